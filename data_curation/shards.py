"""One shard of an embedding set: `.npy`, Parquet, or an array in memory. Read by `embeddings.py`.

A shard knows its `n`, `dim` and `dtype` from the head of its file. `reader()` gives a function from
sorted row numbers of the shard to vectors as they are stored; `table(columns)` its ids and
metadata. Files are read by ranges and by batches, never mapped: mapped pages count as memory used.
"""

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Float16, Float32, Float64, Int64

from dinojax.data import storage
from dinojax.data.options import nearest

EMBEDDING, ID = "embedding", "id"
Stored = (
    Float16[np.ndarray, "m d"] | Float32[np.ndarray, "m d"] | Float64[np.ndarray, "m d"]
)  # what files hold; float64 is accepted and narrowed
Reader = Callable[[Int64[np.ndarray, " m"]], Stored]

_GAP = 1 << 16  # bytes between two rows that are cheaper to read than to skip
_BATCH = 8192  # rows of a Parquet file decoded at a time


@dataclass(frozen=True, eq=False)
class ArrayShard:
    """Vectors in memory; ids are row numbers."""

    array: Float[np.ndarray, "n d"] = field(repr=False)
    path = "memory"
    columns: tuple[str, ...] = ()

    @property
    def n(self) -> int:
        return len(self.array)

    @property
    def dim(self) -> int:
        return self.array.shape[1]

    @property
    def dtype(self) -> str:
        return self.array.dtype.name

    def reader(self) -> Reader:
        # Rows one after another, the common case, need no copy.
        return lambda rows: self.array[slice(rows[0], rows[-1] + 1) if _run(rows) else rows]

    def table(self, columns: Sequence[str]) -> pa.Table:
        return pa.table({})


@dataclass(frozen=True)
class NpyShard:
    """A `.npy` of vectors, with a Parquet file of ids and metadata beside it or none."""

    path: str
    n: int
    dim: int
    dtype: str
    offset: int  # bytes before the first row
    meta: str | None
    columns: tuple[str, ...]

    def reader(self) -> Reader:
        return self._read

    def _read(self, rows: Int64[np.ndarray, " m"]) -> Stored:
        width = self.dim * np.dtype(self.dtype).itemsize
        cuts = np.flatnonzero(np.diff(rows) * width > _GAP) + 1
        parts = []
        for run in np.split(rows, cuts):
            start, stop = int(run[0]), int(run[-1]) + 1
            data = storage.read_range(
                self.path, self.offset + start * width, self.offset + stop * width
            )
            if len(data) != (stop - start) * width:
                raise ValueError(f"{self.path} ends before its row {stop - 1}; it has changed.")
            block = np.frombuffer(data, self.dtype).reshape(-1, self.dim)
            parts.append(block if _run(run) else block[run - start])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def table(self, columns: Sequence[str]) -> pa.Table:
        return pa.table({}) if self.meta is None else _read_columns(self.meta, columns)


@dataclass(frozen=True)
class ParquetShard:
    """A Parquet file with a column `embedding`; its other columns are ids and metadata."""

    path: str
    n: int
    dim: int
    dtype: str
    columns: tuple[str, ...]

    def reader(self) -> Reader:
        return _ParquetReader(self)

    def table(self, columns: Sequence[str]) -> pa.Table:
        return _read_columns(self.path, columns)


class _ParquetReader:
    """Reads on from where the last call ended, so that a pass decodes every row once."""

    def __init__(self, shard: ParquetShard) -> None:
        self.shard, self.file = shard, _open_parquet(shard.path)
        groups = self.file.metadata
        sizes = [groups.row_group(g).num_rows for g in range(groups.num_row_groups)]
        self.starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        if self.starts[-1] != shard.n:
            raise ValueError(
                f"{shard.path} holds {self.starts[-1]} rows and had {shard.n} when it was opened; "
                f"run `python -m data_curation index` again."
            )
        self.batches, self.group = iter(()), -1
        self.first, self.block = 0, np.empty((0, shard.dim), shard.dtype)

    def __call__(self, rows: Int64[np.ndarray, " m"]) -> Stored:
        out = np.empty((len(rows), self.shard.dim), self.shard.dtype)
        done = 0
        while done < len(rows):
            row = int(rows[done])
            if not self.first <= row < self.first + len(self.block):
                self._seek(row)
            here = int(np.searchsorted(rows, self.first + len(self.block)))
            out[done:here] = self.block[rows[done:here] - self.first]
            done = here
        return out

    def _seek(self, row: int) -> None:
        group = int(np.searchsorted(self.starts, row, side="right")) - 1
        if group != self.group or row < self.first:
            self.batches = self.file.iter_batches(
                _BATCH, row_groups=[group], columns=[EMBEDDING], use_threads=False
            )
            self.group, self.first, self.block = group, int(self.starts[group]), self.block[:0]
        while row >= self.first + len(self.block):
            self.first += len(self.block)
            batch = storage.call(self.shard.path, next, self.batches)
            self.block = _vectors(batch.column(0), self.shard, self.first)


def _vectors(column: pa.Array, shard: ParquetShard, first: int) -> Stored:
    values = column.flatten()
    lengths_differ = not pa.types.is_fixed_size_list(column.type) and np.any(
        np.diff(column.offsets.to_numpy()) != shard.dim
    )
    if column.null_count or values.null_count or lengths_differ:
        bad = next(
            i
            for i, row in enumerate(column)
            if not row.is_valid or len(row) != shard.dim or row.values.null_count
        )
        raise ValueError(
            f"{shard.path}: row {first + bad} of the shard holds no vector of {shard.dim} numbers; "
            f"leave it out or write NaN, which is counted and skipped."
        )
    return values.to_numpy(zero_copy_only=False).reshape(-1, shard.dim)


Shard = ArrayShard | NpyShard | ParquetShard


def open_shard(path: str, meta: str | None = None) -> NpyShard | ParquetShard:
    """A shard from the head of its file.

    Args:
      path: a `.npy` or `.parquet`, local or a URL.
      meta: for `.npy`, the Parquet file with `id` and metadata of the same rows.

    Raises:
      ValueError: one sentence with the path: not readable, no vectors, ragged, ids of other rows.
    """
    try:
        return _open_npy(path, meta) if path.endswith(".npy") else _open_parquet_shard(path)
    except OSError as error:
        raise ValueError(f"embeddings: {error}.") from error


def _open_npy(path: str, meta: str | None) -> NpyShard:
    head = io.BytesIO(storage.read_range(path, 0, min(storage.size(path), 1 << 14)))
    try:
        version = np.lib.format.read_magic(head)
        read_header = getattr(np.lib.format, f"read_array_header_{version[0]}_{version[1]}")
        shape, columns_first, dtype = read_header(head)
    except (AttributeError, ValueError) as error:
        raise ValueError(f"embeddings: {path} is no .npy file ({error}).") from error
    if len(shape) != 2 or dtype.kind != "f" or min(shape) < 1 or columns_first:
        order = ", in Fortran order" if columns_first else ""
        raise ValueError(
            f"embeddings: {path} holds {dtype} {list(shape)}{order}, expected float16 or float32 "
            f"[rows, dimensions] in C order."
        )
    n, dim = shape
    expected = head.tell() + n * dim * dtype.itemsize
    if storage.size(path) != expected:
        raise ValueError(
            f"embeddings: {path} has {storage.size(path)} bytes and its head promises {expected}; "
            f"it was not written to its end."
        )
    columns: tuple[str, ...] = ()
    if meta is not None:
        file = _open_parquet(meta)
        columns = tuple(file.schema_arrow.names)
        if file.metadata.num_rows != n:
            raise ValueError(
                f"embeddings: {meta} has {file.metadata.num_rows} rows and {path} has {n}."
            )
        if ID not in columns:
            raise ValueError(f"embeddings: {meta} has no column 'id'; {nearest(ID, columns)}")
    return NpyShard(path, n, dim, dtype.str, head.tell(), meta, columns)


def _open_parquet_shard(path: str) -> ParquetShard:
    file = _open_parquet(path)
    names = file.schema_arrow.names
    for name in (EMBEDDING, ID):
        if name not in names:
            raise ValueError(f"embeddings: {path} has no column {name!r}; {nearest(name, names)}")
    kind = file.schema_arrow.field(EMBEDDING).type
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if not any(is_list(kind) for is_list in lists) or not pa.types.is_floating(kind.value_type):
        raise ValueError(
            f"embeddings: column 'embedding' of {path} holds {kind}, expected "
            f"fixed_size_list<float16 or float32>."
        )
    n = file.metadata.num_rows
    if n < 1:
        raise ValueError(f"embeddings: {path} has no rows.")
    if pa.types.is_fixed_size_list(kind):
        dim = kind.list_size
    else:  # lists of any length: the first row says how long all must be
        batch = next(file.iter_batches(1, columns=[EMBEDDING], use_threads=False))
        dim = len(batch.column(0).flatten())
    if dim < 1:
        raise ValueError(f"embeddings: {path} holds vectors of no dimensions.")
    dtype = np.dtype(kind.value_type.to_pandas_dtype()).str
    columns = tuple(name for name in names if name != EMBEDDING)
    return ParquetShard(path, n, dim, dtype, columns)


def _open_parquet(path: str) -> pq.ParquetFile:
    def opened() -> pq.ParquetFile:
        # Arrow's own reading of local files is faster than through a file object of Python's.
        plain = os.path.expanduser(path)
        file = plain if storage.local(path) else storage.open_file(path)
        return pq.ParquetFile(file, pre_buffer=not storage.local(path))

    return storage.call(path, opened)


def _read_columns(path: str, columns: Sequence[str]) -> pa.Table:
    return storage.call(path, lambda: _open_parquet(path).read(list(columns)))


def _run(rows: Int64[np.ndarray, " m"]) -> bool:
    """Whether sorted, distinct or repeated, rows follow one another without a gap."""
    return int(rows[-1]) - int(rows[0]) + 1 == len(rows) and bool(np.all(np.diff(rows) == 1))
