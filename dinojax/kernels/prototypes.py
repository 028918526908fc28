"""Cross-entropy between bottleneck features and targets over K prototypes, in chunks of prototypes.

Logits are products of L2-normalised bottleneck features [n, b] with prototypes [K, b]. A float32
table [n, K] of them, its softmax and its gradient are what fills a device at K = 65,536 and more.
So nothing here holds one unless it is small (`default_chunk`): passes over the prototypes take a
chunk at a time, and the backward pass makes its tables anew. The target term needs no table either:
    sum_k q_mk <x_n, W_k> = <x_n, sum_k q_mk W_k>,
one contraction [m, b] per target row, whatever number of student rows is compared with it.
Prototypes are stored [K, b], so that a chunk of them is a view. Across devices they are sharded
over K in runs, and a chunk takes its share of every device's run, so that it alone is gathered when
its turn comes. (Neighbouring prototypes lie on few devices: for chunks of them the compiler
gathered the whole matrix at every chunk, 1.2 TB into each of 256 chips in a 7B step.) Called by
`losses`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float

from dinojax.sharding import gather_rows

Scalar = Float[ArrayLike, ""]
Carry = TypeVar("Carry")

# A float32 table of up to 2^23 entries is 32 MiB: below that, chunks only cost time.
SMALL_TABLE = 2**23


class Potentials(NamedTuple):
    """Targets without their table: q_mk = exp(z_mk / temp + prototypes_k + rows_m)."""

    prototypes: Float[Array, " k"]
    rows: Float[Array, " m"]


class Targets(NamedTuple):
    """All that is needed to make a chunk of target probabilities [m, K]. No gradient enters it."""

    bottleneck: Float[Array, "m bt"]
    prototypes: Float[Array, "k bt"]
    potentials: Potentials
    temp: Scalar


def default_chunk(rows: int, prototypes: int) -> int:
    """Prototypes per chunk: all of them where the table is small, else 512 to 4,096.

    4,096 keeps a matmul busy; many rows get fewer, so that a device's part of a chunk's table has
    at most 2^26 entries (down to 512). `rows` counts the whole array, sharded or not.
    """
    if rows * prototypes <= SMALL_TABLE:
        return prototypes
    mesh = jax.sharding.get_abstract_mesh()
    here = rows if mesh.empty else -(-rows // (mesh.shape["data"] * mesh.shape["fsdp"]))
    fitting = 1 << max(2**26 // here, 1).bit_length() - 1
    return min(max(fitting, 512), 4096, prototypes)


def product(
    x: Float[Array, "n b"], w: Float[Array, "k b"], dtype: DTypeLike = jnp.float32
) -> Float[Array, "n k"]:
    """Logits x W^T: inputs in `dtype`, sums and result in float32."""
    return _dot(x, w, 1, 1, dtype)


def chunk_logits(
    x: Float[Array, "n b"], w: Float[Array, "k b"], dtype: DTypeLike = jnp.float32
) -> Float[Array, "n k"]:
    """`product` with a chunk of prototypes that is first gathered; not to be differentiated."""
    return product(x, gather_rows(w.astype(dtype)), dtype)


def scan_chunks(
    body: Callable[[Carry, tuple], tuple[Carry, Array | None]],
    carry: Carry,
    arrays: tuple[Array, ...],
    chunk: int,
) -> tuple[Carry, Array | None]:
    """`lax.scan` over chunks of the leading axis; the last one may be shorter.

    `body` gets the chunks [chunk, ...] and gives carry and an output [chunk, ...] or None; outputs
    are joined to [K, ...] in the order of the inputs.
    """
    size = arrays[0].shape[0]
    whole = size // chunk
    outputs = []
    if whole:
        strided = _runs() > 1 and size % chunk == 0 and chunk % _runs() == 0
        cut = tuple(_cut(a[: whole * chunk], whole, chunk, strided) for a in arrays)
        carry, out = jax.lax.scan(body, carry, cut)
        outputs.append(None if out is None else _join(out, strided))
    if whole * chunk < size:
        carry, out = body(carry, tuple(a[whole * chunk :] for a in arrays))
        outputs.append(out)
    if outputs[0] is None:
        return carry, None
    return carry, outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs)


def _runs() -> int:
    """Into how many runs of K prototypes are split across devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["fsdp"] * mesh.shape["tensor"]


def _cut(a: Array, whole: int, chunk: int, strided: bool) -> Array:
    """[K, ...] -> [whole, chunk, ...]: neighbours, a view; strided: every whole-th from c on."""
    if strided:
        return a.reshape(chunk, whole, *a.shape[1:]).swapaxes(0, 1)
    return a.reshape(whole, chunk, *a.shape[1:])


def _join(out: Array, strided: bool) -> Array:
    """The inverse of `_cut`: [whole, chunk, ...] -> [K, ...]."""
    out = out.swapaxes(0, 1) if strided else out
    return out.reshape(out.shape[0] * out.shape[1], *out.shape[2:])


def target_probabilities(targets: Targets, dtype: DTypeLike = jnp.float32) -> Float[Array, "m k"]:
    """The table q [m, K] in float32, for problems small enough to hold it."""
    x, w, potentials, temp = jax.lax.stop_gradient(targets)
    return _probabilities(x, w, potentials.prototypes, potentials.rows, temp, dtype)


def cross_entropy_terms(
    student: Float[Array, "n b"],
    targets: Targets,
    prototypes: Float[Array, "k b"],
    temp: Scalar,
    chunk: int | None = None,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Float[Array, " n"], Float[Array, "m b"]]:
    """Two float32 terms that give the cross-entropy of any student row n with any target row m:

        -sum_k q_mk log softmax(x_n W^T / temp)_k = lse_n - <x_n, contracted_m> / temp

    lse_n = log sum_k exp(<x_n, W_k> / temp), contracted_m = sum_k q_mk W_k (each q row sums to 1).
    One pass over the prototypes forward, one backward (the gradient of W is written once, chunk by
    chunk). Gradients flow to `student` and `prototypes`, none to the targets.
    """
    if chunk is None:
        chunk = default_chunk(student.shape[0] + targets.bottleneck.shape[0], prototypes.shape[0])
    targets = jax.lax.stop_gradient(targets)
    return _terms(student, targets, prototypes, temp, chunk, jnp.dtype(dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _terms(student, targets, prototypes, temp, chunk, dtype):
    x = student.astype(dtype)

    def body(carry, chunks):
        lse, contracted = carry
        w, target_w, column = _gathered(chunks, dtype)
        lse = jnp.logaddexp(lse, jax.nn.logsumexp(product(x, w, dtype) / temp, axis=1))
        contracted += _dot(_chunk_of(targets, target_w, column, dtype), w, 1, 0, dtype)
        return (lse, contracted), None

    n, m, b = student.shape[0], targets.bottleneck.shape[0], prototypes.shape[1]
    start = (jnp.full(n, -jnp.inf, jnp.float32), jnp.zeros((m, b), jnp.float32))
    terms, _ = scan_chunks(body, start, _chunked(prototypes, targets), chunk)
    return terms


def _terms_forward(student, targets, prototypes, temp, chunk, dtype):
    terms = _terms(student, targets, prototypes, temp, chunk, dtype)
    return terms, (student, targets, prototypes, temp, terms[0])


def _terms_backward(chunk, dtype, kept, cotangents):
    student, targets, prototypes, temp, lse = kept
    lse_bar, contracted_bar = cotangents
    x, scale = student.astype(dtype), lse_bar / temp

    def body(x_bar, chunks):
        w, target_w, column = _gathered(chunks, dtype)
        # d lse_n / d z_nk = p_nk: the softmax, already multiplied by what arrives at row n
        p = jnp.exp(product(x, w, dtype) / temp - lse[:, None]) * scale[:, None]
        q = _chunk_of(targets, target_w, column, dtype)
        w_bar = _dot(p, x, 0, 0, dtype) + _dot(q, contracted_bar, 0, 0, dtype)
        return x_bar + _dot(p, w, 1, 0, dtype), w_bar

    start = jnp.zeros(student.shape, jnp.float32)
    x_bar, w_bar = scan_chunks(body, start, _chunked(prototypes, targets), chunk)
    return x_bar.astype(student.dtype), None, w_bar.astype(prototypes.dtype), None


_terms.defvjp(_terms_forward, _terms_backward)


def _gathered(chunks: tuple[Array, Array, Array], dtype: DTypeLike) -> tuple[Array, ...]:
    """A chunk whole on every device, in the dtype of the products."""
    w, target_w, column = chunks
    return gather_rows(w.astype(dtype)), gather_rows(target_w.astype(dtype)), column


def _chunked(prototypes: Array, targets: Targets) -> tuple[Array, Array, Array]:
    return prototypes, targets.prototypes, targets.potentials.prototypes


def _chunk_of(targets: Targets, w: Array, column: Array, dtype: DTypeLike) -> Array:
    rows = targets.potentials.rows
    return _probabilities(targets.bottleneck, w, column, rows, targets.temp, dtype)


def _probabilities(x, w, column, rows, temp, dtype):
    return jnp.exp(product(x, w, dtype) / temp + column[None, :] + rows[:, None])


def _dot(a: Array, b: Array, contract_a: int, contract_b: int, dtype: DTypeLike) -> Array:
    # float32 inputs ask for true float32: the default is TF32 on GPU and bfloat16 on TPU
    exact = jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None
    return jax.lax.dot_general(
        a.astype(dtype),
        b.astype(dtype),
        (((contract_a,), (contract_b,)), ((), ())),
        precision=exact,
        preferred_element_type=jnp.float32,
    )
