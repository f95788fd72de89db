"""Where the compressed frames of a DICOM object lie in its file (PS3.5, annex A.4).

They are found once, when the object is opened: pydicom looks through all fragments again for every
frame, which takes a minute for an object of ten thousand frames.
"""

import struct
from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

from brainray.errors import RejectedImage

Span = tuple[int, int]
"""Where a fragment begins and ends, in bytes from the start of the file."""

MAX_FRAGMENTS = 400_000
"""Most fragments of one object: four times as many as frames."""

_ITEM = b"\xfe\xff\x00\xe0"
_SEQUENCE_END = b"\xfe\xff\xdd\xe0"
_END_OF_IMAGE = b"\xff\xd9"  # of JPEG, JPEG-LS and JPEG 2000; padding may follow


def find_frames(content: bytes, offset: int, num_frames: int) -> tuple[tuple[Span, ...], ...]:
    """Return the fragments of every frame.

    Parameters
    ----------
    content : bytes
        The file.
    offset : int
        Where the value of Pixel Data begins, in bytes.
    num_frames : int
        As the header says.

    Raises
    ------
    RejectedImage
        ``truncated``, ``corrupt`` or ``too_large``.
    """
    table, *fragments = _list_fragments(content, offset)
    if len(fragments) < num_frames:
        raise RejectedImage(
            "truncated", "The file ends before the last compressed frame does. Resend it."
        )
    if len(fragments) == num_frames:  # whatever the offset table says
        return tuple((fragment,) for fragment in fragments)
    if num_frames == 1:
        return (tuple(fragments),)
    starts = _find_starts(content, table, fragments)
    if len(starts) != num_frames or starts[0] != 0:
        raise RejectedImage(
            "corrupt",
            f"The header says {num_frames:,} frames, and it cannot be told which of the "
            f"{len(fragments):,} fragments belong to each. Export the image again.",
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
        raise RejectedImage("truncated", "The file ends inside a compressed frame. Resend it.")
    after = content[end : end + 4]
    if not spans or (len(after) == 4 and after != _SEQUENCE_END):
        raise RejectedImage(
            "corrupt",
            "Pixel Data (7FE0,0010) has something else between its fragments. "
            "Export the image again.",
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
