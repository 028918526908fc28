"""Stochastic depth by exact-count subsets, LayerScale and the order of a block."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dinojax.layers.block import Block, draw_kept, kept_count, residual
from dinojax.models.functional import functional
from dinojax.sharding import batch_sharding, make_mesh


def test_counts():
    """Spec 1.2."""
    examples = {(32, 0.4): 19, (128, 0.4): 76, (128, 0.3): 89, (512, 0.3): 358, (1, 0.9): 1}
    assert {case: kept_count(*case) for case in examples} == examples


def test_draws_are_distinct_and_uniform():
    keys = jax.random.split(jax.random.key(0), 4000)
    kept = np.asarray(draw_kept(keys, 5, 3))
    assert kept.shape == (4000, 3) and (np.diff(kept, axis=1) > 0).all()
    frequency = np.bincount(kept.reshape(-1), minlength=5) / 4000
    assert np.abs(frequency - 0.6).max() < 4 * np.sqrt(0.6 * 0.4 / 4000)


def test_branch_sees_kept_rows_only():
    """Two groups of three rows, two kept in each: the branch sees [4, t, d]; times 3/2."""
    x = jax.random.normal(jax.random.key(0), (6, 2, 4))
    kept = jnp.array([[2, 0], [1, 2]])
    gamma = jnp.arange(1.0, 5.0)
    seen = []

    def branch(y):
        seen.append(y.shape)
        return y**2

    y = residual(x, branch, gamma, kept)
    assert seen == [(4, 2, 4)]
    expected = np.array(x)
    for row in (2, 0, 3 + 1, 3 + 2):
        expected[row] += 1.5 * np.arange(1, 5) * np.asarray(x)[row] ** 2
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(residual(x, branch, None), x + x**2, rtol=1e-6)


def test_expectation_is_the_whole_branch():
    x = jax.random.normal(jax.random.key(0), (5, 1, 3))
    kept = draw_kept(jax.random.split(jax.random.key(1), 2000), 5, 2)
    run = jax.jit(jax.vmap(lambda k: residual(x, lambda y: y, None, k[None])))
    np.testing.assert_allclose(run(kept).mean(0), 2 * x, atol=0.25)


def test_compute_is_skipped():
    """Compiled operations fall with the kept rows (a masked branch would cost the same)."""
    network = functional(lambda r: Block(32, 2, rngs=r))
    params = network.init(jax.random.key(0))
    x = jnp.zeros((8, 17, 32))
    few = (jnp.array([[1, 5]]),) * 2

    def operations(kept):
        compiled = jax.jit(lambda p, x: network.apply(p, x, kept=kept)).lower(params, x).compile()
        return compiled.cost_analysis()["flops"]

    assert operations(few) < 0.35 * operations(None)


def test_groups_on_a_mesh_stay_where_they_are():
    """Eight groups on eight devices: same numbers, no exchange between devices."""
    mesh = make_mesh(data=4, fsdp=2)
    x = jax.random.normal(jax.random.key(0), (24, 2, 4))
    kept = draw_kept(jax.random.split(jax.random.key(1), 8), 3, 2)
    run = jax.jit(
        lambda x, kept: residual(x, jnp.sin, None, kept), out_shardings=batch_sharding(mesh)
    )
    sharded = jax.device_put(x, batch_sharding(mesh)), jax.device_put(kept, batch_sharding(mesh))
    text = run.lower(*sharded).compile().as_text()
    assert not any(word in text for word in ("all-to-all", "all-gather", "all-reduce", "permute("))
    one = jax.device_put(x, NamedSharding(mesh, PartitionSpec()))
    np.testing.assert_allclose(run(*sharded), residual(one, jnp.sin, None, kept), atol=1e-6)
