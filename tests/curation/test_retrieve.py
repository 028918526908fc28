"""Retrieval: counting, filling up, drawing from clusters, subsets."""

import numpy as np
import pytest

from data_curation.embeddings import as_embeddings
from data_curation.retrieve import overlap, retrieve_clusters, retrieve_samples


def points(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 6)).astype(np.float32)


POOL, QUERIES = points(300, 0), points(40, 1)


def ranked() -> tuple[np.ndarray, np.ndarray]:
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (QUERIES, POOL)]
    sims = unit[0] @ unit[1].T
    return np.argsort(-sims, axis=1), -np.sort(-sims, axis=1)


def test_merge_counts_collisions():
    ids, sims = ranked()
    found = retrieve_samples(POOL, QUERIES, 4)
    rows, counts = np.unique(ids[:, :4], return_counts=True)
    np.testing.assert_array_equal(found.rows, rows)
    np.testing.assert_array_equal(found.count, counts)
    for row, query, sim in zip(found.rows, found.query, found.sim):
        asked, rank = np.nonzero(ids[:, :4] == row)
        assert query == asked[np.argmax(sims[asked, rank])]
        assert sim == pytest.approx(sims[asked, rank].max(), abs=1e-6)
    report = found.report
    assert report["collided"] == 160 - len(rows) and report["filled"] == 0
    assert report["similarities"].sum() == (found.sim >= 0).sum() and len(report["examples"]) == 32


def test_fill_goes_on_by_similarity():
    ids, sims = ranked()
    merged = retrieve_samples(POOL, QUERIES, 4)
    found = retrieve_samples(POOL, QUERIES, 4, "fill", max_rank=12)
    assert len(found.rows) == 160 and np.isin(merged.rows, found.rows).all()
    more = {}
    for row, sim in zip(ids[:, 4:12].reshape(-1), sims[:, 4:12].reshape(-1)):
        if row not in merged.rows:
            more[row] = max(sim, more.get(row, -1))
    best = sorted(more, key=lambda row: -more[row])[: 160 - len(merged.rows)]
    assert set(found.rows) - set(merged.rows) == set(best)
    short = retrieve_samples(POOL, QUERIES, 4, "fill", max_rank=4)  # nothing further to look at
    np.testing.assert_array_equal(short.rows, merged.rows)


def test_rows_of_the_full_sets():
    pool = as_embeddings(POOL).restrict(np.arange(0, 300, 2))
    queries = as_embeddings(QUERIES).restrict(np.arange(1, 40, 2))
    found = retrieve_samples(pool, queries, 3)
    plain = retrieve_samples(POOL[::2], QUERIES[1::2], 3)
    np.testing.assert_array_equal(found.rows, 2 * plain.rows)
    np.testing.assert_array_equal(found.query, 2 * plain.query + 1)


def test_what_is_refused():
    for wrong, why in (
        (dict(n=301), "n = 301 neighbours from 300"),
        (dict(n=5, collisions="fill", max_rank=4), "4 deep"),
        (dict(collisions="filled"), "did you mean 'fill'"),
    ):
        with pytest.raises(ValueError, match=why):
            retrieve_samples(POOL, QUERIES, **wrong)
    with pytest.raises(ValueError, match="per_cluster is 0"):
        retrieve_clusters(np.zeros(3, int), np.zeros(3, int), 0)


def test_clusters_with_more_than_enough_queries():
    pool = np.repeat([0, 1, 2, 3, -1], [50, 5, 30, 20, 9])
    queries = np.repeat([0, 1, 2, -1], [4, 9, 3, 30])  # cluster 2 has three, not more
    found = retrieve_clusters(pool, queries, per_cluster=10)
    assert found.eligible.tolist() == [0, 1] and found.take.tolist() == [10, 5]
    assert (found.cluster == pool[found.rows]).all() and len(np.unique(found.rows)) == 15
    again = retrieve_clusters(pool, queries, per_cluster=10)
    np.testing.assert_array_equal(found.rows, again.rows)
    other = retrieve_clusters(pool, queries, per_cluster=10, seed=1)
    assert not np.array_equal(found.rows, other.rows)
    capped = retrieve_clusters(pool, queries, per_cluster=10, cap=7)
    assert len(capped.rows) == 7 and np.isin(capped.rows, found.rows).all()
    assert capped.report["before_cap"] == 15
    # What is drawn from a cluster does not depend on the others.
    alone = retrieve_clusters(pool, queries[:4], per_cluster=10)
    np.testing.assert_array_equal(alone.rows, found.rows[found.cluster == 0])
    none = retrieve_clusters(pool, queries[-30:])
    assert len(none.rows) == 0 and none.report["eligible"] == 0


def test_draws_are_uniform():
    pool, queries = np.zeros(40, int), np.zeros(9, int)
    drawn = [retrieve_clusters(pool, queries, 20, cap=10, seed=s).rows for s in range(400)]
    counts = np.bincount(np.concatenate(drawn), minlength=40)  # 100 each, deviation 8.7
    assert counts.min() > 60 and counts.max() < 140


def test_overlap():
    sets = {"a": np.array([1, 2, 3]), "b": np.array([3, 4])}
    assert overlap(sets) == {"a": {"a": 3, "b": 1}, "b": {"a": 1, "b": 2}}
