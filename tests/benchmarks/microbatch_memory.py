"""Memory of one training step against the number of micro-batches, from the compiled program.

    python tests/benchmarks/microbatch_memory.py --config experiments/pretrain_vitl.py \
        --config.model.variant=small --pieces 1,8,32

Compiles the whole step ahead of time; no arrays are made. `temporaries` is what the step needs on
top of the state (parameters, moments, teacher) and the batch.
"""

import time

import jax
import jax.numpy as jnp
from absl import app, flags
from ml_collections import config_flags

from dinojax import config as configs
from dinojax import sharding, train
from dinojax.data import masking
from dinojax.training import phases
from dinojax.training import state as states

CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment file.", lock_config=True)
PIECES = flags.DEFINE_list("pieces", ["1", "8", "32"], "Numbers of micro-batches.")


def abstract_batch(config, phase) -> dict[str, jax.ShapeDtypeStruct]:
    large, small, _ = phase.crops.sizes[0]
    b, groups = phase.batch_size, phase.batch_size // phase.group
    side = large // configs.patch_stride(config)
    slots = masking.mask_slots(
        2 * phase.group, (side, side), phase.masks.probability, tuple(phase.masks.ratio)
    )
    shapes = {
        "global_crops": ((b, 2, large, large, 3), jnp.uint8),
        "local_crops": ((b, phase.crops.locals, small, small, 3), jnp.uint8),
        "masks": ((b, 2, side * side), jnp.bool_),
        "mask_indices": ((groups, slots), jnp.int32),
        "mask_weights": ((groups, slots), jnp.float32),
        "seeds": ((b,), jnp.uint32),
        "groups": ((groups,), jnp.int32),
    }
    return {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}


def main(_: list[str]) -> None:
    mesh = sharding.make_mesh()
    jax.set_mesh(mesh)
    for pieces in map(int, PIECES.value):
        config = CONFIG.value.copy_and_resolve_references()
        config.microbatches = pieces
        config = configs.resolve(config)
        configs.validate(config)
        phase = config.phases[0]
        networks = states.build_networks(config)
        state = states.abstract(config, networks, phase, mesh)
        scalars = {
            name: jax.ShapeDtypeStruct((), jnp.float32) for name in phases.scalars(config, phase, 0)
        }
        step = train.make_step(config, networks, phase, mesh)
        began = time.perf_counter()
        compiled = step.lower(state, abstract_batch(config, phase), scalars).compile()
        memory = compiled.memory_analysis()
        print(
            f"microbatches {pieces:4d}: temporaries {memory.temp_size_in_bytes / 2**30:8.2f} GiB, "
            f"state and batch {memory.argument_size_in_bytes / 2**30:.2f} GiB "
            f"(compiled in {time.perf_counter() - began:.0f} s)",
            flush=True,
        )


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
