"""`gram_vitl.py:tiny` made smaller still, so that its three phases take seconds.

A config file as any other: `python launch/run.py --config tests/e2e/tiny.py --workdir DIR`;
`tiny.py:pretrain` stops after the first phase, `tiny.py:mixture` too, on two sources.
"""

from pathlib import Path

from ml_collections import ConfigDict

from dinojax import config as c

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
STEPS = 6  # of each phase
SNAPSHOT = 4  # step whose teacher anchors the Gram phase


def get_config(variant: str = "") -> ConfigDict:
    config = c.load_file(str(EXPERIMENTS / "gram_vitl.py"), "tiny")
    config.batch_size, config.group = 16, 2  # eight groups: one for each pretend device
    config.data.source = "scenes:48"
    config.model.update({"width": 32, "depth": 2, "storage_tokens": 1, "drop_path": 0.3})
    # At 1e-5 all features start out alike, and KoLeo would magnify every rounding difference.
    config.model.layerscale = 1.0
    for head in (config.dino_head, config.ibot_head):
        head.update({"prototypes": 32, "bottleneck": 16, "hidden": 32})
    config.optim.lr_scaling = "none"
    config.checkpoint.update({"every": 2, "keep": 3, "keep_every": SNAPSHOT})
    config.eval.update({"size": 32, "pictures": 2})
    config.log_every = 1
    first, second, third = config.phases
    first.crops.sizes = ((24, 16, 0),)
    second.crops.sizes = ((24, 16, 48),)
    second.gram.update({"source": f"step:{SNAPSHOT}", "refresh_first": 2, "refresh_every": 2})
    third.crops.sizes = ((32, 16, 48), (40, 16, 48))
    third.group, third.losses.koleo_group = 2, 4
    for phase in config.phases:
        phase.steps = STEPS
        phase.crops.locals = 2
    for schedule in (first.schedules.lr, first.schedules.teacher_temp):
        schedule.warmup = 2
    first.schedules.lr.update({"peak": 1e-3, "end": 1e-3})
    first.schedules.freeze_last_layer = 1
    for schedule in (second.schedules.dino_local, second.schedules.gram, third.schedules.lr):
        schedule.cosine = STEPS
    if variant in ("pretrain", "mixture"):
        config.phases = (first,)
    if variant == "mixture":
        first.steps = 2 * STEPS
        config.data.source = ""
        config.data.mixture = (
            c.component("scenes", "scenes:48"),
            c.component("others", "scenes:32?seed=1", homogeneous=0.3),
        )
    return config
