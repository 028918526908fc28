"""Sizes by name: the ViTs of spec 1.1 and the ConvNeXts of spec 1.6."""

import difflib
from collections.abc import Iterable
from typing import Any

# width, depth, heads, feed-forward, ratio; for the hidden width see layers/ffn.py: hidden_width.
VIT: dict[str, dict[str, Any]] = {
    name: dict(zip(("width", "depth", "heads", "ffn", "ffn_ratio"), values, strict=True))
    for name, values in {
        "tiny": (192, 12, 3, "mlp", 4.0),
        "small": (384, 12, 6, "mlp", 4.0),
        "splus": (384, 12, 6, "swiglu", 6.0),
        "base": (768, 12, 12, "mlp", 4.0),
        "large": (1024, 24, 16, "mlp", 4.0),
        "lplus": (1024, 24, 16, "swiglu", 6.0),
        "so400m": (1152, 27, 18, "mlp", 3.777777778),
        "huge2": (1280, 32, 20, "mlp", 4.0),
        "hplus": (1280, 32, 20, "swiglu", 6.0),
        "giant2": (1536, 40, 24, "mlp", 4.0),
        "7b": (4096, 40, 32, "swiglu64", 3.0),
    }.items()
}

CONVNEXT: dict[str, dict[str, tuple[int, ...]]] = {
    "tiny": {"depths": (3, 3, 9, 3), "dims": (96, 192, 384, 768)},
    "small": {"depths": (3, 3, 27, 3), "dims": (96, 192, 384, 768)},
    "base": {"depths": (3, 3, 27, 3), "dims": (128, 256, 512, 1024)},
    "large": {"depths": (3, 3, 27, 3), "dims": (192, 384, 768, 1536)},
}


def check_keys(section: str, given: Iterable[str], known: Iterable[str]) -> None:
    """A sentence for the first key of a config section that is not known."""
    known = sorted(known)
    for key in given:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, 1, 0.0)[0]
            raise ValueError(f"{section} key {key!r} is unknown; the nearest is {nearest!r}")


def lookup(table: dict[str, dict[str, Any]], variant: str) -> dict[str, Any]:
    """The sizes of one variant; a sentence with the choices for an unknown name."""
    if variant not in table:
        raise ValueError(f"model variant is {variant!r}; expected one of {', '.join(table)}")
    return table[variant]
