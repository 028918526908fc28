"""Figures of a step and of a run, from programs made by hand; a step compiled here."""

import pytest

from dinojax import train
from dinojax.planning import figures, inputs, network, program
from dinojax.planning.topology import parse
from dinojax.training import state as states


def some_step(seconds, memory=1.0, probability=1.0):
    held = figures.Memory({"student": memory}, memory, 2.0)
    sizes = (224, 96, 0)
    return figures.Step(
        *("pretrain", 0, sizes, probability, 2048, "by hand", seconds, 1e12),
        *(held, {}, 0.0, ()),
    )


def test_roofline():
    step = some_step({"compute": 2.0, "memory": 3.0, "network": 1.0})
    assert (step.bound, step.step_seconds, step.fits) == ("memory", 3.0, True)
    assert not some_step({"compute": 1.0}, memory=3.0).fits


def test_figures_of_a_program(experiment):
    """FLOPs, bytes and collectives of one device over what the device can do."""
    config, topology = experiment("pretrain_vitl"), parse("v5e:4x4")
    gather = program.Collective("all-gather", 10, 10**6, ())
    found = program.Found(
        "by hand",
        program.Program(1.97e14, 1.97e14, 4.1e11, (gather, gather), (("__cublas$gemm", 9),), 2),
        *(5e9, 7e9, 1e8, network.grid(topology), 1.0),
    )
    parts = inputs.held(config, 0, (224, 96, 0), (1, 16, 1))
    step = figures.assess(config, 0, (224, 96, 0), topology, found, parts)
    assert step.seconds["compute"] == pytest.approx(1.0)
    assert step.seconds["memory"] == pytest.approx(0.5)
    assert step.seconds["network"] == pytest.approx(20 * (15e6 / 9e10 + 6e-6))
    assert step.collectives == {"all-gather": (20, 20 * 15e6)}
    assert step.flops_per_image == pytest.approx(1.97e14 * 16 / 2048)
    assert step.memory.total == 5e9 + 7e9 + 1e8 == pytest.approx(sum(step.memory.parts.values()))
    assert step.memory.parts["gradients"] == parts["student"]
    assert step.memory.parts["padding of arrays"] == 5e9 - sum(parts.values())
    assert step.notes == (
        "2 loops of unknown length counted once",
        "FLOPs of 9 runs of __cublas$gemm not counted",
    )


def test_weights_that_come_by_sums(experiment):
    """One step's collectives: a mesh over all three axes, and one whose data axis takes a side."""
    config, topology = experiment("vit7b"), parse("v5p:4x8x8")
    notes = {}
    for kind in ("all-reduce", "all-gather"):
        work = program.Program(1.0, 1.0, 1.0, (program.Collective(kind, 9, 10**6, ()),), (), 0)
        found = program.Found("by hand", work, 1e9, 1e9, None, network.grid(topology), 1.0)
        step = figures.assess(config, 0, (256, 112, 0), topology, found, {"student": 1e9})
        notes[kind] = step.notes
    assert notes["all-gather"] == ()
    assert len(notes["all-reduce"]) == 1 and "--config.mesh.data=4" in notes["all-reduce"][0]


def test_the_whole_run(experiment):
    config = experiment("pretrain_vitl")
    shapes = [some_step({"compute": 1.0}, probability=0.25), some_step({"compute": 3.0}, 1.0, 0.75)]
    (phase,) = figures.summarise(config, shapes, reach=0.5)
    assert phase.step_seconds == pytest.approx(5.0)  # (0.25 + 0.75 x 3) / 0.5
    assert phase.images_per_second == pytest.approx(2048 / 5)
    assert phase.hours == pytest.approx(125_000 * 5 / 3600)
    work = train.work_per_image(config, states.build_networks(config), config.phases[0])
    assert (phase.nominal_per_image, phase.executed_per_image) == work
    run = figures.total([phase], parse("gpu:h100x8"), images_per_core=100.0)
    assert run.device_hours == pytest.approx(8 * phase.hours)
    assert run.kwh == pytest.approx(0.7 * 8 * phase.hours) and run.power_published
    assert run.kg_co2e == pytest.approx(run.kwh * 1.1 * 0.385)
    assert run.host_cores == pytest.approx(2048 / 5 / 100)
    assumed = figures.total([phase], parse("v5p:2x2x1"))
    assert (assumed.watts, assumed.power_published) == (320.0, False)
    assert figures.total([phase], parse("cpu")).kwh is None
    assert figures.total([phase], parse("cpu"), watts=50.0).kwh == pytest.approx(0.05 * phase.hours)


def test_compiled_here(here):
    config, crops, step = here
    assert step.how == "compiled for the CPU here" and step.fits
    kinds = set(step.collectives)
    assert {"all-gather", "all-reduce"} <= kinds and "all-to-all" not in kinds
    parts = inputs.held(config, 1, crops, (1, 8, 1))
    arguments = sum(parts.values())
    assert step.memory.total > arguments + parts["student"]
    assert step.memory.parts["gram"] == parts["gram"] > 0
