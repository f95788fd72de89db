"""JPEG headers: segments up to the first scan; EXIF and other views are left out."""

import struct

from brainray.errors import RejectedImage
from brainray.images.headers.header import Header, check_size, read_exif_orientation

# A scan is one pass over the whole image, and costs a hostile file a hundred bytes. libjpeg-turbo's
# own fuzzers stop at 500 [libjpeg-turbo, fuzz/decompress.cc]; encoders in use write fewer than 20.
MAX_SCANS = 100
_FRAMES = frozenset({0xC0, 0xC1, 0xC2, 0xC3, 0xC9, 0xCA, 0xCB})
# Hierarchical JPEG, which nothing decodes, and JPEG-LS.
_UNSUPPORTED = frozenset({0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF, 0xDE, 0xF7})
_ALONE = frozenset({0x00, 0x01, *range(0xD0, 0xD9)})  # markers without a length


def read_jpeg(data: bytes, max_pixels: int) -> Header:
    """Walk a JPEG's segments up to its first scan (ITU-T T.81, annex B)."""
    at, kept_from, orientation = 2, 0, 0
    kept: list[bytes] = []
    size: tuple[int, int] | None = None
    while True:
        at = data.find(b"\xff", at)
        if at < 0:
            raise RejectedImage("truncated", "The JPEG file ends before its image data. Resend it.")
        while data[at] == 0xFF:
            at += 1
        marker = data[at]
        at += 1
        if marker in _ALONE:
            continue
        if marker == 0xD9:
            raise RejectedImage("corrupt", "The JPEG file has an end marker but no image data.")
        length = data[at] << 8 | data[at + 1]
        if length < 2:
            raise RejectedImage("corrupt", f"JPEG segment {marker:02X} claims {length} bytes.")
        if marker == 0xDA:
            break
        if at + length > len(data):
            raise RejectedImage(
                "truncated", f"The JPEG file ends inside segment {marker:02X}. Resend it."
            )
        if marker in _FRAMES:
            if size is not None:
                raise RejectedImage("corrupt", "The JPEG file has two frame headers.")
            size = _read_frame(data, at)
        elif marker in _UNSUPPORTED:
            raise RejectedImage(
                "unsupported", "Hierarchical JPEG and JPEG-LS are not supported. Save as PNG."
            )
        elif marker in (0xE1, 0xE2) and data.startswith((b"Exif\0\0", b"MPF\0"), at + 2):
            # Pillow would parse both, and warn where they are damaged. The first image of an MPF
            # file is the picture; the rest are previews and other views of it.
            if marker == 0xE1 and not orientation:
                orientation = read_exif_orientation(data[at + 2 : at + length])
            kept.append(data[kept_from : at - 2])
            kept_from = at + length
        at += length
    if size is None:
        raise RejectedImage("corrupt", "The JPEG file has image data but no frame header.")
    check_size("JPEG", size, max_pixels)
    # libjpeg makes up an end where there is none, and paints what is missing grey.
    if data.find(b"\xff\xd9", at) < 0:
        raise RejectedImage(
            "truncated", "The JPEG file has no end marker: part of it is missing. Resend it."
        )
    if data.count(b"\xff\xda", at) > MAX_SCANS:
        raise RejectedImage(
            "too_large", f"The JPEG file has more than {MAX_SCANS} scans. Save as PNG."
        )
    payload = b"".join([*kept, memoryview(data)[kept_from:]]) if kept else data
    return Header(format="JPEG", size=size, payload=payload, orientation=orientation or 1)


def _read_frame(data: bytes, at: int) -> tuple[int, int]:
    bits, height, width = struct.unpack_from(">BHH", data, at + 2)
    if bits != 8:
        raise RejectedImage(
            "unsupported", f"JPEG with {bits}-bit samples is not supported. Save as PNG."
        )
    return width, height
