"""What the evaluators share: images of a labelled source at one size, and their features.

An evaluator is a class `Evaluator` in a file of its own under `eval/`, built from plain values,
with

    run(features_fn) -> Iterator[tuple[name, value]]

`features_fn` maps uint8 images [n, i, j, c] to one descriptor each [n, d], so the trainer passes
its teacher, a finished backbone passes itself, and raw pixels are the floor.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from dinojax.data.decode import UnreadableImage
from dinojax.data.sources import open_source

# Gets a whole batch as a numpy array of one fixed shape; where it runs, and on how many devices, is
# its own affair. On several hosts every host calls it with the same batches.
FeaturesFn = Callable[[UInt8[np.ndarray, "n i j c"]], Any]

_log = logging.getLogger(__name__)
_KEPT_BYTES = 2**29  # resized images up to this size are kept for the next evaluation of a run


def fit(
    image: UInt8[np.ndarray, "i j c"], size: int, resize: int | None = None
) -> UInt8[np.ndarray, "size size c"]:
    """Shorter side to `resize` (None: to `size`), bicubic with antialias, then the centre crop.

    The published protocol for classification is size 224 with resize 256 (spec 0.2).
    """
    resize = size if resize is None else resize
    if resize < size:
        raise ValueError(f"resize {resize} is below the crop size {size}; it must not be smaller.")
    rows, cols, channels = image.shape
    scale = resize / min(rows, cols)
    height, width = max(resize, int(rows * scale)), max(resize, int(cols * scale))
    if (height, width) != (rows, cols):
        # Pillow resizes 1 and 3 channels; others go one by one.
        planes = [image] if channels == 3 else [image[..., k] for k in range(channels)]
        planes = [
            np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC))
            for plane in planes
        ]
        image = planes[0] if channels == 3 else np.stack(planes, axis=-1)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return image[top : top + size, left : left + size]


class Images:
    """The labelled images of a source at one size, in batches of one static shape.

    Args:
        source: a SPEC (`parquet:FILE?split=val`) or an opened source with
            `len()`, `image(i)` [i, j, c] uint8 and `labels()`.
        size, resize: see `fit`.
        limit: use so many images, spread evenly over the source (it may be sorted by class).
        threads: of decoding and resizing; both leave Python's lock.
    """

    def __init__(
        self,
        source: Any,
        size: int,
        resize: int | None = None,
        limit: int | None = None,
        threads: int = 4,
    ):
        self.source = open_source(source) if isinstance(source, str) else source
        self.size, self.resize, self.threads = size, resize, threads
        count = len(self.source)
        if count == 0:
            raise ValueError(f"{source} holds no images; an evaluation needs at least one.")
        if limit is not None and limit < count:
            self.rows = np.arange(limit) * count // limit
        else:
            self.rows = np.arange(count)
        self._kept: dict[int, np.ndarray | None] = {}
        self._room = _KEPT_BYTES

    def __len__(self) -> int:
        return len(self.rows)

    def labels(self) -> Int[np.ndarray, " n"]:
        labels = self.source.labels()
        if labels is None:
            raise ValueError(f"{self.source} has no labels; an evaluation needs them.")
        return np.asarray(labels, np.int32)[self.rows]

    def image(self, index: int) -> UInt8[np.ndarray, "size size c"] | None:
        """One image at `size`; None if it cannot be read (said once, then left out)."""
        if index in self._kept:
            return self._kept[index]
        row = int(self.rows[index])
        try:
            image = fit(self.source.image(row), self.size, self.resize)
        except UnreadableImage as error:
            _log.warning("left out of the evaluation: %s", error)
            self._kept[index] = None
            return None
        if image.nbytes <= self._room:
            self._room -= image.nbytes
            # A copy, or the kept crop would keep the whole decoded image alive.
            image = self._kept[index] = np.ascontiguousarray(image)
        return image

    def batches(
        self, batch: int
    ) -> Iterator[tuple[UInt8[np.ndarray, "n size size c"], Int[np.ndarray, " real"]]]:
        """(images, rows): the readable images of `rows` first, then zeros up to `batch`."""
        starts = deque(range(0, len(self), batch))
        with ThreadPoolExecutor(self.threads) as pool:
            pending: deque[dict[int, Future]] = deque()
            while starts or pending:
                while starts and len(pending) < 2:  # one batch ahead of the device
                    start = starts.popleft()
                    rows = range(start, min(start + batch, len(self)))
                    pending.append({row: pool.submit(self.image, row) for row in rows})
                found = {row: future.result() for row, future in pending.popleft().items()}
                found = {row: image for row, image in found.items() if image is not None}
                if found:
                    images = np.zeros((batch, *next(iter(found.values())).shape), np.uint8)
                    images[: len(found)] = list(found.values())
                    yield images, np.array(list(found))


def extract(
    features_fn: FeaturesFn, images: Images, batch: int = 64
) -> tuple[Float[np.ndarray, "n d"], Int[np.ndarray, " n"]]:
    """Descriptors [n, d] float32 and labels [n] of all readable images, in their order.

    The features of a batch are fetched while the next one runs.
    """
    labels = images.labels()
    features: list[np.ndarray] = []
    kept: list[np.ndarray] = []
    waiting: tuple[Any, int] | None = None
    for pixels, rows in images.batches(batch):
        running = (features_fn(pixels), len(rows))
        kept.append(rows)
        if waiting is not None:
            features.append(_fetch(*waiting))
        waiting = running
    if waiting is None:
        raise ValueError(f"none of the {len(images)} images of {images.source} can be read.")
    features.append(_fetch(*waiting))
    return np.concatenate(features), labels[np.concatenate(kept)]


def _fetch(features: Any, real: int) -> Float[np.ndarray, "n d"]:
    features = np.asarray(jax.device_get(features), np.float32)[:real]
    return features.reshape(real, -1)
