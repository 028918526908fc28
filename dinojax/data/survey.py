"""One pass over the images of a source, for the statistics of `dinojax data SPEC`.

`survey` looks at images with threads and adds what they show to a `Tally`, always in order, so the
figures depend on the images alone; `data.report` puts them into words. A tally takes 32 bytes for
each image looked at, and less than 100 MB beside, whatever the source's size.
"""

import contextlib
import hashlib
import io
import itertools
import json
import os
import time
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import cv2
import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int64, Shaped, UInt8
from PIL import Image

from dinojax.data.decode import EncodedSource, Reading, UnreadableImage, decode
from dinojax.data.formats import read_samples
from dinojax.data.sources import Source

ROW = np.dtype([("digest", "u8"), ("bytes", "i8"), ("height", "i4"), ("width", "i4")])
VALUES = 2**22  # stored values kept for percentiles, over all bands ...
VALUE_IMAGES = 4096  # ... from that many images at most
REASONS = 100_000  # unreadable images whose names and reasons are kept; further ones are counted
EXACT = 2**24  # OpenCV counts in float32, which holds whole numbers up to here

MAGIC = (  # format, where, bytes
    ("JPEG", 0, b"\xff\xd8\xff"),
    ("PNG", 0, b"\x89PNG"),
    ("WebP", 8, b"WEBP"),
    ("NPY", 0, b"\x93NUMPY"),
    ("GIF", 0, b"GIF8"),
    ("BMP", 0, b"BM"),
    *(("TIFF", 0, start) for start in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    *(("PNM", 0, f"P{kind}".encode()) for kind in range(1, 7)),
)

Item, Result = TypeVar("Item"), TypeVar("Result")


class Glance(NamedTuple):
    """What one image adds to a tally; `problem` says why it cannot be read."""

    digest: int = 0  # 64 bits: among 10 million images one false pair has a probability of 3e-6
    bytes: int = 0
    format: str = ""
    stored: str = ""
    shape: tuple[int, int, int] = (0, 0, 0)
    levels: Int64[np.ndarray, "c 256"] | None = None
    values: Float32[np.ndarray, "k _"] | None = None
    problem: str = ""


@dataclass
class Tally:
    """What the images numbered `chosen` show, of which the first `done` have been counted."""

    chosen: Int64[np.ndarray, " n"]
    rows: Shaped[np.ndarray, " n"]  # of type ROW; height 0 where an image cannot be read
    done: int = 0
    seconds: float = 0.0
    formats: Counter[str] = field(default_factory=Counter)
    stored: Counter[str] = field(default_factory=Counter)
    bands: Counter[int] = field(default_factory=Counter)  # of the pixels that the source gives
    levels: dict[int, Int64[np.ndarray, "c 256"]] = field(default_factory=dict)  # by bands
    values: dict[int, list[Float32[np.ndarray, "k c"]]] = field(default_factory=dict)  # by bands
    unreadable: int = 0
    problems: list[tuple[str, str]] = field(default_factory=list)  # names and reasons

    def add(self, glance: Glance, name: str) -> None:
        """Count the next image."""
        height, width, bands = glance.shape
        self.rows[self.done] = (glance.digest, glance.bytes, height, width)
        self.done += 1
        self.formats[glance.format] += 1
        self.stored[glance.stored] += 1
        if glance.values is not None:
            self.values.setdefault(glance.values.shape[1], []).append(glance.values)
        if glance.problem:
            self.unreadable += 1
            if len(self.problems) < REASONS:
                self.problems.append((name, glance.problem))
        else:
            self.bands[bands] += 1
            self.levels[bands] = self.levels.get(bands, 0) + glance.levels


def new_tally(count: int, limit: int) -> Tally:
    """For `limit` of `count` images, evenly spaced; for all where the limit is 0 or larger."""
    looked = min(count, limit) if limit else count
    chosen = np.arange(looked, dtype=np.int64) * count // looked
    return Tally(chosen, np.zeros(looked, ROW))


# ---- the pass ------------------------------------------------------------------------------------


def survey(
    source: Source,
    tally: Tally,
    threads: int,
    progress: Callable[[int], None] = lambda done: None,
    stop: Callable[[], bool] = lambda: False,
) -> Tally:
    """Look at the images of a tally that are not counted yet; `stop` is asked after each."""
    total, began, before = len(tally.chosen), time.perf_counter(), tally.seconds
    every = -(-total // VALUE_IMAGES)
    share = VALUES // min(total, VALUE_IMAGES)  # stored values of one image

    def look(place: int) -> Glance:
        return glance(source, int(tally.chosen[place]), 0 if place % every else share)

    with contextlib.closing(in_order(look, range(tally.done, total), threads)) as glances:
        for found in glances:
            tally.add(found, source.name(int(tally.chosen[tally.done])) if found.problem else "")
            tally.seconds = before + time.perf_counter() - began
            progress(tally.done)
            if stop():
                break
    return tally


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int
) -> Iterator[Result]:
    """`map` by threads, which are at most a few items ahead of who consumes the results."""
    items, pool = iter(items), ThreadPoolExecutor(threads)
    try:
        ahead = deque(pool.submit(function, item) for item in itertools.islice(items, 4 * threads))
        while ahead:
            yield ahead.popleft().result()
            ahead.extend(pool.submit(function, item) for item in itertools.islice(items, 1))
    finally:
        pool.shutdown(cancel_futures=True)


def glance(source: Source, i: int, share: int) -> Glance:
    """Look at image `i`; `share` is how many stored values to keep if they are not plain 8 bits."""
    try:
        data = source.encoded(i)
    except UnreadableImage as error:
        return Glance(format="unknown", stored="unknown", problem=_reason(error, source.name(i)))
    reading = getattr(source, "reading", Reading())
    digest = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())
    seen = Glance(digest, len(data), format_of(data), "unknown")
    try:
        if isinstance(source, EncodedSource):  # the bytes are at hand
            pixels = decode(data, source.name(i), reading)
        else:
            pixels = source.image(i)
        seen = seen._replace(shape=pixels.shape, levels=count_levels(pixels))
    except UnreadableImage as error:
        seen = seen._replace(problem=_reason(error, source.name(i)))
    return seen._replace(**_stored(data, seen, reading, share))


def _stored(data: bytes | pa.Buffer, seen: Glance, reading: Reading, share: int) -> dict[str, Any]:
    """The fields `stored` and `values` of a glance."""
    view = memoryview(data)
    if seen.format not in ("TIFF", "NPY") and not (seen.format == "PNG" and view[24:25] == b"\x10"):
        if seen.problem:
            return {}
        with Image.open(io.BytesIO(data)) as image:  # reads no pixels
            return {"stored": f"{image.mode} uint8"}
    try:
        found = read_samples(data)
    except Exception:  # `problem` says so already
        return {}
    pixels = found.bands
    stored = f"{pixels.shape[2]} x {pixels.dtype}"
    if not share or reading.range or (pixels.dtype == np.uint8 and pixels.shape[2] < 5):
        return {"stored": stored}
    colours = pixels.shape[2] - found.alpha
    kept = reading.bands or range(colours if colours in (1, 3) else pixels.shape[2])
    bands = [band for band in kept if band < pixels.shape[2]]
    flat = pixels.reshape(-1, pixels.shape[2])
    step = max(1, len(flat) * len(bands) // share)
    return {"stored": stored, "values": flat[::step][:, bands].astype(np.float32)}


def format_of(data: bytes | pa.Buffer) -> str:
    """The name of a file's format by its first bytes."""
    head = bytes(memoryview(data)[:16])
    found = (name for name, at, mark in MAGIC if head[at : at + len(mark)] == mark)
    return next(found, "unknown" if head else "empty")


def count_levels(pixels: UInt8[np.ndarray, "i j c"]) -> Int64[np.ndarray, "c 256"]:
    """How many pixels of each band have each level: all that mean and deviation need, exactly.

    By OpenCV, which lets other threads run: 0.3 ms for 500x375, numpy's bincount 0.9.
    """
    bands = pixels.shape[2]
    levels = np.zeros((bands, 256), np.int64)
    rows = max(1, EXACT // pixels.shape[1])
    for top in range(0, len(pixels), rows):
        for band in range(bands):
            plane = np.ascontiguousarray(pixels[top : top + rows, :, band])
            levels[band] += (
                cv2.calcHist([plane], [0], None, [256], [0, 256]).ravel().astype(np.int64)
            )
    return levels


def _reason(error: UnreadableImage, name: str) -> str:
    """Why an image cannot be read, without its name, on one line."""
    return " ".join(str(error).removeprefix(f"{name}: ").split())


# ---- a pass that was interrupted -----------------------------------------------------------------


def save_tally(tally: Tally, path: Path, what: str) -> None:
    """Keep a tally, so that `load_tally` goes on from it; `what` says of which pass."""
    arrays = {"rows": tally.rows[: tally.done]}
    arrays |= {f"levels_{bands}": levels for bands, levels in tally.levels.items()}
    arrays |= {f"values_{bands}": np.concatenate(kept) for bands, kept in tally.values.items()}
    words = {"what": what, "seconds": tally.seconds, "unreadable": tally.unreadable}
    words |= {"formats": tally.formats, "stored": tally.stored, "problems": tally.problems}
    words |= {"bands": list(tally.bands.items())}
    arrays["words"] = np.frombuffer(json.dumps(words).encode(), np.uint8)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        np.savez(temporary, **arrays)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_tally(tally: Tally, path: Path, what: str) -> Tally:
    """A new tally -> what `save_tally` kept of the same pass, if there is anything."""
    try:
        with np.load(path) as kept:
            words = json.loads(kept["words"].tobytes())
            if words["what"] != what:
                return tally
            arrays = {name: kept[name] for name in kept if name != "words"}
    except (OSError, ValueError, zipfile.BadZipFile):
        return tally
    tally.done = len(arrays["rows"])
    tally.rows[: tally.done] = arrays.pop("rows")
    for name, array in arrays.items():
        kind, bands = name.split("_")
        if kind == "levels":
            tally.levels[int(bands)] = array
        else:
            tally.values[int(bands)] = [array]
    tally.formats, tally.stored = Counter(words["formats"]), Counter(words["stored"])
    tally.bands = Counter(dict(words["bands"]))
    tally.seconds, tally.unreadable = words["seconds"], words["unreadable"]
    tally.problems = [(name, reason) for name, reason in words["problems"]]
    return tally
