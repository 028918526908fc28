"""iBOT loss against float64 loops, and invariants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinojax.kernels.prototypes import Targets, target_probabilities
from dinojax.losses import ibot
from dinojax.losses.ibot import ibot_loss_from_logits
from dinojax.losses.sinkhorn import sinkhorn_potentials

# one compilation each: operation by operation these tests compile dozens
ibot_loss = jax.jit(ibot.ibot_loss, static_argnames=("crops", "chunk", "dtype"))

K, WIDTH = 30, 8
COUNTS = (0, 5, 2, 0)  # masked patches of each crop
M = sum(COUNTS)
WEIGHTS = jnp.asarray(
    np.repeat([1 / c for c in COUNTS if c], [c for c in COUNTS if c]), jnp.float32
)


def unit(rng: np.random.Generator, *shape: int) -> jax.Array:
    x = rng.normal(size=shape)
    return jnp.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True), jnp.float32)


@pytest.fixture(scope="module")
def problem() -> tuple[jax.Array, Targets, jax.Array]:
    rng = np.random.default_rng(0)
    teacher, anchors = unit(rng, M, WIDTH), unit(rng, K, WIDTH)
    potentials = sinkhorn_potentials(teacher, anchors, 0.07)
    return unit(rng, M, WIDTH), Targets(teacher, anchors, potentials, 0.07), unit(rng, K, WIDTH)


@pytest.mark.parametrize("chunk", [None, 7])
def test_equals_loops(problem, chunk):
    """Mean over all crops of each crop's mean over its masked patches."""
    x, targets, w = problem
    q = np.asarray(target_probabilities(targets), np.float64)
    z = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T / 0.1
    patches = -(q * (z - np.log(np.exp(z).sum(axis=1, keepdims=True)))).sum(axis=1)
    first = np.cumsum((0, *COUNTS))
    means = [patches[a:b].mean() if b > a else 0.0 for a, b in zip(first, first[1:])]
    loss = ibot_loss(x, targets, WEIGHTS, w, crops=len(COUNTS), chunk=chunk)
    np.testing.assert_allclose(loss, np.mean(means), rtol=2e-6)


def test_chunked_gradients_equal_plain(problem):
    def gradients(chunk):
        def loss(x, targets, w):
            return ibot_loss(x, targets, WEIGHTS, w, crops=len(COUNTS), chunk=chunk)

        return jax.jit(jax.grad(loss, (0, 2)))(*problem)

    for lean, plain in zip(gradients(7), gradients(None)):
        np.testing.assert_allclose(lean, plain, rtol=1e-5, atol=1e-6)


def test_padding_slots_do_not_count(problem):
    x, targets, w = problem
    logits, probs = x @ w.T, target_probabilities(targets)
    pad = jnp.ones((3, K))
    loss = ibot_loss_from_logits(logits, probs, WEIGHTS, 4)
    padded = ibot_loss_from_logits(
        jnp.concatenate([logits, 7 * pad]),
        jnp.concatenate([probs, pad]),
        jnp.concatenate([WEIGHTS, jnp.zeros(3)]),
        4,
    )
    np.testing.assert_allclose(loss, padded, rtol=1e-6)


def test_unmasked_crops_count(problem):
    x, targets, w = problem
    four, eight = (ibot_loss(x, targets, WEIGHTS, w, crops=crops) for crops in (4, 8))
    np.testing.assert_allclose(four, 2 * eight, rtol=1e-6)


def test_gradient_reaches_the_student_only(problem):
    x, targets, w = problem
    gradient = jax.grad(lambda t: ibot_loss(x, t, WEIGHTS, w, crops=4))(targets)
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(gradient))
    loss = lambda x: ibot_loss(x, targets, WEIGHTS, w, crops=4)  # noqa: E731
    assert loss(x - 0.01 * jax.grad(loss)(x)) < loss(x)
