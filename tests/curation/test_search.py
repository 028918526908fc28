"""Nearest neighbours against float64, in every arrangement of blocks, tiles and devices."""

import jax
import numpy as np
import pytest

from data_curation import search, topk
from data_curation.embeddings import as_embeddings
from data_curation.files import Stopped
from data_curation.search import knn
from dinojax import sharding


def points(n: int, d: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def reference(x: np.ndarray, y: np.ndarray | None, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorts all cosines in float64; equal ones by row."""
    wide = [a.astype(np.float64) for a in (x, x if y is None else y)]
    a, b = (a / np.linalg.norm(a, axis=1)[:, None] for a in wide)
    sims = a @ b.T
    if y is None:
        np.fill_diagonal(sims, -np.inf)
    ids = np.argsort(-sims, axis=1, kind="stable")[:, :k]
    return ids, np.take_along_axis(sims, ids, axis=1)


def check(found, expected) -> None:
    (ids, sims), (right, cosines) = found, expected
    np.testing.assert_allclose(sims, cosines, atol=2e-7)
    wrong = ids != right  # only where rounding makes a tie
    assert np.abs(sims - cosines)[wrong].max(initial=0) < 2e-7 and wrong.mean() < 1e-3


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks of the bank and runs of queries, as in large sets."""
    monkeypatch.setattr(search, "block_rows", lambda n: 256)
    monkeypatch.setattr(search, "_RUN_ROWS", 200)


@pytest.mark.parametrize("k", [1, 5, 64])
def test_exact(k, small_blocks):
    x, y = points(500), points(1100, seed=1)
    check(knn(x, y, k), reference(x, y, k))
    check(knn(y, None, k), reference(y, None, k))


def test_streamed_is_resident(small_blocks, monkeypatch):
    x = points(700)
    held = knn(x, None, 5)
    monkeypatch.setattr(search, "RESIDENT_BYTES", 1000)
    for a, b in zip(knn(x, None, 5), held):
        np.testing.assert_array_equal(a, b)


def test_equal_rows_go_to_the_lower(small_blocks):
    x = np.tile(points(4), (200, 1))  # 800 rows, four distinct
    ids, sims = knn(x, None, 5)
    expected = [[j for j in range(i % 4, 24, 4) if j != i][:5] for i in range(len(x))]
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_allclose(sims, 1, atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_split_over_devices(shape, small_blocks):
    x = points(333)  # no multiple of anything
    mesh = sharding.make_mesh(*shape)
    found, single = knn(x, None, 5, mesh=mesh), knn(x, None, 5)
    np.testing.assert_array_equal(found[0], single[0])
    np.testing.assert_allclose(found[1], single[1], atol=1e-7)
    # Queries stay where they are: nothing is exchanged.
    queries = topk.Queries.place(x, np.arange(333, dtype=np.int32), 64, mesh)
    block, ids = search.pad_block(x[:256], np.arange(256), 256, mesh)
    program = topk.merge.lower(
        queries.start(5, -np.inf, mesh), *queries, block, ids, mesh
    ).compile()
    text = program.as_text()
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute"))


def test_floor_is_strict_and_misses_are_marked(small_blocks):
    x = points(600)
    ids, sims = knn(x, None, 20, floor=0.5)
    right, cosines = reference(x, None, 20)
    above = cosines > 0.5
    np.testing.assert_array_equal(ids, np.where(above, right, -1))
    assert (sims[~above] == -np.inf).all() and 0.05 < above.mean() < 0.95
    same = np.eye(3, dtype=np.float32)[[0, 0, 1]]  # cosines are exactly 1 and 0
    np.testing.assert_array_equal(knn(same, None, 2, floor=0.0)[0], [[1, -1], [0, -1], [-1, -1]])
    few, _ = knn(points(3), None, 5)
    assert (few[:, 2:] == -1).all() and (few[:, :2] >= 0).all()


def test_ids_are_rows_of_the_full_set(small_blocks):
    y = points(600)
    rows = np.arange(1, 600, 3)
    x = as_embeddings(y).restrict(rows)
    right, cosines = reference(y[rows], None, 4)
    check(knn(x, None, 4), (rows[right], cosines))
    right, cosines = reference(points(5, seed=9), y[rows], 4)
    check(knn(points(5, seed=9), x, 4), (rows[right], cosines))


def test_what_is_refused():
    x = points(10)
    for wrong, why in (
        (dict(k=0), "k is 0"),
        (dict(index="exakt"), "did you mean 'exact'"),
        (dict(y=points(5, 3)), "16 numbers and memory of 3"),
    ):
        with pytest.raises(ValueError, match=why):
            knn(x, **wrong)
    with pytest.raises(ValueError, match="row 0 .*is zero"):
        knn(np.zeros((3, 4), np.float32))
    with pytest.raises(Stopped):
        knn(x, stop=lambda: True)


def test_group_size_divides():
    for m in (256, 4096, 8192):
        for k in (1, 5, 64, 300):
            size = topk.group_size(m, k)
            assert m % size == 0 and size >= 1
    assert topk.group_size(8192, 64) == 16


# ---- inverted lists ------------------------------------------------------------------------------


def clustered(n: int = 1500, d: int = 16) -> np.ndarray:
    """Points around 30 centres, every tenth followed by a near copy."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(30, d))[rng.integers(0, 30, n)] + 0.5 * rng.normal(size=(n, d))
    x[1::10] = x[::10] + 0.02 * rng.normal(size=(n // 10, d))
    return x.astype(np.float32)


LISTS = dict(index="ivf", nlist=20)


def test_lists_looked_into_all_are_exact():
    x = clustered()
    check(knn(x, None, 5, nprobe=20, **LISTS), reference(x, None, 5))
    check(knn(x[:90], x, 5, nprobe=20, **LISTS), reference(x[:90], x, 5))


def test_lists_find_planted_pairs_and_measure_their_recall(monkeypatch):
    from data_curation import ivf

    monkeypatch.setattr(ivf, "_RUN_ROWS", 400)
    x = clustered()
    opened = search.Search.open(x, None, 8, nprobe=4, **LISTS)
    assert len(opened.runs) > 2 and 0.95 <= opened.recall <= 1
    ids, sims = knn(x, None, 8, nprobe=4, **LISTS)
    right, _ = reference(x, None, 8)
    assert np.mean([len(set(a) & set(b)) / 8 for a, b in zip(ids, right)]) > 0.95
    assert (ids[1::10, 0] == np.arange(0, len(x), 10)).mean() > 0.99
    assert (ids != np.arange(len(x))[:, None]).all()  # never itself
    again = knn(x, None, 8, nprobe=4, **LISTS)
    np.testing.assert_array_equal(ids, again[0])
    np.testing.assert_array_equal(sims, again[1])


def test_too_low_a_recall_is_refused():
    x = points(1500, 32)  # no structure: neighbours are in any list
    with pytest.raises(ValueError, match="less than min_recall = 0.95; raise nprobe above 1"):
        knn(x, None, 10, nprobe=1, **LISTS)
    assert (knn(x, None, 10, nprobe=1, min_recall=0.0, **LISTS)[0] >= 0).any()
    with pytest.raises(ValueError, match="nlist is 1501"):
        knn(x, None, 10, index="ivf", nlist=1501)


def test_a_bank_beyond_memory_is_sorted_in_a_file(tmp_path, monkeypatch):
    x = clustered()
    held = knn(x, None, 5, nprobe=4, min_recall=0.0, **LISTS)
    monkeypatch.setattr(search, "RESIDENT_BYTES", 1000)
    with pytest.raises(ValueError, match="name a folder"):
        knn(x, None, 5, nprobe=4, min_recall=0.0, **LISTS)
    found = knn(x, None, 5, nprobe=4, min_recall=0.0, scratch=tmp_path / "new", **LISTS)
    np.testing.assert_array_equal(found[0], held[0])
    assert not list((tmp_path / "new").iterdir())


def test_one_program_whatever_the_block(small_blocks):
    jax.clear_caches()
    knn(points(1100), None, 5)
    assert topk.merge._cache_size() == 1
