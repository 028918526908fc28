"""RoPE: what it must do to scores, its draws, and its errors. Values: tests/conformance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinojax.layers import rope


def test_scores_depend_on_distances_only():
    """<q at a, k at b> is a function of a - b: move both by the same vector."""
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))
    periods = rope.periods_from_base(100.0, 16)

    def score(a, b):
        (x, y) = (
            rope.apply(v, rope.tables(jnp.asarray([[c]], jnp.float32), periods))
            for v, c in ((q, a), (k, b))
        )
        return float((x * y).sum())

    moved = score((0.3 + 0.25, -0.2 - 0.5), (0.1 + 0.25, 0.4 - 0.5))
    assert abs(score((0.3, -0.2), (0.1, 0.4)) - moved) < 1e-5
    assert abs(score((0.3, -0.2), (0.1, 0.4)) - score((0.1, 0.4), (0.3, -0.2))) > 1e-2


def test_only_the_last_tokens_turn_and_lengths_stay():
    x = jax.random.normal(jax.random.key(0), (2, 3 + 6, 2, 16))
    tables = rope.tables(rope.coordinates(2, 3)[None], rope.periods_from_base(100.0, 16))
    y = rope.apply(x, tables)
    np.testing.assert_array_equal(y[:, :3], x[:, :3])
    assert (jnp.abs(y - x)[:, 3:].max((0, 2, 3)) > 0.1).all()
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
    np.testing.assert_allclose(y, rope.apply(x, rope.with_prefix(tables, 3)), atol=1e-6)


def test_height_comes_before_width():
    """Along a row of patches only the second quarter of the angles changes."""
    tables = rope.tables(rope.coordinates(1, 4)[None], rope.periods_from_base(100.0, 16))
    change = jnp.abs(jnp.diff(tables.sin[0], axis=0)).max(0)
    assert (change[:4] == 0).all() and (change[4:8] > 0).all()


def test_coordinates():
    rows, columns = np.asarray(rope.coordinates(2, 4)).reshape(2, 4, 2).transpose(2, 0, 1)
    np.testing.assert_allclose(rows[:, 0], [-0.5, 0.5])
    np.testing.assert_allclose(columns[0], [-0.75, -0.25, 0.25, 0.75])
    longest = rope.coordinates(2, 4, "max").reshape(2, 4, 2)
    np.testing.assert_allclose(longest[:, 0, 0], [-0.75, -0.25])
    shortest = rope.coordinates(2, 4, "min").reshape(2, 4, 2)
    np.testing.assert_allclose(shortest[0, :, 1], [-0.5, 0.5, 1.5, 2.5])


def test_draws():
    """4,000 of them: ranges, log-uniform laws, and one rescale for both axes."""
    keys = jax.random.split(jax.random.key(0), 4000)
    by = jax.vmap(lambda key: rope.draw(0.25, 1.5, 2.0, key=key))(keys)
    assert by.shift.shape == by.jitter.shape == (4000, 2) and by.rescale.shape == (4000, 1)
    for values, bound in (
        (by.shift, 0.25),
        (jnp.log(by.jitter), np.log(1.5)),
        (jnp.log(by.rescale), np.log(2)),
    ):
        assert jnp.abs(values).max() <= bound * (1 + 1e-6)
        # A uniform law: mean 0, standard deviation bound / sqrt(3); four standard errors.
        assert abs(float(values.mean())) < 4 * bound / np.sqrt(3 * 4000)
        assert abs(float(values.std()) / (bound / np.sqrt(3)) - 1) < 0.05
    assert abs(np.corrcoef(by.jitter.T)[0, 1]) < 0.07  # the axes are drawn apart
    nothing = rope.draw(None, None, None, key=keys[0])
    coords = rope.coordinates(3, 2)
    np.testing.assert_array_equal(rope.augment(coords, nothing), coords)


def test_augmentation_in_order():
    by = rope.Augmentation(*(jnp.asarray(v) for v in ([0.5, -0.5], [2.0, 3.0], [0.5])))
    moved = rope.augment(jnp.asarray([[0.1, 0.2]]), by)
    np.testing.assert_allclose(moved, [[(0.1 + 0.5) * 2 * 0.5, (0.2 - 0.5) * 3 * 0.5]], rtol=1e-6)


def test_groups_use_their_own_tables():
    x = jax.random.normal(jax.random.key(0), (4, 6, 1, 8))
    periods = rope.periods_from_base(100.0, 8)
    coords = jnp.stack([rope.coordinates(2, 3), 2 * rope.coordinates(2, 3)])
    both = rope.apply(x, rope.tables(coords, periods))
    for g in range(2):
        alone = rope.apply(x[2 * g : 2 * g + 2], rope.tables(coords[g : g + 1], periods))
        np.testing.assert_allclose(both[2 * g : 2 * g + 2], alone, atol=1e-6)


def test_periods():
    base = rope.make_periods(64, 100.0, None, None)
    np.testing.assert_allclose(base, 100.0 ** (np.arange(16) / 16), rtol=1e-6)
    ends = rope.make_periods(32, None, 0.5, 90.0)
    np.testing.assert_allclose(ends[jnp.array([0, -1])], [0.5, 90.0], rtol=1e-5)
    np.testing.assert_allclose(ends[1:] / ends[:-1], 180 ** (1 / 7), rtol=1e-5)
    rounded = rope.make_periods(64, 100.0, None, None, bf16=True)
    assert 0 < float(jnp.abs(rounded / base - 1).max()) < 2**-8
    for bad in ((None, None, None), (100.0, 1.0, 2.0), (None, 1.0, None), (100.0, 1.0, None)):
        with pytest.raises(ValueError, match="either rope_base or both"):
            rope.make_periods(32, *bad)
