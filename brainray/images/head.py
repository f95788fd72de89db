"""Where in a scan the head lies."""

from dataclasses import dataclass
from itertools import compress

import cv2
import numpy as np
from numpy.typing import NDArray

from brainray.images.intensity import Range, Samples, stretch_range

SEARCH_PX = 256
"""The head is looked for in a scan reduced to about this on its longer side (two thirds of it to
one and a half times)."""
MIN_THRESHOLD = 12
"""Least grey level, of 255 over the scan's own range, that counts as head."""
KERNEL_PX = 5
"""Side of the blur and of the opening, which removes what is thinner."""
MIN_COMPONENT = 0.1
"""An outline belongs to the head from this share of the largest one's area."""
MIN_HEAD = 0.01
"""Outlines that together hold less of the scan are taken for text or noise."""


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle of whole pixels."""

    left: int
    top: int
    width: int
    height: int

    def cut(self, samples: Samples) -> Samples:
        """Return the samples within, as a view; the box must lie within the image."""
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


def downsample(samples: Samples) -> tuple[Samples, tuple[int, int]]:
    """Reduce a scan to about :data:`SEARCH_PX` by averaging, and return the two factors too.

    The factors (down, across) are whole numbers, which is 30 times as fast in OpenCV; up to a
    factor less one of the last rows and columns is left out.
    """
    height, width = samples.shape
    factor = max(1, round(max(height, width) / SEARCH_PX))
    down, across = min(factor, height), min(factor, width)
    size = (width // across, height // down)
    whole = samples[: size[1] * down, : size[0] * across]
    reduced: Samples = cv2.resize(whole, size, interpolation=cv2.INTER_AREA)
    return reduced, (down, across)


def find_head(reduced: Samples, own: Range) -> Box | None:
    """Return the box of the head, or None where there is no head.

    Blur, threshold at a quarter of Otsu's, opening, and all outlines that hold at least
    :data:`MIN_COMPONENT` of the largest one's area: a brain in two halves is one head, burnt-in
    text is none.

    Parameters
    ----------
    reduced : ndarray of uint8 or uint16, shape (height, width)
        From :func:`downsample`.
    own : (float, float)
        Its range, from :func:`brainray.images.intensity.find_own_range`.
    """
    mask = _threshold(stretch_range(reduced, own))
    outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    areas = np.array([cv2.contourArea(outline) for outline in outlines])
    if areas.sum() < MIN_HEAD * mask.size:
        return None
    is_head = areas >= MIN_COMPONENT * areas.max()
    boxes = np.array([cv2.boundingRect(outline) for outline in compress(outlines, is_head)])
    left, top = boxes[:, :2].min(0).tolist()
    right, bottom = (boxes[:, :2] + boxes[:, 2:]).max(0).tolist()
    return Box(left, top, right - left, bottom - top)


def enlarge_box(reduced_box: Box, factors: tuple[int, int]) -> Box:
    """Return a box of a scan that :func:`downsample` has reduced, in the scan's own pixels."""
    down, across = factors
    return Box(
        reduced_box.left * across,
        reduced_box.top * down,
        reduced_box.width * across,
        reduced_box.height * down,
    )


def _threshold(grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return 255 where there is head."""
    blurred = cv2.blur(grey, (KERNEL_PX, KERNEL_PX))
    otsu, _ = cv2.threshold(blurred, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    _, mask = cv2.threshold(blurred, max(MIN_THRESHOLD, otsu / 4), 255, cv2.THRESH_BINARY)
    kernel = np.ones((KERNEL_PX, KERNEL_PX), np.uint8)
    opened: NDArray[np.uint8] = cv2.morphologyEx(mask, cv2.MORPH_OPEN, kernel)
    return opened
