"""Encoded images in a column of parquet files: `parquet:GLOB`. Opened by `data/sources.py`."""

import glob
import json
import os
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

from dinojax.data.decode import EncodedSource, UnreadableImage
from dinojax.data.options import check_options, nearest, number_classes

HELD_BYTES = 1 << 30  # encoded parquet images kept in memory, per process


@dataclass(frozen=True, kw_only=True)
class ParquetSource(EncodedSource):
    """Encoded images in a binary column; row groups are read when first touched and then kept.

    At most HELD_BYTES of them stay in memory; beyond that the least recently used is dropped, and
    an access costs reading one row group.
    """

    where: str
    options: Mapping[str, str]
    column: str
    groups: tuple[pads.Fragment, ...] = field(repr=False)  # one per row group
    starts: Int64[np.ndarray, " groups"] = field(repr=False)  # first row of each
    rows: Int64[np.ndarray, " n"] = field(repr=False)  # rows of the split
    held: OrderedDict[int, pa.ChunkedArray] = field(default_factory=OrderedDict, repr=False)
    lock: Any = field(default_factory=threading.Lock, repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    def __reduce__(self) -> tuple:
        # A worker process reads the files itself instead of receiving them through a pipe.
        return _reopen, (self.where, dict(self.options), len(self))

    def encoded(self, i: int) -> pa.Buffer:
        group = int(np.searchsorted(self.starts, self.rows[i], side="right")) - 1
        try:
            data = self._group(group)[int(self.rows[i] - self.starts[group])].as_buffer()
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
        column = self.groups[group].to_table(columns=[self.column]).column(0)
        with self.lock:
            self.held[group] = column
            while len(self.held) > 1 and sum(c.nbytes for c in self.held.values()) > HELD_BYTES:
                self.held.popitem(last=False)
        return column

    def name(self, i: int) -> str:
        return f"{self.where}#{self.rows[i]}"


def open_parquet(where: str, options: Mapping[str, str]) -> ParquetSource:
    """Rows of all matching files in order; `split` keeps the rows whose `split` column says so."""
    check_options("parquet", options, ("split", "image", "label"))
    files = sorted(glob.glob(os.path.expanduser(where), recursive=True))
    if not files:
        raise ValueError(f"parquet source: no file matches {where!r}.")
    try:
        data = pads.dataset(files, format="parquet")
        groups = tuple(g for f in data.get_fragments() for g in f.split_by_row_group())
        sizes = [g.row_groups[0].num_rows for g in groups]
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"parquet source: {where!r} cannot be read ({error}).") from error
    schema = data.schema
    image = _column(schema, options.get("image", "image"), where)
    kind = schema.field(image).type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise ValueError(
            f"parquet source: column {image!r} of {where!r} holds {kind}, "
            f"expected encoded image bytes (binary)."
        )
    rows = np.arange(sum(sizes))
    if "split" in options:
        splits = data.to_table(columns=[_column(schema, "split", where)]).column(0)
        rows = np.flatnonzero(pc.equal(splits, options["split"]).fill_null(False).to_numpy())
        if not len(rows):
            names = sorted(str(s) for s in pc.unique(splits).to_pylist())
            hint = nearest(options["split"], names)
            raise ValueError(
                f"parquet source: no row of {where!r} has split {options['split']!r}; {hint}."
            )
    if not len(rows):
        raise ValueError(f"parquet source: {where!r} has no rows.")
    classes = targets = None
    if "label" in options or "label" in schema.names:
        label = _column(schema, options.get("label", "label"), where)
        classes, targets = _labels(data, label, rows, where)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
    return ParquetSource(
        where=where,
        options=dict(options),
        classes=classes,
        targets=targets,
        column=image,
        groups=groups,
        starts=starts,
        rows=rows,
    )


def _labels(
    data: pads.Dataset, label: str, rows: Int64[np.ndarray, " n"], where: str
) -> tuple[tuple[str, ...] | None, Int64[np.ndarray, " n"]]:
    """Integers, named by the JSON list `classes` of the schema metadata; or strings."""
    column = data.to_table(columns=[label]).column(0)
    if pa.types.is_integer(column.type) and not column.null_count:
        known = (data.schema.metadata or {}).get(b"classes")
        classes = tuple(str(c) for c in json.loads(known)) if known else None
        return classes, column.to_numpy().astype(np.int64)[rows]
    if pa.types.is_string(column.type) and not column.null_count:
        classes, targets = number_classes(column.to_pylist())
        return classes, targets[rows]
    raise ValueError(
        f"parquet source: label column {label!r} of {where!r} holds {column.type} with "
        f"{column.null_count} nulls, expected integers or strings in every row."
    )


def _reopen(where: str, options: Mapping[str, str], count: int) -> ParquetSource:
    source = open_parquet(where, options)
    if len(source) != count:
        raise ValueError(f"parquet source: {where!r} had {count} rows and now has {len(source)}.")
    return source


def _column(schema: pa.Schema, name: str, where: str) -> str:
    if name not in schema.names:
        hint = nearest(name, schema.names)
        raise ValueError(f"parquet source: {where!r} has no column {name!r}; {hint}.")
    return name
