"""What to change when a step does not fit. Called by `launch/plan.py`."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from ml_collections import ConfigDict

from dinojax import config as configs
from dinojax.planning import topology as topologies
from dinojax.planning.figures import Step, guess, measure
from dinojax.planning.inputs import check, mesh_shape, tensor_sizes
from dinojax.planning.topology import Topology

CHEAPER_REMAT = ("none", "dots", "dots_no_batch", "full")


class Advice(NamedTuple):
    """A change after which a step fits."""

    change: str  # flags to add, or another topology
    step: Step


def cheaper(config: ConfigDict, topology: Topology) -> Iterator[tuple[str, ConfigDict, Topology]]:
    """Changes that need less memory, the cheapest in speed first: (flags, config, topology)."""
    flags = []
    if config.model.remat in CHEAPER_REMAT:
        choices = CHEAPER_REMAT[CHEAPER_REMAT.index(config.model.remat) + 1 :]
        for remat in choices if config.model.name == "vit" else choices[-1:]:
            changed = configs.resolve(config)
            changed.model.remat = remat
            yield f"--config.model.remat={remat}", changed, topology
        if choices:
            config = changed
            flags = [f"--config.model.remat={choices[-1]}"]
    shape = mesh_shape(config, topology)
    if shape[0] > 1:
        config = configs.resolve(config)
        config.mesh.data, config.mesh.fsdp = 1, -1
        flags.append("--config.mesh.data=1 --config.mesh.fsdp=-1")
        yield " ".join(flags), config, topology
    yield from more_pieces(config, topology, flags)
    for tensor in [size for size in tensor_sizes(config, topology) if size > shape[2]][:2]:
        changed = configs.resolve(config)
        changed.mesh.tensor, changed.mesh.fsdp = tensor, -1
        added = [*flags, f"--config.mesh.tensor={tensor}"]
        yield " ".join(added), changed, topology
        yield from more_pieces(changed, topology, added)
    for spec in topologies.larger(topology):
        bigger = topologies.parse(spec)
        try:
            check(config, bigger)
        except ValueError:
            continue
        yield " ".join([f"--topology {spec}", *flags]), config, bigger


def more_pieces(
    config: ConfigDict, topology: Topology, flags: list[str]
) -> Iterator[tuple[str, ConfigDict, Topology]]:
    """Twice as many micro-batches, again and again."""
    data, fsdp, _ = mesh_shape(config, topology)
    pieces = 2 * config.microbatches
    while all(splits(phase, data * fsdp, pieces) for phase in config.phases):
        changed = configs.resolve(config)
        changed.microbatches = pieces
        yield " ".join([*flags, f"--config.microbatches={pieces}"]), changed, topology
        pieces *= 2


def splits(phase: ConfigDict, shards: int, pieces: int) -> bool:
    """Whether micro-batches hold whole groups on every device, and whole KoLeo groups."""
    neighbours = phase.losses.koleo_group if phase.losses.koleo else phase.group
    whole = phase.batch_size // phase.group % (shards * pieces) == 0
    return whole and phase.batch_size // pieces % neighbours == 0


def advise(
    config: ConfigDict,
    worst: Step,
    topology: Topology,
    measured: Callable[..., Step] = measure,
) -> Advice | None:
    """The first cheaper setting under which the step that needs most fits.

    The estimate, scaled by what it missed in `worst`, chooses what is worth compiling.
    """
    compiled = not worst.how.startswith("estimated")
    scale = worst.memory.total / guess(config, worst.index, worst.sizes, topology).memory.total
    for change, changed, where in cheaper(config, topology):
        step = guess(changed, worst.index, worst.sizes, where)
        if step.memory.total * scale > 1.5 * step.memory.limit:
            continue
        if compiled:
            step = measured(changed, worst.index, worst.sizes, where)
        if step.fits:
            return Advice(change, step)
    return None
