"""True sentences about a drawn scene, for text alignment and open-vocabulary detection.

Pure functions of a `Scene`; the words are those of `data/scenes/labels.py`, the relations are
measured here. Every sentence ends with a full stop, which also separates phrases in a prompt.
"""

from itertools import cycle, permutations
from typing import NamedTuple

from dinojax.data.scenes.draw import Scene, footprint
from dinojax.data.scenes.labels import Attributes, Boxes, article, boxes, ground_words
from dinojax.data.scenes.spec import CAPTIONS, Draw, choice, uniforms

CLEAR = 0.3  # share of an object that must be visible for a sentence to speak of it
MOST = 8  # different captions that every scene has
NUMBERS = ("no", "one", "two", "three", "four")

_ON_GROUND = (
    "{a} on {ground}.",
    "{a} lies on {ground}.",
    "On {ground} there is {a}.",
    "The picture shows {a} on {ground}.",
)
_RELATION = (
    "{a} {relation} {b}.",
    "{a} is {relation} {b}.",
    "There is {a} {relation} {b}.",
    "{b}, and {relation} it {a}.",
)
_PLACE = ("{a} {place}.", "{place} there is {a}.", "{a} can be seen {place}.")
_LISTED = ("{all}.", "{all} on {ground}.", "The picture shows {all}.")
_COUNTED = ("{number}: {all}.", "There {are} {number} on {ground}: {all}.")


class _Facts(NamedTuple):
    """What the sentences about a scene may say."""

    things: tuple[Attributes, ...]
    ground: str
    relations: tuple[tuple[Attributes, str, Attributes], ...]
    complete: bool  # whether `things` are all that can be seen


class Relation(NamedTuple):
    """`words` holds between objects `a` and `b` of a scene's `Boxes`: 'a is left of b'."""

    a: int
    words: str
    b: int


def captions(scene: Scene, count: int = 3) -> tuple[str, ...]:
    """`count` (1 to 8) different sentences: the main object, a relation or a place, a list, again.

    An object of which less than 0.3 can be seen is left out, and then nothing is counted.
    """
    if not 1 <= count <= MOST:
        raise ValueError(f"{count} captions were asked for; a scene has between 1 and {MOST}.")
    seen = boxes(scene)
    clear = [n for n, share in enumerate(seen.visible) if share >= CLEAR]
    if not clear:
        raise ValueError("no object of the scene can be seen well enough to speak of it.")
    related = [r for r in relations(scene, seen) if r.a in clear and r.b in clear]
    facts = _Facts(
        things=tuple(seen.attributes[n] for n in clear),
        ground=ground_words(scene.spec.ground),
        relations=tuple((seen.attributes[a], words, seen.attributes[b]) for a, words, b in related),
        complete=len(clear) == len(seen.objects),
    )
    draw = uniforms(scene.spec.key, CAPTIONS)
    turns = cycle((_about_the_main_one, _about_two if related else _about_a_place, _about_all))
    found: list[str] = []
    while len(found) < count:
        sentence = next(turns)(facts, draw)
        sentence = sentence[0].upper() + sentence[1:]
        if sentence not in found:
            found.append(sentence)
    return tuple(found)


def relations(scene: Scene, seen: Boxes) -> tuple[Relation, ...]:
    """What holds between the visible objects of a scene.

    In front of, behind: they overlap in at least 0.1 of the smaller one.
    Left of, right of, above, below: the centres of both boxes lie outside the other box in this
    direction, and further apart in it than across.
    """
    size = len(scene.mask)
    depths = [scene.spec.objects[n].depth for n in seen.objects]
    prints = [footprint(scene.spec.objects[n], size) for n in seen.objects]
    centres = (seen.xyxy[:, :2] + seen.xyxy[:, 2:]) / 2
    reach = (seen.xyxy[:, 2:] - seen.xyxy[:, :2]) / 2
    found = []
    for a, b in permutations(range(len(seen.objects)), 2):
        shared = (prints[a] & prints[b]).sum()
        if shared >= 0.1 * min(prints[a].sum(), prints[b].sum()):
            found.append(Relation(a, "in front of" if depths[a] < depths[b] else "behind", b))
        way = centres[a] - centres[b]
        axis = int(abs(way[1]) > abs(way[0]))
        if abs(way[axis]) > max(reach[a, axis], reach[b, axis]):
            sides = (("left of", "right of"), ("above", "below"))[axis]
            found.append(Relation(a, sides[int(way[axis] > 0)], b))
    return tuple(found)


def noun(one: Attributes, draw: Draw) -> str:
    """An object in words, in one of four ways: 'a striped red disc', 'a large red striped disc'."""
    order = choice(draw, ((one.colour, one.pattern), (one.texture, one.colour)))
    size = choice(draw, ("", one.size))
    return article(" ".join(word for word in (size, *order, one.shape) if word))


def _about_the_main_one(facts: _Facts, draw: Draw) -> str:
    return choice(draw, _ON_GROUND).format(a=noun(facts.things[0], draw), ground=facts.ground)


def _about_two(facts: _Facts, draw: Draw) -> str:
    a, relation, b = choice(draw, facts.relations)
    return choice(draw, _RELATION).format(a=noun(a, draw), relation=relation, b=noun(b, draw))


def _about_a_place(facts: _Facts, draw: Draw) -> str:
    one = choice(draw, facts.things)
    where = {"centre": "in", "left": "on", "right": "on"}.get(one.position, "at")
    return choice(draw, _PLACE).format(a=noun(one, draw), place=f"{where} the {one.position}")


def _about_all(facts: _Facts, draw: Draw) -> str:
    nouns = [noun(one, draw) for one in facts.things]
    several = len(nouns) > 1
    return choice(draw, _LISTED + (_COUNTED if facts.complete else ())).format(
        all=" and ".join([", ".join(nouns[:-1]), nouns[-1]]) if several else nouns[0],
        ground=facts.ground,
        number=f"{NUMBERS[len(nouns)]} shape{'s' if several else ''}",
        are="are" if several else "is",
    )
