"""KoLeo against float64 loops, the spec's check values, groups, views and bad arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinojax.losses import koleo

# one compilation each: operation by operation these tests compile dozens
koleo_loss = jax.jit(koleo.koleo_loss, static_argnums=(1, 2))
neighbour_distances = jax.jit(koleo.neighbour_distances, static_argnums=1)


def numpy_koleo(x: np.ndarray, topk: int = 1) -> float:
    """One group [b, d], in float64."""
    y = np.asarray(x, np.float64)
    y = y / np.maximum(np.linalg.norm(y, axis=1, keepdims=True), 1e-8)
    dots = y @ y.T
    np.fill_diagonal(dots, -1)
    near = np.argsort(-dots, axis=1, kind="stable")[:, :topk]
    return -np.mean(np.log(np.linalg.norm(y[:, None] - y[near] + 1e-8, axis=2) + 1e-8))


@pytest.fixture(scope="module")
def features() -> jax.Array:
    """[b, v, d]: 8 images, 2 views."""
    return jnp.asarray(np.random.default_rng(0).normal(size=(8, 2, 6)) + 0.5, jnp.float32)


def test_check_values():
    """Spec 11."""
    x = jnp.array([[1, 0, 0], [0.8, 0.6, 0], [0, 1, 0.2], [0.1, 0.2, 1]])
    expected = [0.632456, 0.632456, 0.907361, 1.111054]
    np.testing.assert_allclose(neighbour_distances(x[None])[0, :, 0], expected, atol=2e-6)
    np.testing.assert_allclose(koleo_loss(x[:, None]), 0.227049, atol=2e-6)


@pytest.mark.parametrize(("group", "topk"), [(0, 1), (4, 1), (4, 3), (8, 2), (2, 1)])
def test_equals_loops(features, group, topk):
    x = np.asarray(features)
    parts = [
        numpy_koleo(x[a : a + (group or 8), v], topk)
        for a in range(0, 8, group or 8)
        for v in (0, 1)
    ]
    np.testing.assert_allclose(koleo_loss(features, group, topk), np.mean(parts), rtol=1e-5)


def test_gradient_spreads(features):
    """It flows through both rows of a pair, and a step along it drives them apart."""
    loss = jax.jit(lambda x: koleo_loss(x, 4))
    gradient = jax.jit(jax.grad(loss))(features)
    assert loss(features - 0.05 * gradient) < loss(features)
    at, step = (3, 1, 2), 1e-2
    numeric = (loss(features.at[at].add(step)) - loss(features.at[at].add(-step))) / (2 * step)
    np.testing.assert_allclose(gradient[at], numeric, rtol=2e-2)


def test_length_and_order_do_not_matter(features):
    loss = koleo_loss(features)
    scale = jnp.linspace(0.5, 20, 16).reshape(8, 2, 1)
    np.testing.assert_allclose(koleo_loss(features * scale), loss, rtol=1e-5)
    order = np.random.default_rng(1).permutation(8)
    np.testing.assert_allclose(koleo_loss(features[order][:, ::-1]), loss, rtol=1e-5)


def test_equal_rows_stay_finite():
    x = jnp.ones((4, 1, 3))
    value, gradient = jax.jit(jax.value_and_grad(koleo_loss))(x)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert value > 10  # -log of almost nothing


def test_bfloat16_is_computed_in_float32(features):
    low = features.astype(jnp.bfloat16)
    assert koleo_loss(low).dtype == jnp.float32
    np.testing.assert_allclose(koleo_loss(low), koleo_loss(low.astype(jnp.float32)))


def test_bad_arguments(features):
    with pytest.raises(ValueError, match="group_size = 3 .* nearest is 2"):
        koleo_loss(features, 3)
    with pytest.raises(ValueError, match="topk = 4"):
        koleo_loss(features, 4, 4)
