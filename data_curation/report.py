"""What a sample is made of and how balanced: `report.json`, figures, one `report.html` (spec 12).

    figures = measure(x, tree, samples)         counts, by level and by column
    write_report(folder, x, tree, ...)          all of it, into the folder of the sample

Called by the stage `report`; the page is put together by `page.py`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from jaxtyping import Float, Int, Int64

from data_curation import page, plots
from data_curation.balance import balance_metrics, balance_warnings, kl_from_uniform
from data_curation.chosen import SAMPLES, images_of
from data_curation.embeddings import EmbeddingSet
from data_curation.files import read_json, write_file, write_json, write_text
from data_curation.gallery import Group, cluster_groups, component_groups, sheet
from data_curation.plots import LevelCounts
from data_curation.provenance import value_counts
from data_curation.tree import ClusterTree
from dinojax.data.sources import Source, open_source

BLOCK = 1 << 20  # rows whose metadata is in memory
SHOWN = 4000  # rows of a scatter plot
FITTED = 20_000  # rows that its two directions are found from
BINS = 40
Gallery = tuple[str, str, list[tuple[str, bytes]]]  # heading, note, (title, JPEG) of each group


def write_report(
    folder: str | Path,
    x: EmbeddingSet,
    tree: ClusterTree,
    *,
    name: str,
    multiplier: int = 1,
    dedup: str | Path | None = None,
    by: str = "",
    groups: int = 0,
    images: str = "",
    warn_imbalance: float = 20.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Writes report.json, report.html and figures (PNG) beside FOLDER/samples.parquet.

    Args:
      x: the whole embedding set that rows are numbers of.
      multiplier: most times that a row could be taken.
      dedup: the folder of the stage of that name, whose figures are shown too.
      by: a metadata column whose values are counted before and after.
      groups: pictures of so many clusters (largest, smallest, at random) and near-duplicates.
      images: SPEC of the pictures; "": what the set says.

    Raises:
      ValueError: an unknown column, or pictures that cannot be opened.
    """
    folder, dedup = Path(folder), None if dedup is None else Path(dedup)
    figures, levels = measure(
        x, tree, folder / SAMPLES, multiplier=multiplier, by=by, warn_imbalance=warn_imbalance
    )
    chosen = pq.read_table(folder / SAMPLES, columns=["embedding_row"])["embedding_row"].to_numpy()
    pictures = {"sizes.png": plots.sizes(levels), "lorenz.png": plots.lorenz(levels)}
    pool = np.sort(np.asarray(tree.levels[0].members, np.int64))
    pictures["scatter.png"] = plots.scatter(*_in_two_dimensions(x, pool, chosen, seed))
    if by:
        counts = figures["by"]
        pictures["values.png"] = plots.values(by, counts["pool"], counts["sample"])
    if dedup is not None:
        figures["dedup"] = read_json(dedup / "report.json")
        figures["warnings"] += figures["dedup"].get("warnings", [])
        pictures |= _dedup_figures(dedup)
    shown: list[Gallery] = []
    if groups:
        shown = _gallery(x, tree, chosen, dedup, groups, images, seed)
    for file, picture in pictures.items():
        write_file(folder / file, lambda stream, picture=picture: stream.write(picture))
    write_text(folder / "report.html", page.page(name, figures, pictures, shown))
    write_json(folder / "report.json", figures)
    return figures


def measure(
    x: EmbeddingSet,
    tree: ClusterTree,
    samples: str | Path,
    *,
    multiplier: int = 1,
    by: str = "",
    warn_imbalance: float = 20.0,
) -> tuple[dict[str, Any], list[LevelCounts]]:
    """What report.json says of a sample, and the counts behind its figures."""
    table = pq.read_table(samples, columns=["embedding_row", "count"])
    rows, times = table["embedding_row"].to_numpy(), table["count"].to_numpy()
    levels = [_level_counts(tree, level, rows, times) for level in range(1, tree.depth + 1)]
    warnings = [
        sentence
        for level in levels
        for sentence in balance_warnings(level.pool, f"level {level.level}", warn_imbalance)
    ]
    figures: dict[str, Any] = {
        "set": x.n_total,
        "pool": len(tree),
        "images": int(times.sum()),
        "distinct": len(rows),
        "repeats": int((times - 1).sum()),
        "warnings": warnings,
        "levels": [_level_figures(tree, level, multiplier) for level in levels],
    }
    top = np.asarray(tree.levels[-1].centroids)
    if top.shape[1] == 2:
        figures["kl_from_uniform"] = kl_from_uniform(top)
    if by:
        figures["by"] = _by_column(x, tree, by, rows, times)
    return figures, levels


def _level_counts(
    tree: ClusterTree, level: int, rows: Int64[np.ndarray, " n"], times: Int[np.ndarray, " n"]
) -> LevelCounts:
    pool = tree.leaf_counts(level)
    cluster = tree.cluster_of(rows, level)
    inside = cluster >= 0
    chosen = np.bincount(cluster[inside], times[inside], len(pool)).astype(np.int64)
    return LevelCounts(level, pool, chosen)


def _level_figures(tree: ClusterTree, counts: LevelCounts, multiplier: int) -> dict[str, Any]:
    level = tree.levels[counts.level - 1]
    capacity = counts.pool * multiplier
    exhausted = (counts.chosen >= capacity) & (capacity > 0)
    return {
        "level": counts.level,
        "members": balance_metrics(level.sizes()),
        "pool": balance_metrics(counts.pool),
        "sample": balance_metrics(counts.chosen),
        "touched": int((counts.chosen > 0).sum()),
        "exhausted": int(exhausted.sum()),
        "cut": _cuts(tree, counts, exhausted),
    }


def _cuts(tree: ClusterTree, counts: LevelCounts, exhausted: np.ndarray) -> dict[str, int] | None:
    """Smallest, median and largest cut of a level's sibling groups; None: every one gave all.

    A cut is what clusters give that could give more, the remainder aside: the least of these.
    """
    above = counts.level < tree.depth
    parent = np.asarray(tree.levels[counts.level].parent) if above else np.zeros_like(counts.pool)
    open_ = ~exhausted & (counts.pool > 0)
    if not open_.any():
        return None
    cuts = np.full(int(parent.max()) + 1, np.iinfo(np.int64).max)
    np.minimum.at(cuts, parent[open_], counts.chosen[open_])
    cuts = cuts[cuts < np.iinfo(np.int64).max]
    return {"min": int(cuts.min()), "median": int(np.median(cuts)), "max": int(cuts.max())}


# ---- by column -----------------------------------------------------------------------------------


def _by_column(
    x: EmbeddingSet,
    tree: ClusterTree,
    by: str,
    rows: Int64[np.ndarray, " n"],
    times: Int[np.ndarray, " n"],
) -> dict[str, Any]:
    """Images of each value in the whole set, in the pool and in the sample, and their entropies."""
    pool = np.sort(np.asarray(tree.levels[0].members, np.int64))
    everything = np.arange(x.n_total)
    counts = {
        "set": _count(x, by, everything, np.ones(x.n_total, np.int64)),
        "pool": _count(x, by, pool, np.ones(len(pool), np.int64)),
        "sample": _count(x, by, rows, times),
    }
    values = len(counts["set"])
    measured = {name: _entropy(found, values) for name, found in counts.items()}
    before = measured["pool"]["entropy"]
    ratio = measured["sample"]["entropy"] / before if before else None
    return {"column": by, "values": values, "entropy_ratio": ratio, "balance": measured, **counts}


def _count(
    x: EmbeddingSet, by: str, rows: Int[np.ndarray, " n"], times: Int[np.ndarray, " n"]
) -> dict[str, int]:
    """Images of each value, largest first; classes by name."""
    found: dict[str, int] = {}
    for first in range(0, len(rows), BLOCK):
        here = slice(first, first + BLOCK)
        column = x.metadata(rows[here], [by])[by].combine_chunks()
        for value, count in value_counts(column, times[here]).items():
            found[value] = found.get(value, 0) + count
    classes = images_of(x).classes if by == "label" else None
    if classes:
        found = {
            classes[int(value)] if value.isdecimal() and int(value) < len(classes) else value: count
            for value, count in found.items()
        }
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def _entropy(counts: Mapping[str, int], values: int) -> dict[str, float]:
    """Over ln(values): 1 if all are equally frequent; and how many equal ones it amounts to."""
    share = np.array([count for count in counts.values() if count]) / sum(counts.values())
    entropy = float(-(share * np.log(share)).sum())
    normalised = entropy / np.log(values) if values > 1 else 1.0
    return {
        "entropy": float(normalised),
        "effective": float(np.exp(entropy)),
        "values": len(share),
    }


# ---- figures -------------------------------------------------------------------------------------


def _in_two_dimensions(
    x: EmbeddingSet, pool: Int64[np.ndarray, " n"], chosen: Int64[np.ndarray, " m"], seed: int
) -> tuple[Float[np.ndarray, "p 2"], Float[np.ndarray, "q 2"], str]:
    """Some rows of the pool and of the sample along the pool's first two principal directions."""
    draw = np.random.default_rng(seed)
    fitted = x.take(_some(draw, pool, FITTED))
    shown = [x.take(_some(draw, rows, SHOWN)) for rows in (pool, chosen)]
    if x.dim == 2:
        return shown[0], shown[1], ""
    mean = fitted.mean(axis=0)
    values, vectors = np.linalg.eigh(
        np.cov((fitted - mean).T.astype(np.float64)).reshape(x.dim, -1)
    )
    axes = vectors[:, ::-1][:, :2]
    axes = np.pad(axes, ((0, 0), (0, 2 - axes.shape[1])))  # of one dimension
    part = values[::-1][:2].sum() / max(values.sum(), 1e-30)
    points = [((vectors - mean) @ axes).astype(np.float32) for vectors in shown]
    return points[0], points[1], f"two principal directions ({part:.0%} of the variance)"


def _some(
    draw: np.random.Generator, rows: Int64[np.ndarray, " n"], count: int
) -> Int64[np.ndarray, " m"]:
    return np.sort(draw.choice(rows, count, replace=False)) if len(rows) > count else rows


def _components(folder: Path) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """Rows that deduplication looked at, and the component of each."""
    components = np.load(folder / "components.npy", mmap_mode="r")
    rows = np.flatnonzero(components >= 0)
    return rows, components[rows]


def _dedup_figures(folder: Path) -> dict[str, bytes]:
    """Similarities of the pairs and sizes of the components that the stage left in its folder."""
    pictures = {}
    sizes = np.unique(_components(folder)[1], return_counts=True)[1]
    if (sizes > 1).any():
        pictures["components.png"] = plots.components(sizes)
    threshold = float(read_json(folder / "report.json")["threshold"])
    edges = np.linspace(threshold, max(1.0, threshold + 1e-3), BINS + 1)
    counts = np.zeros(BINS, np.int64)
    for file in sorted((folder / "edges").glob("*.parquet")):
        for batch in pq.ParquetFile(file).iter_batches(columns=["sim"]):
            sims = np.clip(batch.column("sim").to_numpy(), edges[0], edges[-1])  # 1 + rounding
            counts += np.histogram(sims, edges)[0]
    if counts.any():
        pictures["similarities.png"] = plots.similarities(counts, edges, threshold)
    return pictures


def _gallery(
    x: EmbeddingSet,
    tree: ClusterTree,
    chosen: Int64[np.ndarray, " m"],
    dedup: Path | None,
    count: int,
    images: str,
    seed: int,
) -> list[Gallery]:
    """Pictures of clusters, and of near-duplicates where they were looked for."""
    spec = images or images_of(x).source
    if not spec:
        raise ValueError(
            f"report.gallery is {count}, but {x.where} does not say which images its rows are; "
            "set images=SPEC, or report.gallery=0"
        )
    source = open_source(spec)
    told = "Images of the sample are framed."
    shown = [
        ("Clusters", f"Nearest to the centroid first. {told}", cluster_groups(tree, count, seed))
    ]
    if dedup is not None:
        near = component_groups(*_components(dedup), count, seed)
        shown.append(("Near-duplicates that were joined", f"One of each was kept. {told}", near))
    return [
        (heading, note, [(group.title, _picture(x, source, group, chosen)) for group in groups])
        for heading, note, groups in shown
        if groups
    ]


def _picture(
    x: EmbeddingSet, source: Source, group: Group, chosen: Int64[np.ndarray, " m"]
) -> bytes:
    numbers = group.rows
    if "row" in x.columns:
        numbers = x.metadata(group.rows, ["row"])["row"].to_numpy()
    return sheet(source, numbers.tolist(), np.isin(group.rows, chosen))
