"""What the dry run counts, against sums by hand; what it refuses."""

import pytest

from data_curation import plan
from data_curation import settings as given
from data_curation.plan import Data, Machine

POD = Machine(64, 256, 38e12, 2e9, 448e9, 95e9, 1.2e13, 1e14)
LAPTOP = Machine(1, 1, 1e11, 1e9, 16e9, 16e9, 4e9, 1e11)


def costs(name, data, machine, *settings):
    config = given.change(given.load(name), settings)
    return config, plan.costs(config, data, machine)


def flops(found, stage, what):
    (one,) = (cost.flops for cost in found if cost.stage == stage and cost.what.startswith(what))
    return one


def test_the_published_hierarchy():
    """Spec 10: 3.6e18 operations an iteration for 17e9 rows, 100,000 x 2,000 clusters."""
    data = Data(17_000_000_000, 1024, 2)
    config, found = costs("lvd1689m", data, POD, "dedup.method=none", "cluster.init=random")
    n, d = data.rows, data.dim
    first = flops(found, "level 1", "k-means")
    assert first == 51 * 2 * n * 100_000 * d
    each = flops(found, "level 1", "splits") / (config.cluster.split_restarts * 51)
    assert each == pytest.approx(2 * n * 2000 * d)
    assert first / 51 + each == pytest.approx(3.6e18, rel=0.02)
    assert [cost.alone for cost in found[:2]] == [True, False]  # index; level 1
    (sample,) = (cost for cost in found if cost.stage == "sample lvd")
    assert sample.what == "draws 1,689,000,000"
    levels = {cost.stage for cost in found if cost.stage.startswith("level")}
    assert len(levels) == len(config.cluster.levels) == 5


def test_resampling_and_seeding_by_hand():
    data = Data(29_700, 2, 4)
    _, found = costs("ring2d", data, LAPTOP)
    n, d, k = 29_700, 2, 1000
    seeding = 2 * n * k * 8 * d  # 2 + floor(ln 1000) candidates
    assert flops(found, "level 1", "k-means") == 51 * 2 * n * k * d + seeding
    some = 51 * 2 * 15_000 * k * d + 2 * 15_000 * k * 8 * d
    assert flops(found, "level 1", "10 resamplings") == 10 * (some + 2 * n * k * d)


def test_rows_that_do_not_stay_are_read_again():
    _, small = costs("ring2d", Data(1_000_000, 256, 4), LAPTOP)
    _, large = costs("ring2d", Data(100_000_000, 256, 4), LAPTOP)
    reads = [next(c.read for c in found if c.stage == "level 1") for found in (small, large)]
    assert reads[0] == 1_000_000 * 1024  # once
    assert reads[1] == 100_000_000 * 1024 * (51 + 1000)  # every iteration, every centre


@pytest.mark.parametrize(
    "rows, settings, sentence",
    [
        (500_000_000, (), "of host memory, mostly for sorting the members of level 1"),
        (10_000_000, ("cluster.levels=(level(5_000_000),)",), "mostly for 5,000,000 centroids"),
        (10_000_000, ("budget.hours=0.001",), r"budget.hours is 0.001"),
        (900_000_000, ("cluster.levels=()", "sample=()"), "the work folder would hold"),
    ],
)
def test_what_does_not_fit_is_refused(rows, settings, sentence):
    config, found = costs("ring2d", Data(rows, 256, 2), LAPTOP, "embeddings=x", *settings)
    with pytest.raises(ValueError, match=sentence):
        plan.refuse(config, found, LAPTOP)


def test_a_plan_that_fits_is_a_table(tmp_path):
    config, found = costs("ring2d", Data(29_700, 2, 4), LAPTOP)
    plan.refuse(config, found, LAPTOP)
    text = plan.table(found, LAPTOP)
    assert "level 1" in text and "k-means of 1,000" in text and "operations a second" in text
    machine = plan.find_machine(config, tmp_path / "not" / "there")
    assert machine.devices == 8 and machine.flops > 1e8 and machine.disk > 0
