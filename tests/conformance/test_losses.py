"""Losses and targets against the reference's numbers, through the code paths that train.

The vectors give logits; with the identity as prototypes, logits are bottleneck features, so the
chunked kernels and potentials see them too. The reference is crop-major [s, b, k], ours is
image-major.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import vectors

from dinojax.kernels.prototypes import Targets, target_probabilities
from dinojax.losses.dino import dino_loss_from_logits, dino_losses
from dinojax.losses.gram import gram_loss, select_tokens
from dinojax.losses.ibot import ibot_loss, ibot_loss_from_logits
from dinojax.losses.koleo import EPS, koleo_loss, neighbour_distances
from dinojax.losses.sinkhorn import (
    centering_potentials,
    sinkhorn,
    sinkhorn_potentials,
    updated_center,
)

GRADIENT = {"atol": 1e-4, "rtol": 1e-3}


def temperatures(case: vectors.Case) -> list[str]:
    """Temperatures of a case as they are written in names, t0.04 of t0.04/teacher_probs."""
    return case.matching(r"t[0-9][^/]*(?=/teacher_probs)")


def with_ignore(case: vectors.Case) -> list[tuple[str, str]]:
    return [tuple(name.split("/")) for name in case.matching(r"t[0-9][^/]*/ignore[01](?=/loss)")]


def value_and_gradient(loss: Callable[[jax.Array], jax.Array], x) -> tuple[jax.Array, jax.Array]:
    return jax.jit(jax.value_and_grad(loss))(jnp.asarray(x))


def identity_targets(logits: np.ndarray, temp: float, iterations: int, chunk: int) -> Targets:
    """Targets from logits [m, k] by the potentials path, prototypes being the identity."""
    eye = jnp.eye(logits.shape[1])
    x = jnp.asarray(logits)
    return Targets(x, eye, sinkhorn_potentials(x, eye, temp, iterations, chunk=chunk), temp)


@vectors.cases("dino_loss", sub=temperatures)
def test_dino_targets(case, sub):
    crop_major = case["teacher_logits"]
    logits = crop_major.reshape(-1, crop_major.shape[-1])
    expected = case[f"{sub}/teacher_probs"].reshape(logits.shape)
    temp, iterations = float(sub[1:]), case.meta.get("n_iterations", 3)
    table = sinkhorn(jnp.asarray(logits), temp, iterations)
    vectors.assert_close(table, expected, name="table")
    potentials = identity_targets(logits, temp, iterations, chunk=logits.shape[1] // 3 + 1)
    vectors.assert_close(target_probabilities(potentials), expected, name="potentials")


@vectors.cases("dino_loss", sub=with_ignore)
def test_dino_loss(case, sub):
    prefix, ignore = "/".join(sub), sub[1] == "ignore1"
    temp, student_temp = float(sub[0][1:]), case.meta.get("student_temp", 0.1)
    loss, gradient = case[f"{prefix}/loss"], case[f"{prefix}/grad_student_logits"].swapaxes(0, 1)
    student = jnp.asarray(case["student_logits"].swapaxes(0, 1))  # s b k -> b s k
    probs = jnp.asarray(case[f"{sub[0]}/teacher_probs"].swapaxes(0, 1))
    plain = jax.value_and_grad(dino_loss_from_logits)(student, probs, student_temp, ignore)
    vectors.assert_close(plain[0], loss, name="plain loss")
    vectors.assert_close(plain[1], gradient, **GRADIENT, name="plain gradient")

    b, s, K = student.shape
    teacher = case["teacher_logits"].swapaxes(0, 1).reshape(-1, K)  # t b k -> (b t) k
    targets = identity_targets(teacher, temp, case.meta.get("n_iterations", 3), chunk=K)

    def chunked(student):
        args = targets, jnp.eye(K), student_temp, ignore
        return dino_losses(student, *args, global_views=s, chunk=K // 3 + 1)[0]

    lean = value_and_gradient(chunked, student)
    vectors.assert_close(lean[0], loss, name="chunked loss")
    vectors.assert_close(lean[1], gradient, **GRADIENT, name="chunked gradient")


@vectors.cases("dino_loss", sub=lambda case: ["center"] if "center_probs" in case else [])
def test_centering(case, sub):
    crop_major = case["teacher_logits"]
    K, temp = crop_major.shape[-1], float(temperatures(case)[0][1:])
    center, eye = jnp.zeros(K), jnp.eye(K)
    expected, final = case["center_probs"], case["center_final"]
    for call in range(len(expected)):
        x = jnp.asarray(crop_major.reshape(-1, K) + np.float32(0.3 * call))
        potentials = centering_potentials(x, eye, center, temp, chunk=K // 2 + 1)
        probs = target_probabilities(Targets(x, eye, potentials, temp))
        rows = expected[call].shape[0]
        vectors.assert_close(probs[:rows], expected[call], name=f"call {call}")
        center = updated_center(x, eye, center)
    vectors.assert_close(center, final.reshape(K), name="center")


@vectors.cases("ibot_loss", sub=temperatures)
def test_ibot(case, sub):
    temp, student_temp = float(sub[1:]), case.meta.get("student_temp", 0.1)
    logits, iterations = case["teacher_logits"], case.meta.get("n_iterations", 3)
    K, crops = logits.shape[1], len(case["masks"])
    expected = case[f"{sub}/teacher_probs"]
    vectors.assert_close(sinkhorn(jnp.asarray(logits), temp, iterations), expected, name="table")
    targets = identity_targets(logits, temp, iterations, chunk=K // 3 + 1)
    vectors.assert_close(target_probabilities(targets), expected, name="potentials")

    student, weights = jnp.asarray(case["student_logits"]), jnp.asarray(case["masks_weight"])
    counts = case["masks"].sum(axis=1)
    row = case["mask_indices"] // case["masks"].shape[1]
    own = jnp.asarray(1 / np.maximum(counts[row], 1), jnp.float32)
    vectors.assert_close(own, weights, name="masks_weight")
    for name in ("loss", "loss_default_weights"):
        plain, gradient = jax.value_and_grad(ibot_loss_from_logits)(
            student, jnp.asarray(expected), weights if name == "loss" else own, crops, student_temp
        )
        vectors.assert_close(plain, case[f"{sub}/{name}"], name=name)
    vectors.assert_close(gradient, case[f"{sub}/grad_student_logits"], **GRADIENT)

    def chunked(student):
        args = targets, weights, jnp.eye(K), crops, student_temp
        return ibot_loss(student, *args, chunk=K // 3 + 1)

    lean = value_and_gradient(chunked, student)
    vectors.assert_close(lean[0], case[f"{sub}/loss"], name="chunked loss")
    vectors.assert_close(lean[1], case[f"{sub}/grad_student_logits"], **GRADIENT)


@vectors.cases("ibot_loss", sub=lambda case: ["padded"] if "padded/loss" in case else [])
def test_ibot_padded(case, sub):
    """Slots beyond the masked ones: their weight is 0, the targets are made with them."""
    given, first = case.group(sub), float(temperatures(case)[0][1:])
    iterations = case.meta.get("n_iterations", 3)
    probs = sinkhorn(jnp.asarray(given["teacher_logits"]), first, iterations)
    vectors.assert_close(probs, given["teacher_probs"], name="targets")
    weights = np.zeros(len(probs), np.float32)
    weights[: len(case["masks_weight"])] = case["masks_weight"]
    loss, gradient = jax.value_and_grad(ibot_loss_from_logits)(
        jnp.asarray(given["student_logits"]),
        jnp.asarray(given["teacher_probs"]),
        jnp.asarray(weights),
        len(case["masks"]),
        case.meta.get("student_temp", 0.1),
    )
    vectors.assert_close(loss, given["loss"], name="loss")
    vectors.assert_close(gradient, given["grad_student_logits"], **GRADIENT, name="gradient")


@vectors.cases("ibot_loss", sub=lambda case: ["dense"] if "dense/loss" in case else [])
def test_ibot_dense(case, sub):
    """All patches of all crops, the unmasked with weight 0."""
    given, masks = case.group(sub), case["masks"]
    K = given["student_logits"].shape[-1]
    weights = masks / np.maximum(masks.sum(axis=1, keepdims=True), 1)
    loss, gradient = jax.value_and_grad(ibot_loss_from_logits)(
        jnp.asarray(given["student_logits"].reshape(-1, K)),
        jnp.asarray(given["teacher_probs"].reshape(-1, K)),
        jnp.asarray(weights.reshape(-1), jnp.float32),
        len(masks),
        case.meta.get("student_temp", 0.1),
    )
    vectors.assert_close(loss, given["loss"], name="loss")
    expected = given["grad_student_logits"].reshape(-1, K)
    vectors.assert_close(gradient, expected, **GRADIENT, name="gradient")


@vectors.cases("koleo", sub=lambda case: ["one process"] if "loss" in case else [])
def test_koleo(case, sub):
    x = case["x"]
    y = x / np.linalg.norm(x, axis=1, keepdims=True)
    distances = neighbour_distances(jnp.asarray(x)[None])[0, :, 0]
    to_expected = np.linalg.norm(y - y[case["nn_index"]], axis=1)
    vectors.assert_close(distances, to_expected, name="distances to nn_index")
    loss, gradient = value_and_gradient(koleo_loss, x[:, None])
    vectors.assert_close(loss, case["loss"], name="loss")
    vectors.assert_close(gradient[:, 0], case["grad"], **GRADIENT, name="gradient")


def topks(case: vectors.Case) -> list[str]:
    return case.matching(r"dist_w1_topk\d+(?=/loss)")


@vectors.cases("koleo", sub=topks)
def test_koleo_topk(case, sub):
    x, topk = jnp.asarray(case["x"])[:, None], int(sub.split("topk")[1])
    loss, gradient = value_and_gradient(lambda x: koleo_loss(x, topk=topk), x)
    vectors.assert_close(loss, case[f"{sub}/loss"], name="loss")
    vectors.assert_close(gradient[:, 0], case[f"{sub}/grad"], **GRADIENT, name="gradient")


@vectors.cases("koleo", sub=lambda case: case.matching(r"topk\d+_group\w+(?=/loss_per_rank)"))
def test_koleo_groups(case, sub):
    """Ranks of the reference are consecutive images of the whole batch, groups blocks of them."""
    topk, group = sub.removeprefix("topk").split("_group")
    topk, group = int(topk), 0 if group == "None" else int(group)
    x, expected = jnp.asarray(case["x"]), case[f"{sub}/loss_per_rank"]
    ranks = len(expected)
    distances = neighbour_distances(x.reshape(-1, group or len(x), x.shape[1]), topk)
    per_rank = -jnp.log(distances + EPS).reshape(ranks, -1).mean(axis=1)
    vectors.assert_close(per_rank, expected, name="loss per rank")
    loss, gradient = value_and_gradient(lambda x: koleo_loss(x[:, None], group, topk) * ranks, x)
    vectors.assert_close(loss, expected.sum(), name="sum over ranks")
    vectors.assert_close(gradient, case[f"{sub}/grad"], **GRADIENT, name="gradient")


@vectors.cases("gram", sub=lambda case: case.matching(r"norm\d_img\d_neg-\w+(?=/loss)"))
def test_gram(case, sub):
    normalized, per_image, negative = sub.split("_")

    def loss_of(student):
        fold = (lambda x: x) if per_image == "img1" else (lambda x: x.reshape(1, -1, x.shape[-1]))
        return gram_loss(
            fold(student),
            fold(jnp.asarray(case["teacher"])),
            normalized=normalized == "norm1",
            remove_neg=negative == "neg-both",
            remove_only_teacher_neg=negative == "neg-teacher",
        )

    loss, gradient = value_and_gradient(loss_of, case["student"])
    vectors.assert_close(loss, case[f"{sub}/loss"], name="loss")
    vectors.assert_close(gradient, case[f"{sub}/grad_student"], **GRADIENT, name="gradient")


@vectors.cases("gram", sub=lambda case: ["selected"] if "selected/loss" in case else [])
def test_gram_selected(case, sub):
    mask = case["selected/mask"].reshape(1, -1)  # b p -> 1 (b p)

    def chosen(x):
        return select_tokens(
            x.reshape(1, -1, x.shape[-1]), jnp.asarray(mask), "masked", int(mask.sum())
        )

    def loss_of(student):
        return gram_loss(chosen(student), chosen(jnp.asarray(case["teacher"])))

    loss, gradient = value_and_gradient(loss_of, case["student"])
    vectors.assert_close(loss, case["selected/loss"], name="loss")
    vectors.assert_close(gradient, case["selected/grad_student"], **GRADIENT, name="gradient")
