"""Pictures of a source for `dinojax data`: contact sheet, sizes, balance of labels.

Every picture is a uint8 array [rows, columns, 3], which `visualize.save` writes. Figures are drawn
by matplotlib, which is imported when the first one is.
"""

from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8

from dinojax.data.advice import balance as in_words
from dinojax.data.decode import UnreadableImage
from dinojax.data.sources import Source
from dinojax.visualize import captioned, contact_sheet, rgb

SHOWN = 40  # images of the contact sheet
TILE = 168  # pixels of a side in the contact sheet
NAMED = 40  # classes that a picture of the balance names; of more, only the ends
DPI = 110
INK, MARK = "#30507a", "#c03030"
RATIOS = {"1:10": 0.1, "1:4": 0.25, "1:2": 0.5, "3:4": 0.75, "1:1": 1}
RATIOS |= {"4:3": 4 / 3, "2:1": 2, "4:1": 4, "10:1": 10, "20:1": 20}


def contact(source: Source, title: str, count: int = SHOWN) -> UInt8[np.ndarray, "rows cols 3"]:
    """`count` images spread evenly over a source, whole, with class and name under each."""
    total, count = len(source), min(count, len(source))
    # One further each time: an even stride may meet a single class of a source in class order.
    turns = np.arange(count)
    tiles = []
    for i in (turns * total // count + turns % max(1, total // count)).tolist():
        try:
            tile, lines = framed(source.image(i), TILE), names(source, i)
        except UnreadableImage:
            tile = np.full((TILE, TILE, 3), 200, np.uint8)
            lines = ["cannot be read", source.name(i)]
        tiles.append(captioned(tile, lines))
    return titled(contact_sheet(tiles), title)


def names(source: Source, i: int) -> list[str]:
    """The class of an image, if it has one, and its name."""
    label = source.label(i)
    if label is None or label < 0:
        return [source.name(i)]
    return [source.classes[label] if source.classes else f"class {label}", source.name(i)]


def titled(
    sheet: UInt8[np.ndarray, "rows cols 3"], title: str
) -> UInt8[np.ndarray, "height cols 3"]:
    """A sheet with a line of text over it."""
    line = captioned(np.full((6, sheet.shape[1] - 8, 3), 255, np.uint8), [title], 14)
    return np.concatenate([np.pad(line, ((0, 0), (8, 0), (0, 0)), constant_values=255), sheet])


def framed(image: UInt8[np.ndarray, "i j c"], side: int) -> UInt8[np.ndarray, "side side 3"]:
    """A whole image, as large as it gets, in the middle of a light square."""
    image = rgb(image)
    height, width = image.shape[:2]
    scale = side / max(height, width)
    shape = max(1, round(width * scale)), max(1, round(height * scale))
    tile = cv2.resize(image, shape, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    frame = np.full((side, side, 3), 235, np.uint8)
    top, left = (side - shape[1]) // 2, (side - shape[0]) // 2
    frame[top : top + shape[1], left : left + shape[0]] = tile
    return frame


# ---- figures -------------------------------------------------------------------------------------


def sizes(report: dict[str, Any]) -> UInt8[np.ndarray, "rows cols 3"]:
    """Histograms of shorter side, aspect ratio and file size, from `data.report.summarise`."""
    figure, axes = _figure(3, 12, 3.6)
    looked = f"{report['readable']:,} of {report['images']:,} images"
    figure.suptitle(f"{report['spec']}   ({looked})", fontsize=10)
    for axis, key, title, unit in zip(
        axes,
        ("shorter_side", "aspect", "bytes"),
        ("shorter side, pixels", "width : height", "file size, kB"),
        (1, 1, 1000),
    ):
        values = report[key]
        _histogram(axis, values["histogram"], unit)
        if key == "aspect":
            low, high = axis.get_xlim()
            ratios = {name: ratio for name, ratio in RATIOS.items() if low <= ratio <= high}
            if len(ratios) > 1:
                axis.set_xticks(list(ratios.values()), list(ratios))
        if values["median"] is None:
            continue
        middle = values["median"] / unit
        axis.axvline(middle, color=MARK, lw=1.2)
        axis.set_title(f"{title}\nmedian {middle:,.4g}", fontsize=10)
    return _drawn(figure)


def labels(report: dict[str, Any]) -> UInt8[np.ndarray, "rows cols 3"]:
    """Images of each class: all classes by name, or the two ends of a long list."""
    balance = report["labels"]
    counts = sorted(balance["counts"].items(), key=lambda item: -item[1])
    few = len(counts) <= NAMED
    shown = counts if few else counts[: NAMED // 2] + counts[-(NAMED // 2) :]
    names = [name if len(name) < 32 else name[:31] + "…" for name, _ in shown]
    figure, axes = _figure(1 if few else 2, 7 if few else 12, 1.2 + 0.21 * len(shown))
    axes[0].barh(range(len(shown)), [count for _, count in shown], color=INK, height=0.75)
    axes[0].set_yticks(range(len(shown)), names, fontsize=8)
    axes[0].set_ylim(len(shown) - 0.4, -0.6)  # the largest on top
    axes[0].set_xlim(0, 1.12 * max(1, counts[0][1]))
    for place, (_, count) in enumerate(shown):
        axes[0].text(count, place, f" {count:,}", va="center", fontsize=7)
    if not few:
        half = NAMED // 2
        axes[0].axhline(half - 0.5, color=MARK, lw=1)
        axes[0].set_title(f"the {half} largest and the {half} smallest classes", fontsize=10)
        axes[1].plot(range(1, len(counts) + 1), [max(c, 0.5) for _, c in counts], color=INK)
        axes[1].set(yscale="log", xlabel="class, largest first", ylabel="images")
        axes[1].set_title("all classes", fontsize=10)
    figure.suptitle(in_words(balance), fontsize=10)
    return _drawn(figure)


def _figure(columns: int, width: int | float, height: int | float) -> tuple[Any, list[Any]]:
    """A figure of so many inches, with `columns` axes side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return figure, list(axes)


def _histogram(axis: Any, histogram: dict[str, list], unit: int | float) -> None:
    """Bars; over a logarithmic axis, with plain numbers, where the values span a wide range."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    edges = np.array(histogram["edges"]) / unit
    if not len(edges):
        return
    wide = edges[-1] > 4 * edges[0]
    if edges[0] == edges[-1]:  # one value
        axis.set_xlim(edges[0] / 2, edges[0] * 1.5)
        edges = edges * np.array([0.98, 1.02])
    axis.bar(
        edges[:-1], histogram["counts"], np.diff(edges), align="edge", color=INK, edgecolor="white"
    )
    if wide:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
        axis.set_xticks([], minor=True)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_ylabel("images", fontsize=9)


def _drawn(figure: Any) -> UInt8[np.ndarray, "rows cols 3"]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
