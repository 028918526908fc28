"""Keys of a run: what is refused and in which words, how configs are written, read and compared."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from dinojax import config as configs

ROOT = Path(__file__).parent.parent
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.py"))


def make(**sections) -> ConfigDict:
    """A small valid config of one phase; `sections` go to the phase."""
    config = configs.base()
    config.batch_size, config.group = 48, 8
    config.phases = (configs.phase("only", 100, **sections),)
    return config


def sentence(config: ConfigDict) -> str:
    with pytest.raises(ValueError) as caught:
        configs.validate(configs.resolve(config))
    text = str(caught.value)
    assert "\n" not in text and len(text) < 300
    return text


def replace_rate(phase: ConfigDict, schedule: dict) -> None:
    phase.schedules.lr = ConfigDict(schedule)


def misspelt_component() -> ConfigDict:
    part = configs.component("a", "scenes")
    part.wieght = 2.0
    return part


# ---- what is refused -----------------------------------------------------------------------------


def test_convnext_counts_patches_of_its_own_stride():
    config = make(crops={"sizes": ((64, 32, 0),)})
    config.model = configs.convnext()
    configs.validate(configs.resolve(config))
    config.phases[0].crops.sizes = ((32, 32, 0),)
    assert "of 1 patches" in sentence(config)
    config.phases[0].crops.sizes = ((16, 32, 0),)
    assert "does not fit the patch size 32" in sentence(config)


# A change (to config c, first phase p) -> what the sentence must say, the nearest choice included.
REFUSED = {
    "no phases": (lambda c, p: c.update(phases=()), "phases is empty"),
    "one name twice": (lambda c, p: c.update(phases=(p, p)), r"different names.*'only', 'only'"),
    "objective": (lambda c, p: c.update(objective="sll"), "'sll'; known: 'ssl'"),
    "teacher": (lambda c, p: c.update(teacher_dtype="bf16"), r"'bf16'.*'bfloat16'"),
    "channels": (lambda c, p: c.model.update(in_channels=4), "mean has 3 values for 4 channels"),
    "steps": (lambda c, p: p.update(steps=0), "steps is 0, expected at least 1"),
    "batch": (lambda c, p: c.update(batch_size=45), r"45 is not a multiple.*8 x 1; .*=48"),
    "pieces": (lambda c, p: c.update(microbatches=5), r"48 is not a multiple.*8 x 5.*=40"),
    "group": (lambda c, p: p.update(group=0), "group is 0, expected at least 1"),
    "koleo group": (lambda c, p: p.losses.update(koleo_group=30), r"is 30;.*nearest: 24"),
    "koleo in pieces": (
        lambda c, p: (c.update(microbatches=2), p.losses.update(koleo_group=16)),
        r"is 16;.*divide a micro-batch \(24 images\); nearest: 8",
    ),
    "koleo alone": (
        lambda c, p: (c.update(batch_size=1, group=1),),
        "koleo_group is 1; it must hold at least 2.*nearest: none",
    ),
    "topk": (lambda c, p: p.losses.update(koleo_topk=8), "koleo_topk is 8; expected 1 to 7"),
    "no source": (lambda c, p: c.data.update(source=""), "data.source is '' and .* is empty"),
    "source beside mixture": (
        lambda c, p: c.data.update(mixture=(configs.component("a", "scenes"),)),
        r"data.source is 'scenes' beside a mixture of 1 .*mixture='\(\)'.*data.source=$",
    ),
    "no component": (
        lambda c, p: c.data.update(source="", mixture=("scenes:5",)),
        r"mixture\[0\] is 'scenes:5'; expected component\(name, source\)",
    ),
    "component key": (
        lambda c, p: c.data.update(source="", mixture=(misspelt_component(),)),
        r"mixture\[0\] has no key 'wieght'; did you mean 'weight'",
    ),
    "component gap": (
        lambda c, p: c.data.update(source="", mixture=(ConfigDict({"name": "a"}),)),
        r"mixture\[0\] needs homogeneous, source, weight",
    ),
    "local inside global": (
        lambda c, p: p.crops.update(local_from_global=True, sizes=((96, 112, 0),)),
        "local crop of 112 pixels does not lie inside a global one of 96.*nearest: 96",
    ),
    "crop": (
        lambda c, p: (c.model.update(size_policy="pad"), p.crops.update(sizes=((230, 96, 0),))),
        "a global crop of 230 pixels does not fit the patch size 16.*nearest: 224",
    ),
    "tiny crop": (
        lambda c, p: p.crops.update(sizes=((224, 9, 0),)),
        "local crop of 9.*nearest: 16",
    ),
    "triples": (
        lambda c, p: p.crops.update(sizes=((224, 96),)),
        r"must be \(global, local, gram\)",
    ),
    "chances": (lambda c, p: p.crops.update(probabilities=(0.5,)), "sum to 0.5, not 1"),
    "counts": (lambda c, p: p.crops.update(probabilities=(0.5, 0.5)), "1 triples and .* 2 numbers"),
    "locals": (lambda c, p: p.crops.update(locals=0), "locals is 0; expected at least 1"),
    "scales": (
        lambda c, p: p.crops.update(global_scale=(0.5, 1.5)),
        "expected 0 < low <= high <= 1",
    ),
    "gram crop": (lambda c, p: p.gram.update(teacher="snapshot"), r"nearest: \(224, 96, 448\)"),
    "no gram": (lambda c, p: p.crops.update(sizes=((224, 96, 448),)), r"nearest: \(224, 96, 0\)"),
    "small gram": (
        lambda c, p: (p.gram.update(teacher="snapshot"), p.crops.update(sizes=((224, 96, 112),))),
        "gram crop of 112 pixels is smaller than the global crop of 224; nearest: 224",
    ),
    "centering": (lambda c, p: p.losses.update(centering="sinkhron"), "did you mean 'sinkhorn'"),
    "gram teacher": (lambda c, p: p.gram.update(teacher="emma"), "did you mean 'ema'"),
    "tokens": (lambda c, p: p.gram.update(tokens="masked"), "needs gram.img_level=False"),
    "resize": (lambda c, p: p.gram.update(resize="cubic"), "did you mean 'bicubic'"),
    "negatives": (
        lambda c, p: p.gram.update(remove_neg=True, remove_only_teacher_neg=True),
        "exclude each other",
    ),
    "no loss": (lambda c, p: p.losses.update(dino=0.0, ibot=0.0), "no loss is left"),
    "mask ratio": (lambda c, p: p.masks.update(ratio=(0.5, 0.1)), "0 <= low <= high <= 1"),
    "no mask": (lambda c, p: p.masks.update(probability=0.0), "no patch is masked"),
    "schedule kind": (
        lambda c, p: replace_rate(p, {"kind": "v3"}),
        r"schedules.lr: kind is 'v3'; did you mean 'v[12]'",
    ),
    "schedule key": (
        lambda c, p: p.schedules.gram.update(warmpu=3),
        "a v2 schedule has no key 'warmpu'; did you mean 'warmup'",
    ),
    "schedule gap": (
        lambda c, p: replace_rate(p, {"kind": "v2", "start": 0.0, "peak": 1.0}),
        "a v2 schedule needs end, warmup",
    ),
    "rate kind": (
        lambda c, p: replace_rate(p, configs.v1_linear(0, 1, 2)),
        "schedules.lr.kind is 'v1_linear'; expected 'v2' or 'v1'",
    ),
}


def test_the_small_config_is_valid() -> None:
    configs.validate(configs.resolve(make()))


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_sentence(name: str) -> None:
    change, wanted = REFUSED[name]
    config = make()
    with config.unlocked(), config.ignore_type():
        change(config, config.phases[0])
    assert re.search(wanted, sentence(config))


def test_the_nearest_choice_is_valid() -> None:
    """Taking the advice of the sentence makes the config valid."""
    for group, pieces, asked in ((8, 1, 30), (8, 2, 16), (4, 3, 7), (16, 1, 40)):
        config = make(losses={"koleo_group": asked})
        config.group, config.microbatches = group, pieces
        near = int(re.search(r"nearest: (\d+)", sentence(config))[1])
        config.phases[0].losses.koleo_group = near
        configs.validate(configs.resolve(config))


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("step:0", "expected step:N with N from 1 to 100"),
        ("step:200", "expected step:N with N from 1 to 100"),
        ("step:often", "expected step:N"),
        ("step:30", "set checkpoint.keep_every=30"),
        ("step:40", None),
        ("start", None),
        ("runs/other@100", None),
    ],
)
def test_a_snapshot_must_have_been_kept(source: str, wanted: str | None) -> None:
    config = make()
    config.checkpoint.update({"every": 10, "keep_every": 40})
    second = configs.phase(
        "gram", 50, crops={"sizes": ((224, 96, 448),)}, gram={"teacher": "snapshot"}
    )
    second.gram.source = source
    config.phases = (*config.phases, second)
    if wanted is None:
        configs.validate(configs.resolve(config))
    else:
        assert wanted in sentence(config)


def test_floor_takes_the_published_local_crops() -> None:
    """168 and 336 pixels are no multiples of 16: the high-resolution phase uses them."""
    configs.validate(configs.resolve(make(crops={"sizes": ((768, 168, 0),)})))


# ---- writing a config ----------------------------------------------------------------------------


def test_phase_refuses_misspelt_keys() -> None:
    with pytest.raises(ValueError, match="has no key 'loses'; did you mean 'losses'"):
        configs.phase("a", 1, loses={})
    with pytest.raises(ValueError, match="phase 'a': losses has no key 'dina'; .*'dino'"):
        configs.phase("a", 1, losses={"dina": 1.0})
    with pytest.raises(ValueError, match="here has no key 'xyzzy'; known: .*locals"):
        configs.replace_section(configs.phase("a", 1).crops, {"xyzzy": 1}, "here")


def test_schedules_are_replaced_whole() -> None:
    """A v1 rate leaves none of its keys in the v2 that takes its place."""
    for schedule in (configs.v2(0, 1, 0, 10), ConfigDict(configs.v2(0, 1, 0, 10))):
        phase = configs.phase("a", 1, schedules={"lr": schedule})
        assert phase.schedules.lr.to_dict() == configs.v2(0, 1, 0, 10)
        assert phase.schedules.teacher_temp.kind == "v1_linear"


def test_resolve_states_every_phase() -> None:
    config = make()
    own = configs.phase("own", 1, batch_size=32, group=4, losses={"koleo_group": 0})
    config.phases = (*config.phases, own)
    first, second = configs.resolve(config).phases
    assert (first.batch_size, first.group, first.losses.koleo_group) == (48, 8, 8)
    assert (second.batch_size, second.group, second.losses.koleo_group) == (32, 4, 32)
    assert config.phases[0].batch_size is None  # the original is left alone


# ---- reading and comparing -----------------------------------------------------------------------


def test_flatten() -> None:
    config = make()
    flat = configs.flatten(config)
    assert flat["model.patch_size"] == 16 and flat["phases[0].steps"] == 100
    assert flat["phases[0].schedules.lr.base"] == 1e-3
    assert flat["phases[0].crops.sizes"] == ((224, 96, 0),)
    assert flat["model.width"] is None
    assert list(flat) == list(configs.flatten(make()))
    tree = json.loads(configs.to_json(config))
    assert tree["phases"][0]["crops"]["sizes"] == [[224, 96, 0]]
    assert tree["model"]["width"] is None


def test_continues() -> None:
    """A run goes on under its own values; where and how fast it runs may change."""
    config = configs.resolve(make())
    saved = json.loads(json.dumps(configs.flatten(config)))
    assert configs.continues(saved, config) == []
    config.update({"log_every": 7})
    config.mesh.fsdp = 4
    config.model.scan = False
    config.eval.every = 5
    assert configs.continues(saved, config) == []
    config.seed = 1
    config.phases[0].schedules.lr.base = 2e-3
    assert configs.continues(saved, config) == [
        "phases[0].schedules.lr.base: 0.001 there, 0.002 here",
        "seed: 0 there, 1 here",
    ]


def test_an_appended_phase_is_another_config() -> None:
    config = make()
    saved = json.loads(json.dumps(configs.flatten(configs.resolve(config))))
    config.phases = (*config.phases, configs.phase("more", 10))
    assert "phases[1].batch_size: None there, 48 here" in configs.continues(
        saved, configs.resolve(config)
    )


# ---- experiments ---------------------------------------------------------------------------------


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiments_are_valid(file: Path) -> None:
    configs.validate(configs.resolve(configs.load_file(str(file))))


def test_variants_and_missing_files() -> None:
    file = str(ROOT / "experiments" / "gram_vitl.py")
    assert configs.load_file(file, "tiny").batch_size < configs.load_file(file).batch_size
    with pytest.raises(ValueError, match="unknown variant 'tyni' of gram_vitl.py; known: tiny"):
        configs.load_file(file, "tyni")
    with pytest.raises(ValueError, match="no experiment file 'experiments/gram_vitt.py'"):
        configs.load_file("experiments/gram_vitt.py")


def overridden(*arguments: str, file: str = f"{ROOT}/experiments/gram_vitl.py:tiny") -> ConfigDict:
    """The config that launch/run.py would get."""
    values = flags.FlagValues()
    argv = ["run", f"--config={file}", *arguments]
    config_flags.DEFINE_config_file("config", None, "", values, lock_config=True, sys_argv=argv)
    values(argv)
    return values.config


def test_overrides_reach_into_phases() -> None:
    config = overridden(
        "--config.phases[0].steps=40",
        "--config.phases[1].schedules.gram.end=0.25",
        "--config.phases[2].losses.koleo_group=4",
        "--config.data.source=folder:/images",
        "--config.model.width=96",
        "--config.microbatches=2",
    )
    assert config.phases[0].steps == 40 and config.phases[1].schedules.gram.end == 0.25
    assert config.phases[2].losses.koleo_group == 4
    assert config.data.source == "folder:/images" and config.model.width == 96
    configs.validate(configs.resolve(config))


def test_overrides_reach_into_mixtures(tmp_path: Path) -> None:
    file = tmp_path / "mixed.py"
    file.write_text(
        "from dinojax import config as c\n"
        "def get_config():\n"
        "    config = c.base()\n"
        "    parts = c.component('a', 'scenes:9', 1), c.component('b', 'scenes:9')\n"
        "    config.data.update({'source': '', 'mixture': parts})\n"
        "    config.phases = (c.phase('only', 1),)\n"
        "    return config\n"
    )
    config = overridden("--config.data.mixture[1].weight=3", file=str(file))
    config = configs.resolve(config)
    configs.validate(config)
    flat = configs.flatten(config)
    assert (flat["data.mixture[0].weight"], flat["data.mixture[1].weight"]) == (1.0, 3.0)
    assert flat["data.mixture[1].source"] == "scenes:9"
    alone = overridden("--config.data.mixture=()", "--config.data.source=scenes", file=str(file))
    configs.validate(configs.resolve(alone))
    saved = json.loads(json.dumps(flat))
    config.data.mixture[1].homogeneous = 0.1
    (changed,) = configs.continues(saved, config)
    assert changed == "data.mixture[1].homogeneous: 0.0 there, 0.1 here"


def test_misspelt_overrides_fail() -> None:
    with pytest.raises(Exception, match="steeps"):
        overridden("--config.phases[0].steeps=3")


def test_configs_do_not_start_jax() -> None:
    """A config imports in under a second (style 3): neither jax nor flax comes with it."""
    code = (
        "import sys, time; start = time.perf_counter(); from dinojax import config;"
        "config.load_file('experiments/vit7b.py'); spent = time.perf_counter() - start;"
        "assert not {'jax', 'flax'} & set(sys.modules); print(spent)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert float(found.stdout) < 5  # a fraction of a second on an idle machine
