"""What is in a scene, in words and numbers: everything else about it follows from this.

`describe` draws the description of scene number `index` of a stream; `data/scenes/draw.py` turns it
into pixels and `data/scenes/labels.py` and its neighbours into labels. Called by `data/scenes.py`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any, TypeVar

import numpy as np

from dinojax.data.scenes.parts import CELLS, COLOURS, CREAM, INK, KINDS, SHAPES, tile

# What random numbers are for: every purpose has a stream of its own, so that none shifts another.
DESCRIBE, CAPTIONS, VIEWS, MOTION = range(4)
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
Colour = tuple[float, float, float]
Draw = Callable[..., float]  # U(low, high); of (0, 1) when called without


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


Thing = TypeVar("Thing", ObjectSpec, GroundSpec)


@dataclass(frozen=True)
class SceneSpec:
    """A scene in words and numbers. `objects[0]` is the main object, the one the label names."""

    key: tuple[int, int]  # seed and index; captions, second views and motion are drawn from it too
    label: int
    ground: GroundSpec
    objects: tuple[ObjectSpec, ...]
    light: tuple[float, float]  # direction (x, y) in which it gets brighter, length = strength
    even: bool = False  # whether it went through `even`


def uniforms(key: tuple[int, int], purpose: int) -> Draw:
    """A function that draws U(low, high). The stream depends on key and purpose alone."""
    bits = np.random.Philox(key=np.array(key, np.uint64), counter=[0, 0, 0, purpose])
    following = _endless(np.random.Generator(bits)).__next__
    return lambda low=0.0, high=1.0: low + (high - low) * following()


def _endless(generator: np.random.Generator) -> Iterator[float]:
    for count in repeat(96):  # one call for all that a description needs
        yield from generator.random(count).tolist()


def choice(draw: Draw, options: tuple[Any, ...]) -> Any:
    return options[int(draw() * len(options))]


def mix(a: Colour, b: Colour, amount: float) -> Colour:
    return tuple(x + amount * (y - x) for x, y in zip(a, b, strict=True))


def _tones(draw: Draw, colour: str) -> tuple[Colour, Colour]:
    """A varied shade of a named colour and a much lighter or darker companion, in either order."""
    base = tuple(value + draw(-14, 14) for value in COLOURS[colour])
    if draw() < 0.5:
        pair = (mix(base, INK, draw(0.0, 0.15)), mix(base, CREAM, draw(0.7, 0.95)))
    else:
        pair = (mix(base, CREAM, draw(0.0, 0.3)), mix(base, INK, draw(0.6, 0.85)))
    return pair if draw() < 0.5 else pair[::-1]


def _describe_ground(draw: Draw, colours: tuple[str, ...]) -> GroundSpec:
    colour = choice(draw, colours)
    base = mix(COLOURS[colour], CREAM, draw(0.35, 0.7))
    if draw() < 0.4:
        base = mix(COLOURS[colour], INK, draw(0.3, 0.6))
    second = mix(base, CREAM if draw() < 0.5 else INK, draw(0.06, 0.16))
    texture = choice(draw, ("plain", "striped", "chequered", "dotted", "gridded", "mottled"))
    phase = (draw(0, CELLS), draw(0, CELLS))
    return GroundSpec(texture, colour, (base, second), draw(0, 360), draw(0.1, 0.3), phase)


def describe_object(draw: Draw, kind: tuple[str, str], colour: str, small: bool) -> ObjectSpec:
    """An object of a kind (shape, texture) in a named colour, anywhere if it is small."""
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
    key = (seed, index)
    draw = uniforms(key, DESCRIBE)
    label = index % len(KINDS)
    colours = tuple(COLOURS)
    colour = choice(draw, colours)
    others = tuple(name for name in colours if name != colour)
    ground = _describe_ground(draw, others)
    objects = [describe_object(draw, KINDS[label], colour, small=False)]
    for _ in range(int(draw(0, 4))):
        kind = (choice(draw, SHAPES), "plain")
        objects.append(describe_object(draw, kind, choice(draw, others), small=True))
    angle, strength = draw(0, 2 * np.pi), draw(0.1, 0.5)
    light = (float(strength * np.cos(angle)), float(strength * np.sin(angle)))
    return SceneSpec(key, label, ground, tuple(objects), light)


def even(spec: SceneSpec) -> SceneSpec:
    """The scene in evenly lit greys: every surface keeps its contrast but is mid-grey on average.

    What is left to tell scenes apart is pattern and outline, and so the label. (In the tones of
    `describe` two crops of a scene are first recognised by their colour or brightness, which say
    nothing about the label; a short self-supervised run learns those and stops.)
    """
    objects = tuple(evenly_grey(thing) for thing in spec.objects)
    ground = evenly_grey(spec.ground)
    return replace(spec, ground=ground, objects=objects, light=(0.0, 0.0), even=True)


def evenly_grey(thing: Thing) -> Thing:
    """The thing in two greys, mean 128 over its texture, with 0.8 of its tones' luma contrast."""
    first, second = (float(np.dot(tone, LUMA)) for tone in thing.tones)
    contrast = 0.8 * (second - first)  # 0.8: neither black nor white is reached
    share = float(tile(thing.texture, 16).mean()) / 255  # of the second tone
    grey = 128.0 - share * contrast
    return replace(thing, colour="grey", tones=((grey,) * 3, (grey + contrast,) * 3))
