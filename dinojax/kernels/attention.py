"""Scaled dot-product attention without dropout: XLA everywhere, cuDNN on NVIDIA, splash on TPU."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def attention(
    q: Float[Array, "n t h e"],
    k: Float[Array, "n t h e"],
    v: Float[Array, "n t h e"],
    *,
    valid: Bool[Array, "#n t"] | None = None,
    implementation: str = "auto",
) -> Float[Array, "n t h e"]:
    scores = (
        jnp.einsum("nqhe,nkhe->nhqk", q, k, preferred_element_type=jnp.float32)
        * q.shape[-1] ** -0.5
    )
    if valid is not None:
        scores = jnp.where(valid[:, None, None, :], scores, -1e30)
    probabilities = jax.nn.softmax(scores).astype(v.dtype)
    return jnp.einsum("nhqk,nkhe->nqhe", probabilities, v)
