"""The resizer against Pillow's."""

import numpy as np
import PIL
import pytest
from PIL import Image

from dinojax.data import resize as module
from dinojax.data.resize import resize

BICUBIC = Image.Resampling.BICUBIC
PILLOW = int(PIL.__version__.split(".")[0])


def photo(height, width, seed):
    """Smooth gradients, sharp black and white edges and noise: photographs and worse."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    waves = [127 * (1 + np.sin(rng.uniform(5, 60) * (x + rng.uniform(-1, 1) * y))) for _ in "rgb"]
    pixels = np.stack(waves, -1)
    pixels[(x * 7).astype(int) % 3 == 0] = 255
    pixels[(y * 5).astype(int) % 4 == 0] = 0
    return np.clip(pixels + rng.normal(0, 6, pixels.shape), 0, 255).astype(np.uint8)


def in_passes(image, size, vertical_first):
    """Pillow, one axis after the other."""
    w, h = image.size
    middle = (w, size) if vertical_first else (size, h)
    return np.asarray(image.resize(middle, BICUBIC).resize((size, size), BICUBIC)).astype(int)


@pytest.mark.skipif(module.cykooz_resizer is None, reason="cykooz.resizer is not installed")
def test_within_one_level_of_pillow():
    """On 287 million values of photographs 99.6 % were equal, three of a million two levels off."""
    rng, counts = np.random.default_rng(0), np.zeros(256, int)
    for seed in range(40):
        h, w = (int(n) for n in rng.integers(20, 300, 2))
        size = int(rng.choice([32, 96, 112, 224]))
        image = photo(h, w, seed)
        first = h - size > max(0, 2 * (w - size))
        expected = in_passes(Image.fromarray(image), size, first)
        counts += np.bincount(np.abs(resize(image, size) - expected).ravel(), minlength=256)
    assert counts[3:].sum() == 0
    assert counts[2] <= 2e-5 * counts.sum()
    assert counts[1] <= 0.02 * counts.sum()


@pytest.mark.skipif(PILLOW < 13, reason="older Pillow always takes the horizontal pass first")
@pytest.mark.parametrize("size", [(300, 100), (100, 300), (160, 150), (150, 160), (90, 60), (8, 9)])
def test_the_order_of_passes_is_pillow_s(size):
    """On black and white noise the other order differs by up to 30 levels."""
    image = np.random.default_rng(0).integers(0, 2, (*size, 3), np.uint8) * 255
    for side in (32, 112, 128):
        whole = np.asarray(Image.fromarray(image).resize((side, side), BICUBIC)).astype(int)
        assert np.abs(resize(image, side) - whole).max() <= 2


def test_without_the_library_pillow_does_it(monkeypatch):
    image = photo(50, 70, 0)
    five = np.concatenate([image, image[..., :2]], -1)
    fast = resize(five, 32)
    monkeypatch.setattr(module, "cykooz_resizer", None)
    slow = resize(five, 32)
    assert slow.dtype == fast.dtype == np.uint8
    assert slow.shape == fast.shape == (32, 32, 5)
    assert np.abs(slow.astype(int) - fast).max() <= 2
    np.testing.assert_array_equal(slow[..., :3], Image.fromarray(image).resize((32, 32), BICUBIC))


def test_the_same_size_is_the_identity():
    image = photo(32, 32, 0)
    assert resize(image, 32) is image


def test_the_fourth_band_is_no_transparency():
    """With transparency, colours where it is 0 would be lost."""
    image = photo(40, 40, 0)
    four = np.concatenate([image, np.zeros((40, 40, 1), np.uint8)], -1)
    np.testing.assert_array_equal(resize(four, 24)[..., :3], resize(image, 24))
