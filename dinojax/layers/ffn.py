"""Feed-forward layers of a block (spec 1.1): GELU MLP and SwiGLU."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dinojax.layers.linear import Linear

ALIGNMENT = {"swiglu": 8, "swiglu32": 32, "swiglu64": 64, "swiglu128": 128}


@partial(jax.checkpoint, prevent_cse=False)
def gelu(x: Float[Array, "*n f"]) -> Float[Array, "*n f"]:
    """x Φ(x) with the exact error function, in float32.

    A checkpoint, like the other elementwise functions of a block: a scan stores what the backward
    pass needs for every layer, and x alone is enough (here 2 hidden-width arrays instead of 3).
    """
    y = x.astype(jnp.float32)
    return (y * (0.5 + 0.5 * jax.lax.erf(y * 0.5**0.5))).astype(x.dtype)


def hidden_width(kind: str, dim: int, ratio: float) -> int:
    """MLP: int(D·ratio). SwiGLU: two thirds of that, rounded up to the alignment in its name."""
    hidden = int(dim * ratio)
    if kind == "mlp":
        return hidden
    if kind not in ALIGNMENT:
        raise ValueError(f"ffn is {kind!r}; expected one of mlp, {', '.join(ALIGNMENT)}")
    align = ALIGNMENT[kind]
    return -(-int(hidden * 2 / 3) // align) * align


class Mlp(nnx.Module):
    """fc2(gelu(fc1 x))."""

    def __init__(self, dim: int, hidden: int, *, bias: bool, rngs: nnx.Rngs) -> None:
        self.fc1 = Linear(dim, hidden, bias=bias, rngs=rngs)
        self.fc2 = Linear(hidden, dim, bias=bias, rngs=rngs)

    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        return self.fc2(gelu(self.fc1(x)))


@partial(jax.checkpoint, prevent_cse=False)
def gate(a: Float[Array, "*n f"], b: Float[Array, "*n f"]) -> Float[Array, "*n f"]:
    """silu(a) ⊙ b in float32."""
    y = a.astype(jnp.float32)
    return (y * jax.nn.sigmoid(y) * b.astype(jnp.float32)).astype(a.dtype)


class SwiGlu(nnx.Module):
    """w3(silu(w1 x) ⊙ w2 x)."""

    def __init__(self, dim: int, hidden: int, *, bias: bool, rngs: nnx.Rngs) -> None:
        self.w1 = Linear(dim, hidden, bias=bias, rngs=rngs)
        self.w2 = Linear(dim, hidden, bias=bias, rngs=rngs)
        self.w3 = Linear(hidden, dim, bias=bias, rngs=rngs)

    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        return self.w3(gate(self.w1(x), self.w2(x)))


def make_ffn(kind: str, dim: int, ratio: float, *, bias: bool, rngs: nnx.Rngs) -> Mlp | SwiGlu:
    """The feed-forward layer a config names."""
    hidden = hidden_width(kind, dim, ratio)
    return (Mlp if kind == "mlp" else SwiGlu)(dim, hidden, bias=bias, rngs=rngs)
