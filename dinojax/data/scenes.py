"""The embedded data set: textured shapes on patterned grounds, drawn on the fly, always the same.

A scene is first *described* (`describe`: which shapes, textures, colours, poses) and then *drawn*
(`draw`), so anything a task may ask of a scene follows from its description. `open_scenes` makes a
source of it, known to `data/sources.py` as `scenes:COUNT?size=64&split=val`.

The label is the kind of the main object: a shape together with its texture, so that a crop too
small to show the outline still shows the class. Colours, ground, pose, light and the small objects
around it say nothing about the label. (Measured at 64 pixels, k-NN with 2,000 scenes: raw pixels
21 %, colour statistics 9 %, histograms of oriented gradients 95 %.)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, SupportsIndex

import cv2
import numpy as np
from jaxtyping import Float, Int, UInt8

from dinojax.data.scene_parts import (
    CELLS,
    COLOURS,
    CREAM,
    INK,
    KINDS,
    SHAPES,
    outline,
    tile,
    tile_level,
)

SPLITS = ("train", "val", "test")
CLASSES = tuple(f"{texture} {shape}" for shape, texture in KINDS)
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
DEFAULTS = {"size": "64", "split": "train", "seed": "0", "even": "0"}
Colour = tuple[float, float, float]


@dataclass(frozen=True)
class ObjectSpec:
    """One object. Lengths are fractions of the frame's side; the origin is the top left corner."""

    shape: str
    texture: str
    colour: str
    tones: tuple[Colour, Colour]  # RGB in 0..255 where the texture is 0 and where it is 1
    centre: tuple[float, float]  # x, y
    scale: float  # square root of the area it would cover unclipped
    rotation: float  # degrees, clockwise
    cell: float  # side of a texture cell
    phase: tuple[float, float]  # where the texture starts, in cells
    depth: float  # distance from the camera: the ground is at 1, smaller is nearer


@dataclass(frozen=True)
class GroundSpec:
    """The ground: a faint pattern in two tones."""

    texture: str
    colour: str
    tones: tuple[Colour, Colour]
    rotation: float
    cell: float
    phase: tuple[float, float]


@dataclass(frozen=True)
class SceneSpec:
    """A scene in words and numbers. `objects[0]` is the main object, the one the label names."""

    label: int
    ground: GroundSpec
    objects: tuple[ObjectSpec, ...]
    light: tuple[float, float]  # direction (x, y) in which it gets brighter, length = strength


@dataclass(frozen=True)
class Scene:
    """A drawn scene; `mask` is 0 on the ground and n + 1 where `spec.objects[n]` is in front."""

    image: UInt8[np.ndarray, "i j 3"]
    label: int
    mask: UInt8[np.ndarray, "i j"]
    spec: SceneSpec


# --- description ---------------------------------------------------------------------------------


def _mix(a: Colour, b: Colour, amount: float) -> Colour:
    return tuple(x + amount * (y - x) for x, y in zip(a, b, strict=True))


def _uniforms(seed: int, index: int) -> Callable[..., float]:
    """A function that draws U(low, high). The stream depends on seed and index alone."""
    bits = np.random.Philox(key=np.array([seed, index], np.uint64))
    following = iter(np.random.Generator(bits).random(96).tolist()).__next__
    return lambda low=0.0, high=1.0: low + (high - low) * following()


def _choice(draw: Callable[..., float], options: tuple[Any, ...]) -> Any:
    return options[int(draw() * len(options))]


def _tones(draw: Callable[..., float], colour: str) -> tuple[Colour, Colour]:
    """A varied shade of a named colour and a much lighter or darker companion, in either order."""
    base = tuple(value + draw(-14, 14) for value in COLOURS[colour])
    if draw() < 0.5:
        pair = (_mix(base, INK, draw(0.0, 0.15)), _mix(base, CREAM, draw(0.7, 0.95)))
    else:
        pair = (_mix(base, CREAM, draw(0.0, 0.3)), _mix(base, INK, draw(0.6, 0.85)))
    return pair if draw() < 0.5 else pair[::-1]


def _describe_ground(draw: Callable[..., float], colours: tuple[str, ...]) -> GroundSpec:
    colour = _choice(draw, colours)
    base = _mix(COLOURS[colour], CREAM, draw(0.35, 0.7))
    if draw() < 0.4:
        base = _mix(COLOURS[colour], INK, draw(0.3, 0.6))
    second = _mix(base, CREAM if draw() < 0.5 else INK, draw(0.06, 0.16))
    texture = _choice(draw, ("plain", "striped", "chequered", "dotted", "gridded", "mottled"))
    phase = (draw(0, CELLS), draw(0, CELLS))
    return GroundSpec(texture, colour, (base, second), draw(0, 360), draw(0.1, 0.3), phase)


def _describe_object(
    draw: Callable[..., float], kind: tuple[str, str], colour: str, small: bool
) -> ObjectSpec:
    scale = draw(0.1, 0.17) if small else draw(0.55, 0.9)
    reach = (0.06, 0.94) if small else (0.35, 0.65)
    return ObjectSpec(
        shape=kind[0],
        texture=kind[1],
        colour=colour,
        tones=_tones(draw, colour),
        centre=(draw(*reach), draw(*reach)),
        scale=scale,
        rotation=draw(0, 360) if small else draw(-45, 45),
        cell=scale * draw(0.16, 0.22),
        phase=(draw(0, CELLS), draw(0, CELLS)),
        depth=draw(0.4, 0.9) if small else draw(0.5, 0.8),
    )


def describe(seed: int, index: int) -> SceneSpec:
    """The scene number `index` of a stream. Labels go round, so that every prefix is balanced."""
    draw = _uniforms(seed, index)
    label = index % len(KINDS)
    colours = tuple(COLOURS)
    colour = _choice(draw, colours)
    others = tuple(name for name in colours if name != colour)
    ground = _describe_ground(draw, others)
    objects = [_describe_object(draw, KINDS[label], colour, small=False)]
    for _ in range(int(draw(0, 4))):
        kind = (_choice(draw, SHAPES), "plain")
        objects.append(_describe_object(draw, kind, _choice(draw, others), small=True))
    angle, strength = draw(0, 2 * np.pi), draw(0.1, 0.5)
    light = (float(strength * np.cos(angle)), float(strength * np.sin(angle)))
    return SceneSpec(label, ground, tuple(objects), light)


def even(spec: SceneSpec) -> SceneSpec:
    """The scene in evenly lit greys: every surface keeps its contrast but is mid-grey on average.

    What is left to tell scenes apart is pattern and outline, and so the label. (In the tones of
    `describe` two crops of a scene are first recognised by their colour or brightness, which say
    nothing about the label; a short self-supervised run learns those and stops.)
    """
    ground = replace(spec.ground, tones=_even_tones(spec.ground))
    objects = tuple(replace(thing, tones=_even_tones(thing)) for thing in spec.objects)
    return replace(spec, ground=ground, objects=objects, light=(0.0, 0.0))


def _even_tones(thing: ObjectSpec | GroundSpec) -> tuple[Colour, Colour]:
    """Two greys whose mean over the texture is 128, at 0.8 of the luma contrast of the tones."""
    first, second = (float(np.dot(tone, LUMA)) for tone in thing.tones)
    contrast = 0.8 * (second - first)  # 0.8: neither black nor white is reached
    share = float(tile(thing.texture, 16).mean()) / 255  # of the second tone
    grey = 128.0 - share * contrast
    return (grey,) * 3, (grey + contrast,) * 3


# --- drawing -------------------------------------------------------------------------------------


def pose(thing: ObjectSpec) -> Float[np.ndarray, "2 3"]:
    """Affine map from the object's own frame (area 1, centred) to frame coordinates (x, y)."""
    angle = np.deg2rad(thing.rotation)
    cos, sin = thing.scale * np.cos(angle), thing.scale * np.sin(angle)
    return np.array([[cos, -sin, thing.centre[0]], [sin, cos, thing.centre[1]]])


def _coverage(
    thing: ObjectSpec, size: int, box: tuple[int, int, int, int]
) -> Float[np.ndarray, "i j"]:
    """How much of each pixel of the box (x0, y0, x1, y1) an object covers, 0..1, float32."""
    over = (
        4 if size <= 160 else 2
    )  # supersampling: cv2's own antialiasing fattens shapes by a pixel
    x0, y0, x1, y1 = box
    matrix, corner = pose(thing), np.array([x0, y0])
    canvas = np.zeros(((y1 - y0) * over, (x1 - x0) * over), np.uint8)
    contours = []
    for contour in outline(thing.shape):
        pixels = (contour @ matrix[:, :2].T + matrix[:, 2]) * size - corner
        contours.append(np.rint((pixels * over - 0.5) * 16).astype(np.int32))
    cv2.fillPoly(canvas, contours, 255, shift=4)  # even-odd: a second contour is a hole
    small = cv2.resize(canvas, (x1 - x0, y1 - y0), interpolation=cv2.INTER_AREA)
    return small.astype(np.float32) * np.float32(1 / 255)


def _texture(
    thing: ObjectSpec | GroundSpec,
    centre: tuple[float, float],
    size: int,
    box: tuple[int, int, int, int],
) -> Float[np.ndarray, "i j 1"]:
    """The thing's texture on the pixels of the box, 0..1: its tile, turned and repeated."""
    x0, y0, x1, y1 = box
    level = tile_level(thing.cell * size)
    texels = level / (thing.cell * size)  # per pixel
    angle = np.deg2rad(thing.rotation)
    cos, sin = texels * np.cos(angle), texels * np.sin(angle)
    cx, cy = centre[0] * size - x0 - 0.5, centre[1] * size - y0 - 0.5
    shift = np.array(thing.phase) * level - 0.5  # texel k covers k .. k + 1
    inverse = np.array([[cos, sin, shift[0]], [-sin, cos, shift[1]]])
    inverse[:, 2] -= inverse[:, :2] @ np.array([cx, cy])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    source = tile(thing.texture, level)
    drawn = cv2.warpAffine(
        source, inverse, (x1 - x0, y1 - y0), flags=flags, borderMode=cv2.BORDER_WRAP
    )
    return drawn.astype(np.float32)[..., None] * np.float32(1 / 255)


@lru_cache
def _ramps(size: int) -> tuple[Float[np.ndarray, "1 j 1"], Float[np.ndarray, "i 1 1"]]:
    line = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    return line[None, :, None], line[:, None, None]


def _box(thing: ObjectSpec, size: int) -> tuple[int, int, int, int]:
    """Pixels (x0, y0, x1, y1) that an object and its shadow can touch, inside the frame."""
    matrix = pose(thing)
    corners = outline(thing.shape)[0] @ matrix[:, :2].T + matrix[:, 2]
    low = np.floor(corners.min(0) * size - 1).astype(int).clip(0, size)
    high = np.ceil(corners.max(0) * size + 1 + _shadow(thing, size) * 3).astype(int).clip(0, size)
    return int(low[0]), int(low[1]), int(high[0]), int(high[1])


def _shadow(thing: ObjectSpec, size: int) -> int:
    """How far the shadow falls, in pixels: near and large objects stand further off the ground."""
    return max(1, round(0.1 * thing.scale * (1 - thing.depth) * size))


def _paint(canvas: np.ndarray, mask: np.ndarray, thing: ObjectSpec, number: int) -> None:
    """Draw one object with its shadow over the canvas, and its number into the mask."""
    size = mask.shape[0]
    x0, y0, x1, y1 = box = _box(thing, size)
    if x0 >= x1 or y0 >= y1:
        return
    cover = _coverage(thing, size, box)
    patch = canvas[y0:y1, x0:x1]
    far = _shadow(thing, size)
    shadow = cv2.blur(cover, (2 * far + 1, 2 * far + 1), borderType=cv2.BORDER_REPLICATE)
    patch[far:, far:] *= (1 - 0.4 * shadow[:-far, :-far])[..., None]
    first, second = (np.array(tone, np.float32) for tone in thing.tones)
    surface = first + _texture(thing, thing.centre, size, box) * (second - first)
    surface -= patch
    surface *= cover[..., None]
    patch += surface
    mask[y0:y1, x0:x1][cover > 0.5] = number


def draw(spec: SceneSpec, size: int) -> Scene:
    """Draw a described scene at any size, far objects first."""
    mask = np.zeros((size, size), np.uint8)
    first, second = (np.array(tone, np.float32) for tone in spec.ground.tones)
    whole = (0, 0, size, size)
    canvas = first + _texture(spec.ground, (0.5, 0.5), size, whole) * (second - first)
    order = sorted(range(len(spec.objects)), key=lambda n: -spec.objects[n].depth)
    for n in order:
        _paint(canvas, mask, spec.objects[n], n + 1)
    x, y = _ramps(size)
    canvas *= 1 + spec.light[0] * x + spec.light[1] * y
    image = cv2.convertScaleAbs(np.maximum(canvas, 0))  # rounds and saturates to uint8
    return Scene(image, spec.label, mask, spec)


def render(seed: int, index: int, size: int = 64) -> Scene:
    """Scene `index` of stream `seed`: image uint8 [size, size, 3], label, instance mask."""
    return draw(describe(seed, index), size)


# --- source --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SceneSource:
    """`count` scenes as a data source; holds a few numbers, so it costs nothing to send around."""

    count: int
    size: int
    stream: int
    split: str
    even: bool = False

    classes = CLASSES

    def __len__(self) -> int:
        return self.count

    def _checked(self, index: SupportsIndex) -> int:
        number = index.__index__()  # samplers hand over numpy integers
        if not 0 <= number < self.count:
            raise IndexError(f"Scene {number} asked for, but there are {self.count} (from 0).")
        return number

    def scene(self, index: SupportsIndex) -> Scene:
        spec = describe(self.stream, self._checked(index))
        return draw(even(spec) if self.even else spec, self.size)

    def encoded(self, index: SupportsIndex) -> bytes:
        """The image as PNG."""
        return cv2.imencode(".png", self.image(index)[..., ::-1])[1].tobytes()

    def image(self, index: SupportsIndex) -> UInt8[np.ndarray, "i j 3"]:
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
    outline alone tell scenes apart, see `even`).
    """
    unknown = set(options or {}) - set(DEFAULTS)
    if unknown:
        raise ValueError(f"scenes: unknown option {min(unknown)!r}; there are {sorted(DEFAULTS)}.")
    if count < 1:
        raise ValueError(f"scenes: a count of {count} was asked for; it should be at least 1.")
    chosen = {**DEFAULTS, **(options or {})}
    if chosen["split"] not in SPLITS:
        raise ValueError(f"scenes: split={chosen['split']!r} should be one of {SPLITS}.")
    seed = _whole_number(chosen, "seed", 0)
    stream = seed * len(SPLITS) + SPLITS.index(chosen["split"])
    greys = _whole_number(chosen, "even", 0) > 0
    return SceneSource(count, _whole_number(chosen, "size", 16), stream, chosen["split"], greys)
