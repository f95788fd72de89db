"""From a scan's bytes to pixels of the network's size: the same for every door.

The choice made here is sealed with the classifier (:class:`Preprocessing`), as timm keeps
the preprocessing with the weights.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from brainray.errors import ConfigError
from brainray.images.decode import DecodeLimits, decode_image

IMAGENET_GREY_MEAN = 0.449
"""Mean of ImageNet's three channel means (0.485, 0.456, 0.406), in [0, 1]; torchvision's."""
IMAGENET_GREY_STD = 0.226
"""Mean of ImageNet's three channel deviations (0.229, 0.224, 0.225), in [0, 1]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocessing:
    """How pixels become network input; sealed with the classifier."""

    size_px: int = 224
    """Side of the square network input, in pixels (32 to 1024)."""
    fit: Literal["stretch", "pad"] = "stretch"
    """`stretch` to the square, or keep the aspect ratio and `pad` with black, centred."""
    mean: float = IMAGENET_GREY_MEAN
    """Subtracted from grey values scaled to [0, 1]."""
    std: float = IMAGENET_GREY_STD
    """Divides what the subtraction leaves."""

    def __post_init__(self) -> None:
        if not 32 <= self.size_px <= 1024:
            raise ConfigError(f"size_px must be in [32, 1024], got {self.size_px}.")
        if not self.std > 0:
            raise ConfigError(f"std must be positive, got {self.std}.")


def normalise_greys(preprocessing: Preprocessing) -> NDArray[np.float32]:
    """Return the network's input for each grey value, shape (256,)."""
    scale = np.float32(1.0 / (255.0 * preprocessing.std))
    offset = np.float32(preprocessing.mean / preprocessing.std)
    return np.arange(256, dtype=np.float32) * scale - offset


@dataclass(frozen=True, slots=True)
class Frame:
    """Where a scan lies in the network's square, in its pixels."""

    left: int
    top: int
    width: int
    height: int


def find_frame(height: int, width: int, preprocessing: Preprocessing) -> Frame:
    """Return where a scan of a height and a width comes to lie in the network's square."""
    side = preprocessing.size_px
    if preprocessing.fit == "stretch":
        return Frame(0, 0, side, side)
    scale = side / max(height, width)
    inner_width, inner_height = max(1, round(width * scale)), max(1, round(height * scale))
    return Frame((side - inner_width) // 2, (side - inner_height) // 2, inner_width, inner_height)


def resize_image(pixels: NDArray[np.uint8], preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Resize grey pixels to the network's square, with antialiasing.

    Bilinear with a support that widens with the reduction, as Pillow defines it; torch's
    ``interpolate(antialias=True)`` on uint8 rounds its weights more coarsely and gives the
    same values within one grey level.

    Parameters
    ----------
    pixels : ndarray of uint8, shape (height, width)
        Luminance.
    preprocessing : Preprocessing
        Gives the side and whether the aspect ratio is kept.

    Returns
    -------
    ndarray of uint8, shape (size_px, size_px)
    """
    side = preprocessing.size_px
    height, width = pixels.shape
    if (height, width) == (side, side):
        return pixels
    frame = find_frame(height, width, preprocessing)
    resized = Image.fromarray(pixels).resize((frame.width, frame.height), Image.Resampling.BILINEAR)
    if resized.size == (side, side):
        return np.asarray(resized)
    canvas = Image.new("L", (side, side), 0)
    canvas.paste(resized, (frame.left, frame.top))
    return np.asarray(canvas)


@dataclass(frozen=True, slots=True)
class OpenedScan:
    """A scan that could be decoded."""

    pixels: NDArray[np.uint8]
    """The scan itself, shape (height, width)."""
    image: NDArray[np.uint8]
    """Network input, shape (size_px, size_px)."""


def open_scan(image_bytes: bytes, preprocessing: Preprocessing, limits: DecodeLimits) -> OpenedScan:
    """Decode and resize one scan, and keep its own pixels too.

    Raises
    ------
    RejectedImage
        The bytes cannot be turned into pixels.
    """
    pixels = decode_image(image_bytes, limits)
    return OpenedScan(pixels, resize_image(pixels, preprocessing))


def load_image(
    image_bytes: bytes, preprocessing: Preprocessing, limits: DecodeLimits
) -> NDArray[np.uint8]:
    """Decode and resize one scan.

    Returns
    -------
    ndarray of uint8, shape (size_px, size_px)

    Raises
    ------
    RejectedImage
        The bytes cannot be turned into pixels.
    """
    return open_scan(image_bytes, preprocessing, limits).image
