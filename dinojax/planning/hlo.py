"""The text of a compiled HLO module: its instructions, and how often each computation runs.

Called by `program` and `work`.
"""

import math
import re
from collections import defaultdict
from typing import NamedTuple

BITS = {"pred": 8, "token": 0, "opaque": 0}  # types whose name does not say it
ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^{}]*)\})?")
NAME = r"[A-Za-z_][\w.\-]*"  # in texts that leave out the %
LINE = re.compile(r"^\s+(ROOT )?%?[\w.\-]+ = ")
HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")


class Instruction(NamedTuple):
    """One line: `%name = type opcode(%operand, ...), attributes`."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool
    inside: str  # what stands between the parentheses: an operand list or a literal


Computation = dict[str, Instruction]


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """(computations by name, name of the entry)."""
    program: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        head = HEAD.match(line)
        if head:
            current = program.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif line.rstrip() == "}":
            current = None
        elif current is not None and LINE.match(line):  # attributes may go on in the next lines
            instruction = parse_line(line)
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("this is not the text of a compiled HLO module: it has no ENTRY")
    return program, entry


def parse_line(line: str) -> Instruction:
    """One line; a type may itself hold parentheses (tuples, and tiles such as T(8,128))."""
    left, right = line.strip().split(" = ", 1)
    root = left.startswith("ROOT ")
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    rest = right[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    return Instruction(
        name=left.removeprefix("ROOT ").lstrip("%"),
        type=right[:end],
        opcode=rest[:opening],
        operands=tuple(re.findall(r"%([\w.\-]+)", inside) or re.findall(NAME, inside)),
        attributes=rest[closing + 1 :],
        root=root,
        inside=inside,
    )


def _closing(text: str, opening: int) -> int:
    """Index of the parenthesis that closes the one at `opening`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"parenthesis not closed in {text[:80]!r}")


def arrays(type_text: str) -> list[tuple[int, tuple[int, ...], bool]]:
    """(bytes, shape, whether in main memory) of every array of a type.

    A layout that ends in S(1) or more says another memory space: on-chip memory of a TPU.
    """
    found = []
    for dtype, sizes, layout in ARRAY.findall(type_text):
        shape = tuple(int(size) for size in sizes.split(",") if size)
        bits = BITS.get(dtype) if dtype in BITS else int((re.findall(r"\d+", dtype) or [0])[0])
        found.append((math.prod(shape) * bits // 8, shape, not re.search(r"S\([1-9]", layout)))
    return found


def size(type_text: str, main: bool = False) -> int:
    """Bytes of a type; with `main` only what lies in main memory."""
    return sum(number for number, _, there in arrays(type_text) if there or not main)


def shape(type_text: str) -> tuple[int, ...]:
    """The shape of a type's first array."""
    return arrays(type_text)[0][1]


def visits(
    program: dict[str, Computation], entry: str
) -> tuple[dict[str, int], int, frozenset[str]]:
    """(runs of every computation, loops of unknown length, computations inside fusions)."""
    runs: dict[str, int] = defaultdict(int)
    unknown: set[str] = set()
    fused: set[str] = set()

    def visit(name: str, times: int, within_fusion: bool) -> None:
        runs[name] += times
        if within_fusion:
            fused.add(name)
        for instruction in program[name].values():
            for callee, repeats in callees(instruction, program[name], program, unknown):
                visit(callee, times * repeats, within_fusion or instruction.opcode == "fusion")

    visit(entry, 1, False)
    return dict(runs), len(unknown), frozenset(fused)


def callees(
    instruction: Instruction,
    around: Computation,
    program: dict[str, Computation],
    unknown: set[str],
) -> list[tuple[str, int]]:
    """Computations that an instruction runs, and how often each time."""
    attributes = instruction.attributes
    if instruction.opcode == "while":
        body = re.search(r"body=%?([\w.\-]+)", attributes)[1]
        trips = trip_count(instruction, around, program)
        if trips is None:
            unknown.add(instruction.name)
        return [(body, 1 if trips is None else trips)]
    if instruction.opcode in ("fusion", "async-start"):
        return [(name, 1) for name in re.findall(r"calls=%?([\w.\-]+)", attributes)]
    if instruction.opcode == "call":
        return [(name, 1) for name in re.findall(r"to_apply=%?([\w.\-]+)", attributes)]
    if instruction.opcode == "conditional":
        found = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", attributes)
        for group in re.findall(r"branch_computations=\{([^}]*)\}", attributes):
            found += re.findall(r"[\w.\-]+", group)
        return [(name, 1) for name in found]
    return []


def trip_count(
    loop: Instruction, around: Computation, program: dict[str, Computation]
) -> int | None:
    """Iterations of a loop: as stated, or from its counter's start, step and bound; None: unknown.

    `around` is the computation that the loop stands in.
    """
    stated = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if stated:
        return int(stated[1])
    condition = program[re.search(r"condition=%?([\w.\-]+)", loop.attributes)[1]]
    body = program[re.search(r"body=%?([\w.\-]+)", loop.attributes)[1]]
    test = next(i for i in condition.values() if i.root)
    if "direction=LT" not in test.attributes:
        return None
    counter, bound = (condition[o] for o in test.operands)
    place = re.search(r"index=(\d+)", counter.attributes)
    if counter.opcode != "get-tuple-element" or bound.opcode != "constant":
        return None
    index = int(place[1])
    given = around.get(loop.operands[0])
    start = around.get(given.operands[index]) if given and given.opcode == "tuple" else None
    first = int(start.inside) if start and start.opcode == "constant" else 0
    # The body's result holds the counter plus its step; loops unrolled by two step by two.
    root = next(i for i in body.values() if i.root)
    after = body.get(root.operands[index]) if root.opcode == "tuple" else None
    added = [body[o] for o in after.operands if o in body] if after else []
    steps = [int(i.inside) for i in added if i.opcode == "constant"]
    return max(0, -(-(int(bound.inside) - first) // (steps[0] if steps else 1)))
