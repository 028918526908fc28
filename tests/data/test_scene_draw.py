"""From descriptions to pixels: the same pixels for ever, masks true to them."""

import hashlib
import platform
from dataclasses import replace

import cv2
import numpy as np
import pytest

from dinojax.data.scenes.draw import draw, footprint, pose, render
from dinojax.data.scenes.parts import SHAPES, outline, signature
from dinojax.data.scenes.spec import describe, even

GOLDEN_MEAN = [0.589, 0.543, 0.53]
GOLDEN_STD = [0.258, 0.226, 0.222]
# OpenCV 5.0 on x86: with fused multiply-add (AVX2, AVX-512) and without.
PINNED_IMAGES = ("3bef80207955ef1e", "d348d07b7b683cca")
PINNED_MASKS = "75491c269b500d66"
PINNED_MEANS = [131.0, 161.9, 175.6, 121.66, 87.28, 175.17, 129.57, 188.75, 140.91, 115.33, 141.41]


def _every_way():
    """Scenes of all sizes of supersampling and tiles, coloured and even, of several streams."""
    for seed, index, size in [(0, n, 64) for n in range(20)] + [(1, 5, 161), (7, 33, 256)]:
        spec = describe(seed, index)
        yield draw(spec, size)
        yield draw(even(spec), size)


def test_pixels_stay_the_same_for_ever():
    """By one version of OpenCV: 4.11 differs from 5.0 by 0.07 levels on average, by 4 at most."""
    images, masks, means = hashlib.sha256(), hashlib.sha256(), []
    for scene in _every_way():
        images.update(scene.image.tobytes())
        masks.update(scene.mask.tobytes())
        means.append(scene.image.mean())
    np.testing.assert_allclose(means[::4], PINNED_MEANS, atol=0.2)
    assert masks.hexdigest()[:16] == PINNED_MASKS
    if cv2.__version__.startswith("5.0.") and platform.machine() == "x86_64":
        assert images.hexdigest()[:16] in PINNED_IMAGES


def test_pixel_statistics():
    """Means and spreads over 300 scenes; a changed palette or light moves them."""
    images = np.stack([render(0, index, 32).image for index in range(300)]) / 255.0
    np.testing.assert_allclose(images.mean((0, 1, 2)), GOLDEN_MEAN, atol=0.01)
    np.testing.assert_allclose(images.std((0, 1, 2)), GOLDEN_STD, atol=0.01)


def test_drawing_does_not_depend_on_what_was_drawn_before():
    first = render(0, 5, 48).image
    render(9, 123, 80)
    np.testing.assert_array_equal(render(0, 5, 48).image, first)


def test_mask_covers_the_object():
    """Repainting the main object changes exactly the pixels that the mask gives to it."""
    for index in range(20):
        scene = render(2, index, 64)
        main, *others = scene.spec.objects
        loud = tuple((tone[1], 255.0 - tone[0], tone[2]) for tone in main.tones)
        repainted = replace(main, tones=loud)
        changed = draw(replace(scene.spec, objects=(repainted, *others)), 64).image
        touched = np.abs(changed.astype(int) - scene.image).max(-1) > 0
        inside = scene.mask == 1
        assert touched[inside].mean() > 0.97  # two tones can come out alike
        assert (touched & ~inside).sum() < 0.2 * inside.sum()  # half-covered edge pixels
        assert 0.15 < inside.mean() < 0.9
        assert set(np.unique(scene.mask)) <= set(range(len(scene.spec.objects) + 1))


def test_nearer_objects_hide_farther_ones():
    spec = describe(0, 0)
    main = spec.objects[0]
    front = replace(main, scale=0.2, centre=(0.5, 0.5), depth=0.1)
    behind = replace(front, depth=0.95)
    centre = []
    for small in (front, behind):
        scene = draw(replace(spec, objects=(main, small)), 64)
        centre.append(int(scene.mask[32, 32]))
    assert centre == [2, 1]


@pytest.mark.parametrize("shape", SHAPES)
def test_scale_is_the_root_of_the_area(shape):
    spec = describe(0, 0)
    thing = replace(spec.objects[0], shape=shape, scale=0.5, centre=(0.5, 0.5))
    mask = draw(replace(spec, objects=(thing,)), 128).mask
    assert abs((mask == 1).mean() - 0.25) < 0.01


def test_pose_maps_the_outline_onto_the_mask():
    spec = describe(0, 9)  # an arrow, which looks different from every side
    thing = replace(spec.objects[0], scale=0.4, centre=(0.4, 0.6), rotation=30.0)
    mask = draw(replace(spec, objects=(thing,)), 128).mask == 1
    matrix = pose(thing)
    corners = outline("arrow")[0] @ matrix[:, :2].T + matrix[:, 2]
    rows, columns = np.nonzero(mask)
    found = np.array([[columns.min(), rows.min()], [columns.max() + 1, rows.max() + 1]]) / 128
    np.testing.assert_allclose(found, [corners.min(0), corners.max(0)], atol=1.5 / 128)


def test_a_larger_drawing_is_the_same_scene():
    small, large = render(0, 4, 48), render(0, 4, 192)
    shrunk = large.image.reshape(48, 4, 48, 4, 3).mean((1, 3))
    assert np.abs(shrunk - small.image).mean() < 5.0
    assert (large.mask[2::4, 2::4] == small.mask).mean() > 0.97


def test_a_footprint_is_the_mask_of_an_object_alone():
    for index in range(10):
        spec = describe(0, index)
        for thing in spec.objects:
            alone = draw(replace(spec, objects=(thing,)), 64).mask == 1
            np.testing.assert_array_equal(footprint(thing, 64), alone)
    outside = replace(spec.objects[0], centre=(3.0, 3.0))
    assert not footprint(outside, 64).any()


def test_even_scenes_are_grey_with_the_same_outlines():
    """Tones must say nothing: else two crops of an image agree on them first."""
    plain = [draw(describe(0, index), 64) for index in range(40)]
    evened = [draw(even(describe(0, index)), 64) for index in range(40)]
    for a, b in zip(plain, evened, strict=True):
        assert (b.image == b.image[..., :1]).all()
        np.testing.assert_array_equal(a.mask, b.mask)
    spread = [np.std([scene.image.mean() for scene in scenes]) for scenes in (evened, plain)]
    assert spread[0] < 6 < spread[1]


def test_more_bands_change_no_colour_and_show_signatures():
    for index in range(5):
        spec = describe(0, index)
        scene, more = draw(spec, 64), draw(spec, 64, bands=7)
        assert more.image.shape == (64, 64, 7) and more.image.dtype == np.uint8
        np.testing.assert_array_equal(more.image[..., :3], scene.image)
        np.testing.assert_array_equal(more.mask, scene.mask)
    dark = replace(
        spec.objects[0], shape="disc", texture="plain", tones=((9.0,) * 3,) * 2, scale=0.6
    )
    flat = replace(spec, objects=(replace(dark, centre=(0.5, 0.5)),), light=(0.0, 0.0))
    middle = draw(flat, 64, bands=5).image[32, 32]
    expected = [9, 9, 9, *(round(signature(dark.colour, "plain", b)[0]) for b in (3, 4))]
    np.testing.assert_array_equal(middle, expected)
