"""Headers of encoded pictures, read before Pillow opens the file.

Each reader takes bounded time and unpacks no pixels. It finds the size, rejects files that Pillow
would decode wrongly without an error, and removes metadata that Pillow would unpack or warn about.
Pillow checks the rest.
"""

import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from PIL import Image

from brainray.errors import RejectedImage

ACCEPTED = "Expected a DICOM, NIfTI, PNG, JPEG, BMP, GIF, TIFF or WebP file"

# Chunks (PNG), blocks (GIF) and strips (TIFF) are read in Python, about 1 µs each. No encoder
# writes this many in a file of the default size.
MAX_PARTS = 2**16

# A scan is one pass over the whole image, and costs an attacker a hundred bytes. The fuzzers of
# libjpeg-turbo stop at 500 (fuzz/decompress.cc). Encoders in use write fewer than 20.
MAX_SCANS = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """The header of one encoded picture."""

    format: str
    """Pillow's name of the format."""
    size: tuple[int, int]
    """Width and height as stored, in pixels."""
    payload: bytes
    """The file, without the metadata that Pillow is not to read."""
    orientation: int = 1
    """EXIF orientation, 1 to 8."""
    bits: int = 8
    """Bits in a sample."""
    transparent: tuple[int, ...] | None = None
    """The grey or RGB colour that a PNG declares transparent, in the range of decoded samples."""
    white_is_zero: bool = False
    """16-bit TIFF only: Pillow inverts lower depths itself."""


def check_size(name: str, size: tuple[int, int], max_pixels: int) -> None:
    """Reject an image without pixels, or with too many."""
    width, height = size
    if width < 1 or height < 1:
        raise RejectedImage("corrupt", f"The {name} header gives a size of {width} x {height}.")
    limit, remedy = max_pixels, "Resize it, or raise max_pixels"
    pillow_limit = Image.MAX_IMAGE_PIXELS  # above it Pillow warns, above twice as many it raises
    if pillow_limit is not None and pillow_limit < limit:
        limit, remedy = int(pillow_limit), "Resize it, or raise PIL.Image.MAX_IMAGE_PIXELS"
    if width * height > limit:
        raise RejectedImage(
            "too_large",
            f"The image has {width} x {height} pixels, more than the {limit:,} allowed. {remedy}.",
        )


def read_exif_orientation(exif: bytes) -> int:
    """Return tag 274 of an EXIF block; 1 (upright) where it is absent or damaged.

    Pillow would parse the whole block, and warn where it is damaged.

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
    except struct.error:
        pass
    return 1


# ---- format --------------------------------------------------------------------------------------

_EXPORT = "Export the slice as PNG or JPEG."
_SAVE = "Save it as PNG or JPEG."
# (offset, signature): NIfTI-1 in one file and in two, NIfTI-2, gzip.
_NIFTI = ((344, b"n+1\0"), (344, b"ni1\0"), (4, b"n+2\0\r\n\x1a\n"), (0, b"\x1f\x8b"))
# (offset, signature, description): ISO/IEC 14496-12 section 4.3; the others as in file(1).
_UNSUPPORTED: tuple[tuple[int, bytes, str], ...] = (
    (0, b"%PDF-", "a PDF document. Extract the image from it."),
    (0, b"PK\x03\x04", "a ZIP archive. Unpack it."),
    (4, b"ftyp", f"an HEIC, AVIF or MP4 file. {_SAVE}"),
    (0, b"\0\0\0\x0cjP  \r\n\x87\n", f"a JPEG 2000 image. {_SAVE}"),
    (0, b"\xff\x4f\xff\x51", f"a JPEG 2000 codestream. {_SAVE}"),
    (0, b"\0\0\0\x0cJXL \r\n\x87\n", f"a JPEG XL image. {_SAVE}"),
    (0, b"\xff\x0a", f"a JPEG XL codestream. {_SAVE}"),
    (0, b"8BPS", f"a Photoshop document. {_SAVE}"),
    (0, b"\0\0\x01\0", f"a Windows icon. {_SAVE}"),
)


def is_dicom(start: bytes) -> bool:
    """Return whether to read a file as DICOM, by its first 132 bytes.

    Part 10 files have ``DICM`` after 128 bytes of any content. A file without this preamble starts
    with an element of group 2 or group 8.
    """
    return start[128:132] == b"DICM" or start[:2] in (b"\x02\x00", b"\x08\x00", b"\x00\x08")


def is_nifti(start: bytes) -> bool:
    """Return whether to read a file as NIfTI or gzipped NIfTI, by its first 348 bytes."""
    return any(start.startswith(signature, offset) for offset, signature in _NIFTI)


def recognise_picture(data: bytes) -> str:
    """Return Pillow's name of a picture's format, by its first bytes.

    Raises
    ------
    RejectedImage
        ``unsupported`` or ``not_an_image``.
    """
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    for offset, signature, description in _UNSUPPORTED:
        if data.startswith(signature, offset):
            raise RejectedImage("unsupported", f"{ACCEPTED}, got {description}")
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    # Texts may begin with these letters too. The next words of a BMP are its length and zero.
    if data.startswith(b"BM") and data[6:10] == b"\0\0\0\0":
        return "BMP"
    text = data[:1024].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<svg", b"<?xml", b"<!doctype svg")):
        raise RejectedImage("unsupported", f"{ACCEPTED}, got an SVG or XML document. {_EXPORT}")
    # The message does not quote the bytes: a text may begin with a person's name.
    raise RejectedImage("not_an_image", f"{ACCEPTED}, got bytes of another format.")


# ---- PNG -----------------------------------------------------------------------------------------

_NEEDED_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type


def _iterate_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield each chunk's type, the start of its contents, and their length in bytes."""
    at = 8
    for _ in range(MAX_PARTS):
        length, kind = struct.unpack_from(">L4s", data, at)
        if not kind.isalpha():
            raise RejectedImage("corrupt", f"The PNG file has a chunk of type {kind!r}.")
        if at + 12 + length > len(data):
            raise RejectedImage(
                "truncated", f"The PNG file ends inside its {kind.decode()} chunk. Send it again."
            )
        yield kind, at + 8, length
        if kind == b"IEND":
            return
        at += 12 + length
    raise RejectedImage("corrupt", f"The PNG file has more than {MAX_PARTS} chunks.")


def _read_png(data: bytes, max_pixels: int) -> Header:
    """Keep only the chunks that form the picture, and verify their checksums.

    Pillow does not verify the checksums of image data, and unpacks texts and colour profiles.

    References
    ----------
    .. [1] W3C, Portable Network Graphics (PNG) Specification (Third Edition), sections 5 and 11.
    """
    view = memoryview(data)
    kept: list[memoryview] = [view[:8]]
    packed: list[memoryview] = []
    orientation = 1
    contents: dict[bytes, bytes] = {}
    for kind, start, length in _iterate_chunks(data):
        end = start + length
        if kind in _NEEDED_CHUNKS:
            if zlib.crc32(view[start - 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
                raise RejectedImage(
                    "corrupt", f"The checksum of the PNG file's {kind.decode()} chunk is wrong."
                )
            kept.append(view[start - 8 : end + 4])
            if kind == b"IDAT":
                packed.append(view[start:end])
            else:
                contents.setdefault(kind, data[start:end])
        elif kind == b"acTL" and length >= 4 and struct.unpack_from(">L", data, start)[0] > 1:
            raise RejectedImage(
                "multi_frame", "The PNG file is an animation. Send one frame as a still image."
            )
        elif kind == b"eXIf":
            orientation = read_exif_orientation(data[start:end])
        elif not kind[0] & 0x20:
            raise RejectedImage(
                "corrupt", f"The PNG file has an unknown critical chunk, {kind.decode()}."
            )
    header = contents.get(b"IHDR", b"")
    if len(header) != 13 or not packed:
        raise RejectedImage("corrupt", "The PNG file lacks a header or image data.")
    width, height, bits, colour, packing, filtering, interlace = struct.unpack(">LLBBBBB", header)
    check_size("PNG", (width, height), max_pixels)
    if colour not in _PNG_CHANNELS or packing or filtering or interlace > 1:
        raise RejectedImage("corrupt", "The PNG header has an unknown colour type or method.")
    if colour == 3 and len(contents.get(b"PLTE", b"")) < 3:
        raise RejectedImage("corrupt", "The PNG file has no palette for its palette indices.")
    num_bytes = _count_png_bytes(width, height, bits * _PNG_CHANNELS[colour], interlace == 1)
    _check_png_data(b"".join(packed), num_bytes)
    return Header(
        format="PNG",
        size=(width, height),
        payload=b"".join(kept),
        orientation=orientation,
        bits=bits,
        transparent=_read_transparent(contents.get(b"tRNS"), bits, colour),
    )


def _read_transparent(contents: bytes | None, bits: int, colour: int) -> tuple[int, ...] | None:
    """Return the transparent colour; only its lower bits count ([1] of PNG, 11.3.1.1)."""
    if contents is None or colour not in (0, 2):
        return None
    samples = struct.unpack_from(">H" if colour == 0 else ">HHH", contents)
    full = 2**bits - 1
    scale = 255 // full if bits < 8 else 1  # Pillow scales lower depths to 8 bits
    return tuple((sample & full) * scale for sample in samples)


# First column, first row, column step and row step of each pass: PNG specification, section 8.
_ADAM7_PASSES = (
    *((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)),
    *((0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)),
)


def _count_png_bytes(width: int, height: int, pixel_bits: int, is_interlaced: bool) -> int:
    """Count the bytes of unpacked image data, filter bytes included."""
    count = 0
    for left, top, across, down in _ADAM7_PASSES if is_interlaced else ((0, 0, 1, 1),):
        columns, rows = -((left - width) // across), -((top - height) // down)
        if columns > 0 and rows > 0:
            count += rows * (1 + (columns * pixel_bits + 7) // 8)
    return count


def _check_png_data(packed: bytes, expected: int) -> None:
    """Reject image data that unpack to less than expected.

    Pillow takes a stream that ends early for a whole one, and leaves the rest of the image black.
    """
    try:
        got = len(zlib.decompressobj().decompress(packed, expected))
    except zlib.error as error:
        raise RejectedImage(
            "corrupt", f"The PNG image data cannot be unpacked ({error})."
        ) from error
    if got < expected:
        raise RejectedImage(
            "truncated", f"The PNG image data lack {expected - got} bytes. Export it again."
        )


# ---- JPEG ----------------------------------------------------------------------------------------

JPEG_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
JPEG_MARKERS_ALONE = frozenset({0x00, 0x01, *range(0xD0, 0xD9)})  # without a length


def _read_jpeg(data: bytes, max_pixels: int) -> Header:
    """Read a JPEG's segments up to its first scan, and leave out EXIF and MPF.

    Pillow would parse both, and warn where they are damaged. The first image of an MPF file is the
    picture. The others are previews and other views of it.

    References
    ----------
    .. [1] ITU-T T.81, annex B.
    """
    at, kept_from, orientation = 2, 0, 0
    kept: list[bytes] = []
    size: tuple[int, int] | None = None
    while True:
        at = data.find(b"\xff", at)
        if at < 0:
            raise RejectedImage(
                "truncated", "The JPEG file ends before its image data. Send it again."
            )
        while data[at] == 0xFF:
            at += 1
        marker = data[at]
        at += 1
        if marker in JPEG_MARKERS_ALONE:
            continue
        if marker == 0xD9:
            raise RejectedImage("corrupt", "The JPEG file has an end marker but no image data.")
        length = data[at] << 8 | data[at + 1]
        if length < 2:
            raise RejectedImage("corrupt", f"JPEG segment {marker:02X} gives length {length}.")
        if marker == 0xDA:
            break
        if at + length > len(data):
            raise RejectedImage(
                "truncated", f"The JPEG file ends inside segment {marker:02X}. Send it again."
            )
        if marker in JPEG_FRAME_MARKERS:
            if size is not None:
                raise RejectedImage("corrupt", "The JPEG file has two frame headers.")
            size = _read_jpeg_size(data, at)
        elif marker in (0xE1, 0xE2) and data.startswith((b"Exif\0\0", b"MPF\0"), at + 2):
            if marker == 0xE1 and not orientation:
                orientation = read_exif_orientation(data[at + 2 : at + length])
            kept.append(data[kept_from : at - 2])
            kept_from = at + length
        at += length
    if size is None:
        raise RejectedImage("corrupt", "The JPEG file has image data but no frame header.")
    check_size("JPEG", size, max_pixels)
    # Where the end marker is missing, libjpeg adds one and fills the rest with grey.
    if data.find(b"\xff\xd9", at) < 0:
        raise RejectedImage(
            "truncated", "The JPEG file has no end marker: part of it is missing. Send it again."
        )
    if data.count(b"\xff\xda", at) > MAX_SCANS:
        raise RejectedImage(
            "too_large", f"The JPEG file has more than {MAX_SCANS} scans. Save it as PNG."
        )
    payload = b"".join([*kept, memoryview(data)[kept_from:]]) if kept else data
    return Header(format="JPEG", size=size, payload=payload, orientation=orientation or 1)


def _read_jpeg_size(data: bytes, at: int) -> tuple[int, int]:
    bits, height, width = struct.unpack_from(">BHH", data, at + 2)
    if bits != 8:
        raise RejectedImage(
            "unsupported", f"JPEG with {bits}-bit samples is not supported. Save it as PNG."
        )
    return width, height


# ---- GIF, WebP, BMP ------------------------------------------------------------------------------


def _skip_sub_blocks(data: bytes, at: int) -> int:
    """Return the end of the sub-blocks that start at `at`."""
    for _ in range(2**20):  # of at most 255 bytes each
        if not data[at]:
            return at + 1
        at += 1 + data[at]
    raise RejectedImage("corrupt", "The GIF file has more than a million sub-blocks.")


def _read_gif(data: bytes, max_pixels: int) -> Header:
    """Read a GIF's blocks up to its trailer, which Pillow does not miss where a file is cut.

    References
    ----------
    .. [1] CompuServe, GIF89a Specification (1990).
    """
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    frames = 0
    for _ in range(MAX_PARTS):
        kind = data[at]
        if kind == 0x3B:
            break
        if kind == 0x21:
            at = _skip_sub_blocks(data, at + 2)
        elif kind == 0x2C:
            frames += 1
            left, top, across, down, flags = struct.unpack_from("<4HB", data, at + 1)
            # As browsers do, Pillow enlarges the image to hold a frame that extends beyond it.
            width, height = max(width, left + across), max(height, top + down)
            at += 10 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
            at = _skip_sub_blocks(data, at + 1)
            if frames > 1:
                raise RejectedImage(
                    "multi_frame", "The GIF file is an animation. Send one frame as PNG."
                )
        else:
            raise RejectedImage("corrupt", f"The GIF file has a block of unknown kind {kind:02X}.")
    else:
        raise RejectedImage("corrupt", f"The GIF file has more than {MAX_PARTS} blocks.")
    if not frames:
        raise RejectedImage("corrupt", "The GIF file has no image.")
    check_size("GIF", (width, height), max_pixels)
    return Header(format="GIF", size=(width, height), payload=data)


def _read_webp(data: bytes, max_pixels: int) -> Header:
    """Read a WebP's chunks. Pillow allocates the whole canvas when it opens the file.

    References
    ----------
    .. [1] RFC 9649, section 2.
    """
    end = 8 + int(struct.unpack_from("<L", data, 4)[0])
    if end > len(data):
        raise RejectedImage(
            "truncated", f"The WebP file has {len(data)} of its {end} bytes. Send it again."
        )
    size = _read_webp_size(data)
    check_size("WebP", size, max_pixels)
    at, frames, orientation = 12, 0, 1
    for _ in range(MAX_PARTS):
        if at + 8 > end:
            break
        kind, length = struct.unpack_from("<4sL", data, at)
        frames += kind == b"ANMF"
        if kind == b"EXIF":
            orientation = read_exif_orientation(data[at + 8 : at + 8 + length])
        at += 8 + length + length % 2
    if frames > 1:
        raise RejectedImage(
            "multi_frame", "The WebP file is an animation. Send one frame as a still image."
        )
    return Header(format="WEBP", size=size, payload=data, orientation=orientation)


def _read_webp_size(data: bytes) -> tuple[int, int]:
    """Read the size from the first chunk; its encoding depends on the type."""
    kind, at = data[12:16], 20
    if kind == b"VP8X":
        width, high, height, top = struct.unpack_from("<HBHB", data, at + 4)
        return (high << 16 | width) + 1, (top << 16 | height) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, at + 6)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L":
        (packed,) = struct.unpack_from("<L", data, at + 1)
        return (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
    raise RejectedImage("corrupt", f"The WebP file begins with a chunk of type {kind!r}.")


def _read_bmp(data: bytes, max_pixels: int) -> Header:
    """Read a BMP's size (Microsoft, BITMAPINFOHEADER and BITMAPCOREHEADER)."""
    start, header_bytes = struct.unpack_from("<LL", data, 10)
    if header_bytes == 12:
        width, height, _, bits = struct.unpack_from("<4H", data, 18)
        method = 0
    else:
        width, height, _, bits, method = struct.unpack_from("<llHHL", data, 18)
        height = abs(height)  # negative: the top row is stored first
    if method in (1, 2):  # Pillow unpacks it in Python: a file of the default size takes minutes
        raise RejectedImage(
            "unsupported", "Run-length encoded BMP is not supported. Save it as PNG."
        )
    check_size("BMP", (width, height), max_pixels)
    if start + (width * bits + 31) // 32 * 4 * height > len(data):
        raise RejectedImage(
            "truncated", f"The BMP file lacks some of its {width} x {height} pixels. Send it again."
        )
    return Header(format="BMP", size=(width, height), payload=data)


READERS: dict[str, Callable[[bytes, int], Header]] = {
    "BMP": _read_bmp,
    "GIF": _read_gif,
    "JPEG": _read_jpeg,
    "PNG": _read_png,
    "WEBP": _read_webp,
}
"""Functions of the file and ``max_pixels``, by Pillow's name of the format."""
