"""Where a step's time goes: `launch/bench.py --shares`, read from a profile of the compiled step.

Every instruction of a program carries the named scopes it was written under (objectives/ssl.py,
train.py), a profile carries instructions and their durations; this joins the two. What
rematerialisation computes again counts as backward, and a fusion belongs to the scope of its last
instruction. On a CPU the operations of several threads overlap: shares are of the summed time.
"""

import collections
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

PARTS = (
    *("photometrics", "teacher", "gram teacher", "student forward", "student backward"),
    *("heads and losses", "optimiser + EMA", "other"),
)
# Instructions that only contain others, whose own time is counted.
CONTAINERS = ("while", "call", "conditional", "async-start", "async-done")


def shares(compiled: Any, run: Callable[[], Any], folder: str | None = None) -> dict[str, float]:
    """Fractions of a step's device time by part; they sum to 1.

    Args:
      compiled: the step (`jax.stages.Compiled`).
      run: takes some steps and waits for them.
      folder: where the profile stays (None: nowhere); TensorBoard and Perfetto read it.
    """
    with tempfile.TemporaryDirectory() as temporary:
        where = Path(folder or temporary)
        with jax.profiler.trace(str(where)):
            run()
        newest = max(where.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
        spent = durations(jax.profiler.ProfileData.from_file(str(newest)))
    return divide(spent, parts(compiled.as_text()))


def parts(program: str) -> dict[str, str]:
    """The part that each instruction of an HLO text belongs to."""
    found = {}
    line = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*)")
    for name, rest in (match.groups() for match in map(line.match, program.splitlines()) if match):
        opcode = re.search(r" ([a-z\-]+)\(", " " + rest)
        if opcode is None or opcode.group(1) in CONTAINERS:
            continue
        scopes = re.search(r'op_name="([^"]*)"', rest)
        found[name] = part(scopes.group(1) if scopes else "")
    return found


def part(scopes: str) -> str:
    """The part of 'jit(step)/transpose(jvp(student))/while/body/dot_general'."""
    named = set(re.findall(r"\w+", scopes))
    if "gram" in named:
        return "gram teacher"
    if "student" in named:
        return "student backward" if "transpose" in named else "student forward"
    for scope, name in (
        ("losses", "heads and losses"),
        ("teacher", "teacher"),
        ("photometrics", "photometrics"),
        ("update", "optimiser + EMA"),
    ):
        if scope in named:
            return name
    return "other"


def durations(profile: Any) -> Iterator[tuple[str, float]]:
    """(instruction, nanoseconds) of every operation that ran."""
    for plane in profile.planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if "hlo_op" in stats:
                    yield str(stats["hlo_op"]), event.duration_ns


def divide(spent: Iterator[tuple[str, float]], part_of: Mapping[str, str]) -> dict[str, float]:
    """Durations of instructions -> shares of parts. Containers are in no part and left out.

    Raises:
      ValueError: the profile shows no operation of the program.
    """
    total: dict[str, float] = collections.Counter()
    for instruction, nanoseconds in spent:
        if instruction in part_of:
            total[part_of[instruction]] += nanoseconds
    whole = sum(total.values())
    if not whole:
        raise ValueError("the profile shows no operation of the step on this backend")
    return {name: total[name] / whole for name in PARTS if total[name]}
