"""Figures of a step, a phase and a run on a topology: memory, rooflines, collectives, energy.

Called by `launch/plan.py` and `advice`.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from dinojax import train
from dinojax.planning import compiling, estimate, inputs, network
from dinojax.planning import topology as topologies
from dinojax.planning.program import Found
from dinojax.planning.topology import Topology
from dinojax.training import profiling
from dinojax.training import state as states

# Photographs of 384 to 500 pixels that a core reads, decodes and crops in a second, to 2 x 224 and
# 8 x 96 pixels (docs/performance.md).
IMAGES_PER_CORE = 375.0


class Memory(NamedTuple):
    """Bytes on one device."""

    parts: dict[str, float]
    total: float
    limit: float


class Step(NamedTuple):
    """One step shape of a run: a phase at one of its crop sizes. All of one device's program."""

    phase: str
    index: int
    sizes: tuple[int, int, int]
    probability: float
    batch: int
    how: str  # where the figures come from
    seconds: dict[str, float]  # each of compute, memory and network alone
    flops_per_image: float  # as compiled: with what is computed again
    memory: Memory
    collectives: dict[str, tuple[int, float]]  # kind -> (runs, bytes a device receives)
    compile_seconds: float
    notes: tuple[str, ...]

    @property
    def bound(self) -> str:
        """The term that takes longest."""
        return max(self.seconds, key=self.seconds.__getitem__)

    @property
    def step_seconds(self) -> float:
        """Roofline: the terms overlap perfectly, so the longest one remains."""
        return self.seconds[self.bound]

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.memory.limit


def measure(
    config: ConfigDict,
    index: int,
    crops: tuple[int, int, int],
    topology: Topology,
    code: bool = False,
) -> Step:
    """A step shape, compiled where that is possible; `code`: for a TPU to the end."""
    if topology.platform == "tpu":
        found = compiling.compile_for_tpu(config, index, crops, topology, code)
    elif topology.platform == "cpu" or here(topology):
        found = compiling.compile_here(config, index, crops, topology)
    else:
        return guess(config, index, crops, topology)
    parts = inputs.held(config, index, crops, inputs.mesh_shape(config, topology))
    return assess(config, index, crops, topology, found, parts)


def guess(config: ConfigDict, index: int, crops: tuple[int, int, int], topology: Topology) -> Step:
    """A step shape estimated, whatever the topology."""
    parts = inputs.held(config, index, crops, inputs.mesh_shape(config, topology))
    found = estimate.estimated(config, index, crops, topology, parts)
    return assess(config, index, crops, topology, found, parts)


def here(topology: Topology) -> bool:
    """Whether these GPUs are in this machine."""
    if topology.platform != "gpu" or jax.default_backend() != "gpu":
        return False
    kind = jax.devices()[0].device_kind
    return topology.device.kind.lower() in kind.lower() and jax.device_count() >= topology.count


def assess(
    config: ConfigDict,
    index: int,
    crops: tuple[int, int, int],
    topology: Topology,
    found: Found,
    parts: dict[str, float],
) -> Step:
    """A step's figures on a topology from its program."""
    phase = config.phases[index]
    parts = dict(parts)
    padding = found.arguments - sum(parts.values())
    if padding > 0.01 * found.arguments:
        parts["padding of arrays"] = padding
    parts["gradients"] = min(parts["student"], found.temporaries)
    parts["activations and temporaries"] = found.temporaries - parts["gradients"]
    if found.code:
        parts["code"] = found.code
    total = found.arguments + found.temporaries + (found.code or 0.0)
    peak = topology.device.flops
    if peak is None:
        peak = profiling.peak_flops(config.model.dtype) / topology.count
    seconds = {"compute": found.program.flops / peak}
    if topology.device.bandwidth:
        seconds["memory"] = found.program.memory_bytes / topology.device.bandwidth
    kinds: dict[str, tuple[int, float]] = {}
    moving = 0.0
    for one in found.program.collectives:
        runs, received = kinds.get(one.kind, (0, 0.0))
        kinds[one.kind] = (runs + one.runs, received + one.received(topology.count))
        moving += network.collective_seconds(one, topology, found.places)
    if topology.count > 1:
        seconds["network"] = moving
    notes = []
    if found.program.unknown_loops:
        notes.append(f"{found.program.unknown_loops} loops of unknown length counted once")
    fsdp = inputs.mesh_shape(config, topology)[1]
    if topology.platform == "tpu" and fsdp > 1 and gathered_by_sums(kinds):
        # libtpu has no gather over three axes of a torus: 142 GB a step for 71 at 7B on 4 x 8 x 8.
        side = min(n for n in topology.shape if n > 1)
        notes.append(
            "weights come by all-reduce, not all-gather, twice the bytes: try "
            f"--config.mesh.data={side}"
        )
    for target, runs in found.program.kernels:
        notes.append(f"FLOPs of {runs} runs of {target} not counted")
    return Step(
        phase.name,
        index,
        crops,
        float(phase.crops.probabilities[list(phase.crops.sizes).index(crops)]),
        phase.batch_size,
        found.how,
        seconds,
        found.program.flops * topology.count / phase.batch_size,
        Memory(parts, total, topologies.limit(topology)),
        kinds,
        found.seconds,
        tuple(notes),
    )


def gathered_by_sums(kinds: Mapping[str, tuple[int, float]]) -> bool:
    """Whether all-reduces bring nearly everything that a device receives."""
    return kinds.get("all-reduce", (0, 0.0))[1] > 0.9 * sum(size for _, size in kinds.values()) > 0


class Phase(NamedTuple):
    """A phase as a whole: means over its crop sizes."""

    name: str
    steps: int
    step_seconds: float
    images_per_second: float
    nominal_per_image: float  # FLOPs as papers count them: nothing computed twice, no row skipped
    executed_per_image: float  # without the rows that stochastic depth skips
    compiled_per_image: float  # what the program does, with what is computed again
    hours: float


class Total(NamedTuple):
    """The whole run."""

    hours: float
    device_hours: float
    kwh: float | None  # at full power throughout; None for a CPU
    kg_co2e: float | None
    watts: float | None  # of a device
    power_published: bool
    host_cores: float  # that the busiest phase's input needs


def summarise(config: ConfigDict, steps: Sequence[Step], reach: float = 1.0) -> tuple[Phase, ...]:
    """Phases from their step shapes, at `reach` of the roofline."""
    networks, found = states.build_networks(config), []
    for index in sorted({step.index for step in steps}):
        phase, shapes = config.phases[index], [s for s in steps if s.index == index]
        share = sum(s.probability for s in shapes)
        seconds = sum(s.probability * s.step_seconds for s in shapes) / share / reach
        compiled = sum(s.probability * s.flops_per_image for s in shapes) / share
        work = train.work_per_image(config, networks, phase)
        rate = phase.batch_size / seconds
        hours = phase.steps * seconds / 3600
        found.append(Phase(phase.name, phase.steps, seconds, rate, *work, compiled, hours))
    return tuple(found)


def total(
    every: Sequence[Phase],
    topology: Topology,
    watts: float | None = None,
    images_per_core: float = IMAGES_PER_CORE,
) -> Total:
    """Hours, energy and the host cores of the whole run."""
    hours = sum(phase.hours for phase in every)
    cores = max(phase.images_per_second for phase in every) / images_per_core
    known = topologies.watts(topology)
    power, published = (watts, True) if watts else known or (None, False)
    if power is None:
        return Total(hours, hours * topology.count, None, None, None, False, cores)
    kwh = power * hours * topology.count / 1000
    carbon = kwh * profiling.BUILDING_OVERHEAD * profiling.KG_PER_KWH
    return Total(hours, hours * topology.count, kwh, carbon, power, published, cores)
