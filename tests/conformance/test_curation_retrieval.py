"""Pool rows for seed sets: nearest rows, and clusters with enough queries."""

import numpy as np
import vectors

from data_curation.retrieve import retrieve_clusters, retrieve_samples
from data_curation.search import knn

MARGIN = 1e-6  # neighbours nearer to the next than this may swap


@vectors.files("curation/retrieval")
def test_neighbours(case):
    n = case["knn_ids"].shape[1]
    ids, sims = knn(case["query"], case["pool"], n)
    vectors.assert_close(sims, case["knn_sims"], atol=1e-6, rtol=0, name="similarities")
    clear = case["knn_gap"] > MARGIN
    np.testing.assert_array_equal(ids[clear], case["knn_ids"][clear])


@vectors.files("curation/retrieval")
def test_samples(case):
    n = case["knn_ids"].shape[1]
    found = retrieve_samples(case["pool"], case["query"], n)
    np.testing.assert_array_equal(found.rows, case["union_ids"])
    assert found.report["collided"] == case["n_collisions"]
    assert found.count.sum() == case["knn_ids"].size
    best = {}
    for row, sim in zip(case["knn_ids"].reshape(-1), case["knn_sims"].reshape(-1)):
        best[row] = max(sim, best.get(row, -1))
    np.testing.assert_allclose(found.sim, [best[row] for row in found.rows], atol=1e-6)


@vectors.files("curation/retrieval")
def test_clusters(case):
    k = len(case["centroids"])
    counts = np.bincount(case["query_assign"], minlength=k)
    np.testing.assert_array_equal(counts, case["query_count"])
    limits = int(case["M"]), int(case["min_queries_exclusive"])
    found = retrieve_clusters(case["pool_assign"], case["query_assign"], *limits, int(case["cap"]))
    np.testing.assert_array_equal(found.eligible, case["eligible"])
    np.testing.assert_array_equal(found.take, case["take"])
    assert found.report["before_cap"] == case["total_before_cap"]
    assert len(found.rows) == len(np.unique(found.rows)) == case["final_size"]
    assert np.isin(case["pool_assign"][found.rows], case["eligible"]).all()


@vectors.files("curation/retrieval")
def test_assignments_are_to_the_nearest_centroid(case):
    from data_curation.kmeans import assign

    for name in ("pool", "query"):
        gaps = np.sort(case[name] @ case["centroids"].T - (case["centroids"] ** 2).sum(1) / 2)
        clear = gaps[:, -1] - gaps[:, -2] > 1e-4 / 2  # the margin of squared distances
        found = np.asarray(assign(case[name], case["centroids"])[0])
        np.testing.assert_array_equal(found[clear], case[f"{name}_assign"][clear])
