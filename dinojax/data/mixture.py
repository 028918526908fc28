"""Which image every row of every batch shows: sources mixed by a closed form of (seed, step).

A step is either a homogeneous batch, of one component alone, or a heterogeneous one, whose rows are
shared out by the components' weights. Nothing is replayed and nothing stored: both choices are made
in blocks that hold exact counts in an order of their own, so how often each came before any step is
a matter of arithmetic. A single source is the mixture of one component. Opened by
`data/from_config.py`, asked by `data/pipeline.py`.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from grain.experimental import index_shuffle
from jaxtyping import Int64

from dinojax.data.sources import Source, open_source

# Fourth words of seeds, here and in `data.pipeline`: what a seed is for. A sample's own seed has
# three words (numpy pads them with a zero); outside stream 0 its fourth is SAMPLE + stream.
TRIPLE, MASKS, ORDER, KINDS, ROWS, REPLACEMENT, SAMPLE = 1, 2, 3, 4, 5, 6, 16
STEP_BLOCK, ROW_BLOCK = 1000, 4096  # draws that hold exact counts

Shares = tuple[Fraction, ...]  # they sum to 1


@dataclass(frozen=True)
class Component:
    """A source and how often it is drawn.

    `weight` is its share of the rows of heterogeneous batches, relative to the other components'
    (None: its number of images; 0: it takes no part in them). `homogeneous` is the probability that
    a step's whole batch is of this component.
    """

    name: str
    source: Source
    weight: float | None = None
    homogeneous: float = 0.0


class Rows(NamedTuple):
    """Rows of the global batch of a step.

    `stream` numbers the endless sequence of records that a row comes from: 2 x component, + 1 in
    homogeneous batches. Each sequence goes through all records in every visit, in an order of the
    visit's own.
    """

    component: Int64[np.ndarray, " b"]
    record: Int64[np.ndarray, " b"]
    visit: Int64[np.ndarray, " b"]
    stream: Int64[np.ndarray, " b"]


@dataclass(frozen=True)
class Mixture:
    """Components to draw from; ValueError (one sentence) if their numbers cannot be."""

    components: tuple[Component, ...]

    def __post_init__(self) -> None:
        check([(part.name, part.weight, part.homogeneous) for part in self.components])

    @cached_property
    def kinds(self) -> Shares:
        """Probabilities of a step: homogeneous of each component, and heterogeneous, the last."""
        alone = [_exact(part.homogeneous) for part in self.components]
        return *alone, 1 - sum(alone)

    @cached_property
    def weights(self) -> Shares:
        """Each component's share of the rows of heterogeneous batches."""
        given = [
            Fraction(len(part.source)) if part.weight is None else _exact(part.weight)
            for part in self.components
        ]
        return tuple(weight / (sum(given) or 1) for weight in given)

    def expected(self) -> dict[str, float]:
        """Each component's share of all rows, by name."""
        mixed = self.kinds[-1]
        return {
            part.name: float(alone + mixed * weight)
            for part, alone, weight in zip(self.components, self.kinds, self.weights)
        }

    def describe(self) -> str:
        """A line for people."""
        parts = []
        for part, alone, share in zip(self.components, self.kinds, self.expected().values()):
            parts.append(f"{part.name} {100 * share:.3g}% of the rows")
            if alone:
                parts[-1] += f" ({100 * float(alone):.3g}% of the batches are of it alone)"
        return f"data: {', '.join(parts)}"

    def validate(self, batch: int) -> None:
        """A component must fill its rows of a batch, or images would meet themselves in it.

        (In Sinkhorn and KoLeo. Where one visit ends and the next begins within a batch, a few do.)
        """
        for part, alone, weight in zip(self.components, self.kinds, self.weights):
            share = 1 if alone else weight * bool(self.kinds[-1])
            if batch * share > len(part.source):
                who = f"component {part.name!r}" if len(self.components) > 1 else "the source"
                what = "a homogeneous batch" if alone else "the batch"
                raise ValueError(
                    f"{who} has {len(part.source)} images, {what} needs "
                    f"{math.ceil(batch * share)}; nearest: "
                    f"batch_size={math.floor(len(part.source) / share)}."
                )

    def kind(self, seed: int, step: int) -> int | None:
        """The component of which all rows of a step are; None: the batch is heterogeneous."""
        (chosen,), _ = draw(self.kinds, seed, KINDS, STEP_BLOCK, step, step + 1)
        return int(chosen) if chosen < len(self.components) else None

    def rows(
        self, seed: int, step: int, batch: int, first: int = 0, stop: int | None = None
    ) -> Rows:
        """Rows first..stop (None: all) of the global batch of a step; the same on every host.

        Costs 4 us a row (0.06 ms with components of 1,000 images, 1 ms with 16), whatever the step:
        16,000 us for all of 4,096 rows, in which each thread that prepares groups has its part.
        """
        stop = batch if stop is None else stop
        (kind,), (earlier,) = draw(self.kinds, seed, KINDS, STEP_BLOCK, step, step + 1)
        first, stop = int(earlier) * batch + first, int(earlier) * batch + stop
        alone = int(kind < len(self.components))
        if alone:
            component, position = np.full(stop - first, kind), np.arange(first, stop)
        else:
            component, position = draw(self.weights, seed, ROWS, ROW_BLOCK, first, stop)
        stream = 2 * component + alone
        sizes = np.array([len(part.source) for part in self.components])[component]
        visit, place = np.divmod(position, sizes)
        columns = (column.tolist() for column in (place, sizes, visit, stream))
        record = [
            index_shuffle(place, max_index=n - 1, seed=_order(seed, visit, stream), rounds=4)
            for place, n, visit, stream in zip(*columns)
        ]
        return Rows(component, np.array(record, np.int64), visit, stream)


def as_mixture(source: Source | Mixture) -> Mixture:
    """A bare source is the mixture of it alone."""
    return source if isinstance(source, Mixture) else Mixture((Component("data", source),))


def open_mixture(
    source: str, parts: Sequence[tuple[str, str, float | None, float]] = ()
) -> Mixture:
    """The mixture of `parts`: (name, SPEC, weight, homogeneous probability) of each.

    Without parts it is what `source` names: one source, or all components of a mixture that data
    curation wrote (`curated:DIRECTORY/mixture.json`). Raises ValueError, in one sentence.
    """
    where, question, query = source.removeprefix("curated:").partition("?")
    several = where.endswith(".json") and "component=" not in query
    if not parts and source.startswith("curated:") and several:
        from dinojax.data.curated import read_mixture

        parts = [
            (name, f"curated:{samples}{question}{query}", weight, homogeneous)
            for name, samples, weight, homogeneous in read_mixture(where)
        ]
    if not parts:
        return as_mixture(open_source(source))
    check([(name, weight, homogeneous) for name, _, weight, homogeneous in parts])
    return Mixture(tuple(_open_component(*part) for part in parts))


def _open_component(name: str, spec: str, weight: float | None, homogeneous: float) -> Component:
    try:
        return Component(name, open_source(spec), weight, homogeneous)
    except ValueError as error:
        raise ValueError(f"component {name!r}: {error}") from None


def check(parts: Sequence[tuple[str, float | None, float]]) -> None:
    """Raise ValueError unless (name, weight, homogeneous probability) of the parts make sense."""
    names = [name for name, _, _ in parts]
    for name, weight, alone in parts:
        if not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(
                f"mixture: a component is called {name!r}; expected letters, digits, '_', '-', '.'."
            )
        if names.count(name) > 1:
            raise ValueError(f"mixture: {names.count(name)} components are called {name!r}.")
        if weight is not None and not 0 <= weight < math.inf:
            raise ValueError(
                f"mixture: component {name!r} has the weight {weight}; expected a number from 0 "
                f"on, or None (its size)."
            )
        if not 0 <= alone <= 1:
            raise ValueError(
                f"mixture: component {name!r} has the homogeneous probability {alone}; expected 0 "
                f"to 1."
            )
    total = sum(_exact(alone) for _, _, alone in parts)
    if total > 1:
        raise ValueError(
            f"mixture: the homogeneous probabilities sum to {float(total):g}; expected at most 1."
        )
    if total < 1 and all(weight == 0 for _, weight, _ in parts):
        raise ValueError(
            f"mixture: no component has a weight above 0, but {float(1 - total):g} of the batches "
            f"are heterogeneous; give one a weight, or make the homogeneous probabilities sum to 1."
        )


# ---- the closed form -----------------------------------------------------------------------------


def draw(
    shares: Shares, seed: int, word: int, length: int, first: int, stop: int
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """Draws first..stop of an endless sequence of choices among `shares`.

    Returns for each draw what is chosen, and how often that was chosen before. Every block of
    `length` draws holds each share's exact count, up to rounding that does not add up.
    """
    blocks = range(first // length, (stop - 1) // length + 1)
    chosen, before = zip(*(_block(shares, seed, word, length, block) for block in blocks))
    part = slice(first - blocks[0] * length, stop - blocks[0] * length)
    return np.concatenate(chosen)[part], np.concatenate(before)[part]


def counts(shares: Shares, n: int) -> list[int]:
    """How many of the first n draws go to each share; they sum to n, and none falls as n grows.

    Rounded down one after the other, each out of what the ones before it leave.
    """
    found, left, total = [], n, Fraction(1)
    for share in shares[:-1]:
        part = int(left * share // total) if total else 0
        found.append(part)
        left, total = left - part, total - share
    return [*found, left]


@lru_cache(maxsize=64)  # 64 KB each; a step looks at the blocks of its own rows
def _block(
    shares: Shares, seed: int, word: int, length: int, block: int
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """Of every draw of a block: what is chosen, and how often it was chosen before."""
    before = counts(shares, block * length)
    added = np.diff([before, counts(shares, (block + 1) * length)], axis=0)[0]
    # By sorting raw words: numpy keeps those the same for ever, its permutations not.
    words = np.random.PCG64([seed, block, 0, word]).random_raw(length)
    order = np.argsort(words, kind="stable")
    chosen, rank = np.empty(length, np.int64), np.empty(length, np.int64)
    for choice, mine in enumerate(np.split(order, np.cumsum(added)[:-1])):
        chosen[mine] = choice
        rank[np.sort(mine)] = before[choice] + np.arange(len(mine))
    return chosen, rank


@lru_cache(maxsize=1024)
def _order(seed: int, visit: int, stream: int) -> int:
    """The seed of the permutation in which a visit of a stream goes through the records."""
    return int(np.random.SeedSequence([seed, visit, stream, ORDER]).generate_state(1)[0])


def _exact(number: float) -> Fraction:
    """The fraction that a person means who writes 0.1."""
    return Fraction(repr(float(number)))
