"""Sources: what they find, what they decode, and the one sentence they end with otherwise."""

import io
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

from dinojax.data import parquet, sources
from dinojax.data.decode import UnreadableImage, decode
from dinojax.data.sources import open_source


def picture(seed=0, size=(30, 20)):
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (4, 5, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


def encoded(image, kind="JPEG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


# ------------------------------------------------------------------------------------ decoding


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_pixels_are_pillow_s(subsampling, progressive):
    data = encoded(picture(), subsampling=subsampling, progressive=progressive)
    expected = np.asarray(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(decode(data, "x"), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_orientation_is_applied(orientation, kind):
    exif = Image.Exif()
    exif[0x112] = orientation
    data = encoded(picture(), kind, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert expected.shape == ((20, 30, 3) if orientation < 5 else (30, 20, 3))
    np.testing.assert_array_equal(decode(data, "x"), expected)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("L", "JPEG"), ("CMYK", "JPEG"), ("RGBA", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("1", "PNG")]
    + [("RGB", "WEBP"), ("RGB", "BMP"), ("P", "GIF"), ("RGB", "TIFF"), ("L", "TIFF")],
)
def test_every_mode_becomes_rgb(mode, kind):
    data = encoded(picture().convert(mode), kind)
    pixels = decode(data, "x")
    assert pixels.dtype == np.uint8 and pixels.shape == (20, 30, 3) and pixels.flags.writeable
    np.testing.assert_array_equal(pixels, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_sixteen_bit_grey_keeps_its_range():
    grey = np.linspace(0, 65535, 200).astype(np.uint16).reshape(10, 20)
    pixels = decode(encoded(Image.fromarray(grey), "PNG"), "x")
    np.testing.assert_array_equal(pixels, np.repeat((grey // 257)[..., None], 3, 2))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.98])
def test_truncated_files_are_unreadable(kind, kept):
    data = encoded(picture(size=(90, 60)), kind)
    with pytest.raises(UnreadableImage, match=r"^some/name"):
        decode(data[: int(len(data) * kept)], "some/name")


def test_trailing_bytes_do_no_harm():
    data = encoded(picture())
    np.testing.assert_array_equal(decode(data + b"\0\0\0", "x"), decode(data, "x"))


# ------------------------------------------------------------------------------------- folders


def test_folder_with_classes(tmp_path):
    for name in ("train/cat/b.jpg", "train/cat/deep/er/a.JPG", "train/ant/c.png"):
        write(tmp_path / name, encoded(picture(len(name)), "PNG" if "png" in name else "JPEG"))
    for name in (".hidden/x.jpg", "train/._b.jpg", "train/notes.txt"):
        write(tmp_path / name, b"no image")
    source = open_source(f"folder:{tmp_path}")
    assert len(source) == 3
    assert source.classes == ("ant", "cat")  # the folder that holds everything is no class
    assert source.labels().tolist() == [0, 1, 1]
    assert [source.label(i) for i in range(3)] == [0, 1, 1]
    assert [source.name(i) for i in range(3)] == [
        "train/ant/c.png",
        "train/cat/b.jpg",
        "train/cat/deep/er/a.JPG",
    ]
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again.image(2), source.image(2))


@pytest.mark.parametrize("names", [("a.jpg", "cat/b.jpg"), ("a.jpg",), ("one/a.jpg", "one/b.jpg")])
def test_folder_without_classes(tmp_path, names):
    for name in names:
        write(tmp_path / name, encoded(picture()))
    source = open_source(f"folder:{tmp_path}")
    assert source.classes is None and source.labels() is None and source.label(0) is None


def test_a_file_that_vanished_is_unreadable(tmp_path):
    write(tmp_path / "a.jpg", encoded(picture()))
    source = open_source(f"folder:{tmp_path}")
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(UnreadableImage, match="No such file"):
        source.image(0)


# ------------------------------------------------------------------------------------- parquet


@pytest.fixture
def shards(tmp_path):
    """Two files of 7 rows in row groups of 3; every third row is `val`."""
    for shard in range(2):
        rows = range(7 * shard, 7 * shard + 7)
        table = pa.table(
            {
                "image": [encoded(picture(k), "PNG") for k in rows],
                "label": pa.array([k % 4 for k in rows], pa.int16()),
                "species": [f"s{k % 2}" for k in rows],
                "split": ["val" if k % 3 == 0 else "train" for k in rows],
            }
        ).replace_schema_metadata({"classes": json.dumps(["a", "b", "c", "d"])})
        pq.write_table(table, tmp_path / f"part{shard}.parquet", row_group_size=3)
    return f"parquet:{tmp_path}/part*.parquet"


@pytest.mark.parametrize("held", [1 << 30, 0])
def test_parquet_rows_of_a_split(shards, monkeypatch, held):
    monkeypatch.setattr(parquet, "HELD_BYTES", held)
    source = open_source(f"{shards}?split=train")
    rows = [k for k in range(14) if k % 3]
    assert len(source) == len(rows)
    assert source.classes == ("a", "b", "c", "d")
    assert source.labels().tolist() == [k % 4 for k in rows]
    for i in (8, 0, 3, 7, 1):  # any order
        np.testing.assert_array_equal(source.image(i), np.asarray(picture(rows[i])))
        assert source.label(i) == rows[i] % 4
        assert source.name(i).endswith(f"#{rows[i]}")
    if held == 0:
        assert len(source.held) == 1
    again = pickle.loads(pickle.dumps(source))
    assert len(pickle.dumps(source)) < 1000
    np.testing.assert_array_equal(again.image(5), source.image(5))


def test_parquet_columns_can_be_named(shards):
    source = open_source(f"{shards}?label=species&image=image")
    assert len(source) == 14 and source.classes == ("s0", "s1")
    assert source.labels().tolist() == [k % 2 for k in range(14)]


def test_parquet_without_labels_or_image(tmp_path):
    table = pa.table({"picture": [encoded(picture()), None]})
    pq.write_table(table, tmp_path / "x.parquet")
    source = open_source(f"parquet:{tmp_path}/x.parquet?image=picture")
    assert source.labels() is None and source.label(0) is None and source.classes is None
    with pytest.raises(UnreadableImage, match="holds no image"):
        source.image(1)


# ---------------------------------------------------------------------------- scenes and errors


def test_scenes_come_with_count_and_options():
    source = open_source("scenes:7?size=32&split=val")
    assert len(source) == 7 and source.image(6).shape == (32, 32, 3)
    assert 0 <= source.label(6) < len(source.classes)
    assert len(open_source("scenes")) == sources.SCENES == len(open_source("scenes?size=32"))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("foldr:/x", "unknown source kind 'foldr' .* did you mean 'folder'"),
        ("video:/x", "unknown source kind 'video' .* there are folder, parquet, scenes"),
        ("{dir}", "names no kind; nearest: 'folder:/.*'"),
        ("folder:{dir}/absent", "does not exist"),
        ("folder:{dir}/notes.txt", "is not a folder"),
        ("folder:{dir}/empty", "holds no file"),
        ("folder:{dir}/texts", "holds 1 files but no image .*jpg"),
        ("folder:{dir}?split=train", "unknown option 'split'; it takes none"),
        ("folder:{dir}?split", "not of the form name=value"),
        ("scenes:many", "count 'many' is not a positive integer"),
        ("parquet:{dir}/*.parque", "no file matches"),
        ("parquet:{dir}/notes.txt", "cannot be read"),
        ("{shards}?splt=train", "unknown option 'splt'; did you mean 'split'"),
        ("{shards}?split=trains", "no row of .* has split 'trains'; did you mean 'train'"),
        ("{shards}?image=imag", "has no column 'imag'; did you mean 'image'"),
        ("{shards}?label=klass", "has no column 'klass'; there are image, label, species, split"),
        ("{shards}?image=label", "column 'label' .* holds int16, expected encoded image bytes"),
        ("{shards}?label=image", "label column 'image' .* holds binary"),
    ],
)
def test_one_sentence_says_what_is_wrong(tmp_path, shards, spec, words):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "texts" / "a.txt", b"text")
    write(tmp_path / "notes.txt", b"text")
    with pytest.raises(ValueError, match=words) as caught:
        open_source(spec.format(dir=tmp_path, shards=shards))
    assert "\n" not in str(caught.value) and str(caught.value).endswith((".", "?"))


def test_related_sources_share_their_place():
    base = "parquet:a.parquet?split=train&image=pixels"
    assert sources.related("split=val", base) == "parquet:a.parquet?split=val&image=pixels"
    assert sources.related("split=val", "scenes:100") == "scenes:100?split=val"
    assert sources.related("folder:/x", base) == "folder:/x"
    assert sources.related("scenes", base) == "scenes"
