"""k-means: starting centres, Lloyd's iterations, restarts; and assignment to given centroids.

Section 3 of the curation spec. Called by `hierarchy`, `split`, `search`, `semdedup`; the passes
over the data are `lloyd.py`'s. Centroids live on the host between passes, where they are averaged
in float64, split where clusters are empty, and saved.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Float64, Int32, Int64

from data_curation.checkpoints import Checkpoints, stopping
from data_curation.device_rows import Chunk, DeviceRows, device_rows, origin, unit_rows
from data_curation.embeddings import EmbeddingSet, as_embeddings
from data_curation.files import Stopped
from data_curation.kmeans_parallel import kmeans_parallel
from data_curation.lloyd import METRICS, PRECISIONS, Totals, lloyd_pass
from data_curation.seeding import checked_k, greedy, trials_for
from dinojax.data.options import nearest

INITS = ("kmeans++", "kmeans||", "random")
EMPTY = ("keep", "split", "drop")
_SPLIT = 1 / 1024  # how far an empty cluster and its donor are set apart, of the rows' spread


@dataclass(frozen=True, eq=False)
class KMeansResult:
    """What `kmeans` found.

    Attributes:
      assignment, distance: centroid of every row and the squared distance to it.
      inertia: the sum of these distances.
      potential: squared distances to the means of the clusters, what the public reference reports.
      history: of the restart that was kept: inertia, empty and split clusters of each iteration.
      seeds: positions of the starting centres; None where centroids were given.
      dropped: empty clusters removed at the end.
    """

    centroids: Float32[np.ndarray, "k d"]
    assignment: Int32[np.ndarray, " n"]
    distance: Float32[np.ndarray, " n"]
    inertia: float
    potential: float
    history: list[dict[str, Any]]
    seeds: Int64[np.ndarray, " s"] | None
    dropped: int


@dataclass(frozen=True)
class _Settings:
    """What the iterations of all restarts share."""

    metric: str
    empty: str
    precision: str
    n_iters: int
    tol: float
    stop_on_converged: bool
    log: Callable[[str], None] | None
    stop: Callable[[], bool] | None


def kmeans(
    x: Float[np.ndarray, "n d"] | Float[Array, "n d"] | EmbeddingSet,
    k: int,
    *,
    init: str | Float[np.ndarray, "k d"] = "kmeans++",
    init_sample: int | None = None,
    n_iters: int = 50,
    metric: str = "l2",
    empty: str = "keep",
    num_init: int = 1,
    seed: int = 0,
    mesh: Mesh | None = None,
    precision: str = "highest",
    tol: float = 0.0,
    stop_on_converged: bool = True,
    checkpoint: str | Path | None = None,
    stop: Callable[[], bool] | None = None,
    log: Callable[[str], None] | None = None,
) -> KMeansResult:
    """At most k clusters of the rows of `x`: fewer if it has fewer distinct rows.

    Args:
      x: vectors; those of a set larger than memory are read again in every pass.
      init: a rule of INITS, or the centroids to start from.
      init_sample: the rule sees only this many rows, drawn uniformly; None: all.
      n_iters: most updates of the centroids.
      metric: "l2"; "spherical", rows and centroids scaled to length 1; "cos_raw", the public
        reference's largest x.c with means as they are. Distances are squared L2 in all three.
      empty: what becomes of a cluster without members: "keep" its centroid, "split" a large cluster
        in two after each update, "drop" it at the end.
      num_init: restarts, of which the one of the lowest potential is kept.
      precision: of products, "highest" or "bf16_refine" (the best four of a bfloat16 product are
        compared again in float32).
      tol: end when the inertia falls by less than this share of itself; 0: never for that reason.
      stop_on_converged: end when no assignment changed, which changes no result.
      checkpoint: folder to save to after each iteration; the same call goes on from there.
      stop: asked between blocks and iterations; True saves and raises.
      log: takes a line at a time.

    Raises:
      ValueError: an option that is none, or checkpoints of another call.
      Stopped: `stop()` was true.
    """
    x = as_embeddings(x)
    k = checked_k(k, len(x))
    _check_name("metric", metric, METRICS)
    _check_name("empty", empty, EMPTY)
    _check_name("precision", precision, PRECISIONS)
    given = None if isinstance(init, str) else np.asarray(init, np.float32)
    if given is None:
        _check_name("init", init, INITS)
    elif given.shape != (k, x.dim):
        raise ValueError(f"init is {list(given.shape)}; expected [{k}, {x.dim}]")
    if num_init < 1:
        raise ValueError(f"num_init is {num_init}; expected 1 or more")
    settings = _Settings(metric, empty, precision, n_iters, tol, stop_on_converged, log, stop)
    setup = {"rows": len(x), "dim": x.dim, "k": k, "metric": metric, "empty": empty, "seed": seed}
    if checkpoint is not None:
        setup |= {"input": x.digest(), "init": init if given is None else "array"}
    rows = _rows(x, metric, mesh, stop)
    best = None
    for restart in range(1 if given is not None else num_init):
        rng = np.random.default_rng((seed, restart))
        folder = None if checkpoint is None else Path(checkpoint)
        saves = partial(Checkpoints, folder, setup=setup) if folder else lambda name: None
        seeds = None
        if given is None:
            seeds = _seeds(rows, k, init, init_sample, rng, saves(f"seeds{restart}"), settings)
        start = rows.vectors(seeds) if given is None else given
        if metric == "spherical":
            start = unit_rows(start)
        found = _lloyd(rows, start, (seed, restart), saves(f"lloyd{restart}"), settings)
        result = _finish(rows, *found, seeds, settings)
        if best is None or result.potential < best.potential:
            best = result
    return best


def assign(
    x: Float[np.ndarray, "n d"] | Float[Array, "n d"] | EmbeddingSet,
    centroids: Float[np.ndarray, "k d"],
    metric: str = "l2",
    mesh: Mesh | None = None,
    precision: str = "highest",
    stop: Callable[[], bool] | None = None,
) -> tuple[Int32[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
    """Nearest centroid of every row (of equal ones the first) and the squared distance to it.

    Raises:
      ValueError: the centroids have another width, or there are none.
      Stopped: `stop()` was true.
    """
    x = as_embeddings(x)
    _check_name("metric", metric, METRICS)
    _check_name("precision", precision, PRECISIONS)
    if centroids.shape[1] != x.dim or not len(centroids):
        raise ValueError(
            f"centroids are {list(centroids.shape)}; expected [k, {x.dim}] with k of 1 or more"
        )
    rows = _rows(x, metric, mesh, stop)
    return _assign(rows, np.asarray(centroids, np.float32), metric, precision)[:2]


def _rows(
    x: EmbeddingSet, metric: str, mesh: Mesh | None, stop: Callable[[], bool] | None
) -> DeviceRows:
    shift = origin(x) if metric == "l2" else None
    return device_rows(x, mesh, shift, unit=metric == "spherical", stop=stop)


def _check_name(field: str, value: str, names: tuple[str, ...]) -> None:
    if value not in names:
        raise ValueError(f"{field} is {value!r}; {nearest(str(value), names)}")


def _seeds(
    rows: DeviceRows,
    k: int,
    init: str,
    sample: int | None,
    rng: np.random.Generator,
    checkpoints: Checkpoints | None,
    settings: _Settings,
) -> Int64[np.ndarray, " k"]:
    """Positions of the starting centres, among all rows or a sample of them."""
    n = len(rows.x)
    if sample is None or sample >= n:
        return _seed_rows(rows, k, init, rng, checkpoints, settings.stop)
    some = np.sort(rng.choice(n, max(sample, k), replace=False))
    few = device_rows(
        rows.x.restrict(rows.x.row_of(some)), rows.mesh, rows.shift, rows.unit, rows.stop
    )
    return some[_seed_rows(few, k, init, rng, checkpoints, settings.stop)]


def _seed_rows(
    rows: DeviceRows,
    k: int,
    init: str,
    rng: np.random.Generator,
    checkpoints: Checkpoints | None = None,
    stop: Callable[[], bool] | None = None,
) -> Int64[np.ndarray, " c"]:
    """Positions of k (or, of fewer distinct rows, fewer) starting centres by a rule of INITS."""
    if init == "random":
        return np.sort(rng.choice(len(rows.x), k, replace=False)).astype(np.int64)
    if init == "kmeans||":
        return kmeans_parallel(rows, k, rng)
    return greedy(rows, k, rng, trials_for(k), checkpoints=checkpoints, stop=stop)[0]


def _lloyd(
    rows: DeviceRows,
    centroids: Float32[np.ndarray, "k d"],
    seed: tuple[int, ...],
    checkpoints: Checkpoints | None,
    settings: _Settings,
) -> tuple[Float32[np.ndarray, "k d"], list[dict[str, Any]]]:
    """Up to `n_iters` updates of the centroids.

    Equal centroids before and after an update say that no assignment changed, and nothing of the
    size of the rows need be remembered for it.
    """
    history: list[dict[str, Any]] = []
    if checkpoints and (found := checkpoints.load()):
        history, centroids = found[0]["history"], found[1]["centroids"]
    while len(history) < settings.n_iters and not (history and history[-1]["done"]):
        if stopping(settings.stop, rows.mesh):
            raise Stopped(f"after iteration {len(history)}")
        start = time.perf_counter()
        found = lloyd_pass(rows, centroids, settings.metric, settings.precision)
        updated, split = _update(rows, centroids, found, settings, (*seed, len(history)))
        line = {
            **{"iteration": len(history) + 1, "inertia": found.inertia},
            **{"empty": int((found.counts == 0).sum()), "split": split},
            "seconds": time.perf_counter() - start,
        }
        same = settings.stop_on_converged and not split and np.array_equal(updated, centroids)
        small = settings.tol > 0 and bool(history) and _fell_little(history[-1], line, settings)
        history.append(line | {"done": bool(same or small)})
        centroids = updated
        if checkpoints:
            checkpoints.save(len(history), {"history": history}, {"centroids": centroids})
        if settings.log is not None:
            rate = len(rows.x) / max(line["seconds"], 1e-9)
            settings.log(
                f"iteration {line['iteration']}: inertia {line['inertia']:.6g}, "
                f"{line['empty']} empty, {split} split, {line['seconds']:.2f} s, {rate:.3g} rows/s"
            )
    return centroids, history


def _fell_little(before: dict[str, Any], now: dict[str, Any], settings: _Settings) -> bool:
    return before["inertia"] - now["inertia"] < settings.tol * before["inertia"]


def _update(
    rows: DeviceRows,
    centroids: Float32[np.ndarray, "k d"],
    found: Totals,
    settings: _Settings,
    seed: tuple[int, ...],
) -> tuple[Float32[np.ndarray, "k d"], int]:
    """Means of the members, in float64; an empty cluster stays or splits another. And how many."""
    full = found.counts > 0
    means = centroids.astype(np.float64)
    means[full] = found.sums[full] / found.counts[full, None] + rows.shift
    split = 0
    if settings.empty == "split" and not full.all():
        spread = np.sqrt(_square_about_mean(centroids, found, rows.shift) / means.shape[1])
        split = split_largest(means, found.counts, _SPLIT * spread, seed)
    if settings.metric == "spherical":
        norms = np.linalg.norm(means, axis=1, keepdims=True)
        means = np.where(norms > 0, means / np.where(norms > 0, norms, 1), centroids)
    return means.astype(np.float32), split


def split_largest(
    means: Float64[np.ndarray, "k d"],
    counts: Int64[np.ndarray, " k"],
    delta: float,
    seed: tuple[int, ...],
) -> int:
    """Give every empty cluster half of another, in place; returns how many could be given one.

    A donor is drawn in proportion to its size less 1. The two are set delta apart from its mean
    with alternating signs (faiss scales by 1 +- 1/1024 instead, which leaves a mean of 0 as it is).
    """
    rng = np.random.default_rng((*seed, 1))
    sizes = counts.astype(np.float64)
    signs = np.where(np.arange(means.shape[1]) % 2, -1.0, 1.0)
    empty = np.flatnonzero(counts == 0)
    for done, cluster in enumerate(empty):
        chance = np.maximum(sizes - 1, 0).cumsum()
        if chance[-1] == 0:
            return done
        donor = int(np.searchsorted(chance, rng.random() * chance[-1], "right"))
        means[cluster] = means[donor] + delta * signs
        means[donor] -= delta * signs
        sizes[cluster] = sizes[donor] = sizes[donor] / 2
    return len(empty)


def _square_about_mean(
    centroids: Float32[np.ndarray, "k d"], found: Totals, shift: Float32[np.ndarray, " d"]
) -> float:
    """Mean squared distance of the rows to their mean, from the sums of a pass."""
    n = found.counts.sum()
    means = found.sums / np.maximum(found.counts, 1)[:, None]
    away = means - found.sums.sum(axis=0)[None] / n
    between = found.counts @ np.einsum("kd,kd->k", away, away)
    return (_potential(centroids, found, shift) + between) / n


def _potential(
    centroids: Float32[np.ndarray, "k d"], found: Totals, shift: Float32[np.ndarray, " d"]
) -> float:
    """Squared distances to the means of the clusters: those to the centroids, less the moves."""
    means = found.sums / np.maximum(found.counts, 1)[:, None]
    moved = means - (centroids - shift[None])
    return max(found.inertia - float(found.counts @ np.einsum("kd,kd->k", moved, moved)), 0.0)


def _assign(
    rows: DeviceRows, centroids: Float32[np.ndarray, "k d"], metric: str, precision: str
) -> tuple[Int32[np.ndarray, " n"], Float32[np.ndarray, " n"], Totals]:
    ids, distances = [], []

    def visit(chunk: Chunk, of_chunk: Array, away: Array) -> None:
        ids.append(rows.collect(of_chunk, chunk.count))
        distances.append(rows.collect(away, chunk.count))

    found = lloyd_pass(rows, centroids, metric, precision, visit)
    return rows.join(np.concatenate(ids)), rows.join(np.concatenate(distances)), found


def _finish(
    rows: DeviceRows,
    centroids: Float32[np.ndarray, "k d"],
    history: list[dict[str, Any]],
    seeds: Int64[np.ndarray, " s"] | None,
    settings: _Settings,
) -> KMeansResult:
    """Assign all rows to the last centroids; drop what is empty if asked to."""
    ids, distances, found = _assign(rows, centroids, settings.metric, settings.precision)
    potential, dropped = _potential(centroids, found, rows.shift), 0
    if settings.empty == "drop":
        full = found.counts > 0
        ids = (np.cumsum(full, dtype=np.int32) - 1)[ids]
        centroids, dropped = centroids[full], int((~full).sum())
    return KMeansResult(
        centroids, ids, distances, found.inertia, potential, history, seeds, dropped
    )
