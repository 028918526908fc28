"""Is the run still learning? Collapse and divergence, judged on the host.

The watchers look at fetched metrics, every step's in order, and never at the device: `NonFinite`
ends a run whose updates keep being discarded, `CollapseWatch` says once, in a sentence, that the
features have stopped differing from each other.
"""

import math
from collections.abc import Mapping


class TrainingDiverged(RuntimeError):  # noqa: N818 (an end of training, not a mistake in the code)
    """Too many steps in a row were not finite."""


class NonFinite:
    """Counts steps in a row whose loss or gradient norms were not finite.

    Their updates were discarded inside the compiled step; `limit` of them end the run.
    """

    def __init__(self, limit: int = 3):
        self.limit, self.in_a_row = limit, 0

    def observe(self, step: int, metrics: Mapping[str, float]) -> None:
        """To be called once per step, in order. Raises TrainingDiverged at the limit."""
        names = [name for name in metrics if name == "loss" or name.startswith("grad_norm")]
        finite = all(math.isfinite(metrics[name]) for name in names)
        finite &= not metrics.get("skipped_in_a_row", 0)  # the step judged its update as well
        self.in_a_row = 0 if finite else self.in_a_row + 1
        if self.in_a_row >= self.limit:
            terms = ", ".join(f"{name} {value:.6g}" for name, value in metrics.items())
            raise TrainingDiverged(
                f"{self.in_a_row} steps in a row were not finite, the last was step {step}; their "
                f"updates were discarded. Terms of step {step}: {terms}"
            )


class CollapseWatch:
    """Warns once when the DINO loss sits at chance and the features have drawn together.

    Chance is ln(prototypes). Either sign alone is common early in a healthy run, so both must hold,
    on averages over about `memory` steps, and not before `patience` steps. Of the features it knows
    what the metrics tell: `cls_spread` (1 spread evenly, 0 all alike) or else `koleo`, minus the
    mean log distance of nearest neighbours.
    """

    CHANCE = 0.99  # of ln(prototypes)
    SPREAD = 0.1  # a tenth of an even spread
    KOLEO = 4.0  # nearest neighbours exp(-4) = 0.018 apart on the unit sphere

    def __init__(self, prototypes: int, patience: int = 500, memory: int = 100):
        self.chance = math.log(prototypes)
        self.patience, self.memory = patience, memory
        self.seen, self.warned = 0, False
        self.means: dict[str, float] = {}

    def observe(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """The warning, or None."""
        self.seen += 1
        for name in ("dino_global", "cls_spread", "koleo"):
            if name in metrics and math.isfinite(metrics[name]):
                mean = self.means.get(name, metrics[name])
                self.means[name] = mean + (metrics[name] - mean) / min(self.seen, self.memory)
        narrow = self._narrow()
        if self.warned or self.seen < self.patience or narrow is None:
            return None
        if self.means.get("dino_global", 0.0) < self.CHANCE * self.chance:
            return None
        self.warned = True
        return (
            f"step {step}: the features look collapsed: the DINO loss is "
            f"{self.means['dino_global']:.3f}, chance {self.chance:.3f}, and {narrow}; try a lower "
            "learning rate, a longer warm-up, a lower teacher temperature or a larger batch"
        )

    def _narrow(self) -> str | None:
        if "cls_spread" in self.means:
            spread = self.means["cls_spread"]
            return f"their spread is {spread:.3f} of 1" if spread < self.SPREAD else None
        koleo = self.means.get("koleo", 0.0)
        distance = math.exp(-koleo)
        return f"nearest neighbours are {distance:.3f} apart" if koleo > self.KOLEO else None
