"""Points drawn instead of embedded, to try a curation without images: `embed.source=rings`.

    rings              29,700 points of the plane on five rings, two of them rare (spec 15.8)
    normal:ROWSxDIM    standard normal, without any structure (spec 15.7)

Written as any other embedding set, with the ring as its label. Called by the stage `embed`.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from data_curation.embeddings import EmbeddingWriter
from data_curation.files import Stopped
from dinojax.data.options import nearest

SHARD_ROWS = 65_536
RADII = 0.7, 1.0  # of every ring, uniform in between
RINGS = (  # x and y of the centre, points
    (-2.2, 1.0, 20_000),
    (0.0, 1.0, 200),
    (2.2, 1.0, 1000),
    (-1.2, 0.2, 500),
    (1.2, 0.2, 8000),
)


def sizes(source: str) -> tuple[int, int] | None:
    """(rows, dim) of what `source` names; None if it names images.

    Raises:
      ValueError: normal:... without sizes.
    """
    kind, _, rest = source.partition(":")
    if source == "rings":
        return sum(count for _, _, count in RINGS), 2
    if kind != "normal":
        return None
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", rest)
    if not match:
        raise ValueError(f"embed.source is {source!r}; {nearest(rest, ['normal:100000x256'])}")
    return int(match[1]), int(match[2])


def write_points(
    source: str, folder: str | Path, dtype: str, seed: int, stop: Callable[[], bool]
) -> int:
    """Write the embedding set that `source` names; returns its rows. Shards that are there stay.

    Raises:
      Stopped: `stop()` was true between two shards.
    """
    rows, dim = sizes(source) or (0, 0)
    writer = EmbeddingWriter(str(folder), dim, dtype, about={"points": source, "seed": seed})
    firsts = range(0, rows, SHARD_ROWS)
    for number, (points, labels) in enumerate(_blocks(source, rows, dim, seed)):
        if stop():
            raise Stopped(f"{number} of {len(firsts)} shards are written")
        if writer.done(number):
            continue
        ids = pa.array(np.arange(len(points)) + firsts[number])
        table = pa.table({"id": ids} | ({} if labels is None else {"label": pa.array(labels)}))
        writer.write(number, points, table)
    writer.finish(len(firsts))
    return rows


def _blocks(
    source: str, rows: int, dim: int, seed: int
) -> Iterator[tuple[Float[np.ndarray, "n d"], Int[np.ndarray, " n"] | None]]:
    if source == "rings":
        yield draw_rings(seed)
        return
    for number, first in enumerate(range(0, rows, SHARD_ROWS)):
        draw = np.random.default_rng([seed, number])
        count = min(SHARD_ROWS, rows - first)
        yield draw.standard_normal((count, dim), np.float32), None


def draw_rings(seed: int) -> tuple[Float[np.ndarray, "n 2"], Int[np.ndarray, " n"]]:
    """Points and the ring of each, in an order that says nothing of it."""
    draw = np.random.default_rng(seed)
    ring = np.repeat(np.arange(len(RINGS)), [count for _, _, count in RINGS])
    radius, angle = draw.uniform(*RADII, len(ring)), draw.uniform(0, 2 * np.pi, len(ring))
    centres = np.array([centre for *centre, _ in RINGS])[ring]
    points = centres + radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    order = draw.permutation(len(ring))
    return points[order].astype(np.float32), ring[order]
