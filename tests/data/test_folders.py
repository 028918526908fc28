"""Folders and lists of files: what they find, in which order and with which labels; and URLs."""

import functools
import http.server
import importlib.util
import io
import os
import pickle
import shutil
import threading
import time

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dinojax.data import folders
from dinojax.data.decode import Reading, UnreadableImage
from dinojax.data.sources import open_source


def image(seed=0):
    return np.full((6, 8, 3), seed % 256, np.uint8)


def encoded(seed=0, kind="PNG"):
    stream = io.BytesIO()
    Image.fromarray(image(seed)).save(stream, kind)
    return stream.getvalue()


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.fixture
def memory():
    """A folder of a memory file system, emptied again."""
    fs = fsspec.filesystem("memory")
    yield lambda path, data: fs.pipe_file(f"memory://{path}", data)
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


# ---- folder -------------------------------------------------------------------------------------


def test_folder_with_classes(tmp_path):
    for name in ("train/cat/b.jpg", "train/cat/deep/er/a.JPG", "train/ant/c.png"):
        write(tmp_path / name, encoded(len(name), "PNG" if "png" in name else "JPEG"))
    for name in (".hidden/x.jpg", "train/._b.jpg", "train/notes.txt", "train/cat/.thumbs/a.jpg"):
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
        write(tmp_path / name, encoded(0, "JPEG"))
    source = open_source(f"folder:{tmp_path}")
    assert source.classes is None and source.labels() is None and source.label(0) is None


def test_names_are_sorted_as_whole_paths(tmp_path):
    names = ["a/z.png", "a-b/x.png", "a b/x.png", "a.png", "a0/x.png", "é/x.png", "B/x.png"]
    for name in names:
        write(tmp_path / name, b"")
    source = open_source(f"folder:{tmp_path}/")
    assert [source.name(i) for i in range(len(source))] == sorted(names)


def test_names_need_not_be_text(tmp_path):
    for number, name in enumerate((b"caf\xe9/\xff.png", b"tea/b.png")):
        folder = os.path.join(os.fsencode(tmp_path), os.path.dirname(name))
        os.mkdir(folder)
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(encoded(number))
    source = open_source(f"folder:{tmp_path}")
    assert os.fsencode(source.classes[0]) == b"caf\xe9" and source.classes[1] == "tea"
    np.testing.assert_array_equal(source.image(0), image(0))


def test_other_formats_and_options(tmp_path):
    write(tmp_path / "a.jpg", encoded(7))  # what it holds counts, not how it is called
    np.save(tmp_path / "b.npy", np.full((6, 8, 5), 9, np.uint8))
    source = open_source(f"folder:{tmp_path}?bands=2,0&range=0:18")
    assert source.reading == Reading(bands=(2, 0), range=((0.0, 18.0),))
    assert source.image(0).shape == source.image(1).shape == (6, 8, 2)
    assert source.image(0).flat[0] == 99 and source.image(1).flat[0] == 128


def test_a_file_that_vanished_is_unreadable(tmp_path):
    path = write(tmp_path / "a.jpg", encoded())
    source = open_source(f"folder:{tmp_path}")
    path.unlink()
    with pytest.raises(UnreadableImage, match="/a.jpg: No such file"):
        source.image(0)
    path.mkdir()
    with pytest.raises(UnreadableImage, match="/a.jpg: Is a directory"):
        source.image(0)


def test_an_empty_file_is_unreadable(tmp_path):
    write(tmp_path / "a.jpg", b"")
    with pytest.raises(UnreadableImage, match="^a.jpg: the file is empty$"):
        open_source(f"folder:{tmp_path}").image(0)


def test_links_to_files_count_and_links_to_folders_do_not(tmp_path):
    write(tmp_path / "in/a.png", encoded(3))
    (tmp_path / "in/b.png").symlink_to(tmp_path / "in/a.png")
    (tmp_path / "in/loop").symlink_to(tmp_path / "in")
    source = open_source(f"folder:{tmp_path}/in")
    assert [source.name(i) for i in range(len(source))] == ["a.png", "b.png"]
    np.testing.assert_array_equal(source.image(1), image(3))


@pytest.mark.parametrize("classes", [1, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_hundred_thousand_files(tmp_path, classes):
    """Listing takes about 0.1 s; making the files (hard links) and removing them, seconds."""
    for number in range(100_000):
        path = f"{tmp_path}/{number % classes:04d}/{number:06d}.png"
        if number < classes:
            os.mkdir(os.path.dirname(path))
        if number % 30_000 == 0:  # a file may have some 65,000 links
            open(path, "wb").close()
            first = path
        else:
            os.link(first, path)
    start = time.process_time()
    source = open_source(f"folder:{tmp_path}")
    seconds = time.process_time() - start
    shutil.rmtree(tmp_path)
    assert len(source) == 100_000 and len(source.classes or ()) == (classes if classes > 1 else 0)
    assert source.name(99_999).endswith("99999.png") and source.name(0).endswith("/000000.png")
    assert seconds < 3, seconds


def test_many_names_are_held_compactly():
    """37 bytes of name take about 41: ten million, with classes, 1.2 GB at the most (measured)."""
    names = (b"train/n%08d/n%08d_%06d.JPEG" % (k // 1300, k // 1300, k) for k in range(100_000))
    held = folders._packed(names)
    assert held.nbytes < 100_000 * 50
    source = folders.FileSource(root="/x", names=held)
    assert source.name(99_999) == "train/n00000076/n00000076_099999.JPEG"
    assert len(pickle.dumps(source)) < 100_000 * 50


# ---- list ---------------------------------------------------------------------------------------


def test_a_list_names_files_in_its_own_order(tmp_path, memory):
    for number, name in enumerate(("pics/a.png", "b.dat", "c c.png")):
        write(tmp_path / name, encoded(number))
    memory("/far/d.png", encoded(3))
    lines = ["# three here, one there", "", "c c.png", f"{tmp_path}/b.dat", "memory://far/d.png"]
    write(tmp_path / "list.txt", ("\r\n".join(lines) + "\r\n  \r\npics/a.png").encode())
    source = open_source(f"list:{tmp_path}/list.txt")
    assert len(source) == 4 and source.classes is None and source.labels() is None
    assert [source.image(i).flat[0] for i in range(4)] == [2, 1, 3, 0]
    assert source.name(0) == "c c.png" and source.name(2) == "memory://far/d.png"
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again.image(2), image(3))


def test_a_list_with_labels(tmp_path):
    write(tmp_path / "words.txt", b"a.png\tdog\nb.png\tant, red\nc.png\tdog\n")
    source = open_source(f"list:{tmp_path}/words.txt")
    assert source.classes == ("ant, red", "dog") and source.labels().tolist() == [1, 0, 1]
    write(tmp_path / "numbers.txt", b"a.png\t7\nb.png\t0\n")
    source = open_source(f"list:{tmp_path}/numbers.txt")
    assert source.classes is None and source.labels().tolist() == [7, 0]


def test_a_missing_file_of_a_list_is_found_when_it_is_read(tmp_path):
    write(tmp_path / "list.txt", b"absent.png\nmemory://absent.png\n")
    source = open_source(f"list:{tmp_path}/list.txt")
    for i, name in enumerate((f"{tmp_path}/absent.png", "memory://absent.png")):
        with pytest.raises(UnreadableImage, match=f"^{name}: No such file"):
            source.image(i)


def test_a_list_in_parquet(tmp_path):
    for number in range(4):
        write(tmp_path / f"pics/{number}.png", encoded(number))
    columns = {
        "path": [f"pics/{k}.png" for k in range(4)],
        "other": [f"{tmp_path}/pics/{3 - k}.png" for k in range(4)],
        "label": ["b", "a", "b", "c"],
        "number": [5, 6, 7, 8],
        "split": ["train", "val", "train", "val"],
    }
    pq.write_table(pa.table(columns), tmp_path / "list.parquet")
    source = open_source(f"list:{tmp_path}/list.parquet?split=val")
    assert [source.image(i).flat[0] for i in range(2)] == [1, 3] and len(source) == 2
    assert source.classes == ("a", "b", "c") and source.labels().tolist() == [0, 2]
    source = open_source(f"list:{tmp_path}/list.parquet?path=other&label=number&bands=0")
    assert source.image(1).shape == (6, 8, 1) and source.image(1).flat[0] == 2
    assert source.classes is None and source.labels().tolist() == [5, 6, 7, 8]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("list:{dir}/absent.txt", "absent.txt: No such file"),
        ("list:{dir}/empty.txt", "names no file"),
        ("list:{dir}/half.txt", "2 of its 4 files have no label, the first of them 'b.png'"),
        ("list:{dir}/half.txt?label=x", "unknown option 'label'; there are bands, range, draft"),
        ("list:{dir}/half.txt?range=x", "range='x' is not LOW:HIGH"),
        ("list:{dir}/x.parquet", "has no column 'path'; there are image"),
        ("list:{dir}/x.parquet?path=image", "holds int64 with 0 nulls in its column 'image'"),
        ("list:{dir}/x.parquet?split=a", "has no column 'split'"),
        ("folder:{dir}/absent", "does not exist"),
        ("folder:{dir}/half.txt", "is not a folder"),
        ("folder:{dir}/nothing", "holds no file"),
        ("folder:{dir}", "holds 3 files but no image .*jpg"),
        ("folder:memory://nowhere", "holds no file"),
        ("folder:nonsense://x", "nonsense://x: Protocol not known"),
        ("folder:{dir}?split=train", "unknown option 'split'; there are bands, range, draft"),
    ],
)
def test_one_sentence_says_what_is_wrong(tmp_path, spec, words):
    (tmp_path / "nothing").mkdir()
    write(tmp_path / "empty.txt", b"# nothing\n\n")
    write(tmp_path / "half.txt", b"a.png\tx\nb.png\nc.png\t\nd.png\ty\n")
    pq.write_table(pa.table({"image": [1]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=words) as caught:
        open_source(spec.format(dir=tmp_path))
    assert "\n" not in str(caught.value) and str(caught.value).endswith((".", "?"))


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_a_folder_one_may_not_read(tmp_path):
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(ValueError, match="closed: Permission denied"):
        open_source(f"folder:{tmp_path}")


# ---- URLs ---------------------------------------------------------------------------------------


def test_folder_and_list_in_memory(memory):
    for number, name in enumerate(("cat/b.png", "ant/deep/a.png", "ant/.x.png", "ant/notes.txt")):
        memory(f"/pics/{name}", encoded(number))
    memory("/pics2/other.png", encoded(9))
    for root in ("memory://pics", "memory://pics/", "memory:///pics"):
        source = open_source(f"folder:{root}")
        assert [source.name(i) for i in range(len(source))] == ["ant/deep/a.png", "cat/b.png"]
        assert source.classes == ("ant", "cat")
        assert [source.image(i).flat[0] for i in range(2)] == [1, 0]
    memory("/pics/list.txt", b"cat/b.png\nmemory://pics2/other.png\n")
    source = open_source("list:memory://pics/list.txt")
    assert [source.image(i).flat[0] for i in range(2)] == [0, 9]


@pytest.fixture
def web(tmp_path):
    """The address of a web server of tmp_path on this machine; it knows no ranges."""
    if importlib.util.find_spec("aiohttp") is None:
        pytest.skip("reading http:// needs aiohttp: pip install aiohttp")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_folder_and_list_on_the_web(tmp_path, web, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    for number, name in enumerate(("cat/b.png", "ant/a.png")):
        write(tmp_path / "pics" / name, encoded(number))
    source = open_source(f"folder:{web}/pics/")
    assert source.classes == ("ant", "cat")
    assert [source.image(i).flat[0] for i in range(2)] == [1, 0]
    write(tmp_path / "list.txt", f"pics/cat/b.png\n{web}/pics/ant/a.png\nabsent.png".encode())
    source = open_source(f"list:{web}/list.txt")
    assert [source.image(i).flat[0] for i in range(2)] == [0, 1]
    with pytest.raises(UnreadableImage, match="absent.png: No such file"):
        source.image(2)
