"""What a drawn scene shows: semantic mask, depth, boxes with phrases. Pure functions of a `Scene`.

For dense evaluation, depth and detection; `data/scenes/captions.py` makes sentences of it. All is
read off the instance mask and the description, so it agrees with the picture at every size.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64, UInt8

from dinojax.data.scenes.draw import Scene, whole_area
from dinojax.data.scenes.parts import COLOURS, CREAM, INK, SHAPES
from dinojax.data.scenes.spec import Colour, GroundSpec, ObjectSpec

SLOPE = 0.08  # how much nearer the ground is at the bottom edge; no object is farther than 0.9


@dataclass(frozen=True)
class Attributes:
    """What one object looks like, in words."""

    size: str  # small, large; huge: it would cover more than half of the frame
    colour: str  # as seen: red, pale red, dark red, white, black, ...
    texture: str
    shape: str
    position: str  # of its visible part, by thirds of the frame: top left, centre, ...

    @property
    def phrase(self) -> str:
        """'a red striped disc'; a plain texture goes without saying."""
        return article(" ".join(w for w in (self.colour, self.pattern, self.shape) if w))

    @property
    def pattern(self) -> str:
        return "" if self.texture == "plain" else self.texture


@dataclass(frozen=True)
class Boxes:
    """The n objects that can be seen, in the order of the description; the main one comes first."""

    xyxy: Float32[np.ndarray, "n 4"]  # x0, y0, x1, y1: the edges of the visible part, in pixels
    categories: Int64[np.ndarray, " n"]  # number of the shape, 0..9; the semantic mask has + 1
    objects: Int64[np.ndarray, " n"]  # number in the description; the instance mask has + 1
    visible: Float32[np.ndarray, " n"]  # share of the whole object, 0..1
    attributes: tuple[Attributes, ...]

    @property
    def phrases(self) -> tuple[str, ...]:
        return tuple(one.phrase for one in self.attributes)


def semantic(scene: Scene) -> UInt8[np.ndarray, "i j"]:
    """0 on the ground, 1 + the number of the shape on objects (10 shapes)."""
    numbers = [0, *(1 + SHAPES.index(thing.shape) for thing in scene.spec.objects)]
    return np.array(numbers, np.uint8)[scene.mask]


def depth(scene: Scene) -> Float32[np.ndarray, "i j"]:
    """Distance from the camera: objects stand upright at their `depth`, 0.4 to 0.9.

    The ground slopes gently towards the camera, from 1 at the top edge to 0.92 at the bottom, and
    stays behind every object.
    """
    size = len(scene.mask)
    ground = 1 - SLOPE * (np.arange(size, dtype=np.float32)[:, None] + 0.5) / size
    distances = np.array([0, *(thing.depth for thing in scene.spec.objects)], np.float32)
    return np.where(scene.mask == 0, ground, distances[scene.mask]).astype(np.float32)


def boxes(scene: Scene) -> Boxes:
    """Boxes of the visible parts; an object of which no pixel is seen has none.

    `visible` counts both what other objects hide and what lies outside the frame.
    """
    size = len(scene.mask)
    rows, shares, numbers = [], [], []
    for n, thing in enumerate(scene.spec.objects):
        inside = scene.mask == n + 1
        y, x = (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
        if len(x):
            rows.append((x[0], y[0], x[-1] + 1, y[-1] + 1))
            shares.append(inside.sum() / whole_area(thing, size))
            numbers.append(n)
    xyxy = np.array(rows, np.float32).reshape(-1, 4)
    things = [scene.spec.objects[n] for n in numbers]
    return Boxes(
        xyxy=xyxy,
        categories=np.array([SHAPES.index(thing.shape) for thing in things], np.int64),
        objects=np.array(numbers, np.int64),
        visible=np.array(shares, np.float32),
        attributes=tuple(_attributes(thing, box / size) for thing, box in zip(things, xyxy)),
    )


# --- words ---------------------------------------------------------------------------------------


def article(words: str) -> str:
    """'an orange disc', 'a red arrow'."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _attributes(thing: ObjectSpec, box: Float32[np.ndarray, "4"]) -> Attributes:
    size = "small" if thing.scale < 0.3 else "huge" if thing.scale**2 > 0.5 else "large"
    # A textured object shows the named colour in one of its tones; a plain one has only the first,
    # which may be the companion: almost white, or nearly black.
    plain = thing.texture == "plain"
    colour = shade(thing.tones[0], thing.colour, least=0.47) if plain else thing.colour
    across = ("left", "", "right")[int((box[0] + box[2]) / 2 * 3)]
    down = ("top", "", "bottom")[int((box[1] + box[3]) / 2 * 3)]
    return Attributes(
        size=size,
        colour=colour,
        texture=thing.texture,
        shape=thing.shape,
        position=f"{down} {across}".strip() or "centre",
    )


def shade(tone: Colour, colour: str, least: float) -> str:
    """'red', 'pale red', 'dark red', 'white' or 'black': how a tone of a named colour looks.

    Pale or dark if at least `least` of it is cream or ink, white or black from 0.8.
    """
    base = np.array(COLOURS[colour])
    for end, a_bit, whole in ((CREAM, "pale", "white"), (INK, "dark", "black")):
        way = np.array(end) - base
        amount = float((np.array(tone) - base) @ way / (way @ way))
        if amount > least:
            return whole if amount > 0.8 else f"{a_bit} {colour}"
    return colour


def ground_words(ground: GroundSpec) -> str:
    """'a pale green dotted ground'."""
    colour = shade(ground.tones[0], ground.colour, least=0.25)
    pattern = "" if ground.texture == "plain" else f" {ground.texture}"
    return article(f"{colour}{pattern} ground")
