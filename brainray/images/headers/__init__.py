"""All that can be known of an encoded image without unpacking it: one module for each format."""

import struct
from collections.abc import Callable

from brainray.errors import RejectedImage
from brainray.images.headers.bmp import read_bmp
from brainray.images.headers.gif import read_gif
from brainray.images.headers.header import Header
from brainray.images.headers.jpeg import read_jpeg
from brainray.images.headers.png import read_png
from brainray.images.headers.signatures import ACCEPTED, recognise
from brainray.images.headers.tiff import read_tiff
from brainray.images.headers.webp import read_webp

__all__ = ["ACCEPTED", "Header", "read_header", "recognise"]

_READERS: dict[str, Callable[[bytes, int], Header]] = {
    "BMP": read_bmp,
    "GIF": read_gif,
    "JPEG": read_jpeg,
    "PNG": read_png,
    "TIFF": read_tiff,
    "WEBP": read_webp,
}


def read_header(name: str, data: bytes, max_pixels: int) -> Header:
    """Read the header of a file of a recognised format, in bounded time.

    Parameters
    ----------
    name : str
        What :func:`recognise` called it.
    data : bytes
        The whole file.
    max_pixels : int
        Largest image accepted, width times height.

    Raises
    ------
    RejectedImage
        The file is cut short, damaged, too large, of several images, or of an unread variant.
    """
    try:
        return _READERS[name](data, max_pixels)
    except (IndexError, struct.error) as error:
        raise RejectedImage(
            "truncated", f"The {name} file ends inside its header. Resend it."
        ) from error
