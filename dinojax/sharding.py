"""Where every array lives: the mesh, path rules -> PartitionSpec, and host -> global batches.

Mesh axes are `data`, `fsdp`, `tensor`, always with Auto axis types. The same rules place
parameters, moments, teacher and gram, because all of them carry the parameter's path. Batches are
split over (`data`, `fsdp`) on their leading axis, whole groups to a device.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))

# First match wins. Letters name what a dimension is given to: "t" the tensor axis, "." nothing;
# FSDP then takes the largest dimension that is left and divides. "s" marks the scan axis, which is
# never split: a scan slices it in every iteration.
RULES: tuple[tuple[str, str], ...] = (
    (r"blocks/attn/qkv/(kernel|bias)$", "s*t"),
    (r"blocks/attn/proj/kernel$", "st."),
    (r"blocks/ffn/(fc1|w1|w2)/(kernel|bias)$", "s*t"),
    (r"blocks/ffn/(fc2|w3)/kernel$", "st."),
    (r"(blocks|stages\d)/", "s*"),
    (r"last_layer/prototypes$", "t."),
    (r".", "*"),
)


def start_distributed() -> None:
    """Join the other hosts of a pod or cluster if the environment names any; else do nothing."""
    many_hosts = len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1
    slurm = int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_NODELIST" in os.environ
    if many_hosts or slurm or "JAX_COORDINATOR_ADDRESS" in os.environ:
        jax.distributed.initialize()


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1) -> Mesh:
    """A mesh over all devices; one of the three sizes may be -1 (what remains).

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    count = jax.device_count()
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    fixed = int(np.prod([size for size in sizes.values() if size > 0]))
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) == 1 and count % fixed == 0:
        sizes[free[0]] = count // fixed
    if int(np.prod(list(sizes.values()))) != count or min(sizes.values()) < 1:
        raise ValueError(
            f"mesh data={data} fsdp={fsdp} tensor={tensor} does not fit {count} devices; "
            f"nearest: data=1 fsdp={count} tensor=1 (one size may be -1)"
        )
    return jax.make_mesh(
        tuple(sizes[axis] for axis in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES)
    )


def partition(path: str, shape: tuple[int, ...], mesh: Mesh, shard_above: int) -> PartitionSpec:
    """PartitionSpec of one parameter from its path and shape.

    Example on mesh fsdp=8, tensor=2: `backbone/blocks/attn/qkv/kernel` [s, d_fsdp, 3d_tensor].
    """
    layout = next(layout for pattern, layout in RULES if re.search(pattern, path))
    fill = len(shape) - (len(layout) - 1)  # "*" stands for the dimensions in between
    letters = layout.replace("*", "." * max(fill, 0))[: len(shape)].ljust(len(shape), ".")
    axes: list[str | None] = [None] * len(shape)
    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
    for index, letter in enumerate(letters):
        if letter == "t" and tensor > 1 and shape[index] % tensor == 0:
            axes[index] = "tensor"
    free = [
        index
        for index, letter in enumerate(letters)
        if letter != "s" and axes[index] is None and shape[index] % fsdp == 0
    ]
    if fsdp > 1 and free and int(np.prod(shape)) >= shard_above:
        axes[max(free, key=lambda index: shape[index])] = "fsdp"
    while axes and axes[-1] is None:
        axes.pop()
    return PartitionSpec(*axes)


def path_name(path: tuple[Any, ...]) -> str:
    """'backbone/blocks/attn/qkv/kernel' of a key path of a nested dict."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)


def tree_shardings(mesh: Mesh, abstract: Any, shard_above: int) -> Any:
    """NamedShardings of a tree of shaped arrays whose paths end in parameter paths."""

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, partition(path_name(path), leaf.shape, mesh, shard_above))

    return jax.tree_util.tree_map_with_path(one, abstract)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis split over data and fsdp."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_shards(mesh: Mesh) -> int:
    """Into how many pieces the batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def constrain_batch(tree: Any) -> Any:
    """Keep the leading axis of every array split over (data, fsdp) inside a jitted step.

    The other axes stay free, for the tensor axis. Without a mesh nothing happens.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return tree

    def one(x: jax.Array) -> jax.Array:
        free = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
        return jax.lax.with_sharding_constraint(x, PartitionSpec(*BATCH, *free))

    return jax.tree.map(one, tree)


def to_global(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's rows of a batch -> arrays of the whole batch, split over the mesh."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }


def to_scalars(values: Mapping[str, float], mesh: Mesh) -> dict[str, jax.Array]:
    """Host numbers -> replicated float32 scalars (an explicit transfer; the guard is on)."""
    return jax.device_put({k: np.float32(v) for k, v in values.items()}, replicated(mesh))


def to_counter(value: int, mesh: Mesh) -> jax.Array:
    """A host number -> a replicated int32 scalar."""
    return jax.device_put(np.int32(value), replicated(mesh))
