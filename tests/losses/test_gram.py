"""Gram loss, token selection and bicubic resize against float64 numpy and the spec's numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinojax.losses import gram
from dinojax.losses.gram import select_tokens

# one compilation each: operation by operation these tests compile dozens
gram_loss = jax.jit(gram.gram_loss, static_argnums=(2, 3, 4))
resize_features = jax.jit(gram.resize_features, static_argnums=(1, 2, 3, 4))


@pytest.fixture(scope="module")
def features() -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    draw = lambda d: jnp.asarray(rng.normal(size=(3, 6, d)) + 0.2, jnp.float32)  # noqa: E731
    return draw(4), draw(5)


def numpy_gram(s: np.ndarray, g: np.ndarray, normalized: bool, clear: tuple[bool, bool]) -> float:
    matrices = []
    for x, cleared in zip((s, g), clear):
        x = np.asarray(x, np.float64)
        if normalized:
            x = x / np.linalg.norm(x, axis=-1, keepdims=True)
        matrix = x @ x.swapaxes(-1, -2)
        matrices.append(np.where(cleared & (matrix < 0), 0, matrix))
    return float(np.mean((matrices[0] - matrices[1]) ** 2))


def test_check_values():
    """Spec 11."""
    s, g = jnp.array([[[1, 0], [1, 1], [-1, 0.5]]]), jnp.array([[[1, 0.2], [0.5, 1], [0, 1]]])
    np.testing.assert_allclose(gram_loss(s, g), 0.591922, atol=1e-6)
    np.testing.assert_allclose(gram_loss(s, g, True, True), 0.188254, atol=1e-6)


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("clear", [(False, False), (True, True), (False, True)])
def test_equals_numpy(features, normalized, clear):
    loss = gram_loss(*features, normalized, clear[0], clear[1] and not clear[0])
    np.testing.assert_allclose(loss, numpy_gram(*features, normalized, clear), rtol=2e-6)


def test_groups_are_separate(features):
    """Leading axis: images, or whole groups of images folded together."""
    s, g = features
    one_by_one = np.mean([gram_loss(s[i : i + 1], g[i : i + 1]) for i in range(3)])
    np.testing.assert_allclose(gram_loss(s, g), one_by_one, rtol=1e-6)
    together = gram_loss(s.reshape(1, 18, 4), g.reshape(1, 18, 5))
    expected = numpy_gram(s.reshape(18, 4), g.reshape(18, 5), True, (False, False))
    np.testing.assert_allclose(together, expected, rtol=2e-6)


def test_gradient_reaches_the_student_only(features):
    s, g = features
    to_student, to_teacher = jax.jit(jax.grad(gram_loss, (0, 1)))(s, g)
    assert not to_teacher.any()
    assert gram_loss(s - 0.1 * to_student, g) < gram_loss(s, g)
    assert gram_loss(s, s * 3.0) < 1e-12


def test_zero_token_has_finite_gradient(features):
    s, g = features
    assert np.isfinite(jax.grad(gram_loss)(s.at[0, 0].set(0.0), g)).all()


def test_both_flags_are_refused(features):
    with pytest.raises(ValueError, match="choose one"):
        gram_loss(*features, True, True, True)


def test_select_tokens(features):
    s = features[0]
    mask = np.array([[1, 0, 0, 1, 0, 0], [0, 0, 1, 0, 0, 1], [0, 1, 1, 0, 0, 0]], bool)
    for tokens, chosen in (("masked", mask), ("unmasked", ~mask)):
        picked = select_tokens(s, jnp.asarray(mask), tokens, 2)
        expected = [np.asarray(s[i])[chosen[i]] for i in range(3)]
        np.testing.assert_array_equal(picked, expected)
    assert select_tokens(s, jnp.asarray(mask), "all", 2) is s
    with pytest.raises(ValueError, match="'none'"):
        select_tokens(s, jnp.asarray(mask), "none", 2)


def response(size: int, to: int) -> np.ndarray:
    """[size, to]: what each input row alone gives, on a grid of one column."""
    unit = jnp.eye(size)[:, :, None]  # n p d
    return np.asarray(resize_features(unit, (size, 1), (to, 1)))[:, :, 0]


def test_bicubic_taps():
    """Spec 3.6: halving, and the two phases of a factor 1.5."""
    np.testing.assert_allclose(response(32, 16)[3:7, 2], [-0.09375, 0.59375, 0.59375, -0.09375])
    quarter = [-0.10546875, 0.87890625, 0.26171875, -0.03515625]
    np.testing.assert_allclose(response(48, 32)[2:6, 2], quarter)  # samples at 3.25
    np.testing.assert_allclose(response(48, 32)[3:7, 3], quarter[::-1])  # samples at 4.75
    # at 0.5: the tap outside is added to the edge's
    np.testing.assert_allclose(response(32, 16)[:3, 0], [0.5, 0.59375, -0.09375])


def test_resize_keeps_constants_and_order():
    features = jnp.ones((1, 12, 2)) * jnp.array([[[2.0, -3.0]]])
    resized = resize_features(features, (3, 4), (5, 2))
    np.testing.assert_allclose(resized, np.tile([[[2.0, -3.0]]], (1, 10, 1)), rtol=1e-6)
    ramp = jnp.repeat(jnp.arange(8.0), 4).reshape(1, 32, 1)  # rows count, columns do not
    resized = resize_features(ramp, (8, 4), (4, 2)).reshape(4, 2)
    np.testing.assert_allclose(resized[:, 0], resized[:, 1], atol=1e-6)
    np.testing.assert_allclose(resized[1:3, 0], [2.5, 4.5], atol=1e-6)
    same = jax.random.normal(jax.random.key(0), (2, 12, 3))
    np.testing.assert_allclose(resize_features(same, (3, 4), (3, 4)), same, atol=1e-6)


def test_unknown_method():
    with pytest.raises(ValueError, match="'nearest'"):
        resize_features(jnp.ones((1, 4, 1)), (2, 2), (4, 4), "nearest")
