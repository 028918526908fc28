"""The one product with weights: values and gradients against float64, in both compute dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinojax.layers.linear import Linear, along_last, dot, product
from dinojax.models.functional import functional


def inputs(d, dtype):
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (3, 7, d)).astype(dtype)
    g = jax.random.normal(keys[1], (3, 7, 24)).astype(dtype)
    return x, jax.random.normal(keys[2], (d, 24)), jax.random.normal(keys[3], (24,)), g


# 256 = two blocks of the identity that transposes on CPU in bfloat16; 20 has no such block.
@pytest.mark.parametrize(("d", "dtype"), [(20, "float32"), (20, "bfloat16"), (256, "bfloat16")])
def test_values_and_gradients(d, dtype):
    x, w, bias, g = inputs(d, dtype)
    y, vjp = jax.vjp(dot, x, w, bias)
    dx, dw, dbias = vjp(g)
    assert (y.dtype, dx.dtype) == (x.dtype, x.dtype)
    assert dw.dtype == dbias.dtype == jnp.float32
    # The weight is rounded to the compute dtype, nothing else is before the result.
    x, g, bias = (np.asarray(a, np.float64) for a in (x, g, bias))
    rounded = np.asarray(w.astype(dtype), np.float64)
    rtol = 2**-8 if dtype == "bfloat16" else 1e-5
    np.testing.assert_allclose(np.asarray(y, np.float64), x @ rounded + bias, rtol=rtol, atol=1e-5)
    np.testing.assert_allclose(np.asarray(dx, np.float64), g @ rounded.T, rtol=rtol, atol=1e-4)
    np.testing.assert_allclose(dw, np.einsum("nti,ntj->ij", x, g), rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(dbias, g.sum((0, 1)), rtol=1e-5, atol=1e-5)


def test_product_is_float32():
    x, w, _, _ = inputs(16, "bfloat16")
    assert product(x, w).dtype == jnp.float32


def test_initial_values():
    params = functional(lambda r: Linear(200, 100, rngs=r)).init(jax.random.key(0))
    assert params["kernel"].shape == (200, 100)
    assert abs(float(params["kernel"].std()) - 0.02) < 4 * 0.02 / np.sqrt(2 * 20000)
    assert not params["bias"].any()
    assert "bias" not in functional(lambda r: Linear(2, 2, bias=False, rngs=r)).init(
        jax.random.key(0)
    )


def test_along_last():
    assert along_last(jnp.ones(5), 3).shape == (1, 1, 5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_weight_of_several_parts(dtype):
    """[d, parts, f] gives the columns of [d, parts * f], and the same gradients."""
    x, w, bias, g = inputs(20, dtype)
    y, vjp = jax.vjp(dot, x, w, bias)
    parts, vjp_parts = jax.vjp(dot, x, w.reshape(20, 3, 8), bias.reshape(3, 8))
    np.testing.assert_array_equal(parts.reshape(y.shape), y)
    for a, b in zip(vjp_parts(g.reshape(parts.shape)), vjp(g)):
        np.testing.assert_allclose(
            np.asarray(a, np.float32).reshape(b.shape),
            np.asarray(b, np.float32),
            rtol=2e-2 if dtype == "bfloat16" else 1e-5,
            atol=1e-5,
        )
