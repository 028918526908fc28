"""What a run leaves behind: features in three lines, and a place for other runs to start from."""

import jax
import numpy as np
import pytest

import dinojax
from dinojax import config as configs
from dinojax import train
from dinojax.backbone import read
from dinojax.sharding import path_name
from dinojax.training import phases
from dinojax.training.checkpoint import Checkpoints


def flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): np.asarray(x) for path, x in leaves}


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def teacher(run, step):
    saves = Checkpoints(run / "checkpoints", read_only=True)
    return flat(saves.restore_item(step, "teacher"))


def test_features_in_three_lines(whole):
    images = np.random.default_rng(0).integers(0, 255, (3, 32, 40, 3), dtype=np.uint8)
    backbone = dinojax.load(whole)
    features = backbone.features(images)
    assert features.cls.shape == (3, 32) and features.storage.shape == (3, 1, 32)
    assert features.patches.shape == (3, 20, 32) and features.grid == (4, 5)
    assert np.isfinite(features.patches).all()
    assert np.abs(features.cls[0] - features.cls[1]).max() > 1e-3
    earlier = dinojax.load(f"{whole}@4").features(images)
    assert np.abs(earlier.cls - features.cls).max() > 1e-3


def test_weights_are_the_final_teacher(whole):
    arrays, settings = read(whole / "weights" / "teacher.safetensors")
    assert settings.step == 18
    same(arrays, teacher(whole, 18))


def begun(tools, tmp_path, whole, phase, **values):
    """The state with which a phase of a new run begins."""
    config = configs.load_file(str(tools.TINY))
    for key, value in values.items():
        config.phases[phase].gram.source = value if key == "gram_source" else "start"
        config.phases[phase].start = value if key == "start" else "previous"
    run = train.prepare(config, tmp_path / "run")
    span = phases.spans(run.config)[phase]
    with tools.restored(), jax.set_mesh(run.mesh):
        saves = Checkpoints(whole / "checkpoints", read_only=True)
        return jax.device_get(train.begin_phase(run, saves, span, None))


@pytest.mark.parametrize("source, step", [("{run}@8", 8), ("{run}", 18), ("{file}", 18)])
def test_start_from_another_run(whole, tools, tmp_path, source, step):
    """Student and teacher are its teacher; optimizer and counters are fresh."""
    file = whole / "weights" / "teacher.safetensors"
    state = begun(tools, tmp_path, whole, 0, start=source.format(run=whole, file=file))
    same(flat(state["student"]), teacher(whole, step))
    same(flat(state["teacher"]), teacher(whole, step))
    assert not any(np.any(x) for x in jax.tree.leaves(state["optimizer"]))
    assert state["step"] == 0


def test_gram_teacher_from_another_run(whole, tools, tmp_path):
    state = begun(tools, tmp_path, whole, 1, gram_source=f"{whole}@8")
    same(
        flat({"backbone": state["gram"]}),
        {name: x for name, x in teacher(whole, 8).items() if name.startswith("backbone/")},
    )


def test_weights_that_do_not_fit(whole, launch, tools, tmp_path):
    """Seen before the first step; the sentence names the array."""
    arguments = ("--config.model.width=64", f"--config.phases[0].start={whole}")
    ended = launch(tools.command(tmp_path / "run", *arguments, config=f"{tools.TINY}:pretrain"))
    assert ended.code != 0
    sentence = ended.sentence()
    assert "has the shape" in sentence and "this model needs" in sentence
