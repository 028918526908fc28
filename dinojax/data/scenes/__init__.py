"""The embedded data set: textured shapes on patterned grounds, drawn on the fly, always the same.

A scene is first *described* (`scenes.spec.describe`: which shapes, textures, colours, poses) and
then *drawn* (`scenes.draw.draw`), so anything a task may ask of a scene follows from its
description. `open_scenes` makes a source of it, known to `data/sources.py` as
`scenes:COUNT?size=64&split=val`.

The label is the kind of the main object: a shape together with its texture, so that a crop too
small to show the outline still shows the class. Colours, ground, pose, light and the small objects
around it say nothing about the label. (Measured at 64 pixels, k-NN with 2,000 scenes: raw pixels
21 %, colour statistics 9 %, histograms of oriented gradients 95 %.)

Images per second and core (Xeon, OpenCV 5.0): 2,080 at 64 pixels, 1,170 at 128, 490 at 256, 136 at
512. The first 100 images of a process cost 0.2 s (64 pixels) to 2.7 s (512) more: textures are
drawn once. Pixels depend on OpenCV's version (4.11: off by 0.07 levels on average, 4 at most);
labels, masks and captions do not.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import SupportsIndex

import cv2
import numpy as np
from jaxtyping import Int, UInt8

from dinojax.data.options import check_options, nearest
from dinojax.data.scenes.draw import Scene, draw
from dinojax.data.scenes.parts import KINDS
from dinojax.data.scenes.spec import SceneSpec, describe, even
from dinojax.data.scenes.video import Video, video
from dinojax.data.scenes.views import ViewPair, view_pair

SPLITS = ("train", "val", "test")
CLASSES = tuple(f"{texture} {shape}" for shape, texture in KINDS)
DEFAULTS = {"size": "64", "split": "train", "seed": "0", "even": "0", "bands": "3"}


@dataclass(frozen=True)
class SceneSource:
    """`count` scenes as a data source; holds a few numbers, so it costs nothing to send around."""

    count: int
    size: int
    stream: int
    split: str
    even: bool = False
    bands: int = 3

    classes = CLASSES

    def __len__(self) -> int:
        return self.count

    def _checked(self, index: SupportsIndex) -> int:
        number = index.__index__()  # samplers hand over numpy integers
        if not 0 <= number < self.count:
            raise IndexError(f"Scene {number} asked for, but there are {self.count} (from 0).")
        return number

    def spec(self, index: SupportsIndex) -> SceneSpec:
        spec = describe(self.stream, self._checked(index))
        return even(spec) if self.even else spec

    def scene(self, index: SupportsIndex) -> Scene:
        """Image, label, instance mask and description; `data/scenes/labels.py` tells the rest."""
        return draw(self.spec(index), self.size, self.bands)

    def pair(self, index: SupportsIndex) -> ViewPair:
        """The scene and a second view of it, with corresponding points."""
        return view_pair(self.spec(index), self.size, self.bands)

    def video(self, index: SupportsIndex, frames: int = 16) -> Video:
        """The scene in motion, with instance masks."""
        return video(self.spec(index), self.size, frames, self.bands)

    def encoded(self, index: SupportsIndex) -> bytes:
        """The image as PNG, or as NPY if it has more than three bands."""
        image = self.image(index)
        if self.bands == 3:
            return cv2.imencode(".png", image[..., ::-1])[1].tobytes()
        np.save(file := io.BytesIO(), image)
        return file.getvalue()

    def image(self, index: SupportsIndex) -> UInt8[np.ndarray, "i j c"]:
        return self.scene(index).image

    def label(self, index: SupportsIndex) -> int:
        return self._checked(index) % len(CLASSES)

    def labels(self) -> Int[np.ndarray, " count"]:
        return np.arange(self.count) % len(CLASSES)

    def name(self, index: SupportsIndex) -> str:
        return f"scenes/{self.split}/{self._checked(index)}"


def _whole_number(options: Mapping[str, str], key: str, least: int) -> int:
    try:
        value = int(options[key])
    except ValueError:
        value = least - 1
    if value < least:
        raise ValueError(
            f"scenes: {key}={options[key]!r} should be a whole number of at least {least}."
        )
    return value


def open_scenes(count: int = 10_000, options: Mapping[str, str] | None = None) -> SceneSource:
    """A source of `count` scenes; options as text.

    size (64), split (train, val, test), seed (0), even (0; 1 for evenly lit greys: pattern and
    outline alone tell scenes apart, see `scenes.spec.even`), bands (3; more add bands that tell the
    colours' names and the textures, see `scenes.parts.signature`).
    """
    check_options("scenes", options or {}, tuple(DEFAULTS))
    if count < 1:
        raise ValueError(f"scenes: a count of {count} was asked for; it should be at least 1.")
    chosen = {**DEFAULTS, **(options or {})}
    if chosen["split"] not in SPLITS:
        hint = nearest(chosen["split"], SPLITS)
        raise ValueError(f"scenes: split={chosen['split']!r} is none of its splits; {hint}")
    seed = _whole_number(chosen, "seed", 0)
    return SceneSource(
        count=count,
        size=_whole_number(chosen, "size", 16),
        stream=seed * len(SPLITS) + SPLITS.index(chosen["split"]),
        split=chosen["split"],
        even=_whole_number(chosen, "even", 0) > 0,
        bands=_whole_number(chosen, "bands", 3),
    )
