"""What the stages up to the tree do: fetch what earlier ones left, call the file that does it.

Each takes the `Work` and returns what run.json keeps: counts, `rows_in` and `rows` among them. Work
that was cut short goes on from what its own files hold. Listed in `stages.py`; what comes after the
tree is in `outputs.py`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from data_curation import filters, hierarchy, points
from data_curation.dedup import self_dedup
from data_curation.embeddings import EmbeddingSet, open_embeddings
from data_curation.relative import relative_dedup
from data_curation.run import Work
from data_curation.search import EXACT_BELOW
from data_curation.semdedup import semdedup

Facts = Mapping[str, Any]
RELATIVE = ("dedup", "relative")  # what comparing with evaluation sets leaves


def whole(work: Work) -> EmbeddingSet:
    """All embeddings, made by `embed` or elsewhere."""
    return open_embeddings(work.config.embeddings or str(work.path("embeddings")))


def usable(work: Work) -> EmbeddingSet:
    """Those that `index` left."""
    return whole(work).restrict(np.load(work.path("subset.npy")))


def pool(work: Work) -> EmbeddingSet:
    """Those that `dedup` left too, where it is asked for."""
    if work.config.dedup.method == "none":
        return usable(work)
    folder = RELATIVE if work.config.dedup.references else RELATIVE[:1]
    return whole(work).restrict(np.load(work.path(*folder, "kept.npy")))


def check_sizes(config: ConfigDict, rows: int) -> None:
    """Raise ValueError for more clusters than rows."""
    if config.cluster.levels and config.cluster.levels[0].k > rows:
        raise ValueError(
            f"cluster.levels[0].k is {config.cluster.levels[0].k}, and there are {rows} rows; "
            f"nearest: cluster.levels[0].k={rows}, useful: {max(1, rows // 20)} or less"
        )


# ---- until there is a pool ----------------------------------------------------------------------


def draw(work: Work) -> Facts:
    """Points in the place of embeddings."""
    embed, seed = work.config.embed, work.config.seed
    folder = work.path("embeddings")
    return {"rows": points.write_points(embed.source, folder, embed.dtype, seed, work.stop)}


def features(work: Work) -> Facts:
    """Images -> vectors; several processes share the shards."""
    from data_curation import embed

    options, team = work.config.embed.to_dict(), work.team
    made = embed.embed(
        options.pop("source"),
        options.pop("weights"),
        work.path("embeddings"),
        **options,
        part=(team.index, team.count),
        stop=work.stop,
    )
    return {"rows": made.rows, "left_out": made.left_out}


def index(work: Work) -> Facts:
    """Which rows may be used."""
    x, options, config = whole(work), work.config.index, work.config
    check_sizes(config, len(x))
    found = filters.usable_rows(
        x,
        opt_out=options.opt_out,
        allow=options.license_allow,
        deny=options.license_deny,
        unknown=options.license_unknown,
        # What has no direction can be neither normalised nor compared.
        zero_is_bad=config.normalize == "l2" or config.dedup.method != "none",
        max_bad_fraction=options.max_bad_fraction,
    )
    counts = filters.write_usable(work.folder, x, found)
    return {"rows_in": counts.pop("rows"), "rows": counts.pop("usable"), **counts}


def dedup(work: Work) -> Facts:
    """One row of each group of near-duplicates, none of those of evaluation sets."""
    options, x = work.config.dedup, usable(work)
    shared = {"mesh": work.local_mesh(), "seed": work.config.seed, "stop": work.stop}
    search = shared | {"log": work.log("dedup"), "max_component": options.max_component}
    search["index"] = options.index
    if options.index == "ivf" or options.index == "auto" and len(x) >= EXACT_BELOW:
        # Which rows inverted lists miss is measured; they need room for a sorted copy.
        search |= {"index": "ivf", "min_recall": options.min_recall, "scratch": work.path("dedup")}
    if options.method == "semdedup":
        how = {"directory": work.path("dedup"), **shared}
        kept = semdedup(x, options.clusters, options.eps, options.order, **how).kept
    else:
        kept = self_dedup(
            x,
            options.k,
            options.threshold,
            options.keep,
            priority=[tuple(column.rsplit(maxsplit=1)) for column in options.priority],
            directory=work.path("dedup"),
            **search,
        ).kept
    facts = {"rows_in": len(x), "duplicates": len(x) - len(kept)}
    if options.references:
        seen = relative_dedup(
            x.restrict(kept),
            {path: open_embeddings(path) for path in options.references},
            options.reference_k,
            options.reference_threshold,
            options.reference_mode,
            directory=work.path(*RELATIVE),
            **search,
        )
        facts["evaluation"] = len(kept) - len(seen.kept)
        kept = seen.kept
    if not len(kept):
        raise ValueError(
            "no row is left: all are in components of evaluation pictures; raise "
            "dedup.reference_threshold or take dedup.reference_mode=direct"
        )
    return {**facts, "rows": len(kept)}


# ---- clusters and samples -----------------------------------------------------------------------


def cluster(work: Work) -> Facts:
    """The tree; all processes share the rows."""
    config = work.config
    x = pool(work).prepared(config.normalize, config.center and config.cluster.metric == "l2")
    check_sizes(config, len(x))
    options = {key: value for key, value in config.cluster.items() if key != "levels"}
    tree = hierarchy.hierarchical_kmeans(
        x,
        [hierarchy.Level(**level) for level in config.cluster.levels],
        **options,
        seed=config.seed,
        warn_imbalance=config.report.warn_imbalance,
        mesh=work.mesh,
        directory=work.folder,
        stop=work.stop,
        log=work.log("cluster"),
    )
    counts = {f"level_{number}": len(level) for number, level in enumerate(tree.levels, 1)}
    return {"rows_in": len(x), "rows": len(tree), **counts}
