"""ViT-7B/16 through all phases of the DINOv3 recipe: pretrain, Gram anchoring, high resolution.

    python launch/run.py --config experiments/vit7b.py \
        --config.data.source=folder:/data/web --workdir runs/vit7b

Reference: 256 H100; its data are private. Here: not run yet; needs a pod (about 108 GB of float32
state for student, teacher, Gram teacher and moments, sharded over the mesh).

The recipe mixes its data: one step in ten is a batch of ImageNet-1k alone, the others draw from all
remaining parts (their ratios are not published; without weights it is by size). With data at hand:

    config.data.source = ""
    config.data.mixture = (
        c.component("clusters", "curated:lvd/samples.parquet"),
        c.component("retrieved", "curated:retrieved/samples.parquet"),
        c.component("imagenet22k", "tar:/data/imagenet22k/*.tar"),
        c.component("mapillary", "folder:/data/mapillary"),
        c.component("imagenet1k", "tfds:imagenet2012:train", weight=0, homogeneous=0.1),
    )

Values are those of the three published 7B configs. Where they count from the start of the whole
run and a phase here counts from its own start, the numbers are shifted accordingly.
"""

from ml_collections import ConfigDict

from dinojax import config as c


def get_config() -> ConfigDict:
    config = c.base()
    config.batch_size = 4096
    config.group = 16  # 256 GPUs of 16 images
    config.data.source = "folder:data/web"
    config.model.update(
        {
            "variant": "7b",
            "storage_tokens": 4,
            "drop_path": 0.4,
            "norm": "layernormbf16",
            "qkv_bias": False,
            "mask_k_bias": True,
            "untie_global_and_local_cls_norm": True,
            "rope_rescale": 2.0,
            "remat": "full",
        }
    )
    config.dino_head.update({"prototypes": 262144, "bottleneck": 512, "hidden": 8192})
    config.ibot_head.update({"prototypes": 98304, "bottleneck": 384, "hidden": 4096})
    config.optim.update({"betas": (0.9, 0.99), "clip": 30.0, "layer_decay": 0.98})
    config.augment.flip = 0.0
    config.checkpoint.update({"every": 1000, "keep": 3, "keep_every": 50_000})
    config.eval.every = 50_000
    config.phases = (pretrain(), gram(), highres())
    return config


def pretrain() -> ConfigDict:
    """1 M steps at a constant rate; the snapshot for the Gram teacher is kept on the way."""
    return c.phase(
        "pretrain",
        steps=1_000_000,
        crops={"sizes": ((256, 112, 0),)},
        schedules={
            "lr": c.v2(start=0.0, peak=5e-5, end=5e-5, warmup=100_000),
            "freeze_last_layer": 5000,
            "weight_decay": c.constant(0.04),
            "momentum": c.constant(0.994),  # the paper's text says 0.999, its config 0.994
            "teacher_temp": c.v2(start=0.04, peak=0.07, end=0.07, warmup=100_000),
        },
    )


def gram() -> ConfigDict:
    """Dense features are pulled back to those of the EMA of step 200,000, at twice the pixels."""
    return c.phase(
        "gram",
        steps=200_000,  # the config allows as many; the paper does not state the exact stop
        crops={"sizes": ((256, 112, 512),)},
        gram={
            "teacher": "snapshot",
            "source": "step:200000",
            "refresh_first": 10_000,
            "refresh_every": 10_000,
            "refresh_max": 3,
        },
        schedules={
            "lr": c.constant(3e-5),
            "freeze_last_layer": 0,
            "weight_decay": c.constant(0.04),
            "momentum": c.constant(0.999),
            "teacher_temp": c.constant(0.07),
            "dino_local": c.v2(start=1.0, peak=1.0, end=0.5, warmup=0, cosine=1000),
            "gram": c.v2(start=0.0, peak=0.0, end=2.0, warmup=0, cosine=1000),
        },
    )


def highres() -> ConfigDict:
    """Mixed resolutions from the Gram phase's EMA, which also stays the fixed Gram teacher."""
    return c.phase(
        "highres",
        steps=10_000,  # the paper's number; the config permits 30,000
        start="previous_teacher",
        batch_size=2048,
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
            "lr": c.v2(start=0.0, peak=0.0, end=1.25e-5, warmup=0, cosine=10_000),
            "freeze_last_layer": 0,
            "weight_decay": c.constant(0.04),
            "momentum": c.constant(0.999),
            "teacher_temp": c.constant(0.07),
            "dino_local": c.constant(0.5),
            "gram": c.constant(1.5),
        },
    )
