"""What an image is besides its picture: size, mode, format, brightness, border."""

import io
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from brainray.images.decode import DecodeLimits
from brainray.images.headers import read_header, recognise
from brainray.images.slices import ScanFile

BORDER_SHARE = 0.05
"""Width of the frame that counts as border, as a share of the shorter side."""

DARK_GREY = 8
"""Grey level, of 255, up to which a pixel counts as black; a JPEG's black is rarely 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageProperties:
    """What could give an image's source away, whatever it shows."""

    pixel_sha256: str
    """Of the decoded grey pixels and their shape: the same for the same picture in any file."""
    width_px: int
    height_px: int
    """As shown, EXIF orientation applied."""
    mode: str
    """Pillow's mode of the file (L, RGB, P, …), with the depth where it is not 8 bits; "grey" for
    DICOM and NIfTI."""
    format: str
    """JPEG, PNG, …, DICOM, NIfTI."""
    size_bytes: int
    """Length of the encoded file; of one with several slices, this slice's share of it."""
    mean_grey: float
    """Mean of all pixels, 0 to 255."""
    border_grey: float
    """Mean of the border, 0 to 255."""
    border_dark_share: float
    """Share of the border's pixels that are black, in [0, 1]."""


def measure_properties(
    image_bytes: bytes, file: ScanFile, pixels: NDArray[np.uint8], limits: DecodeLimits
) -> ImageProperties:
    """Measure a scan that was decoded.

    Parameters
    ----------
    image_bytes : bytes
        The encoded file.
    file : ScanFile
        The same, opened.
    pixels : ndarray of uint8, shape (height, width)
        Of one of its slices.
    limits : DecodeLimits
        Those it was decoded with.
    """
    mode, name = _find_mode(image_bytes, file, limits)
    height, width = pixels.shape
    border = _cut_border(pixels)
    return ImageProperties(
        pixel_sha256=hash_pixels(pixels),
        width_px=width,
        height_px=height,
        mode=mode,
        format=name,
        size_bytes=len(image_bytes) // len(file.slices),
        mean_grey=float(pixels.mean()),
        border_grey=float(border.mean()),
        border_dark_share=float((border <= DARK_GREY).mean()),
    )


def _find_mode(image_bytes: bytes, file: ScanFile, limits: DecodeLimits) -> tuple[str, str]:
    """Return the colour mode and the name of the format."""
    if file.format != "picture":
        return "grey", {"dicom": "DICOM", "nifti": "NIfTI"}[file.format]
    header = read_header(recognise(image_bytes), image_bytes, limits.max_pixels)
    with Image.open(io.BytesIO(header.payload), formats=[header.format]) as image:
        mode = image.mode if header.bits == 8 else f"{image.mode}, {header.bits} bit"
    return mode, header.format


def hash_pixels(pixels: NDArray[np.uint8]) -> str:
    """Compute the SHA-256 of grey pixels and their shape."""
    digest = sha256(f"{pixels.shape[0]} {pixels.shape[1]} ".encode())
    digest.update(pixels.tobytes())
    return digest.hexdigest()


def _cut_border(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the pixels of the frame, in one dimension."""
    width = max(1, round(BORDER_SHARE * min(pixels.shape)))
    is_border = np.ones(pixels.shape, np.bool_)
    is_border[width:-width, width:-width] = False
    return pixels[is_border]
