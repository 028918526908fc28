"""A scene set in motion, with instance masks that keep their numbers: for tracking evaluation.

The main object drifts, turns and grows a little. Every small one crosses it, in front or behind,
so objects hide each other and come back; some enter from outside. Called through
`SceneSource.video`.
"""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Float32, UInt8

from dinojax.data.scenes.draw import Scene, draw, pose
from dinojax.data.scenes.parts import COLOURS, SHAPES
from dinojax.data.scenes.spec import (
    MOTION,
    Draw,
    ObjectSpec,
    SceneSpec,
    choice,
    describe_object,
    evenly_grey,
    uniforms,
)

SMALL = 2  # small objects in a video at least; those that the scene lacks come in from outside
Point = tuple[float, float]


@dataclass(frozen=True)
class Video:
    """Frames with instance masks: n + 1 where object n of every frame's description is in front."""

    frames: UInt8[np.ndarray, "t i j c"]
    masks: UInt8[np.ndarray, "t i j"]
    specs: tuple[SceneSpec, ...]  # one a frame, with the same objects in the same order

    def scene(self, t: int) -> Scene:
        """A frame as a scene, for its boxes, depth and so on."""
        return Scene(self.frames[t], self.specs[t].label, self.masks[t], self.specs[t])


def video(spec: SceneSpec, size: int, frames: int = 16, bands: int = 3) -> Video:
    """The scene in motion. The first frame is the scene itself; more frames move more slowly."""
    if frames < 2:
        raise ValueError(f"a video of {frames} frames was asked for; it has at least 2.")
    specs = tuple(motion(spec, frames))
    drawn = [draw(one, size, bands) for one in specs]
    return Video(
        frames=np.stack([scene.image for scene in drawn]),
        masks=np.stack([scene.mask for scene in drawn]),
        specs=specs,
    )


def motion(spec: SceneSpec, frames: int) -> list[SceneSpec]:
    """The description of every frame."""
    uniform = uniforms(spec.key, MOTION)
    main, *small = spec.objects
    small += [_coming(spec, uniform) for _ in range(SMALL - len(small))]
    turns = np.linspace(0.0, 1.0, frames).tolist()
    tracks = [_drifting(main, uniform, turns)]
    tracks += [_crossing(thing, main.centre, uniform, turns) for thing in small]
    return [replace(spec, objects=things) for things in zip(*tracks, strict=True)]


def centres(moving: Video) -> Float[np.ndarray, "t n 2"]:
    """Where the middle (x, y) of every object is in every frame, in pixels, seen or not."""
    size = moving.masks.shape[1]
    return np.array([[thing.centre for thing in spec.objects] for spec in moving.specs]) * size


def flow(moving: Video) -> Float32[np.ndarray, "moves i j 2"]:
    """How far (x, y), in pixels, what a pixel's centre shows moves until the next frame.

    Exact, for all frames but the last. Where it moves to may be outside the frame, or hidden by
    another object: compare the masks there.
    """
    steps, size, _ = moving.masks.shape
    line = np.arange(size) + 0.5
    x, y = np.meshgrid(line, line)
    moved = np.zeros((steps - 1, size, size, 2), np.float32)
    for t in range(steps - 1):
        pairs = zip(moving.specs[t].objects, moving.specs[t + 1].objects, strict=True)
        for n, (now, then) in enumerate(pairs):
            inside = moving.masks[t] == n + 1
            here = np.stack([x[inside], y[inside]], 1)
            before, after = pose(now), pose(then)
            own = np.linalg.solve(before[:, :2], (here / size - before[:, 2]).T)
            moved[t][inside] = (after[:, :2] @ own).T * size + after[:, 2] * size - here
    return moved


def _coming(spec: SceneSpec, uniform: Draw) -> ObjectSpec:
    """A small object that is still outside of the frame."""
    colours = tuple(name for name in COLOURS if name != spec.objects[0].colour)
    kind = (choice(uniform, SHAPES), "plain")
    thing = describe_object(uniform, kind, choice(uniform, colours), small=True)
    beyond, along = choice(uniform, (-0.25, 1.25)), uniform(0.1, 0.9)
    centre = choice(uniform, ((beyond, along), (along, beyond)))
    thing = replace(thing, centre=centre)
    return evenly_grey(thing) if spec.even else thing


def _drifting(thing: ObjectSpec, uniform: Draw, turns: list[float]) -> list[ObjectSpec]:
    x, y = thing.centre
    half = (x + uniform(-0.06, 0.06), y + uniform(-0.06, 0.06))
    end = (x + uniform(-0.1, 0.1), y + uniform(-0.1, 0.1))
    return _moving(thing, half, end, uniform(-25, 25), uniform(0.9, 1.1), turns)


def _crossing(
    thing: ObjectSpec, main: Point, uniform: Draw, turns: list[float]
) -> list[ObjectSpec]:
    """Past the middle of the main object half-way, and out on its other side."""
    half = tuple(c + uniform(-0.1, 0.1) for c in main)
    end = tuple(2 * m - c + uniform(-0.2, 0.2) for m, c in zip(half, thing.centre))
    return _moving(thing, half, end, uniform(-120, 120), 1.0, turns)


def _moving(
    thing: ObjectSpec, half: Point, end: Point, spin: float, growth: float, turns: list[float]
) -> list[ObjectSpec]:
    """The object at each turn, 0 to 1: along the parabola through where it is, half and end."""

    def at(turn: float) -> ObjectSpec:
        grown = growth**turn
        return replace(
            thing,
            centre=tuple(
                a + turn * (b - a) + 4 * turn * (1 - turn) * (m - (a + b) / 2)
                for a, m, b in zip(thing.centre, half, end)
            ),
            scale=thing.scale * grown,
            cell=thing.cell * grown,
            rotation=thing.rotation + turn * spin,
        )

    return [at(turn) for turn in turns]
