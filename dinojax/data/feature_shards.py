"""An embedding set on disk, written shard by shard. Called by `features.py`.

    OUT/emb-00000.parquet ...   id, row, label where there are any, embedding [d]
    OUT/done/emb-00000.json     of a finished shard: rows, bytes, sha256, what was left out
    OUT/task.json               what was asked for; another task is refused
    OUT/manifest.json           in the end: the shards in order, and what made them
    OUT/unreadable.txt          in the end, if any: name, tab, reason

A shard appears when it is whole, so a killed writer goes on at the first unfinished one and ends
with the same bytes. `row` is an image's number in the source whose SPEC is the schema metadata
`source`: any table with these two is a `curated:` source.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int

from dinojax.data.pipeline import Failure
from dinojax.data.unreadable import UnreadableList

DONE, TASK, MANIFEST, UNREADABLE = "done", "task.json", "manifest.json", "unreadable.txt"
# May differ between calls that go on with one another: the same weights in another place.
_LOOSE = ("embedder.weights",)


def begin(folder: Path, task: dict[str, Any]) -> None:
    """Makes the folder, or checks that what it holds is a part of the same task (ValueError)."""
    (folder / DONE).mkdir(parents=True, exist_ok=True)
    if not (folder / TASK).exists():
        if found := sorted(folder.glob("emb-*")):
            raise ValueError(f"features: {str(folder)!r} holds {found[0].name} of something else.")
        _write_json(folder / TASK, task)
        return
    there, wanted = _flat(json.loads((folder / TASK).read_text())), _flat(task)
    for key in sorted(there.keys() | wanted.keys()):
        if there.get(key) != wanted.get(key) and key not in _LOOSE:
            raise ValueError(
                f"features: {str(folder)!r} holds features made otherwise ({key} was "
                f"{there.get(key)!r}, now it is {wanted.get(key)!r}); choose another folder."
            )


def done(folder: Path, shard: int) -> dict[str, Any] | None:
    """The note on a finished shard; None if there is none, or the shard itself is gone or cut."""
    try:
        note = json.loads(_note(folder, shard).read_text())
        whole = not note["n"] or (folder / note["path"]).stat().st_size == note["bytes"]
    except (OSError, ValueError):
        return None
    return note if whole else None


def write_shard(
    folder: Path,
    shard: int,
    task: dict[str, Any],
    images: Sequence[tuple[int, str]],
    left_out: Sequence[tuple[int, str, str]],
    vectors: Sequence[Float[np.ndarray, "_ d"]],
    labels: Int[np.ndarray, " m"] | None,
) -> None:
    """The shard's file, unless none of its images could be read, then the note that it is done.

    `images` = (row, name) of each vector; `left_out` = (row, name, reason); `labels` of the source.
    """
    note = {"path": f"{_stem(shard)}.parquet", "n": len(images), "bytes": 0, "sha256": ""}
    if images:
        path, table = folder / note["path"], _table(task, images, vectors, labels)
        with _whole(path) as file:
            # zstd takes 11% off float16 vectors, and time in every later pass over them.
            pq.write_table(table, file, compression="none", use_dictionary=False)
            note["bytes"] = file.tell()
            file.seek(0)
            note["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        note["dim"] = vectors[0].shape[1]
    _write_json(_note(folder, shard), note | {"left_out": left_out})


def finish(folder: Path, task: dict[str, Any], shards: int) -> tuple[int, int] | None:
    """The manifest, once all shards are done: rows, images left out. None: not all are done."""
    notes = [done(folder, shard) for shard in range(shards)]
    if any(note is None for note in notes):
        return None
    left_out = [image for note in notes for image in note["left_out"]]
    full = [note for note in notes if note["n"]]
    if not full:
        raise ValueError(f"features: no image can be read, the last: {left_out[-1][2]}.")
    UnreadableList(folder / UNREADABLE).add(Failure(name, why) for _, name, why in left_out)
    manifest = {
        "version": 1,
        "format": "parquet",
        "dim": full[0]["dim"],
        "dtype": task["dtype"],
        "n_total": sum(note["n"] for note in full),
        "normalized": False,
        "embedder": task["embedder"],
        "source": task["source"],
        "classes": task["classes"],
        "left_out": len(left_out),
        "shards": [{key: note[key] for key in ("path", "n", "bytes", "sha256")} for note in full],
    }
    _write_json(folder / MANIFEST, manifest)
    for unfinished in folder.glob(".emb-*"):  # of a process that was killed
        unfinished.unlink(missing_ok=True)
    return manifest["n_total"], len(left_out)


def _table(
    task: dict[str, Any],
    images: Sequence[tuple[int, str]],
    vectors: Sequence[Float[np.ndarray, "_ d"]],
    labels: Int[np.ndarray, " m"] | None,
) -> pa.Table:
    rows = np.array([row for row, _ in images], np.int64)
    numbered = task["ids"] == "name#row"
    names = [f"{name}#{row}" if numbered else name for row, name in images]
    # Names of files may be of any bytes; arrow's strings are UTF-8.
    ids = [name.encode("utf-8", "backslashreplace").decode() for name in names]
    columns = {"id": pa.array(ids, pa.string()), "row": rows}
    metadata = {"source": task["source"]}
    if labels is not None:
        columns["label"] = np.asarray(labels[rows], np.int64)
        if task["classes"]:
            metadata["classes"] = json.dumps(task["classes"])
    values = np.concatenate(vectors)
    flat = pa.array(values.reshape(-1))
    columns["embedding"] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    return pa.table(columns).replace_schema_metadata(metadata)


def _flat(task: dict[str, Any]) -> dict[str, Any]:
    flat = {key: value for key, value in task.items() if key != "embedder"}
    return flat | {f"embedder.{key}": value for key, value in task["embedder"].items()}


def _stem(shard: int) -> str:
    return f"emb-{shard:05d}"


def _note(folder: Path, shard: int) -> Path:
    return folder / DONE / f"{_stem(shard)}.json"


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    with _whole(path) as file:
        file.write((json.dumps(tree, indent=1) + "\n").encode())


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears under its name when it is complete and on disk."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(unfinished, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
