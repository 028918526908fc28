"""Random numbers that follow from names and numbers alone: no state, no order, any machine.

Called by `allot.py`, `sample.py`, `hierarchy.py` and `split.py`.
"""

import numpy as np
from jaxtyping import Int, UInt64


def hashed(ids: Int[np.ndarray, " n"], *key: int) -> UInt64[np.ndarray, " n"]:
    """Uniform 64-bit numbers, a function of (key, id).

    The finaliser of SplitMix64 (Steele, Lea & Flood 2014) over the ids, offset by the key.
    """
    state = np.random.SeedSequence([part % 2**64 for part in key]).generate_state(2, np.uint64)
    with np.errstate(over="ignore"):
        z = np.asarray(ids).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + state[0]
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z ^= z >> np.uint64(shift)
            z *= np.uint64(factor)
        return z ^ (z >> np.uint64(31)) ^ state[1]


def derived_seed(*parts: int) -> int:
    """A seed of 31 bits for one of many draws, from the run's seed and the draw's place."""
    state = np.random.SeedSequence([part % 2**64 for part in parts]).generate_state(1)
    return int(state[0] >> 1)
