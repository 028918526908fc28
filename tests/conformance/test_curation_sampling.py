"""Allotment and balanced sampling against the reference's.

Who gets a remainder, and which members come under "random", is chance: what can be compared is what
a share may be, and, from the reference's own shares, which rows are nearest.
"""

import numpy as np
import vectors

from data_curation import sample
from data_curation.allot import allot, allot_tree
from data_curation.tree import ClusterTree


@vectors.files("curation/allocation")
def test_allotment(case):
    offsets = case["offsets"]
    for number, (start, stop) in enumerate(zip(offsets, offsets[1:])):
        sizes, base = case["sizes"][start:stop], case["base"][start:stop]
        multiplier, target, cut, remainder, everything, above = map(int, case["meta"][number])
        ours, shares = allot(sizes, target, multiplier, np.random.default_rng(number))
        more = shares - base
        assert ours == cut
        assert more.sum() == remainder and set(more.tolist()) <= {0, 1}
        assert np.all((sizes * multiplier > cut)[more > 0])
        assert everything or np.sum(sizes * multiplier > cut) == above


def trees(case: vectors.Case) -> list[str]:
    return case.matching(r"[^_]+(?=_n_levels)")


def read_tree(case: vectors.Case, name: str) -> ClusterTree:
    levels = []
    for level in range(1, int(case[f"{name}_n_levels"]) + 1):
        members, offsets = case[f"{name}_L{level}_members"], case[f"{name}_L{level}_offsets"]
        levels.append(np.split(members, offsets[1:-1]))
    return ClusterTree.from_lists(*levels)


def valid(tree: ClusterTree, shares: list[np.ndarray], target: int, multiplier: int) -> bool:
    """Whether shares of all levels, lowest first, are an allotment of the target."""
    capacities = [tree.leaf_counts(level + 1) * multiplier for level in range(tree.depth)]
    groups = [(np.arange(len(shares[-1])), target, tree.depth - 1)]
    for level in range(tree.depth - 1, 0, -1):
        offsets, members = tree.levels[level].offsets, tree.levels[level].members
        for cluster, share in enumerate(shares[level]):
            children = members[offsets[cluster] : offsets[cluster + 1]]
            groups.append((children, int(share), level - 1))
    return all(
        fair(shares[level][children], capacities[level][children], share)
        for children, share, level in groups
    )


def fair(given: np.ndarray, room: np.ndarray, target: int) -> bool:
    """The totals exact, and those with room left at most one below anybody."""
    short = given[given < room]
    exact = given.sum() == min(target, room.sum()) and np.all(given <= room)
    return exact and (not len(short) or given.max() - short.min() <= 1)


@vectors.files("curation/hierarchical_sampling", sub=trees)
def test_leaf_counts(case, sub):
    tree = read_tree(case, sub)
    for level in range(1, tree.depth + 1):
        assert np.array_equal(tree.leaf_counts(level), case[f"{sub}_L{level}_leafcount"])


@vectors.files("curation/hierarchical_sampling", sub=trees)
def test_balanced_samples(case, sub):
    tree = read_tree(case, sub)
    lowest = tree.levels[0]
    for number in range(int(case[f"{sub}_n_cases"])):
        run = f"{sub}_c{number}"
        target, multiplier, closest, seed = map(int, case[f"{run}_meta"])
        stored = [
            case[f"{run}_targets_L{level}"].astype(np.int64) for level in range(1, tree.depth + 1)
        ]
        assert valid(tree, stored, target, multiplier)
        ours = allot_tree(tree, target, multiplier, key=seed)
        assert valid(tree, [level.shares for level in ours], target, multiplier)

        expected, strategy = case[f"{run}_indices"], "c" if closest else "r"
        options = {"strategy": strategy, "multiplier": multiplier, "order": "tree"}
        rows = sample.hierarchical_sample(tree, target, **options)
        assert len(rows) == len(expected)
        # From the reference's own shares: its rows in its order, or as many of each cluster.
        rows = sample.draw(
            lowest.members, lowest.offsets, sample.depth_first(tree), stored[0], strategy, 0, "tree"
        )
        if closest:
            assert np.array_equal(rows, expected)
        else:
            assert np.array_equal(tree.cluster_of(rows, 1), tree.cluster_of(expected, 1))


@vectors.files("curation/hierarchical_sampling", sub=trees)
def test_equal_splits_leave_nothing_to_chance(case, sub):
    """Where no group has a remainder, the closest rows are the reference's from end to end."""
    tree = read_tree(case, sub)
    for number in range(int(case[f"{sub}_n_cases"])):
        run = f"{sub}_c{number}"
        target, multiplier, closest, _ = map(int, case[f"{run}_meta"])
        keys = [allot_tree(tree, target, multiplier, key)[0].shares for key in range(4)]
        if closest and multiplier == 1 and all(np.array_equal(keys[0], k) for k in keys[1:]):
            rows = sample.hierarchical_sample(tree, target, strategy="c", order="tree")
            assert np.array_equal(rows, case[f"{run}_indices"])
