"""LayerNorm and RMSNorm with float32 statistics (spec 1.2)."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dinojax.layers.linear import along_last

# "layernormbf16" is the reference's name for the other epsilon; it says nothing about the dtype.
EPSILON = {"layernorm": 1e-6, "layernormbf16": 1e-5, "rmsnorm": 1e-5}


# Checkpoints, so that a scan stores x alone for the backward pass (see layers/ffn.py: gelu).
@partial(jax.checkpoint, prevent_cse=False, static_argnums=1)
def standardize(x: Float[Array, "*n d"], epsilon: float) -> Float[Array, "*n d"]:
    """(x - mean) / sqrt(var + eps) over the last axis, float32 out."""
    y = x.astype(jnp.float32)
    return divide_by_rms(y - y.mean(-1, keepdims=True), epsilon)


@partial(jax.checkpoint, prevent_cse=False, static_argnums=1)
def divide_by_rms(x: Float[Array, "*n d"], epsilon: float) -> Float[Array, "*n d"]:
    """x / sqrt(mean(x²) + eps) over the last axis."""
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + epsilon)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias over the last axis, computed in float32."""

    def __init__(self, dim: int, *, epsilon: float) -> None:
        self.scale = nnx.Param(jnp.ones(dim))
        self.bias = nnx.Param(jnp.zeros(dim))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        y = along_last(self.scale[...], x.ndim) * standardize(x, self.epsilon)
        return (y + along_last(self.bias[...], x.ndim)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x²) + eps) * scale over the last axis, computed in float32."""

    def __init__(self, dim: int, *, epsilon: float) -> None:
        self.scale = nnx.Param(jnp.ones(dim))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        y = along_last(self.scale[...], x.ndim) * divide_by_rms(x.astype(jnp.float32), self.epsilon)
        return y.astype(x.dtype)


def make_norm(kind: str, dim: int) -> LayerNorm | RMSNorm:
    """The norm a config names."""
    if kind not in EPSILON:
        raise ValueError(f"norm is {kind!r}; expected one of {', '.join(EPSILON)}")
    return (RMSNorm if kind == "rmsnorm" else LayerNorm)(dim, epsilon=EPSILON[kind])
