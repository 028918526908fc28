"""Decoding: every format a source may hold, Pillow's pixels where it has them, and bad bytes."""

import io
import struct
import tracemalloc
import warnings
import zlib

import cv2
import numpy as np
import pyarrow as pa
import pytest
import tifffile
from PIL import Image, ImageOps

from dinojax.data.decode import Reading, UnreadableImage, decode, read_options

ALL = Reading(bands=tuple(range(5)))
WIDE = np.random.default_rng(0).integers(0, 65536, (20, 30, 5)).astype(np.uint16)


def picture(seed=0, size=(30, 20)):
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (4, 5, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


def encoded(image, kind="JPEG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def tiff(array, **options):
    stream = io.BytesIO()
    tifffile.imwrite(stream, array, **options)
    return stream.getvalue()


def npy(array, **options):
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def png(array):
    """A 16-bit PNG of 1 to 4 bands, row by row."""
    rows, columns, bands = array.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[bands]
    body = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", columns, rows, 16, kind, 0, 0, 0)),
        (b"iCCP", b"x\0\0" + zlib.compress(b"nonsense")),  # libpng would print about it
        (b"IDAT", zlib.compress(body)),
        (b"IEND", b""),
    ]
    made = [
        struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(made)


def eighth(samples):
    """16 bits -> 8: 65535 = 255 * 257."""
    return np.rint(samples / 257).astype(np.uint8)


def turned(pixels, orientation):
    """What EXIF's table says: where row 0 and column 0 of the stored image are seen."""
    return {
        1: lambda p: p,
        2: np.fliplr,
        3: lambda p: np.rot90(p, 2),
        4: np.flipud,
        5: lambda p: np.rot90(np.fliplr(p), 1),
        6: lambda p: np.rot90(p, -1),
        7: lambda p: np.rot90(np.fliplr(p), -1),
        8: lambda p: np.rot90(p, 1),
    }[orientation](pixels)


# ---- photographs --------------------------------------------------------------------------------


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_pixels_are_pillow_s(subsampling, progressive):
    data = encoded(picture(), subsampling=subsampling, progressive=progressive)
    expected = np.asarray(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(decode(data, "x"), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "16 bits"])
def test_exif_orientation_is_applied(orientation, kind):
    exif = Image.Exif()
    exif[0x112] = orientation
    if kind == "16 bits":  # through tifffile, the others through Pillow
        stored = eighth(WIDE[..., :3])
        data = tiff(WIDE[..., :3], photometric="rgb", extratags=[(274, 3, 1, orientation, True)])
    else:
        data = encoded(picture(), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
        stored = np.asarray(Image.open(io.BytesIO(encoded(picture(), kind))))
        stored = stored if kind == "JPEG" else np.asarray(picture())
    pixels = decode(data, "x")
    assert pixels.shape == ((20, 30, 3) if orientation < 5 else (30, 20, 3))
    np.testing.assert_array_equal(pixels, turned(stored, orientation))


def test_a_damaged_exif_tag_does_no_harm():
    exif = Image.Exif()
    exif[0x112] = 6
    data = encoded(picture(), exif=exif)
    at = data.index(b"Exif\0\0") + 6
    broken = data[:at] + b"\xff" * 8 + data[at + 8 :]
    np.testing.assert_array_equal(decode(broken, "x"), decode(encoded(picture()), "x"))


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("L", "JPEG"), ("CMYK", "JPEG"), ("RGBA", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("1", "PNG")]
    + [("RGB", "WEBP"), ("RGBA", "WEBP"), ("RGB", "BMP"), ("P", "GIF"), ("RGB", "PPM")]
    + [(mode, "TIFF") for mode in ("RGB", "L", "1", "P", "LA", "RGBA", "CMYK", "YCbCr", "LAB")],
)
def test_every_mode_becomes_rgb(mode, kind):
    image = picture()
    if mode == "LAB":
        image = Image.merge("LAB", image.split())
    data = encoded(image.convert(mode), kind)
    pixels = decode(data, "x")
    assert pixels.dtype == np.uint8 and pixels.shape == (20, 30, 3) and pixels.flags.writeable
    np.testing.assert_array_equal(pixels, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_transparency_by_palette_is_dropped_without_a_warning(recwarn):
    data = encoded(picture().convert("P"), "PNG", transparency=bytes(range(0, 250, 10)))
    colours = Image.open(io.BytesIO(data)).convert("RGBA").convert("RGB")
    np.testing.assert_array_equal(decode(data, "x"), np.asarray(colours))
    assert not recwarn


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_deflate", "jpeg", "packbits"])
def test_compressed_photographs_in_tiff(compression):
    data = encoded(picture(), "TIFF", compression=compression)
    expected = np.asarray(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(decode(data, "x"), expected)


def test_a_panorama():
    """20,000 x 1,000 pixels, and a size of which Pillow would warn."""
    pixels = decode(encoded(Image.new("RGB", (20_000, 1_000), (9, 99, 199))), "x")
    assert pixels.shape == (1_000, 20_000, 3) and np.ptp(pixels[::50, ::50], (0, 1)).max() == 0
    huge = encoded(Image.new("1", (50_000, 1_800)), "PPM")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(huge, "x", Reading(bands=(0,))).shape == (1_800, 50_000, 1)


# ---- more than 8 bits, more or fewer than 3 bands -----------------------------------------------


@pytest.mark.parametrize("bands", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_sixteen_bit_photographs(bands, kind):
    samples = WIDE[..., :bands]
    if kind == "png":
        data = png(samples)
    elif bands > 2:
        data = tiff(samples, photometric="rgb")
    else:
        extra = {"planarconfig": "contig", "extrasamples": ["unassalpha"]} if bands == 2 else {}
        data = tiff(samples, photometric="minisblack", **extra)
    expected = eighth(samples[..., :3] if bands > 2 else samples[..., [0, 0, 0]])
    np.testing.assert_array_equal(decode(data, "x"), expected)


def test_sixteen_bits_of_eight_are_the_eight():
    eight = np.asarray(picture())
    data = png(eight.astype(np.uint16) * 257)
    np.testing.assert_array_equal(decode(data, "x"), eight)
    np.testing.assert_array_equal(decode(data, "x"), np.asarray(Image.open(io.BytesIO(data))))


CONTIGUOUS = {"photometric": "minisblack", "planarconfig": "contig"}
SEPARATE = {"photometric": "minisblack", "planarconfig": "separate"}


@pytest.mark.parametrize(
    ("first", "options"),
    [
        (False, CONTIGUOUS),
        (False, CONTIGUOUS | {"byteorder": ">"}),
        (False, CONTIGUOUS | {"bigtiff": True}),
        (False, CONTIGUOUS | {"compression": "zlib", "predictor": True, "tile": (16, 16)}),
        (True, SEPARATE),
        (True, SEPARATE | {"compression": "zlib", "rowsperstrip": 7}),
        (False, {}),  # 20 pages of 30 x 5
        (True, {}),  # 5 pages of 20 x 30
        (True, {"imagej": True, "metadata": {"axes": "CYX"}}),
    ],
)
def test_a_tiff_of_five_bands_of_sixteen_bits(first, options):
    data = tiff(np.moveaxis(WIDE, 2, 0) if first else WIDE, **options)
    pixels = decode(data, "x")
    assert pixels.shape == (20, 30, 5) and pixels.flags.writeable
    np.testing.assert_array_equal(pixels, eighth(WIDE))


def test_eight_bit_tiffs_of_other_band_numbers_keep_them():
    narrow = (WIDE >> 8).astype(np.uint8)
    np.testing.assert_array_equal(decode(tiff(narrow, **CONTIGUOUS), "x"), narrow)
    two = tiff(narrow[..., :2], **CONTIGUOUS)
    np.testing.assert_array_equal(decode(two, "x"), narrow[..., :2])
    infrared = tiff(narrow[..., :4], photometric="rgb", extrasamples=["unspecified"])
    np.testing.assert_array_equal(decode(infrared, "x"), narrow[..., :4])


@pytest.mark.parametrize("order", ["C", "F"])
def test_npy(order):
    narrow = np.asarray(WIDE >> 8, np.uint8, order=order)
    np.testing.assert_array_equal(decode(npy(narrow), "x"), narrow)
    first = np.asarray(np.moveaxis(narrow, 2, 0), order=order)
    np.testing.assert_array_equal(decode(npy(first), "x"), narrow)
    np.testing.assert_array_equal(decode(npy(narrow[..., :4]), "x"), narrow[..., :4])
    np.testing.assert_array_equal(decode(npy(narrow[..., 0]), "x"), narrow[..., [0, 0, 0]])
    np.testing.assert_array_equal(decode(npy(WIDE), "x"), eighth(WIDE))
    np.testing.assert_array_equal(decode(npy(narrow > 9), "x"), (narrow > 9) * np.uint8(255))
    assert decode(npy(narrow), "x").flags.writeable


@pytest.mark.parametrize(
    "array",
    [
        np.array([{}, {}]).reshape(1, 2),
        np.zeros((2, 3, 4, 5)),
        np.zeros(7),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 4), np.complex64),
        np.zeros((4, 4), [("red", np.uint8)]),
    ],
)
def test_npy_of_something_else(array):
    with pytest.raises(UnreadableImage, match=r"^x: an array of .* expected numbers \[rows"):
        decode(npy(array), "x")


# ---- options ------------------------------------------------------------------------------------


def test_bands_are_chosen_in_their_order():
    narrow = (WIDE >> 8).astype(np.uint8)
    for data in (tiff(narrow, **CONTIGUOUS), npy(narrow)):
        for bands in ((4, 0, 2), (3,), (0, 0)):
            pixels = decode(data, "x", Reading(bands=bands))
            np.testing.assert_array_equal(pixels, narrow[..., list(bands)])
    photograph = np.asarray(picture().convert("RGBA"))
    data = encoded(picture().convert("RGBA"), "PNG")
    np.testing.assert_array_equal(decode(data, "x", Reading((3, 2))), photograph[..., [3, 2]])
    grey = encoded(picture().convert("L"), "PNG")
    one = np.asarray(picture().convert("L"))[..., None]
    np.testing.assert_array_equal(decode(grey, "x", Reading((0,))), one)
    np.testing.assert_array_equal(decode(grey, "x", Reading((2, 1))), one.repeat(2, 2))
    with pytest.raises(UnreadableImage, match="x: has 3 bands, so there is no band 4"):
        decode(encoded(picture()), "x", ALL)


def test_range_is_linear_clipped_and_knows_nan():
    values = np.array([[-5.0, 0.0, 1.0, 2.5, 10.0, 11.0, np.nan, np.inf, -np.inf]], np.float32)
    expected = [0, 0, 26, 64, 255, 255, 0, 255, 0]
    pixels = decode(npy(values), "x", Reading(bands=(0,), range=((0.0, 10.0),)))
    assert pixels[0, :, 0].tolist() == expected
    both = np.stack([values, 2 * values], 2).repeat(3, 0)
    pixels = decode(npy(both), "x", Reading(range=((0.0, 10.0), (0.0, 20.0))))
    assert pixels[0].T.tolist() == [expected, expected]
    signed = np.array([[-100, 0, 50, 100]], np.int16)
    pixels = decode(tiff(signed, photometric="minisblack"), "x", Reading(range=((-100.0, 100.0),)))
    assert pixels[0].tolist() == [[0] * 3, [128] * 3, [191] * 3, [255] * 3]
    wide = decode(tiff(WIDE, **CONTIGUOUS), "x", Reading(range=((0.0, 65535.0),)))
    np.testing.assert_array_equal(wide, eighth(WIDE))
    photograph = decode(encoded(picture(), "PNG"), "x", Reading(range=((50.0, 150.0),)))
    stretched = (np.asarray(picture()).astype(float) - 50) * 2.55
    assert np.abs(photograph - stretched.clip(0, 255)).max() <= 0.5001
    with pytest.raises(UnreadableImage, match="has 3 bands, but range= has 2 pairs"):
        decode(encoded(picture()), "x", Reading(range=((0.0, 1.0), (0.0, 2.0))))


@pytest.mark.parametrize("kind", [np.float32, np.float16, np.int16, np.int64, np.uint32])
def test_types_without_a_scale_need_a_range(kind):
    values = np.arange(12).reshape(3, 4).astype(kind)
    words = rf"^x: {np.dtype(kind)} pixels need a range .*range=LOW:HIGH, here 0:11$"
    with pytest.raises(UnreadableImage, match=words):
        decode(npy(values), "x")
    with pytest.raises(UnreadableImage, match="all pixels are nan"):
        decode(npy(np.full((2, 2), np.nan)), "x")


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(("draft", "scale"), [(100, 1), (99, 2), (51, 2), (50, 4), (25, 8), (1, 8)])
def test_draft_reads_a_jpeg_at_a_fraction(draft, scale, mode):
    data = encoded(picture(size=(301, 197)).convert(mode))
    pixels = decode(data, "x", Reading(draft=draft))
    assert pixels.shape == (-(-197 // scale), -(-301 // scale), 3)
    image = Image.open(io.BytesIO(data))
    image.draft(None, (301 // scale, 197 // scale))
    np.testing.assert_array_equal(pixels, np.asarray(image.convert("RGB")))


def test_draft_is_upright_and_for_jpeg_alone():
    exif = Image.Exif()
    exif[0x112] = 6
    tall = encoded(picture(size=(400, 200)), exif=exif)
    assert decode(tall, "x", Reading(draft=90)).shape == (200, 100, 3)
    assert decode(encoded(picture(), "PNG"), "x", Reading(draft=1)).shape == (20, 30, 3)
    thin = encoded(picture(size=(30, 1)).convert("CMYK"))
    assert decode(thin, "x", Reading(draft=1)).shape[0] == 1


def test_options_of_a_spec():
    assert read_options({"split": "train"}) == Reading()
    found = read_options({"bands": "3,0", "range": "0:1e4,-1:.5", "draft": "256"})
    assert found == Reading(bands=(3, 0), range=((0.0, 1e4), (-1.0, 0.5)), draft=256)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bands": "a"}, "bands='a' is not a list of band numbers from 0"),
        ({"bands": "0,-1"}, "bands='0,-1' is not"),
        ({"bands": ""}, "bands='' is not"),
        ({"range": "5"}, "range='5' is not LOW:HIGH"),
        ({"range": "5:2"}, "range='5:2' is not LOW:HIGH with LOW below HIGH"),
        ({"range": "0:inf"}, "range='0:inf' is not"),
        ({"range": "nan:1"}, "range='nan:1' is not"),
        ({"bands": "0,1,2", "range": "0:1,0:2"}, "has 2 pairs for the 3 bands of bands=0,1,2"),
        ({"draft": "-1"}, "draft='-1' is not a number of pixels"),
    ],
)
def test_options_that_cannot_be(options, words):
    with pytest.raises(ValueError, match=words):
        read_options(options)


# ---- bad bytes ----------------------------------------------------------------------------------

FILES = {
    "jpeg": encoded(picture(size=(90, 60))),
    "progressive": encoded(picture(size=(90, 60)), progressive=True),
    "cmyk": encoded(picture(size=(90, 60)).convert("CMYK")),
    "png": encoded(picture(size=(90, 60)), "PNG"),
    "png 16": png(WIDE[..., :3]),
    "webp": encoded(picture(size=(90, 60)), "WEBP"),
    "tiff": encoded(picture(size=(90, 60)), "TIFF"),
    "lzw": encoded(picture(size=(90, 60)), "TIFF", compression="tiff_lzw"),
    "fax": encoded(picture(size=(90, 60)).convert("1"), "TIFF", compression="group4"),
    "five bands": tiff(WIDE, **CONTIGUOUS),
    "five tiled bands": tiff(WIDE, **CONTIGUOUS, compression="zlib", tile=(16, 16)),
    "five pages": tiff(np.moveaxis(WIDE, 2, 0)),
    "npy": npy(WIDE),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.8])
def test_truncated_files_are_unreadable(name, kept):
    data = FILES[name]
    with pytest.raises(UnreadableImage, match=r"^some/name: "):
        decode(data[: int(len(data) * kept)], "some/name")


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_raise_one_exception_and_print_nothing(name, capfd):
    data, rng = FILES[name], np.random.default_rng(0)
    damaged = [data[:length] for length in np.linspace(1, len(data) - 1, 20).astype(int)]
    for _ in range(60):
        bad = bytearray(data)
        for place in rng.integers(0, len(data), 4):
            bad[place] = rng.integers(256)
        damaged.append(bytes(bad))
    outcomes = set()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for bad in damaged:
            try:
                assert decode(bad, "x").dtype == np.uint8
                outcomes.add("image")
            except UnreadableImage as error:
                assert str(error).startswith("x: ") and "\n" not in str(error)
                assert " at 0x" not in str(error)
                outcomes.add("unreadable")
    assert "unreadable" in outcomes
    assert capfd.readouterr() == ("", "")


def test_a_jpeg_damaged_in_the_middle_is_what_pillow_makes_of_it(capfd):
    data = bytearray(FILES["jpeg"])
    middle = len(data) // 2
    data[middle : middle + 40] = b"\0" * 40
    expected = np.asarray(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(decode(bytes(data), "x"), expected)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", FILES)
def test_arrow_buffers_are_bytes_too(name):
    data = FILES[name]
    np.testing.assert_array_equal(decode(pa.py_buffer(data), "x"), decode(data, "x"))


def test_trailing_bytes_do_no_harm():
    data = encoded(picture())
    np.testing.assert_array_equal(decode(data + b"\0\0\0", "x"), decode(data, "x"))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"no image at all", "not an image of a known format"),
        (b"<html>404</html>" * 50, "not an image of a known format"),
        (b"\xff\xd8\xff", "not an image of a known format"),
    ],
)
def test_bytes_that_are_no_image(data, reason):
    with pytest.raises(UnreadableImage, match=rf"^x: {reason}$"):
        decode(data, "x")


def bomb(kind):
    """A header of 46,000 x 46,000 pixels (2.1 gigapixels) and hardly a byte behind it."""
    side = 46_000
    if kind == "npy":
        header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({side}, {side}), }}"
        return b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header.encode() + b"\0" * 99
    if kind == "jpeg":
        data = bytearray(encoded(picture()))
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", side, side)
        return bytes(data)
    if kind in ("png", "png 16"):
        data = bytearray(encoded(picture(), "PNG") if kind == "png" else png(WIDE[..., :3]))
        data[16:24] = struct.pack(">II", side, side)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
        return bytes(data)
    data = bytearray(FILES[kind])
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        tags = file.pages.first.tags
        for tag in ("ImageWidth", "ImageLength"):
            data[tags[tag].offset + 2 : tags[tag].offset + 12] = struct.pack("<HII", 4, 1, side)
    return bytes(data)


@pytest.mark.parametrize("kind", ["jpeg", "png", "png 16", "npy", "tiff", "five bands", "lzw"])
def test_a_decompression_bomb_allocates_nothing(kind):
    data = bomb(kind)
    tracemalloc.start()
    with pytest.raises(UnreadableImage, match="decompression bomb|GB|buffer is smaller"):
        decode(data, "x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6, peak


def test_a_missing_codec_is_named():
    if "imagecodecs" in str(getattr(tifffile.tifffile.imagecodecs, "__name__", "")).split("."):
        pytest.skip("imagecodecs is installed: it reads LZW")
    data = cv2.imencode(".tiff", WIDE[..., :3])[1].tobytes()
    with pytest.raises(UnreadableImage, match="^x: LZW compression of uint16 in 3 bands needs"):
        decode(data, "x")


def test_exif_transpose_agrees_on_a_pillow_only_file():
    """CMYK JPEGs go through Pillow: upright once, not twice."""
    exif = Image.Exif()
    exif[0x112] = 6
    data = encoded(picture().convert("CMYK"), exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    np.testing.assert_array_equal(decode(data, "x"), np.asarray(expected))
