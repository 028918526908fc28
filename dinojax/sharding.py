"""Where every array lives: the mesh, path rules -> PartitionSpec, and host -> global batches.

Mesh axes are `data`, `fsdp`, `tensor`, always with Auto axis types. The same rules place
parameters, moments, teacher and gram, because all of them carry the parameter's path. Batches are
split over (`data`, `fsdp`) on their leading axis, whole groups to a device.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))
AnyMesh = Mesh | AbstractMesh  # an abstract one has sizes and no devices: for shapes (a plan's)

# First match wins. Letters name what a dimension is given to: "t" the tensor axis, "." nothing;
# FSDP then takes the largest dimension that divides, the last one only if no other does: rows are
# gathered in runs of memory, columns would have to be woven together. It may share a dimension
# with the tensor axis. "s" marks the scan axis, never split: a scan slices it in every iteration.
RULES: tuple[tuple[str, str], ...] = (
    (r"blocks/attn/qkv/(kernel|bias)$", "s*t"),
    (r"blocks/attn/proj/kernel$", "st."),
    (r"blocks/ffn/(fc1|w1|w2)/(kernel|bias)$", "s*t"),
    (r"blocks/ffn/(fc2|w3)/kernel$", "st."),
    (r"(blocks|stages\d)/", "s*"),
    (r"last_layer/prototypes$", "t."),
    (r".", "*"),
)


def mesh_shape(count: int, data: int = 1, fsdp: int = -1, tensor: int = 1) -> tuple[int, int, int]:
    """(data, fsdp, tensor) over `count` devices; one of the three may be -1 (what remains).

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
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
    return sizes["data"], sizes["fsdp"], sizes["tensor"]


def make_mesh(
    data: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh over all devices, or over `devices`, which may be described only (a plan's).

    Devices of several slices (TPUs joined by the data centre's network) are laid out so that only
    the `data` axis crosses from one to the next: gradients cross once a step, weights never.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or slices do not fit.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = mesh_shape(len(devices), data, fsdp, tensor)
    types = (AxisType.Auto,) * len(AXES)
    slices = len({slice_of(device) for device in devices})
    arrange = arrange_devices if slices == 1 else arrange_slices
    return Mesh(arrange(devices, shape), AXES, axis_types=types)


def arrange_devices(devices: Sequence[Any], shape: tuple[int, int, int]) -> np.ndarray:
    """Devices as [data, fsdp, tensor], neighbours of a TPU's torus next to one another."""
    try:
        return mesh_utils.create_device_mesh(shape, devices)
    except NotImplementedError:  # an axis of ours is a part of one of the torus: 2 of 8 x 8 x 8
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def slice_of(device: Any) -> int:
    """The slice a device belongs to; 0 where there are none."""
    return getattr(device, "slice_index", None) or 0


def arrange_slices(devices: Sequence[Any], shape: tuple[int, int, int]) -> np.ndarray:
    """Devices of several slices as [data, fsdp, tensor], a slice to each run of `data`."""
    slices = len({slice_of(device) for device in devices})
    data, fsdp, tensor = shape
    if data % slices:
        raise ValueError(
            f"mesh data={data} fsdp={fsdp} tensor={tensor} does not fit {slices} slices of "
            f"{len(devices) // slices} devices, between which only data may be split; nearest: "
            f"data={slices} fsdp={len(devices) // slices} tensor=1"
        )
    inside = (data // slices, fsdp, tensor)
    return mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), devices)


def partition(path: str, shape: tuple[int, ...], mesh: AnyMesh, shard_above: int) -> PartitionSpec:
    """PartitionSpec of one parameter from its path and shape.

    Example on mesh fsdp=8, tensor=2: `backbone/blocks/attn/qkv/kernel` [s, d_fsdp, 3d_tensor].
    """
    layout = next(layout for pattern, layout in RULES if re.search(pattern, path))
    fill = len(shape) - (len(layout) - 1)  # "*" stands for the dimensions in between
    letters = layout.replace("*", "." * max(fill, 0))[: len(shape)].ljust(len(shape), ".")
    axes: list[str | tuple[str, str] | None] = [None] * len(shape)
    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
    for index, letter in enumerate(letters):
        if letter == "t" and tensor > 1 and shape[index] % tensor == 0:
            axes[index] = "tensor"
    last = len(shape) - 1
    free = [
        index
        for index, letter in enumerate(letters)
        if letter != "s" and shape[index] % (fsdp * (tensor if axes[index] else 1)) == 0
    ]
    rows = [index for index in free if index < last]
    if last in free and axes[last] is None and not rows:
        rows = [last]
    if fsdp > 1 and rows and int(np.prod(shape)) >= shard_above:
        index = max(rows, key=lambda index: shape[index])
        axes[index] = ("tensor", "fsdp") if axes[index] else "fsdp"
    while axes and axes[-1] is None:
        axes.pop()
    return PartitionSpec(*axes)


def path_name(path: tuple[Any, ...]) -> str:
    """'backbone/blocks/attn/qkv/kernel' of a key path of a nested dict."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)


def tree_shardings(mesh: AnyMesh, abstract: Any, shard_above: int) -> Any:
    """NamedShardings of a tree of shaped arrays whose paths end in parameter paths."""

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, partition(path_name(path), leaf.shape, mesh, shard_above))

    return jax.tree_util.tree_map_with_path(one, abstract)


def batch_sharding(mesh: AnyMesh) -> NamedSharding:
    """The leading axis split over data and fsdp."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: AnyMesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_shards(mesh: Mesh) -> int:
    """Into how many pieces the batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def local_runs(mesh: Mesh) -> tuple[tuple[int, ...], int]:
    """Which rows of a batch this process holds: ((1, 3), 4) is the second and last of four runs.

    On TPUs a host's devices need not be neighbours in the mesh, and along the tensor axis several
    hosts may hold the same rows.
    """
    runs = batch_shards(mesh)
    indices = batch_sharding(mesh).addressable_devices_indices_map((runs,))
    here = tuple(sorted({index[0].indices(runs)[0] for index in indices.values()}))
    return (here, runs) if len(here) < runs else ((0,), 1)


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


def tensor_size() -> int:
    """Devices along the tensor axis of the mesh at hand."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["tensor"]


def split_parts(w: jax.Array, parts: int) -> jax.Array:
    """[d, parts * f] -> [d, parts, f] with every part split over the tensor axis.

    Columns q | k | v are stored in runs over that axis, so a device holds all of q and some of k.
    Moving what is left of a weight after FSDP costs little; left to itself the partitioner moves
    the activations (19 GB into each chip in a 7B step with tensor=2).
    """
    w = w.reshape(w.shape[0], parts, w.shape[1] // parts)
    free = PartitionSpec.UNCONSTRAINED
    return jax.lax.with_sharding_constraint(w, PartitionSpec(free, None, "tensor"))


def gather_rows(w: jax.Array) -> jax.Array:
    """A weight whole on every device before it is multiplied, inside a jitted step.

    Left to itself the TPU compiler multiplies by one device's rows at a time, passing them around,
    and rewrites the float32 sums in main memory each time: 1.8 times the traffic of a ViT-S step on
    16 chips. With a tensor axis, along which weights stay split, it is left to itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["fsdp"] == 1 or mesh.shape["tensor"] > 1:
        return w
    return jax.lax.with_sharding_constraint(w, PartitionSpec())


def to_global(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's rows of a batch -> arrays of the whole batch, split over the mesh."""
    sharding = batch_sharding(mesh)
    with jax.transfer_guard_host_to_device("allow"):  # of several processes, jax calls it implicit
        return {
            name: jax.make_array_from_process_local_data(sharding, array)
            for name, array in batch.items()
        }


def to_scalars(values: Mapping[str, float], mesh: Mesh) -> dict[str, jax.Array]:
    """Host numbers -> replicated float32 scalars (an explicit transfer; the guard is on)."""
    return {name: _replicate(np.float32(value), mesh) for name, value in values.items()}


def to_counter(value: int, mesh: Mesh) -> jax.Array:
    """A host number -> a replicated int32 scalar."""
    return _replicate(np.int32(value), mesh)


def _replicate(value: np.generic, mesh: Mesh) -> jax.Array:
    """A scalar onto all devices. (device_put would have all hosts compare it, at every step.)"""
    with jax.transfer_guard_host_to_device("allow"):
        return jax.make_array_from_callback((), replicated(mesh), lambda _: np.asarray(value))
