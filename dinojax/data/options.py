"""What all sources need to read a spec string and to say what is wrong with it."""

import difflib
from collections.abc import Iterable, Mapping

import numpy as np
from jaxtyping import Int64


def nearest(word: str, words: Iterable[str]) -> str:
    """'did you mean ...?' for an unknown word."""
    words = list(words)
    close = difflib.get_close_matches(word, words, 1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"there are {', '.join(words)}"


def check_options(kind: str, options: Mapping[str, str], allowed: tuple[str, ...]) -> None:
    """Raise ValueError for an option that a kind of source does not have."""
    for name in options:
        if name not in allowed:
            hint = nearest(name, allowed) if allowed else "it takes none"
            raise ValueError(f"{kind} source: unknown option {name!r}; {hint}.")


def number_classes(names: Iterable[str]) -> tuple[tuple[str, ...], Int64[np.ndarray, " n"]]:
    """Names of classes, one per image -> sorted classes and each image's number."""
    classes, targets = np.unique(np.array(list(names), dtype=str), return_inverse=True)
    return tuple(classes.tolist()), targets.astype(np.int64)
