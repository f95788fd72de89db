"""Ranges of sample values, and scaling to 8 bits.

A range is a pair (low, high) of sample values with low < high, so that nothing divides by zero.
"""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.uint8 | np.uint16]
"""Grey samples at the depth of their file, shape (height, width)."""
Range = tuple[float, float]
"""Lowest and highest sample value of interest; the lowest is less than the highest."""

OWN_RANGE = (0.005, 0.995)
"""Quantiles of an image's own range: one pixel in two hundred may be hot, dead or burnt-in text."""
HEAD_RANGE = (0.01, 0.99)
"""Quantiles of the head's pixels that become black and white."""
DARK_SHARE = 8 / 255
"""Pixels up to this share of the own range count as air; a JPEG's black is rarely 0."""

SHOWN_PERCENTILES = (1, 99)
"""Percentiles of the range shown where a DICOM object or a volume has no window."""

cv2.setNumThreads(1)  # every CPU already decodes an image of its own


def to_unsigned(samples: NDArray[Any], *, fill_range: bool = False) -> Samples:
    """Convert real samples (height, width) of any type to unsigned integers.

    uint8 and uint16 stay as they are. Integers whose range fits in 16 bits keep their steps, unless
    `fill_range`, and are shifted where necessary: 12-bit samples have the same percentiles in every
    type. Others are scaled linearly to 0 … 65535, from lowest to highest. Values that float32
    cannot hold (NaN, infinities) become the lowest. ValueError is raised for samples that are not
    two-dimensional, not real, or empty.
    """
    if samples.ndim != 2 or not samples.size or samples.dtype.kind not in "buif":
        raise ValueError(
            "Expected real samples of shape (height, width), each at least 1; got "
            f"{samples.dtype} of shape {samples.shape}. Pass one grey image at a time."
        )
    if samples.dtype in (np.uint8, np.uint16):
        # OpenCV needs native byte order and contiguous rows.
        return np.ascontiguousarray(samples, samples.dtype.newbyteorder("="))
    values = samples.astype(np.float64)
    is_measured = np.abs(values) <= np.finfo(np.float32).max  # False for NaN
    measured = values[is_measured]
    lowest, highest = (measured.min(), measured.max()) if measured.size else (0.0, 0.0)
    values = np.where(is_measured, values, lowest)
    if not fill_range and highest - lowest <= 65535 and not (values % 1).any():
        return (values if lowest >= 0 and highest <= 65535 else values - lowest).astype(np.uint16)
    if lowest == highest:
        return np.zeros(samples.shape, np.uint16)
    return np.rint((values - lowest) / (highest - lowest) * 65535).astype(np.uint16)


def find_own_range(samples: Samples) -> Range:
    """Return the range between the :data:`OWN_RANGE` quantiles of an image.

    12-bit data fill a sixteenth of the range of their 16-bit type, or less. So thresholds are
    relative to this range.
    """
    lowest, highest = cv2.minMaxLoc(samples)[:2]
    if lowest == highest:
        return highest, highest + 1
    low, high = _find_percentiles(samples, OWN_RANGE, lowest, highest)
    return (low, high) if low < high else (lowest, highest)


def find_head_range(samples: Samples, own: Range) -> Range:
    """Return the range from the 1st to the 99th percentile of pixels that are not air.

    `samples` are the reduced scan, or its part with the head: reducing averages noise as resizing
    to the network's input does. `own` is the range of the whole scan.
    """
    lowest, highest = cv2.minMaxLoc(samples)[:2]
    first = max(lowest, np.floor(own[0] + DARK_SHARE * (own[1] - own[0])) + 1)
    if first > highest:  # air alone
        return highest, highest + 1
    low, high = _find_percentiles(samples, HEAD_RANGE, first, highest)
    return min(low, high - 1), high


def _find_percentiles(
    samples: Samples, shares: tuple[float, float], lowest: float, highest: float
) -> Range:
    """Return two quantiles of the pixels within [lowest, highest]."""
    num_bins = round(highest - lowest) + 1  # one for each value
    counts = cv2.calcHist([samples], [0], None, [num_bins], [lowest, highest + 1]).ravel()
    cumulative = np.cumsum(counts, dtype=np.float64)
    bins = np.searchsorted(cumulative, np.array(shares) * cumulative[-1])
    low, high = (lowest + bins).tolist()
    return low, high


def stretch_range(samples: Samples, to_stretch: Range) -> NDArray[np.uint8]:
    """Scale a range linearly to 0 … 255; values outside it become black or white."""
    low, high = to_stretch
    gain = 255 / (high - low)
    raised = cv2.max(samples, low)  # the next step takes absolute values
    stretched: NDArray[np.uint8] = cv2.convertScaleAbs(raised, alpha=gain, beta=-low * gain)
    return stretched


def scale_to_8_bits(samples: Samples) -> NDArray[np.uint8]:
    """Scale samples to 8 bits by the full range of their type, with exact rounding.

    As libpng 1.6's ``png_do_scale_16_to_8``; uint8 is returned as it is.
    """
    if samples.dtype == np.uint8:
        return samples.view(np.uint8)
    wide = samples.astype(np.uint32)
    wide *= 255
    wide += 32895
    wide >>= 16
    return wide.astype(np.uint8)


def to_display(samples: Samples) -> NDArray[np.uint8]:
    """Convert samples to 8 bits for display: 16-bit samples by their own range.

    By the full range of their type, 12-bit data would be nearly black.
    """
    if samples.dtype == np.uint8:
        return samples.view(np.uint8)
    return stretch_range(samples, find_own_range(samples))


def to_bytes(shares: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """Scale 0 … 1 to 0 … 255; values outside become black or white."""
    grey: NDArray[np.uint8] = np.rint(np.clip(shares, 0, 1) * 255).astype(np.uint8)
    return grey


def render_percentiles(
    values: NDArray[np.float32], shown: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """Scale values to 8 bits by the :data:`SHOWN_PERCENTILES` of `shown`, or of all of them."""
    low, high = np.percentile(values if shown is None else shown, SHOWN_PERCENTILES)
    return to_bytes((values - low) / max(float(high - low), float(np.finfo(np.float32).tiny)))
