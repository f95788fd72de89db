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

# Chunks (PNG), blocks (GIF), segments (JPEG) and strips (TIFF) are read in Python, about 1 µs each.
# No encoder writes this many in a file of the default size.
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


def corrupt(message: str) -> RejectedImage:
    """Return the rejection of a file that contradicts its format."""
    return RejectedImage("corrupt", f"{message} Export it again.")


def truncated(message: str) -> RejectedImage:
    """Return the rejection of a file that ends too early."""
    return RejectedImage("truncated", f"{message} Send it again.")


def unsupported(message: str) -> RejectedImage:
    """Return the rejection of a format, or a variant of one, that is not read."""
    return RejectedImage("unsupported", message)


def too_large(message: str) -> RejectedImage:
    """Return the rejection of a file that exceeds a limit."""
    return RejectedImage("too_large", message)


def check_size(name: str, size: tuple[int, int], max_pixels: int) -> None:
    """Reject an image without pixels, or with too many."""
    width, height = size
    if width < 1 or height < 1:
        raise corrupt(f"The {name} header gives a size of {width} x {height}.")
    limit, remedy = max_pixels, "Resize it, or raise max_pixels"
    pillow_limit = Image.MAX_IMAGE_PIXELS  # above it Pillow warns, above twice as many it raises
    if pillow_limit is not None and pillow_limit < limit:
        limit, remedy = int(pillow_limit), "Resize it, or raise PIL.Image.MAX_IMAGE_PIXELS"
    if width * height > limit:
        raise too_large(
            f"The image has {width} x {height} pixels, more than the {limit:,} allowed. {remedy}."
        )


def _read_exif_orientation(exif: bytes) -> int:
    """Return tag 274 of an EXIF block; 1 (upright) where it is absent or damaged.

    Pillow would parse the whole block, and warn where it is damaged (CIPA DC-008, 4.6.4 A).
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

# (offset, signature): NIfTI-1 in one file and in two, NIfTI-2, gzip.
_NIFTI = ((344, b"n+1\0"), (344, b"ni1\0"), (4, b"n+2\0\r\n\x1a\n"), (0, b"\x1f\x8b"))
_PICTURES: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (0, b"GIF87a", "GIF"),
    (0, b"GIF89a", "GIF"),
    (8, b"WEBP", "WEBP"),
    *((0, signature, "TIFF") for signature in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
)
# (offset, signature, description): ISO/IEC 14496-12 section 4.3; the others as in file(1).
_UNSUPPORTED: tuple[tuple[int, bytes, str], ...] = (
    (0, b"%PDF-", "a PDF document. Extract the image from it."),
    (0, b"PK\x03\x04", "a ZIP archive. Unpack it."),
    (4, b"ftyp", "an HEIC, AVIF or MP4 file. Save it as PNG or JPEG."),
    (0, b"\0\0\0\x0cjP  \r\n\x87\n", "a JPEG 2000 image. Save it as PNG or JPEG."),
    (0, b"\xff\x4f\xff\x51", "a JPEG 2000 codestream. Save it as PNG or JPEG."),
    (0, b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL image. Save it as PNG or JPEG."),
    (0, b"\xff\x0a", "a JPEG XL codestream. Save it as PNG or JPEG."),
    (0, b"8BPS", "a Photoshop document. Save it as PNG or JPEG."),
    (0, b"\0\0\x01\0", "a Windows icon. Save it as PNG or JPEG."),
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
    """Return Pillow's name of a picture's format; reject as ``unsupported`` or ``not_an_image``."""
    for offset, signature, name in _PICTURES:
        if data.startswith(signature, offset) and (name != "WEBP" or data.startswith(b"RIFF")):
            return name
    for offset, signature, description in _UNSUPPORTED:
        if data.startswith(signature, offset):
            raise unsupported(f"{ACCEPTED}, got {description}")
    # Texts may begin with these letters too. The next words of a BMP are its length and zero.
    if data.startswith(b"BM") and data[6:10] == b"\0\0\0\0":
        return "BMP"
    text = data[:1024].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<svg", b"<?xml", b"<!doctype svg")):
        description = "an SVG or XML document. Export the slice as PNG or JPEG."
        raise unsupported(f"{ACCEPTED}, got {description}")
    # The message does not quote the bytes: a text may begin with a person's name.
    raise RejectedImage("not_an_image", f"{ACCEPTED}, got bytes of another format.")


# ---- PNG -----------------------------------------------------------------------------------------

_NEEDED_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
# First column, first row, column step and row step of each pass: PNG specification, section 8.
_ADAM7_PASSES = (
    *((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)),
    *((0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)),
)


def _iterate_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield each chunk's type, and the start and end of its contents."""
    at = 8
    for _ in range(MAX_PARTS):
        length, kind = struct.unpack_from(">L4s", data, at)
        if not kind.isalpha():
            raise corrupt(f"The PNG file has a chunk of type {kind!r}.")
        if at + 12 + length > len(data):
            raise truncated(f"The PNG file ends inside its {kind.decode()} chunk.")
        yield kind, at + 8, at + 8 + length
        if kind == b"IEND":
            return
        at += 12 + length
    raise corrupt(f"The PNG file has more than {MAX_PARTS} chunks.")


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
    for kind, start, end in _iterate_chunks(data):
        if kind in _NEEDED_CHUNKS:
            if zlib.crc32(view[start - 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
                raise corrupt(f"The checksum of the PNG file's {kind.decode()} chunk is wrong.")
            kept.append(view[start - 8 : end + 4])
            if kind == b"IDAT":
                packed.append(view[start:end])
            else:
                contents.setdefault(kind, data[start:end])
        elif kind == b"acTL" and end - start >= 4 and struct.unpack_from(">L", data, start)[0] > 1:
            raise RejectedImage(
                "multi_frame", "The PNG file is an animation. Send one frame as a still image."
            )
        elif kind == b"eXIf":
            orientation = _read_exif_orientation(data[start:end])
        elif not kind[0] & 0x20:
            raise corrupt(f"The PNG file has an unknown critical chunk, {kind.decode()}.")
    header = contents.get(b"IHDR", b"")
    if len(header) != 13 or not packed:
        raise corrupt("The PNG file lacks a header or image data.")
    width, height, bits, colour, packing, filtering, interlace = struct.unpack(">LLBBBBB", header)
    check_size("PNG", (width, height), max_pixels)
    if colour not in _PNG_CHANNELS or packing or filtering or interlace > 1:
        raise corrupt("The PNG header has an unknown colour type or method.")
    if colour == 3 and len(contents.get(b"PLTE", b"")) < 3:
        raise corrupt("The PNG file has no palette for its palette indices.")
    num_bytes = _count_png_bytes(width, height, bits * _PNG_CHANNELS[colour], interlace == 1)
    _check_png_data(b"".join(packed), num_bytes)
    transparent = None
    if b"tRNS" in contents and colour in (0, 2):
        samples = struct.unpack_from(">H" if colour == 0 else ">HHH", contents[b"tRNS"])
        full = 2**bits - 1  # only the lower bits count (section 11.3.1.1)
        scale = 255 // full if bits < 8 else 1  # Pillow scales lower depths to 8 bits
        transparent = tuple((sample & full) * scale for sample in samples)
    return Header(
        format="PNG",
        size=(width, height),
        payload=b"".join(kept),
        orientation=orientation,
        bits=bits,
        transparent=transparent,
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
        raise corrupt(f"The PNG image data cannot be unpacked ({error}).") from error
    if got < expected:
        raise RejectedImage(
            "truncated", f"The PNG image data lack {expected - got} bytes. Export it again."
        )


# ---- JPEG ----------------------------------------------------------------------------------------

JPEG_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_MARKERS_ALONE = frozenset({0x00, 0x01, *range(0xD0, 0xD9)})  # without a length


def iterate_jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield the segments of a JPEG file up to its first scan: marker, start (at the length), end.

    References
    ----------
    .. [1] ITU-T T.81, annex B.
    """
    at = 2
    for _ in range(MAX_PARTS):
        at = data.find(b"\xff", at) + 1
        if not at:
            raise truncated("The JPEG file ends before its image data.")
        marker = data[at]
        if marker == 0xFF:  # a fill byte
            continue
        at += 1
        if marker in _JPEG_MARKERS_ALONE:
            continue
        if marker == 0xD9:
            raise corrupt("The JPEG file has an end marker but no image data.")
        length = data[at] << 8 | data[at + 1]
        if length < 2:
            raise corrupt(f"JPEG segment {marker:02X} gives length {length}.")
        if marker == 0xDA:
            return
        if at + length > len(data):
            raise truncated(f"The JPEG file ends inside segment {marker:02X}.")
        yield marker, at, at + length
        at += length
    raise corrupt(f"The JPEG file has more than {MAX_PARTS} segments.")


def _read_jpeg(data: bytes, max_pixels: int) -> Header:
    """Read a JPEG's segments up to its first scan, and leave out EXIF and MPF.

    Pillow would parse both, and warn where they are damaged. The first image of an MPF file is the
    picture. The others are previews and other views of it.
    """
    kept_from = end = 0
    orientation = 0
    kept: list[bytes] = []
    size: tuple[int, int] | None = None
    for marker, start, end in iterate_jpeg_segments(data):
        if marker in JPEG_FRAME_MARKERS:
            if size is not None:
                raise corrupt("The JPEG file has two frame headers.")
            bits, height, width = struct.unpack_from(">BHH", data, start + 2)
            if bits != 8:
                raise unsupported(f"JPEG with {bits}-bit samples is not supported. Save it as PNG.")
            size = width, height
        elif marker in (0xE1, 0xE2) and data.startswith((b"Exif\0\0", b"MPF\0"), start + 2):
            if marker == 0xE1 and not orientation:
                orientation = _read_exif_orientation(data[start + 2 : end])
            kept.append(data[kept_from : start - 2])
            kept_from = end
    if size is None:
        raise corrupt("The JPEG file has image data but no frame header.")
    check_size("JPEG", size, max_pixels)
    # Where the end marker is missing, libjpeg adds one and fills the rest with grey.
    if data.find(b"\xff\xd9", end) < 0:
        raise truncated("The JPEG file has no end marker: part of it is missing.")
    if data.count(b"\xff\xda", end) > MAX_SCANS:
        raise too_large(f"The JPEG file has more than {MAX_SCANS} scans. Save it as PNG.")
    payload = b"".join([*kept, memoryview(data)[kept_from:]]) if kept else data
    return Header(format="JPEG", size=size, payload=payload, orientation=orientation or 1)


# ---- GIF, WebP, BMP ------------------------------------------------------------------------------


def _skip_sub_blocks(data: bytes, at: int) -> int:
    """Return the end of the sub-blocks that start at `at`."""
    for _ in range(2**20):  # of at most 255 bytes each
        if not data[at]:
            return at + 1
        at += 1 + data[at]
    raise corrupt("The GIF file has more than a million sub-blocks.")


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
            raise corrupt(f"The GIF file has a block of unknown kind {kind:02X}.")
    else:
        raise corrupt(f"The GIF file has more than {MAX_PARTS} blocks.")
    if not frames:
        raise corrupt("The GIF file has no image.")
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
        raise truncated(f"The WebP file has {len(data)} of its {end} bytes.")
    first = data[12:16]
    if first == b"VP8X":
        width, high, height, top = struct.unpack_from("<HBHB", data, 24)
        size = (high << 16 | width) + 1, (top << 16 | height) + 1
    elif first == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        size = width & 0x3FFF, height & 0x3FFF
    elif first == b"VP8L":
        (packed,) = struct.unpack_from("<L", data, 21)
        size = (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
    else:
        raise corrupt(f"The WebP file begins with a chunk of type {first!r}.")
    check_size("WebP", size, max_pixels)
    at, frames, orientation = 12, 0, 1
    for _ in range(MAX_PARTS):
        if at + 8 > end:
            break
        kind, length = struct.unpack_from("<4sL", data, at)
        frames += kind == b"ANMF"
        if kind == b"EXIF":
            orientation = _read_exif_orientation(data[at + 8 : at + 8 + length])
        at += 8 + length + length % 2
    if frames > 1:
        raise RejectedImage(
            "multi_frame", "The WebP file is an animation. Send one frame as a still image."
        )
    return Header(format="WEBP", size=size, payload=data, orientation=orientation)


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
        raise unsupported("Run-length encoded BMP is not supported. Save it as PNG.")
    check_size("BMP", (width, height), max_pixels)
    if start + (width * bits + 31) // 32 * 4 * height > len(data):
        raise truncated(f"The BMP file lacks some of its {width} x {height} pixels.")
    return Header(format="BMP", size=(width, height), payload=data)


READERS: dict[str, Callable[[bytes, int], Header]] = {
    "BMP": _read_bmp,
    "GIF": _read_gif,
    "JPEG": _read_jpeg,
    "PNG": _read_png,
    "WEBP": _read_webp,
}
"""Functions of the file and ``max_pixels``, by Pillow's name of the format."""
