"""Chunked cross-entropy terms against the plain tables: values, gradients, shards."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dinojax.kernels.prototypes import (
    Potentials,
    Targets,
    cross_entropy_terms,
    default_chunk,
    scan_chunks,
    target_probabilities,
)
from dinojax.losses.sinkhorn import sinkhorn_potentials
from dinojax.planning import program
from dinojax.sharding import make_mesh

N, M, K, WIDTH, TARGET_WIDTH, TEMP = 24, 8, 60, 8, 6, 0.1


def unit(rng: np.random.Generator, *shape: int) -> jax.Array:
    x = rng.normal(size=shape)
    return jnp.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True), jnp.float32)


@pytest.fixture(scope="module")
def problem() -> tuple[jax.Array, Targets, jax.Array]:
    """Student rows [N, b], targets of M rows from a teacher of another width, prototypes [K, b]."""
    rng = np.random.default_rng(0)
    teacher, anchors = unit(rng, M, TARGET_WIDTH), unit(rng, K, TARGET_WIDTH)
    potentials = sinkhorn_potentials(teacher, anchors, 0.07)
    return unit(rng, N, WIDTH), Targets(teacher, anchors, potentials, 0.07), unit(rng, K, WIDTH)


@functools.partial(jax.jit, static_argnames=("chunk", "dtype"))
def pairs_from_terms(x, targets, w, chunk, dtype=jnp.float32):
    lse, contracted = cross_entropy_terms(x, targets, w, TEMP, chunk, dtype)
    return lse[:, None] - x @ contracted.T / TEMP


@jax.jit
def pairs_from_tables(x, targets, w):
    return -jax.nn.log_softmax(x @ w.T / TEMP) @ target_probabilities(targets).T


def value_and_gradients(pairs, x, targets, w):
    """A weighted sum of the pairs, so that every one has a gradient of its own."""
    weights = jnp.asarray(np.random.default_rng(1).uniform(0.5, 2, (N, M)), jnp.float32)
    total = jax.jit(
        jax.value_and_grad(lambda x, w: (weights * pairs(x, targets, w)).mean(), (0, 1))
    )
    return jax.tree.leaves(total(x, w))


@pytest.mark.parametrize("chunk", [None, K, 20, 17, 1000])
def test_equals_plain(problem, chunk):
    """Also where K is no multiple of the chunk, and where the chunk is larger than K."""
    plain = value_and_gradients(pairs_from_tables, *problem)
    lean = value_and_gradients(lambda *a: pairs_from_terms(*a, chunk), *problem)
    for a, b in zip(lean, plain):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_equals_numpy(problem):
    x, targets, w = problem
    logits = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T / TEMP
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    z = np.asarray(targets.bottleneck, np.float64) @ np.asarray(targets.prototypes).T / 0.07
    q = np.exp(z + np.asarray(targets.potentials.prototypes)[None])
    q /= q.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(pairs_from_terms(*problem, 17), -log_p @ q.T, rtol=2e-6)


def test_bfloat16_inputs(problem):
    plain = value_and_gradients(pairs_from_tables, *problem)
    lean = value_and_gradients(lambda *a: pairs_from_terms(*a, 20, jnp.bfloat16), *problem)
    for a, b in zip(lean, plain):
        assert a.dtype == jnp.float32
        assert np.linalg.norm(a - b) < 2e-2 * np.linalg.norm(b)


def test_no_gradient_into_targets(problem):
    x, targets, w = problem
    for pairs in (lambda t: pairs_from_terms(x, t, w, 20), lambda t: pairs_from_tables(x, t, w)):
        gradients = jax.jit(jax.grad(lambda t, pairs=pairs: pairs(t).mean()))(targets)
        assert not any(np.asarray(g).any() for g in jax.tree.leaves(gradients))


def test_rows_of_targets_can_be_taken(problem):
    """A micro-batch uses its rows of whole-batch potentials."""
    x, targets, w = problem
    rows = slice(2, 5)
    potentials = Potentials(targets.potentials.prototypes, targets.potentials.rows[rows])
    part = targets._replace(bottleneck=targets.bottleneck[rows], potentials=potentials)
    whole = pairs_from_terms(x, targets, w, 20)[:, rows]
    np.testing.assert_allclose(pairs_from_terms(x, part, w, 20), whole, atol=1e-6)


def test_rows_on_eight_devices(problem):
    """Features stay on their devices; the prototypes' gradient is summed over them."""
    x, targets, w = problem
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())
    placed = Targets(rows, whole, Potentials(whole, rows), whole)

    def loss(x, targets, w):
        lse, contracted = cross_entropy_terms(x, targets, w, TEMP, 20)
        return lse.mean() - (contracted**2).mean()

    both = jax.value_and_grad(loss, (0, 2))
    arrays = (x, targets._replace(temp=jnp.float32(0.07)), w)
    sharded = jax.device_put(arrays, (rows, placed, whole))
    compiled = jax.jit(both).lower(*sharded).compile()
    assert "all-gather" not in compiled.as_text() and "all-to-all" not in compiled.as_text()
    for a, b in zip(jax.tree.leaves(compiled(*sharded)), jax.tree.leaves(both(*arrays))):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [16, 24])
def test_prototypes_on_eight_devices(problem, chunk):
    """Prototypes lie in runs; a chunk takes a share of each, and alone is gathered at its turn.

    24 does not divide by the eight devices' runs: then chunks are neighbours, with equal results.
    """
    x, targets, w = problem
    rng = np.random.default_rng(2)
    w, anchors = unit(rng, 64, WIDTH), unit(rng, 64, TARGET_WIDTH)
    potentials = sinkhorn_potentials(targets.bottleneck, anchors, 0.07)
    targets = Targets(targets.bottleneck, anchors, potentials, jnp.float32(0.07))
    mesh = make_mesh(fsdp=8)
    split, whole = NamedSharding(mesh, PartitionSpec("fsdp")), NamedSharding(mesh, PartitionSpec())
    placed = Targets(split, split, Potentials(split, split), whole)

    def loss(x, targets, w):
        found = sinkhorn_potentials(targets.bottleneck, targets.prototypes, 0.07, chunk=chunk)
        lse, contracted = cross_entropy_terms(x, targets, w, TEMP, chunk)
        return lse.mean() - (contracted**2).mean(), found

    both = jax.value_and_grad(loss, (0, 2), has_aux=True)
    alone = jax.tree.leaves(both(x, targets, w))
    with jax.set_mesh(mesh):
        arrays = jax.device_put((x, targets, w), (split, placed, split))
        placed_out = ((whole, Potentials(split, split)), (split, split))
        compiled = jax.jit(both, out_shardings=placed_out).lower(*arrays).compile()
        for a, b in zip(jax.tree.leaves(compiled(*arrays)), alone):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    gathered = [c for c in program.read(compiled.as_text()).collectives if c.kind == "all-gather"]
    if chunk == 16:  # no gather is larger than a chunk of float32, and none moves the whole
        assert gathered and max(8 * c.operand_bytes for c in gathered) <= 4 * chunk * WIDTH
        assert "all-to-all" not in compiled.as_text()


def test_scan_chunks_joins_outputs():
    data = jnp.arange(14.0).reshape(7, 2)
    total, doubled = scan_chunks(lambda c, a: (c + a[0].sum(), 2 * a[0]), jnp.zeros(()), (data,), 3)
    assert total == data.sum()
    np.testing.assert_array_equal(doubled, 2 * data)


@pytest.mark.parametrize(
    ("rows", "prototypes", "expected"),
    [(100, 4096, 4096), (1024, 65536, 4096), (40_000, 65536, 1024), (10**6, 65536, 512)],
)
def test_default_chunk(rows, prototypes, expected):
    assert default_chunk(rows, prototypes) == expected
