"""k-means of data_curation, faiss and scikit-learn, in turn: A B C A B C.

    python tests/benchmarks/compare_kmeans.py [--rows 200000] [--dim 384] [--k 1000] [--rounds 3] \
        [--seeding] [--json FILE]
    python tests/benchmarks/compare_kmeans.py --stream 10000000 --dim 256 [--k 1000] [--folder DIR]

One Lloyd iteration each: assignment of all rows to the same centroids, and the new means. Rows are
standard normal, the hardest case for anything that tries to skip distances. faiss assigns with its
flat index, whose means take `numpy.add.reduceat` here, and once with its own `Kmeans`;
scikit-learn's is its inner loop, `lloyd_iter_chunked_dense`. Peers that are not installed are left
out (extra `[bench]`). Wall and CPU seconds are the lowest of the rounds; on a machine that does
other things too (its load is printed) only the ratios mean something.

`--seeding` times greedy k-means++, ours and scikit-learn's. `--stream ROWS` writes a file of that
many float16 rows, runs one iteration from it and prints how far the memory grew.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import resource
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_curation.device_rows import device_rows, origin
from data_curation.embeddings import EmbeddingSet, as_embeddings, open_embeddings
from data_curation.lloyd import lloyd_pass
from data_curation.seeding import kmeans_plusplus

Times = dict[str, list[tuple[float, float]]]


def peers(x: np.ndarray, c: np.ndarray) -> dict[str, Callable[[], object]]:
    """One iteration by each library that is installed."""
    found: dict[str, Callable[[], object]] = {}
    threads = os.cpu_count() or 1
    if importlib.util.find_spec("faiss"):
        import faiss

        def flat() -> None:
            index = faiss.IndexFlatL2(x.shape[1])
            index.add(c)
            _, ids = index.search(x, 1)
            order = np.argsort(ids[:, 0], kind="stable")
            starts = np.flatnonzero(np.diff(ids[order, 0], prepend=-1))
            np.add.reduceat(x[order], starts, axis=0)

        def own() -> None:
            clustering = faiss.Kmeans(
                x.shape[1], len(c), niter=1, max_points_per_centroid=len(x), verbose=False
            )
            clustering.train(x, init_centroids=c)

        found |= {"faiss Kmeans": own, "faiss flat + means": flat}
    if importlib.util.find_spec("sklearn"):
        from sklearn.cluster._k_means_lloyd import lloyd_iter_chunked_dense

        new, weights = np.zeros_like(c), np.zeros(len(c), np.float32)
        labels, shift = np.zeros(len(x), np.int32), np.zeros(len(c), np.float32)
        ones = np.ones(len(x), np.float32)

        def chunked() -> None:
            from threadpoolctl import threadpool_limits

            with threadpool_limits(1, user_api="blas"):  # as scikit-learn itself does
                lloyd_iter_chunked_dense(x, ones, c, new, weights, labels, shift, threads)

        found["scikit-learn"] = chunked
    for name in {"faiss", "sklearn"} - {n for n in ("faiss", "sklearn") if _installed(n)}:
        print(f"{name} is not installed; left out (pip install -e '.[bench]')")
    return found


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def in_turn(programs: dict[str, Callable[[], object]], rounds: int) -> Times:
    """Wall and CPU seconds of each program, one after the other, `rounds` times."""
    times: Times = {name: [] for name in programs}
    for program in programs.values():
        program()  # compiles, allocates
    for _ in range(rounds):
        for name, program in programs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            program()
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return times


def report(times: Times) -> dict[str, dict[str, float]]:
    """Print the lowest times and what ours takes of each of the others'."""
    best = {name: {"wall": min(t)[0], "cpu": min(c for _, c in t)} for name, t in times.items()}
    mine = best["ours"]
    for name, one in best.items():
        print(
            f"{name:20} {one['wall']:8.3f} s wall {one['cpu']:8.3f} s CPU   "
            f"ours / it: {mine['wall'] / one['wall']:.2f} wall {mine['cpu'] / one['cpu']:.2f} CPU"
        )
    return best


def iterations(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((options.rows, options.dim), dtype=np.float32)
    c = x[rng.choice(options.rows, options.k, replace=False)].copy()
    rows = device_rows(as_embeddings(x), None, origin(as_embeddings(x)))
    return report(
        in_turn({"ours": lambda: lloyd_pass(rows, c, "l2"), **peers(x, c)}, options.rounds)
    )


def seedings(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((options.rows, options.dim), dtype=np.float32)
    programs: dict[str, Callable[[], object]] = {"ours": lambda: kmeans_plusplus(x, options.k)}
    if _installed("sklearn"):
        from sklearn.cluster import kmeans_plusplus as theirs

        programs["scikit-learn"] = lambda: theirs(x, options.k, random_state=0)
    return report(in_turn(programs, options.rounds))


class Peak:
    """The most memory of this process (resident, without mapped files) while it is open."""

    def __enter__(self) -> "Peak":
        self.start = self.most = _anonymous()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            self.most = max(self.most, _anonymous())


def _anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def stream(options: argparse.Namespace) -> dict[str, float]:
    """One iteration over a file, with the memory it took; the second one is timed."""
    with contextlib.ExitStack() as stack:
        folder = options.folder or stack.enter_context(tempfile.TemporaryDirectory())
        path = Path(folder) / "emb.npy"
        write_rows(path, options.stream, options.dim)
        x = open_embeddings(str(path))
        c = x.take(np.linspace(0, len(x) - 1, options.k).astype(np.int64))
        few = x.restrict(np.arange(min(len(x), 1 << 17)))
        lloyd_pass(streamed(few), c, "l2")  # compiles
        start = time.perf_counter()
        with Peak() as peak:
            found = lloyd_pass(streamed(x), c, "l2")
        seconds = time.perf_counter() - start
        assert found.counts.sum() == len(x)
        path.unlink()
    batch = 65_536 * options.dim * 4
    grown = peak.most - peak.start
    gigabytes = 2 * options.dim * options.stream / 1e9
    print(
        f"{options.stream} x {options.dim} float16 ({gigabytes:.2f} GB), k = {options.k}: "
        f"{seconds:.1f} s, {options.stream / seconds:.3g} rows/s, {gigabytes / seconds:.2f} GB/s; "
        f"memory grew by {grown / 2**20:.0f} MiB ({grown / batch:.1f} batches of 65,536 rows)"
    )
    return {"seconds": seconds, "grown_bytes": grown}


def streamed(x: EmbeddingSet):
    """Rows that are read again in each pass, whatever their number."""
    import dataclasses

    return dataclasses.replace(device_rows(x, None, origin(x)), resident=False)


def write_rows(path: Path, count: int, dim: int, step: int = 1 << 16) -> None:
    """Standard normal float16 rows, in pieces."""
    rng = np.random.default_rng(0)
    file = np.lib.format.open_memmap(path, "w+", np.float16, (count, dim))
    for first in range(0, count, step):
        rows = file[first : first + step]
        rows[:] = rng.standard_normal(rows.shape, dtype=np.float32)
    file.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in (("rows", 200_000), ("dim", 384), ("k", 1000), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seeding", action="store_true")
    parser.add_argument("--stream", type=int, metavar="ROWS")
    parser.add_argument("--folder", help="where --stream writes its file (default: temporary)")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    chosen = stream if options.stream else seedings if options.seeding else iterations
    figures = chosen(options)
    print(f"load at the end {os.getloadavg()[0]:.1f}")
    if options.json:
        Path(options.json).write_text(json.dumps({"load": os.getloadavg(), **figures}, indent=1))


if __name__ == "__main__":
    main()
