"""From a mixture of sources to batches: which images, crops and masks at (seed, step).

Everything a batch holds is a pure function of (seed, step): `Batches.at(step)` computes it, and
`Batches.stream(start_step)` gives the same batches in order, prepared ahead by threads or worker
processes. So the step number is all that a resumed run needs, and hosts, workers and threads change
nothing.

The unit of work is a group (`config.group` consecutive rows): threads and worker processes prepare
whole groups, hosts hold whole groups.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from dinojax.data.decode import UnreadableImage
from dinojax.data.masking import Masks, group_masks, mask_positions
from dinojax.data.mixture import MASKS, REPLACEMENT, SAMPLE, TRIPLE, Mixture, as_mixture
from dinojax.data.multicrop import Crops, views
from dinojax.data.sources import Source
from dinojax.data.workers import Ahead

GIVE_UP = 1000  # unreadable records in a row


class Failure(NamedTuple):
    """An image that could not be read (in a mixture, its name begins with its component's)."""

    name: str
    reason: str


def sample(
    seed: int, record: int, visit: int, stream: int = 0
) -> tuple[np.uint32, np.random.Generator]:
    """What is drawn for one image: the seed of its colours, and the generator of its crops."""
    rng = np.random.default_rng([seed, record, visit, *([SAMPLE + stream] if stream else [])])
    return rng.integers(2**32, dtype=np.uint32), rng


@dataclass(frozen=True)
class Batches:
    """All batches of a phase.

    `mixture` may be a bare source. `crops` are the crop sizes among which a step chooses with
    `probabilities`; `host` says which rows of the global batch are here: ((1, 3), 4) holds the
    second and the last of four equal runs of rows. An image with another number of
    bands than `channels` counts as unreadable.
    """

    mixture: Mixture | Source
    crops: tuple[Crops, ...]
    probabilities: tuple[float, ...]
    masks: Masks
    batch: int
    group: int
    seed: int
    host: tuple[tuple[int, ...], int] = ((0,), 1)
    channels: int = 3

    def __post_init__(self) -> None:
        object.__setattr__(self, "mixture", as_mixture(self.mixture))
        self.mixture.validate(self.batch)
        runs = self.host[1]
        if self.batch % (self.group * runs):
            nearest = max(1, round(self.batch / (self.group * runs))) * self.group * runs
            raise ValueError(
                f"a batch of {self.batch} images is not whole groups of {self.group} in each of "
                f"{runs} equal parts; nearest: batch_size={nearest}."
            )
        if len(self.crops) != len(self.probabilities) or min(self.probabilities) < 0:
            raise ValueError(
                f"{len(self.crops)} crop sizes have the probabilities {self.probabilities}, "
                f"expected one non-negative number for each."
            )

    @property
    def groups(self) -> int:
        """Groups of a batch on this host."""
        return self.batch // (self.group * self.host[1]) * len(self.host[0])

    def triple(self, step: int) -> int:
        """Which of the crop sizes step `step` uses; the same on every host."""
        bounds = np.cumsum(self.probabilities)
        u = np.random.default_rng([self.seed, step, 0, TRIPLE]).random()
        return int(np.searchsorted(bounds / bounds[-1], u, side="right"))

    def at(self, step: int) -> dict[str, Any]:
        """This host's part of the batch of one step, computed here and now.

        Arrays, and what stays on the host: `triple`, the number of the crop sizes, and `replaced`,
        a Failure for every image that was tried and could not be read.
        """
        return _join([self._group(step * self.groups + k) for k in range(self.groups)])

    def stream(
        self,
        start_step: int = 0,
        *,
        workers: int = 0,
        threads: int | None = None,
        prefetch: int = 2,
    ) -> "BatchStream":
        """The batches from `start_step` on; best closed, or used with `with`, when done.

        `threads` (default: one per core this process may use; 0: the caller itself) or `workers`
        processes prepare groups ahead. Decoding and resizing release the GIL, so worker processes
        pay only for small images on many cores.

        Memory, whatever the size of the source: with n threads or workers and groups of
        `prefetch` batches, at most max(n, groups) groups of finished crops, n decoded images, and
        the batch that the caller holds (besides what the sources themselves keep, and about 200
        bytes for each name in `replaced`).
        """
        return BatchStream(self, start_step, workers, threads, prefetch)

    def _group(self, element: int) -> dict[str, Any]:
        """Group `element` of the endless sequence of this host's groups."""
        step, k = divmod(element, self.groups)
        here, runs = self.host
        run, k = divmod(k, self.groups // len(here))
        index = here[run] * (self.batch // self.group // runs) + k  # in the global batch
        triple = self.triple(step)
        crops = self.crops[triple]
        out = {
            name: np.empty((self.group, *shape), np.uint8)
            for name, shape in crops.shapes(self.channels).items()
        }
        seeds = np.empty(self.group, np.uint32)
        failures: list[Failure] = []
        first = index * self.group
        rows = self.mixture.rows(self.seed, step, self.batch, first, first + self.group)
        for row, key in enumerate(zip(*(column.tolist() for column in rows))):
            _, record, visit, stream = key
            seeds[row], rng = sample(self.seed, record, visit, stream)
            # No name for the image: it must be gone when the next one comes.
            for name, pixels in views(self._readable(*key, failures), rng, crops).items():
                out[name][row] = pixels
        mask_rng = np.random.default_rng([self.seed, step, index, MASKS])
        spec, grid = self.masks, self.masks.grid(crops.global_size)
        masks = group_masks(
            mask_rng, 2 * self.group, grid, spec.probability, spec.ratio, spec.circular_shift
        )
        indices, weights = mask_positions(masks)
        return out | {
            "masks": masks.reshape(self.group, 2, -1),  # (b v) p -> b v p
            "mask_indices": indices[None],
            "mask_weights": weights[None],
            "seeds": seeds,
            "groups": np.array([index], np.int32),
            "triple": triple,
            "replaced": tuple(failures),
            "components": rows.component,
        }

    def _readable(
        self, component: int, record: int, visit: int, stream: int, failures: list[Failure]
    ) -> UInt8[np.ndarray, "i j c"]:
        """The image of a record, or of one drawn from the same component in its place.

        Drawn, not the next one: of a deleted shard the neighbours are unreadable too.
        """
        part, rng, tried = self.mixture.components[component], None, record
        for _ in range(GIVE_UP):
            try:
                return self._image(part.source, tried)
            except UnreadableImage as error:
                name = part.source.name(tried)
                reason = str(error).removeprefix(f"{name}: ")
            if len(self.mixture.components) > 1:
                name = f"{part.name}: {name}"
            failures.append(Failure(name, reason))
            rng = rng or np.random.default_rng([self.seed, record, visit, REPLACEMENT, stream])
            tried = int(rng.integers(len(part.source)))
        last = ": ".join(failures[-1])
        raise UnreadableImage(f"{GIVE_UP} images in a row cannot be read, the last: {last}")

    def _image(self, source: Source, record: int) -> UInt8[np.ndarray, "i j c"]:
        image = source.image(record)
        if image.shape[2] != self.channels:
            raise UnreadableImage(f"has {image.shape[2]} bands, expected {self.channels}")
        return image


class BatchStream(Iterator[dict[str, Any]]):
    """Batches in order of steps, and what they were made of so far.

    `replaced` counts the unreadable images by name, `rows` this host's rows by component; `kind` is
    the component of the last batch, or "mixed" if that was a heterogeneous one.
    """

    def __init__(
        self, batches: Batches, start_step: int, workers: int, threads: int | None, prefetch: int
    ) -> None:
        self.replaced: Counter[str] = Counter()
        self.rows: Counter[str] = Counter()
        self.kind = "mixed"
        self._batches, self._step = batches, start_step
        self._parts: list[dict[str, Any]] = []
        self._groups = Ahead(
            batches._group,
            start_step * batches.groups,
            workers=workers,
            threads=cores() if threads is None else threads,
            ahead=prefetch * batches.groups,
        )

    def __next__(self) -> dict[str, Any]:
        # Kept in self: whoever goes on after a Ctrl-C in here gets the whole batch.
        while len(self._parts) < self._batches.groups:
            self._parts.append(next(self._groups))
        parts, self._parts = self._parts, []
        mixture = self._batches.mixture
        drawn = np.concatenate([part["components"] for part in parts])
        for component, count in zip(*np.unique(drawn, return_counts=True)):
            self.rows[mixture.components[component].name] += int(count)
        kind = mixture.kind(self._batches.seed, self._step)
        self.kind = "mixed" if kind is None else mixture.components[kind].name
        self._step += 1
        batch = _join(parts)
        self.replaced.update(failure.name for failure in batch["replaced"])
        return batch

    def shares(self) -> dict[str, float | str]:
        """For logs: `rows_<name>`, each component's share of the rows so far, and `batch`."""
        components = self._batches.mixture.components
        if len(components) == 1:
            return {}
        total = max(self.rows.total(), 1)
        shares = {f"rows_{part.name}": self.rows[part.name] / total for part in components}
        return shares | {"batch": self.kind}

    def close(self) -> None:
        """Drops what is prepared ahead and ends threads and worker processes."""
        self._groups.close()

    def __enter__(self) -> "BatchStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def cores() -> int:
    """Cores this process may use (a container or a job often has fewer than the machine)."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _join(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Groups of one step -> a batch."""
    batch = {
        key: np.concatenate([part[key] for part in parts])
        for key in parts[0]
        if key not in ("triple", "replaced", "components")
    }
    replaced = tuple(failure for part in parts for failure in part["replaced"])
    return batch | {"triple": parts[0]["triple"], "replaced": replaced}
