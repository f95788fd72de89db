"""Augmentation: parameters are drawn for each image and applied to a batch on its device.

An image's parameters depend on the seed, the epoch and the image's id alone, not on the worker, the
batch or the step. So a run augments its images equally on any number of workers and after a resume.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from brainray.errors import ConfigError
from brainray.training.clahe import apply_clahe

CLIP_LIMITS = (1.0, 4.0)
"""Range of CLAHE's clip limit, see :func:`brainray.training.clahe.apply_clahe`."""
LIMITS = {
    "rotation_deg": 180.0,
    "shift": 0.5,
    "gamma": 2.0,
    "bias_field": 0.5,
    "gain": 2.0,
    "blur": 0.05,
}
"""Maximum of a field of :class:`Augmentation`, if it is not 1."""
BLUR_REACH = 3.0
"""Radius of the blur's kernel, in standard deviations."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Augmentation:
    """Ranges of the augmentation of training images; zero disables a change.

    The order is: CLAHE; the geometric changes as one affine resampling, with black outside the
    image; gamma, bias field, gain, blur, noise.
    """

    rotation_deg: float = 10.0
    """Rotation, uniform in ± this many degrees (0 to 180)."""
    flip_horizontal: float = 0.5
    """Probability of a left-right flip (0 to 1)."""
    flip_vertical: float = 0.0
    """Probability of an up-down flip (0 to 1)."""
    zoom: float = 0.1
    """Magnification, log-uniform between 1/(1 + this) and 1 + this (0 to 1)."""
    stretch: float = 0.2
    """Ratio of width to height, log-uniform between 1/(1 + this) and 1 + this (0 to 1)."""
    shift: float = 0.05
    """Shift along each axis, uniform in ± this share of the side (0 to 0.5)."""
    grey_probability: float = 1.0
    """Probability that any of the grey-value changes below is applied to an image (0 to 1)."""
    clahe: float = 0.3
    """Probability that an image is blended with its CLAHE version, whose weight is uniform in
    [0, 1] and whose clip limit is uniform in [1, 4] (0 to 1)."""
    gamma: float = 0.4
    """Logarithm of the exponent of the grey values, uniform in ± this (0 to 2)."""
    bias_field: float = 0.2
    """Relative change of brightness from the centre to the border along each axis, linear, uniform
    in ± this (0 to 0.5)."""
    gain: float = 0.15
    """Logarithm of the factor of all grey values, uniform in ± this (0 to 2)."""
    blur: float = 0.015
    """Standard deviation of a Gaussian blur, uniform in [0, this share of the side] (0 to 0.05)."""
    blur_probability: float = 0.15
    """Probability of the blur (0 to 1)."""
    noise: float = 0.04
    """Standard deviation of Rician noise, uniform in [0, this share of the grey range] (0 to 1)."""
    noise_probability: float = 0.3
    """Probability of the noise (0 to 1)."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value, limit = getattr(self, name), LIMITS.get(name, 1.0)
            if not 0 <= value <= limit:
                raise ConfigError(f"augmentation.{name} must be in [0, {limit:g}], got {value}.")


NO_AUGMENTATION = Augmentation(**dict.fromkeys(Augmentation.__slots__, 0.0))


@dataclass(frozen=True, slots=True)
class AugmentParams:
    """Parameters drawn for N images: tensors on the CPU, float32 of shape (N,) unless stated."""

    theta: torch.Tensor
    """Output to input coordinates, both in [-1, 1], shape (N, 2, 3); as ``affine_grid`` has it."""
    clahe_weight: torch.Tensor
    """Share of the CLAHE version."""
    clip_limit: torch.Tensor
    gamma: torch.Tensor
    bias: torch.Tensor
    """Relative change of brightness from the centre to the right and to the lower border, shape
    (N, 2)."""
    gain: torch.Tensor
    blur: torch.Tensor
    """Standard deviation in shares of the side."""
    noise: torch.Tensor
    """Standard deviation in shares of the grey range."""
    noise_key: torch.Tensor
    """Seed of the noise, int64."""


def sample_params(
    augmentation: Augmentation, image_ids: NDArray[np.int64], *, seed: int, epoch: int
) -> AugmentParams:
    """Draw the augmentation parameters of images.

    Parameters
    ----------
    augmentation : Augmentation
        The ranges. Changing one does not change the values drawn for the others.
    image_ids : ndarray of int64, shape (N,)
        Any numbers; equal ids get equal parameters.
    seed, epoch : int
        Not negative.
    """
    a, uniform = augmentation, _open_uniforms(image_ids, seed, epoch)

    def symmetric(limit: float) -> NDArray[np.float64]:
        return (2 * uniform() - 1) * limit

    def happens(probability: float) -> NDArray[np.bool_]:
        return uniform() < probability

    angle = symmetric(math.radians(a.rotation_deg))
    zoom = np.exp(symmetric(math.log1p(a.zoom)))
    root = np.sqrt(np.exp(symmetric(math.log1p(a.stretch))))  # keeps the area
    # The inverse of: shift, rotate, then scale and flip along the axes of the output.
    scale_x = (1 - 2.0 * happens(a.flip_horizontal)) / (zoom * root)
    scale_y = (1 - 2.0 * happens(a.flip_vertical)) * root / zoom
    cosine, sine = np.cos(angle), np.sin(angle)
    theta = [
        [scale_x * cosine, -scale_y * sine, symmetric(2 * a.shift)],  # the side is 2 long
        [scale_x * sine, scale_y * cosine, symmetric(2 * a.shift)],
    ]
    is_grey = happens(a.grey_probability)
    drawn = {
        "theta": np.stack([np.stack(row, 1) for row in theta], 1),
        "clahe_weight": uniform() * (happens(a.clahe) & is_grey),
        "clip_limit": CLIP_LIMITS[0] + uniform() * (CLIP_LIMITS[1] - CLIP_LIMITS[0]),
        "gamma": np.exp(symmetric(a.gamma) * is_grey),
        "bias": np.stack([symmetric(a.bias_field), symmetric(a.bias_field)], 1) * is_grey[:, None],
        "gain": np.exp(symmetric(a.gain) * is_grey),
        "blur": uniform() * a.blur * (happens(a.blur_probability) & is_grey),
        "noise": uniform() * a.noise * (happens(a.noise_probability) & is_grey),
    }
    tensors = {name: torch.from_numpy(values.astype(np.float32)) for name, values in drawn.items()}
    noise_key = torch.from_numpy((uniform() * 2**53).astype(np.int64))
    return AugmentParams(**tensors, noise_key=noise_key)


# ----------------------------------------------------------------------------------- random numbers

# SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): number n of a stream is a hash of the stream's
# seed + n * GOLDEN. So any number of any stream is computed by itself, for many streams at once.
GOLDEN = 0x9E3779B97F4A7C15
SHIFTS_AND_FACTORS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))


def _hash(values: NDArray[np.uint64], number: int) -> NDArray[np.uint64]:
    """Return one number of the streams whose seeds are given."""
    mixed = values + np.uint64(number * GOLDEN % 2**64)
    for shift, factor in SHIFTS_AND_FACTORS:
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed


def _open_uniforms(
    image_ids: NDArray[np.int64], seed: int, epoch: int
) -> Callable[[], NDArray[np.float64]]:
    """Return a function that gives each image's next number, uniform in [0, 1), shape (N,)."""
    streams = np.zeros(len(image_ids), np.uint64)
    for part in (np.uint64(seed), np.uint64(epoch), image_ids.astype(np.uint64)):
        streams = _hash(streams ^ part, 1)
    numbers = itertools.count(1)

    def uniform() -> NDArray[np.float64]:
        return (_hash(streams, next(numbers)) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    return uniform


def _hash_pixels(keys: torch.Tensor, count: int) -> torch.Tensor:
    """Return the first 64-bit numbers of streams, int64 of shape (N, count), on the keys' device.

    The arithmetic is that of :func:`_hash`: int64 wraps around as uint64 does, but its shift to the
    right repeats the sign bit, which is masked out.
    """

    def wrap(unsigned: int) -> int:
        return unsigned - 2**64 if unsigned >= 2**63 else unsigned

    mixed = keys[:, None] + torch.arange(1, count + 1, device=keys.device) * wrap(GOLDEN)
    for shift, factor in SHIFTS_AND_FACTORS:
        mixed ^= (mixed >> shift) & (2 ** (64 - shift) - 1)
        mixed *= wrap(factor)
    return mixed


# -------------------------------------------------------------------------------------- application


def augment_images(images: torch.Tensor, params: AugmentParams) -> torch.Tensor:
    """Apply what was drawn to a batch.

    On a CPU an image comes out the same to the last bit whatever else is in the batch. Autocast
    does not touch it: it would make the sampling grid bf16, off by a pixel at 224 px.

    Parameters
    ----------
    images : Tensor of uint8, shape (N, S, S)
        Grey images, on any device.
    params : AugmentParams
        Of :func:`sample_params`, for these images.

    Returns
    -------
    Tensor of float32, shape (N, 1, S, S)
        Grey values, in [0, 1], on the images' device.
    """
    with torch.autocast(images.device.type, enabled=False):
        pixels = _blend_clahe(images, params)
        pixels = _sample_affine(pixels, params.theta)
        pixels = _change_brightness(pixels, params)
        pixels = _blur_some(pixels, params.blur)
        pixels = _add_rician_noise(pixels, params)
        return pixels.clamp_(0, 1).unsqueeze(1)


def _per_image(values: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Return a value for each image as a factor of its pixels, on their device."""
    return values.to(pixels.device).view(-1, 1, 1)


def _blend_clahe(images: torch.Tensor, params: AugmentParams) -> torch.Tensor:
    """Return grey values in [0, 1], of which some images are blended with their CLAHE version.

    Black stays black, as it does in scans whose intensity range is stretched after CLAHE.
    """
    pixels = images.float().div_(255)
    rows = params.clahe_weight.nonzero().flatten()
    if len(rows):
        weight = _per_image(params.clahe_weight[rows], pixels)
        clip_limit = params.clip_limit[rows].to(pixels.device)
        rows = rows.to(pixels.device)
        stored = pixels[rows]
        change = apply_clahe(images[rows], clip_limit) - stored
        pixels[rows] = stored + change * (weight * (stored > 0))
    return pixels


def _sample_affine(pixels: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """Interpolate once for all geometric changes; black comes from outside the image."""
    if bool((theta == torch.eye(2, 3)).all()):
        return pixels
    y, x = _centre_pixels(pixels)
    # Not by affine_grid: it multiplies matrices, whose last bit can depend on the batch's size.
    along_x, along_y, shift = theta.to(pixels.device)[:, None, None].unbind(-1)
    grid = along_x * x.unsqueeze(-1) + (along_y * y.unsqueeze(-1) + shift)
    return F.grid_sample(pixels.unsqueeze(1), grid, align_corners=False).squeeze(1)


def _centre_pixels(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the coordinates, in (-1, 1), of the pixels' centres: shapes (H, 1) and (1, W)."""
    height, width = pixels.shape[1:]
    y, x = (
        (2 * torch.arange(size, device=pixels.device) + 1) / size - 1 for size in (height, width)
    )
    return y[:, None], x[None]


def _change_brightness(pixels: torch.Tensor, params: AugmentParams) -> torch.Tensor:
    """Apply gamma, bias field and gain; black stays black."""
    if bool((params.gamma != 1).any()):
        pixels = pixels.pow_(_per_image(params.gamma, pixels))
    if bool((params.bias != 0).any() or (params.gain != 1).any()):
        gain = _per_image(params.gain, pixels)
        bias_x, bias_y = (_per_image(values, pixels) for values in params.bias.unbind(1))
        y, x = _centre_pixels(pixels)
        pixels = pixels.mul_(bias_x * x * gain + (bias_y * y + 1) * gain)
    return pixels


def _blur_some(pixels: torch.Tensor, blur: torch.Tensor) -> torch.Tensor:
    """Blur some of the images, each by its own Gaussian; the border pixels repeat outside."""
    rows = blur.nonzero().flatten()
    if len(rows):
        weights = _build_gaussians(blur[rows].double() * pixels.shape[1]).to(pixels.device)
        rows = rows.to(pixels.device)
        radius = weights.shape[1] - 1
        blurred = F.pad(pixels[rows], [radius] * 4, mode="replicate")
        for axis in (1, 2):
            blurred = _convolve(blurred, weights, axis)
        pixels[rows] = blurred
    return pixels


def _build_gaussians(sigma_px: torch.Tensor) -> torch.Tensor:
    """Return the right halves of Gaussian kernels, float32 of shape (N, 1 + radius)."""
    radius = math.ceil(BLUR_REACH * float(sigma_px.max()))
    distance, sigma_px = torch.arange(radius + 1), sigma_px[:, None]
    weights = torch.exp(-0.5 * (distance / sigma_px) ** 2) * (distance <= BLUR_REACH * sigma_px)
    # Summed in order: so the zeros that a wider kernel in the batch appends change no last bit.
    half = weights.cumsum(1)[:, -1:]
    return (weights / (2 * half - weights[:, :1])).float()


def _convolve(pixels: torch.Tensor, weights: torch.Tensor, axis: int) -> torch.Tensor:
    """Convolve each image along one axis by its own symmetric kernel; its radius is cut off."""
    radius = weights.shape[1] - 1
    size = pixels.shape[axis] - 2 * radius
    columns = weights.view(*weights.shape, 1, 1).unbind(1)
    result = pixels.narrow(axis, radius, size) * columns[0]
    for offset in range(1, radius + 1):
        before, after = (pixels.narrow(axis, radius + side, size) for side in (-offset, offset))
        result += (before + after) * columns[offset]
    return result


def _add_rician_noise(pixels: torch.Tensor, params: AugmentParams) -> torch.Tensor:
    """Add noise to some of the images as MRI has it: the magnitude of a complex Gaussian [1]_.

    It covers the black background too, as it does around the head of a noisy scan.

    References
    ----------
    .. [1] Gudbjartsson and Patz, The Rician distribution of noisy MRI data, Magnetic Resonance in
       Medicine 34, 1995.
    """
    rows = params.noise.nonzero().flatten()
    if len(rows):
        sigma = _per_image(params.noise[rows], pixels)
        bits = _hash_pixels(params.noise_key[rows].to(pixels.device), pixels[0].numel())
        bits = bits.view(-1, *pixels.shape[1:])
        # Box and Muller's radius and angle; 24 bits are what float32 can hold.
        radius = (((bits >> 40 & 0xFFFFFF) + 1) * 2.0**-24).log_().mul_(-2).sqrt_() * sigma
        cosine = ((bits & 0xFFFFFF) * (2 * math.pi * 2.0**-24)).cos_()
        rows = rows.to(pixels.device)
        stored = pixels[rows]
        # |x + r e^(i angle)|; rounding may leave the square just below 0.
        square = stored * stored + 2 * stored * radius * cosine + radius * radius
        pixels[rows] = square.clamp_(min=0).sqrt_()
    return pixels
