"""What the stages after the tree do: samples, rows like seed sets, and what is made of them.

As in `tasks.py`, each takes the `Work` and returns what run.json keeps. Listed in `stages.py`.
"""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Int64
from ml_collections import ConfigDict

from data_curation import chosen, filters, provenance
from data_curation import export as exports
from data_curation.embeddings import EmbeddingSet, open_embeddings
from data_curation.files import write_json
from data_curation.kmeans import assign, kmeans
from data_curation.mixture import Part, write_mixture
from data_curation.retrieve import overlap, retrieve_clusters, retrieve_samples
from data_curation.run import Work, read_record
from data_curation.sample import flat_sample, hierarchical_sample
from data_curation.tasks import Facts, pool, whole
from data_curation.tree import ClusterTree

RETRIEVED, OVERLAP = "retrieved.parquet", "retrieval/overlap.json"
KMEANS = ("retrieval", ".kmeans")  # checkpoints of a seed set's own clusters, while they are made
PLUSPLUS_UP_TO = 50_000  # clusters; above, k-means++ takes too many rounds (spec 4)


def sample(work: Work, one: ConfigDict) -> Facts:
    """One sample of the tree: samples/NAME."""
    tree = ClusterTree.load(work.folder)
    rows, distinct = write_sample(work, one, tree, work.path("samples", one.name))
    write_provenance(work, "sample", one.name, len(tree), rows)
    return {"rows_in": len(tree), "rows": rows, "distinct": distinct}


def write_sample(work: Work, one: ConfigDict, tree: ClusterTree, folder: Path) -> tuple[int, int]:
    """Draws a sample from a tree and writes it; how many rows, and how many distinct ones."""
    rows = draw_sample(tree, one, work.config.seed)
    options = {"images": work.config.images, "carry": work.config.carry_columns}
    distinct = chosen.write_chosen(folder, whole(work), rows, part=one.name, tree=tree, **options)
    return len(rows), distinct


def draw_sample(tree: ClusterTree, one: ConfigDict, seed: int) -> Int64[np.ndarray, " t"]:
    """The rows of a sample."""
    how = {"multiplier": one.multiplier, "order": one.order, "nested": one.nested, "seed": seed}
    if one.flat_level:
        return flat_sample(tree, one.flat_level, one.target, **how)
    return hierarchical_sample(tree, one.target, strategy=one.strategy, **how)


def retrieve(work: Work, one: ConfigDict) -> Facts:
    """Rows like those of a seed set: retrieval/NAME."""
    x, queries = pool(work), open_embeddings(one.embeddings)
    told = {"seed_set": one.name, "mode": one.mode}
    if one.mode == "sample":
        shared = {"mesh": work.local_mesh(), "seed": work.config.seed, "stop": work.stop}
        found = retrieve_samples(x, queries, one.n, one.collisions, max_rank=one.max_rank, **shared)
        rows, report = np.repeat(found.rows, found.count), found.report
        extra = {"query_id": queries.ids(found.query), "sim": pa.array(found.sim)}
    else:
        pool_assign, query_assign = _assigned(work, one, x, queries)
        limits = (one.per_cluster, one.min_queries, one.cap)
        found = retrieve_clusters(pool_assign, query_assign, *limits, work.config.seed)
        rows, report = found.rows, found.report
        extra = {"cluster": pa.array(found.cluster)}
    if not len(rows):
        raise ValueError(
            f"seed set {one.name!r} finds no row: no cluster holds more than {one.min_queries} of "
            f"its {len(queries)} rows; lower min_queries, or take mode='sample'"
        )
    count = len(np.unique(rows))
    extra |= {name: pa.array([text] * count).dictionary_encode() for name, text in told.items()}
    folder = work.path("retrieval", one.name)
    options = {"images": work.config.images, "carry": work.config.carry_columns}
    chosen.write_chosen(folder, whole(work), rows, part=one.name, extra=extra, **options)
    (folder / chosen.SAMPLES).replace(folder / RETRIEVED)
    write_json(folder / "report.json", report)
    shutil.rmtree(work.path(*KMEANS, one.name), ignore_errors=True)
    write_provenance(work, "retrieve", one.name, len(x), len(rows))
    return {"rows_in": len(x), "rows": len(rows), "distinct": count}


def _assigned(
    work: Work, one: ConfigDict, x: EmbeddingSet, queries: EmbeddingSet
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " q"]]:
    """Cluster of every row of the full set (-1: not in the pool) and of every query."""
    config = work.config
    x = x.prepared(config.normalize, config.center and config.cluster.metric == "l2")
    queries = queries.prepared(config.normalize, mean=x.mean)
    how = {"metric": config.cluster.metric, "mesh": work.local_mesh()}
    if one.level:
        tree = ClusterTree.load(work.folder)
        lowest = assign(queries, np.asarray(tree.levels[0].centroids), **how)[0]
        found = lowest.astype(np.int64)
        for above in tree.levels[1 : one.level]:
            found = above.parent[found].astype(np.int64)
        return tree.cluster_of(np.arange(x.n_total), one.level), found
    k = min(one.clusters, len(x))
    made = kmeans(
        x,
        k,
        init="kmeans++" if k <= PLUSPLUS_UP_TO else "kmeans||",
        n_iters=config.cluster.n_iters,
        empty="split",
        seed=config.seed,
        # Checkpoints are for all processes together; this is done by the first one alone.
        checkpoint=work.path(*KMEANS, one.name) if work.team.count == 1 else None,
        stop=work.stop,
        **how,
    )
    clusters = np.full(x.n_total, -1)
    clusters[x.row_of(np.arange(len(x)))] = np.asarray(made.assignment)
    return clusters, np.asarray(assign(queries, made.centroids, **how)[0], np.int64)


# ---- what becomes of them -----------------------------------------------------------------------


def mix(work: Work) -> Facts:
    """mixture.json."""
    config = work.config
    names = {one.name: "samples" for one in config.sample}
    names |= {one.name: "retrieval" for one in config.retrieve}
    parts = [
        Part(
            part.name,
            part.samples or str(_listed(work, names[part.name], part.name)),
            None if part.weight == -1 else part.weight,
            part.homogeneous,
        )
        for part in config.mix.components
    ]
    if not parts:
        parts = [Part(name, str(_listed(work, kind, name))) for name, kind in names.items()]
    path = work.path("mixture.json")
    return write_mixture(path, parts, seed=config.mix.seed, once=config.mix.once)


def _listed(work: Work, kind: str, name: str) -> Path:
    """The table of a sample or a seed set."""
    return work.path(kind, name, RETRIEVED if kind == "retrieval" else chosen.SAMPLES)


def report(work: Work) -> Facts:
    """report.json, report.html and figures of every sample, beside it."""
    from data_curation.report import write_report  # draws: matplotlib

    config, warnings, x = work.config, set(), whole(work)
    tree = ClusterTree.load(work.folder) if config.sample else None
    for one in config.sample:
        figures = write_report(
            work.path("samples", one.name),
            x,
            tree,
            name=one.name,
            multiplier=one.multiplier,
            dedup=work.path("dedup") if config.dedup.method == "components" else None,
            by=config.report.by,
            groups=config.report.gallery,
            images=config.images,
            warn_imbalance=config.report.warn_imbalance,
            seed=config.seed,
        )
        warnings |= {*figures["warnings"]}
    sets = {
        one.name: np.load(work.path("retrieval", one.name, chosen.ROWS)) for one in config.retrieve
    }
    if sets:
        write_json(work.path(OVERLAP), overlap(sets))
    for sentence in sorted(warnings):
        work.say("report", f"warning: {sentence}")
    return {"reports": len(config.sample), "warnings": len(warnings)}


def export(work: Work) -> Facts:
    """export/NAME of every sample and seed set, without the rows that are excluded.

    Of a sample others are drawn in their place: the target is shared among what is left of the
    tree, which needs no clustering (spec 13).
    """
    config, left_out = work.config, {}
    options = {"opt_out": config.index.opt_out, "exclude": config.export.exclude}
    gone = np.empty(0, np.int64)
    if config.export.exclude:
        gone = filters.listed_rows(whole(work), filters.read_list(config.export.exclude))
    for kind, one in [
        *(("samples", one) for one in config.sample),
        *(("retrieval", one) for one in config.retrieve),
    ]:
        source, folder = _listed(work, kind, one.name), work.path("export", one.name)
        if len(gone) and kind == "samples":
            tree = ClusterTree.load(work.folder).without(gone)
            write_sample(work, one, tree, folder)
            source = folder / chosen.SAMPLES
        form = config.export.format or "parquet"
        _, out = exports.export(source, folder, form, **options)
        left_out[one.name] = out
    return {"excluded": len(gone), **left_out}


def write_provenance(work: Work, verb: str, name: str, rows_in: int, rows: int) -> None:
    """provenance.json of a folder of chosen rows: all that happened before, and this."""
    entries = read_record(work.folder)["stages"]
    made = {
        stage: (entry["fields"], entry["facts"], entry["seconds"])
        for stage, entry in entries.items()
        if entry["state"] == "done" and stage in ("embed", "index", "dedup", "cluster")
    }
    this = f"{verb}/{name}"
    made[this] = entries[this]["fields"], {"rows_in": rows_in, "rows": rows}, 0.0
    folder = work.path("samples" if verb == "sample" else "retrieval", name)
    provenance.write_provenance(
        folder,
        {"embeddings": provenance.input_facts(whole(work))},
        [
            provenance.StageRecord(
                stage,
                fields,
                work.config.seed,
                facts.get("rows_in", facts["rows"]),
                facts["rows"],
                seconds,
            )
            for stage, (fields, facts, seconds) in made.items()
        ],
        _listed(work, folder.parent.name, name),
    )
