"""Projection heads; their values are held to the reference in tests/conformance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinojax.models import heads

SIZES = {"prototypes": 20, "bottleneck": 6, "hidden": 12, "layers": 3}


def test_bottleneck_is_on_the_sphere_in_float32():
    network = heads.build(SIZES, 8, "bfloat16")
    params = network.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (5, 8)).astype(jnp.bfloat16)
    y = network.apply(params, x, method="bottleneck")
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), 1.0, rtol=1e-6)
    logits = network.apply(params, x)
    assert logits.shape == (5, 20) and logits.dtype == jnp.float32
    exact = heads.build(SIZES, 8, "float32").apply(params, x.astype(jnp.float32))
    assert jnp.linalg.norm(logits - exact) < 2e-2 * jnp.linalg.norm(exact)


def test_a_zero_vector_has_a_finite_gradient():
    """All biases are zero at the start, so rows of zeros reach the normalisation as zeros."""
    network = heads.build(SIZES, 8, "float32")
    params = network.init(jax.random.key(0))
    grads = jax.grad(lambda x: network.apply(params, x).sum())(jnp.zeros((2, 8)))
    assert jnp.isfinite(grads).all()


def test_sizes():
    """Spec 2: 23.6 M at D = 1024 in the default recipe; one layer is a single linear map."""
    shapes = jax.eval_shape(heads.build({}, 1024, "float32").init, jax.random.key(0))
    count = sum(a.size for a in jax.tree.leaves(shapes))
    layers = 1024 * 2048 + 2048 + 2048 * 2048 + 2048 + 2048 * 256 + 256
    assert count == layers + 65536 * 256 == 23_597_312
    one = heads.build(SIZES | {"layers": 1}, 8, "float32").init(jax.random.key(0))
    assert {k: v["kernel"].shape for k, v in one.items() if k != "last_layer"} == {"fc1": (8, 6)}
    assert one["last_layer"]["prototypes"].shape == (20, 6)


def test_errors_are_sentences():
    with pytest.raises(ValueError, match="'prototype' is unknown; the nearest is 'prototypes'"):
        heads.build({"prototype": 3}, 8, "float32")
    with pytest.raises(ValueError, match="0 layers; expected at least 1"):
        heads.build(SIZES | {"layers": 0}, 8, "float32")
