"""Embedding sets: one content in every form, subsets, preprocessing, and what is refused."""

import json
import threading
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_curation.embeddings import (
    EmbeddingWriter,
    as_embeddings,
    find_bad_rows,
    index,
    open_embeddings,
)

SIZES, DIM = (300, 1, 170), 6


def vectors(dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(0).normal(size=(sum(SIZES), DIM)).astype(dtype)


def write_set(directory, kind: str, dtype: str = "float32", x=None, ids=None) -> str:
    """A set of three uneven shards with ids and one metadata column."""
    x = vectors(dtype) if x is None else x
    writer = EmbeddingWriter(str(directory), DIM, dtype, kind, embedder={"name": "test"})
    first = 0
    for number, size in enumerate(SIZES):
        rows = range(first, first + size)
        names = [f"img-{row}" for row in rows] if ids is None else [ids[row] for row in rows]
        table = pa.table({"id": names, "label": [row % 7 for row in rows]})
        writer.write(number, x[first : first + size], table)
        first += size
    writer.finish(len(SIZES))
    return str(directory)


@pytest.fixture(params=["parquet", "npy", "single", "array"])
def either(request, tmp_path):
    if request.param == "array":
        return as_embeddings(vectors())
    if request.param == "single":
        np.save(tmp_path / "x.npy", vectors())
        return open_embeddings(str(tmp_path / "x.npy"))
    return open_embeddings(write_set(tmp_path, request.param))


def test_every_form_holds_the_same(either):
    x = vectors()
    assert (len(either), either.dim, either.n_total) == (*x.shape, len(x))
    firsts, blocks = zip(*either.blocks(batch_rows=64))
    assert firsts == tuple(range(0, len(x), 64))
    assert [len(block) for block in blocks[:-1]] == [64] * (len(blocks) - 1)
    np.testing.assert_array_equal(np.concatenate(blocks), x)
    np.testing.assert_array_equal(either.array(), x)
    middle = np.concatenate([block for _, block in either.blocks(50, start=290, stop=345)])
    np.testing.assert_array_equal(middle, x[290:345])
    some = np.array([470, 3, 300, 3, 299, 301])  # any order, repeats, every shard
    np.testing.assert_array_equal(either.take(some), x[some])
    assert either.take(np.empty(0, np.int64)).shape == (0, DIM)


def test_subset_speaks_of_rows_of_the_full_set(either):
    x, rows = vectors(), np.array([0, 5, 299, 300, 301, 470])
    part = either.restrict(rows)
    assert len(part) == 6 and part.n_total == len(x)
    np.testing.assert_array_equal(np.concatenate([b for _, b in part.blocks(4)]), x[rows])
    np.testing.assert_array_equal(part.take(np.array([4, 1])), x[rows[[4, 1]]])
    np.testing.assert_array_equal(part.row_of(np.array([4, 1])), rows[[4, 1]])
    np.testing.assert_array_equal(part.restrict(rows[1:3]).array(), x[rows[1:3]])
    assert len(part.restrict(rows[:0])) == 0 and list(part.restrict(rows[:0]).blocks()) == []
    for wrong, why in (
        ([1], "of the set it is of"),
        ([5, 0], "sorted"),
        ([5, 5], "sorted"),
        ([471], "rows 0 to 470, not 471"),
        ([-1], "not -1"),
    ):
        with pytest.raises(ValueError, match=why):
            part.restrict(np.array(wrong))


def test_preprocessing(either):
    x = vectors().astype(np.float64)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    for normalize, expected in (("none", x), ("l2", unit)):
        np.testing.assert_allclose(either.prepared(normalize).array(), expected, atol=1e-6)
        centred = either.prepared(normalize, center=True)
        np.testing.assert_allclose(centred.array(), expected - expected.mean(0), atol=1e-6)
        np.testing.assert_array_equal(
            centred.prepared(normalize).array(), either.prepared(normalize).array()
        )
    half = either.restrict(np.arange(100)).prepared(center=True)  # of the subset at hand
    np.testing.assert_allclose(half.mean, x[:100].mean(0), atol=1e-6)
    np.testing.assert_allclose(either.prepared(mean=np.ones(DIM)).array(), x - 1, atol=1e-6)
    with pytest.raises(ValueError, match="did you mean 'l2'"):
        either.prepared("L2")


@pytest.mark.parametrize("kind", ["parquet", "npy"])
def test_ids_and_metadata_follow_the_rows(tmp_path, kind):
    x = open_embeddings(write_set(tmp_path, kind))
    rows = np.array([470, 2, 300, 2])
    assert x.ids(rows).to_pylist() == ["img-470", "img-2", "img-300", "img-2"]
    assert x.restrict(np.arange(3)).ids(rows).to_pylist()[0] == "img-470"  # rows, not positions
    assert x.metadata(rows).to_pydict() == {"label": [1, 2, 6, 2]}
    assert x.metadata(rows, ["label", "id"]).column_names == ["label", "id"]
    assert x.columns == ("label",) and x.manifest["embedder"] == {"name": "test"}
    with pytest.raises(ValueError, match="no column 'labels'; did you mean 'label'"):
        x.metadata(rows, ["labels"])
    with pytest.raises(ValueError, match="not 471"):
        x.ids(np.array([471]))
    assert as_embeddings(vectors()).ids(rows).to_pylist() == [470, 2, 300, 2]


def test_shards_with_other_columns(tmp_path):
    index(write_set(tmp_path, "npy"))
    for number, column in ((1, {"licence": ["cc0"]}), (2, {"label": pa.array([1.5] * 170)})):
        names = pq.read_table(tmp_path / f"meta-{number:05d}.parquet").column("id")
        pq.write_table(pa.table({"id": names, **column}), tmp_path / f"meta-{number:05d}.parquet")
    x = open_embeddings(str(tmp_path))
    table = x.metadata(np.array([301, 300, 1]))
    assert table.to_pydict() == {"label": [1.5, None, 1.0], "licence": [None, "cc0", None]}


@pytest.mark.parametrize("kind", ["parquet", "npy"])
def test_half_precision_is_its_own_float32_copy(tmp_path, kind):
    half = open_embeddings(write_set(tmp_path, kind, "float16"))
    assert half.manifest["dtype"] == "float16"
    np.testing.assert_array_equal(half.array(), vectors("float16").astype(np.float32))


def test_large_row_groups_and_reading_backwards(tmp_path):
    x = np.random.default_rng(1).normal(size=(20_000, 2)).astype(np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), 2)
    table = pa.table({"id": np.arange(len(x)), "embedding": column})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=17_000)
    read = open_embeddings(str(tmp_path / "a.parquet"))
    np.testing.assert_array_equal(read.array(), x)
    np.testing.assert_array_equal(np.concatenate([b for _, b in read.blocks(3000)]), x)
    some = np.array([19_999, 0, 8192, 8191, 16_999, 17_000])
    np.testing.assert_array_equal(read.take(some), x[some])


def test_lists_of_any_type(tmp_path):
    x = vectors()
    ragged = [*x[:9].tolist(), x[9, :-1].tolist()]
    pq.write_table(pa.table({"id": range(9), "embedding": ragged[:9]}), tmp_path / "a.parquet")
    np.testing.assert_array_equal(open_embeddings(str(tmp_path / "a.parquet")).array(), x[:9])
    pq.write_table(pa.table({"id": range(10), "embedding": ragged}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="row 9 of the shard holds no vector of 6 numbers"):
        open_embeddings(str(tmp_path / "a.parquet")).array()


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_bad_rows_are_found_and_refused_by_name(tmp_path, value):
    x = vectors()
    x[[7, 400]] = value
    for kind in ("parquet", "npy"):
        bad = open_embeddings(write_set(tmp_path / kind, kind, x=x))
        np.testing.assert_array_equal(find_bad_rows(bad), [7, 400])
        np.testing.assert_array_equal(find_bad_rows(bad, zero=False), [7, 400] if value else [])
        np.testing.assert_array_equal(find_bad_rows(bad.restrict(np.arange(50, 450))), [400])
        what = "not finite" if value else "zero"
        with pytest.raises(ValueError, match=rf"row 400 \(row 99 of .*emb-00002.*\) is {what}"):
            bad.restrict(np.arange(50, 450)).prepared("l2").array()
        if value:
            with pytest.raises(ValueError, match="row 7 "):
                bad.array()
        good = bad.restrict(np.setdiff1d(np.arange(len(x)), [7, 400]))
        assert np.isfinite(good.prepared("l2").array()).all()


def test_digest_tells_of_any_change(tmp_path):
    x = open_embeddings(write_set(tmp_path, "npy"))
    digests = [
        x.digest(),
        x.restrict(np.arange(9)).digest(),
        x.prepared("l2").digest(),
        x.prepared(center=True).digest(),
        as_embeddings(vectors()).digest(),
        as_embeddings(vectors("float16")).digest(),
    ]
    assert len(set(digests)) == len(digests)
    assert open_embeddings(str(tmp_path)).digest() == digests[0]
    file = tmp_path / "emb-00002.npy"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")  # of the same size
    assert open_embeddings(str(tmp_path)).digest() != digests[0]
    (tmp_path / "again").mkdir()
    again = open_embeddings(write_set(tmp_path / "again", "npy"))
    meta = tmp_path / "again" / "meta-00000.parquet"
    assert again.digest() == digests[0]
    pq.write_table(pq.read_table(meta).set_column(1, "label", pa.array([9] * 300)), meta)
    assert again.digest() != digests[0]
    with pytest.raises(ValueError, match="emb-00002.npy has sha256 .* index"):
        open_embeddings(str(tmp_path), verify=True)


@pytest.mark.parametrize("kind", ["parquet", "npy"])
def test_changed_files_are_refused(tmp_path, kind):
    directory = write_set(tmp_path, kind)
    table = pa.table({"id": ["a"], "label": [0]})
    EmbeddingWriter(directory, DIM, "float32", kind).write(0, vectors()[:1], table)
    with pytest.raises(ValueError, match="emb-00000.* has rows 1 and manifest.json says 300"):
        open_embeddings(directory)
    (tmp_path / f"emb-00000.{kind}").unlink()
    with pytest.raises(ValueError, match=f"emb-00000.{kind}: No such file"):
        open_embeddings(directory)


def test_a_file_cut_short_is_refused(tmp_path):
    directory = write_set(tmp_path, "npy")
    file = tmp_path / "emb-00000.npy"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match="not written to its end"):
        open_embeddings(directory)


def test_sets_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        open_embeddings(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="has no manifest.json.*index"):
        open_embeddings(str(tmp_path))
    with pytest.raises(ValueError, match="neither"):
        index(str(tmp_path))
    np.save(tmp_path / "emb-0.npy", np.zeros((3, 4), np.int32))
    with pytest.raises(ValueError, match="int32.*expected float16 or float32"):
        index(str(tmp_path))
    np.save(tmp_path / "emb-0.npy", np.ones((3, 4), np.float32))
    np.save(tmp_path / "emb-1.npy", np.ones((3, 5), np.float32))
    with pytest.raises(ValueError, match=r"float32 \[5\] and .*float32 \[4\]"):
        index(str(tmp_path))
    (tmp_path / "emb-1.npy").unlink()
    pq.write_table(pa.table({"id": [1, 2]}), tmp_path / "meta-0.parquet")
    with pytest.raises(ValueError, match="meta-0.parquet has 2 rows and .* has 3"):
        index(str(tmp_path))
    pq.write_table(pa.table({"ids": [1, 2, 3]}), tmp_path / "meta-0.parquet")
    with pytest.raises(ValueError, match="no column 'id'; did you mean 'ids'"):
        index(str(tmp_path))
    pq.write_table(pa.table({"id": [1, 2, 3]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="both"):
        index(str(tmp_path))
    (tmp_path / "emb-0.npy").unlink()
    with pytest.raises(ValueError, match="other.parquet has no column 'embedding'"):
        index(str(tmp_path))
    for wrong in (np.ones(3), np.ones((3, 2), int), np.ones((0, 2))):
        with pytest.raises((ValueError, TypeError)):
            as_embeddings(wrong)


def test_duplicate_ids(tmp_path):
    ids = [f"img-{row}" for row in range(sum(SIZES))]
    ids[350] = ids[3]
    with pytest.raises(ValueError, match="1 ids occur .*'img-3' in rows 3 and 350"):
        write_set(tmp_path, "parquet", ids=ids)
    ids[350] = None
    with pytest.raises(ValueError, match="row 350 has no id"):
        write_set(tmp_path / "npy", "npy", ids=ids)


def test_index_of_a_folder_made_by_others(tmp_path):
    x = vectors() / np.linalg.norm(vectors(), axis=1, keepdims=True)
    np.save(tmp_path / "emb-00000.npy", x[:300])
    np.save(tmp_path / "emb-00001.npy", x[300:])
    manifest = index(str(tmp_path), about={"source": "folder:pictures"})
    assert manifest == json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["normalized"], manifest["n_total"], manifest["source"]) == (
        True, 471, "folder:pictures",
    )  # fmt: skip
    read = open_embeddings(str(tmp_path), verify=True)
    np.testing.assert_array_equal(read.array(), x)
    assert read.ids(np.array([300])).to_pylist() == [300]


def test_urls(tmp_path):
    import fsspec

    write_set("memory://curation/set", "npy")
    read = open_embeddings("memory://curation/set", verify=True)
    np.testing.assert_array_equal(read.array(), vectors())
    assert read.ids(np.array([300])).to_pylist() == ["img-300"]
    write_set("memory://curation/tables", "parquet")
    np.testing.assert_array_equal(open_embeddings("memory://curation/tables").array(), vectors())
    fsspec.filesystem("memory").rm("/curation", recursive=True)


def test_writer_goes_on_where_it_was(tmp_path):
    writer = EmbeddingWriter(str(tmp_path), DIM)
    table = pa.table({"id": [0, 1]})
    writer.write(0, vectors()[:2], table)
    assert writer.done(0) and not writer.done(1)
    with pytest.raises(ValueError, match="emb-00001.parquet is missing"):
        writer.finish(2)
    writer.write(1, vectors()[2:4], pa.table({"id": [2, 3]}))
    with pytest.raises(ValueError, match="emb-00001.parquet is left over"):
        writer.finish(1)
    assert writer.finish(2)["n_total"] == 4
    with pytest.raises(ValueError, match="shard 2 has vectors .2, 6. and 1 ids"):
        writer.write(2, vectors()[:2], pa.table({"id": [9]}))
    with pytest.raises(ValueError, match="row 1 of shard 2 .* beyond float16 .1e.05."):
        writer.write(2, np.array([[1] * DIM, [1e5] * DIM], np.float32), table)
    with pytest.raises(ValueError, match="format is 'csv'"):
        EmbeddingWriter(str(tmp_path), DIM, format="csv")


def test_blocks_left_early_leave_no_thread(tmp_path):
    read = open_embeddings(write_set(tmp_path, "npy"))
    for _ in read.blocks(10):
        break
    assert not any(thread.name.startswith("embeddings") for thread in threading.enumerate())


@pytest.mark.parametrize("kind", ["parquet", "npy"])
def test_memory_is_that_of_blocks(tmp_path, kind):
    """Peak of a pass over 32 MB in blocks of 0.5 MB: four blocks, and what arrow decodes."""
    writer = EmbeddingWriter(str(tmp_path), 64, "float32", kind)
    for number in range(8):
        ids = np.arange(16_384) + number * 16_384
        writer.write(number, np.ones((len(ids), 64), np.float32), pa.table({"id": ids}))
    writer.finish(8)
    read, arrow = open_embeddings(writer.directory), 0
    tracemalloc.start()
    for _ in read.blocks(2048):
        arrow = max(arrow, pa.total_allocated_bytes())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20 and arrow < 10 << 20
