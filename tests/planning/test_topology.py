"""Topologies by name."""

import pytest

from dinojax.planning import topology
from dinojax.training import profiling


@pytest.mark.parametrize(
    ("spec", "platform", "shape", "kind"),
    [
        ("v5e:4x4", "tpu", (4, 4), "TPU v5e"),
        ("v5p:4x8x8", "tpu", (4, 8, 8), "TPU v5p"),
        ("v5p:8x4x8", "tpu", (8, 4, 8), "TPU v5p"),
        ("v6e:16x16", "tpu", (16, 16), "TPU v6e"),
        ("v4:2x2x1", "tpu", (2, 2, 1), "TPU v4"),
        ("gpu:h100x8", "gpu", (1, 8), "H100"),
        ("gpu:h200x16", "gpu", (2, 8), "H200"),
        ("gpu:l4", "gpu", (1, 1), "L4"),
        ("gpu:rtx4090x2", "gpu", (1, 2), "RTX 4090"),
    ],
)
def test_parse(spec, platform, shape, kind):
    found = topology.parse(spec)
    assert (found.spec, found.platform, found.shape, found.device.kind) == (
        *(spec, platform, shape, kind),
    )
    assert found.device.flops == profiling.DEVICES[kind][0]


def test_this_machine():
    found = topology.parse("cpu", cpu_devices=8)
    assert found.count == 8 and found.device.flops is None
    assert 8 * topology.limit(found) == found.device.memory > 2**30


@pytest.mark.parametrize(
    ("spec", "near"),
    [
        ("v5x:4x4", "nearest: v5p:2x2x4"),
        ("h100x8", "nearest: v4:2x2x4, v5e:4x4"),
        ("v5p:4x4", "nearest: v5p:2x2x4"),
        ("v5e:3x5", "nearest: v5e:4x4"),
        ("v5e:", "nearest: v5e:4x4"),
        ("v6e:32x32", "nearest: v6e:16x16"),
        ("v5p:4x4x6", "nearest: v5p:4x4x8"),
        ("v5p:0x4x4", "nearest: v5p:"),
        ("gpu:h10x8", "nearest: gpu:h100x8"),
        ("gpu:h100x12", "nearest: gpu:h100x16"),
        ("gpu:h100x0", "nearest: gpu:h100x1"),
        ("gpu:quantum", "nearest: gpu:NAMExN with NAME a100"),
    ],
)
def test_unknown_topologies_name_the_nearest(spec, near):
    with pytest.raises(ValueError, match=f"{spec!r}.*{near}"):
        topology.parse(spec)


def test_every_suggestion_exists():
    for spec in ("v4:2x2x1", "v5e:1x1", "v5p:2x2x1", "v6e:1x1", "gpu:a100", "gpu:h100x8"):
        one = topology.parse(spec)
        counts = [topology.parse(larger).count for larger in topology.larger(one)]
        assert counts == sorted(counts) and counts[0] > one.count
    assert topology.larger(topology.parse("cpu")) == []


def test_every_device_is_in_the_table_of_peaks():
    for device in (*topology.TPUS.values(), *topology.GPUS.values()):
        flops, watts = profiling.DEVICES[device.kind]
        assert watts or topology.ASSUMED_WATTS[device.kind]
        # What a device can compute on a byte lies between 100 (L40S cards more) and 1,000 FLOPs.
        assert 100 < flops / device.bandwidth < 1000
        assert device.link < device.bandwidth


def test_limits_and_power():
    assert topology.limit(topology.parse("v5e:4x4")) == 15.75 * 2**30
    assert topology.limit(topology.parse("gpu:h100x8")) == 60e9  # what JAX takes of 80
    assert topology.watts(topology.parse("gpu:h100x8")) == (700.0, True)
    assert topology.watts(topology.parse("v4:2x2x2")) == (192.0, True)
    assert topology.watts(topology.parse("v5p:2x2x2")) == (320.0, False)
    assert topology.watts(topology.parse("cpu")) is None
