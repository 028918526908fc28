"""Encoded image bytes -> pixels, and what every source of encoded images shares.

Called by the sources of `data/` (folders, parquet, tar, records, tfds, curated) through
`EncodedSource`. What files store is read by `data.formats`.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from jaxtyping import Int64, Shaped, UInt8

from dinojax.data.formats import Samples, read_samples


class UnreadableImage(ValueError):  # noqa: N818  (what is wrong, not who raised it)
    """An image that cannot be read or decoded; the pipeline puts another one in its place."""


READING_OPTIONS = ("bands", "range", "draft")


@dataclass(frozen=True)
class Reading:
    """How encoded bytes become pixels.

    `bands` keeps these bands, in this order (from 0; None: all). `range` maps low..high of each
    band (or of all, if it is one pair) to 0..255.

    `draft` decodes a JPEG at the smallest of 1/2, 1/4 and 1/8 scale whose shorter side still has
    that many pixels (0: always at full scale). In 2.9 -> 1.0 ms at half scale for photographs of
    384x288; the same boxes, resized to no more pixels than they then have, differ by 1.5 levels on
    average, to two thirds of them by 0.9. (Boxes drawn in whole pixels of the smaller image move
    by up to half of one, which differs more: 4 to 9 levels.)
    """

    bands: tuple[int, ...] | None = None
    range: tuple[tuple[float, float], ...] | None = None
    draft: int = 0


def read_options(options: Mapping[str, str]) -> Reading:
    """The Reading that `bands=0,1,2`, `range=LOW:HIGH[,...]` and `draft=N` of a spec ask for."""
    bands, ranges = None, None
    if "bands" in options:
        try:
            bands = tuple(int(band) for band in options["bands"].split(","))
        except ValueError:
            bands = (-1,)
        if min(bands) < 0:
            raise ValueError(
                f"bands={options['bands']!r} is not a list of band numbers from 0, such as "
                f"bands=2,1,0."
            )
    if "range" in options:
        pairs = [pair.split(":") for pair in options["range"].split(",")]
        try:
            ranges = tuple((float(low), float(high)) for low, high in pairs)
        except ValueError:
            ranges = ((0.0, 0.0),)
        if not all(low < high and math.isfinite(high - low) for low, high in ranges):
            raise ValueError(
                f"range={options['range']!r} is not LOW:HIGH with LOW below HIGH (one pair, or one "
                f"for each band with commas between), such as range=0:4095."
            )
        if bands and len(ranges) not in (1, len(bands)):
            raise ValueError(
                f"range={options['range']!r} has {len(ranges)} pairs for the {len(bands)} bands "
                f"of bands={options['bands']}; expected one pair or one for each."
            )
    draft = options.get("draft", "0")
    if not draft.isdecimal():
        raise ValueError(f"draft={draft!r} is not a number of pixels, such as draft=256.")
    return Reading(bands, ranges, int(draft))


def decode(
    data: bytes | pa.Buffer, name: str, reading: Reading = Reading()
) -> UInt8[np.ndarray, "i j c"]:
    """Encoded bytes -> pixels, upright by EXIF; UnreadableImage (`name` and the reason) otherwise.

    Photographs become RGB: grey, palette, CMYK, alpha (dropped). TIFF and NPY keep the bands they
    have, unless these are one (grey), three, or three and what a TIFF says is alpha. 16 bits become
    8; other types need a range.
    """
    try:
        pixels = _levels(_bands(read_samples(data, reading.draft), reading.bands), reading.range)
        return np.require(pixels, requirements=["C", "W"])
    except MemoryError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ...
        reason = " ".join(re.sub(r" at 0x\w+", "", str(error)).split()) or type(error).__name__
        raise UnreadableImage(f"{name}: {reason}") from error


def _bands(samples: Samples, bands: tuple[int, ...] | None) -> Shaped[np.ndarray, "i j _"]:
    """The bands that were asked for; by default all, or RGB if the samples are a photograph's."""
    pixels = samples.bands
    colours = pixels.shape[2] - samples.alpha
    if colours == 1 and bands != (0,):
        return _bands(Samples(np.repeat(pixels[..., :1], 3, 2)), bands)
    if bands is None:
        return pixels[..., :3] if colours == 3 else pixels
    if max(bands) >= pixels.shape[2]:
        raise ValueError(f"has {pixels.shape[2]} bands, so there is no band {max(bands)}")
    return pixels[..., list(bands)]


def _levels(
    pixels: Shaped[np.ndarray, "i j c"], ranges: tuple[tuple[float, float], ...] | None
) -> UInt8[np.ndarray, "i j c"]:
    """Samples of any type -> 0..255."""
    if ranges is None:
        if pixels.dtype == np.uint8:
            return pixels
        if pixels.dtype == bool:
            return pixels.astype(np.uint8) * 255
        if pixels.dtype.kind == "u" and pixels.dtype.itemsize == 2:
            return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)  # rounded
        raise ValueError(_needs_range(pixels))
    if len(ranges) not in (1, pixels.shape[2]):
        raise ValueError(f"has {pixels.shape[2]} bands, but range= has {len(ranges)} pairs")
    # float32 for what it holds exactly, float64 for wider types
    with np.errstate(all="ignore"):
        low, high = np.array(ranges, np.result_type(pixels.dtype, np.float32)).T
        levels = (pixels - low) * (255 / (high - low))
    return np.nan_to_num(np.rint(levels), nan=0, posinf=255, neginf=0).clip(0, 255).astype(np.uint8)


def _needs_range(pixels: Shaped[np.ndarray, "i j c"]) -> str:
    finite = pixels[np.isfinite(pixels)]
    if not finite.size:
        return f"all pixels are {pixels.flat[0]}"
    found = f"{finite.min():.6g}:{finite.max():.6g}"
    return f"{pixels.dtype} pixels need a range to become 8 bits: range=LOW:HIGH, here {found}"


@dataclass(frozen=True, kw_only=True)
class EncodedSource:
    """A source whose images are encoded bytes; its kinds add `__len__`, `encoded` and `name`."""

    classes: tuple[str, ...] | None = None
    targets: Int64[np.ndarray, " n"] | None = field(default=None, repr=False)
    reading: Reading = Reading()

    def encoded(self, i: int) -> bytes | pa.Buffer:
        """The bytes of image `i` as they are stored; UnreadableImage if they cannot be read."""
        raise NotImplementedError

    def name(self, i: int) -> str:
        raise NotImplementedError

    def image(self, i: int) -> UInt8[np.ndarray, "i j c"]:
        return decode(self.encoded(i), self.name(i), self.reading)

    def label(self, i: int) -> int | None:
        return None if self.targets is None else int(self.targets[i])

    def labels(self) -> Int64[np.ndarray, " n"] | None:
        return self.targets
