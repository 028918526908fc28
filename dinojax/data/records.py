"""Images in ArrayRecord shards: `array_record:GLOB`. Opened by `data/sources.py`.

Shards made by `data/shards.py` hold an image's encoded bytes behind a small header (`pack`), shards
of others may hold the encoded bytes alone. `data/tfds.py` reads its examples through `Records`.
"""

import functools
import json
import os
import struct
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from array_record.python.array_record_module import ArrayRecordReader
from jaxtyping import Int64

from dinojax.data import storage
from dinojax.data.decode import READING_OPTIONS, EncodedSource, UnreadableImage, read_options
from dinojax.data.options import check_options

OPEN = 128  # shards held open at a time, per process; systems often allow 1,024 open files in all
THREADS = 16  # readers of what is needed of every shard or record
# What data/shards.py writes beside its shards; the last while it is not done.
INDEX, LABELS, PROGRESS = "index.json", "labels.npy", "progress.jsonl"
FORMAT = "dinojax shards 1"  # of that index
HEADER = b'{"name":'  # what the header of a record begins with
IMAGES = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"P5", b"P6", b"\x93NUMPY")
IMAGES += (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # TIFF and BigTIFF, both byte orders


def pack(encoded: bytes | pa.Buffer, name: str, label: int | None) -> bytes:
    """A record: the header's length (4 bytes, little-endian), the header (JSON), the image."""
    header = json.dumps({"name": name, "label": label}, ensure_ascii=False).encode()
    return b"".join((struct.pack("<I", len(header)), header, encoded))


def unpack(record: bytes) -> bytes:
    """The encoded image of a record that `pack` made, or that is an image and nothing else."""
    if record[4:12] == HEADER:
        return record[4 + struct.unpack_from("<I", record)[0] :]
    return record


@dataclass(frozen=True, kw_only=True)
class Records:
    """Records of several shards by one number; a deleted or damaged shard is an OSError."""

    files: tuple[str, ...] = field(repr=False)
    stamps: tuple[int, ...] = field(repr=False)  # time of each file, ns: none is taken for another
    firsts: Int64[np.ndarray, " files"] = field(repr=False)  # first record taken of each
    starts: Int64[np.ndarray, " files"] = field(repr=False)  # its number here
    count: int

    def read(self, i: int) -> bytes:
        file, place = self._place(i)
        try:
            (record,) = _reader(self.files[file], self.stamps[file]).read([place])
        except (RuntimeError, ValueError) as error:
            raise OSError(str(error)) from error
        if not record:  # what the library returns where a file was cut short after it was opened
            raise OSError("the record is empty or gone")
        return record

    def name(self, i: int) -> str:
        file, place = self._place(i)
        return f"{self.files[file]}#{place}"

    @classmethod
    def of(cls, files: Sequence[str], firsts: Sequence[int], counts: Sequence[int]) -> "Records":
        """`counts` records from `firsts` on of each file."""
        ends = np.cumsum(counts, dtype=np.int64)
        return cls(
            files=tuple(files),
            stamps=tuple(os.stat(file).st_mtime_ns for file in files),
            firsts=np.asarray(firsts, np.int64),
            starts=ends - np.asarray(counts, np.int64),
            count=int(ends[-1]),
        )

    def _place(self, i: int) -> tuple[int, int]:
        file = int(np.searchsorted(self.starts, i, side="right")) - 1
        return file, int(self.firsts[file] + i - self.starts[file])


@functools.lru_cache(maxsize=OPEN)
def _reader(path: str, stamp: int) -> ArrayRecordReader:
    """A shard open for random access (thread-safe, 27 us a read of 50 kB; 200 us to open)."""
    reader = ArrayRecordReader(
        path, options="readahead_buffer_size:0,max_parallelism:0", file_reader_buffer_size=1 << 15
    )
    if not reader.ok():  # without asking, a missing or damaged file has 0 records
        try:
            reader.close()
        except RuntimeError as error:
            raise OSError(str(error)) from error
    return reader


@dataclass(frozen=True, kw_only=True)
class ArrayRecordSource(EncodedSource):
    """Images of ArrayRecord shards. In memory: a name and 32 bytes a shard, 8 bytes a label."""

    records: Records

    def __len__(self) -> int:
        return self.records.count

    def encoded(self, i: int) -> bytes:
        try:
            return unpack(self.records.read(i))
        except OSError as error:
            raise UnreadableImage(f"{self.name(i)}: {error}") from error

    def name(self, i: int) -> str:
        return self.records.name(i)


def open_array_record(where: str, options: Mapping[str, str]) -> ArrayRecordSource:
    """All records of the matching shards; labels where the index beside them holds any."""
    check_options("array_record", options, READING_OPTIONS)
    reading = read_options(options)
    if not storage.local(where):
        raise ValueError(
            f"array_record source: {where!r} is a URL, and ArrayRecord files are read from local "
            f"disks alone; copy or mount it, or read it as tar:."
        )
    files = [
        file
        for file in storage.matching(where)
        if os.path.basename(file) not in (INDEX, LABELS, PROGRESS)
    ]
    if not files:
        raise ValueError(f"array_record source: no file matches {where!r}.")
    if os.path.isdir(files[0]):
        nearest_one = f"array_record:{where}/*.array_record"
        raise ValueError(f"array_record source: {where!r} is a folder; nearest: {nearest_one!r}.")
    index = _read_index(files)
    known = {shard["file"]: shard for shard in index.get("shards", ())}
    with ThreadPoolExecutor(THREADS) as pool:
        counts = list(pool.map(lambda file: _count(file, known.get(os.path.basename(file))), files))
    records = Records.of(files, [0] * len(files), counts)
    if not records.count:
        raise ValueError(f"array_record source: {where!r} holds no record.")
    _check_images(records, where)
    classes, targets = _labels(Path(files[0]).parent, files, index)
    return ArrayRecordSource(classes=classes, targets=targets, reading=reading, records=records)


def _check_images(records: Records, where: str) -> None:
    """Raise ValueError if none of the first records can be an image."""
    begin = b""
    for i in range(min(16, records.count)):
        try:
            record = records.read(i)
        except OSError:
            continue
        if record[4:12] == HEADER or record.startswith(IMAGES):
            return
        begin = record[:12]
    raise ValueError(
        f"array_record source: the records of {where!r} begin with {begin!r} and are no encoded "
        f"images; a data set of TFDS is read as tfds:NAME."
    )


def _read_index(files: Sequence[str]) -> dict[str, Any]:
    """The index that data/shards.py wrote beside the shards; empty where there is none."""
    folders = {os.path.dirname(file) for file in files}
    path = Path(folders.pop(), INDEX)
    if folders or not path.exists():
        return {}
    try:
        index = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"array_record source: {str(path)!r} cannot be read ({error}).") from error
    return index if isinstance(index, dict) and index.get("format") == FORMAT else {}


def _count(file: str, known: Mapping[str, Any] | None) -> int:
    """Records of a shard: from the index if that knows it, else from the shard's end."""
    if known is None:
        try:
            return _reader(file, os.stat(file).st_mtime_ns).num_records()
        except OSError as error:
            raise ValueError(
                f"array_record source: {file!r} is no whole ArrayRecord file ({error}); replace "
                f"or remove it."
            ) from error
    size = os.path.getsize(file)
    if size != known["bytes"]:
        raise ValueError(
            f"array_record source: {file!r} has {size} bytes, and {known['bytes']} when it was "
            f"written; copy or make it again."
        )
    return known["count"]


def _labels(
    folder: Path, files: Sequence[str], index: Mapping[str, Any]
) -> tuple[tuple[str, ...] | None, Int64[np.ndarray, " n"] | None]:
    """Classes and labels of these shards, if the index knows them all."""
    shards = index.get("shards", ())
    ends = np.cumsum([shard["count"] for shard in shards], dtype=np.int64)
    spans = {shard["file"]: (end - shard["count"], end) for shard, end in zip(shards, ends)}
    names = [os.path.basename(file) for file in files]
    if not (folder / LABELS).exists() or not all(name in spans for name in names):
        return None, None
    labels = np.load(folder / LABELS, mmap_mode="r")
    targets = np.concatenate([labels[slice(*spans[name])] for name in names])
    classes = index["classes"]
    return None if classes is None else tuple(classes), targets
