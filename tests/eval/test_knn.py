"""k-NN against a plain float64 version, its invariants, and its floors."""

import jax
import numpy as np
import pytest

from dinojax import sharding
from dinojax.eval import knn


def reference(bank, labels, queries, k, temperature, classes, kmax):
    """Section 1 of the evaluation spec, word for word, in float64."""
    bank = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    scores = np.zeros((len(queries), classes))
    for row, query in enumerate(queries):
        similarity = bank @ query
        order = np.argsort(-similarity)[:kmax]
        weights = np.exp(similarity[order] / temperature)
        weights /= weights.sum()
        for neighbour, weight in zip(order[:k], weights[:k]):
            scores[row, labels[neighbour]] += weight
    return scores


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(6, 12))
    labels = np.arange(90) % 6
    bank = centres[labels] + 0.8 * rng.normal(size=(90, 12))
    queries = centres[np.arange(30) % 6] + 0.8 * rng.normal(size=(30, 12))
    return bank, labels, queries, np.arange(30) % 6


@pytest.mark.parametrize("bank_chunk, query_chunk", [(8192, 256), (16, 7)])
def test_scores_equal_the_plain_version(problem, monkeypatch, bank_chunk, query_chunk):
    monkeypatch.setattr(knn, "_BANK_CHUNK", bank_chunk)
    monkeypatch.setattr(knn, "_QUERY_CHUNK", query_chunk)
    bank, labels, queries, _ = problem
    scores = knn.knn_scores(bank, labels, queries, ks=(1, 5, 20))
    assert list(scores) == [1, 5, 20]
    for k, table in scores.items():
        expected = reference(bank, labels, queries, k, 0.07, 6, kmax=20)
        np.testing.assert_allclose(table, expected, atol=2e-6)


def test_under_the_mesh_and_the_transfer_guard_of_a_run(problem):
    bank, labels, queries, _ = problem
    expected = knn.knn_scores(bank, labels, queries)[20]
    with jax.set_mesh(sharding.make_mesh(2, -1, 1)), jax.transfer_guard("disallow"):
        found = knn.knn_scores(bank, labels, queries)[20]
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_scale_of_the_features_does_not_matter(problem):
    bank, labels, queries, _ = problem
    scales = np.random.default_rng(1).uniform(0.1, 10, (90, 1))
    one = knn.knn_scores(bank, labels, queries)[20]
    other = knn.knn_scores(scales * bank, labels, 3 * queries)[20]
    np.testing.assert_allclose(one, other, atol=2e-6)


def test_skip_first_leaves_the_query_itself_out(problem):
    bank, labels, _, _ = problem
    with_itself = knn.knn_scores(bank, labels, bank, ks=(1,))[1]
    assert knn.accuracy(with_itself, labels) == 100.0
    scores = knn.knn_scores(bank, labels, bank, ks=(3,), skip_first=True)[3]
    for row in (0, 41):
        others = np.delete(np.arange(90), row)
        expected = reference(bank[others], labels[others], bank[row : row + 1], 3, 0.07, 6, 3)
        np.testing.assert_allclose(scores[row], expected[0], atol=2e-6)


def test_k_is_capped_and_duplicates_go(problem):
    bank, labels, queries, _ = problem
    assert list(knn.knn_scores(bank[:7], labels[:7], queries, ks=(10, 200, 3))) == [3, 7]
    with pytest.raises(ValueError, match="at least one neighbour"):
        knn.knn_scores(bank[:1], labels[:1], bank[:1], skip_first=True)


def test_accuracy_by_hand():
    scores = np.array([[0.1, 0.7, 0.2], [0.5, 0.1, 0.4], [0.0, 0.0, 1.0]], np.float32)
    labels = np.array([1, 2, 5], np.int32)  # 5: a class that the bank does not hold
    assert knn.accuracy(scores, labels) == pytest.approx(100 / 3)
    assert knn.accuracy(scores, labels, top=2) == pytest.approx(200 / 3)


class Squares:
    """A labelled source: the class is where the bright square stands."""

    def __init__(self, count, seed):
        self.count, self.seed = count, seed

    def __len__(self):
        return self.count

    def labels(self):
        return np.arange(self.count) % 5

    def encoded(self, i):
        raise NotImplementedError

    def image(self, index):
        image = np.random.default_rng([self.seed, index]).integers(0, 60, (20, 20, 3))
        start = 4 * (index % 5)
        image[start : start + 4, start : start + 4] += 180
        return image.astype(np.uint8)


def test_evaluator_reports_every_k_and_the_floor():
    evaluator = knn.Evaluator(Squares(60, 0), Squares(25, 1), size=20, k=(1, 10), batch=16)
    shapes = []

    def good(images):
        shapes.append(images.shape)
        return images.astype(np.float32).mean(axis=(2, 3)) - 60

    found = dict(evaluator.run(good))
    assert list(found) == ["knn1/top1", "knn1/top5", "knn10/top1", "knn10/top5"]
    assert found["knn10/top1"] == 100.0 and found["knn10/top5"] == 100.0
    assert set(shapes) == {(16, 20, 20, 3)}  # one static shape: one compile
    blind = dict(evaluator.run(lambda images: np.ones((len(images), 4), np.float32)))
    assert blind["knn10/top1"] == pytest.approx(20.0)
    assert dict(evaluator.pixel_knn())["knn10/top1"] > 90
