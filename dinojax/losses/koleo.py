"""KoLeo: spreads features by pushing each away from its nearest neighbours (spec 3.5).

    L = -mean log(|y_i - y_nn(i) + eps| + eps),  y = x / max(|x|, eps),  eps = 1e-8
Neighbours are looked for among the other images of a group (the reference's per-rank batch, or its
distributed groups), each view by itself. Called by `objectives` on the student's CLS tokens before
the head.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

EPS = 1e-8


def koleo_loss(x: Float[Array, "b v d"], group_size: int = 0, topk: int = 1) -> Float[Array, ""]:
    """Mean over views of the loss of each view; computed in float32.

    Groups are `group_size` consecutive images; 0 takes all b images together.
    """
    b, v, d = x.shape
    group = group_size or b
    if b % group:
        near = max(g for g in range(1, min(group, b) + 1) if b % g == 0)
        raise ValueError(
            f"koleo group_size = {group_size} does not divide the batch of {b}: nearest is {near}"
        )
    # b v d -> groups group v d -> groups v group d -> (groups v) group d
    grouped = x.reshape(b // group, group, v, d).transpose(0, 2, 1, 3).reshape(-1, group, d)
    return -jnp.log(neighbour_distances(grouped, topk) + EPS).mean()


def neighbour_distances(x: Float[Array, "g b d"], topk: int = 1) -> Float[Array, "g b topk"]:
    """Distances of each normalised row to its `topk` nearest other rows of the group, float32.

    Nearest means largest dot product. Gradients flow through both rows of a pair, not through the
    choice.
    """
    b = x.shape[-2]
    if not 1 <= topk < b:
        raise ValueError(f"koleo topk = {topk}: expected 1 to {b - 1}, for groups of {b} images")
    x = x.astype(jnp.float32)
    y = x * jax.lax.rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), EPS**2))
    frozen = jax.lax.stop_gradient(y)
    exact = jax.lax.Precision.HIGHEST
    dots = jnp.einsum("gid,gjd->gij", frozen, frozen, precision=exact)
    dots = jnp.where(jnp.eye(b, dtype=bool)[None], -1.0, dots)
    distances = []
    for _ in range(topk):
        # The choice as a 0/1 matrix: its product with y is exact, and the partitioner splits it
        # where it would gather for an indexed read.
        chosen = jnp.argmax(dots, axis=-1)[..., None] == jnp.arange(b)[None, None]
        neighbour = jnp.einsum("gij,gjd->gid", chosen.astype(y.dtype), y, precision=exact)
        distances.append(jnp.linalg.norm(y - neighbour + EPS, axis=-1))
        dots = jnp.where(chosen, -jnp.inf, dots)
    return jnp.stack(distances, axis=-1)
