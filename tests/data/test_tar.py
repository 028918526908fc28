"""Tar shards: what makes a sample, the index and its upkeep, shards that are damaged or vanish."""

import hashlib
import http.server
import io
import json
import multiprocessing
import operator
import os
import pickle
import tarfile
import threading
from concurrent.futures import ProcessPoolExecutor

import fsspec
import numpy as np
import pytest
from PIL import Image

from dinojax.data import tar, tar_index
from dinojax.data.decode import UnreadableImage
from dinojax.data.sources import open_source


def png(seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 5, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write(path, members, **options):
    """A tar file of (name, bytes) pairs."""
    with tarfile.open(path, "w", **options) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def index_of(source):
    return [os.path.basename(shard.index) for shard in source.shards]


@pytest.fixture
def shards(tmp_path):
    """Three shards of 4, 5 and 6 samples, numbered through; label = number modulo 3."""
    number = 0
    for shard in range(3):
        members = []
        for _ in range(4 + shard):
            members += [(f"{number:04d}.cls", b"%d\n" % (number % 3)), (f"{number:04d}.txt", b"x")]
            members += [(f"{number:04d}.png", png(number))]
            number += 1
        write(tmp_path / f"part-{shard:03d}.tar", members)
    return tmp_path


@pytest.fixture
def no_indexing(monkeypatch):
    """A function after which making an index fails the test."""

    def refuse(*_):
        raise AssertionError("an index is made anew")

    return lambda: monkeypatch.setattr(tar_index, "_rows", refuse)


# ------------------------------------------------------------------------------------- samples


def test_samples_of_all_shards(shards):
    source = open_source(f"tar:{shards}/*.tar")
    assert len(source) == 15 and source.classes is None
    assert source.labels().tolist() == [k % 3 for k in range(15)]
    for i in np.random.default_rng(0).permutation(15).tolist():
        assert source.encoded(i) == png(i) and source.label(i) == i % 3
    np.testing.assert_array_equal(source.image(7), np.array(Image.open(io.BytesIO(png(7)))))
    assert source.name(4) == f"{shards}/part-001.tar#0004.png"


def test_a_worker_process_reads_the_same(shards, no_indexing):
    source = open_source(f"tar:{shards}/*.tar")
    no_indexing()
    assert len(pickle.dumps(source)) < 1500
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(operator.methodcaller("encoded", 9), source).result() == png(9)


def test_no_labels(tmp_path):
    write(tmp_path / "x.tar", [("a.png", png(0)), ("b.png", png(1)), ("b.cls", b"1")])
    source = open_source(f"tar:{tmp_path}/x.tar")
    assert source.labels() is None and source.label(1) is None and source.classes is None


def test_labels_that_are_names(tmp_path):
    write(
        tmp_path / "x.tar", [("a.png", png(0)), ("a.cls", b"dog "), ("b.jpg", b""), ("b.cls", b"7")]
    )
    write(tmp_path / "y.tar", [("a.cls", b"cat"), ("a.png", png(0))])
    source = open_source(f"tar:{tmp_path}/*.tar")
    assert source.classes == ("7", "cat", "dog") and source.labels().tolist() == [2, 0, 1]


def test_labels_in_json(tmp_path):
    told = [{"kind": {"id": 3}, "name": "x"}, {"kind": {"id": 5}}]
    members = [(f"{k}.json", json.dumps(entry).encode()) for k, entry in enumerate(told)]
    write(tmp_path / "x.tar", [*members, ("0.png", png(0)), ("1.png", png(1))])
    source = open_source(f"tar:{tmp_path}/x.tar?label=json.kind.id")
    assert source.labels().tolist() == [3, 5] and source.classes is None
    with pytest.raises(ValueError, match=r"1 of 2 images of '.*x.tar' have no label 'json.name'"):
        open_source(f"tar:{tmp_path}/x.tar?label=json.name")
    with pytest.raises(ValueError, match=r"'kind' of '.*x.tar#0.json' is .*, expected an integer"):
        open_source(f"tar:{tmp_path}/x.tar?label=json.kind")
    assert open_source(f"tar:{tmp_path}/x.tar").labels() is None


@pytest.mark.parametrize(
    ("option", "chosen"),
    [
        ("", ["a.JPG", "p.2.png", "s/a.webp"]),  # a whole extension before a part of one
        ("?image=depth.png", ["a.depth.png"]),
        ("?image=webp;jpg", ["a.JPG", "s/a.webp"]),
        ("?image=webp;.depth.png", ["a.depth.png", "s/a.webp"]),
        ("?image=jpg;webp;depth.png", ["a.JPG", "s/a.webp"]),  # the first that there is
    ],
)
def test_which_member_is_the_image(tmp_path, option, chosen):
    names = [
        "a.depth.png",
        "a.JPG",
        "a.json",
        "p.2.png",
        "s/a.png2",
        "s/a.webp",
        ".x.png",
        "README",
    ]
    write(tmp_path / "x.tar", [(name, name.encode()) for name in names])
    source = open_source(f"tar:{tmp_path}/x.tar{option}")
    assert [source.encoded(i).decode() for i in range(len(source))] == chosen


def test_members_of_a_sample_may_lie_apart_and_others_are_no_samples(tmp_path):
    path = write(tmp_path / "x.tar", [("a.cls", b"1"), ("b.png", png(1)), ("b.cls", b"2")])
    with tarfile.open(path, "a") as archive:
        folder = tarfile.TarInfo("c.png")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        info = tarfile.TarInfo("a.png")
        info.size = len(png(0))
        archive.addfile(info, io.BytesIO(png(0)))
    source = open_source(f"tar:{path}")
    assert source.labels().tolist() == [2, 1] and source.encoded(1) == png(0)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_large_headers(tmp_path, form):
    names = ["d" * 90 + "/" + "n" * 120 + ".png", "größe/日本.png", "c.png"]
    write(tmp_path / "x.tar", [(name, png(k)) for k, name in enumerate(names)], format=form)
    source = open_source(f"tar:{tmp_path}/x.tar")
    assert [source.encoded(k) for k in range(3)] == [png(k) for k in range(3)]
    assert source.name(1) == f"{tmp_path}/x.tar#größe/日本.png"


def test_thousands_of_members(tmp_path):
    """More than are looked at between two reports of progress."""
    write(tmp_path / "x.tar", [(f"{k}.png", b"%d" % k) for k in range(2500)])
    source = open_source(f"tar:{tmp_path}/x.tar")
    assert [source.encoded(i) for i in range(0, 2500, 7)] == [b"%d" % i for i in range(0, 2500, 7)]


@pytest.mark.parametrize(
    ("pattern", "expanded"),
    [
        ("x-{008..011}.tar", ["x-008.tar", "x-009.tar", "x-010.tar", "x-011.tar"]),
        ("{a,b}-{1..2}.tar", ["a-1.tar", "a-2.tar", "b-1.tar", "b-2.tar"]),
        ("plain*.tar", ["plain*.tar"]),
    ],
)
def test_braces(pattern, expanded):
    assert list(tar._braces(pattern)) == expanded


def test_braces_choose_shards(shards):
    assert len(open_source(f"tar:{shards}/part-{{001..002}}.tar")) == 11


def test_urls(shards, monkeypatch, tmp_path, no_indexing):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    for shard in shards.glob("*.tar"):
        memory.pipe(f"/tars/{shard.name}", shard.read_bytes())
    try:
        source = open_source("tar:memory://tars/part-*.tar")
        assert [source.encoded(i) for i in range(15)] == [png(i) for i in range(15)]
        assert len(list((tmp_path / "cache/dinojax/tar").iterdir())) == 3
        memory.pipe("/tars/part-000.tar", (shards / "part-001.tar").read_bytes())
        assert len(open_source("tar:memory://tars/part-*.tar")) == 16  # another file, by its size
        no_indexing()
        assert len(open_source("tar:memory://tars/part-*.tar")) == 16
    finally:
        memory.rm("/tars", recursive=True)


class RangeHandler(http.server.BaseHTTPRequestHandler):
    """Serves the files of `server.folder`, or parts of them, and notes how much."""

    def do_HEAD(self):  # noqa: N802
        self.do_GET(body=False)

    def do_GET(self, body=True):  # noqa: N802
        path = self.server.folder / self.path.lstrip("/")
        if not path.exists():
            self.send_error(404)
            return
        data = path.read_bytes()
        size, part = len(data), self.headers.get("Range")
        if part:
            first, last = part.removeprefix("bytes=").split("-")
            data = data[int(first) : int(last) + 1 if last else size]
        self.send_response(206 if part else 200)
        if part:
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(data) - 1}/{size}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", hashlib.md5(path.read_bytes()).hexdigest())
        self.end_headers()
        if body:
            self.server.sent.append(len(data))
            self.wfile.write(data)

    def log_message(self, *_):
        pass


def test_a_web_server(shards, monkeypatch, tmp_path, no_indexing):
    pytest.importorskip("aiohttp", reason="reading http:// needs aiohttp: pip install aiohttp")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), RangeHandler) as server:
        server.folder, server.sent = shards, []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            spec = f"tar:http://127.0.0.1:{server.server_port}/part-{{000..002}}.tar"
            source = open_source(spec)
            server.sent.clear()
            assert source.encoded(6) == png(6) and source.label(6) == 0
            assert server.sent == [len(png(6))]  # nothing but the image
            with pytest.raises(ValueError, match="no file matches '.*/part-003.tar'"):
                open_source(spec.replace("002", "003"))
            write(shards / "part-000.tar", [("x.png", png(99)), ("x.cls", b"5")])
            assert open_source(spec).encoded(0) == png(99)
            no_indexing()
            assert open_source(spec).label(0) == 5
        finally:
            server.shutdown()


# --------------------------------------------------------------------------------------- index


def test_an_index_is_made_once(shards, no_indexing):
    first = open_source(f"tar:{shards}/*.tar")
    assert index_of(first) == [f"part-00{k}.tar.index" for k in range(3)]
    no_indexing()
    again = open_source(f"tar:{shards}/*.tar")
    assert again.labels().tolist() == first.labels().tolist() and again.encoded(8) == png(8)
    assert not list(shards.glob("*.tmp"))


@pytest.mark.parametrize("change", ["content", "time"])
def test_an_index_is_for_one_state_of_its_shard(shards, change, no_indexing):
    open_source(f"tar:{shards}/*.tar")
    path = shards / "part-001.tar"
    if change == "content":
        write(path, [("new.png", png(99)), ("new.cls", b"8")])
        source = open_source(f"tar:{shards}/*.tar")
        assert len(source) == 11 and source.encoded(4) == png(99) and source.label(4) == 8
    else:
        os.utime(path, ns=(1, 1))
        no_indexing()
        with pytest.raises(AssertionError, match="anew"):
            open_source(f"tar:{shards}/*.tar")


def test_other_options_have_an_index_of_their_own(shards, no_indexing):
    open_source(f"tar:{shards}/*.tar")
    other = open_source(f"tar:{shards}/*.tar?label=txt")
    assert other.classes == ("x",)
    no_indexing()
    assert open_source(f"tar:{shards}/*.tar").classes is None
    assert open_source(f"tar:{shards}/*.tar?label=txt").classes == ("x",)


def test_a_damaged_index_is_made_anew(shards):
    open_source(f"tar:{shards}/*.tar")
    for k, data in enumerate((b"", b"ARROW1 and no more", None)):
        path = shards / f"part-00{k}.tar.index"
        path.write_bytes(path.read_bytes()[:-30] if data is None else data)
    assert open_source(f"tar:{shards}/*.tar").encoded(14) == png(14)


def test_the_index_goes_to_the_cache_where_the_folder_cannot_be_written(
    shards, monkeypatch, tmp_path, no_indexing
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (shards / "part-001.tar.index").mkdir()  # root may write everywhere, but not here
    source = open_source(f"tar:{shards}/*.tar")
    assert [os.path.dirname(shard.index) for shard in source.shards] == [
        str(shards),
        str(tmp_path / "cache/dinojax/tar"),
        str(shards),
    ]
    no_indexing()
    assert open_source(f"tar:{shards}/*.tar").encoded(5) == png(5)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="can be written neither beside it nor .* XDG_CACHE_HOME"):
        open_source(f"tar:{shards}/*.tar")


def test_indexing_goes_on_after_an_interruption(shards, monkeypatch):
    rows, made = tar_index._rows, []

    def interrupted(shard, *rest):
        if made:
            raise KeyboardInterrupt
        made.append(shard.path)
        return rows(shard, *rest)

    monkeypatch.setattr(tar_index, "THREADS", 1)
    monkeypatch.setattr(tar_index, "_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_source(f"tar:{shards}/*.tar")
    assert [p.name for p in shards.glob("*.index*")] == ["part-000.tar.index"]
    made[:] = ["go on"]
    monkeypatch.undo()
    monkeypatch.setattr(tar_index, "_rows", lambda *a: made.append(a[0].path) or rows(*a))
    assert len(open_source(f"tar:{shards}/*.tar")) == 15
    assert sorted(made[1:]) == [str(shards / f"part-00{k}.tar") for k in (1, 2)]


# -------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("indexes_too", [False, True])
def test_a_shard_that_vanishes_in_mid_run(shards, indexes_too):
    source = open_source(f"tar:{shards}/*.tar")
    if not indexes_too:
        source.encoded(6)
    (shards / "part-001.tar").unlink()
    if indexes_too:
        (shards / "part-001.tar.index").unlink()
    for i in range(4, 9):
        with pytest.raises(UnreadableImage, match=r"part-001.tar.*No such file"):
            source.image(i)
    assert source.encoded(3) == png(3) and source.encoded(9) == png(9)
    assert source.name(5).startswith(str(shards / "part-001.tar#"))


def test_a_shard_cut_short_in_mid_run(shards):
    source = open_source(f"tar:{shards}/*.tar")
    cut = int(tar._index(source.shards[1]).offsets[3]) + 10
    os.truncate(shards / "part-001.tar", cut)
    for i in (7, 8):
        with pytest.raises(UnreadableImage, match=r"part-001.tar#000\d.png: the shard ends before"):
            source.image(i)
    assert source.encoded(6) == png(6) and source.encoded(9) == png(9)


@pytest.mark.parametrize("kept", [0, 100, 512, 700, 5000])
def test_a_shard_that_is_cut_short_is_refused(shards, kept):
    path = shards / "part-001.tar"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"part-001.tar' is no whole tar file .*; replace or"):
        open_source(f"tar:{shards}/*.tar")


def test_a_damaged_header_is_not_the_end(shards):
    path = shards / "part-001.tar"
    with tarfile.open(path) as archive:
        header = archive.getmembers()[6].offset
    data = bytearray(path.read_bytes())
    data[header + 150] ^= 0xFF  # in the checksum
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"no whole tar file .damaged at byte {header}."):
        open_source(f"tar:{shards}/*.tar")


def test_an_archive_without_an_end_mark_is_whole(tmp_path):
    path = write(tmp_path / "x.tar", [("a.png", png(0))])
    path.write_bytes(path.read_bytes()[: 512 + -(-len(png(0)) // 512) * 512])
    assert open_source(f"tar:{path}").encoded(0) == png(0)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("tar:{dir}/*.tarr", "no file matches"),
        ("tar:{dir}/part-{{000..003}}.tar", "no file matches '.*part-003.tar'"),
        ("tar:{dir}", "is a folder; nearest: 'tar:/.*/\\*.tar'"),
        ("tar:{dir}/part-000.tar?imag=png", "unknown option 'imag'; did you mean 'image'"),
        ("tar:{dir}/part-000.tar?image=pngg", "no image; image=pngg: did you mean 'png'"),
        ("tar:{dir}/part-000.tar?bands=x", "bands='x' is not a list of band numbers"),
        ("tar:{dir}/none.tar", "no image; its members end in txt .looked for .*jpg"),
        ("tar:{dir}/x.tar.gz", "is compressed, so its images cannot be read at random; unpack"),
        ("tar:{dir}/text", "is no whole tar file .* replace or remove it"),
        ("tar:{dir}/json.tar?label=json.a", "'.*json.tar#a.json' is not JSON"),
    ],
)
def test_one_sentence_says_what_is_wrong(shards, spec, words):
    write(shards / "none.tar", [("a.txt", b"x"), ("folder/b", b"y")])
    write(shards / "json.tar", [("a.json", b"{"), ("a.png", png(0))])
    with tarfile.open(shards / "x.tar.gz", "w:gz") as archive:
        archive.add(shards / "none.tar", "a.png")
    (shards / "text").write_text("no archive " * 100)
    with pytest.raises(ValueError, match=words) as caught:
        open_source(spec.format(dir=shards))
    assert "\n" not in str(caught.value) and str(caught.value).endswith((".", "?"))
