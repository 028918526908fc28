"""Figures of a source against independent computations on files made here."""

import io
import json
import math
import shlex
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
from PIL import Image

from dinojax.data import advice, report, survey
from dinojax.data.sources import open_source


def noise(seed, shape):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def encoded(pixels, kind="PNG", **options):
    stream = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(stream, kind, **options)
    return stream.getvalue()


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def look(spec, limit=0, threads=2, **kwargs):
    source = open_source(spec)
    tally = survey.survey(source, survey.new_tally(len(source), limit), threads, **kwargs)
    return tally, report.summarise(source, tally, spec)


@pytest.fixture(scope="module")
def images():
    """Name to pixels of nine images in three classes, of different sizes."""
    shapes = [(10 + 7 * k, 40 - 3 * k, 3) for k in range(9)]
    classes = ("ant", "bee", "bee", "bee", "cat", "cat", "cat", "cat", "cat")
    return {f"{name}/{k}.png": noise(k, shapes[k]) // (k + 1) for k, name in enumerate(classes)}


@pytest.fixture(scope="module")
def folder(images, tmp_path_factory):
    """The images, two copies, a zero-byte file, a truncated one and one that is none."""
    root = tmp_path_factory.mktemp("images")
    for name, pixels in images.items():
        write(root / name, encoded(pixels))
    write(root / "ant/copy.png", encoded(images["bee/2.png"]))
    write(root / "cat/copy.png", encoded(images["bee/2.png"]))
    write(root / "ant/empty.jpg", b"")
    write(root / "ant/nothing.jpg", b"")  # no duplicate: it cannot be read
    write(root / "bee/cut.png", encoded(noise(99, (30, 30, 3)))[:500])
    write(root / "cat/text.jpg", b"this is no image at all")
    return root


@pytest.fixture(scope="module")
def found(folder):
    return look(f"folder:{folder}")[1]


def test_counts_and_formats(found):
    assert found["images"] == found["looked_at"] == 15
    assert found["readable"] == 11
    assert found["formats"] == {"PNG": 12, "empty": 2, "unknown": 1}
    assert found["stored"] == {"RGB uint8": 11, "unknown": 4}
    assert found["bands"] == {"3": 11} and found["channels"] == 3


def test_mean_and_deviation_are_those_of_all_pixels(found, images):
    all_of_them = [*images.values(), images["bee/2.png"], images["bee/2.png"]]
    pixels = np.concatenate([p.reshape(-1, 3) for p in all_of_them]).astype(np.float64) / 255
    assert found["pixels"] == len(pixels)
    np.testing.assert_allclose(found["mean"], pixels.mean(0), rtol=1e-13)
    np.testing.assert_allclose(found["std"], pixels.std(0), rtol=1e-12)


def test_sizes(found, images):
    shapes = np.array([p.shape[:2] for p in [*images.values(), *[images["bee/2.png"]] * 2]])
    for name, values in {
        "height": shapes[:, 0],
        "width": shapes[:, 1],
        "shorter_side": shapes.min(1),
        "aspect": shapes[:, 1] / shapes[:, 0],
    }.items():
        assert found[name]["min"] == values.min() and found[name]["max"] == values.max()
        assert found[name]["median"] == np.median(values)
    for name in ("shorter_side", "aspect", "bytes"):
        histogram = found[name]["histogram"]
        assert sum(histogram["counts"]) == 11
        assert len(histogram["edges"]) == len(histogram["counts"]) + 1
        assert histogram["edges"][0] == found[name]["min"]


def test_bytes(found, folder):
    sizes = [path.stat().st_size for path in folder.rglob("*.*")]
    assert found["bytes"]["total"] == sum(sizes)
    assert found["bytes"]["max"] == max(sizes)


def test_duplicates(found):
    copies = ["ant/copy.png", "bee/2.png", "cat/copy.png"]
    assert found["duplicates"] == {"copies": 2, "groups": 1, "examples": [copies]}


def test_unreadable_images_have_reasons(folder):
    tally, found = look(f"folder:{folder}")
    reasons = dict(tally.problems)
    assert found["unreadable"]["images"] == 4 == len(reasons)
    assert set(reasons) == {"ant/empty.jpg", "ant/nothing.jpg", "bee/cut.png", "cat/text.jpg"}
    assert "empty" in reasons["ant/empty.jpg"]
    assert all(reason and "\n" not in reason for reason in reasons.values())
    assert not any(name in reason for name, reason in reasons.items())
    assert found["unreadable"]["examples"][0] == {
        "name": "ant/empty.jpg",
        "reason": reasons["ant/empty.jpg"],
    }


def test_label_balance_is_of_the_whole_source(folder):
    for limit in (0, 3):
        labels = look(f"folder:{folder}", limit)[1]["labels"]
        assert labels["counts"] == {"ant": 4, "bee": 4, "cat": 7}
        assert (labels["classes"], labels["min"], labels["max"]) == (3, 4, 7)
        share = np.array([4, 4, 7]) / 15
        assert labels["entropy_bits"] == pytest.approx(-(share * np.log2(share)).sum())
        assert labels["uniform_bits"] == math.log2(3) and labels["unlabelled"] == 0


def test_no_labels(tmp_path):
    write(tmp_path / "a.png", encoded(noise(0, (8, 8, 3))))
    assert look(f"folder:{tmp_path}")[1]["labels"] is None


def test_images_without_a_label_are_counted_apart():
    found = report.balance(np.array([2, -1, 0, 2, -1]), None)
    assert found["counts"] == {"0": 1, "1": 0, "2": 2}
    assert (found["unlabelled"], found["min"], found["max"]) == (2, 0, 2)
    assert report.balance(np.array([0, 0]), ("one",))["entropy_bits"] == 0


@pytest.mark.parametrize(("count", "limit"), [(10, 0), (10, 4), (10, 10), (10, 99), (7, 3)])
def test_the_images_looked_at_are_evenly_spaced(count, limit):
    chosen = survey.new_tally(count, limit).chosen
    assert len(chosen) == (min(count, limit) or count)
    assert chosen[0] == 0 and len(set(chosen.tolist())) == len(chosen)
    gaps = np.diff([*chosen, count])
    assert gaps.max() - gaps.min() <= 1


def test_a_limited_look_says_so(folder):
    found = look(f"folder:{folder}", 4)[1]
    assert (found["images"], found["looked_at"]) == (15, 4)
    assert ("images", "15, of which 4 were looked at") in advice.table(found)


def test_threads_change_nothing(folder):
    ones = [look(f"folder:{folder}", threads=n)[1] for n in (1, 5)]
    for found in ones:
        for key in ("seconds", "images_per_second", "bytes_per_second"):
            assert found.pop(key) > 0
    assert ones[0] == ones[1]


def test_a_report_is_json(found):
    assert json.loads(json.dumps(found)) == found


# ---- kinds of files ------------------------------------------------------------------------------


def test_formats_and_types_as_stored(tmp_path):
    grey, colour = noise(0, (12, 9)), noise(1, (12, 9, 3))
    wide = np.random.default_rng(2).integers(0, 2**16, (12, 9), np.uint16)
    write(tmp_path / "a.jpg", encoded(colour, "JPEG"))
    write(tmp_path / "b.jpg", encoded(grey, "JPEG"))
    write(tmp_path / "c.jpg", encoded(Image.fromarray(colour).convert("CMYK"), "JPEG"))
    write(tmp_path / "d.png", encoded(wide))
    write(tmp_path / "e.webp", encoded(colour, "WEBP"))
    write(tmp_path / "f.gif", encoded(Image.fromarray(colour).convert("P"), "GIF"))
    write(tmp_path / "g.bmp", encoded(colour, "BMP"))
    tifffile.imwrite(tmp_path / "h.tif", noise(3, (12, 9, 4)), photometric="minisblack")
    np.save(tmp_path / "i.npy", noise(4, (12, 9, 3)))
    write(tmp_path / "j.ppm", encoded(colour, "PPM"))
    found = look(f"folder:{tmp_path}")[1]
    assert found["unreadable"]["images"] == 0
    assert found["formats"] == {
        "JPEG": 3,
        **dict.fromkeys(("PNG", "WebP", "GIF", "BMP", "TIFF", "NPY", "PNM"), 1),
    }
    assert found["stored"] == {
        "RGB uint8": 4,
        **dict.fromkeys(("L uint8", "CMYK uint8", "1 x uint16", "P uint8"), 1),
        **dict.fromkeys(("4 x uint8", "3 x uint8"), 1),
    }
    assert found["bands"] == {"3": 9, "4": 1} and found["channels"] == 3
    assert "other than 3 bands" in advice.advice(found)[0]


def tiles(root, dtype=np.uint16, top=3000):
    """Five-band TIFFs that use part of their type, and all their values."""
    rng = np.random.default_rng(0)
    values = []
    for k in range(4):
        pixels = (rng.random((20 + k, 31, 5)) ** 2 * np.linspace(top / 4, top, 5)).astype(dtype)
        tifffile.imwrite(root / f"{k}.tif", pixels, photometric="minisblack")
        values.append(pixels.reshape(-1, 5))
    return np.concatenate(values)


def test_range_of_sixteen_bits(tmp_path):
    values = tiles(tmp_path)
    found = look(f"folder:{tmp_path}")[1]
    assert found["stored"] == {"5 x uint16": 4} and found["channels"] == 5
    low, high = np.percentile(values, (0.1, 99.9), axis=0)
    np.testing.assert_allclose(found["range"]["low"], low, rtol=1e-6)
    np.testing.assert_allclose(found["range"]["high"], high, rtol=1e-6)
    assert found["range"]["needed"]
    np.testing.assert_allclose(
        found["mean"], (np.round(values / 257) / 255).mean(0), rtol=1e-12
    )  # as the source gives it without a range
    command = shlex.split(advice.advice(found)[-1])
    assert command[:2] == ["dinojax", "data"]
    again = look(command[2])[1]
    assert again["range"] is None
    assert np.min(again["mean"]) > 0.2 and again["channels"] == 5


def test_range_of_chosen_bands(tmp_path):
    values = tiles(tmp_path)
    found = look(f"folder:{tmp_path}?bands=4,0")[1]
    np.testing.assert_allclose(
        found["range"]["high"], np.percentile(values[:, [4, 0]], 99.9, axis=0), rtol=1e-6
    )
    assert look(f"folder:{tmp_path}?bands=4,0&{found['range']['option']}")[1]["channels"] == 2


def test_what_cannot_be_read_without_a_range_gets_one(tmp_path):
    tiles(tmp_path, np.float32, top=0.5)
    found = look(f"folder:{tmp_path}")[1]
    assert found["readable"] == 0 and found["mean"] is None and found["range"]["needed"]
    wider = shlex.split(advice.advice(found)[-1])[2]
    assert look(wider)[1]["readable"] == 4
    advice.table(found)


def test_full_sixteen_bits_need_no_range(tmp_path):
    tiles(tmp_path, top=65000)
    assert not look(f"folder:{tmp_path}")[1]["range"]["needed"]


@pytest.mark.parametrize("spec", ["scenes:20", "scenes:20?size=32"])
def test_sources_of_other_kinds(spec):
    found = look(spec)[1]
    source = open_source(spec)
    pixels = np.concatenate([source.image(i).reshape(-1, 3) for i in range(20)]) / 255
    np.testing.assert_allclose(found["mean"], pixels.mean(0), rtol=1e-12)
    assert found["formats"] == {"PNG": 20} and found["labels"]["classes"] == 10


def test_parquet(tmp_path):
    rows = [encoded(noise(k % 3, (16, 16, 3)), "JPEG") for k in range(6)] + [None]
    pq.write_table(pa.table({"image": pa.array(rows, pa.binary())}), tmp_path / "x.parquet")
    found = look(f"parquet:{tmp_path}/x.parquet")[1]
    assert found["duplicates"]["copies"] == 3 and found["duplicates"]["groups"] == 3
    assert found["unreadable"]["images"] == 1 and found["readable"] == 6


# ---- exact, bounded, interruptible ---------------------------------------------------------------


def test_moments_do_not_overflow_or_cancel():
    levels = np.zeros((1, 256), np.int64)
    levels[0, 200], levels[0, 201] = 10**16, 1  # the deviation is 1e-8 of a level
    (mean,), (deviation,) = report.moments(levels)
    assert mean == pytest.approx(200 / 255, rel=1e-15)
    assert deviation == pytest.approx(1e-8 / 255, rel=1e-12)


@pytest.mark.parametrize("exact", [survey.EXACT, 50])
def test_levels_are_counted_in_pieces_that_float32_can_hold(exact, monkeypatch):
    monkeypatch.setattr(survey, "EXACT", exact)
    pixels = noise(0, (23, 17, 4))
    counted = survey.count_levels(pixels)
    for band in range(4):
        expected = np.bincount(pixels[..., band].ravel(), minlength=256)
        np.testing.assert_array_equal(counted[band], expected)


def test_only_a_few_images_are_ahead_of_the_counting():
    begun, started = [], threading.Event()

    def work(item):
        begun.append(item)
        started.set()
        return item

    results = survey.in_order(work, range(1000), 2)
    assert [next(results) for _ in range(5)] == list(range(5))
    assert len(begun) <= 5 + 8
    results.close()
    assert len(begun) <= 5 + 8


def test_reasons_are_bounded(folder, monkeypatch):
    monkeypatch.setattr(survey, "REASONS", 2)
    tally, found = look(f"folder:{folder}")
    assert len(tally.problems) == 2 and found["unreadable"]["images"] == 4


def test_values_for_percentiles_are_bounded(tmp_path, monkeypatch):
    tiles(tmp_path)
    monkeypatch.setattr(survey, "VALUES", 400)
    monkeypatch.setattr(survey, "VALUE_IMAGES", 2)
    tally, found = look(f"folder:{tmp_path}")
    (kept,) = tally.values.values()
    assert len(kept) == 2 and sum(array.size for array in kept) <= 500
    assert found["range"]["needed"]


@pytest.mark.parametrize("fixture", ["folder", "bands"])
def test_an_interrupted_pass_goes_on(fixture, folder, tmp_path):
    if fixture == "bands":
        tiles(tmp_path)
    spec = f"folder:{folder if fixture == 'folder' else tmp_path}"
    source, whole = open_source(spec), look(spec)[1]
    kept, stops = tmp_path / "kept.npz", 0
    while True:
        tally = survey.load_tally(survey.new_tally(len(source), 0), kept, "this pass")
        before = tally.done
        survey.survey(source, tally, 2, stop=lambda: tally.done >= before + 2)  # noqa: B023
        assert tally.done == min(before + 2, len(source))
        if tally.done == len(source):
            break
        survey.save_tally(tally, kept, "this pass")
        stops += 1
    assert stops == (len(source) - 1) // 2
    found = report.summarise(source, tally, spec)
    for timed in ("seconds", "images_per_second", "bytes_per_second"):
        found.pop(timed), whole.pop(timed)
    assert found == whole


def test_another_or_a_damaged_pass_is_not_continued(folder, tmp_path):
    tally, _ = look(f"folder:{folder}")
    survey.save_tally(tally, tmp_path / "kept.npz", "one pass")
    assert survey.load_tally(survey.new_tally(15, 0), tmp_path / "kept.npz", "another").done == 0
    (tmp_path / "kept.npz").write_bytes(b"PK\x03\x04 cut short")
    assert survey.load_tally(survey.new_tally(15, 0), tmp_path / "kept.npz", "one pass").done == 0


# ---- in words ------------------------------------------------------------------------------------


def test_table(found):
    rows = dict(advice.table(found))
    assert rows["images"] == "15, all looked at"
    assert rows["formats"] == "PNG 12, empty 2, unknown 1"
    assert rows["height"] == "10 to 66, median 31"
    assert rows["duplicates"] == (
        "2 superfluous in 1 group, such as ant/copy.png = bee/2.png = cat/copy.png"
    )
    assert rows["unreadable"].startswith("4, such as ant/empty.jpg: ")
    assert rows["labels"].startswith("3 classes of 4 to 7 images, entropy 1.53 of 1.58 bits")
    assert rows["mean"] == ", ".join(f"{value:.4f}" for value in found["mean"])


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (17_757, "17.76 kB"), (4.2e12, "4.2 TB")],
)
def test_bytes_in_words(count, words):
    assert advice.size(count) == words
