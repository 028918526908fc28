"""Gram anchoring: patch similarities of the student stay those of an earlier teacher (spec 3.6).

    L = mean over all entries of (S S^T - G G^T)^2, tokens L2-normalised first
a mean, where the paper writes a squared Frobenius norm; the published weights belong to the mean.
The Gram teacher sees larger crops; its features are resized to the student's grid before they are
normalised. All in float32. Called by `objectives`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

EPS = 1e-12
CUBIC = -0.75  # the reference's bicubic coefficient; jax.image uses -0.5


def gram_loss(
    student: Float[Array, "g t d"],
    teacher: Float[Array, "g t e"],
    normalized: bool = True,
    remove_neg: bool = False,
    remove_only_teacher_neg: bool = False,
) -> Float[Array, ""]:
    """Mean squared difference of the Gram matrices [t, t], one for each leading index.

    Per image (img_level): fold `b v p d -> bv p d`. Over all tokens of a group: `-> g (b v p) d`.
    `remove_neg` clears negative similarities of both; `remove_only_teacher_neg` those of the
    teacher alone (the reference also means to clear some of the student's, on a test that never
    holds).
    """
    if remove_neg and remove_only_teacher_neg:
        raise ValueError("gram remove_neg and remove_only_teacher_neg are both set: choose one")
    similar = _similarities(student, normalized)
    anchor = jax.lax.stop_gradient(_similarities(teacher, normalized))
    if remove_neg:
        similar = jnp.maximum(similar, 0.0)
    if remove_neg or remove_only_teacher_neg:
        anchor = jnp.maximum(anchor, 0.0)
    return jnp.square(similar - anchor).mean()


def select_tokens(
    features: Float[Array, "g t d"], mask: Bool[Array, "g t"], tokens: str, masked: int
) -> Float[Array, "g s d"]:
    """The `masked` or `unmasked` tokens of each group (or all); `masked` = True entries per group.

    Static shapes: the counts are the same in every group. Their order is kept.
    """
    if tokens == "all":
        return features
    if tokens not in ("masked", "unmasked"):
        raise ValueError(f"gram tokens = {tokens!r}: expected 'all', 'masked' or 'unmasked'")
    unmasked = mask.shape[1] - masked
    order = jnp.argsort(mask, axis=1, stable=True)  # unmasked positions first
    chosen = order[:, unmasked:] if tokens == "masked" else order[:, :unmasked]
    return jnp.take_along_axis(features, chosen[:, :, None], axis=1)


def resize_features(
    features: Float[Array, "n p d"],
    grid: tuple[int, int],
    to: tuple[int, int],
    method: str = "bicubic",
    antialias: bool = False,
) -> Float[Array, "n q d"]:
    """Patch features from one grid (rows, columns) to another, half-pixel centres, float32.

    `bicubic` without antialias is written out, as four taps of a = -0.75 with the edge repeated
    (jax.image's differs from it by up to 0.33 on unit noise); the others agree with the reference.
    """
    if method not in ("bicubic", "bilinear"):
        raise ValueError(f"resize method = {method!r}: expected 'bicubic' or 'bilinear'")
    n, _, d = features.shape
    image = features.astype(jnp.float32).reshape(n, *grid, d)  # n (y x) d -> n y x d
    if method == "bicubic" and not antialias:
        exact = jax.lax.Precision.HIGHEST
        rows, columns = (_bicubic_matrix(a, b) for a, b in zip(grid, to))
        image = jnp.einsum("ay,nyxd->naxd", rows, image, precision=exact)
        image = jnp.einsum("bx,naxd->nabd", columns, image, precision=exact)
    else:
        kind = "cubic" if method == "bicubic" else "linear"
        exact = jax.lax.Precision.HIGHEST
        image = jax.image.resize(image, (n, *to, d), kind, antialias=antialias, precision=exact)
    return image.reshape(n, to[0] * to[1], d)


def _similarities(x: Array, normalized: bool) -> Array:
    x = x.astype(jnp.float32)
    if normalized:
        x = x * jax.lax.rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), EPS**2))
    return jnp.einsum("gtd,gsd->gts", x, x, precision=jax.lax.Precision.HIGHEST)


def _bicubic_matrix(size: int, to: int) -> np.ndarray:
    """[to, size] float32: row i holds the four taps of output i, outside ones added to the edge."""
    place = (np.arange(to) + 0.5) * (size / to) - 0.5
    first = np.floor(place).astype(int) - 1
    matrix = np.zeros((to, size))
    for tap in range(4):
        x = np.abs(place - (first + tap))
        near = (CUBIC + 2) * x**3 - (CUBIC + 3) * x**2 + 1
        far = CUBIC * (x**3 - 5 * x**2 + 8 * x - 4)
        weight = np.where(x <= 1, near, far)  # the farthest tap lies at most 2 away
        np.add.at(matrix, (np.arange(to), np.clip(first + tap, 0, size - 1)), weight)
    return matrix.astype(np.float32)
