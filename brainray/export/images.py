"""Samples of a slice to a PNG file, and how to get the samples back."""

from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from brainray.images.intensity import to_unsigned


class Png(NamedTuple):
    """A picture of 8 or 16 bits, with nothing in it but pixels."""

    content: bytes
    slope: float
    """A sample is the picture's value times this, plus the intercept."""
    intercept: float


def encode_png(samples: NDArray[Any]) -> Png:
    """Encode grey samples losslessly: whole numbers that 16 bits hold keep their steps.

    Parameters
    ----------
    samples : ndarray of any real dtype, shape (height, width)
        Other values than whole numbers are mapped linearly onto 16 bits, those that are not finite
        to the lowest.
    """
    unsigned = to_unsigned(samples)
    finite = samples[np.isfinite(samples)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    darkest, brightest = float(unsigned.min()), float(unsigned.max())
    slope = (high - low) / (brightest - darkest) if brightest > darkest else 1.0
    _, encoded = cv2.imencode(".png", unsigned)
    return Png(encoded.tobytes(), slope, low - slope * darkest)
