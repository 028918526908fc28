"""Targets from teacher logits: Sinkhorn-Knopp, or softmax of centred logits (spec 3.2).

Both give potentials, one number per prototype and one per row, from which any chunk of the target
probabilities q_mk = exp(z_mk / temp + prototypes_k + rows_m) can be made (`kernels/prototypes.py`).
Rows are all rows of the global batch, on whatever devices they lie: only sums over rows cross
devices. All float32, in the log domain; matmul inputs are of the given dtype.
Called by `objectives`.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dinojax.kernels.prototypes import (
    Potentials,
    Scalar,
    chunk_logits,
    default_chunk,
    product,
    scan_chunks,
)


def sinkhorn(logits: Float[Array, "m k"], temp: Scalar, iterations: int = 3) -> Float[Array, "m k"]:
    """Sinkhorn-Knopp on a table: rows sum to 1, prototypes are used about equally.

    Q = exp(z / temp); repeat { divide each column by its sum; divide each row by its sum }. The
    constant factors of the reference (K, number of rows, total) cancel in the last division.
    """
    z = logits.astype(jnp.float32) / temp
    column, rows = _table_potentials(z, iterations)
    return jnp.exp(z + column[None, :] + rows[:, None])


def sinkhorn_potentials(
    bottleneck: Float[Array, "m b"],
    prototypes: Float[Array, "k b"],
    temp: Scalar,
    iterations: int = 3,
    chunk: int | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Potentials:
    """Sinkhorn-Knopp on z = bottleneck prototypes^T, whose table is kept only if it is small.

    Otherwise each iteration is one pass over chunks of the prototypes: a chunk holds whole columns,
    so their sums are complete, and its part of the row sums is added to that of earlier chunks.
    """
    _check(iterations)
    rows, K = bottleneck.shape[0], prototypes.shape[0]
    chunk = default_chunk(rows, K) if chunk is None else chunk
    x, w = jax.lax.stop_gradient((bottleneck.astype(dtype), prototypes))
    if chunk >= K:
        return _table_potentials(product(x, w, dtype) / temp, iterations)

    def iteration(_, potentials):
        def body(row_sums, chunks):
            column, part = _normalise(chunk_logits(x, chunks[0], dtype) / temp, potentials.rows)
            return jnp.logaddexp(row_sums, part), column

        row_sums, columns = scan_chunks(body, jnp.full(rows, -jnp.inf), (w,), chunk)
        return Potentials(columns, -row_sums)

    return jax.lax.fori_loop(0, iterations, iteration, _start(rows, K))


def centering_potentials(
    bottleneck: Float[Array, "m b"],
    prototypes: Float[Array, "k b"],
    center: Float[Array, " k"],
    temp: Scalar,
    chunk: int | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Potentials:
    """The targets of DINO v1 and v2: q = softmax((z - center) / temp)."""
    rows, K = bottleneck.shape[0], prototypes.shape[0]
    chunk = default_chunk(rows, K) if chunk is None else chunk
    x, w = jax.lax.stop_gradient((bottleneck.astype(dtype), prototypes))
    column = -center / temp

    def body(row_sums, chunks):
        w_chunk, part = chunks
        z = chunk_logits(x, w_chunk, dtype) / temp + part[None, :]
        return jnp.logaddexp(row_sums, jax.nn.logsumexp(z, axis=1)), None

    row_sums, _ = scan_chunks(body, jnp.full(rows, -jnp.inf), (w, column), chunk)
    return Potentials(column, -row_sums)


def updated_center(
    bottleneck: Float[Array, "m b"],
    prototypes: Float[Array, "k b"],
    center: Float[Array, " k"],
    momentum: float = 0.9,
) -> Float[Array, " k"]:
    """center <- momentum center + (1 - momentum) mean of z over rows, for the next step."""
    mean = bottleneck.astype(jnp.float32).mean(axis=0, keepdims=True)
    # the mean of the logits is the logits of the mean: no table
    new = momentum * center + (1 - momentum) * product(mean, prototypes)[0]
    return jax.lax.stop_gradient(new)


def _table_potentials(z: Array, iterations: int) -> Potentials:
    _check(iterations)

    def iteration(_, potentials):
        column, row_sums = _normalise(z, potentials.rows)
        return Potentials(column, -row_sums)

    return jax.lax.fori_loop(0, iterations, iteration, _start(*z.shape))


def _normalise(z: Array, rows: Array) -> tuple[Array, Array]:
    # z [m, chunk]: the new column potentials, and the log of the row sums that they leave
    column = -jax.nn.logsumexp(z + rows[:, None], axis=0)
    return column, jax.nn.logsumexp(z + column[None, :], axis=1)


def _start(rows: int, K: int) -> Potentials:
    return Potentials(jnp.zeros(K, jnp.float32), jnp.zeros(rows, jnp.float32))


def _check(iterations: int) -> None:
    if iterations < 1:
        raise ValueError(f"sinkhorn iterations = {iterations}: expected 1 or more (3 is usual)")
