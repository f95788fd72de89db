"""Encoded bytes to grey pixels: the one decoder, for training, bulk and HTTP alike.

The order of work is what makes it safe to point at strangers' bytes. The file's own header is read
first, here, in bounded time and without unpacking anything: size, frames, orientation, length. Only
what passes is handed to Pillow, and without its metadata. So a decompression bomb costs a few
microseconds, a text chunk or an EXIF block cannot hurt, and Pillow finds nothing to warn about.
(``warnings.catch_warnings`` would not do: it swaps the process's filters, and threads share them.)
"""

import io
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from brainray.errors import RejectedImage

REJECTION_REASONS: dict[str, str] = {
    "missing": "There is no file at that place.",
    "unreadable": "The file exists but could not be read.",
    "empty": "The file has no bytes.",
    "truncated": "The file ends before its image does.",
    "corrupt": "The file contradicts its own format.",
    "not_an_image": "The bytes are not an image in any known format.",
    "too_large": "The image is larger than the limits allow.",
    "unsupported": "The format, or this variant of it, is not supported.",
    "multi_frame": "The file holds several images, and which is meant is ambiguous.",
}
"""Stable reason code to one sentence; what :class:`brainray.errors.RejectedImage` carries."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeLimits:
    """How large an image may be before it is refused unopened."""

    max_bytes: int = 64 * 2**20
    """Largest encoded file, in bytes."""

    max_pixels: int = 50_000_000
    """Largest image, width times height, in pixels. Unpacking takes 2 to 20 bytes for each. Above
    Pillow's own limit (``PIL.Image.MAX_IMAGE_PIXELS``, 89 million) Pillow's limit holds."""


_DEFAULT_LIMITS = DecodeLimits()

_ACCEPTED = "Expected a PNG, JPEG, BMP, GIF, TIFF or WebP file with one image"

# A scan is one pass over the whole image, and costs a hostile file a hundred bytes. libjpeg-turbo's
# own fuzzers stop at 500 [libjpeg-turbo, fuzz/decompress.cc]; encoders in use write fewer than 20.
_MAX_JPEG_SCANS = 100
# Chunks (PNG), blocks (GIF, WebP) and strips (TIFF) are walked in Python, about 1 µs each; no
# encoder writes this many in a file of the default size (GIF blocks hold up to 255 bytes).
_MAX_PARTS = 2**16
_MAX_GIF_BLOCKS = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class _Header:
    """What a file says of itself before anything is unpacked."""

    format: str
    width: int
    height: int
    payload: bytes
    """The same image without metadata; the file itself where there was none to drop."""
    orientation: int = 1
    """EXIF orientation, 1 to 8."""
    bits: int = 8
    """Bits in a sample."""
    transparent: tuple[int, ...] | None = None
    """The one grey or RGB colour that a PNG declares transparent, in samples of `bits` bits."""
    white_is_zero: bool = False
    """16-bit TIFF only: Pillow inverts the shallower depths itself."""


def decode_image(image_bytes: bytes, limits: DecodeLimits = _DEFAULT_LIMITS) -> NDArray[np.uint8]:
    """Decode one encoded image to 8-bit luminance.

    Colour becomes luminance by ITU-R 601-2, as Pillow's ``convert("L")``; transparency shows black;
    16-bit samples are scaled by their full range, never clipped [1]_; EXIF orientation is applied.
    Safe to call from many threads: it touches no global state and raises no warnings.

    Parameters
    ----------
    image_bytes : bytes
        A whole JPEG, PNG, BMP, GIF, TIFF or WebP file.
    limits : DecodeLimits
        The largest file (bytes) and image (pixels) accepted.

    Returns
    -------
    ndarray of uint8, shape (height, width)
        Luminance, 0 black to 255 white; C-contiguous and read-only (copy it to write to it).

    Raises
    ------
    RejectedImage
        Whatever else the bytes may be; ``reason`` is a key of :data:`REJECTION_REASONS`.

    References
    ----------
    .. [1] libpng manual 1.6, section 3.6, ``png_set_scale_16``.
    """
    if not image_bytes:
        _reject("empty", f"{_ACCEPTED}, got no bytes. Upload the file again.")
    if len(image_bytes) > limits.max_bytes:
        _reject(
            "too_large",
            f"The file has {len(image_bytes):,} bytes, more than the {limits.max_bytes:,} allowed.",
        )
    name = _recognise(image_bytes)
    try:
        grey = _decode(_read_header(name, image_bytes, limits))
    except RejectedImage:
        raise
    except (MemoryError, Image.DecompressionBombError):
        _reject("too_large", f"There is not enough memory to unpack this {name} image.")
    except Exception as error:  # any bytes get an answer; Pillow raises a dozen types for bad ones
        raise _translate(name, error) from error
    grey.flags.writeable = False
    return grey


def _reject(reason: str, message: str) -> NoReturn:
    raise RejectedImage(reason, message)


def _translate(name: str, error: Exception) -> RejectedImage:
    """Sort an exception of Pillow's into truncated or corrupt."""
    if "truncated" in str(error):
        return RejectedImage("truncated", f"The {name} file ends before its image does. Resend it.")
    if isinstance(error, UnidentifiedImageError):  # its message is a memory address
        if name == "TIFF":  # the directory was read and found whole, so it is Pillow that lacks it
            return RejectedImage(
                "unsupported", "This layout of TIFF samples is not supported. Save it as PNG."
            )
        return RejectedImage("corrupt", f"The {name} header is damaged. Export the image again.")
    return RejectedImage(
        "corrupt", f"The {name} data cannot be decoded ({error}). Export the image again."
    )


# ---- what kind of file ---------------------------------------------------------------------------

_TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

_EXPORT = "Export the slice as PNG or JPEG."
# (offset, magic, what it is). Offsets and magics: DICOM PS3.10 section 7.1; NIfTI-1 and NIfTI-2
# headers; ISO/IEC 14496-12 brands; the others as in the file(1) database.
_UNSUPPORTED: tuple[tuple[int, bytes, str], ...] = (
    (128, b"DICM", f"a DICOM file. {_EXPORT}"),
    (344, b"n+1\0", f"a NIfTI volume. {_EXPORT}"),
    (344, b"ni1\0", f"a NIfTI header without its image. {_EXPORT}"),
    (4, b"n+2\0\r\n\x1a\n", f"a NIfTI-2 volume. {_EXPORT}"),
    (0, b"%PDF-", "a PDF document. Extract the image from it."),
    (0, b"PK\x03\x04", "a ZIP archive. Unpack it."),
    (0, b"PK\x05\x06", "an empty ZIP archive."),
    (4, b"ftypheic", "an HEIC image. Save it as PNG or JPEG."),
    (4, b"ftypheix", "an HEIC image. Save it as PNG or JPEG."),
    (4, b"ftypmif1", "an HEIF image. Save it as PNG or JPEG."),
    (4, b"ftypmsf1", "an HEIF sequence. Save one image as PNG or JPEG."),
    (4, b"ftypavif", "an AVIF image. Save it as PNG or JPEG."),
    (4, b"ftypavis", "an AVIF sequence. Save one image as PNG or JPEG."),
    (0, b"\0\0\0\x0cjP  \r\n\x87\n", "a JPEG 2000 image. Save it as PNG or JPEG."),
    (0, b"\xff\x4f\xff\x51", "a JPEG 2000 codestream. Save it as PNG or JPEG."),
    (0, b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL image. Save it as PNG or JPEG."),
    (0, b"\xff\x0a", "a JPEG XL codestream. Save it as PNG or JPEG."),
    (0, b"8BPS", "a Photoshop document. Save it as PNG or JPEG."),
    (0, b"\0\0\x01\0", "a Windows icon. Save it as PNG."),
    (0, b"\0\0\x02\0", "a Windows cursor. Save it as PNG."),
)


def _recognise(data: bytes) -> str:
    """Name the format by its first bytes, or raise RejectedImage."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    # DICOM lets any 128 bytes come first, so it is asked before the short magics of TIFF and BMP.
    for offset, magic, what in _UNSUPPORTED:
        if data.startswith(magic, offset):
            _reject("unsupported", f"{_ACCEPTED}, got {what}")
    if data.startswith(_TIFF_MAGICS):
        return "TIFF"
    # Two letters begin many texts; a BMP's third header word is zero (reserved).
    if data.startswith(b"BM") and data[6:10] == b"\0\0\0\0":
        return "BMP"
    _reject_foreign(data)


def _reject_foreign(data: bytes) -> NoReturn:
    """Refuse what needs more than a fixed magic to be told apart, and then the unknown."""
    if data.startswith(b"\x1f\x8b"):
        what = "a gzip archive"
        try:  # 352 bytes hold a whole NIfTI-1 header
            inside = zlib.decompressobj(wbits=31).decompress(data[:4096], 352)
        except zlib.error:
            inside = b""
        if inside[344:348] in (b"n+1\0", b"ni1\0") or inside[4:8] == b"n+2\0":
            what = "a compressed NIfTI volume (.nii.gz)"
        _reject("unsupported", f"{_ACCEPTED}, got {what}. {_EXPORT}")
    text = data[:1024].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<svg", b"<?xml", b"<!doctype svg")):
        what = "an SVG drawing" if b"<svg" in text else "an XML document"
        _reject("unsupported", f"{_ACCEPTED}, got {what}. {_EXPORT}")
    _reject("not_an_image", f"{_ACCEPTED}, got bytes that begin {data[:8].hex(' ')}.")


# ---- headers: all that can be known without unpacking --------------------------------------------


def _read_header(name: str, data: bytes, limits: DecodeLimits) -> _Header:
    try:
        return _READERS[name](data, limits)
    except (IndexError, struct.error):
        _reject("truncated", f"The {name} file ends inside its header. Resend it.")


def _check_size(name: str, width: int, height: int, limits: DecodeLimits) -> None:
    """Refuse an image of no pixels, or of too many."""
    if width < 1 or height < 1:
        _reject("corrupt", f"The {name} file claims {width} x {height} pixels.")
    ceiling, remedy = limits.max_pixels, "Resize it, or raise max_pixels"
    pillow = Image.MAX_IMAGE_PIXELS
    if pillow is not None and pillow < ceiling:  # beyond it Pillow warns, and then refuses
        ceiling, remedy = int(pillow), "Resize it, or raise PIL.Image.MAX_IMAGE_PIXELS"
    if width * height > ceiling:
        _reject(
            "too_large",
            f"The image has {width} x {height} pixels, more than the {ceiling:,} allowed. "
            f"{remedy}.",
        )


def _read_exif_orientation(exif: bytes) -> int:
    """Find tag 274 in an EXIF block (a TIFF header and directory); 1, upright, if it is not there.

    References
    ----------
    .. [1] CIPA DC-008 (Exif 2.32), section 4.6.4 A.
    """
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "L", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, start)
        for at in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(order + "HH", exif, at)
            if tag == 274 and kind in (3, 4):
                (value,) = struct.unpack_from(order + ("H" if kind == 3 else "L"), exif, at + 8)
                return int(value) if 1 <= value <= 8 else 1
    except struct.error:  # a damaged EXIF block is no reason to refuse the picture
        pass
    return 1


_JPEG_FRAMES = frozenset({0xC0, 0xC1, 0xC2, 0xC3, 0xC9, 0xCA, 0xCB})
_JPEG_DIFFERENTIAL = frozenset({0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF, 0xDE})  # no known decoder
_JPEG_ALONE = frozenset({0x00, 0x01, *range(0xD0, 0xD9)})  # markers without a length


def _read_jpeg(data: bytes, limits: DecodeLimits) -> _Header:
    """Walk a JPEG's segments up to its first scan (ITU-T T.81, annex B)."""
    at, kept_from, orientation = 2, 0, 0
    kept: list[bytes] = []
    size: tuple[int, int] | None = None
    while True:
        at = data.find(b"\xff", at)
        if at < 0:
            _reject("truncated", "The JPEG file ends before its image data. Resend it.")
        while data[at] == 0xFF:
            at += 1
        marker = data[at]
        at += 1
        if marker in _JPEG_ALONE:
            continue
        if marker == 0xD9:
            _reject("corrupt", "The JPEG file has an end marker but no image data.")
        length = data[at] << 8 | data[at + 1]
        if length < 2:
            _reject("corrupt", f"JPEG segment {marker:02X} claims {length} bytes.")
        if marker == 0xDA:
            break
        if at + length > len(data):
            _reject("truncated", f"The JPEG file ends inside segment {marker:02X}. Resend it.")
        if marker in _JPEG_FRAMES:
            if size is not None:
                _reject("corrupt", "The JPEG file has two frame headers.")
            size = _read_jpeg_frame(data, at)
        elif marker in _JPEG_DIFFERENTIAL or marker == 0xF7:
            _reject("unsupported", "Hierarchical JPEG and JPEG-LS are not supported. Save as PNG.")
        elif marker in (0xE1, 0xE2) and data.startswith((b"Exif\0\0", b"MPF\0"), at + 2):
            # Pillow would parse both, and warn where they are damaged. The first image of an MPF
            # file is the picture; the rest are previews and other views of it.
            if marker == 0xE1 and not orientation:
                orientation = _read_exif_orientation(data[at + 2 : at + length])
            kept.append(data[kept_from : at - 2])
            kept_from = at + length
        at += length
    if size is None:
        _reject("corrupt", "The JPEG file has image data but no frame header.")
    width, height = size
    _check_size("JPEG", width, height, limits)
    # libjpeg makes up an end where there is none, and paints what is missing grey.
    if data.find(b"\xff\xd9", at) < 0:
        _reject("truncated", "The JPEG file has no end marker: part of it is missing. Resend it.")
    if data.count(b"\xff\xda", at) > _MAX_JPEG_SCANS:
        _reject("too_large", f"The JPEG file has more than {_MAX_JPEG_SCANS} scans. Save as PNG.")
    payload = b"".join([*kept, memoryview(data)[kept_from:]]) if kept else data
    return _Header(
        format="JPEG", width=width, height=height, payload=payload, orientation=orientation or 1
    )


def _read_jpeg_frame(data: bytes, at: int) -> tuple[int, int]:
    bits, height, width = struct.unpack_from(">BHH", data, at + 2)
    if bits != 8:
        _reject("unsupported", f"JPEG with {bits}-bit samples is not supported. Save as PNG.")
    return width, height


_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_PNG_NEEDED = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")


def _iterate_png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield each chunk's type, where its contents start, and their length in bytes."""
    at = 8
    for _ in range(_MAX_PARTS):
        length, kind = struct.unpack_from(">L4s", data, at)
        if not kind.isalpha():
            _reject("corrupt", f"The PNG file has a chunk called {kind!r}.")
        if at + 12 + length > len(data):
            _reject("truncated", f"The PNG file ends inside its {kind.decode()} chunk. Resend it.")
        yield kind, at + 8, length
        if kind == b"IEND":
            return
        at += 12 + length
    _reject("corrupt", f"The PNG file has more than {_MAX_PARTS} chunks.")


def _read_png(data: bytes, limits: DecodeLimits) -> _Header:
    """Walk a PNG's chunks, keeping only those that make the picture, their checksums verified.

    Pillow does not verify the checksums of image data, so a flipped bit would pass as a pixel.

    References
    ----------
    .. [1] W3C, Portable Network Graphics (PNG) Specification (Third Edition), sections 5 and 11.
    """
    view = memoryview(data)
    kept: list[memoryview] = [view[:8]]
    packed: list[memoryview] = []
    spans: dict[bytes, bytes] = {}
    orientation = 1
    for kind, start, length in _iterate_png_chunks(data):
        if kind in _PNG_NEEDED:
            (expected,) = struct.unpack_from(">L", data, start + length)
            if zlib.crc32(view[start - 4 : start + length]) != expected:
                _reject("corrupt", f"The PNG file's {kind.decode()} chunk fails its checksum.")
            kept.append(view[start - 8 : start + length + 4])
            if kind == b"IDAT":
                packed.append(view[start : start + length])
            else:
                spans.setdefault(kind, data[start : start + length])
        elif kind == b"acTL" and length >= 4 and struct.unpack_from(">L", data, start)[0] > 1:
            _reject("multi_frame", "The PNG file is an animation. Send one frame as a still image.")
        elif kind == b"eXIf":
            orientation = _read_exif_orientation(data[start : start + length])
        elif not kind[0] & 0x20:
            _reject("corrupt", f"The PNG file has a critical chunk {kind.decode()} unknown to PNG.")
    if len(spans.get(b"IHDR", b"")) != 13 or bytes(kept[1][4:8]) != b"IHDR" or not packed:
        _reject("corrupt", "The PNG file lacks a header or image data.")
    width, height, bits, colour, packing, filtering, lacing = struct.unpack(
        ">LLBBBBB", spans[b"IHDR"]
    )
    if bits not in _PNG_DEPTHS.get(colour, ()) or packing or filtering or lacing > 1:
        _reject("corrupt", "The PNG header's bit depth, colour type or methods are not PNG's.")
    _check_size("PNG", width, height, limits)
    _check_png_data(b"".join(packed), _count_png_bytes(width, height, bits, colour, lacing))
    if colour == 3 and (not spans.get(b"PLTE") or len(spans[b"PLTE"]) % 3):
        _reject("corrupt", "The PNG file has palette indices but no whole palette.")
    transparent = None
    if colour in (0, 2) and b"tRNS" in spans:
        # "Only the lower bits are used" [1], section 11.3.1.1.
        samples = struct.unpack_from(">H" if colour == 0 else ">HHH", spans[b"tRNS"])
        transparent = tuple(sample & (2**bits - 1) for sample in samples)
    return _Header(
        format="PNG",
        width=width,
        height=height,
        payload=data if sum(map(len, kept)) == len(data) else b"".join(kept),
        orientation=orientation,
        bits=bits,
        transparent=transparent,
    )


_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2))
_ADAM7_PASSES = (*_ADAM7, (0, 1, 1, 2))
"""First column, first row, column step, row step of each pass: PNG specification, section 8."""


def _count_png_bytes(width: int, height: int, bits: int, colour: int, lacing: int) -> int:
    """Count the bytes of unpacked, still filtered image data."""
    pixel_bits = bits * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    count = 0
    for left, top, across, down in _ADAM7_PASSES if lacing else ((0, 0, 1, 1),):
        columns, rows = -((left - width) // across), -((top - height) // down)
        if columns > 0 and rows > 0:
            count += rows * (1 + (columns * pixel_bits + 7) // 8)
    return count


def _check_png_data(packed: bytes, expected: int) -> None:
    """Refuse image data that does not unpack to the expected number of bytes.

    Pillow takes a stream that ends early for a whole one and leaves the rest of the picture black.
    """
    stream, rest = zlib.decompressobj(), packed
    while expected > 0:
        try:
            got = len(stream.decompress(rest, min(expected, 2**20)))
        except zlib.error as error:
            _reject("corrupt", f"The PNG image data cannot be unpacked ({error}).")
        if not got:
            _reject("truncated", f"The PNG image data lacks {expected} bytes. Export it again.")
        expected, rest = expected - got, stream.unconsumed_tail


def _skip_gif_blocks(data: bytes, at: int) -> int:
    """Return where the chain of sub-blocks that starts at `at` ends."""
    for _ in range(_MAX_GIF_BLOCKS):
        if not data[at]:
            return at + 1
        at += 1 + data[at]
    _reject("corrupt", f"The GIF file has a run of more than {_MAX_GIF_BLOCKS} blocks.")


def _read_gif(data: bytes, limits: DecodeLimits) -> _Header:
    """Walk a GIF's blocks to its trailer (CompuServe, GIF89a Specification, 1990)."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    frames = 0
    for _ in range(_MAX_PARTS):
        kind = data[at]
        if kind == 0x3B:
            break
        if kind == 0x21:
            at = _skip_gif_blocks(data, at + 2)
        elif kind == 0x2C:
            frames += 1
            if frames > 1:
                _reject("multi_frame", "The GIF file is an animation. Send one frame as PNG.")
            left, top, across, down, flags = struct.unpack_from("<4HB", data, at + 1)
            if not across or not down:
                _reject("corrupt", f"The GIF file's image has {across} x {down} pixels.")
            # A frame beyond the screen enlarges it, in browsers as in Pillow.
            width, height = max(width, left + across), max(height, top + down)
            at += 10 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
            at = _skip_gif_blocks(data, at + 1)
        else:
            _reject("corrupt", f"The GIF file has a block of unknown kind {kind:02X}.")
    else:
        _reject("corrupt", f"The GIF file has more than {_MAX_PARTS} blocks.")
    if not frames:
        _reject("corrupt", "The GIF file holds no image.")
    _check_size("GIF", width, height, limits)
    return _Header(format="GIF", width=width, height=height, payload=data)


def _read_webp(data: bytes, limits: DecodeLimits) -> _Header:
    """Walk a WebP's RIFF chunks (RFC 9649, section 2)."""
    end = 8 + int(struct.unpack_from("<L", data, 4)[0])
    if end > len(data):
        _reject("truncated", f"The WebP file has {len(data)} of its {end} bytes. Resend it.")
    at, frames, orientation = 12, 0, 1
    size: tuple[int, int] | None = None
    for _ in range(_MAX_PARTS):
        if at + 8 > end:
            break
        kind, length = struct.unpack_from("<4sL", data, at)
        if at + 8 + length > end:
            _reject("truncated", f"The WebP file ends inside its {kind!r} chunk. Resend it.")
        if size is None:
            size = _read_webp_size(data, at + 8, kind)
        if kind == b"ANMF":
            frames += 1
        elif kind == b"EXIF":
            orientation = _read_exif_orientation(data[at + 8 : at + 8 + length])
        at += 8 + length + length % 2
    else:
        _reject("corrupt", f"The WebP file has more than {_MAX_PARTS} chunks.")
    if size is None:
        _reject("corrupt", "The WebP file holds no image.")
    width, height = size
    _check_size("WebP", width, height, limits)
    if frames > 1:
        _reject("multi_frame", "The WebP file is an animation. Send one frame as a still image.")
    return _Header(format="WEBP", width=width, height=height, payload=data, orientation=orientation)


def _read_webp_size(data: bytes, at: int, kind: bytes) -> tuple[int, int]:
    """Read the size, which the first chunk holds in one of three encodings."""
    if kind == b"VP8X":
        width, high, height, top = struct.unpack_from("<HBHB", data, at + 4)
        return (high << 16 | width) + 1, (top << 16 | height) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, at + 6)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L":
        (packed,) = struct.unpack_from("<L", data, at + 1)
        return (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
    _reject("corrupt", f"The WebP file begins with a {kind!r} chunk.")


def _read_bmp(data: bytes, limits: DecodeLimits) -> _Header:
    """Read a BMP's headers (Microsoft, BITMAPV5HEADER and BITMAPCOREHEADER)."""
    start, header_bytes = struct.unpack_from("<LL", data, 10)
    if header_bytes == 12:
        width, height, _, bits = struct.unpack_from("<4H", data, 18)
        method = 0
    elif header_bytes in (40, 52, 56, 64, 108, 124):
        width, height, _, bits, method = struct.unpack_from("<llHHL", data, 18)
        height = abs(height)  # negative: stored top row first
    else:
        _reject("corrupt", f"The BMP file's header claims {header_bytes} bytes.")
    if method in (1, 2):
        _reject("unsupported", "Run-length encoded BMP is not supported. Save it as PNG.")
    if method not in (0, 3) or bits not in (1, 4, 8, 16, 24, 32):
        _reject("unsupported", f"BMP with {bits} bits, method {method}, is not supported.")
    _check_size("BMP", width, height, limits)
    if start < 14 + header_bytes:
        _reject("corrupt", f"The BMP file's pixels begin at byte {start}, inside its header.")
    row_bytes = (width * bits + 31) // 32 * 4
    if start + row_bytes * height > len(data):
        _reject("truncated", f"The BMP file lacks part of its {width} x {height} pixels. Resend.")
    return _Header(format="BMP", width=width, height=height, payload=data)


# ---- TIFF: a directory rewritten with only the tags that make the picture ------------------------

_TIFF_TYPES = {1: "B", 3: "H", 4: "L", 7: "B", 16: "Q"}  # BYTE, SHORT, LONG, UNDEFINED, LONG8
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 256, 257, 258, 259, 262
_STRIP_OFFSETS, _ORIENTATION, _SAMPLES, _ROWS, _STRIP_BYTES = 273, 274, 277, 278, 279
_PLANAR, _TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_BYTES = 284, 322, 323, 324, 325
_EXTRA, _SAMPLE_FORMAT, _JPEG_TABLES = 338, 339, 347
# FillOrder, T4Options, T6Options, Predictor.
_TIFF_SINGLE = frozenset(
    {_WIDTH, _HEIGHT, _COMPRESSION, _PHOTOMETRIC, _ORIENTATION, _SAMPLES, _ROWS, _PLANAR}
    | {_TILE_WIDTH, _TILE_HEIGHT, 266, 292, 293, 317}
)
# ColorMap, YCbCrSubSampling.
_TIFF_ARRAYS = frozenset(
    {_BITS, _STRIP_OFFSETS, _STRIP_BYTES, _TILE_OFFSETS, _TILE_BYTES, _EXTRA, _SAMPLE_FORMAT}
    | {_JPEG_TABLES, 320, 530}
)
_TiffTags = dict[int, tuple[int, ...]]


def _read_tiff_directory(data: bytes) -> tuple[str, _TiffTags]:
    """Read byte order and wanted tags of a TIFF or BigTIFF with one image (TIFF 6.0, section 2)."""
    order = "<" if data[:2] == b"II" else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    word, entry_bytes, inline = ("Q", 20, 8) if big else ("L", 12, 4)
    (at,) = struct.unpack_from(order + word, data, 8 if big else 4)
    (count,) = struct.unpack_from(order + ("Q" if big else "H"), data, at)
    if count > 65535:
        _reject("corrupt", f"The TIFF directory claims {count} entries.")
    at += 8 if big else 2
    tags: _TiffTags = {}
    for entry in range(at, at + entry_bytes * count, entry_bytes):
        tag, kind, number = struct.unpack_from(f"{order}HH{word}", data, entry)
        if tag not in _TIFF_SINGLE | _TIFF_ARRAYS or tag in tags:
            continue
        code = _TIFF_TYPES.get(kind)
        if code is None or not number:
            _reject("corrupt", f"TIFF tag {tag} is of kind {kind} with {number} values.")
        if tag in _TIFF_SINGLE:
            number = 1
        elif number > max(_MAX_PARTS, 3 * 2**8):
            _reject("corrupt", f"TIFF tag {tag} has {number} values.")
        start = entry + entry_bytes - inline
        if struct.calcsize("=" + code) * number > inline:
            (start,) = struct.unpack_from(order + word, data, start)
        tags[tag] = struct.unpack_from(f"{order}{number}{code}", data, start)
    (following,) = struct.unpack_from(order + word, data, at + entry_bytes * count)
    if following >= len(data):
        _reject("truncated", "The TIFF file's next page is beyond its end. Resend it.")
    if following:
        _reject("multi_frame", "The TIFF file has several pages. Send one page alone.")
    return order, tags


def _write_tiff(data: bytes, order: str, tags: _TiffTags) -> bytes:
    """Append a directory of `tags` to a TIFF's bytes and point its header there."""
    pad = b"\0" * (len(data) % 2)
    directory = len(data) + len(pad)
    spill_at = directory + 2 + 12 * len(tags) + 4
    entries, spill = [], b""
    for tag, values in sorted(tags.items()):
        code = "B" if tag == _JPEG_TABLES else "H" if max(values) < 65536 else "L"
        kind = {"B": 7, "H": 3, "L": 4}[code]
        packed = struct.pack(f"{order}{len(values)}{code}", *values)
        if len(packed) > 4:
            where = struct.pack(order + "L", spill_at + len(spill))
            spill += packed + b"\0" * (len(packed) % 2)
            packed = where
        entries.append(struct.pack(order + "HHL4s", tag, kind, len(values), packed))
    header = (b"II" if order == "<" else b"MM") + struct.pack(order + "HL", 42, directory)
    count = struct.pack(order + "H", len(tags))
    return b"".join([header, memoryview(data)[8:], pad, count, *entries, b"\0\0\0\0", spill])


def _check_tiff_layout(tags: _TiffTags) -> None:
    """Refuse samples whose range is undefined, or which Pillow would read wrongly in silence."""
    bits, planar = tags.get(_BITS, (1,)), tags.get(_PLANAR, (1,))[0]
    photometric = tags.get(_PHOTOMETRIC, (0,))[0]
    if set(tags.get(_SAMPLE_FORMAT, (1,))) != {1} or len(set(bits)) > 1 or bits[0] > 16:
        _reject(
            "unsupported",
            "TIFF samples must be unsigned integers of at most 16 bits: the range of "
            f"{bits[0]}-bit, signed and floating samples is not defined. Save as 16-bit PNG.",
        )
    if bits[0] not in (1, 2, 4, 8, 16) or photometric not in (0, 1, 2, 3, 5, 6):
        _reject("unsupported", f"TIFF with {bits[0]}-bit samples, colours {photometric}.")
    if photometric == 6 and tags.get(_COMPRESSION, (1,))[0] != 7:
        _reject("unsupported", "TIFF in YCbCr is supported with JPEG compression only.")
    if bits[0] == 16 and (photometric not in (0, 1, 2) or planar == 2 or 1 in tags.get(_EXTRA, ())):
        _reject("unsupported", "16-bit TIFF must be grey, RGB or RGBA, interleaved. Save as PNG.")


def _check_tiff_parts(tags: _TiffTags, file_bytes: int) -> None:
    """Hold the strips or tiles to the image's size and the file's; trims `tags` to what is used."""
    width, height = tags[_WIDTH][0], tags[_HEIGHT][0]
    layers = tags.get(_SAMPLES, (1,))[0] if tags.get(_PLANAR, (1,))[0] == 2 else 1
    if _STRIP_OFFSETS in tags:
        for tag in (_TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_BYTES):
            tags.pop(tag, None)
        offsets, sizes, across = _STRIP_OFFSETS, _STRIP_BYTES, width
        down = min(tags.get(_ROWS, (height,))[0], height)
        tags[_ROWS] = (down,)
    elif _TILE_OFFSETS in tags and _TILE_WIDTH in tags and _TILE_HEIGHT in tags:
        offsets, sizes = _TILE_OFFSETS, _TILE_BYTES
        across, down = tags[_TILE_WIDTH][0], tags[_TILE_HEIGHT][0]
        # Tiles are padded to multiples of 16, not to more than that (TIFF 6.0, section 15).
        if across > max(2 * width, 1024) or down > max(2 * height, 1024):
            _reject("corrupt", f"The TIFF file's tiles have {across} x {down} pixels.")
    else:
        _reject("corrupt", "The TIFF directory does not say where its pixels are.")
    if not across or not down or not 1 <= layers <= 6:
        _reject("corrupt", f"The TIFF file's parts have {across} x {down} pixels, {layers} layers.")
    expected = -(-width // across) * -(-height // down) * layers
    if expected > _MAX_PARTS or len(tags[offsets]) < expected:
        _reject("corrupt", f"The TIFF file lists {len(tags[offsets])} parts of {expected}.")
    tags[offsets] = tags[offsets][:expected]
    if sizes in tags:
        if len(tags[sizes]) < expected:
            _reject("corrupt", "The TIFF file does not size all of its parts.")
        tags[sizes] = tags[sizes][:expected]
    ends = zip(tags[offsets], tags.get(sizes, (0,) * expected), strict=True)
    if max(start + length for start, length in ends) > file_bytes:
        _reject("truncated", "The TIFF file lacks part of its pixels. Resend it.")


def _read_tiff(data: bytes, limits: DecodeLimits) -> _Header:
    order, tags = _read_tiff_directory(data)
    if _WIDTH not in tags or _HEIGHT not in tags:
        _reject("corrupt", "The TIFF directory does not say its image's size.")
    width, height = tags[_WIDTH][0], tags[_HEIGHT][0]
    _check_size("TIFF", width, height, limits)
    _check_tiff_layout(tags)
    _check_tiff_parts(tags, len(data))
    orientation = tags.pop(_ORIENTATION, (1,))[0]
    bits = tags.get(_BITS, (1,))[0]
    white_is_zero = bits == 16 and tags.get(_PHOTOMETRIC, (0,))[0] == 0
    return _Header(
        format="TIFF",
        width=width,
        height=height,
        payload=_write_tiff(data, order, tags),
        orientation=orientation if 1 <= orientation <= 8 else 1,
        bits=bits,
        white_is_zero=white_is_zero,
    )


_READERS: dict[str, Callable[[bytes, DecodeLimits], _Header]] = {
    "BMP": _read_bmp,
    "GIF": _read_gif,
    "JPEG": _read_jpeg,
    "PNG": _read_png,
    "TIFF": _read_tiff,
    "WEBP": _read_webp,
}


# ---- pixels --------------------------------------------------------------------------------------


def _open(header: _Header) -> ImageFile.ImageFile:
    image = Image.open(io.BytesIO(header.payload), formats=[header.format])
    if sorted(image.size) != sorted((header.width, header.height)):
        _reject("corrupt", f"The {header.format} file contradicts itself about its size.")
    return image


def _decode(header: _Header) -> NDArray[np.uint8]:
    image = _open(header)
    if image.mode.startswith("I;16"):
        grey = _decode_grey_16(image, header)
    elif header.bits == 16:
        grey = _decode_colour_16(image, header)
    else:
        image.load()
        grey = np.asarray(_to_grey(image))
        if header.transparent is not None:
            colour = np.array(header.transparent) * (255 // (2**header.bits - 1))
            pixels = np.asarray(image.convert("L") if image.mode == "1" else image)
            grey = _blacken(grey, pixels, colour)
    if header.orientation != 1:
        grey = np.ascontiguousarray(_TURNS[header.orientation](grey))
    return grey


def _to_grey(image: Image.Image) -> Image.Image:
    """Turn a loaded image of 8-bit samples into mode L, over black where it is transparent."""
    mode = image.mode
    if mode == "L":
        return image
    if mode == "P":
        # The palette is turned to grey, not the image: one byte for each pixel throughout.
        palette = np.zeros((1, 256, 4), np.uint8)
        palette[..., 3] = 255
        colours = np.array(image.getpalette("RGB") or (), np.uint8).reshape(-1, 3)
        palette[0, : len(colours), :3] = colours
        clear = image.info.get("transparency")
        if isinstance(clear, bytes):
            palette[0, : len(clear), 3] = np.frombuffer(clear, np.uint8)[:256]
        elif isinstance(clear, int):
            palette[0, clear, 3] = 0
        return image.point(list(_to_grey(Image.fromarray(palette)).tobytes()), "L")
    if mode == "PA":
        image, mode = image.convert("RGBA"), "RGBA"
    image.info.pop("transparency", None)  # ours to apply, in full depth
    if mode == "RGBA":
        image, mode = image.convert("LA"), "LA"
    if mode == "LA":
        image, mode = image.convert("La"), "La"  # times alpha, rounded: that is, over black
    return image.getchannel(0) if mode == "La" else image.convert("L")


def _scale_16(samples: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """Scale 16 bits to 8 with exact rounding, as libpng's png_do_scale_16_to_8."""
    wide = samples.astype(np.uint32)
    wide *= 255
    wide += 32895
    wide >>= 16
    return wide.astype(np.uint8)


def _blacken(
    grey: NDArray[np.uint8], pixels: NDArray[np.generic], colour: NDArray[np.int64]
) -> NDArray[np.uint8]:
    """Blacken the pixels of exactly the transparent colour."""
    clear = pixels == colour
    return np.where(clear if clear.ndim == 2 else clear.all(axis=-1), 0, grey).astype(np.uint8)


def _decode_grey_16(image: Image.Image, header: _Header) -> NDArray[np.uint8]:
    image.load()
    samples = np.asarray(image)
    grey = _scale_16(samples)
    if header.white_is_zero:
        grey = np.invert(grey, out=grey)
    if header.transparent is not None:
        grey = _blacken(grey, samples, np.array(header.transparent))
    return grey


def _decode_colour_16(image: ImageFile.ImageFile, header: _Header) -> NDArray[np.uint8]:
    """Decode 16-bit colour or grey with alpha, which Pillow has no mode for, at full depth.

    Pillow keeps one byte of each such sample. Which one is the raw mode's choice, so reading once
    in each byte order gives both; grey with alpha fits into one reading as four bytes.
    """
    raw_modes = {_get_raw_mode(tile) for tile in image.tile}
    raw = raw_modes.pop()
    if raw_modes or raw[:-1] not in ("RGB;16", "RGBA;16", "LA;16"):
        _reject("unsupported", f"This layout of 16-bit {header.format} samples is not supported.")
    if raw == "LA;16B":
        _set_raw_mode(image, "RGBA")
        image.load()
        samples = np.asarray(image).view(">u2")
    else:
        other = _open(header)
        native_other = "B" if sys.byteorder == "little" else "L"
        _set_raw_mode(other, raw[:-1] + {"B": "L", "L": "B", "N": native_other}[raw[-1]])
        image.load()
        other.load()
        samples = np.asarray(image).astype(np.uint16)
        samples <<= 8
        samples |= np.asarray(other)
    grey = np.asarray(_to_grey(Image.fromarray(_scale_16(samples))))
    if header.transparent is not None:
        grey = _blacken(grey, samples, np.array(header.transparent))
    return grey


def _get_raw_mode(tile: ImageFile._Tile) -> str:
    return tile.args if isinstance(tile.args, str) else str((tile.args or ("",))[0])


def _set_raw_mode(image: ImageFile.ImageFile, raw: str) -> None:
    image.tile = [
        tile._replace(args=raw if isinstance(tile.args, str) else (raw, *(tile.args or ())[1:]))
        for tile in image.tile
    ]


_TURNS: dict[int, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
    2: lambda grey: grey[:, ::-1],
    3: lambda grey: grey[::-1, ::-1],
    4: lambda grey: grey[::-1],
    5: lambda grey: grey.T,
    6: lambda grey: grey.T[:, ::-1],
    7: lambda grey: grey.T[::-1, ::-1],
    8: lambda grey: grey.T[::-1],
}
"""EXIF orientation to the turn that makes the picture upright, as ImageOps.exif_transpose."""
