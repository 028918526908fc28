"""Descriptions of scenes: the same for ever, the label told by the main object alone."""

import numpy as np

from dinojax.data.scenes.parts import COLOURS, KINDS, tile
from dinojax.data.scenes.spec import CAPTIONS, DESCRIBE, describe, even, uniforms

GOLDEN_NAMES = ("star", "ringed", "teal", "blue")
GOLDEN_NUMBERS = [
    0.4650502,
    0.5277048,
    0.7632917,
    -14.3943021,
    0.1314603,
    0.5790948,
    0.3735568,
    -0.1356055,
]


def test_descriptions_stay_the_same_for_ever():
    """A changed stream of random numbers would silently change everyone's data."""
    spec = describe(0, 3)
    main = spec.objects[0]
    assert (main.shape, main.texture, main.colour, spec.ground.colour) == GOLDEN_NAMES
    found = (*main.centre, main.scale, main.rotation, main.cell, main.depth, *spec.light)
    np.testing.assert_allclose(found, GOLDEN_NUMBERS, rtol=1e-6)


def test_label_names_the_main_object():
    for index in range(20):
        spec = describe(1, index)
        assert (spec.objects[0].shape, spec.objects[0].texture) == KINDS[spec.label]
        assert spec.objects[0].colour != spec.ground.colour


def test_colours_have_names():
    assert {describe(0, i).objects[0].colour for i in range(200)} == set(COLOURS)


def test_every_purpose_has_its_own_random_numbers():
    drawn = {}
    for key in ((0, 3), (3, 0), (0, 4)):
        for purpose in (DESCRIBE, CAPTIONS):
            draw = uniforms(key, purpose)
            drawn[key, purpose] = tuple(draw() for _ in range(200))  # more than one block of them
            again = uniforms(key, purpose)
            assert drawn[key, purpose] == tuple(again() for _ in range(200))
    assert len(set(drawn.values())) == 6
    assert all(len(set(numbers)) == 200 for numbers in drawn.values())


def test_a_description_knows_where_it_comes_from():
    assert describe(4, 17).key == (4, 17)
    assert not describe(4, 17).even


def test_even_scenes_have_mid_grey_surfaces_and_the_same_outlines():
    """Tones must say nothing: else two crops of an image agree on them first."""
    for index in range(40):
        a, b = describe(0, index), even(describe(0, index))
        assert b.even and b.light == (0.0, 0.0)
        assert {b.ground.colour, *(thing.colour for thing in b.objects)} == {"grey"}
        for before, after in zip(a.objects, b.objects, strict=True):
            share = tile(after.texture, 16).mean() / 255
            mean = after.tones[0][0] * (1 - share) + after.tones[1][0] * share
            np.testing.assert_allclose(mean, 128, atol=1e-6)
            assert (after.shape, after.centre) == (before.shape, before.centre)
            assert 0 < min(after.tones[0][0], after.tones[1][0])
            assert max(after.tones[0][0], after.tones[1][0]) < 255
