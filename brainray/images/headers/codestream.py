"""Size and depth of one compressed frame, read from the frame itself before anything unpacks it.

A DICOM header may say 16 x 16 where the compressed frame says 60,000 x 60,000, and the libraries
that decode it allocate what the frame says.
"""

import struct
from typing import NamedTuple

from brainray.errors import RejectedImage
from brainray.images.headers.header import MAX_PARTS
from brainray.images.headers.jpeg import MAX_SCANS

_JPEG_FRAME_MARKERS = frozenset({*range(0xC0, 0xD0), 0xF7}) - {0xC4, 0xC8, 0xCC}
_JPEG_ALONE = frozenset({0x01, *range(0xD0, 0xD9)})  # markers without a length
_JPEG_2000_START = b"\xff\x4f\xff\x51"  # start of codestream, then the marker of its size


class Codestream(NamedTuple):
    """What a compressed frame says about itself."""

    rows: int
    columns: int
    bits: int
    """Bits per sample."""
    components: int
    data: bytes
    """The frame without a file format around it: what may be decoded."""


def read_jpeg_codestream(frame: bytes) -> Codestream:
    """Read the frame header of JPEG (ITU-T T.81, annex B.2.2) or JPEG-LS (T.87, annex C.2.2).

    Raises
    ------
    RejectedImage
        It has no frame header, or more scans than :data:`brainray.images.headers.jpeg.MAX_SCANS`.
    """
    if frame.count(b"\xff\xda") > MAX_SCANS:
        raise RejectedImage(
            "too_large", f"A compressed frame has more than the {MAX_SCANS} JPEG scans allowed."
        )
    at = 2
    for _ in range(MAX_PARTS):
        if at + 4 > len(frame) or frame[:2] != b"\xff\xd8" or frame[at] != 0xFF:
            break
        marker = frame[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif marker in _JPEG_ALONE:
            at += 2
        elif marker in _JPEG_FRAME_MARKERS and at + 10 <= len(frame):
            bits, rows, columns, components = struct.unpack_from(">BHHB", frame, at + 4)
            return Codestream(rows, columns, bits, components, frame)
        else:
            at += 2 + int.from_bytes(frame[at + 2 : at + 4], "big")
    raise RejectedImage("corrupt", "A compressed frame has no JPEG frame header. Export it again.")


def read_jpeg_2000_codestream(frame: bytes) -> Codestream:
    """Read the size marker of JPEG 2000 or HTJ2K (ITU-T T.800, annex A.5.1).

    Raises
    ------
    RejectedImage
        It has no codestream, or its components are subsampled.
    """
    start = frame.find(_JPEG_2000_START)
    if start < 0 or len(frame) < start + 45:
        raise RejectedImage(
            "corrupt", "A compressed frame has no JPEG 2000 size marker. Export it again."
        )
    right, bottom, left, top = struct.unpack_from(">4L", frame, start + 8)
    (components,) = struct.unpack_from(">H", frame, start + 40)
    depth, step_x, step_y = frame[start + 42 : start + 45]
    if (step_x, step_y) != (1, 1):
        raise RejectedImage("unsupported", "JPEG 2000 with subsampled components is not supported.")
    bits = (depth & 0x7F) + 1  # the highest bit tells signed samples
    return Codestream(bottom - top, right - left, bits, components, frame[start:])
