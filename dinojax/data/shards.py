"""Any source -> ArrayRecord shards, read fast and with few files: `dinojax data SPEC --shard OUT`.

    OUT/data-00000.array_record ...   records as `records.pack` makes them, in the source's order
    OUT/progress.jsonl                until all is finished: what is being written, a line a shard
    OUT/index.json, OUT/labels.npy    in the end: counts, sizes, classes, what was left out

Shards are written one after another, each under a temporary name until it is whole. So a killed
writer goes on at the first unfinished one, and ends with the same bytes.
"""

import contextlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Int

from dinojax.data import storage
from dinojax.data.decode import UnreadableImage
from dinojax.data.records import FORMAT, INDEX, LABELS, PROGRESS, pack
from dinojax.data.sources import Source

SHARD_BYTES = 256 << 20
THREADS, AHEAD = 16, 64  # of reading; images in memory
# Each record by itself, so that one image is one read; encoded images do not compress further.
OPTIONS = "group_size:1,uncompressed"


def write_shards(
    source: Source,
    out: str | os.PathLike[str],
    *,
    spec: str = "",
    shard_bytes: int = SHARD_BYTES,
    verify: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes all images of a source, encoded as they are, and their labels; the path of the index.

    An earlier call with the same arguments is continued. Images that cannot be read are left out
    and listed in the index; with `verify` also those that cannot be decoded. In memory: AHEAD
    images, and 8 bytes a label.

    `progress(done, total)` is called for every image; what it raises ends the writing, and the
    finished shards stay.

    ValueError: `out` holds something else, or no image can be read. OSError: no room, no right.
    """
    if not storage.local(os.fspath(out)):
        raise ValueError(f"shards: {out!r} is a URL; write to a local folder and copy it there.")
    if shard_bytes < 1:
        raise ValueError(f"shards: shard_bytes={shard_bytes} is not a positive number of bytes.")
    folder = Path(out).expanduser()
    task = {
        "format": FORMAT,
        "spec": spec,
        "images": len(source),
        "first": source.name(0),
        "last": source.name(len(source) - 1),
        "shard_bytes": shard_bytes,
        "verify": verify,
        "classes": source.classes and list(source.classes),
    }
    try:
        if not (folder / INDEX).exists():
            _write(source, folder, task, progress or (lambda done, total: None))
        else:
            _check_same(task, json.loads((folder / INDEX).read_text()), folder)
    except OSError as error:
        raise OSError(
            f"shards: {str(folder)!r} cannot be written ({error}); finished shards are kept, and "
            f"the same call goes on after them."
        ) from error
    return folder / INDEX


def _write(
    source: Source,
    folder: Path,
    task: dict[str, Any],
    progress: Callable[[int, int], None],
) -> None:
    shards = _begun(folder, task)
    start, total = shards[-1]["stop"] if shards else 0, task["images"]
    progress(start, total)
    labels = source.labels()
    images = _read_ahead(source, start, task["verify"])
    try:
        while start < total:
            name = f"data-{len(shards):05d}.array_record"
            shard = _write_shard(folder / name, images, labels, task, progress)
            with open(folder / PROGRESS, "a") as file:
                file.write(json.dumps(shard) + "\n")
            shards.append(shard)
            start = shard["stop"]
    finally:
        images.close()  # ends its threads
    skipped = [image for shard in shards for image in shard.pop("skipped")]
    count = sum(shard["count"] for shard in shards)
    if not count:
        raise ValueError(f"shards: no image can be read, the last: {skipped[-1]['reason']}.")
    if labels is not None:
        labels = np.delete(labels, [image["row"] for image in skipped])
        _put(folder / LABELS, lambda file: np.save(file, labels.astype(np.int64)))
    index = task | {"count": count, "shards": shards, "skipped": skipped}
    _put(folder / INDEX, lambda file: file.write(json.dumps(index, indent=1).encode()))
    (folder / PROGRESS).unlink()


def _write_shard(
    path: Path,
    images: "Iterator[tuple[int, str, bytes | pa.Buffer | UnreadableImage]]",
    labels: Int[np.ndarray, " n"] | None,
    task: dict[str, Any],
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Fills one shard with the next images and says what it holds."""
    unfinished = path.with_name(path.name + ".tmp")
    count, size, stop, skipped = 0, 0, 0, []
    try:
        with _told():
            writer = ArrayRecordWriter(str(unfinished), OPTIONS)
        for row, name, image in images:
            if isinstance(image, UnreadableImage):
                skipped.append({"row": row, "name": name, "reason": str(image)})
            else:
                record = pack(image, name, None if labels is None else int(labels[row]))
                with _told():
                    writer.write(record)
                count, size = count + 1, size + len(record)
            stop = row + 1
            progress(stop, task["images"])
            if size >= task["shard_bytes"]:
                break
        with _told():
            writer.close()
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    size = path.stat().st_size
    return {"file": path.name, "count": count, "bytes": size, "stop": stop, "skipped": skipped}


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """array_record raises RuntimeError, whatever the system told it."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error)) from error


def _read_ahead(
    source: Source, start: int, verify: bool
) -> Iterator[tuple[int, str, bytes | pa.Buffer | UnreadableImage]]:
    """Rows from `start` on in order: number, name, encoded image or why it cannot be read."""

    def read(row: int) -> tuple[int, str, bytes | pa.Buffer | UnreadableImage]:
        try:
            encoded = source.encoded(row)
            if verify:
                source.image(row)
        except UnreadableImage as error:
            encoded = error
        return row, source.name(row), encoded

    pool = ThreadPoolExecutor(THREADS)
    try:
        waiting = deque()
        for row in range(start, len(source)):
            waiting.append(pool.submit(read, row))
            if len(waiting) == AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


# ---- what is there already ---------------------------------------------------------------------


def _begun(folder: Path, task: dict[str, Any]) -> list[dict[str, Any]]:
    """The finished shards of a writing that was cut off; begins a new one where there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    notes = folder / PROGRESS
    lines = notes.read_text().splitlines() if notes.exists() else []
    if not lines:
        if found := sorted(folder.glob("*.array_record")):
            raise ValueError(
                f"shards: {str(folder)!r} holds {found[0].name} of something else; choose an empty "
                f"folder."
            )
    else:
        _check_same(task, json.loads(lines[0]), folder)
    shards = []
    for line in lines[1:]:
        try:
            shard = json.loads(line)
            if (folder / shard["file"]).stat().st_size != shard["bytes"]:
                break
        except (ValueError, OSError):  # a line cut off, a shard removed: from here on anew
            break
        shards.append(shard)
    text = "".join(json.dumps(entry) + "\n" for entry in (task, *shards))
    _put(notes, lambda file: file.write(text.encode()))
    return shards


def _check_same(task: dict[str, Any], found: dict[str, Any], folder: Path) -> None:
    for key, value in task.items():
        if found.get(key) != value:
            raise ValueError(
                f"shards: {str(folder)!r} holds shards of another source or form ({key} is "
                f"{found.get(key)!r}, not {value!r}); choose an empty folder."
            )


def _put(path: Path, write: Callable[[Any], Any]) -> None:
    unfinished = path.with_name(path.name + ".tmp")
    try:
        with open(unfinished, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
