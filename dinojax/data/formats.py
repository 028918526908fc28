"""Bytes of one image file -> the samples stored in it, one function a family of formats.

Called by `data.decode`, which makes uint8 pixels of them and turns whatever is raised here into an
UnreadableImage, and by `data.survey`, which wants them as they are stored. Nothing here prints:
libjpeg's messages are exceptions (simplejpeg), the warnings of Pillow and tifffile are off.
"""

import ctypes
import io
import logging
import math
import re
import warnings
import zlib
from typing import NamedTuple

import cv2
import numpy as np
import pyarrow as pa
import simplejpeg
import tifffile
from jaxtyping import Shaped, UInt8, UInt16
from PIL import Image, UnidentifiedImageError

_NPY = b"\x93NUMPY"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two: BigTIFF
# Pillow refuses 179 million pixels and more as a decompression bomb. Samples may be of 8 bytes, so
# here bytes count: as many as that in RGBA, 0.7 GB.
_MOST_BYTES = 4 * 2 * 89_478_485
_TURNS = {3: cv2.ROTATE_180, 6: cv2.ROTATE_90_CLOCKWISE, 8: cv2.ROTATE_90_COUNTERCLOCKWISE}
_QUIET = ("ignore", None, Warning, re.compile(r"PIL\.|tifffile"), 0)


class Samples(NamedTuple):
    """What a file stores, upright, of any type. `alpha`: the last band is transparency."""

    bands: Shaped[np.ndarray, "i j c"]
    alpha: bool = False


def read_samples(data: bytes | pa.Buffer, draft: int = 0) -> Samples:
    """The samples of a JPEG, PNG, WebP, TIFF, NPY, ... file; any exception if it cannot be read.

    Palette, CMYK, YCbCr and Lab become RGB; all else keeps its bands and its type. `draft`: see
    `decode.Reading`.
    """
    _silence()
    head = bytes(memoryview(data)[:6])
    if not head:
        raise ValueError("the file is empty")
    if head == _NPY:
        return _npy(data)
    if head[:4] in _TIFF:
        return _tiff(data)
    return _picture(data, draft)


def _silence() -> None:
    # Not at import: whoever sets filters later (pytest, for each test) would have the last word.
    if warnings.filters[:1] != [_QUIET]:
        warnings.filterwarnings("ignore", category=Warning, module=_QUIET[3].pattern)
        for library in ("PIL", "tifffile"):  # they also log, and logging prints by default
            logging.getLogger(library).setLevel(logging.CRITICAL + 1)
        # libtiff prints by itself, and Pillow lets it; None means no handler.
        pillow = ctypes.CDLL(Image.core.__file__)
        if hasattr(pillow, "TIFFSetErrorHandler"):
            pillow.TIFFSetErrorHandler(None)
            pillow.TIFFSetWarningHandler(None)


# ---- what Pillow knows --------------------------------------------------------------------------


def _picture(data: bytes | pa.Buffer, draft: int = 0) -> Samples:
    try:
        image = Image.open(io.BytesIO(data))  # checks the size, reads no pixels
    except UnidentifiedImageError:
        raise ValueError("not an image of a known format") from None
    with image:
        pixels = None
        if image.format == "JPEG":
            scale = _scale(image.size, draft)
            if image.mode in ("RGB", "L"):
                pixels = _jpeg(data, image.size, scale)
            if pixels is None and scale > 1:
                image.draft(None, tuple(max(1, side // scale) for side in image.size))
        elif image.format == "PNG" and data[24] == 16 and image.mode in ("RGB", "RGBA"):
            image.load()  # raises what is wrong with the file; OpenCV would print it
            pixels = _png_16(data)
        if pixels is None:
            pixels = _pillow_pixels(image)
        # After the pixels: Pillow turns TIFFs upright as it reads them, and drops the tag.
        return Samples(_upright(pixels, _orientation(image)), pixels.shape[2] in (2, 4))


def _jpeg(
    data: bytes | pa.Buffer, size: tuple[int, int], scale: int
) -> UInt8[np.ndarray, "i j 3"] | None:
    """By libjpeg-turbo; None for a damaged file, of which Pillow has the last word.

    Pillow's very pixels, in 0.95 ms where OpenCV takes 1.02 and Pillow 1.23 (500x375, quality 90);
    and OpenCV lets libjpeg print its remarks about damaged files.
    """
    width, height = (-(-side // scale) for side in size)
    try:
        return simplejpeg.decode_jpeg(data, min_height=height, min_width=width)
    except ValueError:
        return None


def _scale(size: tuple[int, int], draft: int) -> int:
    """The strongest of 1/8, 1/4 and 1/2 that leaves the shorter side at least `draft` pixels."""
    fits = (scale for scale in (8, 4, 2) if draft and -(-min(size) // scale) >= draft)
    return next(fits, 1)


def _png_16(data: bytes | pa.Buffer) -> UInt16[np.ndarray, "i j c"]:
    """Colour at 16 bits, of which Pillow keeps 8. Grey with alpha comes as RGBA."""
    view = memoryview(data)
    kept, at = [bytes(view[:8])], 8
    while at < len(view):  # only the chunks needed for pixels: libpng prints about the others
        end = at + 12 + int.from_bytes(view[at : at + 4], "big")
        chunk = view[at:end]
        if end > len(view) or zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:], "big"):
            raise ValueError("the PNG is damaged")
        if chunk[4] & 32 == 0:  # a capital letter
            kept.append(bytes(chunk))
        at = end
    pixels = cv2.imdecode(np.frombuffer(b"".join(kept), np.uint8), cv2.IMREAD_UNCHANGED)
    return pixels[..., [2, 1, 0, 3][: pixels.shape[2]]]


def _pillow_pixels(image: Image.Image) -> Shaped[np.ndarray, "i j c"]:
    if image.mode == "1":
        image = image.convert("L")
    elif image.mode in ("LA", "La", "RGBA", "RGBa"):
        image = image.convert(image.mode.upper())
    elif image.mode not in ("L", "F") and not image.mode.startswith("I"):
        image = image.convert("RGB")
    pixels = np.array(image)
    if image.mode == "I":  # 16-bit grey of PGM (and of PNG, once)
        pixels = pixels.clip(0, 65535).astype(np.uint16)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _orientation(image: Image.Image) -> int:
    """EXIF's 1..8; 1 where it says nothing, or nothing one can read."""
    try:
        return int(image.getexif().get(0x112, 1))
    except Exception:  # struct.error, ValueError, SyntaxError, ... : a damaged tag, not a bad image
        return 1


def _upright(pixels: Shaped[np.ndarray, "i j c"], orientation: int) -> Shaped[np.ndarray, "_ _ c"]:
    if orientation in _TURNS and pixels.shape[2] == 3 and pixels.dtype == np.uint8:
        return cv2.rotate(pixels, _TURNS[orientation])  # 18 ms for 12 megapixels, numpy takes 80
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


# ---- what it does not ---------------------------------------------------------------------------


def _tiff(data: bytes | pa.Buffer) -> Samples:
    """Photographs of 8 bits and grey ones of 16 by Pillow, all else by tifffile.

    The first page; a series of pages that tifffile's or ImageJ's remarks in the file declare to be
    one array or one image is that.
    """
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages.first
        alpha = page.extrasamples[-1:] in ((1,), (2,))
        colours = page.samplesperpixel - alpha
        series = file.series[0]
        if series.axes in ("QYX", "CYX"):
            _check_bytes(series.shape, series.dtype)
            stack = series.asarray(maxworkers=1)
            if series.axes == "CYX":
                return Samples(np.moveaxis(stack, 0, 2))
            return Samples(_bands_last(stack))
        if _pillow_reads(page, colours):
            return _picture(data)
        if page.axes not in ("YX", "YXS", "SYX") or page.dtype is None:
            raise ValueError(f"a TIFF of axes {page.axes} and type {page.dtype}, expected pixels")
        _check_bytes(page.shape, page.dtype)
        try:
            pixels = page.asarray(maxworkers=1)
        except ValueError as error:
            if "imagecodecs" not in str(error):
                raise
            raise ValueError(
                f"{page.compression.name} compression of {page.dtype} in {page.samplesperpixel} "
                f"bands needs a package: pip install imagecodecs"
            ) from error
        if page.axes == "SYX":
            pixels = np.moveaxis(pixels, 0, 2)
        pixels = pixels.reshape(*pixels.shape[:2], -1)
        return Samples(_upright(pixels, page.tags.valueof("Orientation", 1)), alpha)


def _pillow_reads(page: tifffile.TiffPage, colours: int) -> bool:
    if page.sampleformat != 1:
        return False
    if page.bitspersample == 16:
        return page.samplesperpixel == 1
    grey = page.photometric in (tifffile.PHOTOMETRIC.MINISWHITE, tifffile.PHOTOMETRIC.MINISBLACK)
    cmyk = page.photometric == tifffile.PHOTOMETRIC.SEPARATED and colours == 4
    return page.bitspersample <= 8 and (colours == 1 or colours == 3 and not grey or cmyk)


def _npy(data: bytes | pa.Buffer) -> Samples:
    """A numeric array: [i, j], [i, j, c], or [c, i, j] if c is at most half of either side.

    Nothing is unpickled, and no memory allocated: the pixels are a view of `data`.
    """
    stream = io.BytesIO(data)
    headers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    shape, fortran, kind = headers[np.lib.format.read_magic(stream)](stream)
    if len(shape) not in (2, 3) or kind.kind not in "buif" or not math.prod(shape):
        raise ValueError(f"an array of {kind} {shape}, expected numbers [rows, columns, bands]")
    values = np.frombuffer(data, kind, math.prod(shape), stream.tell())
    return Samples(_bands_last(values.reshape(shape, order="F" if fortran else "C")))


def _bands_last(array: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "i j c"]:
    if array.ndim == 2:
        return array[..., None]
    bands_first = 2 * array.shape[0] <= min(array.shape[1:])
    return np.moveaxis(array, 0, 2) if bands_first else array


def _check_bytes(shape: tuple[int, ...], kind: np.dtype) -> None:
    if math.prod(shape) * kind.itemsize > _MOST_BYTES:
        raise ValueError(
            f"{kind} {shape} takes {math.prod(shape) * kind.itemsize / 1e9:.1f} GB, more than the "
            f"{_MOST_BYTES / 1e9:.1f} GB that an image may"
        )
