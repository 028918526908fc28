"""Paths and URLs: the same functions, the same errors."""

import threading
import time

import fsspec
import pytest

from dinojax.data import storage


@pytest.fixture
def folders(tmp_path):
    """The same files in a folder and in memory, as roots."""
    fs = fsspec.filesystem("memory")
    for name, data in {"a/x.bin": b"0123456789", "a/y.bin": b"y", "b/[z].bin": b"z"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
        fs.pipe_file(f"memory://files/{name}", data)
    yield str(tmp_path), "memory://files"
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def test_files_are_found_and_read(folders):
    for root in folders:
        assert storage.local(root) == (root == folders[0])
        assert storage.exists(f"{root}/a/x.bin") and not storage.exists(f"{root}/a/absent")
        assert storage.size(f"{root}/a/x.bin") == 10
        assert storage.read(f"{root}/a/x.bin") == b"0123456789"
        assert storage.read_range(f"{root}/a/x.bin", 3, 6) == b"345"
        assert storage.read_range(f"{root}/a/x.bin", 8, 60) == b"89"
        assert storage.read_range(f"{root}/a/x.bin", 60, 70) == b""
        found = storage.matching(f"{root}/*/?.bin")
        assert [name.rpartition("files")[2][-7:] for name in found] == ["a/x.bin", "a/y.bin"]
        assert [storage.read(name) for name in found] == [b"0123456789", b"y"]
        assert len(storage.matching(f"{root}/**/*.bin")) == 3
        assert storage.matching(f"{root}/a/y.bin") == [f"{root}/a/y.bin"]
        assert storage.matching(f"{root}/absent") == storage.matching(f"{root}/absent*") == []
    # A local name that looks like a pattern and exists is that file.
    assert storage.matching(f"{folders[0]}/b/[z].bin") == [f"{folders[0]}/b/[z].bin"]


def test_files_are_written(folders):
    for root in folders:
        with storage.open_file(f"{root}/new.txt", "w") as file:
            file.write("text")
        assert storage.read(f"{root}/new.txt") == b"text"


def test_what_goes_wrong_names_the_file(folders):
    for root in folders:
        for function in (
            storage.size,
            storage.read,
            storage.open_file,
            lambda name: storage.read_range(name, 0, 1),
        ):
            with pytest.raises(FileNotFoundError) as caught:
                function(f"{root}/absent")
            assert str(caught.value) == f"{root}/absent: No such file or directory"
    for function in (storage.exists, storage.matching, storage.read):
        with pytest.raises(OSError, match="^nonsense://x: Protocol not known: nonsense"):
            function("nonsense://x")


def test_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x").write_bytes(b"home")
    assert storage.read("~/x") == b"home" and storage.exists("~/x") and storage.size("~/x") == 4
    assert storage.matching("~/*") == [str(tmp_path / "x")]


def test_names_beside_a_file():
    assert storage.beside("/sets", "a/b.png") == "/sets/a/b.png"
    assert storage.beside("gs://sets/", "a/b.png") == "gs://sets/a/b.png"
    assert storage.beside("memory://", "a.png") == "memory://a.png"
    assert storage.beside("/sets", "/b.png") == "/b.png"
    assert storage.beside("gs://sets", "s3://b.png") == "s3://b.png"
    assert storage.beside("gs://sets", "/b.png") == "/b.png"
    assert storage.beside("", "b.png") == "b.png"
    assert storage.folder("a/b.png") == "a" and storage.folder("b.png") == ""
    assert storage.folder("gs://sets/b.png") == "gs://sets/"


class Flaky(fsspec.AbstractFileSystem):
    """Fails a number of times, then reads."""

    protocol = "flaky"
    cachable = False
    failures = 0

    def cat_file(self, path, start=None, end=None, **_):
        if Flaky.failures:
            Flaky.failures -= 1
            raise ConnectionError("the line is down")
        return b"0123456789"  # as a web server that knows no ranges


def test_a_lost_connection_is_tried_again(monkeypatch):
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    Flaky.failures = storage.TRIES - 1
    assert storage.read("flaky://x") == b"0123456789" and waits == [0.5, 2.0]
    assert storage.read_range("flaky://x", 2, 4) == b"23"
    Flaky.failures = storage.TRIES
    with pytest.raises(OSError, match="^flaky://x: the line is down$"):
        storage.read("flaky://x")


def test_many_threads_read_at_once(folders):
    found = []

    def read(root):
        found.extend(storage.read_range(f"{root}/a/x.bin", k % 10, k % 10 + 1) for k in range(100))

    threads = [threading.Thread(target=read, args=(root,)) for root in folders * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted([b"%d" % k for k in range(10)] * 60)
