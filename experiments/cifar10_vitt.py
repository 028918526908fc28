"""A tiny ViT on CIFAR-10 (or any small images), sized for 20 minutes on two CPU cores.

    python launch/run.py --config experiments/cifar10_vitt.py \
        --config.data.source='parquet:cifar10.parquet?split=train' --workdir runs/cifar

k-NN asks for the labels of the file's `val` split among those of its `train` split. Results:
docs/results.md.
"""

from ml_collections import ConfigDict

from dinojax import config as c

STEPS = 3000


def get_config() -> ConfigDict:
    config = c.base()
    config.batch_size = config.group = 64
    config.init = "fan_in"  # for a narrow network and a short run, as in demo.py
    config.data.source = "parquet:cifar10.parquet?split=train"
    config.data.threads = 1  # measured: at 32 pixels more threads wait for each other
    config.model.update(
        {
            "variant": "tiny",
            "width": 128,
            "depth": 4,
            "heads": 4,
            "patch_size": 8,  # 4 costs four times as much a step, and steps matter more here
            "layerscale": 0.0,
            "drop_path": 0.0,
            "dtype": "float32",
            "scan": False,
        }
    )
    for head in (config.dino_head, config.ibot_head):
        head.update({"prototypes": 1024, "bottleneck": 64, "hidden": 256})
    config.optim.update({"layer_decay": 1.0, "patch_embed_lr": 1.0, "lr_scaling": "none"})
    # No blur or solarize: at 32 pixels they remove the image. Half the usual colour jitter.
    config.augment.update({"blur": (0.0, 0.0, 0.0), "solarize": (0.0, 0.0, 0.0)})
    config.augment.update({"brightness": 0.2, "contrast": 0.2, "saturation": 0.1, "hue": 0.05})
    config.checkpoint.every = 500
    config.log_every = 50
    config.eval.update({"every": 1000, "knn_train": "split=train", "knn_val": "split=val"})
    config.eval.update({"size": 32, "batch": 250})
    config.phases = (
        c.phase(
            "pretrain",
            steps=STEPS,
            crops={
                "sizes": ((32, 16, 0),),
                "locals": 4,
                "global_scale": (0.5, 1.0),
                "local_scale": (0.2, 0.5),
            },
            losses={"koleo": 0.05},
            schedules={
                "lr": c.v1(start=0.0, base=3e-3, end=1e-5, warmup=100),
                "freeze_last_layer": STEPS,  # why: demo.py
                "weight_decay": c.constant(0.04),
                "momentum": c.v1(start=0.0, base=0.97, end=1.0, warmup=0),
                "teacher_temp": c.constant(0.04),
            },
        ),
    )
    return config
