"""Outlines, textures and spectral signatures that scenes are made of."""

import itertools

import numpy as np
import pytest

from dinojax.data.scenes.parts import CELLS, COLOURS, PATTERNS, SHAPES, outline, signature, tile

SIGNATURES = [107.93, 59.59, 160.28, 208.06]
TEXTURES = [name for name in PATTERNS if name != "plain"]


@pytest.mark.parametrize("texture", TEXTURES)
def test_textures_repeat_and_show_both_tones(texture):
    drawn = tile(texture, 16)
    assert drawn.shape == (CELLS * 16,) * 2
    assert 0.15 < drawn.mean() / 255 < 0.85
    row, column = np.random.RandomState(0).uniform(0, CELLS, (2, 50))
    u, v = row[None, :], column[:, None]
    pattern = PATTERNS[texture]
    whole = np.broadcast_to(pattern(u, v), (50, 50))
    for shifted in (pattern(u + CELLS, v), pattern(u, v + CELLS)):
        assert (shifted == whole).mean() > 0.999


@pytest.mark.parametrize("shape", SHAPES)
def test_outlines_have_area_one(shape):
    areas = []
    for x, y in (contour.T for contour in outline(shape)):
        areas.append(abs(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1))) / 2)
    assert np.isclose(areas[0] - sum(areas[1:]), 1.0)


def test_signatures_stay_the_same_for_ever():
    found = *signature("red", "striped", 3), *signature("pink", "bricked", 4)
    np.testing.assert_allclose(found, SIGNATURES, atol=0.01)


def test_signatures_tell_colours_by_their_mean_and_textures_by_their_contrast():
    def mean(colour, texture, band):
        first, second = signature(colour, texture, band)
        share = tile(texture, 16).mean() / 255
        return first * (1 - share) + second * share

    for band in (3, 4, 7):
        for colour, texture in itertools.product(COLOURS, PATTERNS):
            assert all(10 < value < 246 for value in signature(colour, texture, band))
            np.testing.assert_allclose(mean(colour, texture, band), mean(colour, "plain", band))
        assert np.isclose(mean("grey", "dotted", band), 128)
    spectra = np.array([[mean(colour, "plain", band) for band in (3, 4)] for colour in COLOURS])
    apart = np.linalg.norm(spectra[:, None] - spectra[None], axis=-1)
    assert (apart + 1e3 * np.eye(len(COLOURS))).min() > 5  # no two colours alike in both bands
