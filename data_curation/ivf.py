"""Search in inverted lists: rows are grouped by k-means, a query looks into the nearest groups.

Called by `search.py` for banks of millions of rows. Queries of one list are answered together:
they look into the union of each other's lists, so one product serves them all and none of them
sees fewer than `nprobe` lists. What that misses is measured against the exact search on a sample
before any long work.
"""

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32, Int, Int64

from data_curation import search
from data_curation.embeddings import EmbeddingSet, as_embeddings, open_embeddings
from data_curation.kmeans import kmeans

RECALL_SAMPLE = 10_000
PROBES = 16  # lists a query looks into
FIT_ROWS = 64  # rows a list that the k-means is fitted on
_GROUP = 1024  # queries answered together
_RUN_ROWS = 65_536  # queries of another set than the bank, sorted by list together


@dataclass(frozen=True, kw_only=True, eq=False)
class InvertedLists:
    """Rows of a bank sorted by list, with the lists' centroids. Made by `build`."""

    centroids: Float32[np.ndarray, "l d"] = field(repr=False)
    order: Int64[np.ndarray, " n"] = field(repr=False)  # place in the lists -> position in the bank
    offsets: Int64[np.ndarray, " l1"] = field(repr=False)  # list c is offsets[c]:offsets[c + 1]
    sorted: EmbeddingSet = field(repr=False)  # the vectors in that order, of length 1
    nprobe: int
    min_recall: float
    scratch: Any = field(repr=False)  # holds the file of sorted vectors while this lives

    @classmethod
    def build(
        cls,
        y: EmbeddingSet,
        *,
        nlist: int | None = None,
        nprobe: int = PROBES,
        min_recall: float = 0.95,
        seed: int = 0,
        mesh: Mesh | None = None,
        scratch: str | Path | None = None,
    ) -> "InvertedLists":
        """Group a bank of unit rows.

        Args:
          nlist: lists; None: 4 sqrt(N). More (up to 16 sqrt(N) is usual) make smaller products.
          nprobe: lists that each query looks into.
          min_recall: `measure` refuses less.
          scratch: folder for a sorted copy of a bank that does not fit in memory.
        """
        n = len(y)
        nlist = default_lists(n) if nlist is None else nlist
        if not 1 <= nlist <= n or not 1 <= nprobe:
            raise ValueError(
                f"inverted lists: nlist is {nlist} and nprobe {nprobe} for {n} rows; expected at "
                f"least 1 each, and no more lists than rows."
            )
        rng = np.random.default_rng((seed, 0x1F))
        chosen = np.sort(rng.choice(n, min(n, FIT_ROWS * nlist), replace=False))
        fitted = kmeans(
            as_embeddings(y.take(chosen)), nlist, init="random", n_iters=10, metric="spherical",
            seed=seed, mesh=mesh,
        )  # fmt: skip
        centroids = np.asarray(fitted.centroids, np.float32)
        places = np.concatenate([_nearest_list(block, centroids, mesh) for _, block in y.blocks()])
        order = np.argsort(places, kind="stable")
        offsets = np.searchsorted(places[order], np.arange(len(centroids) + 1))
        sorted_set, held = _sort(y, order, scratch)
        return cls(
            centroids=centroids, order=order, offsets=offsets, sorted=sorted_set, nprobe=nprobe,
            min_recall=min_recall, scratch=held,
        )  # fmt: skip

    def measure(
        self, x: EmbeddingSet, own: bool, k: int, floor: float, mesh: Mesh | None, seed: int
    ) -> float:
        """Share of the exact neighbours (above `floor`) of 10,000 queries that the lists find.

        Raises:
          ValueError: it is under `min_recall`.
        """
        rng = np.random.default_rng((seed, 0x2F))
        sample = np.sort(rng.choice(len(x), min(len(x), RECALL_SAMPLE), replace=False))
        vectors = x.take(sample)
        there = np.argsort(self.order)[sample] if own else np.full(len(sample), -1)
        found = self._find(vectors, there, k, floor, mesh)[0]
        bank = search.read_blocks(self.sorted, mesh)
        expected = search.exact(vectors, there, bank, k, floor, mesh)[0]
        hits = sum(len(np.intersect1d(a[a >= 0], b[b >= 0])) for a, b in zip(found, expected))
        count = int((expected >= 0).sum())
        recall = hits / count if count else 1.0
        if recall < self.min_recall:
            raise ValueError(
                f"inverted lists find {recall:.3f} of the exact neighbours, less than min_recall = "
                f"{self.min_recall}; raise nprobe above {self.nprobe}, or lower nlist under "
                f"{len(self.centroids)}."
            )
        return recall

    def runs(self, x: EmbeddingSet, own: bool) -> tuple[range, ...]:
        """Parts of a search: of places in the lists, or of positions in another set."""
        if not own:
            return search.split_runs(len(x), _RUN_ROWS)
        cuts = [0]
        for end in self.offsets[1:]:  # whole lists, as their queries go together
            if end - cuts[-1] >= _RUN_ROWS or end == len(x):
                cuts.append(int(end))
        return tuple(range(a, b) for a, b in zip(cuts, cuts[1:]) if b > a)

    def ask(
        self, x: EmbeddingSet, run: range, own: bool, k: int, floor: float, mesh: Mesh | None
    ) -> search.Found:
        """Neighbours of one run of queries."""
        queries = np.arange(run.start, run.stop)
        vectors = (self.sorted if own else x).take(queries)
        there = queries if own else np.full(len(queries), -1)
        places, sims = self._find(vectors, there, k, floor, mesh)
        ids = np.where(places < 0, -1, self.order[places])
        return search.Found(self.order[queries] if own else queries, ids, sims)

    def _find(
        self,
        vectors: Float32[np.ndarray, "q d"],
        own: Int[np.ndarray, " q"],
        k: int,
        floor: float,
        mesh: Mesh | None,
    ) -> tuple[Int64[np.ndarray, "q k"], Float32[np.ndarray, "q k"]]:
        """Places in the lists and similarities; `own` is the place of the query itself, or -1."""
        probes = _nearest_lists(vectors, self.centroids, self.nprobe, mesh)
        ids = np.full((len(vectors), k), -1, np.int64)
        sims = np.full((len(vectors), k), floor, np.float32)
        for group in _groups(probes[:, 0]):
            lists = np.unique(probes[group])
            starts, sizes = self.offsets[lists], np.diff(self.offsets)[lists]
            within = np.concatenate([[0], np.cumsum(sizes)])  # lists one behind the other
            if not within[-1]:
                continue
            places = np.arange(within[-1]) + np.repeat(starts - within[:-1], sizes)
            # Numbers within the group's candidates fit in 32 bits whatever the size of the bank.
            local = np.searchsorted(places, own[group])
            itself = places[np.minimum(local, len(places) - 1)] == own[group]
            found, sims[group] = search.exact(
                vectors[group], np.where(itself, local, -1), self._blocks(places, mesh), k, floor,
                mesh,
            )  # fmt: skip
            ids[group] = np.where(found < 0, -1, places[found])
        return ids, sims

    def _blocks(self, places: Int64[np.ndarray, " m"], mesh: Mesh | None) -> search.Blocks:
        rows = min(search.block_rows(len(places)), 4096)
        for first in range(0, len(places), rows):
            numbers = np.arange(first, min(first + rows, len(places)))
            yield search.pad_block(self.sorted.take(places[numbers]), numbers, rows, mesh)


def default_lists(n: int) -> int:
    """How many lists `n` rows are grouped into."""
    return max(min(4 * math.isqrt(n), n // 8), 1)


def _groups(lists: Int64[np.ndarray, " q"]) -> Iterator[Int64[np.ndarray, " g"]]:
    """Queries that go together: those of one list, at most `_GROUP` of them."""
    order = np.argsort(lists, kind="stable")
    for part in np.split(order, np.flatnonzero(np.diff(lists[order])) + 1):
        yield from np.array_split(part, -(-len(part) // _GROUP))


def _nearest_lists(
    vectors: Float32[np.ndarray, "q d"],
    centroids: Float32[np.ndarray, "l d"],
    count: int,
    mesh: Mesh | None,
) -> Int64[np.ndarray, "q c"]:
    bank = search.hold(as_embeddings(centroids), mesh)
    none, count = np.full(len(vectors), -1), min(count, len(centroids))
    return search.exact(vectors, none, bank(), count, -np.inf, mesh)[0]


def _nearest_list(
    vectors: Float32[np.ndarray, "q d"], centroids: Float32[np.ndarray, "l d"], mesh: Mesh | None
) -> Int64[np.ndarray, " q"]:
    return _nearest_lists(vectors, centroids, 1, mesh)[:, 0]


def _sort(
    y: EmbeddingSet, order: Int64[np.ndarray, " n"], scratch: str | Path | None
) -> tuple[EmbeddingSet, Any]:
    """The vectors in the lists' order: in memory if they fit, else in a file of `scratch`."""
    if 4 * y.dim * len(y) <= search.RESIDENT_BYTES:
        held, whole = None, np.empty((len(y), y.dim), np.float32)
    elif scratch is None:
        raise ValueError(
            f"inverted lists: {len(y)} rows of {y.dim} numbers do not fit in memory; name a folder "
            f"`scratch` with {4 * y.dim * len(y) / 1e9:.0f} GB for a sorted copy."
        )
    else:
        Path(scratch).mkdir(parents=True, exist_ok=True)
        held = tempfile.TemporaryDirectory(prefix="lists-", dir=scratch)
        file = Path(held.name) / "sorted.npy"
        whole = np.lib.format.open_memmap(file, "w+", np.float32, (len(y), y.dim))
    place = np.empty(len(y), np.int64)
    place[order] = np.arange(len(y))
    for first, block in y.blocks():
        whole[place[first : first + len(block)]] = block
    if held is None:
        return as_embeddings(whole), None
    whole.flush()
    return open_embeddings(str(file)), held
