"""iBOT: the student predicts the teacher's prototype assignment of masked patches (spec 3.4).

    L = -(1 / crops) sum_m w_m <q_m, log softmax(z_m / student_temp)>
w_m = 1 / (masked patches of the crop of m), and `crops` counts all global crops, unmasked ones too.
Called by `objectives`.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dinojax.kernels.prototypes import (
    Scalar,
    Targets,
    cross_entropy_terms,
    default_chunk,
    product,
    target_probabilities,
)


def ibot_loss(
    student: Float[Array, "m bt"],
    targets: Targets,
    weights: Float[Array, " m"],
    prototypes: Float[Array, "k bt"],
    crops: int,
    student_temp: Scalar = 0.1,
    chunk: int | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, ""]:
    """Loss of masked patches' bottleneck features; row m of the targets belongs to row m.

    For a micro-batch `crops` is the number of its global crops. A slot of weight 0 does not count.
    """
    rows, K = 2 * student.shape[0], prototypes.shape[0]
    chunk = default_chunk(rows, K) if chunk is None else chunk
    if chunk >= K:
        logits = product(student, prototypes, dtype)
        probs = target_probabilities(targets, dtype)
        return ibot_loss_from_logits(logits, probs, weights, crops, student_temp)
    lse, contracted = cross_entropy_terms(student, targets, prototypes, student_temp, chunk, dtype)
    dots = (student.astype(jnp.float32) * contracted).sum(axis=-1)
    return (weights * (lse - dots / student_temp)).sum() / crops


def ibot_loss_from_logits(
    student_logits: Float[Array, "m k"],
    teacher_probs: Float[Array, "m k"],
    weights: Float[Array, " m"],
    crops: int,
    student_temp: Scalar = 0.1,
) -> Float[Array, ""]:
    """The same loss from tables of logits and target probabilities."""
    log_p = jax.nn.log_softmax(student_logits.astype(jnp.float32) / student_temp)
    cross_entropy = -(jax.lax.stop_gradient(teacher_probs) * log_p).sum(axis=-1)
    return (weights * cross_entropy).sum() / crops
