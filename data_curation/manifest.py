"""`manifest.json` of an embedding set: made, read and checked; and the writing of new sets.

`index` makes it for a folder that has shards already (the verb of that name); `EmbeddingWriter`
writes shards one by one, each whole or absent, so that an interrupted embedding goes on. Opened by
`embeddings.open_embeddings`.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float

from data_curation.files import read_json, sha256, write_file, write_json, write_table
from data_curation.shards import EMBEDDING, ID, Shard, open_shard
from dinojax.data import storage

VERSION = 1
NAME = "manifest.json"
_UNIT = 1e-2  # lengths this near to 1 count as normalised: float16 rows come within 3e-4
_LOOK = 256  # rows of each shard that are looked at for it


def index(
    directory: str,
    embedder: Mapping[str, Any] | None = None,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Make `manifest.json` for a folder of shards, and return it.

    Shards are `emb-*.npy` (ids and metadata in `meta-*.parquet`, or none) or else `*.parquet`, in
    the order of their names.

    Args:
      directory: local or a URL.
      embedder: what made the vectors: name, checkpoint digest, layer, image size, preprocessing.
      about: further entries, such as `source`, the SPEC that the rows are images of.

    Raises:
      ValueError: no shards, shards of several dimensions, ids that occur twice.
    """
    directory = str(directory)
    arrays = storage.matching(storage.beside(directory, "emb-*.npy"))
    tables = storage.matching(storage.beside(directory, "*.parquet"))
    metas = [path for path in tables if os.path.basename(path).startswith("meta-")]
    tables = [path for path in tables if path not in metas]
    if bool(arrays) == bool(tables):
        found = "both emb-*.npy and" if arrays else "neither emb-*.npy nor"
        raise ValueError(f"embeddings: {directory} holds {found} *.parquet; expected one kind.")
    if arrays and metas and len(metas) != len(arrays):
        raise ValueError(
            f"embeddings: {directory} holds {len(arrays)} emb-*.npy and {len(metas)} "
            f"meta-*.parquet; expected one for each, or none at all."
        )
    files = arrays or tables
    pairs = list(zip(files, metas if arrays and metas else [None] * len(files)))
    shards = [open_shard(path, meta) for path, meta in pairs]
    _check_same(shards)
    check_ids(shards)
    manifest = {
        "version": VERSION,
        "format": "npy" if arrays else "parquet",
        "dim": shards[0].dim,
        "dtype": np.dtype(shards[0].dtype).name,
        "n_total": sum(shard.n for shard in shards),
        "normalized": all(map(_normalized, shards)),
        "embedder": dict(embedder or {}),
        **(about or {}),
        "shards": [
            {
                "path": os.path.basename(path),
                **({"meta": os.path.basename(meta)} if meta else {}),
                "n": shard.n,
                "bytes": storage.size(path),
                "sha256": sha256(path),
            }
            for (path, meta), shard in zip(pairs, shards)
        ],
    }
    write_json(storage.beside(directory, NAME), manifest)
    return manifest


def open_shards(path: str, verify: bool = False) -> tuple[list[Shard], Mapping[str, Any]]:
    """Shards of a folder with its manifest; of a single file, with {}.

    Raises:
      ValueError: as `embeddings.open_embeddings`.
    """
    if path.endswith((".npy", ".parquet")):
        shards = [open_shard(path)]
        if verify:
            check_ids(shards)
        return shards, {}
    file = storage.beside(path, NAME)
    if not storage.exists(file):
        missing = "has no manifest.json" if storage.exists(path) else "does not exist"
        raise ValueError(
            f"embeddings: {path} {missing}; expected a .npy, a .parquet, or a folder for which "
            f"`python -m data_curation index` made one."
        )
    manifest = read_json(file)
    if not isinstance(manifest, dict) or manifest.get("version") != VERSION:
        version = manifest.get("version") if isinstance(manifest, dict) else None
        raise ValueError(f"embeddings: {file} is of version {version!r}, expected {VERSION}.")
    try:
        shards = [
            _open_listed(path, entry, manifest["dim"], verify) for entry in manifest["shards"]
        ]
        total = manifest["n_total"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"embeddings: {file} lacks an entry ({error!r}).") from error
    if not shards or sum(shard.n for shard in shards) != total:
        raise ValueError(f"embeddings: the shards of {file} do not add up to its n_total, {total}.")
    _check_same(shards)
    if verify:
        check_ids(shards)
    return shards, manifest


def _open_listed(folder: str, entry: Mapping[str, Any], dim: int, verify: bool) -> Shard:
    """One shard as the manifest describes it."""
    path, meta = storage.beside(folder, entry["path"]), entry.get("meta")
    shard = open_shard(path, meta and storage.beside(folder, meta))
    found = {"rows": shard.n, "dimensions": shard.dim, "bytes": storage.size(path)}
    told = {"rows": entry["n"], "dimensions": dim, "bytes": entry["bytes"]}
    if verify:
        found["sha256"], told["sha256"] = sha256(path), entry["sha256"]
    for what, value in found.items():
        if value != told[what]:
            raise ValueError(
                f"embeddings: {path} has {what} {value} and {NAME} says {told[what]}; if it was "
                f"meant to change, run `python -m data_curation index {folder}` again."
            )
    return shard


def check_ids(shards: Sequence[Shard]) -> None:
    """Raise ValueError where an id is missing or occurs twice. Memory: all ids at once."""
    columns = [shard.table([ID]).column(0) for shard in shards if ID in shard.columns]
    if not columns:
        return
    if len(columns) < len(shards):
        raise ValueError("embeddings: some shards have ids and others have none.")
    if len({column.type for column in columns}) > 1:
        kinds = sorted({str(column.type) for column in columns})
        raise ValueError(
            f"embeddings: ids are {' and '.join(kinds)}; expected one type in all shards."
        )
    ids = pa.chunked_array([chunk for column in columns for chunk in column.chunks])
    kinds = (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string)
    if not any(is_kind(ids.type) for is_kind in kinds):
        raise ValueError(f"embeddings: ids are {ids.type}; expected string or int64.")
    if ids.null_count:
        row = int(np.flatnonzero(ids.is_null().to_numpy())[0])
        raise ValueError(f"embeddings: row {row} has no id.")
    if pc.count_distinct(ids).as_py() == len(ids):
        return
    counts = pc.value_counts(ids)
    often = counts.filter(pc.greater(counts.field("counts"), 1))
    first = often[0].as_py()["values"]
    rows = np.flatnonzero(pc.equal(ids, first).to_numpy())[:2]
    raise ValueError(
        f"embeddings: {len(often)} ids occur more than once, the first of them {first!r} in rows "
        f"{rows[0]} and {rows[1]}; ids must be distinct."
    )


def _check_same(shards: Sequence[Shard]) -> None:
    for shard in shards:
        if shard.dim != shards[0].dim or shard.dtype != shards[0].dtype:
            raise ValueError(
                f"embeddings: {shard.path} holds {np.dtype(shard.dtype).name} [{shard.dim}] and "
                f"{shards[0].path} {np.dtype(shards[0].dtype).name} [{shards[0].dim}]; expected "
                f"the same in all shards."
            )


def _normalized(shard: Shard) -> bool:
    rows = np.arange(min(shard.n, _LOOK))
    norms = np.linalg.norm(shard.reader()(rows).astype(np.float32), axis=1)
    return bool(np.all(np.abs(norms - 1) < _UNIT))


@dataclass(frozen=True)
class EmbeddingWriter:
    """Writes a set shard by shard; a shard that is there is whole, so a restart skips it.

    Args:
      directory: local or a URL.
      dim: of the vectors.
      dtype: "float16" or "float32", as stored.
      format: "parquet", or "npy" (with ids and metadata in Parquet files beside the arrays).
      embedder, about: see `index`.
    """

    directory: str
    dim: int
    dtype: str = "float16"
    format: str = "parquet"
    embedder: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, allowed in {
            "dtype": ("float16", "float32"),
            "format": ("parquet", "npy"),
        }.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"embeddings: {name} is {getattr(self, name)!r}, expected "
                    f"{' or '.join(allowed)}."
                )

    def path(self, number: int) -> str:
        """Of a shard's file, `emb-00000.parquet` or `.npy`."""
        return storage.beside(str(self.directory), f"emb-{number:05d}.{self.format}")

    def done(self, number: int) -> bool:
        """Whether this shard is there."""
        return storage.exists(self.path(number))

    def write(self, number: int, vectors: Float[np.ndarray, "n d"], table: pa.Table) -> None:
        """Write one shard.

        Args:
          vectors: at least one row; rounded to `dtype`.
          table: a column `id` and any metadata, a row for each vector.

        Raises:
          ValueError: sizes differ, no `id`, a number beyond float16, a disk that is full.
        """
        if vectors.shape[1] != self.dim or len(vectors) != len(table) or not len(vectors):
            raise ValueError(
                f"embeddings: shard {number} has vectors {list(vectors.shape)} and {len(table)} "
                f"ids; expected as many ids as vectors of {self.dim} numbers."
            )
        if ID not in table.column_names:
            raise ValueError(f"embeddings: shard {number} has no column 'id' in its table.")
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(vectors, self.dtype)
        lost = np.flatnonzero((np.isinf(stored) & np.isfinite(vectors)).any(axis=1))
        if len(lost):
            raise ValueError(
                f"embeddings: row {lost[0]} of shard {number} has a number beyond {self.dtype} "
                f"({np.abs(vectors[lost[0]]).max():.3g}); store float32."
            )
        if self.format == "npy":  # the vectors last: they say that the shard is done
            write_table(storage.beside(str(self.directory), f"meta-{number:05d}.parquet"), table)
            write_file(self.path(number), lambda file: np.lib.format.write_array(file, stored))
            return
        flat = pa.array(stored.reshape(-1))
        column = pa.FixedSizeListArray.from_arrays(flat, self.dim)
        write_table(self.path(number), table.append_column(EMBEDDING, column))

    def finish(self, shards: int) -> dict[str, Any]:
        """Write the manifest, once shards 0 to `shards` - 1 are there and no others.

        Of several processes one does this.
        """
        pattern = storage.beside(str(self.directory), f"emb-*.{self.format}")
        there = {os.path.basename(path) for path in storage.matching(pattern)}
        expected = {os.path.basename(self.path(number)) for number in range(shards)}
        if there != expected:
            odd = sorted(there ^ expected)[0]
            state = "missing from" if odd in expected else "left over in"
            raise ValueError(f"embeddings: {odd} is {state} {self.directory}.")
        return index(self.directory, self.embedder, self.about)
