"""Loss and gradient of a whole batch, computed at once or in micro-batches with equal results.

The teacher's Sinkhorn-Knopp couples all rows of the batch, so a step in k pieces first runs the
teacher over every piece keeping only bottlenecks, then finds the potentials of the whole batch,
then runs student and losses piece by piece and averages. Called by `train.py`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from dinojax.objectives.ssl import Arrays, LossFn, Params


def value_and_grad(fns: LossFn, pieces: int = 1, unit: int = 1) -> Callable[..., Any]:
    """f(student, frozen, batch, centers, scalars, key) -> (metrics, gradients, centers).

    Args:
      fns: the stages of the objective.
      pieces: micro-batches.
      unit: images that must stay together (the larger of group and KoLeo group).
    """

    def whole(
        student: Params,
        frozen: Params,
        batch: Arrays,
        centers: Arrays,
        scalars: Arrays,
        key: PRNGKeyArray | None,
    ) -> tuple[Arrays, Params, Arrays]:
        views = fns.prepare(batch)
        taught = fns.teach(frozen, views, batch)
        potentials, centers = fns.match(frozen, taught, centers, scalars)
        grad = jax.value_and_grad(fns.loss, has_aux=True)
        (_, metrics), gradients = grad(
            student, frozen, views, batch, taught, potentials, scalars, key
        )
        return metrics, gradients, centers

    def pieced(
        student: Params,
        frozen: Params,
        batch: Arrays,
        centers: Arrays,
        scalars: Arrays,
        key: PRNGKeyArray | None,
    ) -> tuple[Arrays, Params, Arrays]:
        parts = split(batch, pieces, unit)

        def teach(_: None, part: Arrays) -> tuple[None, Arrays]:
            return None, fns.teach(frozen, fns.prepare(part), part)

        _, taught = jax.lax.scan(teach, None, parts)
        potentials, centers = fns.match(frozen, merge(taught), centers, scalars)
        shared = {k: v for k, v in potentials.items() if k.endswith("_prototypes")}
        rows = {
            name: unmerge(value, pieces)
            for name, value in potentials.items()
            if name.endswith("_rows")
        }

        def one(xs: Any) -> tuple[Arrays, Params]:
            part, taught_part, rows_part = xs
            # Colour is drawn again rather than kept: the same keys give the same pixels, and
            # keeping every view of a big batch as floats would cost more memory than the step.
            views = fns.prepare(part)
            grad = jax.value_and_grad(fns.loss, has_aux=True)
            (_, metrics), gradients = grad(
                student, frozen, views, part, taught_part, shared | rows_part, scalars, key
            )
            return metrics, gradients

        def accumulate(total: Any, xs: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, one(xs)), None

        inputs = (parts, taught, rows)
        shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], inputs))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        total, _ = jax.lax.scan(accumulate, zeros, inputs)
        metrics, gradients = jax.tree.map(lambda x: x / pieces, total)
        return metrics, gradients, centers

    return whole if pieces == 1 else pieced


def split(batch: Arrays, pieces: int, unit: int) -> Arrays:
    """Arrays [u * n, ...] of u units -> [pieces, u / pieces * n, ...]; piece i gets units i, i + k.

    Strided rather than in runs: on a batch split over devices in runs of units, every device then
    holds its share of every piece and nothing moves.
    """
    units = batch["seeds"].shape[0] // unit

    def one(x: Array) -> Array:
        x = x.reshape(units // pieces, pieces, x.shape[0] // units, *x.shape[1:])
        return jnp.moveaxis(x, 1, 0).reshape(pieces, -1, *x.shape[3:])

    return jax.tree.map(one, batch)


def merge(tree: Any) -> Any:
    """[pieces, n, ...] -> [n * pieces, ...] (row order does not matter to Sinkhorn-Knopp)."""
    return jax.tree.map(
        lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:]), tree
    )


def unmerge(x: Array, pieces: int) -> Array:
    """The inverse of `merge`: [n * pieces, ...] -> [pieces, n, ...]."""
    return jnp.moveaxis(x.reshape(-1, pieces, *x.shape[1:]), 1, 0)
