"""Scenes in motion: the same objects under the same numbers, smooth paths, exact flow."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

from dinojax.data.scenes.draw import draw, render
from dinojax.data.scenes.labels import boxes, depth, semantic
from dinojax.data.scenes.spec import describe, even
from dinojax.data.scenes.video import SMALL, centres, flow, motion, video

SIZE, FRAMES = 64, 12


@pytest.fixture(scope="module")
def videos():
    return [video(describe(8, index), SIZE, FRAMES) for index in range(15)]


def test_the_first_frame_is_the_scene_itself():
    for index in range(60):  # also where objects are yet to come in
        spec = describe(8, index)
        first = draw(motion(spec, 3)[0], 48)
        still = render(8, index, 48)
        np.testing.assert_array_equal(first.image, still.image)
        np.testing.assert_array_equal(first.mask, still.mask)
        assert first.spec.objects[: len(spec.objects)] == spec.objects


def test_numbers_stay_with_their_objects(videos):
    """Each frame, with one object painted loud: exactly the pixels of its number change."""
    for moving in videos[:6]:
        assert moving.frames.shape == (FRAMES, SIZE, SIZE, 3) and moving.frames.dtype == np.uint8
        assert moving.masks.shape == (FRAMES, SIZE, SIZE) and moving.masks.dtype == np.uint8
        for t in (0, 5, 11):
            things = list(moving.specs[t].objects)
            for n in range(len(things)):
                loud = tuple(tuple(255 - value for value in tone) for tone in things[n].tones)
                changed = things[:n] + [replace(things[n], tones=loud)] + things[n + 1 :]
                drawn = draw(replace(moving.specs[t], objects=tuple(changed)), SIZE).image
                touched = np.abs(drawn.astype(int) - moving.frames[t]).max(-1) > 0
                inside = moving.masks[t] == n + 1
                assert touched[inside].mean() > 0.9 if inside.any() else touched.sum() < 20
                assert (touched & ~inside).sum() <= 0.3 * inside.sum() + 20


def test_what_an_object_is_made_of_never_changes(videos):
    for moving in videos:
        assert len({len(spec.objects) for spec in moving.specs}) == 1
        for things in zip(*(spec.objects for spec in moving.specs)):
            kinds = {(one.shape, one.texture, one.tones, one.phase, one.depth) for one in things}
            assert len(kinds) == 1
            np.testing.assert_allclose(
                [one.cell / one.scale for one in things], things[0].cell / things[0].scale
            )
        assert len(moving.specs[0].objects) >= 1 + SMALL


def test_paths_are_smooth(videos):
    """A parabola each: the second difference is constant."""
    for moving in videos:
        path = centres(moving)
        assert path.shape == (FRAMES, len(moving.specs[0].objects), 2)
        bend = np.diff(path, 2, axis=0)
        np.testing.assert_allclose(bend, np.broadcast_to(bend[:1], bend.shape), atol=1e-9)
        assert np.abs(np.diff(path, axis=0)).max() < 0.5 * SIZE


def test_small_objects_cross_the_main_one():
    for index in range(20):
        start, half, _ = motion(describe(8, index), 3)
        ways = np.array([thing.centre for thing in half.objects[1:]]) - start.objects[0].centre
        assert np.abs(ways).max() <= 0.1


def test_centres_are_in_the_middle_of_what_is_seen(videos):
    """Of objects that are whole in a frame, and whose middle is that of their area."""
    off = []
    for moving in videos:
        path = centres(moving)
        for t in range(FRAMES):
            seen = boxes(moving.scene(t))
            for n, share in zip(seen.objects, seen.visible):
                if share == 1 and moving.specs[t].objects[n].shape in ("disc", "square", "cross"):
                    y, x = np.nonzero(moving.masks[t] == n + 1)
                    off.append(np.abs(np.array([x.mean(), y.mean()]) + 0.5 - path[t, n]).max())
    assert len(off) > 20
    assert max(off) < 0.5


def test_objects_hide_each_other_and_come_back(videos):
    hidden = returned = 0
    for moving in videos:
        sizes = np.array([[(m == n + 1).sum() for n in range(3)] for m in moving.masks])
        for count in sizes.T[1:]:
            seen = count > 0
            gap = np.flatnonzero(seen)
            hidden += (count[gap[0] :] < 0.3 * count.max()).any() if len(gap) else 0
            returned += len(gap) and not seen[gap[0] : gap[-1]].all()
    assert hidden >= 8 and returned >= 3


def test_flow_leads_to_the_same_surface(videos):
    """The next frame, looked up where flow leads to, looks like this one."""
    x, y = np.meshgrid(np.arange(SIZE, dtype=np.float32), np.arange(SIZE, dtype=np.float32))
    after, before = [], []
    for moving in videos:
        field = flow(moving)
        assert field.shape == (FRAMES - 1, SIZE, SIZE, 2) and field.dtype == np.float32
        for t in range(0, FRAMES - 1, 3):
            place = x + field[t, ..., 0], y + field[t, ..., 1]
            following = moving.frames[t + 1].astype(np.float32)
            there = cv2.remap(following, *place, cv2.INTER_LINEAR)
            number = cv2.remap(moving.masks[t + 1], *place, cv2.INTER_NEAREST)
            same = ((number == moving.masks[t]) & (number > 0)).astype(np.uint8)
            inner = cv2.erode(same, np.ones((5, 5)), borderValue=0) > 0
            after.append(np.abs(there - moving.frames[t])[inner].mean())
            before.append(np.abs(following - moving.frames[t])[inner].mean())
            assert (field[t][moving.masks[t] == 0] == 0).all()
    assert np.mean(after) < 0.4 * np.mean(before)


def test_flow_of_a_centre_is_the_step_of_the_centre(videos):
    steps = []
    for moving in videos:
        field, path = flow(moving), centres(moving)
        for t in range(FRAMES - 1):
            for n in range(path.shape[1]):
                pixel = np.floor(path[t, n]).astype(int)
                inside = (pixel >= 0).all() and (pixel < SIZE).all()
                if inside and moving.masks[t][pixel[1], pixel[0]] == n + 1:
                    step = path[t + 1, n] - path[t, n]
                    steps.append(np.abs(field[t][pixel[1], pixel[0]] - step).max())
    assert len(steps) > 100
    assert max(steps) < 0.4  # the pixel's centre lies up to half a pixel off the object's


def test_every_frame_is_a_scene_with_labels(videos):
    scene = videos[0].scene(5)
    assert (semantic(scene) > 0).sum() == (videos[0].masks[5] > 0).sum()
    assert depth(scene).shape == (SIZE, SIZE)
    assert boxes(scene).phrases[0] == boxes(videos[0].scene(0)).phrases[0]


def test_objects_that_come_into_an_even_scene_are_even():
    for index in range(12):
        moving = video(even(describe(8, index)), 32, 3, bands=4)
        assert moving.frames.shape == (3, 32, 32, 4)
        assert (moving.frames[..., 0] == moving.frames[..., 1]).all()
        assert {thing.colour for thing in moving.specs[1].objects} == {"grey"}


def test_a_longer_video_shows_the_same_motion():
    short, long = (motion(describe(8, 1), frames) for frames in (4, 7))
    for few, many in zip(short, long[::2], strict=True):
        for a, b in zip(few.objects, many.objects, strict=True):
            np.testing.assert_allclose((*a.centre, a.scale), (*b.centre, b.scale))
            np.testing.assert_allclose((a.rotation, a.cell), (b.rotation, b.cell))


def test_a_video_has_two_frames_at_least():
    with pytest.raises(ValueError, match="1 frames was asked for; it has at least 2"):
        video(describe(0, 0), 32, 1)
