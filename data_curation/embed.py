"""Images -> an embedding set, by a dinojax backbone. Called by the stage `embed`.

The work is `dinojax.features`, which `dinojax features` calls too: shards that are done stay, and
`row` leads back to the image. What is embedded here is a pool, a seed set or an evaluation set.
"""

from collections.abc import Callable
from pathlib import Path

from data_curation.files import Stopped
from dinojax import backbone
from dinojax.data.sources import open_source
from dinojax.features import SHARD_ROWS, Recipe, Summary, write_features


def embed(
    source: str,
    weights: str,
    folder: str | Path,
    *,
    tokens: str = "cls",
    size: int = 224,
    dtype: str = "float16",
    batch: int = 64,
    limit: int = 0,
    shard_rows: int = SHARD_ROWS,
    threads: int = 8,
    part: tuple[int, int] = (0, 1),
    stop: Callable[[], bool] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Writes the embedding set of all images of a SPEC (or of `limit`, evenly spread; 0: all).

    Arguments as of `dinojax.features.write_features`. `progress` is called with (done, total).

    Raises:
      ValueError: the source, the weights or the folder cannot be used.
      Stopped: `stop()` was true; finished shards are kept.
    """
    recipe = Recipe(tokens, size, dtype)
    if not weights:
        raise ValueError("embed.weights is ''; expected a run directory or a weights file")
    images, network = open_source(source), backbone.load(weights)

    def told(done: int, total: int) -> None:
        if progress is not None:
            progress(done, total)
        if stop is not None and stop():
            raise Stopped(f"{done:,} of {total:,} images are embedded")

    return write_features(
        network,
        images,
        folder,
        recipe,
        spec=source,
        weights=weights,
        batch=batch,
        limit=limit or None,
        shard_rows=shard_rows,
        threads=threads,
        part=part,
        progress=told,
    )
