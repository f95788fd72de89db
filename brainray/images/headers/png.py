"""PNG headers: the chunks that make the picture, whole and with right checksums."""

import struct
import zlib
from collections.abc import Iterator

from brainray.errors import RejectedImage
from brainray.images.headers.header import MAX_PARTS, Header, check_size, read_exif_orientation

_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_NEEDED = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")


def _iterate_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield each chunk's type, where its contents start, and their length in bytes."""
    at = 8
    for _ in range(MAX_PARTS):
        length, kind = struct.unpack_from(">L4s", data, at)
        if not kind.isalpha():
            raise RejectedImage("corrupt", f"The PNG file has a chunk called {kind!r}.")
        if at + 12 + length > len(data):
            raise RejectedImage(
                "truncated", f"The PNG file ends inside its {kind.decode()} chunk. Resend it."
            )
        yield kind, at + 8, length
        if kind == b"IEND":
            return
        at += 12 + length
    raise RejectedImage("corrupt", f"The PNG file has more than {MAX_PARTS} chunks.")


def read_png(data: bytes, max_pixels: int) -> Header:
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
    for kind, start, length in _iterate_chunks(data):
        if kind in _NEEDED:
            (expected,) = struct.unpack_from(">L", data, start + length)
            if zlib.crc32(view[start - 4 : start + length]) != expected:
                raise RejectedImage(
                    "corrupt", f"The PNG file's {kind.decode()} chunk fails its checksum."
                )
            kept.append(view[start - 8 : start + length + 4])
            if kind == b"IDAT":
                packed.append(view[start : start + length])
            else:
                spans.setdefault(kind, data[start : start + length])
        elif kind == b"acTL" and length >= 4 and struct.unpack_from(">L", data, start)[0] > 1:
            raise RejectedImage(
                "multi_frame", "The PNG file is an animation. Send one frame as a still image."
            )
        elif kind == b"eXIf":
            orientation = read_exif_orientation(data[start : start + length])
        elif not kind[0] & 0x20:
            raise RejectedImage(
                "corrupt", f"The PNG file has a critical chunk {kind.decode()} unknown to PNG."
            )
    if len(spans.get(b"IHDR", b"")) != 13 or bytes(kept[1][4:8]) != b"IHDR" or not packed:
        raise RejectedImage("corrupt", "The PNG file lacks a header or image data.")
    width, height, bits, colour, packing, filtering, lacing = struct.unpack(
        ">LLBBBBB", spans[b"IHDR"]
    )
    if bits not in _DEPTHS.get(colour, ()) or packing or filtering or lacing > 1:
        raise RejectedImage(
            "corrupt", "The PNG header's bit depth, colour type or methods are not PNG's."
        )
    check_size("PNG", (width, height), max_pixels)
    _check_data(b"".join(packed), _count_bytes(width, height, bits, colour, lacing))
    if colour == 3 and (not spans.get(b"PLTE") or len(spans[b"PLTE"]) % 3):
        raise RejectedImage("corrupt", "The PNG file has palette indices but no whole palette.")
    transparent = None
    if colour in (0, 2) and b"tRNS" in spans:
        # "Only the lower bits are used" [1], section 11.3.1.1.
        samples = struct.unpack_from(">H" if colour == 0 else ">HHH", spans[b"tRNS"])
        full = 2**bits - 1
        stretch = 255 // full if bits < 8 else 1  # as the pixels will be
        transparent = tuple((sample & full) * stretch for sample in samples)
    return Header(
        format="PNG",
        size=(width, height),
        payload=data if sum(map(len, kept)) == len(data) else b"".join(kept),
        orientation=orientation,
        bits=bits,
        transparent=transparent,
    )


_ADAM7_PASSES = (
    *((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)),
    *((0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)),
)
"""First column, first row, column step, row step of each pass: PNG specification, section 8."""


def _count_bytes(width: int, height: int, bits: int, colour: int, lacing: int) -> int:
    """Count the bytes of unpacked, still filtered image data."""
    pixel_bits = bits * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    count = 0
    for left, top, across, down in _ADAM7_PASSES if lacing else ((0, 0, 1, 1),):
        columns, rows = -((left - width) // across), -((top - height) // down)
        if columns > 0 and rows > 0:
            count += rows * (1 + (columns * pixel_bits + 7) // 8)
    return count


def _check_data(packed: bytes, expected: int) -> None:
    """Refuse image data that unpacks to less than the expected number of bytes; unpack no more.

    Pillow takes a stream that ends early for a whole one and leaves the rest of the picture black.
    """
    try:
        got = len(zlib.decompressobj().decompress(packed, expected))
    except zlib.error as error:
        raise RejectedImage(
            "corrupt", f"The PNG image data cannot be unpacked ({error})."
        ) from error
    if got < expected:
        raise RejectedImage(
            "truncated", f"The PNG image data lacks {expected - got} bytes. Export it again."
        )
