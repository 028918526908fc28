"""From a source to batches: which images, crops and masks at (seed, step), prepared by threads.

Everything a batch holds is a pure function of (seed, step): `Batches.at(step)` computes it, and
`Batches.stream(start_step)` gives the same batches in order, prepared ahead by grain. So the step
number is all that a resumed run needs, and hosts, workers and threads change nothing.

The unit of work is a group (`config.group` consecutive rows): threads and worker processes prepare
whole groups, hosts hold whole groups.
"""

import os
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from absl import flags
from grain.experimental import index_shuffle
from jaxtyping import UInt8

from dinojax.data.decode import UnreadableImage
from dinojax.data.masking import Masks, group_masks, mask_positions
from dinojax.data.multicrop import Crops, views
from dinojax.data.sources import Source

# Fourth word of the seeds of what is not drawn per sample (a sample's seed has three words, which
# numpy pads with a zero).
TRIPLE, MASKS, ORDER = 1, 2, 3
GIVE_UP = 1000  # consecutive unreadable records


def validate(source: Source, batch: int) -> None:
    """A source must fill a batch, or an image would meet itself in Sinkhorn and KoLeo."""
    if len(source) < batch:
        raise ValueError(
            f"the source has {len(source)} images, the batch needs {batch}; "
            f"nearest: batch_size={len(source)}."
        )


@dataclass(frozen=True)
class Batches:
    """All batches of a phase.

    `crops` are the crop sizes among which a step chooses with `probabilities`; `host` is (index,
    number of hosts): each holds its run of consecutive rows of the global batch.
    """

    source: Source
    crops: tuple[Crops, ...]
    probabilities: tuple[float, ...]
    masks: Masks
    batch: int
    group: int
    seed: int
    host: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        validate(self.source, self.batch)
        hosts = self.host[1]
        if self.batch % (self.group * hosts):
            nearest = max(1, round(self.batch / (self.group * hosts))) * self.group * hosts
            raise ValueError(
                f"a batch of {self.batch} images is not whole groups of {self.group} on each of "
                f"{hosts} hosts; nearest: batch_size={nearest}."
            )
        if len(self.crops) != len(self.probabilities) or min(self.probabilities) < 0:
            raise ValueError(
                f"{len(self.crops)} crop sizes have the probabilities {self.probabilities}, "
                f"expected one non-negative number for each."
            )

    @property
    def groups(self) -> int:
        """Groups of a batch on this host."""
        return self.batch // (self.group * self.host[1])

    def triple(self, step: int) -> int:
        """Which of the crop sizes step `step` uses; the same on every host."""
        bounds = np.cumsum(self.probabilities)
        u = np.random.default_rng([self.seed, step, 0, TRIPLE]).random()
        return int(np.searchsorted(bounds / bounds[-1], u, side="right"))

    def records(self, positions: Sequence[int]) -> list[tuple[int, int]]:
        """(record, visit) at each position of the endless sequence of rows.

        Every visit goes through all records in an order of its own (grain's index_shuffle: a
        permutation computed entry by entry, nothing is stored). It walks a cycle among at least
        2**16 numbers: 4 us an entry from 10,000 records on, 0.06 ms for 1,000, 1 ms for 16.
        """
        n, seeds, found = len(self.source), {}, []
        for position in positions:
            visit, place = divmod(position, n)
            if visit not in seeds:
                words = np.random.SeedSequence([self.seed, visit, 0, ORDER])
                seeds[visit] = int(words.generate_state(1)[0])
            record = index_shuffle(place, max_index=n - 1, seed=seeds[visit], rounds=4)
            found.append((record, visit))
        return found

    def at(self, step: int) -> dict[str, Any]:
        """This host's part of the batch of one step, computed here and now."""
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

        Threads prepare groups ahead: `threads` of them (default: one per core this process may use;
        one in each worker process), at most max(threads, prefetch batches of groups) groups in
        memory. Decoding and resizing release the GIL, so worker processes pay only for small images
        on many cores; they start their own Python, which needs a main module safe to import.
        """
        return BatchStream(self, start_step, workers, threads, prefetch)

    def _group(self, element: int) -> dict[str, Any]:
        """Group `element` of the endless sequence of this host's groups."""
        step, k = divmod(element, self.groups)
        index = self.host[0] * self.groups + k  # in the global batch
        triple = self.triple(step)
        crops = self.crops[triple]
        out = {
            name: np.empty((self.group, *shape), np.uint8) for name, shape in crops.shapes().items()
        }
        seeds = np.empty(self.group, np.uint32)
        replaced: list[str] = []
        first = step * self.batch + index * self.group
        for row, (record, visit) in enumerate(self.records(range(first, first + self.group))):
            rng = np.random.default_rng([self.seed, record, visit])
            seeds[row] = rng.integers(2**32, dtype=np.uint32)
            image = self._readable(record, replaced)
            for name, pixels in views(image, rng, crops).items():
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
            "replaced": tuple(replaced),
        }

    def _readable(self, record: int, replaced: list[str]) -> UInt8[np.ndarray, "i j c"]:
        """The image of a record, or of the next readable one after it."""
        n = len(self.source)
        for offset in range(min(n, GIVE_UP)):
            try:
                return self.source.image((record + offset) % n)
            except UnreadableImage as error:
                last = error
                replaced.append(self.source.name((record + offset) % n))
        raise UnreadableImage(f"{len(replaced)} images in a row cannot be read, the last: {last}")


class BatchStream(Iterator[dict[str, Any]]):
    """Batches in order of steps. `replaced` counts the unreadable images met so far, by name."""

    def __init__(
        self, batches: Batches, start_step: int, workers: int, threads: int | None, prefetch: int
    ) -> None:
        self.replaced: Counter[str] = Counter()
        self._groups = batches.groups
        if threads is None:
            threads = 1 if workers else _cores()
        ahead = prefetch * self._groups  # groups
        if workers:
            ahead = -(-ahead // workers)
        # len() of a dataset must fit a signed word; no run gets through 2**48 groups.
        data = grain.MapDataset.range(start_step * self._groups, 2**48).map(batches._group)
        options = grain.ReadOptions(threads, max(ahead, threads) if threads else 0)
        data = data.to_iter_dataset(options)
        if workers:
            # grain asks absl about its flags, and absl refuses where no `app.run` parsed any
            # (notebooks, tests, plain scripts).
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            data = data.mp_prefetch(grain.MultiprocessingOptions(workers, ahead))
        self._iterators = [iter(data)]
        # Also when forgotten, and then before the interpreter takes its modules apart: grain's own
        # destructors print tracebacks there and leave shared memory behind.
        self._finish = weakref.finalize(self, _close_all, self._iterators)

    def __next__(self) -> dict[str, Any]:
        if not self._iterators:
            raise ValueError("this stream of batches has been closed.")
        groups = [next(self._iterators[0]) for _ in range(self._groups)]
        return _join(groups, self.replaced)

    def close(self) -> None:
        """Drops what is prepared ahead and ends threads and worker processes."""
        self._finish()

    def __enter__(self) -> "BatchStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _cores() -> int:
    """Cores this process may use (a container or a job often has fewer than the machine)."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _close_all(iterators: list[grain.DatasetIterator]) -> None:
    while iterators:
        iterators.pop().close()


def _join(parts: list[dict[str, Any]], replaced: Counter[str] | None = None) -> dict[str, Any]:
    """Groups of one step -> a batch; names of unreadable images become their number."""
    names = [name for part in parts for name in part["replaced"]]
    if replaced is not None:
        replaced.update(names)
    batch = {
        key: np.concatenate([part[key] for part in parts])
        for key in parts[0]
        if key not in ("triple", "replaced")
    }
    return batch | {"triple": parts[0]["triple"], "replaced": len(names)}
