"""Deduplication: planted groups go, rules of what stays, restarts, reference sets."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_curation import search
from data_curation.dedup import relative_dedup, self_dedup
from data_curation.embeddings import EmbeddingWriter, as_embeddings, open_embeddings
from data_curation.files import Stopped
from data_curation.search import knn

DIM = 16


def groups(sizes, seed: int = 0, noise: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """Shuffled rows in tight groups of these sizes, far from one another; and their group."""
    rng = np.random.default_rng(seed)
    centres = np.linalg.qr(rng.normal(size=(DIM, DIM)))[0]  # orthogonal: cosines near 0
    which = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    x = centres[which] + noise / 4 * rng.normal(size=(len(which), DIM))
    return (x * rng.uniform(0.5, 2, (len(x), 1))).astype(np.float32), which


def first_of(which: np.ndarray) -> np.ndarray:
    return np.array([np.flatnonzero(which == group)[0] for group in which])


SIZES = (1, 1, 2, 3, 7, 30)


def test_groups_are_components_and_the_first_stays():
    x, which = groups(SIZES)
    found = self_dedup(x, k=4)
    np.testing.assert_array_equal(found.component, first_of(which))
    np.testing.assert_array_equal(found.kept, np.unique(first_of(which)))
    assert (found.edges.rows[:, 0] < found.edges.rows[:, 1]).all()
    assert len(np.unique(found.edges.rows, axis=0)) == len(found.edges.rows)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosines = np.einsum("ed,ed->e", *unit[found.edges.rows].transpose(1, 0, 2))
    np.testing.assert_allclose(found.edges.sims, cosines, atol=1e-6)
    gone = found.removed
    rows, by = gone["row"].to_numpy(), gone["representative"].to_numpy()
    np.testing.assert_array_equal(np.sort(np.append(rows, found.kept)), np.arange(len(x)))
    np.testing.assert_array_equal(by, first_of(which)[rows])
    np.testing.assert_allclose(gone["sim"].to_numpy(), (unit[rows] * unit[by]).sum(1), atol=1e-6)


def test_report():
    x, which = groups(SIZES)
    report = self_dedup(x, k=40, max_component=20).report
    assert report["component_sizes"] == {1: 2, 2: 1, 3: 1, 7: 1, 30: 1}
    assert (report["rows"], report["kept"], report["removed"]) == (44, 6, 38)
    assert report["edges"] == 1 + 3 + 21 + 435 == report["similarities"].sum()
    assert [entry["size"] for entry in report["largest"]] == [30, 7, 3, 2]
    assert report["largest"][0]["ids"] == np.flatnonzero(which == 5)[:16].tolist()
    assert "30 rows, more than max_component = 20" in report["warnings"][0]
    assert self_dedup(x, k=4).report["warnings"] == []


def test_chains_are_seen_by_the_diameter_check():
    angles = np.arange(8) * np.pi / 8  # neighbours have a cosine of 0.92, the ends of -0.92
    x = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    found = self_dedup(x, threshold=0.9)
    assert found.kept.tolist() == [0]
    # 0.9239 to the first, 0.7071 to the second, ...: six of seven are below.
    assert found.report["representatives"]["below_threshold"] == 6
    assert found.report["representatives"]["lowest"] == pytest.approx(np.cos(7 * np.pi / 8))


def test_medoid_is_the_nearest_to_its_component(monkeypatch):
    from data_curation import dedup

    x, which = groups(SIZES, noise=0.25)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    for batch in (65_536, 5):  # several components at a time, or one
        monkeypatch.setattr(dedup, "BATCH_ROWS", batch)
        found = self_dedup(x, k=40, threshold=0.45, keep="medoid")
        np.testing.assert_array_equal(found.component, first_of(which))
        for group in range(len(SIZES)):
            members = np.flatnonzero(which == group)
            best = members[np.argmax((unit[members] @ unit[members].T).sum(1))]
            assert np.isin(best, found.kept) or len(members) == 2
            assert np.isin(members, found.kept).sum() == 1
    twins = np.tile(x[:1], (3, 1))
    assert self_dedup(twins, keep="medoid").kept.tolist() == [0]


def write(directory, x: np.ndarray, **columns) -> str:
    writer = EmbeddingWriter(str(directory), DIM, "float32")
    writer.write(0, x, pa.table({"id": [f"r{i}" for i in range(len(x))], **columns}))
    writer.finish(1)
    return str(directory)


def test_priority_by_columns(tmp_path):
    x, which = groups((4, 3, 1))
    width = np.array([1, 5, 2, 5, 3, None, 5, 5], object)
    name = list("hgfedcba")
    data = open_embeddings(write(tmp_path, x, width=pa.array(width, pa.int64()), name=name))
    found = self_dedup(
        data, keep="priority", priority=[("width", "descending"), ("name", "ascending")]
    )
    key = [(-(w or 0), n) for w, n in zip(width, name)]
    best = [min(np.flatnonzero(which == g), key=lambda i: key[i]) for g in range(3)]
    assert found.kept.tolist() == sorted(best)
    assert self_dedup(data, keep="priority", priority=[("width", "descending")]).kept.tolist() == [
        *sorted(min(np.flatnonzero(which == g), key=lambda i: (key[i][0], i)) for g in range(3))
    ]
    with pytest.raises(ValueError, match="no column 'with'; did you mean 'width'"):
        self_dedup(data, keep="priority", priority=[("with", "descending")])
    with pytest.raises(ValueError, match="'down', expected ascending or descending"):
        self_dedup(data, keep="priority", priority=[("width", "down")])
    for arguments in (dict(keep="priority"), dict(priority=[("width", "ascending")])):
        with pytest.raises(ValueError, match="columns are needed for keep='priority'"):
            self_dedup(data, **arguments)


def test_a_subset_is_told_of_in_rows_of_the_full_set():
    x, which = groups(SIZES)
    rows = np.flatnonzero(np.arange(len(x)) % 3 > 0)
    found = self_dedup(as_embeddings(x).restrict(rows), k=4)
    np.testing.assert_array_equal(found.kept, rows[np.unique(first_of(which[rows]))])
    np.testing.assert_array_equal(found.component[rows], rows[first_of(which[rows])])
    assert (np.delete(found.component, rows) == -1).all()
    assert np.isin(found.edges.rows, rows).all()
    assert np.isin(found.removed["row"].to_numpy(), rows).all()


def test_killed_and_resumed(tmp_path, monkeypatch):
    x, _ = groups((40,) * 10)
    monkeypatch.setattr(search, "_RUN_ROWS", 100)
    whole = self_dedup(x, k=4, directory=tmp_path / "whole")
    held = self_dedup(x, k=4)
    np.testing.assert_array_equal(whole.component, held.component)
    assert whole.edges is None and whole.report["edges"] >= held.report["edges"]
    asked = []
    with pytest.raises(Stopped):
        self_dedup(
            x, k=4, directory=tmp_path / "again", stop=lambda: asked.append(1) or len(asked) > 2
        )
    done = sorted((tmp_path / "again" / "edges").glob("*.parquet"))
    assert len(done) == 2 and not (tmp_path / "again" / "kept.npy").exists()
    times = [file.stat().st_mtime_ns for file in done]
    self_dedup(x, k=4, directory=tmp_path / "again")
    assert [file.stat().st_mtime_ns for file in done] == times  # not made anew
    for file in sorted((tmp_path / "whole").rglob("*.*")):
        other = tmp_path / "again" / file.relative_to(tmp_path / "whole")
        assert file.read_bytes() == other.read_bytes(), file.name
    edges = pa.concat_tables(map(pq.read_table, sorted(tmp_path.glob("whole/edges/*.parquet"))))
    pairs = np.stack([edges["i"].to_numpy(), edges["j"].to_numpy()], axis=1)
    np.testing.assert_array_equal(np.unique(pairs, axis=0), held.edges.rows)
    np.testing.assert_array_equal(np.load(tmp_path / "whole" / "kept.npy"), held.kept)
    assert json.loads((tmp_path / "whole" / "report.json").read_text())["kept"] == len(held.kept)
    for changed, why in ((dict(k=5), "k = 4, not of 5"), (dict(threshold=0.7), "threshold = 0.6")):
        with pytest.raises(ValueError, match=why):
            self_dedup(x, **{"k": 4, **changed}, directory=tmp_path / "again")
    x[0, 0] += 1
    with pytest.raises(ValueError, match="edges of digest"):
        self_dedup(x, k=4, directory=tmp_path / "again")


def test_processes_share_the_work(tmp_path, monkeypatch):
    x, _ = groups((40,) * 10)
    monkeypatch.setattr(search, "_RUN_ROWS", 100)
    seen = []

    def other():  # where the first waits, the second does its share
        seen.append(len(list(tmp_path.glob("edges/*.parquet"))))
        second = self_dedup(x, k=4, directory=tmp_path, part=(1, 2))
        seen.append(len(list(tmp_path.glob("edges/*.parquet"))))
        assert not (tmp_path / "kept.npy").exists()  # the first one's
        others.append(second)

    others = []
    with pytest.raises(ValueError, match="need a folder"):
        self_dedup(x, part=(0, 2))
    first = self_dedup(x, k=4, directory=tmp_path, part=(0, 2), barrier=other)
    alone = self_dedup(x, k=4)
    assert seen[0] == 2 and (tmp_path / "kept.npy").exists()
    for found in (first, *others):
        np.testing.assert_array_equal(found.component, alone.component)


def test_what_is_refused():
    x, _ = groups(SIZES)
    with pytest.raises(ValueError, match="threshold is 1.5"):
        self_dedup(x, threshold=1.5)
    with pytest.raises(ValueError, match="did you mean 'medoid'"):
        self_dedup(x, keep="medoids")
    with pytest.raises(ValueError, match="row 0 .* is zero"):
        self_dedup(np.zeros((3, DIM), np.float32))


# ---- reference sets ------------------------------------------------------------------------------


def test_whole_components_go_or_only_what_is_near():
    angles = np.arange(8) * np.pi / 8
    ring = np.stack([np.cos(angles), np.sin(angles), 0 * angles], axis=1).astype(np.float32)
    x = np.concatenate([ring, [[0, 0, 1]]]).astype(np.float32)  # a chain, and a row apart
    leak = ring[3:4] * 2
    whole = relative_dedup(x, leak, threshold=0.9)
    assert whole.kept.tolist() == [8]
    assert whole.component.tolist() == [0] * 8 + [8, 0]
    near = relative_dedup(x, {"eval": leak}, threshold=0.9, mode="direct")
    assert near.kept.tolist() == [0, 1, 5, 6, 7, 8] and near.component is None
    gone = near.removed.to_pydict()
    assert gone["row"] == [2, 3, 4] and gone["reference"] == ["eval"] * 3
    np.testing.assert_allclose(gone["sim"], [np.cos(np.pi / 8), 1, np.cos(np.pi / 8)], atol=1e-6)


def test_each_reference_set_is_counted():
    x, which = groups((5, 6, 7, 8))
    refs = {
        "val": as_embeddings(x).restrict(np.flatnonzero(which == 1)[:2]),
        "test": x[which == 3][:1],
    }
    found = relative_dedup(x, refs)
    np.testing.assert_array_equal(found.kept, np.flatnonzero((which == 0) | (which == 2)))
    counts = found.report["references"]
    assert counts["val"] == {"rows": 2, "removed_direct": 6, "removed": 6, "largest_component": 8}
    assert counts["test"] == {"rows": 1, "removed_direct": 8, "removed": 8, "largest_component": 9}
    gone = found.removed.to_pydict()
    assert set(zip(which[gone["row"]], gone["reference"])) == {(1, "val"), (3, "test")}
    val = np.flatnonzero(which == 1)[:2]
    for row, name, by in zip(gone["row"], gone["reference"], gone["reference_row"]):
        assert by == 0 if name == "test" else by in val
        if name == "val" and row in val:
            assert by == row


@pytest.mark.parametrize("mode", ["component", "direct"])
def test_nothing_stays_above_the_threshold(mode):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 4)).astype(np.float32)  # dense: far more than k are near
    ref = rng.normal(size=(3, 4)).astype(np.float32)
    found = relative_dedup(x, ref, k=1, threshold=0.95, mode=mode)
    sims = knn(x, ref, 1)[1][:, 0]
    assert (sims[found.kept] <= 0.95).all() and len(found.kept) < 400
    if mode == "direct":
        np.testing.assert_array_equal(found.kept, np.flatnonzero(sims <= 0.95))


def test_relative_results_are_written_and_resumed(tmp_path):
    x, which = groups((5, 6, 7, 8))
    before = relative_dedup(x, x[which == 1], directory=tmp_path)
    files = {f: f.read_bytes() for f in tmp_path.rglob("*.*")}
    assert {f.name for f in files} >= {"kept.npy", "removed.parquet", "report.json"}
    after = relative_dedup(x, x[which == 1], directory=tmp_path)
    np.testing.assert_array_equal(after.kept, before.kept)
    assert files == {f: f.read_bytes() for f in tmp_path.rglob("*.*")}


def test_references_that_cannot_be_compared(tmp_path):
    x, _ = groups(SIZES)
    with pytest.raises(ValueError, match="memory has vectors of 16 numbers and memory of 3"):
        relative_dedup(x, x[:, :3])
    with pytest.raises(ValueError, match="at least one reference"):
        relative_dedup(x, {})
    with pytest.raises(ValueError, match="did you mean 'direct'"):
        relative_dedup(x, x, mode="directly")
    sets = []
    for name in ("a", "b"):
        writer = EmbeddingWriter(str(tmp_path / name), DIM, "float32", embedder={"name": name})
        writer.write(0, x, pa.table({"id": range(len(x))}))
        writer.finish(1)
        sets.append(open_embeddings(str(tmp_path / name)))
    with pytest.raises(ValueError, match="embedded by .*'a'.* and .*'b'.*mean nothing"):
        relative_dedup(*sets)
