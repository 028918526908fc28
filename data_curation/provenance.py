"""`provenance.json`: what a folder of results was made of, by which code and settings (spec 13).

Written beside every result by the stages; what it says of licences and sources is counted in the
table of chosen rows itself.
"""

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_curation.chosen import images_of
from data_curation.embeddings import EmbeddingSet
from data_curation.files import write_json
from data_curation.filters import UNKNOWN
from dinojax.hosts import code_version

FILE = "provenance.json"
COUNTED = ("license", "source", "part")
NAMED = 1000  # values of a column that are listed; a source of many URLs has more


class StageRecord(NamedTuple):
    """What a stage did."""

    name: str
    config: Mapping[str, Any]
    seed: int
    rows_in: int
    rows_out: int
    seconds: float


def input_facts(x: EmbeddingSet) -> dict[str, Any]:
    """What identifies an embedding set."""
    return {
        "path": x.where,
        "digest": x.digest(),
        "rows": x.n_total,
        "used": len(x),
        "dim": x.dim,
        "source": images_of(x).source,
        "embedder": dict(x.manifest.get("embedder", {})),
        "normalize": x.normalize,
        "centred": x.mean is not None,
    }


def write_provenance(
    folder: str | Path,
    inputs: Mapping[str, Mapping[str, Any]],
    stages: Sequence[StageRecord],
    samples: str | Path | None = None,
) -> None:
    """Writes FOLDER/provenance.json.

    Args:
      inputs: by name, from `input_facts`.
      stages: in the order they were done.
      samples: a samples.parquet whose licences and sources are counted.
    """
    facts = {
        "version": 1,
        "code": code_version(),
        "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "inputs": dict(inputs),
        "stages": [stage._asdict() for stage in stages],
        "counts": count_columns(samples) if samples is not None else {},
    }
    write_json(Path(folder) / FILE, facts)


def count_columns(
    samples: str | Path, columns: Sequence[str] = COUNTED
) -> dict[str, dict[str, int]]:
    """Images (rows times `count`) of each value of these columns, where there are any."""
    names = pq.read_schema(samples).names
    here = [name for name in columns if name in names]
    found: dict[str, dict[str, int]] = {name: {} for name in here}
    read = [*here, *(["count"] if "count" in names else [])]
    for batch in pq.ParquetFile(samples).iter_batches(columns=read) if here else ():
        times = batch.column("count").to_numpy() if "count" in names else np.ones(len(batch))
        for name in here:
            for value, count in value_counts(batch.column(name), times).items():
                found[name][value] = found[name].get(value, 0) + count
    return {name: _most(counts) for name, counts in found.items()}


def value_counts(column: pa.Array, times: np.ndarray) -> dict[str, int]:
    """Summed `times` of each value as text; nulls and empty texts are UNKNOWN."""
    coded = pc.fill_null(column.cast(pa.string()), "").dictionary_encode()
    sums = np.bincount(coded.indices.to_numpy(), times, len(coded.dictionary))
    pairs = zip(coded.dictionary.to_pylist(), sums.astype(np.int64).tolist())
    return {value or UNKNOWN: count for value, count in pairs}


def _most(counts: dict[str, int]) -> dict[str, int]:
    """Largest first; beyond NAMED values, the rest together."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rest = ordered[NAMED:]
    others = {f"({len(rest)} others)": sum(count for _, count in rest)} if rest else {}
    return dict(ordered[:NAMED]) | others
