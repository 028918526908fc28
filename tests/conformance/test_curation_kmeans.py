"""k-means of data_curation against the public reference's: every iteration, and seeding.

Each step starts from the stored result of the one before, so that one row between two centroids
cannot derail the rest; rows whose margin is below 1e-4 may go either way.
"""

import numpy as np
import vectors

from data_curation.kmeans import assign, kmeans
from data_curation.seeding import kmeans_plusplus

MARGIN = 1e-4


def prefixes(case: vectors.Case, marker: str) -> list[str]:
    """'blobs' of 'blobs_init'."""
    return [name.removesuffix(marker) for name in case if name.endswith(marker)]


def metric_of(name: str) -> str:
    return "cos_raw" if name.startswith("cos") else "l2"


@vectors.files("curation/kmeans_lloyd", sub=lambda case: prefixes(case, "_init"))
def test_lloyd(case, sub):
    x, init, centroids, stored, margin, inertia = (
        case[f"{sub}_{name}"] for name in ("X", "init", "centroids", "assign", "margin", "inertia")
    )
    metric = metric_of(sub)
    np.testing.assert_array_equal(centroids[0], init)
    for step in range(len(centroids)):
        assignment, distance = assign(x, centroids[step], metric)
        differ = assignment != stored[step]
        assert (margin[step][differ] < MARGIN).all(), f"step {step}: {differ.sum()} rows differ"
        np.testing.assert_allclose(distance.sum(dtype=np.float64), inertia[step], rtol=1e-4)
        if step + 1 < len(centroids):
            once = kmeans(x, len(init), init=centroids[step], n_iters=1, metric=metric)
            same = np.ones(len(init), bool)  # clusters that no differing row is in
            same[assignment[differ]] = same[stored[step][differ]] = False
            assert same.sum() >= 0.9 * len(init)
            np.testing.assert_allclose(
                once.centroids[same], centroids[step + 1][same], rtol=1e-4, atol=1e-4
            )


@vectors.files("curation/kmeans_lloyd", sub=lambda case: prefixes(case, "_init"))
def test_end_to_end(case, sub):
    x, init, centroids = (case[f"{sub}_{name}"] for name in ("X", "init", "centroids"))
    found = kmeans(x, len(init), init=init, n_iters=len(centroids) - 1, metric=metric_of(sub))
    inertia, potential = case[f"{sub}_inertia"][-1], case[f"{sub}_pot_of_means"]
    np.testing.assert_allclose(found.inertia, inertia, rtol=1e-4)
    np.testing.assert_allclose(found.potential, potential, rtol=1e-4)


@vectors.files("curation/kmeans_plusplus", sub=lambda case: prefixes(case, "_uniforms"))
def test_kmeans_plusplus(case, sub):
    x, first, uniforms, candidates, chosen, potentials, numpy_seed = (
        case[f"{sub}_{name}"]
        for name in (
            *("X", "first", "uniforms", "candidates"),
            *("indices", "potentials", "numpy_seed"),
        )
    )
    draws = np.random.RandomState(int(numpy_seed))  # the numbers are those the file says they are
    assert draws.randint(len(x)) == first
    np.testing.assert_array_equal(draws.uniform(size=uniforms.shape), uniforms)
    indices, sums = kmeans_plusplus(
        x, len(chosen), n_trials=uniforms.shape[1], first=int(first), uniforms=uniforms
    )
    np.testing.assert_array_equal(indices, chosen)
    np.testing.assert_allclose(sums, potentials, rtol=1e-5)
    assert all(row in proposed for row, proposed in zip(indices[1:], candidates))
