"""The time a collective takes on a topology, in closed form."""

import pytest

from dinojax.planning import network, topology
from dinojax.planning.program import Collective

HOP = network.HOP_SECONDS


def seconds(spec, kind, size, members=(), runs=1):
    target = topology.parse(spec)
    collective = Collective(kind, runs, size, members)
    return network.collective_seconds(collective, target, network.grid(target))


def test_whole_torus():
    """4 x 8 x 8, every axis a ring: six links of 90 GB/s, and half of each ring to go."""
    one = seconds("v5p:4x8x8", "all-gather", 10**6)
    assert one == pytest.approx(255e6 / (6 * 9e10) + (2 + 4 + 4) * HOP)
    assert seconds("v5p:4x8x8", "all-gather", 10**6, runs=3) == pytest.approx(3 * one)
    twice = seconds("v5p:4x8x8", "all-reduce", 256 * 10**6)
    assert twice == pytest.approx(2 * 255e6 / (6 * 9e10) + 10 * HOP)


def test_without_rings():
    """v5e's axes close at 16 only: one link an axis, and their whole length to go."""
    found = seconds("v5e:4x8", "reduce-scatter", 32 * 10**6)
    assert found == pytest.approx(31e6 / (2 * 4.5e10) + (3 + 7) * HOP)
    found = seconds("v5e:16x16", "all-gather", 10**6)
    assert found == pytest.approx(255e6 / (4 * 4.5e10) + 16 * HOP)


def test_part_of_a_torus():
    """A group along one axis has that axis's links alone."""
    along_last = tuple(range(8))  # of 4 x 8 x 8
    found = seconds("v5p:4x8x8", "all-gather", 10**6, along_last)
    assert found == pytest.approx(7e6 / (2 * 9e10) + 4 * HOP)
    half = tuple(range(4))  # half a ring is a line
    found = seconds("v5p:4x8x8", "all-gather", 10**6, half)
    assert found == pytest.approx(3e6 / 9e10 + 3 * HOP)


def test_all_to_all_is_bound_by_the_middle():
    """A quarter of all there is crosses it each way: through 2 x 8 x 4 links of 8 x 8 x 4."""
    size = 256 * 10**6
    found = seconds("v5p:4x8x8", "all-to-all", size)
    assert found == pytest.approx(256 * size / 4 / (2 * 32 * 9e10) + 10 * HOP)


def test_neighbours():
    found = seconds("v5p:4x8x8", "collective-permute", 10**6, (0, 1), runs=2)
    assert found == pytest.approx(2e6 / (2 * 9e10) + 2 * HOP)


def test_gpus():
    inside = seconds("gpu:h100x8", "all-gather", 10**6)
    assert inside == pytest.approx(7e6 / 4.5e11)
    # Two nodes: half of the 15 MB comes through eight cards of 50 GB/s; inside takes longer.
    both = seconds("gpu:h100x16", "all-gather", 10**6)
    assert both == pytest.approx(max(15e6 / 4.5e11, 7.5e6 / 4e11))
    apart = seconds("gpu:h100x16", "all-to-all", 16 * 10**6)  # every card for itself
    assert apart == pytest.approx(7.5e6 / 5e10)


def test_nothing_to_move():
    assert seconds("v5e:1x1", "all-reduce", 10**6) == 0.0
    assert seconds("v5p:2x2x1", "all-reduce", 10**6, (3,)) == 0.0
    assert seconds("cpu", "all-reduce", 10**6) == 0.0
