"""Nearest neighbours by cosine: exact, block against block, or in inverted lists (`ivf.py`).

`neighbours` yields them for one run of queries after another, which is what deduplication and
retrieval read; `knn` collects them. Never an [N, N] array: the bank is read in blocks, again for
every run of queries unless it fits in memory, and each query keeps its k best.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float32, Int, Int32, Int64

from data_curation import topk
from data_curation.embeddings import EmbeddingSet, as_embeddings, check_comparable
from data_curation.files import Stopped
from dinojax.data.options import nearest

EXACT_BELOW = 5_000_000  # rows of the bank up to which `index="auto"` compares all pairs
RESIDENT_BYTES = 4 << 30  # a bank up to this size stays in memory, as float32
_RUN_BYTES = 1 << 30  # queries held at a time where the bank is read again for each run of them
_RUN_ROWS = 16_384  # where it is not: small runs are soon done, and a restart loses little
INDEXES = ("auto", "exact", "ivf")


class Found(NamedTuple):
    """Neighbours of some queries, by position in the bank; the nearest first."""

    queries: Int64[np.ndarray, " q"]  # positions
    ids: Int64[np.ndarray, "q k"]  # -1: there are no more
    sims: Float32[np.ndarray, "q k"]  # cosine; -inf (or the floor) there


def knn(
    x: Any,
    y: Any = None,
    k: int = 64,
    *,
    index: str = "auto",
    floor: float = -np.inf,
    mesh: Mesh | None = None,
    seed: int = 0,
    stop: Callable[[], bool] | None = None,
    **lists: Any,
) -> tuple[Int64[np.ndarray, "n k"], Float32[np.ndarray, "n k"]]:
    """Rows of `y` nearest to every row of `x` by cosine, and the similarities, largest first.

    Args:
      x: queries, an array or an `EmbeddingSet`.
      y: the bank; None: `x` itself, where no row is its own neighbour.
      k: neighbours a query. Where the bank has fewer (above `floor`): id -1.
      index: "exact", "ivf" (inverted lists), or "auto": exact below 5 million rows.
      floor: only similarities above it.
      mesh: splits the queries over its batch axes; None: one device.
      seed: of the inverted lists.
      stop: asked between runs of queries; `Stopped` is raised when it says yes.
      lists: settings of `ivf.InvertedLists.build`, where there are lists.

    Returns:
      ids (rows of the full set `y`), cosine similarities. Equal ones: the lower row (exact only).

    Raises:
      ValueError: a zero or non-finite row, different widths, an unknown index.
    """
    search = Search.open(x, y, k, index=index, floor=floor, mesh=mesh, seed=seed, **lists)
    ids = np.full((len(search.x), k), -1, np.int64)
    sims = np.full((len(search.x), k), -np.inf, np.float32)
    for run in search.runs:
        if stop is not None and stop():
            raise Stopped
        found = search.neighbours(run)
        ids[found.queries], sims[found.queries] = search.rows(found.ids), found.sims
    return ids, np.where(ids < 0, -np.float32(np.inf), sims)


class Search(NamedTuple):
    """A bank ready to be asked. Made by `open`; `runs` are the parts a search is done in."""

    x: EmbeddingSet
    y: EmbeddingSet
    k: int
    runs: tuple[Any, ...]  # a function of the sets' sizes only, so that a restart finds the same
    neighbours: Callable[[Any], Found]  # of one of the runs
    index: str
    recall: float | None  # of inverted lists, measured

    def rows(self, ids: Int64[np.ndarray, "..."]) -> Int64[np.ndarray, "..."]:
        """Positions in the bank as rows of its full set; -1 stays."""
        if self.y.rows is None:
            return ids
        return np.where(ids < 0, -1, self.y.rows[ids])

    @classmethod
    def open(
        cls,
        x: Any,
        y: Any = None,
        k: int = 64,
        *,
        index: str = "auto",
        floor: float = -np.inf,
        mesh: Mesh | None = None,
        seed: int = 0,
        **lists: Any,
    ) -> "Search":
        """See `knn`. With inverted lists they are built and their recall is measured here."""
        own = y is None
        x = as_embeddings(x).prepared("l2")
        y = x if own else as_embeddings(y).prepared("l2")
        if index not in INDEXES:
            raise ValueError(f"index is {index!r}; {nearest(str(index), INDEXES)}")
        if k < 1:
            raise ValueError(f"k is {k} neighbours; expected at least 1.")
        check_comparable(x, y)
        if index == "auto":
            index = "exact" if len(y) < EXACT_BELOW else "ivf"
        if index == "ivf":
            from data_curation import ivf  # which searches its lists' centroids with `exact`

            built = ivf.InvertedLists.build(y, seed=seed, mesh=mesh, **lists)
            recall = built.measure(x, own, k, floor, mesh, seed)
            runs = built.runs(x, own)
            return cls(
                x, y, k, runs, lambda run: built.ask(x, run, own, k, floor, mesh), index, recall
            )
        if len(y) >= 2**31:
            raise ValueError(f"exact search among {len(y)} rows; expected under 2^31, or 'ivf'.")
        bank = hold(y, mesh)

        def neighbours(run: range) -> Found:
            queries = np.arange(run.start, run.stop)
            numbers = queries if own else np.full(len(queries), -1)
            vectors = np.concatenate([b for _, b in x.blocks(start=run.start, stop=run.stop)])
            return Found(queries, *exact(vectors, numbers, bank(), k, floor, mesh))

        streamed = 4 * y.dim * len(y) > RESIDENT_BYTES
        most = max(_RUN_BYTES // (4 * x.dim), _RUN_ROWS) if streamed else _RUN_ROWS
        return cls(x, y, k, split_runs(len(x), most), neighbours, index, None)


def split_runs(n: int, most: int) -> tuple[range, ...]:
    """0 to n in equal runs of at most so many."""
    size = -(-n // max(-(-n // most), 1))
    return tuple(range(first, min(first + size, n)) for first in range(0, n, max(size, 1)))


Blocks = Iterable[tuple[Float32[Array, "m d"], Int32[Array, " m"]]]


def hold(y: EmbeddingSet, mesh: Mesh | None) -> Callable[[], Blocks]:
    """A bank as padded blocks on the devices: kept there if small, else read whenever asked."""
    if 4 * y.dim * len(y) > RESIDENT_BYTES:
        return lambda: read_blocks(y, mesh)
    blocks = list(read_blocks(y, mesh))
    return lambda: blocks


def read_blocks(y: EmbeddingSet, mesh: Mesh | None) -> Blocks:
    """A bank as padded blocks, one after another."""
    rows = block_rows(len(y))
    for first, vectors in y.blocks(rows):
        yield pad_block(vectors, np.arange(first, first + len(vectors)), rows, mesh)


def block_rows(n: int) -> int:
    """Rows of the bank compared at a time: a power of two, larger where there is more memory."""
    # On two CPU cores 8,192 x 256 queries are fastest: 8 MB of similarities.
    rows, most = 256, 8192 if jax.default_backend() == "cpu" else 65_536
    while rows < min(n, most):
        rows *= 2
    return rows


def pad_block(
    vectors: Float32[np.ndarray, "b d"],
    numbers: Int[np.ndarray, " b"],
    rows: int,
    mesh: Mesh | None,
) -> tuple[Float32[Array, "m d"], Int32[Array, " m"]]:
    """A block of candidates on the devices, filled up to `rows` with some that never count."""
    padded = np.zeros((rows, vectors.shape[1]), np.float32)
    padded[: len(vectors)] = vectors
    ids = np.full(rows, -1, np.int32)
    ids[: len(numbers)] = numbers
    return topk.put(padded, mesh), topk.put(ids, mesh)


def exact(
    vectors: Float32[np.ndarray, "q d"],
    own: Int[np.ndarray, " q"],
    blocks: Blocks,
    k: int,
    floor: float,
    mesh: Mesh | None,
) -> tuple[Int64[np.ndarray, "q k"], Float32[np.ndarray, "q k"]]:
    """The k candidates most similar to each query: their numbers and similarities.

    Args:
      own: number of the candidate that a query is itself; -1: of none.
      blocks: candidates with their numbers, see `pad_block`.
    """
    most = 256 if jax.default_backend() == "cpu" else 2048
    tile = topk.tile_rows(len(vectors), mesh, most)
    queries = topk.Queries.place(vectors, own.astype(np.int32), tile, mesh)
    best = queries.start(k, floor, mesh)
    for block, ids in blocks:
        best = topk.merge(best, *queries, block, ids, mesh)
    sims, ids = jax.device_get(best)
    count = len(vectors)
    return ids.reshape(-1, k)[:count].astype(np.int64), sims.reshape(-1, k)[:count]
