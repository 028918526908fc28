"""Attention implementations against a float64 version and against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dinojax.kernels.attention import attention, choose
from dinojax.sharding import make_mesh

SHAPE = (2, 21, 3, 16)


def inputs(shape=SHAPE, dtype=jnp.float32):
    """q, k, v and a cotangent."""
    keys = jax.random.split(jax.random.key(0), 4)
    return tuple(jax.random.normal(key, shape).astype(dtype) for key in keys)


def plain(q, k, v, valid):
    """softmax(q kᵀ / sqrt(e)) v, row by row in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    y = np.zeros_like(q)
    for n, h in np.ndindex(q.shape[0], q.shape[2]):
        scores = q[n, :, h] @ k[n, :, h].T / np.sqrt(q.shape[-1])
        scores[:, ~valid[n]] = -np.inf
        weights = np.exp(scores - scores.max(1, keepdims=True))
        y[n, :, h] = weights / weights.sum(1, keepdims=True) @ v[n, :, h]
    return y


def some_valid():
    valid = np.ones(SHAPE[:2], bool)
    valid[1, 15:] = False
    return valid


def value_and_gradients(implementation, q, k, v, g, valid):
    def scalar(q, k, v):
        y = attention(q, k, v, valid=valid, implementation=implementation)
        return jnp.sum(y.astype(jnp.float32) * g.astype(jnp.float32)), y

    (_, y), grads = jax.jit(jax.value_and_grad(scalar, (0, 1, 2), has_aux=True))(q, k, v)
    return (y, *grads)


@pytest.mark.parametrize("masked", [False, True])
def test_xla_against_float64(masked):
    q, k, v, _ = inputs()
    valid = some_valid() if masked else np.ones(SHAPE[:2], bool)
    y = attention(q, k, v, valid=jnp.asarray(valid) if masked else None, implementation="xla")
    np.testing.assert_allclose(y, plain(q, k, v, valid), atol=1e-6)


def test_own_backward_is_the_derivative():
    """Against autodiff of jax.nn.dot_product_attention; measured 5e-7."""
    q, k, v, g = inputs()
    valid = jnp.asarray(some_valid())

    def scalar(q, k, v):
        y = jax.nn.dot_product_attention(q, k, v, mask=valid[:, None, None])
        return jnp.sum(y * g)

    expected = jax.jit(jax.grad(scalar, (0, 1, 2)))(q, k, v)
    _, *ours = value_and_gradients("xla", q, k, v, g, valid)
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6)


def test_large_scores_do_not_overflow():
    q, k, v, _ = inputs()
    y = attention(300 * q, 300 * k, v, implementation="xla")
    expected = plain(300 * q, 300 * k, v, np.ones(SHAPE[:2], bool))
    np.testing.assert_allclose(y, expected, atol=1e-2)  # scores of 1e5 carry errors of 1e-2
    assert jnp.isfinite(y).all()


def test_bfloat16_stays_close():
    q, k, v, g = inputs(dtype=jnp.bfloat16)
    exact = value_and_gradients("xla", *(x.astype(jnp.float32) for x in (q, k, v, g)), None)
    for ours, wide in zip(value_and_gradients("xla", q, k, v, g, None), exact, strict=True):
        assert ours.dtype == jnp.bfloat16
        error = jnp.linalg.norm(ours.astype(jnp.float32) - wide) / jnp.linalg.norm(wide)
        assert error < 1e-2


def test_splash_equals_xla():
    """Interpreted on CPU; 21 tokens padded to a block of 128, some keys masked."""
    q, k, v, g = inputs()
    valid = jnp.asarray(some_valid())
    ours = value_and_gradients("splash", q, k, v, g, valid)
    for a, b in zip(ours, value_and_gradients("xla", q, k, v, g, valid), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_splash_on_a_mesh():
    q, k, v, _ = inputs((8, 5, 2, 16))
    expected = attention(q, k, v, implementation="xla")
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        sharded = [jax.device_put(x, rows) for x in (q, k, v)]
        y = jax.jit(lambda q, k, v: attention(q, k, v, implementation="splash"))(*sharded)
    np.testing.assert_allclose(np.asarray(y), expected, atol=2e-5)


def test_choices():
    assert choose(SHAPE, jnp.dtype("bfloat16"), False) == "xla"  # these tests run on CPU
    with pytest.raises(ValueError, match="'flash'; expected one of auto, xla, cudnn, splash"):
        attention(*inputs()[:3], implementation="flash")
