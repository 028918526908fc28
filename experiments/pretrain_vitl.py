"""ViT-L/16 on ImageNet-1k, the public recipe (vitl_im1k_lin834).

    python launch/run.py --config experiments/pretrain_vitl.py \
        --config.data.source=folder:/data/imagenet/train --workdir runs/vitl

Reference: 32 H100, about 14 hours, 82.0-82.2 k-NN and 83.3-83.5 linear on ImageNet-1k (its README).
Here: not run yet.
"""

from ml_collections import ConfigDict

from dinojax import config as c

EPOCH = 1250  # steps; 100 of them


def get_config() -> ConfigDict:
    config = c.base()
    config.data.source = "folder:data/imagenet/train"
    config.model.drop_path = 0.3
    config.model.remat = "full"
    config.checkpoint.every = 3750
    config.eval.every = 10 * EPOCH
    config.phases = (
        c.phase(
            "pretrain",
            steps=100 * EPOCH,
            crops={"sizes": ((224, 96, 0),)},
            schedules={
                "lr": c.v1(start=0.0, base=1e-3, end=1e-6, warmup=10 * EPOCH),
                "freeze_last_layer": EPOCH,
                "weight_decay": c.v1(start=0.0, base=0.04, end=0.4, warmup=0),
                "momentum": c.v1(start=0.0, base=0.992, end=1.0, warmup=0),
                "teacher_temp": c.v1_linear(start=0.04, end=0.07, warmup=30 * EPOCH),
            },
        ),
    )
    return config
