"""Two views of a scene: the correspondences are those of the pixels, not only of the formula."""

import itertools
from dataclasses import replace

import cv2
import numpy as np
import pytest

from dinojax.data.scenes.draw import render
from dinojax.data.scenes.spec import VIEWS, describe, even, uniforms
from dinojax.data.scenes.views import WIDE, _camera, transform, view_pair

SIZE = 128


@pytest.fixture(scope="module")
def pairs():
    return [view_pair(describe(6, index), SIZE) for index in range(25)]


def test_matches_are_where_the_homography_takes_the_points(pairs):
    for pair in pairs:
        expected = cv2.perspectiveTransform(pair.points[None], pair.homography)[0]
        np.testing.assert_allclose(pair.matches, expected, atol=1e-9)
        back = transform(np.linalg.inv(pair.homography), pair.matches)
        np.testing.assert_allclose(back, pair.points, atol=1e-9)


def test_points_are_spread_and_visible_ones_are_inside(pairs):
    for pair in pairs:
        cells = np.floor(pair.points / (SIZE / 8)).astype(int)
        assert len({tuple(cell) for cell in cells}) == 64
        inside = (pair.matches >= 0).all(1) & (pair.matches <= SIZE).all(1)
        np.testing.assert_array_equal(pair.visible, inside)
        assert 0.4 < pair.visible.mean() < 1


def test_what_is_around_a_point_is_around_its_match(pairs):
    """Patches carried over by the homography correlate; moved by two pixels they do so less."""
    grid = np.stack(np.meshgrid(*[np.arange(-7, 8.0)] * 2), -1).reshape(-1, 2)
    shifts = [(x, y) for x, y in itertools.product((-2, 0, 2), repeat=2) if (x, y) != (0, 0)]
    at_match, best = [], []
    for pair in pairs[:12]:
        for point in pair.points[pair.visible]:
            here = point + grid
            there = transform(pair.homography, here)
            if min(here.min(), there.min()) < 3 or max(here.max(), there.max()) > SIZE - 3:
                continue
            patch = _sample(pair.first, here)
            if patch.std() < 15:  # no texture, nothing to compare
                continue
            at_match.append(np.corrcoef(patch, _sample(pair.second, there))[0, 1])
            beside = [np.corrcoef(patch, _sample(pair.second, there + s))[0, 1] for s in shifts]
            best.append(at_match[-1] > max(beside))
    assert len(best) > 100
    assert np.median(at_match) > 0.98
    assert np.mean(best) > 0.97


def test_the_ground_moves_along():
    """Its faint pattern alone: carried back, the second view correlates with the first."""
    pixels = np.stack(np.meshgrid(*[np.arange(SIZE) + 0.5] * 2), -1).reshape(-1, 2)
    found = []
    for index in range(30):
        spec = describe(6, index)
        if spec.ground.texture in ("plain", "mottled"):
            continue
        pair = view_pair(replace(spec, objects=(), light=(0.0, 0.0)), SIZE)
        places = transform(pair.homography, pixels)
        inside = ((places > 2) & (places < SIZE - 2)).all(1).reshape(SIZE, SIZE)
        pattern, seen = (
            _sample(image, where).reshape(SIZE, SIZE)
            for image, where in ((pair.first, pixels), (pair.second, places))
        )
        # what is brighter than around it: the second view has a light
        detail = [x - cv2.blur(x, (31, 31)) for x in (pattern, seen)]
        inner = cv2.erode(inside.astype(np.uint8), np.ones((31, 31)), borderValue=0) > 0
        found.append(np.corrcoef(detail[0][inner], detail[1][inner])[0, 1])
    assert len(found) > 10
    assert np.median(found) > 0.95 and min(found) > 0.6


def test_no_instance_appears_between_two():
    spec = describe(6, 1)
    away = replace(spec.objects[0], centre=(9.0, 9.0))
    for index in range(5):
        pair = view_pair(replace(spec, key=(6, index), objects=(away, spec.objects[0])), SIZE)
        assert set(np.unique(pair.masks)) == {0, 2}


def test_instances_keep_their_numbers(pairs):
    same = []
    for pair in pairs:
        points, matches = (
            np.floor(x[pair.visible]).astype(int).T for x in (pair.points, pair.matches)
        )
        same.append(pair.masks[0][points[1], points[0]] == pair.masks[1][matches[1], matches[0]])
    assert np.concatenate(same).mean() > 0.97  # all but points on an outline


def test_views_differ_in_light_and_colour(pairs):
    """Where a point is seen in both, no fixed factor leads from one to the other."""
    spread = []
    for pair in pairs:
        points, matches = pair.points[pair.visible], pair.matches[pair.visible]
        first, second = (
            np.stack([_sample(image[..., c : c + 1], where) for c in range(3)], -1)
            for image, where in ((pair.first, points), (pair.second, matches))
        )
        ratio = np.median((second + 1) / (first + 1), axis=0)
        spread.append(ratio)
    assert np.std(spread, axis=0).min() > 0.03
    assert np.abs(np.log(spread)).max() < 0.5


def test_the_first_view_is_the_scene_itself(pairs):
    for index, pair in enumerate(pairs[:5]):
        scene = render(6, index, SIZE)
        np.testing.assert_array_equal(pair.first, scene.image)
        np.testing.assert_array_equal(pair.masks[0], scene.mask)
        again = view_pair(describe(6, index), SIZE)
        np.testing.assert_array_equal(again.second, pair.second)


def test_points_and_camera_do_not_depend_on_the_size():
    small, large = (view_pair(describe(6, 3), size) for size in (48, 96))
    np.testing.assert_allclose(small.points * 2, large.points)
    np.testing.assert_allclose(small.matches * 2, large.matches)


def test_nothing_but_the_scene_is_ever_in_view():
    """The corners of the second view, seen from the first, in the extreme cameras of all."""
    ranges = []
    _camera(lambda low, high: ranges.append((low, high)) or low)
    assert len(ranges) == 6
    corners = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    farthest = 0.0
    for extreme in itertools.product(*ranges):
        values = iter(extreme)
        inverse = np.linalg.inv(_camera(lambda low, high, values=values: next(values)))
        farthest = max(farthest, np.abs(transform(inverse, corners) - 0.5).max())
    assert 0.8 < farthest / (WIDE / 2) < 1
    drawn = uniforms((0, 0), VIEWS)
    assert np.linalg.det(_camera(drawn)) > 0


@pytest.mark.parametrize("bands", [3, 5])
def test_other_kinds_of_scenes(bands):
    pair = view_pair(even(describe(6, 2)), 40, bands)
    assert pair.first.shape == pair.second.shape == (40, 40, bands)
    assert pair.second.dtype == np.uint8 and pair.second.min() > 5


def _sample(image, points):
    """Brightness at points (x, y), bilinear."""
    x, y = (points.astype(np.float32) - 0.5).T
    grey = np.ascontiguousarray(image.astype(np.float32).mean(-1))
    return cv2.remap(grey, x[None], y[None], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)[0]
