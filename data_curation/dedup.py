"""Near-duplicates of a set itself: one row of each group is kept.

Neighbours above a cosine similarity are edges, connected components are the groups (DINOv2, arXiv
2304.07193, A.3). Called by the stage `dedup`; `relative.py` keeps evaluation data out the same way.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jax.sharding import Mesh
from jaxtyping import Float32, Int64

from data_curation import dedup_report
from data_curation.embeddings import BATCH_ROWS, EmbeddingSet, as_embeddings
from data_curation.files import write_json, write_npy, write_table
from data_curation.graph import Edges, build_graph, check_threshold, describe_search
from data_curation.relative import RelativeResult as RelativeResult
from data_curation.relative import relative_dedup as relative_dedup
from data_curation.search import Search
from dinojax.data.options import nearest

KEEP = ("first", "priority", "medoid")


class DedupResult(NamedTuple):
    """Of `self_dedup`; rows are those of the full set."""

    kept: Int64[np.ndarray, " q"]  # sorted
    component: Int64[np.ndarray, " n"]  # smallest row of the component; -1: outside of the subset
    removed: pa.Table  # row, component, representative, sim (between row and representative)
    edges: Edges | None  # None: written to files
    report: dict[str, Any]


def self_dedup(
    x: Any,
    k: int = 64,
    threshold: float = 0.6,
    keep: str = "first",
    *,
    priority: Sequence[tuple[str, str]] = (),
    index: str = "auto",
    max_component: int = 10_000,
    directory: str | Path | None = None,
    mesh: Mesh | None = None,
    seed: int = 0,
    stop: Callable[[], bool] | None = None,
    log: Callable[[str], None] | None = None,
    part: tuple[int, int] = (0, 1),
    barrier: Callable[[], Any] | None = None,
    **lists: Any,
) -> DedupResult:
    """Keep one row of every connected component of near-duplicates.

    Args:
      x: an array or an `EmbeddingSet`; rows are scaled to length 1.
      k: neighbours of each row that may become edges; the row itself is none of them.
      threshold: an edge is above it, strictly.
      keep: "first" (the smallest row), "medoid" (the most similar to the others on average), or
        "priority": the first by the metadata columns `priority`, (name, "ascending" or
        "descending") each, missing values last, then the smallest row.
      max_component: a larger component is warned of: chains join what is not alike.
      directory: takes edges/, components.npy, kept.npy, removed.parquet and report.json; asked
        again, the search goes on where it was. None: everything stays in memory.
      index, mesh, seed, lists: of the search, see `search.knn`.
      part, barrier: (number, count) of this process where several share `directory`, and what
        waits for the others; the mesh is then one of this process's devices. The first one writes.

    Raises:
      ValueError: an unknown rule or column, bad rows, a recall of inverted lists that is too low.
      Stopped: `stop` said so; the edges found so far are in `directory`.
    """
    x = as_embeddings(x)
    check_threshold(threshold)
    _check_keep(x, keep, priority)
    search = Search.open(x, None, k, index=index, floor=threshold, mesh=mesh, seed=seed, **lists)
    x, directory = search.x, directory and Path(directory)
    settings = {"threshold": threshold, **describe_search(search, seed, lists)}
    graph = build_graph(
        search, settings, directory=directory, stop=stop, log=log, part=part, barrier=barrier
    )
    chosen = _representatives(x, graph.labels, keep, priority)
    positions = np.arange(len(x))
    kept, gone = x.row_of(np.flatnonzero(chosen == positions)), np.flatnonzero(chosen != positions)
    component = np.full(x.n_total, -1, np.int64)
    component[x.row_of(positions)] = x.row_of(graph.labels)
    removed = pa.table(
        {
            "row": x.row_of(gone),
            "component": x.row_of(graph.labels[gone]),
            "representative": x.row_of(chosen[gone]),
            "sim": _similarities(x, gone, chosen[gone]),
        }
    )
    report = {
        **settings,
        **{"keep": keep, "priority": list(priority), "recall": search.recall},
        **{"rows": len(x), "kept": len(kept), "removed": len(gone), "edges": graph.count},
        **dedup_report.components(x, graph.labels, max_component),
        "representatives": dedup_report.representatives(removed, threshold),
        "similarities": graph.histogram,
    }
    if directory is not None and part[0] == 0:
        write_npy(directory / "components.npy", component)
        write_table(directory / "removed.parquet", removed)
        write_npy(directory / "kept.npy", kept)
        write_json(directory / "report.json", report)
    return DedupResult(kept, component, removed, graph.edges, report)


def _check_keep(x: EmbeddingSet, keep: str, priority: Sequence[tuple[str, str]]) -> None:
    """Before the search, which may take hours."""
    if keep not in KEEP:
        raise ValueError(f"keep is {keep!r}; {nearest(str(keep), KEEP)}")
    if bool(priority) != (keep == "priority"):
        raise ValueError(
            f"keep is {keep!r} with priority {list(priority)}; columns are needed for "
            f"keep='priority' and for that only."
        )
    for column, direction in priority:
        if direction not in ("ascending", "descending"):
            raise ValueError(
                f"priority by {column!r} is {direction!r}, expected ascending or descending."
            )
        x.metadata(np.zeros(1, np.int64), [column])


def _representatives(
    x: EmbeddingSet,
    labels: Int64[np.ndarray, " n"],
    keep: str,
    priority: Sequence[tuple[str, str]],
) -> Int64[np.ndarray, " n"]:
    """The position that stands for every position's component."""
    if keep == "first":
        return labels
    members = np.flatnonzero(np.bincount(labels, minlength=len(labels))[labels] > 1)
    members = members[np.argsort(labels[members], kind="stable")]  # whole components, by row
    best = (
        _medoids(x, members, labels[members])
        if keep == "medoid"
        else _by_priority(x, members, labels[members], priority)
    )
    chosen = np.arange(len(labels))
    chosen[labels[best]] = best  # for the smallest row of each, which the others look up
    return chosen[labels]


def _by_priority(
    x: EmbeddingSet,
    members: Int64[np.ndarray, " m"],
    labels: Int64[np.ndarray, " m"],
    priority: Sequence[tuple[str, str]],
) -> Int64[np.ndarray, " c"]:
    columns = x.metadata(x.row_of(members), [name for name, _ in priority])
    ranks = [_ranks(columns[name], direction) for name, direction in priority]
    order = np.lexsort((members, *reversed(ranks), labels))
    members, labels = members[order], labels[order]
    return members[np.flatnonzero(np.diff(labels, prepend=-1))]


def _ranks(column: pa.ChunkedArray, direction: str) -> Int64[np.ndarray, " m"]:
    """Place of every value among the distinct ones; missing values come last."""
    coded = column.combine_chunks().dictionary_encode()
    order = pc.array_sort_indices(coded.dictionary, order=direction).to_numpy()
    ranks = np.full(len(order) + 1, len(order))
    ranks[order] = np.arange(len(order))
    return ranks[coded.indices.fill_null(len(order)).to_numpy(zero_copy_only=False)]


def _medoids(
    x: EmbeddingSet, members: Int64[np.ndarray, " m"], labels: Int64[np.ndarray, " m"]
) -> Int64[np.ndarray, " c"]:
    """A row's mean cosine to the others of its component is its product with their sum."""
    starts = np.append(np.flatnonzero(np.diff(labels, prepend=-1)), len(members))
    best, first = [], 0
    while first < len(starts) - 1:  # whole components, about BATCH_ROWS rows of them at a time
        last = int(np.searchsorted(starts, starts[first] + BATCH_ROWS, side="right")) - 1
        last = max(last, first + 1)
        here = members[starts[first] : starts[last]]
        vectors, cuts = x.take(here).astype(np.float64), starts[first:last] - starts[first]
        sums, sizes = np.add.reduceat(vectors, cuts), np.diff(starts[first : last + 1])
        which = np.repeat(np.arange(last - first), sizes)
        # Rounded, so that equal rows tie whatever the order of addition; then the smallest wins.
        score = np.round(np.einsum("md,md->m", vectors, sums[which]), 6)
        order = np.lexsort((here, -score, which))
        best.append(here[order[cuts]])
        first = last
    return np.concatenate(best) if best else members


def _similarities(
    x: EmbeddingSet, a: Int64[np.ndarray, " m"], b: Int64[np.ndarray, " m"]
) -> Float32[np.ndarray, " m"]:
    """Cosine of pairs of positions."""
    sims = np.empty(len(a), np.float32)
    for first in range(0, len(a), BATCH_ROWS):
        part = slice(first, first + BATCH_ROWS)
        sims[part] = np.einsum("md,md->m", x.take(a[part]), x.take(b[part]))
    return sims
