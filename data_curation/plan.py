"""What a curation would cost, before it runs: `python -m data_curation run --config X --dry-run`.

Operations, bytes and memory follow from the config, the number of rows and their dimensions; time
follows from two rates, of products and of reading. The counts are what the stages do at most: all
iterations, no early stop (spec 10). Called by `__main__.py`; reads heads of files only.
"""

import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from data_curation.embeddings import BATCH_ROWS
from data_curation.search import EXACT_BELOW, RESIDENT_BYTES
from dinojax.data.advice import size

GB = 1e9
READ = 1e9  # bytes a second from storage where the config says nothing: a guess
BLOCK_ROWS = 4096  # of distances on a device at a time
# Rows stay where they are compared while they fit (`device_rows`): in this share of the memory of
# accelerators, or in so many bytes of a CPU's. Beyond that they are read again for every pass.
RESIDENT, RESIDENT_CPU = 0.5, 4 << 30
FIT_ROWS, PROBES = 64, 16  # a list of an inverted index, and how many each row looks into (`ivf`)
CANDIDATES = 10  # x k of k-means||: five rounds of 2k (spec 4)
# On the host that writes the tree, per input of a level: parent, dist, members, and an int64 order
# by which they are sorted, all at once (`tree.tree_level`).
TREE_BYTES = 4 + 4 + 8 + 2 * 8


ROW_BYTES = 16  # on every host: cluster and distance of every row, and both again while joined
SPLIT_BYTES = 24  # on every host that splits: cluster of every row, rows by cluster, their parts


class Machine(NamedTuple):
    """What it would run on. Memory in bytes; rates a second, of a device and of a host."""

    hosts: int
    devices: int
    flops: float
    read: float
    host_memory: float
    device_memory: float
    resident: float  # of all devices, for rows that stay there
    disk: float


class Data(NamedTuple):
    """A set of vectors, by its size alone."""

    rows: int
    dim: int
    bytes_each: int  # of a number, as stored

    @property
    def stored(self) -> int:
        return self.rows * self.dim * self.bytes_each


class Cost(NamedTuple):
    """A piece of a stage. `flops`, `read` and `disk` of all hosts; memory of one device or host."""

    stage: str
    what: str
    rows: int
    k: int = 0
    flops: float = 0.0
    read: float = 0.0
    device: float = 0.0
    host: float = 0.0
    disk: float = 0.0
    terms: Mapping[str, str] = {}  # what most of a memory is for: "host" -> "sorting the tree"
    alone: bool = False  # the first host does it, the others wait

    def seconds(self, machine: Machine) -> float:
        """The larger of computing and reading: they overlap."""
        return max(self._both(machine))

    def bound(self, machine: Machine) -> str:
        """What takes longest, in a word."""
        computing, reading = self._both(machine)
        return "compute" if computing >= reading else "reading"

    def _both(self, machine: Machine) -> tuple[float, float]:
        hosts = 1 if self.alone else machine.hosts
        devices = machine.devices / machine.hosts * hosts
        return self.flops / (devices * machine.flops), self.read / (hosts * machine.read)


# ---- stages -------------------------------------------------------------------------------------


def costs(config: ConfigDict, data: Data, machine: Machine) -> list[Cost]:
    """What each stage does to `data`, in order."""
    first = [*_index(config, data), *_dedup(config, data)]
    last = [*_sample(config, data), *_retrieve(config, data, machine)]
    before, after = ([cost._replace(alone=True) for cost in part] for part in (first, last))
    return [*before, *_cluster(config, data, machine), *after]


def _index(config: ConfigDict, data: Data) -> Iterator[Cost]:
    if config.embed.source:
        yield Cost("embed", "writes vectors", data.rows, disk=data.stored)
    host = 3 * BATCH_ROWS * data.dim * 4 + data.rows * 9
    terms = {"host": "the numbers of usable rows"}
    read, disk = 2 * data.stored, data.rows * 8
    yield Cost("index", "looks at rows", data.rows, read=read, host=host, disk=disk, terms=terms)


def _dedup(config: ConfigDict, data: Data) -> Iterator[Cost]:
    n, d, dedup = data.rows, data.dim, config.dedup
    if dedup.method == "none":
        return
    host = 16 * n + 4 * BATCH_ROWS * d * 4
    shared = {"host": host, "terms": {"host": "16 bytes a row to join duplicates"}}
    if dedup.method == "semdedup":
        k = dedup.clusters or max(1, n // 1000)
        flops = 2 * n * k * d * (config.cluster.n_iters + 1) + 2 * n * n / k * d
        read = data.stored * (config.cluster.n_iters + 2)
        yield Cost("dedup", f"within {k:,} clusters", n, k, flops, read, disk=n * 8, **shared)
        return
    device = 2 * BATCH_ROWS * d * 4 + BATCH_ROWS * dedup.k * 8
    edges = n * dedup.k * 20 / 2  # i, j and their similarity, if every neighbour were one
    if dedup.index == "exact" or dedup.index == "auto" and n < EXACT_BELOW:
        times = 1 if n * d * 4 <= RESIDENT_BYTES else max(1, n * d * 4 // 2**30)
        flops, read = 2 * n * n * d, data.stored * times
        yield Cost("dedup", "all pairs", n, 0, flops, read, device, disk=edges, **shared)
    else:
        k = max(1, min(8 * math.isqrt(n), n // 8))
        some = Data(min(n, FIT_ROWS * k), d, data.bytes_each)
        fit, lists = 2 * some.rows * k * d * 11, 3 * k * d * 4
        what = f"fits {k:,} lists"
        yield Cost("dedup", what, some.rows, k, fit, some.stored, lists, **shared)
        # Rows of one list look into each other's lists together, which is more than this.
        flops, read = 2 * n * k * d + 2 * n * n * PROBES / k * d, 3 * data.stored
        disk = edges + n * d * 4  # and a copy, sorted by list
        what = f"looks into {PROBES} lists"
        yield Cost("dedup", what, n, k, flops, read, device, disk=disk, **shared)
    if dedup.references:
        read = len(dedup.references) * data.stored
        yield Cost("dedup", "with evaluation sets", n, 0, 0, read, device, **shared)


def _cluster(config: ConfigDict, data: Data, machine: Machine) -> Iterator[Cost]:
    inputs = data
    for number, one in enumerate(config.cluster.levels, 1):
        stage, n, d, k = f"level {number}", inputs.rows, inputs.dim, min(one.k, inputs.rows)
        yield kmeans(stage, f"k-means of {k:,}", inputs, k, config, machine)
        total = k
        if one.n_splits > 1:
            total = min(k * one.n_splits, n)
            yield _split(stage, inputs, k, total // k, config, machine)
        if one.n_resamples:
            yield _resample(stage, inputs, k, one, config, machine)
        terms = {"host": f"sorting the members of level {number}"}
        host, disk = n * TREE_BYTES + total * d * 4, n * 16 + total * d * 4
        yield Cost(stage, "writes members", n, total, host=host, disk=disk, terms=terms)
        inputs = Data(total, d, 4)


def _split(stage: str, data: Data, k: int, m: int, config: ConfigDict, machine: Machine) -> Cost:
    """k-means inside each of k clusters, of which one at a time is in memory."""
    each = Data(max(1, data.rows // k), data.dim, data.bytes_each)
    one = kmeans(stage, "", each, m, config, machine, resident=True)
    flops = k * config.cluster.split_restarts * one.flops
    centroids = k * m * data.dim * 4
    rows, host = each.rows * data.dim * 4, centroids + data.rows * SPLIT_BYTES
    terms = {"host": f"{k * m:,} centroids", "device": "the rows of a cluster"}
    return Cost(
        *(stage, f"splits into {m:,} each", data.rows, k * m, flops, data.stored),
        *(one.device + rows, host, centroids, terms),
    )


def _resample(
    stage: str, data: Data, k: int, level: ConfigDict, config: ConfigDict, machine: Machine
) -> Cost:
    """k-means on some rows of each cluster, and all rows to the new centroids; a few times."""
    times = level.n_resamples
    some = Data(min(data.rows, k * level.n_samples), data.dim, data.bytes_each)
    one = kmeans(stage, "", some, k, config, machine)
    flops = times * (one.flops + 2 * data.rows * k * data.dim)
    read, disk = times * (one.read + data.stored), times * (k * data.dim * 4 + some.rows * 8)
    what = f"{times} resamplings"
    return Cost(stage, what, some.rows, k, flops, read, one.device, one.host, disk, one.terms)


def kmeans(
    stage: str,
    what: str,
    data: Data,
    k: int,
    config: ConfigDict,
    machine: Machine,
    resident: bool = False,
) -> Cost:
    """Seeding and all Lloyd iterations."""
    n, d, cluster = data.rows, data.dim, config.cluster
    stays = resident or n * d * 4 <= machine.resident
    draws = 2 + int(math.log(k))  # candidates for each centre (spec 4)
    seeding, rounds = 2.0 * n * k * draws * d, k
    if cluster.init == "kmeans||":
        seeding = 2.0 * n * CANDIDATES * k * d + 2.0 * CANDIDATES * k * k * draws * d
        rounds = 6
    elif cluster.init == "random":
        seeding, rounds = 0.0, 1
    passes = (cluster.n_iters + 1) * cluster.num_init
    read = float(data.stored) * (1 if stays else passes + rounds)
    # Centroids, their sums and what compensates their rounding; blocks of rows; distances.
    shards = config.mesh.tensor
    device = (3 * k * d * 4 + BLOCK_ROWS * k * 4) / shards + 2 * BATCH_ROWS * d * 4
    if stays:
        device += n * d * 4 / machine.devices
    most = "rows that stay there" if stays and n / machine.devices > 3 * k else f"{k:,} centroids"
    return Cost(
        *(stage, what, n, k, 2.0 * n * k * d * passes + seeding, read, device),
        host=4 * BATCH_ROWS * d * 4 + k * d * 8 + n * ROW_BYTES,
        disk=k * d * 8,  # two checkpoints
        terms={"device": most, "host": "a distance and a cluster for each row"},
    )


def _sample(config: ConfigDict, data: Data) -> Iterator[Cost]:
    clusters = sum(one.k * one.n_splits for one in config.cluster.levels)
    for one in config.sample:
        host = data.rows * 16 + clusters * 40 + one.target * 24
        disk = one.target * (24 + 4 * len(config.cluster.levels))
        terms = {"host": "the tree in memory"}
        stage, what = f"sample {one.name}", f"draws {one.target:,}"
        yield Cost(stage, what, data.rows, clusters, host=host, disk=disk, terms=terms)


def _retrieve(config: ConfigDict, data: Data, machine: Machine) -> Iterator[Cost]:
    n, d = data.rows, data.dim
    for one in config.retrieve:
        stage = f"retrieve {one.name}"
        if one.mode == "cluster" and not one.level:
            k = min(one.clusters, n)
            yield kmeans(stage, f"k-means of {k:,}", data, k, config, machine)
        host, disk = 4 * BATCH_ROWS * d * 4 + n * 5, one.cap * 32
        yield Cost(stage, one.mode, n, read=data.stored, host=host, disk=disk)


# ---- the whole ----------------------------------------------------------------------------------


def find_machine(config: ConfigDict, folder: Path) -> Machine:
    """What the config says, completed by this machine, whose products are measured if need be."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    budget, wanted = config.budget, config.plan
    host = budget.host_memory * GB or memory
    device = budget.device_memory * GB or _device_memory() or host / jax.local_device_count()
    place = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    disk = budget.disk * GB or shutil.disk_usage(place).free
    devices = wanted.devices or jax.device_count()
    flops = wanted.flops or measure_flops() / (1 if wanted.devices else jax.local_device_count())
    here = not wanted.devices and jax.default_backend() == "cpu"
    resident = RESIDENT_CPU if here else RESIDENT * device * devices
    return Machine(wanted.hosts, devices, flops, wanted.read or READ, host, device, resident, disk)


def _device_memory() -> float:
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    return float((stats or {}).get("bytes_limit", 0))


def measure_flops() -> float:
    """Operations a second of a float32 product of a block of rows with 1,024 centroids."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4096, 512), np.float32))
    c = x[:1024].T

    @jax.jit
    def nearest(x: jax.Array, c: jax.Array) -> jax.Array:
        return jnp.matmul(x, c, precision=jax.lax.Precision.HIGHEST).max(axis=1)

    nearest(x, c).block_until_ready()
    best = math.inf
    for _ in range(5):
        began = time.perf_counter()
        nearest(x, c).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return 2 * x.size * c.shape[1] / best


def table(plan: list[Cost], machine: Machine) -> str:
    """The plan as text: a line a piece, and the sums."""
    head = (
        "stage",
        "what",
        "rows",
        "k",
        "flops",
        "read",
        "device",
        "host",
        "disk",
        "time",
        "bound",
    )
    lines = [head]
    for cost in plan:
        lines.append(
            (
                *(cost.stage, cost.what, f"{cost.rows:,}", f"{cost.k:,}" if cost.k else ""),
                *(f"{cost.flops:.1e}" if cost.flops else "", size(cost.read) if cost.read else ""),
                *(size(cost.device) if cost.device else "", size(cost.host), size(cost.disk)),
                *(duration(cost.seconds(machine)), cost.bound(machine) if cost.flops else ""),
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    left = (0, 1, 10)
    text = [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    ]
    total = sum(cost.seconds(machine) for cost in plan)
    flops, read = sum(cost.flops for cost in plan), sum(cost.read for cost in plan)
    disk = sum(cost.disk for cost in plan)
    text += [
        f"in all {flops:.2e} operations, {size(read)} read, {size(disk)} written: at least "
        f"{duration(total)} on {machine.hosts} x {machine.devices // machine.hosts} devices",
        f"at {machine.flops:.2e} operations a second and device, {size(machine.read)} a second and "
        "host; memory is of one device, one host"
        + ("; only levels are shared among hosts" if machine.hosts > 1 else ""),
    ]
    return "\n".join(text)


def duration(seconds: float) -> str:
    """For people: 0.2 s, 3 min, 5 h, 12 d."""
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.0f} {unit}"
    return f"{seconds:.1f} s"


def refuse(config: ConfigDict, plan: list[Cost], machine: Machine) -> None:
    """Raise ValueError, naming stage and term, for a plan that does not fit."""
    for cost in plan:
        for name, need, have in (
            ("device", cost.device, machine.device_memory),
            ("host", cost.host, machine.host_memory),
        ):
            if need > have:
                term = cost.terms.get(name, cost.what)
                raise ValueError(
                    f"{cost.stage} ({cost.what}) needs {size(need)} of {name} memory, mostly for "
                    f"{term}, and there are {size(have)} (budget.{name}_memory); "
                    f"{_remedy(cost, name)}"
                )
    disk = sum(cost.disk for cost in plan)
    if disk > machine.disk:
        most = max(plan, key=lambda cost: cost.disk)
        raise ValueError(
            f"the work folder would hold {size(disk)}, mostly {most.stage} ({most.what}), and "
            f"{size(machine.disk)} are free (budget.disk)"
        )
    hours = sum(cost.seconds(machine) for cost in plan) / 3600
    if 0 < config.budget.hours < hours:
        most = max(plan, key=lambda cost: cost.seconds(machine))
        raise ValueError(
            f"it would take {duration(3600 * hours)}, mostly {most.stage} ({most.what}, bound by "
            f"{most.bound(machine)}), and budget.hours is {config.budget.hours:g}"
        )


def _remedy(cost: Cost, name: str) -> str:
    if name == "device" and "centroids" in cost.terms.get("device", ""):
        return "split the level (n_splits) or share centroids among devices (mesh.tensor=2)"
    if name == "device":
        return "take more devices"
    return "take hosts with more memory, or fewer rows"
