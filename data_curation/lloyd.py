"""One pass of Lloyd's algorithm: nearest centroid of every row and the sums of the members.

`kmeans` calls `lloyd_pass` once an iteration. Blocks of rows are multiplied with tiles of
centroids, reduced at once and forgotten: no array of rows x k is ever made. Rows are split over the
mesh axes (`data`, `fsdp`), centroids over `tensor`.

Sums are float64, as in the public reference: the mean of 32,768 equal rows is off by 1.4e-4 in
float32, and float64 sums are the same float32 centroids whatever the number of devices. (TPUs
emulate float64; such a scatter compiles for them, but has not been run there.)
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Float32, Float64, Int, Int32, Int64

from data_curation.device_rows import Chunk, DeviceRows
from dinojax.sharding import BATCH

METRICS = ("l2", "spherical", "cos_raw")
PRECISIONS = ("highest", "bf16_refine")
REFINED = 4  # candidates of the bf16 product that are compared again in float32

# Measured on two CPU cores at 200,000 x 384 and k = 1000: see tests/benchmarks/compare_kmeans.py.
# CPU seconds of a pass beside other work: 1.72 with blocks of 2048 rows and groups of 32, 1.52 with
# 512 and 32, 1.43 with 512 and 8; faiss 1.99.
_BLOCK_ROWS = 512
_GROUP = 8  # centroids to a group of the two-stage argmin
_TILE = 2048  # centroids multiplied at a time on a CPU
_ACCELERATOR_TILE, _ACCELERATOR_BYTES = 16_384, 1 << 29  # and rows x tile x 4 bytes elsewhere
_NEVER = np.int32(2**31 - 1)


class Totals(NamedTuple):
    """What a pass adds up over all rows, on the host; in the frame of the shifted rows."""

    sums: Float64[np.ndarray, "k d"]
    counts: Int64[np.ndarray, " k"]
    inertia: float  # squared distances of all rows to their centroid


class Centroids(NamedTuple):
    """Centroids on the devices, padded with ones that no row is nearest to."""

    tiles: Float32[Array, "t k d"]  # C[t_tensor, k, d]
    half: Float32[Array, "t k"]  # half of the squared norms; infinite for padding


class Sums(NamedTuple):
    """The running totals of each row shard; k_tensor, r_(data,fsdp)."""

    sums: Float[Array, "r k d"]
    counts: Int[Array, "r k"]
    inertia: Float[Array, " r"]


def lloyd_pass(
    rows: DeviceRows,
    centroids: Float32[np.ndarray, "k d"],
    metric: str,
    precision: str = "highest",
    visit: Callable[[Chunk, Int32[Array, " s"], Float32[Array, " s"]], None] | None = None,
) -> Totals:
    """Assign all rows and add them up by cluster.

    Args:
      visit: takes each chunk with the ids and squared distances of its rows, as they are ready.
    """
    with jax.enable_x64(True):
        program = _program(rows.mesh, precision)
        placed = place_centroids(rows, centroids, metric)
        sums = _zeros(rows, placed)
    before = None
    for chunk in rows.chunks():
        with jax.enable_x64(True):
            ids, distances, sums = program(chunk.x, chunk.valid, placed, sums)
        if before is not None:  # or a reader faster than the devices would fill the memory
            before.block_until_ready()
        before = ids
        if visit is not None:
            visit(chunk, ids, distances)
    with jax.enable_x64(True):
        added, counts, inertia = map(np.asarray, _reduce(rows.mesh)(sums))
    return Totals(added[: len(centroids)], counts[: len(centroids)], float(inertia))


def place_centroids(
    rows: DeviceRows, centroids: Float32[np.ndarray, "k d"], metric: str
) -> Centroids:
    """Shift, pad and cut into tiles; every shard of `tensor` has the same number of tiles."""
    k, d = centroids.shape
    shards = rows.mesh.shape["tensor"]
    most = _TILE if on_cpu(rows.mesh) else _ACCELERATOR_TILE
    local = -(-k // shards)
    count = -(-local // most)
    width = -(-local // count)
    width = -(-width // _GROUP) * _GROUP
    tiles = np.zeros((shards * count * width, d), np.float32)
    # Both are float32 and near each other: the difference is exact.
    tiles[:k] = centroids - rows.shift[None]
    half = np.full(len(tiles), np.inf, np.float32)
    half[:k] = 0.5 * np.einsum("kd,kd->k", tiles[:k], tiles[:k], dtype=np.float64)
    if metric == "cos_raw":
        half[:k] = 0  # then long centroids attract more
    sharding = NamedSharding(rows.mesh, PartitionSpec("tensor"))

    def put(array: np.ndarray) -> Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return Centroids(put(tiles.reshape(-1, width, d)), put(half.reshape(-1, width)))


def on_cpu(mesh: Mesh) -> bool:
    """The devices of a mesh are CPUs."""
    return mesh.devices.flat[0].platform == "cpu"


def _zeros(rows: DeviceRows, placed: Centroids) -> Sums:
    count, width, d = placed.tiles.shape
    shards = rows.local_shards * len(rows.ranges)
    return _make_zeros(rows.mesh, shards, count * width, d)()


_SPECS = Sums(
    PartitionSpec(*BATCH, "tensor"), PartitionSpec(*BATCH, "tensor"), PartitionSpec(*BATCH)
)


@lru_cache
def _make_zeros(mesh: Mesh, shards: int, k: int, d: int):
    shardings = jax.tree.map(partial(NamedSharding, mesh), _SPECS)

    def zeros() -> Sums:
        return Sums(
            jnp.zeros((shards, k, d), jnp.float64),
            jnp.zeros((shards, k), jnp.int64),
            jnp.zeros(shards, jnp.float64),
        )

    return jax.jit(zeros, out_shardings=shardings)


@lru_cache
def _reduce(mesh: Mesh):
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.jit(lambda sums: tuple(x.sum(axis=0) for x in sums), out_shardings=whole)


@lru_cache
def _program(mesh: Mesh, precision: str):
    """The compiled pass over one chunk; jit keeps one for every shape."""
    tiles = PartitionSpec("tensor")
    chunk = partial(_chunk, cpu=on_cpu(mesh), precision=precision)
    program = jax.shard_map(
        chunk,
        mesh=mesh,
        in_specs=(BATCH, BATCH, Centroids(tiles, tiles), _SPECS),
        out_specs=(BATCH, BATCH, _SPECS),
    )
    return jax.jit(program, donate_argnums=3)


def _chunk(
    x: Float32[Array, "s d"],
    valid: Int32[Array, " 1"],
    centroids: Centroids,
    sums: Sums,
    *,
    cpu: bool,
    precision: str,
) -> tuple[Int32[Array, " s"], Float32[Array, " s"], Sums]:
    """One device's rows of a chunk against its own centroids, block by block."""
    rows, d = x.shape
    _, width, _ = centroids.tiles.shape
    block = _BLOCK_ROWS
    if not cpu:
        block = max(block, 1 << (_ACCELERATOR_BYTES // (4 * width)).bit_length() - 1)
    block = min(block, rows)
    flat = centroids.tiles.reshape(-1, d)  # t k d -> (t k) d
    offset = lax.axis_index("tensor").astype(jnp.int32) * flat.shape[0]
    count = valid[0]

    def body(index: Int32[Array, ""], carry: tuple) -> tuple:
        ids, distances, sums = carry
        start = index * block
        rows = lax.dynamic_slice_in_dim(x, start, block)
        score, nearest = _nearest(rows, centroids, precision)
        best = lax.pmin(score, "tensor")  # equal scores: the lowest id
        nearest = lax.pmin(jnp.where(score == best, nearest + offset, _NEVER), "tensor")
        own = nearest - offset
        inside = (own >= 0) & (own < flat.shape[0])
        c = flat.at[jnp.where(inside, own, 0)].get(mode="promise_in_bounds")
        # Not by expansion: exactly 0 for a row that is its centroid, and never negative.
        distance = jnp.sum(jnp.square(rows - c), axis=1)
        real = start + lax.iota(jnp.int32, block) < count
        distance = lax.psum(jnp.where(inside, distance, 0), "tensor")
        target = jnp.where(inside & real, own, flat.shape[0])  # outside: dropped
        sums = Sums(
            sums.sums.at[0, target].add(rows.astype(jnp.float64), mode="drop"),
            sums.counts.at[0, target].add(1, mode="drop"),
            sums.inertia + jnp.sum(jnp.where(real, distance, 0), dtype=jnp.float64),
        )
        ids = lax.dynamic_update_slice_in_dim(ids, nearest, start, 0)
        return ids, lax.dynamic_update_slice_in_dim(distances, distance, start, 0), sums

    blocks = (count + block - 1) // block
    empty = jnp.zeros_like(x[:, 0])
    return lax.fori_loop(0, blocks, body, (empty.astype(jnp.int32), empty, sums))


def _nearest(
    rows: Float32[Array, "b d"], centroids: Centroids, precision: str
) -> tuple[Float32[Array, " b"], Int32[Array, " b"]]:
    """|c|^2 / 2 - x . c of the nearest centroid, and its number; the lowest of equal ones."""
    of_tile = partial(_nearest_in_tile, rows, refine=precision == "bf16_refine")
    count, width, _ = centroids.tiles.shape
    if count == 1:
        return of_tile(centroids.tiles[0], centroids.half[0])

    def body(best: tuple, tile: tuple) -> tuple[tuple, None]:
        first, c, half = tile
        score, number = of_tile(c, half)
        better = score < best[0]
        return (jnp.where(better, score, best[0]), jnp.where(better, number + first, best[1])), None

    firsts = width * lax.iota(jnp.int32, count)
    start = of_tile(centroids.tiles[0], centroids.half[0])
    rest = (firsts[1:], centroids.tiles[1:], centroids.half[1:])
    return lax.scan(body, start, rest)[0]


def _nearest_in_tile(
    rows: Float32[Array, "b d"],
    c: Float32[Array, "k d"],
    half: Float32[Array, " k"],
    refine: bool,
) -> tuple[Float32[Array, " b"], Int32[Array, " b"]]:
    """Two stages: XLA's argmin over k costs more than the product on a CPU, its min very little.

    Product and min take 0.36 s, product and argmin 0.98 s, in two stages 0.42 s (spec section 10).
    """
    if refine:
        return _nearest_refined(rows, c, half)
    product = jnp.dot(rows, c.T, precision=lax.Precision.HIGHEST)
    score = (half[None] - product).reshape(len(rows), -1, _GROUP)  # b (g e) -> b g e
    group = lax.argmin(score.min(axis=2), 1, jnp.int32)
    members = jnp.take_along_axis(score, group[:, None, None], axis=1)[:, 0]
    return members.min(axis=1), group * _GROUP + lax.argmin(members, 1, jnp.int32)


def _nearest_refined(
    rows: Float32[Array, "b d"], c: Float32[Array, "k d"], half: Float32[Array, " k"]
) -> tuple[Float32[Array, " b"], Int32[Array, " b"]]:
    """The best four by a product in bfloat16, compared again in float32."""
    product = jnp.dot(
        rows.astype(jnp.bfloat16), c.astype(jnp.bfloat16).T, preferred_element_type=jnp.float32
    )
    _, found = lax.top_k(product - half[None], REFINED)
    found = jnp.sort(found, axis=1)  # of equal scores the lowest number
    exact = jnp.einsum("bd,bed->be", rows, c[found], precision=lax.Precision.HIGHEST)
    score = half[found] - exact
    best = lax.argmin(score, 1, jnp.int32)[:, None]
    pick = partial(jnp.take_along_axis, indices=best, axis=1)
    return pick(score)[:, 0], pick(found)[:, 0].astype(jnp.int32)
