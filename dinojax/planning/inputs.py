"""What goes into a step, as shapes: batch, state, the lowered step; and whether it can be cut up.

Called by `compiling`, `figures` and `advice`.
"""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh
from ml_collections import ConfigDict

from dinojax import config as configs
from dinojax import sharding, train
from dinojax.data import masking
from dinojax.models import vit
from dinojax.planning.topology import Topology
from dinojax.sharding import AnyMesh
from dinojax.training import phases
from dinojax.training import state as states


def check(config: ConfigDict, topology: Topology) -> None:
    """Whether batch and groups split over the devices.

    Raises:
      ValueError: one sentence with what to change.
    """
    shape = mesh_shape(config, topology)
    shards, pieces = shape[0] * shape[1], config.microbatches
    for index, phase in enumerate(config.phases):
        groups = phase.batch_size // phase.group
        if groups % (shards * pieces) == 0:
            continue
        group = phase.batch_size // (shards * pieces)
        key, choices = f"--config.phases[{index}]", []
        if group and phase.batch_size % (shards * pieces) == 0:
            neighbours = f"{key}.losses.koleo_group={phase.losses.koleo_group}"
            choices.append(f"{key}.group={group} {neighbours} (exact counts of {group} images)")
        # Second, since sums over the tensor axis grow with it: 7B on 1,024 v5p chips, the network
        # takes 0.95 s of a step at tensor=4 and 0.22 with groups of 4 (docs/scaling.md).
        choices += [f"--config.mesh.tensor={t}" for t in tensor_sizes(config, topology)[:1]]
        unit = phase.group * shards * pieces
        near = max(1, round(phase.batch_size / unit)) * unit
        choices.append(f"{key}.batch_size={near}")
        raise ValueError(
            f"phase {phase.name!r}: {groups} groups of {phase.group} images do not split over "
            f"{shards} shards of the batch x {pieces} micro-batches; nearest: "
            f"{', or '.join(choices)}"
        )


def tensor_sizes(config: ConfigDict, topology: Topology) -> list[int]:
    """Sizes of the tensor axis at which every phase's groups split over what remains."""
    heads = attention_heads(config)
    return [
        tensor
        for tensor in range(2, min(heads, topology.count) + 1)
        if heads % tensor == 0
        and topology.count % tensor == 0
        and all(
            (phase.batch_size // phase.group) % (topology.count // tensor * config.microbatches)
            == 0
            for phase in config.phases
        )
    ]


def attention_heads(config: ConfigDict) -> int:
    """Heads of a ViT; 0 of a network without attention."""
    if config.model.name != "vit":
        return 0
    section = {key: value for key, value in config.model.to_dict().items() if key != "name"}
    return vit.resolve(section).heads


def mesh_shape(config: ConfigDict, topology: Topology) -> tuple[int, int, int]:
    """(data, fsdp, tensor) of the config on the topology."""
    mesh = config.mesh
    return sharding.mesh_shape(topology.count, mesh.data, mesh.fsdp, mesh.tensor)


def abstract_batch(
    config: ConfigDict, phase: ConfigDict, crops: tuple[int, int, int], mesh: AnyMesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of what `data.pipeline` gives for a global batch at one triple of crop sizes."""
    large, small, anchor = crops
    b, channels = phase.batch_size, config.model.in_channels
    side, groups = large // configs.patch_stride(config), b // phase.group
    low, high = phase.masks.ratio
    slots = masking.mask_slots(
        2 * phase.group, (side, side), phase.masks.probability, (float(low), float(high))
    )
    shapes = {
        "global_crops": ((b, 2, large, large, channels), np.uint8),
        "local_crops": ((b, phase.crops.locals, small, small, channels), np.uint8),
        "masks": ((b, 2, side**2), np.bool_),
        "mask_indices": ((groups, slots), np.int32),
        "mask_weights": ((groups, slots), np.float32),
        "seeds": ((b,), np.uint32),
        "groups": ((groups,), np.int32),
    }
    if anchor:
        shapes["gram_crops"] = ((b, 2, anchor, anchor, channels), np.uint8)
    placed = sharding.batch_sharding(mesh)
    return {k: jax.ShapeDtypeStruct(*v, sharding=placed) for k, v in shapes.items()}


def abstract_scalars(
    config: ConfigDict, phase: ConfigDict, mesh: AnyMesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the scheduled numbers of a step."""
    everywhere = sharding.replicated(mesh)
    names = phases.scalars(config, phase, 0)
    return {name: jax.ShapeDtypeStruct((), np.float32, sharding=everywhere) for name in names}


def lower(
    config: ConfigDict, index: int, crops: tuple[int, int, int], mesh: Mesh
) -> jax.stages.Lowered:
    """The training step of a phase at one triple of crop sizes, for the devices of `mesh`."""
    phase = config.phases[index]
    networks = states.build_networks(config)
    step = train.make_step(config, networks, phase, mesh)
    state = states.abstract(config, networks, phase, mesh)
    batch = abstract_batch(config, phase, crops, mesh)
    scalars = abstract_scalars(config, phase, mesh)
    with jax.set_mesh(mesh):
        return step.lower(state, batch, scalars)


def held(
    config: ConfigDict, index: int, crops: tuple[int, int, int], shape: tuple[int, int, int]
) -> dict[str, float]:
    """Bytes on one device of everything that a step is given, by component; exact."""
    mesh = AbstractMesh(shape, sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    phase = config.phases[index]
    state = states.abstract(config, states.build_networks(config), phase, mesh)

    def size(tree: Any) -> float:
        return float(
            sum(
                math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
                for x in jax.tree.leaves(tree)
            )
        )

    parts = {name: size(state[name]) for name in ("student", "teacher", "gram")}
    parts["moments"] = size(state) - sum(parts.values())
    given = (abstract_batch(config, phase, crops, mesh), abstract_scalars(config, phase, mesh))
    return parts | {"batch": size(given)}
