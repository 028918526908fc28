"""What was chosen on disk: training reads it, exports hold it, nothing that opted out is in it."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_curation import filters, provenance
from data_curation.chosen import images_of, write_chosen, write_whole
from data_curation.embeddings import as_embeddings, open_embeddings
from data_curation.export import export
from data_curation.mixture import Part, expected_shares, write_mixture
from dinojax.data import shards
from dinojax.data.curated import read_mixture
from dinojax.data.mixture import open_mixture
from dinojax.data.sources import open_source

from .sets import small_tree, write_set

N, SPEC = 40, "scenes:60?size=32"
ROWS = np.arange(N) + 20  # images of the source that rows of the set are
DRAWN = np.array([30, 2, 7, 7, 39, 2, 7, 11])


@pytest.fixture(scope="module")
def vectors():
    return np.random.default_rng(0).normal(size=(N, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def embeddings(vectors, tmp_path_factory):
    """40 rows: images 20 to 59 of a source of scenes, of which one was left out of each shard."""
    source = open_source(SPEC)
    licenses = ["cc0", "cc-by", None, "", "cc-by-nc"] * 8
    columns = {
        "id": [f"image-{row}" for row in ROWS],
        "row": ROWS,
        "label": source.labels()[ROWS],
        "license": pa.array(licenses),
        "url": [f"http://x/{row}.jpg" for row in ROWS],
        "colour": ["red", "blue"] * 20,
    }
    folder = tmp_path_factory.mktemp("set")
    return write_set(folder, vectors, columns, source=SPEC, classes=list(source.classes))


@pytest.fixture(scope="module")
def tree(vectors):
    low = np.arange(N) % 5
    low[:3] = -1
    return small_tree(vectors, low, [0, 0, 1, 1, 1])


@pytest.fixture(scope="module")
def samples(embeddings, tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    drawn = DRAWN + 3
    drawn[4] = 39
    write_chosen(folder, embeddings, drawn, part="balanced", tree=tree, carry=["colour"])
    return folder


def test_samples_hold_what_is_known_of_each_row(samples, embeddings, tree):
    table = pq.read_table(samples / "samples.parquet")
    rows = [5, 10, 14, 33, 39]
    assert table["embedding_row"].to_pylist() == rows
    assert table["id"].to_pylist() == [f"image-{row + 20}" for row in rows]
    assert table["row"].to_pylist() == [row + 20 for row in rows]
    assert table["count"].to_pylist() == [2, 3, 1, 1, 1]
    assert table["cluster_1"].to_pylist() == [row % 5 for row in rows]
    assert table["cluster_2"].to_pylist() == [(row % 5) // 2 > 0 for row in rows]
    np.testing.assert_array_equal(table["dist"], tree.levels[0].dist[rows])
    assert set(table["part"].to_pylist()) == {"balanced"}
    assert table["license"].to_pylist() == ["cc0", "cc0", "cc-by-nc", "", "cc-by-nc"]
    assert table["colour"].to_pylist() == ["blue", "red", "red", "blue", "blue"]
    assert "url" in table.column_names
    assert np.load(samples / "rows.npy").tolist() == [33, 5, 10, 10, 39, 5, 10, 14]
    ids = (samples / "ids.txt").read_text().splitlines()
    assert ids == [f"image-{row + 20}" for row in np.repeat(rows, [2, 3, 1, 1, 1])]


def test_training_reads_samples(samples):
    source, scenes = open_source(f"curated:{samples}/samples.parquet"), open_source(SPEC)
    rows = [25, 25, 30, 30, 30, 34, 53, 59]
    assert len(source) == 8 and source.classes == scenes.classes
    for place, row in enumerate(rows):
        np.testing.assert_array_equal(source.image(place), scenes.image(row))
        assert source.label(place) == scenes.label(row)


def test_a_set_without_row_numbers_is_its_own_source(vectors, tmp_path):
    write_chosen(tmp_path, as_embeddings(vectors), np.array([4, 1]), part="p", images="scenes:40")
    table = pq.read_table(tmp_path / "samples.parquet")
    assert table["row"].to_pylist() == [1, 4] == table["id"].to_pylist()
    source, scenes = open_source(f"curated:{tmp_path}/samples.parquet"), open_source("scenes:40")
    assert [source.name(k) for k in (0, 1)] == [scenes.name(k) for k in (1, 4)]
    assert table.schema.metadata == {b"source": b"scenes:40"}


def test_images_are_known_without_a_manifest(embeddings):
    assert images_of(embeddings).source == SPEC and len(images_of(embeddings).classes) == 10
    assert images_of(as_embeddings(np.ones((2, 2), np.float32))) == ("", None)


def test_a_shard_of_features_is_a_set(tmp_path):
    table = pa.table({"id": ["a", "b"], "row": [4, 9], "embedding": [[1.0, 2.0], [3.0, 4.0]]})
    metadata = {"source": SPEC, "classes": '["x", "y"]'}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "emb.parquet")
    x = open_embeddings(str(tmp_path / "emb.parquet"))
    assert images_of(x) == (SPEC, ["x", "y"])
    write_chosen(tmp_path, x, np.array([1]), part="p")
    source, scenes = open_source(f"curated:{tmp_path}/samples.parquet"), open_source(SPEC)
    np.testing.assert_array_equal(source.image(0), scenes.image(9))


def test_labels_that_training_would_refuse_stay_out(vectors, tmp_path):
    labels = pa.array([1, None] * 20)
    x = write_set(tmp_path / "set", vectors, {"id": np.arange(N), "label": labels})
    write_chosen(tmp_path, x, np.arange(5), part="p", images="scenes:40?size=16")
    assert "label" not in pq.read_table(tmp_path / "samples.parquet").column_names
    assert open_source(f"curated:{tmp_path}/samples.parquet").label(0) is not None


def test_large_samples_are_written_in_blocks(embeddings, tree, tmp_path, monkeypatch):
    import data_curation.chosen as chosen

    monkeypatch.setattr(chosen, "BLOCK", 7)
    write_chosen(tmp_path / "a", embeddings, np.arange(3, N), part="p", tree=tree)
    monkeypatch.undo()
    write_chosen(tmp_path / "b", embeddings, np.arange(3, N), part="p", tree=tree)
    one, other = (pq.read_table(tmp_path / f"{k}/samples.parquet") for k in "ab")
    assert one.equals(other) and one.schema.metadata == other.schema.metadata
    assert (tmp_path / "a/ids.txt").read_text() == (tmp_path / "b/ids.txt").read_text()


def test_unusable_choices_end_in_a_sentence(embeddings, tmp_path):
    with pytest.raises(ValueError, match="no rows were chosen"):
        write_chosen(tmp_path, embeddings, np.empty(0, np.int64), part="p")
    with pytest.raises(ValueError, match="no column 'colours'; did you mean 'colour'"):
        write_chosen(tmp_path, embeddings, np.arange(3), part="p", carry=["colours"])
    assert not list(tmp_path.iterdir())


# ---- filters -------------------------------------------------------------------------------------


def test_opt_outs_by_id_url_and_number(embeddings, tmp_path):
    file = tmp_path / "out.txt"
    file.write_text("# people who asked\nimage-23\n\nhttp://x/59.jpg\nimage-9999\n")
    assert filters.listed_rows(embeddings, filters.read_list(str(file))).tolist() == [3, 39]
    table = pa.table({"url": ["http://x/20.jpg", None], "id": ["image-21", "image-22"]})
    pq.write_table(table, tmp_path / "out.parquet")
    listed = filters.read_list(str(tmp_path / "out.parquet"))
    assert filters.listed_rows(embeddings, listed).tolist() == [0, 1, 2]
    numbered = as_embeddings(np.ones((9, 2), np.float32))
    assert filters.listed_rows(numbered, pa.array(["4", "8"])).tolist() == [4, 8]


def test_licences(embeddings):
    usable = filters.usable_rows(embeddings, allow=["cc0", "cc-by"])
    assert [row % 5 for row in usable.rows] == [0, 1, 2, 3] * 8
    assert usable.licenses == {"(unknown)": 16, "cc-by": 8, "cc-by-nc": 8, "cc0": 8}
    usable = filters.usable_rows(embeddings, deny=["cc-by-nc"], unknown="drop")
    assert [row % 5 for row in usable.rows] == [0, 1] * 8
    assert len(usable.licensed_out) == 24 and len(usable.opted_out) == 0


def test_bad_rows_are_counted_listed_and_limited(vectors, tmp_path):
    broken = vectors.copy()
    broken[7, 2], broken[9] = np.nan, 0
    x = write_set(tmp_path / "set", broken, {"id": [f"i{k}" for k in range(N)]})
    with pytest.raises(ValueError, match="1 of 40 rows .* not finite, the first is row 7"):
        filters.usable_rows(x)
    usable = filters.usable_rows(x, max_bad_fraction=0.1, zero_is_bad=True)
    assert usable.bad.tolist() == [7, 9] and len(usable.rows) == 38
    assert 9 in filters.usable_rows(x, max_bad_fraction=0.1).rows
    counts = filters.write_usable(tmp_path, x, usable)
    assert counts == {"rows": 40, "opted_out": 0, "licensed_out": 0, "bad": 2, "usable": 38}
    assert np.load(tmp_path / "subset.npy").tolist() == usable.rows.tolist()
    assert pq.read_table(tmp_path / "bad_rows.parquet")["id"].to_pylist() == ["i7", "i9"]


def test_impossible_filters_end_in_a_sentence(embeddings, vectors, tmp_path):
    with pytest.raises(ValueError, match="no column 'license'"):
        filters.usable_rows(as_embeddings(vectors), deny=["x"])
    with pytest.raises(ValueError, match="no row of .* may be used: 0 opted out, 40 have"):
        filters.usable_rows(embeddings, allow=["nothing"], unknown="drop")
    pq.write_table(pa.table({"name": ["x"]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="has the columns name; expected one of id, url, sha256"):
        filters.read_list(str(tmp_path / "x.parquet"))
    with pytest.raises(ValueError, match="the list .*absent.txt cannot be read"):
        filters.read_list(str(tmp_path / "absent.txt"))


# ---- provenance ----------------------------------------------------------------------------------


def test_provenance_counts_images(samples, embeddings, tmp_path):
    stage = provenance.StageRecord("sample", {"target": 8}, 3, 37, 8, 0.5)
    facts = provenance.input_facts(embeddings)
    provenance.write_provenance(tmp_path, {"pool": facts}, [stage], samples / "samples.parquet")
    found = json.loads((tmp_path / "provenance.json").read_text())
    counts = {"cc0": 5, "cc-by-nc": 2, "(unknown)": 1}
    assert found["counts"] == {"license": counts, "part": {"balanced": 8}}
    assert found["stages"][0] == stage._asdict()
    assert found["inputs"]["pool"]["digest"] == embeddings.digest()
    assert found["inputs"]["pool"]["source"] == SPEC and found["code"].startswith("0.")


# ---- export --------------------------------------------------------------------------------------


def test_export_without_those_who_asked_later(samples, tmp_path):
    exclude = tmp_path / "exclude.txt"
    exclude.write_text("image-30\nhttp://x/59.jpg\n")
    file, options = samples / "samples.parquet", {"exclude": str(exclude)}
    assert export(file, tmp_path, "parquet", **options) == (3, 2)
    source = open_source(f"curated:{tmp_path}/samples.parquet")
    assert [source.sources[0].name(int(row)) for row in source.rows] == [
        open_source(SPEC).name(row) for row in (25, 34, 53)
    ]
    export(file, tmp_path, "txt", opt_out=str(exclude))
    assert (tmp_path / "ids.txt").read_text().split() == ["image-25"] * 2 + ["image-34", "image-53"]
    export(file, tmp_path, "npy", **options)
    assert np.load(tmp_path / "rows.npy").tolist() == [25, 25, 34, 53]
    exclude.write_text("".join(f"image-{row}\n" for row in range(60)))
    with pytest.raises(ValueError, match="all 5 rows are excluded"):
        export(file, tmp_path, **options)
    with pytest.raises(ValueError, match="'csv'; there are parquet, txt"):
        export(file, tmp_path, "csv")


def test_record_index(samples, vectors, tmp_path):
    with pytest.raises(ValueError, match="images are in 'scenes:60"):
        export(samples / "samples.parquet", tmp_path, "arrayrecord-index")
    spec = "scenes:12?size=16"
    shards.write_shards(open_source(spec), tmp_path / "s", spec=spec, shard_bytes=4000)
    images = f"array_record:{tmp_path}/s/*.array_record"
    rows = np.array([11, 0, 6, 6])
    write_chosen(tmp_path / "x", as_embeddings(vectors[:12]), rows, part="p", images=images)
    export(tmp_path / "x/samples.parquet", tmp_path, "arrayrecord-index")
    table, source = pq.read_table(tmp_path / "records.parquet"), open_source(images)
    assert len(set(table["file"].to_pylist())) > 1
    assert table["count"].to_pylist() == [1, 2, 1]
    named = [f"{file}#{place}" for file, place in zip(table["file"], table["record"])]
    assert named == [source.records.name(row) for row in (0, 6, 11)]


# ---- mixtures ------------------------------------------------------------------------------------


@pytest.fixture
def parts(embeddings, tmp_path):
    """Two files of samples that share rows 5 to 9."""
    write_chosen(tmp_path / "a", embeddings, np.arange(10).repeat(2), part="a")
    write_chosen(tmp_path / "b", embeddings, np.arange(5, 20), part="b")
    return [Part(name, str(tmp_path / name / "samples.parquet")) for name in "ab"]


def test_training_reads_a_mixture(parts, tmp_path):
    parts += [Part("seed", "scenes:8?size=16&seed=3", weight=0, homogeneous=0.1)]
    sizes = write_mixture(tmp_path / "mixture.json", parts)
    assert sizes == {"a": 20, "b": 10, "seed": 8}
    mixture = open_mixture(f"curated:{tmp_path}/mixture.json")
    assert [part.name for part in mixture.components] == ["a", "b", "seed"]
    assert [len(part.source) for part in mixture.components] == [20, 10, 8]
    shares = {"a": 0.6, "b": 0.3, "seed": 0.1}
    assert mixture.expected() == pytest.approx(shares)
    assert expected_shares(parts, sizes) == pytest.approx(shares)
    rows = mixture.components[1].source.rows.tolist()
    assert rows == list(range(30, 40))  # 5 to 9 are in "a" already
    written = json.loads((tmp_path / "mixture.json").read_text())
    assert written["components"][0]["samples"] == "a/samples.parquet"
    assert written["components"][1]["samples"] == "parts/b/samples.parquet"
    assert written["homogeneous"] == [{"component": "seed", "probability": 0.1}]
    assert written["heterogeneous"] == {"components": ["a", "b"], "weights": "size"}


def test_weights_and_repeats_as_given(parts, tmp_path):
    parts = [parts[0]._replace(weight=3.0), parts[1]]
    assert write_mixture(tmp_path / "mixture.json", parts, once=False) == {"a": 20, "b": 15}
    (a, b) = read_mixture(str(tmp_path / "mixture.json"))
    assert (a.weight, b.weight) == (3.0, 15)
    assert not (tmp_path / "parts").exists()


def test_a_row_of_several_seed_sets_is_one_image(embeddings, tmp_path):
    """As retrieval writes it: a row for each seed set."""
    table = pa.table({"row": [3, 3, 5], "seed_set": ["x", "y", "x"], "count": [1, 2, 1]})
    table = table.replace_schema_metadata({"source": SPEC})
    pq.write_table(table, tmp_path / "retrieved.parquet")
    parts = [Part("r", str(tmp_path / "retrieved.parquet")), Part("s", "scenes:9?size=16")]
    assert write_mixture(tmp_path / "mixture.json", parts) == {"r": 2, "s": 9}


def test_impossible_mixtures_end_in_a_sentence(parts, tmp_path):
    path = tmp_path / "mixture.json"
    with pytest.raises(ValueError, match="needs at least one"):
        write_mixture(path, [])
    pq.write_table(pq.read_table(parts[1].samples).slice(0, 5), tmp_path / "c.parquet")
    with pytest.raises(ValueError, match="'c': all of its 5 rows are in components before it"):
        write_mixture(path, [parts[0], Part("c", str(tmp_path / "c.parquet"))])
    with pytest.raises(ValueError, match="probabilities sum to 1.2"):
        write_mixture(path, [part._replace(homogeneous=0.6) for part in parts])
    with pytest.raises(ValueError, match="cannot be read"):
        write_mixture(path, [parts[0], Part("x", str(tmp_path / "absent.parquet"))])
    assert not path.exists()


def test_a_whole_source(tmp_path):
    write_whole(tmp_path / "s.parquet", open_source(SPEC), SPEC, "seed")
    source, scenes = open_source(f"curated:{tmp_path}/s.parquet"), open_source(SPEC)
    assert len(source) == 60 and source.name(31) == scenes.name(31)
    np.testing.assert_array_equal(source.labels(), scenes.labels())
