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

from dinojax.sharding import constrain_batch, gather_rows

# Name under which outputs are known to rematerialisation policies (models/vit.py: REMAT).
SAVED = "linear"


def along_last(vector: Float[Array, " d"], ndim: int) -> Float[Array, "..."]:
    """[d] -> [1, ..., 1, d] with `ndim` axes, so that no rank promotion happens silently."""
    return jnp.expand_dims(vector, tuple(range(ndim - 1)))


@jax.custom_vjp
def product(x: Float[Array, "*n d"], w: Float[Array, "d *f"]) -> Float[Array, "..."]:
    """x · w in float32, `w` rounded to x's dtype first. Gradients: dx in x's dtype, dw in w's."""
    numbers = (((x.ndim - 1,), (0,)), ((), ()))  # [*n, d] [d, *f] -> [*n, *f]
    w = gather_rows(w.astype(x.dtype))
    return jax.lax.dot_general(x, w, numbers, preferred_element_type=jnp.float32)


def _product_forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return product(x, w), (x, w)


def _product_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = saved
    # [*n, d] -> [rows, d]: contracted over several axes, XLA on CPU first transposes x, twice.
    rows, g = x.reshape(-1, x.shape[-1]), g.astype(x.dtype).reshape(-1, *w.shape[1:])
    on_cpu = (_contract_columns, _contract_rows_on_cpu)
    if w.ndim == 3:  # in parts, since XLA on CPU has no bf16 product over two axes
        on_cpu = (_sum_of_parts, _stack_of_parts)
    w16, by_rows = gather_rows(w.astype(x.dtype)), partial(_contract, axes=(0,))
    dx = jax.lax.platform_dependent(g, w16, cpu=on_cpu[0], default=_contract_columns)
    dw = jax.lax.platform_dependent(rows, g, cpu=on_cpu[1], default=by_rows)
    return dx.astype(x.dtype).reshape(x.shape), dw.astype(w.dtype)


def _contract_columns(g: Array, w: Array) -> Array:
    """[rows, *f] and [d, *f] over all of f."""
    return _contract(g, w, tuple(range(1, w.ndim)))


def _sum_of_parts(g: Array, w: Array) -> Array:
    """The same for [rows, parts, f] and [d, parts, f], one part after the other."""
    return sum(_contract(g[:, i], w[:, i], (1,)) for i in range(w.shape[1]))


def _stack_of_parts(rows: Array, g: Array) -> Array:
    """[rows, d] and [rows, parts, f] over the rows."""
    return jnp.stack([_contract_rows_on_cpu(rows, g[:, i]) for i in range(g.shape[1])], axis=1)


def _contract(a: Array, b: Array, axes: tuple[int, ...]) -> Array:
    """Product of two arrays over the same axes of both, in float32."""
    numbers = ((axes, axes), ((), ()))
    return jax.lax.dot_general(a, b, numbers, preferred_element_type=jnp.float32)


def _contract_rows_on_cpu(a: Array, b: Array) -> Array:
    """aᵀ b; in bf16 through a product with the identity, which transposes exactly.

    XLA on CPU has fast bf16 kernels for products over the last axis of `a` only, and folds a
    written transposition back into the other kind: [985, 384]ᵀ [985, 1536] took 9.3 ms, so 2.8.
    """
    n, d = a.shape
    block = d if d <= 128 else math.gcd(d, 128)
    if a.dtype != jnp.bfloat16 or block < 16:
        return _contract(a, b, (0,))
    blocks = a.reshape(n, d // block, block).swapaxes(0, 1)
    eye = jnp.eye(block, dtype=a.dtype)
    across = jnp.einsum("xy,jny->jxn", eye, blocks, preferred_element_type=jnp.float32)
    return jnp.dot(across.reshape(d, n).astype(a.dtype), b, preferred_element_type=jnp.float32)


product.defvjp(_product_forward, _product_backward)


def dot(
    x: Float[Array, "*n d"], w: Float[Array, "d *f"], bias: Float[Array, "*f"] | None = None
) -> Float[Array, "..."]:
    """x · w + bias, rounded once, to the dtype of `x`; the bias gradient is summed in float32.

    On a mesh rows stay split and the weight is gathered. Left to itself the partitioner may split
    features over fsdp instead and move every activation (10 all-to-alls in the step of a tiny ViT).
    """
    x = constrain_batch(x)
    y = product(x, w)
    if bias is not None:
        y = y + jnp.expand_dims(bias, tuple(range(y.ndim - bias.ndim)))
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
