"""`mixture.json`: the parts that a run is trained on, and how often each (spec 9).

Training reads it as `--config.data.source=curated:WORKDIR/mixture.json`; what it means step by step
is `dinojax.data.mixture`. Called by the stage `mix`.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool, Int64

from data_curation.chosen import SAMPLES, write_tables, write_whole
from data_curation.files import write_json
from dinojax.data.curated import read_mixture
from dinojax.data.mixture import check
from dinojax.data.sources import open_source

SEED = 65537  # as published code has it; a run draws with its own seed


class Part(NamedTuple):
    """A component of the mixture.

    `samples` is a samples.parquet (or a retrieved.parquet), or an image SPEC: all its images.
    `weight` is its share of mixed batches, relative to the others' (None: its size; 0: it is in
    none), `homogeneous` the probability of a batch of it alone.
    """

    name: str
    samples: str
    weight: float | None = None
    homogeneous: float = 0.0


def write_mixture(
    path: str | Path, parts: Sequence[Part], *, seed: int = SEED, once: bool = True
) -> dict[str, int]:
    """Writes mixture.json, and samples in `parts/` beside it where they differ; images of each.

    Args:
      path: FOLDER/mixture.json. Files below the folder are named relative to it.
      once: an image of several parts stays in the first of them only. (Its `count` stays too.)

    Raises:
      ValueError: numbers that make no mixture, a file that is no samples.parquet, a part of which
        nothing is left.
    """
    path = Path(path)
    if not parts:
        raise ValueError("a mixture needs at least one component; there is none")
    parts = [
        part._replace(weight=None if part.weight is None else float(part.weight)) for part in parts
    ]
    check([(part.name, part.weight, float(part.homogeneous)) for part in parts])
    files = [_samples_of(part, path.parent) for part in parts]
    if once and len(parts) > 1:
        files = _each_once(parts, files, path.parent)
    sizes = {part.name: _size(file) for part, file in zip(parts, files)}
    mixed = [part for part in parts if part.weight != 0]
    by_size = all(part.weight is None for part in mixed)
    weights = [sizes[part.name] if part.weight is None else part.weight for part in mixed]
    mixture = {
        "version": 1,
        "seed": seed,
        "components": [
            {
                "name": part.name,
                "samples": _relative(file, path.parent),
                "n": sizes[part.name],
                "weight": sizes[part.name] if part.weight is None else part.weight,
            }
            for part, file in zip(parts, files)
        ],
        "homogeneous": [
            {"component": part.name, "probability": part.homogeneous}
            for part in parts
            if part.homogeneous > 0
        ],
        "heterogeneous": {
            "components": [part.name for part in mixed],
            "weights": "size" if by_size else weights,
        },
    }
    write_json(path, mixture)
    read_mixture(str(path))  # as training will
    return sizes


def expected_shares(parts: Sequence[Part], sizes: dict[str, int]) -> dict[str, float]:
    """Each part's share of all images that a run sees."""
    weights = [sizes[part.name] if part.weight is None else part.weight for part in parts]
    total = math.fsum(weights) or 1.0
    mixed = 1 - math.fsum(part.homogeneous for part in parts)
    return {
        part.name: part.homogeneous + mixed * weight / total for part, weight in zip(parts, weights)
    }


def _samples_of(part: Part, folder: Path) -> Path:
    """The part's file; of an image SPEC, one that is written now."""
    if part.samples.endswith(".parquet") and ":" not in part.samples.partition("/")[0]:
        return Path(part.samples)
    file = folder / "parts" / part.name / SAMPLES
    write_whole(file, open_source(part.samples), part.samples, part.name)
    return file


def _each_once(parts: Sequence[Part], files: Sequence[Path], folder: Path) -> list[Path]:
    """The files, without images that an earlier one holds; those that differ are written anew."""
    seen: dict[str, Int64[np.ndarray, " m"]] = {}
    kept = []
    for part, file in zip(parts, files):
        table = _read(file)
        keep = np.ones(len(table), bool)
        for spec, here in _by_source(table, file):
            rows = table["row"].to_numpy()[here]
            before = seen.get(spec, np.empty(0, np.int64))
            first = np.zeros(len(rows), bool)  # of one part too: retrieved for several seed sets
            first[np.unique(rows, return_index=True)[1]] = True
            keep[here] = first & ~np.isin(rows, before)
            seen[spec] = np.union1d(before, rows)
        if not keep.any():
            raise ValueError(
                f"component {part.name!r}: all of its {len(table)} rows are in components before "
                "it; leave it out, or mix.once=False"
            )
        if not keep.all():
            file = folder / "parts" / part.name / SAMPLES
            write_tables(file, iter([table.filter(pa.array(keep))]))
        kept.append(file)
    return kept


def _by_source(table: pa.Table, file: Path) -> list[tuple[str, Bool[np.ndarray, " n"]]]:
    """(source SPEC, which rows are numbers in it) of a table of samples."""
    told = (table.schema.metadata or {}).get(b"source")
    if told:
        return [(told.decode(), np.ones(len(table), bool))]
    if "source" not in table.column_names:
        raise ValueError(
            f"{file} does not say which images its rows are; set images=SPEC and sample again"
        )
    column = table["source"].cast(pa.string())
    return [
        (spec, pc.equal(column, spec).to_numpy(zero_copy_only=False))
        for spec in pc.unique(column).to_pylist()
    ]


def _read(file: Path) -> pa.Table:
    try:
        table = pq.read_table(file)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{file} cannot be read ({error})") from error
    if "row" not in table.column_names:
        raise ValueError(
            f"{file} has the columns {', '.join(table.column_names)}; expected a samples.parquet "
            "with `row`"
        )
    return table


def _size(file: Path) -> int:
    """Images: the sum of `count`, or the rows."""
    parquet = pq.ParquetFile(file)
    if "count" not in parquet.schema_arrow.names:
        return parquet.metadata.num_rows
    counts = (batch.column(0).to_numpy() for batch in parquet.iter_batches(columns=["count"]))
    return int(sum(count.sum() for count in counts))


def _relative(file: Path, folder: Path) -> str:
    """Relative to the mixture's folder where it lies below, so that the folder can be moved."""
    file, folder = file.resolve(), folder.resolve()
    return str(file.relative_to(folder) if file.is_relative_to(folder) else file)
