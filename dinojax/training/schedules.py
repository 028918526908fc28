"""Schedules: host-side float64 functions of the step, in closed form (spec 6.2 and 6.3).

The trainer evaluates them once a step and hands the results to the compiled step as scalars; plots
and tests evaluate them over whole arrays of steps. Steps count from 0 and from the start of the
phase; the value of step i is the one used *by* step i.

A schedule is a mapping of one of these kinds (all lengths in steps):

    kind="v2":         start, peak, end, warmup, cosine    (cosine = -1: all that is left)
    kind="v1":         start, base, end, warmup, trunc_extra
    kind="v1_linear":  start, end, warmup

v2: linear from `start` (included) to `peak`, reached at step `warmup`; then `cosine` steps from
`peak` to `end`, both included; then `end`. So start = peak = 0 with end > 0 is a half-cosine ramp
*up*, and cosine = 0 jumps to `end`. v1: the warm-up includes both its ends, the cosine excludes its
own. v1_linear (the teacher temperature of the v1 recipes): the warm-up, then `end`.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import numpy as np

Array = np.ndarray
_FIELDS = {
    "v2": ("start", "peak", "end", "warmup", "cosine"),
    "v1": ("start", "base", "end", "warmup", "trunc_extra"),
    "v1_linear": ("start", "end", "warmup"),
}
_LENGTHS = ("warmup", "cosine")
_OPTIONAL = {"cosine": -1, "trunc_extra": 0.0}
# What a learning rate's scaling rule multiplies: v2 scales its end too, v1 leaves it (spec 6.2).
_SCALED = {"v2": ("peak", "end"), "v1": ("base",)}
_SCALING_RULES = {
    "sqrt_1024": lambda batch: 4.0 * (batch / 1024.0) ** 0.5,
    "linear_256": lambda batch: batch / 256.0,
    "none": lambda batch: 1.0,
}


def value(schedule: Mapping[str, Any], step: int, total: int) -> float:
    """The schedule's value at one `step` of a phase of `total` steps."""
    return float(values(schedule, np.asarray(step), total))


def values(schedule: Mapping[str, Any], steps: Array, total: int) -> Array:
    """The schedule's values at `steps` (any shape), float64."""
    kind, fields = _checked(schedule)
    steps = np.asarray(steps, np.float64)
    return _FORMULAS[kind](steps, float(total), **fields)


def last_layer_values(
    learning_rate: Mapping[str, Any], freeze: int, steps: Array, total: int
) -> Array:
    """Learning rate of the prototype matrices: 0 for the first `freeze` steps, then everyone's."""
    return np.where(np.asarray(steps) < freeze, 0.0, values(learning_rate, steps, total))


def scale_lr(rule: str, batch: int) -> float:
    """Factor of a learning rate for a global batch (spec 6.2). Mind the 4 in "sqrt_1024"."""
    if rule not in _SCALING_RULES:
        raise ValueError(_unknown("learning-rate scaling rule", rule, _SCALING_RULES))
    return _SCALING_RULES[rule](batch)


def scaled(schedule: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """The learning-rate schedule with its peak scaled, and its end too in the v2 family."""
    kind, fields = _checked(schedule)
    if kind not in _SCALED:
        raise ValueError(f"a schedule of kind {kind!r} is not a learning rate; use 'v2' or 'v1'")
    return {
        "kind": kind,
        **{name: v * factor if name in _SCALED[kind] else v for name, v in fields.items()},
    }


def _v2(
    i: Array, total: float, start: float, peak: float, end: float, warmup: int, cosine: int
) -> Array:
    length = max(total - warmup, 0.0) if cosine < 0 else float(cosine)
    linear = start + (peak - start) * i / max(warmup, 1.0)
    # np.linspace(0, pi, length): both ends included; a single point sits at the peak.
    angle = np.pi * (i - warmup) / max(length - 1.0, 1.0)
    curve = end + (peak - end) * (1.0 + np.cos(angle)) / 2.0
    return np.where(i < warmup, linear, np.where(i < warmup + length, curve, end))


def _v1(
    i: Array, total: float, start: float, base: float, end: float, warmup: int, trunc_extra: float
) -> Array:
    length = max(total - warmup, 1.0)
    linear = start + (base - start) * i / max(warmup - 1.0, 1.0)
    if trunc_extra == 0:
        fraction = (1.0 + np.cos(np.pi * (i - warmup) / length)) / 2.0
    else:
        # A cosine over more points than there are steps, cut off and stretched to end at 0.
        points = max(float(int((1.0 + trunc_extra) * length)) - 1.0, 1.0)
        last = (1.0 + np.cos(np.pi * (length - 1.0) / points)) / 2.0
        fraction = (1.0 + np.cos(np.pi * (i - warmup) / points)) / 2.0
        fraction = (fraction - last) / (1.0 - last) if last < 1.0 else np.ones_like(fraction)
    curve = end + (base - end) * fraction
    return np.where(i < warmup, linear, np.where(i < total, curve, end))


def _v1_linear(i: Array, total: float, start: float, end: float, warmup: int) -> Array:
    del total  # the warm-up alone shapes it
    linear = start + (end - start) * i / max(warmup - 1.0, 1.0)
    return np.where(i < warmup, linear, end)


_FORMULAS = {"v2": _v2, "v1": _v1, "v1_linear": _v1_linear}


def _checked(schedule: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Kind and complete fields of a schedule; an unknown or missing name is one sentence."""
    given = dict(schedule)
    kind = given.pop("kind", None)
    if kind not in _FIELDS:
        raise ValueError(_unknown("schedule kind", kind, _FIELDS))
    for name in given:
        if name not in _FIELDS[kind]:
            raise ValueError(_unknown(f"field of a {kind!r} schedule", name, _FIELDS[kind]))
    missing = [n for n in _FIELDS[kind] if n not in given and n not in _OPTIONAL]
    if missing:
        raise ValueError(f"a schedule of kind {kind!r} needs {', '.join(missing)}; got {given}")
    fields = {n: given.get(n, _OPTIONAL.get(n)) for n in _FIELDS[kind]}
    return kind, {n: int(v) if n in _LENGTHS else float(v) for n, v in fields.items()}


def _unknown(what: str, name: Any, allowed: Any) -> str:
    near = get_close_matches(str(name), list(allowed), n=1, cutoff=0.0)
    return f"unknown {what} {name!r}; known: {', '.join(allowed)} (nearest: {near[0]})"
