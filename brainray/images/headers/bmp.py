"""BMP headers."""

import struct

from brainray.errors import RejectedImage
from brainray.images.headers.header import Header, check_size


def read_bmp(data: bytes, max_pixels: int) -> Header:
    """Read a BMP's headers (Microsoft, BITMAPV5HEADER and BITMAPCOREHEADER)."""
    start, header_bytes = struct.unpack_from("<LL", data, 10)
    if header_bytes == 12:
        width, height, _, bits = struct.unpack_from("<4H", data, 18)
        method = 0
    elif header_bytes in (40, 52, 56, 64, 108, 124):
        width, height, _, bits, method = struct.unpack_from("<llHHL", data, 18)
        height = abs(height)  # negative: stored top row first
    else:
        raise RejectedImage("corrupt", f"The BMP file's header claims {header_bytes} bytes.")
    if method in (1, 2):
        raise RejectedImage(
            "unsupported", "Run-length encoded BMP is not supported. Save it as PNG."
        )
    if method not in (0, 3) or bits not in (1, 4, 8, 16, 24, 32):
        raise RejectedImage(
            "unsupported", f"BMP with {bits} bits, method {method}, is not supported."
        )
    check_size("BMP", (width, height), max_pixels)
    if start < 14 + header_bytes:
        raise RejectedImage(
            "corrupt", f"The BMP file's pixels begin at byte {start}, inside its header."
        )
    row_bytes = (width * bits + 31) // 32 * 4
    if start + row_bytes * height > len(data):
        raise RejectedImage(
            "truncated", f"The BMP file lacks part of its {width} x {height} pixels. Resend."
        )
    return Header(format="BMP", size=(width, height), payload=data)
