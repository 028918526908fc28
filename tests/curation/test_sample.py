"""Allotment and balanced sampling: exact totals, fair shares, the same draws everywhere."""

import numpy as np
import pytest

from data_curation import sample
from data_curation.allot import allot, allot_groups, allot_tree
from data_curation.draws import hashed
from data_curation.sample import flat_sample, hierarchical_sample
from data_curation.tree import ClusterTree


def random_tree(rng: np.random.Generator, rows: int, *clusters: int) -> ClusterTree:
    """A tree whose members are drawn unevenly, so that clusters are empty anywhere."""
    levels, inputs = [], rows
    for k in clusters:
        weight = rng.pareto(1.0, k) + 1e-3
        parent = rng.choice(k, inputs, p=weight / weight.sum())
        levels.append([rng.permutation(np.flatnonzero(parent == c)) for c in range(k)])
        inputs = k
    return ClusterTree.from_lists(*levels)


def random_trees(count: int):
    rng = np.random.default_rng(1)
    shapes = ((1,), (9,), (30, 5), (30, 1), (40, 12, 4), (20, 30, 3))
    for number in range(count):
        rows = int(rng.integers(1, 400))
        yield random_tree(rng, rows, *shapes[number % len(shapes)]), rows, rng


def slow_cut(capacities: np.ndarray, target: int) -> int:
    """The cut by its definition, one by one."""
    if capacities.sum() <= target:
        return int(capacities.max(initial=0))
    cut = 0
    while np.minimum(cut + 1, capacities).sum() <= target:
        cut += 1
    return cut


def test_allot_is_its_definition():
    rng = np.random.default_rng(0)
    for _ in range(300):
        sizes, m = rng.integers(0, 30, rng.integers(1, 12)), int(rng.integers(1, 4))
        target = int(rng.integers(0, m * sizes.sum() + 3))
        cut, shares = allot(sizes, target, m, rng)
        base = np.minimum(cut, sizes * m)
        assert cut == slow_cut(sizes * m, target)
        assert shares.sum() == min(target, m * sizes.sum())
        assert set((shares - base).tolist()) <= {0, 1}
        assert np.all(shares <= sizes * m)


def test_remainder_is_uniform():
    rng = np.random.default_rng(0)
    drawn = sum(allot(np.array([9, 9, 1, 9]), 9, 1, rng)[1] for _ in range(3000))
    # 2 each and 1, then 2 more among the three large ones: 2/3 of the time each; sd 26 of 3000.
    np.testing.assert_allclose(drawn, [8000, 8000, 3000, 8000], atol=130)


def test_groups_are_each_as_if_alone():
    rng = np.random.default_rng(2)
    sizes = np.array([0, 3, 1, 0, 6, 0])  # groups without members first, last and between
    offsets = np.concatenate(([0], np.cumsum(sizes)))
    for _ in range(200):
        capacities, priority = rng.integers(0, 9, 10), rng.integers(0, 99, 10).astype(np.uint64)
        targets = rng.integers(0, 30, len(sizes))
        cuts, shares = allot_groups(capacities, targets, offsets, priority)
        for i, (start, stop) in enumerate(zip(offsets, offsets[1:])):
            own, given = capacities[start:stop], shares[start:stop]
            assert cuts[i] == slow_cut(own, targets[i])
            base = np.minimum(cuts[i], own)
            rest = min(targets[i], own.sum()) - base.sum()
            above = np.flatnonzero(own > cuts[i])
            lucky = above[np.argsort(priority[start:stop][above], kind="stable")][:rest]
            assert given.tolist() == (base + np.isin(np.arange(len(own)), lucky)).tolist()


@pytest.mark.parametrize("strategy", ["r", "c", "f"])
def test_totals_repeats_and_shares_on_random_trees(strategy):
    for tree, n, rng in random_trees(60):
        m, seed = int(rng.integers(1, 4)), int(rng.integers(99))
        for target in {0, 1, n - 1, n, n + 1, m * n, m * n + 1, int(rng.integers(m * n))}:
            options = {"strategy": strategy, "multiplier": m, "seed": seed}
            rows = hierarchical_sample(tree, target, **options)
            times = np.bincount(rows, minlength=n)
            assert len(rows) == min(target, m * n) and times.max() <= m
            assert np.array_equal(rows, np.sort(rows))
            check_shares(tree, rows, m)
            in_cluster = np.split(times[tree.levels[0].members], tree.levels[0].offsets[1:-1])
            for own in in_cluster:  # nobody comes twice before all have come once
                assert np.ptp(own) <= 1 if len(own) else True
                if strategy != "r":
                    assert np.all(np.diff(own) <= 0 if strategy == "c" else np.diff(own) >= 0)


def check_shares(tree: ClusterTree, rows: np.ndarray, m: int) -> None:
    """Among siblings: everyone who is not exhausted gives the same, or one more."""
    given = [len(rows)]
    children, offsets = np.arange(len(tree.levels[-1])), [0, len(tree.levels[-1])]
    for level in range(tree.depth, 0, -1):
        k = len(tree.levels[level - 1])
        own = np.bincount(tree.cluster_of(rows, level), minlength=k)
        room = m * tree.leaf_counts(level)
        for parent, (start, stop) in enumerate(zip(offsets, offsets[1:])):
            siblings = children[start:stop]
            assert own[siblings].sum() == given[parent]
            short = own[siblings][own[siblings] < room[siblings]]
            if len(short):
                assert np.ptp(short) <= 1 and own[siblings].max() <= short.min() + 1
        below = tree.levels[level - 1]
        given, children, offsets = own, below.members, below.offsets


def test_nested_samples_contain_one_another():
    for tree, n, _ in random_trees(24):
        before = np.zeros(n, int)
        for target in range(0, 2 * n + 1, max(n // 5, 1)):
            rows = hierarchical_sample(tree, target, multiplier=2, nested=True, seed=3)
            times = np.bincount(rows, minlength=n)
            assert np.all(times >= before)
            before = times


def test_independent_samples_differ():
    tree = random_tree(np.random.default_rng(0), 2000, 20)
    nested, alone = (
        hierarchical_sample(tree, 500, seed=1, nested=nested) for nested in (True, False)
    )
    other = hierarchical_sample(tree, 500, seed=2)
    assert 0 < len(np.intersect1d(nested, alone)) < 400
    assert 0 < len(np.intersect1d(other, alone)) < 400


def test_rows_are_drawn_uniformly():
    tree = ClusterTree.from_lists([np.arange(50), np.arange(50, 53)])
    times = np.zeros(53)
    for seed in range(800):
        times[hierarchical_sample(tree, 13, seed=seed)] += 1
    # 3 of 3 rows, 10 of 50 others: 160 times each, sd 11.
    np.testing.assert_allclose(times, [160] * 50 + [800] * 3, atol=50)


def test_blocks_do_not_matter(monkeypatch):
    tree = random_tree(np.random.default_rng(4), 3000, 60, 7)
    expected = {s: hierarchical_sample(tree, 700, strategy=s, order="tree") for s in "rcf"}
    monkeypatch.setattr(sample, "BLOCK_ROWS", 50)
    for strategy, rows in expected.items():
        again = hierarchical_sample(tree, 700, strategy=strategy, order="tree")
        assert np.array_equal(again, rows)


def test_numbering_of_unrelated_clusters_does_not_matter():
    """Draws follow from the row: a cluster whose place in the arrays changes gives the same."""
    parts = [np.arange(40), np.arange(40, 80), np.arange(80, 120)]
    one = hierarchical_sample(ClusterTree.from_lists(parts), 30, seed=5)
    other = hierarchical_sample(ClusterTree.from_lists(parts[::-1]), 30, seed=5)
    assert np.array_equal(one, other)


def test_order_among_siblings_does_not_matter():
    """Nor does a remainder go by place: whose it is follows from the cluster's number."""
    lowest = [np.arange(10 * c, 10 * c + 10) for c in range(7)]
    for target in range(1, 60, 4):
        one, other = (
            hierarchical_sample(ClusterTree.from_lists(lowest, [siblings]), target, seed=2)
            for siblings in (np.arange(7), np.array([3, 6, 0, 5, 1, 4, 2]))
        )
        assert np.array_equal(one, other)


def test_orders():
    tree = random_tree(np.random.default_rng(0), 500, 30, 4)
    rows = {
        o: hierarchical_sample(tree, 900, multiplier=2, order=o)
        for o in ("row", "tree", "shuffled")
    }
    for of_order in rows.values():
        assert np.array_equal(np.sort(of_order), rows["row"])
    top = tree.cluster_of(rows["tree"], 2)
    assert np.array_equal(top, np.sort(top))  # depth first: one top cluster after another
    lowest = tree.cluster_of(rows["tree"], 1)
    assert np.count_nonzero(np.diff(lowest)) == len(np.unique(lowest)) - 1
    assert not np.array_equal(rows["shuffled"], rows["row"])


def test_flat_sample_balances_one_level():
    for tree, n, rng in random_trees(36):
        level, m = int(rng.integers(1, tree.depth + 1)), int(rng.integers(1, 3))
        for target in {0, 1, n, m * n + 1, int(rng.integers(m * n))}:
            rows = flat_sample(tree, level, target, multiplier=m, seed=1)
            times = np.bincount(rows, minlength=n)
            assert len(rows) == min(target, m * n) and times.max() <= m
            own = np.bincount(tree.cluster_of(rows, level), minlength=len(tree.levels[level - 1]))
            short = own[own < m * tree.leaf_counts(level)]
            assert not len(short) or own.max() <= short.min() + 1


def test_rows_taken_out_are_made_up_for():
    tree = random_tree(np.random.default_rng(3), 1000, 40, 6)
    whole = hierarchical_sample(tree, 200, nested=True)
    out = np.concatenate([whole[::4], tree.levels[0].members[: tree.levels[0].offsets[1]]])
    rows = hierarchical_sample(tree.without(out), 200, nested=True)
    assert len(rows) == 200 and not np.isin(rows, out).any()
    assert np.isin(rows, whole).sum() > 100  # most of what may stay does
    check_shares(tree.without(out), rows, 1)


def test_shares_are_told_level_by_level():
    tree = random_tree(np.random.default_rng(7), 800, 50, 8)
    shares = allot_tree(tree, 300)
    assert [len(s.shares) for s in shares] == [50, 8]
    assert [len(s.cuts) for s in shares] == [8, 1]
    assert [int(s.shares.sum()) for s in shares] == [300, 300]


def test_hash_is_fixed_and_uniform():
    # Of a seed that somebody has published a sample with: these numbers must never change.
    assert hashed(np.arange(3), 1, 2).tolist() == [
        627929090557486843,
        10869963655939716709,
        12004133598395454642,
    ]
    ones = np.unpackbits(hashed(np.arange(4096), 5).view(np.uint8)).mean()
    assert abs(ones - 0.5) < 0.005  # sd 0.001


@pytest.mark.parametrize(
    "options, words",
    [
        ({"target": -1}, "target is -1"),
        ({"target": 5, "multiplier": 0}, "multiplier is 0"),
        ({"target": 5, "strategy": "x"}, "strategy is 'x'; expected one of r, c, f"),
        ({"target": 5, "order": "rows"}, "order is 'rows'; expected one of row, tree, shuffled"),
    ],
)
def test_refusals(options, words):
    tree = ClusterTree.from_lists([np.arange(3)])
    with pytest.raises(ValueError, match=words):
        hierarchical_sample(tree, **options)
