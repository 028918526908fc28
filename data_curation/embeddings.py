"""Embedding sets: vectors with ids, on disk or in memory, read in blocks of bounded memory.

Every stage takes an array or an `EmbeddingSet` and calls `as_embeddings` first. A set is a folder
with `manifest.json` and shards (data curation spec, section 2), a single `.npy` or `.parquet`, or
an array; restricted to some rows (what deduplication kept) and preprocessed on the way out.

    row       number in the full set: shard offset + place in the shard; what files hold
    position  number in the set at hand: the same, unless it is restricted to a subset
"""

import hashlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Array as JaxArray
from jaxtyping import Float, Float32, Int, Int64

from data_curation.manifest import EmbeddingWriter as EmbeddingWriter
from data_curation.manifest import index as index
from data_curation.manifest import open_shards
from data_curation.shards import ID, ArrayShard, Reader, Shard
from dinojax.data import storage
from dinojax.data.options import nearest

BATCH_ROWS = 65_536
_AHEAD = 2  # blocks prepared while one is in use
_WHOLE_BYTES = 1 << 30  # a set up to this size is hashed whole, a larger one in samples
_SAMPLE_BYTES, _SAMPLES = 1 << 16, 16


@dataclass(frozen=True, kw_only=True, eq=False)
class EmbeddingSet:
    """Vectors of `dim` numbers; len() counts positions. Made by `open_embeddings`/`as_embeddings`.

    Attributes:
      rows: sorted rows that belong to it; None: all `n_total`.
      normalize: "none", or "l2": rows are scaled to length 1 (before centring).
      mean: subtracted from every row; None: nothing is.
      manifest: of the folder it was opened from, else {}.
    """

    dim: int
    n_total: int
    shards: tuple[Shard, ...] = field(repr=False)
    rows: Int64[np.ndarray, " n"] | None = field(default=None, repr=False)
    normalize: str = "none"
    mean: Float32[np.ndarray, " d"] | None = field(default=None, repr=False)
    where: str = "memory"
    manifest: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return self.n_total if self.rows is None else len(self.rows)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the metadata columns, without `id`."""
        names = dict.fromkeys(name for shard in self.shards for name in shard.columns)
        return tuple(name for name in names if name != ID)

    def row_of(self, positions: Int[np.ndarray, " m"]) -> Int64[np.ndarray, " m"]:
        """Rows of the full set at these positions."""
        positions = np.asarray(positions, np.int64)
        return positions if self.rows is None else self.rows[positions]

    def position_of(self, rows: Int[np.ndarray, " m"]) -> Int64[np.ndarray, " m"]:
        """Positions of rows of the full set that belong to this one."""
        rows = np.asarray(rows, np.int64)
        return rows if self.rows is None else np.searchsorted(self.rows, rows)

    def blocks(
        self, batch_rows: int = BATCH_ROWS, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[int, Float32[np.ndarray, "b d"]]]:
        """(first position, vectors) of positions [start, stop), all of `batch_rows` but the last.

        Two blocks are read ahead in a thread; nothing else is held. Blocks may share memory with
        the caller's array: do not write to them.

        Raises:
          ValueError: a row that is not finite, or is zero and must be normalised, with its shard.
        """
        stop = len(self) if stop is None else min(stop, len(self))
        firsts = range(start, stop, batch_rows)
        readers = _Readers(self)

        def block(first: int) -> tuple[int, np.ndarray]:
            last = min(first + batch_rows, stop)
            rows = self.row_of(np.arange(first, last))
            return first, _prepare(readers.read(rows), rows, self)

        if len(self.shards) == 1 and isinstance(self.shards[0], ArrayShard):
            yield from map(block, firsts)
            return
        with ThreadPoolExecutor(1, "embeddings") as thread:
            waiting: deque = deque()
            try:
                for first in firsts:
                    waiting.append(thread.submit(block, first))
                    if len(waiting) > _AHEAD:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:  # the caller has seen enough, or a block cannot be read
                for future in waiting:
                    future.cancel()

    def take(self, positions: Int[np.ndarray, " m"]) -> Float32[np.ndarray, "m d"]:
        """Vectors at these positions, in any order and with repeats; reads are sorted inside.

        May share memory with the caller's array, as `blocks` does: do not write to it.
        """
        rows = self.row_of(positions)
        if not len(rows):
            return np.empty((0, self.dim), np.float32)
        if np.all(np.diff(rows) > 0):
            return _prepare(_Readers(self).read(rows), rows, self)
        rows, back = np.unique(rows, return_inverse=True)
        return _prepare(_Readers(self).read(rows), rows, self)[back.reshape(-1)]

    def array(self) -> Float32[np.ndarray, "n d"]:
        """All vectors in memory."""
        whole = np.empty((len(self), self.dim), np.float32)
        for first, block in self.blocks():
            whole[first : first + len(block)] = block
        return whole

    def ids(self, rows: Int[np.ndarray, " m"]) -> pa.Array:
        """Ids of rows of the full set, in the order asked for; row numbers where it has none."""
        if all(ID in shard.columns for shard in self.shards):
            return self.metadata(rows, [ID]).column(0).combine_chunks()
        return pa.array(np.asarray(rows, np.int64))

    def metadata(
        self, rows: Int[np.ndarray, " m"], columns: Sequence[str] | None = None
    ) -> pa.Table:
        """Columns (default: all but `id`) of rows of the full set, in the order asked for.

        Where some shards lack a column, their rows hold nulls. Memory: one shard's columns.

        Raises:
          ValueError: no shard has a column of this name, or its types cannot be reconciled.
        """
        columns = self.columns if columns is None else tuple(columns)
        for name in columns:
            if name not in (ID, *self.columns):
                hint = nearest(name, self.columns) if self.columns else "it has ids only."
                raise ValueError(f"embeddings: {self.where} has no column {name!r}; {hint}")
        rows = np.asarray(rows, np.int64)
        _check_rows(rows, self)
        if not columns or not len(rows):
            empty = pa.table({name: pa.nulls(len(rows)) for name in columns})
            return empty if columns else pa.table({})
        order = np.argsort(rows, kind="stable")
        parts = []
        for shard, local in _by_shard(self.shards, rows[order]):
            here = [name for name in columns if name in shard.columns]
            parts.append(shard.table(here).take(pa.array(local)))
        try:
            table = pa.concat_tables(parts, promote_options="permissive")
        except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
            raise ValueError(
                f"embeddings: shards of {self.where} disagree on the types of their columns "
                f"({error})."
            ) from error
        back = np.empty(len(rows), np.int64)
        back[order] = np.arange(len(rows))
        return table.take(pa.array(back)).select(list(columns))

    def restrict(self, rows: Int[np.ndarray, " m"]) -> "EmbeddingSet":
        """The set with these rows of the full set only: sorted, distinct, and in it now."""
        rows = np.asarray(rows, np.int64)
        _check_rows(rows, self)
        if np.any(np.diff(rows) <= 0):
            raise ValueError("embeddings: the rows of a subset must be sorted and distinct.")
        if self.rows is not None:
            place = np.minimum(np.searchsorted(self.rows, rows), len(self.rows) - 1)
            if len(rows) and (not len(self.rows) or np.any(self.rows[place] != rows)):
                raise ValueError("embeddings: a subset may only have rows of the set it is of.")
        return replace(self, rows=rows)

    def prepared(
        self,
        normalize: str = "none",
        center: bool = False,
        mean: Float[np.ndarray, " d"] | None = None,
    ) -> "EmbeddingSet":
        """The set with rows scaled to length 1 ("l2") or not, then centred or not.

        Replaces earlier preprocessing. The mean is that of this set's (scaled) rows, added up in
        float64 in one pass, unless `mean` is given, which centres with it.
        """
        if normalize not in ("none", "l2"):
            raise ValueError(
                f"normalize is {normalize!r}; {nearest(str(normalize), ('none', 'l2'))}"
            )
        scaled = replace(self, normalize=normalize, mean=None)
        if mean is None and center:
            total = np.zeros(self.dim)
            for _, block in scaled.blocks():
                total += block.sum(axis=0, dtype=np.float64)
            mean = total / max(len(self), 1)
        return scaled if mean is None else replace(scaled, mean=mean.astype(np.float32))

    def digest(self) -> str:
        """Hex digest of the files (metadata too), the subset and the preprocessing.

        A set above 1 GiB is not read whole: 16 pieces of 64 kB of every shard, with its size.
        """
        digest = hashlib.sha256(f"{self.n_total} {self.dim} {self.normalize}".encode())
        total = sum(shard.n * shard.dim for shard in self.shards) * 4
        for shard in self.shards:
            _fingerprint(shard, total <= _WHOLE_BYTES, digest)
        for array in (self.rows, self.mean):
            digest.update(b"all" if array is None else np.ascontiguousarray(array))
        return digest.hexdigest()


class _Readers:
    """Rows of a set as float32; keeps the reader of the shard it was in last."""

    def __init__(self, of: EmbeddingSet) -> None:
        self.of, self.shard, self.reader = of, None, None

    def read(self, rows: Int64[np.ndarray, " m"]) -> Float32[np.ndarray, "m d"]:
        """Sorted rows of the full set."""
        _check_rows(rows, self.of)
        parts = []
        for shard, local in _by_shard(self.of.shards, rows):
            try:
                vectors = self._reader(shard)(local)
            except OSError as error:
                raise ValueError(f"embeddings cannot be read: {error}.") from error
            parts.append(vectors.astype(np.float32, copy=False))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _reader(self, shard: Shard) -> Reader:
        if shard is not self.shard:
            self.shard, self.reader = shard, shard.reader()
        return self.reader


def open_embeddings(path: str, verify: bool = False) -> EmbeddingSet:
    """The set in a folder with `manifest.json`, or of a single `.npy` or `.parquet`; URLs too.

    Row counts and dimensions are compared with every shard's head; with `verify`, SHA-256 sums of
    all bytes too, and ids must be distinct.

    Raises:
      ValueError: one sentence naming the shard: missing, changed, ragged, without a column.
    """
    shards, manifest = open_shards(str(path), verify)
    return EmbeddingSet(
        dim=shards[0].dim,
        n_total=sum(shard.n for shard in shards),
        shards=tuple(shards),
        where=str(path),
        manifest=manifest,
    )


def as_embeddings(
    x: Float[np.ndarray, "n d"] | Float[JaxArray, "n d"] | EmbeddingSet,
) -> EmbeddingSet:
    """An array as a set in memory (ids are its row numbers); a set as it is."""
    if isinstance(x, EmbeddingSet):
        return x
    array = np.asarray(x)
    if array.ndim != 2 or array.dtype.kind not in "fV" or min(array.shape) < 1:
        raise ValueError(
            f"embeddings are {array.dtype} {list(array.shape)}; expected floats [rows, dimensions] "
            f"with at least one row."
        )
    if array.dtype not in (np.float16, np.float32):  # bfloat16, float64
        array = array.astype(np.float32)
    shard = ArrayShard(array)
    return EmbeddingSet(dim=shard.dim, n_total=shard.n, shards=(shard,))


def concatenate(sets: Sequence[EmbeddingSet]) -> EmbeddingSet:
    """Sets one after another: rows of the second begin at the first's `n_total`.

    Raises:
      ValueError: of different widths, or of different embedders where both name theirs.
    """
    for other in sets[1:]:
        check_comparable(sets[0], other)
    starts = np.cumsum([0, *(x.n_total for x in sets)])
    rows = None
    if any(x.rows is not None for x in sets):
        parts = zip(sets, starts)
        rows = np.concatenate([x.row_of(np.arange(len(x))) + start for x, start in parts])
    return EmbeddingSet(
        dim=sets[0].dim,
        n_total=int(starts[-1]),
        shards=tuple(shard for x in sets for shard in x.shards),
        rows=rows,
        where=" and ".join(dict.fromkeys(x.where for x in sets)),
    )


def check_comparable(x: EmbeddingSet, y: EmbeddingSet) -> None:
    """Raise ValueError where vectors of the two sets must not be compared."""
    if x.dim != y.dim:
        raise ValueError(f"{x.where} has vectors of {x.dim} numbers and {y.where} of {y.dim}.")
    made = [of.manifest.get("embedder") for of in (x, y)]
    if all(made) and made[0] != made[1]:
        raise ValueError(
            f"{x.where} was embedded by {made[0]} and {y.where} by {made[1]}; their similarities "
            f"mean nothing."
        )


def find_bad_rows(x: EmbeddingSet, zero: bool = True) -> Int64[np.ndarray, " m"]:
    """Rows (of the full set) that are not finite or, with `zero`, all zeros. One pass."""
    readers, bad = _Readers(x), [np.empty(0, np.int64)]
    for first in range(0, len(x), BATCH_ROWS):
        rows = x.row_of(np.arange(first, min(first + BATCH_ROWS, len(x))))
        bad.append(rows[_bad(readers.read(rows), zero)])
    return np.concatenate(bad)


def _bad(block: Float32[np.ndarray, "b d"], zero: bool) -> np.ndarray:
    bad = ~np.isfinite(block).all(axis=1)
    return bad | ~block.any(axis=1) if zero else bad


def _prepare(
    block: Float32[np.ndarray, "b d"], rows: Int64[np.ndarray, " b"], of: EmbeddingSet
) -> Float32[np.ndarray, "b d"]:
    with np.errstate(all="ignore"):
        # A sum tells of any NaN or infinity at a tenth of the cost of looking at each number.
        fine = np.isfinite(block.sum())
        if of.normalize == "l2":
            norms = np.sqrt(np.einsum("bd,bd->b", block, block, dtype=np.float64))
            fine = fine and norms.min() > 0
    if not fine:
        bad = np.flatnonzero(_bad(block, of.normalize == "l2"))
        if len(bad):
            shard, local = next(iter(_by_shard(of.shards, rows[bad[:1]])))
            what = "zero" if np.isfinite(block[bad[0]]).all() else "not finite"
            raise ValueError(
                f"embeddings: row {rows[bad[0]]} (row {local[0]} of {shard.path}) is {what}; leave "
                f"such rows out first."
            )
    if of.normalize == "l2":
        block = block * (1 / norms)[:, None].astype(np.float32)
    return block if of.mean is None else block - of.mean[None]


def _by_shard(
    shards: Sequence[Shard], rows: Int64[np.ndarray, " m"]
) -> Iterator[tuple[Shard, Int64[np.ndarray, " l"]]]:
    """Sorted rows of the full set -> (shard, its own rows) for every shard touched."""
    ends = np.cumsum([shard.n for shard in shards])
    cuts = np.searchsorted(rows, ends)
    first = 0
    for shard, end, cut in zip(shards, ends, cuts):
        if cut > first:
            yield shard, rows[first:cut] - (end - shard.n)
        first = cut


def _check_rows(rows: Int64[np.ndarray, " m"], of: EmbeddingSet) -> None:
    if len(rows) and not 0 <= rows.min() <= rows.max() < of.n_total:
        wrong = rows.min() if rows.min() < 0 else rows.max()
        raise ValueError(f"embeddings: {of.where} has rows 0 to {of.n_total - 1}, not {wrong}.")


def _fingerprint(shard: Shard, whole: bool, digest: Any) -> None:
    if isinstance(shard, ArrayShard):
        array = shard.array if whole else shard.array[:: max(len(shard.array) // 4096, 1)]
        digest.update(f"{array.dtype.name} ".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).reshape(-1))
        return
    digest.update(f"{shard.n} {shard.dtype} ".encode())
    for path in filter(None, (shard.path, getattr(shard, "meta", None))):
        size = storage.size(path)
        digest.update(f"{size} ".encode())
        piece = max(size, 1) if whole else _SAMPLE_BYTES
        count = 1 if whole else _SAMPLES
        for start in sorted({round(s) for s in np.linspace(0, max(size - piece, 0), count)}):
            digest.update(storage.read_range(path, start, min(start + piece, size)))
