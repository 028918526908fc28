"""Pairs inside clusters: against all cosines of the cluster, in the stated order."""

import importlib

import numpy as np
import pytest

from data_curation.semdedup import earlier, semdedup


def blobs(n: int = 600, k: int = 5, d: int = 8):
    """Unit rows in k clusters with their unit centroids."""
    rng = np.random.default_rng(0)
    centroids = np.linalg.qr(rng.normal(size=(d, d)))[0][:k]
    which = rng.integers(0, k, n)
    x = centroids[which] + 0.2 * rng.normal(size=(n, d))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x.astype(np.float32), which, centroids.astype(np.float32)


def reference(x, which, centroids, eps, sign):
    """Rows that stay: sign 1, far from the centroid first."""
    kept = []
    for cluster in np.unique(which):
        members = np.flatnonzero(which == cluster)
        wide = x[members].astype(np.float64)
        members = members[np.argsort(sign * (wide @ centroids[cluster]), kind="stable")]
        sims = x[members].astype(np.float64) @ x[members].T
        earlier = [sims[i, :i].max(initial=-1) for i in range(len(members))]
        kept += members[np.array(earlier) <= 1 - eps].tolist()
    return sorted(kept)


@pytest.mark.parametrize("order,sign", [("hard", 1), ("easy", -1)])
def test_against_all_pairs(order, sign):
    x, which, centroids = blobs()
    found = semdedup(3 * x, eps=0.05, order=order, assignment=which, centroids=centroids)
    expected = reference(x, which, centroids, 0.05, sign)
    assert found.kept.tolist() == expected and 0.1 < len(expected) / len(x) < 0.9
    assert found.kept_at(0.05) == len(expected)
    for eps in (0.02, 0.2):
        assert found.kept_at(eps) == len(reference(x, which, centroids, eps, sign))


def test_of_equal_rows_one_stays(tmp_path):
    x, which, centroids = blobs(50)
    twice = np.concatenate([x, x])
    for order in ("hard", "easy", "random"):
        found = semdedup(
            twice, eps=1e-4, order=order, assignment=np.tile(which, 2), centroids=centroids,
            directory=tmp_path / order,
        )  # fmt: skip
        assert len(found.kept) == 50 and len(np.unique(found.kept % 50)) == 50
        if order != "random":
            np.testing.assert_array_equal(found.kept, np.arange(50))
        np.testing.assert_array_equal(np.load(tmp_path / order / "kept.npy"), found.kept)


def test_tiles(monkeypatch):
    # By name: the package has a function of this name too.
    monkeypatch.setattr(importlib.import_module("data_curation.semdedup"), "_ROWS", 64)
    x, _, _ = blobs(300)
    sims = np.where(np.tri(300, k=-1, dtype=bool), x @ x.T, -1)
    np.testing.assert_allclose(earlier(x), sims.max(axis=1), atol=1e-6)
    assert earlier(x[:1]).tolist() == [-1]


def test_with_its_own_clusters():
    x, _, _ = blobs(300)
    found = semdedup(np.concatenate([x, x]), clusters=5, eps=1e-4)
    assert len(found.kept) == 300 and found.report["clusters"] == 5


def test_what_is_refused():
    x, which, _ = blobs(20)
    for wrong, why in (
        (dict(order="harder"), "did you mean 'hard'"),
        (dict(eps=0.0), "eps is 0.0"),
        (dict(assignment=which), "or neither"),
    ):
        with pytest.raises(ValueError, match=why):
            semdedup(x, **wrong)
