"""A second view of a scene whose every pixel's partner is known: for correspondence evaluation.

The camera turns, moves and tilts a little, the light comes from elsewhere, the colours shift. The
scene is taken as a plane, so one homography maps the first view onto the second. Called through
`SceneSource.pair`.

Points are (x, y) in pixels; pixel (row i, column j) covers x in j..j + 1 and y in i..i + 1, as for
boxes.
"""

from dataclasses import dataclass, replace

import cv2
import numpy as np
from jaxtyping import Bool, Float, Float64, UInt8

from dinojax.data.scenes.draw import brightness, draw
from dinojax.data.scenes.spec import VIEWS, Draw, ObjectSpec, SceneSpec, uniforms

GRID = 8  # points per side
WIDE = 2  # how much wider than the frame the scene is drawn for the second view
FINE = 1.5  # and how much finer, since it is resampled


@dataclass(frozen=True)
class ViewPair:
    """Two views of a scene and n corresponding points; `homography` leads from first to second."""

    first: UInt8[np.ndarray, "i j c"]  # the scene as it is in the source
    second: UInt8[np.ndarray, "i j c"]
    masks: UInt8[np.ndarray, "2 i j"]  # instances in both views, with the same numbers
    homography: Float64[np.ndarray, "3 3"]
    points: Float64[np.ndarray, "n 2"]  # in the first view
    matches: Float64[np.ndarray, "n 2"]  # the same points of the scene in the second view
    visible: Bool[np.ndarray, " n"]  # whether the match lies inside the second view


def view_pair(spec: SceneSpec, size: int, bands: int = 3) -> ViewPair:
    """The scene as it is and seen anew; 64 points, one somewhere in each cell of an 8 x 8 grid."""
    uniform = uniforms(spec.key, VIEWS)
    unit = _camera(uniform)
    gains = np.array([uniform(0.93, 1.07) for _ in range(bands)], np.float32)
    angle, strength = uniform(0, 2 * np.pi), uniform(0.1, 0.5)
    light = (float(strength * np.cos(angle)), float(strength * np.sin(angle)))
    cells = np.stack(np.meshgrid(*[np.arange(GRID)] * 2), -1).reshape(-1, 2)
    points = (cells + np.array([[uniform(), uniform()] for _ in cells])) * (size / GRID)

    first = draw(spec, size, bands)
    second, mask = _seen_anew(spec, unit, size, bands)
    second = second * (brightness(light, size)[..., None] * gains)
    to_pixels = np.diag([size, size, 1.0])
    homography = to_pixels @ unit @ np.linalg.inv(to_pixels)
    matches = transform(homography, points)
    return ViewPair(
        first=first.image,
        second=np.rint(second.clip(0, 255)).astype(np.uint8),
        masks=np.stack([first.mask, mask]),
        homography=homography,
        points=points,
        matches=matches,
        visible=((matches >= 0) & (matches < size)).all(1),
    )


def transform(
    homography: Float64[np.ndarray, "3 3"], points: Float[np.ndarray, "n 2"]
) -> Float64[np.ndarray, "n 2"]:
    """Where a homography takes points (x, y)."""
    mapped = np.concatenate([points, np.ones((len(points), 1))], 1) @ homography.T
    return mapped[:, :2] / mapped[:, 2:]


def _camera(uniform: Draw) -> Float64[np.ndarray, "3 3"]:
    """A homography of the unit frame: turn, zoom and tilt about the middle, then a shift.

    Within these bounds the second view never leaves what is drawn for it (`WIDE`).
    """
    angle, zoom = np.deg2rad(uniform(-25, 25)), uniform(0.95, 1.3)
    cos, sin = zoom * np.cos(angle), zoom * np.sin(angle)
    about_the_middle = np.array(
        [[cos, -sin, 0.0], [sin, cos, 0.0], [uniform(-0.15, 0.15), uniform(-0.15, 0.15), 1.0]]
    )
    shift = np.array([uniform(-0.08, 0.08), uniform(-0.08, 0.08)])
    return _moved(0.5 + shift) @ about_the_middle @ _moved(np.array([-0.5, -0.5]))


def _moved(shift: Float64[np.ndarray, "2"]) -> Float64[np.ndarray, "3 3"]:
    matrix = np.eye(3)
    matrix[:2, 2] = shift
    return matrix


def _seen_anew(
    spec: SceneSpec, unit: Float64[np.ndarray, "3 3"], size: int, bands: int
) -> tuple[UInt8[np.ndarray, "i j c"], UInt8[np.ndarray, "i j"]]:
    """Pixels, without light, and instances of the second view."""
    side = round(WIDE * FINE * size)
    wide = draw(_from_afar(spec), side, bands)
    # cv2 counts pixels from their centres: pixel k is (k + 0.5) / side along the wide drawing.
    from_wide = np.array([[WIDE / side, 0, 0], [0, WIDE / side, 0], [0, 0, 1.0]])
    from_wide[:2, 2] = 0.5 * WIDE / side - (WIDE - 1) / 2
    to_view = np.array([[size, 0, -0.5], [0, size, -0.5], [0, 0, 1.0]])
    matrix = to_view @ unit @ from_wide
    planes = [
        cv2.warpPerspective(np.ascontiguousarray(plane), matrix, (size, size))
        for plane in np.moveaxis(wide.image, -1, 0)
    ]
    mask = cv2.warpPerspective(wide.mask, matrix, (size, size), flags=cv2.INTER_NEAREST)
    return np.stack(planes, -1), mask


def _from_afar(spec: SceneSpec) -> SceneSpec:
    """The same scene, `WIDE` times as much of it in the frame, without light."""

    def shrunk(thing: ObjectSpec) -> ObjectSpec:
        x, y = (0.5 + (c - 0.5) / WIDE for c in thing.centre)
        return replace(thing, centre=(x, y), scale=thing.scale / WIDE, cell=thing.cell / WIDE)

    ground = replace(spec.ground, cell=spec.ground.cell / WIDE)
    return replace(spec, ground=ground, objects=tuple(map(shrunk, spec.objects)), light=(0.0, 0.0))
