"""The attention layer: layout of qkv, masked k bias, padded keys."""

import jax
import jax.numpy as jnp
import numpy as np

from dinojax.layers.attention import Attention
from dinojax.models.functional import functional

DIM, HEADS = 12, 3


def network(mask_k_bias=False):
    return functional(
        lambda r: Attention(
            DIM,
            HEADS,
            qkv_bias=True,
            proj_bias=True,
            mask_k_bias=mask_k_bias,
            implementation="xla",
            rngs=r,
        )
    )


def inputs():
    """Parameters of visible size, tokens."""
    params = network().init(jax.random.key(0))
    params = jax.tree.map(lambda a: 20 * a + jax.random.normal(jax.random.key(1), a.shape), params)
    return params, jax.random.normal(jax.random.key(2), (2, 5, DIM))


def plain(params, x, keep_k_bias=True, keys=slice(None)):
    """Columns q | k | v, each with heads contiguous; float64."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    x = np.asarray(x, np.float64)
    bias = p["qkv"]["bias"].copy()
    if not keep_k_bias:
        bias[DIM : 2 * DIM] = 0
    q, k, v = np.split(x @ p["qkv"]["kernel"] + bias, 3, axis=-1)
    out = np.zeros_like(x)
    for h in range(HEADS):
        one = slice(4 * h, 4 * h + 4)
        scores = q[:, :, one] @ k[:, keys, one].swapaxes(1, 2) / 2  # sqrt(4)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, :, one] = weights / weights.sum(-1, keepdims=True) @ v[:, keys, one]
    return out @ p["proj"]["kernel"] + p["proj"]["bias"]


def test_against_float64():
    params, x = inputs()
    np.testing.assert_allclose(network().apply(params, x), plain(params, x), rtol=1e-4, atol=1e-4)


def test_invalid_tokens_are_no_keys():
    params, x = inputs()
    valid = jnp.array([[True, False, True, True, False]])
    y = network().apply(params, x, valid=valid)
    expected = plain(params, x, keys=np.array([0, 2, 3]))
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_masked_k_bias():
    """Softmax does not see a k bias anyway; masked, it gets no gradient at all, q and v do."""
    params, x = inputs()
    masked = network(mask_k_bias=True)
    expected = plain(params, x, keep_k_bias=False)
    np.testing.assert_allclose(masked.apply(params, x), expected, rtol=1e-4, atol=1e-4)
    grads = jax.grad(lambda p: jnp.sin(masked.apply(p, x)).sum())(params)["qkv"]["bias"]
    q, k, v = jnp.split(grads, 3)
    assert not k.any()
    assert jnp.abs(q).max() > 1e-3 and jnp.abs(v).max() > 1e-3
