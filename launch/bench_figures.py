"""Figures as text: of one measurement, and of two beside each other. Called by `bench.py`."""

import json
from collections.abc import Mapping
from typing import Any


def lines(figures: Mapping[str, Any]) -> list[str]:
    """A figure a line, those of a group indented."""
    found = []
    for name, value in figures.items():
        if isinstance(value, Mapping):
            found += [name, *(f"  {line}" for line in lines(value))]
        else:
            found.append(f"{name:28s} {shown(value)}")
    return found


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """The figures of both, and of numbers B / A."""
    found = [f"{'':28s} {'A':>14s} {'B':>14s} {'B / A':>8s}"]
    for name in [*a, *(name for name in b if name not in a)]:
        pair = a.get(name), b.get(name)
        if all(isinstance(value, Mapping) for value in pair):
            found += [name, *(f"  {line}" for line in compare(*pair)[1:])]
            continue
        numbers = all(isinstance(value, int | float) for value in pair) and pair[0]
        ratio = f"{pair[1] / pair[0]:8.3f}" if numbers else ""
        found.append(f"{name:28s} {shown(pair[0]):>14s} {shown(pair[1]):>14s} {ratio}".rstrip())
    return found


def read(path: str) -> dict[str, Any]:
    try:
        with open(path) as file:
            return json.load(file)
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path!r} is no file that --json wrote: {error}.") from None
