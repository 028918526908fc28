"""Crop geometry against a plain float version of torchvision's, pixels against PIL's."""

import math

import numpy as np
import pytest
from PIL import Image
from scipy.stats import ks_2samp

from dinojax.data.multicrop import Crops, boxes, crop_box, views


def photo(height, width, seed=0):
    """Smooth colours with some noise, different in every corner."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    pixels = np.stack([200 * y, 200 * x, 100 * (np.sin(9 * x + 4 * y) + 1)], -1)
    return (pixels + rng.integers(0, 55, pixels.shape)).astype(np.uint8)


def assert_as_pillow(got, expected):
    """Within one level, and mostly equal (tests/data/test_resize.py measures how close)."""
    difference = np.abs(got.astype(int) - np.asarray(expected))
    assert difference.max() <= 1
    assert difference.mean() < 0.02


def torchvision_box(rng, height, width, scale, ratio):
    """RandomResizedCrop.get_params as torchvision documents it, in float64."""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = int(round(math.sqrt(area * aspect))), int(round(math.sqrt(area / aspect)))
        if 0 < w <= width and 0 < h <= height:
            return rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w
    in_ratio = width / height
    if in_ratio < min(ratio):
        w, h = width, int(round(width / min(ratio)))
    elif in_ratio > max(ratio):
        w, h = int(round(height * max(ratio))), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("size", [(375, 500), (500, 333), (32, 32), (90, 130)])
@pytest.mark.parametrize("scale", [(0.32, 1.0), (0.05, 0.32)])
def test_boxes_are_distributed_as_torchvision_s(size, scale):
    draws = 3000
    ours = np.array(
        [crop_box(np.random.default_rng(k), *size, scale, (3 / 4, 4 / 3)) for k in range(draws)]
    )
    rng = np.random.default_rng(10**6)
    theirs = np.array([torchvision_box(rng, *size, scale, (3 / 4, 4 / 3)) for _ in range(draws)])
    for found in (ours, theirs):
        assert (found >= 0).all() and (found[:, 2:] > 0).all()
        assert (found[:, :2] + found[:, 2:] <= size).all()
    for name, of in {
        "top": lambda b: b[:, 0],
        "left": lambda b: b[:, 1],
        "height": lambda b: b[:, 2],
        "width": lambda b: b[:, 3],
        "area": lambda b: b[:, 2] * b[:, 3],
        "aspect": lambda b: b[:, 3] / b[:, 2],
        "top of what is free": lambda b: b[:, 0] / np.maximum(size[0] - b[:, 2], 1),
    }.items():
        statistic = ks_2samp(of(ours), of(theirs)).statistic
        # 0.045 is the 0.5 % level for two samples of 3,000; the seeds are fixed.
        assert statistic < 0.045, (name, statistic)


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((20, 400), (0, 186, 20, 27)),  # round(20 * 4 / 3) = 27 columns in the middle
        ((400, 20), (186, 0, 27, 20)),
        ((1, 50), (0, 24, 1, 1)),
        ((1, 1), (0, 0, 1, 1)),
    ],
)
def test_the_central_crop_when_nothing_fits(size, box):
    assert crop_box(np.random.default_rng(0), *size, (0.99, 1.0), (3 / 4, 4 / 3)) == box


def test_pixels_are_pil_s():
    crops = Crops(global_size=48, local_size=20, locals=3)
    image = photo(150, 200)
    got = views(image, np.random.default_rng(7), crops)
    assert {k: v.shape for k, v in got.items()} == {
        "global_crops": (2, 48, 48, 3),
        "local_crops": (3, 20, 20, 3),
    }
    rng = np.random.default_rng(7)
    plan = [("global_crops", k, 48, (0.32, 1.0)) for k in range(2)]
    plan += [("local_crops", k, 20, (0.05, 0.32)) for k in range(3)]
    for name, k, size, scale in plan:
        top, left, h, w = crop_box(rng, 150, 200, scale, (3 / 4, 4 / 3))
        cut = Image.fromarray(np.ascontiguousarray(image[top : top + h, left : left + w]))
        expected = np.asarray(cut.resize((size, size), Image.Resampling.BICUBIC))
        assert_as_pillow(got[name][k], expected)


def test_the_whole_image_stays_upright():
    crops = Crops(32, 16, locals=1, global_scale=(1.0, 1.0), aspect=(1.0, 1.0))
    image = photo(64, 64)
    expected = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC))
    got = views(image, np.random.default_rng(0), crops)["global_crops"]
    assert_as_pillow(got, [expected, expected])


@pytest.mark.parametrize("gram", [64, 40, 24])
def test_gram_crops_share_the_base_crop(gram):
    """One base crop of max(global, gram) pixels, then resized to each of the two sizes."""
    image = photo(100, 120)
    bicubic = Image.Resampling.BICUBIC
    got = views(image, np.random.default_rng(3), Crops(40, 16, gram, locals=1))
    base = views(image, np.random.default_rng(3), Crops(max(40, gram), 16, locals=1))
    for view in range(2):
        picture = Image.fromarray(base["global_crops"][view])
        for name, size in (("global_crops", 40), ("gram_crops", gram)):
            assert_as_pillow(got[name][view], picture.resize((size, size), bicubic))
    np.testing.assert_array_equal(got["local_crops"], base["local_crops"])


def test_only_the_larger_crop_travels_when_it_is_distorted():
    got = views(photo(50, 50), np.random.default_rng(3), Crops(16, 8, 32, 2, no_distortions=False))
    assert {k: v.shape[1] for k, v in got.items()} == {"gram_crops": 32, "local_crops": 8}
    with pytest.raises(ValueError, match="gram_size=16 is smaller .* nearest: gram_size=32"):
        Crops(32, 8, 16, 2, no_distortions=False)


@pytest.mark.parametrize("size", [(1, 1), (1, 80), (80, 1), (2, 3)])
def test_tiny_images_give_crops_too(size):
    got = views(photo(*size), np.random.default_rng(0), Crops(16, 8, locals=4))
    assert got["local_crops"].shape == (4, 8, 8, 3)


@pytest.mark.parametrize("bands", [1, 2, 4, 5, 13])
def test_any_number_of_bands(bands):
    """Every band is cut and resized as it would be alone."""
    image = np.random.default_rng(0).integers(0, 256, (40, 50, bands), np.uint8)
    crops = Crops(24, 12, 32, locals=2)
    got = views(image, np.random.default_rng(1), crops)
    for band in (0, bands - 1):
        alone = views(image[..., band : band + 1], np.random.default_rng(1), crops)
        for name, pixels in got.items():
            np.testing.assert_array_equal(pixels[..., band : band + 1], alone[name])


def test_local_crops_as_windows_of_the_global_ones():
    crops = Crops(64, 32, locals=5, local_grid=16)
    image, corners = photo(90, 100), set()
    for seed in range(60):
        got = views(image, np.random.default_rng(seed), crops)
        places = boxes(90, 100, np.random.default_rng(seed), crops)["local_crops"]
        for k, (top, left, h, w) in enumerate(places):
            assert (h, w) == (32, 32)
            window = got["global_crops"][int(k >= 3), top : top + 32, left : left + 32]
            np.testing.assert_array_equal(got["local_crops"][k], window)
            corners.add((top, left))
    assert corners == {(y, x) for y in (0, 16, 32) for x in (0, 16, 32)}
    with pytest.raises(ValueError, match="local_size=80 is larger .* nearest: local_size=64"):
        Crops(64, 80, local_grid=16)


def test_boxes_are_those_of_the_views():
    image = photo(150, 200)
    crops = Crops(48, 20, locals=3)
    found = boxes(150, 200, np.random.default_rng(7), crops)
    got = views(image, np.random.default_rng(7), crops)
    for name, size in (("global_crops", 48), ("local_crops", 20)):
        for view, (top, left, h, w) in enumerate(found[name]):
            part = Image.fromarray(image[top : top + h, left : left + w])
            assert_as_pillow(got[name][view], part.resize((size, size), Image.Resampling.BICUBIC))
