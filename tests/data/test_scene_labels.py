"""Semantic masks, depth, boxes and the words for objects, against the mask and the pixels."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

from dinojax.data.scenes.draw import draw, footprint, render
from dinojax.data.scenes.labels import article, boxes, depth, ground_words, semantic, shade
from dinojax.data.scenes.parts import COLOURS, CREAM, INK, SHAPES
from dinojax.data.scenes.spec import describe, even, mix

COUNT = 60


@pytest.fixture(scope="module")
def scenes():
    return [render(3, index, 64) for index in range(COUNT)]


def test_semantic_mask_names_the_shape_of_every_instance(scenes):
    for scene in scenes:
        mask = semantic(scene)
        assert mask.dtype == np.uint8
        np.testing.assert_array_equal(mask == 0, scene.mask == 0)
        for number in np.unique(scene.mask[scene.mask > 0]):
            (category,) = np.unique(mask[scene.mask == number])
            assert SHAPES[category - 1] == scene.spec.objects[number - 1].shape
    assert {int(n) for scene in scenes for n in np.unique(semantic(scene))} == set(range(11))


def test_depth_is_that_of_the_nearest_object_over_every_pixel(scenes):
    for scene in scenes:
        rows = np.arange(64)[:, None]
        expected = np.repeat(1 - 0.08 * (rows + 0.5) / 64, 64, axis=1)
        for thing in scene.spec.objects:
            here = footprint(thing, 64)
            assert (expected[here] != thing.depth).all()
            expected[here] = np.minimum(expected[here], thing.depth)
        found = depth(scene)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_ground_is_behind_everything_and_nearer_below(scenes):
    for scene in scenes:
        found, ground = depth(scene), scene.mask == 0
        assert found[ground].min() > 0.91 and found.max() < 1
        assert not (~ground).any() or found[~ground].max() <= 0.9
        empty = draw(replace(scene.spec, objects=()), 32)
        assert (np.diff(depth(empty), axis=0) < 0).all()


def test_boxes_are_tight_around_what_is_visible(scenes):
    for scene in scenes:
        found = boxes(scene)
        assert found.xyxy.dtype == np.float32
        assert found.objects.tolist() == [n - 1 for n in np.unique(scene.mask) if n]
        for box, n, category in zip(found.xyxy, found.objects, found.categories):
            x, y, w, h = cv2.boundingRect((scene.mask == n + 1).astype(np.uint8))
            assert box.tolist() == [x, y, x + w, y + h]
            assert SHAPES[category] == scene.spec.objects[n].shape


def test_visible_is_the_share_of_the_whole_object():
    """The whole one: in a frame three times as wide, of which the scene is the middle."""
    whole, cut = 0, 0
    for index in range(40):
        scene = render(3, index, 48)
        found = boxes(scene)
        for n, share in zip(found.objects, found.visible):
            thing, here = scene.spec.objects[n], scene.mask == n + 1
            centre = tuple((c + 1) / 3 for c in thing.centre)
            alone = footprint(replace(thing, centre=centre, scale=thing.scale / 3), 144)
            np.testing.assert_allclose(share, here.sum() / alone.sum(), rtol=1e-6)
            whole, cut = whole + (share == 1), cut + (share < 0.95)
    assert whole > 10 and cut > 10


def test_a_hidden_object_has_no_box_and_an_outlying_one_neither():
    main = replace(describe(0, 1).objects[0], centre=(0.5, 0.5), depth=0.5)  # a square
    small = replace(main, shape="disc", texture="plain", scale=0.15, depth=0.8)
    away = replace(small, centre=(1.4, 0.5))
    front = replace(small, centre=(0.8, 0.5), depth=0.4)
    spec = replace(describe(0, 1), objects=(main, small, away, front))
    assert boxes(draw(spec, 64)).objects.tolist() == [0, 3]
    nothing = boxes(draw(replace(spec, objects=(away,)), 64))
    assert nothing.xyxy.shape == (0, 4) and nothing.phrases == ()


def test_a_phrase_has_colour_texture_and_shape():
    seen = boxes(render(0, 0, 160))
    assert seen.phrases == ("a red striped disc", "a pale teal arrow", "a black triangle")
    first, second, _ = seen.attributes
    assert (first.size, first.texture, first.position) == ("large", "striped", "centre")
    assert (second.size, second.texture, second.position) == ("small", "plain", "top right")
    assert article("orange disc") == "an orange disc"


def test_position_is_read_off_the_box(scenes):
    for scene in scenes:
        found = boxes(scene)
        for (x0, y0, x1, y1), one in zip(found.xyxy / 64, found.attributes):
            words = one.position.split()
            assert ("left" in words) == ((x0 + x1) / 2 < 1 / 3)
            assert ("right" in words) == ((x0 + x1) / 2 >= 2 / 3)
            assert ("top" in words) == ((y0 + y1) / 2 < 1 / 3)
            assert ("bottom" in words) == ((y0 + y1) / 2 >= 2 / 3)
            assert one.position.strip()


def test_size_words(scenes):
    for scene in scenes:
        found = boxes(scene)
        for n, one in zip(found.objects, found.attributes):
            area = scene.spec.objects[n].scale ** 2
            assert {"small": area < 0.03, "large": 0.3 < area <= 0.5, "huge": area > 0.5}[one.size]


def test_colour_words_are_what_the_pixels_show():
    """Of all that could be said of a plain surface, nothing is much nearer to its colour."""
    said = {}
    for colour, value in COLOURS.items():
        said |= {colour: value, f"pale {colour}": mix(value, CREAM, 0.72)}
        said |= {f"dark {colour}": mix(value, INK, 0.7)}
    said |= {"white": mix(COLOURS["grey"], CREAM, 0.95), "black": mix(COLOURS["grey"], INK, 0.95)}
    anchors = np.array(list(said.values()))
    wrong, seen = 0, set()
    for index in range(200):
        spec = replace(describe(5, index), light=(0.0, 0.0))
        scene = draw(spec, 96)
        found = boxes(scene)
        for n, one in zip(found.objects, found.attributes):
            inside = cv2.erode((scene.mask == n + 1).astype(np.uint8), np.ones((5, 5)))
            if one.texture != "plain" or inside.sum() < 12:
                continue
            pixel = np.median(scene.image[inside > 0], axis=0)
            distances = np.linalg.norm(anchors - pixel, axis=1)
            wrong += distances[list(said).index(one.colour)] > distances.min() + 45
            seen.add(one.colour)
    assert len(seen) > 25
    assert wrong == 0


def test_textured_objects_show_the_colour_they_are_called_by():
    for index in range(50):
        spec = replace(describe(5, index), light=(0.0, 0.0))
        scene = draw(spec, 96)
        main = boxes(scene).attributes[0]
        pixels = scene.image[scene.mask == 1].astype(float)
        near = np.linalg.norm(pixels - np.array(COLOURS[main.colour]), axis=1) < 95
        assert near.mean() > 0.15, main.phrase


def test_even_scenes_are_called_grey():
    for index in range(20):
        scene = draw(even(describe(0, index)), 64)
        assert {one.colour for one in boxes(scene).attributes} == {"grey"}
        assert ground_words(scene.spec.ground).startswith("a grey ")


def test_grounds_are_paler_or_darker_than_the_colour_they_are_called_by(scenes):
    luma = np.array([0.299, 0.587, 0.114])
    for scene in scenes:
        bare = draw(replace(scene.spec, objects=(), light=(0.0, 0.0)), 64).image
        words = ground_words(scene.spec.ground).split()
        assert words[-1] == "ground" and words[2] in COLOURS
        lighter = bare.reshape(-1, 3).mean(0) @ luma - np.array(COLOURS[words[2]]) @ luma
        assert (lighter > 0) == (words[1] == "pale")
        assert (len(words) == 4) == (bare.std((0, 1)).max() == 0)


def test_shades():
    red = COLOURS["red"]
    for amount, words in ((0.0, "red"), (0.4, "red"), (0.6, "pale red"), (0.9, "white")):
        assert shade(mix(red, CREAM, amount), "red", least=0.47) == words
    for amount, words in ((0.4, "red"), (0.6, "dark red"), (0.85, "black")):
        assert shade(mix(red, INK, amount), "red", least=0.47) == words
