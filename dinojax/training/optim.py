"""AdamW by parameter path on plain nested dicts (spec 6.1), called by the compiled training step.

Which multipliers a parameter gets is read off its path alone, for example
`backbone/blocks/attn/qkv/kernel`; the first word of a path is its network (backbone, dino_head,
ibot_head). Everything here is float32; state is `{"mu", "nu", "count"}` with the moments in the
parameters' own structure, so they shard, save and restore by the same paths.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

Params = dict[str, Any]  # nested dicts of float32 arrays, str keys
Scalar = Float[Array, ""] | float

# ConvNeXt's norms outside the blocks are called downsample_layers.i.j.weight in the reference:
# without "norm" in the name they get weight decay there, and so here (spec 6.1).
_DECAYED_NORMS = re.compile(r"backbone/(stem|downsample\d+)/norm/scale")
_FIRST_LAYER = re.compile(r"backbone/(patch_embed/.*|cls_token|mask_token|storage_tokens)")


class Rule(NamedTuple):
    """What the path of a parameter decides."""

    lr_multiplier: float | np.ndarray  # [s] float32 where blocks are stacked
    decay_multiplier: float
    is_last_layer: bool  # a prototype matrix: follows `last_layer_lr`


def parameter_rules(
    params: Mapping[str, Any], layer_decay: float = 1.0, patch_embed_multiplier: float = 1.0
) -> dict[str, Rule]:
    """Rules of every parameter (arrays or abstract arrays), by path.

    A ViT (recognised by its stacked `backbone/blocks`) of depth L has layer id 0 for its patch
    embedding and tokens, i + 1 for block i, L + 1 for the rest, and multiplier layer_decay^(L + 1 -
    id), the patch embedding's times `patch_embed_multiplier`. Heads and ConvNeXt have multiplier 1.
    Biases, norms and layer scales are not decayed; tokens and the patch embedding are.
    """
    flat = flatten(params)
    depths = {leaf.shape[0] for path, leaf in flat.items() if path.startswith("backbone/blocks/")}
    if len(depths) > 1:
        raise ValueError(f"stacked blocks disagree on their number: {sorted(depths)}")
    depth = depths.pop() if depths else None
    return {
        path: Rule(
            lr_multiplier=_lr_multiplier(path, depth, layer_decay, patch_embed_multiplier),
            decay_multiplier=_decay_multiplier(path),
            is_last_layer="last_layer" in path,
        )
        for path in flat
    }


def init(params: Params) -> dict[str, Any]:
    """State of a fresh optimizer: zero moments `mu`, `nu` like `params`, `count` int32 []."""
    state = optax.scale_by_adam().init(params)
    return {"mu": state.mu, "nu": state.nu, "count": state.count}


def update(
    params: Params,
    grads: Params,
    state: dict[str, Any],
    scalars: Mapping[str, Scalar],
    rules: Mapping[str, Rule],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> tuple[Params, dict[str, Any]]:
    """One AdamW step as torch takes it: p <- p (1 - lr wd) - lr mu_hat / (sqrt(nu_hat) + eps).

    Args:
        scalars: `lr`, `last_layer_lr`, `weight_decay`, from the schedules.
        rules: of `parameter_rules`, one for every parameter.

    With a rate of 0 (a frozen last layer) a parameter neither moves nor decays; its moments
    advance.
    """
    adam = optax.scale_by_adam(*betas, eps=eps)
    before = optax.ScaleByAdamState(count=state["count"], mu=state["mu"], nu=state["nu"])
    directions, after = adam.update(grads, before)

    def step(path: str, p: Array, direction: Array) -> Array:
        rule = rules[path]
        lr = scalars["last_layer_lr" if rule.is_last_layer else "lr"]
        lr = lr * _over_leading_axis(rule.lr_multiplier, p.ndim)
        decay = scalars["weight_decay"] * rule.decay_multiplier
        return p * (1.0 - lr * decay) - lr * direction

    new = map_with_path(step, params, directions)
    return new, {"mu": after.mu, "nu": after.nu, "count": after.count}


def clip_by_network(grads: Params, max_norm: float) -> tuple[Params, dict[str, Scalar]]:
    """Clips each network by its own global norm: factor min(1, max_norm / (norm + 1e-6)).

    Returns the clipped gradients and each network's norm before clipping.
    """
    norms = {name: optax.tree.norm(tree) for name, tree in grads.items()}
    factors = {name: jnp.minimum(1.0, max_norm / (norm + 1e-6)) for name, norm in norms.items()}
    clipped = {
        name: jax.tree.map(lambda g, f=factors[name]: g * f, tree) for name, tree in grads.items()
    }
    return clipped, norms


def select(finite: Bool[Array, ""], new: Any, old: Any) -> Any:
    """`new` if `finite`, else `old`: discards a non-finite update inside the compiled step."""
    return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of nested dicts by their path, `{"backbone/cls_token": leaf, ...}`."""
    flat = {}
    for key, child in tree.items():
        if isinstance(child, Mapping):
            flat |= flatten(child, f"{prefix}{key}/")
        else:
            flat[prefix + key] = child
    return flat


def map_with_path(f: Any, tree: Mapping[str, Any], *rest: Any) -> dict[str, Any]:
    """`f(path, leaf, *leaves)` over nested dicts of one structure."""

    def call(keys: tuple, *leaves: Any) -> Any:
        return f("/".join(key.key for key in keys), *leaves)

    return jax.tree_util.tree_map_with_path(call, dict(tree), *rest)


def _lr_multiplier(
    path: str, depth: int | None, layer_decay: float, patch_embed_multiplier: float
) -> float | np.ndarray:
    if depth is None or not path.startswith("backbone/"):
        return 1.0
    if path.startswith("backbone/blocks/"):
        return (layer_decay ** np.arange(depth, 0, -1, dtype=np.float64)).astype(np.float32)
    if _FIRST_LAYER.fullmatch(path):
        embed = path.startswith("backbone/patch_embed/")
        return layer_decay ** (depth + 1) * (patch_embed_multiplier if embed else 1.0)
    return 1.0


def _decay_multiplier(path: str) -> float:
    if _DECAYED_NORMS.fullmatch(path):
        return 1.0
    undecayed = path.endswith("bias") or "norm" in path or "gamma" in path
    return 0.0 if undecayed else 1.0


def _over_leading_axis(multiplier: float | np.ndarray, ndim: int) -> Any:
    if np.ndim(multiplier) == 0:
        return multiplier
    return np.reshape(multiplier, (-1,) + (1,) * (ndim - 1))  # [s] -> [s, 1, ...]
