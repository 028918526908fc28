"""Rows that were chosen -> `samples.parquet`, which training reads as `curated:FILE`.

    id                   of the embedding set
    row                  the image's number in its source, as `dinojax.data.curated` expects
    count                times it was chosen, 1 or more
    cluster_1 .. L, dist  where it lies in the tree; squared distance to its level-1 centroid
    part                 the component of a mixture that it was chosen for
    embedding_row        its row in the embedding set
    label, license, ...  what the set knew (spec 13)

Beside it `rows.npy` (rows of the embedding set with repeats, in drawn order) and `ids.txt` (ids,
repeated by their count). Called by the stages sample, retrieve and export, and by `mixture.py`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Int, Int64

from data_curation.embeddings import EmbeddingSet
from data_curation.files import write_file, write_npy
from data_curation.shards import ParquetShard
from data_curation.tree import ClusterTree
from dinojax.data import storage
from dinojax.data.sources import Source

SAMPLES, ROWS, IDS = "samples.parquet", "rows.npy", "ids.txt"
CARRIED = (  # from the input to every output, where they are (spec 13)
    *("source", "url", "license", "license_url", "creator", "sha256", "width", "height"),
    "retrieved_at",
)
BLOCK = 1 << 20  # rows of a table in memory


class Images(NamedTuple):
    """What an embedding set says of the images it was made of."""

    source: str  # SPEC that the column `row` counts in; "": it does not say
    classes: list[str] | None  # names of its labels


def images_of(x: EmbeddingSet) -> Images:
    """From its manifest, or (a manifest made later, a single file) from its first Parquet shard."""
    told = dict(x.manifest)
    if "source" not in told and isinstance(x.shards[0], ParquetShard):
        with storage.open_file(x.shards[0].path) as file:
            metadata = pq.read_schema(file).metadata or {}
        told["source"] = metadata.get(b"source", b"").decode()
        told["classes"] = json.loads(metadata.get(b"classes", b"null"))
    return Images(told.get("source") or "", told.get("classes"))


def write_chosen(
    folder: str | Path,
    x: EmbeddingSet,
    rows: Int[np.ndarray, " n"],
    *,
    part: str,
    tree: ClusterTree | None = None,
    images: str = "",
    carry: Sequence[str] = (),
    extra: Mapping[str, pa.Array] | None = None,
) -> int:
    """Writes samples.parquet, rows.npy and ids.txt; returns the number of distinct rows.

    Args:
      rows: of the full set, with repeats, in drawn order.
      images: SPEC that the images are numbered in; "": what the set's manifest says.
      carry: further metadata columns to keep.
      extra: further columns, of the distinct rows in ascending order (retrieval's `sim`, ...).

    Raises:
      ValueError: no rows, or a file cannot be written.
    """
    folder, rows = Path(folder), np.asarray(rows, np.int64)
    if not len(rows):
        raise ValueError(f"{part}: no rows were chosen, so there is nothing to write")
    distinct, counts = np.unique(rows, return_counts=True)
    keys = _Keys(x, part, tree, images, tuple(carry))

    def blocks() -> Iterator[pa.Table]:
        for first in range(0, len(distinct), BLOCK):
            here = slice(first, first + BLOCK)
            table = keys.table(distinct[here], counts[here])
            for name, column in (extra or {}).items():
                table = table.append_column(name, column[here])
            yield table

    write_tables(folder / SAMPLES, blocks())
    write_npy(folder / ROWS, rows)
    write_ids(folder / IDS, folder / SAMPLES)
    return len(distinct)


def write_whole(path: str | Path, source: Source, spec: str, part: str) -> int:
    """A samples.parquet of all images of a SPEC: a seed set as it is (spec 9); returns its rows."""
    total, labels = len(source), source.labels()

    def blocks() -> Iterator[pa.Table]:
        for first in range(0, total, BLOCK):
            rows = np.arange(first, min(first + BLOCK, total))
            names = (source.name(int(row)) for row in rows)
            columns = {
                "id": [name.encode("utf-8", "backslashreplace").decode() for name in names],
                "row": rows,
                "count": np.ones(len(rows), np.int32),
                "part": pa.array([part] * len(rows)).dictionary_encode(),
            }
            metadata = {"source": spec}
            if labels is not None:
                columns["label"] = np.asarray(labels[rows], np.int64)
                metadata |= {"classes": json.dumps(source.classes)} if source.classes else {}
            yield pa.table(columns).replace_schema_metadata(metadata)

    write_tables(path, blocks())
    return total


def write_tables(path: str | Path, tables: Iterator[pa.Table]) -> None:
    """Tables one after another as one Parquet file, in the schema of the first."""

    def write(file: IO[bytes]) -> None:
        first = next(tables)
        fields = [
            field.with_type(pa.string()) if pa.types.is_null(field.type) else field
            for field in first.schema
        ]
        schema = pa.schema(fields, first.schema.metadata)
        with pq.ParquetWriter(file, schema, compression="zstd") as writer:
            writer.write_table(first.cast(schema), row_group_size=65_536)
            for table in tables:
                writer.write_table(
                    table.replace_schema_metadata(schema.metadata).cast(schema),
                    row_group_size=65_536,
                )

    write_file(path, write)


def write_ids(path: str | Path, samples: pa.Table | str | Path) -> None:
    """One id a line, repeated by its count, in the order of a samples.parquet."""
    if isinstance(samples, pa.Table):
        batches = iter(samples.select(["id", "count"]).to_batches(max_chunksize=BLOCK))
    else:
        batches = pq.ParquetFile(samples).iter_batches(BLOCK, columns=["id", "count"])

    def write(file: IO[bytes]) -> None:
        for batch in batches:
            # Indices of repeated rows: arrow has no repeat of its own.
            again = np.repeat(np.arange(len(batch)), batch.column("count").to_numpy())
            ids = batch.column("id").cast(pa.string()).take(pa.array(again))
            file.write("".join(f"{one}\n" for one in ids.to_pylist()).encode())

    write_file(path, write)


class _Keys:
    """What the set and the tree know of chosen rows."""

    def __init__(
        self,
        x: EmbeddingSet,
        part: str,
        tree: ClusterTree | None,
        images: str,
        carry: tuple[str, ...],
    ) -> None:
        self.x, self.part, self.tree = x, part, tree
        known = images_of(x)
        self.spec, self.classes = images or known.source, known.classes
        wanted = dict.fromkeys((*CARRIED, *carry))
        missing = [name for name in carry if name not in x.columns]
        if missing:  # says what there is
            x.metadata(np.empty(0, np.int64), missing)
        self.kept = [name for name in wanted if name in x.columns]

    def table(self, rows: Int64[np.ndarray, " m"], counts: Int64[np.ndarray, " m"]) -> pa.Table:
        x, here = self.x, self.kept
        known = [name for name in ("row", "label") if name in x.columns and name not in here]
        told = x.metadata(rows, [*known, *here])
        columns = {
            "id": x.ids(rows),
            "row": told["row"] if "row" in told.column_names else rows,
            "count": counts.astype(np.int32),
        }
        if self.tree is not None:
            for level in range(1, self.tree.depth + 1):
                columns[f"cluster_{level}"] = self.tree.cluster_of(rows, level)
            columns["dist"] = np.asarray(self.tree.levels[0].dist[rows])
        columns["part"] = pa.array([self.part] * len(rows)).dictionary_encode()
        columns["embedding_row"] = rows
        metadata = {"source": self.spec} if self.spec else {}
        if "label" in told.column_names and _is_label(told["label"]):
            columns["label"] = told["label"]
            if self.classes:
                metadata["classes"] = json.dumps(self.classes)
        columns |= {name: told[name] for name in here if name not in columns}
        return pa.table(columns).replace_schema_metadata(metadata)


def _is_label(column: pa.ChunkedArray) -> bool:
    """Whether training takes it: a class or a number in every row, -1 or more."""
    if column.null_count:
        return False
    if pa.types.is_integer(column.type):
        return not len(column) or pc.min(column).as_py() >= -1
    return pa.types.is_string(column.type)
