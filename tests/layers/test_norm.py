"""Norms against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinojax.layers.norm import EPSILON, make_norm
from dinojax.models.functional import functional


def plain(kind, x, scale, bias):
    """In numpy, float64."""
    x = np.asarray(x, np.float64)
    if kind != "rmsnorm":
        x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON[kind])
    return x * scale + (0 if bias is None else bias)


@pytest.mark.parametrize("kind", EPSILON)
def test_norm(kind):
    network = functional(lambda r: make_norm(kind, 12))
    names = {"scale"} if kind == "rmsnorm" else {"scale", "bias"}
    assert set(network.init(jax.random.key(0))) == names
    # Rows of every size down to the epsilon, far from zero mean.
    size = 10.0 ** np.arange(-4, 4).reshape(-1, 1)
    x = (np.random.default_rng(0).normal(size=(8, 12)) + 0.5) * size
    scale, bias = np.linspace(0.5, 2, 12), np.linspace(-1, 1, 12)
    params = {"scale": jnp.asarray(scale, jnp.float32)}
    if kind != "rmsnorm":
        params["bias"] = jnp.asarray(bias, jnp.float32)
    x = jnp.asarray(x, jnp.float32)
    expected = plain(kind, x, scale, bias if "bias" in params else None)
    np.testing.assert_allclose(network.apply(params, x), expected, atol=2e-6)
    # Statistics in float32 whatever the input: only the input's and the result's rounding remain.
    half = network.apply(params, x.astype(jnp.bfloat16))
    exact = plain(kind, x.astype(jnp.bfloat16), scale, bias if "bias" in params else None)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(half, np.float64), exact, rtol=2**-8, atol=1e-6)


def test_derivative():
    """The checkpointed form against finite differences."""
    network = functional(lambda r: make_norm("layernorm", 6))
    scale = np.linspace(0.5, 2, 6)
    params = {"scale": jnp.asarray(scale, jnp.float32), "bias": jnp.zeros(6)}
    x = np.random.default_rng(0).normal(size=(1, 6))
    weights = np.linspace(-1, 2, 6, dtype=np.float32)
    grad = jax.grad(lambda x: (network.apply(params, x) * weights[None]).sum())(
        jnp.asarray(x, jnp.float32)
    )
    for i, step in enumerate(np.eye(6) * 1e-5):
        high, low = (plain("layernorm", x + s, scale, None) for s in (step, -step))
        np.testing.assert_allclose(grad[0, i], ((high - low) * weights).sum() / 2e-5, atol=1e-5)


def test_unknown_name():
    with pytest.raises(ValueError, match="'batchnorm'; expected one of layernorm"):
        make_norm("batchnorm", 4)
