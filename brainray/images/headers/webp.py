"""WebP headers: RIFF chunks."""

import struct

from brainray.errors import RejectedImage
from brainray.images.headers.header import MAX_PARTS, Header, check_size, read_exif_orientation


def read_webp(data: bytes, max_pixels: int) -> Header:
    """Walk a WebP's RIFF chunks (RFC 9649, section 2)."""
    end = 8 + int(struct.unpack_from("<L", data, 4)[0])
    if end > len(data):
        raise RejectedImage(
            "truncated", f"The WebP file has {len(data)} of its {end} bytes. Resend it."
        )
    at, frames, orientation = 12, 0, 1
    size: tuple[int, int] | None = None
    for _ in range(MAX_PARTS):
        if at + 8 > end:
            break
        kind, length = struct.unpack_from("<4sL", data, at)
        if at + 8 + length > end:
            raise RejectedImage(
                "truncated", f"The WebP file ends inside its {kind!r} chunk. Resend it."
            )
        if size is None:
            size = _read_size(data, at + 8, kind)
        if kind == b"ANMF":
            frames += 1
        elif kind == b"EXIF":
            orientation = read_exif_orientation(data[at + 8 : at + 8 + length])
        at += 8 + length + length % 2
    else:
        raise RejectedImage("corrupt", f"The WebP file has more than {MAX_PARTS} chunks.")
    if size is None:
        raise RejectedImage("corrupt", "The WebP file holds no image.")
    check_size("WebP", size, max_pixels)
    if frames > 1:
        raise RejectedImage(
            "multi_frame", "The WebP file is an animation. Send one frame as a still image."
        )
    return Header(format="WEBP", size=size, payload=data, orientation=orientation)


def _read_size(data: bytes, at: int, kind: bytes) -> tuple[int, int]:
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
    raise RejectedImage("corrupt", f"The WebP file begins with a {kind!r} chunk.")
