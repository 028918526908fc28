"""Pictures of clusters and of near-duplicates, through the source that rows are images of.

Called by `report.py`. A group is one JPEG: up to 16 images in order, those of the sample framed.
"""

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int64, UInt8
from PIL import Image

from data_curation.tree import ClusterTree
from dinojax.data.decode import UnreadableImage
from dinojax.data.sources import Source

MEMBERS = 16  # images of a group
TILE, FRAME, GAP, COLUMNS = 80, 3, 3, 8  # pixels, pixels, pixels, images
PAPER, CHOSEN, GREY = (255, 255, 255), (32, 85, 138), (205, 205, 205)


class Group(NamedTuple):
    """Rows of the embedding set that are shown together."""

    title: str
    rows: Int64[np.ndarray, " m"]


def cluster_groups(tree: ClusterTree, count: int, seed: int = 0) -> list[Group]:
    """The `count` largest, `count` smallest and `count` other clusters of level 1, their members
    nearest to the centroid first."""
    lowest = tree.levels[0]
    sizes = lowest.sizes()
    order = np.argsort(-sizes, kind="stable")
    order = order[sizes[order] > 0]
    largest, rest = order[:count], order[count:]
    smallest, middle = rest[len(rest) - count :] if len(rest) > count else rest, rest[:-count]
    drawn = np.random.default_rng(seed).permutation(middle)[:count]
    groups = []
    for kind, clusters in (("largest", largest), ("at random", drawn), ("smallest", smallest)):
        for cluster in clusters.tolist():
            first = lowest.offsets[cluster]
            rows = lowest.members[first : min(first + MEMBERS, lowest.offsets[cluster + 1])]
            title = f"{kind}: cluster {cluster}, {sizes[cluster]:,} rows"
            groups.append(Group(title, np.asarray(rows, np.int64)))
    return groups


def component_groups(
    rows: Int[np.ndarray, " n"], components: Int[np.ndarray, " n"], count: int, seed: int = 0
) -> list[Group]:
    """The `count` largest components of near-duplicates, and `count` others at random.

    `components` = the component of each of `rows`.
    """
    order = np.argsort(components, kind="stable")
    labels, firsts, sizes = np.unique(components[order], return_index=True, return_counts=True)
    several = np.flatnonzero(sizes > 1)
    several = several[np.argsort(-sizes[several], kind="stable")]
    drawn = np.random.default_rng(seed).permutation(several[count:])[:count]
    groups = []
    for kind, chosen in (("largest", several[:count]), ("at random", drawn)):
        for one in chosen.tolist():
            members = rows[order[firsts[one] : firsts[one] + min(sizes[one], MEMBERS)]]
            title = f"{kind}: component of row {labels[one]}, {sizes[one]:,} rows"
            groups.append(Group(title, np.sort(np.asarray(members, np.int64))))
    return groups


def sheet(source: Source, images: Sequence[int], framed: Bool[np.ndarray, " m"]) -> bytes:
    """Images of a source by number, as one JPEG; `framed` ones have a frame."""
    side = TILE + 2 * FRAME + GAP
    columns, rows = min(COLUMNS, len(images)), -(-len(images) // COLUMNS)
    paper = Image.new("RGB", (columns * side - GAP, rows * side - GAP), PAPER)
    for place, (number, mark) in enumerate(zip(images, framed)):
        left, top = place % COLUMNS * side, place // COLUMNS * side
        if mark:
            end = (left + TILE + 2 * FRAME, top + TILE + 2 * FRAME)
            paper.paste(CHOSEN, (left, top, *end))
        paper.paste(_tile(source, int(number)), (left + FRAME, top + FRAME))
    stream = io.BytesIO()
    paper.save(stream, "JPEG", quality=88)
    return stream.getvalue()


def _tile(source: Source, number: int) -> Image.Image:
    """A whole image on a grey square; grey alone where it cannot be read."""
    tile = Image.new("RGB", (TILE, TILE), GREY)
    try:
        picture = Image.fromarray(_rgb(source.image(number)))
    except UnreadableImage:
        return tile
    scale = TILE / max(picture.size)
    shape = tuple(max(1, round(scale * pixels)) for pixels in picture.size)
    picture = picture.resize(shape, Image.Resampling.BICUBIC)
    tile.paste(picture, ((TILE - shape[0]) // 2, (TILE - shape[1]) // 2))
    return tile


def _rgb(image: UInt8[np.ndarray, "i j c"]) -> UInt8[np.ndarray, "i j 3"]:
    if image.shape[-1] >= 3:
        return np.ascontiguousarray(image[..., :3])
    return np.repeat(image[..., :1], 3, axis=-1)
