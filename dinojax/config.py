"""The keys of a run: their defaults, their meaning, and the checks made before any work starts.

An experiment file calls `base()` for the whole tree, changes values, and lists its phases with
`phase()`. Nothing here imports jax, so a config loads in milliseconds. Called by `experiments/*`,
`launch/run.py` and `train.py`.
"""

import difflib
import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

Number = int | float


def base() -> ConfigDict:
    """The whole tree with the defaults of the public ViT-L ImageNet-1k recipe (spec 7.2)."""
    config = ConfigDict()
    config.seed = 0
    config.objective = "ssl"  # dinojax/objectives/<name>.py
    config.batch_size = 2048  # images in the global batch of one step
    config.group = 64  # images the reference would hold on one GPU (DESIGN: groups)
    config.microbatches = 1  # pieces the batch is cut into, one after the other; same results
    config.teacher_dtype = "float32"  # bfloat16: half the memory, averaged with random rounding
    config.model = ConfigDict(
        {
            "name": "vit",  # or config.model = convnext()
            "variant": "large",
            "width": placeholder(int),  # None: what the variant says
            "depth": placeholder(int),
            "heads": placeholder(int),
            "ffn": placeholder(str),  # mlp | swiglu | swiglu32 | swiglu64 | swiglu128
            "ffn_ratio": placeholder(float),
            "patch_size": 16,
            "in_channels": 3,
            "storage_tokens": 0,
            "norm": "layernorm",  # layernorm (eps 1e-6) | layernormbf16 (eps 1e-5) | rmsnorm
            "qkv_bias": True,
            "proj_bias": True,
            "ffn_bias": True,
            "mask_k_bias": False,
            "layerscale": 1e-5,  # 0 = no LayerScale
            "drop_path": 0.3,
            "untie_cls_and_patch_norms": False,
            "untie_global_and_local_cls_norm": False,
            "rope_base": 100.0,  # 0 = periods from the two below
            "rope_min_period": placeholder(float),
            "rope_max_period": placeholder(float),
            "rope_normalize": "separate",  # separate | max | min
            "rope_shift": placeholder(float),
            "rope_jitter": placeholder(float),
            "rope_rescale": placeholder(float),
            "rope_bf16_periods": False,
            "size_policy": "floor",  # floor | resize | pad
            "dtype": "bfloat16",  # of matmul inputs and activations; parameters stay float32
            "scan": True,  # False unrolls the blocks: slower to compile, faster on some CPUs
            "remat": "none",
            "attention": "auto",  # auto | xla | cudnn | splash
        }
    )
    config.init = "fixed"  # fixed: N(0, 0.02^2) as the reference; fan_in: N(0, 1 / inputs)
    head = {"prototypes": 65536, "bottleneck": 256, "hidden": 2048, "layers": 3}
    config.dino_head = ConfigDict(dict(head))
    config.ibot_head = ConfigDict(dict(head))
    config.optim = ConfigDict(
        {
            "betas": (0.9, 0.999),
            "clip": 3.0,  # per network: backbone, dino_head, ibot_head
            "layer_decay": 0.9,
            "patch_embed_lr": 0.2,
            "lr_scaling": "sqrt_1024",  # sqrt_1024 | linear_256 | none
        }
    )
    config.data = ConfigDict(
        {
            # A SPEC, or "curated:DIRECTORY/mixture.json"; "" where there is a mixture.
            "source": "scenes",
            "mixture": (),  # of component(...)
            "workers": 0,  # worker processes; 0 = threads of this process
            "threads": 0,  # their number without workers; 0 = as many as there are cores
            "prefetch": 4,  # batches held ready
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
        }
    )
    config.augment = ConfigDict(
        {
            "flip": 0.5,
            "jitter": 0.8,
            "brightness": 0.4,
            "contrast": 0.4,
            "saturation": 0.2,
            "hue": 0.1,
            "grayscale": 0.2,
            # The effective probabilities: the reference applies blur with one minus the nominal.
            "blur": (0.0, 0.9, 0.5),  # first global, second global, local
            "blur_sigma": (0.1, 2.0),
            "solarize": (0.0, 0.2, 0.0),
            "solarize_threshold": 128,
        }
    )
    config.mesh = ConfigDict(
        {
            "data": 1,
            "fsdp": -1,  # -1: all devices that remain
            "tensor": 1,
            "shard_above": 2**20,  # arrays with fewer elements are kept whole on every device
        }
    )
    config.log_every = 10
    config.checkpoint = ConfigDict({"every": 1000, "keep": 3, "keep_every": 0})
    config.eval = ConfigDict(
        {
            "every": 0,  # steps between evaluations; 0 = at the end of each phase only
            # Labelled sources of bank and queries; "" = no k-NN; options alone ("split=val") name
            # another part of data.source, or of the first component of a mixture.
            "knn_train": "",
            "knn_val": "",
            "knn_k": 20,
            "size": 224,  # image side for features
            "batch": 64,
            "pictures": 8,  # images of the PCA sheet; 0 = none
        }
    )
    config.max_nonfinite = 3  # steps in a row whose update was discarded before the run ends
    config.wandb = ""  # project name; "" = off
    config.phases = ()
    return config


def component(
    name: str, source: str, weight: Number | None = None, homogeneous: Number = 0.0
) -> ConfigDict:
    """A component of `config.data.mixture`: a SPEC and how often it is drawn.

    `weight`: its share of the rows of heterogeneous batches, relative to the other components'
    (None: its number of images; 0: it takes no part in them). `homogeneous`: the probability that
    the whole batch of a step is of this component alone.
    """
    found = ConfigDict(
        {
            "name": name,
            "source": source,
            "weight": placeholder(float),
            "homogeneous": float(homogeneous),
        }
    )
    if weight is not None:
        found.weight = float(weight)
    return found


def constant(number: Number) -> dict[str, Any]:
    """A schedule that never changes."""
    return v2(number, number, number, 0, 0)


def v2(start: Number, peak: Number, end: Number, warmup: int, cosine: int = -1) -> dict[str, Any]:
    """Linear start -> peak over `warmup` steps, cosine to `end` over `cosine` (-1: the rest)."""
    return {
        "kind": "v2",
        "start": float(start),
        "peak": float(peak),
        "end": float(end),
        "warmup": int(warmup),
        "cosine": int(cosine),
    }


def v1(
    start: Number, base: Number, end: Number, warmup: int, trunc_extra: Number = 0.0
) -> dict[str, Any]:
    """The older family: warm-up including both ends, then a cosine that never quite arrives."""
    return {
        "kind": "v1",
        "start": float(start),
        "base": float(base),
        "end": float(end),
        "warmup": int(warmup),
        "trunc_extra": float(trunc_extra),
    }


def v1_linear(start: Number, end: Number, warmup: int) -> dict[str, Any]:
    """The older teacher-temperature schedule: linear warm-up including both ends, then constant."""
    return {"kind": "v1_linear", "start": float(start), "end": float(end), "warmup": int(warmup)}


def convnext(variant: str = "tiny") -> ConfigDict:
    """The model section of a ConvNeXt, in place of the ViT's: `config.model = c.convnext()`."""
    return ConfigDict(
        {
            "name": "convnext",
            "variant": variant,
            "depths": placeholder(tuple),  # None: what the variant says; four stages
            "dims": placeholder(tuple),
            "in_channels": 3,
            "layerscale": 1e-6,
            "drop_path": 0.0,  # of the last block; rises linearly from 0
            "dtype": "bfloat16",
            "scan": True,
            "remat": "none",  # none | full
        }
    )


def phase(name: str, steps: int, **sections: Any) -> ConfigDict:
    """One phase: what it starts from, what it sees, what it optimises, for how many steps.

    `sections` replace values by name, e.g. `crops={"sizes": ((256, 112, 512),)}`; an unknown name
    raises. Step counts in schedules are counted from the start of the phase.
    """
    result = ConfigDict(
        {
            "name": name,
            "steps": steps,
            # previous: go on with everything (from scratch in the first phase)
            # previous_teacher: student and teacher = the EMA so far, fresh optimizer
            # scratch | PATH of weights | RUN_DIRECTORY[@STEP]
            "start": "previous",
            "batch_size": placeholder(int),  # None: config.batch_size
            "group": placeholder(int),  # None: config.group
            "crops": {
                # (global, local, gram) pixels; gram 0 = no separate Gram crop
                "sizes": ((224, 96, 0),),
                "probabilities": (1.0,),
                "locals": 8,
                "global_scale": (0.32, 1.0),
                "local_scale": (0.05, 0.32),
                "local_from_global": False,  # local crops are cut from the global ones
                "gram_undistorted": True,
            },
            "masks": {"probability": 0.5, "ratio": (0.1, 0.5), "circular_shift": False},
            "losses": {
                "dino": 1.0,  # a weight of 0 leaves the term out of the compiled step
                "ibot": 1.0,
                "koleo": 0.1,
                "koleo_group": placeholder(int),  # None: the group; 0: the whole batch
                "koleo_topk": 1,
                "ignore_diagonal": True,
                "student_temp": 0.1,
                "centering": "sinkhorn",  # sinkhorn | softmax (DINO v1/v2)
                "sinkhorn_iterations": 3,
                "center_momentum": 0.9,
            },
            "gram": {
                "teacher": "none",  # none | snapshot | ema (the current EMA teacher)
                # of a snapshot: start (EMA at the phase's start) | step:N (of this run)
                # | PATH of weights | RUN_DIRECTORY[@STEP]
                "source": "start",
                "normalized": True,
                "img_level": True,  # False: one Gram matrix over a group's tokens
                "tokens": "all",  # all | masked | unmasked (the last two need img_level=False)
                "remove_neg": False,
                "remove_only_teacher_neg": False,
                "resize": "bicubic",  # bicubic | bilinear: the Gram teacher's features to ours
                "antialias": False,  # of that resize
                "refresh_first": 0,  # copy the EMA again after this many steps, ...
                "refresh_every": 0,  # ... every so many (0 = never) ...
                "refresh_max": 0,  # ... at most so often (0 = no limit)
                "stats": False,  # also log the loss on masked and on unmasked tokens
            },
            "schedules": {
                "lr": v1(0.0, 1e-3, 1e-6, 12500),
                "freeze_last_layer": 1250,
                "weight_decay": v1(0.0, 0.04, 0.4, 0),
                "momentum": v1(0.0, 0.992, 1.0, 0),
                "teacher_temp": v1_linear(0.04, 0.07, 37500),
                "dino_local": constant(1.0),
                "gram": constant(0.0),
            },
        }
    )
    for key, value in sections.items():
        if key not in result:
            raise ValueError(f"phase {name!r} has no key {key!r}; {nearest(key, result)}")
        if isinstance(result[key], ConfigDict):
            replace_section(result[key], value, f"phase {name!r}: {key}")
        else:
            result[key] = value
    return result


def replace_section(
    section: ConfigDict, values: Mapping[str, Any] | ConfigDict, where: str
) -> None:
    """Set `values` in `section`; schedules are replaced whole, since their kinds differ in keys."""
    for key, value in values.items():
        if key not in section:
            raise ValueError(f"{where} has no key {key!r}; {nearest(key, section)}")
        if isinstance(value, Mapping | ConfigDict):
            with section.ignore_type():
                section[key] = ConfigDict(dict(value))
        else:
            section[key] = value


def nearest(key: str, known: Any) -> str:
    """'did you mean ...' for an unknown key."""
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.4)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"


def resolve(config: ConfigDict) -> ConfigDict:
    """A frozen-shape copy in which every phase states its own batch, group and KoLeo group."""
    config = config.copy_and_resolve_references()
    # A tuple is not copied with the tree that holds it.
    config.phases = tuple(phase.copy_and_resolve_references() for phase in config.phases)
    config.data.mixture = tuple(
        part.copy_and_resolve_references() if isinstance(part, ConfigDict) else part
        for part in config.data.mixture
    )
    for phase in config.phases:
        phase.batch_size = config.batch_size if phase.batch_size is None else phase.batch_size
        phase.group = config.group if phase.group is None else phase.group
        if phase.losses.koleo_group is None:
            phase.losses.koleo_group = phase.group
        elif phase.losses.koleo_group == 0:
            phase.losses.koleo_group = phase.batch_size
    return config


def flatten(config: ConfigDict) -> dict[str, Any]:
    """{"model.patch_size": 16, "phases[0].steps": 125000, ...} in a stable order."""
    return dict(_leaves("", config))


def _leaves(prefix: str, node: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(node, ConfigDict):
        for key in sorted(node):
            yield from _leaves(f"{prefix}.{key}" if prefix else key, node[key])
    elif isinstance(node, tuple | list) and node and isinstance(node[0], ConfigDict):
        for index, item in enumerate(node):
            yield from _leaves(f"{prefix}[{index}]", item)
    else:
        yield prefix, node


def to_json(config: ConfigDict) -> str:
    """The whole tree as JSON text."""

    def plain(node: Any) -> Any:
        if isinstance(node, ConfigDict):
            return {key: plain(node[key]) for key in sorted(node)}
        if isinstance(node, tuple | list):
            return [plain(item) for item in node]
        return node

    return json.dumps(plain(config), indent=1) + "\n"


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Sentences naming the flattened keys in which two configs differ."""
    normal = json.dumps
    return [
        f"{key}: {one.get(key)!r} there, {other.get(key)!r} here"
        for key in sorted(set(one) | set(other))
        if normal(one.get(key)) != normal(other.get(key))
    ]


# Keys that may change between two starts of the same run: they move where and how fast it runs,
# not what it computes.
MAY_CHANGE = ("mesh.", "data.workers", "data.threads", "data.prefetch", "checkpoint.", "log_every")
MAY_CHANGE += ("eval.", "wandb", "model.attention", "model.scan", "model.remat")


def continues(saved: Mapping[str, Any], config: ConfigDict) -> list[str]:
    """Differences that forbid to go on with a run saved under another config ([] = go on).

    A phase may be appended and the last phase may be made longer only if its schedules do not
    depend on its length; to keep this simple any change of a phase is refused.
    """
    here = json.loads(json.dumps(flatten(config)))
    kept = [
        key
        for key in set(saved) | set(here)
        if not any(key.startswith(free) for free in MAY_CHANGE)
    ]
    return differences({k: saved.get(k) for k in kept}, {k: here.get(k) for k in kept})


def validate(config: ConfigDict) -> None:
    """Raise ValueError with one sentence if a resolved config cannot work."""
    if not config.phases:
        raise ValueError("config.phases is empty; give at least one config.phase(name, steps)")
    names = [p.name for p in config.phases]
    if len(set(names)) < len(names):
        raise ValueError(f"phases must have different names, got {names}")
    if config.objective != "ssl":
        raise ValueError(f"config.objective is {config.objective!r}; known: 'ssl'")
    if len(config.data.mean) != config.model.in_channels:
        raise ValueError(
            f"config.data.mean has {len(config.data.mean)} values for "
            f"{config.model.in_channels} channels (config.model.in_channels); `dinojax data SPEC` "
            f"prints the mean and std of a source"
        )
    _validate_data(config.data)
    if config.init not in ("fixed", "fan_in"):
        raise ValueError(f"config.init is {config.init!r}; known: 'fixed', 'fan_in'")
    if config.teacher_dtype not in ("float32", "bfloat16"):
        known = nearest(config.teacher_dtype, ("float32", "bfloat16"))
        raise ValueError(f"config.teacher_dtype is {config.teacher_dtype!r}; {known}")
    first = 0
    for phase_config in config.phases:
        _validate_phase(config, phase_config)
        _validate_snapshot(config, phase_config, first)
        first += phase_config.steps


def _validate_data(data: ConfigDict) -> None:
    """One source or a mixture; what its numbers must be, `dinojax.data.mixture` says."""
    if not data.source and not data.mixture:
        raise ValueError(
            "config.data.source is '' and config.data.mixture is empty; give one, such as "
            "--config.data.source=scenes"
        )
    if data.source and data.mixture:
        raise ValueError(
            f"config.data.source is {data.source!r} beside a mixture of {len(data.mixture)} "
            "components; to train on the source alone give --config.data.mixture='()' too, to "
            "train on the mixture --config.data.source="
        )
    known = component("", "")
    for index, part in enumerate(data.mixture):
        if not isinstance(part, ConfigDict):
            raise ValueError(
                f"config.data.mixture[{index}] is {part!r}; expected component(name, source)"
            )
        for key in part:
            if key not in known:
                raise ValueError(
                    f"config.data.mixture[{index}] has no key {key!r}; {nearest(key, known)}"
                )
        missing = sorted(set(known) - set(part))
        if missing:
            raise ValueError(f"config.data.mixture[{index}] needs {', '.join(missing)}")


def _validate_phase(config: ConfigDict, phase: ConfigDict) -> None:
    where = f"phase {phase.name!r}"
    batch, group, pieces = phase.batch_size, phase.group, config.microbatches
    if phase.steps < 1:
        raise ValueError(f"{where}: steps is {phase.steps}, expected at least 1")
    for label, number in (("batch_size", batch), ("group", group), ("microbatches", pieces)):
        if number < 1:
            raise ValueError(f"{where}: {label} is {number}, expected at least 1")
    if batch % (group * pieces):
        near = max(1, round(batch / (group * pieces))) * group * pieces
        raise ValueError(
            f"{where}: batch_size {batch} is not a multiple of group x microbatches = "
            f"{group} x {pieces}; nearest: batch_size={near}"
        )
    if phase.losses.koleo:
        _validate_koleo(phase, batch // pieces, where)
    _validate_crops(config, phase, where)
    _validate_masks(config, phase, where)
    _validate_losses(phase, where)
    for key, schedule in phase.schedules.items():
        if isinstance(schedule, ConfigDict):
            _validate_schedule(schedule, f"{where}: schedules.{key}")
    if phase.schedules.lr.kind == "v1_linear":
        raise ValueError(f"{where}: schedules.lr.kind is 'v1_linear'; expected 'v2' or 'v1'")


def first_source(config: ConfigDict) -> str:
    """The SPEC that evaluations mean by options alone."""
    return config.data.mixture[0].source if config.data.mixture else config.data.source


def patch_stride(config: ConfigDict) -> int:
    """Pixels of the image per patch token and axis."""
    return 32 if config.model.name == "convnext" else config.model.patch_size


def _validate_koleo(phase: ConfigDict, piece: int, where: str) -> None:
    """Neighbours are searched inside a micro-batch, in whole groups."""
    neighbours, group, topk = phase.losses.koleo_group, phase.group, phase.losses.koleo_topk
    fitting = [n for n in range(group, piece + 1, group) if n > 1 and piece % n == 0]
    if neighbours not in fitting:
        near = min(fitting, key=lambda n: abs(n - neighbours), default="none, losses.koleo=0")
        raise ValueError(
            f"{where}: losses.koleo_group is {neighbours}; it must hold at least 2 images, be a "
            f"multiple of the group ({group}) and divide a micro-batch ({piece} images); "
            f"nearest: {near}"
        )
    if not 1 <= topk < neighbours:
        raise ValueError(
            f"{where}: losses.koleo_topk is {topk}; expected 1 to {neighbours - 1}, the other "
            "images of a KoLeo group"
        )


def _validate_masks(config: ConfigDict, phase: ConfigDict, where: str) -> None:
    """The exact counts of spec 4 must leave iBOT something to predict."""
    chance, (low, high) = phase.masks.probability, phase.masks.ratio
    if not 0 <= chance <= 1 or not 0 <= low <= high <= 1:
        raise ValueError(
            f"{where}: masks.probability is {chance} and masks.ratio {(low, high)}; expected "
            "0 <= probability <= 1 and 0 <= low <= high <= 1"
        )
    if not phase.losses.ibot:
        return
    patch = patch_stride(config)
    patches = min((size // patch) ** 2 for size, _, _ in phase.crops.sizes)
    if int(2 * phase.group * chance) < 1 or int(patches * high) < 1:
        raise ValueError(
            f"{where}: no patch is masked with masks.probability {chance} of {2 * phase.group} "
            f"crops and masks.ratio up to {high} of {patches} patches; losses.ibot needs one"
        )


def _validate_crops(config: ConfigDict, phase: ConfigDict, where: str) -> None:
    patch, crops = patch_stride(config), phase.crops
    policy = config.model.get("size_policy", "floor")  # ConvNeXt's strides cut as well
    if not crops.sizes or len(crops.sizes) != len(crops.probabilities):
        raise ValueError(
            f"{where}: crops.sizes has {len(crops.sizes)} triples and crops.probabilities "
            f"{len(crops.probabilities)} numbers; expected the same count, at least 1"
        )
    if not math.isclose(sum(crops.probabilities), 1.0, abs_tol=1e-6):
        raise ValueError(f"{where}: crops.probabilities sum to {sum(crops.probabilities)}, not 1")
    for triple in crops.sizes:
        if len(triple) != 3:
            raise ValueError(f"{where}: crop sizes {triple} must be (global, local, gram)")
        for kind, size in zip(("global", "local", "gram"), triple, strict=True):
            if kind == "gram" and size == 0:
                continue
            # Policy "floor" cuts what is left over a multiple, as the published high-resolution
            # crops of 168 pixels need; the other policies would change the grid under the masks.
            if size < patch or (size % patch and policy != "floor"):
                near = max(patch, round(size / patch) * patch)
                raise ValueError(
                    f"{where}: a {kind} crop of {size} pixels does not fit the patch size {patch} "
                    f"(size_policy {policy!r}); nearest: {near}"
                )
        if phase.gram.teacher == "snapshot" and triple[2] == 0:
            raise ValueError(
                f"{where}: gram.teacher='snapshot' needs a gram crop size, got {triple}; "
                f"nearest: {(triple[0], triple[1], 2 * triple[0])}"
            )
        if phase.gram.teacher != "snapshot" and triple[2]:
            raise ValueError(
                f"{where}: crop sizes {triple} ask for gram crops but gram.teacher is "
                f"{phase.gram.teacher!r}; nearest: {(triple[0], triple[1], 0)}"
            )
        if triple[2] and triple[2] < triple[0]:
            raise ValueError(
                f"{where}: the gram crop of {triple[2]} pixels is smaller than the global crop of "
                f"{triple[0]}; nearest: {triple[0]}"
            )
        if crops.local_from_global and triple[1] > triple[0]:
            raise ValueError(
                f"{where}: a local crop of {triple[1]} pixels does not lie inside a global one of "
                f"{triple[0]} (crops.local_from_global); nearest: {triple[0]}"
            )
    if crops.locals < 1:
        raise ValueError(f"{where}: crops.locals is {crops.locals}; expected at least 1")
    for key in ("global_scale", "local_scale"):
        low, high = crops[key]
        if not 0 < low <= high <= 1:
            raise ValueError(f"{where}: crops.{key} is {crops[key]}, expected 0 < low <= high <= 1")


def _validate_losses(phase: ConfigDict, where: str) -> None:
    choices = (
        ("losses.centering", phase.losses.centering, ("sinkhorn", "softmax")),
        ("gram.teacher", phase.gram.teacher, ("none", "snapshot", "ema")),
        ("gram.tokens", phase.gram.tokens, ("all", "masked", "unmasked")),
        ("gram.resize", phase.gram.resize, ("bicubic", "bilinear")),
    )
    for key, value, known in choices:
        if value not in known:
            raise ValueError(f"{where}: {key} is {value!r}; {nearest(value, known)}")
    if phase.gram.tokens != "all" and phase.gram.img_level:
        raise ValueError(
            f"{where}: gram.tokens={phase.gram.tokens!r} needs gram.img_level=False "
            "(images have different numbers of masked tokens)"
        )
    if phase.gram.remove_neg and phase.gram.remove_only_teacher_neg:
        raise ValueError(
            f"{where}: gram.remove_neg and gram.remove_only_teacher_neg exclude each other"
        )
    if not any((phase.losses.dino, phase.losses.ibot, phase.gram.teacher != "none")):
        raise ValueError(f"{where}: no loss is left; set losses.dino or losses.ibot above 0")


def _validate_snapshot(config: ConfigDict, phase: ConfigDict, first: int) -> None:
    """A Gram teacher from this run's own past needs a checkpoint that is still there."""
    if phase.gram.teacher != "snapshot" or not phase.gram.source.startswith("step:"):
        return
    where, text = f"phase {phase.name!r}", phase.gram.source[len("step:") :]
    kept, every = config.checkpoint.keep_every, config.checkpoint.every
    if not text.isdigit() or not 0 < int(text) <= first:
        raise ValueError(
            f"{where}: gram.source is {phase.gram.source!r}; expected step:N with N from 1 to "
            f"{first}, where the phase begins"
        )
    if not kept or int(text) % kept or kept % every:
        raise ValueError(
            f"{where}: gram.source is {phase.gram.source!r}, but checkpoints are kept every "
            f"{kept} steps (0 = none) out of one every {every}; set checkpoint.keep_every={text} "
            f"and checkpoint.every to a divisor of it"
        )


def _validate_schedule(schedule: ConfigDict, where: str) -> None:
    forms = {"v2": v2(0, 0, 0, 0), "v1": v1(0, 0, 0, 0), "v1_linear": v1_linear(0, 0, 0)}
    kind = str(schedule.get("kind", "missing"))
    if kind not in forms:
        raise ValueError(f"{where}: kind is {kind!r}; {nearest(kind, forms)}")
    for key in schedule:
        if key not in forms[kind]:
            raise ValueError(
                f"{where}: a {kind} schedule has no key {key!r}; {nearest(key, forms[kind])}"
            )
    missing = sorted(set(forms[kind]) - set(schedule) - {"cosine", "trunc_extra"})
    if missing:
        raise ValueError(f"{where}: a {kind} schedule needs {', '.join(missing)}")


def load_file(path: str, argument: str | None = None) -> ConfigDict:
    """The config of an experiment file (`get_config(argument)`), without flags."""
    file = pathlib.Path(path)
    if not file.is_file():
        siblings = [str(p) for p in pathlib.Path("experiments").glob("*.py")]
        raise ValueError(f"no experiment file {path!r}; {nearest(str(path), siblings)}")
    scope: dict[str, Any] = {"__name__": file.stem, "__file__": str(file)}
    exec(compile(file.read_text(), str(file), "exec"), scope)
    return scope["get_config"](argument) if argument else scope["get_config"]()
