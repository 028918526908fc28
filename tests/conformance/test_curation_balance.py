"""Figures of balance, and the divergence of 2-D points, against the reference's."""

import numpy as np
import vectors

from data_curation.balance import balance_metrics, kl_from_uniform

COLUMNS = ("clusters", "points", "empty", "min", "max", "imbalance", "gini", "entropy")
COLUMNS += ("effective", "variation", "top1")


@vectors.files("curation/balance_metrics")
def test_balance_metrics(case):
    sizes, offsets = case["sizes"], case["offsets"]
    assert len(case["metrics"]) == len(offsets) - 1
    for start, stop, expected in zip(offsets, offsets[1:], case["metrics"]):
        metrics = balance_metrics(sizes[start:stop])
        ours = np.array([metrics[name] for name in COLUMNS])
        vectors.assert_close(ours, expected, atol=1e-9, rtol=1e-9, name=f"sizes at {start}")


@vectors.files("curation/gauss2d")
def test_divergence_of_the_data(case):
    expected = case["kl_values"][case["kl_names"].tolist().index("data")]
    assert abs(kl_from_uniform(case["X"]) - expected) < 1e-6


@vectors.files("curation/gauss2d")
def test_divergence_of_uniform_points(case):
    rng = np.random.default_rng(0)
    drawn = [kl_from_uniform(rng.uniform(-3, 3, (300, 2))) for _ in range(50)]
    mean, deviation = case["kl_uniform300_mean_std"]
    assert abs(np.mean(drawn) - mean) < 4 * deviation / np.sqrt(50)
