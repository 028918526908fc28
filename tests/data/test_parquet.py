"""Parquet: rows of a split, labels of every kind, Hugging Face's layout, URLs, bounded memory."""

import io
import json
import pickle
import threading

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dinojax.data import parquet
from dinojax.data.decode import UnreadableImage
from dinojax.data.sources import open_source


def image(seed=0):
    return np.random.default_rng(seed).integers(0, 255, (20, 30, 3), dtype=np.uint8)


def encoded(seed=0):
    stream = io.BytesIO()
    Image.fromarray(image(seed)).save(stream, "PNG")
    return stream.getvalue()


def table_of(rows):
    return pa.table(
        {
            "image": [encoded(k) for k in rows],
            "label": pa.array([k % 4 for k in rows], pa.int16()),
            "species": [f"s{k % 2}" for k in rows],
            "split": ["val" if k % 3 == 0 else "train" for k in rows],
        }
    ).replace_schema_metadata({"classes": json.dumps(["a", "b", "c", "d"])})


@pytest.fixture
def shards(tmp_path):
    """Two files of 7 rows in row groups of 3; every third row is `val`."""
    for shard in range(2):
        rows = range(7 * shard, 7 * shard + 7)
        pq.write_table(table_of(rows), tmp_path / f"part{shard}.parquet", row_group_size=3)
    return f"parquet:{tmp_path}/part*.parquet"


@pytest.mark.parametrize("held", [1 << 30, 0])
def test_rows_of_a_split(shards, monkeypatch, held):
    monkeypatch.setattr(parquet, "HELD_BYTES", held)
    source = open_source(f"{shards}?split=train")
    rows = [k for k in range(14) if k % 3]
    assert len(source) == len(rows)
    assert source.classes == ("a", "b", "c", "d")
    assert source.labels().tolist() == [k % 4 for k in rows]
    for i in (8, 0, 3, 7, 1):  # any order
        np.testing.assert_array_equal(source.image(i), image(rows[i]))
        assert source.label(i) == rows[i] % 4
        assert source.name(i).endswith(f"#{rows[i]}")
    if held == 0:
        assert len(source.held) == 1
    again = pickle.loads(pickle.dumps(source))
    assert len(pickle.dumps(source)) < 1000
    np.testing.assert_array_equal(again.image(5), source.image(5))


def test_memory_is_bounded_with_threads(shards, monkeypatch):
    group = 3 * len(encoded())
    monkeypatch.setattr(parquet, "HELD_BYTES", 2 * group)
    source = open_source(shards)
    right, held = [], []

    def read(seed):
        for i in np.random.default_rng(seed).integers(0, 14, 40).tolist():
            right.append((source.image(i) == image(i)).all())
            with source.lock:
                held.append(sum(column.nbytes for column in source.held.values()))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(right) == 120 and all(right) and max(held) <= 2 * group


def test_columns_can_be_named(shards):
    source = open_source(f"{shards}?label=species&image=image&bands=1")
    assert len(source) == 14 and source.classes == ("s0", "s1")
    assert source.labels().tolist() == [k % 2 for k in range(14)]
    np.testing.assert_array_equal(source.image(4), image(4)[..., 1:2])


def test_without_labels_or_image(tmp_path):
    table = pa.table({"picture": [encoded(), None]})
    pq.write_table(table, tmp_path / "x.parquet")
    source = open_source(f"parquet:{tmp_path}/x.parquet?image=picture")
    assert source.labels() is None and source.label(0) is None and source.classes is None
    with pytest.raises(UnreadableImage, match="x.parquet#1: the row holds no image"):
        source.image(1)


def test_a_shard_that_vanished_is_unreadable(shards, tmp_path):
    source = open_source(shards)
    (tmp_path / "part1.parquet").unlink()
    np.testing.assert_array_equal(source.image(2), image(2))
    with pytest.raises(UnreadableImage, match="part\\*.parquet#9: .*part1.parquet"):
        source.image(9)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
@pytest.mark.parametrize("binary", [pa.binary(), pa.large_binary()])
def test_text_and_bytes_of_other_writers(tmp_path, kind, binary):
    columns = {
        "image": pa.array([encoded(0), encoded(1)], binary),
        "label": pa.array(["b", "a"], kind),
        "split": pa.array(["x", "y"], kind),
    }
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    source = open_source(f"parquet:{tmp_path}/x.parquet?split=y")
    assert source.classes == ("a", "b") and source.labels().tolist() == [0]
    np.testing.assert_array_equal(source.image(0), image(1))


# ---- Hugging Face -------------------------------------------------------------------------------


def hugging_face(image_type):
    """A file as `datasets` writes it: {bytes, path} and a ClassLabel."""
    rows = [
        {"bytes": encoded(0), "path": "a.png"},
        {"bytes": None, "path": "pics/b.png"},
        {"bytes": None, "path": None},
        None,
        {"bytes": None, "path": "absent.png"},
        {"bytes": encoded(5), "path": None},
    ]
    features = {
        "image": {"_type": "Image"},
        "label": {"names": ["cat", "dog"], "_type": "ClassLabel"},
    }
    kind = pa.struct([("bytes", image_type), ("path", pa.string())])
    table = pa.table(
        {"image": pa.array(rows, kind), "label": pa.array([0, 1, 1, 0, 0, 1], pa.int64())}
    ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    stream = io.BytesIO()
    pq.write_table(table, stream, row_group_size=4)
    return stream.getvalue()


@pytest.mark.parametrize("image_type", [pa.binary(), pa.large_binary()])
def test_hugging_face_layout(tmp_path, image_type):
    (tmp_path / "pics").mkdir()
    (tmp_path / "pics" / "b.png").write_bytes(encoded(1))
    (tmp_path / "train.parquet").write_bytes(hugging_face(image_type))
    source = open_source(f"parquet:{tmp_path}/*.parquet")
    assert source.classes == ("cat", "dog") and source.labels().tolist() == [0, 1, 1, 0, 0, 1]
    for i in (0, 1, 5):
        np.testing.assert_array_equal(source.image(i), image(i))
    for i in (2, 3):
        with pytest.raises(UnreadableImage, match=f"#{i}: the row holds no image"):
            source.image(i)
    with pytest.raises(UnreadableImage, match=f"#4: {tmp_path}/absent.png: No such file"):
        source.image(4)


# ---- URLs ---------------------------------------------------------------------------------------


@pytest.fixture
def memory():
    """A folder of a memory file system, emptied again."""
    fs = fsspec.filesystem("memory")
    yield lambda path, data: fs.pipe_file(f"memory://{path}", data)
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


@pytest.mark.parametrize("folder", ["/sets/one", ""])
def test_parquet_by_url(memory, folder):
    for shard in range(2):
        stream = io.BytesIO()
        pq.write_table(table_of(range(4 * shard, 4 * shard + 4)), stream, row_group_size=2)
        memory(f"{folder}/part{shard}.parquet", stream.getvalue())
    source = open_source(f"parquet:memory://{folder}/part*.parquet?split=train")
    rows = [k for k in range(8) if k % 3]
    assert len(source) == len(rows) and source.labels().tolist() == [k % 4 for k in rows]
    for i in (4, 0, 2):
        np.testing.assert_array_equal(source.image(i), image(rows[i]))
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again.image(1), source.image(1))


@pytest.mark.parametrize("folder", ["/hf", ""])
def test_hugging_face_paths_by_url(memory, folder):
    memory(f"{folder}/train.parquet", hugging_face(pa.binary()))
    memory(f"{folder}/pics/b.png", encoded(1))
    source = open_source(f"parquet:memory://{folder}/train.parquet")
    np.testing.assert_array_equal(source.image(1), image(1))


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("parquet:{dir}/*.parque", "no file matches"),
        ("parquet:memory://absent.parquet", "no file matches"),
        ("parquet:nonsense://x.parquet", "nonsense://x.parquet: Protocol not known"),
        ("parquet:{dir}/notes.txt", "notes.txt' cannot be read"),
        ("{shards}?splt=train", "unknown option 'splt'; did you mean 'split'"),
        ("{shards}?split=trains", "no row of split 'trains'; did you mean 'train'"),
        ("{shards}?image=imag", "has no column 'imag'; did you mean 'image'"),
        ("{shards}?label=klass", "has no column 'klass'; there are image, label, species, split"),
        ("{shards}?image=label", "holds int16 in its column 'label', expected encoded image bytes"),
        ("{shards}?label=image", "holds binary with 0 nulls in its label column 'image'"),
        ("{shards}?bands=x", "bands='x' is not a list of band numbers"),
        ("parquet:{dir}/empty.parquet", "has no rows"),
    ],
)
def test_one_sentence_says_what_is_wrong(tmp_path, shards, spec, words):
    (tmp_path / "notes.txt").write_text("text")
    pq.write_table(table_of([0]).slice(0, 0), tmp_path / "empty.parquet")
    with pytest.raises(ValueError, match=words) as caught:
        open_source(spec.format(dir=tmp_path, shards=shards))
    assert "\n" not in str(caught.value) and str(caught.value).endswith((".", "?"))


def test_files_that_name_their_classes_differently_are_refused(tmp_path):
    """Numbers mean other classes in each; the first file's names used to be given to all."""
    for file, classes in (("a", ["cat", "dog"]), ("b", ["cat", "cow"]), ("c", ["cat", "dog"])):
        table = pa.table({"image": [b"x"], "label": pa.array([1], pa.int64())})
        table = table.replace_schema_metadata({"classes": json.dumps(classes)})
        pq.write_table(table, tmp_path / f"{file}.parquet")
    with pytest.raises(ValueError, match="name the classes of 'label' differently"):
        open_source(f"parquet:{tmp_path}/*.parquet")
    assert open_source(f"parquet:{tmp_path}/[ac].parquet").classes == ("cat", "dog")
