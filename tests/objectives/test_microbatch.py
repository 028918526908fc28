"""Micro-batches and devices change where a step is computed, not what.

Stochastic depth and RoPE rescale are on: their keys are folded with the group's number in the whole
batch. Gram matrices span a group, KoLeo one group or two.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinojax import sharding
from dinojax.objectives import microbatch
from dinojax.training import optim
from dinojax.training import state as states

# Sizes of the mesh, and micro-batches.
MESHES = {
    "fsdp8": ({"fsdp": 8}, 1),
    "data2_fsdp2_tensor2": ({"data": 2, "fsdp": 2, "tensor": 2}, 2),
}
SCALARS = {"lr": 1e-3, "last_layer_lr": 1e-3, "weight_decay": 0.04, "momentum": 0.99}


def assert_same(found, wanted, tolerance: float) -> None:
    """Relative L2 of every array of two trees."""
    found, wanted = optim.flatten(found), optim.flatten(wanted)
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        error = np.linalg.norm(found[name] - array) / max(np.linalg.norm(array), 1e-12)
        assert error <= tolerance, f"{name}: relative L2 {error:.1e}"


@pytest.mark.parametrize(("pieces", "koleo_groups"), [(2, 1), (4, 1), (2, 2)])
def test_pieces_equal_the_whole(world, pieces: int, koleo_groups: int) -> None:
    neighbours = koleo_groups * world.group
    metrics, gradients = world.run(pieces, neighbours)
    whole_metrics, whole_gradients = world.whole(neighbours)
    assert_same(metrics, whole_metrics, 1e-5)
    assert_same(gradients, whole_gradients, 1e-5)


def test_koleo_group_matters(world) -> None:
    """Else the test above would not show that units of two groups stay together."""
    one, two = (world.whole(n * world.group)[0]["koleo"] for n in (1, 2))
    assert abs(one - two) > 1e-2


def test_pieces_take_strided_units() -> None:
    batch = {"seeds": jnp.arange(24), "groups": jnp.arange(12), "x": jnp.arange(48).reshape(24, 2)}
    parts = microbatch.split(batch, pieces=2, unit=4)  # six units of four images and two groups
    assert parts["seeds"].shape == (2, 12) and parts["groups"].shape == (2, 6)
    np.testing.assert_array_equal(parts["groups"][1], [2, 3, 6, 7, 10, 11])
    np.testing.assert_array_equal(parts["x"][1, :, 0], 2 * parts["seeds"][1])
    whole = microbatch.merge(parts)["seeds"]
    np.testing.assert_array_equal(np.sort(whole), np.arange(24))
    np.testing.assert_array_equal(microbatch.unmerge(whole, 2), parts["seeds"])


@pytest.fixture(scope="module", params=MESHES, ids=str)
def on_mesh(request, world):
    """The trainer's step on eight devices: its compiled form, metrics and gradients."""
    sizes, pieces = MESHES[request.param]
    mesh = sharding.make_mesh(**sizes)
    gradients_of = world.gradients_of(pieces, world.group)
    rules = optim.parameter_rules(world.student)

    def step(student, frozen, moments, batch, scalars, key):
        metrics, gradients, _ = gradients_of(student, frozen, batch, {}, scalars, key)
        clipped, _ = optim.clip_by_network(gradients, 3.0)
        student, moments = optim.update(student, clipped, moments, scalars, rules)
        teacher = states.ema(frozen["teacher"], student, scalars["momentum"])
        return metrics, gradients, student, moments, teacher

    def placed(tree):
        return jax.device_put(tree, sharding.tree_shardings(mesh, tree, shard_above=64))

    scalars = {name: float(value) for name, value in (world.scalars | SCALARS).items()}
    with jax.set_mesh(mesh):
        student = placed(world.student)
        split = [leaf for leaf in jax.tree.leaves(student) if not leaf.is_fully_replicated]
        assert len(split) > 20  # whole parameters on every device would show nothing
        arguments = (
            student,
            placed(world.frozen),
            placed(optim.init(world.student)),
            jax.device_put(world.batch, sharding.batch_sharding(mesh)),
            sharding.to_scalars(scalars, mesh),
            jax.device_put(world.key, sharding.replicated(mesh)),
        )
        compiled = jax.jit(step).lower(*arguments).compile()
        metrics, gradients, *_ = compiled(*arguments)
        return sizes, compiled, jax.device_get(metrics), jax.device_get(gradients)


def test_eight_devices_equal_one(world, on_mesh) -> None:
    *_, metrics, gradients = on_mesh
    whole_metrics, whole_gradients = world.whole(world.group)
    assert_same(metrics, whole_metrics, 1e-5)
    assert_same(gradients, whole_gradients, 1e-5)


def test_rows_stay_on_their_devices(on_mesh) -> None:
    """Views folded image-major, subsets drawn by group, weights gathered: no all-to-all.

    Along the tensor axis there are some, to split q | k | v.
    """
    sizes, compiled, *_ = on_mesh
    if "tensor" not in sizes:
        assert "all-to-all" not in compiled.as_text()
