"""Pictures of patch features: PCA maps, similarity to one patch, contact sheets.

Plain numpy and Pillow on arrays that are already there; called by `train.py` during a run, by
`dinojax visualize` on a finished backbone, and by `data_pictures`. Every picture is a uint8 array
[rows, columns, 3], which `save` writes.
"""

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Float, UInt8
from matplotlib import colormaps
from PIL import Image, ImageDraw, ImageFont

from dinojax.data.decode import UnreadableImage
from dinojax.data.sources import Source

_TILE = 192  # least side of a picture in a sheet, in pixels
_GAP = 8
_PAPER = 255
_FIT_ROWS = 4096  # patches that PCA is fitted on: more cost time and change nothing one can see


class Projection(NamedTuple):
    """Three principal directions, with the colour range that each fills."""

    mean: Float[np.ndarray, " d"]
    components: Float[np.ndarray, "3 d"]
    low: Float[np.ndarray, " 3"]
    high: Float[np.ndarray, " 3"]

    def colours(self, features: Float[np.ndarray, "*n d"]) -> UInt8[np.ndarray, "*n 3"]:
        """Patch features -> RGB. The same projection paints other images in the same colours."""
        scores = (features - self.mean) @ self.components.T
        unit = (scores - self.low) / np.maximum(self.high - self.low, 1e-12)
        return np.round(255 * np.clip(unit, 0, 1)).astype(np.uint8)


def fixed_images(source: Source, count: int, size: int) -> UInt8[np.ndarray, "n size size c"]:
    """`count` images spread evenly over a source, at one size: the same ones at every call.

    An unreadable one gives its place to the next readable one.
    """
    from dinojax.eval.common import fit  # here, because it imports jax: sheets need none

    chosen: list[np.ndarray] = []
    # One further each time: an even stride may meet a single class of a source in class order.
    turns = np.arange(count)
    for start in turns * len(source) // count + turns % max(1, len(source) // count):
        for row in range(start, len(source)):
            try:
                chosen.append(fit(source.image(row), size))
                break
            except UnreadableImage:
                continue
    if not chosen:
        raise ValueError(f"none of the images that were tried in {source} can be read.")
    return np.stack(chosen)


def fit_pca(features: Float[np.ndarray, "n p d"], grid: tuple[int, int]) -> Projection:
    """The first three principal components over all patches of all images.

    Each fills its colour channel from the 2nd to the 98th percentile, so that a few outlying
    patches do not wash out the rest. A component's sign is arbitrary; it is chosen so that patches
    near the middle of the images, where the objects are, come out bright.
    """
    _check_grid(features, grid)
    n, p, d = features.shape
    rows = features.reshape(n * p, d).astype(np.float64)
    centre = _centre_weight(grid)
    step = -(-len(rows) // _FIT_ROWS)
    sample = rows[::step]
    mean = sample.mean(axis=0)
    directions = np.linalg.svd(sample - mean, full_matrices=False)[2][:3]
    components = np.zeros((3, d))
    components[: len(directions)] = directions
    scores = (rows - mean) @ components.T
    towards_centre = np.tile(centre, n) @ scores
    sign = np.where(towards_centre < 0, -1.0, 1.0)
    low, high = np.percentile(scores * sign, (2, 98), axis=0)
    return Projection(mean, components * sign[:, None], low, high)


def pca_sheet(
    images: UInt8[np.ndarray, "n i j c"],
    patch_features: Float[np.ndarray, "n p d"],
    grid: tuple[int, int],
    projection: Projection | None = None,
) -> UInt8[np.ndarray, "rows cols 3"]:
    """Every image beside the PCA map of its patches, on one sheet.

    `grid` = rows and columns of patches, p = their product. The colours are fitted over all the
    images together, so equal colours mean similar features across images.
    """
    patch_features = np.asarray(patch_features, np.float32)
    projection = projection or fit_pca(patch_features, grid)
    maps = projection.colours(patch_features).reshape(len(images), *grid, 3)
    return contact_sheet([beside(image, picture) for image, picture in zip(images, maps)])


def similarity(features: Float[np.ndarray, "p d"], patch: int) -> Float[np.ndarray, " p"]:
    """Cosine between one patch of an image and all its patches (1 at the patch itself)."""
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    return unit @ unit[patch]


def similarity_sheet(
    images: UInt8[np.ndarray, "n i j c"],
    patch_features: Float[np.ndarray, "n p d"],
    grid: tuple[int, int],
    patches: Sequence[int] | None = None,
    limits: tuple[float, float] = (0.0, 1.0),
) -> UInt8[np.ndarray, "rows cols 3"]:
    """Every image with a cross on one of its patches, beside the cosine of all patches to it.

    `patches` = one row-major position for each image (None: the middle one). `limits` are the
    cosines that get the darkest and brightest colour: fixed, so that sheets can be compared.
    """
    patch_features = np.asarray(patch_features, np.float32)
    _check_grid(patch_features, grid)
    rows, cols = grid
    if patches is None:
        patches = [rows // 2 * cols + cols // 2] * len(images)
    low, high = limits
    pairs = []
    for image, features, patch in zip(images, patch_features, patches, strict=True):
        if not 0 <= patch < rows * cols:
            raise ValueError(f"patch {patch} is outside a grid of {rows} x {cols} patches.")
        heat = (similarity(features, patch).reshape(grid) - low) / (high - low)
        picture = (255 * colormaps["inferno"](np.clip(heat, 0, 1))[..., :3]).astype(np.uint8)
        where = ((patch // cols + 0.5) / rows, (patch % cols + 0.5) / cols)
        pairs.append(beside(image, picture, cross=where))
    return contact_sheet(pairs)


def beside(
    image: UInt8[np.ndarray, "i j c"],
    picture: UInt8[np.ndarray, "y x 3"],
    cross: tuple[float, float] | None = None,
) -> UInt8[np.ndarray, "h w 3"]:
    """An image and a map of its patches, drawn at one size side by side.

    `cross` = (down, right) as fractions of the image, marked on both.
    """
    image = rgb(image)
    height, width = image.shape[:2]
    scale = max(1, -(-_TILE // min(height, width)))
    size = (width * scale, height * scale)
    left = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
    right = Image.fromarray(picture).resize(size, Image.Resampling.NEAREST)
    if cross is not None:
        for tile in (left, right):
            _draw_cross(tile, cross)
    seam = np.full((size[1], _GAP // 4, 3), _PAPER, np.uint8)
    return np.concatenate([np.asarray(left), seam, np.asarray(right)], axis=1)


def contact_sheet(
    tiles: Sequence[UInt8[np.ndarray, "_ _ _"]], columns: int | None = None
) -> UInt8[np.ndarray, "rows cols 3"]:
    """Pictures in rows on white paper; `columns` None: about as wide as high."""
    if not len(tiles):
        raise ValueError("a contact sheet needs at least one picture; got none.")
    tiles = [rgb(np.asarray(tile)) for tile in tiles]
    height = max(tile.shape[0] for tile in tiles)
    width = max(tile.shape[1] for tile in tiles)
    if columns is None:
        columns = max(1, round((len(tiles) * height / width) ** 0.5))
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    shape = (rows * (height + _GAP) + _GAP, columns * (width + _GAP) + _GAP, 3)
    sheet = np.full(shape, _PAPER, np.uint8)
    for index, tile in enumerate(tiles):
        top = _GAP + index // columns * (height + _GAP) + (height - tile.shape[0]) // 2
        left = _GAP + index % columns * (width + _GAP) + (width - tile.shape[1]) // 2
        sheet[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    return sheet


def captioned(
    tile: UInt8[np.ndarray, "i j c"], lines: Sequence[str], size: int = 12
) -> UInt8[np.ndarray, "h j 3"]:
    """A picture with lines of text under it: the first black, the others grey.

    Text that is wider than the picture loses its middle: names differ at both ends.
    """
    tile, height = rgb(tile), round(1.4 * size)
    paper = Image.new("RGB", (tile.shape[1], height * len(lines) + 2), (_PAPER,) * 3)
    draw, face = ImageDraw.Draw(paper), font(size)
    for number, line in enumerate(lines):
        fitted = _shortened(line, face, tile.shape[1])
        draw.text((0, number * height + 2), fitted, (0, 0, 0) if number == 0 else (110,) * 3, face)
    return np.concatenate([tile, np.asarray(paper)])


@lru_cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """The font that comes with matplotlib, `size` pixels high."""
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), size)


def save(picture: UInt8[np.ndarray, "i j 3"], path: str | Path) -> Path:
    """Writes a PNG (or what the name ends in); a reader never sees half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        Image.fromarray(picture).save(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def rgb(image: UInt8[np.ndarray, "i j c"]) -> UInt8[np.ndarray, "i j 3"]:
    """Three channels to look at: grey images tripled, further channels left out."""
    if image.shape[-1] >= 3:
        return np.ascontiguousarray(image[..., :3])
    return np.repeat(image[..., :1], 3, axis=-1)


def _shortened(text: str, face: ImageFont.FreeTypeFont, width: int) -> str:
    """The text, without as much of its middle as it takes to fit into `width` pixels."""
    shorter, kept = text, len(text)
    while kept > 2 and face.getlength(shorter) > width:
        kept -= 1
        shorter = f"{text[: kept // 2]}…{text[kept // 2 - kept :]}"
    return shorter


def _draw_cross(tile: Image.Image, where: tuple[float, float]) -> None:
    y, x = where[0] * tile.height, where[1] * tile.width
    arm = max(5, min(tile.size) // 24)
    draw = ImageDraw.Draw(tile)
    for colour, thickness in (((255, 255, 255), 5), ((230, 30, 30), 3)):
        draw.line((x - arm, y, x + arm, y), colour, thickness)
        draw.line((x, y - arm, x, y + arm), colour, thickness)


def _centre_weight(grid: tuple[int, int]) -> Float[np.ndarray, " p"]:
    """Large in the middle of the grid, small at its border; sums to zero."""
    y, x = (np.abs(np.linspace(-1, 1, k)) if k > 1 else np.zeros(1) for k in grid)
    weight = -(y[:, None] ** 2 + x[None, :] ** 2)
    return (weight - weight.mean()).reshape(-1)


def _check_grid(features: np.ndarray, grid: tuple[int, int]) -> None:
    if features.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"{features.shape[1]} patch features do not fill a grid of {grid[0]} x {grid[1]}."
        )
