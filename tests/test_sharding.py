"""Where arrays live: path rules, meshes, batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from dinojax import sharding


@pytest.fixture(scope="module")
def both() -> jax.sharding.Mesh:
    return sharding.make_mesh(data=1, fsdp=4, tensor=2)


@pytest.fixture(scope="module")
def fsdp() -> jax.sharding.Mesh:
    return sharding.make_mesh(fsdp=8)


BOTH = ("tensor", "fsdp")
# path, shape, what it is on fsdp=4 tensor=2, what it is on fsdp=8. Stacked layers come first.
PLACES = [
    ("backbone/blocks/attn/qkv/kernel", (3, 64, 192), P(None, "fsdp", "tensor"), P(None, "fsdp")),
    ("backbone/blocks/attn/qkv/bias", (3, 192), P(None, "tensor"), P(None, "fsdp")),
    ("backbone/blocks/attn/proj/kernel", (3, 64, 64), P(None, BOTH), P(None, "fsdp")),
    ("backbone/blocks/ffn/fc1/kernel", (3, 64, 256), P(None, "fsdp", "tensor"), P(None, "fsdp")),
    ("backbone/blocks/ffn/w2/kernel", (3, 64, 256), P(None, "fsdp", "tensor"), P(None, "fsdp")),
    ("backbone/blocks/ffn/fc2/kernel", (3, 256, 64), P(None, BOTH), P(None, "fsdp")),
    ("backbone/blocks/ffn/w3/kernel", (3, 256, 64), P(None, BOTH), P(None, "fsdp")),
    # 12 rows divide by the tensor axis alone, so FSDP has to take columns.
    (
        "backbone/blocks/ffn/w3/kernel",
        (3, 12, 64),
        P(None, "tensor", "fsdp"),
        P(None, None, "fsdp"),
    ),
    ("backbone/blocks/norm1/scale", (3, 64), P(None, "fsdp"), P(None, "fsdp")),
    ("backbone/blocks/ls1/gamma", (3, 63), P(), P()),  # 63 divides by nothing
    ("backbone/patch_embed/kernel", (14, 14, 3, 64), P(None, None, None, "fsdp"), None),
    ("backbone/patch_embed/kernel", (16, 16, 3, 64), P("fsdp"), None),
    ("backbone/cls_token", (1, 64), P(None, "fsdp"), P(None, "fsdp")),
    ("backbone/stages2/dwconv/kernel", (8, 7, 7, 1, 64), P(None, None, None, None, "fsdp"), None),
    ("dino_head/last_layer/prototypes", (512, 64), P(BOTH), P("fsdp")),
    ("dino_head/fc1/kernel", (64, 128), P("fsdp"), P("fsdp")),
    ("step", (), P(), P()),
]


@pytest.mark.parametrize(("path", "shape", "wanted", "wanted_fsdp"), PLACES)
def test_partition(both, fsdp, path, shape, wanted, wanted_fsdp) -> None:
    assert sharding.partition(path, shape, both, shard_above=1) == wanted
    if wanted_fsdp is None:
        wanted_fsdp = wanted
    assert sharding.partition(path, shape, fsdp, shard_above=1) == wanted_fsdp


def test_the_same_rules_place_moments_and_teachers(both) -> None:
    for prefix in ("", "student/", "teacher/", "optimizer/mu/"):
        path = prefix + "backbone/blocks/attn/proj/kernel"
        found = sharding.partition(path, (3, 64, 64), both, shard_above=1)
        assert found == P(None, BOTH)
    # The Gram teacher is a backbone without its name.
    found = sharding.partition("gram/blocks/attn/proj/kernel", (3, 64, 64), both, shard_above=1)
    assert found == P(None, BOTH)


def test_small_arrays_stay_whole(both) -> None:
    path, shape = "backbone/blocks/ffn/fc2/kernel", (3, 256, 64)
    size = int(np.prod(shape))
    assert sharding.partition(path, shape, both, size) == P(None, BOTH)
    assert sharding.partition(path, shape, both, size + 1) == P(None, "tensor")


def test_the_layer_axis_is_never_split(both, fsdp) -> None:
    """A scan slices it in every iteration, even where it is the largest axis."""
    for mesh in (both, fsdp):
        for name in ("attn/qkv/kernel", "ffn/fc2/kernel", "norm2/scale", "ls2/gamma"):
            shape = (1024, 8, 16) if name.endswith("kernel") else (1024, 16)
            spec = sharding.partition(f"backbone/blocks/{name}", shape, mesh, shard_above=1)
            assert not spec or spec[0] is None


def test_tree_shardings(both) -> None:
    tree = {
        "backbone": {"blocks": {"attn": {"qkv": {"kernel": jnp.zeros((2, 8, 24))}}}},
        "dino_head": {"last_layer": {"prototypes": jnp.zeros((32, 8))}},
    }
    placed = jax.device_put(tree, sharding.tree_shardings(both, tree, shard_above=1))
    qkv = placed["backbone"]["blocks"]["attn"]["qkv"]["kernel"]
    assert qkv.sharding.spec == P(None, "fsdp", "tensor")
    assert qkv.addressable_shards[0].data.shape == (2, 2, 12)
    prototypes = placed["dino_head"]["last_layer"]["prototypes"]
    assert prototypes.addressable_shards[0].data.shape == (4, 8)


# ---- meshes --------------------------------------------------------------------------------------


def test_make_mesh() -> None:
    for sizes, shape in (
        ({}, (1, 8, 1)),
        ({"data": -1, "fsdp": 2}, (4, 2, 1)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
    ):
        mesh = sharding.make_mesh(**sizes)
        assert tuple(mesh.shape.values()) == shape and mesh.axis_names == sharding.AXES
        assert set(mesh.axis_types) == {AxisType.Auto}
        assert sharding.batch_shards(mesh) == shape[0] * shape[1]


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 3}, {"data": 3, "fsdp": -1}, {"data": -1, "fsdp": -1}, {"data": 0}]
)
def test_a_mesh_that_does_not_fit(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="does not fit 8 devices; nearest: data=1 fsdp=8 tensor=1"):
        sharding.make_mesh(**sizes)


# ---- batches -------------------------------------------------------------------------------------


def test_batches_are_split_in_runs(both) -> None:
    rows = np.arange(16).reshape(8, 2)
    found = sharding.to_global({"x": rows}, both)["x"]
    np.testing.assert_array_equal(found, rows)
    for shard in found.addressable_shards:
        assert shard.data.shape == (2, 2)  # over data x fsdp = 4, the same on both of tensor
        np.testing.assert_array_equal(shard.data, rows[shard.index])
    scalars = sharding.to_scalars({"lr": 0.1}, both)
    assert scalars["lr"].dtype == jnp.float32 and scalars["lr"].is_fully_replicated


def test_constrain_batch(both) -> None:
    """Splits rows inside a compiled step, the columns stay; nothing without a mesh."""
    x = jnp.ones((8, 4))
    assert sharding.constrain_batch(x) is x
    with jax.set_mesh(both):
        columns = jax.device_put(x, jax.NamedSharding(both, P(None, "tensor")))
        found = jax.jit(lambda tree: sharding.constrain_batch(tree))({"x": columns})["x"]
        assert found.addressable_shards[0].data.shape == (2, 2)
        odd = jax.jit(lambda x: 2 * sharding.constrain_batch(x))(jnp.ones((3, 4)))
    np.testing.assert_array_equal(odd, 2 * np.ones((3, 4)))  # rows that do not divide
    np.testing.assert_array_equal(found, x)
