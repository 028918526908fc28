"""What all sources need to read a spec string and to say what is wrong with it."""

import difflib
import os
from collections.abc import Iterable, Mapping

import numpy as np
import pyarrow as pa
from jaxtyping import Int64


def nearest(word: str, words: Iterable[str]) -> str:
    """'did you mean ...?' or 'there are ...' for an unknown word; it ends a sentence."""
    words = list(words)
    close = difflib.get_close_matches(word, words, 1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"there are {', '.join(words)}."


def check_options(kind: str, options: Mapping[str, str], allowed: tuple[str, ...]) -> None:
    """Raise ValueError for an option that a kind of source does not have."""
    for name in options:
        if name not in allowed:
            hint = nearest(name, allowed) if allowed else "it takes none."
            raise ValueError(f"{kind} source: unknown option {name!r}; {hint}")


def number_classes(
    names: Iterable[str] | pa.Array | pa.ChunkedArray,
) -> tuple[tuple[str, ...], Int64[np.ndarray, " n"]]:
    """Names of classes, one per image -> sorted classes and each image's number.

    Names in arrow arrays (text, or bytes of file names) never become as many Python objects.
    """
    if not isinstance(names, pa.Array | pa.ChunkedArray):
        names = pa.array(names, pa.string())
    coded = pa.chunked_array(names if isinstance(names, pa.ChunkedArray) else [names])
    coded = coded.dictionary_encode().unify_dictionaries()
    words = [os.fsdecode(word) for word in coded.chunk(0).dictionary.to_pylist()]
    order = sorted(range(len(words)), key=words.__getitem__)
    numbers = np.empty(len(words), np.int64)
    numbers[order] = np.arange(len(words))
    targets = [numbers[chunk.indices.to_numpy()] for chunk in coded.chunks]
    return tuple(words[k] for k in order), np.concatenate(targets)
