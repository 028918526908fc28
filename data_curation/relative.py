"""Rows too near to reference rows, such as those of evaluation sets, which must stay unseen.

DINOv2, arXiv 2304.07193, A.3, "relative deduplication". Called by the stage `dedup`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jax.sharding import Mesh
from jaxtyping import Bool, Float32, Int64

from data_curation import dedup_report
from data_curation.embeddings import EmbeddingSet, as_embeddings, concatenate
from data_curation.files import write_json, write_npy, write_table
from data_curation.graph import build_graph, check_threshold, describe_search
from data_curation.search import Search, knn
from dinojax.data.options import nearest

MODES = ("component", "direct")


class RelativeResult(NamedTuple):
    """Of `relative_dedup`; rows are those of the full set."""

    kept: Int64[np.ndarray, " q"]  # sorted
    # row, then its nearest reference row: reference (name), reference_row, sim
    removed: pa.Table
    component: Int64[np.ndarray, " u"] | None  # over positions of [x, references]; None: "direct"
    report: dict[str, Any]


def relative_dedup(
    x: Any,
    ref: Any,
    k: int = 64,
    threshold: float = 0.45,
    mode: str = "component",
    *,
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
) -> RelativeResult:
    """Discard what is too near to reference rows.

    Besides the graph of k neighbours, in which nearer rows of `x` may push a reference row out,
    every row is compared with its nearest reference row, exactly: above the threshold none stays.

    Args:
      x: an array or an `EmbeddingSet`.
      ref: reference rows: the same, or several sets by name.
      mode: "component": every component of the graph over `x` and all references that holds a
        reference row goes whole. "direct": only rows that are above the threshold to one
        themselves, far fewer.
      directory: takes edges/, removed.parquet, kept.npy and report.json.
      k, threshold, max_component, ...: as in `dedup.self_dedup`.

    Raises:
      ValueError: an unknown mode, no references, vectors of another width or embedder.
      Stopped: `stop` said so.
    """
    x = as_embeddings(x).prepared("l2")
    refs = dict(ref) if isinstance(ref, Mapping) else {"reference": ref}
    refs = {name: as_embeddings(part) for name, part in refs.items()}
    check_threshold(threshold)
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; {nearest(str(mode), MODES)}")
    if not refs:
        raise ValueError("relative deduplication needs at least one reference set.")
    directory = directory and Path(directory)
    both = concatenate([x, *refs.values()])
    near, sims = _nearest(x, refs, mesh, stop)
    gone, labels, report = sims > threshold, None, {"threshold": threshold, "mode": mode}
    if mode == "component":
        search = Search.open(
            both, None, k, index=index, floor=threshold, mesh=mesh, seed=seed, **lists
        )
        settings = {**report, **describe_search(search, seed, lists)}
        touched = np.flatnonzero(gone)
        graph = build_graph(
            search,
            settings,
            more=np.stack([touched, len(x) + near[touched]], axis=1),
            directory=directory,
            stop=stop,
            log=log,
            part=part,
            barrier=barrier,
        )
        labels = graph.labels
        gone = _with_any(labels, range(len(x), len(labels)))[: len(x)]
        report = {
            **{**settings, "recall": search.recall, "edges": graph.count},
            **dedup_report.components(x, labels[: len(x)], max_component),
            "similarities": graph.histogram,
        }
    out = np.flatnonzero(gone)
    ends = np.cumsum([len(part) for part in refs.values()])
    owner = np.searchsorted(ends, near, side="right")
    removed = pa.table(
        {
            "row": x.row_of(out),
            "reference": pa.array([*refs]).take(pa.array(owner[out])),
            "reference_row": _rows(refs, owner[out], near[out]),
            "sim": sims[out],
        }
    )
    kept = x.row_of(np.flatnonzero(~gone))
    report |= {
        **{"rows": len(x), "kept": len(kept), "removed": len(out)},
        "references": {
            name: _of_one(len(x), labels, range(end - len(refs[name]), end), near, sims > threshold)
            for name, end in zip(refs, ends.tolist())
        },
    }
    if directory is not None and part[0] == 0:
        write_table(directory / "removed.parquet", removed)
        write_npy(directory / "kept.npy", kept)
        write_json(directory / "report.json", report)
    return RelativeResult(kept, removed, labels, report)


def _nearest(
    x: EmbeddingSet,
    refs: Mapping[str, EmbeddingSet],
    mesh: Mesh | None,
    stop: Callable[[], bool] | None,
) -> tuple[Int64[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
    """The nearest of all reference rows, counted through, and its similarity."""
    whole = concatenate([*refs.values()])
    rows, sims = knn(x, whole, 1, index="exact", mesh=mesh, stop=stop)
    return whole.position_of(rows[:, 0]), sims[:, 0]


def _rows(
    refs: Mapping[str, EmbeddingSet], owner: Int64[np.ndarray, " m"], near: Int64[np.ndarray, " m"]
) -> Int64[np.ndarray, " m"]:
    """Reference rows, counted through, as rows of the set each belongs to."""
    rows, start = np.empty(len(near), np.int64), 0
    for number, part in enumerate(refs.values()):
        here = owner == number
        rows[here] = part.row_of(near[here] - start)
        start += len(part)
    return rows


def _with_any(labels: Int64[np.ndarray, " u"], members: range) -> Bool[np.ndarray, " u"]:
    """Whether each position's component has any of these members."""
    has = np.zeros(len(labels), bool)
    has[labels[members.start : members.stop]] = True
    return has[labels]


def _of_one(
    n: int,
    labels: Int64[np.ndarray, " u"] | None,
    members: range,
    near: Int64[np.ndarray, " n"],
    direct: Bool[np.ndarray, " n"],
) -> dict[str, int]:
    """Counts for one reference set; a row may count for several."""
    hit = direct & (near >= members.start) & (near < members.stop)
    counts = {"rows": len(members), "removed_direct": int(hit.sum())}
    if labels is not None:
        touched = _with_any(labels, range(n + members.start, n + members.stop))
        sizes = np.bincount(labels[touched], minlength=1)
        counts |= {"removed": int(touched[:n].sum()), "largest_component": int(sizes.max())}
    return counts
