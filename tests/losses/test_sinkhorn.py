"""Sinkhorn-Knopp and centering against numpy, and what may not change them.

Probabilities are compared to 1e-5 (4e-6 measured): they are exponentials of sums of numbers up to
60, whose own rounding in float32 is 4e-6.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dinojax.kernels.prototypes import Targets, target_probabilities
from dinojax.losses import sinkhorn as targets
from dinojax.losses.sinkhorn import updated_center

# one compilation each: operation by operation these tests compile dozens
sinkhorn = jax.jit(targets.sinkhorn, static_argnames="iterations")
sinkhorn_potentials = jax.jit(
    targets.sinkhorn_potentials, static_argnames=("iterations", "chunk", "dtype")
)
centering_potentials = jax.jit(targets.centering_potentials, static_argnames=("chunk", "dtype"))

ROWS, K, WIDTH, TEMP = 16, 60, 8, 0.07


def numpy_sinkhorn(logits: np.ndarray, temp: float, iterations: int) -> np.ndarray:
    """The reference's steps on log q, its constants included, in float64."""
    q = logits.astype(np.float64) / temp
    q -= np.logaddexp.reduce(q, axis=None)
    n, k = q.shape
    for _ in range(iterations):
        q -= np.logaddexp.reduce(q, axis=0, keepdims=True) + np.log(k)
        q -= np.logaddexp.reduce(q, axis=1, keepdims=True) + np.log(n)
    return np.exp(q) * n


@pytest.fixture(scope="module")
def problem() -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, WIDTH)) + 0.5
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    w = rng.normal(size=(K, WIDTH))
    return jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32)


def probabilities(problem, potentials) -> np.ndarray:
    return np.asarray(target_probabilities(Targets(*problem, potentials, TEMP)))


def test_check_values():
    """Spec 11."""
    logits = 0.1 * jnp.array([[1, 2, 0], [0, 1, 3], [2, 0, 1], [0.5, 0.5, 0.5]])
    expected = [
        [0.171800, 0.804257, 0.023943],
        [0.020863, 0.097666, 0.881471],
        [0.830704, 0.053525, 0.115771],
        [0.369901, 0.414989, 0.215109],
    ]
    np.testing.assert_allclose(sinkhorn(logits, 0.07), expected, atol=1e-6)


@pytest.mark.parametrize("iterations", [1, 3])
def test_table_equals_numpy(problem, iterations):
    logits = problem[0] @ problem[1].T
    q = np.asarray(sinkhorn(logits, TEMP, iterations=iterations))
    np.testing.assert_allclose(q, numpy_sinkhorn(np.asarray(logits), TEMP, iterations), atol=1e-5)
    np.testing.assert_allclose(q.sum(axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("chunk", [None, K, 20, 17])  # whole, thirds, and a shorter last chunk
def test_potentials_equal_table(problem, chunk):
    potentials = sinkhorn_potentials(*problem, TEMP, chunk=chunk)
    table = numpy_sinkhorn(np.asarray(problem[0] @ problem[1].T), TEMP, 3)
    np.testing.assert_allclose(probabilities(problem, potentials), table, atol=1e-5)


def test_shifts_change_nothing(problem):
    """A constant on all logits cancels, and so does one per prototype: columns come first."""
    logits = problem[0] @ problem[1].T
    q = sinkhorn(logits, TEMP)
    np.testing.assert_allclose(sinkhorn(logits + 3.0, TEMP), q, atol=1e-5)
    shift = jnp.linspace(-2, 2, K)[None, :]
    np.testing.assert_allclose(sinkhorn(logits + shift, TEMP), q, atol=2e-5)
    # one per row does not: the prototypes' sums see it
    assert jnp.abs(sinkhorn(logits + jnp.linspace(-2, 2, ROWS)[:, None], TEMP) - q).max() > 0.1


def test_order_of_rows_is_followed(problem):
    logits = problem[0] @ problem[1].T
    order = np.random.default_rng(1).permutation(ROWS)
    np.testing.assert_allclose(
        sinkhorn(logits[order], TEMP), sinkhorn(logits, TEMP)[order], atol=1e-5
    )


def test_large_logits_do_not_overflow(problem):
    """exp(z / temp) is infinite in float32 from z / temp = 89 on; and no row's sum gets lost."""
    x = problem[0] * jnp.linspace(1, 40, ROWS)[:, None]
    logits = x @ problem[1].T
    assert jnp.abs(logits / TEMP).max() > 500
    expected = numpy_sinkhorn(np.asarray(logits), TEMP, 3)
    np.testing.assert_allclose(sinkhorn(logits, TEMP), expected, atol=2e-3)
    chunked = sinkhorn_potentials(x, problem[1], TEMP, chunk=16)
    q = probabilities((x, problem[1]), chunked)
    np.testing.assert_allclose(q.sum(axis=1), 1, atol=2e-3)
    np.testing.assert_allclose(q, expected, atol=2e-3)  # 1e-7 of exponents of a thousand: 1e-4


def test_no_gradient(problem):
    def total(x, w):
        return sum(p.sum() for p in sinkhorn_potentials(x, w, TEMP, chunk=20))

    for gradient in jax.jit(jax.grad(total, argnums=(0, 1)))(*problem):
        assert not gradient.any()


@pytest.mark.parametrize("chunk", [K, 20])
def test_rows_on_eight_devices(problem, chunk):
    """Rows stay where they are: only sums over them cross devices."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())
    x, w = jax.device_put(problem[0], rows), jax.device_put(problem[1], whole)
    run = jax.jit(lambda x, w: sinkhorn_potentials(x, w, TEMP, chunk=chunk))
    compiled = run.lower(x, w).compile()
    assert "all-gather" not in compiled.as_text() and "all-to-all" not in compiled.as_text()
    one = sinkhorn_potentials(*problem, TEMP, chunk=chunk)
    for sharded, single in zip(compiled(x, w), one):
        np.testing.assert_allclose(sharded, single, atol=2e-5)


@pytest.mark.parametrize("chunk", [None, 17])
def test_centering(problem, chunk):
    center = jnp.linspace(-0.5, 0.5, K)
    potentials = centering_potentials(*problem, center, TEMP, chunk=chunk)
    z = (np.asarray(problem[0] @ problem[1].T, np.float64) - np.asarray(center)) / TEMP
    expected = np.exp(z - z.max(axis=1, keepdims=True))
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(probabilities(problem, potentials), expected, atol=1e-5)


def test_updated_center(problem):
    center = jnp.linspace(-0.5, 0.5, K)
    mean = np.asarray(problem[0] @ problem[1].T, np.float64).mean(axis=0)
    expected = 0.8 * np.asarray(center) + 0.2 * mean
    np.testing.assert_allclose(updated_center(*problem, center, 0.8), expected, atol=1e-6)


def test_iterations_below_one_are_refused(problem):
    with pytest.raises(ValueError, match="iterations = 0"):
        sinkhorn_potentials(*problem, TEMP, iterations=0)
