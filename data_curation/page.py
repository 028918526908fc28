"""`report.html`: the figures of `report.json` and the pictures in one file that needs no other."""

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 72em; margin: 2em auto;
       padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
table { border-collapse: collapse; margin: 0.8em 0; display: block; overflow-x: auto }
th, td { padding: 0.25em 0.9em; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
thead th { border-bottom: 2px solid #888; font-weight: 600 }
img { max-width: 100% }
figure { margin: 0.6em 0 } figcaption { color: #555; font-size: 0.9em }
.warning { background: #fff3d6; border-left: 4px solid #d9a100; padding: 0.4em 0.8em }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(30em, 1fr)); gap: 1em }
"""
CAPTIONS = {
    "sizes.png": "Images in each cluster, largest cluster first. A flat line is perfect balance.",
    "lorenz.png": "Share of the images that the smallest clusters hold together. The diagonal is "
    "perfect balance, Gini 0.",
    "scatter.png": "Where pool and sample lie.",
    "values.png": "Share of each value before and after.",
    "components.png": "Near-duplicates: how many components have how many rows. One row of each "
    "was kept.",
    "similarities.png": "Near-duplicates: similarity of the pairs that were joined.",
}
TABLED = {  # of balance_metrics
    "clusters": "clusters",
    "empty": "empty",
    "min": "smallest",
    "median": "median",
    "max": "largest",
    "imbalance": "imbalance (1: equal)",
    "gini": "Gini (0: equal)",
    "entropy": "entropy (1: equal)",
    "effective": "effective clusters",
    "top1": "share of the largest 1%",
}
NAMED = 40  # values of a column in the table


def page(
    name: str,
    figures: Mapping[str, Any],
    pictures: Mapping[str, bytes],
    shown: Sequence[tuple[str, str, Sequence[tuple[str, bytes]]]],
) -> str:
    """The whole page.

    Args:
      figures: of `report.measure`.
      pictures: PNGs by file name.
      shown: galleries: heading, note, and (title, JPEG) of each group.
    """
    title = html.escape(f"Curated sample: {name}")
    parts = [f"<h1>{title}</h1>", _summary(figures)]
    parts += [f'<p class="warning">{html.escape(one)}</p>' for one in figures["warnings"]]
    parts += ["<h2>Balance of the clusters</h2>", _levels(figures["levels"])]
    parts += [_figure(file, pictures[file]) for file in ("lorenz.png", "sizes.png", "scatter.png")]
    if "by" in figures:
        column = html.escape(figures["by"]["column"])
        parts += [f"<h2>By {column}</h2>", _values(figures["by"])]
        parts.append(_figure("values.png", pictures["values.png"]))
    if "dedup" in figures:
        parts += ["<h2>Near-duplicates</h2>", _facts(figures["dedup"])]
        files = ("similarities.png", "components.png")
        parts += [_figure(file, pictures[file]) for file in files if file in pictures]
    for heading, note, groups in shown:
        items = "".join(
            f"<figure>{_image(picture, 'jpeg', title)}<figcaption>{html.escape(title)}"
            "</figcaption></figure>"
            for title, picture in groups
        )
        parts.append(f"<h2>{heading}</h2><p>{note}</p><div class='gallery'>{items}</div>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _summary(figures: Mapping[str, Any]) -> str:
    repeats = f", {figures['repeats']:,} of them repeats" if figures["repeats"] else ""
    return (
        f"<p>{figures['images']:,} images{repeats}, chosen from a pool of {figures['pool']:,} "
        f"({figures['set']:,} before filters and deduplication).</p>"
    )


def _levels(levels: Sequence[Mapping[str, Any]]) -> str:
    """A column for the pool and one for the sample of each level."""
    head = [""] + [
        f"level {one['level']}: {which}" for one in levels for which in ("pool", "sample")
    ]
    rows = [
        [label, *(_number(one[which][key]) for one in levels for which in ("pool", "sample"))]
        for key, label in TABLED.items()
    ]
    for key, label in (("touched", "clusters with images"), ("exhausted", "clusters taken whole")):
        rows.append([label, *(cell for one in levels for cell in ("", _number(one[key])))])
    cuts = [one["cut"] for one in levels]
    rows.append(
        ["images of each other cluster", *(cell for cut in cuts for cell in ("", _cut(cut)))]
    )
    return _table(head, rows)


def _cut(cut: Mapping[str, int] | None) -> str:
    if cut is None:
        return "–"
    if cut["min"] == cut["max"]:
        return f"{cut['min']:,}"
    return f"{cut['min']:,} to {cut['max']:,}, median {cut['median']:,}"


def _values(by: Mapping[str, Any]) -> str:
    names = ("set", "pool", "sample")
    rows = [
        [label, *(_number(by["balance"][name][key]) for name in names)]
        for key, label in (
            ("values", "values that occur"),
            ("entropy", "entropy (1: equal)"),
            ("effective", "effective values"),
        )
    ]
    listed = list(by["set"])[:NAMED]
    rows += [[value, *(f"{by[name].get(value, 0):,}" for name in names)] for value in listed]
    if by["values"] > NAMED:
        rows.append([f"({by['values'] - NAMED:,} more)", "", "", ""])
    return _table(["", "all", "pool", "sample"], rows)


def _facts(facts: Mapping[str, Any]) -> str:
    """The plain numbers and texts of another stage's report."""
    plain = {key: value for key, value in facts.items() if isinstance(value, int | float | str)}
    return _table(["", ""], [[key.replace("_", " "), _number(plain[key])] for key in plain])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = (
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _figure(file: str, picture: bytes) -> str:
    caption = html.escape(CAPTIONS[file])
    return f"<figure>{_image(picture, 'png', caption)}<figcaption>{caption}</figcaption></figure>"


def _image(picture: bytes, kind: str, text: str) -> str:
    data = base64.b64encode(picture).decode()
    return f'<img alt="{html.escape(text)}" src="data:image/{kind};base64,{data}">'


def _number(value: Any) -> str:
    if isinstance(value, float) and not value.is_integer():
        return f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"
    return f"{value:,.0f}" if isinstance(value, int | float) else str(value)
