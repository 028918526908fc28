"""The whole system in minutes on a laptop CPU, on images it renders itself.

    python launch/run.py --config experiments/demo.py --workdir runs/demo

A small ViT learns on rendered scenes of which ten kinds exist, without being told; k-NN then asks
for the kind. What it reached, and what it did not: docs/results.md.

Choices that differ from the large recipes, each for a narrow network and a few hundred steps:

- scenes in even greys, where pattern and outline alone tell images apart: colour and brightness say
  nothing about the kind and are the first thing that two crops of an image agree on;
- weights drawn by fan-in and no LayerScale: at width 128 the reference's small initial values keep
  even a supervised network at chance for 100 steps;
- prototypes that stay where they were drawn: while targets are still noise, the cheapest way to a
  lower loss is to shrink them until every output is uniform (measured: the DINO loss then rests at
  ln K for hundreds of steps);
- no layer decay, and a teacher that follows within tens of steps.
"""

from ml_collections import ConfigDict

from dinojax import config as c

STEPS = 400


def get_config() -> ConfigDict:
    config = c.base()
    config.batch_size = config.group = 64
    config.init = "fan_in"
    config.data.source = "scenes:20000?even=1"
    config.model.update(
        {
            "variant": "tiny",
            "width": 128,
            "depth": 3,
            "heads": 4,
            "patch_size": 8,
            "layerscale": 0.0,
            "drop_path": 0.0,
            "dtype": "float32",
            "scan": False,
        }
    )
    for head in (config.dino_head, config.ibot_head):
        head.update({"prototypes": 512, "bottleneck": 64, "hidden": 256})
    config.optim.update({"layer_decay": 1.0, "patch_embed_lr": 1.0, "lr_scaling": "none"})
    config.augment.update(
        {"hue": 0.0, "grayscale": 0.0, "blur": (0.0, 0.0, 0.0), "solarize": (0.0, 0.0, 0.0)}
    )
    config.checkpoint.every = 200
    config.log_every = 20
    config.eval.update(
        {
            "every": 200,
            "knn_train": "scenes:2000?even=1",
            "knn_val": "scenes:500?split=val&even=1",
            "size": 48,
        }
    )
    config.phases = (
        c.phase(
            "pretrain",
            steps=STEPS,
            crops={
                "sizes": ((48, 24, 0),),
                "locals": 4,
                "global_scale": (0.4, 1.0),
                "local_scale": (0.15, 0.5),
            },
            schedules={
                "lr": c.v1(start=0.0, base=2e-3, end=1e-5, warmup=30),
                "freeze_last_layer": STEPS,
                "weight_decay": c.constant(0.04),
                "momentum": c.v1(start=0.0, base=0.97, end=1.0, warmup=0),
                "teacher_temp": c.constant(0.04),
            },
        ),
    )
    return config
