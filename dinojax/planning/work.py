"""FLOPs of an instruction, and the bytes that it reads from and writes to main memory.

Called by `program`.
"""

import functools
import math
import re

import numpy as np

from dinojax.planning.hlo import Computation, Instruction, shape, size

# Instructions that move nothing themselves: names for values, and calls whose callees count.
FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while call conditional after-all "
    "partition-id replica-id async-start async-update async-done copy-done optimization-barrier "
    "opt-barrier add-dependency domain".split()
)
SLICES = ("dynamic-slice", "slice", "gather")  # read as much as they give
ALIASES = ("bitcast", "reshape", "copy", "convert", "transpose")
# Matrix products in each of splash attention's kernels, by a part of its name; all [n, h, t, e].
SPLASH_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dkv": 4, "splash_mha_dq": 3}


def instruction_flops(i: Instruction, computation: Computation) -> float:
    """FLOPs of a product or convolution; 0 for everything else."""
    if i.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)
        lhs = shape(computation[i.operands[0]].type)
        axes = [int(a) for a in contracted[1].split(",") if a] if contracted else []
        return 2.0 * math.prod(shape(i.type)) * math.prod(lhs[a] for a in axes)
    if i.opcode == "convolution":
        return convolution_flops(i, computation)
    for name, products in SPLASH_PRODUCTS.items():
        if i.opcode == "custom-call" and i.name.startswith(name):
            n, h, t, e = max((shape(computation[o].type) for o in i.operands), key=len)
            return 2.0 * products * n * h * t * t * e
    return 0.0


def convolution_flops(i: Instruction, computation: Computation) -> float:
    """2 x pairs of an input and a kernel entry that really meet: padding and dilation left out."""
    lhs, rhs = (shape(computation[o].type) for o in i.operands[:2])
    out = shape(i.type)
    left, right, result = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes).groups()
    window = re.search(r"window=\{([^}]*)\}", i.attributes)
    options = dict(part.split("=") for part in window[1].split()) if window else {}
    spatial = sorted(label for label in result if label.isdigit())

    def option(key: str, index: int, default: str) -> str:
        return options[key].split("x")[index] if key in options else default

    meet = 1
    for index, label in enumerate(spatial):
        pads = option("pad", index, "0_0").split("_")
        meet *= _meetings(
            lhs[left.index(label)],
            rhs[right.index(label)],
            out[result.index(label)],
            int(option("stride", index, "1")),
            int(pads[0]),
            int(option("lhs_dilate", index, "1")),
            int(option("rhs_dilate", index, "1")),
        )
    groups = re.search(r"batch_group_count=(\d+)", i.attributes)
    batch = lhs[left.index("b")] // (int(groups[1]) if groups else 1)
    return 2.0 * rhs[right.index("i")] * out[result.index("f")] * batch * meet


@functools.lru_cache(maxsize=4096)
def _meetings(
    inputs: int, kernel: int, outputs: int, stride: int, pad: int, dilate: int, spread: int
) -> int:
    """Pairs (kernel entry, output) along one axis that fall on a real input."""
    starts = np.arange(outputs) * stride - pad
    last = (inputs - 1) * dilate
    total = 0
    for k in range(kernel):
        place = starts + k * spread
        total += int(((place >= 0) & (place <= last) & (place % dilate == 0)).sum())
    return total


def moved_bytes(i: Instruction, computation: Computation, program: dict[str, Computation]) -> float:
    """Bytes that an instruction reads from and writes to main memory, at most."""
    if i.opcode in FREE or i.opcode.endswith("-done") or "AllocateBuffer" in i.attributes:
        return 0.0
    types = [computation[o].type for o in i.operands if o in computation]
    if i.opcode == "fusion":
        callee = program[re.search(r"calls=%?([\w.\-]+)", i.attributes)[1]]
        inputs = [
            min(_read_bytes(callee, index, program), size(text)) if size(text, True) else 0
            for index, text in enumerate(types)
        ]
        written = min(_written_bytes(callee, program), size(i.type)) if size(i.type, True) else 0
        return float(sum(inputs) + written)
    if i.opcode in SLICES:
        return 2.0 * size(i.type, True)
    if i.opcode == "dynamic-update-slice":
        return 2.0 * size(types[1], True)
    if i.opcode.endswith("-start"):  # its type holds what goes in beside what comes out
        return float(size(i.type, True))
    return float(size(i.type, True) + sum(size(text, True) for text in types))


def _read_bytes(callee: Computation, index: int, program: dict[str, Computation]) -> int:
    """Bytes that a fusion reads of a parameter: of a slice, no more than the slice."""
    name = next(
        i.name for i in callee.values() if i.opcode == "parameter" and i.inside == str(index)
    )
    whole, total, seen = size(callee[name].type), 0, [name]
    while seen:
        value = seen.pop()
        for user in callee.values():
            if value not in user.operands:
                continue
            place = user.operands.index(value)
            if user.opcode in SLICES and place == 0:
                total += size(user.type)
            elif user.opcode == "dynamic-update-slice" and place == 0:
                continue  # written in place
            elif user.opcode in ALIASES:
                seen.append(user.name)
            elif user.opcode == "fusion":
                inner = program[re.search(r"calls=%?([\w.\-]+)", user.attributes)[1]]
                total += _read_bytes(inner, place, program)
            else:
                return whole
    return total


def _written_bytes(callee: Computation, program: dict[str, Computation]) -> int:
    """Bytes that a fusion writes: of an update in place, no more than the update."""
    root = next(i for i in callee.values() if i.root)
    roots = [callee[o] for o in root.operands] if root.opcode == "tuple" else [root]
    total = 0
    for one in roots:
        while one.opcode in ALIASES and one.operands[0] in callee:
            one = callee[one.operands[0]]
        if one.opcode == "dynamic-update-slice":
            total += size(callee[one.operands[1]].type)
        elif one.opcode == "fusion":
            inner = program[re.search(r"calls=%?([\w.\-]+)", one.attributes)[1]]
            total += _written_bytes(inner, program)
        else:
            total += size(one.type, True)
    return total
