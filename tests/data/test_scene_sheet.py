"""Pictures of scenes with their labels drawn on them."""

import cv2
import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image

from dinojax.data.scenes.draw import draw, render
from dinojax.data.scenes.labels import boxes, semantic
from dinojax.data.scenes.sheet import FRAMES, GAP, HEAD, TILE, annotated, main
from dinojax.data.scenes.spec import describe

PALETTE = np.round(255 * np.array(colormaps["tab10"].colors)).astype(int)


def test_what_is_drawn_lies_where_the_labels_are():
    scene = render(0, 5, 110)  # a large cross, a square and a triangle
    pictures = annotated(scene)
    assert all(picture.dtype == np.uint8 for picture in pictures)
    seen, mask = boxes(scene), semantic(scene)
    boxed, masked = (picture[HEAD:].astype(int) for picture in pictures[:2])
    scale = TILE / 110
    for box, category in zip(seen.xyxy * scale, seen.categories):
        x0, y0, x1, y1 = np.round(box).astype(int)
        near = np.abs(boxed - PALETTE[category]).max(-1) < 60
        for row, columns in ((y1, slice(x0 + 9, x1 - 9)), (y0, slice(x0 + 9, x1 - 9))):
            rows = near[max(row - 3, 0) : row + 3, columns]
            assert rows.any(0).mean() > 0.25  # words may lie on it
    for category in seen.categories:  # the overlay is painted over, never beside the object
        inside = cv2.resize((mask == category + 1).astype(np.uint8), (TILE, TILE)) > 0
        inside = cv2.erode(inside.astype(np.uint8), np.ones((7, 7))) > 0
        shown = masked[inside].mean(0) - masked[~inside].mean(0)
        tint = PALETTE[category] - PALETTE.mean()
        assert np.corrcoef(shown, tint)[0, 1] > 0.3


def test_shapes_of_the_five_pictures():
    for spec in (describe(0, 12), describe(0, 14)):  # two words on one line, objects side by side
        boxed, masked, deep, pair, strip = annotated(draw(spec, 48, bands=5))
        assert boxed.shape == masked.shape == deep.shape == (TILE + HEAD, TILE, 3)
        assert pair.shape[1] == 2 * (TILE * 3 // 4) + GAP
        assert strip.shape[1] == 3 * TILE + 2 * GAP
        assert strip.shape[0] == (strip.shape[1] - (FRAMES - 1) * GAP) // FRAMES + HEAD
        assert min(picture[:HEAD].min() for picture in (boxed, pair, strip)) < 60  # the titles


def test_command_writes_a_small_picture(tmp_path, capsys):
    main(["--out", str(tmp_path / "sheet.png"), "--scenes", "2", "--size", "48"])
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.size[0] == 3 * TILE + 4 * GAP
    assert (tmp_path / "sheet.png").stat().st_size < 400_000
    assert "sheet.png: 1022 x" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["sheet.png"]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["--size", "3"], "size='3' should be a whole number of at least 16"),
        (["--scenes", "-4"], "at least 1"),
        (["--out", "no/such/x.png"], "--out 'no/such/x.png': there is no folder 'no/such'."),
    ],
)
def test_command_says_what_is_wrong(wrong, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--out", str(tmp_path / "x.png"), "--scenes", "1", "--size", "32", *wrong])
    assert stop.value.code == 2
    assert not list(tmp_path.iterdir())
    assert words in capsys.readouterr().err
