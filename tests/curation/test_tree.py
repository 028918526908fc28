"""Cluster trees: sorted members, lookups through all levels, files."""

import numpy as np
import pytest

from data_curation.files import read_json, write_npy
from data_curation.tree import ClusterTree, drop_empty, runs, tree_level


def small_tree() -> ClusterTree:
    """Seven rows (row 2 outside) in four clusters, one empty, in two groups."""
    centroids = np.arange(8, dtype=np.float32).reshape(4, 2)
    parent = np.array([3, 0, -1, 0, 1, 3, 0])
    dist = np.array([1, 2, np.nan, 1, 0, 1, 2], np.float32)
    lowest = tree_level(centroids, parent, dist)
    upper = tree_level(centroids[:2], np.array([1, 0, 1, 0]), np.array([1, 3, 2, 2], np.float32))
    return ClusterTree((lowest, upper))


def test_members_are_nearest_first_then_lowest_row():
    lowest, upper = small_tree().levels
    assert lowest.offsets.tolist() == [0, 3, 4, 4, 6]
    assert lowest.members.tolist() == [3, 1, 6, 4, 0, 5]
    assert upper.members.tolist() == [3, 1, 0, 2]
    assert lowest.members.dtype == lowest.parent.dtype == np.int32


def test_counts_and_clusters_through_the_levels():
    tree = small_tree()
    assert len(tree) == 6 and tree.depth == 2
    assert tree.leaf_counts(1).tolist() == [3, 1, 0, 2]
    assert tree.leaf_counts(2).tolist() == [3, 3]
    assert tree.cluster_of(np.array([0, 2, 4, 6]), 1).tolist() == [3, -1, 1, 0]
    assert tree.cluster_of(np.array([0, 2, 4, 6]), 2).tolist() == [0, -1, 0, 1]


def test_without_takes_rows_out_and_leaves_the_tree():
    tree = small_tree()
    less = tree.without(np.array([4, 1]))
    assert less.leaf_counts(1).tolist() == [2, 0, 0, 2]
    assert less.levels[0].members.tolist() == [3, 6, 0, 5]
    assert less.cluster_of(np.array([4, 3]), 2).tolist() == [-1, 1]
    assert len(tree) == 6 and tree.cluster_of(np.array([4]), 1).tolist() == [1]


def test_save_and_load(tmp_path):
    tree = small_tree()
    tree.save(tmp_path)
    loaded = ClusterTree.load(tmp_path, verify=True)
    for one, other in zip(tree.levels, loaded.levels):
        for name in ("centroids", "parent", "dist", "members", "offsets"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
            assert getattr(one, name).dtype == getattr(other, name).dtype
    facts = read_json(tmp_path / "tree.json")
    assert [level["clusters"] for level in facts["levels"]] == [4, 2]
    assert np.load(tmp_path / facts["levels"][1]["leaf_counts"]).tolist() == [3, 3]
    assert loaded.leaf_counts(2).tolist() == [3, 3]


def test_what_is_not_the_tree_that_was_saved_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no tree.json"):
        ClusterTree.load(tmp_path)
    tree = small_tree()
    tree.save(tmp_path)
    write_npy(tmp_path / "level1" / "dist.npy", np.zeros(7, np.float32))
    ClusterTree.load(tmp_path)
    with pytest.raises(ValueError, match=r"dist\.npy has changed since tree\.json was written"):
        ClusterTree.load(tmp_path, verify=True)
    for name, dtype in (("parent", np.int32), ("dist", np.float32)):
        write_npy(tmp_path / "level1" / f"{name}.npy", np.zeros(9, dtype))
    with pytest.raises(ValueError, match="4 clusters of 9 inputs; expected 4 of 7"):
        ClusterTree.load(tmp_path)


def test_from_lists_refuses_what_is_no_tree():
    with pytest.raises(ValueError, match="row 1 is in 2 clusters of level 1"):
        ClusterTree.from_lists([np.array([0, 1]), np.array([1])])
    with pytest.raises(ValueError, match="cluster of level 1 1 is in 0 clusters of level 2"):
        ClusterTree.from_lists([np.array([0]), np.array([1])], [np.array([0])])
    with pytest.raises(ValueError, match="level 3 of 1 levels; nearest: 1"):
        ClusterTree.from_lists([np.array([0])]).leaf_counts(3)


def test_drop_empty_renumbers_in_order():
    centroids, parent = drop_empty(np.eye(4, dtype=np.float32), np.array([3, 1, 3]))
    assert centroids.tolist() == np.eye(4)[[1, 3]].tolist()
    assert parent.tolist() == [1, 0, 1]


def test_runs_hold_as_much_as_they_may():
    assert list(runs(np.array([2, 3, 9, 0, 1]), 5)) == [slice(0, 2), slice(2, 3), slice(3, 5)]
    assert list(runs(np.array([], int), 5)) == []
