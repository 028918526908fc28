"""Starting centres for large k by k-means||: a few rounds of many draws instead of k rounds.

Called by `kmeans`. Section 4 of the curation spec.
"""

import numpy as np
from jaxtyping import Float32, Int64

from data_curation.device_rows import DeviceRows, device_rows
from data_curation.embeddings import as_embeddings
from data_curation.lloyd import lloyd_pass
from data_curation.seeding import greedy, trials_for

_ROUNDS, _OVERSAMPLING = 5, 2  # of k-means||


def kmeans_parallel(rows: DeviceRows, k: int, rng: np.random.Generator) -> Int64[np.ndarray, " c"]:
    """k-means|| (Bahmani et al. 2012): rounds of many draws, then k-means++ of what was drawn.

    Each row is taken with probability min(1, 2k D / sum of D), five times over, and weighs as many
    rows as are nearest to it. For k of 100,000 and more, where one round for each centre is slow.
    """
    x, (start, stop) = rows.x, rows.ranges[rows.mine]
    chosen = np.asarray([rng.integers(len(x))], np.int64)
    d = _distances(rows, rows.vectors(chosen))
    found = [chosen]
    for number in range(1000):  # rounds after the fifth only where rows lie very unevenly
        total = rows.join(np.asarray([d.sum(dtype=np.float64)])).sum()
        if total == 0 or (number >= _ROUNDS and sum(map(len, found)) >= k):
            break
        uniform = np.random.default_rng(rng.integers(2**63)).bit_generator.advance(start)
        taken = np.random.Generator(uniform).random(stop - start) < _OVERSAMPLING * k * d / total
        chosen = rows.join(start + np.flatnonzero(taken))
        if len(chosen):
            d = np.minimum(d, _distances(rows, rows.vectors(chosen)))
            found.append(chosen)
    positions = np.unique(np.concatenate(found))
    if len(positions) <= k:
        return positions
    candidates = rows.vectors(positions)
    counts = lloyd_pass(rows, _padded(candidates), "l2").counts[: len(candidates)]
    weights = counts.astype(np.float32)
    few = device_rows(as_embeddings(candidates), rows.mesh, rows.shift)
    picked, _ = greedy(few, k, rng, trials_for(k), weights=weights)
    return positions[picked]


def _distances(rows: DeviceRows, centres: Float32[np.ndarray, "m d"]) -> Float32[np.ndarray, " r"]:
    """Squared distance of this process's rows to the nearest of some vectors."""
    parts = []
    lloyd_pass(
        rows,
        _padded(centres),
        "l2",
        visit=lambda c, _, away: parts.append(rows.collect(away, c.count)),
    )
    return np.concatenate(parts)


def _padded(centres: Float32[np.ndarray, "m d"]) -> Float32[np.ndarray, "p d"]:
    """Copies of the first behind them, to which no row goes: a power of two compiles once."""
    count = 1 << max(len(centres) - 1, 63).bit_length()
    return np.concatenate([centres, np.repeat(centres[:1], count - len(centres), axis=0)])
