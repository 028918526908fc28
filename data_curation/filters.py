"""Which rows of an embedding set may be used at all: opt-outs, licences, rows that are no vectors.

Section 13 and section 2 of the curation spec. Called by the stage `index`, before anything else,
and (opt-outs) by `export`, after everything else.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool, Int64

from data_curation.embeddings import EmbeddingSet, find_bad_rows
from data_curation.files import write_json, write_npy, write_table
from dinojax.data import storage

UNKNOWN = "(unknown)"  # the bucket of rows without a licence
LISTED = ("id", "url", "sha256")  # what a list of opt-outs may hold
BLOCK = 1 << 20  # rows whose metadata is in memory


class Usable(NamedTuple):
    """The rows that may be used, and why others may not. Rows are those of the full set."""

    rows: Int64[np.ndarray, " n"]
    opted_out: Int64[np.ndarray, " a"]
    licensed_out: Int64[np.ndarray, " b"]
    bad: Int64[np.ndarray, " c"]
    licenses: dict[str, int]  # rows of each licence, opt-outs left out; {}: there is no such column


def usable_rows(
    x: EmbeddingSet,
    *,
    opt_out: str = "",
    allow: Sequence[str] = (),
    deny: Sequence[str] = (),
    unknown: Literal["keep", "drop"] = "keep",
    zero_is_bad: bool = False,
    max_bad_fraction: float = 1e-3,
) -> Usable:
    """Rows of `x` without opt-outs, then without forbidden licences, then without bad rows.

    Args:
      opt_out: a file of ids, urls or sha256 sums, see `read_list`.
      allow, deny: licences; an empty `allow` means all. A denied one is never kept.
      unknown: what becomes of rows without a licence.
      zero_is_bad: where rows will be normalised.
      max_bad_fraction: of the rows that are left; more are refused.

    Raises:
      ValueError: too many bad rows, nothing is left, or a policy where there is no such column.
    """
    left = x
    opted_out = listed_rows(left, read_list(opt_out)) if opt_out else np.empty(0, np.int64)
    left = _without(left, opted_out)
    licensed_out, licenses = _licensed_out(left, allow, deny, unknown)
    left = _without(left, licensed_out)
    bad = find_bad_rows(left, zero_is_bad)
    if len(bad) > max_bad_fraction * len(left):
        raise ValueError(
            f"{len(bad)} of {len(left)} rows of {x.where} are not finite"
            f"{' or zero' if zero_is_bad else ''}, the first is row {bad[0]}; expected at most "
            f"{max_bad_fraction:g} of them (index.max_bad_fraction)"
        )
    left = _without(left, bad)
    if not len(left):
        raise ValueError(
            f"no row of {x.where} may be used: {len(opted_out)} opted out, {len(licensed_out)} "
            f"have forbidden licences, {len(bad)} are bad"
        )
    return Usable(left.row_of(np.arange(len(left))), opted_out, licensed_out, bad, licenses)


def write_usable(folder: str | Path, x: EmbeddingSet, usable: Usable) -> dict[str, int]:
    """`subset.npy`, `bad_rows.parquet` (id, row) and `filters.json` in a folder; the counts."""
    folder = Path(folder)
    ids = {"id": x.ids(usable.bad), "row": usable.bad}
    write_table(folder / "bad_rows.parquet", pa.table(ids))
    counts = {
        "rows": len(x),
        "opted_out": len(usable.opted_out),
        "licensed_out": len(usable.licensed_out),
        "bad": len(usable.bad),
        "usable": len(usable.rows),
    }
    write_json(folder / "filters.json", counts | {"licenses": usable.licenses})
    write_npy(folder / "subset.npy", usable.rows)  # last: what later stages look for
    return counts


def read_list(path: str) -> pa.Array:
    """The texts of a list: a line each (empty ones and those that begin with # left out), or the
    columns `id`, `url` and `sha256` of a Parquet file.

    Raises:
      ValueError: it cannot be read, or has none of these columns.
    """
    try:
        if path.endswith(".parquet"):
            with storage.open_file(path) as file:
                table = pq.read_table(file)
            here = [table[name].cast(pa.string()) for name in LISTED if name in table.column_names]
            if not here:
                raise ValueError(
                    f"{path} has the columns {', '.join(table.column_names)}; expected one of "
                    f"{', '.join(LISTED)}"
                )
            texts = pa.chunked_array([chunk for column in here for chunk in column.chunks])
            return pc.unique(texts.drop_null())
        lines = storage.read(path).decode("utf-8", "backslashreplace").splitlines()
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"the list {path} cannot be read ({error})") from error
    lines = (line.strip() for line in lines)
    return pc.unique(pa.array([line for line in lines if line and line[0] != "#"], pa.string()))


def listed_rows(x: EmbeddingSet, listed: pa.Array) -> Int64[np.ndarray, " m"]:
    """Rows of the full set whose id, url or sha256 is on a list."""
    names = [name for name in LISTED if name in x.columns]
    found = [np.empty(0, np.int64)]
    for rows in _row_blocks(x):
        hit = is_listed(x.ids(rows), listed)
        for column in x.metadata(rows, names).columns if names else ():
            hit = hit | is_listed(column, listed)
        found.append(rows[hit])
    return np.concatenate(found)


def is_listed(column: pa.Array | pa.ChunkedArray, listed: pa.Array) -> Bool[np.ndarray, " n"]:
    """Whether each value, as text, is on a list; nulls are not."""
    found = pc.is_in(column.cast(pa.string()), listed, skip_nulls=True)
    return found.to_numpy(zero_copy_only=False)


def _licensed_out(
    x: EmbeddingSet, allow: Sequence[str], deny: Sequence[str], unknown: str
) -> tuple[Int64[np.ndarray, " m"], dict[str, int]]:
    """Rows that the policy forbids, and how many rows each licence has."""
    if "license" not in x.columns:
        if allow or deny or unknown == "drop":
            raise ValueError(
                f"a licence policy is set, but {x.where} has no column 'license'; it has "
                f"{', '.join(x.columns) or 'ids only'}"
            )
        return np.empty(0, np.int64), {}
    found, counts = [np.empty(0, np.int64)], {}
    for rows in _row_blocks(x):
        column = x.metadata(rows, ["license"])["license"].cast(pa.string())
        coded = column.combine_chunks().dictionary_encode()
        names = [(name or "").strip() for name in coded.dictionary.to_pylist()]
        names.append("")  # of nulls
        codes = coded.indices.fill_null(len(names) - 1).to_numpy()
        for name, count in zip(names, np.bincount(codes, minlength=len(names)).tolist()):
            if count:
                counts[name or UNKNOWN] = counts.get(name or UNKNOWN, 0) + count
        barred = [
            (name in deny or bool(allow) and name not in allow) if name else unknown == "drop"
            for name in names
        ]
        found.append(rows[np.array(barred)[codes]])
    return np.concatenate(found), dict(sorted(counts.items()))


def _without(x: EmbeddingSet, rows: Int64[np.ndarray, " m"]) -> EmbeddingSet:
    if not len(rows):
        return x
    return x.restrict(np.setdiff1d(x.row_of(np.arange(len(x))), rows, assume_unique=True))


def _row_blocks(x: EmbeddingSet) -> Iterator[Int64[np.ndarray, " m"]]:
    for first in range(0, len(x), BLOCK):
        yield x.row_of(np.arange(first, min(first + BLOCK, len(x))))
