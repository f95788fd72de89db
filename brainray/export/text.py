"""Find text that is drawn into an image: characters in a line, bright on the air around a head.

A search for what a person should look at. It finds no text that lies over the head, and no single
letters such as those that mark a side.
"""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from brainray.images.intensity import find_own_range, stretch_range, to_unsigned

MIN_GREY = 80
"""Least grey level of a character, of 255 over the image's own range."""
AIR_GREY = 40
"""Greatest mean grey level around a character."""
HEIGHT_PX = (4, 48)
"""Of a character, in pixels: the least, and the greatest."""
MAX_WIDTH = 4.0
"""In heights: characters that touch are found as one."""
MIN_CHARACTERS = 4
"""In one line. What is wider than it is high counts as several."""
MAX_GAP = 2.0
"""Between two characters of a line, in heights of the taller one: a space, or a comma, which is too
small to be found."""


def has_text(samples: NDArray[Any]) -> bool:
    """Tell whether a line of characters is drawn beside the head, bright on dark samples."""
    unsigned = to_unsigned(samples)
    boxes = _find_characters(stretch_range(unsigned, find_own_range(unsigned)))
    return any(_count_neighbours(boxes, box) >= MIN_CHARACTERS for box in boxes)


def _find_characters(grey: NDArray[np.uint8]) -> list[tuple[int, int, int, int]]:
    """Return left, top, width and height of what is as large as a character, from the left."""
    bright = (grey >= MIN_GREY).astype(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(bright, connectivity=8)
    found = []
    for label in range(1, count):
        left, top, width, height, area = stats[label].tolist()
        if not HEIGHT_PX[0] <= height <= HEIGHT_PX[1] or width > MAX_WIDTH * height:
            continue
        if width > 3 and not 0.1 <= area / (width * height) <= 0.9:  # no "l" is hollow
            continue
        rows = slice(max(0, top - 2), top + height + 2)
        columns = slice(max(0, left - 2), left + width + 2)
        others = grey[rows, columns][labels[rows, columns] != label]
        if others.size and others.mean() <= AIR_GREY:
            found.append((left, top, width, height))
    return sorted(found)


def _count_neighbours(
    boxes: list[tuple[int, int, int, int]], first: tuple[int, int, int, int]
) -> int:
    """Return how many characters follow each other in a line from the first one."""
    left, top, width, height = first
    count = max(1, round(width / height))
    for other in boxes:
        gap, taller = other[0] - (left + width), max(height, other[3])
        on_line = abs(other[1] + other[3] - top - height) <= 0.25 * taller
        alike = min(height, other[3]) >= 0.5 * taller
        if 0 <= gap <= MAX_GAP * taller and on_line and alike:
            left, top, width, height = other
            count += max(1, round(width / height))
    return count
