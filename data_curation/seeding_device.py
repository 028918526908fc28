"""What greedy k-means++ runs on the devices: distances of a pool, comparing candidates, sums of D.

Called by `seeding`, in float64 mode: sums over rows are float64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float32, Float64, Int32, Int64

from dinojax.sharding import BATCH

_FILL_ROWS = 512  # rows multiplied with a pool at a time, so that the product stays in the cache
# |x|^2 + |y|^2 - 2 x.y of equal rows is not quite 0: below this share of the first two it counts as
# 0. (Largest for equal rows of up to 4096 numbers: 7.5e-7.)
_ROUNDING = 2e-6


@dataclass(frozen=True, eq=False)
class Programs:
    """What runs on the devices, for the rows of one mesh. Sums are float64."""

    fill: Callable[..., Array]
    compare: Callable[..., tuple[Array, ...]]
    block_sums: Callable[..., Array]
    take_blocks: Callable[..., Array]


@lru_cache
def zeros(mesh: Mesh, shape: tuple[int, int, int]) -> Callable[[], Array]:
    sharding = NamedSharding(mesh, PartitionSpec(None, None, *BATCH))
    return jax.jit(partial(jnp.zeros, shape, jnp.float32), out_shardings=sharding)


@lru_cache
def programs(mesh: Mesh) -> Programs:
    d = NamedSharding(mesh, PartitionSpec(None, *BATCH))
    whole = NamedSharding(mesh, PartitionSpec())
    # Within a shard, or blocks of rows would be gathered from all of them.
    pool = PartitionSpec(None, None, *BATCH)
    alike = PartitionSpec()
    specs = {"in_specs": (pool, BATCH, BATCH, alike, alike), "out_specs": pool}
    fill = jax.shard_map(_fill, mesh=mesh, **specs)
    return Programs(
        jax.jit(fill, donate_argnums=0),
        jax.jit(_compare, out_shardings=(d, whole, whole, whole)),
        jax.jit(_block_sums, static_argnums=2, out_shardings=whole),
        jax.jit(_take_blocks, static_argnums=3, out_shardings=whole),
    )


def _fill(
    distances: Float32[Array, "m t s"],
    x: Float32[Array, "s d"],
    valid: Int32[Array, " 1"],
    candidates: Float32[Array, "m d"],
    index: Int32[Array, ""],
) -> Float32[Array, "m t s"]:
    """Squared distances of the candidates to one device's rows of a chunk, into the pool."""
    block = min(_FILL_ROWS, len(x))
    own = jnp.sum(candidates * candidates, axis=1)[:, None]

    def body(number: Int32[Array, ""], distances: Array) -> Array:
        rows = lax.dynamic_slice_in_dim(x, number * block, block)
        product = jnp.dot(candidates, rows.T, precision=lax.Precision.HIGHEST)
        norms = own + jnp.sum(rows * rows, axis=1)[None]
        squared = norms - 2 * product
        squared = jnp.where(squared > _ROUNDING * norms, squared, 0)[:, None]
        place = (jnp.int32(0), index, number * block)
        return lax.dynamic_update_slice(distances, squared, place)

    return lax.fori_loop(0, (valid[0] + block - 1) // block, body, distances)


def _compare(
    d: Float32[Array, "t s"],
    weight: Float32[Array, "t s"],
    distances: Float32[Array, "m t s"],
    picks: Int32[Array, " l"],
    places: Int64[Array, " m"],
) -> tuple[Array, Array, Array, Array]:
    """One round: (D after it, the sum with each pick, the best pick, D of the pool's rows)."""

    def total(pick: Int32[Array, ""]) -> Float64[Array, ""]:
        lowered = weight * jnp.minimum(d, distances[pick])
        return jnp.sum(_columns(lowered))

    sums = lax.map(total, picks)
    best = jnp.argmin(sums)  # the first of equal ones
    d = jnp.minimum(d, distances[picks[best]])
    return d, sums, best, d.reshape(-1)[places]


def _columns(values: Float32[Array, "t s"]) -> Float64[Array, "b w"]:
    """Float32 sums of 16 rows, 128 apart: what a CPU adds in parallel.

    One after the other in float64, 200,000 numbers take 0.3 ms, eight times a round.
    """
    width = min(128, values.shape[1])
    block = min(16, values.shape[1] // width)
    columns = values.reshape(-1, block, width).sum(axis=1)  # t s -> b 16 w -> b w
    return columns.astype(jnp.float64)


def _block_sums(
    d: Float32[Array, "t s"], weight: Float32[Array, "t s"], block: int
) -> Float64[Array, "t b"]:
    values = (d.astype(jnp.float64) * weight).reshape(len(d), -1, block)
    return values.sum(axis=2)


def _take_blocks(
    d: Float32[Array, "t s"],
    weight: Float32[Array, "t s"],
    blocks: Int64[Array, " m"],
    block: int,
) -> Float32[Array, "m 2 block"]:
    """D and weights of some blocks."""
    return jnp.stack([a.reshape(-1, block)[blocks] for a in (d, weight)], axis=1)
