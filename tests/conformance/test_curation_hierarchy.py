"""Hierarchical k-means with resampling, step by step from the reference's inputs of each step.

So that one point at equal distance of two centroids does not derail the rest.
"""

import jax
import numpy as np
import vectors

from data_curation.hierarchy import Level, hierarchical_kmeans, resample
from data_curation.kmeans import assign, kmeans
from data_curation.tree import tree_level
from dinojax.sharding import make_mesh

MARGIN = 1e-4  # assignments of points nearer than this to a second centroid may differ


def steps(case: vectors.Case) -> list[str]:
    return case.matching(r"L\d+_S\d+(?=_centroids)")


def inputs_of(case: vectors.Case, level: int) -> np.ndarray:
    """What a level clusters: the data, or the centroids of the last step of the level below."""
    if level == 1:
        return case["X"]
    return case[f"L{level - 1}_S{int(case['n_resamples'])}_centroids"]


def parse(step: str) -> tuple[int, int]:
    level, number = step.split("_")
    return int(level[1:]), int(number[1:])


@vectors.files("curation/hkm*", sub=steps)
def test_assignment(case, sub):
    ours, _ = assign(inputs_of(case, parse(sub)[0]), case[f"{sub}_centroids"])
    clear = case[f"{sub}_margin"] >= MARGIN
    assert clear.mean() > 0.9
    assert np.array_equal(ours[clear], case[f"{sub}_assign"][clear])


@vectors.files("curation/hkm*", sub=steps)
def test_kmeans_of_a_step(case, sub):
    level, _ = parse(sub)
    points = inputs_of(case, level)[case[f"{sub}_points"]]
    initial, expected = points[case[f"{sub}_init"]], case[f"{sub}_centroids"]
    k = int(case["n_clusters"][level - 1])
    result = kmeans(points, k, init=initial, n_iters=int(case["n_iters"]), empty="keep")
    _, distance = assign(points, expected)
    assert abs(result.inertia / distance.astype(np.float64).sum() - 1) < 1e-4
    vectors.assert_close(result.centroids, expected, atol=1e-4, rtol=1e-4)
    # Ours counts the update that shows that nothing changes any more.
    assert abs(len(result.history) - 1 - int(case[f"{sub}_converged_at"])) <= 1


@vectors.files("curation/hkm*", sub=lambda case: [s for s in steps(case) if parse(s)[1] > 0])
def test_resampled_points(case, sub):
    level, number = parse(sub)
    before = f"L{level}_S{number - 1}"
    x, parent = inputs_of(case, level), case[f"{before}_assign"]
    dist = own_distances(x, case[f"{before}_centroids"], parent)
    n_samples = int(case["sample_sizes"][level - 1])
    ours, expected = resample(parent, dist, n_samples), np.sort(case[f"{sub}_points"])
    # Where the last one taken and the first one left are equally near, either will do.
    assert len(ours) == len(expected)
    assert np.array_equal(np.bincount(parent[ours]), np.bincount(parent[expected]))
    differ = np.setxor1d(ours, expected)
    for cluster in np.unique(parent[differ]):
        assert np.ptp(dist[differ[parent[differ] == cluster]]) < 1e-5


def own_distances(x: np.ndarray, centroids: np.ndarray, parent: np.ndarray) -> np.ndarray:
    return ((x.astype(np.float64) - centroids[parent]) ** 2).sum(1).astype(np.float32)


def levels(case: vectors.Case) -> list[int]:
    return list(range(1, len(case["n_clusters"]) + 1))


@vectors.files("curation/hkm*", sub=levels)
def test_final_members(case, sub):
    last = f"L{sub}_S{int(case['n_resamples'])}"
    x, parent = inputs_of(case, sub), case[f"{last}_assign"]
    dist = own_distances(x, case[f"{last}_centroids"], parent)
    level = tree_level(case[f"{last}_centroids"], parent, dist)
    members, offsets = case[f"L{sub}_sorted_clusters"], case[f"L{sub}_sorted_offsets"]
    assert np.array_equal(level.offsets, offsets)
    # Members at equal distance may change places.
    vectors.assert_close(dist[level.members], dist[members], atol=1e-6, rtol=1e-5)
    for start, stop in zip(offsets, offsets[1:]):
        assert set(level.members[start:stop].tolist()) == set(members[start:stop].tolist())


@vectors.files("curation/hkm*")
def test_end_to_end(case):
    """With seeds of our own: the same sizes, and level 1 as tight as the reference's."""
    n_resamples = int(case["n_resamples"])
    settings = [
        Level(int(k), int(n), n_resamples) for k, n in zip(case["n_clusters"], case["sample_sizes"])
    ]
    mesh = make_mesh(data=1, devices=jax.devices()[:1])  # pretend devices are slow, and no matter
    tree = hierarchical_kmeans(case["X"], settings, n_iters=int(case["n_iters"]), mesh=mesh)
    assert [len(level) for level in tree.levels] == case["n_clusters"].tolist()
    last = f"L1_S{n_resamples}"
    reference = own_distances(case["X"], case[f"{last}_centroids"], case[f"{last}_assign"]).sum()
    assert abs(tree.levels[0].dist.sum() / reference - 1) < 0.1
