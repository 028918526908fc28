"""The embedded data set: always the same, balanced, its masks and labels true to the picture."""

import pickle
import time

import numpy as np
import pytest

from dinojax.data import scenes
from dinojax.data.scene_parts import CELLS, COLOURS, KINDS, PATTERNS, SHAPES, outline, tile

TRAIN, VAL = 1_000, 250
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
GOLDEN_MEAN = [0.589, 0.543, 0.53]
GOLDEN_STD = [0.258, 0.226, 0.222]


@pytest.fixture(scope="module")
def source():
    return scenes.open_scenes(200, {"size": "48"})


def test_same_seed_and_index_give_the_same_scene(source):
    again = scenes.open_scenes(200, {"size": "48"})
    for index in (0, 7, 199):
        np.testing.assert_array_equal(source.image(index), again.image(index))
        assert scenes.describe(3, index) == scenes.describe(3, index)
    assert np.any(source.image(0) != source.image(10))
    other = scenes.open_scenes(200, {"size": "48", "seed": "1"})
    assert np.any(source.image(0) != other.image(0))


def test_drawing_does_not_depend_on_what_was_drawn_before(source):
    first = source.image(5)
    scenes.render(9, 123, 80)
    np.testing.assert_array_equal(source.image(5), first)


def test_descriptions_stay_the_same_for_ever():
    """A changed stream of random numbers would silently change everyone's data."""
    spec = scenes.describe(0, 3)
    main = spec.objects[0]
    assert (main.shape, main.texture, main.colour, spec.ground.colour) == GOLDEN_NAMES
    found = (*main.centre, main.scale, main.rotation, main.cell, main.depth, *spec.light)
    np.testing.assert_allclose(found, GOLDEN_NUMBERS, rtol=1e-6)


def test_pixel_statistics():
    """Means and spreads over 300 scenes; a changed palette or light moves them."""
    images = np.stack([scenes.render(0, index, 32).image for index in range(300)]) / 255.0
    np.testing.assert_allclose(images.mean((0, 1, 2)), GOLDEN_MEAN, atol=0.01)
    np.testing.assert_allclose(images.std((0, 1, 2)), GOLDEN_STD, atol=0.01)


def test_source_interface(source):
    assert len(source) == 200
    assert source.image(0).shape == (48, 48, 3) and source.image(0).dtype == np.uint8
    assert len(source.classes) == 10 and source.classes[0] == "striped disc"
    assert [source.label(i) for i in range(200)] == source.labels().tolist()
    assert source.scene(13).label == source.label(13)
    assert source.name(np.int64(13)) == "scenes/train/13"
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.image(17), source.image(17))


def test_labels_are_balanced(source):
    assert np.bincount(source.labels()).tolist() == [20] * 10


def test_splits_share_no_scene():
    images = {}
    for split in scenes.SPLITS:
        for seed in ("0", "1"):
            opened = scenes.open_scenes(50, {"size": "24", "split": split, "seed": seed})
            for index in range(50):
                images[opened.image(index).tobytes()] = (split, seed, index)
    assert len(images) == 3 * 2 * 50


def test_label_names_the_main_object():
    for index in range(20):
        spec = scenes.describe(1, index)
        assert (spec.objects[0].shape, spec.objects[0].texture) == KINDS[spec.label]
        assert spec.objects[0].colour != spec.ground.colour


def test_mask_covers_the_object():
    """Repainting the main object changes exactly the pixels that the mask gives to it."""
    for index in range(20):
        scene = scenes.render(2, index, 64)
        main, *others = scene.spec.objects
        loud = tuple((tone[1], 255.0 - tone[0], tone[2]) for tone in main.tones)
        repainted = _replace(main, tones=loud)
        changed = scenes.draw(_replace(scene.spec, objects=(repainted, *others)), 64).image
        touched = np.abs(changed.astype(int) - scene.image).max(-1) > 0
        inside = scene.mask == 1
        assert touched[inside].mean() > 0.97  # two tones can come out alike
        assert (touched & ~inside).sum() < 0.2 * inside.sum()  # half-covered edge pixels
        assert 0.15 < inside.mean() < 0.9
        assert set(np.unique(scene.mask)) <= set(range(len(scene.spec.objects) + 1))


def test_nearer_objects_hide_farther_ones():
    spec = scenes.describe(0, 0)
    main = spec.objects[0]
    front = _replace(main, scale=0.2, centre=(0.5, 0.5), depth=0.1)
    behind = _replace(front, depth=0.95)
    centre = []
    for small in (front, behind):
        scene = scenes.draw(_replace(spec, objects=(main, small)), 64)
        centre.append(int(scene.mask[32, 32]))
    assert centre == [2, 1]


@pytest.mark.parametrize("shape", SHAPES)
def test_scale_is_the_root_of_the_area(shape):
    spec = scenes.describe(0, 0)
    thing = _replace(spec.objects[0], shape=shape, scale=0.5, centre=(0.5, 0.5))
    mask = scenes.draw(_replace(spec, objects=(thing,)), 128).mask
    assert abs((mask == 1).mean() - 0.25) < 0.01


def test_pose_maps_the_outline_onto_the_mask():
    spec = scenes.describe(0, 9)  # an arrow, which looks different from every side
    thing = _replace(spec.objects[0], scale=0.4, centre=(0.4, 0.6), rotation=30.0)
    mask = scenes.draw(_replace(spec, objects=(thing,)), 128).mask == 1
    matrix = scenes.pose(thing)
    corners = outline("arrow")[0] @ matrix[:, :2].T + matrix[:, 2]
    rows, columns = np.nonzero(mask)
    found = np.array([[columns.min(), rows.min()], [columns.max() + 1, rows.max() + 1]]) / 128
    np.testing.assert_allclose(found, [corners.min(0), corners.max(0)], atol=1.5 / 128)


def test_a_larger_drawing_is_the_same_scene():
    small, large = scenes.render(0, 4, 48), scenes.render(0, 4, 192)
    shrunk = large.image.reshape(48, 4, 48, 4, 3).mean((1, 3))
    assert np.abs(shrunk - small.image).mean() < 5.0
    assert (large.mask[2::4, 2::4] == small.mask).mean() > 0.97


@pytest.mark.parametrize("texture", [name for name in PATTERNS if name != "plain"])
def test_textures_repeat_and_show_both_tones(texture):
    drawn = tile(texture, 16)
    assert drawn.shape == (CELLS * 16,) * 2
    assert 0.15 < drawn.mean() / 255 < 0.85
    u, v = np.random.RandomState(0).uniform(0, CELLS, (2, 50, 50))
    pattern = PATTERNS[texture]
    for shifted in (pattern(u + CELLS, v), pattern(u, v + CELLS)):
        assert (shifted == pattern(u, v)).mean() > 0.999


def test_class_is_in_the_structure_and_not_in_the_pixels():
    """k-NN (k = 20): raw pixels near chance (0.1), orientation histograms far above."""
    sets = {}
    for split, count in (("train", TRAIN), ("val", VAL)):
        opened = scenes.open_scenes(count, {"size": "48", "split": split})
        sets[split] = np.stack([opened.image(i) for i in range(count)]), opened.labels()
    raw = _knn(*[(x.reshape(len(x), -1), y) for x, y in sets.values()])
    structure = _knn(*[(_orientations(x), y) for x, y in sets.values()])
    print(f"k-NN: raw pixels {raw:.3f}, orientation histograms {structure:.3f}")
    assert raw < 0.27
    assert structure > 0.6


def test_speed(source):
    source.image(0)
    start = time.perf_counter()
    for index in range(200):
        source.image(index)
    print(f"{200 / (time.perf_counter() - start):.0f} scenes/s at 48 pixels")


@pytest.mark.parametrize(
    ("count", "options", "words"),
    [
        (0, {}, "count of 0"),
        (10, {"sise": "64"}, "'sise'"),
        (10, {"split": "dev"}, "'dev'"),
        (10, {"size": "tall"}, "'tall'"),
        (10, {"seed": "-1"}, "'-1'"),
    ],
)
def test_bad_options_are_named(count, options, words):
    with pytest.raises(ValueError, match=words):
        scenes.open_scenes(count, options)


def test_index_outside_the_source(source):
    with pytest.raises(IndexError, match="200"):
        source.image(200)


def test_colours_have_names():
    assert {scenes.describe(0, i).objects[0].colour for i in range(200)} == set(COLOURS)


def _replace(thing, **changes):
    return type(thing)(**{**vars(thing), **changes})


def _knn(train, val, neighbours=20):
    """Share of val whose weighted nearest neighbours (cosine, mean removed) have their label."""
    mean = train[0].mean(0)
    bank, queries = (x - mean for x in (train[0], val[0]))
    bank, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (bank, queries))
    similarity = queries @ bank.T
    nearest = np.argsort(-similarity, 1)[:, :neighbours]
    weights = np.exp(np.take_along_axis(similarity, nearest, 1) / 0.07)
    votes = [(weights * (train[1][nearest] == label)).sum(1) for label in range(10)]
    return (np.argmax(votes, 0) == val[1]).mean()


def _orientations(images, cell=8, bins=9):
    """Histograms of gradient orientation per cell, each cell's normalised: [n, cells * bins]."""
    grey = images.astype(np.float32).mean(-1)
    dy, dx = np.gradient(grey, axis=(1, 2))
    strength = np.hypot(dx, dy)
    orientation = ((np.arctan2(dy, dx) % np.pi) / np.pi * bins).astype(int) % bins
    n, side, _ = grey.shape
    per_bin = [np.where(orientation == b, strength, 0) for b in range(bins)]
    cells = np.stack(per_bin, -1).reshape(n, side // cell, cell, side // cell, cell, bins)
    summed = cells.sum((2, 4))
    return (summed / (np.linalg.norm(summed, axis=-1, keepdims=True) + 1)).reshape(n, -1)


def test_even_scenes_have_mid_grey_surfaces_and_the_same_outlines():
    """Tones must say nothing: else two crops of an image agree on them first."""
    plain, even = scenes.open_scenes(40), scenes.open_scenes(40, {"even": "1"})
    for index in range(40):
        a, b = plain.scene(index), even.scene(index)
        assert (b.image == b.image[..., :1]).all()
        np.testing.assert_array_equal(a.mask, b.mask)
        for before, after in zip(a.spec.objects, b.spec.objects, strict=True):
            share = tile(after.texture, 16).mean() / 255
            mean = after.tones[0][0] * (1 - share) + after.tones[1][0] * share
            np.testing.assert_allclose(mean, 128, atol=1e-6)
            assert (after.shape, after.centre) == (before.shape, before.centre)
            assert 0 < min(after.tones[0][0], after.tones[1][0])
            assert max(after.tones[0][0], after.tones[1][0]) < 255
    means = [even.image(index).mean() for index in range(40)]
    assert np.std(means) < 6 < np.std([plain.image(index).mean() for index in range(40)])
