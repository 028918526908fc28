"""Figures of balance at sizes where they are known, and what is warned of."""

import numpy as np
import pytest

from data_curation.balance import balance_metrics, balance_warnings, kl_from_uniform


def test_equal_clusters():
    metrics = balance_metrics(np.full(200, 7))
    assert metrics["imbalance"] == pytest.approx(1) and metrics["gini"] == pytest.approx(0)
    assert metrics["entropy"] == pytest.approx(1) and metrics["effective"] == pytest.approx(200)
    assert metrics["variation"] == 0 and metrics["top1"] == pytest.approx(2 / 200)
    assert metrics["p1"] == metrics["median"] == metrics["p99"] == metrics["mean"] == 7


def test_all_in_one():
    metrics = balance_metrics(np.array([0, 12, 0, 0]))
    assert metrics["imbalance"] == pytest.approx(4) and metrics["gini"] == pytest.approx(3 / 4)
    assert metrics["entropy"] == 0 and metrics["effective"] == 1 and metrics["top1"] == 1
    assert (metrics["empty"], metrics["min"], metrics["max"], metrics["points"]) == (3, 0, 12, 12)
    assert balance_metrics(np.array([5]))["entropy"] == 1


def test_large_sizes_do_not_overflow():
    assert balance_metrics(np.full(10, 10**10))["imbalance"] == pytest.approx(1)


@pytest.mark.parametrize("sizes", [[], [0, 0], [3, -1]])
def test_sizes_that_mean_nothing(sizes):
    with pytest.raises(ValueError, match="cluster sizes are"):
        balance_metrics(np.array(sizes, int))


def test_warnings():
    assert balance_warnings(np.array([3, 4, 5]), "level 1") == []
    one, two = balance_warnings(np.array([970] + [1] * 30), "level 2")
    assert one == "level 2: imbalance factor 29.2, above 20"
    assert two == "level 2: one cluster holds 97% of the rows"
    assert balance_warnings(np.array([9]), "level 3") == []  # one cluster is meant to hold all


def test_divergence_from_uniform():
    side = np.linspace(-2.99, 2.99, 60)
    even = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
    assert 0 < kl_from_uniform(even) < 0.05  # not 0: the kernel spills over the border
    # A single point's density is a Gaussian of the kernel's width: KL = ln 36 - ln(2 pi e h^2).
    expected = np.log(36) - np.log(2 * np.pi * np.e * 0.25)
    assert kl_from_uniform(np.zeros((1, 2))) == pytest.approx(expected, abs=1e-3)
