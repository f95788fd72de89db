"""Training-only dice: drawn for the whole global batch, applied on the device.

Every draw depends on the seed, the epoch and the step alone, never on the worker, so that
the same image of the same global batch is augmented alike however many workers share it,
and alike again after a resume.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from brainray.errors import ConfigError


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
    mixup_alpha: float = 0.0
    """Beta(α, α) of mixup (Zhang et al., ICLR 2018), one draw a step; pairs within a worker."""

    def __post_init__(self) -> None:
        limits = {
            "rotation_deg": 180.0,
            "shift": 0.5,
            "blur_px": 5.0,
            "mixup_alpha": 10.0,
        }
        for name in self.__slots__:
            value, limit = getattr(self, name), limits.get(name, 1.0)
            if not 0 <= value <= limit:
                raise ConfigError(f"augmentation.{name} must be in [0, {limit:g}], got {value}.")


NO_AUGMENTATION = Augmentation(**dict.fromkeys(Augmentation.__slots__, 0.0))
"""Every range zero: images pass unchanged."""


@dataclass(frozen=True, slots=True)
class Dice:
    """What was drawn for one batch; every tensor has the batch as its first dimension."""

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
    noise_seed: int
    """Seeds the noise field of the first image; each next image's seed is one higher."""
    mixup: float
    """Weight of the first of two mixed images, in [0.5, 1]; 1 mixes nothing."""

    def slice(self, start: int, stop: int) -> "Dice":
        """Return one worker's share of a global batch."""
        part = slice(start, stop)
        return Dice(
            self.theta[part],
            self.brightness[part],
            self.contrast[part],
            self.blur_px[part],
            self.noise[part],
            self.noise_seed + start,
            self.mixup,
        )


def roll_dice(augmentation: Augmentation, num_images: int, *, seed: int) -> Dice:
    """Draw the random changes for a batch.

    Parameters
    ----------
    augmentation : Augmentation
        The ranges.
    num_images : int
        Size of the global batch.
    seed : int
        The same seed draws the same changes.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(limit: float) -> torch.Tensor:
        return (torch.rand(num_images, generator=generator) * 2 - 1) * limit

    def flip(probability: float) -> torch.Tensor:
        return 1.0 - 2.0 * (torch.rand(num_images, generator=generator) < probability).float()

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
    return Dice(
        theta=theta,
        brightness=uniform(augmentation.brightness),
        contrast=uniform(math.log1p(augmentation.contrast)).exp(),
        blur_px=uniform(augmentation.blur_px).abs(),
        noise=uniform(augmentation.noise).abs(),
        noise_seed=int(torch.randint(2**31, (1,), generator=generator)),
        mixup=_draw_mixup(augmentation.mixup_alpha, generator),
    )


def _draw_mixup(alpha: float, generator: torch.Generator) -> float:
    if alpha == 0:
        return 1.0
    gammas = torch._standard_gamma(torch.tensor([alpha, alpha]), generator=generator)
    share = float(gammas[0] / gammas.sum().clamp_min(1e-12))
    return max(share, 1 - share)


def augment_images(images: torch.Tensor, dice: Dice, *, grey_range: float) -> torch.Tensor:
    """Apply one affine sampling and the intensity changes to a normalised batch.

    Rotation, flips, zoom, stretch and shift are one matrix, so that pixels are
    interpolated once. What comes from outside the image repeats its border. Autocast
    does not touch it: it would make the sampling grid bf16, off by a pixel at 224 px.

    Parameters
    ----------
    images : Tensor of float32, shape (N, 1, H, W)
        Normalised images, on any device.
    dice : Dice
        What was drawn for them.
    grey_range : float
        Width of the full grey range after normalisation: ``1 / std``.

    Returns
    -------
    Tensor of float32, shape (N, 1, H, W)
    """
    with torch.autocast(images.device.type, enabled=False):
        return _augment(images, dice, grey_range)


def _augment(images: torch.Tensor, dice: Dice, grey_range: float) -> torch.Tensor:
    """Do so in the images' own type."""
    device = images.device
    if not bool((dice.theta == torch.eye(2, 3)).all()):
        grid = F.affine_grid(dice.theta.to(device), list(images.shape), align_corners=False)
        images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    if bool((dice.blur_px > 0).any()):
        images = _blur(images, dice.blur_px.to(device))
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    contrast, brightness = (
        values.to(device).view(-1, 1, 1, 1) for values in (dice.contrast, dice.brightness)
    )
    images = (images - mean) * contrast + (mean + brightness * grey_range)
    if bool((dice.noise > 0).any()):
        fields = [
            torch.randn(
                images.shape[1:], generator=torch.Generator().manual_seed(dice.noise_seed + index)
            )
            for index in range(len(images))
        ]
        field = torch.stack(fields).to(device)
        images = images + field * (dice.noise.to(device).view(-1, 1, 1, 1) * grey_range)
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


def mix_images(
    images: torch.Tensor, targets: torch.Tensor, share: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix each image and its target with those of the batch in reverse order (mixup).

    Parameters
    ----------
    images : Tensor, shape (N, 1, H, W)
    targets : Tensor of float32, shape (N, K)
        Class probabilities.
    share : float
        Weight of the image itself; 1 returns the batch unchanged.
    """
    if share >= 1:
        return images, targets
    return (
        images * share + images.flip(0) * (1 - share),
        targets * share + targets.flip(0) * (1 - share),
    )
