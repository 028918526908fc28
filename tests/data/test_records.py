"""ArrayRecord shards: others' and damaged ones. (Those of our own writer: test_shards.py.)"""

import io
import multiprocessing
import operator
import os
import pickle
import sys
import threading
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from dinojax.data import records
from dinojax.data.decode import UnreadableImage
from dinojax.data.sources import open_source


def png(seed, size=5):
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write(path, data, options="group_size:1,uncompressed"):
    writer = ArrayRecordWriter(str(path), options)
    for record in data:
        writer.write(record)
    writer.close()


@pytest.fixture
def shards(tmp_path):
    """Three shards of 3, 0 and 4 images, numbered through."""
    numbers = iter(range(7))
    for shard, count in enumerate((3, 0, 4)):
        write(tmp_path / f"x-{shard}.array_record", [png(next(numbers)) for _ in range(count)])
    return tmp_path


def test_encoded_images_of_all_shards(shards):
    source = open_source(f"array_record:{shards}/*.array_record")
    assert len(source) == 7 and source.labels() is None and source.label(0) is None
    for i in np.random.default_rng(0).permutation(7).tolist():
        assert source.encoded(i) == png(i)
    np.testing.assert_array_equal(source.image(4), np.array(Image.open(io.BytesIO(png(4)))))
    assert source.name(3) == f"{shards}/x-2.array_record#0"


@pytest.mark.parametrize("options", ["group_size:1", "group_size:100", ""])
def test_any_way_of_writing(tmp_path, options):
    write(tmp_path / "x", [png(k) for k in range(30)], options)
    source = open_source(f"array_record:{tmp_path}/x")
    assert [source.encoded(i) for i in (29, 0, 17)] == [png(i) for i in (29, 0, 17)]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "npy"])
def test_formats_are_known_by_their_first_bytes(tmp_path, kind):
    stream, pixels = io.BytesIO(), np.zeros((4, 5, 3), np.uint8)
    if kind == "npy":
        np.save(stream, pixels)
    else:
        Image.fromarray(pixels).save(stream, kind)
    write(tmp_path / "x", [stream.getvalue()])
    assert open_source(f"array_record:{tmp_path}/x").image(0).shape == (4, 5, 3)


def test_a_worker_process_reads_the_same(shards):
    source = open_source(f"array_record:{shards}/*.array_record")
    assert len(pickle.dumps(source)) < 1500
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(operator.methodcaller("encoded", 5), source).result() == png(5)


def test_threads_share_a_shard(tmp_path):
    images = [png(k, 5 + k % 30) for k in range(200)]
    write(tmp_path / "x", images)
    source = open_source(f"array_record:{tmp_path}/x")
    wrong = []

    def read(seed):
        for i in np.random.default_rng(seed).integers(0, 200, 300).tolist():
            if source.encoded(i) != images[i]:
                wrong.append(i)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="open files are counted in /proc")
def test_few_files_are_open_at_a_time(tmp_path):
    count = records.OPEN + 20
    for k in range(count):
        write(tmp_path / f"{k:04d}", [b"BM%d" % k])
    before = len(os.listdir("/proc/self/fd"))
    source = open_source(f"array_record:{tmp_path}/*")
    assert [source.encoded(i) for i in range(count)] == [b"BM%d" % k for k in range(count)]
    assert len(os.listdir("/proc/self/fd")) <= before + records.OPEN


def test_a_rewritten_shard_is_not_taken_for_the_old_one(tmp_path):
    for seed in (0, 1):
        write(tmp_path / "x", [png(seed)])
        os.utime(tmp_path / "x", ns=(seed, seed))
        assert open_source(f"array_record:{tmp_path}/x").encoded(0) == png(seed)


# -------------------------------------------------------------------------------------- damage


def test_a_shard_that_vanishes_in_mid_run(shards):
    source = open_source(f"array_record:{shards}/*.array_record")
    records._reader.cache_clear()
    assert source.encoded(6) == png(6)
    for shard in (0, 2):
        (shards / f"x-{shard}.array_record").unlink()
    assert source.encoded(5) == png(5)  # was open
    for i in range(3):
        with pytest.raises(UnreadableImage, match=r"x-0.array_record#\d: .*No such file"):
            source.image(i)


def test_a_shard_cut_short_in_mid_run(tmp_path):
    write(tmp_path / "x", [np.random.default_rng(k).bytes(30_000) for k in range(20)])
    # The first has the beginning of an image, or the source would be refused.
    write(tmp_path / "w", [png(0)])
    source = open_source(f"array_record:{tmp_path}/*")
    os.truncate(tmp_path / "x", 200_000)
    for opened in (True, False):
        with pytest.raises(UnreadableImage, match=r"x#18: "):
            source.image(19)
        if opened:
            assert source.encoded(2) == np.random.default_rng(1).bytes(30_000)
            records._reader.cache_clear()


def test_changed_bytes_are_noticed(tmp_path):
    data = [png(0), *(np.random.default_rng(k).bytes(30_000) for k in range(9))]
    write(tmp_path / "x", data)
    raw = bytearray((tmp_path / "x").read_bytes())
    raw[raw.index(data[1]) + 100] ^= 1
    (tmp_path / "x").write_bytes(raw)
    source = open_source(f"array_record:{tmp_path}/x")
    with pytest.raises(UnreadableImage, match="x#1: Corrupted"):
        source.image(1)
    assert source.encoded(2) == data[2]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("array_record:{dir}/*.array_recor", "no file matches"),
        ("array_record:{dir}", "is a folder; nearest: 'array_record:/.*/\\*.array_record'"),
        ("array_record:gs://bucket/*.array_record", "is a URL, .* local disks alone"),
        ("array_record:{dir}/x-1.array_record", "holds no record"),
        ("array_record:{dir}/text", "is no whole ArrayRecord file .*64KB.*; replace or remove it"),
        ("array_record:{dir}/cut", "is no whole ArrayRecord file .*; replace or remove it"),
        ("array_record:{dir}/examples", "begin with b'.*' and are no encoded .* tfds:NAME"),
        ("array_record:{dir}/x-0.array_record?split=x", "unknown option 'split'"),
        ("array_record:{dir}/x-0.array_record?draft=x", "draft='x' is not"),
    ],
)
def test_one_sentence_says_what_is_wrong(shards, spec, words):
    (shards / "text").write_text("no records")
    (shards / "cut").write_bytes((shards / "x-0.array_record").read_bytes()[:70_000])
    write(shards / "examples", [b"\n\x0b\n\x05image"] * 3)
    with pytest.raises(ValueError, match=words) as caught:
        open_source(spec.format(dir=shards))
    assert "\n" not in str(caught.value) and str(caught.value).endswith((".", "?"))


def test_tfds_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ValueError, match=r"needs the package .*pip install 'dinojax\[tfds\]'"):
        open_source("tfds:mnist:train")
