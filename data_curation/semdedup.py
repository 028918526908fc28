"""Near-duplicates inside clusters only: one k-means, then pairs of the same cluster (SemDeDup).

arXiv 2303.09540: a row goes if an earlier row of its cluster is more similar than 1 - eps, earlier
meaning farther from the centroid by default. Far cheaper than the graph of `dedup.py`; pairs of
different clusters are missed, and there are no components. Called by the stage `dedup`.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float32, Int, Int32, Int64

from data_curation.embeddings import as_embeddings
from data_curation.files import Stopped, write_json, write_npy
from dinojax.data.options import nearest

ORDERS = ("hard", "easy", "random")
_ROWS = 512  # rows of a cluster compared with those before them at a time


class SemDedupResult(NamedTuple):
    """Of `semdedup`; rows are those of the full set."""

    kept: Int64[np.ndarray, " q"]  # sorted
    nearest_earlier: Float32[np.ndarray, " n"]  # by position; -1: it is the first of its cluster
    report: dict[str, Any]

    def kept_at(self, eps: float) -> int:
        """How many rows another eps would keep, without another pass."""
        return int((self.nearest_earlier <= 1 - eps).sum())


def semdedup(
    x: Any,
    clusters: int = 0,
    eps: float = 0.05,
    order: str = "hard",
    *,
    assignment: Int[np.ndarray, " n"] | None = None,
    centroids: Float32[np.ndarray, "k d"] | None = None,
    directory: str | Path | None = None,
    mesh: Mesh | None = None,
    seed: int = 0,
    stop: Callable[[], bool] | None = None,
) -> SemDedupResult:
    """Drop a row if an earlier row of its cluster has a cosine above 1 - eps.

    Args:
      x: an array or an `EmbeddingSet`; rows are scaled to length 1.
      clusters: of the k-means; 0: about 1,000 rows in each.
      order: "hard": the row farthest from the centroid first, "easy": the nearest, "random".
        Equal distances: the lower row.
      assignment, centroids: clusters made elsewhere; both or neither.
      directory: takes kept.npy, nearest_earlier.npy and report.json.

    Raises:
      ValueError: eps outside (0, 2), an unknown order, bad rows.
      Stopped: `stop` said so.
    """
    x = as_embeddings(x).prepared("l2")
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}; {nearest(str(order), ORDERS)}")
    if not 0 < eps < 2:
        raise ValueError(f"eps is {eps}; expected a distance 1 - cosine, between 0 and 2.")
    if (assignment is None) != (centroids is None):
        raise ValueError("semdedup takes an assignment and its centroids, or neither.")
    if assignment is None:
        from data_curation.kmeans import kmeans

        k = min(clusters or max(len(x) // 1000, 1), len(x))
        found = kmeans(x, k, init="random", metric="spherical", seed=seed, mesh=mesh, stop=stop)
        assignment, centroids = np.asarray(found.assignment), np.asarray(found.centroids)
    nearest_earlier = np.full(len(x), -1, np.float32)
    for members in _clusters(assignment):
        if stop is not None and stop():
            raise Stopped
        vectors = x.take(members)
        centroid = centroids[assignment[members[0]]]
        first_to_last = _ordered(vectors, centroid, order, seed, int(members[0]))
        nearest_earlier[members[first_to_last]] = earlier(vectors[first_to_last])
    kept = x.row_of(np.flatnonzero(nearest_earlier <= 1 - eps))
    report = {
        **{"eps": eps, "order": order, "clusters": len(centroids), "seed": seed},
        **{"rows": len(x), "kept": len(kept), "removed": len(x) - len(kept)},
        "similarities": np.histogram(nearest_earlier, 100, (0, 1))[0],
    }
    if directory is not None:
        write_npy(Path(directory) / "nearest_earlier.npy", nearest_earlier)
        write_npy(Path(directory) / "kept.npy", kept)
        write_json(Path(directory) / "report.json", report)
    return SemDedupResult(kept, nearest_earlier, report)


def _clusters(assignment: Int[np.ndarray, " n"]) -> Iterator[Int64[np.ndarray, " m"]]:
    """Members of every cluster, by row."""
    order = np.argsort(assignment, kind="stable")
    return iter(np.split(order, np.flatnonzero(np.diff(assignment[order])) + 1))


def _ordered(
    vectors: Float32[np.ndarray, "m d"],
    centroid: Float32[np.ndarray, " d"],
    order: str,
    seed: int,
    first: int,
) -> Int64[np.ndarray, " m"]:
    if order == "random":
        return np.random.default_rng((seed, 0x6F, first)).permutation(len(vectors))
    cosine = np.round(vectors.astype(np.float64) @ centroid, 6)  # equal rows tie
    return np.argsort(cosine if order == "hard" else -cosine, kind="stable")


def earlier(vectors: Float32[np.ndarray, "m d"]) -> Float32[np.ndarray, " m"]:
    """The largest cosine of every row to one before it; -1 for the first. Rows have length 1."""
    tile = 16  # powers of two, so that few sizes are compiled
    while tile < min(len(vectors), _ROWS):
        tile *= 2
    count = -(-len(vectors) // tile)
    padded = np.zeros((count, tile, vectors.shape[1]), np.float32)
    padded.reshape(count * tile, -1)[: len(vectors)] = vectors
    tiles = [jax.device_put(part) for part in padded]
    most = [
        jnp.stack([_most(q, tiles[j], np.int32((i - j) * tile)) for j in range(i + 1)]).max(axis=0)
        for i, q in enumerate(tiles)
    ]
    return np.concatenate(jax.device_get(most))[: len(vectors)]


@jax.jit
def _most(
    rows: Float32[Array, "t d"], before: Float32[Array, "t d"], offset: Int32[Array, ""]
) -> Float32[Array, " t"]:
    sims = jnp.einsum("td,ud->tu", rows, before, precision="highest")
    number = jnp.arange(len(rows))
    return jnp.where(number[None] < number[:, None] + offset, sims, -1.0).max(axis=1)
