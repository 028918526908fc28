"""From the description of a scene to its pixels and its instance mask.

Called by `data/scenes.py` for images, and by `data/scenes/labels.py`, `scenes.views.py` and
`scenes.video.py` for all else. Drawing goes band by band, [c, i, j]: numpy and OpenCV are two to
three times as fast on whole rows as on three values a pixel, and the results are the same.
"""

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8

from dinojax.data.scenes.parts import outline, signature, tile, tile_level
from dinojax.data.scenes.spec import GroundSpec, ObjectSpec, SceneSpec, describe

Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels


@dataclass(frozen=True)
class Scene:
    """A drawn scene; `mask` is 0 on the ground and n + 1 where `spec.objects[n]` is in front."""

    image: UInt8[np.ndarray, "i j c"]
    label: int
    mask: UInt8[np.ndarray, "i j"]
    spec: SceneSpec


def pose(thing: ObjectSpec) -> Float[np.ndarray, "2 3"]:
    """Affine map from the object's own frame (area 1, centred) to frame coordinates (x, y)."""
    angle = np.deg2rad(thing.rotation)
    cos, sin = thing.scale * np.cos(angle), thing.scale * np.sin(angle)
    return np.array([[cos, -sin, thing.centre[0]], [sin, cos, thing.centre[1]]])


def footprint(thing: ObjectSpec, size: int) -> Bool[np.ndarray, "i j"]:
    """The pixels of the frame that an object would cover if nothing were in front of it."""
    x0, y0, x1, y1 = box = _box(thing, size)
    covered = np.zeros((size, size), bool)
    if x0 < x1 and y0 < y1:
        covered[y0:y1, x0:x1] = _coverage(thing, size, box) > 0.5
    return covered


def whole_area(thing: ObjectSpec, size: int) -> int:
    """How many pixels an object would cover if neither others nor the frame hid any."""
    return int((_coverage(thing, size, _box(thing, size, inside=False)) > 0.5).sum())


def _coverage(thing: ObjectSpec, size: int, box: Box) -> Float32[np.ndarray, "i j"]:
    """How much of each pixel of the box an object covers, 0..1."""
    # Supersampled: cv2's own antialiasing fattens shapes by a pixel.
    over = 4 if size <= 160 else 2
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
    thing: ObjectSpec | GroundSpec, centre: tuple[float, float], size: int, box: Box
) -> UInt8[np.ndarray, "i j"]:
    """The thing's texture on the pixels of the box: its tile, turned and repeated."""
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
    return cv2.warpAffine(
        source, inverse, (x1 - x0, y1 - y0), flags=flags, borderMode=cv2.BORDER_WRAP
    )


def _tables(thing: ObjectSpec | GroundSpec, bands: int) -> Float32[np.ndarray, "bands 256"]:
    """What the levels 0..255 of the thing's texture look like in each band."""
    extra = [signature(thing.colour, thing.texture, band) for band in range(3, bands)]
    pairs = np.array([*zip(*thing.tones, strict=True), *extra], np.float32)
    first, second = pairs[:, :1], pairs[:, 1:]
    return first + np.arange(256, dtype=np.float32) * np.float32(1 / 255) * (second - first)


@lru_cache
def _ramp(size: int) -> Float32[np.ndarray, " size"]:
    return (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5


def brightness(light: tuple[float, float], size: int) -> Float32[np.ndarray, "i j"]:
    """The factor by which a light brightens each pixel, 1 in the middle."""
    ramp = _ramp(size)
    return 1 + light[0] * ramp[None, :] + light[1] * ramp[:, None]


def _box(thing: ObjectSpec, size: int, inside: bool = True) -> Box:
    """Pixels that an object and its shadow can touch, inside the frame or altogether."""
    matrix = pose(thing)
    corners = outline(thing.shape)[0] @ matrix[:, :2].T + matrix[:, 2]
    low = np.floor(corners.min(0) * size - 1).astype(int)
    high = np.ceil(corners.max(0) * size + 1 + _shadow(thing, size) * 3).astype(int)
    if inside:
        low, high = low.clip(0, size), high.clip(0, size)
    return int(low[0]), int(low[1]), int(high[0]), int(high[1])


def _shadow(thing: ObjectSpec, size: int) -> int:
    """How far the shadow falls, in pixels: near and large objects stand further off the ground."""
    return max(1, round(0.1 * thing.scale * (1 - thing.depth) * size))


def _paint(
    canvas: Float32[np.ndarray, "c i j"],
    mask: UInt8[np.ndarray, "i j"],
    thing: ObjectSpec,
    number: int,
) -> None:
    """Draw one object with its shadow over the canvas, and its number into the mask."""
    size = mask.shape[0]
    x0, y0, x1, y1 = box = _box(thing, size)
    if x0 >= x1 or y0 >= y1:
        return
    cover = _coverage(thing, size, box)
    far = _shadow(thing, size)
    shadow = cv2.blur(cover, (2 * far + 1, 2 * far + 1), borderType=cv2.BORDER_REPLICATE)
    dimmed = 1 - 0.4 * shadow[:-far, :-far]
    drawn = _texture(thing, thing.centre, size, box)
    for plane, table in zip(canvas, _tables(thing, len(canvas)), strict=True):
        patch = plane[y0:y1, x0:x1]
        patch[far:, far:] *= dimmed
        surface = cv2.LUT(drawn, table)
        surface -= patch
        surface *= cover
        patch += surface
    mask[y0:y1, x0:x1][cover > 0.5] = number


def draw(spec: SceneSpec, size: int, bands: int = 3) -> Scene:
    """Draw a described scene at any size, far objects first.

    Bands from the fourth on show the `signature` of every surface; the first three do not change.
    """
    mask = np.zeros((size, size), np.uint8)
    ground = _texture(spec.ground, (0.5, 0.5), size, (0, 0, size, size))
    canvas = np.stack([cv2.LUT(ground, table) for table in _tables(spec.ground, bands)])
    for n in sorted(range(len(spec.objects)), key=lambda n: -spec.objects[n].depth):
        _paint(canvas, mask, spec.objects[n], n + 1)
    light = brightness(spec.light, size)
    image = np.empty((size, size, bands), np.uint8)
    for band, plane in enumerate(canvas):
        plane *= light
        # rounds and saturates to uint8
        image[..., band] = cv2.convertScaleAbs(np.maximum(plane, 0, out=plane))
    return Scene(image, spec.label, mask, spec)


def render(seed: int, index: int, size: int = 64) -> Scene:
    """Scene `index` of stream `seed`: image uint8 [size, size, 3], label, instance mask."""
    return draw(describe(seed, index), size)
