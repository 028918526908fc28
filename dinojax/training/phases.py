"""Phases of a run: which one a step belongs to, its schedules, what starts from what.

Steps are global across phases; everything inside a phase is counted from its own start. Configs
arrive resolved (`dinojax.config.resolve`).
"""

from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from dinojax.training import schedules


class Span(NamedTuple):
    """One phase on the time line of a run: global steps first .. last - 1."""

    index: int
    first: int
    last: int
    phase: ConfigDict


def spans(config: ConfigDict) -> tuple[Span, ...]:
    """All phases in order."""
    result, first = [], 0
    for index, phase in enumerate(config.phases):
        result.append(Span(index, first, first + phase.steps, phase))
        first += phase.steps
    return tuple(result)


def scalars(config: ConfigDict, phase: ConfigDict, step: int) -> dict[str, float]:
    """Every scheduled number at `step` of the phase (spec 6.2, 6.3)."""
    plan, total = phase.schedules.to_dict(), phase.steps
    factor = schedules.scale_lr(config.optim.lr_scaling, phase.batch_size)
    rate, freeze = schedules.scaled(plan["lr"], factor), plan["freeze_last_layer"]
    return {
        "lr": schedules.value(rate, step, total),
        "last_layer_lr": float(schedules.last_layer_values(rate, freeze, np.asarray(step), total)),
        "weight_decay": schedules.value(plan["weight_decay"], step, total),
        "momentum": schedules.value(plan["momentum"], step, total),
        "teacher_temp": schedules.value(plan["teacher_temp"], step, total),
        "dino_local_weight": schedules.value(plan["dino_local"], step, total),
        "gram_weight": schedules.value(plan["gram"], step, total),
    }


def gram_refresh_due(phase: ConfigDict, step: int) -> bool:
    """Whether the Gram teacher is refreshed after `step` of the phase (spec 3.6).

    As the reference: after step it if it + 1 >= first and (it + 1) is a multiple of every, at most
    `refresh_max` times; how many came before follows from the step alone.
    """
    rule, done = phase.gram, step + 1
    if rule.teacher != "snapshot" or rule.refresh_every < 1:
        return False
    if done < rule.refresh_first or done % rule.refresh_every:
        return False
    earliest = max(rule.refresh_first, 1)
    before = (done - 1) // rule.refresh_every - (earliest - 1) // rule.refresh_every
    return rule.refresh_max == 0 or before < rule.refresh_max


def describe(config: ConfigDict) -> str:
    """The time line in plain words, one line a phase."""
    lines = []
    for span in spans(config):
        phase = span.phase
        batch = phase.batch_size
        sizes = " or ".join(
            f"2x{large} + {phase.crops.locals}x{small}" + (f", gram {anchor}" if anchor else "")
            for large, small, anchor in phase.crops.sizes
        )
        start = {"previous": "goes on", "previous_teacher": "starts from the EMA teacher"}.get(
            phase.start, f"starts from {phase.start}"
        )
        if span.index == 0 and phase.start == "previous":
            start = "starts from scratch"
        terms = [name for name in ("dino", "ibot", "koleo") if phase.losses[name]]
        if phase.gram.teacher != "none":
            terms.append(f"gram ({phase.gram.teacher})")
        lines.append(
            f"{phase.name}: steps {span.first:,} to {span.last:,}, {start}; {batch:,} images a "
            f"step ({phase.steps * batch:,} in all); crops {sizes}; {' + '.join(terms)}"
        )
    return "\n".join(lines)
