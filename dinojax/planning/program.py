"""What a compiled program does in one run: FLOPs, memory traffic, collectives; from XLA's text.

The compiler's own `cost_analysis` counts the body of a loop once and says nothing of collectives.
Here every instruction counts as often as it runs: a scan's body as often as there are layers. The
text is that of one device's program, so all figures are per device. Called by `compiling`.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dinojax.planning.hlo import Computation, parse, size, visits
from dinojax.planning.work import instruction_flops, moved_bytes

COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"),
    *("ragged-all-to-all", "collective-broadcast"),
)
# Custom calls that multiply, by a part of their names: cuBLAS and cuDNN on GPUs, Pallas on TPUs.
PRODUCTS = re.compile("gemm|matmul|conv|fmha|triton|tpu_custom_call")


class Collective(NamedTuple):
    """One collective instruction. `kind` as XLA names it, "all-reduce" and so on."""

    kind: str
    runs: int  # times it runs in a step
    operand_bytes: int  # what one device puts in, in one run
    members: tuple[int, ...]  # devices of its first group, as places in the mesh; () = all

    def received(self, devices: int) -> float:
        """Bytes a device receives in a step, at least (ring algorithms reach it)."""
        group = len(self.members) or devices
        share = {
            "all-gather": group - 1.0,
            "all-reduce": 2 * (group - 1) / group,
            "collective-permute": 1.0,
            "collective-broadcast": 1.0,
        }.get(self.kind, (group - 1) / group)
        return self.runs * self.operand_bytes * share


class Program(NamedTuple):
    """Figures of one run of one device's program."""

    flops: float  # of products and convolutions: 2 for each multiplication and addition
    flops_loops_once: float  # with every loop's body counted once, as `cost_analysis` does
    memory_bytes: float  # read from and written to main memory, at most
    collectives: tuple[Collective, ...]
    kernels: tuple[tuple[str, int], ...]  # (target, runs) of products that are not counted
    unknown_loops: int  # whose length is not in the text; counted once


def read(text: str) -> Program:
    """The figures of a compiled HLO module's text."""
    program, entry = parse(text)
    runs, unknown, fused = visits(program, entry)
    flops = once = traffic = 0.0
    kernels: Counter[str] = Counter()
    for name, times in runs.items():
        computation = program[name]
        for instruction in computation.values():
            work = instruction_flops(instruction, computation)
            flops += times * work
            once += work
            target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
            if target and not work and PRODUCTS.search(target[1]):
                kernels[target[1]] += times
        if name not in fused:
            moved = sum(moved_bytes(i, computation, program) for i in computation.values())
            traffic += times * moved
    return Program(
        flops, once, traffic, collectives(program, runs), tuple(sorted(kernels.items())), unknown
    )


def collectives(program: dict[str, Computation], runs: dict[str, int]) -> tuple[Collective, ...]:
    """Every collective of the program.

    One spread over several fusions, to overlap with their work, keeps its channel and counts once.
    On TPU a reduce-scatter may be a fusion that slices an all-reduce.
    """
    found: dict[tuple[str, str], Collective] = {}
    for name, times in runs.items():
        computation = program[name]
        scatters = any(i.root and i.opcode == "dynamic-slice" for i in computation.values())
        for i in computation.values():
            kind = i.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            if kind == "all-reduce" and scatters:
                kind = "reduce-scatter"
            put_in = sum(size(computation[o].type) for o in i.operands if o in computation)
            channel = re.search(r"channel_id=(\d+)", i.attributes)
            key = (kind, channel[1] if channel else f"{name}/{i.name}")
            one = Collective(kind, times, put_in, members(i.attributes))
            found[key] = max(found.get(key, one), one, key=lambda c: c.runs * c.operand_bytes)
    return tuple(found.values())


def members(attributes: str) -> tuple[int, ...]:
    """The devices of a collective's first group; () where all take part."""
    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes)
    if pairs:
        return int(pairs[1]), int(pairs[2])
    groups = re.search(r"replica_groups=(.*)", attributes)
    if not groups:
        return ()
    text = groups[1]
    listed = re.match(r"\{\{([\d,]+)\}", text)
    if listed:
        return tuple(int(x) for x in listed[1].split(","))
    iota = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        shape_, dims, order = (
            tuple(int(x) for x in (g or "").split(",") if x) for g in iota.groups()
        )
        places = np.arange(math.prod(dims)).reshape(dims)
        places = places.transpose(order) if order else places
        return tuple(int(x) for x in places.reshape(-1, shape_[-1])[0])
    mesh = re.match(r"mesh\[([^\]]*)\] *\{([^}]*)\}", text)
    if mesh:
        return _mesh_members(mesh[1], mesh[2])
    return ()


def _mesh_members(axes: str, used: str) -> tuple[int, ...]:
    """Of `mesh['a'=64,'b'=4] {'b'}`; a part of an axis is written 'a':(before)size."""
    sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", axes)}
    places = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    for axis, name in reversed(list(enumerate(sizes))):
        part = re.search(rf"'{name}'(?::\((\d+)\)(\d+))?", used)
        if not part:
            places = places.take([0], axis)
        elif part[1]:
            before, taken = int(part[1]), int(part[2])
            split = (before, taken, sizes[name] // (before * taken))
            cut = places.reshape(*places.shape[:axis], *split, *places.shape[axis + 1 :])
            places = cut.take(0, axis + 2).take(0, axis)
    return tuple(int(x) for x in places.ravel())


class Found(NamedTuple):
    """A step's program and memory, compiled or estimated."""

    how: str
    program: Program
    arguments: float
    temporaries: float
    code: float | None  # None: not generated
    places: Sequence[Sequence[int]]  # coordinates of the mesh's devices
    seconds: float
