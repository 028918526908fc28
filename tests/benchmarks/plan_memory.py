"""The planner's memory of a step against the same step really run, on one CPU device.

    python tests/benchmarks/plan_memory.py --config experiments/pretrain_vitl.py \
        --config.model.variant=small --config.batch_size=16 --config.group=16

Prints bytes as JSON: `planned` is what `figures.measure` says of arguments and temporaries,
`measured` how far the process grew from before the state was made to the highest point of a step.
"""

import json
import os
import pathlib
import sys

from absl import app

sys.path[:0] = [str(pathlib.Path(__file__).parents[2] / "launch")]
import bench  # noqa: E402, --config, --phase and a synthetic batch

from dinojax import startup  # noqa: E402


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at the highest since `forget_peak`."""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.split(field + ":")[1].split()[0])


def forget_peak() -> None:
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def main(_: list[str]) -> None:
    import jax

    from dinojax import config as configs
    from dinojax import sharding, train
    from dinojax.planning import figures, topology
    from dinojax.training import phases
    from dinojax.training import state as states

    config = configs.resolve(bench.CONFIG.value)
    configs.validate(config)
    index = bench.PHASE.value
    phase = config.phases[index]
    here = topology.parse("cpu", jax.device_count())
    step = figures.measure(config, index, tuple(phase.crops.sizes[0]), here)
    parts = {name: size for name, size in step.memory.parts.items() if name != "code"}

    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    with jax.set_mesh(mesh):
        networks = states.build_networks(config)
        step_fn = train.make_step(config, networks, phase, mesh)
        scalars = sharding.to_scalars(phases.scalars(config, phase, 0), mesh)
        batch = bench.synthetic_batch(config, phase)
        # Compiled before anything is held: the compiler's own memory must not count.
        shapes = states.abstract(config, networks, phase, mesh)
        compiled = step_fn.lower(shapes, batch, scalars).compile()
        make = jax.jit(states._initialiser(config, networks, phase)).lower(jax.random.key(0))
        make = make.compile()
        startup.return_free_memory()
        before = resident("VmRSS")
        state = make(jax.random.key(config.seed))
        placed = sharding.to_global(batch, mesh)
        jax.block_until_ready((state, placed))
        highest = []
        for _ in range(3):
            startup.return_free_memory()
            forget_peak()
            state, metrics = compiled(state, placed, scalars)
            jax.block_until_ready((state, metrics))
            highest.append(resident("VmHWM") - before)
    planned = sum(parts.values())
    print(
        json.dumps(
            {
                "planned": planned,
                "measured": max(highest),
                "ratio": max(highest) / planned,
                "parts": parts,
                "jax": jax.__version__,
            }
        )
    )


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    startup.restart_with_huge_pages()
    app.run(main)
