"""The ConvNeXt's structure; its values are held to the reference in tests/conformance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinojax.models import convnext

TINY = {"depths": (1, 1, 2, 1), "dims": (4, 4, 8, 8)}
COUNTS = {"tiny": 27_820_128, "small": 49_454_688, "base": 87_566_464, "large": 196_230_336}


def parameters(network):
    params = network.init(jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 100))
    return jax.tree.map(lambda a: a + 0.2 * jax.random.normal(next(keys), a.shape), params)


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    """Spec 1.6, without a classifier."""
    shapes = jax.eval_shape(convnext.build({"variant": name}).init, jax.random.key(0))
    assert sum(a.size for a in jax.tree.leaves(shapes)) == COUNTS[name]


def test_two_crop_sizes_in_one_pass_however_computed():
    network = convnext.build(TINY)
    params = parameters(network)
    crops = tuple(jax.random.normal(jax.random.key(i), (2, 32 * i, 32, 3)) for i in (1, 2))
    both = jax.jit(network.apply)(params, crops)
    assert [f.patches.shape for f in both] == [(2, 1, 8), (2, 2, 8)]
    assert both[0].storage.shape == (2, 0, 8)
    for change in ({"scan": False}, {"remat": "full"}):
        other = convnext.build(TINY | change)
        (alone,) = jax.jit(other.apply)(params, crops[1:])
        np.testing.assert_allclose(alone.cls, both[1].cls, atol=1e-5)
        np.testing.assert_allclose(alone.patches, both[1].patches, atol=1e-5)


def test_depthwise_convolution_on_cpu():
    """The sum of shifts against XLA's grouped convolution, with gradients."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, g = jax.random.normal(keys[0], (2, 2, 5, 9, 4))
    kernel = jax.random.normal(keys[1], (7, 7, 1, 4))
    ours, theirs = (
        jax.vjp(f, x, kernel) for f in (convnext.shifted_sum, convnext.grouped_convolution)
    )
    np.testing.assert_allclose(ours[0], theirs[0], atol=1e-5)
    for a, b in zip(ours[1](g), theirs[1](g), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5)


def test_stochastic_depth():
    """Rising from 0 in the first block; whole rows lose a branch; eval keeps all."""
    keep = convnext.kept(jax.random.key(0), 0, jnp.float32(0.25), jnp.arange(2), 4000)
    np.testing.assert_allclose(np.unique(np.asarray(keep)), [0, 4 / 3], rtol=1e-6)
    assert abs(float(keep.mean()) - 1) < 0.05
    assert (convnext.kept(jax.random.key(0), 0, jnp.float32(0), jnp.arange(2), 8) == 1).all()
    network = convnext.build(TINY | {"drop_path": 0.9})
    params, images = parameters(network), jax.random.normal(jax.random.key(2), (8, 32, 32, 3))
    apply = jax.jit(network.apply)
    (still,), (dropped,) = apply(params, (images,)), apply(params, (images,), key=jax.random.key(0))
    assert jnp.isfinite(dropped.cls).all()
    assert float(jnp.abs(dropped.cls - still.cls).max()) > 1e-3


def test_errors_are_sentences():
    with pytest.raises(ValueError, match="'huge'; expected one of tiny, small, base, large"):
        convnext.build({"variant": "huge"})
    with pytest.raises(ValueError, match="'drop_pat' is unknown; the nearest is 'drop_path'"):
        convnext.build({"drop_pat": 0.1})
    with pytest.raises(ValueError, match="four stages"):
        convnext.build({"depths": (1, 2), "dims": (4, 4)})
