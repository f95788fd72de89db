"""What every format's header comes to, and the checks that all formats share."""

import struct
from dataclasses import dataclass

from PIL import Image

from brainray.errors import RejectedImage

# Chunks (PNG, WebP), blocks (GIF) and strips (TIFF) are walked in Python, about 1 µs each; no
# encoder writes this many in a file of the default size.
MAX_PARTS = 2**16


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What a file says of itself before anything is unpacked."""

    format: str
    size: tuple[int, int]
    """Width and height as stored, in pixels."""
    payload: bytes
    """The same image without metadata; the file itself where there was none to drop."""
    orientation: int = 1
    """EXIF orientation, 1 to 8."""
    bits: int = 8
    """Bits in a sample."""
    transparent: tuple[int, ...] | None = None
    """The one grey or RGB colour that a PNG declares transparent, in samples as unpacked: of 16
    bits, or stretched to 8."""
    white_is_zero: bool = False
    """16-bit TIFF only: Pillow inverts the shallower depths itself."""


def check_size(name: str, size: tuple[int, int], max_pixels: int) -> None:
    """Refuse an image of no pixels, or of too many."""
    width, height = size
    if width < 1 or height < 1:
        raise RejectedImage("corrupt", f"The {name} file claims {width} x {height} pixels.")
    ceiling, remedy = max_pixels, "Resize it, or raise max_pixels"
    pillow = Image.MAX_IMAGE_PIXELS
    if pillow is not None and pillow < ceiling:  # beyond it Pillow warns, and then refuses
        ceiling, remedy = int(pillow), "Resize it, or raise PIL.Image.MAX_IMAGE_PIXELS"
    if width * height > ceiling:
        raise RejectedImage(
            "too_large",
            f"The image has {width} x {height} pixels, more than the {ceiling:,} allowed. "
            f"{remedy}.",
        )


def read_exif_orientation(exif: bytes) -> int:
    """Find tag 274 in an EXIF block (a TIFF header and directory); 1, upright, if it is not there.

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
    except struct.error:  # a damaged EXIF block is no reason to refuse the picture
        pass
    return 1
