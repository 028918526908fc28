"""Where k-means starts: greedy k-means++, k-means|| for large k, or rows at random.

Called by `kmeans`. Section 4 of the curation spec. A round of greedy k-means++ draws a few
candidate rows with probability in proportion to D, the squared distance to the nearest centre so
far, and keeps the one that lowers the sum of D most.

Reading all rows in every round would take as long as the memory does: 26 ms at 200,000 x 384 on two
CPU cores, 26 s for 1000 centres. So a pool of candidates is drawn at once, and their distances to
all rows are one product. As D falls, a candidate drawn from the older D counts with probability
D now / D then, which makes it a draw from D now, exactly. A pool for one round needs no such test
and is the rule as it is written; injected random numbers use that.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Float32, Float64, Int32, Int64

from data_curation.checkpoints import Checkpoints, stopping
from data_curation.device_rows import DeviceRows, device_rows, origin
from data_curation.embeddings import EmbeddingSet, as_embeddings
from data_curation.files import Stopped
from data_curation.lloyd import lloyd_pass
from dinojax.sharding import BATCH

INITS = ("kmeans++", "kmeans||", "random")
_POOL = 256  # most candidates drawn at once; pools have trials x 1, 2, 4, ..
_BLOCK = 2048  # rows whose D is one number in the search for candidates
_FILL_ROWS = 512  # rows multiplied with a pool at a time, so that the product stays in the cache
# |x|^2 + |y|^2 - 2 x.y of equal rows is not quite 0: below this share of the first two it counts as
# 0. (Largest for equal rows of up to 4096 numbers: 3.4e-7.)
_ROUNDING = 1e-6
_ROUNDS, _OVERSAMPLING = 5, 2  # of k-means||
_SAVE_EVERY = 1024  # centres

Seeds = tuple[Int64[np.ndarray, " c"], Float64[np.ndarray, " c"]]


def kmeans_plusplus(
    x: Float[np.ndarray, "n d"] | Float[Array, "n d"] | EmbeddingSet,
    k: int,
    *,
    seed: int = 0,
    n_trials: int | None = None,
    first: int | None = None,
    uniforms: Float[np.ndarray, "rounds trials"] | None = None,
    mesh: Mesh | None = None,
) -> Seeds:
    """Positions of k starting centres and the sum of D after each; fewer if D falls to 0.

    Args:
      n_trials: candidates in a round; None: 2 + floor(ln k).
      first: the first centre; None: any row.
      uniforms: numbers in [0, 1), one for every candidate, instead of random ones.

    Raises:
      ValueError: k, `first` or the shape of `uniforms` is impossible.
    """
    x = as_embeddings(x)
    k = checked_k(k, len(x))
    if first is not None and not 0 <= first < len(x):
        raise ValueError(f"first is {first}; expected a row from 0 to {len(x) - 1}")
    trials = trials_for(k) if n_trials is None else n_trials
    if trials < 1:
        raise ValueError(f"n_trials is {n_trials}; expected 1 or more")
    if uniforms is not None and (len(uniforms) < k - 1 or uniforms.shape[1] != trials):
        raise ValueError(
            f"uniforms are {list(uniforms.shape)}; expected [{k - 1}, {trials}] for k = {k}"
        )
    rows = device_rows(x, mesh, origin(x))
    return greedy(rows, k, np.random.default_rng(seed), trials, first, uniforms)


def seed_rows(
    rows: DeviceRows,
    k: int,
    init: str,
    rng: np.random.Generator,
    checkpoints: Checkpoints | None = None,
    stop: Callable[[], bool] | None = None,
) -> Int64[np.ndarray, " c"]:
    """Positions of k (or, of fewer distinct rows, fewer) starting centres by a rule of INITS."""
    if init == "random":
        return np.sort(rng.choice(len(rows.x), k, replace=False)).astype(np.int64)
    if init == "kmeans||":
        return parallel(rows, k, rng)
    return greedy(rows, k, rng, trials_for(k), checkpoints=checkpoints, stop=stop)[0]


def checked_k(k: int, n: int) -> int:
    """min(k, n); ValueError unless k is positive."""
    if k < 1:
        raise ValueError(f"k is {k}; expected 1 or more clusters")
    return min(k, n)


def trials_for(k: int) -> int:
    """Candidates in a round: 2 + floor(ln k)."""
    return 2 + int(np.log(k))


class _State(NamedTuple):
    """The centres so far, the sum of D after each, and D of all rows."""

    indices: list[int]
    potentials: list[float]
    d: Float32[Array, "t s"]  # D[t, s_(data,fsdp)]: chunk, then place in it
    spent: Float32[Array, "m t s"] | None  # distances of a used pool, to be overwritten


class _Pool(NamedTuple):
    """Candidates: their places in D, their D when drawn, their distances to all rows."""

    places: Int64[np.ndarray, " m"]
    positions: Int64[np.ndarray, " m"]
    drawn: Float32[np.ndarray, " m"]
    distances: Float32[Array, "m t s"]


@dataclass(frozen=True, eq=False)
class _Programs:
    """What runs on the devices, for the rows of one mesh. Sums are float64."""

    fill: Callable[..., Array]
    compare: Callable[..., tuple[Array, ...]]
    block_sums: Callable[..., Array]
    take_blocks: Callable[..., Array]


def greedy(
    rows: DeviceRows,
    k: int,
    rng: np.random.Generator,
    trials: int,
    first: int | None = None,
    uniforms: Float[np.ndarray, "rounds trials"] | None = None,
    weights: Float32[np.ndarray, " n"] | None = None,
    checkpoints: Checkpoints | None = None,
    stop: Callable[[], bool] | None = None,
) -> Seeds:
    """Greedy k-means++ (`kmeans_plusplus`), of rows with weights if given.

    Raises:
      Stopped: `stop()` was true, after a checkpoint.
    """
    with jax.enable_x64(True):
        weight = _place_weights(rows, weights)
        state = _restore(rows, rng, checkpoints)
        if state is None:
            if first is None:
                first = _draw_row(rng, len(rows.x), weights)
            state = _begin(rows, first, weight, trials)
        saved = len(state.indices)
        while len(state.indices) < k and state.potentials[-1] > 0:
            state = _use_pool(rows, state, weight, k, trials, rng, uniforms)
            ending = stopping(stop)
            if checkpoints and (ending or len(state.indices) - saved >= _SAVE_EVERY):
                saved = len(state.indices)
                _save(rows, state, rng, checkpoints)
            if ending:
                raise Stopped(f"after {len(state.indices)} of {k} starting centres")
    return np.asarray(state.indices, np.int64), np.asarray(state.potentials)


def _begin(rows: DeviceRows, first: int, weight: Float32[Array, "t s"], trials: int) -> _State:
    """One centre. It is compared `trials` times, for the shapes of the rounds to come."""
    same = np.full(trials, first)
    pool = _pool(rows, None, np.zeros(trials, np.int64), same, np.zeros(trials, np.float32))
    d = jnp.full_like(weight, jnp.finfo(jnp.float32).max)
    picks = np.zeros(trials, np.int32)
    d, sums, _, _ = _programs(rows.mesh).compare(d, weight, pool.distances, picks, pool.places)
    return _State([first], [float(sums[0])], d, pool.distances)


def _use_pool(
    rows: DeviceRows,
    state: _State,
    weight: Float32[Array, "t s"],
    k: int,
    trials: int,
    rng: np.random.Generator,
    uniforms: Float[np.ndarray, "rounds trials"] | None,
) -> _State:
    """Draw a pool and add centres from it until it is used up."""
    done = len(state.indices)
    if uniforms is None:
        size = trials
        # Not more than there are centres, or D changes under it; nor more numbers than the rows.
        while 2 * size <= min(_POOL, rows.x.dim, trials * done):
            size *= 2
        draws, tests = rng.random((2, size))
    else:
        draws, tests = uniforms[done - 1], np.zeros(trials)
    pool = _pool(rows, state.spent, *_locate(rows, state.d, weight, state.potentials[-1], draws))
    compare = _programs(rows.mesh).compare
    indices, potentials, d = list(state.indices), list(state.potentials), state.d
    now, following = pool.drawn, 0
    while len(indices) < k and potentials[-1] > 0:
        picks = []
        while len(picks) < trials and following < len(draws):
            if tests[following] * pool.drawn[following] < now[following]:
                picks.append(following)
            following += 1
        if len(picks) < trials:
            break
        d, sums, best, now = compare(
            d, weight, pool.distances, np.asarray(picks, np.int32), pool.places
        )
        sums, best, now = map(np.asarray, (sums, best, now))
        indices.append(int(pool.positions[picks[int(best)]]))
        potentials.append(float(sums[int(best)]))
    return _State(indices, potentials, d, pool.distances)


def _pool(
    rows: DeviceRows,
    spent: Float32[Array, "m_before t s"] | None,
    places: Int64[np.ndarray, " m"],
    positions: Int64[np.ndarray, " m"],
    drawn: Float32[np.ndarray, " m"],
) -> _Pool:
    """Distances of the rows at these positions to all rows, by one product for each chunk."""
    candidates = rows.vectors(positions) - rows.shift[None]
    programs = _programs(rows.mesh)
    width = len(rows.ranges) * rows.batch
    distances = spent
    if spent is None or len(spent) != len(positions):
        distances = _zeros(rows.mesh, (len(positions), rows.chunk_count, width))()
    for chunk in rows.chunks():
        distances = programs.fill(
            distances, chunk.x, chunk.valid, candidates, np.int32(chunk.index)
        )
        if not rows.resident:  # or a fast reader fills the memory
            distances.block_until_ready()
    return _Pool(places, positions, drawn, distances)


def _locate(
    rows: DeviceRows,
    d: Float32[Array, "t s"],
    weight: Float32[Array, "t s"],
    total: float,
    draws: Float64[np.ndarray, " m"],
) -> tuple[Int64[np.ndarray, " m"], Int64[np.ndarray, " m"], Float32[np.ndarray, " m"]]:
    """For each u the first row up to which D adds up to u times its sum: (place, position, D)."""
    programs = _programs(rows.mesh)
    block = min(_BLOCK, rows.shard_rows)
    sums = np.asarray(programs.block_sums(d, weight, block)).reshape(-1)
    order = _blocks_by_row(rows, block)
    ends = np.cumsum(sums[order])
    wanted = np.maximum(draws * total, np.nextafter(0, 1))  # never before the first row with D > 0
    at = np.minimum(np.searchsorted(ends, wanted), np.flatnonzero(sums[order])[-1])
    blocks = order[at]
    values = np.asarray(programs.take_blocks(d, weight, blocks, block), np.float64)
    inside = np.empty(len(draws), np.int64)
    for i, row in enumerate(values[:, 0] * values[:, 1]):
        rest = wanted[i] - (ends[at[i]] - sums[blocks[i]])
        inside[i] = min(np.searchsorted(np.cumsum(row), rest), np.flatnonzero(row)[-1])
    places = blocks * block + inside
    drawn = values[np.arange(len(draws)), 0, inside].astype(np.float32)
    return places, _positions(rows, places), drawn


def _blocks_by_row(rows: DeviceRows, block: int) -> Int64[np.ndarray, " blocks"]:
    """Blocks of D (flattened) in the order of their rows: by process, chunk, shard."""
    each = rows.shard_rows // block
    shape = (rows.chunk_count, len(rows.ranges) * rows.local_shards, each)
    numbers = np.arange(np.prod(shape)).reshape(shape)
    return np.concatenate([numbers[:, list(shards)].reshape(-1) for shards in rows.shards])


def _positions(rows: DeviceRows, places: Int64[np.ndarray, " m"]) -> Int64[np.ndarray, " m"]:
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


def _place_weights(
    rows: DeviceRows, weights: Float32[np.ndarray, " n"] | None
) -> Float32[Array, "t s"]:
    """Weights as D lies; 1 for every row if there are none, 0 for padding."""
    start, stop = rows.ranges[rows.mine]
    own = np.ones(stop - start, np.float32) if weights is None else weights[start:stop]
    return _place(rows, own)


def _place(rows: DeviceRows, own: Float32[np.ndarray, " m"]) -> Float32[Array, "t s"]:
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


def _collect(rows: DeviceRows, d: Float32[Array, "t s"]) -> Float32[np.ndarray, " m"]:
    """The inverse of `_place`."""
    counts = [rows.rows_in(rows.mine, index) for index in range(rows.chunk_count)]
    return np.concatenate([rows.collect(d[i], count) for i, count in enumerate(counts)])


def _draw_row(rng: np.random.Generator, n: int, weights: Float32[np.ndarray, " n"] | None) -> int:
    if weights is None:
        return int(rng.integers(n))
    ends = np.cumsum(weights, dtype=np.float64)
    return min(int(np.searchsorted(ends, rng.random() * ends[-1], "right")), n - 1)


def _save(
    rows: DeviceRows, state: _State, rng: np.random.Generator, checkpoints: Checkpoints
) -> None:
    arrays = {"indices": np.asarray(state.indices), "potentials": np.asarray(state.potentials)}
    tree = {"rng": rng.bit_generator.state}
    checkpoints.save(len(state.indices), tree, arrays, own={"d": _collect(rows, state.d)})


def _restore(
    rows: DeviceRows, rng: np.random.Generator, checkpoints: Checkpoints | None
) -> _State | None:
    found = checkpoints.load() if checkpoints else None
    if found is None:
        return None
    tree, arrays = found
    rng.bit_generator.state = tree["rng"]
    indices, potentials = arrays["indices"].tolist(), arrays["potentials"].tolist()
    return _State(indices, potentials, _place(rows, arrays["d"]), None)


@lru_cache
def _zeros(mesh: Mesh, shape: tuple[int, int, int]) -> Callable[[], Array]:
    sharding = NamedSharding(mesh, PartitionSpec(None, None, *BATCH))
    return jax.jit(partial(jnp.zeros, shape, jnp.float32), out_shardings=sharding)


@lru_cache
def _programs(mesh: Mesh) -> _Programs:
    d = NamedSharding(mesh, PartitionSpec(None, *BATCH))
    whole = NamedSharding(mesh, PartitionSpec())
    # Within a shard, or blocks of rows would be gathered from all of them.
    pool = PartitionSpec(None, None, *BATCH)
    alike = PartitionSpec()
    specs = {"in_specs": (pool, BATCH, BATCH, alike, alike), "out_specs": pool}
    fill = jax.shard_map(_fill, mesh=mesh, **specs)
    return _Programs(
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


def parallel(rows: DeviceRows, k: int, rng: np.random.Generator) -> Int64[np.ndarray, " c"]:
    """k-means|| (Bahmani et al. 2012): rounds of many draws, then k-means++ of what was drawn.

    Each row is taken with probability min(1, 2k D / sum of D), five times over, and weighs as many
    rows as are nearest to it. For k of 100,000 and more, where one round for each centre is slow.
    """
    x, (start, stop) = rows.x, rows.ranges[rows.mine]
    chosen = np.asarray([rng.integers(len(x))], np.int64)
    d = _distances(rows, rows.vectors(chosen))
    found = [chosen]
    for number in range(1000):  # rounds after the fifth only where rows lie very unevenly
        total = rows.join(np.asarray([d.sum(dtype=np.float64)])).sum()
        if total == 0 or (number >= _ROUNDS and sum(map(len, found)) >= k):
            break
        uniform = np.random.default_rng(rng.integers(2**63)).bit_generator.advance(start)
        taken = np.random.Generator(uniform).random(stop - start) < _OVERSAMPLING * k * d / total
        chosen = rows.join(start + np.flatnonzero(taken))
        if len(chosen):
            d = np.minimum(d, _distances(rows, rows.vectors(chosen)))
            found.append(chosen)
    positions = np.unique(np.concatenate(found))
    if len(positions) <= k:
        return positions
    candidates = rows.vectors(positions)
    counts = lloyd_pass(rows, _padded(candidates), "l2").counts[: len(candidates)]
    weights = counts.astype(np.float32)
    few = device_rows(as_embeddings(candidates), rows.mesh, rows.shift)
    picked, _ = greedy(few, k, rng, trials_for(k), weights=weights)
    return positions[picked]


def _distances(rows: DeviceRows, centres: Float32[np.ndarray, "m d"]) -> Float32[np.ndarray, " r"]:
    """Squared distance of this process's rows to the nearest of some vectors."""
    parts = []
    lloyd_pass(
        rows,
        _padded(centres),
        "l2",
        visit=lambda c, _, away: parts.append(rows.collect(away, c.count)),
    )
    return np.concatenate(parts)


def _padded(centres: Float32[np.ndarray, "m d"]) -> Float32[np.ndarray, "p d"]:
    """Copies of the first behind them, to which no row goes: a power of two compiles once."""
    count = 1 << max(len(centres) - 1, 63).bit_length()
    return np.concatenate([centres, np.repeat(centres[:1], count - len(centres), axis=0)])
