"""Phases: schedules at the published check values, refreshes of the Gram teacher, the timeline."""

from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from dinojax import config as configs
from dinojax.training import phases

VIT7B = Path(__file__).parents[2] / "experiments" / "vit7b.py"


def vitl_im1k() -> tuple[ConfigDict, ConfigDict]:
    """`config.base()` is the recipe: 125,000 steps of 2,048 images."""
    config = configs.base()
    config.phases = (configs.phase("pretrain", 125_000),)
    config = configs.resolve(config)
    return config, config.phases[0]


# Spec section 11: step -> name -> value.
CHECK_VALUES = [
    (1, "lr", 4.525845e-7),
    (12_499, "lr", 5.656854e-3),
    (12_500, "lr", 5.656854e-3),
    (62_500, "lr", 3.319992e-3),
    (124_999, "lr", 1.000001e-6),
    (62_500, "weight_decay", 0.22),
    (62_500, "momentum", 0.996),
    (12_500, "teacher_temp", 0.0500003),
    (1_249, "last_layer_lr", 0.0),
    (1_250, "last_layer_lr", 5.657306e-4),
]


@pytest.mark.parametrize(("step", "name", "value"), CHECK_VALUES)
def test_check_values_of_vitl_im1k(step: int, name: str, value: float) -> None:
    found = phases.scalars(*vitl_im1k(), step)[name]
    np.testing.assert_allclose(found, value, rtol=5e-7 if name != "teacher_temp" else 1e-6)


def test_scalars_are_those_of_the_step() -> None:
    """The last layer follows the rate once it is free; constants stay."""
    config, phase = vitl_im1k()
    found = phases.scalars(config, phase, 5_000)
    assert found["last_layer_lr"] == found["lr"] > 0
    assert found["dino_local_weight"] == 1.0 and found["gram_weight"] == 0.0
    assert all(isinstance(value, float) for value in found.values())


def test_loss_weights_ramp_from_the_start_of_the_phase() -> None:
    """The 7B's Gram phase (spec 6.3), its steps counted from 0 instead of 1,000,000."""
    config = configs.load_file(str(VIT7B))
    config = configs.resolve(config)
    gram = next(phase for phase in config.phases if phase.name == "gram")
    values = {step: phases.scalars(config, gram, step) for step in (0, 500, 999, 150_000)}
    weights = [values[step]["gram_weight"] for step in values]
    np.testing.assert_allclose(weights, [0.0, 1.0016, 2.0, 2.0], atol=5e-5)
    local = [values[step]["dino_local_weight"] for step in values]
    np.testing.assert_allclose(local, [1.0, 0.7496, 0.5, 0.5], atol=5e-5)
    np.testing.assert_allclose(values[500]["lr"], 2.4e-4)
    highres = config.phases[-1]
    rates = [phases.scalars(config, highres, step)["lr"] for step in (0, 5_000, 9_999)]
    np.testing.assert_allclose(rates, [0.0, 3.536e-5, 7.0711e-5], rtol=1e-3)


# ---- Gram refreshes ------------------------------------------------------------------------------


def reference_refreshes(steps: range, first: int, every: int, most: int | None) -> list[int]:
    """Spec 3.6, written as the reference does it: with a count that is carried along."""
    found: list[int] = []
    for step in steps:
        due = step + 1 >= first and (step + 1) % every == 0
        if due and (most is None or len(found) < most):
            found.append(step)
    return found


def refreshes(steps: range, first: int, every: int, most: int | None) -> list[int]:
    rule = {"refresh_first": first, "refresh_every": every, "refresh_max": most or 0}
    phase = configs.phase("gram", len(steps), gram={"teacher": "snapshot"} | rule)
    return [step for step in steps if phases.gram_refresh_due(phase, step)]


@pytest.mark.parametrize(
    ("first", "every", "most"),
    [(0, 2, None), (0, 2, 3), (5, 2, 3), (6, 3, 2), (7, 3, 1), (1, 1, 4), (4, 4, None), (99, 2, 1)],
)
def test_refreshes_follow_the_reference(first: int, every: int, most: int | None) -> None:
    wanted = reference_refreshes(range(40), first, every, most)
    assert refreshes(range(40), first, every, most) == wanted


def test_refreshes_of_the_7b() -> None:
    """After iterations 1,009,999, 1,019,999 and 1,029,999 of the run; the phase begins at 1 M."""
    config = configs.load_file(str(VIT7B))
    gram = next(phase for phase in config.phases if phase.name == "gram")
    found = [step for step in range(9_999, 200_000, 10_000) if phases.gram_refresh_due(gram, step)]
    assert [1_000_000 + step for step in found] == [1_009_999, 1_019_999, 1_029_999]
    assert reference_refreshes(range(1_000_000, 1_200_000), 1_010_000, 10_000, 3) == [
        1_000_000 + step for step in found
    ]
    assert not any(phases.gram_refresh_due(gram, step) for step in (0, 9_998, 10_000, 39_999))


@pytest.mark.parametrize("teacher", ["none", "ema"])
def test_only_a_snapshot_is_refreshed(teacher: str) -> None:
    phase = configs.phase("a", 10, gram={"teacher": teacher, "refresh_every": 1})
    assert not any(phases.gram_refresh_due(phase, step) for step in range(10))


# ---- the timeline --------------------------------------------------------------------------------


def three() -> ConfigDict:
    config = configs.base()
    snapshot = {"teacher": "snapshot"}
    config.phases = (
        configs.phase("pretrain", 1000),
        configs.phase("gram", 200, crops={"sizes": ((256, 112, 512),)}, gram=snapshot),
        configs.phase(
            "highres",
            100,
            start="previous_teacher",
            batch_size=1024,
            crops={"sizes": ((512, 112, 768), (768, 168, 1152)), "probabilities": (0.5, 0.5)},
            gram=snapshot,
            losses={"koleo": 0.0},
        ),
    )
    return configs.resolve(config)


def test_spans() -> None:
    spans = phases.spans(three())
    assert [(span.index, span.first, span.last) for span in spans] == [
        (0, 0, 1000),
        (1, 1000, 1200),
        (2, 1200, 1300),
    ]
    assert [span.phase.name for span in spans] == ["pretrain", "gram", "highres"]


def test_describe() -> None:
    assert phases.describe(three()).splitlines() == [
        "pretrain: steps 0 to 1,000, starts from scratch; 2,048 images a step (2,048,000 in all); "
        "crops 2x224 + 8x96; dino + ibot + koleo",
        "gram: steps 1,000 to 1,200, goes on; 2,048 images a step (409,600 in all); "
        "crops 2x256 + 8x112, gram 512; dino + ibot + koleo + gram (snapshot)",
        "highres: steps 1,200 to 1,300, starts from the EMA teacher; 1,024 images a step "
        "(102,400 in all); crops 2x512 + 8x112, gram 768 or 2x768 + 8x168, gram 1152; "
        "dino + ibot + gram (snapshot)",
    ]


def test_describe_names_what_a_phase_starts_from() -> None:
    config = configs.base()
    config.phases = (configs.phase("only", 10, start="runs/a@500"),)
    assert "starts from runs/a@500;" in phases.describe(configs.resolve(config))
