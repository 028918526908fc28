"""DINO loss against float64 loops, the spec's check values, and invariants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinojax.kernels.prototypes import Potentials, Targets, target_probabilities
from dinojax.losses import dino
from dinojax.losses.dino import dino_loss_from_logits, dino_scales
from dinojax.losses.sinkhorn import sinkhorn, sinkhorn_potentials

# one compilation each: operation by operation these tests compile dozens
dino_losses = jax.jit(
    dino.dino_losses, static_argnames=("ignore_diagonal", "global_views", "chunk", "dtype")
)

B, VIEWS, K, WIDTH = 4, 5, 30, 8


def unit(rng: np.random.Generator, *shape: int) -> jax.Array:
    x = rng.normal(size=shape)
    return jnp.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True), jnp.float32)


@pytest.fixture(scope="module")
def problem() -> tuple[jax.Array, Targets, jax.Array]:
    rng = np.random.default_rng(0)
    teacher, anchors = unit(rng, B * 2, WIDTH), unit(rng, K, WIDTH)
    potentials = sinkhorn_potentials(teacher, anchors, 0.07)
    return (
        unit(rng, B, VIEWS, WIDTH),
        Targets(teacher, anchors, potentials, 0.07),
        unit(rng, K, WIDTH),
    )


def numpy_pair(x: np.ndarray, w: np.ndarray, q: np.ndarray) -> float:
    z = np.asarray(w, np.float64) @ np.asarray(x, np.float64) / 0.1
    return -float(np.asarray(q, np.float64) @ (z - np.log(np.exp(z).sum())))


def test_check_values():
    """Spec 11, given crop-major."""
    logits = 0.1 * jnp.array([[1, 2, 0], [0, 1, 3], [2, 0, 1], [0.5, 0.5, 0.5]])
    probs = sinkhorn(logits, 0.07).reshape(2, 2, 3).swapaxes(0, 1)
    student = [[[0.3, -0.1, 0.2], [0, 0.1, -0.2]], [[0.05, 0.2, 0.1], [-0.3, 0.2, 0]]]
    student = jnp.array(student).swapaxes(0, 1)
    np.testing.assert_allclose(dino_loss_from_logits(student, probs), 1.948422, atol=2e-6)
    without = dino_loss_from_logits(student, probs, ignore_diagonal=True)
    np.testing.assert_allclose(without, 1.191697, atol=2e-6)


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("ignore_diagonal", [True, False])
def test_equals_loops(problem, ignore_diagonal, chunk):
    student, targets, w = problem
    q = np.asarray(target_probabilities(targets)).reshape(B, 2, K)
    pairs = [
        [[numpy_pair(student[b, s], w, q[b, t]) for t in range(2)] for s in range(VIEWS)]
        for b in range(B)
    ]
    pairs = np.array(pairs)
    kept = [(0, 1), (1, 0)] if ignore_diagonal else [(0, 0), (0, 1), (1, 0), (1, 1)]
    expected = np.mean([pairs[:, s, t].mean() for s, t in kept]), pairs[:, 2:].mean()
    losses = dino_losses(student, targets, w, ignore_diagonal=ignore_diagonal, chunk=chunk)
    np.testing.assert_allclose(losses, expected, rtol=2e-6)


def test_chunked_gradients_equal_plain(problem):
    def gradients(chunk):
        def total(x, targets, w):
            a, b = dino_losses(x, targets, w, chunk=chunk)
            return a + 3 * b

        return jax.jit(jax.grad(total, (0, 2)))(*problem)

    for lean, plain in zip(gradients(7), gradients(None)):
        np.testing.assert_allclose(lean, plain, rtol=1e-5, atol=1e-6)


def test_gradient_reaches_the_student_only(problem):
    student, targets, w = problem
    gradient = jax.grad(lambda t: sum(dino_losses(student, t, w)))(targets)
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(gradient))
    loss = lambda x: sum(dino_losses(x, targets, w))  # noqa: E731
    assert loss(student - 0.01 * jax.grad(loss)(student)) < loss(student)


def test_order_of_local_views_does_not_matter(problem):
    student, targets, w = problem
    turned = student[:, np.array([0, 1, 4, 2, 3])]
    before, after = dino_losses(student, targets, w), dino_losses(turned, targets, w)
    np.testing.assert_allclose(before, after, rtol=1e-6)
    swapped = dino_losses(student[:, np.array([1, 0, 2, 3, 4])], targets, w)
    assert abs(swapped[0] - before[0]) > 1e-3  # that of the global ones does: pairs change


def test_constant_on_all_logits_changes_nothing(problem):
    student, targets, w = problem
    logits = jnp.einsum("bvd,kd->bvk", student, w)
    probs = target_probabilities(targets).reshape(B, 2, K)
    shifted = dino_loss_from_logits(logits + 5.0, probs)
    np.testing.assert_allclose(dino_loss_from_logits(logits, probs), shifted, rtol=1e-5)


def test_micro_batches_average_to_the_batch(problem):
    """With potentials of the whole batch."""
    student, targets, w = problem
    losses = []
    for images in (slice(0, 2), slice(2, 4)):
        rows = slice(2 * images.start, 2 * images.stop)
        potentials = Potentials(targets.potentials.prototypes, targets.potentials.rows[rows])
        part = targets._replace(bottleneck=targets.bottleneck[rows], potentials=potentials)
        losses.append(dino_losses(student[images], part, w, chunk=7))
    whole = dino_losses(student, targets, w, chunk=7)
    np.testing.assert_allclose(np.mean(losses, axis=0), whole, rtol=1e-6)


def test_without_local_views(problem):
    student, targets, w = problem
    assert dino_losses(student[:, :2], targets, w)[1] == 0


def test_scales():
    np.testing.assert_allclose(dino_scales(8), (2 / 18, 16 / 18))
    np.testing.assert_allclose(dino_scales(8, ignore_diagonal=False), (4 / 20, 16 / 20))
    assert dino_scales(0) == (1.0, 0.0)
