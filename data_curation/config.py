"""The keys of a curation: their defaults, their meaning, and the checks made before any work.

A file of `configs/` calls `base()` for the whole tree, changes values, and lists its levels with
`level()`, its samples with `sample()`, its seed sets with `seed_set()`. Nothing here imports jax,
so a config loads in milliseconds. Called by `configs/*`, `settings.py` and the stages.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from dinojax.data.options import nearest


def base() -> ConfigDict:
    """The whole tree with its defaults (spec 1-9)."""
    config = ConfigDict()
    config.workdir = ""  # everything that is written (spec 2)
    config.seed = 0
    config.embeddings = ""  # a set made elsewhere: folder, .npy or URL; "": embed makes one
    config.images = ""  # image SPEC that rows are numbers of; "": what the set itself says
    config.normalize = "none"  # none | l2, of rows before clustering
    config.center = (
        True  # subtract the pool's mean before clustering: same distances, less rounding
    )
    config.carry_columns = ()  # metadata that every output keeps, beside those of spec 13
    config.embed = ConfigDict(
        {
            "source": "",  # an image SPEC; or points: rings, normal:ROWSxDIM
            "weights": "",  # of a dinojax backbone: run directory, file or folder
            "tokens": "cls",  # cls | mean | cls+mean
            "size": 224,  # pixels
            "batch": 64,  # images at a time; neither this nor `threads` changes what is written
            "limit": 0,  # images, evenly spaced; 0: all
            "dtype": "float16",  # of the vectors on disk
        }
    )
    config.index = ConfigDict(
        {
            "max_bad_fraction": 1e-3,  # non-finite (or, to normalise, zero) rows; more: refused
            "opt_out": "",  # a file of ids, urls or sha256 to leave out, one a line
            "license_allow": (),  # only these; (): all
            "license_deny": (),
            "license_unknown": "keep",  # keep | drop
        }
    )
    config.dedup = ConfigDict(
        {
            "method": "components",  # components (DINOv2 A.3) | semdedup | none
            "k": 64,  # neighbours
            "threshold": 0.6,  # cosine above which two rows are one picture
            "keep": "first",  # first | priority | medoid, of a component
            "priority": (),  # ("width descending", "id ascending"), for keep=priority
            "index": "auto",  # exact | ivf (inverted lists) | auto: exact below 5 million rows
            "min_recall": 0.95,  # of ivf, measured; below: the stage fails
            "max_component": 10_000,  # rows; a larger component is warned of
            "references": (),  # embedding sets of evaluations, whose pictures must not remain
            "reference_k": 64,
            "reference_threshold": 0.45,
            "reference_mode": "component",  # component (whole components go) | direct
            "clusters": 0,  # semdedup: of its one k-means; 0: about 1,000 rows in each
            "eps": 0.05,  # semdedup: a row goes if an earlier one is nearer than this
            "order": "hard",  # semdedup: hard | easy | random
        }
    )
    config.cluster = ConfigDict(
        {
            "levels": (),  # level(...), lowest first
            "n_iters": 50,
            "resampling": "closest",  # closest | random
            "metric": "l2",  # l2 | spherical
            "empty": "split",  # keep | split | drop
            "init": "kmeans++",  # kmeans++ | kmeans|| (k above 50,000) | random
            "num_init": 1,
            "split_restarts": 10,  # of each k-means inside a cluster that is split
        }
    )
    config.sample = ()  # sample(...)
    config.retrieve = ()  # seed_set(...)
    config.mix = ConfigDict(
        {
            "seed": 65537,
            "components": (),  # component(...); (): every sample and every seed set
            "once": True,  # a row of several components comes in the first of them only
        }
    )
    config.report = ConfigDict(
        {
            "by": "",  # a column (label, source, ...) to count before and after
            "gallery": 0,  # clusters of which pictures are shown
            "warn_imbalance": 20.0,
        }
    )
    config.export = ConfigDict(
        {
            "format": "",  # parquet | txt | npy | arrayrecord-index; "": `run` exports nothing
            "exclude": "",  # a file of ids, urls or sha256 that must not leave; needs no clustering
        }
    )
    config.mesh = ConfigDict({"data": -1, "tensor": 1})  # devices that share rows; centroids
    config.budget = ConfigDict(
        {
            "host_memory": 0.0,  # GB of a host; 0: what this one has
            "device_memory": 0.0,  # GB of a device; 0: what it has, on CPU the host's
            "disk": 0.0,  # GB; 0: what is free in workdir
            "hours": 0.0,  # of the whole; 0: any
        }
    )
    config.plan = ConfigDict(
        {
            "rows": 0,  # of a set that is not there yet; 0: what it has
            "dim": 0,
            "hosts": 1,
            "devices": 0,  # 0: as many as there are
            "flops": 0.0,  # a second and device, as measured in float32; 0: measured here
            "read": 0.0,  # bytes a second and host from storage; 0: measured here
        }
    )
    return config


def level(k: int, n_samples: int = 1, n_resamples: int = 0, n_splits: int = 1) -> ConfigDict:
    """A level of the hierarchy (spec 5).

    Args:
      k: clusters; pre-clusters if it is split.
      n_samples: members of each cluster on which k-means runs again; about half the average.
      n_resamples: how often it does.
      n_splits: clusters that each pre-cluster is split into.
    """
    return ConfigDict(dict(k=k, n_samples=n_samples, n_resamples=n_resamples, n_splits=n_splits))


def sample(
    name: str,
    target: int,
    strategy: str = "r",
    multiplier: int = 1,
    order: str = "row",
    nested: bool = False,
    flat_level: int = 0,
) -> ConfigDict:
    """A sample of the tree (spec 6): `target` rows, written to samples/NAME.

    Args:
      strategy: r(andom), c(losest), f(arthest) inside a lowest cluster.
      multiplier: most times that one row is taken.
      order: row | tree | shuffled.
      nested: rows of a smaller target are among those of a larger.
      flat_level: balance over the clusters of this level only (a baseline); 0: over all.
    """
    return ConfigDict(
        {
            **dict(name=name, target=target, strategy=strategy, multiplier=multiplier),
            **dict(order=order, nested=nested, flat_level=flat_level),
        }
    )


def seed_set(
    name: str,
    embeddings: str,
    mode: str = "sample",
    n: int = 4,
    collisions: str = "merge",
    max_rank: int = 128,
    level: int = 0,
    clusters: int = 100_000,
    per_cluster: int = 10_000,
    min_queries: int = 3,
    cap: int = 1_000_000,
) -> ConfigDict:
    """Pool rows like those of a seed set (spec 8), written to retrieval/NAME.

    Args:
      embeddings: of the seed set, by the same backbone.
      mode: sample (`n` neighbours of each of its rows) or cluster (`per_cluster` rows of every
        cluster in which more than `min_queries` of its rows lie, `cap` in all).
      collisions: merge | fill (on to rank `max_rank`), for rows that several ask for.
      level: of the tree, for mode cluster; 0: a k-means of `clusters` of its own.
    """
    return ConfigDict(
        {
            **dict(name=name, embeddings=embeddings, mode=mode, n=n, collisions=collisions),
            **dict(max_rank=max_rank, level=level, clusters=clusters, per_cluster=per_cluster),
            **dict(min_queries=min_queries, cap=cap),
        }
    )


def component(
    name: str, samples: str = "", weight: float = -1.0, homogeneous: float = 0.0
) -> ConfigDict:
    """A part of the mixture (spec 9).

    Args:
      name: of a sample or a seed set of this config, or of `samples`.
      samples: a samples.parquet made elsewhere; "": by this config.
      weight: in mixed batches; -1: its size; 0: it is in none.
      homogeneous: probability of a batch of it alone.
    """
    return ConfigDict(dict(name=name, samples=samples, weight=weight, homogeneous=homogeneous))


# What the items of each tuple of ConfigDicts must look like.
ITEMS = {
    "cluster.levels": level(1),
    "sample": sample("", 1),
    "retrieve": seed_set("", ""),
    "mix.components": component(""),
}
CHOICES = {
    "normalize": ("none", "l2"),
    "embed.tokens": ("cls", "mean", "cls+mean"),
    "embed.dtype": ("float16", "float32"),
    "index.license_unknown": ("keep", "drop"),
    "dedup.method": ("components", "semdedup", "none"),
    "dedup.keep": ("first", "priority", "medoid"),
    "dedup.index": ("auto", "exact", "ivf"),
    "dedup.reference_mode": ("component", "direct"),
    "dedup.order": ("hard", "easy", "random"),
    "cluster.resampling": ("closest", "random"),
    "cluster.metric": ("l2", "spherical"),
    "cluster.empty": ("keep", "split", "drop"),
    "cluster.init": ("kmeans++", "kmeans||", "random"),
    "sample[].strategy": ("r", "c", "f"),
    "sample[].order": ("row", "tree", "shuffled"),
    "retrieve[].mode": ("sample", "cluster"),
    "retrieve[].collisions": ("merge", "fill"),
    "export.format": ("", "parquet", "txt", "npy", "arrayrecord-index"),
}
AT_LEAST = {
    **dict.fromkeys(("embed.size", "embed.batch", "dedup.k", "dedup.reference_k"), 1),
    **dict.fromkeys(("cluster.n_iters", "cluster.num_init", "cluster.levels[].k"), 1),
    **dict.fromkeys(("cluster.split_restarts", "retrieve[].max_rank"), 1),
    **dict.fromkeys(("cluster.levels[].n_samples", "cluster.levels[].n_splits"), 1),
    **dict.fromkeys(("sample[].multiplier", "retrieve[].n", "retrieve[].clusters"), 1),
    **dict.fromkeys(("seed", "mix.seed", "embed.limit", "dedup.clusters", "report.gallery"), 0),
    **dict.fromkeys(("cluster.levels[].n_resamples", "sample[].target", "plan.rows"), 0),
    **dict.fromkeys(("sample[].flat_level", "retrieve[].level", "retrieve[].min_queries"), 0),
    **dict.fromkeys(("retrieve[].per_cluster", "retrieve[].cap", "plan.hosts"), 1),
}


def validate(config: ConfigDict) -> None:
    """Raise ValueError with one sentence if a config cannot work, whatever the data is."""
    for key, known in CHOICES.items():
        for name, value in _values(config, key):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; {nearest(str(value), known)}")
    for key, least in AT_LEAST.items():
        for name, value in _values(config, key):
            if value < least:
                raise ValueError(f"{name} is {value}; expected {least} or more")
    for key in ("dedup.threshold", "dedup.reference_threshold", "dedup.eps"):
        ((name, value),) = _values(config, key)
        if not -1 <= value <= 2:
            raise ValueError(f"{name} is {value}; expected a cosine, such as 0.6")
    if config.embeddings and config.embed.source:
        raise ValueError(
            f"embeddings is {config.embeddings!r} and embed.source is {config.embed.source!r}; "
            "give one of them: embeddings that exist, or what to embed"
        )
    if not config.embeddings and not config.embed.source and not config.plan.rows:
        raise ValueError(
            "embeddings and embed.source are both ''; give embeddings=DIR (or a .npy file), or "
            "embed.source=folder:/images embed.weights=RUN"
        )
    for index, column in enumerate(config.dedup.priority):
        if column.split()[1:] not in (["ascending"], ["descending"]):
            raise ValueError(
                f"dedup.priority[{index}] is {column!r}; expected a column and its order, such as "
                "'width descending'"
            )
    _validate_names(config)
    _validate_levels(config)


def _validate_names(config: ConfigDict) -> None:
    """Samples and seed sets become folders, so each has its own plain name."""
    made: list[str] = []
    for key in ("sample", "retrieve"):
        for index, item in enumerate(config[key]):
            if not re.fullmatch(r"[A-Za-z0-9_][\w.-]*", item.name):
                raise ValueError(
                    f"{key}[{index}].name is {item.name!r}; expected letters, digits, '_', '-', '.'"
                )
            if item.name in made:
                raise ValueError(f"{key}[{index}].name is {item.name!r}, which has been given")
            made.append(item.name)
    for index, part in enumerate(config.mix.components):
        if not part.samples and part.name not in made:
            hint = nearest(part.name, made) if made else "there is none."
            raise ValueError(
                f"mix.components[{index}].name is {part.name!r}, no sample or seed set; {hint}"
            )


def _validate_levels(config: ConfigDict) -> None:
    levels = config.cluster.levels
    for index, (below, above) in enumerate(zip(levels, levels[1:]), 1):
        most = below.k * below.n_splits
        if above.k * above.n_splits > most:
            raise ValueError(
                f"cluster.levels[{index}] has {above.k * above.n_splits} clusters of the {most} "
                f"centroids below; nearest: cluster.levels[{index}].k={max(1, most // 4)}"
            )
    for index, one in enumerate(levels):
        if one.n_splits > 1 and one.n_resamples:
            raise ValueError(
                f"cluster.levels[{index}] is split and resampled; a split level takes no "
                f"resampling: cluster.levels[{index}].n_resamples=0"
            )
        if one.n_resamples and one.n_samples == 1:
            raise ValueError(
                f"cluster.levels[{index}] is resampled from one row a cluster; expected n_samples "
                "of 2 or more, or n_resamples=0"
            )
    for index, item in enumerate(config.sample):
        if not levels:
            raise ValueError(
                f"sample[{index}] ({item.name}) needs a tree, but cluster.levels is empty; give "
                "levels such as cluster.levels=(level(1000, 15, 10), level(300, 2, 10))"
            )
        if item.flat_level > len(levels):
            raise ValueError(
                f"sample[{index}].flat_level is {item.flat_level}; there are {len(levels)} levels"
            )
    for index, item in enumerate(config.retrieve):
        if item.mode == "cluster" and item.level > len(levels):
            raise ValueError(
                f"retrieve[{index}].level is {item.level}; there are {len(levels)} levels"
            )


def _values(config: ConfigDict, key: str) -> Iterator[tuple[str, Any]]:
    """(name, value) of a key; of every item where the key says `[]`."""
    above, item, below = key.partition("[].")
    if not item:
        yield key, get(config, key)
        return
    for index, part in enumerate(get(config, above)):
        yield f"{above}[{index}].{below}", part[below]


def get(config: ConfigDict, key: str) -> Any:
    """config.dedup.k of "dedup.k"."""
    for word in key.split("."):
        config = config[word]
    return config


def flatten(config: ConfigDict) -> dict[str, Any]:
    """{"cluster.levels[0].k": 1000, ...} in a stable order; tuples of numbers stay whole."""
    return dict(_leaves("", config))


def _leaves(prefix: str, node: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(node, ConfigDict):
        for key in sorted(node):
            yield from _leaves(f"{prefix}.{key}" if prefix else key, node[key])
    elif isinstance(node, tuple) and node and isinstance(node[0], ConfigDict):
        for index, item in enumerate(node):
            yield from _leaves(f"{prefix}[{index}]", item)
    else:
        yield prefix, node


def plain(config: ConfigDict) -> dict[str, Any]:
    """The tree as JSON holds it."""
    return json.loads(json.dumps(_plain(config)))


def _plain(node: Any) -> Any:
    if isinstance(node, ConfigDict | Mapping):
        return {key: _plain(node[key]) for key in sorted(node)}
    if isinstance(node, tuple | list):
        return [_plain(item) for item in node]
    return node
