"""The training step and the forward pass of an experiment on one fixed synthetic batch, so that no
input is part of it; `launch/bench.py` prints what they give."""

import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import bench_shares
import jax
import numpy as np
from ml_collections import ConfigDict

from dinojax import backbone, sharding, startup, train
from dinojax import config as configs
from dinojax.data import masking
from dinojax.training import phases, profiling
from dinojax.training import state as states

WARM_UP = 2


def measure_step(
    config: ConfigDict, index: int, steps: int, divided: bool, trace: str | None
) -> dict[str, Any]:
    """Figures of `steps` timed steps of phase `index`.

    Args:
      divided: also find which part of the step takes what share of it.
      trace: folder for a profile of two steps.
    """
    config = configs.resolve(config)
    configs.validate(config)
    phase = phases.spans(config)[index].phase
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    with jax.set_mesh(mesh):
        networks = states.build_networks(config)
        state = states.create(config, networks, phase, mesh)
        batch = sharding.to_global(synthetic_batch(config, phase), mesh)
        scalars = sharding.to_scalars(phases.scalars(config, phase, 0), mesh)

        started = time.perf_counter()
        step = train.make_step(config, networks, phase, mesh).lower(state, batch, scalars).compile()
        startup.return_free_memory()
        compiling = time.perf_counter() - started
        metrics: dict[str, jax.Array] = {}

        def run() -> None:
            nonlocal state, metrics
            state, metrics = jax.block_until_ready(step(state, batch, scalars))

        seconds = timed(run, steps)
        figures: dict[str, Any] = {}
        if divided or trace:
            figures["shares"] = bench_shares.shares(step, lambda: (run(), run()), trace)
    rate = phase.batch_size / statistics.median(seconds)
    work = train.work_per_image(config, networks, phase)
    peak = profiling.peak_flops(config.model.dtype)
    return {
        **common(seconds, rate),
        "nominal_utilisation": rate * work.nominal / peak if peak else None,
        "executed_utilisation": rate * work.executed / peak if peak else None,
        "peak_tflops_per_second": peak / 1e12 if peak else None,
        "compile_seconds": compiling,
        "loss": float(metrics["loss"]),
        **figures,
    }


def measure_features(config: ConfigDict, index: int, steps: int, batch: int) -> dict[str, Any]:
    """Figures of the backbone alone, on `batch` images of the phase's global crop size."""
    config = configs.resolve(config)
    configs.validate(config)
    side = phases.spans(config)[index].phase.crops.sizes[0][0]
    network = backbone.build(config.model.to_dict())
    params = jax.jit(network.init)(jax.random.key(0))
    shape = (batch, side, side, config.model.in_channels)
    images = jax.random.normal(jax.random.key(1), shape, np.float32)

    def forward(params: Any, images: jax.Array) -> jax.Array:
        return network.apply(params, (images,))[0].cls

    started = time.perf_counter()
    compiled = jax.jit(forward).lower(params, images).compile()
    startup.return_free_memory()
    compiling = time.perf_counter() - started
    seconds = timed(lambda: jax.block_until_ready(compiled(params, images)), steps)
    rate = batch / statistics.median(seconds)
    peak = profiling.peak_flops(config.model.dtype)
    work = sum(profiling.forward_flops(params, side))
    return common(seconds, rate) | {
        "nominal_utilisation": rate * work / peak if peak else None,
        "compile_seconds": compiling,
    }


def timed(run: Callable[[], Any], steps: int) -> list[float]:
    """Seconds of each of `steps` runs, after two that warm up."""
    seconds = []
    for _ in range(WARM_UP + steps):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return seconds[WARM_UP:]


def common(seconds: list[float], rate: float) -> dict[str, Any]:
    """What every measurement says, and on what it was made."""
    return {
        "seconds_per_step": statistics.median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "images_per_second": rate,
        "peak_memory_bytes": peak_memory(),
        "steps": len(seconds),
        "load": os.getloadavg()[0],
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def peak_memory() -> int:
    """Bytes: of the accelerator where it says so, else of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return stats.get("peak_bytes_in_use", resident)


def synthetic_batch(config: ConfigDict, phase: ConfigDict) -> dict[str, np.ndarray]:
    """One batch of the phase's first crop sizes: noise images, real masks."""
    rng = np.random.default_rng(0)
    large, small, anchor = phase.crops.sizes[0]
    b, channels = phase.batch_size, config.model.in_channels
    grid = (large // configs.patch_stride(config),) * 2
    groups = b // phase.group
    per_group = [
        masking.group_masks(rng, 2 * phase.group, grid, phase.masks.probability, phase.masks.ratio)
        for _ in range(groups)
    ]
    positions = [masking.mask_positions(masks) for masks in per_group]

    def noise(views: int, size: int) -> np.ndarray:
        return rng.integers(0, 256, (b, views, size, size, channels), np.uint8)

    batch = {
        "global_crops": noise(2, large),
        "local_crops": noise(phase.crops.locals, small),
        "masks": np.stack(per_group).reshape(b, 2, -1),
        "mask_indices": np.stack([indices for indices, _ in positions]),
        "mask_weights": np.stack([weights for _, weights in positions]),
        "seeds": rng.integers(0, 2**32, b, np.uint32),
        "groups": np.arange(groups, dtype=np.int32),
    }
    if anchor:
        batch["gram_crops"] = noise(2, anchor)
    return batch
