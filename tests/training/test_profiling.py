"""FLOPs against formulas written out and against XLA's own count; the timer against a set clock."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinojax.models import convnext, heads, vit
from dinojax.training import profiling

WIDTH, DEPTH, HEADS, STORAGE = 64, 3, 4, 2


def shapes(network):
    return jax.eval_shape(network.init, jax.random.key(0))


def vit_shapes(**changes):
    sizes = {"width": WIDTH, "depth": DEPTH, "heads": HEADS, "ffn": "mlp", "ffn_ratio": 4.0}
    return shapes(vit.build({**sizes, "storage_tokens": STORAGE, **changes}))


def vit_by_hand(side, hidden=4 * WIDTH, matrices=2):
    """FLOPs of the blocks and of the rest, term by term."""
    n = 1 + STORAGE + (side // 16) ** 2
    per_token = 3 * WIDTH**2 + WIDTH**2 + matrices * WIDTH * hidden
    blocks = DEPTH * 2 * (n * per_token + 2 * n * n * WIDTH)
    return blocks, 2 * (side // 16) ** 2 * 16 * 16 * 3 * WIDTH


def test_forward_of_a_vit():
    assert profiling.forward_flops(vit_shapes(), 96) == vit_by_hand(96)
    gated = vit_shapes(ffn="swiglu64", ffn_ratio=3.0)  # 2/3 of 192 is 128
    assert profiling.forward_flops(gated, 64) == vit_by_hand(64, hidden=128, matrices=3)


def test_published_figures():
    """Multiply-adds of ViT-B/16 and ConvNeXt-T at 224 pixels as the literature has them."""
    base = shapes(vit.build({"variant": "base"}))
    assert sum(profiling.forward_flops(base, 224)) / 2 == pytest.approx(17.58e9, rel=0.01)
    tiny = shapes(convnext.build({"variant": "tiny"}))
    assert sum(profiling.forward_flops(tiny, 224)) / 2 == pytest.approx(4.46e9, rel=0.01)


def test_forward_against_the_compilers_count():
    network = vit.build(
        {"width": 256, "depth": 2, "heads": 4, "ffn": "mlp", "ffn_ratio": 4.0, "scan": False}
    )
    params, images = shapes(network), jax.ShapeDtypeStruct((1, 128, 128, 3), jnp.float32)
    lowered = jax.jit(lambda p, x: network.apply(p, (x,))[0].patches).lower(params, images)
    counted = lowered.cost_analysis()["flops"]  # element-wise work included
    assert sum(profiling.forward_flops(params, 128)) == pytest.approx(counted, rel=0.05)


def head_by_hand(prototypes):
    return 2 * (WIDTH * 24 + 24 * 24 + 24 * 8 + 8 * prototypes)


@pytest.fixture(scope="module")
def params():
    def head(prototypes):
        config = {"prototypes": prototypes, "bottleneck": 8, "hidden": 24, "layers": 3}
        return shapes(heads.build(config, WIDTH, jnp.float32))

    return {"backbone": vit_shapes(), "dino_head": head(100), "ibot_head": head(50)}


def test_work_of_a_step(params):
    masked, group, rate = 5.5, 3, 0.4
    work = profiling.work_per_image(params, (96, 48, 128), 4, masked, group, rate)
    (big, big_rest), (small, small_rest) = vit_by_hand(96), vit_by_hand(48)
    heads_work = (3 * 6 + 2) * head_by_hand(100) + 4 * masked * head_by_hand(50)
    once = 2 * (big + big_rest) + 2 * sum(vit_by_hand(128)) + heads_work
    student = 3 * (2 * (big + big_rest) + 4 * (small + small_rest))
    assert work.nominal == pytest.approx(student + once, rel=1e-12)
    # Groups of 6 global and 12 local rows keep 3 and 7 of them.
    student = 3 * (2 * (big * 3 / 6 + big_rest) + 4 * (small * 7 / 12 + small_rest))
    assert work.executed == pytest.approx(student + once, rel=1e-12)


def test_work_without_terms(params):
    full = profiling.work_per_image(params, (96, 48, 0), 4, 5.5, 2)
    assert full.nominal == full.executed
    only = {"backbone": params["backbone"]}
    bare = profiling.work_per_image(only, (96, 48, 0), 0, 0.0, 2)
    assert bare.nominal == 8 * sum(vit_by_hand(96))
    larger = {**params, "backbone": vit_shapes(depth=6)}
    taught = profiling.work_per_image(params, (96, 48, 0), 4, 5.5, 2, teacher=larger)
    extra = sum(profiling.forward_flops(larger["backbone"], 96)) - sum(vit_by_hand(96))
    assert taught.nominal - full.nominal == pytest.approx(2 * extra)


def test_device_table():
    assert profiling.device_table("NVIDIA H100 80GB HBM3") == (989e12, 700.0)
    assert profiling.device_table("NVIDIA H100 PCIe") == (756e12, 350.0)
    assert profiling.device_table("NVIDIA L40S") == (362e12, 350.0)
    assert profiling.device_table("TPU v5 lite") == (197e12, None)
    assert profiling.device_table("TPU v5") == (459e12, None)
    assert profiling.device_table("cpu") is None
    assert profiling.energy(3600.0) is None


def test_peak_of_a_cpu_is_measured():
    peak = profiling.peak_flops("float32")
    assert 1e9 < peak < 1e14
    assert profiling.peak_flops("float32") == peak  # once


def test_energy(monkeypatch):
    class Device:
        device_kind = "NVIDIA H200"

    monkeypatch.setattr(profiling.jax, "devices", lambda: [Device()])
    monkeypatch.setattr(profiling.jax, "device_count", lambda: 8)
    assert profiling.energy(7200.0) == (
        "about 11.2 kWh (8 x 700 W for 2.00 h), 4.74 kg CO2e at an assumed building overhead of "
        "1.1 and 0.385 kg/kWh"
    )


def test_timer(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: clock[0])
    timer = profiling.StepTimer(batch_size=8, peak=1000.0)

    def step(wait, run):
        with timer.waiting_for_data():
            clock[0] += wait
        clock[0] += run
        timer.step()

    step(5.0, 35.0)  # compiles: in no lap
    for _ in range(4):
        step(0.5, 1.5)
    speed = timer.lap(step=5, last=15, work=profiling.Work(100.0, 50.0))
    assert speed.images_per_second == pytest.approx(4.0)
    assert (speed.mfu, speed.executed_mfu) == pytest.approx((0.4, 0.2))
    assert speed.data_wait == pytest.approx(0.25)
    assert speed.step_seconds == pytest.approx(2.0)
    assert speed.eta_seconds == pytest.approx(20.0)
    assert speed.goodput == pytest.approx(5 * 2.0 / 48.0)
    assert speed.peak_bytes > 0
    step(0.0, 4.0)
    again = timer.lap(step=15, last=15, work=profiling.Work(100.0, 50.0))
    assert (again.images_per_second, again.eta_seconds) == pytest.approx((2.0, 0.0))
    at_a_save = timer.lap(step=15, last=25, work=profiling.Work(100.0, 50.0))
    assert (at_a_save.images_per_second, at_a_save.eta_seconds) == pytest.approx((2.0, 40.0))
    nothing = profiling.StepTimer(8, None).lap(0, 10, profiling.Work(1.0, 1.0))
    assert nothing.mfu is None and np.isfinite(nothing.eta_seconds)
