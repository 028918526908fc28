"""The stages of a curation: which config keys they follow, what they read and write (spec 2).

What they do is in `tasks.py` and `outputs.py`; `run.py` does them in order and skips what is done.
Called by `__main__.py`.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from data_curation import outputs, points, tasks
from data_curation.chosen import images_of
from data_curation.embeddings import open_embeddings
from data_curation.files import sha256
from data_curation.plan import Data
from data_curation.run import Stage
from dinojax import sharding

REPORTS = ("report.json", "report.html")


def stages(config: ConfigDict, verb: str = "run") -> list[Stage]:
    """The stages that a config, or a verb, asks for, in order.

    Raises:
      ValueError: embeddings or a list that cannot be read, more clusters than rows, ...
    """
    found = [*_until_pool(config)]
    pool = found[-1].name
    if config.cluster.levels:
        folders = (f"level{number + 1}" for number in range(len(config.cluster.levels)))
        writes = (*folders, "tree.json", "cluster.json")
        keys = ("cluster", "normalize", "center", "seed")
        found.append(Stage("cluster", keys, (pool,), writes, tasks.cluster, together=True))
    shared = ("seed", "carry_columns", "images")
    for index, one in enumerate(config.sample):
        keys, writes = (f"sample[{index}]", *shared), (f"samples/{one.name}",)
        work = partial(outputs.sample, one=one)
        found.append(Stage(f"sample/{one.name}", keys, ("cluster",), writes, work))
    for index, one in enumerate(config.retrieve):
        keys, writes = (f"retrieve[{index}]", *shared), (f"retrieval/{one.name}",)
        reads = (pool, "cluster") if one.mode == "cluster" and one.level else (pool,)
        inputs = {"embeddings": open_embeddings(one.embeddings).digest()}
        work = partial(outputs.retrieve, one=one)
        found.append(Stage(f"retrieve/{one.name}", keys, reads, writes, work, inputs))
    chosen = tuple(stage.name for stage in found if stage.verb in ("sample", "retrieve"))
    if config.mix.components or chosen and images(config):
        found.append(Stage("mix", ("mix",), chosen, ("mixture.json",), outputs.mix, renews=True))
    if chosen:
        writes = [f"samples/{one.name}/{file}" for one in config.sample for file in REPORTS]
        writes += [outputs.OVERLAP] if config.retrieve else []
        keys = ("report", "images")
        found.append(Stage("report", keys, chosen, tuple(writes), outputs.report, renews=True))
    if chosen and (config.export.format or config.export.exclude or verb == "export"):
        found.append(Stage("export", ("export",), chosen, ("export",), outputs.export, renews=True))
    return found


def _until_pool(config: ConfigDict) -> Iterator[Stage]:
    """Embed, index and dedup: which rows there are."""
    before: tuple[str, ...] = ()
    outside: dict[str, str] = {}
    if config.embed.source:
        yield _embed(config)
        before = ("embed",)
    elif not config.embeddings:
        raise ValueError("embeddings is ''; give embeddings=DIR (or a .npy file), what to curate")
    else:
        outside = {"embeddings": open_embeddings(config.embeddings).digest()}
        tasks.check_sizes(config, size(config).rows)
    keys = ("index", "normalize", "dedup.method")
    writes = ("subset.npy", "bad_rows.parquet", "filters.json")
    yield Stage("index", keys, before, writes, tasks.index, outside | _opt_out(config))
    if config.dedup.method != "none":
        paths = config.dedup.references
        inputs = {f"dedup.references {path}": open_embeddings(path).digest() for path in paths}
        yield Stage("dedup", ("dedup", "seed"), ("index",), ("dedup",), tasks.dedup, inputs)


def images(config: ConfigDict) -> str:
    """The SPEC that rows are numbers of; "" where they are of no images."""
    if config.images or not config.embeddings:
        drawn = points.sizes(config.embed.source)
        return config.images or ("" if drawn else config.embed.source)
    return images_of(open_embeddings(config.embeddings)).source


def size(config: ConfigDict) -> Data:
    """Rows and dimensions of what will be curated, from heads of files or from `plan`.

    Raises:
      ValueError: nothing says how many there are.
    """
    wanted, drawn = config.plan, points.sizes(config.embed.source)
    if wanted.rows and wanted.dim:
        return Data(wanted.rows, wanted.dim, np.dtype(config.embed.dtype).itemsize)
    if config.embeddings:
        x = open_embeddings(config.embeddings)
        return Data(len(x), x.dim, np.dtype(x.shards[0].dtype).itemsize)
    if drawn:
        return Data(*drawn, np.dtype(config.embed.dtype).itemsize)
    made = Path(config.workdir) / "embeddings" / "manifest.json"
    if made.exists():
        x = open_embeddings(str(made.parent))
        return Data(len(x), x.dim, np.dtype(x.shards[0].dtype).itemsize)
    raise ValueError(
        "the embeddings are not there yet, so their size is not known; give plan.rows=N plan.dim=D"
    )


def mesh(config: ConfigDict) -> Mesh | None:
    """All devices: rows over `data`, centroids over `tensor`; None where there is only one."""
    if jax.device_count() == 1:
        return None
    return sharding.make_mesh(data=config.mesh.data, fsdp=1, tensor=config.mesh.tensor)


def _opt_out(config: ConfigDict) -> dict[str, str]:
    """Digest of the list of opt-outs, where there is one."""
    path = config.index.opt_out
    try:
        return {"index.opt_out": sha256(path)} if path else {}
    except OSError as error:
        raise ValueError(f"index.opt_out: {error}") from None


def _embed(config: ConfigDict) -> Stage:
    names = ("source", "weights", "tokens", "size", "limit", "dtype")
    keys, writes = tuple(f"embed.{name}" for name in names), ("embeddings",)
    if points.sizes(config.embed.source):
        return Stage("embed", (*keys, "seed"), (), writes, tasks.draw)
    if not config.embed.weights:
        raise ValueError(
            f"embed.source is {config.embed.source!r} and embed.weights is ''; give the backbone, "
            "such as embed.weights=runs/demo"
        )
    return Stage("embed", keys, (), writes, tasks.features, together=True)
