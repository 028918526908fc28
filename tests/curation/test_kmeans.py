"""Lloyd's iterations against float64 numpy, on any mesh, from memory or disk, stopped or not."""

import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_curation import device_rows, lloyd
from data_curation.embeddings import as_embeddings, open_embeddings
from data_curation.files import Stopped
from data_curation.kmeans import assign, kmeans, split_largest
from dinojax.sharding import make_mesh

N, DIM, K = 1003, 16, 20


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(30, DIM)) * 3
    return (centres[rng.integers(30, size=N)] + rng.normal(size=(N, DIM))).astype(np.float32)


@pytest.fixture(scope="module")
def init(x) -> np.ndarray:
    return x[np.random.default_rng(1).choice(N, K, replace=False)]


@pytest.fixture(scope="module")
def one() -> jax.sharding.Mesh:
    return make_mesh(devices=jax.devices()[:1])


def distances64(x: np.ndarray, c: np.ndarray) -> np.ndarray:
    x, c = x.astype(np.float64), c.astype(np.float64)
    return np.square(x[:, None] - c[None]).sum(axis=2)


def lloyd64(x: np.ndarray, c: np.ndarray, iterations: int, unit: bool = False) -> np.ndarray:
    """Centroids after some iterations in float64; empty ones stay."""
    c = c.astype(np.float64)
    for _ in range(iterations):
        nearest = distances64(x, c).argmin(axis=1)
        for j in set(nearest.tolist()):
            c[j] = x[nearest == j].astype(np.float64).mean(axis=0)
        if unit:
            c /= np.linalg.norm(c, axis=1, keepdims=True)
    return c


def same_result(one, other) -> None:
    for name in ("centroids", "assignment", "distance"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert (one.inertia, one.potential) == (other.inertia, other.potential)


def test_iterations_equal_float64(x, init, one):
    found = kmeans(x, K, init=init, n_iters=5, mesh=one)
    expected = lloyd64(x, init, 5)
    np.testing.assert_allclose(found.centroids, expected, rtol=1e-5, atol=1e-5)
    away = distances64(x, expected)
    np.testing.assert_array_equal(found.assignment, away.argmin(axis=1))
    np.testing.assert_allclose(found.distance, away.min(axis=1), rtol=1e-4)
    assert found.inertia == pytest.approx(away.min(axis=1).sum(), rel=1e-6)
    after = distances64(x, lloyd64(x, init, 6))[np.arange(N), found.assignment].sum()
    assert found.potential == pytest.approx(after, rel=1e-6)
    inertia = [line["inertia"] for line in found.history]
    assert len(inertia) == 5 and sorted(inertia, reverse=True) == inertia


@pytest.mark.parametrize("data, fsdp, tensor", [(2, 1, 1), (8, 1, 1), (2, 1, 4), (1, 4, 2)])
def test_any_mesh_gives_the_same(x, init, one, data, fsdp, tensor):
    devices = jax.devices()[: data * fsdp * tensor]
    mesh = make_mesh(data, fsdp, tensor, devices=devices)
    alone = kmeans(x, K, init=init, n_iters=4, mesh=one)
    found = kmeans(x, K, init=init, n_iters=4, mesh=mesh)
    np.testing.assert_array_equal(found.assignment, alone.assignment)
    np.testing.assert_allclose(found.centroids, alone.centroids, rtol=1e-5, atol=1e-6)
    assert found.inertia == pytest.approx(alone.inertia, rel=1e-6)


@pytest.fixture(scope="module")
def folder(x, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("set") / "x.npy"
    np.save(path, x)
    return path


@pytest.mark.parametrize("resident", [True, False])
def test_from_disk_in_chunks_gives_the_same(x, init, one, folder, monkeypatch, resident):
    """Four chunks, the last a part, kept on the devices or read again: bit for bit one chunk's."""
    whole = kmeans(x, K, init=init, n_iters=3, mesh=one)
    monkeypatch.setattr(device_rows, "_CHUNK_ROWS", 256)
    monkeypatch.setattr(device_rows, "_HOST_RESIDENT", 1 << 30 if resident else 0)
    rows = device_rows.device_rows(as_embeddings(x), one)
    assert (rows.chunk_count, rows.shard_rows, rows.resident) == (4, 256, resident)
    found = kmeans(open_embeddings(str(folder)), K, init=init, n_iters=3, mesh=one)
    same_result(found, whole)


def test_float16_is_widened_first(x, init, one):
    half = x.astype(np.float16)
    widened = kmeans(half.astype(np.float32), K, init=init, n_iters=2, mesh=one)
    same_result(kmeans(half, K, init=init, n_iters=2, mesh=one), widened)
    same_result(kmeans(jnp.asarray(half), K, init=init, n_iters=2, mesh=one), widened)


def test_rows_of_a_subset(x, init, one):
    some = np.arange(0, N, 3)
    subset = kmeans(as_embeddings(x).restrict(some), K, init=init, n_iters=2, mesh=one)
    same_result(subset, kmeans(x[some], K, init=init, n_iters=2, mesh=one))


def test_far_from_the_origin_equals_float64(one):
    """Rows around 1000 with a spread of 0.01: without a shift, errors of 0.1 and more."""
    rng = np.random.default_rng(2)
    x = (1000 + 0.01 * rng.normal(size=(N, DIM))).astype(np.float32)
    centroids = x[:K]
    ids, distance = assign(x, centroids, mesh=one)
    away = distances64(x, centroids)
    np.testing.assert_array_equal(ids, away.argmin(axis=1))
    np.testing.assert_allclose(distance, away.min(axis=1), rtol=1e-5, atol=1e-12)


def test_equal_distances_go_to_the_lowest_centroid(x, init, one, monkeypatch):
    """Within a group of the two-stage argmin, across groups, tiles and devices."""
    many = np.concatenate([init, init, init, init, init])  # 100 centroids, each five times
    expected = distances64(x, init).argmin(axis=1)
    np.testing.assert_array_equal(assign(x, many, mesh=one)[0], expected)
    split = make_mesh(2, 1, 4, devices=jax.devices())
    np.testing.assert_array_equal(assign(x, many, mesh=split)[0], expected)
    monkeypatch.setattr(lloyd, "_TILE", 32)  # four tiles
    assert lloyd.place_centroids(device_rows.device_rows(as_embeddings(x), one), many, "l2")[
        0
    ].shape == (4, 32, DIM)
    np.testing.assert_array_equal(assign(x, many, mesh=one)[0], expected)


def test_spherical(x, init, one):
    found = kmeans(x, K, init=init, n_iters=3, metric="spherical", mesh=one)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    start = init / np.linalg.norm(init, axis=1, keepdims=True)
    expected = lloyd64(unit, start, 3, unit=True)
    np.testing.assert_allclose(found.centroids, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found.assignment, (unit @ expected.T).argmax(axis=1))
    longer = x * np.linspace(1, 5, N, dtype=np.float32)[:, None]  # lengths do not matter
    again = kmeans(longer, K, init=init, n_iters=3, metric="spherical", mesh=one)
    np.testing.assert_array_equal(again.assignment, found.assignment)


def test_bfloat16_products_refined(x, init, one):
    """The nearest is among the best four of the coarse product, and the distances are float32."""
    ids, distance = assign(x, init, mesh=one)
    fine, refined = assign(x, init, mesh=one, precision="bf16_refine")
    np.testing.assert_array_equal(fine, ids)
    np.testing.assert_array_equal(refined, distance)


def test_converges_and_stops(x, one):
    found = kmeans(x, 5, seed=3, mesh=one)
    assert found.history[-1]["done"] and len(found.history) < 50
    more = kmeans(x, 5, seed=3, mesh=one, stop_on_converged=False)
    same_result(found, more)
    assert len(more.history) == 50
    early = kmeans(x, 5, seed=3, mesh=one, tol=0.05)
    assert len(early.history) < len(found.history)


def test_restarts_keep_the_lowest_potential(x, one):
    how = {"init": "random", "n_iters": 2, "mesh": one}
    lower = 0
    for seed in range(5):
        first = kmeans(x, 5, seed=seed, **how)
        several = kmeans(x, 5, seed=seed, num_init=4, **how)
        assert several.potential <= first.potential
        lower += several.potential < first.potential
        seeds = several.seeds
        np.testing.assert_array_equal(seeds, np.unique(seeds))
    assert lower


@pytest.fixture(scope="module")
def with_empty(init) -> np.ndarray:
    """The last two of 20 centroids are far from all rows."""
    return np.concatenate([init[:-2], np.full((2, DIM), 50, np.float32)])


def test_an_empty_cluster_keeps_its_centroid(x, with_empty, one):
    found = kmeans(x, K, init=with_empty, n_iters=3, mesh=one)
    np.testing.assert_array_equal(found.centroids[-2:], with_empty[-2:])
    assert [line["empty"] for line in found.history] == [2, 2, 2]


def test_empty_clusters_are_dropped(x, with_empty, one):
    gap = with_empty[[0, 18, *range(1, 18), 19]]  # the second and the last are empty
    found = kmeans(x, K, init=gap, n_iters=3, empty="drop", mesh=one)
    kept = kmeans(x, K, init=with_empty, n_iters=3, mesh=one)
    assert found.dropped == 2
    np.testing.assert_array_equal(found.centroids, kept.centroids[:-2])
    np.testing.assert_array_equal(found.assignment, kept.assignment)


def test_empty_clusters_take_half_of_another(x, with_empty, one):
    kept = kmeans(x, K, init=with_empty, n_iters=10, mesh=one)
    found = kmeans(x, K, init=with_empty, n_iters=10, empty="split", mesh=one)
    assert found.history[0]["split"] == 2 and not found.history[0]["done"]
    assert len(set(found.assignment.tolist())) == K
    assert found.inertia < kept.inertia
    assert np.isfinite(found.centroids).all()


def test_how_a_cluster_is_split():
    means = np.arange(6.0).reshape(3, 2)
    assert split_largest(means, np.array([5, 0, 1]), 0.25, (0,)) == 1
    np.testing.assert_array_equal(means, [[-0.25, 1.25], [0.25, 0.75], [4, 5]])
    assert split_largest(np.zeros((3, 2)), np.array([1, 0, 1]), 0.25, (0,)) == 0
    taken = np.array([90, 10, 0, 0, 0])
    donors = [np.zeros((5, 1)) + np.arange(5.0)[:, None] for _ in range(50)]
    for number, means in enumerate(donors):
        split_largest(means, taken, 0.25, (number,))
    from_first = np.mean([(np.abs(means[2:, 0] - 0) < 0.8).mean() for means in donors])
    assert 0.8 < from_first < 1  # in proportion to size: 89 of 98 for the first of them


@pytest.mark.parametrize("empty", ["keep", "split", "drop"])
def test_few_and_equal_rows(one, empty):
    """Never more clusters than distinct rows, never a NaN."""
    distinct = np.random.default_rng(4).normal(size=(5, DIM)).astype(np.float32)
    repeated = np.repeat(distinct, 30, axis=0)
    found = kmeans(repeated, 12, empty=empty, mesh=one)
    assert len(found.centroids) == 5 and found.inertia < 1e-9
    constant = kmeans(np.ones((150, DIM), np.float32), 12, empty=empty, mesh=one)
    np.testing.assert_array_equal(constant.centroids, np.ones((1, DIM)))
    few = kmeans(distinct, 12, empty=empty, mesh=one)
    assert len(few.centroids) == 5 and few.inertia < 1e-9
    line = kmeans(np.arange(9, dtype=np.float32)[:, None], 9, empty=empty, mesh=one)
    assert sorted(line.centroids[:, 0].tolist()) == list(range(9))


def test_refusals(x, init, one):
    bad = x.copy()
    bad[17, 3] = np.nan
    with pytest.raises(ValueError, match="row 17 .*not finite"):
        kmeans(bad, K, mesh=one)
    wrong = {
        "metric is 'l1'; .*l2": {"metric": "l1"},
        "empty is 'splt'; .*split": {"empty": "splt"},
        "init is 'kmeans'; .*kmeans": {"init": "kmeans"},
        r"init is \[20, 3\]; expected \[20, 16\]": {"init": init[:, :3]},
        "precision is 'high'": {"precision": "high"},
        "num_init is 0; expected 1 or more": {"num_init": 0},
    }
    for sentence, options in wrong.items():
        with pytest.raises(ValueError, match=sentence):
            kmeans(as_embeddings(x), K, mesh=one, **options)
    with pytest.raises(ValueError, match="k is 0; expected 1 or more"):
        kmeans(x, 0)
    with pytest.raises(ValueError, match=r"centroids are \[20, 3\]; expected \[k, 16\]"):
        assign(as_embeddings(x), init[:, :3])


def stops_after(questions: int):
    """A `stop` that says so when it is asked for the n-th time."""
    count = itertools.count(1)
    return lambda: next(count) >= questions


@pytest.mark.parametrize("questions", [1, 2, 3, 8, 13])
def test_stopped_anywhere_and_gone_on_is_the_same(x, one, tmp_path, questions):
    """While seeding, between iterations, within one, and in the second restart."""
    how = {"n_iters": 3, "num_init": 2, "empty": "split", "seed": 7, "mesh": one}
    with pytest.raises(Stopped):
        kmeans(x, K, checkpoint=tmp_path, stop=stops_after(questions), **how)
    again = kmeans(x, K, checkpoint=tmp_path, **how)
    alone = kmeans(x, K, **how)
    same_result(again, alone)
    saved = sorted(path.name for path in tmp_path.glob("lloyd0-*.json"))
    assert saved == ["lloyd0-00000002.json", "lloyd0-00000003.json"]


def test_checkpoints_of_another_call_are_refused(x, init, one, tmp_path):
    kmeans(x, K, init=init, n_iters=1, mesh=one, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="made with k 20, not 19; give another folder"):
        kmeans(x, 19, init=init[:19], n_iters=1, mesh=one, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="made with input"):
        kmeans(x + 1, K, init=init, n_iters=1, mesh=one, checkpoint=tmp_path)


def test_no_array_of_rows_by_centroids(one):
    """32,768 rows and 8192 centroids would be 1 GiB; the program needs blocks of 512 x 2048."""
    x = np.zeros((32_768, 8), np.float32)
    rows = device_rows.device_rows(as_embeddings(x), one)
    placed = lloyd.place_centroids(rows, np.zeros((8192, 8), np.float32), "l2")
    assert placed.tiles.shape == (4, 2048, 8)
    chunk = next(rows.chunks())
    with jax.enable_x64(True):
        program = lloyd._program(one, "highest")
        sums = lloyd._zeros(rows, placed)
        compiled = program.lower(chunk.x, chunk.valid, placed, sums).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 6 * 512 * 2048 * 4


PROGRAM = """
import itertools, sys
import jax, numpy as np
from dinojax import hosts
hosts.start()
from data_curation.embeddings import open_embeddings
from data_curation.files import Stopped
from data_curation.kmeans import kmeans
data, folder, questions = sys.argv[1], sys.argv[2], int(sys.argv[3])
count = itertools.count(1)
stop = lambda: next(count) >= questions
for name, init in (("greedy", "kmeans++"), ("parallel", "kmeans||")):
    try:
        found = kmeans(open_embeddings(data), 20, init=init, n_iters=4, seed=5, stop=stop,
                       checkpoint=f"{folder}/{name}")
    except Stopped:
        print("stopped")
        break
    np.savez(f"{folder}/{name}{jax.process_index()}.npz", centroids=found.centroids,
             assignment=found.assignment, distance=found.distance, seeds=found.seeds)
if jax.process_count() > 1:
    jax.distributed.shutdown()
"""


def run_processes(count: int, data: Path, folder: Path, questions: int = 10**9) -> list[str]:
    """The program on `count` processes of two devices each; what they print."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for number in range(count):
        variables = {"JAX_NUM_CPU_DEVICES": "2"}
        if count > 1:
            variables |= {
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                **{"JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(number)},
            }
        arguments = [sys.executable, "-c", PROGRAM, str(data), str(folder), str(questions)]
        root = Path(__file__).parents[2]
        how = {"cwd": root, "env": os.environ | variables, "text": True}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(arguments, **how, **pipes))
    try:
        told = [process.communicate(timeout=600) for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(process.returncode == 0 for process in started), told
    return [out for out, _ in told]


@pytest.mark.slow
def test_two_processes_equal_one(folder, tmp_path):
    """Rows are split between them, stopped and gone on; both hold the whole result."""
    alone, both = tmp_path / "alone", tmp_path / "both"
    for path in (alone, both):
        path.mkdir()
    run_processes(1, folder, alone)
    told = run_processes(2, folder, both, questions=3)
    assert [out.splitlines()[-1] for out in told] == ["stopped"] * 2
    assert json.loads(next(both.glob("greedy/*.json")).read_text())["processes"] == 2
    run_processes(2, folder, both)
    for name in ("greedy", "parallel"):
        expected = np.load(alone / f"{name}0.npz")
        for process in range(2):
            found = np.load(both / f"{name}{process}.npz")
            for array in ("seeds", "assignment"):
                np.testing.assert_array_equal(found[array], expected[array])
            np.testing.assert_allclose(found["centroids"], expected["centroids"], rtol=1e-5)
            np.testing.assert_allclose(found["distance"], expected["distance"], rtol=1e-4)
