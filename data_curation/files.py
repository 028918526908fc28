"""Files that are whole or absent: a temporary name in the same folder, synced, then renamed.

Every stage writes its results with these. A bucket's file is sent in one piece and appears when it
has arrived. What cannot be written (a full disk, a folder that is read-only) is one ValueError.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Shaped

from dinojax.data import storage

_CHUNK = 1 << 24  # bytes hashed at a time


class Stopped(Exception):  # noqa: N818  (nothing went wrong)
    """Asked to stop (SIGTERM) and saved; the same command goes on from there."""


def write_npy(path: str | Path, array: Shaped[np.ndarray, "..."]) -> None:
    """An array as `.npy` (format 1.0, C order, no pickles)."""
    array = np.ascontiguousarray(array) if array.ndim else array
    write_file(path, lambda file: np.lib.format.write_array(file, array, allow_pickle=False))


def write_json(path: str | Path, tree: Any) -> None:
    """Dicts, lists, texts and numbers (numpy's too) as JSON; a NaN becomes null."""
    text = json.dumps(_plain(tree), indent=1, allow_nan=False)
    write_file(path, lambda file: file.write(text.encode() + b"\n"))


def write_text(path: str | Path, text: str) -> None:
    """A text in UTF-8."""
    write_file(path, lambda file: file.write(text.encode()))


def write_table(path: str | Path, table: pa.Table) -> None:
    """A table as Parquet, in row groups of 65,536 (what a reader holds of it at a time)."""
    write_file(
        path,
        lambda file: pq.write_table(table, file, row_group_size=65_536, compression="zstd"),
    )


def write_file(path: str | Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Let `write` fill a file that takes the name `path` once it is whole and on the disk.

    Raises:
      ValueError: the file cannot be written. What was there before stays.
    """
    path = os.path.expanduser(str(path))
    try:
        if not storage.local(path):
            whole = io.BytesIO()
            write(whole)
            fs, inside = storage.filesystem(path)
            storage.call(path, fs.pipe_file, inside, whole.getvalue())
            return
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        unfinished = f"{path}.{os.getpid()}.part"  # of this process: others may write the same
        try:
            with open(unfinished, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        finally:
            if os.path.exists(unfinished):
                os.unlink(unfinished)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"{path} cannot be written ({reason}); nothing is left of it.") from error


def read_json(path: str | Path) -> Any:
    """What `write_json` wrote; ValueError where it cannot be read."""
    try:
        return json.loads(storage.read(str(path)))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}).") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}).") from error


def sha256(path: str | Path) -> str:
    """Hex digest of a whole file, read in pieces."""
    with storage.open_file(str(path)) as file:
        return storage.call(str(path), _hash, file)


def _hash(file: Any) -> str:  # not all of fsspec's files are a typing.IO
    digest = hashlib.sha256()
    while part := file.read(_CHUNK):
        digest.update(part)
    return digest.hexdigest()


def _plain(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {str(key): _plain(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_plain(value) for value in tree]
    if isinstance(tree, np.ndarray):
        return _plain(tree.tolist())
    if isinstance(tree, np.generic):
        return _plain(tree.item())
    if isinstance(tree, float) and not np.isfinite(tree):
        return None
    return str(tree) if isinstance(tree, Path) else tree
