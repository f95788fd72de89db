"""Decode pictures (JPEG, PNG, BMP, GIF, TIFF, WebP) to grey samples.

Files may be hostile. So :mod:`brainray.images.headers` reads a file's header first, in
bounded time and without unpacking pixels, and checks its size and length. Only then does Pillow get
the file, without its metadata: a decompression bomb costs microseconds, and Pillow finds nothing to
warn about. (``warnings.catch_warnings`` changes the filters of the whole process, and so of other
threads.)
"""

import io
import struct
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from brainray.errors import RejectedImage
from brainray.images.headers import (
    ACCEPTED,
    READERS,
    Header,
    corrupt,
    recognise_picture,
    too_large,
    truncated,
    unsupported,
)
from brainray.images.intensity import Samples, scale_to_8_bits
from brainray.images.tiff import read_tiff

REJECTION_REASONS: dict[str, str] = {
    "missing": "There is no file at this URI.",
    "unreadable": "The file exists but could not be read.",
    "empty": "The file has no bytes.",
    "truncated": "The file ends before its image does.",
    "corrupt": "The file contradicts its own format.",
    "not_an_image": "The bytes are not an image in any known format.",
    "too_large": "The image is larger than the limits allow.",
    "unsupported": "The format, or this variant of it, is not supported.",
    "multi_frame": "The file has several images.",
    "not_an_image_object": "The DICOM object is a report or something else that is not an image.",
    "no_pixels": "The DICOM object has no pixel data.",
    "not_mr": "The DICOM image is not a magnetic resonance image.",
    "other_body_part": "The DICOM header names a body part other than the head.",
    "localizer": "The DICOM image is a localizer.",
    "projection": "The DICOM image is a projection or a reformatted image.",
    "derived_map": "The DICOM image is a computed map or a phase image.",
    "mosaic": "The DICOM frame is a mosaic of many slices.",
    "secondary_capture": "The DICOM object is a screen capture.",
    "colour": "The DICOM or NIfTI image has colours.",
    "burned_in": "The DICOM header says that the image has text burned in.",
    "little_tissue": "The slice of the volume has little or no tissue.",
}
"""Stable codes of :class:`brainray.errors.RejectedImage`, each with a sentence."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeLimits:
    """The largest files and images that are decoded."""

    max_bytes: int = 64 * 2**20
    """Largest encoded file, in bytes."""

    max_pixels: int = 50_000_000
    """Largest image, width times height, in pixels. Decoding takes 2 to 20 bytes for each. Pillow's
    own limit (``PIL.Image.MAX_IMAGE_PIXELS``, 89 million) holds too."""


_DEFAULT_LIMITS = DecodeLimits()


def decode_image(image_bytes: bytes, limits: DecodeLimits = _DEFAULT_LIMITS) -> NDArray[np.uint8]:
    """As :func:`decode_samples`, with 16-bit samples scaled by the full range of their type."""
    pixels = scale_to_8_bits(decode_samples(image_bytes, limits))
    pixels.flags.writeable = False
    return pixels


def decode_samples(image_bytes: bytes, limits: DecodeLimits = _DEFAULT_LIMITS) -> Samples:
    """Decode one JPEG, PNG, BMP, GIF, TIFF or WebP file to luminance at the depth of its samples.

    Colour becomes luminance by ITU-R 601-2, as in Pillow's ``convert("L")``. Transparent pixels
    become black. EXIF orientation is applied. Threads may call this at the same time: it changes no
    global state and raises no warnings.

    Returns
    -------
    ndarray of uint16 for files with 16-bit samples, else uint8, shape (height, width)
        From 0 (black) to the highest value of the type (white); C-contiguous and read-only.

    Raises
    ------
    RejectedImage
        ``reason`` is a key of :data:`REJECTION_REASONS`.
    """
    check_length(image_bytes, limits)
    header = read_header(image_bytes, limits)
    try:
        return _decode(header)
    except RejectedImage:
        raise
    except (MemoryError, Image.DecompressionBombError) as error:
        raise too_large(
            f"There is not enough memory to decode this {header.format} image."
        ) from error
    except Exception as error:  # Pillow raises a dozen types for damaged files
        raise _translate(header.format, error) from error


def check_length(content: bytes, limits: DecodeLimits) -> None:
    """Reject a file that is empty or too large."""
    if not content:
        raise RejectedImage("empty", f"{ACCEPTED}, got no bytes. Send the file again.")
    if len(content) > limits.max_bytes:
        raise too_large(
            f"The file has {len(content):,} bytes, more than the {limits.max_bytes:,} allowed."
        )


def read_header(image_bytes: bytes, limits: DecodeLimits = _DEFAULT_LIMITS) -> Header:
    """Recognise a picture and read its header, without decoding it; raise RejectedImage."""
    name = recognise_picture(image_bytes)
    read = read_tiff if name == "TIFF" else READERS[name]
    try:
        return read(image_bytes, limits.max_pixels)
    except (IndexError, OverflowError, struct.error) as error:  # an offset beyond the file
        raise truncated(f"The {name} file ends inside its header.") from error


def _translate(name: str, error: Exception) -> RejectedImage:
    """Make a rejection of an exception of Pillow's."""
    if "truncated" in str(error).lower():
        return truncated(f"The {name} file ends inside its image.")
    if isinstance(error, UnidentifiedImageError):  # its message is a memory address
        if name == "TIFF":  # its directory is whole: Pillow does not support the layout
            return unsupported("This layout of TIFF samples is not supported. Save it as PNG.")
        return corrupt(f"The {name} header is damaged.")
    return corrupt(f"The {name} data cannot be decoded ({error}).")


# ---- pixels --------------------------------------------------------------------------------------

# Makes the picture upright, by its EXIF orientation; as ImageOps.exif_transpose.
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _open(header: Header) -> ImageFile.ImageFile:
    image = Image.open(io.BytesIO(header.payload), formats=[header.format])
    if image.size != header.size:
        raise corrupt(f"The {header.format} file gives two different sizes.")
    return image


def _decode(header: Header) -> Samples:
    if header.bits == 16:
        grey = Image.fromarray(_decode_16(header))
    else:
        image = _open(header)
        image.load()
        if header.transparent is not None:  # in the range of the samples
            image.info["transparency"] = (
                header.transparent if image.mode == "RGB" else header.transparent[0]
            )
        grey = _to_grey(image)
    if header.orientation != 1:
        grey = grey.transpose(_TRANSPOSES[header.orientation])
    return np.asarray(grey)


def _to_grey(image: Image.Image) -> Image.Image:
    """Convert a loaded image of 8-bit samples to mode L, over black where it is transparent."""
    # Convert palettes through RGB: Pillow rounds P to L differently.
    if image.mode != "La" and (image.mode == "P" or image.has_transparency_data):
        image = image.convert("RGBA").convert("LA").convert("La")
    # La is grey times alpha, rounded: the image over black.
    return image.getchannel(0) if image.mode == "La" else image.convert("L")


def _decode_16(header: Header) -> NDArray[np.uint16]:
    """Decode 16-bit samples to luminance, over black where they are transparent."""
    image = _open(header)
    if image.mode.startswith("I;16"):
        image.load()
        samples = np.asarray(image)
    else:  # Pillow reduces 16-bit colour to 8 bits
        colours = cv2.imdecode(np.frombuffer(header.payload, np.uint8), cv2.IMREAD_UNCHANGED)
        if colours is None or colours.dtype != np.uint16 or colours.shape[1::-1] != header.size:
            raise corrupt(f"The {header.format} data cannot be decoded.")
        samples = colours[..., [2, 1, 0, 3][: colours.shape[2]]]  # blue, green, red, alpha
    grey = _to_grey_16(samples)
    if header.white_is_zero:
        grey = np.invert(grey)
    if header.transparent is not None:
        bands = np.atleast_3d(samples)[..., : len(header.transparent)]
        grey *= (bands != np.array(header.transparent)).any(axis=-1)
    return grey


def _to_grey_16(samples: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """Convert 16-bit samples to luminance, by Pillow's weights (libImaging/Convert.c, ``L24``)."""
    if samples.ndim == 2:
        return samples.astype(np.uint16)  # in the machine's byte order
    num_bands = samples.shape[-1]
    grey = samples[..., 0].astype(np.uint32)
    if num_bands > 2:
        grey *= 19595
        grey += samples[..., 1] * np.uint32(38470)
        grey += samples[..., 2] * np.uint32(7471)
        grey += 0x8000
        grey >>= 16
    if num_bands in (2, 4):  # the last is alpha; its product with grey fits in 32 bits
        grey *= samples[..., -1]
        grey += 32767
        grey //= 65535
    return grey.astype(np.uint16)
