"""GIF headers: blocks up to the trailer."""

import struct

from brainray.errors import RejectedImage
from brainray.images.headers.header import MAX_PARTS, Header, check_size

_MAX_BLOCKS = 2**20  # of up to 255 bytes each


def _skip_blocks(data: bytes, at: int) -> int:
    """Return where the chain of sub-blocks that starts at `at` ends."""
    for _ in range(_MAX_BLOCKS):
        if not data[at]:
            return at + 1
        at += 1 + data[at]
    raise RejectedImage("corrupt", f"The GIF file has a run of more than {_MAX_BLOCKS} blocks.")


def read_gif(data: bytes, max_pixels: int) -> Header:
    """Walk a GIF's blocks to its trailer (CompuServe, GIF89a Specification, 1990)."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    frames = 0
    for _ in range(MAX_PARTS):
        kind = data[at]
        if kind == 0x3B:
            break
        if kind == 0x21:
            at = _skip_blocks(data, at + 2)
        elif kind == 0x2C:
            frames += 1
            if frames > 1:
                raise RejectedImage(
                    "multi_frame", "The GIF file is an animation. Send one frame as PNG."
                )
            left, top, across, down, flags = struct.unpack_from("<4HB", data, at + 1)
            if not across or not down:
                raise RejectedImage(
                    "corrupt", f"The GIF file's image has {across} x {down} pixels."
                )
            # A frame beyond the screen enlarges it, in browsers as in Pillow.
            width, height = max(width, left + across), max(height, top + down)
            at += 10 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
            at = _skip_blocks(data, at + 1)
        else:
            raise RejectedImage("corrupt", f"The GIF file has a block of unknown kind {kind:02X}.")
    else:
        raise RejectedImage("corrupt", f"The GIF file has more than {MAX_PARTS} blocks.")
    if not frames:
        raise RejectedImage("corrupt", "The GIF file holds no image.")
    check_size("GIF", (width, height), max_pixels)
    return Header(format="GIF", size=(width, height), payload=data)
