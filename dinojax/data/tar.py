"""Images in webdataset shards: `tar:GLOB`. Opened by `data/sources.py`.

`data/tar_index.py` knows where in its shard each image lies, so that image `i` is one read at a
known offset, in any order and from any place on.
"""

import functools
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from dinojax.data import storage
from dinojax.data.decode import READING_OPTIONS, EncodedSource, UnreadableImage, read_options
from dinojax.data.folders import EXTENSIONS
from dinojax.data.options import check_options, nearest, number_classes
from dinojax.data.tar_index import Index, Shard, Wanted, indexed, read_index

MAPPED = 1024  # indexes memory-mapped at a time, per process


@dataclass(frozen=True, kw_only=True)
class TarSource(EncodedSource):
    """Images of webdataset shards, in the order of the shards and of their members.

    In memory: three short strings a shard, and 8 bytes an image where there are labels, however
    many images there are; the indexes are memory-mapped, MAPPED of them at a time.
    """

    shards: tuple[Shard, ...] = field(repr=False)
    starts: Int64[np.ndarray, " shards"] = field(repr=False)  # number of each shard's first image
    count: int

    def __len__(self) -> int:
        return self.count

    def encoded(self, i: int) -> bytes:
        shard, row = self._place(i)
        try:
            index = _index(shard)
            offset, size = int(index.offsets[row]), int(index.sizes[row])
            data = storage.read_range(shard.path, offset, offset + size)
        except OSError as error:
            raise UnreadableImage(f"{self.name(i)}: {error}") from error
        if len(data) < size:
            raise UnreadableImage(f"{self.name(i)}: the shard ends before the image does")
        return data

    def name(self, i: int) -> str:
        shard, row = self._place(i)
        try:
            return f"{shard.path}#{_index(shard).names[row]}"
        except OSError:  # the index went with its shard
            return f"{shard.path}#{row}"

    def _place(self, i: int) -> tuple[Shard, int]:
        shard = int(np.searchsorted(self.starts, i, side="right")) - 1
        return self.shards[shard], int(i - self.starts[shard])


@functools.lru_cache(maxsize=MAPPED)
def _index(shard: Shard) -> Index:
    return read_index(shard.index)


def open_tar(where: str, options: Mapping[str, str]) -> TarSource:
    """All samples with an image; `image=jpg;png` names extensions, `label=json.FIELD` the label.

    A sample is the members that share a name up to the first dot of its last part. Its image is the
    first one with an image extension, its label the content of its `.cls`: an integer or a name.
    """
    check_options("tar", options, ("image", "label", *READING_OPTIONS))
    reading = read_options(options)
    images = tuple(e.strip().lstrip(".").lower() for e in options.get("image", "").split(";") if e)
    wanted = Wanted(images, options.get("label", "cls"))
    shards = indexed(_files(where), wanted)
    counts, labels, labelled, extensions = [], [], True, set()
    for shard in shards:  # one by one: a process may map 65,530 files, and shards can be more
        index = read_index(shard.index)
        counts.append(len(index.names))
        extensions |= set(index.extensions)
        labelled = labelled and not index.labels.null_count
        if labelled:
            labels.append(index.labels.dictionary_encode())
        elif "label" in options:
            raise ValueError(
                f"tar source: {index.labels.null_count} of {len(index.labels)} images of "
                f"{shard.path!r} have no label {wanted.label!r}."
            )
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    if not starts[-1]:
        seen = sorted(extensions)
        hint = f"its members end in {', '.join(seen)} (looked for {', '.join(EXTENSIONS)})."
        if images and seen:
            hint = f"image={images[0]}: {nearest(images[0], seen)}"
        raise ValueError(f"tar source: {where!r} holds no image; {hint}")
    classes, targets = _labels(pa.chunked_array(labels)) if labelled else (None, None)
    return TarSource(
        classes=classes,
        targets=targets,
        reading=reading,
        shards=tuple(shards),
        starts=starts[:-1],
        count=int(starts[-1]),
    )


def _labels(column: pa.ChunkedArray) -> tuple[tuple[str, ...] | None, Int64[np.ndarray, " n"]]:
    """Integers if all labels are, else names in sorted order and their numbers."""
    classes, targets = number_classes(column)
    if all(re.fullmatch(r"-?\d+", label) for label in classes):
        return None, np.array(classes, np.int64)[targets]
    return classes, targets


def _files(where: str) -> list[str]:
    """The shards that a pattern names; braces first: shard-{000000..000099}.tar, {a,b}.tar."""
    files = []
    for pattern in _braces(where):
        try:
            found = storage.matching(pattern)
        except OSError as error:
            raise ValueError(f"tar source: {pattern!r} cannot be listed ({error}).") from error
        if not found:
            raise ValueError(f"tar source: no file matches {pattern!r}.")
        files += found
    if storage.local(files[0]) and os.path.isdir(files[0]):
        raise ValueError(f"tar source: {where!r} is a folder; nearest: 'tar:{where}/*.tar'.")
    return files


def _braces(pattern: str) -> Iterator[str]:
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        yield pattern
        return
    span = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if span:
        numbers = range(int(span[1]), int(span[2]) + 1)
        values = [f"{number:0{len(span[1])}d}" for number in numbers]
    else:
        values = found[1].split(",")
    for value in values:
        yield from _braces(pattern[: found.start()] + value + pattern[found.end() :])
