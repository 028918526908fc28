"""Transformer block and its stochastic depth by exact-count subsets of rows (spec 1.2)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from dinojax.layers.attention import Attention
from dinojax.layers.ffn import make_ffn
from dinojax.layers.linear import along_last
from dinojax.layers.norm import make_norm
from dinojax.layers.rope import Tables


def kept_count(rows: int, rate: float) -> int:
    """Rows of a group that keep a residual branch: max(int(rows (1 - rate)), 1)."""
    return max(int(rows * (1 - rate)), 1)


def draw_kept(keys: Key[Array, " g"], rows: int, kept: int) -> Int[Array, "g k"]:
    """For every group `kept` distinct row numbers out of `rows`, uniformly, in increasing order."""
    draw = jax.vmap(lambda key: jnp.sort(jax.random.permutation(key, rows)[:kept]))
    return draw(keys)


def residual(
    x: Float[Array, "n t d"],
    branch: Callable[[Float[Array, "m t d"]], Float[Array, "m t d"]],
    gamma: Float[Array, " d"] | None,
    kept: Int[Array, "g k"] | None = None,
) -> Float[Array, "n t d"]:
    """x + gamma * branch(x); with `kept` the branch sees only those rows of each group.

    Rows are g equal runs of r. The branch runs on [g·k] rows and is added back times r/k.
    """
    if kept is None:
        return (x + _scaled(branch(x), gamma, 1.0)).astype(x.dtype)
    n, t, d = x.shape
    g, k = kept.shape
    rows = x.reshape(g, n // g, t, d)  # [g·r, t, d] -> [g, r, t, d]
    # vmap makes g a batch axis of gather and scatter: a mesh that splits g needs no exchange.
    chosen = jax.vmap(lambda run, index: run[index])(rows, kept)
    added = _scaled(branch(chosen.reshape(g * k, t, d)), gamma, n / (g * k)).reshape(g, k, t, d)
    add = jax.vmap(lambda run, index, value: run.at[index].add(value, unique_indices=True))
    return add(rows, kept, added.astype(x.dtype)).reshape(n, t, d)


def _scaled(branch: Array, gamma: Array | None, factor: float) -> Array:
    """factor * gamma * branch in float32."""
    branch = branch.astype(jnp.float32)
    return branch * factor if gamma is None else branch * along_last(gamma * factor, branch.ndim)


class LayerScale(nnx.Module):
    """Holds γ [d]; `residual` multiplies by it."""

    def __init__(self, dim: int, value: float) -> None:
        self.gamma = nnx.Param(jnp.full(dim, value, jnp.float32))


class Block(nnx.Module):
    """x += ls1 ⊙ attn(norm1 x); x += ls2 ⊙ ffn(norm2 x)."""

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        ffn: str = "mlp",
        ffn_ratio: float = 4.0,
        norm: str = "layernorm",
        qkv_bias: bool = True,
        proj_bias: bool = True,
        ffn_bias: bool = True,
        mask_k_bias: bool = False,
        layerscale: float | None = 1e-5,
        attention: str = "auto",
        rngs: nnx.Rngs,
    ) -> None:
        self.norm1 = make_norm(norm, dim)
        self.attn = Attention(
            dim,
            heads,
            qkv_bias=qkv_bias,
            proj_bias=proj_bias,
            mask_k_bias=mask_k_bias,
            implementation=attention,
            rngs=rngs,
        )
        self.ls1 = LayerScale(dim, layerscale) if layerscale else None
        self.norm2 = make_norm(norm, dim)
        self.ffn = make_ffn(ffn, dim, ffn_ratio, bias=ffn_bias, rngs=rngs)
        self.ls2 = LayerScale(dim, layerscale) if layerscale else None

    def __call__(
        self,
        x: Float[Array, "n t d"],
        rope: Tables | None = None,
        valid: Bool[Array, "#n t"] | None = None,
        kept: tuple[Int[Array, "g k"], Int[Array, "g k"]] | None = None,
    ) -> Float[Array, "n t d"]:
        """`kept` = rows for the attention and for the feed-forward branch, None for all."""
        kept_attn, kept_ffn = kept or (None, None)
        gamma1, gamma2 = (None if ls is None else ls.gamma[...] for ls in (self.ls1, self.ls2))
        x = residual(x, lambda y: self.attn(self.norm1(y), rope, valid), gamma1, kept_attn)
        return residual(x, lambda y: self.ffn(self.norm2(y)), gamma2, kept_ffn)
