"""Scenes with their labels drawn on them; writes `docs/scenes.png`:

    python -m dinojax.data.scenes.sheet --out docs/scenes.png

`annotated` draws one scene, for any sheet. Matplotlib is imported only when something is drawn.
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dinojax.data.scenes import open_scenes
from dinojax.data.scenes.captions import captions
from dinojax.data.scenes.draw import Scene
from dinojax.data.scenes.labels import SLOPE, boxes, depth, semantic
from dinojax.data.scenes.parts import SHAPES
from dinojax.data.scenes.spec import ObjectSpec
from dinojax.data.scenes.video import video
from dinojax.data.scenes.views import view_pair

TILE = 330  # pixels of a panel's picture
HEAD = 30  # pixels above it, for the title
GAP = 8
TEXT, TITLE = 12, 14  # pixels
FRAMES = 6  # shown of a video
POINTS = 9  # shown of the corresponding ones
Picture = UInt8[np.ndarray, "_ _ 3"]  # rows, columns, RGB


def annotated(scene: Scene) -> list[Picture]:
    """Five pictures: boxes with phrases, semantic mask, depth, corresponding points, a video."""
    return [
        _boxes_panel(scene),
        _semantic_panel(scene),
        _depth_panel(scene),
        _pair_panel(scene),
        _video_panel(scene),
    ]


def sheet(scenes: Sequence[Scene]) -> Picture:
    """All scenes with their labels and captions, one below the other."""
    blocks = []
    for scene in scenes:
        drawn = annotated(scene)
        high, wide, _ = drawn[3].shape
        words = _captions_panel(scene, high, 3 * TILE + GAP - wide)
        rows = [_beside(drawn[:3]), _beside([drawn[3], words]), drawn[4]]
        blocks.append(np.concatenate(rows))
    whole = np.concatenate(blocks)
    return np.pad(whole, ((GAP, GAP), (GAP, GAP), (0, 0)), constant_values=255)


def _beside(pictures: Sequence[Picture]) -> Picture:
    space = np.full((len(pictures[0]), GAP, 3), 255, np.uint8)
    parts = [part for picture in pictures for part in (picture, space)]
    return np.concatenate(parts[:-1], axis=1)


# --- panels --------------------------------------------------------------------------------------


class _Panel:
    """A picture `width` x `height` pixels under a title; `axes` counts its pixels."""

    def __init__(self, title: str, width: int = TILE, height: int = TILE) -> None:
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(width / 72, (height + HEAD) / 72), dpi=72)
        self.axes: Any = self.figure.add_axes((0, 0, 1, height / (height + HEAD)))
        self.axes.set(xlim=(0, width), ylim=(height, 0))
        self.axes.axis("off")
        self.axes.set_title(title, fontsize=TITLE, loc="left", pad=5)

    def show(self, image: np.ndarray, x: int = 0, width: int = TILE, **colours: Any) -> None:
        self.axes.imshow(image, extent=(x, x + width, width, 0), aspect="auto", **colours)

    def write(self, x: float, y: float, text: str, colour: Any = "black", **where: Any) -> None:
        """Words on a light card."""
        card = {"facecolor": "white", "alpha": 0.85, "linewidth": 0, "pad": 1.5}
        self.axes.text(x, y, text, color=colour, fontsize=TEXT, bbox=card, **where)

    def drawn(self) -> Picture:
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        canvas = FigureCanvasAgg(self.figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _colour(number: int) -> tuple[float, float, float]:
    """One of ten: of a shape, an instance or a point."""
    from matplotlib import colormaps

    return colormaps["tab10"](number % 10)[:3]


def _boxes_panel(scene: Scene) -> Picture:
    from matplotlib.patches import Rectangle

    panel, seen = _Panel("boxes and phrases"), boxes(scene)
    panel.show(scene.image[..., :3])
    corners = seen.xyxy * (TILE / len(scene.mask))
    taken: list[tuple[float, float, float]] = []  # middle x, y and half the width of words
    for (x0, y0, x1, y1), number, phrase in zip(corners, seen.categories, seen.phrases):
        colour = _colour(int(number))
        for edge, lw in (("white", 4), (colour, 2)):
            panel.axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, ec=edge, lw=lw))
        half = 0.31 * TEXT * len(phrase)
        x = float(np.clip((x0 + x1) / 2, half + 4, TILE - half - 4))
        y = float(np.clip(y0 - 10, 12, TILE - 12))
        step = 18 if y < TILE / 2 else -18
        while any(abs(y - v) < 18 and abs(x - u) < half + w for u, v, w in taken):
            y += step
        taken.append((x, y, half))
        panel.write(x, y, phrase, colour, ha="center", va="center", weight="bold")
    return panel.drawn()


def _semantic_panel(scene: Scene) -> Picture:
    panel, mask = _Panel("semantic mask"), semantic(scene)
    colours = np.array([(0.25, 0.25, 0.25), *(_colour(n) for n in range(len(SHAPES)))])
    panel.show((0.35 * scene.image[..., :3] / 255 + 0.65 * colours[mask]).clip(0, 1))
    for thing, at in _places(scene):
        panel.write(*at, thing.shape, ha="center", va="center")
    return panel.drawn()


def _depth_panel(scene: Scene) -> Picture:
    panel = _Panel(f"depth (ground: top 1.00, bottom {1 - SLOPE:.2f})")
    panel.show(depth(scene), cmap="magma_r", vmin=0.35, vmax=1.0)
    for thing, at in _places(scene):
        panel.write(*at, f"{thing.depth:.2f}", ha="center", va="center")
    return panel.drawn()


def _places(scene: Scene) -> Iterator[tuple[ObjectSpec, tuple[float, float]]]:
    """Visible objects, each with the place for words: where what is seen of it is thickest."""
    for n in boxes(scene).objects:
        inside = np.pad((scene.mask == n + 1).astype(np.uint8), 1)
        thickness = cv2.distanceTransform(inside, cv2.DIST_L2, 5)[1:-1, 1:-1]
        y, x = np.unravel_index(thickness.argmax(), thickness.shape)
        if thickness[y, x] > 0.02 * len(scene.mask):  # else nobody would find it
            x, y = (np.array([x, y]) + 0.5) * TILE / len(scene.mask)
            yield scene.spec.objects[n], (float(np.clip(x, 30, TILE - 30)), float(y))


def _pair_panel(scene: Scene) -> Picture:
    side = TILE * 3 // 4
    panel = _Panel("a second view, with corresponding points", 2 * side + GAP, side)
    pair = view_pair(scene.spec, len(scene.mask), scene.image.shape[2])
    scale = side / len(scene.mask)
    panel.show(pair.first[..., :3], 0, side)
    panel.show(pair.second[..., :3], side + GAP, side)
    both = np.flatnonzero(pair.visible)
    for k, n in enumerate(both[np.linspace(0, len(both) - 1, POINTS).astype(int)]):
        (x, y), (u, v) = pair.points[n] * scale, pair.matches[n] * scale
        ends = [x, u + side + GAP], [y, v]
        panel.axes.plot(*ends, "-", color=_colour(k), lw=1.2)
        panel.axes.plot(*ends, "o", color=_colour(k), mec="white", ms=7)
    return panel.drawn()


def _video_panel(scene: Scene) -> Picture:
    width = 3 * TILE + 2 * GAP
    side = (width - (FRAMES - 1) * GAP) // FRAMES
    panel = _Panel("a video, with instance masks", width, side)
    moving = video(scene.spec, len(scene.mask), 2 * FRAMES - 1, scene.image.shape[2])
    for k in range(FRAMES):
        x = k * (side + GAP)
        frame, mask = moving.frames[2 * k][..., :3], moving.masks[2 * k]
        panel.show(frame, x, side)
        line = (np.arange(len(mask)) + 0.5) * side / len(mask)
        for n in set(np.unique(mask).tolist()) - {0}:
            for colour, lw in (("white", 3), (_colour(n), 1.6)):
                inside = (mask == n).astype(float)
                panel.axes.contour(line + x, line, inside, [0.5], colors=[colour], linewidths=lw)
    return panel.drawn()


def _captions_panel(scene: Scene, height: int, width: int) -> Picture:
    import textwrap

    panel = _Panel("captions", width, height - HEAD)
    text = ""
    for words in captions(scene, 5):
        longer = f"{text}{textwrap.fill(words, width // 8)}\n\n"
        if longer.count("\n") * 1.3 * TITLE < height - HEAD:  # a sentence too many is left out
            text = longer
    panel.axes.text(2, 8, text, fontsize=TITLE, va="top", linespacing=1.3)
    return panel.drawn()


# --- command -------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a sheet of a few scenes as PNG."""
    parser = argparse.ArgumentParser(prog="dinojax.data.scenes.sheet", description=main.__doc__)
    parser.add_argument("--out", default="docs/scenes.png", help="file to write (%(default)s)")
    parser.add_argument("--scenes", type=int, nargs="+", default=[5, 16], help="their numbers")
    parser.add_argument("--seed", type=int, default=0, help="of the stream (%(default)s)")
    parser.add_argument("--size", type=int, default=256, help="pixels (%(default)s)")
    given = parser.parse_args(arguments)
    if not os.path.isdir(folder := os.path.dirname(given.out) or "."):
        parser.error(f"--out {given.out!r}: there is no folder {folder!r}.")
    try:
        options = {"size": str(given.size), "seed": str(given.seed)}
        source = open_scenes(max(given.scenes) + 1, options)
        picture = sheet([source.scene(n) for n in given.scenes])
        save(picture, given.out)
    except (ValueError, IndexError, OSError) as error:
        parser.error(str(error))
    size = os.path.getsize(given.out) // 1000
    print(f"{given.out}: {picture.shape[1]} x {picture.shape[0]} pixels, {size} kB")


def save(picture: Picture, path: str) -> None:
    """Write a PNG of 256 colours: 165 kB instead of 740, colours off by 1.2 levels on average."""
    image = Image.fromarray(picture)
    # Of Pillow's ways this one keeps rare colours (24 levels off at most; median cut: 76).
    image = image.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=10, dither=Image.Dither.NONE)
    image.save(f"{path}.part", format="PNG", optimize=True)
    os.replace(f"{path}.part", path)


if __name__ == "__main__":
    main()
