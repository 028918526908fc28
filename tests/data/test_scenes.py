"""The embedded data set as a source: always the same, balanced, its label in the structure."""

import io
import pickle
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest

from dinojax.data import scenes
from dinojax.data.multicrop import Crops, views
from dinojax.data.sources import check_readable, open_source

TRAIN, VAL = 1_000, 250
# Everything a source can tell about some scenes, asked for in a given order: one digest for each.
DIGESTS = """
import hashlib, sys
from dinojax.data.scenes.captions import captions
from dinojax.data.scenes.labels import boxes, depth, semantic
from dinojax.data.scenes.video import flow
from dinojax.data.sources import open_source
def digests(order):
    found = {}
    for spec in ("scenes:50?size=32&seed=2", "scenes:50?size=32&bands=5&even=1")[::order]:
        source = open_source(spec)
        for index in (3, 17, 42)[::order]:
            scene, pair, moving = source.scene(index), source.pair(index), source.video(index, 3)
            seen = boxes(scene)
            parts = [scene.image, scene.mask, semantic(scene), depth(scene), seen.xyxy]
            parts += [seen.visible, pair.second, pair.masks, pair.points, pair.matches]
            parts += [moving.frames, moving.masks, flow(moving)]
            words = repr((captions(scene), seen.phrases, pair.homography.tolist()))
            data = b"".join(part.tobytes() for part in parts) + words.encode()
            found[spec, index] = hashlib.sha256(data).hexdigest()
    return sorted(found.items())
"""


@pytest.fixture(scope="module")
def source():
    return scenes.open_scenes(200, {"size": "48"})


def test_same_seed_and_index_give_the_same_scene(source):
    again = scenes.open_scenes(200, {"size": "48"})
    for index in (0, 7, 199):
        np.testing.assert_array_equal(source.image(index), again.image(index))
    assert np.any(source.image(0) != source.image(10))
    other = scenes.open_scenes(200, {"size": "48", "seed": "1"})
    assert np.any(source.image(0) != other.image(0))


def test_everything_is_the_same_in_another_process_and_order():
    names: dict = {}
    exec(DIGESTS, names)  # noqa: S102
    code = DIGESTS + "print(digests(-1))"
    run = [sys.executable, "-c", code]
    other = subprocess.run(run, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == repr(names["digests"](1))


def test_source_interface(source):
    assert len(source) == 200
    assert source.image(0).shape == (48, 48, 3) and source.image(0).dtype == np.uint8
    assert len(source.classes) == 10 and source.classes[0] == "striped disc"
    assert [source.label(i) for i in range(200)] == source.labels().tolist()
    assert source.scene(13).label == source.label(13)
    assert source.name(np.int64(13)) == "scenes/train/13"
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.image(17), source.image(17))


def test_pairs_and_videos_begin_with_the_image_itself(source):
    for opened in (source, scenes.open_scenes(20, {"size": "32", "even": "1", "bands": "4"})):
        image = opened.image(7)
        pair, moving = opened.pair(7), opened.video(7, 4)
        np.testing.assert_array_equal(pair.first, image)
        np.testing.assert_array_equal(moving.frames[0], image)
        assert pair.second.shape == image.shape and len(moving.frames) == 4


def test_encoded_images_decode_to_the_image(source):
    data = np.frombuffer(source.encoded(3), np.uint8)
    image = cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1]
    np.testing.assert_array_equal(image, source.image(3))
    many = open_source("scenes:20?size=32&bands=6")
    np.testing.assert_array_equal(np.load(io.BytesIO(many.encoded(3))), many.image(3))


def test_bands_are_an_option_like_any_other():
    many, few = open_source("scenes:20?size=32&bands=5"), open_source("scenes:20?size=32")
    assert many.image(4).shape == (32, 32, 5)
    np.testing.assert_array_equal(many.image(4)[..., :3], few.image(4))
    np.testing.assert_array_equal(many.labels(), few.labels())
    crops = [
        views(source.image(4), np.random.default_rng(0), Crops(24, 16)) for source in (many, few)
    ]
    for name in crops[1]:
        np.testing.assert_array_equal(crops[0][name][..., :3], crops[1][name])
    check_readable(many, 5)
    with pytest.raises(ValueError, match="5 channels, the model expects 3"):
        check_readable(many, 3)


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
        (10, {"split": "dev"}, "'dev' is none of its splits; .*train"),
        (10, {"size": "tall"}, "'tall'"),
        (10, {"seed": "-1"}, "'-1'"),
        (10, {"bands": "2"}, "bands='2' should be a whole number of at least 3"),
    ],
)
def test_bad_options_are_named(count, options, words):
    with pytest.raises(ValueError, match=words):
        scenes.open_scenes(count, options)


def test_index_outside_the_source(source):
    with pytest.raises(IndexError, match="200"):
        source.image(200)


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
