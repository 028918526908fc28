"""Features of a data set to disk, as an embedding set that data curation and evaluations read.

Called by `dinojax features` and by `python -m data_curation embed`; what lies on disk is described
in `data/feature_shards.py`. Threads decode and resize ahead, as the evaluators do (`eval.common`),
all devices of this process compute, and one program is compiled.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from dinojax import sharding
from dinojax.backbone import Backbone
from dinojax.data import feature_shards, storage
from dinojax.data.decode import UnreadableImage
from dinojax.data.sources import Source, check_readable
from dinojax.data.workers import Ahead
from dinojax.eval.common import fit

TOKENS, DTYPES = ("cls", "mean", "cls+mean"), ("float16", "float32")
SHARD_ROWS = 4096  # images that a kill can cost
AHEAD = 3  # batches of images in memory
# Parameters of so many values are split over the devices, smaller ones are whole on each: 1 GiB in
# one stacked weight, which giant2 and 7b reach and no smaller network.
SPLIT_ABOVE = 1 << 28


@dataclass(frozen=True)
class Recipe:
    """How an image becomes a row: shorter side to `size`, centre crop, network, `tokens`."""

    tokens: str = "cls"
    size: int = 224
    dtype: str = "float16"  # as stored

    def __post_init__(self) -> None:
        for name, allowed in (("tokens", TOKENS), ("dtype", DTYPES)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"features: {name} {getattr(self, name)!r}; expected {', '.join(allowed)}."
                )


class Summary(NamedTuple):
    """What a call did. `rows` and `left_out` are of the whole set (None: others work on it)."""

    computed: int  # images of this call
    seconds: float
    waiting: float  # of these seconds, in which there were no images for the network
    rows: int | None
    left_out: int | None


class _Image(NamedTuple):
    row: int
    name: str
    pixels: UInt8[np.ndarray, "s s c"] | None
    reason: str = ""  # why there are no pixels


@dataclass(frozen=True)
class _Work:
    """`total` images spread evenly over a source, in shards of which a call makes every n-th."""

    source: Source
    total: int
    shard_rows: int
    part: tuple[int, int]

    @property
    def shards(self) -> int:
        return -(-self.total // self.shard_rows)

    @property
    def mine(self) -> range:
        return range(self.part[0], self.shards, self.part[1])

    def size(self, shard: int) -> int:
        return min(self.shard_rows, self.total - shard * self.shard_rows)

    def row(self, number: int) -> int:
        return number * len(self.source) // self.total


def write_features(
    backbone: Backbone,
    source: Source,
    out: str | os.PathLike[str],
    recipe: Recipe = Recipe(),
    *,
    spec: str,
    weights: str = "",
    batch: int = 64,
    limit: int | None = None,
    shard_rows: int = SHARD_ROWS,
    threads: int = 8,
    part: tuple[int, int] = (0, 1),
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Writes an embedding set of a source's images, or goes on with one.

    Args:
        spec: the source's SPEC, recorded so that rows lead back to their images.
        weights: what the backbone was loaded from, recorded.
        batch: images in a call of the network, shared out over this process's devices.
        limit: use so many images, spread evenly over the source.
        part: (i, n): only every n-th shard from the i-th on, for n processes that share the work.
            The one that finds all shards done writes the manifest.
        progress: called with (done, total) images of this part; what it raises ends the work, and
            finished shards stay.

    ValueError: `out` holds something else, or no image can be read. OSError: no room, no right.
    """
    if not storage.local(os.fspath(out)):
        raise ValueError(f"features: {out!r} is a URL; write to a local folder and copy it there.")
    numbers = {"batch": batch, "shard_rows": shard_rows, "threads": threads, "limit": limit}
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"features: {name} is {number}; expected 1 or more.")
    if not 0 <= part[0] < part[1]:
        raise ValueError(f"features: part {part[0]} of {part[1]}; expected one from 0 on, below.")
    if recipe.size < 1 or 0 in backbone.grid(recipe.size, recipe.size):
        raise ValueError(f"features: an image of {recipe.size} pixels has no patch; take more.")
    check_readable(source, len(backbone.settings.mean))
    folder = Path(out).expanduser()
    total = len(source) if limit is None else min(limit, len(source))
    work = _Work(source, total, shard_rows, part)
    task = _task(backbone, work, recipe, spec, weights)
    try:
        feature_shards.begin(folder, task)
        todo = [shard for shard in work.mine if feature_shards.done(folder, shard) is None]
        began = time.perf_counter()
        computed, waiting = 0, 0.0
        if todo:
            network = _network(backbone, recipe, batch)
            computed, waiting = _compute(network, work, todo, folder, task, threads, progress)
        seconds = time.perf_counter() - began
        found = feature_shards.finish(folder, task, work.shards)
    except OSError as error:
        raise OSError(
            f"features: {str(folder)!r} cannot be written ({error}); finished shards are kept, and "
            f"the same call goes on after them."
        ) from error
    return Summary(computed, seconds, waiting, *(found or (None, None)))


class _Network(NamedTuple):
    """uint8 images [batch, s, s, c] -> vectors of the first `n` of them, in two steps."""

    batch: int
    size: int
    channels: int
    start: Callable[[UInt8[np.ndarray, "b s s c"]], jax.Array]
    fetch: Callable[[jax.Array, list[_Image]], Float[np.ndarray, "n d"]]


def _network(backbone: Backbone, recipe: Recipe, batch: int) -> _Network:
    """The backbone over all devices of this process, `batch` rounded up to share them."""
    mesh = sharding.make_mesh(devices=jax.local_devices())
    layout = sharding.tree_shardings(mesh, backbone.params, SPLIT_ABOVE)
    params = jax.device_put(backbone.params, layout)

    @jax.jit
    def describe(params: Any, images: jax.Array) -> jax.Array:
        cls, patches, _ = backbone.forward(params, images)
        mean = patches.mean(axis=1)
        tokens = {"cls": [cls], "mean": [mean], "cls+mean": [cls, mean]}[recipe.tokens]
        return jnp.concatenate(tokens, axis=1)

    def start(pixels: UInt8[np.ndarray, "b s s c"]) -> jax.Array:
        with jax.set_mesh(mesh):
            return describe(params, jax.device_put(pixels, sharding.batch_sharding(mesh)))

    def fetch(vectors: jax.Array, images: list[_Image]) -> Float[np.ndarray, "n d"]:
        found = np.asarray(jax.device_get(vectors))[: len(images)]
        with np.errstate(over="ignore"):
            stored = found.astype(recipe.dtype)
        over = np.flatnonzero((np.isinf(stored) & np.isfinite(found)).any(axis=1))
        if len(over):
            raise ValueError(
                f"features: {images[over[0]].name} has a feature of "
                f"{np.abs(found[over[0]]).max():.3g}, too large for float16; use float32."
            )
        return stored

    channels = len(backbone.settings.mean)
    return _Network(batch + -batch % mesh.size, recipe.size, channels, start, fetch)


def _compute(
    network: _Network,
    work: _Work,
    todo: list[int],
    folder: Path,
    task: dict[str, Any],
    threads: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[int, float]:
    """Writes the shards of `todo`; returns images that were looked at, seconds without images."""
    total = sum(work.size(shard) for shard in work.mine)
    done = before = total - sum(work.size(shard) for shard in todo)
    labels = work.source.labels()
    waiting = 0.0

    def read(place: int) -> _Image | None:
        shard, inside = divmod(place, work.shard_rows)  # only the last shard is shorter
        if shard >= len(todo) or inside >= work.size(todo[shard]):
            return None  # threads read ahead, past the end too
        row = work.row(todo[shard] * work.shard_rows + inside)
        return _read(work.source, row, network.size, network.channels)

    if progress is not None:
        progress(done, total)
    images = Ahead(read, threads=threads, ahead=AHEAD * network.batch)

    def take() -> _Image:
        nonlocal waiting
        began = time.perf_counter()
        image = next(images)
        waiting += time.perf_counter() - began
        return image

    try:
        for shard in todo:
            found: list[_Image] = []
            left_out: list[_Image] = []
            vectors: list[np.ndarray] = []
            running: tuple[jax.Array, list[_Image]] | None = None
            for batch, bad in _batches(take, work.size(shard), network.batch):
                ahead = (network.start(_stack(batch, network.batch)), batch) if batch else None
                if running is not None:  # fetched while the next one runs
                    vectors.append(network.fetch(*running))
                running = ahead
                done += len(batch) + len(bad)
                found += [image._replace(pixels=None) for image in batch]
                left_out += bad
                if progress is not None:
                    progress(done, total)
            if running is not None:
                vectors.append(network.fetch(*running))
            rows = [(image.row, image.name) for image in found]
            skipped = [(image.row, image.name, image.reason) for image in left_out]
            feature_shards.write_shard(folder, shard, task, rows, skipped, vectors, labels)
    finally:
        images.close()
    return done - before, waiting


def _read(source: Source, row: int, size: int, channels: int) -> _Image:
    name = source.name(row)
    try:
        image = source.image(row)
        if image.shape[2] != channels:
            raise UnreadableImage(f"has {image.shape[2]} bands, expected {channels}")
    except UnreadableImage as error:
        return _Image(row, name, None, str(error).removeprefix(f"{name}: "))
    # A copy, or the crop would keep the whole image alive.
    return _Image(row, name, np.ascontiguousarray(fit(image, size)))


def _batches(
    take: Callable[[], _Image], count: int, batch: int
) -> Iterator[tuple[list[_Image], list[_Image]]]:
    """The next `count` images as (`batch` readable ones, the others met); the last may be short."""
    good: list[_Image] = []
    bad: list[_Image] = []
    for place in range(count):
        image = take()
        (bad if image.pixels is None else good).append(image)
        if len(good) == batch or place == count - 1:
            yield good, bad
            good, bad = [], []


def _stack(images: list[_Image], batch: int) -> UInt8[np.ndarray, "b s s c"]:
    """Their pixels, with zeros behind: one shape, one program."""
    pixels = np.zeros((batch, *images[0].pixels.shape), np.uint8)
    pixels[: len(images)] = [image.pixels for image in images]
    return pixels


# ---- what is asked for ---------------------------------------------------------------------------


def _task(
    backbone: Backbone, work: _Work, recipe: Recipe, spec: str, weights: str
) -> dict[str, Any]:
    """Everything that the bytes of the shards depend on."""
    source, settings = work.source, backbone.settings
    model = settings.sections["model"]
    return {
        "version": 1,
        "source": spec,
        "images": work.total,
        "of": len(source),
        "first": source.name(0),
        "last": source.name(len(source) - 1),
        "classes": source.classes and list(source.classes),
        "ids": "name#row" if _names_repeat(work) else "name",
        "shard_rows": work.shard_rows,
        "dtype": recipe.dtype,
        "embedder": {
            "name": "/".join(str(model[key]) for key in ("name", "variant") if key in model),
            "weights": weights,
            "step": settings.step,
            "digest": digest(backbone.params),
            "token": f"{recipe.tokens} after the final norm",
            "image_size": recipe.size,
            "preprocessing": {
                "resize": "shorter side, bicubic; centre crop",
                "mean": list(settings.mean),
                "std": list(settings.std),
            },
        },
    }


def digest(params: Any) -> str:
    """sha256 of parameters, names and values in order of their paths: the same in any file."""
    found = hashlib.sha256()
    for path, value in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(jax.device_get(value))
        found.update(f"{sharding.path_name(path)} {array.dtype} {array.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()


def _names_repeat(work: _Work) -> bool:
    """Whether two images have one name, so that names alone cannot be ids. (8 bytes an image.)"""
    names = (work.source.name(work.row(number)) for number in range(work.total))
    marks = b"".join(hashlib.blake2b(os.fsencode(n), digest_size=8).digest() for n in names)
    return len(np.unique(np.frombuffer(marks, np.uint64))) < work.total
