"""Sample values to grey levels: an image's own range, percentiles, and 8 bits of what lies between.

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
"""Share of an image's pixels below each end of its own range: one pixel in two hundred may be hot,
dead or part of burnt-in text."""
HEAD_RANGE = (0.01, 0.99)
"""Share of the head's pixels that become black at most, and of those that do not become white."""
DARK_SHARE = 8 / 255
"""Up to this share of its own range a pixel is taken for air; a JPEG's black is rarely 0."""

cv2.setNumThreads(1)  # tasks and the service decode one image on each CPU already


def to_unsigned(samples: NDArray[Any], *, fill_range: bool = False) -> Samples:
    """Return samples of any real type as unsigned integers.

    uint8 and uint16 are returned as they are. Whole numbers keep their steps where 16 bits hold
    their range, and are shifted if they do not fit: so 12-bit samples have the same percentiles
    whatever type a file has them in. Others are mapped linearly onto 0 … 65535, from their lowest
    to their highest value. Values that float32 cannot hold (NaN, infinities) become the lowest.

    Parameters
    ----------
    samples : ndarray of any real dtype, shape (height, width)
    fill_range : bool
        Map whole numbers linearly too.

    Raises
    ------
    ValueError
        Samples of other than two dimensions, without pixels, or not real.
    """
    if samples.ndim != 2 or not samples.size or samples.dtype.kind not in "buif":
        raise ValueError(
            "Expected real samples of shape (height, width), each at least 1; got "
            f"{samples.dtype} of shape {samples.shape}. Pass one grey image at a time."
        )
    if samples.dtype in (np.uint8, np.uint16):
        # OpenCV reads neither a foreign byte order nor columns that are not neighbours in memory.
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
    """Return the range that holds :data:`OWN_RANGE` of an image's pixels.

    12-bit data in a 16-bit file fill a sixteenth of their type's range, and a contrast may fill a
    part of that: what is dark has to be said relative to the image's own range.
    """
    lowest, highest = cv2.minMaxLoc(samples)[:2]
    if lowest == highest:
        return highest, highest + 1
    low, high = _find_percentiles(samples, OWN_RANGE, lowest, highest)
    return (low, high) if low < high else (lowest, highest)


def find_head_range(samples: Samples, own: Range) -> Range:
    """Return the range from the 1st to the 99th percentile of the pixels that are not air.

    Parameters
    ----------
    samples : ndarray of uint8 or uint16, shape (height, width)
        The scan, or the part of it that holds the head. Percentiles of a reduced scan are nearer to
        those of what the network sees than a large scan's own, whose noise it averages away.
    own : (float, float)
        Of the whole scan, from :func:`find_own_range`.
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
    """Return the values below which shares of the pixels within [lowest, highest] lie."""
    num_bins = round(highest - lowest) + 1  # every value has its own
    counts = cv2.calcHist([samples], [0], None, [num_bins], [lowest, highest + 1]).ravel()
    cumulative = np.cumsum(counts, dtype=np.float64)
    bins = np.searchsorted(cumulative, np.array(shares) * cumulative[-1])
    low, high = (lowest + bins).tolist()
    return low, high


def stretch_range(samples: Samples, to_stretch: Range) -> NDArray[np.uint8]:
    """Map a range linearly onto 0 … 255; what lies beside it becomes black or white."""
    low, high = to_stretch
    gain = 255 / (high - low)
    raised = cv2.max(samples, low)  # as the next step takes absolute values
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
    """Return grey levels for a person to look at: 8 bits as they are, others by their own range.

    By its type's full range 12-bit data in a 16-bit file would be nearly black.
    """
    if samples.dtype == np.uint8:
        return samples.view(np.uint8)
    return stretch_range(samples, find_own_range(samples))
