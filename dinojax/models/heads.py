"""Projection heads of DINO and iBOT (spec 2)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dinojax.layers.ffn import gelu
from dinojax.layers.linear import Linear, product
from dinojax.models import variants
from dinojax.models.functional import Network, functional

DEFAULTS = {"prototypes": 65536, "bottleneck": 256, "hidden": 2048, "layers": 3}


def build(config: Mapping[str, Any], in_dim: int, dtype: DTypeLike) -> Network:
    """A head from the keys `prototypes`, `bottleneck`, `hidden` and `layers`."""
    variants.check_keys("head", config, DEFAULTS)
    sizes = DEFAULTS | dict(config)
    return functional(lambda rngs: Head(in_dim, **sizes, dtype=dtype, rngs=rngs))


class Prototypes(nnx.Module):
    """K prototypes [K, b] ~ N(0, 0.02²), so that chunks of K are views; no bias, no weight norm."""

    def __init__(self, count: int, dim: int, *, rngs: nnx.Rngs) -> None:
        self.prototypes = nnx.Param(0.02 * jax.random.normal(rngs.params(), (count, dim)))


class Head(nnx.Module):
    """Linear, GELU, ..., Linear to the bottleneck; L2 normalisation; prototypes."""

    def __init__(
        self,
        in_dim: int,
        *,
        prototypes: int,
        bottleneck: int,
        hidden: int,
        layers: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        if layers < 1:
            raise ValueError(f"a head has {layers} layers; expected at least 1")
        widths = [in_dim, *[hidden] * (layers - 1), bottleneck]
        for i in range(layers):
            setattr(self, f"fc{i + 1}", Linear(widths[i], widths[i + 1], rngs=rngs))
        self.last_layer = Prototypes(prototypes, bottleneck, rngs=rngs)
        self.layers = layers
        self.dtype = jnp.dtype(dtype)

    def bottleneck(self, x: Float[Array, "*n d"]) -> Float[Array, "*n b"]:
        """Unit vectors in float32 (norm clamped at 1e-12); products in the compute dtype."""
        x = x.astype(self.dtype)
        for i in range(self.layers):
            x = getattr(self, f"fc{i + 1}")(x if i == 0 else gelu(x))
        x = x.astype(jnp.float32)
        # A maximum inside the root: the gradient of a zero vector is then zero, not NaN.
        squared = jnp.square(x).sum(-1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.maximum(squared, 1e-24))

    def logits(self, bottleneck: Float[Array, "*n b"]) -> Float[Array, "*n k"]:
        """bottleneck · prototypesᵀ in float32, inputs in the compute dtype."""
        return product(bottleneck.astype(self.dtype), self.last_layer.prototypes[...].T)

    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n k"]:
        return self.logits(self.bottleneck(x))
