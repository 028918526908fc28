"""Hierarchical k-means with resampling: clusters of clusters, bottom up, each level flattened.

Section 5 of the curation spec. Called by the `cluster` verb. A level is clustered once (step 0)
and then, a few times over, from a few rows of each cluster (steps 1, 2, ..): rows of crowded
regions count less each time, and the centroids spread evenly over what there is. A level may
instead be split: clustered, then each cluster by itself (`split.py`).

With a directory every step is saved as it ends, and the same call goes on from there.
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Int, Int32, Int64, Shaped

from data_curation.balance import balance_metrics, balance_warnings
from data_curation.checkpoints import stopping
from data_curation.draws import derived_seed, hashed
from data_curation.embeddings import EmbeddingSet, as_embeddings
from data_curation.files import Stopped, read_json, write_json, write_npy, write_text
from data_curation.kmeans import KMeansResult, assign, kmeans
from data_curation.processes import first_writes
from data_curation.split import split_clusters
from data_curation.tree import (
    ClusterTree,
    TreeLevel,
    drop_empty,
    load_level,
    ranks,
    save_level,
    save_tree,
    tree_level,
)


@dataclass(frozen=True)
class Level:
    """How one level is made; `n_samples` of about half the mean members per cluster is a good rule.

    Attributes:
      k: clusters asked for (of a split level: before the split).
      n_samples: rows taken from each cluster when resampling.
      n_resamples: how often to resample, the first clustering not counted.
      n_splits: clusters that each of the k is split into; 1: it is not.
    """

    k: int
    n_samples: int = 1
    n_resamples: int = 0
    n_splits: int = 1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            least = 0 if name == "n_resamples" else 1
            if value < least:
                raise ValueError(f"level: {name} is {value}; expected {least} or more")
        if self.n_resamples and self.n_splits > 1:
            raise ValueError(
                f"level: n_resamples is {self.n_resamples} with n_splits {self.n_splits}; a split "
                "level is not resampled, expected n_resamples 0"
            )
        if self.n_resamples and self.n_samples == 1:
            raise ValueError(
                f"level: n_resamples is {self.n_resamples} with n_samples 1; expected n_samples "
                "of 2 or more to resample, or n_resamples 0"
            )


@dataclass(frozen=True)
class _Run:
    """What all levels share."""

    fit: Callable[..., KMeansResult]
    place: Callable[..., tuple[Int32[np.ndarray, " n"], Float32[np.ndarray, " n"]]]
    num_init: int
    split_restarts: int
    resampling: str
    seed: int
    directory: Path | None
    stop: Callable[[], bool] | None
    log: Callable[[str], None] | None
    warn_imbalance: float


def hierarchical_kmeans(
    x: Float[np.ndarray, "n d"] | Float[Array, "n d"] | EmbeddingSet,
    levels: Sequence[Level],
    *,
    resampling: str = "closest",
    seed: int = 0,
    n_iters: int = 50,
    metric: str = "l2",
    init: str = "kmeans++",
    empty: str = "split",
    num_init: int = 1,
    split_restarts: int = 10,
    warn_imbalance: float = 20.0,
    mesh: Mesh | None = None,
    directory: str | Path | None = None,
    stop: Callable[[], bool] | None = None,
    log: Callable[[str], None] | None = None,
) -> ClusterTree:
    """Clusters rows, then the centroids, then theirs; every centroid counts once.

    Empty clusters are dropped at the end of each level and the others renumbered in order.

    Args:
      x: vectors; of a set restricted to a subset the tree holds these rows of the full set.
      levels: lowest first.
      resampling: which rows a step takes from each cluster: "closest" to its centroid, or "random".
      seed: of all draws.
      n_iters, metric, init, empty, num_init: of every k-means (see `kmeans`).
      split_restarts: restarts of each k-means inside a split cluster.
      warn_imbalance: imbalance factor of leaf counts above which the report warns.
      mesh: devices to use.
      directory: where levels and steps are saved and resumed; None: nothing is saved.
      stop: asked between steps and inside k-means; True saves and raises `Stopped`.
      log: takes one line at a time.

    Raises:
      ValueError: levels that do not fit the input, or a directory begun with other settings.
      Stopped: `stop` said so.
    """
    x = as_embeddings(x)
    _check_levels(levels, len(x), resampling)
    directory = None if directory is None else Path(directory)
    settings = {
        "levels": [asdict(level) for level in levels],
        **{"resampling": resampling, "seed": seed, "n_iters": n_iters, "metric": metric},
        **{"init": init, "empty": empty, "num_init": num_init, "split_restarts": split_restarts},
    }
    if directory is not None:
        _check_settings(directory / "cluster.json", {**settings, "input": x.digest()})
    shared = {"metric": metric, "mesh": mesh}
    run = _Run(
        partial(kmeans, n_iters=n_iters, init=init, empty=empty, stop=stop, **shared),
        partial(assign, stop=stop, **shared),
        num_init,
        split_restarts,
        resampling,
        seed,
        directory,
        stop,
        log,
        warn_imbalance,
    )
    made: list[TreeLevel] = []
    inputs = x
    for number, level in enumerate(levels, start=1):
        made.append(_make_level(inputs, level, number, made, run))
        inputs = as_embeddings(np.asarray(made[-1].centroids))
    tree = ClusterTree(tuple(made))
    if directory is not None:
        first_writes(_save_tree, directory, tree)
    return tree


def resample(
    parent: Int[np.ndarray, " n"],
    dist: Float32[np.ndarray, " n"],
    n_samples: int,
    resampling: str = "closest",
    key: tuple[int, ...] = (0,),
) -> Int64[np.ndarray, " m"]:
    """Positions, ascending, of min(n_samples, size) inputs of every cluster.

    The nearest ones, of equal distances the lower; or random ones, drawn without replacement by a
    hash of (key, position).
    """
    by = dist if resampling == "closest" else hashed(np.arange(len(parent)), *key)
    order = np.lexsort((by, parent))
    bounds = np.concatenate(([0], np.cumsum(np.bincount(parent))))
    return np.sort(order[ranks(bounds) < n_samples])


def _make_level(
    x: EmbeddingSet, level: Level, number: int, below: Sequence[TreeLevel], run: _Run
) -> TreeLevel:
    """One level over its inputs; read from the directory if it is done."""
    folder = None if run.directory is None else run.directory / f"level{number}"
    if folder is not None and (folder / "report.json").exists():
        first_writes(_tidy, folder)
        return load_level(folder)
    start, steps = time.perf_counter(), []
    centroids, parent, dist = _cluster(x, level, number, folder, run, steps)
    if level.n_splits > 1:
        fit = partial(run.fit, num_init=run.split_restarts)
        where = None if folder is None else folder / "split"
        centroids, parent, dist = split_clusters(
            x, parent, level.n_splits, fit, seed=run.seed, folder=where, stop=run.stop
        )
    kept, parent = drop_empty(centroids, parent)
    made = tree_level(kept, *_by_row(x, parent, dist))
    leaves = ClusterTree((*below, made)).leaf_counts(number)
    warnings = balance_warnings(leaves, f"level {number}", run.warn_imbalance)
    report = {
        **{"level": number, "inputs": len(x), "asked": level.k * level.n_splits},
        **{"kept": len(made), "dropped_empty": len(centroids) - len(made), "steps": steps},
        "inertia": float(dist.astype(np.float64).sum()),
        "seconds": time.perf_counter() - start,
        "sizes": balance_metrics(made.sizes()),
        "leaves": balance_metrics(leaves),
        "warnings": warnings,
    }
    if folder is not None:
        first_writes(_save, folder, made, report)
        first_writes(_tidy, folder)
    if run.log is not None:
        seconds = f"{report['seconds']:.1f} s"
        run.log(f"level {number}: {len(made)} clusters of {len(x)} inputs in {seconds}")
        for warning in warnings:
            run.log(f"warning: {warning}")
    return made


def _cluster(
    x: EmbeddingSet,
    level: Level,
    number: int,
    folder: Path | None,
    run: _Run,
    steps: list[dict[str, Any]],
) -> tuple[Float32[np.ndarray, "k d"], Int32[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
    """Step 0 and the resampling steps of a level: centroids, and all inputs assigned to them.

    What each step did is added to `steps`.
    """
    for step in range(level.n_resamples + 1):
        where = None if folder is None else folder / f"step{step}"
        positions = None
        if step:
            key = (run.seed, number, step)
            positions = resample(parent, dist, level.n_samples, run.resampling, key)
        if where is not None and (where / "centroids.npy").exists():
            centroids = np.load(where / "centroids.npy")
        else:
            if stopping(run.stop):
                raise Stopped(f"before step {step} of level {number}")
            points = x if positions is None else as_embeddings(x.take(positions))
            centroids = _step(points, positions, level.k, (number, step), x, where, run)
        # Also for step 0, whose own assignment this is: a resumed run then takes the same path.
        parent, dist = run.place(x, centroids)
        inertia = float(dist.astype(np.float64).sum())
        used = len(x) if positions is None else len(positions)
        steps.append({"step": step, "points": used, "inertia": inertia})
        if run.log is not None:
            run.log(f"level {number} step {step}: {used} points, inertia {inertia:.6g}")
    return centroids, parent, dist


def _step(
    points: EmbeddingSet,
    positions: Int64[np.ndarray, " m"] | None,
    k: int,
    place: tuple[int, int],
    x: EmbeddingSet,
    folder: Path | None,
    run: _Run,
) -> Float32[np.ndarray, "k d"]:
    """Centroids of one k-means, seeded anew; saved when there is a folder, centroids last."""
    seed = derived_seed(run.seed, *place)
    checkpoint = None if folder is None else folder / "kmeans"
    result = run.fit(
        points, k, num_init=run.num_init, seed=seed, checkpoint=checkpoint, log=run.log
    )
    if folder is not None:
        seeds = result.seeds if positions is None else positions[result.seeds]
        arrays = {"init_rows": x.row_of(seeds), "centroids": result.centroids}
        if positions is not None:
            arrays = {"sampled_rows": x.row_of(positions), **arrays}
        first_writes(_save_step, folder, arrays, result.history)
        first_writes(_remove, checkpoint)  # when all processes have done with it
    return result.centroids


def _save_step(
    folder: Path, arrays: Mapping[str, Shaped[np.ndarray, "..."]], history: Sequence[dict[str, Any]]
) -> None:
    write_text(folder / "stats.jsonl", "".join(json.dumps(line) + "\n" for line in history))
    for name, array in arrays.items():  # centroids last: they say that the step is whole
        write_npy(folder / f"{name}.npy", array)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _tidy(folder: Path) -> None:
    """Removes what only an unfinished level needs, also where a run was killed just before."""
    for needless in (folder / "split", *folder.glob("step*/kmeans")):
        _remove(needless)


def _save(folder: Path, level: TreeLevel, report: Mapping[str, Any]) -> None:
    save_level(level, folder)
    write_json(folder / "report.json", report)  # last: it says that the level is whole


def _save_tree(directory: Path, tree: ClusterTree) -> None:
    if not (directory / "tree.json").exists():
        save_tree(directory, tree)


def _by_row(
    x: EmbeddingSet, parent: Int[np.ndarray, " n"], dist: Float32[np.ndarray, " n"]
) -> tuple[Int[np.ndarray, " r"], Float32[np.ndarray, " r"]]:
    """From positions of a subset to rows of the full set; -1 and NaN for the others."""
    if x.rows is None:
        return parent, dist
    parents, dists = np.full(x.n_total, -1, parent.dtype), np.full(x.n_total, np.nan, np.float32)
    parents[x.rows], dists[x.rows] = parent, dist
    return parents, dists


def _check_levels(levels: Sequence[Level], rows: int, resampling: str) -> None:
    if resampling not in ("closest", "random"):
        raise ValueError(f"resampling is {resampling!r}; expected closest or random")
    if not levels:
        raise ValueError("levels are empty; expected one Level(k) or more, lowest first")
    inputs, what = rows, "rows"
    for number, level in enumerate(levels, start=1):
        if level.k > inputs:
            raise ValueError(
                f"level {number} asks for {level.k} clusters of {inputs} {what}; expected "
                f"{inputs} or fewer"
            )
        inputs, what = level.k * level.n_splits, f"clusters of level {number}"


def _check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Refuses a directory begun with other settings; a new one is marked with these."""
    first_writes(_mark, path, settings)
    begun = read_json(path)
    for name, value in settings.items():
        if begun.get(name) != value:
            raise ValueError(
                f"{path.parent} was begun with {name} {begun.get(name)}, not {value}; give another "
                "directory, or remove this one to start again"
            )


def _mark(path: Path, settings: Mapping[str, Any]) -> None:
    if not path.exists():
        write_json(path, settings)
