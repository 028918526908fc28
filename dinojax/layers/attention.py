"""Self-attention of a block (spec 1.2)."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from dinojax.kernels.attention import CHOICES, MIXED, WEIGHTS, attention
from dinojax.layers import rope as rope_lib
from dinojax.layers.linear import Linear, dot
from dinojax.sharding import split_parts, tensor_size

IMPLEMENTATIONS = CHOICES  # of the product with the values, see kernels/attention.py
SAVED = (WEIGHTS, MIXED)  # names under which rematerialisation policies know its parts


class Attention(nnx.Module):
    """proj(softmax(q kᵀ / sqrt(e)) v).

    The qkv kernel is [d, 3d] with columns q | k | v, heads contiguous in each. `mask_k_bias`
    multiplies the qkv bias by the constant 1 | 0 | 1, so k has none and gets no gradient.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        qkv_bias: bool,
        proj_bias: bool,
        mask_k_bias: bool,
        implementation: str,
        rngs: nnx.Rngs,
    ) -> None:
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, rngs=rngs)
        self.proj = Linear(dim, dim, bias=proj_bias, rngs=rngs)
        self.heads = heads
        self.mask_k_bias = mask_k_bias and qkv_bias
        self.implementation = implementation

    def __call__(
        self,
        x: Float[Array, "n t d"],
        rope: rope_lib.Tables | None = None,
        valid: Bool[Array, "#n t"] | None = None,
    ) -> Float[Array, "n t d"]:
        n, t, d = x.shape
        bias = None if self.qkv.bias is None else self.qkv.bias[...]
        if self.mask_k_bias:
            bias = bias * jnp.repeat(jnp.array([1.0, 0.0, 1.0]), d)
        # A split has a concatenation as its derivative, three slices would pad and add.
        if tensor_size() > 1:
            bias = None if bias is None else bias.reshape(3, d)
            qkv = dot(x, split_parts(self.qkv.kernel[...], 3), bias)  # [n, t, 3, d]
            parts = jnp.split(qkv, 3, axis=2)
        else:
            parts = jnp.split(dot(x, self.qkv.kernel[...], bias), 3, axis=-1)
        # 3 x [n, t, (1,) d] -> [n, t, h, e]
        q, k, v = (part.reshape(n, t, self.heads, d // self.heads) for part in parts)
        if rope is not None:
            q, k = rope_lib.apply(q, rope), rope_lib.apply(k, rope)
        y = attention(q, k, v, valid=valid, implementation=self.implementation)
        return self.proj(y.reshape(n, t, d))
