"""What was chosen, in the form that something else reads (spec 9). Called by the stage `export`.

    parquet             samples.parquet itself
    txt                 ids.txt, an id a line, repeated by its count
    npy                 rows.npy, numbers of the images in their source, repeated by their count
    arrayrecord-index   records.parquet: file, record, count of every image in ArrayRecord shards

Opt-outs are honoured once more, and rows can be left out after the fact; drawing others in their
place is `hierarchical_sample(tree.without(rows), ...)` and needs no clustering.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_curation.chosen import IDS, ROWS, SAMPLES, write_ids, write_tables
from data_curation.files import write_npy, write_table
from data_curation.filters import LISTED, is_listed, read_list
from dinojax.data.options import nearest
from dinojax.data.records import ArrayRecordSource
from dinojax.data.sources import open_source

FORMATS = ("parquet", "txt", "npy", "arrayrecord-index")
RECORDS = "records.parquet"


def export(
    samples: str | Path,
    folder: str | Path,
    format: str = "parquet",
    *,
    opt_out: str = "",
    exclude: str = "",
) -> tuple[int, int]:
    """Writes a samples.parquet into FOLDER in a format; rows written, rows left out.

    Args:
      opt_out, exclude: files of ids, urls or sha256 that must not leave (`filters.read_list`).

    Raises:
      ValueError: an unknown format, nothing is left, or images that are not in ArrayRecord shards.
    """
    if format not in FORMATS:
        raise ValueError(f"export.format is {format!r}; {nearest(format, FORMATS)}")
    folder = Path(folder)
    whole = pq.read_table(samples)
    table = whole.filter(pa.array(_allowed(whole, opt_out, exclude)))
    if not len(table):
        raise ValueError(f"nothing is left of {samples}: all {len(whole)} rows are excluded")
    if format == "parquet":
        write_tables(folder / SAMPLES, iter([table]))
    elif format == "txt":
        write_ids(folder / IDS, table)
    elif format == "npy":
        write_npy(folder / ROWS, np.repeat(table["row"].to_numpy(), table["count"].to_numpy()))
    else:
        write_table(folder / RECORDS, record_index(table))
    return len(table), len(whole) - len(table)


def record_index(table: pa.Table) -> pa.Table:
    """`file`, `record` (its number in the file), `count` of every row of a table of samples.

    Raises:
      ValueError: the source is not `array_record:...`.
    """
    spec = ((table.schema.metadata or {}).get(b"source") or b"").decode()
    if not spec.startswith("array_record:"):
        raise ValueError(
            f"export.format is 'arrayrecord-index', but the images are in {spec or 'no source'!r}; "
            "expected array_record:... (`dinojax data SPEC --shard DIR` makes such shards)"
        )
    source = open_source(spec)
    assert isinstance(source, ArrayRecordSource)
    rows, records = table["row"].to_numpy(), source.records
    shard = np.searchsorted(records.starts, rows, side="right") - 1
    place = records.firsts[shard] + rows - records.starts[shard]
    files = pa.DictionaryArray.from_arrays(shard.astype(np.int32), list(records.files))
    columns = {"id": table["id"], "file": files, "record": place, "count": table["count"]}
    return pa.table(columns)


def _allowed(table: pa.Table, opt_out: str, exclude: str) -> np.ndarray:
    allowed = np.ones(len(table), bool)
    for path in filter(None, (opt_out, exclude)):
        listed = read_list(path)
        for name in LISTED:
            if name in table.column_names:
                allowed &= ~is_listed(table[name], listed)
    return allowed
