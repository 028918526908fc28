"""ViT-L/16 through pretraining, Gram anchoring and high resolution, in one run directory.

    python launch/run.py --config experiments/gram_vitl.py \
        --config.data.source=folder:/images --workdir runs/a

`--config experiments/gram_vitl.py:tiny` is the same run shrunk to minutes on a laptop: every phase
and every mechanism, at sizes that learn little. Full size: not run yet.

The published ViT-L recipe has no Gram phase and the published Gram phase is the 7B's, so some
values here are choices; each carries its reason. Everything else is the 7B's.
"""

from ml_collections import ConfigDict

from dinojax import config as c

# Lengths of the published satellite models (same recipe on 493 M images): 100k + 10k + 8k steps.
PRETRAIN, GRAM, HIGHRES = 100_000, 10_000, 8_000
# The 7B's Gram teacher is its EMA after a fifth of pretraining; half of that did as well (paper).
SNAPSHOT = PRETRAIN // 5


def get_config(variant: str = "") -> ConfigDict:
    config = c.base()
    config.batch_size = 2048  # the ViT-L recipe's
    config.group = 16  # the 7B's images per GPU, hence KoLeo's neighbours
    config.data.source = "folder:data/images"
    config.model.update(
        {
            "variant": "large",
            "storage_tokens": 4,
            "drop_path": 0.3,  # the ViT-L recipe's; the 7B's is 0.4
            "norm": "layernormbf16",
            "mask_k_bias": True,  # as in the released ViT-L
            "rope_rescale": 2.0,
            "remat": "full",
        }
    )
    # Heads stay at the ViT-L recipe's 65,536 prototypes.
    # The ViT-L recipe decays by 0.9 a block at a cosine rate; with a constant rate the 7B's 0.98
    # would leave the early blocks of a 24-block network almost undecayed, so 0.9 stays.
    config.optim.update({"betas": (0.9, 0.99), "clip": 3.0, "layer_decay": 0.9})
    config.augment.flip = 0.0
    config.checkpoint.update({"every": 1000, "keep": 3, "keep_every": SNAPSHOT})
    config.eval.every = 10_000
    config.phases = (pretrain(), gram(), highres())
    if variant == "tiny":
        shrink(config)
    elif variant:
        raise ValueError(f"unknown variant {variant!r} of gram_vitl.py; known: tiny")
    return config


def pretrain() -> ConfigDict:
    return c.phase(
        "pretrain",
        steps=PRETRAIN,
        crops={"sizes": ((256, 112, 0),)},
        schedules={
            # The recipe's cosine peaks at 1e-3 and averages half of it. The Gram phase goes on from
            # here, so the rate must not have decayed to zero: constant, at a quarter of that peak
            # because no cool-down follows.
            "lr": c.v2(start=0.0, peak=2.5e-4, end=2.5e-4, warmup=PRETRAIN // 10),
            "freeze_last_layer": 1250,  # the ViT-L recipe's
            "weight_decay": c.constant(0.04),
            "momentum": c.constant(0.994),
            "teacher_temp": c.v2(start=0.04, peak=0.07, end=0.07, warmup=PRETRAIN // 10),
        },
    )


def gram() -> ConfigDict:
    return c.phase(
        "gram",
        steps=GRAM,
        crops={"sizes": ((256, 112, 512),)},
        gram={
            "teacher": "snapshot",
            "source": f"step:{SNAPSHOT}",
            # Three refreshes as in the 7B's phase, spread evenly over this shorter one.
            "refresh_first": GRAM // 4,
            "refresh_every": GRAM // 4,
            "refresh_max": 3,
        },
        schedules={
            "lr": c.constant(1.5e-4),  # the 7B's step down from pretraining: 3e-5 after 5e-5
            "freeze_last_layer": 0,
            "weight_decay": c.constant(0.04),
            "momentum": c.constant(0.999),
            "teacher_temp": c.constant(0.07),
            "dino_local": c.v2(start=1.0, peak=1.0, end=0.5, warmup=0, cosine=1000),
            "gram": c.v2(start=0.0, peak=0.0, end=2.0, warmup=0, cosine=1000),
        },
    )


def highres() -> ConfigDict:
    return c.phase(
        "highres",
        steps=HIGHRES,
        start="previous_teacher",
        group=8,
        crops={
            "sizes": (
                (512, 112, 768),
                (768, 112, 1152),
                (768, 168, 1152),
                (768, 224, 1152),
                (768, 336, 1152),
            ),
            "probabilities": (0.3, 0.3, 0.3, 0.05, 0.05),
        },
        losses={"koleo_group": 16},
        gram={"teacher": "snapshot", "source": "start"},
        schedules={
            # The 7B ends at a quarter of its pretraining rate, after a half-cosine ramp.
            "lr": c.v2(start=0.0, peak=0.0, end=6.25e-5, warmup=0, cosine=HIGHRES),
            "freeze_last_layer": 0,
            "weight_decay": c.constant(0.04),
            "momentum": c.constant(0.999),
            "teacher_temp": c.constant(0.07),
            "dino_local": c.constant(0.5),
            "gram": c.constant(1.5),
        },
    )


def shrink(config: ConfigDict) -> None:
    """The same three phases at sizes for a CPU: 64-pixel images, a few dozen steps each."""
    config.batch_size, config.group = 16, 4
    config.data.source = "scenes:512"
    config.data.threads = 1
    config.model.update({"variant": "tiny", "width": 64, "depth": 3, "heads": 2, "patch_size": 8})
    config.model.update({"dtype": "float32", "remat": "none", "drop_path": 0.1})
    for head in (config.dino_head, config.ibot_head):
        head.update({"prototypes": 128, "bottleneck": 32, "hidden": 64})
    config.checkpoint.update({"every": 10, "keep_every": 10})
    config.eval.update({"every": 0, "size": 64})
    config.log_every = 5
    first, second, third = config.phases
    first.steps, second.steps, third.steps = 30, 30, 20
    first.crops.sizes = ((48, 24, 0),)
    second.crops.sizes = ((48, 24, 96),)
    third.crops.sizes, third.crops.probabilities = ((64, 24, 96), (96, 32, 144)), (0.5, 0.5)
    third.losses.koleo_group = 8
    third.group = 4
    second.gram.update({"source": "step:10", "refresh_first": 10, "refresh_every": 10})
    for phase in config.phases:
        phase.crops.locals = 4
    for schedule in (first.schedules.lr, first.schedules.teacher_temp):
        schedule.warmup = 10
    first.schedules.freeze_last_layer = 5
    for schedule in (second.schedules.dino_local, second.schedules.gram):
        schedule.cosine = 10
    third.schedules.lr.cosine = 20
