"""Complete training steps against the reference's numbers (ssl_*.npz), by the code that trains.

Networks, objective, clip, AdamW, EMA and schedules are the trainer's; only the photometrics are
replaced, because the vectors hold finished crops. Those are crop-major there, image-major here.
Each file is run once, with one compilation; the tests compare what it left behind.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import reference_params as reference
import vectors
from ml_collections import ConfigDict

from dinojax import config as configs
from dinojax.data import photometric
from dinojax.kernels.prototypes import Targets, target_probabilities
from dinojax.losses import gram
from dinojax.losses.sinkhorn import Potentials
from dinojax.models import heads, vit
from dinojax.objectives import microbatch, ssl
from dinojax.training import optim, phases
from dinojax.training import state as states

Tree = dict[str, Any]
NETWORKS = ("backbone", "dino_head", "ibot_head")

LOSS = {"atol": 2e-5, "rtol": 2e-4}
FEATURES = {"atol": 3e-5, "rtol": 3e-4}
GRADIENT = {"atol": 1e-4, "rtol": 1e-3}
EMA = {"atol": 2e-5, "rtol": 1e-5}
# Adam turns the rounding of a near-zero gradient into a visible part of one learning rate: 0.2 of
# it per entry, and next to nothing on average (the reference's README, "Suggested tolerances").
STEP_ATOL, STEP_RTOL, STEP_MEAN = 0.2, 1e-4, 1e-6
MASKED = "masked_patch_"  # in the names of arrays with one row for each masked patch

# Our metric -> the reference's name, per step.
METRICS = {
    "loss": "total",
    "dino_local": "dino_local_crops_loss",
    "dino_global": "dino_global_crops_loss",
    "koleo": "koleo_loss",
    "ibot": "ibot_loss",
    "gram": "gram_loss",
    "gram_masked": "stats_only/masked_gram_loss",
    "gram_unmasked": "stats_only/unmasked_gram_loss",
    "dino_local_weight": "dino_local_loss_weight",
    "gram_weight": "gram_loss_weight",
    "images_local": "local_batch_size",
    "images_global": "global_batch_size",
    "grad_norm_backbone": "backbone_grad_norm",
    "grad_norm_dino_head": "dino_head_grad_norm",
    "grad_norm_ibot_head": "ibot_head_grad_norm",
}
# Option `student.X` of the reference's config -> argument of its ViT.
VIT_OPTIONS = {
    name: name
    for name in (
        "patch_size ffn_layer qkv_bias proj_bias ffn_bias mask_k_bias norm_layer n_storage_tokens "
        "untie_cls_and_patch_norms untie_global_and_local_cls_norm pos_embed_rope_base "
        "pos_embed_rope_min_period pos_embed_rope_max_period pos_embed_rope_normalize_coords"
    ).split()
} | {"layerscale": "layerscale_init"}


class Trace(NamedTuple):
    """What a run over the steps of one file left behind, as numpy."""

    steps: list[Tree]  # of each step: metrics, gradients, student, ema, inter, masks
    gram: Tree
    rules: dict[str, optim.Rule]
    learning_rate: float  # the largest of all steps


TRACES: dict[str, Trace] = {}


def trace(case: vectors.Case) -> Trace:
    """The run over a file, made once."""
    if case.topic not in TRACES:
        TRACES[case.topic] = run(case)
    return TRACES[case.topic]


# ---- from the reference's settings to ours ------------------------------------------------------


def options(lines: list[str]) -> dict[str, Any]:
    """["student.patch_size=8", ...] -> {"student.patch_size": 8, ...}."""
    return {key: plain(text) for key, text in (line.split("=", 1) for line in lines)}


def plain(text: str) -> Any:
    named = {"true": True, "false": False, "null": None, "none": None}
    if text.lower() in named:
        return named[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def model_section(arguments: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Our `model` section from the arguments of the reference's ViT and its `student.*` options."""
    settings = {"layerscale_init": 1e-5}  # the reference's default config
    for key, value in chosen.items():
        section, name = key.split(".", 1)
        if section == "student" and name in VIT_OPTIONS:
            settings[VIT_OPTIONS[name]] = value
    return reference.vit_config(settings | dict(arguments))


def make_phase(settings: Mapping[str, Any], chosen: Mapping[str, Any]) -> ConfigDict:
    """The phase that a case's settings describe; scheduled rates are given step by step instead."""
    epoch = chosen.get("train.OFFICIAL_EPOCH_LENGTH", 1250)
    losses, anchor = settings["losses"], settings["losses"]["gram"] or {}
    distributed = chosen.get("dino.koleo_loss_distributed", False)
    local, weight = settings.get("local_schedule"), anchor.get("loss_weight_schedule")
    sizes = (settings["global_hw"][0], settings["local_hw"][0], settings.get("gram_hw", [0])[0])
    sections = {
        "crops": {"sizes": (sizes,), "locals": chosen["crops.local_crops_number"]},
        "losses": {
            "dino": losses["dino_w"],
            "ibot": losses["ibot_w"],
            "koleo": losses["koleo_w"],
            "koleo_group": settings["B"],
            "koleo_topk": chosen.get("dino.koleo_topk", 1) if distributed else 1,
            "ignore_diagonal": losses["ignore_diagonal"],
        },
        "schedules": {
            "lr": configs.constant(0.0),
            "weight_decay": configs.constant(0.0),
            "dino_local": v2(local, epoch) if local else configs.constant(1.0),
            "gram": v2(weight, epoch) if weight else configs.constant(anchor.get("loss_weight", 0)),
        },
    }
    if anchor.get("use_loss"):
        sections["gram"] = {
            "teacher": "ema" if anchor["ema_teacher"] else "snapshot",
            "normalized": anchor["normalized"],
            "img_level": anchor["img_level"],
            "tokens": anchor["tokens_used"],
            "remove_neg": anchor["remove_neg"],
            "remove_only_teacher_neg": anchor["remove_only_teacher_neg"],
            "resize": anchor["global_teacher_resize_method"],
            "antialias": anchor["global_teacher_resize_antialias"],
            "stats": anchor["compute_stats"],
        }
    phase = configs.phase("conformance", chosen.get("optim.epochs", 100) * epoch, **sections)
    phase.batch_size = phase.group = settings["B"]
    return phase


def v2(schedule: Mapping[str, Any], epoch: int) -> dict[str, Any]:
    lengths = {"warmup": schedule["warmup_epochs"], "cosine": schedule.get("cosine_epochs", -1)}
    lengths = {key: int(n * epoch) if n >= 0 else -1 for key, n in lengths.items()}
    return configs.v2(*(schedule[key] for key in ("start", "peak", "end")), **lengths)


# ---- parameters and batches ---------------------------------------------------------------------


def parameters(state: Mapping[str, np.ndarray], model: Mapping[str, Any]) -> Tree:
    """{network: our tree} from a state dict that names its networks."""
    named = {
        network: {k[len(network) + 1 :]: v for k, v in state.items() if k.startswith(network + ".")}
        for network in NETWORKS
    }
    trees = {"backbone": reference.backbone_params(named["backbone"], model)}
    return trees | {n: reference.head_params(named[n]) for n in NETWORKS[1:] if named[n]}


def to_reference(trees: Tree) -> dict[str, np.ndarray]:
    """{"backbone.norm.weight": array, ...}."""
    return {
        f"{network}.{name}": array
        for network, tree in trees.items()
        for name, array in reference.to_reference(tree).items()
    }


def applies(state: Mapping[str, np.ndarray], model: Mapping[str, Any]) -> Tree:
    """The apply functions of backbone and heads, sized as their arrays are."""
    networks = {"backbone": vit.build(model).apply}
    for network in NETWORKS[1:]:
        prefix = network + "."
        sizes = reference.head_config(
            {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
        )
        networks[network] = heads.build(sizes, sizes.pop("in_dim"), "float32").apply
    return networks


def image_major(x: np.ndarray, images: int) -> np.ndarray:
    """Crop-major rows [v b, ...] -> [b, v, ...]."""
    return np.moveaxis(x.reshape(-1, images, *x.shape[1:]), 0, 1)


def crops(x: np.ndarray, images: int) -> np.ndarray:
    """[v b, c, i, j] -> [b, v, i, j, c]."""
    return image_major(x, images).transpose(0, 1, 3, 4, 2)


def read_batch(arrays: Mapping[str, np.ndarray], images: int) -> dict[str, np.ndarray]:
    """A batch of one group. The given positions and weights of masked patches are checked here."""
    masks = arrays["collated_masks"]
    counts = masks.sum(1)
    np.testing.assert_array_equal(arrays["mask_indices_list"], np.flatnonzero(masks))
    np.testing.assert_allclose(
        arrays["masks_weight"], np.repeat(1 / np.maximum(counts, 1), counts), rtol=1e-6
    )
    assert arrays["n_masked_patches"] == arrays["upperbound"] == counts.sum()
    masks = image_major(masks, images)
    counts = masks.sum(-1)
    batch = {
        "global": crops(arrays["collated_global_crops"], images),
        "local": crops(arrays["collated_local_crops"], images),
        "masks": masks,
        "mask_indices": np.flatnonzero(masks)[None].astype(np.int32),
        "mask_weights": np.repeat(1 / np.maximum(counts, 1), counts.ravel())[None],
        "groups": np.zeros(1, np.int32),
        "seeds": np.zeros(images, np.uint32),
    }
    batch["mask_weights"] = batch["mask_weights"].astype(np.float32)
    if "collated_gram_teacher_crops" in arrays:
        batch["gram"] = crops(arrays["collated_gram_teacher_crops"], images)
    return batch


# ---- the run ------------------------------------------------------------------------------------


def run(case: vectors.Case) -> Trace:
    settings = case.meta["case"]
    chosen = options(settings["config"])
    model = model_section(settings["student_vit"], chosen)
    phase, distilled = make_phase(settings, chosen), "teacher_vit" in settings

    start = {"student": case.group("init/student"), "ema": case.group("init/ema")}
    student, ema = (parameters(start[name], model) for name in ("student", "ema"))
    networks = applies(start["student"], model)
    teacher, teacher_networks = None, networks  # None: the EMA
    if distilled:
        state = case.group("init/teacher")
        described = model_section(settings["teacher_vit"], options(settings["teacher_config"]))
        teacher, teacher_networks = parameters(state, described), applies(state, described)
    anchor = {}
    if phase.gram.teacher == "snapshot":
        anchor = parameters(case.group("init/gram_teacher"), model)["backbone"]

    rules = optim.parameter_rules(
        student,
        chosen.get("optim.layerwise_decay", 0.9),
        chosen.get("optim.patch_embed_lr_mult", 0.2),
    )
    step = make_step(
        phase,
        ssl.Networks(networks, teacher_networks, networks["backbone"]),
        model["patch_size"],
        masked_student=not distilled,
        rules=rules,
        clip=settings["clip_grad"],
        optimizer=settings["optimizer"],
    )
    config = ConfigDict({"optim": {"lr_scaling": "none"}})
    moments, traced = optim.init(student), []
    for index, given in enumerate(settings["steps"]):
        scalars = phases.scalars(config, phase, given["iteration"])
        scalars |= {key: given[key] for key in ("lr", "last_layer_lr", "momentum", "teacher_temp")}
        scalars |= {"weight_decay": given["wd"]}
        scalars = {key: jnp.float32(value) for key, value in scalars.items()}
        batch = read_batch(case.group(f"step{index}/batch"), settings["B"])
        student, ema, moments, left = step(student, ema, teacher, anchor, moments, batch, scalars)
        if index in settings.get("gram_update_after", []):
            anchor = states.copy(ema["backbone"])
        left["metrics"] |= {"images_local": settings["B"], "images_global": settings["B"]}
        left |= {"student": student, "ema": ema, "masks": batch["masks"]}
        traced.append(jax.device_get(left))
    assert step._cache_size() == 1
    rate = max(given["lr"] for given in settings["steps"])
    return Trace(traced, jax.device_get(anchor), rules, rate)


def make_step(
    phase: ConfigDict,
    networks: ssl.Networks,
    patch: int,
    masked_student: bool,
    rules: Mapping[str, optim.Rule],
    clip: float,
    optimizer: Mapping[str, float],
):
    """The trainer's step without its bookkeeping, plus the intermediate tensors."""
    fns = ssl.make_loss_fn(
        phase,
        networks,
        photometric.Photometric(),
        patch,
        phase.losses.koleo_group,
        masked_student=masked_student,
    )
    names = ("global", "local", "gram")
    fns = fns._replace(prepare=lambda batch: {n: batch[n] for n in names if n in batch})
    gradients_of = microbatch.value_and_grad(fns)
    # A key means training mode (the norm of local crops); rates of 0 make it draw nothing.
    key = jax.random.key(0)

    @jax.jit
    def step(student, ema, teacher, anchor, moments, batch, scalars):
        frozen = {"teacher": ema if teacher is None else teacher, "gram": anchor}
        metrics, gradients, _ = gradients_of(student, frozen, batch, {}, scalars, key)
        inter = intermediates(fns, phase, networks, patch, masked_student)(
            student, frozen, batch, scalars, key
        )
        clipped, norms = optim.clip_by_network(gradients, clip)
        betas = (optimizer["beta1"], optimizer["beta2"])
        student, moments = optim.update(
            student, clipped, moments, scalars, rules, betas, optimizer["eps"]
        )
        ema = states.ema(ema, student, scalars["momentum"])
        metrics |= {f"grad_norm_{name}": norm for name, norm in norms.items()}
        metrics |= {name: scalars[name] for name in ("dino_local_weight", "gram_weight")}
        return student, ema, moments, {"metrics": metrics, "gradients": gradients, "inter": inter}

    return step


def intermediates(
    fns: ssl.LossFn, phase: ConfigDict, networks: ssl.Networks, patch: int, masked_student: bool
):
    """The reference's `inter/*` arrays, image-major, from the objective's stages and networks."""

    def logits(nets: Mapping[str, Any], params: Tree, name: str, x: jax.Array) -> jax.Array:
        rows = nets[f"{name}_head"](params[f"{name}_head"], x.reshape(-1, x.shape[-1]))
        return rows.reshape(*x.shape[:-1], -1)

    def probabilities(name: str, frozen: Tree, taught: Tree, potentials: Tree, temp: jax.Array):
        prototypes = frozen["teacher"][f"{name}_head"]["last_layer"]["prototypes"]
        rows = potentials[f"{name}_rows"]
        found = Potentials(potentials[f"{name}_prototypes"], rows.reshape(-1))
        probs = target_probabilities(Targets(ssl.fold(taught[name]), prototypes, found, temp))
        return probs.reshape(*rows.shape, -1)

    def compute(student: Tree, frozen: Tree, batch: Tree, scalars: Tree, key: jax.Array) -> Tree:
        views, images = fns.prepare(batch), batch["masks"].shape[0]
        taught = fns.teach(frozen, views, batch)
        potentials, _ = fns.match(frozen, taught, {}, scalars)
        crops = (ssl.fold(views["global"]), ssl.fold(views["local"]))
        masks = (ssl.fold(batch["masks"]) if masked_student else None, None)
        seen = dict(
            zip(
                ("student_global", "student_local"),
                networks.student["backbone"](
                    student["backbone"], crops, masks=masks, groups=batch["groups"], key=key
                ),
                strict=True,
            )
        )
        (seen["teacher"],) = networks.teacher["backbone"](frozen["teacher"]["backbone"], crops[:1])

        found = {}
        for name, features in seen.items():
            cls = ssl.unfold(features.cls, features.cls.shape[0] // images)  # [b, v, d]
            nets, params = (networks.student, student)
            if name == "teacher":
                nets, params = networks.teacher, frozen["teacher"]
            found[f"{name}/cls_pre_head"] = cls
            found[f"{name}/cls_after_head"] = logits(nets, params, "dino", cls)
        for name, target in (("dino", "cls_centered"), ("ibot", "masked_patch_centered")):
            if name in taught:
                temp = scalars["teacher_temp"]
                probs = probabilities(name, frozen, taught, potentials, temp)
                found[f"teacher/{target}"] = probs
        chosen = ssl.masked_tokens(seen["student_global"].patches, batch["mask_indices"])
        found[f"student_global/{MASKED}after_head"] = logits(
            networks.student, student, "ibot", chosen
        )
        if phase.gram.teacher != "none":
            anchors = seen["teacher"].patches
            if phase.gram.teacher == "snapshot":
                (features,) = networks.gram(frozen["gram"], (ssl.fold(views["gram"]),))
                grid, to = (
                    tuple(side // patch for side in views[name].shape[2:4])
                    for name in ("gram", "global")
                )
                flags = (phase.gram.resize, phase.gram.antialias)
                anchors = gram.resize_features(features.patches, grid, to, *flags)
            found["gram/student_patches"] = ssl.unfold(seen["student_global"].patches, 2)
            found["gram/teacher_patches"] = ssl.unfold(anchors, 2)
        return found

    return compute


def crop_major(name: str, x: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """An intermediate tensor in the reference's order of rows; masks [b, 2, p]."""
    if MASKED in name:  # [1, m, k], one row for each masked patch of [b, 2, p]
        place = np.cumsum(masks).reshape(masks.shape) - 1
        return x[0][np.moveaxis(place, 1, 0)[np.moveaxis(masks, 1, 0)]]
    x = np.moveaxis(x, 0, 1)  # [b, v, ...] -> [v, b, ...]
    return x.reshape(-1, *x.shape[2:]) if name.startswith("gram/") else x


# ---- the tests ----------------------------------------------------------------------------------


def steps_with(kind: str):
    """The numbers of the steps that have arrays of a kind."""

    def numbers(case: vectors.Case) -> list[int]:
        return [int(name[4:]) for name in case.matching(rf"step\d+(?=/{kind}/)")]

    return numbers


def compare(
    found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray], mean: float = np.inf, **tol
) -> None:
    """Every wanted array (buffers aside) close to the one of its name, none left over."""
    wanted = {
        name: array
        for name, array in wanted.items()
        if not reference.BUFFERS.fullmatch(name.split(".", 1)[-1])
    }
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        vectors.assert_close(found[name], array, name=name, **tol)
        assert np.abs(found[name] - array).mean() < mean, f"{name}: mean difference"


def gradients(case: vectors.Case, step: int) -> dict[str, np.ndarray]:
    """Of all parameters to which the reference gives one, before clipping."""
    found = to_reference(trace(case).steps[step]["gradients"])
    without = case.meta["case"].get("params_without_gradient", [])
    return {name: array for name, array in found.items() if name not in without}


@vectors.files("ssl_*")
def test_rules(case: vectors.Case) -> None:
    """Learning-rate and decay multipliers of every parameter, and which are last layers."""
    done = trace(case)

    def field(path: str, leaf: np.ndarray, name: str) -> np.ndarray:
        value = np.asarray(getattr(done.rules[path], name))
        return np.broadcast_to(value.reshape(-1, *[1] * (leaf.ndim - 1)), leaf.shape)

    student = done.steps[0]["student"]
    table = case.meta["case"]["lr_mult_wd_mult_is_last"]
    for index, name in enumerate(optim.Rule._fields):
        tree = optim.map_with_path(functools.partial(field, name=name), student)
        found = to_reference(tree)
        assert set(found) == set(table)
        for parameter, row in table.items():
            np.testing.assert_allclose(found[parameter], row[index], rtol=1e-6, err_msg=parameter)


@vectors.files("ssl_*", sub=steps_with("inter"))
def test_intermediates(case: vectors.Case, sub: int) -> None:
    done = trace(case).steps[sub]
    for name, array in case.group(f"step{sub}/inter").items():
        tolerance = FEATURES if name.endswith(("pre_head", "patches")) else LOSS
        found = crop_major(name, done["inter"][name], done["masks"])
        vectors.assert_close(found, array, name=name, **tolerance)


@vectors.files("ssl_*", sub=steps_with("metric"))
def test_metrics(case: vectors.Case, sub: int) -> None:
    done, losses = trace(case).steps[sub]["metrics"], case.meta["case"]["losses"]
    left_out = {name for name in ("dino", "ibot", "koleo") if not losses[f"{name}_w"]}
    wanted = case.group(f"step{sub}/metric")
    for ours, theirs in METRICS.items():
        if theirs in wanted and ours.split("_")[0] not in left_out:
            tolerance = GRADIENT if ours.startswith("grad_norm") else LOSS
            vectors.assert_close(done[ours], wanted[theirs], name=theirs, **tolerance)
    assert set(wanted) <= set(METRICS.values())


@vectors.files("ssl_*", sub=steps_with("grad"))
def test_gradients(case: vectors.Case, sub: int) -> None:
    found = gradients(case, sub)
    compare(found, case.group(f"step{sub}/grad"), **GRADIENT)


@vectors.files("ssl_*", sub=steps_with("grad_l2"))
def test_gradient_norms(case: vectors.Case, sub: int) -> None:
    norms = {name: np.linalg.norm(array) for name, array in gradients(case, sub).items()}
    compare(norms, case.group(f"step{sub}/grad_l2"), **GRADIENT)


@vectors.files("ssl_*", sub=steps_with("student_after"))
def test_student_after(case: vectors.Case, sub: int) -> None:
    done = trace(case)
    found, wanted = to_reference(done.steps[sub]["student"]), case.group(f"step{sub}/student_after")
    compare(found, wanted, atol=STEP_ATOL * done.learning_rate, rtol=STEP_RTOL, mean=STEP_MEAN)


@vectors.files("ssl_*", sub=lambda case: case.matching(r"final/\w+(?=/)"))
def test_final(case: vectors.Case, sub: str) -> None:
    """Student, EMA and Gram teacher after the last step."""
    done, name = trace(case), sub.split("/")[1]
    if name == "gram_teacher":
        tree = {"backbone": done.gram}
    else:
        tree = done.steps[-1][name]
    tolerance = EMA
    if name == "student":
        tolerance = {"atol": STEP_ATOL * done.learning_rate, "rtol": STEP_RTOL}
    compare(to_reference(tree), case.group(sub), mean=STEP_MEAN, **tolerance)
