"""DINO + iBOT + KoLeo + Gram: what one phase of self-supervised pretraining minimises (spec 3).

`make_loss_fn` returns pure functions that `objectives/microbatch.py` strings together, once for
the whole batch or once per micro-batch:

    views      = prepare(batch)                       photometrics, uint8 -> normalised floats
    taught     = teach(frozen, views, batch)          teacher forward up to the bottlenecks
    potentials = match(frozen, taught, ...)           Sinkhorn-Knopp over the WHOLE batch
    loss       = loss(student, frozen, views, ...)    student forward and every loss term

Only bottleneck features and potentials cross from one to the next, never a [rows, prototypes]
table. Rows are image-major: all views of image 0 first. The named scopes (photometrics, teacher,
student, losses, gram) are what `launch/bench.py --shares` divides a step's time by.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray
from ml_collections import ConfigDict

from dinojax.data import photometric
from dinojax.losses import dino, gram, ibot, koleo, sinkhorn
from dinojax.losses.dino import Targets
from dinojax.losses.sinkhorn import Potentials
from dinojax.sharding import constrain_batch

Params = Mapping[str, Any]
Arrays = dict[str, Array]
STUDENT_KEY = 1  # folded into the step's key for the student's stochastic depth and RoPE draws


class LossFn(NamedTuple):
    """The four stages of a step; see the module's head."""

    prepare: Callable[[Arrays], Arrays]
    teach: Callable[..., Arrays]
    match: Callable[..., tuple[Arrays, Arrays]]
    loss: Callable[..., tuple[Array, Arrays]]


class Networks(NamedTuple):
    """Apply functions of the networks that take part; teacher and gram may differ in shape."""

    student: Mapping[str, Callable[..., Any]]  # backbone, dino_head, ibot_head
    teacher: Mapping[str, Callable[..., Any]]
    gram: Callable[..., Any] | None = None  # backbone of the Gram teacher


def make_loss_fn(
    phase: ConfigDict,
    networks: Networks,
    augment: photometric.Photometric,
    patch_size: int,
    koleo_group: int,
    dtype: Any = jnp.float32,
    masked_student: bool = True,
) -> LossFn:
    """Loss functions of one phase.

    Args:
      phase: sections `crops`, `losses`, `gram` are read.
      networks: apply functions.
      augment: photometric policy.
      patch_size: pixels of one patch side, for the grids of Gram features.
      koleo_group: images among which KoLeo searches neighbours.
      dtype: of matmul inputs in the prototype products.
      masked_student: False in distillation, where the student sees no mask tokens.
    """
    weights, centering = phase.losses, phase.losses.centering
    temp = weights.student_temp

    @jax.named_scope("photometrics")
    def prepare(batch: Arrays) -> Arrays:
        side = math.isqrt(batch["masks"].shape[-1]) * patch_size  # of the global crops
        return constrain_batch(
            photometric.views(batch, augment, phase.crops.gram_undistorted, side)
        )

    def teach(frozen: Params, views: Arrays, batch: Arrays) -> Arrays:
        teacher = frozen["teacher"]
        with jax.named_scope("teacher"):
            (seen,) = networks.teacher["backbone"](teacher["backbone"], (fold(views["global"]),))
        taught: Arrays = {}
        if weights.dino:
            cls = unfold(seen.cls, 2)
            taught["dino"] = teacher_rows("dino", teacher, cls)  # [b, 2, bottleneck]
        if weights.ibot:
            chosen = masked_tokens(seen.patches, batch["mask_indices"])
            taught["ibot"] = teacher_rows("ibot", teacher, chosen)  # [g, m, bottleneck]
        if phase.gram.teacher == "ema":
            taught["patches"] = unfold(seen.patches, 2)  # [b, 2, p, d]
        return taught

    @jax.named_scope("losses")
    def teacher_rows(name: str, teacher: Params, x: Float[Array, "a n d"]) -> Float[Array, "a n k"]:
        return head_rows(networks.teacher[f"{name}_head"], teacher[f"{name}_head"], x)

    @jax.named_scope("losses")
    def match(
        frozen: Params, taught: Arrays, centers: Arrays, scalars: Arrays
    ) -> tuple[Arrays, Arrays]:
        """Potentials of every teacher row of the whole batch, and the centers of the next step."""
        potentials: Arrays = {}
        new_centers: Arrays = {}
        for name in ("dino", "ibot"):
            if name not in taught:
                continue
            rows = taught[name]
            flat = rows.reshape(-1, rows.shape[-1])
            prototypes = frozen["teacher"][f"{name}_head"]["last_layer"]["prototypes"]
            if centering == "sinkhorn":
                found = sinkhorn.sinkhorn_potentials(
                    flat,
                    prototypes,
                    scalars["teacher_temp"],
                    weights.sinkhorn_iterations,
                    dtype=dtype,
                )
            else:
                found = sinkhorn.centering_potentials(
                    flat, prototypes, centers[name], scalars["teacher_temp"], dtype=dtype
                )
                new_centers[name] = sinkhorn.updated_center(
                    flat, prototypes, centers[name], weights.center_momentum
                )
            potentials[f"{name}_prototypes"] = found.prototypes
            potentials[f"{name}_rows"] = found.rows.reshape(rows.shape[:-1])
        return potentials, new_centers

    def targets(
        name: str, frozen: Params, taught: Arrays, potentials: Arrays, scalars: Arrays
    ) -> Targets:
        return Targets(
            fold(taught[name]),
            frozen["teacher"][f"{name}_head"]["last_layer"]["prototypes"],
            Potentials(potentials[f"{name}_prototypes"], potentials[f"{name}_rows"].reshape(-1)),
            scalars["teacher_temp"],
        )

    def loss(
        student: Params,
        frozen: Params,
        views: Arrays,
        batch: Arrays,
        taught: Arrays,
        potentials: Arrays,
        scalars: Arrays,
        key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, ""], Arrays]:
        masks = fold(batch["masks"]) if masked_student else None
        with jax.named_scope("student"):
            seen_global, seen_local = networks.student["backbone"](
                student["backbone"],
                (fold(views["global"]), fold(views["local"])),
                masks=(masks, None),
                groups=batch["groups"],
                key=None if key is None else jax.random.fold_in(key, STUDENT_KEY),
            )
        seen = (seen_global, seen_local)
        return terms(student, frozen, views, batch, taught, potentials, scalars, *seen)

    @jax.named_scope("losses")
    def terms(
        student: Params,
        frozen: Params,
        views: Arrays,
        batch: Arrays,
        taught: Arrays,
        potentials: Arrays,
        scalars: Arrays,
        seen_global: Any,
        seen_local: Any,
    ) -> tuple[Float[Array, ""], Arrays]:
        """Every loss term and their sum, of what the student saw in the two crop sizes."""
        locals_ = views["local"].shape[1]
        cls_global = unfold(seen_global.cls, 2).astype(jnp.float32)  # [b, 2, d]
        metrics: Arrays = {"cls_spread": spread(cls_global, batch["groups"].shape[0])}
        total = jnp.zeros((), jnp.float32)

        if weights.dino:
            cls = jnp.concatenate(
                [unfold(seen_global.cls, 2), unfold(seen_local.cls, locals_)], axis=1
            )  # [b, 2 + v, d]
            rows = head_rows(networks.student["dino_head"], student["dino_head"], cls)
            global_loss, local_loss = dino.dino_losses(
                rows,
                targets("dino", frozen, taught, potentials, scalars),
                student["dino_head"]["last_layer"]["prototypes"],
                student_temp=temp,
                ignore_diagonal=weights.ignore_diagonal,
                dtype=dtype,
            )
            global_scale, local_scale = dino.dino_scales(
                locals_, ignore_diagonal=weights.ignore_diagonal
            )
            local_weight = scalars["dino_local_weight"]
            total += weights.dino * (
                local_scale * local_weight * local_loss + global_scale * global_loss
            )
            metrics |= {"dino_global": global_loss, "dino_local": local_loss}

        if weights.koleo:
            value = koleo.koleo_loss(cls_global, koleo_group, weights.koleo_topk)
            total += weights.koleo * 2.0 * value  # summed over the two crops (spec 3.5)
            metrics["koleo"] = value

        if weights.ibot:
            chosen = masked_tokens(seen_global.patches, batch["mask_indices"])
            rows = head_rows(networks.student["ibot_head"], student["ibot_head"], chosen)
            value = ibot.ibot_loss(
                fold(rows),
                targets("ibot", frozen, taught, potentials, scalars),
                batch["mask_weights"].reshape(-1),
                student["ibot_head"]["last_layer"]["prototypes"],
                crops=2 * views["global"].shape[0],
                student_temp=temp,
                dtype=dtype,
            )
            total += weights.ibot * value
            metrics["ibot"] = value

        if phase.gram.teacher != "none":
            anchors = gram_features(frozen, views, taught)
            found = gram_terms(seen_global.patches, anchors, batch)
            total += scalars["gram_weight"] * found["gram"]
            metrics |= found
        metrics["loss"] = total
        return total, metrics

    def gram_features(frozen: Params, views: Arrays, taught: Arrays) -> Float[Array, "n p d"]:
        """Patch features of the anchor on the student's grid, without gradient."""
        rows, cols = (side // patch_size for side in views["global"].shape[2:4])
        if phase.gram.teacher == "ema":
            return fold(taught["patches"])
        with jax.named_scope("gram"):
            (anchor,) = networks.gram(frozen["gram"], (fold(views["gram"]),))
        grid = tuple(side // patch_size for side in views["gram"].shape[2:4])
        return gram.resize_features(
            anchor.patches, grid, (rows, cols), phase.gram.resize, phase.gram.antialias
        )

    def gram_terms(
        patches: Float[Array, "n p d"], anchors: Float[Array, "n p d"], batch: Arrays
    ) -> Arrays:
        flags = {
            "normalized": phase.gram.normalized,
            "remove_neg": phase.gram.remove_neg,
            "remove_only_teacher_neg": phase.gram.remove_only_teacher_neg,
        }
        groups = batch["groups"].shape[0]

        def grouped(x: Array) -> Array:  # [g * r, p, d] -> [g, r * p, d]
            return x.reshape(groups, -1, x.shape[-1])

        masks = batch["masks"].reshape(groups, -1)  # [g, group * 2 * p]
        wanted = {"gram": (phase.gram.img_level, phase.gram.tokens)}
        if phase.gram.stats:
            wanted |= {"gram_masked": (False, "masked"), "gram_unmasked": (False, "unmasked")}
        found: Arrays = {}
        for name, (img_level, tokens) in wanted.items():
            pair = (patches, anchors)
            if not img_level:
                slots = batch["mask_indices"].shape[1]
                pair = tuple(gram.select_tokens(grouped(x), masks, tokens, slots) for x in pair)
            found[name] = gram.gram_loss(*pair, **flags)
        return found

    return LossFn(prepare, teach, match, loss)


def fold(x: Array) -> Array:
    """[b, v, ...] -> [b * v, ...], image-major."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def unfold(x: Array, views: int) -> Array:
    """[b * v, ...] -> [b, v, ...]."""
    return x.reshape(x.shape[0] // views, views, *x.shape[1:])


def masked_tokens(
    patches: Float[Array, "n p d"], indices: Int[Array, "g m"]
) -> Float[Array, "g m d"]:
    """The masked patches of every group, in the order of their flat positions in the group."""
    groups = indices.shape[0]
    flat = patches.reshape(groups, -1, patches.shape[-1])  # [g, rows * p, d]
    return jnp.take_along_axis(flat, indices[..., None], axis=1)


def head_rows(
    head: Callable[..., Array], params: Params, x: Float[Array, "a n d"]
) -> Float[Array, "a n k"]:
    """Bottleneck features of rows that carry two leading axes."""
    rows = head(params, fold(x), method="bottleneck")
    return unfold(rows, x.shape[1])


def spread(cls: Float[Array, "b v d"], groups: int) -> Float[Array, ""]:
    """sqrt(d) x std of the normalised CLS within a group, mean of groups: 1 spread, 0 collapsed.

    By group, so that the mean of micro-batches is the number of the whole batch.
    """
    d = cls.shape[-1]
    unit = cls / jnp.maximum(jnp.linalg.norm(cls, axis=-1, keepdims=True), 1e-12)
    rows = jax.lax.stop_gradient(unit).reshape(groups, -1, d)  # [b, v, d] -> [g, r, d]
    return jnp.sqrt(d * jnp.var(rows, axis=1, ddof=1).mean(axis=-1)).mean()
