"""Where k-means starts: greedy k-means++.

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
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Float64, Int64

from data_curation.checkpoints import Checkpoints, stopping
from data_curation.device_rows import DeviceRows, device_rows, origin
from data_curation.embeddings import EmbeddingSet, as_embeddings
from data_curation.files import Stopped
from data_curation.places import blocks_by_row, collect, place, positions
from data_curation.seeding_device import programs, zeros

_POOL = 256  # most candidates drawn at once; pools have trials x 1, 2, 4, ..
_BLOCK = 2048  # rows whose D is one number in the search for candidates
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
            ending = stopping(stop, rows.mesh)
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
    d, sums, _, _ = programs(rows.mesh).compare(d, weight, pool.distances, picks, pool.places)
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
    compare = programs(rows.mesh).compare
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
    device = programs(rows.mesh)
    width = len(rows.ranges) * rows.batch
    distances = spent
    if spent is None or len(spent) != len(positions):
        distances = zeros(rows.mesh, (len(positions), rows.chunk_count, width))()
    for chunk in rows.chunks():
        distances = device.fill(distances, chunk.x, chunk.valid, candidates, np.int32(chunk.index))
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
    device = programs(rows.mesh)
    block = min(_BLOCK, rows.shard_rows)
    sums = np.asarray(device.block_sums(d, weight, block)).reshape(-1)
    order = blocks_by_row(rows, block)
    ends = np.cumsum(sums[order])
    wanted = np.maximum(draws * total, np.nextafter(0, 1))  # never before the first row with D > 0
    at = np.minimum(np.searchsorted(ends, wanted), np.flatnonzero(sums[order])[-1])
    blocks = order[at]
    values = np.asarray(device.take_blocks(d, weight, blocks, block), np.float64)
    inside = np.empty(len(draws), np.int64)
    for i, row in enumerate(values[:, 0] * values[:, 1]):
        rest = wanted[i] - (ends[at[i]] - sums[blocks[i]])
        inside[i] = min(np.searchsorted(np.cumsum(row), rest), np.flatnonzero(row)[-1])
    places = blocks * block + inside
    drawn = values[np.arange(len(draws)), 0, inside].astype(np.float32)
    return places, positions(rows, places), drawn


def _place_weights(
    rows: DeviceRows, weights: Float32[np.ndarray, " n"] | None
) -> Float32[Array, "t s"]:
    """Weights as D lies; 1 for every row if there are none, 0 for padding."""
    start, stop = rows.ranges[rows.mine]
    own = np.ones(stop - start, np.float32) if weights is None else weights[start:stop]
    return place(rows, own)


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
    checkpoints.save(len(state.indices), tree, arrays, own={"d": collect(rows, state.d)})


def _restore(
    rows: DeviceRows, rng: np.random.Generator, checkpoints: Checkpoints | None
) -> _State | None:
    found = checkpoints.load() if checkpoints else None
    if found is None:
        return None
    tree, arrays = found
    rng.bit_generator.state = tree["rng"]
    indices, potentials = arrays["indices"].tolist(), arrays["potentials"].tolist()
    return _State(indices, potentials, place(rows, arrays["d"]), None)
