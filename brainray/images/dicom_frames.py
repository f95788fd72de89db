"""Compressed frames of a DICOM object: their positions in the file, and their own headers.

Their positions (PS3.5, annex A.4) are found once, when the object is opened. pydicom would search
all fragments again for every frame, which takes a minute for an object of ten thousand frames.

Their headers are read before a decoder gets them: the DICOM header may say 16 x 16 where the
compressed frame says 60,000 x 60,000, and decoders allocate what the frame says.
"""

import struct
from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from brainray.errors import RejectedImage
from brainray.images.headers import (
    JPEG_FRAME_MARKERS,
    JPEG_MARKERS_ALONE,
    MAX_PARTS,
    MAX_SCANS,
)

Span = tuple[int, int]
"""Start and end of a fragment, in bytes from the start of the file."""

MAX_FRAGMENTS = 400_000
"""Most fragments of one object: four times as many as frames."""

_ITEM = b"\xfe\xff\x00\xe0"
_SEQUENCE_END = b"\xfe\xff\xdd\xe0"
_END_OF_IMAGE = b"\xff\xd9"  # of JPEG, JPEG-LS and JPEG 2000; padding may follow


def find_frames(content: bytes, offset: int, num_frames: int) -> tuple[tuple[Span, ...], ...]:
    """Return the fragments of every frame; Pixel Data's value begins at byte `offset`.

    Raises
    ------
    RejectedImage
        ``truncated``, ``corrupt`` or ``too_large``.
    """
    table, *fragments = _list_fragments(content, offset)
    if len(fragments) < num_frames:
        raise RejectedImage(
            "truncated", "The file ends before the last compressed frame does. Send it again."
        )
    if len(fragments) == num_frames:  # no offset table is needed
        return tuple((fragment,) for fragment in fragments)
    if num_frames == 1:
        return (tuple(fragments),)
    starts = _find_starts(content, table, fragments)
    if len(starts) != num_frames or starts[0] != 0:
        raise RejectedImage(
            "corrupt",
            f"The header says {num_frames:,} frames, but neither the offset table nor end markers "
            f"divide the {len(fragments):,} fragments into as many. Export the image again.",
        )
    ends = [*starts[1:], len(fragments)]
    return tuple(tuple(fragments[start:end]) for start, end in zip(starts, ends, strict=True))


def _list_fragments(content: bytes, offset: int) -> list[Span]:
    """Return all items; the first is the offset table, which may be empty."""
    spans: list[Span] = []
    end = offset
    while content[end : end + 4] == _ITEM and len(spans) <= MAX_FRAGMENTS:
        (length,) = struct.unpack_from("<L", content, end + 4)
        start, end = end + 8, end + 8 + length
        spans.append((start, end))
    if len(spans) > MAX_FRAGMENTS:
        raise RejectedImage(
            "too_large", f"The pixel data have more than the {MAX_FRAGMENTS:,} fragments allowed."
        )
    if end > len(content):
        raise RejectedImage("truncated", "The file ends inside a compressed frame. Send it again.")
    after = content[end : end + 4]
    if not spans or (len(after) == 4 and after != _SEQUENCE_END):
        raise RejectedImage(
            "corrupt",
            "Pixel Data (7FE0,0010) has other bytes between its fragments. Export the image again.",
        )
    return spans


def _find_starts(content: bytes, table: Span, fragments: Sequence[Span]) -> list[int]:
    """Return the index of each frame's first fragment, by the offset table or by end markers."""
    num_offsets = (table[1] - table[0]) // 4
    if num_offsets:
        offsets = struct.unpack_from(f"<{num_offsets}L", content, table[0])
        begins = [start - fragments[0][0] for start, _ in fragments]
        starts = [bisect_left(begins, offset) for offset in offsets]
        is_valid = all(one < other for one, other in pairwise(starts))
        return starts if is_valid and starts[-1] < len(fragments) else []
    is_last = [_END_OF_IMAGE in content[max(start, end - 10) : end] for start, end in fragments]
    return [0, *(index + 1 for index, last in enumerate(is_last[:-1]) if last)]


# ---- headers of frames ---------------------------------------------------------------------------

_JPEG_LS_FRAME = 0xF7
_JPEG_2000_START = b"\xff\x4f\xff\x51"  # start of codestream, then the marker of its size


class Codestream(NamedTuple):
    """The header of a compressed frame."""

    rows: int
    columns: int
    bits: int
    """Bits per sample."""
    components: int
    data: bytes
    """The codestream alone, without a file format around it."""


def read_jpeg_codestream(frame: bytes) -> Codestream:
    """Read the frame header of JPEG (ITU-T T.81, B.2.2) or JPEG-LS (T.87, C.2.2)."""
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
        elif marker in JPEG_MARKERS_ALONE:
            at += 2
        elif (marker in JPEG_FRAME_MARKERS or marker == _JPEG_LS_FRAME) and at + 10 <= len(frame):
            bits, rows, columns, components = struct.unpack_from(">BHHB", frame, at + 4)
            return Codestream(rows, columns, bits, components, frame)
        else:
            at += 2 + int.from_bytes(frame[at + 2 : at + 4], "big")
    raise RejectedImage("corrupt", "A compressed frame has no JPEG frame header. Export it again.")


def read_jpeg_2000_codestream(frame: bytes) -> Codestream:
    """Read the size marker of JPEG 2000 or HTJ2K (ITU-T T.800, annex A.5.1)."""
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
    bits = (depth & 0x7F) + 1  # the highest bit means signed samples
    return Codestream(bottom - top, right - left, bits, components, frame[start:])
