"""Curated rows: they lead back to their images, repeat by their count, and come from mixtures."""

import io
import json
import multiprocessing
import operator
import pickle
import tarfile
from concurrent.futures import ProcessPoolExecutor
from urllib.parse import quote

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dinojax.data.curated import read_mixture
from dinojax.data.decode import UnreadableImage
from dinojax.data.sources import open_source


def png(seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 5, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def images(tmp_path):
    """A folder of 10 images in two classes, and a tar of 5; the SPECs of both."""
    for k in range(10):
        path = tmp_path / "images" / "ab"[k // 5] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(k))
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for k in range(10, 15):
            info = tarfile.TarInfo(f"{k}.png")
            info.size = len(png(k))
            archive.addfile(info, io.BytesIO(png(k)))
    return f"folder:{tmp_path}/images", f"tar:{tmp_path}/x.tar"


def samples(path, source=None, **columns):
    table = pa.table(columns)
    pq.write_table(table.replace_schema_metadata(source and {"source": source}), path)
    return f"curated:{path}"


ROWS = [7, 0, 3, 3, 9]
COUNTS = [1, 3, 2, 1, 1]
REPEATED = [7, 0, 0, 0, 3, 3, 3, 9]


# ---------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("told", ["metadata", "column", "option"])
@pytest.mark.parametrize("counts", [None, [1] * 5, COUNTS])
def test_rows_lead_back_to_their_images(images, tmp_path, told, counts):
    folder = images[0]
    columns = {"row": ROWS} | ({} if counts is None else {"count": counts})
    if told == "metadata":
        spec = samples(tmp_path / "s.parquet", folder, **columns)
    elif told == "column":
        spec = samples(tmp_path / "s.parquet", source=None, **columns | {"id": ["x"] * 5})
        table = pq.read_table(tmp_path / "s.parquet").append_column("source", [[folder] * 5])
        pq.write_table(table, tmp_path / "s.parquet")
    else:  # wins over what the file says
        spec = samples(tmp_path / "s.parquet", "folder:/absent", **columns)
        spec += f"?source={quote(folder, safe='')}"
    source, base = open_source(spec), open_source(folder)
    expected = REPEATED if counts == COUNTS else ROWS
    assert len(source) == len(expected) and source.classes == ("a", "b")
    assert [source.encoded(i) for i in range(len(source))] == [png(k) for k in expected]
    assert [source.name(i) for i in range(len(source))] == [base.name(k) for k in expected]
    np.testing.assert_array_equal(source.image(1), base.image(expected[1]))
    assert [source.label(i) for i in range(len(source))] == [k // 5 for k in expected]
    assert source.labels().tolist() == [k // 5 for k in expected]


def test_rows_of_several_sources(images, tmp_path):
    folder, tar = images
    spec = samples(
        tmp_path / "s.parquet",
        row=pa.array([4, 4, 0, 1], pa.uint32()),
        count=pa.array([1, 2, 1, 1], pa.int16()),
    )
    specs = pa.array([tar, folder, tar, folder]).dictionary_encode()
    table = pq.read_table(tmp_path / "s.parquet").append_column("source", specs)
    pq.write_table(table, tmp_path / "s.parquet")
    source = open_source(spec)
    assert [source.encoded(i) for i in range(5)] == [png(k) for k in (14, 4, 4, 10, 1)]
    assert source.classes is None and source.labels() is None  # the tar has no labels
    assert source.label(1) is None


def test_labels_of_several_sources(images, tmp_path):
    folder = images[0]
    same = f"{folder}/../images"
    spec = samples(tmp_path / "s.parquet", row=[9, 1, 6], count=[1, 2, 1])
    table = pq.read_table(tmp_path / "s.parquet").append_column("source", [[same, folder, folder]])
    pq.write_table(table, tmp_path / "s.parquet")
    source = open_source(spec)
    assert len(source.sources) == 2 and source.classes == ("a", "b")
    assert source.labels().tolist() == [1, 0, 0, 1] == [source.label(i) for i in range(4)]


@pytest.mark.parametrize(
    ("labels", "classes", "targets"),
    [
        (pa.array([5, 6, 7, 8, 9], pa.int8()), None, [5, 6, 6, 6, 7, 7, 8, 9]),
        (pa.array(["z", "a", "a", "b", "z"]), ("a", "b", "z"), [2, 0, 0, 0, 0, 0, 1, 2]),
    ],
)
def test_labels_of_the_file(images, tmp_path, labels, classes, targets):
    spec = samples(tmp_path / "s.parquet", images[0], row=ROWS, count=COUNTS, label=labels)
    source = open_source(spec)
    assert source.classes == classes and source.labels().tolist() == targets
    assert [source.label(i) for i in range(8)] == targets


def test_names_of_numbered_labels_are_in_the_metadata(images, tmp_path):
    table = pa.table({"row": [1], "label": [1]})
    metadata = {"source": images[0], "classes": json.dumps(["cat", "dog"])}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "s.parquet")
    assert open_source(f"curated:{tmp_path}/s.parquet").classes == ("cat", "dog")


def test_any_source_can_be_chosen_from(images, tmp_path):
    once = samples(tmp_path / "once.parquet", images[1] + "?bands=2,1,0", row=[4, 2], count=[1, 2])
    twice = open_source(samples(tmp_path / "twice.parquet", once, row=[2, 0]))
    assert [twice.encoded(i) for i in range(2)] == [png(12), png(14)]
    np.testing.assert_array_equal(
        twice.image(0), np.array(Image.open(io.BytesIO(png(12))))[..., ::-1]
    )
    scenes = open_source(samples(tmp_path / "s.parquet", "scenes:9?size=16", row=[8]))
    np.testing.assert_array_equal(scenes.image(0), open_source("scenes:9?size=16").image(8))


def test_a_worker_process_reads_the_same(images, tmp_path):
    rows, counts = np.arange(3000) % 5, np.arange(3000) % 3 + 1
    source = open_source(samples(tmp_path / "s.parquet", images[1], row=rows, count=counts))
    assert len(pickle.dumps(source)) < 1500  # neither rows nor counts
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        i = len(source) - 1
        assert pool.submit(operator.methodcaller("encoded", i), source).result() == png(14)
    state = pickle.dumps(source)
    samples(tmp_path / "s.parquet", images[1], row=[0])
    with pytest.raises(ValueError, match="had 6000 images, now 1"):
        pickle.loads(state)


def test_nothing_is_repeated_in_memory(images, tmp_path):
    spec = samples(tmp_path / "s.parquet", images[0], row=[1, 2], count=[10**12, 5])
    source = open_source(spec)
    assert len(source) == 10**12 + 5
    assert source.encoded(10**12 - 1) == png(1) and source.encoded(10**12) == png(2)


def test_an_image_that_is_gone_is_unreadable(images, tmp_path):
    source = open_source(samples(tmp_path / "s.parquet", images[0], row=[1, 2]))
    (tmp_path / "images/a/1.png").unlink()
    with pytest.raises(UnreadableImage, match="No such file"):
        source.image(0)


def test_urls(images, tmp_path):
    samples(tmp_path / "s.parquet", images[0], row=[3])
    memory = fsspec.filesystem("memory")
    try:
        memory.pipe("/cur/lvd/s.parquet", (tmp_path / "s.parquet").read_bytes())
        part = {"name": "x", "samples": "lvd/s.parquet"}
        memory.pipe("/cur/mixture.json", json.dumps({"components": [part]}).encode())
        assert open_source("curated:memory://cur/lvd/s.parquet").encoded(0) == png(3)
        assert read_mixture("memory://cur/mixture.json")[0].samples == "memory://cur/lvd/s.parquet"
        assert open_source("curated:memory://cur/mixture.json?component=x").encoded(0) == png(3)
    finally:
        memory.rm("/cur", recursive=True)


# ------------------------------------------------------------------------------------ mixtures

STRANGE = [{"component": "s", "probability": 1}]
PARTS = [
    {"name": "clustering", "samples": "samples/lvd/samples.parquet", "n": 5, "weight": 2.5},
    {"name": "seed", "samples": "/data/seed.parquet"},
    {"name": "web", "samples": "gs://bucket/web.parquet", "weight": 0},
    {"name": "imagenet", "samples": "../imagenet.parquet"},
]


@pytest.mark.parametrize(
    ("rest", "expected"),
    [
        ({}, {"clustering": (2.5, 0.0), "seed": (None, 0.0), "imagenet": (None, 0.0)}),
        (
            {
                "homogeneous": [{"component": "imagenet", "probability": 0.1}],
                "heterogeneous": {"components": ["seed", "clustering"], "weights": "size"},
            },
            {"clustering": (None, 0.0), "seed": (None, 0.0), "imagenet": (0.0, 0.1)},
        ),
        (
            {
                "homogeneous": [{"component": "seed", "probability": 0.2}],
                "heterogeneous": {"components": ["seed", "web", "imagenet"], "weights": [3, 1, 0]},
            },
            {"seed": (3, 0.2), "web": (1, 0.0)},
        ),
    ],
)
def test_what_a_mixture_draws(tmp_path, rest, expected):
    path = tmp_path / "mixture.json"
    path.write_text(json.dumps({"version": 1, "seed": 65537, "components": PARTS} | rest))
    places = {
        "clustering": f"{tmp_path}/samples/lvd/samples.parquet",
        "seed": "/data/seed.parquet",
        "web": "gs://bucket/web.parquet",
        "imagenet": f"{tmp_path}/../imagenet.parquet",
    }
    assert read_mixture(str(path)) == [
        (name, places[name], *drawn) for name, drawn in expected.items()
    ]


def test_one_component_of_a_mixture_is_a_source(images, tmp_path):
    (tmp_path / "samples").mkdir()
    samples(tmp_path / "samples" / "s.parquet", images[0], row=ROWS, count=COUNTS)
    parts = [{"name": "one", "samples": "samples/s.parquet"}, {"name": "two", "samples": "absent"}]
    (tmp_path / "mixture.json").write_text(json.dumps({"components": parts}))
    source = open_source(f"curated:{tmp_path}/mixture.json?component=one")
    assert source.encoded(3) == png(0)
    assert pickle.loads(pickle.dumps(source)).encoded(7) == png(9)
    with pytest.raises(ValueError, match=r"is a mixture of one, two; choose .*component=NAME"):
        open_source(f"curated:{tmp_path}/mixture.json")
    with pytest.raises(ValueError, match="has no component 'too'; did you mean 'two'"):
        open_source(f"curated:{tmp_path}/mixture.json?component=too")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is no mixture.json of data curation"),
        ("[]", "is no mixture.json of data curation"),
        (json.dumps({"components": PARTS[:1] * 2}), "two components have one name"),
        (
            '{"components": [{"name": "x"}]}',
            "is no mixture.json of .*KeyError.'samples'",
        ),
        (
            json.dumps(
                {"components": PARTS, "homogeneous": [{"component": "s", "probability": 1}]}
            ),
            "draws from 's', which is none of its components; there are clustering, seed",
        ),
        (
            json.dumps(
                {"components": PARTS, "heterogeneous": {"components": ["web"], "weights": [1, 2]}}
            ),
            "is no mixture.json of data curation",
        ),
        (None, "cannot be read .*No such file"),
    ],
)
def test_what_is_no_mixture(tmp_path, text, words):
    if text is not None:
        (tmp_path / "mixture.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_mixture(str(tmp_path / "mixture.json"))


# ----------------------------------------------------------------------------------- sentences


@pytest.mark.parametrize(
    ("columns", "option", "words"),
    [
        ({"rows": [1]}, "", "has no column 'row'; did you mean 'rows'"),
        ({"row": [1.5]}, "", "column 'row' .* holds double with 0 nulls, expected integers"),
        ({"row": [1, None]}, "", "column 'row' .* holds int64 with 1 nulls"),
        ({"row": [1, -1]}, "", "column 'row' .* holds -1, expected 0 or more"),
        ({"row": [1], "count": [0]}, "", "column 'count' .* holds 0, expected 1 or more"),
        ({"row": [1, 10]}, "", "chooses row 10 of 'folder:.*', which has 10 images"),
        ({"row": [1], "label": [1.0]}, "", "column 'label' .* holds double"),
        ({"row": pa.array([], pa.int64())}, "", "has no rows"),
        (
            {"row": [1]},
            "?source=folder:/absent",
            "rows of 'folder:/absent' .*: .*not exist",
        ),
        ({"row": [1]}, "?sourc=x", "unknown option 'sourc'; did you mean 'source'"),
        ({"row": [1]}, "?component=x", "is no mixture.json and has no component"),
    ],
)
def test_one_sentence_says_what_is_wrong(images, tmp_path, columns, option, words):
    spec = samples(tmp_path / "s.parquet", images[0], **columns)
    with pytest.raises(ValueError, match=words) as caught:
        open_source(spec + option)
    assert "\n" not in str(caught.value) and str(caught.value).endswith((".", "?"))


def test_files_that_say_too_little(tmp_path):
    with pytest.raises(ValueError, match="does not say which source .*[?]source=SPEC"):
        open_source(samples(tmp_path / "s.parquet", row=[1]))
    table = pa.table({"row": [1, 2], "source": ["scenes", None]})
    pq.write_table(table, tmp_path / "s.parquet")
    with pytest.raises(ValueError, match="column 'source' .* with 1 nulls, expected the SPEC"):
        open_source(f"curated:{tmp_path}/s.parquet")
    (tmp_path / "s.parquet").write_text("text")
    with pytest.raises(ValueError, match="s.parquet' cannot be read"):
        open_source(f"curated:{tmp_path}/s.parquet")
    with pytest.raises(ValueError, match="absent.parquet' cannot be read .*No such file"):
        open_source(f"curated:{tmp_path}/absent.parquet")
