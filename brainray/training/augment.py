"""Random changes of training images: drawn for each image, applied to a batch on its device.

What happens to an image depends on the seed, the epoch and the image's id alone: not on the
worker, the batch or the step. So a run gives the same images on any number of workers, and after
a resume.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from brainray.errors import ConfigError
from brainray.images.normalise import scale_to_unit


@dataclass(frozen=True, kw_only=True, slots=True)
class Augmentation:
    """Ranges of the random changes made to training images; zero switches one off."""

    rotation_deg: float = 15.0
    """Rotation, uniform in ± this many degrees (0 to 180)."""
    flip_horizontal: float = 0.5
    """Probability of a left-right flip (0 to 1)."""
    flip_vertical: float = 0.0
    """Probability of an up-down flip (0 to 1)."""
    zoom: float = 0.15
    """Magnification, log-uniform between 1/(1 + this) and 1 + this (0 to 1)."""
    stretch: float = 0.0
    """Ratio of width to height, log-uniform between 1/(1 + this) and 1 + this (0 to 1)."""
    shift: float = 0.08
    """Shift along each axis, uniform in ± this share of the side (0 to 0.5)."""
    brightness: float = 0.1
    """Added grey, uniform in ± this share of the full range (0 to 1)."""
    contrast: float = 0.2
    """Factor about the image's mean, log-uniform between 1/(1 + this) and 1 + this (0 to 1)."""
    blur_px: float = 0.0
    """Gaussian blur with a deviation uniform in [0, this] pixels (0 to 5)."""
    noise: float = 0.0
    """Gaussian noise with a deviation uniform in [0, this] shares of the full range (0 to 1)."""

    def __post_init__(self) -> None:
        limits = {
            "rotation_deg": 180.0,
            "shift": 0.5,
            "blur_px": 5.0,
        }
        for name in self.__slots__:
            value, limit = getattr(self, name), limits.get(name, 1.0)
            if not 0 <= value <= limit:
                raise ConfigError(f"augmentation.{name} must be in [0, {limit:g}], got {value}.")


NO_AUGMENTATION = Augmentation(**dict.fromkeys(Augmentation.__slots__, 0.0))
"""Every range zero: images pass unchanged."""


@dataclass(frozen=True, slots=True)
class AugmentParams:
    """What was drawn for N images: tensors on the CPU."""

    theta: torch.Tensor
    """Shape (N, 2, 3): output to input coordinates in [-1, 1], as affine_grid takes them."""
    brightness: torch.Tensor
    """Shape (N,): shares of the full range."""
    contrast: torch.Tensor
    """Shape (N,): factors."""
    blur_px: torch.Tensor
    """Shape (N,): deviations in pixels."""
    noise: torch.Tensor
    """Shape (N,): deviations in shares of the full range."""
    noise_seed: torch.Tensor
    """Seed of the noise of each image, int64, shape (N,)."""


def sample_params(
    augmentation: Augmentation, image_ids: NDArray[np.int64], *, seed: int, epoch: int
) -> AugmentParams:
    """Draw the random changes of some images.

    Parameters
    ----------
    augmentation : Augmentation
        The ranges.
    image_ids : ndarray of int64, shape (N,)
        Not negative; equal ones get equal changes.
    seed, epoch : int
        Not negative. Others draw other changes.
    """
    draws = [np.random.default_rng([seed, epoch, number]).random(12) for number in image_ids]
    columns = iter(torch.from_numpy(np.array(draws).reshape(-1, 12)).float().unbind(1))

    def uniform(limit: float) -> torch.Tensor:
        return (next(columns) * 2 - 1) * limit

    def flip(probability: float) -> torch.Tensor:
        return 1.0 - 2.0 * (next(columns) < probability).float()

    angle = uniform(math.radians(augmentation.rotation_deg))
    zoom = uniform(math.log1p(augmentation.zoom)).exp()
    stretch = uniform(math.log1p(augmentation.stretch) / 2).exp()
    scale_x = flip(augmentation.flip_horizontal) / (zoom * stretch)
    scale_y = flip(augmentation.flip_vertical) * stretch / zoom
    cosine, sine = angle.cos(), angle.sin()
    theta = torch.stack(
        [
            torch.stack([scale_x * cosine, -scale_y * sine, uniform(2 * augmentation.shift)], 1),
            torch.stack([scale_x * sine, scale_y * cosine, uniform(2 * augmentation.shift)], 1),
        ],
        1,
    )
    return AugmentParams(
        theta=theta,
        brightness=uniform(augmentation.brightness),
        contrast=uniform(math.log1p(augmentation.contrast)).exp(),
        blur_px=uniform(augmentation.blur_px).abs(),
        noise=uniform(augmentation.noise).abs(),
        noise_seed=(next(columns) * 2**24).long(),
    )


def augment_images(images: torch.Tensor, params: AugmentParams) -> torch.Tensor:
    """Apply one affine sampling and the intensity changes to a batch.

    Rotation, flips, zoom, stretch and shift are one matrix, so that pixels are
    interpolated once. What comes from outside the image repeats its border. Autocast
    does not touch it: it would make the sampling grid bf16, off by a pixel at 224 px.

    Parameters
    ----------
    images : Tensor of uint8, shape (N, H, W)
        Grey images, on any device.
    params : AugmentParams
        What was drawn for them.

    Returns
    -------
    Tensor of float32, shape (N, 1, H, W)
        Grey values in [0, 1], on the images' device.
    """
    with torch.autocast(images.device.type, enabled=False):
        return _augment(scale_to_unit(images), params).clamp_(0, 1)


def _augment(images: torch.Tensor, params: AugmentParams) -> torch.Tensor:
    device = images.device
    if not bool((params.theta == torch.eye(2, 3)).all()):
        grid = F.affine_grid(params.theta.to(device), list(images.shape), align_corners=False)
        images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    if bool((params.blur_px > 0).any()):
        images = _blur(images, params.blur_px.to(device))
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    contrast, brightness = (
        values.to(device).view(-1, 1, 1, 1) for values in (params.contrast, params.brightness)
    )
    images = (images - mean) * contrast + (mean + brightness)
    if bool((params.noise > 0).any()):
        fields = [
            torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(int(seed)))
            for seed in params.noise_seed
        ]
        images = images + torch.stack(fields).to(device) * params.noise.to(device).view(-1, 1, 1, 1)
    return images


def _blur(images: torch.Tensor, sigma_px: torch.Tensor) -> torch.Tensor:
    """Blur each image by its own Gaussian: two one-dimensional grouped convolutions."""
    reach_px = (3 * sigma_px).ceil().clamp_min(1).unsqueeze(1)  # each its own, whoever is beside it
    radius = int(reach_px.max())
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    kernels = torch.exp(-0.5 * (offsets / sigma_px.clamp_min(1e-3).unsqueeze(1)) ** 2)
    kernels = kernels * (offsets.abs() <= reach_px)
    kernels = kernels / kernels.sum(1, keepdim=True)
    count, _, height, width = images.shape
    stacked = F.pad(images.view(1, count, height, width), [radius] * 4, mode="replicate")
    stacked = F.conv2d(stacked, kernels.view(count, 1, -1, 1), groups=count)
    stacked = F.conv2d(stacked, kernels.view(count, 1, 1, -1), groups=count)
    return stacked.view(count, 1, height, width)
