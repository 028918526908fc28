"""Time the training step of an experiment: `python launch/bench.py --config experiments/X.py`.

Runs the compiled step on one fixed synthetic batch, so the input pipeline is not part of it, and
prints the median seconds a step with its spread, images/s, model-FLOPs utilisation, compile time
and memory. `--data` times the input path instead, stage by stage, and names its bottleneck.
`--json FILE` writes the same. Values are changed as in `launch/run.py`: `--config.batch_size=4`.
"""

import json
import platform
import resource
import statistics
import sys
import time
from typing import Any

import numpy as np
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from dinojax import startup

CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment file.", lock_config=True)
JSON = flags.DEFINE_string("json", None, "Write the figures to this file.")
STEPS = flags.DEFINE_integer("steps", 10, "Timed steps, after two that are not.")
DATA = flags.DEFINE_boolean("data", False, "Time reading, cropping and colour, not the step.")
SECONDS = flags.DEFINE_float("seconds", 3.0, "Of each stage of --data.")
PHASE = flags.DEFINE_integer("phase", 0, "Which phase of the config.")


def synthetic_batch(config: ConfigDict, phase: ConfigDict) -> dict[str, np.ndarray]:
    """One batch of the phase's first crop sizes: noise images, real masks."""
    from dinojax import config as configs
    from dinojax.data import masking

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


def measure(config: ConfigDict, index: int, steps: int) -> dict[str, Any]:
    """Figures of `steps` timed steps of phase `index`."""
    import jax

    from dinojax import config as configs
    from dinojax import sharding, train
    from dinojax.training import phases, profiling
    from dinojax.training import state as states

    config = configs.resolve(config)
    configs.validate(config)
    span = phases.spans(config)[index]
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    jax.set_mesh(mesh)
    networks = states.build_networks(config)
    state = states.create(config, networks, span.phase, mesh)
    step = train.make_step(config, networks, span.phase, mesh)
    batch = sharding.to_global(synthetic_batch(config, span.phase), mesh)
    scalars = sharding.to_scalars(phases.scalars(config, span.phase, 0), mesh)

    started = time.perf_counter()
    train.compile_step(step, state, batch, scalars)
    state, metrics = step(state, batch, scalars)
    jax.block_until_ready(metrics)
    compile_seconds = time.perf_counter() - started
    seconds = []
    for index in range(steps + 1):
        started = time.perf_counter()
        state, metrics = step(state, batch, scalars)
        jax.block_until_ready((state, metrics))
        if index:  # one more warm-up
            seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds)
    work = train.work_per_image(config, networks, span.phase)
    peak = profiling.peak_flops(config.model.dtype)
    rate = span.phase.batch_size / median
    return {
        "seconds_per_step": median,
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "images_per_second": rate,
        "nominal_utilisation": rate * work.nominal / peak,
        "executed_utilisation": rate * work.executed / peak,
        "compile_and_first_step_seconds": compile_seconds,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "steps": steps,
        "loss": float(metrics["loss"]),
    }


def main(_: list[str]) -> int:
    try:
        if DATA.value:
            import bench_data

            figures = bench_data.measure(CONFIG.value, PHASE.value, SECONDS.value)
            print("\n".join(bench_data.lines(figures)))
        else:
            figures = measure(CONFIG.value, PHASE.value, STEPS.value)
            for name, value in figures.items():
                shown = f"{value:.4g}" if isinstance(value, float) else value
                print(f"{name:32s} {shown}")
    except ValueError as error:  # an impossible config; said before anything is compiled
        print(f"error: {error}", file=sys.stderr)
        return 2
    if JSON.value:
        with open(JSON.value, "w") as file:
            json.dump(figures, file, indent=1)
    return 0


if __name__ == "__main__":
    startup.restart_with_huge_pages()
    flags.mark_flag_as_required("config")
    app.run(main)
