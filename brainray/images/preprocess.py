"""From a scan's bytes or samples to the network's input: the same code for all that uses one.

The order of work: decode at full depth; find the head (``crop``); find the percentiles of its
samples, and with them stretch it to 8 bits (``intensity``); cut it out; resize it with antialiasing
and pad it (``fit``). What is chosen here is saved with the classifier (:class:`Preprocessing`), as
timm keeps preprocessing with the weights.
"""

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from brainray.errors import ConfigError
from brainray.images.decode import DecodeLimits, decode_samples
from brainray.images.head import Box, downsample, enlarge_box, find_head
from brainray.images.intensity import (
    Samples,
    find_head_range,
    find_own_range,
    scale_to_8_bits,
    stretch_range,
    to_unsigned,
)

HEAD_MARGIN = 0.04
"""Added on each side of the head's box, as a share of its width and height. Where the scan ends
sooner it is filled up with black, so that a border added by an export changes nothing."""
IMAGENET_GREY_MEAN = 0.449
"""Mean of ImageNet's three channel means (0.485, 0.456, 0.406), in [0, 1]; torchvision's."""
IMAGENET_GREY_STD = 0.226
"""Mean of ImageNet's three channel deviations (0.229, 0.224, 0.225), in [0, 1]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocessing:
    """How samples become network input; saved with the classifier."""

    size_px: int = 224
    """Side of the square network input, in pixels (32 to 1024)."""
    crop: Literal["none", "head"] = "none"
    """The whole scan (`none`), or the box of the `head` with a margin of 4 %; the whole scan where
    no head is found."""
    intensity: Literal["stored", "percentile"] = "stored"
    """Grey levels as `stored`, or stretched from the 1st to the 99th `percentile` of what is
    neither cut away nor air."""
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
        for field in fields(self):
            choices, chosen = get_args(field.type), getattr(self, field.name)
            if choices and chosen not in choices:
                raise ConfigError(f"{field.name} must be {' or '.join(choices)}, got {chosen!r}.")


def normalise_greys(preprocessing: Preprocessing) -> NDArray[np.float32]:
    """Return the network's input for each grey value, shape (256,)."""
    scale = np.float32(1.0 / (255.0 * preprocessing.std))
    offset = np.float32(preprocessing.mean / preprocessing.std)
    return np.arange(256, dtype=np.float32) * scale - offset


@dataclass(frozen=True, slots=True)
class Frame:
    """Which part of a scan the network sees, and where that lies in its square."""

    shape: tuple[int, int]
    """Height and width of the scan, in pixels."""
    source: Box
    """What the network sees, in the scan's pixels."""
    target: Box
    """Where that lies in the network's square, in the square's pixels."""


@dataclass(frozen=True, slots=True)
class OpenedScan:
    """A scan and what the network sees of it."""

    samples: Samples
    """The scan itself at its file's depth, shape (height, width)."""
    image: NDArray[np.uint8]
    """Network input, shape (size_px, size_px)."""
    frame: Frame
    """Relates the two."""


def open_scan(image_bytes: bytes, preprocessing: Preprocessing, limits: DecodeLimits) -> OpenedScan:
    """Decode one scan and make the network's input of it.

    Raises
    ------
    RejectedImage
        The bytes cannot be decoded.
    """
    return open_samples(decode_samples(image_bytes, limits), preprocessing)


def load_image(
    image_bytes: bytes, preprocessing: Preprocessing, limits: DecodeLimits
) -> NDArray[np.uint8]:
    """Decode one scan and return the network's input alone, shape (size_px, size_px).

    Raises
    ------
    RejectedImage
        The bytes cannot be decoded.
    """
    return open_scan(image_bytes, preprocessing, limits).image


def preprocess_image(samples: NDArray[Any], preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Return the network's input alone, shape (size_px, size_px); see :func:`open_samples`."""
    return open_samples(samples, preprocessing).image


def open_samples(samples: NDArray[Any], preprocessing: Preprocessing) -> OpenedScan:
    """Make the network's input of a decoded scan.

    Resizing is bilinear with a support that widens with the reduction, as Pillow defines it;
    torch's ``interpolate(antialias=True)`` on uint8 rounds its weights more coarsely and gives the
    same values within one grey level.

    Parameters
    ----------
    samples : ndarray of any real dtype, shape (height, width)
        Luminance. `stored` intensity means the full range of uint8 and uint16, and of any other
        type the range from the lowest to the highest sample.
    preprocessing : Preprocessing
        What is to be done.

    Raises
    ------
    ValueError
        Samples of other than two dimensions, without pixels, or not real.
    """
    samples = to_unsigned(samples, fill_range=preprocessing.intensity == "stored")
    view, pixels = _select(samples, preprocessing)
    source = view.clip(samples.shape)
    target = _place(view, source, preprocessing)
    image = Image.fromarray(pixels)
    if image.size != (target.width, target.height):
        image = image.resize((target.width, target.height), Image.Resampling.BILINEAR)
    side = preprocessing.size_px
    if image.size != (side, side):
        canvas = Image.new("L", (side, side), 0)
        canvas.paste(image, (target.left, target.top))
        image = canvas
    height, width = samples.shape
    return OpenedScan(samples, np.asarray(image), Frame((height, width), source, target))


def _select(samples: Samples, preprocessing: Preprocessing) -> tuple[Box, NDArray[np.uint8]]:
    """Return the box that fills the network's square, and in 8 bits what of it is in the scan."""
    height, width = samples.shape
    view = Box(0, 0, width, height)
    if preprocessing.crop == "none" and preprocessing.intensity == "stored":
        return view, scale_to_8_bits(samples)
    reduced, factors = downsample(samples)
    own = find_own_range(reduced)
    head = find_head(reduced, own) if preprocessing.crop == "head" else None
    if head is not None:
        view = enlarge_box(head, factors).widen(HEAD_MARGIN)
        reduced = head.cut(reduced)
    cut = view.clip(samples.shape).cut(samples)
    if preprocessing.intensity == "stored":
        return view, scale_to_8_bits(cut)
    return view, stretch_range(cut, find_head_range(reduced, own))


def _place(view: Box, source: Box, preprocessing: Preprocessing) -> Box:
    """Return where a part of the box that fills the network's square comes to lie in it."""
    side = preprocessing.size_px
    width = height = side
    if preprocessing.fit == "pad":
        scale = side / max(view.height, view.width)
        width, height = max(1, round(view.width * scale)), max(1, round(view.height * scale))
    across, down = width / view.width, height / view.height
    left, right = (round((source.left - view.left + end) * across) for end in (0, source.width))
    top, bottom = (round((source.top - view.top + end) * down) for end in (0, source.height))
    return Box(
        (side - width) // 2 + left,
        (side - height) // 2 + top,
        max(1, right - left),
        max(1, bottom - top),
    )
