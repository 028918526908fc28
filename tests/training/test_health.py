"""What the watchers do, and when."""

import math

import pytest

from dinojax.training import health


def test_three_in_a_row_end_the_run():
    watch = health.NonFinite(limit=3)
    good = {"loss": 1.0, "dino_global": 9.0, "grad_norm_backbone": 2.0}
    bad = {**good, "loss": math.nan, "ibot": math.inf}
    for step, metrics in enumerate([bad, bad, good, bad, bad]):
        watch.observe(step, metrics)
    with pytest.raises(health.TrainingDiverged) as caught:
        watch.observe(5, bad)
    assert "3 steps in a row" in str(caught.value) and "step 5" in str(caught.value)
    for term in ("loss nan", "dino_global 9", "ibot inf", "grad_norm_backbone 2"):
        assert term in str(caught.value)


def test_a_gradient_that_is_not_finite_counts_and_a_statistic_does_not():
    watch = health.NonFinite(limit=1)
    watch.observe(0, {"loss": 1.0, "gram_masked": math.nan})
    with pytest.raises(health.TrainingDiverged):
        watch.observe(1, {"loss": 1.0, "grad_norm_dino_head": math.inf})


CHANCE = math.log(4096)


@pytest.mark.parametrize(
    ("metrics", "warns"),
    [
        ({"dino_global": CHANCE, "cls_spread": 0.01}, True),
        ({"dino_global": CHANCE, "cls_spread": 0.6}, False),
        ({"dino_global": 0.8 * CHANCE, "cls_spread": 0.01}, False),
        ({"dino_global": CHANCE, "koleo": 9.0}, True),
        ({"dino_global": CHANCE, "koleo": 1.0}, False),
        ({"ibot": 3.0}, False),
    ],
)
def test_collapse_is_said_once(metrics, warns):
    watch = health.CollapseWatch(prototypes=4096, patience=20, memory=5)
    said = [watch.observe(step, metrics) for step in range(60)]
    assert said[:19] == [None] * 19
    spoken = [sentence for sentence in said if sentence]
    assert len(spoken) == (1 if warns else 0)
    if warns:
        assert (
            spoken[0].startswith("step 19: the features look collapsed") and "\n" not in spoken[0]
        )


def test_an_update_the_step_discarded_counts():
    watch = health.NonFinite(limit=2)
    row = {"loss": 1.0, "grad_norm_backbone": 2.0}
    watch.observe(1, {**row, "skipped_in_a_row": 1.0})
    with pytest.raises(health.TrainingDiverged):
        watch.observe(2, {**row, "skipped_in_a_row": 2.0})
