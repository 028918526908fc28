"""How many rows each cluster gives: a target shared as equally as the clusters' sizes allow.

Section 6 of the curation spec. `allot` shares among one list of siblings, `allot_tree` down all
levels of a tree, every sibling group of a level at once. Called by `sample.py`, which then draws
the rows, and by the report, which shows the cuts.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int64, UInt64

from data_curation.draws import hashed
from data_curation.tree import ClusterTree, ranks


class Shares(NamedTuple):
    """What the clusters of one level are asked for."""

    cuts: Int64[np.ndarray, " g"]  # most that a cluster gives, remainder aside; one per parent
    shares: Int64[np.ndarray, " k"]  # rows with repeats


def allot(
    sizes: Int[np.ndarray, " n"],
    target: int,
    multiplier: int = 1,
    rng: np.random.Generator | None = None,
) -> tuple[int, Int64[np.ndarray, " n"]]:
    """Shares a target among siblings of `sizes` rows, each row given at most `multiplier` times.

    Everyone gives min(cut, capacity) for the largest cut that does not pass the target. What then
    remains, less than one each, is given by as many siblings above the cut, drawn uniformly.

    Returns:
      The cut (the largest capacity if the target takes everything) and the shares, whose sum is
      min(target, multiplier * sizes.sum()) exactly.

    Raises:
      ValueError: a target below 0, or a multiplier below 1.
    """
    check(target, multiplier)
    rng = np.random.default_rng(0) if rng is None else rng
    capacities = np.asarray(sizes, np.int64) * multiplier
    priority = rng.integers(2**64, size=len(capacities), dtype=np.uint64)
    whole = np.array([0, len(capacities)])
    cuts, shares = allot_groups(capacities, np.array([target]), whole, priority)
    return int(cuts[0]), shares


def allot_tree(
    tree: ClusterTree, target: int, multiplier: int = 1, key: int = 0
) -> tuple[Shares, ...]:
    """Shares of all clusters, level 1 first: each level's among the children by leaf counts.

    Who gives a remainder follows from (key, level, cluster) alone. One key gives nested shares: no
    cluster gives less to a larger target.
    """
    check(target, multiplier)
    top = tree.depth
    offsets = np.array([0, len(tree.levels[-1])])
    children, targets = np.arange(len(tree.levels[-1])), np.array([target])
    found: list[Shares] = []
    for level in range(top, 0, -1):
        capacities = tree.leaf_counts(level)[children] * multiplier
        priority = hashed(children, key, level)
        cuts, given = allot_groups(capacities, targets, offsets, priority)
        targets = np.zeros(len(children), np.int64)
        targets[children] = given
        found.append(Shares(cuts, targets))
        below = tree.levels[level - 1]
        children, offsets = below.members, below.offsets
    return tuple(reversed(found))


def allot_groups(
    capacities: Int64[np.ndarray, " n"],
    targets: Int[np.ndarray, " g"],
    offsets: Int[np.ndarray, " g+1"],
    priority: UInt64[np.ndarray, " n"],
) -> tuple[Int64[np.ndarray, " g"], Int64[np.ndarray, " n"]]:
    """`allot` for many sibling groups at once: group i is offsets[i]:offsets[i + 1].

    In ascending order of capacity the sum of min(x, capacity) is piecewise linear in x, with a bend
    at each capacity; the cut lies between the last bend that stays within the target and the next.
    Lowest `priority` takes the remainder first.
    """
    sizes = np.diff(offsets)
    group = np.repeat(np.arange(len(sizes)), sizes)
    ascending = capacities[np.lexsort((capacities, group))]
    running = np.concatenate(([0], np.cumsum(ascending)))
    before = running[:-1] - running[offsets[:-1]][group]  # in the group, below this bend
    above = sizes[group] - ranks(offsets)  # members at this bend or over it
    total = running[offsets[1:]] - running[offsets[:-1]]
    within = before + above * ascending <= targets[group]
    bends = segment_sums(within.astype(np.int64), offsets)
    settled = running[offsets[:-1] + bends] - running[offsets[:-1]]  # given by those up to there
    everything = total <= targets
    cuts = (targets - settled) // np.maximum(sizes - bends, 1)
    largest = np.concatenate((ascending, [0]))[np.maximum(offsets[1:] - 1, 0)]
    cuts = np.where(everything, np.where(sizes > 0, largest, 0), cuts)
    shares = np.minimum(cuts[group], capacities)
    rest = np.where(everything, 0, targets - segment_sums(shares, offsets))
    shares[_first(capacities > cuts[group], group, priority, rest)] += 1
    return cuts, shares


def _first(
    eligible: np.ndarray,
    group: Int[np.ndarray, " n"],
    priority: UInt64[np.ndarray, " n"],
    counts: Int64[np.ndarray, " g"],
) -> Int64[np.ndarray, " m"]:
    """Places of the counts[i] eligible members of lowest priority in each group i."""
    places = np.flatnonzero(eligible & (counts > 0)[group])
    places = places[np.lexsort((priority[places], group[places]))]
    held = np.bincount(group[places], minlength=len(counts))
    bounds = np.concatenate(([0], np.cumsum(held)))
    return places[ranks(bounds) < counts[group[places]]]


def segment_sums(
    values: Int64[np.ndarray, " n"], offsets: Int[np.ndarray, " h"]
) -> Int64[np.ndarray, " g"]:
    """Sums of values[offsets[i]:offsets[i + 1]], empty ones included (h = g + 1)."""
    running = np.concatenate(([0], np.cumsum(values)))
    return running[offsets[1:]] - running[offsets[:-1]]


def check(target: int, multiplier: int) -> None:
    """Refuses a target or a multiplier that means nothing."""
    if target < 0:
        raise ValueError(f"target is {target}; expected a number of rows, 0 or more")
    if multiplier < 1:
        raise ValueError(
            f"multiplier is {multiplier}; expected 1 or more (most times a row may come)"
        )
