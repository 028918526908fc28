"""Captions: every word of every sentence is checked against the scene by other means."""

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest

from dinojax.data.scenes.captions import MOST, captions, relations
from dinojax.data.scenes.draw import draw, render
from dinojax.data.scenes.labels import boxes
from dinojax.data.scenes.parts import COLOURS, PATTERNS, SHAPES
from dinojax.data.scenes.spec import describe, even

TONES = rf"(?:(?:pale |dark )?(?:{'|'.join(COLOURS)})|white|black)"
LOOKS = "|".join(PATTERNS)
NOUN = re.compile(
    rf"\ban? (?P<size>small |large |huge )?(?:(?P<colour>{TONES}) (?P<texture>(?:{LOOKS}) )?|"
    rf"(?P<texture2>{LOOKS}) (?P<colour2>{TONES}) )(?P<shape>{'|'.join(SHAPES)})\b"
)
GROUND = re.compile(rf"\ban? (?P<colour>{TONES})(?: (?P<texture>{LOOKS}))? ground\b")
SIDES = "in front of|behind|left of|right of|above|below"
PLACES = r"(?:in the (centre)|on the (left|right)|at the ((?:top|bottom)(?: left| right)?))"
LIST = "(?:N, )*(?:N and )?N"
# What a sentence may look like once its nouns are N and its ground is G.
FORMS = {
    "main": ["N on G", "N lies on G", "on G there is N", "the picture shows N on G"],
    "relation": [rf"N (?:is )?({SIDES}) N", rf"there is N ({SIDES}) N"],
    "reverse": [rf"N, and ({SIDES}) it N"],
    "place": [rf"N (?:can be seen )?{PLACES}", rf"{PLACES} there is N"],
    "list": [LIST, f"{LIST} on G", f"the picture shows {LIST}"],
    "counted": [
        rf"(one) shape: {LIST}|(two|three|four) shapes: {LIST}",
        rf"there is (one) shape on G: {LIST}|there are (two|three|four) shapes on G: {LIST}",
    ],
}
NUMBERS = ("none", "one", "two", "three", "four")


@pytest.mark.parametrize("evened", [False, True])
def test_every_sentence_is_true(evened):
    kinds = []
    for index in range(120):
        spec = describe(11, index)
        scene = draw(even(spec) if evened else spec, 96)
        for sentence in captions(scene, 5):
            kinds.append(_check(sentence, scene))
    assert set(kinds) == set(FORMS)


def test_false_sentences_are_found_out():
    """What the test above rests on: it sees a wrong word."""
    scene = render(0, 0, 96)  # a red striped disc, a pale teal arrow top right, a black triangle
    _check("A black triangle is left of a large red striped disc.", scene)
    for wrong in (
        "A black triangle is right of a large red striped disc.",
        "A black triangle in front of a large red striped disc.",
        "A huge red striped disc on a pale green mottled ground.",
        "A red dotted disc on a pale green mottled ground.",
        "A red striped disc on a dark green mottled ground.",
        "A red striped disc and a red striped disc.",
        "Two shapes: a red striped disc and a black triangle.",
        "A black triangle at the top.",
        "A red striped disc flies over a pale green mottled ground.",
    ):
        with pytest.raises(AssertionError):
            _check(wrong, scene)


def test_captions_of_a_scene_differ_and_vary():
    starts = set()
    for index in range(40):
        scene = render(2, index, 64)
        many = captions(scene, MOST)
        assert len(set(many)) == MOST
        assert captions(scene) == captions(scene, 3) == many[:3]
        starts |= {" ".join(sentence.split()[:2]) for sentence in many}
        assert all(s[0].isupper() and s.endswith(".") and s.count(".") == 1 for s in many)
    assert {"The picture", "There is", "In the", "On a"} <= starts


@pytest.mark.parametrize("count", [0, MOST + 1])
def test_number_of_captions_is_limited(count):
    with pytest.raises(ValueError, match=f"{count} captions"):
        captions(render(0, 0, 32), count)


def test_a_scene_without_objects_has_no_captions():
    bare = draw(replace(describe(0, 0), objects=()), 32)
    with pytest.raises(ValueError, match="no object of the scene"):
        captions(bare)


def test_relations_come_in_pairs():
    opposite = dict(zip(SIDES.split("|"), ("behind", "in front of", "right of", "left of")))
    opposite |= {"above": "below", "below": "above"}
    words = set()
    for index in range(60):
        scene = render(4, index, 64)
        found = relations(scene, boxes(scene))
        assert {(b, opposite[words], a) for a, words, b in found} == set(found)
        words |= {relation.words for relation in found}
    assert words == set(opposite)


# --- the truth, by other means -------------------------------------------------------------------


def _check(sentence, scene):
    """Which kind of sentence it is; AssertionError if it is none, or untrue."""
    text = sentence[0].lower() + sentence[1:].removesuffix(".")
    nouns = [_meant(match, scene) for match in NOUN.finditer(text)]
    assert all(nouns), f"{sentence}: no such object"
    grounds = list(GROUND.finditer(text))
    for match in grounds:
        _check_ground(match, scene)
    form = NOUN.sub("N", GROUND.sub("G", text))
    kind, found = next(
        ((k, m) for k, forms in FORMS.items() for f in forms if (m := re.fullmatch(f, form))),
        (None, None),
    )
    assert kind, f"{sentence}: no known form: {form}"
    words = next((word for word in found.groups() if word), None)
    if kind == "main":
        assert 0 in nouns[0], "the main object"
    elif kind in ("relation", "reverse"):
        first, second = nouns if kind == "relation" else nouns[::-1]
        pairs = itertools.product(first, second)
        assert any(a != b and _holds(scene, a, words, b) for a, b in pairs), sentence
    elif kind == "place":
        assert any(_lies(scene, n, words) for n in nouns[0]), sentence
    else:
        different = (set(pick) for pick in itertools.product(*nouns))
        assert max(map(len, different)) == len(nouns), "every noun means another object"
        if kind == "counted":
            visible = len(np.unique(scene.mask[scene.mask > 0]))
            assert visible == NUMBERS.index(words) == len(nouns)
    return kind


def _meant(noun, scene):
    """Numbers of the visible objects that a noun fits."""
    texture = (noun["texture"] or noun["texture2"] or "plain").strip()
    fitting = []
    for n, thing in enumerate(scene.spec.objects):
        size = "small" if thing.scale < 0.2 else "huge" if thing.scale > np.sqrt(0.5) else "large"
        fits = (thing.shape, thing.texture) == (noun["shape"], texture)
        fits &= (noun["size"] or size).strip() == size
        fits &= _fits(noun["colour"] or noun["colour2"], thing)
        if fits and (scene.mask == n + 1).any():
            fitting.append(n)
    return fitting


def _fits(words, thing):
    """Whether the words fit the tone that one sees most of a plain object; see test_scene_labels
    for tones against pixels."""
    tone, base = np.array(thing.tones[0]), np.array(COLOURS[thing.colour])
    if words == "white":
        return tone.min() > 175
    if words == "black":
        return tone.max() < 120
    *how, name = words.split()
    if name != thing.colour:
        return False
    if thing.texture != "plain":
        return not how
    lighter = (tone - base).mean()
    return {"pale": lighter > 20, "dark": lighter < -25}.get("".join(how), abs(lighter) < 80)


def _check_ground(match, scene):
    ground = scene.spec.ground
    assert (match["texture"] or "plain") == ground.texture
    *how, name = match["colour"].split()
    lighter = np.mean(ground.tones) - np.mean(COLOURS[name])
    assert name == ground.colour
    assert scene.spec.even or how == ["pale" if lighter > 0 else "dark"]


def _holds(scene, a, words, b):
    """In front: in a scene of these two alone, taking the first away uncovers some of the other."""
    if words in ("in front of", "behind"):
        near, far = (a, b) if words == "in front of" else (b, a)
        things = scene.spec.objects[near], scene.spec.objects[far]
        both = draw(replace(scene.spec, objects=things), 96).mask == 2
        alone = draw(replace(scene.spec, objects=things[1:]), 96).mask == 1
        return alone.sum() > both.sum()
    middle, spans = [], []
    for n in (a, b):
        y, x = np.nonzero(scene.mask == n + 1)
        spans.append({"x": (x.min(), x.max() + 1), "y": (y.min(), y.max() + 1)})
        middle.append({axis: sum(span) / 2 for axis, span in spans[-1].items()})
    axis, other = ("x", "y") if words in ("left of", "right of") else ("y", "x")
    before = words in ("left of", "above")
    first, second = (0, 1) if before else (1, 0)
    return (
        middle[first][axis] < spans[second][axis][0]
        and middle[second][axis] > spans[first][axis][1]
        and abs(middle[0][axis] - middle[1][axis]) >= abs(middle[0][other] - middle[1][other])
    )


def _lies(scene, n, words):
    y, x = np.nonzero(scene.mask == n + 1)
    column = int((x.min() + x.max() + 1) / 2 / 96 * 3)
    row = int((y.min() + y.max() + 1) / 2 / 96 * 3)
    said = {"left": 0, "right": 2}, {"top": 0, "bottom": 2}
    expected = [next((at[w] for w in words.split() if w in at), 1) for at in said]
    return [column, row] == expected
