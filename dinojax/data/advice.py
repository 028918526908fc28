"""What a source holds, in words: the table of `dinojax data SPEC`, and what to do next."""

import math
import shlex
from collections.abc import Sequence
from typing import Any, NamedTuple

LISTED = 10  # formats, types or band counts that are shown
CROP = 224  # pixels of the global crops of most experiments
GROUP = 64  # `config.group` of the experiments below


class Experiment(NamedTuple):
    """A config to begin with, the images in its batch, and what it needs for any source."""

    file: str
    batch: int
    options: tuple[str, ...] = ()


SMALL = 64  # pixels
# Its k-NN asks for splits that few sources have.
SMALL_IMAGES = Experiment("experiments/cifar10_vitt.py", 64, ("--config.eval.knn_train=",))
LARGE_IMAGES = Experiment("experiments/pretrain_vitl.py", 2048)


def table(report: dict[str, Any]) -> list[tuple[str, str]]:
    """What a terminal shows: names and values."""
    looked, images = report["looked_at"], report["images"]
    rows = [
        (
            "images",
            f"{images:,}, all looked at"
            if looked == images
            else f"{images:,}, of which {looked:,} were looked at",
        ),
        ("formats", _counts(report["formats"])),
        ("stored as", _counts(report["stored"])),
    ]
    if report["readable"]:
        rows += [
            ("file size", f"{_span(report['bytes'], size)}, {size(report['bytes']['total'])} read"),
            ("height", _span(report["height"])),
            ("width", _span(report["width"])),
            ("shorter side", f"{_span(report['shorter_side'])}  {_bars(report['shorter_side'])}"),
            ("width : height", f"{_span(report['aspect'])}  {_bars(report['aspect'])}"),
            ("bands", _counts(report["bands"])),
            ("mean", numbers(report["mean"])),
            ("std", numbers(report["std"])),
        ]
    if report["range"]:
        rows.append(("0.1 to 99.9 %", report["range"]["option"].removeprefix("range=")))
    twice, broken, labels = report["duplicates"], report["unreadable"], report["labels"]
    text = "none"
    if twice["copies"]:
        example = " = ".join(twice["examples"][0][:3])
        groups = f"{twice['groups']:,} group{'s' * (twice['groups'] > 1)}"
        text = f"{twice['copies']:,} superfluous in {groups}, such as {example}"
    rows.append(("duplicates", text))
    text = "none"
    if broken["images"]:
        first = broken["examples"][0]
        text = f"{broken['images']:,}, such as {first['name']}: {first['reason']}"
    rows.append(("unreadable", text))
    text = "none"
    if labels:
        text = f"{balance(labels)}, {labels['unlabelled']:,} images without"
        text = text.removesuffix(", 0 images without")
    rows.append(("labels", text))
    rate, flow = report["images_per_second"], report["bytes_per_second"]
    rows.append(("took", f"{report['seconds']:.1f} s: {rate:,.0f} images/s, {size(flow)}/s"))
    return rows


def advice(report: dict[str, Any]) -> list[str]:
    """What to do next: sentences, and commands to paste (lines that begin with spaces)."""
    spec, bands = report["spec"], report["channels"]
    if report["range"] and report["range"]["needed"]:
        wider = f"{spec}{'&' if '?' in spec else '?'}{report['range']['option']}"
        return [
            "The stored values fill little of their type, or cannot be read without a range.",
            "Spread each band, from its 0.1st to 99.9th percentile, over 0..255 and look again:",
            f"  dinojax data {shlex.quote(wider)}",
        ]
    if not report["readable"]:
        return ["No image that was looked at can be read, so there is nothing to train on."]
    lines = []
    if len(report["bands"]) > 1:
        lines.append(f"Images with other than {bands} bands count as unreadable in training.")
    if report["unreadable"]["images"]:
        lines.append("Training puts other images in the place of unreadable ones.")
    shorter = report["shorter_side"]["median"]
    if SMALL < shorter < CROP:
        lines.append(f"Half of the images have a side below the usual crops' {CROP} pixels.")
    chosen = SMALL_IMAGES if shorter <= SMALL else LARGE_IMAGES
    values = {
        "data.source": spec,
        "data.mean": _tuple(report["mean"]),
        "data.std": _tuple(report["std"]),
    }
    if bands != 3:
        values["model.in_channels"] = bands
    group = min(GROUP, report["images"])
    if report["images"] < chosen.batch:
        values["batch_size"] = report["images"] // group * group
    if group < GROUP:
        values["group"] = group
    options = [f"    --config.{key}={_quoted(value)}" for key, value in values.items()]
    options += [f"    {option}" for option in chosen.options]
    command = f"  python launch/run.py --config {chosen.file} --workdir runs/a"
    return [*lines, "Train on these images:", " \\\n".join([command, *options])]


def balance(labels: dict[str, Any]) -> str:
    """'10 classes of 90 to 110 images, entropy 3.31 of 3.32 bits'."""
    low, high = labels["min"], labels["max"]
    return (
        f"{labels['classes']:,} classes of {f'{low:,} to ' if low < high else ''}{high:,} images, "
        f"entropy {labels['entropy_bits']:.2f} of {labels['uniform_bits']:.2f} bits"
    )


def size(count: int | float) -> str:
    """Bytes for people: 17.8 kB."""
    units = ("B", "kB", "MB", "GB", "TB", "PB")
    power = min(int(math.log10(max(1, count)) // 3), len(units) - 1)
    return f"{count / 1000**power:.4g} {units[power]}" if power else f"{count:.0f} B"


def numbers(values: Sequence[float]) -> str:
    """Means and deviations, precise enough for any use of them."""
    return ", ".join(f"{value:.4f}" if value >= 0.1 else f"{value:.4g}" for value in values)


def _tuple(values: Sequence[float]) -> str:
    return f"({numbers(values)},)" if len(values) == 1 else f"({numbers(values)})"


def _quoted(value: str | int) -> str:
    text = str(value)
    return f'"{text}"' if text.startswith("(") else shlex.quote(text)


def _counts(counts: dict[str, int]) -> str:
    if len(counts) == 1:
        return f"{next(iter(counts))} (all)"
    shown = [f"{name} {count:,}" for name, count in list(counts.items())[:LISTED]]
    return ", ".join(shown) + (", ..." if len(counts) > LISTED else "")


def _span(values: dict[str, Any], words: Any = "{:,.4g}".format) -> str:
    low, middle, high = (words(values[key]) for key in ("min", "median", "max"))
    return low if low == high else f"{low} to {high}, median {middle}"


def _bars(values: dict[str, Any]) -> str:
    """A histogram in one line; empty where there is but one value."""
    counts = values["histogram"]["counts"]
    if len(counts) < 2:
        return ""
    return "".join(" ▁▂▃▄▅▆▇█"[math.ceil(8 * count / max(counts))] for count in counts)
