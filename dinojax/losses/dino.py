"""DINO: student views predict the teacher's prototype assignment of the global views (spec 3.3).

    L = -mean over (image, student view s, teacher view t) of <q_t, log softmax(z_s / student_temp)>
Called by `objectives` for the CLS token, with features image-major: all views of image 0 first.
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


def dino_losses(
    student: Float[Array, "b v bt"],
    targets: Targets,
    prototypes: Float[Array, "k bt"],
    student_temp: Scalar = 0.1,
    ignore_diagonal: bool = True,
    global_views: int = 2,
    chunk: int | None = None,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(global, local) loss of the first `global_views` and of the other student views, unweighted.

    `student` are bottleneck features; the targets' rows are `b t` image-major, t teacher views per
    image. `ignore_diagonal` leaves out the pairs of the same global view. Without local views the
    local loss is 0.
    """
    b, v = student.shape[:2]
    x = student.reshape(b * v, -1)  # b v bt -> bv bt
    rows, K = x.shape[0] + targets.bottleneck.shape[0], prototypes.shape[0]
    chunk = default_chunk(rows, K) if chunk is None else chunk
    if chunk >= K:
        logits = product(x, prototypes, dtype).reshape(b, v, K)
        probs = target_probabilities(targets, dtype).reshape(b, -1, K)
        pairs = _pairs(logits, probs, student_temp)
    else:
        lse, contracted = cross_entropy_terms(x, targets, prototypes, student_temp, chunk, dtype)
        contracted = contracted.reshape(b, -1, contracted.shape[-1])  # bt' b -> b t' b
        dots = _float32_einsum("bsd,btd->bst", student, contracted)
        pairs = lse.reshape(b, v)[:, :, None] - dots / student_temp
    global_loss = _mean(pairs[:, :global_views], ignore_diagonal)
    local = pairs[:, global_views:]
    return global_loss, local.mean() if local.size else jnp.zeros((), jnp.float32)


def dino_loss_from_logits(
    student_logits: Float[Array, "b s k"],
    teacher_probs: Float[Array, "b t k"],
    student_temp: Scalar = 0.1,
    ignore_diagonal: bool = False,
) -> Float[Array, ""]:
    """The same loss over all given pairs, from tables of logits and target probabilities."""
    return _mean(_pairs(student_logits, teacher_probs, student_temp), ignore_diagonal)


def dino_scales(
    local_views: int, global_views: int = 2, ignore_diagonal: bool = True
) -> tuple[float, float]:
    """(global, local) weights of the two losses: their shares of all student-teacher pairs."""
    n_global = global_views * (global_views - 1 if ignore_diagonal else global_views)
    n_local = global_views * local_views
    return n_global / (n_global + n_local), n_local / (n_global + n_local)


def _pairs(logits: Array, probs: Array, temp: Scalar) -> Array:
    # b s k, b t k -> b s t: cross-entropy of each pair
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32) / temp)
    return -_float32_einsum("bsk,btk->bst", log_p, jax.lax.stop_gradient(probs))


def _mean(pairs: Array, ignore_diagonal: bool) -> Array:
    if not ignore_diagonal:
        return pairs.mean()
    b, s, t = pairs.shape
    keep = 1 - jnp.eye(s, t, dtype=pairs.dtype)
    return (pairs * keep[None]).sum() / (b * s * t - b * min(s, t))


def _float32_einsum(equation: str, *arrays: Array) -> Array:
    return jnp.einsum(
        equation,
        *(a.astype(jnp.float32) for a in arrays),
        precision=jax.lax.Precision.HIGHEST,
    )
