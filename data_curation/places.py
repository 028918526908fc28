"""Numbers of all rows as one array on the devices: [chunk, place in it], split as the rows are.

`seeding` keeps the distances to the nearest centre so. A place is an index of the flattened array,
a position one of the set of rows.
"""

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float32, Int64

from data_curation.device_rows import DeviceRows
from dinojax.sharding import BATCH


def place(rows: DeviceRows, own: Float32[np.ndarray, " m"]) -> Float32[Array, "t s"]:
    """This process's values of its rows onto the devices, as D lies."""
    padded = np.zeros((rows.chunk_count, rows.local_shards, rows.shard_rows), np.float32)
    for index in range(rows.chunk_count):
        count = rows.rows_in(rows.mine, index)
        share = -(-count // rows.local_shards)
        part = own[index * rows.batch : index * rows.batch + count]
        for shard in range(rows.local_shards):
            values = part[shard * share : (shard + 1) * share]
            padded[index, shard, : len(values)] = values
    sharding = NamedSharding(rows.mesh, PartitionSpec(None, *BATCH))
    return jax.make_array_from_process_local_data(
        sharding, padded.reshape(rows.chunk_count, rows.batch)
    )


def collect(rows: DeviceRows, d: Float32[Array, "t s"]) -> Float32[np.ndarray, " m"]:
    """The inverse of `place`."""
    counts = [rows.rows_in(rows.mine, index) for index in range(rows.chunk_count)]
    return np.concatenate([rows.collect(d[i], count) for i, count in enumerate(counts)])


def blocks_by_row(rows: DeviceRows, block: int) -> Int64[np.ndarray, " blocks"]:
    """Blocks of D (flattened) in the order of their rows: by process, chunk, shard."""
    each = rows.shard_rows // block
    shape = (rows.chunk_count, len(rows.ranges) * rows.local_shards, each)
    numbers = np.arange(np.prod(shape)).reshape(shape)
    return np.concatenate([numbers[:, list(shards)].reshape(-1) for shards in rows.shards])


def positions(rows: DeviceRows, places: Int64[np.ndarray, " m"]) -> Int64[np.ndarray, " m"]:
    """Positions of the rows at these places of D, flattened."""
    reader_of = {shard: i for i, shards in enumerate(rows.shards) for shard in shards}
    width = len(rows.ranges) * rows.batch
    out = np.empty(len(places), np.int64)
    for i, place in enumerate(places.tolist()):
        index, rest = divmod(place, width)
        shard, inside = divmod(rest, rows.shard_rows)
        reader = reader_of[shard]
        share = -(-rows.rows_in(reader, index) // rows.local_shards)
        before = index * rows.batch + rows.shards[reader].index(shard) * share
        out[i] = rows.ranges[reader][0] + before + inside
    return out
