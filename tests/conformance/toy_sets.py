"""The two toy sets of the curation vectors, clustered as the reference clustered them.

Called by `test_curation_toys.py` and by `tests/benchmarks/curation_toys.py`, which draws them.
"""

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from data_curation.hierarchy import Level, hierarchical_kmeans
from data_curation.tree import ClusterTree
from dinojax.sharding import make_mesh

# gauss2d.npz, by the names in its `kl_names`: clusters of each level, resampling.
GAUSS = {
    "1level": ((300,), None),
    "2level": ((1500, 300), None),
    "3level": ((3000, 1000, 300), None),
    "3level_resampling_closest": ((3000, 1000, 300), "closest"),
    "3level_resampling_random": ((3000, 1000, 300), "random"),
}


def _one_device() -> Mesh:
    """Sets as small as these are slower on several."""
    return make_mesh(data=1, devices=jax.devices()[:1])


def ring_tree(case: Mapping[str, np.ndarray], seed: int = 0, flat: bool = False) -> ClusterTree:
    """The hierarchy of `ring2d.npz`; or, flat, one k-means with as many clusters as its top."""
    counts, samples = case["n_clusters"].tolist(), case["sample_sizes"].tolist()
    resamples, n_iters = int(case["n_resamples"]), int(case["n_iters"])
    levels = [Level(k, n, resamples) for k, n in zip(counts, samples)]
    levels = [Level(counts[-1])] if flat else levels
    return hierarchical_kmeans(case["X"], levels, seed=seed, n_iters=n_iters, mesh=_one_device())


def per_ring(case: Mapping[str, np.ndarray], rows: np.ndarray) -> list[int]:
    """How many of the rows lie on each ring."""
    return np.bincount(case["ring"][rows], minlength=int(case["ring"].max()) + 1).tolist()


def gauss_centroids(case: Mapping[str, np.ndarray], name: str, seed: int = 0) -> np.ndarray:
    """Top centroids [300, 2] of one of the hierarchies `GAUSS` over `gauss2d.npz`."""
    counts, resampling = GAUSS[name]
    if resampling is None:
        levels, restarts = [Level(k) for k in counts], int(case["num_init"])
    else:
        levels, restarts = [Level(k, 2, 10) for k in counts], 1
    tree = hierarchical_kmeans(
        case["X"],
        levels,
        resampling=resampling or "closest",
        num_init=restarts,
        seed=seed,
        mesh=_one_device(),
    )
    return np.asarray(tree.levels[-1].centroids)
