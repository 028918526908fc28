"""The graph of near-duplicates: edges between neighbours over a threshold, and its components.

Edges go to one Parquet file for each run of queries (a file that is there is whole, so a restart
skips it) or stay in memory; the components are found as they come. Called by `dedup.py`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32, Int64

from data_curation.components import UnionFind
from data_curation.files import Stopped, read_json, write_json, write_table
from data_curation.search import Search

BINS = 100  # of the similarity histogram, over [0, 1]


class Edges(NamedTuple):
    """Pairs of rows of the full set, the smaller first."""

    rows: Int64[np.ndarray, "m 2"]
    sims: Float32[np.ndarray, " m"]


class Graph(NamedTuple):
    """What is left of the edges."""

    labels: Int64[np.ndarray, " n"]  # smallest position of every position's component
    edges: Edges | None  # unique and sorted; None: in files, where both ends may list one
    count: int  # edges, as many as are listed
    histogram: Int64[np.ndarray, " bins"]  # of their similarities


def check_threshold(threshold: float) -> None:
    """Raise ValueError for what is no cosine."""
    if not -1 < threshold < 1:
        raise ValueError(f"threshold is {threshold}; expected a cosine between -1 and 1.")


def describe_search(search: Search, seed: int, lists: Mapping[str, Any]) -> dict[str, Any]:
    """What the neighbours depend on besides the vectors."""
    if search.index == "exact":
        return {"k": search.k, "index": search.index}
    lists = {name: value for name, value in lists.items() if name != "scratch"}
    return {"k": search.k, "index": search.index, "seed": seed, **lists}


def build_graph(
    search: Search,
    settings: Mapping[str, Any],
    *,
    more: Int64[np.ndarray, "e 2"] | None = None,
    directory: Path | None = None,
    stop: Callable[[], bool] | None = None,
    log: Callable[[str], None] | None = None,
    part: tuple[int, int] = (0, 1),
    barrier: Callable[[], Any] | None = None,
) -> Graph:
    """Ask for the neighbours of every row and join them; the search's floor is the threshold.

    Args:
      settings: what the edges depend on; files made with others are refused.
      more: further edges, of positions.
      directory: takes `edges/edges-00000.parquet` (columns i, j, sim), ...
      part, barrier: (number, count) of this process where several share the directory, and what
        waits for the others. Each asks for its share and then reads all.

    Raises:
      Stopped: `stop` said so, between two runs.
    """
    x, forest = search.x, UnionFind.empty(len(search.x))
    histogram, kept, count = np.zeros(BINS, np.int64), [], 0
    if directory is None and part != (0, 1):
        raise ValueError("several processes need a folder that all of them see.")
    if directory is None:
        found = (_edges(search, run) for run in _unstopped(search.runs, stop, log))
    else:
        whole = {**settings, "digest": x.digest()}
        _same_settings(directory / "edges" / "settings.json", whole, write=part[0] == 0)
        files = [directory / "edges" / f"edges-{n:05d}.parquet" for n in range(len(search.runs))]
        own = list(zip(files, search.runs))[part[0] :: part[1]]
        for file, run in _unstopped([one for one in own if not one[0].exists()], stop, log):
            edges = _edges(search, run)
            columns = {"i": edges.rows[:, 0], "j": edges.rows[:, 1], "sim": edges.sims}
            write_table(file, pa.table(columns))
        if barrier is not None:
            barrier()
        found = map(_read, files)
    if more is not None:
        forest.add(more)
    for edges in found:
        forest.add(x.position_of(edges.rows.reshape(-1)).reshape(-1, 2))
        bins = np.clip((edges.sims * BINS).astype(np.int64), 0, BINS - 1)
        histogram += np.bincount(bins, minlength=BINS)
        count += len(edges.rows)
        if directory is None:
            kept.append(edges)
    if directory is not None:
        return Graph(forest.labels(), None, count, histogram)
    edges = _unique(kept)
    return Graph(forest.labels(), edges, len(edges.rows), histogram)


def _unstopped(
    work: Sequence[Any], stop: Callable[[], bool] | None, log: Callable[[str], None] | None
) -> Iterator[Any]:
    for number, item in enumerate(work, 1):
        if stop is not None and stop():
            raise Stopped
        yield item
        if log is not None:
            log(f"neighbours: {number} of {len(work)} runs of queries")


def _edges(search: Search, run: Any) -> Edges:
    """What the queries of one run list; a pair that both of its ends list comes once."""
    found = search.neighbours(run)
    places, ranks = np.nonzero(found.ids >= 0)
    ends = np.stack([found.queries[places], found.ids[places, ranks]], axis=1)
    rows = np.sort(search.x.row_of(ends.reshape(-1)).reshape(-1, 2), axis=1)
    return _unique([Edges(rows, found.sims[places, ranks])])


def _unique(parts: list[Edges]) -> Edges:
    rows = np.concatenate([part.rows for part in parts])
    sims = np.concatenate([part.sims for part in parts])
    order = np.lexsort((rows[:, 1], rows[:, 0]))
    rows, sims = rows[order], sims[order]
    new = np.ones(len(rows), bool)
    new[1:] = (rows[1:] != rows[:-1]).any(axis=1)
    return Edges(rows[new], sims[new])


def _read(file: Path) -> Edges:
    table = pq.read_table(file)
    i, j, sim = (table.column(name).to_numpy() for name in ("i", "j", "sim"))
    return Edges(np.stack([i, j], axis=1), sim)


def _same_settings(file: Path, settings: dict[str, Any], write: bool) -> None:
    if not file.exists():
        if write:
            write_json(file, settings)
        return
    before = read_json(file)
    for name, value in settings.items():
        if before.get(name) != value:
            raise ValueError(
                f"{file.parent} holds edges of {name} = {before.get(name)}, not of {value}; choose "
                f"another folder, or delete this one."
            )
