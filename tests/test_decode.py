"""The decoder: exact pixels for every format and mode, and a rejection for all other bytes."""

import io
import os
import random
import struct
import time
import tracemalloc
import warnings
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from brainray.errors import RejectedImage
from brainray.images.decode import REJECTION_REASONS, DecodeLimits, decode_image, decode_samples
from brainray.images.headers import ACCEPTED

RNG = np.random.default_rng(20240607)
GREY = RNG.integers(0, 256, (13, 19), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (13, 19, 3), dtype=np.uint8)
WITH_ALPHA = RNG.integers(0, 256, (13, 19, 4), dtype=np.uint8)
DEEP = RNG.integers(0, 2**16, (13, 19, 4), dtype=np.uint16)


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """Fail on warnings. They are recorded: raised inside Pillow, they would reject the file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert [str(warning.message) for warning in caught] == []


def encode(pixels: NDArray | Image.Image, format_name: str, **options) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


def decode_with_pillow(data: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("L"))


def compute_luma(rgb: NDArray) -> NDArray:
    """ITU-R 601-2 in Pillow's fixed point (libImaging/Convert.c)."""
    r, g, b = (rgb[..., band].astype(np.int64) for band in range(3))
    return ((r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16).astype(rgb.dtype)


def over_black(grey: NDArray, alpha: NDArray) -> NDArray[np.uint8]:
    return np.rint(grey.astype(float) * alpha / 255).astype(np.uint8)


def scale_16(samples: NDArray) -> NDArray[np.uint8]:
    """Round v * 255 / 65535, the definition that libpng's shift form is exact for."""
    return np.floor(samples.astype(float) * 255 / 65535 + 0.5).astype(np.uint8)


def reject(data: bytes, reason: str, limits: DecodeLimits | None = None) -> str:
    with pytest.raises(RejectedImage) as caught:
        decode_image(data, limits or DecodeLimits())
    assert caught.value.reason == reason, caught.value.message
    assert reason in REJECTION_REASONS
    return caught.value.message


def chunk(kind: bytes, contents: bytes) -> bytes:
    check = struct.pack(">L", zlib.crc32(kind + contents))
    return struct.pack(">L", len(contents)) + kind + contents + check


def make_png(size, bits, colour, packed, *extra, lace=0) -> bytes:
    header = chunk(b"IHDR", struct.pack(">LLBBBBB", *size, bits, colour, 0, 0, lace))
    parts = [b"\x89PNG\r\n\x1a\n", header, *extra, chunk(b"IDAT", packed), chunk(b"IEND", b"")]
    return b"".join(parts)


def make_deep_png(samples: NDArray, colour: int, *extra: bytes) -> bytes:
    """Filter every other row with Sub, so that a wrong pixel stride changes the pixels."""
    height, width = samples.shape[:2]
    step, rows = samples[0, 0].nbytes, []
    for index, row in enumerate(samples.astype(">u2")):
        line = np.frombuffer(row.tobytes(), np.uint8).astype(np.int64)
        if index % 2:
            line[step:] = line[step:] - line[:-step]
        rows.append(bytes([index % 2]) + (line % 256).astype(np.uint8).tobytes())
    return make_png((width, height), 16, colour, zlib.compress(b"".join(rows)), *extra)


def make_tiff(samples: NDArray, order: str, *, photometric=1, big=False, **changed) -> bytes:
    """Build an uncompressed, one-strip TIFF by hand, in either byte order."""
    height, width = samples.shape[:2]
    bands = samples.shape[2] if samples.ndim == 3 else 1
    raw = samples.astype(samples.dtype.newbyteorder(order)).tobytes()
    bits = samples.dtype.itemsize * 8
    start = 16 if big else 8
    tags = {256: [width], 257: [height], 258: [bits] * bands, 259: [1], 262: [photometric]}
    tags |= {273: [start], 277: [bands], 278: [height], 279: [len(raw)]}
    tags |= {int(tag): values for tag, values in changed.pop("tags", {}).items()}
    word, inline = ("Q", 8) if big else ("L", 4)
    directory = start + len(raw)
    spill_at = directory + (8 if big else 2) + (20 if big else 12) * len(tags) + inline
    entries, spill = b"", b""
    for tag, values in sorted(tags.items()):
        code, kind = ("H", 3) if max(values) < 65536 else ("L", 4)
        packed = struct.pack(f"{order}{len(values)}{code}", *values)
        if len(packed) > inline:
            where = struct.pack(order + word, spill_at + len(spill))
            spill, packed = spill + packed, where
        entries += struct.pack(f"{order}HH{word}", tag, kind, len(values)) + packed.ljust(
            inline, b"\0"
        )
    mark = b"II" if order == "<" else b"MM"
    if big:
        head = mark + struct.pack(order + "HHHQ", 43, 8, 0, directory)
    else:
        head = mark + struct.pack(order + "HL", 42, directory)
    count = struct.pack(order + ("Q" if big else "H"), len(tags))
    return head + raw + count + entries + bytes(inline) + spill


# ---- pixels of every format ----------------------------------------------------------------------


@pytest.mark.parametrize("format_name", ["PNG", "BMP", "GIF", "TIFF"])
def test_grey_is_exact_in_every_lossless_format(format_name: str) -> None:
    grey = decode_image(encode(GREY, format_name))
    np.testing.assert_array_equal(grey, GREY)
    assert grey.dtype == np.uint8
    assert grey.flags.c_contiguous
    assert not grey.flags.writeable


def test_webp_is_read_losslessly_with_and_without_alpha() -> None:
    data = encode(COLOUR, "WEBP", lossless=True)
    np.testing.assert_array_equal(decode_image(data), compute_luma(COLOUR))
    data = encode(WITH_ALPHA, "WEBP", lossless=True, exact=True)
    expected = over_black(compute_luma(WITH_ALPHA), WITH_ALPHA[..., 3])
    np.testing.assert_array_equal(decode_image(data), expected)
    smooth = np.tile(np.arange(0, 240, 4, dtype=np.uint8), (40, 1))
    lossy = decode_image(encode(np.dstack([smooth] * 3), "WEBP", quality=95))
    assert np.abs(lossy.astype(int) - smooth).max() < 12


@pytest.mark.parametrize("format_name", ["PNG", "BMP", "TIFF"])
def test_colour_becomes_luminance(format_name: str) -> None:
    np.testing.assert_array_equal(decode_image(encode(COLOUR, format_name)), compute_luma(COLOUR))


@pytest.mark.parametrize("format_name", ["PNG", "TIFF"])
def test_transparent_pixels_are_blended_with_black(format_name: str) -> None:
    expected = over_black(compute_luma(WITH_ALPHA), WITH_ALPHA[..., 3])
    np.testing.assert_array_equal(decode_image(encode(WITH_ALPHA, format_name)), expected)
    pair = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(WITH_ALPHA[..., 3])])
    expected = over_black(GREY, WITH_ALPHA[..., 3])
    np.testing.assert_array_equal(decode_image(encode(pair, format_name)), expected)


@pytest.mark.parametrize("format_name", ["PNG", "BMP", "GIF", "TIFF"])
def test_one_bit_is_black_and_white(format_name: str) -> None:
    image = Image.fromarray(GREY > 127)
    assert image.mode == "1"
    expected = np.where(GREY > 127, 255, 0)
    np.testing.assert_array_equal(decode_image(encode(image, format_name)), expected)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_shallow_grey_png_fills_the_range(bits: int) -> None:
    levels = 2**bits
    samples = np.arange(64) % levels
    row = np.packbits((samples[:, None] >> np.arange(bits)[::-1] & 1).astype(np.uint8)).tobytes()
    data = make_png((64, 1), bits, 0, zlib.compress(b"\0" + row))
    np.testing.assert_array_equal(decode_image(data)[0], samples * 255 // (levels - 1))
    clear = make_png((64, 1), bits, 0, zlib.compress(b"\0" + row), chunk(b"tRNS", b"\0\1"))
    expected = np.where(samples == 1, 0, samples * 255 // (levels - 1))
    np.testing.assert_array_equal(decode_image(clear)[0], expected)


@pytest.mark.parametrize("format_name", ["PNG", "BMP", "GIF", "TIFF"])
def test_palette(format_name: str) -> None:
    image = Image.fromarray(COLOUR).quantize(40)
    expected = compute_luma(np.asarray(image.convert("RGB")))
    np.testing.assert_array_equal(decode_image(encode(image, format_name)), expected)


@pytest.mark.parametrize("format_name", ["PNG", "GIF"])
def test_transparency_of_a_palette_becomes_black(format_name: str) -> None:
    image = Image.fromarray(COLOUR).quantize(40)
    entries = np.asarray(image)
    luma = compute_luma(np.asarray(image.convert("RGB")))
    assert luma[entries == 7].any()
    grey = decode_image(encode(image, format_name, transparency=7))
    np.testing.assert_array_equal(grey, np.where(entries == 7, 0, luma))


def test_transparency_of_a_grey_gif_becomes_black() -> None:
    """All 256 greys in order make Pillow read the palette as mode L."""
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    data = encode(ramp, "GIF", transparency=45)
    np.testing.assert_array_equal(decode_image(data), np.where(ramp == 45, 0, ramp))


def test_palette_with_an_alpha_for_each_entry() -> None:
    image = Image.fromarray(COLOUR).quantize(40)
    alphas = np.arange(40, dtype=np.uint8) * 6
    luma = compute_luma(np.asarray(image.convert("RGB")))
    grey = decode_image(encode(image, "PNG", transparency=alphas.tobytes()))
    np.testing.assert_array_equal(grey, over_black(luma, alphas[np.asarray(image)]))


def test_rgb_png_with_a_transparent_colour() -> None:
    colour = tuple(int(band) for band in COLOUR[3, 4])
    expected = compute_luma(COLOUR)
    assert expected[3, 4] != 0
    expected[(COLOUR[3, 4] == COLOUR).all(axis=-1)] = 0
    np.testing.assert_array_equal(
        decode_image(encode(COLOUR, "PNG", transparency=colour)), expected
    )


def test_sixteen_bit_ramp_is_scaled_not_clipped() -> None:
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = scale_16(ramp)
    assert expected.flat[[0, 128, 129, 257, 32768, 65535]].tolist() == [0, 0, 1, 1, 128, 255]
    np.testing.assert_array_equal(decode_image(encode(ramp, "PNG")), expected)
    for order in "<>":
        np.testing.assert_array_equal(decode_image(make_tiff(ramp, order)), expected)
    inverted = decode_image(make_tiff(ramp, "<", photometric=0))
    np.testing.assert_array_equal(inverted, 255 - expected)
    packed = encode(ramp, "TIFF", compression="tiff_adobe_deflate")
    np.testing.assert_array_equal(decode_image(packed), expected)


def test_sixteen_bit_colour_keeps_its_full_depth() -> None:
    rgb, alpha = compute_luma(DEEP), DEEP[..., 3].astype(float)
    assert rgb.dtype == np.uint16
    files = {
        make_deep_png(DEEP[..., :3], 2): rgb,
        make_deep_png(DEEP, 6): np.rint(rgb * alpha / 65535),
        make_deep_png(DEEP[..., :2], 4): np.rint(DEEP[..., 0] * (DEEP[..., 1] / 65535)),
        make_tiff(DEEP[..., :3], "<", photometric=2): rgb,
        make_tiff(DEEP[..., :3], ">", photometric=2): rgb,
    }
    for data, expected in files.items():
        samples = decode_samples(data)
        np.testing.assert_array_equal(samples, expected)
        assert samples.dtype == np.uint16
        assert samples.dtype.isnative
        np.testing.assert_array_equal(decode_image(data), scale_16(expected))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_sixteen_bit_samples_are_unscaled_and_upright(orientation: int) -> None:
    deep = DEEP[..., 0]
    for order, white_is_zero in (("<", False), (">", False), ("<", True)):
        data = make_tiff(deep, order, photometric=1 - white_is_zero, tags={274: [orientation]})
        samples = decode_samples(data)
        expected = turn(65535 - deep if white_is_zero else deep)[orientation]
        np.testing.assert_array_equal(samples, expected)
        assert samples.dtype == np.uint16
        assert samples.flags.c_contiguous
        assert not samples.flags.writeable
        assert not decode_image(data).flags.writeable


def test_sixteen_bit_transparent_colour_is_matched_in_sixteen_bits() -> None:
    samples = np.array([[0x1234, 0x1235, 0xFFFF]], np.uint16)
    data = make_deep_png(samples[..., None], 0, chunk(b"tRNS", b"\x12\x34"))
    assert decode_image(data).tolist() == [[0, 18, 255]]
    colours = np.repeat(samples[..., None], 3, axis=2)
    data = make_deep_png(colours, 2, chunk(b"tRNS", b"\x12\x34" * 3))
    assert decode_image(data).tolist() == [[0, 18, 255]]


def test_interlaced_png() -> None:
    # One Adam7 pixel per pass that exists in a 2 x 2 image: passes 1, 6 and 7.
    raw = b"\0\x0a" + b"\0\x14" + b"\0\x1e\x28"
    data = make_png((2, 2), 8, 0, zlib.compress(raw), lace=1)
    assert decode_image(data).tolist() == [[10, 20], [30, 40]]
    short = make_png((2, 2), 8, 0, zlib.compress(raw[:-1]), lace=1)
    reject(short, "truncated")


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_equals_pillow(mode: str, progressive: bool) -> None:
    data = encode(Image.fromarray(COLOUR).convert(mode), "JPEG", progressive=progressive)
    grey = decode_image(data)
    np.testing.assert_array_equal(grey, decode_with_pillow(data))
    assert np.corrcoef(grey.ravel(), compute_luma(COLOUR).ravel())[0, 1] > 0.8  # not inverted


def test_ycck_jpeg_is_recognised_by_its_adobe_marker() -> None:
    plain = encode(Image.new("CMYK", (16, 16), (200, 30, 90, 20)), "JPEG")
    at = plain.index(b"Adobe") + 11
    ycck = plain[:at] + b"\x02" + plain[at + 1 :]
    np.testing.assert_array_equal(decode_image(ycck), decode_with_pillow(ycck))
    assert not np.array_equal(decode_image(ycck), decode_image(plain))


@pytest.mark.parametrize("compression", ["tiff_lzw", "packbits", "tiff_deflate", "jpeg", "group4"])
def test_compressed_tiff_equals_pillow(compression: str) -> None:
    image = Image.fromarray(GREY > 127) if compression == "group4" else Image.fromarray(COLOUR)
    data = encode(image, "TIFF", compression=compression)
    np.testing.assert_array_equal(decode_image(data), decode_with_pillow(data))


def test_big_tiff_and_cmyk_tiff() -> None:
    for order in "<>":
        np.testing.assert_array_equal(decode_image(make_tiff(GREY, order, big=True)), GREY)
    data = encode(Image.fromarray(COLOUR).convert("CMYK"), "TIFF")
    np.testing.assert_array_equal(decode_image(data), decode_with_pillow(data))


@pytest.mark.parametrize("format_name", ["PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP"])
def test_one_pixel(format_name: str) -> None:
    options = {"lossless": True} if format_name == "WEBP" else {}
    data = encode(np.full((1, 1, 3), 200, np.uint8), format_name, **options)
    assert decode_image(data).tolist() == [[200]]


def turn(grey: NDArray) -> dict[int, NDArray]:
    """Return the upright image for each EXIF orientation of the stored image."""
    return {
        1: grey,
        2: np.fliplr(grey),
        3: np.rot90(grey, 2),
        4: np.flipud(grey),
        5: grey.T,
        6: np.rot90(grey, -1),
        7: np.rot90(grey.T, 2),
        8: np.rot90(grey, 1),
    }


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    jpeg = decode_image(encode(GREY, "JPEG", quality=100, exif=exif.tobytes()))
    upright = decode_with_pillow(encode(GREY, "JPEG", quality=100))
    for candidate, turned in turn(upright).items():  # only this orientation
        assert np.array_equal(jpeg, turned) == (candidate == orientation)
    png = encode(GREY, "PNG", exif=exif.tobytes())
    tiff = encode(GREY, "TIFF", tiffinfo={274: orientation})
    webp = encode(GREY, "WEBP", lossless=True, exif=exif.tobytes())
    for data in (png, tiff, webp):
        grey = decode_image(data)
        np.testing.assert_array_equal(grey, turn(GREY)[orientation])
        assert grey.flags.c_contiguous


# ---- rejections ----------------------------------------------------------------------------------


def list_samples() -> dict[str, bytes]:
    """Encode small valid files of each format."""
    exif = Image.Exif()
    exif[274] = 6
    return {
        "jpeg": encode(COLOUR, "JPEG", exif=exif.tobytes()),
        "progressive jpeg": encode(GREY, "JPEG", progressive=True),
        "png": encode(COLOUR, "PNG", exif=exif.tobytes(), dpi=(72, 72)),
        "palette png": encode(Image.fromarray(COLOUR).quantize(9), "PNG", transparency=b"\x07\x50"),
        "deep png": make_deep_png(DEEP, 6),
        "bmp": encode(COLOUR, "BMP"),
        "gif": encode(Image.fromarray(COLOUR).quantize(9), "GIF", transparency=3),
        "tiff": encode(GREY, "TIFF", tiffinfo={274: 5}),
        "lzw tiff": encode(COLOUR, "TIFF", compression="tiff_lzw"),
        "deep tiff": make_tiff(DEEP[..., :3], ">", photometric=2),
        "webp": encode(COLOUR, "WEBP", exif=exif.tobytes()),
        "lossless webp": encode(WITH_ALPHA, "WEBP", lossless=True),
    }


SAMPLES = list_samples()


@pytest.mark.parametrize("name", SAMPLES)
def test_the_display_of_a_file_is_its_samples_scaled_to_eight_bits(name: str) -> None:
    samples, grey = decode_samples(SAMPLES[name]), decode_image(SAMPLES[name])
    expected = scale_16(samples) if samples.dtype == np.uint16 else samples
    np.testing.assert_array_equal(grey, expected)


@pytest.mark.parametrize("name", SAMPLES)
def test_a_file_truncated_anywhere_is_rejected(name: str) -> None:
    data = SAMPLES[name]
    assert decode_image(data).size
    seen = set()
    for length in range(1, len(data), 1 if len(data) < 1500 else 7):
        with pytest.raises(RejectedImage) as caught:
            decode_image(data[:length])
        seen.add(caught.value.reason)
        if length > 150:
            assert caught.value.reason == "truncated", (length, str(caught.value))
    assert seen <= {"truncated", "not_an_image"}


def test_trailing_bytes_are_ignored() -> None:
    for name, data in SAMPLES.items():
        np.testing.assert_array_equal(decode_image(data + b"\0tail"), decode_image(data), name)


def test_empty_and_unknown() -> None:
    reject(b"", "empty")
    for data in (
        b"\0",
        b"hello, world",
        bytes(4096),
        b"BMW is no bitmap, nor is this",
        b"\xff\xd8",
    ):
        reject(data, "not_an_image")


def test_file_larger_than_the_limit_is_rejected() -> None:
    data = SAMPLES["png"]
    assert decode_image(data, DecodeLimits(max_bytes=len(data))).size
    reject(data, "too_large", DecodeLimits(max_bytes=len(data) - 1))


@pytest.mark.parametrize("name", SAMPLES)
def test_image_larger_than_the_limit_is_rejected(name: str) -> None:
    pixels = GREY.size
    assert decode_image(SAMPLES[name], DecodeLimits(max_pixels=pixels)).size == pixels
    message = reject(SAMPLES[name], "too_large", DecodeLimits(max_pixels=pixels - 1))
    assert f"{pixels - 1:,}" in message
    assert "max_pixels" in message


def test_pillows_own_limit_applies_if_it_is_lower() -> None:
    data = make_png((10_000, 10_000), 1, 0, zlib.compress(bytes(1251 * 10_000)))
    message = reject(data, "too_large", DecodeLimits(max_pixels=10**9))
    assert "MAX_IMAGE_PIXELS" in message


def test_several_frames_are_rejected() -> None:
    frames = [Image.fromarray(GREY), Image.fromarray(255 - GREY)]
    for format_name in ("GIF", "TIFF", "WEBP", "PNG"):
        data = encode(frames[0], format_name, save_all=True, append_images=frames[1:])
        reject(data, "multi_frame")
        assert decode_image(encode(frames[0], format_name, save_all=True)).shape == GREY.shape


UNSUPPORTED = {
    "PDF": b"%PDF-1.7\n",
    "ZIP": b"PK\x03\x04" + bytes(30),
    "HEIC": b"\0\0\0\x18ftypheic" + bytes(30),
    "AVIF": b"\0\0\0\x1cftypavif" + bytes(30),
    "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(30),
    "JPEG XL": b"\xff\x0a" + bytes(30),
    "icon": b"\0\0\x01\0\x01\0" + bytes(30),
    "Photoshop": b"8BPS\0\x01" + bytes(30),
    "SVG": b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>',
    "XML": b"\xef\xbb\xbf<?xml version='1.0'?><a/>",
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_formats_are_named(name: str) -> None:
    message = reject(UNSUPPORTED[name], "unsupported")
    assert message.startswith(f"{ACCEPTED}, got ")
    assert name in message.removeprefix(ACCEPTED)


def test_a_rejection_lists_the_accepted_formats_and_does_not_quote_the_file() -> None:
    for data in (b"", b"Dear colleague", bytes(99)):
        message = reject(data, "not_an_image" if data else "empty")
        assert message.startswith(ACCEPTED)
        assert "44 65 61" not in message, "a text may begin with a patient's name"
    for name in ("DICOM", "NIfTI", "PNG", "JPEG", "BMP", "GIF", "TIFF", "WebP"):
        assert name in ACCEPTED


def test_samples_of_undefined_range_are_unsupported() -> None:
    for samples in (np.ones((3, 4), np.int32), np.ones((3, 4), np.float32)):
        assert "16-bit PNG" in reject(encode(samples, "TIFF"), "unsupported")
    signed = make_tiff(GREY.astype(np.uint16), "<", tags={339: [2]})
    reject(signed, "unsupported")
    jpeg = SAMPLES["jpeg"]
    at = jpeg.index(b"\xff\xc0") + 4
    reject(jpeg[:at] + b"\x0c" + jpeg[at + 1 :], "unsupported")


def test_an_image_without_pixels_is_corrupt() -> None:
    reject(make_png((0, 5), 8, 0, zlib.compress(b"")), "corrupt")
    reject(make_tiff(GREY, "<", tags={256: [0]}), "corrupt")
    jpeg = SAMPLES["jpeg"]
    at = jpeg.index(b"\xff\xc0") + 5
    reject(jpeg[:at] + b"\0\0" + jpeg[at + 2 :], "corrupt")


def test_png_data_with_a_flipped_bit_is_corrupt() -> None:
    data = bytearray(SAMPLES["png"])
    data[data.index(b"IDAT") + 40] ^= 1
    reject(bytes(data), "corrupt")


def test_pixel_data_that_ends_early_is_truncated() -> None:
    rows = b"\0abcd" * 4
    assert decode_image(make_png((4, 4), 8, 0, zlib.compress(rows))).shape == (4, 4)
    reject(make_png((4, 4), 8, 0, zlib.compress(rows[:-5])), "truncated")
    jpeg = encode(GREY, "JPEG")
    reject(jpeg[:-100] + bytes(100), "truncated")


def test_damaged_metadata_is_ignored_without_a_warning() -> None:
    plain = encode(COLOUR, "JPEG")
    damaged = b"Exif\0\0II*\0\x08\0\0\0\xff\x00" + b"\x0f\x01\x02\0\xff\xff\0\0\xff\xff\0\0" * 9
    segment = b"\xff\xe1" + struct.pack(">H", len(damaged) + 2) + damaged
    views = b"\xff\xe2\x00\x10MPF\0II*\0\x09\0\0\0ab"
    jpeg = plain[:2] + segment + views + plain[20:]
    np.testing.assert_array_equal(decode_image(jpeg), decode_image(plain))
    png = encode(COLOUR, "PNG")
    extra = chunk(b"eXIf", damaged[6:]) + chunk(b"acTL", bytes(8)) + chunk(b"iCCP", b"no null")
    np.testing.assert_array_equal(decode_image(png[:33] + extra + png[33:]), decode_image(png))


# ---- bombs ---------------------------------------------------------------------------------------


def reject_cheaply(data: bytes, reason: str, seconds: float = 0.25) -> None:
    tracemalloc.start()
    start = time.perf_counter()
    reject(data, reason)
    spent, (_, peak) = time.perf_counter() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert spent < seconds
    assert peak < 3 * len(data) + 2**20


def test_bombs_are_rejected_before_they_are_decompressed() -> None:
    packer = zlib.compressobj(9)
    zeros = b"".join(packer.compress(bytes(2**20)) for _ in range(500)) + packer.flush()
    reject_cheaply(make_png((60_000, 60_000), 8, 2, zeros * 2), "too_large")
    reject_cheaply(make_tiff(GREY, "<", tags={256: [2**31], 257: [2**31]}), "too_large")
    strips = make_tiff(GREY, "<", tags={256: [1], 257: [40_000_000], 278: [1]})
    reject_cheaply(strips, "corrupt")
    jpeg = encode(GREY, "JPEG", progressive=True)
    at = jpeg.index(b"\xff\xda")
    reject_cheaply(jpeg[:at] + jpeg[at:-2] * 60 + jpeg[-2:], "too_large")
    bitmap = bytearray(SAMPLES["bmp"])
    bitmap[18:26] = struct.pack("<ll", 2**20, 2**20)
    reject_cheaply(bytes(bitmap), "too_large")


def test_compressed_text_and_surplus_data_are_not_decompressed() -> None:
    packer = zlib.compressobj(9)
    zeros = b"".join(packer.compress(bytes(2**20)) for _ in range(300)) + packer.flush()
    text = chunk(b"zTXt", b"Comment\0\0" + zeros) * 3 + chunk(b"iCCP", b"profile\0\0" + zeros)
    for data in (
        make_png((4, 1), 8, 0, zlib.compress(b"\0abcd"), text),
        make_png((4, 1), 8, 0, zeros),
    ):
        tracemalloc.start()
        start = time.perf_counter()
        assert decode_image(data).shape == (1, 4)
        assert time.perf_counter() - start < 0.25
        assert tracemalloc.get_traced_memory()[1] < 3 * len(data) + 2**20
        tracemalloc.stop()


def test_a_memory_error_is_a_rejection(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image, "open", fail)
    reject(SAMPLES["png"], "too_large")


# ---- threads, mutated files, real scans ----------------------------------------------------------


def test_threads_decode_the_same_pixels() -> None:
    expected = {name: decode_image(data) for name, data in SAMPLES.items()}
    with ThreadPoolExecutor(8) as pool:
        names = list(SAMPLES) * 40
        for name, grey in zip(
            names, pool.map(lambda n: decode_image(SAMPLES[n]), names), strict=True
        ):
            np.testing.assert_array_equal(grey, expected[name], name)


SMALL = DecodeLimits(max_pixels=100_000)


def check_answer(data: bytes) -> str:
    """Decode; any exception but RejectedImage fails the test. Returns the reason, or "decoded"."""
    rejection = None
    try:
        grey = decode_image(data, SMALL)
    except RejectedImage as caught:
        rejection = caught
    if rejection is not None:
        assert rejection.reason in REJECTION_REASONS
        assert " object at 0x" not in rejection.message
        return rejection.reason
    assert grey.dtype == np.uint8
    assert grey.ndim == 2
    assert 0 < grey.size <= SMALL.max_pixels
    assert grey.flags.c_contiguous
    return "decoded"


def mutate(rng: random.Random, files: Sequence[bytes] = tuple(SAMPLES.values())) -> bytes:
    """Damage a valid file at one to four positions; fix PNG checksums half the time."""
    data = bytearray(rng.choice(files))
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(len(data), 96))
        act = rng.randrange(6)
        if act == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif act == 1:
            data[at] = rng.choice((0, 1, 127, 128, 254, 255))
        elif act == 2:
            data[at : at + 4] = rng.choice(
                (b"\xff" * 4, b"\0\0\0\0", b"\0\0\0\1", b"\x7f\xff\xff\xff")
            )
        elif act == 3 and len(data) > 40:
            del data[at : at + rng.randint(1, 40)]
        elif act == 4:
            other = rng.choice(files)
            start = rng.randrange(len(other))
            data[at:at] = other[start : start + rng.randint(1, 60)]
        elif len(data) > 40 and rng.random() < 0.3:
            del data[max(20, at) :]
        if not data:
            data = bytearray(b"\0")
    return fix_checksums(bytes(data)) if rng.random() < 0.5 else bytes(data)


def fix_checksums(data: bytes) -> bytes:
    """Recompute the PNG checksums, so that the damage and not the checksum is tested."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    out, at = data[:8], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">L", data, at)
        if at + 12 + length > len(data):
            break
        out += chunk(data[at + 4 : at + 8], data[at + 8 : at + 8 + length])
        at += 12 + length
    return out + data[at:]


@settings(
    max_examples=20 * settings.default.max_examples,
    deadline=1000,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(seed=st.integers(0, 2**32))
def test_mutants_get_an_answer(seed: int) -> None:
    check_answer(mutate(random.Random(seed)))


@settings(max_examples=8 * settings.default.max_examples, deadline=1000, derandomize=True)
@given(
    magic=st.sampled_from([data[:16] for data in SAMPLES.values()]), tail=st.binary(max_size=300)
)
def test_noise_behind_a_signature_gets_an_answer(magic: bytes, tail: bytes) -> None:
    check_answer(magic + tail)


@pytest.mark.slow
def test_twenty_thousand_mutants_get_an_answer_in_time() -> None:
    counts: dict[str, int] = {}
    slowest = 0.0
    for seed in range(20_000):
        data = mutate(random.Random(seed))
        start = time.perf_counter()
        reason = check_answer(data)
        slowest = max(slowest, time.perf_counter() - start)
        counts[reason] = counts.get(reason, 0) + 1
    assert slowest < 0.5, slowest
    assert {"decoded", "truncated", "corrupt", "too_large", "unsupported"} <= set(counts), counts
    print(f"slowest {slowest * 1000:.1f} ms; {counts}")  # noqa: T201 - shown with -s


def test_real_scans_equal_pillow() -> None:
    fallback = Path(__file__).parents[2] / "shared" / "brain-tumor-mri"
    root = Path(os.environ.get("BRAINRAY_DATA", fallback))
    paths = sorted(root.glob("*/*/*.jpg"))[::60]
    if not paths:
        pytest.skip(f"no images under {root}; set BRAINRAY_DATA")
    for path in paths:
        data = path.read_bytes()
        grey = decode_image(data)
        assert grey.shape == (224, 224)
        np.testing.assert_array_equal(grey, decode_with_pillow(data), str(path))
