"""Where in a tar shard each image lies, written beside the shard once. Called by `data/tar.py`.

A tar file has no table of contents: to find its members one has to go from header to header. The
index of `X.tar` is `X.tar.index`, an Arrow file (one row an image) made to be memory-mapped. It
says which size and time (or version, of a URL) of the shard it is for, and is made anew when these
differ. Where the shard's folder cannot be written, it is in the user's cache directory.
"""

import contextlib
import hashlib
import json
import logging
import os
import socket
import tarfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Int64
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from dinojax.data import storage
from dinojax.data.folders import EXTENSIONS

THREADS = 16  # shards looked at or indexed at a time: most of it is waiting for storage
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
SCHEMA = pa.schema(
    {
        "name": pa.large_string(),
        "offset": pa.int64(),
        "size": pa.int64(),
        "label": pa.large_string(),  # null: none
    }
)

_log = logging.getLogger(__name__)


class Wanted(NamedTuple):
    """What is looked for in a sample."""

    images: tuple[str, ...] = ()  # extensions, the preferred one first; none: any image's
    label: str = "cls"  # the member `.cls`, or `json.FIELD[.FIELD]`


class Shard(NamedTuple):
    path: str
    stamp: str  # differs when the file does
    index: str  # where its index is; empty: nowhere yet


class Index(NamedTuple):
    """Where the images of one shard lie; arrays of one entry an image, memory-mapped."""

    names: pa.LargeStringArray
    offsets: Int64[np.ndarray, " n"]
    sizes: Int64[np.ndarray, " n"]
    labels: pa.LargeStringArray
    extensions: tuple[str, ...]  # of all members
    stamp: str


def read_index(path: str) -> Index:
    """The index in a file; OSError where there is none."""
    try:
        with pa.memory_map(path) as file:
            rows = pa.ipc.open_file(file).get_batch(0)
        told = json.loads(rows.schema.metadata[b"dinojax"])
        names, offsets, sizes, labels = rows.columns
        extensions, stamp = tuple(told["extensions"]), told["stamp"]
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise OSError(f"{path}: not the index of a tar shard ({error})") from error
    return Index(names, offsets.to_numpy(), sizes.to_numpy(), labels, extensions, stamp)


def indexed(files: Sequence[str], wanted: Wanted) -> list[Shard]:
    """The shards, each with an index that fits it; missing ones are made, shard by shard.

    What is finished stays when this is interrupted: the next call goes on from there.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        shards = list(pool.map(partial(_find, wanted=wanted), files))
    missing = [shard for shard in shards if not shard.index]
    if not missing:
        return shards
    total = sum(storage.size(shard.path) for shard in missing)
    _log.info("indexing %d tar shards, %.1f GB (done once)", len(missing), total / 1e9)
    stop = threading.Event()
    with _progress() as progress, ThreadPoolExecutor(THREADS) as pool:
        bar = progress.add_task(f"indexing {len(missing)} tar shards", total=total)

        def advance(step: int) -> None:
            progress.update(bar, advance=step)
            if stop.is_set():
                raise InterruptedError

        try:
            made = list(pool.map(partial(_build, wanted=wanted, advance=advance), missing))
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    made = dict(zip(missing, made))
    return [made.get(shard, shard) for shard in shards]


def _progress() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _find(path: str, wanted: Wanted) -> Shard:
    try:
        stamp = _stamp(path)
    except OSError as error:
        raise ValueError(f"tar source: {path!r} cannot be read ({error}).") from error
    for index in _homes(path, wanted):
        try:
            if read_index(index).stamp == stamp:
                return Shard(path, stamp, index)
        except OSError:
            continue
    return Shard(path, stamp, "")


def _stamp(path: str) -> str:
    """Size and time of a file, or what a store tells of its version."""
    if storage.local(path):
        found = storage.call(path, os.stat, path)
        return f"{found.st_size} {found.st_mtime_ns}"
    fs, inside = storage.filesystem(path)
    info = storage.call(path, fs.info, inside)
    told = ("size", "ETag", "etag", "generation", "LastModified", "Last-Modified", "created")
    return " ".join(str(info[key]) for key in told if info.get(key))


def _homes(path: str, wanted: Wanted) -> list[str]:
    """Where the index of a shard may be: beside it, else in the user's cache."""
    ending = ".index"
    if wanted != Wanted():
        ending = f".{hashlib.sha256(repr(wanted).encode()).hexdigest()[:8]}.index"
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    place = os.path.abspath(path) if storage.local(path) else path
    hashed = hashlib.sha256(place.encode()).hexdigest()[:32] + ending
    cached = os.path.join(cache, "dinojax", "tar", hashed)
    return [path + ending, cached] if storage.local(path) else [cached]


def _build(shard: Shard, wanted: Wanted, advance: Callable[[int], None]) -> Shard:
    """Makes the index of a shard; ValueError if that is no tar file or is cut short."""
    try:
        rows = _rows(shard, wanted, advance)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(
            f"tar source: {shard.path!r} is no whole tar file ({error}); replace or remove it."
        ) from error
    homes = _homes(shard.path, wanted)
    for index in homes:
        # Several hosts may index the same shard at a time, each under a name of its own.
        unfinished = f"{index}.{socket.gethostname()}-{os.getpid()}.tmp"
        try:
            os.makedirs(os.path.dirname(index) or ".", exist_ok=True)
            with pa.OSFile(unfinished, "wb") as file, pa.ipc.new_file(file, rows.schema) as out:
                out.write_batch(rows)
            os.replace(unfinished, index)
            return shard._replace(index=index)
        except OSError as error:
            failed = error
            with contextlib.suppress(OSError):
                os.unlink(unfinished)
    raise ValueError(
        f"tar source: the index of {shard.path!r} can be written neither beside it nor as "
        f"{homes[-1]!r} ({failed}); set XDG_CACHE_HOME to a folder with room."
    )


def _rows(shard: Shard, wanted: Wanted, advance: Callable[[int], None]) -> pa.RecordBatch:
    """The images of a shard, in the order in which their samples begin."""
    found: dict[str, tuple[int, str, int, int]] = {}  # key -> rank, name, offset, size
    labels: dict[str, str | None] = {}
    extensions = set()
    label_extension, _, field = wanted.label.partition(".")
    with storage.open_file(shard.path) as file:
        for member, read in _members(file, shard.path, advance):
            folder, name = os.path.split(member.name)
            stem, dot, extension = name.partition(".")
            if not stem or not dot:
                continue
            key, extension = f"{folder}/{stem}", extension.lower()
            extensions.add(extension)
            if extension == label_extension:
                labels[key] = _label(read(), field, f"{shard.path}#{member.name}")
            rank = _rank(extension, wanted.images)
            if rank is not None and (key not in found or rank < found[key][0]):
                found[key] = (rank, member.name, member.offset_data, member.size)
    rows = [(*where, labels.get(key)) for key, (_, *where) in found.items()]
    columns = zip(*rows) if rows else [()] * len(SCHEMA)
    told = {"stamp": shard.stamp, "extensions": sorted(extensions)[:100]}
    return pa.record_batch(
        [pa.array(column, kind) for column, kind in zip(columns, SCHEMA.types)],
        schema=SCHEMA.with_metadata({"dinojax": json.dumps(told)}),
    )


def _members(
    file: Any, path: str, advance: Callable[[int], None]
) -> Iterator[tuple[tarfile.TarInfo, Callable[[], bytes]]]:
    """The files in a tar archive, and a function that reads each; contents are skipped over."""
    if file.read(6).startswith(COMPRESSED):
        raise ValueError(
            f"tar source: {path!r} is compressed, so its images cannot be read at random; "
            f"unpack it to a plain .tar."
        )
    file.seek(0)
    told = 0
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            if len(tar.members) == 1000:
                tar.members.clear()  # tarfile would keep them all
                advance(tar.offset - told)
                told = tar.offset
            if member.isreg() and not member.issparse():
                yield member, lambda member=member: tar.extractfile(member).read()
        advance(tar.offset - told)
        # tarfile takes a damaged header in the middle for the end.
        file.seek(tar.offset)
        block = file.read(tarfile.BLOCKSIZE)
        if block.strip(b"\0") or 0 < len(block) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError(f"damaged at byte {tar.offset}")


def _rank(extension: str, images: Sequence[str]) -> int | None:
    """How near a member is to being its sample's image, 0 the nearest; None if it is none."""
    if images:
        return images.index(extension) if extension in images else None
    if f".{extension}" in EXTENSIONS:
        return 0
    # `seg.png` beside `jpg` is likely a label map, but `2.jpg`, of `photo.2.jpg`, the image.
    return 1 if extension.endswith(EXTENSIONS) else None


def _label(data: bytes, field: str, name: str) -> str | None:
    """The text of a label; with a field, what a JSON object holds there."""
    if not field:
        return data.decode(errors="replace").strip()
    try:
        value: Any = json.loads(data)
    except ValueError as error:
        raise ValueError(f"tar source: {name!r} is not JSON ({error}).") from error
    for part in field.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if value is None or isinstance(value, str | int):
        return None if value is None else str(value)
    raise ValueError(
        f"tar source: {field!r} of {name!r} is {value!r}, expected an integer or a name."
    )
