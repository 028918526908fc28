"""The pictures of `dinojax data`: sizes, and that what they show is where it should be."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from dinojax import crop_pictures, data_pictures, visualize
from dinojax.data import report, survey
from dinojax.data.masking import Masks
from dinojax.data.mixture import Component, Mixture
from dinojax.data.multicrop import Crops, boxes, views
from dinojax.data.photometric import Photometric
from dinojax.data.pipeline import Batches
from dinojax.data.sources import open_source


def count(picture, colour):
    return int((picture == np.array(colour, np.uint8)).all(-1).sum())


def summary(spec):
    source = open_source(spec)
    tally = survey.survey(source, survey.new_tally(len(source), 0), 2)
    return report.summarise(source, tally, spec)


# ---- captions ------------------------------------------------------------------------------------


def test_a_caption_is_below_the_picture_and_no_wider():
    tile = np.full((40, 90, 3), 7, np.uint8)
    short, long = (visualize.captioned(tile, [text]) for text in ("ab", "ab" * 40))
    for picture in (short, long):
        np.testing.assert_array_equal(picture[:40], tile)
        assert picture.shape[1] == 90 and 50 < picture.shape[0] < 70
        assert (picture[40:] < 128).any()  # ink
    assert (long[40:] < 128).sum() > 3 * (short[40:] < 128).sum()
    assert visualize.captioned(tile, ["a", "b"]).shape[0] > short.shape[0]


def test_long_names_keep_both_ends():
    face = visualize.font(12)
    text = visualize._shortened("train/n01440764/n01440764_10026.JPEG", face, 120)
    assert text.startswith("train/") and text.endswith(".JPEG") and "…" in text
    assert face.getlength(text) <= 120
    assert visualize._shortened("short.png", face, 120) == "short.png"


# ---- contact sheet -------------------------------------------------------------------------------


def flat(path, colour, size):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_contact_sheet_shows_every_image_whole(tmp_path):
    flat(tmp_path / "a/wide.png", (255, 0, 0), (300, 100))
    flat(tmp_path / "b/high.png", (0, 255, 0), (10, 40))
    (tmp_path / "b/none.png").write_bytes(b"")
    sheet = data_pictures.contact(open_source(f"folder:{tmp_path}"), "a title")
    side = data_pictures.TILE
    assert count(sheet, (255, 0, 0)) == side * round(side / 3)
    assert count(sheet, (0, 255, 0)) == side * round(side / 4)
    assert count(sheet, (200, 200, 200)) >= side * side  # the one that cannot be read
    red = np.argwhere((sheet == (255, 0, 0)).all(-1))
    assert np.ptp(red[:, 1]) + 1 == side  # wide, not high


def test_contact_sheet_of_many_bands_and_of_grey():
    for image in (np.full((9, 9, 5), 90, np.uint8), np.full((9, 9, 1), 90, np.uint8)):
        tile = data_pictures.framed(image, 60)
        assert tile.shape == (60, 60, 3) and (tile == 90).all()


def test_names_of_an_image():
    source = open_source("scenes:20")
    assert data_pictures.names(source, 3) == ["ringed star", "scenes/train/3"]


# ---- figures -------------------------------------------------------------------------------------


def test_figures_of_sizes_and_labels(tmp_path):
    for k in range(6):
        flat(tmp_path / f"class{k % 3}/{k}.png", (k, 0, 0), (10 + k, 20 + 9 * k))
    found = summary(f"folder:{tmp_path}")
    wide, high = data_pictures.sizes(found), data_pictures.labels(found)
    assert wide.shape[1] > 2.5 * wide.shape[0] and high.dtype == np.uint8
    ink = tuple(int(data_pictures.INK[k : k + 2], 16) for k in (1, 3, 5))
    assert count(wide, ink) > 5000 and count(high, ink) > 5000  # bars are drawn


def test_bars_are_as_long_as_classes_are_large():
    counts = {"few": 10, "many": 40}
    found = {"labels": report.balance(np.repeat([0, 1], [10, 40]), tuple(counts))}
    assert found["labels"]["counts"] == counts
    picture = data_pictures.labels(found)
    ink = tuple(int(data_pictures.INK[k : k + 2], 16) for k in (1, 3, 5))
    across = (picture == np.array(ink, np.uint8)).all(-1).sum(1)
    top, bottom = across[: len(across) // 2].max(), across[len(across) // 2 :].max()
    assert top == pytest.approx(4 * bottom, rel=0.03)  # the largest comes first


def test_a_thousand_classes_stay_legible():
    labels = np.repeat(np.arange(1000), np.arange(1000) + 1)
    found = {"labels": report.balance(labels, tuple(f"class {k}" for k in range(1000)))}
    assert data_pictures.labels(found).shape[0] < 1200


def test_figures_of_one_size(tmp_path):
    flat(tmp_path / "a.png", (1, 2, 3), (16, 16))
    assert data_pictures.sizes(summary(f"folder:{tmp_path}")).shape[2] == 3


# ---- crops ---------------------------------------------------------------------------------------

CROPS = Crops(global_size=32, local_size=16, locals=3)


def batches(source="scenes:40", crops=CROPS, **kwargs):
    source = open_source(source) if isinstance(source, str) else source
    return Batches(source, (crops,), (1.0,), Masks(patch=8), 8, 4, seed=3, **kwargs)


def test_hidden_patches_are_where_the_mask_is():
    crop = np.full((35, 35, 3), 200, np.uint8)  # a border of three pixels belongs to no patch
    mask = np.zeros((4, 4), bool)
    mask[1, 2] = mask[3, 0] = True
    shown = crop_pictures.hidden(crop, mask.ravel(), 8)
    covered = (shown != 200).any(-1)
    expected = np.zeros((35, 35), bool)
    expected[8:16, 16:24] = expected[24:32, 0:8] = True
    np.testing.assert_array_equal(covered, expected)


def test_boxes_are_drawn_where_the_crops_are():
    image = np.zeros((235, 470, 3), np.uint8)
    places = {
        "global_crops": [(10, 20, 100, 200), (60, 200, 170, 260)],
        "local_crops": [(150, 30, 40, 50)],
    }
    drawn = crop_pictures.boxed(image, places)
    assert drawn.shape == (235, 470, 3)
    for colour, (top, left, h, w) in zip(
        (*crop_pictures.COLOURS, crop_pictures.LOCAL_COLOUR),
        [*places["global_crops"], *places["local_crops"]],
    ):
        found = np.argwhere((drawn == np.array(colour, np.uint8)).all(-1))
        assert tuple(found.min(0)) == (top, left)
        assert tuple(found.max(0)) == (top + h - 1, left + w - 1)


def test_local_crops_of_global_ones_are_placed_in_the_image():
    crops = replace(CROPS, local_grid=8)
    places = {
        "global_crops": [(10, 20, 64, 96), (0, 0, 32, 32)],
        "local_crops": [(8, 16, 16, 16), (0, 8, 16, 16), (16, 0, 16, 16)],
    }
    assert crop_pictures.in_image(places, crops)["local_crops"] == [
        (26, 68, 32, 48),
        (10, 44, 32, 48),
        (16, 0, 16, 16),
    ]
    assert places["local_crops"][0] == (8, 16, 16, 16)


def mixture():
    parts = [("a", "scenes:40", 0.0, 1.0), ("b", "scenes:40?split=val", 1.0, 0.0)]
    return Mixture(tuple(Component(n, open_source(s), w, p) for n, s, w, p in parts))


@pytest.mark.parametrize("crops", [CROPS, Crops(32, 16, 48, 3), replace(CROPS, local_grid=8)])
@pytest.mark.parametrize("make", [lambda: "scenes:40", mixture])
def test_boxes_are_those_of_training(crops, make):
    """The generators of `read`, given to `views`, yield the very crops of the batch."""
    made = batches(make(), crops)
    batch, rows = made.at(0), list(crop_pictures.read(made))
    assert [row for row, *_ in rows] == list(range(8))
    for row, image, _, rng in rows:
        for name, pixels in views(image, rng, crops).items():
            np.testing.assert_array_equal(pixels, batch[name][row])


def test_images_that_cannot_be_read_are_left_out(tmp_path):
    for k in range(8):
        flat(tmp_path / f"{k}.png", (k, k, k), (20, 20))
    for k in (1, 4, 5):
        (tmp_path / f"{k}.png").write_bytes(b"")
    rows = list(crop_pictures.read(batches(f"folder:{tmp_path}")))
    assert sorted(names[-1] for *_, names, _ in rows) == [f"{k}.png" for k in (0, 2, 3, 6, 7)]
    for _, image, names, _ in rows:
        assert image[0, 0, 0] == int(names[-1][0])


def test_a_panel_holds_every_crop():
    """Flat crops of different colours, each of which must appear at its full size."""
    image = np.full((60, 90, 3), 250, np.uint8)
    row = {
        "global_crops": np.stack([np.full((32, 32, 3), v, np.uint8) for v in (10, 20)]),
        "local_crops": np.stack([np.full((16, 16, 3), v, np.uint8) for v in (30, 40, 50)]),
        "masks": np.zeros((2, 16), bool),
    }
    row["masks"][0, [0, 5, 6]] = True
    seen = {
        "global": row["global_crops"] + 1,
        "local": row["local_crops"] + 1,
        "gram": np.stack([np.full((64, 64, 3), v, np.uint8) for v in (60, 70)]),
    }
    places = boxes(60, 90, np.random.default_rng(0), CROPS)
    words = ["unchanged", "flip, blur 1.0", "jitter, grey", "flip", "unchanged"]
    picture = crop_pictures.panel(image, ["a", "b"], row, seen, places, words, 8)
    large, small = crop_pictures.GLOBAL**2, (crop_pictures.LOCAL // 16 * 16) ** 2
    counts = {v: count(picture, (v, v, v)) for v in (10, 20, 30, 40, 50, 60, 70, 11, 21, 31)}
    hidden = 3 * (8 * 7) ** 2  # drawn at seven times the size
    text = 400  # pixels of letters may have any grey
    expected = {10: large, 20: large, 60: 192**2, 70: 192**2, 11: 2 * large - hidden, 21: 2 * large}
    expected |= {30: small, 40: small, 50: small, 31: small}
    for value, pixels in expected.items():
        assert 0 <= counts[value] - pixels < text, (value, counts[value], pixels)
    covered = count(picture, crop_pictures.HIDDEN) + count(picture, crop_pictures.SEAM)
    assert covered == hidden


@pytest.mark.parametrize("bands", [3, 5])
def test_panels(bands, tmp_path):
    rng = np.random.default_rng(0)
    for k in range(8):
        np.save(tmp_path / f"{k}.npy", rng.integers(0, 256, (40, 60, bands), np.uint8))
    made = batches(f"folder:{tmp_path}", channels=bands)
    pictures = list(crop_pictures.panels(made, Photometric(), 2))
    assert len(pictures) == 2
    assert all(p.dtype == np.uint8 and p.shape[1] > 900 for p in pictures)


def test_words_say_what_colour_does():
    seeds = np.array([5, 6], np.uint32)
    always = Photometric(
        flip=1.0, jitter=1.0, grayscale=1.0, blur=(0.0, 1.0, 0.0), solarize=(0.0, 1.0, 0.0)
    )
    for words in crop_pictures.events(seeds, always, 4, 3):
        assert words[0] == words[2] == words[3] == "flip, jitter, grey"
        assert words[1].startswith("flip, jitter, grey, blur ") and words[1].endswith(", solarize")
    assert "grey" not in crop_pictures.events(seeds, always, 4, 5)[0][1]
    never = Photometric(flip=0, jitter=0, grayscale=0, blur=(0, 0, 0), solarize=(0, 0, 0))
    assert crop_pictures.events(seeds, never, 3, 3) == [["unchanged"] * 3] * 2


def test_after_colour_with_nothing_to_do_is_as_cut():
    made = batches()
    batch = made.at(0)
    never = Photometric(flip=0, jitter=0, grayscale=0, blur=(0, 0, 0), solarize=(0, 0, 0))
    sent = {name: batch[name] for name in ("global_crops", "local_crops", "seeds")}
    seen = crop_pictures.as_levels(sent, never, CROPS)
    np.testing.assert_array_equal(seen["global"], batch["global_crops"])
    np.testing.assert_array_equal(seen["local"], batch["local_crops"])
