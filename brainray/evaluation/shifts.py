"""Scans as another scanner, another export or another hand would have left them.

Each shift changes a decoded scan in one way, at a severity of 1 to 3, in the manner of ImageNet-C
[1]_ and MedMNIST-C [2]_. Severity 2 is a change that is plain to see and that a radiologist reads
past; 1 is milder, and 3 is as far as an image may still be met with in practice. Lengths are in
shares of the scan's side, so that a shift means the same whatever the size of the scan.

References
----------
.. [1] Hendrycks and Dietterich, Benchmarking neural network robustness to common corruptions and
   perturbations, ICLR 2019.
.. [2] Di Salvo et al., MedMNIST-C: Comprehensive benchmark and improved classifier robustness by
   simulating realistic image corruptions, arXiv 2406.17536, 2024.
"""

import io
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from brainray.errors import ConfigError

Scan = NDArray[np.uint8]
SEVERITIES = (1, 2, 3)


@dataclass(frozen=True, slots=True)
class Shift:
    """One way in which a scan may differ from those that a classifier was trained on."""

    description: str
    """One line for people; says what the levels are."""
    levels: tuple[float, float, float]
    """Strength at severity 1, 2 and 3; three times the same where there are no degrees of it."""
    apply: Callable[[Scan, float, np.random.Generator], NDArray[Any]]
    """Function of a scan, uint8 of shape (H, W), a level, and a source of random numbers."""


def apply_shift(samples: Scan, name: str, severity: int, *, seed: int) -> NDArray[Any]:
    """Shift a decoded scan.

    Parameters
    ----------
    samples : ndarray of uint8, shape (H, W)
        Grey levels, at the scan's own size.
    name : str
        A key of :data:`SHIFTS`.
    severity : {1, 2, 3}
    seed : int
        Not negative. Decides what a shift draws, as the direction of a rotation; the same at every
        severity. Give each image its own.

    Returns
    -------
    ndarray of uint8, shape (H', W')
        uint16 for ``export_16_bit``.

    Raises
    ------
    ConfigError
        An unknown name or severity.
    """
    assert samples.dtype == np.uint8, samples.dtype
    assert samples.ndim == 2, samples.shape
    if name not in SHIFTS:
        raise ConfigError(f"Unknown shift '{name}'. Expected one of {', '.join(SHIFTS)}.")
    if severity not in SEVERITIES:
        raise ConfigError(f"Expected a severity of 1, 2 or 3, got {severity}.")
    shift = SHIFTS[name]
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])  # not hash(): that is salted
    return shift.apply(samples, shift.levels[severity - 1], rng)


def _to_scan(values: NDArray[np.floating[Any]]) -> Scan:
    """Round grey levels and cut them off at black and white."""
    rounded: Scan = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return rounded


# -------------------------------------------------------------------------------------- grey levels


def _apply_clahe(samples: Scan, level: float, _: np.random.Generator) -> Scan:
    return np.asarray(cv2.createCLAHE(level, (8, 8)).apply(samples), np.uint8)


def _equalise(samples: Scan, level: float, _: np.random.Generator) -> Scan:
    return _to_scan(samples + level * (cv2.equalizeHist(samples) - samples.astype(np.float32)))


def _apply_gamma(samples: Scan, level: float, _: np.random.Generator) -> Scan:
    return _to_scan(255 * (np.arange(256) / 255) ** level)[samples]


def _apply_gain(samples: Scan, level: float, _: np.random.Generator) -> Scan:
    return _to_scan(np.arange(256) * level)[samples]


def _apply_bias_field(samples: Scan, level: float, rng: np.random.Generator) -> Scan:
    angle = rng.uniform(0, 2 * np.pi)
    y, x = (np.linspace(-1, 1, size) for size in samples.shape)
    field = 1 + level * np.add.outer(np.sin(angle) * y, np.cos(angle) * x)
    return _to_scan(samples * field)


def _add_rician_noise(samples: Scan, level: float, rng: np.random.Generator) -> Scan:
    real, imaginary = rng.normal(0, level, (2, *samples.shape))
    return _to_scan(np.hypot(samples + real, imaginary))


def _invert(samples: Scan, _: float, __: np.random.Generator) -> Scan:
    return np.invert(samples)


def _export_16_bit(samples: Scan, level: float, _: np.random.Generator) -> NDArray[np.uint16]:
    scaled: NDArray[np.uint16] = np.rint(samples * (level / 255)).astype(np.uint16)
    return scaled


# ------------------------------------------------------------------------------------------- detail


def _blur(samples: Scan, level: float, _: np.random.Generator) -> Scan:
    return np.asarray(cv2.GaussianBlur(samples, (0, 0), level * max(samples.shape)), np.uint8)


def _compress(samples: Scan, level: float, _: np.random.Generator) -> Scan:
    sink = io.BytesIO()
    Image.fromarray(samples).save(sink, "JPEG", quality=round(level))
    return np.asarray(Image.open(sink))


def _downsample(samples: Scan, level: float, _: np.random.Generator) -> Scan:
    height, width = (max(1, round(size / level)) for size in samples.shape)
    return np.asarray(cv2.resize(samples, (width, height), interpolation=cv2.INTER_AREA), np.uint8)


# ----------------------------------------------------------------------------------------- geometry


def _rotate(samples: Scan, level: float, rng: np.random.Generator) -> Scan:
    height, width = samples.shape
    centre = ((width - 1) / 2, (height - 1) / 2)
    matrix = cv2.getRotationMatrix2D(centre, float(rng.choice([-level, level])), 1.0)
    return np.asarray(cv2.warpAffine(samples, matrix, (width, height)), np.uint8)


def _add_border(samples: Scan, level: float, _: np.random.Generator) -> Scan:
    return np.pad(samples, [(round(level * size),) * 2 for size in samples.shape])


def _crop(samples: Scan, level: float, _: np.random.Generator) -> Scan:
    top, left = (round(level * size) for size in samples.shape)
    height, width = samples.shape
    return samples[top : height - top, left : width - left]


def _stretch(samples: Scan, level: float, rng: np.random.Generator) -> Scan:
    height, width = samples.shape
    size = (round(width * level), height) if rng.random() < 0.5 else (width, round(height * level))
    return np.asarray(cv2.resize(samples, size, interpolation=cv2.INTER_LINEAR), np.uint8)


SHIFTS: dict[str, Shift] = {
    "clahe": Shift("CLAHE in 8 x 8 tiles with this clip limit", (2.0, 3.0, 5.0), _apply_clahe),
    "equalized": Shift(
        "blended with its histogram equalised, by this weight", (0.5, 1.0, 1.0), _equalise
    ),
    "gamma_bright": Shift("grey levels to this power", (0.8, 0.6, 0.45), _apply_gamma),
    "gamma_dark": Shift("grey levels to this power", (1.3, 1.7, 2.3), _apply_gamma),
    "gain_dark": Shift("grey levels times this", (0.7, 0.5, 0.3), _apply_gain),
    "gain_bright": Shift("grey levels times this, cut off at white", (1.25, 1.5, 2.0), _apply_gain),
    "bias_field": Shift(
        "brightness changes linearly, by ± this at the borders, in a random direction",
        (0.2, 0.4, 0.6),
        _apply_bias_field,
    ),
    "noise": Shift(
        "Rician noise with this deviation, in grey levels", (6.0, 12.0, 24.0), _add_rician_noise
    ),
    "blur": Shift(
        "Gaussian blur with this deviation, in shares of the longer side: 1, 2 and 4 of 224 px",
        (1 / 224, 2 / 224, 4 / 224),
        _blur,
    ),
    "jpeg": Shift("JPEG of this quality", (30.0, 15.0, 7.0), _compress),
    "downsampled": Shift("sides divided by this", (1.5, 2.0, 4.0), _downsample),
    "rotation": Shift(
        "rotated by this many degrees, either way, about the middle", (6.0, 12.0, 20.0), _rotate
    ),
    "border": Shift(
        "a black border of this share of the side, on each side", (0.1, 0.2, 0.4), _add_border
    ),
    "tighter_crop": Shift(
        "this share of the side cut off, on each side", (0.04, 0.08, 0.12), _crop
    ),
    "stretched": Shift(
        "width or height times this: 7:6, 4:3 and 3:2", (7 / 6, 4 / 3, 3 / 2), _stretch
    ),
    "inverted": Shift("black and white changed over", (1.0, 1.0, 1.0), _invert),
    "export_16_bit": Shift(
        "16-bit samples of which only 0 to this are used", (4095.0, 4095.0, 4095.0), _export_16_bit
    ),
}
"""Name to shift."""
