"""The k largest similarities of every query, kept up to date over blocks of candidates.

One compiled program: a product, the maxima of small groups of it, and the k best of the groups
that can matter. Nothing larger than [tile, block] is ever made. Called by `search.py`.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float32, Int32

from dinojax.sharding import BATCH, batch_shards

SPLIT = PartitionSpec(None, *BATCH)  # of [tiles, t, ...]


class Best(NamedTuple):
    """The k best so far of every query: similarities, largest first, and candidates' numbers."""

    sims: Float32[Array, "tiles t k"]
    ids: Int32[Array, "tiles t k"]  # -1: none


@partial(jax.jit, donate_argnums=0, static_argnames="mesh")
def merge(
    best: Best,
    queries: Float32[Array, "tiles t d"],
    own: Int32[Array, "tiles t"],
    block: Float32[Array, "m d"],
    ids: Int32[Array, " m"],
    mesh: Mesh | None = None,
) -> Best:
    """`best` with the candidates of one block; their number `ids` < 0 marks padding.

    `own` is the number under which a query is a candidate itself, which does not count (-1: none).
    Equal similarities: the earlier candidate. float32 products at the highest precision: on TPUs
    and on GPUs with TF32 the default would move pairs over a threshold.
    """

    def tile(part: tuple, block: Array, ids: Array) -> Best:
        best, queries, own = part
        sims = jnp.einsum("td,md->tm", queries, block, precision="highest")
        hidden = (ids < 0)[None] | (ids[None] == own[:, None])
        return _best_of(best, jnp.where(hidden, -jnp.inf, sims), ids)

    def tiles(best: Best, queries: Array, own: Array, block: Array, ids: Array) -> Best:
        return jax.lax.map(lambda part: tile(part, block, ids), (best, queries, own))

    if mesh is not None:  # by hand: the partitioner would gather all queries for every top_k
        split, whole = SPLIT, PartitionSpec()
        tiles = jax.shard_map(
            tiles, mesh=mesh, in_specs=(split, split, split, whole, whole), out_specs=split
        )
    return tiles(best, queries, own, block, ids)


def _best_of(
    best: Best, sims: Float32[Array, "t m"], ids: Int32[Array, " m"]
) -> Best:  # of one tile
    (t, m), k = sims.shape, best.sims.shape[1]
    size = group_size(m, k)
    groups = sims.reshape(t, m // size, size)
    most = groups.max(axis=2)

    def merged() -> Best:
        candidates, numbers = sims, jnp.broadcast_to(ids[None], sims.shape)
        if k * size < m:  # the k best are in the k groups of the largest maxima
            # In order of their numbers, so that ties still go to the earlier one.
            chosen = jnp.sort(jax.lax.top_k(most, k)[1], axis=1)
            candidates = jnp.take_along_axis(groups, chosen[:, :, None], axis=1).reshape(t, -1)
            numbers = ids.reshape(m // size, size)[chosen].reshape(t, -1)
        values = jnp.concatenate([best.sims, candidates], axis=1)
        numbers = jnp.concatenate([best.ids, numbers], axis=1)
        top, where = jax.lax.top_k(values, k)
        return Best(top, jnp.take_along_axis(numbers, where, axis=1))

    # Above a threshold there is seldom anything: then the product is all that a block costs.
    return jax.lax.cond(jnp.any(most.max(axis=1) > best.sims[:, -1]), merged, lambda: best)


def group_size(m: int, k: int) -> int:
    """A power of two near sqrt(m / k) that divides m: as many maxima to rank as candidates."""
    size = 1
    while m % (2 * size) == 0 and (2 * size) ** 2 * k <= 2 * m:
        size *= 2
    return size


class Queries(NamedTuple):
    """Queries on the devices, as tiles."""

    vectors: Float32[Array, "tiles t d"]
    own: Int32[Array, "tiles t"]

    @classmethod
    def place(
        cls,
        vectors: Float32[np.ndarray, "q d"],
        own: Int32[np.ndarray, " q"],
        tile: int,
        mesh: Mesh | None,
    ) -> "Queries":
        """Padded to whole tiles (rows of zeros), each tile split over the mesh's batch axes."""
        tiles = -(-len(vectors) // tile)
        padded = np.zeros((tiles * tile, vectors.shape[1]), np.float32)
        padded[: len(vectors)] = vectors
        numbers = np.full(tiles * tile, -1, np.int32)
        numbers[: len(own)] = own
        return cls(
            put(padded.reshape(tiles, tile, -1), mesh, split=True),
            put(numbers.reshape(tiles, tile), mesh, split=True),
        )

    def start(self, k: int, floor: float, mesh: Mesh | None) -> Best:
        """Nothing found yet; only what is above `floor` will be."""
        shape = (*self.own.shape, k)
        sims, ids = np.full(shape, floor, np.float32), np.full(shape, -1, np.int32)
        return Best(put(sims, mesh, split=True), put(ids, mesh, split=True))


def put(array: np.ndarray, mesh: Mesh | None, split: bool = False) -> Array:
    """Onto the devices: whole on each, or its axis 1 split over the mesh's batch axes."""
    if mesh is None:
        return jax.device_put(array)
    return jax.device_put(array, NamedSharding(mesh, SPLIT if split else PartitionSpec()))


def tile_rows(rows: int, mesh: Mesh | None, most: int) -> int:
    """Rows of a tile for so many queries: a power of two up to `most`, times the mesh's shards."""
    shards = 1 if mesh is None else batch_shards(mesh)
    tile = 16
    while tile < min(rows / shards, most):
        tile *= 2
    return tile * shards
