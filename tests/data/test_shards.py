"""Writing shards: the same images and labels come back, and a killed writer loses nothing."""

import io
import json
import os
import resource
import struct

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image

from dinojax.data import records, shards
from dinojax.data.shards import write_shards
from dinojax.data.sources import open_source

COUNT = 40


def image(seed, kind="JPEG"):
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (4, 5, 3), dtype=np.uint8))
    stream = io.BytesIO()
    small.resize((60 + seed, 50)).save(stream, kind)
    return stream.getvalue()


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path):
    """Images of three classes and two formats; two that can be read but not decoded."""
    for k in range(COUNT):
        path = tmp_path / "images" / "abc"[k % 3] / f"{k:03d}.{'png' if k % 5 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        data = image(k, "PNG" if k % 5 else "JPEG")
        path.write_bytes(data[:50] if k in (9, 10) else data)
    return f"folder:{tmp_path}/images"


def test_images_and_labels_come_back(folder, tmp_path):
    source, steps = open_source(folder), []
    index = write_shards(
        source,
        tmp_path / "out",
        spec=folder,
        shard_bytes=40_000,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert index == tmp_path / "out" / "index.json"
    assert steps == [(k, COUNT) for k in range(COUNT + 1)]
    written = open_source(f"array_record:{tmp_path}/out/*.array_record")
    assert len(written.records.files) > 2
    assert len(written) == COUNT and written.classes == ("a", "b", "c")
    assert written.labels().dtype == np.int64
    np.testing.assert_array_equal(written.labels(), source.labels())
    for i in range(COUNT):
        assert written.encoded(i) == source.encoded(i) and written.label(i) == source.label(i)
    np.testing.assert_array_equal(written.image(7), source.image(7))
    assert sorted(content(tmp_path / "out"))[-2:] == ["index.json", "labels.npy"]
    assert len(open_source(f"array_record:{tmp_path}/out/*")) == COUNT  # these two are no shards
    part = open_source(f"array_record:{tmp_path}/out/data-00001.array_record")
    first = len(open_source(f"array_record:{tmp_path}/out/data-00000.array_record"))
    np.testing.assert_array_equal(part.labels(), source.labels()[first : first + len(part)])


def test_a_record_describes_itself(folder, tmp_path):
    source = open_source(folder)
    write_shards(source, tmp_path / "out")
    reader = ArrayRecordReader(str(tmp_path / "out/data-00000.array_record"))
    (record,) = reader.read([4])
    (length,) = struct.unpack("<I", record[:4])
    told = json.loads(record[4 : 4 + length])
    assert told == {"name": source.name(4), "label": source.label(4)}
    assert record[4 + length :] == source.encoded(4)
    index = json.loads((tmp_path / "out/index.json").read_text())
    size = os.path.getsize(tmp_path / "out/data-00000.array_record")
    assert index["count"] == COUNT and index["classes"] == ["a", "b", "c"]
    assert index["shards"] == [
        {"file": "data-00000.array_record", "count": COUNT, "bytes": size, "stop": COUNT}
    ]


@pytest.mark.parametrize("verify", [False, True])
def test_unreadable_images_are_left_out_and_listed(folder, tmp_path, verify):
    source = open_source(folder)
    cut = [i for i in range(COUNT) if len(source.encoded(i)) == 50]
    gone = [0, 20, COUNT - 1]
    for i in gone:
        os.unlink(os.path.join(tmp_path, "images", source.name(i)))
    out = tmp_path / "out"
    index = json.loads(write_shards(source, out, shard_bytes=40_000, verify=verify).read_text())
    left_out = sorted([*gone, *cut] if verify else gone)
    assert [entry["row"] for entry in index["skipped"]] == left_out
    assert [entry["name"] for entry in index["skipped"]] == [source.name(i) for i in left_out]
    assert "No such file" in index["skipped"][0]["reason"]
    kept = [i for i in range(COUNT) if i not in left_out]
    written = open_source(f"array_record:{out}/*.array_record")
    assert index["count"] == len(written) == len(kept)
    np.testing.assert_array_equal(written.labels(), source.labels()[kept])
    assert [written.encoded(k) for k in range(len(kept))] == [source.encoded(i) for i in kept]


def test_sources_without_labels_or_files(tmp_path):
    source = open_source("scenes:6?size=16")
    write_shards(source, tmp_path / "scenes")
    written = open_source(f"array_record:{tmp_path}/scenes/*.array_record")
    assert written.classes == source.classes
    np.testing.assert_array_equal(written.image(5), source.image(5))
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "x.png").write_bytes(image(0, "PNG"))
    write_shards(open_source(f"folder:{tmp_path}/flat"), tmp_path / "out")
    written = open_source(f"array_record:{tmp_path}/out/*.array_record")
    assert written.labels() is None and written.classes is None and len(written) == 1


# ------------------------------------------------------------------------------ interruptions


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [1, 10, 23, COUNT])
def test_a_killed_writer_goes_on_and_ends_with_the_same_bytes(folder, tmp_path, at):
    source = open_source(folder)
    write_shards(source, tmp_path / "whole", spec=folder, shard_bytes=40_000)

    def kill(done, total):
        if done == at:
            raise Killed

    with pytest.raises(Killed):
        write_shards(source, tmp_path / "out", spec=folder, shard_bytes=40_000, progress=kill)
    left = content(tmp_path / "out")
    assert "index.json" not in left and not any(name.endswith(".tmp") for name in left)
    assert all(
        left[name] == data for name, data in content(tmp_path / "whole").items() if name in left
    )
    steps = []
    progress = lambda done, total: steps.append(done)  # noqa: E731
    write_shards(source, tmp_path / "out", spec=folder, shard_bytes=40_000, progress=progress)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    finished = sum(name.endswith(".array_record") for name in left)
    assert steps[0] == (0 if not finished else _stop(tmp_path / "whole", finished))


def _stop(folder, shards):
    return json.loads((folder / "index.json").read_text())["shards"][shards - 1]["stop"]


@pytest.mark.parametrize("damage", ["note", "shard", "left-over"])
def test_what_a_hard_kill_leaves_is_mended(folder, tmp_path, damage):
    source = open_source(folder)
    write_shards(source, tmp_path / "whole", shard_bytes=40_000)

    def kill(done, total):
        if done == COUNT - 1:
            raise Killed

    with pytest.raises(Killed):
        write_shards(source, tmp_path / "out", shard_bytes=40_000, progress=kill)
    notes = tmp_path / "out" / "progress.jsonl"
    assert len(notes.read_text().splitlines()) >= 3
    if damage == "note":
        notes.write_text(notes.read_text()[:-15])
    elif damage == "shard":
        (tmp_path / "out" / "data-00000.array_record").unlink()
    else:
        unfinished = len(notes.read_text().splitlines()) - 1
        (tmp_path / "out" / f"data-{unfinished:05d}.array_record.tmp").write_bytes(b"x" * 1000)
    write_shards(source, tmp_path / "out", shard_bytes=40_000)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_full_disk(folder, tmp_path):
    """(A limit on the size of files: the same failure of write(2), another errno.)"""
    source = open_source(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
        with pytest.raises(OSError, match="out' cannot be written .*File too large.*goes on after"):
            write_shards(source, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(content(tmp_path / "out")) == ["progress.jsonl"]
    write_shards(source, tmp_path / "out")
    assert len(open_source(f"array_record:{tmp_path}/out/*.array_record")) == COUNT


def test_what_is_finished_is_not_written_again(folder, tmp_path, monkeypatch):
    source = open_source(folder)
    write_shards(source, tmp_path / "out")
    monkeypatch.setattr(shards, "_write", None)
    assert write_shards(source, tmp_path / "out") == tmp_path / "out" / "index.json"


# ----------------------------------------------------------------------------------- sentences


def test_a_folder_of_something_else_is_refused(folder, tmp_path):
    source, out = open_source(folder), tmp_path / "out"
    write_shards(source, out)
    other = open_source("scenes:5")
    for change, words in [
        ({"source": other}, "images is 40, not 5"),
        ({"shard_bytes": 5}, "shard_bytes is 268435456, not 5"),
        ({"spec": "x"}, "spec is '', not 'x'"),
        ({"verify": True}, "verify is False, not True"),
    ]:
        with pytest.raises(ValueError, match=f"another source or form .{words}.; choose an empty"):
            write_shards(**{"source": source, "out": out} | change)
    (out / "index.json").unlink()
    with pytest.raises(ValueError, match="holds data-00000.array_record of something else"):
        write_shards(source, out)
    with pytest.raises(ValueError, match="is a URL"):
        write_shards(source, "gs://bucket/x")
    with pytest.raises(ValueError, match="shard_bytes=0 is not a positive"):
        write_shards(source, out, shard_bytes=0)


def test_nothing_readable(folder, tmp_path):
    source = open_source(folder)
    for i in range(COUNT):
        os.unlink(os.path.join(tmp_path, "images", source.name(i)))
    with pytest.raises(ValueError, match="no image can be read, the last: .*No such file"):
        write_shards(source, tmp_path / "out")


def test_shards_that_do_not_fit_their_index(folder, tmp_path):
    out = tmp_path / "out"
    write_shards(open_source(folder), out, shard_bytes=40_000)
    (out / "strange.array_record").write_bytes((out / "data-00000.array_record").read_bytes())
    mixed = open_source(f"array_record:{out}/*.array_record")
    assert len(mixed) > COUNT and mixed.labels() is None  # one of them has no known labels
    (out / "strange.array_record").unlink()
    with open(out / "data-00001.array_record", "ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"data-00001.array_record' has \d+ bytes, and \d+ when"):
        open_source(f"array_record:{out}/*.array_record")
    (out / "index.json").write_text("{")
    with pytest.raises(ValueError, match="index.json' cannot be read"):
        open_source(f"array_record:{out}/*.array_record")
    (out / "index.json").write_text("[]")  # somebody else's
    assert open_source(f"array_record:{out}/data-00000*").labels() is None


def test_the_format_is_what_it_was():
    """Shards are kept for years: a change of the layout must be seen here."""
    packed = records.pack(b"\xff\xd8\xffdata", "a/ü.jpg", 3)
    assert packed == b' \x00\x00\x00{"name": "a/\xc3\xbc.jpg", "label": 3}\xff\xd8\xffdata'
    assert records.unpack(packed) == b"\xff\xd8\xffdata" == records.unpack(b"\xff\xd8\xffdata")
