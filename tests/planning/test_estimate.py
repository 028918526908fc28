"""Estimates."""

import jax
import pytest

from dinojax.planning import estimate, figures
from dinojax.planning.advice import CHEAPER_REMAT
from dinojax.planning.topology import parse


def test_policies_are_ordered(experiment):
    """Every policy that keeps less is estimated to need less; micro-batches divide what is kept."""
    config, topology = experiment("pretrain_vitl"), parse("gpu:h100x8")
    needs = []
    for remat in CHEAPER_REMAT:
        config.model.remat = remat
        needs.append(estimate.temporaries(estimate.case_of(config, 0, (224, 96, 0), topology)))
    assert needs == sorted(needs, reverse=True)
    config.microbatches = 2
    half = estimate.temporaries(estimate.case_of(config, 0, (224, 96, 0), topology))
    assert 0.4 < half / needs[-1] < 0.6


def test_the_estimate_against_the_program(here):
    """FLOPs and the bytes gathered follow from shapes; of temporaries the estimate is rough."""
    config, crops, step = here
    topology = parse("cpu", jax.device_count())
    rough = figures.guess(config, 1, crops, topology)
    assert rough.how == "estimated from shapes"
    assert rough.flops_per_image == pytest.approx(step.flops_per_image, rel=0.15)
    for name in ("student", "teacher", "gram", "moments", "batch", "gradients"):
        assert rough.memory.parts[name] == step.memory.parts[name]
    assert 0.2 < rough.memory.total / step.memory.total < 3
