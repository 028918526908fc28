"""What scenes are made of: outlines, textures and colours. Used by `data/scenes.py`."""

from functools import lru_cache

import cv2
import numpy as np
from jaxtyping import Float, UInt8

CELLS = 8  # cells of a texture per side of its tile
_LEVELS = (4, 8, 16, 32, 64, 128)  # texels per cell

COLOURS = {
    "red": (214.0, 62.0, 66.0),
    "orange": (240.0, 136.0, 52.0),
    "yellow": (246.0, 202.0, 68.0),
    "green": (84.0, 166.0, 88.0),
    "teal": (40.0, 158.0, 156.0),
    "blue": (58.0, 112.0, 202.0),
    "purple": (130.0, 84.0, 190.0),
    "pink": (234.0, 118.0, 170.0),
    "brown": (142.0, 96.0, 64.0),
    "grey": (136.0, 140.0, 148.0),
}
CREAM = (252.0, 248.0, 236.0)
INK = (26.0, 28.0, 44.0)


# --- outlines: polygons around the origin, y downwards as in images -----------------------------


def _arc(radius: float, start: float = 0.0, stop: float = 360.0, points: int = 48) -> np.ndarray:
    angle = np.deg2rad(np.linspace(start, stop, points, endpoint=stop - start < 360.0))
    return radius * np.stack([np.cos(angle), np.sin(angle)], 1)


def _spokes(radii: tuple[float, ...], corners: int) -> np.ndarray:
    """Corners at equal angles, the first one upwards, the radii taken in turn."""
    angle = 2 * np.pi * np.arange(corners) / corners - np.pi / 2
    radius = np.resize(radii, corners)
    return radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y - 2], 1) / 16


def _crescent() -> np.ndarray:
    outer = _arc(1.0, 48.0, 312.0)
    bite = np.array([np.cos(np.deg2rad(48)) + 0.5, 0.0])  # a larger circle through both tips
    tip = outer[0] - bite
    radius, angle = float(np.hypot(*tip)), float(np.rad2deg(np.arctan2(tip[1], tip[0])))
    inner = _arc(radius, 360.0 - angle, angle) + bite
    return np.concatenate([outer, inner[1:-1]]) + np.array([0.17, 0.0])


_CROSS = [(-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1), (-1, -3)]
_CROSS += [(-x, -y) for x, y in _CROSS]
_ARROW = [(0, -1), (0.95, 0), (0.42, 0), (0.42, 1), (-0.42, 1), (-0.42, 0), (-0.95, 0)]
_OUTLINES = {
    "disc": lambda: [_arc(1.0)],
    "square": lambda: [_spokes((1.0,), 4) @ (np.array([[1, 1], [-1, 1]]) / np.sqrt(2))],
    "triangle": lambda: [_spokes((1.0,), 3)],
    "star": lambda: [_spokes((1.0, 0.48), 10)],
    "ring": lambda: [_arc(1.0), _arc(0.42)],
    "cross": lambda: [np.array(_CROSS) / 3],
    "heart": lambda: [_heart()],
    "hexagon": lambda: [_spokes((1.0,), 6)],
    "crescent": lambda: [_crescent()],
    "arrow": lambda: [np.array(_ARROW)],
}
SHAPES = tuple(_OUTLINES)


@lru_cache
def outline(shape: str) -> tuple[Float[np.ndarray, "corners 2"], ...]:
    """Contours (x, y) of a shape of area 1; a second contour is a hole."""
    contours = [contour.astype(np.float64) for contour in _OUTLINES[shape]()]
    areas = []
    for x, y in (contour.T for contour in contours):
        areas.append(abs(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1))) / 2)
    return tuple(c / np.sqrt(areas[0] - sum(areas[1:])) for c in contours)


# --- textures: 0 is the first colour, 1 the second; u is a row and v a column, in cells ----------


def _triangle_wave(x: np.ndarray) -> np.ndarray:
    return np.abs(x % 2 - 1)


def _bricks(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    row = np.floor(v)
    return (v % 1 < 0.2) | ((u / 2 + 0.5 * (row % 2)) % 1 < 0.1)


def _crosses(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    x, y = np.abs(u % 1 - 0.5), np.abs(v % 1 - 0.5)
    return (np.minimum(x, y) < 0.13) & (np.maximum(x, y) < 0.4)


def _blobs(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Level set of a sum of waves with whole numbers of periods per tile, so that it tiles.

    By cos(x + y) = cos x cos y - sin x sin y the sum is two products of matrices: 0.2 s instead of
    7.4 for the largest tile.
    """
    generator = np.random.RandomState(7)  # the legacy stream is frozen for good
    angle, start = generator.uniform(0, 2 * np.pi, (24, 2)).T
    x = 2 * np.pi / CELLS * np.rint(6.0 * np.cos(angle))[:, None] * u
    y = 2 * np.pi / CELLS * np.rint(6.0 * np.sin(angle)) * v + start
    return np.cos(y) @ np.cos(x) > np.sin(y) @ np.sin(x)


def _rings(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    radius = np.hypot(u / 2 % 1 - 0.5, v / 2 % 1 - 0.5)
    return (radius < 0.13) | ((radius > 0.27) & (radius < 0.42))


PATTERNS = {
    "plain": lambda u, v: np.zeros_like(u),
    "striped": lambda u, v: u % 1 < 0.5,
    "dotted": lambda u, v: np.hypot(u % 1 - 0.5, v % 1 - 0.5) < 0.34,
    "chequered": lambda u, v: (np.floor(u) + np.floor(v)) % 2,
    "ringed": _rings,
    "zigzag": lambda u, v: (v + 0.9 * _triangle_wave(u)) % 1 < 0.5,
    "gridded": lambda u, v: (u % 1 < 0.24) | (v % 1 < 0.24),
    "mottled": _blobs,
    "toothed": lambda u, v: 2 * np.abs(u % 1 - 0.5) < v % 1,
    "crossed": _crosses,
    "bricked": _bricks,
}


@lru_cache
def tile(texture: str, level: int) -> UInt8[np.ndarray, "i j"]:
    """One period of a texture, antialiased, with `level` texels per cell."""
    side = CELLS * level * 4
    line = (np.arange(side) + 0.5) * (CELLS / side)
    drawn = np.asarray(PATTERNS[texture](line[None, :], line[:, None]), np.float32) * 255
    whole = np.ascontiguousarray(np.broadcast_to(drawn, (side, side)))
    small = cv2.resize(whole, (side // 4, side // 4), interpolation=cv2.INTER_AREA)
    return np.rint(small).astype(np.uint8)


def tile_level(cell_pixels: float) -> int:
    """The smallest tile that does not blur a cell drawn this many pixels wide."""
    return next((level for level in _LEVELS if level >= cell_pixels), _LEVELS[-1])


# --- more bands than red, green and blue ---------------------------------------------------------


@lru_cache
def signature(colour: str, texture: str, band: int) -> tuple[float, float]:
    """What a surface returns in band 3, 4, ... (0..255) where its texture is 0 and where it is 1.

    The colour's name decides the mean over the surface (grey is 128 in all bands), the texture the
    contrast between its two tones. Every shade of a colour is alike here: what light and dark red
    have in common shows in these bands alone.
    """
    turn = band - 2
    mean = 128 + 60 * np.cos(2.4 * turn * (1 + list(COLOURS).index(colour)))
    contrast = 50 * np.cos(1.7 * turn * (1 + list(PATTERNS).index(texture)))
    if colour == "grey":
        mean = 128.0
    first = mean - contrast * tile(texture, 16).mean() / 255
    return float(first), float(first + contrast)


# The classes: a shape and its texture.
KINDS = (
    ("disc", "striped"),
    ("square", "dotted"),
    ("triangle", "chequered"),
    ("star", "ringed"),
    ("ring", "zigzag"),
    ("cross", "gridded"),
    ("heart", "mottled"),
    ("hexagon", "toothed"),
    ("crescent", "crossed"),
    ("arrow", "bricked"),
)
