"""Components against a walk through the graph; chains, stars and streams of edges."""

import numpy as np
import pytest

from data_curation import components
from data_curation.components import UnionFind, connected_components


def walk(n: int, edges: np.ndarray) -> np.ndarray:
    """Smallest row reachable from each, by visiting."""
    beside = [[] for _ in range(n)]
    for a, b in edges:
        beside[a].append(b)
        beside[b].append(a)
    labels = np.full(n, -1)
    for start in range(n):
        waiting = [start] if labels[start] < 0 else []
        while waiting:
            here = waiting.pop()
            if labels[here] < 0:
                labels[here] = start
                waiting += beside[here]
    return labels


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0, 3.0])
def test_random_graphs_whole_and_streamed(density, monkeypatch):
    rng = np.random.default_rng(int(10 * density))
    for n in (1, 2, 50, 700):
        edges = rng.integers(0, n, (int(density * n), 2))  # with loops and repeats
        expected = walk(n, edges)
        np.testing.assert_array_equal(connected_components(n, edges), expected)
        np.testing.assert_array_equal(connected_components(n, np.array_split(edges, 7)), expected)
        with monkeypatch.context() as small:
            small.setattr(components, "_BATCH", 13)
            small.setattr(components, "_CHUNK", 7)
            np.testing.assert_array_equal(connected_components(n, iter([edges])), expected)


@pytest.mark.parametrize("order", ["up", "down", "shuffled", "one by one"])
def test_a_long_chain_is_one_component(order):
    n = 300 if order == "one by one" else 20_000
    edges = np.stack([np.arange(n - 1), np.arange(1, n)], axis=1)
    if order == "down":
        edges = edges[::-1, ::-1]
    if order == "shuffled":
        edges = np.random.default_rng(0).permutation(edges)
    parts = np.split(edges[::-1], n - 1) if order == "one by one" else edges
    np.testing.assert_array_equal(connected_components(n, parts), np.zeros(n))


def test_a_star_around_its_largest_row():
    n = 1000
    edges = np.stack([np.full(n - 1, n - 1), np.arange(n - 1)], axis=1)
    np.testing.assert_array_equal(connected_components(n, edges), np.zeros(n))


def test_no_edges_and_wrong_ones():
    np.testing.assert_array_equal(connected_components(3, np.empty((0, 2), int)), [0, 1, 2])
    with pytest.raises(ValueError, match="row 3 of 3"):
        UnionFind.empty(3).add(np.array([[0, 3]]))
    with pytest.raises(ValueError, match="row -1 of 3"):
        UnionFind.empty(3).add(np.array([[0, -1]]))
