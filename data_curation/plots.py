"""Figures of a curation, each as the bytes of a PNG. Called by `report.py`; matplotlib, no display.

Whoever calls has counted: these take arrays of counts, not embeddings.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

DPI = 110
POOL, CHOSEN, MARK = "#8a97a8", "#20558a", "#c03030"  # before, after, a threshold
POINTS = 1000  # of a curve: what a screen can show
NAMED = 30  # values of a column that a figure names


class LevelCounts(NamedTuple):
    """Rows under each cluster of a level, and images of the sample among them."""

    level: int
    pool: Int[np.ndarray, " k"]
    chosen: Int[np.ndarray, " k"]


def sizes(levels: Sequence[LevelCounts]) -> bytes:
    """Rows of each cluster, largest first, on log-log axes, level by level."""
    figure, axes = _figure(len(levels), 4.2, 3.6)
    for axis, level in zip(axes, levels):
        for counts, colour, name in (
            (level.pool, POOL, "pool"),
            (level.chosen, CHOSEN, "sample"),
        ):
            ordered = np.sort(counts[counts > 0])[::-1]
            places = _thinned(len(ordered))
            style = {"marker": "o", "ms": 3} if len(ordered) <= 30 else {}
            axis.plot(places + 1, ordered[places], color=colour, lw=1.8, label=name, **style)
        axis.set(xscale="log", yscale="log", xlabel="cluster, largest first")
        axis.set_title(f"level {level.level}: {_clusters(level)}", fontsize=10)
        _plain_numbers(axis)
    axes[0].set_ylabel("images")
    axes[0].legend(frameon=False, fontsize=9)
    return _png(figure)


def lorenz(levels: Sequence[LevelCounts]) -> bytes:
    """Share of the images that the smallest clusters hold: the diagonal is perfect balance."""
    figure, axes = _figure(len(levels), 4.0, 3.8)
    for axis, level in zip(axes, levels):
        axis.plot([0, 1], [0, 1], color="#bbbbbb", lw=1, ls="--")
        for counts, colour, name in (
            (level.pool, POOL, "pool"),
            (level.chosen, CHOSEN, "sample"),
        ):
            share = np.concatenate(([0], np.cumsum(np.sort(counts)))) / max(counts.sum(), 1)
            places = _thinned(len(share))
            label = f"{name}, Gini {gini(counts):.2f}"
            axis.plot(places / len(counts), share[places], color=colour, lw=1.8, label=label)
        axis.set(xlabel="share of the clusters, smallest first", xlim=(0, 1), ylim=(0, 1))
        axis.set_title(f"level {level.level}: {_clusters(level)}", fontsize=10)
        axis.legend(frameon=False, fontsize=9, loc="upper left")
    axes[0].set_ylabel("share of the images")
    return _png(figure)


def similarities(
    counts: Int[np.ndarray, " bins"], edges: Float[np.ndarray, " bins+1"], threshold: float
) -> bytes:
    """How similar near-duplicates are, with the threshold."""
    figure, (axis,) = _figure(1, 5.5, 3.4)
    axis.bar(edges[:-1], counts, np.diff(edges), align="edge", color=CHOSEN, edgecolor="white")
    axis.axvline(threshold, color=MARK, lw=1.5)
    low, high = axis.get_xlim()
    axis.set_xlim(min(low, threshold - 0.02 * (high - low)), high)
    axis.set_title(f"pairs above the threshold, {threshold:g}", fontsize=10)
    axis.set(xlabel="cosine similarity", ylabel="pairs")
    _whole_numbers(axis)
    return _png(figure)


def components(sizes: Int[np.ndarray, " m"]) -> bytes:
    """How many components (of 2 rows or more) have how many rows, on log-log axes."""
    figure, (axis,) = _figure(1, 5.5, 3.4)
    several = sizes[sizes > 1]
    found, counts = np.unique(several, return_counts=True)
    axis.scatter(found, counts, s=22, color=CHOSEN)
    axis.set(xscale="log", yscale="log", xlabel="rows of a component", ylabel="components")
    rows = int(several.sum())
    axis.set_title(f"{len(several):,} components of {rows:,} near-duplicates", fontsize=10)
    if len(found):
        axis.set_xlim(1.6, max(4, 1.3 * found[-1]))
        axis.set_ylim(0.7, max(4, 1.5 * counts.max()))
    _plain_numbers(axis)
    return _png(figure)


def scatter(pool: Float[np.ndarray, "n 2"], chosen: Float[np.ndarray, "m 2"], note: str) -> bytes:
    """Rows of the pool and of the sample in two dimensions, side by side on one scale."""
    figure, axes = _figure(2, 4.3, 4.2)
    low, high = pool.min(axis=0), pool.max(axis=0)
    pad = 0.04 * np.maximum(high - low, 1e-9)
    for axis, points, colour, name in (
        (axes[0], pool, POOL, "pool"),
        (axes[1], chosen, CHOSEN, "sample"),
    ):
        size = 5 if len(points) > 1000 else 14
        axis.scatter(*points.T, s=size, color=colour, alpha=0.6, linewidths=0)
        axis.set(xlim=(low[0] - pad[0], high[0] + pad[0]), ylim=(low[1] - pad[1], high[1] + pad[1]))
        axis.set_title(f"{len(points):,} rows of the {name}", fontsize=10)
        axis.set_xlabel(note)
    return _png(figure)


def values(name: str, before: Mapping[str, int], after: Mapping[str, int]) -> bytes:
    """Shares of a column's values in pool and sample; of many values, the largest by name."""
    order = sorted(before, key=lambda value: (-before[value], value))
    few = len(order) <= NAMED
    shown = order[:NAMED]
    figure, axes = _figure(1 if few else 2, 6.5 if few else 5.5, 1.1 + 0.27 * len(shown))
    totals = [max(sum(counts.values()), 1) for counts in (before, after)]
    places = np.arange(len(shown))
    for counts, total, colour, title, shift in (
        (before, totals[0], POOL, "pool", -0.2),
        (after, totals[1], CHOSEN, "sample", 0.2),
    ):
        shares = [100 * counts.get(value, 0) / total for value in shown]
        axes[0].barh(places + shift, shares, 0.38, color=colour, label=title)
        if not few:
            ranked = np.sort(np.array([counts.get(value, 0) for value in order]))[::-1]
            thin = _thinned(len(ranked))
            axes[1].plot(
                thin + 1, np.maximum(ranked[thin], 0.5) / total * 100, color=colour, lw=1.8
            )
    names = [value if len(value) < 32 else value[:31] + "…" for value in shown]
    axes[0].set_yticks(places, names, fontsize=8)
    axes[0].set_ylim(len(shown) - 0.4, -0.6)  # the largest on top
    axes[0].set_xlabel("% of the images")
    # Outside: bars may fill every corner.
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    axes[0].set_title(
        name if few else f"{name}: the {NAMED} largest of {len(order):,}", fontsize=10
    )
    if not few:
        axes[1].set(xscale="log", yscale="log", xlabel="value, largest first")
        axes[1].set_title("all values", fontsize=10)
        _plain_numbers(axes[1])
    return _png(figure)


def gini(counts: Int[np.ndarray, " k"]) -> float:
    """0: all equal; towards 1: all in one. (Spec 12.)"""
    ordered, k = np.sort(counts), len(counts)
    total = ordered.sum()
    return float((2 * np.arange(1, k + 1) - k - 1) @ ordered / (k * total)) if total else 0.0


def _clusters(level: LevelCounts) -> str:
    count = len(level.pool)
    return f"{count:,} cluster{'s' if count > 1 else ''}"


def _thinned(count: int) -> Int[np.ndarray, " m"]:
    """Places 0 to count - 1, both included; of many, POINTS that are even on either axis."""
    if count <= POINTS:
        return np.arange(count)
    even = np.linspace(0, count - 1, POINTS // 2)
    log = np.geomspace(1, count, POINTS // 2) - 1
    return np.unique(np.concatenate([even, log]).round().astype(np.int64))


def _figure(count: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure of `count` axes of so many inches each, at most three side by side."""
    from matplotlib.figure import Figure

    columns = min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows), dpi=DPI, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).reshape(-1)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, list(axes[:count])


def _plain_numbers(axis: Any) -> None:
    """1, 10, 1,000 instead of powers, and no ticks in between."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    for one in (axis.xaxis, axis.yaxis):
        low, high = one.get_view_interval()
        few = high < 30 * max(low, 1e-12)
        one.set_major_locator(LogLocator(10, (1, 2, 5) if few else (1,), numticks=9))
        one.set_minor_locator(NullLocator())
        one.set_minor_formatter(NullFormatter())
        one.set_major_formatter(FuncFormatter(_plain))


def _plain(value: float, place: int | None = None) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:.4g}"


def _whole_numbers(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _png(figure: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})  # the same bytes every time
    return stream.getvalue()
