"""Where images come from: `open_source("kind:where?option=value")` gives random access by number.

Kinds: `folder:PATH`, `list:FILE`, `parquet:GLOB?split=train&image=image&label=label`, `tar:GLOB`,
`array_record:GLOB`, `tfds:NAME[:SPLIT]`, `curated:MANIFEST`, `scenes[:COUNT][?...]`; paths are
local or URLs. Where images are encoded, `bands`, `range` and `draft` say how they become pixels
(`data.decode`). A new kind is one function `_open_<kind>(where, options)` here and a file beside
it. Used by `data.pipeline`, by evaluators and by data curation; everything here pickles, so worker
processes can hold a source.
"""

import os
import re
from collections.abc import Mapping
from typing import Protocol, runtime_checkable
from urllib.parse import parse_qsl, urlencode

import numpy as np
import pyarrow as pa
from jaxtyping import Int, UInt8

from dinojax.data.decode import UnreadableImage
from dinojax.data.options import nearest

SCENES = 10_000  # images of `scenes` when no count is given


@runtime_checkable
class Source(Protocol):
    """Images by number, with class labels where there are any."""

    classes: tuple[str, ...] | None

    def __len__(self) -> int: ...

    def encoded(self, i: int) -> bytes | pa.Buffer: ...

    def image(self, i: int) -> UInt8[np.ndarray, "i j c"]: ...

    def label(self, i: int) -> int | None: ...

    def labels(self) -> Int[np.ndarray, " n"] | None: ...

    def name(self, i: int) -> str: ...


def open_source(spec: str) -> Source:
    """The source a spec string names; ValueError (one sentence) if it cannot be opened."""
    base, _, query = spec.partition("?")
    kind, _, where = base.partition(":")
    opener = globals().get(f"_open_{kind}")
    if opener is None:
        kinds = sorted(n.removeprefix("_open_") for n in globals() if n.startswith("_open_"))
        if os.path.exists(spec):
            raise ValueError(f"source {spec!r} names no kind; nearest: 'folder:{spec}'.")
        raise ValueError(f"unknown source kind {kind!r} in {spec!r}; {nearest(kind, kinds)}")
    try:
        options = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
    except ValueError:
        raise ValueError(f"the options of {spec!r} are not of the form name=value&...") from None
    return opener(where, options)


def related(spec: str, base: str) -> str:
    """`spec`; if it holds options alone (`split=val`), `base` with these instead of its own."""
    if not re.match(r"\??\w+=", spec):
        return spec
    where, _, query = base.partition("?")
    options = dict(parse_qsl(query)) | dict(parse_qsl(spec.lstrip("?")))
    return f"{where}?{urlencode(options, safe='/:,[]*')}"


# ---- kinds; each imports its file only when asked for ------------------------------------------


def _open_folder(where: str, options: Mapping[str, str]) -> Source:
    from dinojax.data.folders import open_folder

    return open_folder(where, options)


def _open_list(where: str, options: Mapping[str, str]) -> Source:
    from dinojax.data.folders import open_list

    return open_list(where, options)


def _open_parquet(where: str, options: Mapping[str, str]) -> Source:
    from dinojax.data.parquet import open_parquet

    return open_parquet(where, options)


def _open_tar(where: str, options: Mapping[str, str]) -> Source:
    from dinojax.data.tar import open_tar

    return open_tar(where, options)


def _open_array_record(where: str, options: Mapping[str, str]) -> Source:
    from dinojax.data.records import open_array_record

    return open_array_record(where, options)


def _open_tfds(where: str, options: Mapping[str, str]) -> Source:
    from dinojax.data.tfds import open_tfds

    return open_tfds(where, options)


def _open_curated(where: str, options: Mapping[str, str]) -> Source:
    from dinojax.data.curated import open_curated

    return open_curated(where, options)


def _open_scenes(where: str, options: Mapping[str, str]) -> Source:
    """The embedded, rendered images."""
    from dinojax.data import scenes

    if where and not (where.isdecimal() and int(where) > 0):
        raise ValueError(f"scenes source: count {where!r} is not a positive integer.")
    return scenes.open_scenes(int(where) if where else SCENES, options)


def check_readable(source: Source, channels: int, tries: int = 32) -> None:
    """Raise ValueError unless one of the first images can be read and has `channels` channels."""
    failures = []
    for index in range(min(tries, len(source))):
        try:
            found = source.image(index).shape[-1]
        except UnreadableImage as error:
            failures.append(str(error))
            continue
        if found != channels:
            raise ValueError(
                f"the images have {found} channels, the model expects {channels}; nearest: "
                f"config.model.in_channels={found} with {found} values in config.data.mean and "
                f"config.data.std, or the option bands= of the source."
            )
        return
    raise ValueError(f"the first {len(failures)} images cannot be read, the last: {failures[-1]}")
