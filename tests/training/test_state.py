"""TrainState: born sharded, the teacher an exact copy, the average in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from dinojax import config as configs
from dinojax import sharding
from dinojax.training import optim
from dinojax.training import state as states

HEAD = {"prototypes": 40, "bottleneck": 16, "hidden": 24, "layers": 2}


@pytest.fixture(scope="module")
def config() -> ConfigDict:
    config = configs.base()
    config.batch_size, config.group, config.seed = 16, 2, 3
    config.model.update({"width": 32, "depth": 2, "heads": 2, "patch_size": 8})
    config.dino_head.update(HEAD)
    config.ibot_head.update(HEAD | {"prototypes": 48})
    config.mesh.shard_above = 256
    config.phases = (
        configs.phase("plain", 10),
        configs.phase(
            "gram",
            10,
            gram={"teacher": "snapshot"},
            losses={"centering": "softmax", "ibot": 0.0},
        ),
    )
    return configs.resolve(config)


@pytest.fixture(scope="module")
def networks(config) -> states.NetworkSet:
    return states.build_networks(config)


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return sharding.make_mesh(data=2, fsdp=2, tensor=2)


@pytest.fixture(scope="module")
def created(config, networks, mesh) -> states.State:
    """The state of the phase with a Gram snapshot and centers."""
    return states.create(config, networks, config.phases[1], mesh)


def test_abstract_is_what_is_created(config, networks, mesh, created) -> None:
    abstract = states.abstract(config, networks, config.phases[1], mesh)
    assert jax.tree.structure(abstract) == jax.tree.structure(created)
    for path, leaf in optim.flatten(abstract).items():
        made = optim.flatten(created)[path]
        assert (leaf.shape, leaf.dtype) == (made.shape, made.dtype), path
        assert leaf.sharding.is_equivalent_to(made.sharding, made.ndim), path


def test_moments_and_teachers_lie_where_their_parameter_does(created) -> None:
    flat = optim.flatten(created)
    student = {k[8:]: leaf for k, leaf in flat.items() if k.startswith("student/")}
    for path, leaf in student.items():
        others = ["teacher/" + path, "optimizer/mu/" + path, "optimizer/nu/" + path]
        others += ["gram/" + path[9:]] if path.startswith("backbone/") else []
        for other in others:
            assert flat[other].sharding == leaf.sharding, other
    split = [path for path, leaf in student.items() if not leaf.is_fully_replicated]
    assert "backbone/blocks/attn/qkv/kernel" in split and len(split) > 8


def test_teacher_and_gram_are_exact_copies(created) -> None:
    for path, leaf in optim.flatten(created["student"]).items():
        np.testing.assert_array_equal(optim.flatten(created["teacher"])[path], leaf, err_msg=path)
        if path.startswith("backbone/"):
            np.testing.assert_array_equal(optim.flatten(created["gram"])[path[9:]], leaf)
    # Copies, not names of the same buffers: the step gives its arguments' memory away.
    student, teacher = (
        created[name]["backbone"]["cls_token"].addressable_shards[0].data.unsafe_buffer_pointer()
        for name in ("student", "teacher")
    )
    assert student != teacher


def test_fresh_state(created, config) -> None:
    assert int(created["step"]) == 0 and int(created["optimizer"]["count"]) == 0
    assert jax.tree.map(int, created["skipped"]) == {"total": 0, "in_a_row": 0}
    assert set(created["centers"]) == {"dino"}  # iBOT is off in this phase
    assert created["centers"]["dino"].shape == (config.dino_head.prototypes,)
    for moments in (created["optimizer"]["mu"], created["optimizer"]["nu"]):
        assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(moments))
    floats = [x for x in jax.tree.leaves(created) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {leaf.dtype for leaf in floats} == {np.dtype("float32")}  # also of a bfloat16 model
    assert config.model.dtype == "bfloat16"


def test_a_plain_phase_has_no_gram_and_no_centers(config, networks, mesh, created) -> None:
    abstract = states.abstract(config, networks, config.phases[0], mesh)
    assert abstract["gram"] == {} and abstract["centers"] == {}
    assert jax.tree.structure(abstract["student"]) == jax.tree.structure(created["student"])


def test_start_depends_on_the_seed_and_not_on_the_mesh(config, networks, created) -> None:
    init = jax.jit(lambda key: states.init_params(networks, key))
    alone, other = (optim.flatten(init(jax.random.key(config.seed + i))) for i in range(2))
    for path, leaf in optim.flatten(created["student"]).items():
        np.testing.assert_allclose(alone[path], leaf, rtol=1e-6, atol=1e-8, err_msg=path)
    assert np.abs(alone["backbone/cls_token"] - other["backbone/cls_token"]).max() > 1e-3


def test_backbone_and_heads_are_drawn_apart(created) -> None:
    dino, ibot = (created["student"][f"{name}_head"]["fc1"]["kernel"] for name in ("dino", "ibot"))
    assert np.abs(np.asarray(dino) - np.asarray(ibot)).max() > 1e-3


def test_ema() -> None:
    random = np.random.default_rng(0)
    teacher, student = (
        {"a": {"b": jnp.asarray(random.normal(size=(5, 3)), jnp.float32)}} for _ in range(2)
    )
    found = teacher
    wanted = np.float64(teacher["a"]["b"])
    for momentum in (0.994, 0.9, 0.999):
        found = states.ema(found, student, jnp.float32(momentum))
        wanted = momentum * wanted + (1 - momentum) * np.float64(student["a"]["b"])
    assert found["a"]["b"].dtype == jnp.float32
    np.testing.assert_allclose(found["a"]["b"], wanted, rtol=1e-6, atol=1e-7)


def test_ema_of_a_bfloat16_teacher() -> None:
    """Steps far below a bit of bfloat16 add up all the same; vectors stay float32."""
    random = np.random.default_rng(0)
    values = random.normal(size=(2, 64, 256)).astype(np.float32)
    start = {"fc": {"kernel": jnp.asarray(values[0]), "bias": jnp.zeros(3)}}
    student = {"fc": {"kernel": jnp.asarray(values[1]), "bias": jnp.ones(3)}}
    params = {"backbone": start}
    teacher = states.from_params(params, gram=True, centers={}, teacher_dtype="bfloat16")
    assert teacher["gram"]["fc"]["kernel"].dtype == jnp.bfloat16
    rounded = teacher["teacher"]["backbone"]
    assert rounded["fc"]["bias"].dtype == jnp.float32
    exact, average = start, jax.jit(states.ema)
    for step in range(300):
        exact = average(exact, student, jnp.float32(0.999), jnp.int32(step))
        rounded = average(rounded, student, jnp.float32(0.999), jnp.int32(step))
    found, wanted = (np.float64(x["fc"]["kernel"]) for x in (rounded, exact))
    assert rounded["fc"]["kernel"].dtype == jnp.bfloat16
    # Way gone: 26 %. What is left is noise of about a bit, a hundredth of that in the mean.
    way = np.float64(values[1]) - values[0]
    assert abs(((found - wanted) * way).mean() / (way**2).mean()) < 1e-3
    assert np.abs(found - wanted).mean() < 0.02
    np.testing.assert_allclose(rounded["fc"]["bias"], exact["fc"]["bias"], rtol=1e-6)


def test_random_rounding() -> None:
    """One of the two neighbours, the nearer one likelier: on average the number itself."""
    x = jnp.full((400, 500), 1.0 + 0.25 * 2**-7, jnp.float32)
    found = np.float64(states.randomly_rounded(x, jnp.uint32(7)))
    assert set(np.unique(found)) == {1.0, 1.0 + 2**-7}
    assert abs((found > 1).mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / x.size)
    other = np.float64(states.randomly_rounded(x, jnp.uint32(8)))
    assert abs(np.corrcoef(found.ravel(), other.ravel())[0, 1]) < 4 / np.sqrt(x.size)
    rows = (found > 1).mean(axis=1), (found > 1).mean(axis=0)
    assert all(abs(np.std(r) - np.sqrt(0.1875 / n)) < 0.003 for r, n in zip(rows, (500, 400)))
    exact = jnp.asarray([0.0, -1.5, 2.0**-100, jnp.inf], jnp.float32)  # bfloat16 already
    np.testing.assert_array_equal(np.float32(states.randomly_rounded(exact, jnp.uint32(1))), exact)


def test_refresh_gram(created) -> None:
    teacher = jax.tree.map(lambda x: x + 1, created["teacher"])
    state = states.refresh_gram({**created, "teacher": teacher})
    for path, leaf in optim.flatten(state["gram"]).items():
        np.testing.assert_array_equal(leaf, optim.flatten(teacher["backbone"])[path])
        assert leaf.sharding == optim.flatten(created["gram"])[path].sharding
    assert state["student"] is created["student"]


def test_unknown_model_name() -> None:
    with pytest.raises(ValueError, match="config.model.name is 'vitt', expected one of"):
        states.build_backbone({"name": "vitt"})
