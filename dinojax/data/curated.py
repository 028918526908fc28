"""Rows of other sources, chosen by data curation: `curated:FILE`. Opened by `data/sources.py`.

FILE is the `samples.parquet` that curation writes: `row` is an image's number in the source that
`source` names, `count` how often it comes. A `mixture.json` lists several such files: a run mixes
them (`data/mixture.py`, through `read_mixture`), a source is one of them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Int, Int32, Int64, UInt8

from dinojax.data import storage
from dinojax.data.options import check_options, nearest, number_classes
from dinojax.data.sources import Source, open_source


@dataclass(frozen=True, kw_only=True)
class CuratedSource:
    """Chosen rows of one or more sources; a row that counts k times is k images.

    In memory: 8 bytes a row of the file, 8 more if any counts more than once, 8 if the file holds
    labels, 4 if it names several sources.
    """

    where: str
    options: Mapping[str, str]
    sources: tuple[Source, ...]
    rows: Int64[np.ndarray, " m"] = field(repr=False)  # number in its source
    which: Int32[np.ndarray, " m"] | None = field(repr=False)  # its source; None: all of the first
    ends: Int64[np.ndarray, " m"] | None = field(repr=False)  # cumulative counts; None: all are 1
    classes: tuple[str, ...] | None
    targets: Int64[np.ndarray, " m"] | None = field(repr=False)  # None: the sources know

    def __len__(self) -> int:
        return len(self.rows) if self.ends is None else int(self.ends[-1])

    def __reduce__(self) -> tuple:
        # A worker process reads the file itself instead of receiving it through a pipe.
        return _reopen, (self.where, dict(self.options), self.sources, len(self))

    def encoded(self, i: int) -> bytes | pa.Buffer:
        source, row = self._place(i)
        return source.encoded(row)

    def image(self, i: int) -> UInt8[np.ndarray, "i j c"]:
        source, row = self._place(i)
        return source.image(row)

    def label(self, i: int) -> int | None:
        if self.targets is not None:
            return int(self.targets[self._chosen(i)])
        source, row = self._place(i)
        return source.label(row) if self._agree() else None

    def labels(self) -> Int[np.ndarray, " n"] | None:
        targets = self.targets
        if targets is None:
            targets = self._sources_labels()
        if targets is None or self.ends is None:
            return targets
        return np.repeat(targets, np.diff(self.ends, prepend=0))

    def _agree(self) -> bool:
        """Whether all sources mean the same by their labels."""
        return len({source.classes for source in self.sources}) == 1

    def _sources_labels(self) -> Int[np.ndarray, " m"] | None:
        labels = [source.labels() for source in self.sources] if self._agree() else [None]
        if any(of_source is None for of_source in labels):
            return None
        if self.which is None:
            return labels[0][self.rows]
        targets = np.empty(len(self.rows), np.int64)
        for number, of_source in enumerate(labels):
            here = self.which == number
            targets[here] = of_source[self.rows[here]]
        return targets

    def name(self, i: int) -> str:
        source, row = self._place(i)
        return source.name(row)

    def _chosen(self, i: int) -> int:
        """The row of the file that image `i` is."""
        return i if self.ends is None else int(np.searchsorted(self.ends, i, side="right"))

    def _place(self, i: int) -> tuple[Source, int]:
        chosen = self._chosen(i)
        source = 0 if self.which is None else int(self.which[chosen])
        return self.sources[source], int(self.rows[chosen])


def open_curated(where: str, options: Mapping[str, str]) -> CuratedSource:
    """All rows of the file in order, repeated by their `count`.

    The sources are SPECs: of the option `source` (percent-encoded, as it may hold `?` and `&`),
    else of the file's schema metadata `source`, else of the column `source`. Labels are the column
    `label`, else the sources' own. Of a mixture, `component` names the part that is meant.
    """
    check_options("curated", options, ("component", "source"))
    if where.endswith(".json"):
        file = _component(where, options.get("component"))
    elif "component" in options:
        raise ValueError(f"curated source: {where!r} is no mixture.json and has no component.")
    else:
        file = where
    return _open(file, where, options, None)


def _reopen(
    where: str, options: Mapping[str, str], sources: tuple[Source, ...], count: int
) -> CuratedSource:
    file = _component(where, options["component"]) if "component" in options else where
    source = _open(file, where, options, sources)
    if len(source) != count:
        raise ValueError(f"curated source: {where!r} had {count} images, now {len(source)}.")
    return source


def _open(
    file: str, where: str, options: Mapping[str, str], sources: tuple[Source, ...] | None
) -> CuratedSource:
    table = _read(file)
    rows = _integers(table, "row", 0, file)
    counts = _integers(table, "count", 1, file) if "count" in table.column_names else None
    repeated = counts is not None and counts.max() > 1
    specs, which = _specs(table, options, file)
    if sources is None:
        sources = tuple(_open_spec(spec, file) for spec in specs)
    lengths = np.array([len(source) for source in sources])
    outside = np.flatnonzero(rows >= (lengths[0] if which is None else lengths[which]))
    if len(outside):
        source = 0 if which is None else which[outside[0]]
        raise ValueError(
            f"curated source: {file!r} chooses row {rows[outside[0]]} of {specs[source]!r}, which "
            f"has {lengths[source]} images."
        )
    classes, targets = _labels(table, file)
    if targets is None and len({source.classes for source in sources}) == 1:
        classes = sources[0].classes
    return CuratedSource(
        where=where,
        options=dict(options),
        sources=sources,
        rows=rows,
        which=which,
        ends=np.cumsum(counts) if repeated else None,
        classes=classes,
        targets=targets,
    )


def _read(file: str) -> pa.Table:
    try:
        with storage.open_file(file) as stream:
            parquet = pq.ParquetFile(stream)
            names = parquet.schema_arrow.names
            if "row" not in names:
                raise ValueError(
                    f"curated source: {file!r} has no column 'row'; {nearest('row', names)}"
                )
            metadata = parquet.schema_arrow.metadata or {}
            wanted = ["row", "count", "label"] + ["source"] * (b"source" not in metadata)
            table = parquet.read(columns=[name for name in wanted if name in names])
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"curated source: {file!r} cannot be read ({error}).") from error
    if not len(table):
        raise ValueError(f"curated source: {file!r} has no rows.")
    return table


def _integers(table: pa.Table, name: str, least: int, file: str) -> Int64[np.ndarray, " m"]:
    column = table.column(name)
    if not pa.types.is_integer(column.type) or column.null_count:
        raise ValueError(
            f"curated source: column {name!r} of {file!r} holds {column.type} with "
            f"{column.null_count} nulls, expected integers."
        )
    found = column.to_numpy().astype(np.int64)
    if found.min() < least:
        raise ValueError(
            f"curated source: column {name!r} of {file!r} holds {found.min()}, expected {least} "
            f"or more."
        )
    return found


def _specs(
    table: pa.Table, options: Mapping[str, str], file: str
) -> tuple[list[str], Int32[np.ndarray, " m"] | None]:
    """The sources' SPECs, and which of them each row is of (None: the only one)."""
    told = (table.schema.metadata or {}).get(b"source")
    if "source" in options or told:
        return [options["source"] if "source" in options else told.decode()], None
    if "source" not in table.column_names:
        raise ValueError(
            f"curated source: {file!r} does not say which source its rows are of; add "
            f"'?source=SPEC' (percent-encoded)."
        )
    column = table.column("source")
    if column.null_count or not (
        pa.types.is_string(column.type) or pa.types.is_dictionary(column.type)
    ):
        raise ValueError(
            f"curated source: column 'source' of {file!r} holds {column.type} with "
            f"{column.null_count} nulls, expected the SPEC of a source in every row."
        )
    specs = pc.unique(column.cast(pa.string())).sort()
    if len(specs) == 1:
        return specs.to_pylist(), None
    which = pc.index_in(column.cast(pa.string()), value_set=specs)
    return specs.to_pylist(), which.to_numpy()


def _open_spec(spec: str, file: str) -> Source:
    try:
        return open_source(spec)
    except ValueError as error:
        raise ValueError(
            f"curated source: {file!r} chooses rows of {spec!r} (?source= names others): {error}"
        ) from error


def _labels(
    table: pa.Table, file: str
) -> tuple[tuple[str, ...] | None, Int64[np.ndarray, " m"] | None]:
    """Classes and one label a row, where the file holds any."""
    if "label" not in table.column_names:
        return None, None
    column = table.column("label")
    if pa.types.is_string(column.type) and not column.null_count:
        return number_classes(column)
    classes = (table.schema.metadata or {}).get(b"classes")
    return classes and tuple(json.loads(classes)), _integers(table, "label", -1, file)


# ---- mixtures ----------------------------------------------------------------------------------


class Component(NamedTuple):
    """A part of a mixture.json."""

    name: str
    samples: str  # its samples.parquet
    weight: float | None  # in heterogeneous batches; None: by its size
    homogeneous: float  # probability of a batch of it alone


def read_mixture(path: str) -> list[Component]:
    """The parts of a mixture.json that are ever drawn, in its order; ValueError if it is not one.

    A part has the weight that the list `heterogeneous.weights` gives it (`"size"`: None), and 0 if
    `heterogeneous.components` leaves it out; without `heterogeneous`, its own `weight`.
    """
    return [part for part in _parts(path) if part.weight != 0 or part.homogeneous > 0]


def _parts(path: str) -> list[Component]:
    try:
        mixture = json.loads(storage.read(path))
        parts = {part["name"]: part for part in mixture["components"]}
        alone = {
            part["component"]: float(part["probability"]) for part in mixture.get("homogeneous", ())
        }
        together = mixture.get("heterogeneous")
        if together is None:
            weights = {name: part.get("weight") for name, part in parts.items()}
        elif together.get("weights", "size") == "size":
            weights = dict.fromkeys(together["components"])
        else:
            weights = dict(zip(together["components"], together["weights"], strict=True))
        weights = {name: None if of is None else float(of) for name, of in weights.items()}
        files = {name: part["samples"] for name, part in parts.items()}
        if len(files) < len(mixture["components"]):
            raise ValueError("two components have one name")
    except OSError as error:
        raise ValueError(f"mixture: {path!r} cannot be read ({error}).") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"mixture: {path!r} is no mixture.json of data curation ({error!r})."
        ) from error
    for name in (*alone, *weights):
        if name not in parts:
            raise ValueError(
                f"mixture: {path!r} draws from {name!r}, which is none of its components; "
                f"{nearest(name, parts)}"
            )
    folder = storage.folder(path)
    return [
        Component(name, storage.beside(folder, file), weights.get(name, 0.0), alone.get(name, 0.0))
        for name, file in files.items()
    ]


def _component(path: str, name: str | None) -> str:
    """The samples.parquet of one component of a mixture."""
    files = {part.name: part.samples for part in _parts(path)}
    if name is None:
        raise ValueError(
            f"curated source: {path!r} is a mixture of {', '.join(files)}; choose one of them with "
            f"'?component=NAME', or train on all with config.data.source."
        )
    if name not in files:
        raise ValueError(
            f"curated source: {path!r} has no component {name!r}; {nearest(name, files)}"
        )
    return files[name]
