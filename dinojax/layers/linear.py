"""Every matrix product with a weight, in one place: compute-dtype inputs, float32 accumulation.

Why a backward of our own: measured on a CPU with AMX, a bf16 product that asks for a float32 result
runs at 1.1-1.9 TFLOP/s, one that asks for bf16 at 0.28, a float32 one at 0.3, and the transposes
that autodiff writes mix float32 with bf16 and land on the slow path.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from dinojax.sharding import constrain_batch

# Name under which outputs are known to rematerialisation policies (models/vit.py: REMAT).
SAVED = "linear"


def along_last(vector: Float[Array, " d"], ndim: int) -> Float[Array, "..."]:
    """[d] -> [1, ..., 1, d] with `ndim` axes, so that no rank promotion happens silently."""
    return jnp.expand_dims(vector, tuple(range(ndim - 1)))


@jax.custom_vjp
def product(x: Float[Array, "*n d"], w: Float[Array, "d f"]) -> Float[Array, "*n f"]:
    """x · w in float32, `w` rounded to x's dtype first. Gradients: dx in x's dtype, dw in w's."""
    return jnp.dot(x, w.astype(x.dtype), preferred_element_type=jnp.float32)


def _product_forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return product(x, w), (x, w)


def _product_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = saved
    # [*n, d] -> [rows, d]: contracted over several axes, XLA on CPU first transposes x, twice.
    rows, g = x.reshape(-1, x.shape[-1]), g.astype(x.dtype).reshape(-1, g.shape[-1])
    dx = _contract(g, w.astype(x.dtype), 1).astype(x.dtype)
    by_rows = partial(_contract, axis=0)
    dw = jax.lax.platform_dependent(rows, g, cpu=_contract_rows_on_cpu, default=by_rows)
    return dx.reshape(x.shape), dw.astype(w.dtype)


def _contract(a: Array, b: Array, axis: int) -> Array:
    """Product of two matrices over the same axis of both, in float32."""
    numbers = (((axis,), (axis,)), ((), ()))
    return jax.lax.dot_general(a, b, numbers, preferred_element_type=jnp.float32)


def _contract_rows_on_cpu(a: Array, b: Array) -> Array:
    """aᵀ b; in bf16 through a product with the identity, which transposes exactly.

    XLA on CPU has fast bf16 kernels for products over the last axis of `a` only, and folds a
    written transposition back into the other kind: [985, 384]ᵀ [985, 1536] took 9.3 ms, so 2.8.
    """
    n, d = a.shape
    block = d if d <= 128 else math.gcd(d, 128)
    if a.dtype != jnp.bfloat16 or block < 16:
        return _contract(a, b, 0)
    blocks = a.reshape(n, d // block, block).swapaxes(0, 1)
    eye = jnp.eye(block, dtype=a.dtype)
    across = jnp.einsum("xy,jny->jxn", eye, blocks, preferred_element_type=jnp.float32)
    return jnp.dot(across.reshape(d, n).astype(a.dtype), b, preferred_element_type=jnp.float32)


product.defvjp(_product_forward, _product_backward)


def dot(
    x: Float[Array, "*n d"], w: Float[Array, "d f"], bias: Float[Array, " f"] | None = None
) -> Float[Array, "*n f"]:
    """x · w + bias, rounded once, to the dtype of `x`; the bias gradient is summed in float32.

    On a mesh rows stay split and the weight is gathered. Left to itself the partitioner may split
    features over fsdp instead and move every activation (10 all-to-alls in the step of a tiny ViT).
    """
    x = constrain_batch(x)
    y = product(x, w)
    if bias is not None:
        y = y + along_last(bias, y.ndim)
    return checkpoint_name(constrain_batch(y.astype(x.dtype)), SAVED)


class Linear(nnx.Module):
    """y = x · kernel + bias with kernel [in, out] ~ N(0, 0.02²) and bias 0 (spec 1.5).

    The reference truncates at ±2, a hundred standard deviations out: plain normal.
    """

    def __init__(self, in_dim: int, out_dim: int, *, bias: bool = True, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(0.02 * jax.random.normal(rngs.params(), (in_dim, out_dim)))
        self.bias = nnx.Param(jnp.zeros(out_dim)) if bias else None

    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n f"]:
        return dot(x, self.kernel[...], None if self.bias is None else self.bias[...])
