"""What a source holds, in figures: from the counts of `data.survey` to the values of report.json.

`data.advice` puts them into words. Called by `dinojax data SPEC`.
"""

import math
from fractions import Fraction
from typing import Any

import numpy as np
from jaxtyping import Int, Int64, Shaped

from dinojax.data.sources import Source
from dinojax.data.survey import Tally
from dinojax.data.tfds import TfdsSource

PERCENTILES = (0.1, 99.9)
EXAMPLES = 10  # groups of duplicates, and unreadable images, that a report names
BINS = 24  # of a histogram
DARK = 64  # levels: images that stay below this could be brought out better by a range


def summarise(source: Source, tally: Tally, spec: str) -> dict[str, Any]:
    """The values of report.json; plain numbers, strings, lists and dicts.

    Sizes, pixels and duplicates are those of the readable images that were looked at; the labels
    are those of the whole source (of a `tfds` one, of the images that were looked at).
    """
    rows = tally.rows[: tally.done]
    good = rows[rows["height"] > 0]
    read = int(rows["bytes"].sum())
    height, width = good["height"], good["width"]
    labels = _labels(source, tally)
    return {
        "spec": spec,
        "images": len(source),
        "looked_at": tally.done,
        "readable": len(good),
        "formats": dict(tally.formats.most_common()),
        "stored": dict(tally.stored.most_common()),
        "bands": {str(bands): images for bands, images in tally.bands.most_common()},
        "bytes": _spread(good["bytes"]) | {"total": read} | _histogram(good["bytes"]),
        "height": _spread(height),
        "width": _spread(width),
        "shorter_side": _spread(np.minimum(height, width)) | _histogram(np.minimum(height, width)),
        "aspect": _spread(width / height) | _histogram(width / height),
        **_pixels(tally),
        "range": _range(tally),
        "duplicates": _duplicates(source, tally),
        "unreadable": {
            "images": tally.unreadable,
            "examples": [{"name": n, "reason": r} for n, r in tally.problems[:EXAMPLES]],
        },
        "labels": None if labels is None else balance(labels, source.classes),
        "seconds": tally.seconds,
        "images_per_second": tally.done / max(tally.seconds, 1e-9),
        "bytes_per_second": read / max(tally.seconds, 1e-9),
    }


def moments(levels: Int64[np.ndarray, "c 256"]) -> tuple[list[float], list[float]]:
    """Mean and deviation of each band, of pixels in 0..1; exact until the last rounding."""
    means, deviations = [], []
    for band in levels.tolist():  # Python's integers do not overflow
        n = sum(band)
        first = sum(level * k for level, k in enumerate(band))
        second = sum(level * level * k for level, k in enumerate(band))
        means.append(float(Fraction(first, 255 * n)))
        deviations.append(math.sqrt(Fraction(n * second - first * first, (255 * n) ** 2)))
    return means, deviations


def _pixels(tally: Tally) -> dict[str, Any]:
    """Mean and deviation of the images that have as many bands as most of them."""
    if not tally.bands:
        return {"channels": None, "pixels": 0, "mean": None, "std": None}
    bands = tally.bands.most_common(1)[0][0]
    mean, std = moments(tally.levels[bands])
    return {
        "channels": bands,
        "pixels": int(tally.levels[bands][0].sum()),
        "mean": mean,
        "std": std,
    }


def _range(tally: Tally) -> dict[str, Any] | None:
    """0.1st to 99.9th percentile of each band as stored, and the option `range=` that says so.

    None where a range is given already, or all is stored in 8 bits and up to four bands. `needed`:
    without it most images cannot be read, or use less than a quarter of the 256 levels.
    """
    if not tally.values:
        return None
    lows, highs = [], []
    for band in np.concatenate(max(tally.values.values(), key=len)).T:
        finite = band[np.isfinite(band)]
        low, high = np.percentile(finite, PERCENTILES).tolist() if finite.size else (0.0, 1.0)
        lows.append(low)
        highs.append(high if high > low else low + 1)
    return {
        "low": lows,
        "high": highs,
        "option": f"range={','.join(f'{low:.6g}:{high:.6g}' for low, high in zip(lows, highs))}",
        "needed": tally.unreadable > tally.done / 2 or _brightest(tally) < DARK,
    }


def _brightest(tally: Tally) -> int:
    """The level that 99.9 % of the pixels do not exceed, of the band where it is highest."""
    levels = tally.levels[tally.bands.most_common(1)[0][0]]
    below = levels.cumsum(1) < 0.999 * levels.sum(1, keepdims=True)
    return int(below.sum(1).max())


def _spread(values: Shaped[np.ndarray, " n"]) -> dict[str, int | float | None]:
    if not len(values):
        return {"min": None, "median": None, "max": None}
    low, middle, high = values.min(), np.median(values), values.max()
    return {"min": low.item(), "median": middle.item(), "max": high.item()}


def _histogram(values: Shaped[np.ndarray, " n"]) -> dict[str, dict[str, list]]:
    """Counts between edges that grow by equal factors: 2:1 and 1:2 are equally far from square."""
    if not len(values):
        return {"histogram": {"edges": [], "counts": []}}
    low, high = float(values.min()), float(values.max())
    edges = np.geomspace(low, high, BINS + 1) if low < high else np.array([low, high])
    edges[0], edges[-1] = low, high  # not a rounding error inside, where the extremes would be lost
    counts = np.histogram(values, edges)[0] if low < high else np.array([len(values)])
    return {"histogram": {"edges": edges.tolist(), "counts": counts.tolist()}}


def _duplicates(source: Source, tally: Tally) -> dict[str, Any]:
    """Readable images whose encoded bytes are those of another one, by 64-bit digests."""
    readable = np.flatnonzero(tally.rows["height"][: tally.done] > 0)
    digests = tally.rows["digest"][readable]
    order = np.argsort(digests, kind="stable")
    new = np.append(True, digests[order][1:] != digests[order][:-1])
    starts = np.flatnonzero(new)
    sizes = np.diff(np.append(starts, len(order)))
    groups = np.flatnonzero(sizes > 1)
    # The first in the source's order first.
    groups = groups[np.argsort(readable[order[starts[groups]]], kind="stable")]
    examples = [
        [source.name(int(tally.chosen[readable[k]])) for k in order[s : s + min(size, EXAMPLES)]]
        for s, size in zip(starts[groups[:EXAMPLES]], sizes[groups[:EXAMPLES]])
    ]
    copies = int(sizes[groups].sum()) - len(groups)
    return {"copies": copies, "groups": len(groups), "examples": examples}


def _labels(source: Source, tally: Tally) -> Int[np.ndarray, " n"] | None:
    """All labels; where they lie inside the images' records, those of what was looked at."""
    if not isinstance(source, TfdsSource) or source.label_feature is None:
        return source.labels()
    readable = tally.chosen[: tally.done][tally.rows["height"][: tally.done] > 0]
    return np.array([source.label(i) for i in readable.tolist()], np.int64)


def balance(labels: Int[np.ndarray, " n"], classes: tuple[str, ...] | None) -> dict[str, Any]:
    """How many images each class has; labels below 0 are none."""
    known = labels[labels >= 0]
    counts = np.bincount(known, minlength=len(classes or ()))
    share = counts[counts > 0] / max(1, len(known))
    return {
        "classes": len(counts),
        "unlabelled": len(labels) - len(known),
        "min": int(counts.min(initial=len(known))),
        "max": int(counts.max(initial=0)),
        "entropy_bits": float(-(share * np.log2(share)).sum()) + 0.0,
        "uniform_bits": math.log2(max(1, len(counts))),
        "counts": dict(zip(classes or map(str, range(len(counts))), counts.tolist())),
    }
