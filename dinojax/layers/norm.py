"""LayerNorm and RMSNorm with float32 statistics (spec 1.2)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dinojax.layers.linear import along_last

# "layernormbf16" is the reference's name for the other epsilon; it says nothing about the dtype.
EPSILON = {"layernorm": 1e-6, "layernormbf16": 1e-5, "rmsnorm": 1e-5}


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias over the last axis, computed in float32."""

    def __init__(self, dim: int, *, epsilon: float) -> None:
        self.scale = nnx.Param(jnp.ones(dim))
        self.bias = nnx.Param(jnp.zeros(dim))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
        y = y * along_last(self.scale[...], y.ndim) + along_last(self.bias[...], y.ndim)
        return y.astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x²) + eps) * scale over the last axis, computed in float32."""

    def __init__(self, dim: int, *, epsilon: float) -> None:
        self.scale = nnx.Param(jnp.ones(dim))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
        return (y * along_last(self.scale[...], y.ndim)).astype(x.dtype)


def make_norm(kind: str, dim: int) -> LayerNorm | RMSNorm:
    """The norm a config names."""
    if kind not in EPSILON:
        raise ValueError(f"norm is {kind!r}; expected one of {', '.join(EPSILON)}")
    return (RMSNorm if kind == "rmsnorm" else LayerNorm)(dim, epsilon=EPSILON[kind])
