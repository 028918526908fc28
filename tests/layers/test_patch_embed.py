"""Patch embedding and the three ways to make sides multiples of a patch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinojax.layers.patch_embed import PatchEmbed, fit
from dinojax.models.functional import functional


def test_embedding_is_a_strided_convolution():
    network = functional(lambda r: PatchEmbed(4, 5, 6, rngs=r))
    params = network.init(jax.random.key(0))
    kernel, bias = np.asarray(params["kernel"]), np.asarray(params["bias"])
    images = np.random.default_rng(0).normal(size=(2, 8, 12, 5))
    y = network.apply(params, jnp.asarray(images, jnp.float32))
    assert y.shape == (2, 6, 6)
    for row, column in np.ndindex(2, 3):
        piece = images[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        expected = np.einsum("nijc,ijcd->nd", piece, kernel) + bias
        np.testing.assert_allclose(y[:, 3 * row + column], expected, atol=1e-5)


def test_initial_values():
    """U(-a, a) with a = 1/sqrt(c p²)."""
    params = functional(lambda r: PatchEmbed(8, 3, 32, rngs=r)).init(jax.random.key(0))
    bound = 1 / np.sqrt(3 * 64)
    for a in (params["kernel"], params["bias"]):
        assert 0.8 * bound < float(jnp.abs(a).max()) <= bound
    assert abs(float(params["kernel"].std()) / (bound / np.sqrt(3)) - 1) < 0.03


def test_size_policies():
    images = jnp.arange(2 * 70 * 33 * 1, dtype=jnp.float32).reshape(2, 70, 33, 1)
    np.testing.assert_array_equal(fit(images, 16, "floor"), images[:, :64, :32])
    padded = fit(images, 16, "pad")
    assert padded.shape == (2, 80, 48, 1)
    np.testing.assert_array_equal(padded[:, :70, :33], images)
    assert not padded[:, 70:].any() and not padded[:, :, 33:].any()
    resized = fit(images, 16, "resize")
    assert resized.shape == (2, 64, 32, 1)
    np.testing.assert_allclose(resized.mean(), images.mean(), rtol=1e-2)
    for policy in ("floor", "pad", "resize"):
        np.testing.assert_array_equal(fit(images[:, :64, :32], 16, policy), images[:, :64, :32])
    with pytest.raises(ValueError, match="70x33 pixels are smaller than one patch of 40"):
        fit(images, 40, "floor")
    with pytest.raises(ValueError, match="'crop'; expected floor, resize or pad"):
        fit(images, 16, "crop")
