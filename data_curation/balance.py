"""How equal cluster sizes are, and how uniform points of a plane.

Section 12 of the curation spec. Called by `hierarchy.py` and the reports for every level, by the
toy sets for the figures of section 15.
"""

import numpy as np
from jaxtyping import Float, Int

PERCENTILES = (1, 5, 25, 75, 95, 99)


def balance_metrics(sizes: Int[np.ndarray, " k"]) -> dict[str, int | float]:
    """Size statistics of k clusters of n_i points, empty ones included.

    `imbalance` is k sum(n^2) / sum(n)^2 (1: all equal, k: all in one), `gini` the Gini coefficient
    (0: equal), `entropy` that of the shares over ln k (1: equal; 1 for a single cluster),
    `effective` exp(entropy) clusters, `variation` the standard deviation over the mean, `top1` the
    share of the largest 1% of clusters, rounded up.

    Raises:
      ValueError: no cluster, a negative size, or no points.
    """
    n = np.sort(np.asarray(sizes, np.float64))
    if len(n) == 0 or n[0] < 0 or n[-1] == 0:
        what = "none" if len(n) == 0 else f"{n[0]:.0f} to {n[-1]:.0f}"
        raise ValueError(f"cluster sizes are {what}; expected 0 or more each and one above 0")
    k, total = len(n), n.sum()
    share = n[n > 0] / total
    entropy = max(float(-(share * np.log(share)).sum()), 0.0)
    metrics = {
        "clusters": k,
        "points": int(total),
        "empty": int((n == 0).sum()),
        "min": int(n[0]),
        "max": int(n[-1]),
        "mean": total / k,
        "median": np.median(n),
        **{f"p{p}": np.percentile(n, p) for p in PERCENTILES},
        "imbalance": k * (n / total @ (n / total)),
        "gini": (2 * np.arange(1, k + 1) - k - 1) @ n / (k * total),
        "entropy": entropy / np.log(k) if k > 1 else 1.0,
        "effective": np.exp(entropy),
        "variation": n.std() / n.mean(),
        "top1": n[-int(np.ceil(k / 100)) :].sum() / total,
    }
    return {
        name: value if isinstance(value, int) else float(value) for name, value in metrics.items()
    }


def balance_warnings(
    sizes: Int[np.ndarray, " k"], what: str, warn_imbalance: float = 20.0
) -> list[str]:
    """Sentences about clusters that balance nothing: the data may have no structure to find.

    Args:
      sizes: rows under each cluster.
      what: whose sizes, as the sentence begins: "level 2".
      warn_imbalance: imbalance factor above which to warn.
    """
    metrics = balance_metrics(sizes)
    largest, imbalance = metrics["max"] / metrics["points"], metrics["imbalance"]
    found = []
    if imbalance > warn_imbalance:
        found.append(f"{what}: imbalance factor {imbalance:.1f}, above {warn_imbalance:g}")
    if largest > 0.5 and metrics["clusters"] > 1:
        found.append(f"{what}: one cluster holds {largest:.0%} of the rows")
    return found


def kl_from_uniform(
    points: Float[np.ndarray, "n 2"], half: float = 3.0, step: float = 0.02, bandwidth: float = 0.5
) -> float:
    """KL(p || u) in nats of the density p of points, u uniform on [-half, half]^2; 0 is uniform.

    p is a Gaussian kernel estimate on a grid, normalised to 1 there.
    """
    grid = np.arange(-half, half, step)
    # The Gaussian kernel factors over the axes: the grid's density is one product of two tables.
    along = [
        np.exp(-((grid[:, None] - points[None, :, axis]) ** 2) / (2 * bandwidth**2))
        for axis in (0, 1)
    ]
    p = along[0] @ along[1].T
    p /= p.sum() * step**2
    return float((p * np.log(np.maximum(p, 1e-300) * (2 * half) ** 2)).sum() * step**2)
