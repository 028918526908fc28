"""Encoded images in a column of parquet files: `parquet:GLOB`. Opened by `data/sources.py`.

The helpers below are shared with lists that are parquet files (`data/folders.py`).
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
from jaxtyping import Int64

from dinojax.data import storage
from dinojax.data.decode import READING_OPTIONS, EncodedSource, UnreadableImage, read_options
from dinojax.data.options import check_options, nearest, number_classes

HELD_BYTES = 1 << 30  # encoded parquet images kept in memory, per process


@dataclass(frozen=True, kw_only=True)
class ParquetSource(EncodedSource):
    """Encoded images in a binary column; row groups are read when first touched and then kept.

    At most HELD_BYTES of them stay in memory (and one row group more for each thread that reads);
    beyond that the least recently used is dropped, and an access costs reading one row group.
    """

    where: str
    options: Mapping[str, str]
    column: str
    groups: tuple[pads.Fragment, ...] = field(repr=False)  # one per row group
    folders: tuple[str, ...] = field(repr=False)  # where the file of each lies
    starts: Int64[np.ndarray, " groups"] = field(repr=False)  # first row of each
    rows: Int64[np.ndarray, " n"] = field(repr=False)  # rows of the split
    held: OrderedDict[int, pa.ChunkedArray] = field(default_factory=OrderedDict, repr=False)
    lock: Any = field(default_factory=threading.Lock, repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    def __reduce__(self) -> tuple:
        # A worker process reads the files itself instead of receiving them through a pipe.
        return _reopen, (self.where, dict(self.options), len(self))

    def encoded(self, i: int) -> bytes | pa.Buffer:
        group = int(np.searchsorted(self.starts, self.rows[i], side="right")) - 1
        try:
            image = self._group(group)[int(self.rows[i] - self.starts[group])]
            if isinstance(image, pa.StructScalar) and image.is_valid:
                path = image["path"].as_py() if "path" in image else None
                image = image["bytes"]
                if not image.is_valid and path:
                    return storage.read(storage.beside(self.folders[group], path))
            data = image.as_buffer() if image.is_valid else None
        except OSError as error:
            raise UnreadableImage(f"{self.name(i)}: {error}") from error
        if data is None:
            raise UnreadableImage(f"{self.name(i)}: the row holds no image")
        return data

    def _group(self, group: int) -> pa.ChunkedArray:
        with self.lock:
            if group in self.held:
                self.held.move_to_end(group)
                return self.held[group]
        fragment = self.groups[group]
        table = storage.call(fragment.path, lambda: fragment.to_table(columns=[self.column]))
        column = table.column(0)
        with self.lock:
            self.held[group] = column
            while len(self.held) > 1 and sum(c.nbytes for c in self.held.values()) > HELD_BYTES:
                self.held.popitem(last=False)
        return column

    def name(self, i: int) -> str:
        return f"{self.where}#{self.rows[i]}"


def open_parquet(where: str, options: Mapping[str, str]) -> ParquetSource:
    """Rows of all matching files in order; `split` keeps the rows whose `split` column says so.

    The column `image` holds encoded images, or Hugging Face's {bytes, path}: where the bytes are
    missing, the path (relative to the parquet file) is read.
    """
    check_options("parquet", options, ("split", "image", "label", *READING_OPTIONS))
    reading = read_options(options)
    what = f"parquet source: {where!r}"
    try:
        files = storage.matching(where)
    except OSError as error:
        raise ValueError(f"parquet source: {error}.") from error
    if not files:
        raise ValueError(f"parquet source: no file matches {where!r}.")
    data = open_files(files, what)
    groups, folders = [], []
    try:
        for file, fragment in zip(files, data.get_fragments(), strict=True):
            groups += storage.call(file, fragment.split_by_row_group)
            folders += [storage.folder(file)] * (len(groups) - len(folders))
    except OSError as error:
        raise ValueError(f"{what} cannot be read ({error}).") from error
    image = _column(data.schema, options.get("image", "image"), what)
    if not _holds_images(data.schema.field(image).type):
        raise ValueError(
            f"{what} holds {data.schema.field(image).type} in its column {image!r}, expected "
            f"encoded image bytes (binary)."
        )
    rows = split_rows(data, options, what)
    if not len(rows):
        raise ValueError(f"{what} has no rows.")
    classes, targets = read_labels(data, rows, options, what)
    sizes = [group.row_groups[0].num_rows for group in groups]
    return ParquetSource(
        where=where,
        options=dict(options),
        classes=classes,
        targets=targets,
        reading=reading,
        column=image,
        groups=tuple(groups),
        folders=tuple(folders),
        starts=np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64),
        rows=rows,
    )


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _reopen(where: str, options: Mapping[str, str], count: int) -> ParquetSource:
    source = open_parquet(where, options)
    if len(source) != count:
        raise ValueError(f"parquet source: {where!r} had {count} rows and now has {len(source)}.")
    return source


# ---- shared with lists; `what` begins their sentences: "parquet source: 'x.parquet'" -------------


def open_files(files: list[str], what: str) -> pads.Dataset:
    """Parquet files as one table that is not yet read; ValueError if they are none."""
    try:
        fs, paths = None, files  # arrow's own reads local files faster
        if not storage.local(files[0]):
            fs, _ = storage.filesystem(files[0])
            paths = [storage.filesystem(file)[1] for file in files]
        return storage.call(files[0], lambda: pads.dataset(paths, format="parquet", filesystem=fs))
    except OSError as error:
        raise ValueError(f"{what} cannot be read ({error}).") from error


def split_rows(
    data: pads.Dataset, options: Mapping[str, str], what: str
) -> Int64[np.ndarray, " n"]:
    """Numbers of the rows whose `split` column says what the option `split` does; else all."""
    if "split" not in options:
        return np.arange(data.count_rows())
    splits = data.to_table(columns=[_column(data.schema, "split", what)]).column(0)
    rows = np.flatnonzero(pc.equal(splits, options["split"]).fill_null(False).to_numpy())
    if not len(rows):
        names = sorted(str(s) for s in pc.unique(splits).to_pylist())
        hint = nearest(options["split"], names)
        raise ValueError(f"{what} has no row of split {options['split']!r}; {hint}")
    return rows


def texts(data: pads.Dataset, name: str, what: str) -> pa.ChunkedArray:
    """A column of texts, as bytes."""
    column = data.to_table(columns=[_column(data.schema, name, what)]).column(0)
    if not _is_text(column.type) or column.null_count:
        raise ValueError(
            f"{what} holds {column.type} with {column.null_count} nulls in its column {name!r}, "
            f"expected text in every row."
        )
    return column.cast(pa.large_string()).cast(pa.large_binary())


def read_labels(
    data: pads.Dataset, rows: Int64[np.ndarray, " n"], options: Mapping[str, str], what: str
) -> tuple[tuple[str, ...] | None, Int64[np.ndarray, " n"] | None]:
    """Classes and numbers of the rows, from the column `label` (or the one the option names).

    Whole numbers, with names if the file's metadata hold any; or texts.
    """
    if "label" not in options and "label" not in data.schema.names:
        return None, None
    label = _column(data.schema, options.get("label", "label"), what)
    column = data.to_table(columns=[label]).column(0)
    if pa.types.is_integer(column.type) and not column.null_count:
        names = {_class_names(part.physical_schema, label) for part in data.get_fragments()}
        if len(names) > 1:  # the first file's would be given to all
            raise ValueError(
                f"{what}: its files name the classes of {label!r} differently; open those of one "
                f"list of classes at a time, or as components of a mixture."
            )
        return names.pop(), column.to_numpy().astype(np.int64)[rows]
    if _is_text(column.type) and not column.null_count:
        classes, targets = number_classes(column)
        return classes, targets[rows]
    raise ValueError(
        f"{what} holds {column.type} with {column.null_count} nulls in its label column "
        f"{label!r}, expected integers or strings in every row."
    )


def _class_names(schema: pa.Schema, label: str) -> tuple[str, ...] | None:
    """The JSON list `classes` of the metadata, or the names of a Hugging Face ClassLabel."""
    metadata = schema.metadata or {}
    names = json.loads(metadata.get(b"classes", b"null"))
    if b"huggingface" in metadata and names is None:
        features = json.loads(metadata[b"huggingface"]).get("info", {}).get("features", {})
        names = features.get(label, {}).get("names")
    return tuple(str(name) for name in names) if names else None


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _column(schema: pa.Schema, name: str, what: str) -> str:
    if name not in schema.names:
        raise ValueError(f"{what} has no column {name!r}; {nearest(name, schema.names)}")
    return name
