"""Clusters split into smaller ones, each by itself: more clusters than one k-means can make.

Section 5 of the curation spec: 200 million clusters of 17 billion rows are 100,000 clusters of
2,000 each. A row stays in its cluster even if a part of another is nearer. Called by
`hierarchy.py`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int, Int64

from data_curation.checkpoints import stopping
from data_curation.draws import derived_seed
from data_curation.embeddings import EmbeddingSet
from data_curation.files import Stopped, write_npy
from data_curation.kmeans import KMeansResult
from data_curation.processes import first_writes
from data_curation.tree import drop_empty, index_dtype, runs

GROUP_BYTES = 1 << 30  # vectors in memory at a time, as float32; one cluster at least


class Parts(NamedTuple):
    """The parts of some clusters: those of the first, then those of the second, ..."""

    centroids: Float32[np.ndarray, "k d"]
    parent: Int[np.ndarray, " n"]  # part of each row
    dist: Float32[np.ndarray, " n"]  # to its centroid, as `assign` gives it


def split_clusters(
    x: EmbeddingSet,
    parent: Int[np.ndarray, " n"],
    n_splits: int,
    fit: Callable[..., KMeansResult],
    *,
    seed: int = 0,
    folder: Path | None = None,
    stop: Callable[[], bool] | None = None,
    group_bytes: int = GROUP_BYTES,
) -> Parts:
    """k-means with min(n_splits, size) clusters in each cluster; parts left empty are dropped.

    Args:
      x: all vectors.
      parent: cluster of each position.
      n_splits: parts of each cluster.
      fit: `kmeans` with its settings.
      seed: each cluster's own follows from it.
      folder: where groups of clusters are saved as they are done.
      stop: asked between groups.
      group_bytes: vectors to hold at a time.
    """
    sizes = np.bincount(parent)
    clusters = np.flatnonzero(sizes)
    sizes = sizes[clusters]
    by_cluster = np.argsort(parent, kind="stable")
    bounds = np.concatenate(([0], np.cumsum(sizes)))
    centroids: list[np.ndarray] = []
    parts, dist, count = np.empty(len(x), np.int64), np.empty(len(x), np.float32), 0
    for number, run in enumerate(runs(sizes, group_bytes // (4 * x.dim))):
        positions = by_cluster[bounds[run.start] : bounds[run.stop]]
        where = None if folder is None else folder / f"{number:05d}"
        if where is not None and (where / "centroids.npy").exists():
            group = Parts(*(np.load(where / f"{name}.npy") for name in Parts._fields))
        else:
            if stopping(stop):
                raise Stopped(f"before group {number} of the split")
            vectors = np.split(x.take(positions), np.cumsum(sizes[run])[:-1])
            group = _split_group(vectors, clusters[run], n_splits, fit, seed)
            if where is not None:
                first_writes(_save, where, group)
        parts[positions], dist[positions] = count + group.parent, group.dist
        centroids.append(group.centroids)
        count += len(group.centroids)
    return Parts(np.concatenate(centroids), parts.astype(index_dtype(count)), dist)


def _save(folder: Path, group: Parts) -> None:
    for name in reversed(Parts._fields):  # centroids last: they say that the group is whole
        write_npy(folder / f"{name}.npy", getattr(group, name))


def _split_group(
    vectors: Sequence[Float32[np.ndarray, "_ d"]],
    clusters: Int64[np.ndarray, " c"],
    n_splits: int,
    fit: Callable[..., KMeansResult],
    seed: int,
) -> Parts:
    """Parts of these clusters, given the vectors of each."""
    found: list[Parts] = []
    count = 0
    for cluster, own in zip(clusters.tolist(), vectors):
        result = fit(own, min(n_splits, len(own)), seed=derived_seed(seed, 1, cluster))
        centroids, parent = drop_empty(result.centroids, result.assignment)
        found.append(Parts(centroids, parent + count, result.distance))
        count += len(centroids)
    return Parts(*(np.concatenate(arrays) for arrays in zip(*found)))
