"""Rows of an embedding set on the devices of a mesh, in chunks of one shape.

`kmeans` and `seeding` go through all rows in these chunks. Few enough rows stay on the devices,
more are read again in every pass; both run the same compiled programs and give the same bits. Rows
are split over the mesh axes (`data`, `fsdp`); each process reads consecutive rows of its own.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Float32, Int32, Int64, Shaped

from data_curation.embeddings import BATCH_ROWS, EmbeddingSet
from data_curation.files import Stopped
from dinojax.sharding import batch_sharding, batch_shards, make_mesh

_HOST_RESIDENT = 4 << 30  # bytes of rows kept on a CPU, whose memory holds other things too
_RESIDENT_SHARE = 0.5  # of an accelerator's memory
# Of a process at a time. Read ahead, shifted and in use, rows take five chunks of memory, and four
# batches of a reader are the bound (spec section 10).
_CHUNK_ROWS = BATCH_ROWS // 2
_ORIGIN_ROWS = 4096
_FEWEST = 8  # rows to a shard


class Chunk(NamedTuple):
    """Rows of every process at once, an equal share of them in each shard, then padding."""

    index: int
    first: int  # position of this process's first row
    count: int  # rows of this process
    x: Float32[Array, "s d"]  # X[s_(data,fsdp), d], shifted or scaled to length 1
    valid: Int32[Array, " r"]  # rows of each shard that are not padding


@dataclass(frozen=True, kw_only=True, eq=False)
class DeviceRows:
    """How the rows of a set lie on a mesh. Made by `device_rows`.

    Attributes:
      ranges: positions [start, stop) that each reading process holds, in order.
      shards: numbers of the row shards (of the mesh) that each of them fills.
      mine: which of them this process reads.
      shard_rows: rows of one shard in one chunk, padding included; a power of two.
      shift: subtracted from every row: far from the origin products cancel (spec section 16).
      unit: rows are scaled to length 1.
      resident: the chunks stay on the devices after the first pass.
      stop: asked between two chunks of a single process; of several, only between two passes.
    """

    x: EmbeddingSet = field(repr=False)
    mesh: Mesh
    ranges: tuple[tuple[int, int], ...]
    shards: tuple[tuple[int, ...], ...]
    mine: int
    shard_rows: int
    shift: Float32[np.ndarray, " d"] = field(repr=False)
    unit: bool
    resident: bool
    stop: Callable[[], bool] | None = None
    _kept: list[Chunk] = field(default_factory=list, repr=False)

    @property
    def local_shards(self) -> int:
        """Row shards of this process; all processes have as many."""
        return len(self.shards[0])

    @property
    def batch(self) -> int:
        """Rows of one process in a chunk."""
        return self.local_shards * self.shard_rows

    @property
    def chunk_count(self) -> int:
        """Chunks in a pass, as many on all processes."""
        return max(-(-(stop - start) // self.batch) for start, stop in self.ranges)

    def rows_in(self, reader: int, index: int) -> int:
        """How many rows a process has in a chunk."""
        start, stop = self.ranges[reader]
        return min(max(stop - start - index * self.batch, 0), self.batch)

    def chunks(self) -> Iterator[Chunk]:
        """All rows once.

        Raises:
          Stopped: `stop()` was true.
        """
        kept = []
        for chunk in self._kept or self._transferred():
            if self.stop is not None and jax.process_count() == 1 and self.stop():
                raise Stopped
            yield chunk
            if self.resident and not self._kept:
                kept.append(chunk)
        self._kept.extend(kept)

    def collect(self, out: Shaped[Array, "s"], count: int) -> Shaped[np.ndarray, " m"]:
        """The values of this process's `count` rows from an array [s_(data,fsdp)] of a chunk."""
        pieces = {piece.index[0].start or 0: piece.data for piece in out.addressable_shards}
        each = -(-count // self.local_shards)
        parts = [np.asarray(pieces[start])[:each] for start in sorted(pieces)]
        return np.concatenate(parts)[:count]

    def join(self, own: Shaped[np.ndarray, "m *rest"]) -> Shaped[np.ndarray, "n *rest"]:
        """What each process has of its rows, as long as it likes -> all of it, on every process."""
        if len(self.ranges) == 1:
            return own
        told = multihost_utils.process_allgather(np.asarray((self.mine, len(own)), np.int32))
        padded = np.zeros((told[:, 1].max(), *own.shape[1:]), own.dtype)
        padded[: len(own)] = own
        with jax.enable_x64(True):  # or it would make float32 of float64
            parts = multihost_utils.process_allgather(padded)
        found = {reader: part[:count] for (reader, count), part in zip(told.tolist(), parts)}
        return np.concatenate([found[reader] for reader in range(len(self.ranges))])

    def vectors(self, positions: Int64[np.ndarray, " m"]) -> Float32[np.ndarray, "m d"]:
        """Some rows, scaled to length 1 if all are; not shifted."""
        rows = self.x.take(positions)
        return unit_rows(rows) if self.unit else rows

    def _transferred(self) -> Iterator[Chunk]:
        sharding = batch_sharding(self.mesh)
        each = np.arange(self.local_shards, dtype=np.int32)
        for index, block in enumerate(self._read()):
            first, count = self.ranges[self.mine][0] + index * self.batch, len(block)
            share = -(-count // self.local_shards)
            if count < self.batch:
                padded = np.zeros((self.local_shards, self.shard_rows, self.x.dim), np.float32)
                for shard in range(self.local_shards):
                    part = block[shard * share : (shard + 1) * share]
                    padded[shard, : len(part)] = part
                block = padded.reshape(self.batch, self.x.dim)
            x = jax.make_array_from_process_local_data(sharding, block)
            if self.unit or self.shift.any():
                x = _prepare(x, self.shift, self.unit)
            valid = np.clip(count - each * share, 0, share).astype(np.int32)
            valid = jax.make_array_from_process_local_data(sharding, valid)
            yield Chunk(index, first, count, x, valid)

    def _read(self) -> Iterator[Float32[np.ndarray, "m d"]]:
        start, stop = self.ranges[self.mine]
        read = 0
        for _, block in self.x.blocks(self.batch, start, stop):
            read += 1
            yield block
        for _ in range(read, self.chunk_count):  # another process has more
            yield np.zeros((0, self.x.dim), np.float32)


@partial(jax.jit, static_argnums=2)
def _prepare(
    x: Float32[Array, "s d"], shift: Float32[np.ndarray | Array, " d"], unit: bool
) -> Float32[Array, "s d"]:
    if not unit:
        return x - shift[None]
    norms = jnp.sqrt(jnp.sum(x * x, axis=1, keepdims=True))
    return x / jnp.where(norms > 0, norms, 1)  # padding is zero


def unit_rows(rows: Float32[np.ndarray, "m d"]) -> Float32[np.ndarray, "m d"]:
    """Rows scaled to length 1; zero rows stay."""
    norms = np.sqrt(np.einsum("md,md->m", rows, rows, dtype=np.float64))[:, None]
    return (rows / np.where(norms > 0, norms, 1)).astype(np.float32)


def device_rows(
    x: EmbeddingSet,
    mesh: Mesh | None,
    shift: Float32[np.ndarray, " d"] | None = None,
    unit: bool = False,
    stop: Callable[[], bool] | None = None,
) -> DeviceRows:
    """Share the rows of a set out among the processes and devices of a mesh (None: all devices).

    Up to 32,768 rows of a process are in a chunk. Its size is a power of two, so that sets of about
    the same size share their compiled programs; loops end with the rows, not with the padding.
    """
    mesh = make_mesh(data=-1, fsdp=1) if mesh is None else mesh
    owners = [
        min(device.process_index for device in shard)  # along `tensor` several hold the same rows
        for shard in mesh.devices.reshape(batch_shards(mesh), -1)
    ]
    readers = sorted(set(owners))
    shards = tuple(tuple(i for i, o in enumerate(owners) if o == reader) for reader in readers)
    here = batch_sharding(mesh).addressable_devices_indices_map((len(owners),))
    held = {index[0].indices(len(owners))[0] for index in here.values()}
    n, count = len(x), len(readers)
    ranges = tuple((n * i // count, n * (i + 1) // count) for i in range(count))
    local = len(shards[0])
    most = max(_CHUNK_ROWS // local, _FEWEST)
    needed = max(-(-max(stop - start for start, stop in ranges) // local), _FEWEST)
    shard_rows = min(1 << (needed - 1).bit_length(), 1 << (most.bit_length() - 1))
    device = mesh.local_devices[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    limit = _RESIDENT_SHARE * stats["bytes_limit"] * local if stats else _HOST_RESIDENT
    return DeviceRows(
        x=x,
        mesh=mesh,
        ranges=ranges,
        shards=shards,
        mine=next(reader for reader, own in enumerate(shards) if held & set(own)),
        shard_rows=shard_rows,
        shift=np.zeros(x.dim, np.float32) if shift is None else shift,
        unit=unit,
        resident=4 * x.dim * max(stop - start for start, stop in ranges) <= limit,
        stop=stop,
    )


def origin(x: EmbeddingSet) -> Float32[np.ndarray, " d"]:
    """What to subtract from all rows before products: the mean of the first ones.

    Rows around 1000 with a spread of 0.01 have distances of 0.02, with an error of 0.3 otherwise.
    Any point among them will do; reading more of a set on a disk would cost more than it gives.
    """
    _, block = next(iter(x.blocks(_ORIGIN_ROWS, 0, _ORIGIN_ROWS)))
    return block.mean(axis=0, dtype=np.float64).astype(np.float32)
