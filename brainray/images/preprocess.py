"""Make the network's input of decoded samples: the same code for training, bulk and HTTP.

The steps: find the head (``crop``), find the percentiles of its samples and scale them to 8 bits
(``intensity``), cut the head out, resize it with antialiasing and pad it (``fit``). The chosen
steps (:class:`Preprocessing`) are saved with the classifier.
"""

from dataclasses import dataclass, fields
from itertools import compress
from typing import Any, Literal, get_args

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from brainray.errors import ConfigError
from brainray.images.intensity import (
    Range,
    Samples,
    find_head_range,
    find_own_range,
    scale_to_8_bits,
    stretch_range,
    to_unsigned,
)

HEAD_MARGIN = 0.04
"""Margin on each side of the head's box, as a share of its width and height. Beyond the scan's edge
it is black, so that a border added by an export changes nothing."""
SEARCH_PX = 256
"""The head is searched in a scan reduced to about this on its longer side (2/3 to 3/2 of it)."""
MIN_THRESHOLD = 12
"""Least grey level, of 255 over the scan's own range, that counts as head."""
KERNEL_PX = 5
"""Side of the blur and of the opening, which removes thinner structures."""
MIN_COMPONENT = 0.1
"""An outline belongs to the head from this share of the largest outline's area."""
MIN_HEAD = 0.01
"""Outlines with a smaller share of the scan in all are text or noise."""

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
    """`none` keeps the whole scan; `head` cuts out the head with a margin of 4 %, or keeps the
    whole scan where no head is found."""
    intensity: Literal["stored", "percentile"] = "stored"
    """`stored` keeps grey levels; `percentile` scales the 1st to the 99th percentile of the crop,
    air excluded, to the full range."""
    fit: Literal["stretch", "pad"] = "stretch"
    """`stretch` to the square, or keep the aspect ratio and `pad` with black, centred."""
    mean: float = IMAGENET_GREY_MEAN
    """Subtracted from grey values scaled to [0, 1]."""
    std: float = IMAGENET_GREY_STD
    """Divisor of grey values after the subtraction."""

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
    """Return the network's input for each grey level, shape (256,)."""
    scale = np.float32(1.0 / (255.0 * preprocessing.std))
    offset = np.float32(preprocessing.mean / preprocessing.std)
    return np.arange(256, dtype=np.float32) * scale - offset


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle of whole pixels."""

    left: int
    top: int
    width: int
    height: int

    def cut(self, samples: Samples) -> Samples:
        """Return a view of the samples in the box, which must lie within the image."""
        return samples[self.top : self.top + self.height, self.left : self.left + self.width]

    def widen(self, share: float) -> "Box":
        """Return the box with a share of its width and height added on each side."""
        across, down = round(share * self.width), round(share * self.height)
        return Box(
            self.left - across, self.top - down, self.width + 2 * across, self.height + 2 * down
        )

    def clip(self, shape: tuple[int, ...]) -> "Box":
        """Return the part of the box that lies within an image of (height, width)."""
        left, top = max(0, self.left), max(0, self.top)
        right, bottom = self.left + self.width, self.top + self.height
        return Box(left, top, min(shape[1], right) - left, min(shape[0], bottom) - top)


@dataclass(frozen=True, slots=True)
class Frame:
    """The part of a scan that is in the network's input, and its position there."""

    shape: tuple[int, int]
    """Height and width of the scan, in pixels."""
    source: Box
    """The part of the scan, in the scan's pixels."""
    target: Box
    """The same part in the network's input, in the input's pixels."""


@dataclass(frozen=True, slots=True)
class OpenedScan:
    """A scan and the network's input made of it."""

    samples: Samples
    """The scan at its file's depth, shape (height, width)."""
    image: NDArray[np.uint8]
    """Network input, shape (size_px, size_px)."""
    frame: Frame


def preprocess_image(samples: NDArray[Any], preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Return the network's input alone, shape (size_px, size_px); see :func:`open_samples`."""
    return open_samples(samples, preprocessing).image


def open_samples(samples: NDArray[Any], preprocessing: Preprocessing) -> OpenedScan:
    """Make the network's input of a decoded scan.

    Resizing is Pillow's: bilinear, with a support that widens with the reduction. torch's
    ``interpolate(antialias=True)`` on uint8 gives the same values within one grey level.

    `samples` are luminance of any real type, shape (height, width). With `stored` intensity, black
    to white is the full range of uint8 and uint16, and for any other type the range from the lowest
    to the highest sample. ValueError is raised as by
    :func:`brainray.images.intensity.to_unsigned`.
    """
    samples = to_unsigned(samples, fill_range=preprocessing.intensity == "stored")
    view, pixels = _crop(samples, preprocessing)
    source = view.clip(samples.shape)
    target = _locate_target(view, source, preprocessing)
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


def _crop(samples: Samples, preprocessing: Preprocessing) -> tuple[Box, NDArray[np.uint8]]:
    """Return the box that fills the network's input, and its part within the scan in 8 bits."""
    height, width = samples.shape
    view = Box(0, 0, width, height)
    if preprocessing.crop == "none" and preprocessing.intensity == "stored":
        return view, scale_to_8_bits(samples)
    reduced, (down, across) = _downsample(samples)
    own = find_own_range(reduced)
    head = _find_head(reduced, own) if preprocessing.crop == "head" else None
    if head is not None:
        found = Box(head.left * across, head.top * down, head.width * across, head.height * down)
        view = found.widen(HEAD_MARGIN)
        reduced = head.cut(reduced)
    cut = view.clip(samples.shape).cut(samples)
    if preprocessing.intensity == "stored":
        return view, scale_to_8_bits(cut)
    return view, stretch_range(cut, find_head_range(reduced, own))


def _downsample(samples: Samples) -> tuple[Samples, tuple[int, int]]:
    """Average a scan down to about :data:`SEARCH_PX`; return the factors (down, across) too.

    The factors are whole numbers, which is 30 times as fast in OpenCV. The last rows and columns
    that do not fill a whole step are left out.
    """
    height, width = samples.shape
    factor = max(1, round(max(height, width) / SEARCH_PX))
    down, across = min(factor, height), min(factor, width)
    size = (width // across, height // down)
    whole = samples[: size[1] * down, : size[0] * across]
    reduced: Samples = cv2.resize(whole, size, interpolation=cv2.INTER_AREA)
    return reduced, (down, across)


def _find_head(reduced: Samples, own: Range) -> Box | None:
    """Return the head's box in a reduced scan of range `own`; None where no head is found.

    Blur, threshold at a quarter of Otsu's, opening, and all outlines that have at least
    :data:`MIN_COMPONENT` of the largest one's area: a brain in two halves is one head.
    """
    blurred = cv2.blur(stretch_range(reduced, own), (KERNEL_PX, KERNEL_PX))
    otsu, _ = cv2.threshold(blurred, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    _, mask = cv2.threshold(blurred, max(MIN_THRESHOLD, otsu / 4), 255, cv2.THRESH_BINARY)
    mask = cv2.morphologyEx(mask, cv2.MORPH_OPEN, np.ones((KERNEL_PX, KERNEL_PX), np.uint8))
    outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    areas = np.array([cv2.contourArea(outline) for outline in outlines])
    if areas.sum() < MIN_HEAD * mask.size:
        return None
    is_head = areas >= MIN_COMPONENT * areas.max()
    boxes = np.array([cv2.boundingRect(outline) for outline in compress(outlines, is_head)])
    left, top = boxes[:, :2].min(0).tolist()
    right, bottom = (boxes[:, :2] + boxes[:, 2:]).max(0).tolist()
    return Box(left, top, right - left, bottom - top)


def _locate_target(view: Box, source: Box, preprocessing: Preprocessing) -> Box:
    """Return the position of `source` in the network's input, which `view` fills."""
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
