"""Tools of the painter: head units on a canvas, layers with smooth edges, textures, blending."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from brainray.phantoms.anatomy import Curve
from brainray.phantoms.subjects import SubjectParameters

Picture = NDArray[np.float32]


class Frame:
    """Maps head units to pixels of the canvas."""

    def __init__(self, subject: SubjectParameters, offset: float) -> None:
        self.height, self.width = subject.height_px, subject.width_px
        half_width = subject.view.half_width
        scale = min(self.height / 2, self.width / 2 / half_width)
        self.scale = scale * subject.fill * (1 + 0.006 * offset)  # px per head unit
        cos, sin = np.cos(subject.rotation_rad), np.sin(subject.rotation_rad)
        sign = -1.0 if subject.flipped else 1.0
        stretch = np.diag([sign * subject.stretch, 1.0])
        self.matrix = self.scale * np.array([[cos, -sin], [sin, cos]]) @ stretch
        moved = np.array(subject.shift) + 0.006 * offset
        self.centre = np.array([self.width / 2, self.height / 2]) + self.scale * moved
        self.warp = subject.warp

    def to_pixels(self, curve: Curve) -> Curve:
        """Map head units, shape (N, 2), to pixels, with the subject's deformation."""
        bent = curve + 0.02 * np.sin(3.1 * curve[:, ::-1] + self.warp[0])
        bent += 0.008 * np.sin(7.3 * curve[:, ::-1] + self.warp[1])
        placed: Curve = bent @ self.matrix.T + self.centre
        return placed

    def coordinates(self) -> tuple[Picture, Picture]:
        """Compute the head units x and y of every pixel, each of shape (H, W)."""
        inverse = np.linalg.inv(self.matrix)
        columns = np.arange(self.width, dtype=np.float32)[None, :] + np.float32(
            0.5 - self.centre[0]
        )
        rows = np.arange(self.height, dtype=np.float32)[:, None] + np.float32(0.5 - self.centre[1])
        one, two, three, four = (np.float32(value) for value in inverse.ravel())
        return columns * one + rows * two, columns * three + rows * four

    def sample(self, field: Picture) -> Picture:
        """Sample a square field over head units [-1.5, 1.5] at every pixel."""
        size = field.shape[0]
        inverse = np.linalg.inv(self.matrix) * (size / 3.0)
        origin = size / 2 - inverse @ self.centre
        coefficients = (*inverse[0], origin[0], *inverse[1], origin[1])
        picture = Image.fromarray(field).transform(
            (self.width, self.height),
            Image.Transform.AFFINE,
            tuple(float(value) for value in coefficients),
            resample=Image.Resampling.BILINEAR,
        )
        return np.asarray(picture, dtype=np.float32)


_FULL = 200
"""Eight-bit level of brightness or cover 1; allows brightness up to 1.27."""


def _mix_ink(value: float, cover: float) -> tuple[int, int, int]:
    return round(_FULL * value * cover), round(_FULL * cover), 0


class Layer:
    """A layer of paint, drawn at twice the canvas resolution for smooth edges.

    An RGB image has brightness times cover in its first band and cover in its second, so that
    Pillow draws both at once. Eight bits suffice, since noise is added.
    """

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self._image = Image.new("RGB", (2 * frame.width, 2 * frame.height))
        self._pen = ImageDraw.Draw(self._image)

    def fill(self, curve: Curve, value: float, cover: float = 1.0) -> None:
        """Fill a closed curve in head units."""
        corners = (2 * self.frame.to_pixels(curve)).ravel().tolist()
        self._pen.polygon(corners, fill=_mix_ink(value, cover))

    def stroke(self, curve: Curve, width: float, value: float, cover: float = 1.0) -> None:
        """Draw along an open curve; ``width`` in head units."""
        corners = (2 * self.frame.to_pixels(curve)).ravel().tolist()
        thick = max(1, round(2 * width * self.frame.scale))
        self._pen.line(corners, fill=_mix_ink(value, cover), width=thick)

    def flatten(self, soft_px: float = 0.0) -> tuple[Picture, Picture]:
        """Return brightness times cover, and cover in [0, 1]; each of shape (H, W)."""
        shrink = 4 if soft_px > 3 else 1  # a wide blur needs no full resolution
        bands = np.asarray(self._image.reduce(2 * shrink))
        value, cover = (bands[..., band] * np.float32(1 / _FULL) for band in (0, 1))
        if soft_px:
            value, cover = (
                ndimage.gaussian_filter(band, soft_px / shrink, truncate=2.5)
                for band in (value, cover)
            )
        if shrink > 1:
            size = (self.frame.width, self.frame.height)
            value, cover = (
                np.asarray(Image.fromarray(band).resize(size, Image.Resampling.BILINEAR))
                for band in (value, cover)
            )
        return value, cover

    def over(
        self, picture: Picture, *, within: Picture | None = None, soft_px: float = 0.0
    ) -> Picture:
        """Lay this layer over a picture, optionally within a mask or with soft edges."""
        value, cover = self.flatten(soft_px)
        if within is not None:
            value, cover = value * within, cover * within
        result: Picture = picture * (1 - cover) + value
        return result


@lru_cache(maxsize=8)  # slices of one subject follow each other
def draw_textures(seed: int) -> tuple[Picture, Picture, Picture]:
    """Draw the fields of folds, mottles and swells."""
    rng = np.random.default_rng(seed)
    return (
        _draw_ring_noise(rng, 0.235, 0.22),
        _draw_ring_noise(rng, 0.11, 0.35),
        _draw_ring_noise(rng, 0.6, 0.35),
    )


def _draw_ring_noise(rng: np.random.Generator, wavelength: float, spread: float) -> Picture:
    """Draw noise of one wavelength (head units); shape (128, 128), unit variance."""
    size = 128
    rows = np.fft.fftfreq(size, 3.0 / size)[:, None]
    columns = np.fft.rfftfreq(size, 3.0 / size)[None, :]
    away = (np.hypot(rows, columns) * wavelength - 1) / spread
    spectrum = np.fft.rfft2(rng.standard_normal((size, size))) * np.exp(-0.5 * away**2)
    field = np.fft.irfft2(spectrum, s=(size, size))
    result: Picture = (field / field.std()).astype(np.float32)
    return result


def ramp(values: Picture, low: float, high: float) -> Picture:
    """Rise linearly from 0 at ``low`` to 1 at ``high``."""
    result: Picture = np.clip((values - low) * np.float32(1 / (high - low)), 0, 1)
    return result


def blend(under: Picture, over: NDArray[np.floating], cover: Picture) -> Picture:
    """Lay one picture over another with opacity ``cover``, from 0 to 1."""
    return np.asarray(under + cover * (over - under), dtype=np.float32)
