"""Image files: all in a folder (`folder:PATH`), or those that a file names (`list:FILE`).

Opened by `data/sources.py`. Names are bytes in arrow arrays and no Python objects: with its class a
file of 37 characters takes 120 bytes, ten million take 1.2 GB (resident, while listing too).
"""

import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int64

from dinojax.data import parquet, storage
from dinojax.data.decode import READING_OPTIONS, EncodedSource, UnreadableImage, read_options
from dinojax.data.options import check_options, number_classes

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".npy")
_ENDINGS = tuple(extension.encode() for extension in EXTENSIONS)
_CHUNK = 1 << 16  # names that become an arrow array at once

_Listed = tuple[pa.ChunkedArray, tuple[str, ...] | None, Int64[np.ndarray, " n"] | None]


@dataclass(frozen=True, kw_only=True)
class FileSource(EncodedSource):
    """One image a file. Names are relative to `root`, whole paths or URLs."""

    root: str
    names: pa.ChunkedArray = field(repr=False)  # of bytes: file names need not be valid text

    def __len__(self) -> int:
        return len(self.names)

    def encoded(self, i: int) -> bytes:
        try:
            return storage.read(storage.beside(self.root, self.name(i)))
        except OSError as error:
            raise UnreadableImage(str(error)) from error

    def name(self, i: int) -> str:
        return os.fsdecode(self.names[i].as_py())


# ---- folder -------------------------------------------------------------------------------------


def open_folder(where: str, options: Mapping[str, str]) -> FileSource:
    """Nested to any depth. If every image lies in a sub-folder, that sub-folder is its class.

    Outer folders that hold all images (a lone `train/`) are no classes and are looked through.
    100,000 local files are listed in 0.11 s, in one folder or in a thousand.
    """
    check_options("folder", options, READING_OPTIONS)
    reading = read_options(options)
    root = os.path.expanduser(where)
    if storage.local(root) and not os.path.isdir(root):
        problem = "is not a folder" if os.path.exists(root) else "does not exist"
        raise ValueError(f"folder source: {where!r} {problem}.")
    others = 0

    def images() -> Iterator[bytes]:
        nonlocal others
        for name in _local_files(os.fsencode(root)) if storage.local(root) else _remote_files(root):
            if name.lower().endswith(_ENDINGS):
                yield name
            else:
                others += 1

    try:
        names = _packed(images())
    except OSError as error:
        raise ValueError(f"folder source: {where!r} cannot be read ({error}).") from error
    if not len(names):
        what = f"{others} files but no image" if others else "no file"
        raise ValueError(
            f"folder source: {where!r} holds {what} (looked for {', '.join(EXTENSIONS)})."
        )
    classes, targets = _folder_classes(names)
    return FileSource(root=root, names=names, classes=classes, targets=targets, reading=reading)


def _local_files(folder: bytes, inside: bytes = b"") -> Iterator[bytes]:
    """Files under a folder, relative to it, in sorted order; hidden ones are passed over."""
    with storage.call(os.fsdecode(folder), os.scandir, folder) as entries:
        # The slash sorts a folder's name as the longer names of its files sort.
        found = sorted(
            entry.name + b"/" if entry.is_dir(follow_symlinks=False) else entry.name
            for entry in entries
            if not entry.name.startswith(b".")
        )
    for name in found:
        if name.endswith(b"/"):
            yield from _local_files(os.path.join(folder, name), inside + name)
        else:
            yield inside + name


def _remote_files(root: str) -> Iterator[bytes]:
    fs, inside = storage.filesystem(root)
    found = storage.call(root, fs.find, inside)
    names = (path[len(inside) :].lstrip("/") for path in sorted(found))
    return (name.encode() for name in names if not re.search(r"(^|/)\.", name))


def _packed(names: Iterable[bytes]) -> pa.ChunkedArray:
    names, chunks = iter(names), []
    while chunk := list(islice(names, _CHUNK)):
        chunks.append(pa.array(chunk, pa.binary()))
    return pa.chunked_array(chunks, pa.binary())


def _folder_classes(
    names: pa.ChunkedArray,
) -> tuple[tuple[str, ...] | None, Int64[np.ndarray, " n"] | None]:
    # The names are sorted, so what their ends share, all of them share.
    parents = [names[k].as_py().split(b"/")[:-1] for k in (0, len(names) - 1)]
    shared = len(os.path.commonprefix(parents))
    pattern = rf"^(?:[^/]*/){{{shared}}}(?P<folder>[^/]*)/"
    folders = pc.struct_field(pc.extract_regex(names, pattern), "folder")
    return (None, None) if folders.null_count else number_classes(folders)


# ---- list ---------------------------------------------------------------------------------------


def open_list(where: str, options: Mapping[str, str]) -> FileSource:
    """The files that a text or parquet file names, in its order; whether they exist is not asked.

    Text: a path or URL a line, followed by a tab and a label if they have labels (whole numbers, or
    names of classes); empty lines and lines that begin with `#` are passed over. Parquet: the
    columns `path` and, if there is one, `label`. Relative paths are relative to the list.
    """
    what = f"list source: {where!r}"
    try:
        in_parquet = storage.read_range(where, 0, 4) == b"PAR1"
    except OSError as error:
        raise ValueError(f"list source: {error}.") from error
    columns = ("path", "label", "split") if in_parquet else ()
    check_options("list", options, (*columns, *READING_OPTIONS))
    reading = read_options(options)
    names, classes, targets = (_parquet_list if in_parquet else _text_list)(where, options, what)
    if not len(names):
        raise ValueError(f"{what} names no file.")
    root = storage.folder(where)
    return FileSource(root=root, names=names, classes=classes, targets=targets, reading=reading)


def _parquet_list(where: str, options: Mapping[str, str], what: str) -> _Listed:
    data = parquet.open_files([os.path.expanduser(where)], what)
    rows = parquet.split_rows(data, options, what)
    names = parquet.texts(data, options.get("path", "path"), what)
    return names.take(pa.array(rows)), *parquet.read_labels(data, rows, options, what)


def _text_list(where: str, options: Mapping[str, str], what: str) -> _Listed:
    names, labels = [], []
    lines = io.BytesIO(storage.read(where))
    while some := list(islice(lines, _CHUNK)):
        parts = [line.partition(b"\t") for line in some if line.strip() and line[:1] != b"#"]
        names.append(pa.array([name.strip() for name, _, _ in parts], pa.binary()))
        labels.append(pa.array([label.strip() or None for _, _, label in parts], pa.binary()))
    files = pa.chunked_array(names, pa.binary())
    words = pa.chunked_array(labels, pa.binary())
    if words.null_count == len(words):
        return files, None, None
    if words.null_count:
        first = os.fsdecode(files[pc.index(words.is_null(), True).as_py()].as_py())
        raise ValueError(
            f"{what}: {words.null_count} of its {len(words)} files have no label, the first of "
            f"them {first!r}; expected a tab and a label after each or after none."
        )
    try:
        return files, None, words.cast(pa.string()).cast(pa.int64()).to_numpy()
    except pa.ArrowInvalid:  # not whole numbers
        return files, *number_classes(words)
