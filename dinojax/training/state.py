"""TrainState: what a run carries from step to step, born sharded, all plain nested dicts.

step       int32 []        global step, all phases
student    backbone, dino_head, ibot_head
teacher    the same, the exponential moving average of the student
optimizer  mu, nu (like student), count
gram       a frozen backbone in phases with a Gram snapshot, else {}
centers    [prototypes] per head where centering is "softmax", else {}
skipped    total, in_a_row: steps whose update was not finite and was discarded
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, BFloat16, Float, Int, PRNGKeyArray, UInt32
from ml_collections import ConfigDict

from dinojax import sharding
from dinojax.models import heads
from dinojax.models.functional import Network
from dinojax.training import optim

State = dict[str, Any]
Params = dict[str, Any]


class NetworkSet(NamedTuple):
    """The three networks of student and teacher."""

    backbone: Network
    dino_head: Network
    ibot_head: Network

    def applies(self) -> dict[str, Callable[..., Any]]:
        """Their apply functions by name."""
        return {name: network.apply for name, network in self._asdict().items()}


def build_backbone(model: Mapping[str, Any]) -> Network:
    """The backbone that the `model` section of a config describes."""
    section = dict(model)
    name = section.pop("name")
    known = ("vit", "convnext")
    if name not in known:
        raise ValueError(f"config.model.name is {name!r}, expected one of {known}")
    return importlib.import_module(f"dinojax.models.{name}").build(section)


def build_networks(config: ConfigDict) -> NetworkSet:
    """Backbone and heads of a config; heads take their input width from the backbone."""
    backbone = build_backbone(config.model.to_dict())
    width = jax.eval_shape(backbone.init, jax.random.key(0))["norm"]["scale"].shape[0]
    dtype = jnp.dtype(config.model.dtype)
    return NetworkSet(
        backbone,
        heads.build(config.dino_head.to_dict(), width, dtype),
        heads.build(config.ibot_head.to_dict(), width, dtype),
    )


def init_params(networks: NetworkSet, key: PRNGKeyArray, init: str = "fixed") -> Params:
    """Fresh float32 parameters of backbone and heads.

    `init` "fixed" is the reference's: weights of linear layers and prototypes N(0, 0.02^2) whatever
    their width (spec 1.5). "fan_in" draws them N(0, 1 / inputs), for narrow networks and short
    runs: 0.02 suits 2,500 inputs, and at width 128 it leaves residual branches and prototypes so
    small that a supervised 3-block ViT on 48-pixel scenes is still at chance after 100 steps of 128
    images (9 %), where "fan_in" reaches 40 %.
    """
    keys = jax.random.split(key, 3)
    params = {
        name: network.init(one)
        for one, (name, network) in zip(keys, networks._asdict().items(), strict=True)
    }
    return jax.tree_util.tree_map_with_path(_to_fan_in, params) if init == "fan_in" else params


def _to_fan_in(path: tuple[Any, ...], weight: Array) -> Array:
    """N(0, 0.02^2) -> N(0, 1 / inputs) for weights of linear layers and prototypes."""
    name = sharding.path_name(path)
    if name.endswith("prototypes"):
        inputs = weight.shape[-1]  # [K, b]: unit norm on average
    elif name.endswith("kernel") and weight.ndim < 4:  # [s, d, f] or [d, f]; no convolution
        inputs = weight.shape[-2]
    else:
        return weight
    return weight * (inputs**-0.5 / 0.02)


def from_params(
    params: Params, *, gram: bool, centers: Mapping[str, int], teacher_dtype: str = "float32"
) -> State:
    """The state at the start of training from `params`: the teacher is a copy.

    With `teacher_dtype` "bfloat16" its matrices, which products round to bfloat16 anyway, and those
    of the Gram teacher are kept so; vectors stay float32.
    """

    def kept(path: tuple[Any, ...], x: Array) -> Array:
        matrix = sharding.path_name(path).endswith(("kernel", "prototypes"))
        return jnp.array(x, teacher_dtype if matrix else x.dtype, copy=True)

    teacher = jax.tree_util.tree_map_with_path(kept, params)
    zero = jnp.zeros((), jnp.int32)
    return {
        "step": zero,
        "student": params,
        "teacher": teacher,
        "optimizer": optim.init(params),
        "gram": jax.tree.map(jnp.copy, teacher["backbone"]) if gram else {},
        "centers": {name: jnp.zeros((size,), jnp.float32) for name, size in centers.items()},
        "skipped": {"total": zero, "in_a_row": zero},
    }


def center_sizes(config: ConfigDict, phase: ConfigDict) -> dict[str, int]:
    """Prototypes per head that keep a running center in this phase."""
    if phase.losses.centering != "softmax":
        return {}
    sizes = {"dino": config.dino_head.prototypes, "ibot": config.ibot_head.prototypes}
    return {name: size for name, size in sizes.items() if phase.losses[name]}


def zero_centers(config: ConfigDict, phase: ConfigDict, mesh: Mesh) -> dict[str, Array]:
    """Centers at the start of a phase that keeps them."""
    zeros = {n: np.zeros((k,), np.float32) for n, k in center_sizes(config, phase).items()}
    return jax.device_put(zeros, sharding.replicated(mesh))


def abstract(
    config: ConfigDict, networks: NetworkSet, phase: ConfigDict, mesh: sharding.AnyMesh
) -> State:
    """Shapes, dtypes and shardings of the state in `phase`; nothing is allocated."""
    shapes = jax.eval_shape(_initialiser(config, networks, phase), jax.random.key(0))
    placed = sharding.tree_shardings(mesh, shapes, config.mesh.shard_above)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placed
    )


def create(config: ConfigDict, networks: NetworkSet, phase: ConfigDict, mesh: Mesh) -> State:
    """A fresh state, computed directly into its shards."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract(config, networks, phase, mesh))
    init = jax.jit(_initialiser(config, networks, phase), out_shardings=shardings)
    return init(jax.random.key(config.seed))


def _initialiser(
    config: ConfigDict, networks: NetworkSet, phase: ConfigDict
) -> Callable[[PRNGKeyArray], State]:
    centers, gram = center_sizes(config, phase), phase.gram.teacher == "snapshot"
    return lambda key: from_params(
        init_params(networks, key, config.init),
        gram=gram,
        centers=centers,
        teacher_dtype=config.teacher_dtype,
    )


def ema(
    teacher: Params, student: Params, momentum: Float[Array, ""], step: Int[Array, ""] | int = 0
) -> Params:
    """teacher <- momentum * teacher + (1 - momentum) * student, in float32 (spec 6.4).

    A bfloat16 teacher is rounded up or down at random, so that its mean is the float32 average: to
    the nearest it would stand still, since a step of 0.4 % of the difference is less than a bit.
    """

    steps = jnp.asarray(step, jnp.uint32) * jnp.uint32(0x9E3779B9)

    def one(number: int, t: Array, s: Array) -> Array:
        mean = momentum * t.astype(jnp.float32) + (1.0 - momentum) * s
        if t.dtype == jnp.float32:
            return mean
        return randomly_rounded(mean, steps + jnp.uint32(number))

    leaves, tree = jax.tree.flatten(teacher)
    pairs = zip(leaves, jax.tree.leaves(student), strict=True)
    return jax.tree.unflatten(tree, [one(number, *pair) for number, pair in enumerate(pairs)])


def randomly_rounded(x: Float[Array, "*n"], seed: UInt32[Array, ""]) -> BFloat16[Array, "*n"]:
    """bfloat16 above or below each float32, likelier the nearer one: the mean is x.

    Random bits are a hash of an entry's place and the seed ("lowbias32" of C. Wellons), so they
    depend on no device and cost a few integer operations in the loop that averages anyway.
    """
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    noise = place * jnp.uint32(0x85EBCA6B) ^ seed
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        noise = (noise ^ noise >> shift) * jnp.uint32(factor)
    noise = (noise ^ noise >> 16) >> 16  # 0 .. 2^16 - 1: the bits that bfloat16 drops
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
    kept = bits & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(kept, jnp.float32).astype(jnp.bfloat16)


def refresh_gram(state: State) -> State:
    """The Gram teacher becomes a copy of the current EMA backbone (spec 3.6)."""
    return {**state, "gram": copy(state["teacher"]["backbone"])}


@jax.jit
def copy(tree: Params, like: Params | None = None) -> Params:
    """New buffers with the same values, each on its devices, in the dtypes of `like`."""
    like = tree if like is None else like
    return jax.tree.map(lambda x, y: jnp.array(x, y.dtype, copy=True), tree, like)
