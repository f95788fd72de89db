"""Training-only dice: each change against a reference, and independence of the workers."""

import math
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage, stats

from brainray.errors import ConfigError
from brainray.training.augment import (
    NO_AUGMENTATION,
    Augmentation,
    Dice,
    augment_images,
    mix_images,
    roll_dice,
)

GREY_RANGE = 1 / 0.226
EVERYTHING = Augmentation(
    flip_vertical=0.5, stretch=0.1, blur_px=1.5, noise=0.1, brightness=0.2, mixup_alpha=0.2
)


def draw(count: int = 4, side: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 1, side, side, generator=torch.Generator().manual_seed(seed))


def draw_smooth(side: int = 64, seed: int = 0, sigma_px: float = 3.0) -> np.ndarray[Any, Any]:
    noise = np.random.default_rng(seed).normal(size=(side, side))
    return ndimage.gaussian_filter(noise, sigma_px).astype(np.float32) * 10


def draw_blob(side: int = 96, sigma_px: float = 7.0) -> torch.Tensor:
    """Draw a round blob in the middle."""
    y, x = np.indices((side, side)) - (side - 1) / 2
    blob = np.exp(-(x**2 + y**2) / (2 * sigma_px**2)).astype(np.float32)
    return torch.from_numpy(blob)[None, None]


def measure_blob(image: torch.Tensor) -> tuple[float, float, float, float]:
    """Return the centre (x, y), from the middle of the image, and the deviations (x, y)."""
    weights = image[0, 0].double().numpy()
    weights = weights / weights.sum()
    y, x = np.indices(weights.shape) - (len(weights) - 1) / 2
    centre_x, centre_y = (weights * x).sum(), (weights * y).sum()
    deviation_x = math.sqrt((weights * (x - centre_x) ** 2).sum())
    deviation_y = math.sqrt((weights * (y - centre_y) ** 2).sum())
    return centre_x, centre_y, deviation_x, deviation_y


def only(**ranges: float) -> Augmentation:
    return replace(NO_AUGMENTATION, **ranges)


def still(count: int, **values: Any) -> Dice:  # noqa: ANN401 - any field of the dice
    """Return dice that change nothing, but for what is given."""
    return replace(roll_dice(NO_AUGMENTATION, count, seed=0), **values)


def apply(images: torch.Tensor, dice: Dice) -> torch.Tensor:
    return augment_images(images, dice, grey_range=GREY_RANGE)


# ------------------------------------------------------------------------------------------- dice


@pytest.mark.parametrize("side", [32, 224])
def test_no_augmentation_changes_nothing(side: int) -> None:
    images = draw(side=side)
    dice = roll_dice(NO_AUGMENTATION, 4, seed=3)
    assert (apply(images, dice) - images).abs().max() <= 1e-6
    assert dice.mixup == 1
    assert all(getattr(NO_AUGMENTATION, field.name) == 0 for field in fields(Augmentation))


def test_the_seed_decides_and_nothing_else() -> None:
    images = draw()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = apply(images, roll_dice(EVERYTHING, 4, seed=7))
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is left alone
    torch.manual_seed(2)
    assert torch.equal(apply(images, roll_dice(EVERYTHING, 4, seed=7)), first)
    assert (apply(images, roll_dice(EVERYTHING, 4, seed=8)) - first).abs().max() > 0.1
    assert roll_dice(EVERYTHING, 4, seed=7).mixup == roll_dice(EVERYTHING, 4, seed=7).mixup
    assert roll_dice(EVERYTHING, 4, seed=7).mixup != roll_dice(EVERYTHING, 4, seed=8).mixup


def test_autocast_changes_nothing() -> None:
    images = draw(side=224)
    dice = roll_dice(EVERYTHING, 4, seed=7)
    outside = apply(images, dice)
    assert (outside - images).abs().max() > 0.1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(apply(images, dice), outside)


def test_images_of_a_batch_are_drawn_apart() -> None:
    dice = roll_dice(EVERYTHING, 64, seed=0)
    for name in ("brightness", "contrast", "blur_px", "noise"):
        assert len(getattr(dice, name).unique()) == 64
    assert len(dice.theta[:, 0, 2].unique()) == 64


@pytest.mark.parametrize("name", [f.name for f in fields(Augmentation) if f.name != "mixup_alpha"])
def test_image_is_augmented_alike_on_any_number_of_workers(name: str) -> None:
    images = draw(12, 40)
    value = {"rotation_deg": 30.0, "blur_px": 3.0}.get(name, 0.4)
    dice = roll_dice(only(**{name: value}), 12, seed=5)
    whole = apply(images, dice)
    assert (whole - images).abs().max() > 0.1
    for borders in ((0, 6, 12), (0, 1, 4, 9, 12)):
        shares = [apply(images[a:b], dice.slice(a, b)) for a, b in pairwise(borders)]
        assert (torch.cat(shares) - whole).abs().max() < 1e-5


def test_a_slice_of_a_slice_is_the_same_image() -> None:
    images, dice = draw(12, 32), roll_dice(EVERYTHING, 12, seed=1)
    whole = apply(images, dice)
    nested = apply(images[6:8], dice.slice(4, 12).slice(2, 4))
    assert (nested - whole[6:8]).abs().max() < 1e-5
    assert dice.slice(4, 12).mixup == dice.mixup


# ---------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize(("name", "axis"), [("flip_horizontal", -1), ("flip_vertical", -2)])
def test_flip_equals_torch_flip(name: str, axis: int) -> None:
    images = draw(3)
    flipped = apply(images, roll_dice(only(**{name: 1.0}), 3, seed=0))
    assert (flipped - images.flip(axis)).abs().max() < 1e-4
    assert (flipped - images).abs().max() > 1


def test_flip_probability() -> None:
    theta = roll_dice(only(flip_horizontal=0.3), 5000, seed=0).theta
    assert (theta[:, 0, 0] < 0).float().mean() == pytest.approx(0.3, abs=0.03)
    assert (theta[:, 1, 1] > 0).all()


@pytest.mark.parametrize("seed", [1, 2, 3, 5])
def test_rotation_equals_scipy(seed: int) -> None:
    dice = roll_dice(only(rotation_deg=90.0), 1, seed=seed)
    ((cosine, _, shift_x), (sine, _, shift_y)) = dice.theta[0].tolist()
    degrees = math.degrees(math.atan2(sine, cosine))
    assert 5 < abs(degrees) < 90
    assert (abs(shift_x), abs(shift_y)) == (0, 0)
    image = draw_smooth()
    rotated = apply(torch.from_numpy(image)[None, None], dice)[0, 0].numpy()
    expected = ndimage.rotate(image, degrees, reshape=False, order=1, mode="nearest")
    assert np.abs(rotated - expected).max() < 1e-3
    assert np.abs(rotated - image).max() > 0.1


def test_rotation_is_uniform_in_its_range() -> None:
    theta = roll_dice(only(rotation_deg=20.0), 4000, seed=0).theta
    degrees = torch.rad2deg(torch.atan2(theta[:, 1, 0], theta[:, 0, 0])).numpy()
    assert stats.kstest(degrees, stats.uniform(-20, 40).cdf).pvalue > 0.01
    assert np.abs(degrees).max() <= 20.001


@pytest.mark.parametrize("seed", range(6))
def test_zoom_magnifies(seed: int) -> None:
    dice = roll_dice(only(zoom=0.5), 1, seed=seed)
    magnification = 1 / float(dice.theta[0, 0, 0])
    before, after = measure_blob(draw_blob()), measure_blob(apply(draw_blob(), dice))
    for axis in (2, 3):
        assert after[axis] / before[axis] == pytest.approx(magnification, rel=0.02)
    assert max(map(abs, after[:2])) < 0.01  # about the middle


def test_zoom_is_log_uniform_in_its_range() -> None:
    theta = roll_dice(only(zoom=0.5), 4000, seed=0).theta
    assert torch.equal(theta[:, 0, 0], theta[:, 1, 1])
    logarithms = -theta[:, 0, 0].log().numpy()
    limit = math.log(1.5)
    assert stats.kstest(logarithms, stats.uniform(-limit, 2 * limit).cdf).pvalue > 0.01


def test_stretch_changes_width_to_height_and_keeps_the_area() -> None:
    dice = roll_dice(only(stretch=0.5), 40, seed=0)
    ratios = (dice.theta[:, 1, 1] / dice.theta[:, 0, 0]).tolist()
    assert 1 / 1.5 - 1e-5 <= min(ratios) < 0.75
    assert 1.35 < max(ratios) <= 1.5 + 1e-5
    for index in (ratios.index(min(ratios)), ratios.index(max(ratios))):
        *_, wide, high = measure_blob(apply(draw_blob(), dice.slice(index, index + 1)))
        assert wide / high == pytest.approx(ratios[index], rel=0.02)
        assert wide * high == pytest.approx(7.0**2, rel=0.02)


def test_shift_moves_along_both_axes_by_shares_of_the_side() -> None:
    side, limit = 96, 0.15
    dice = roll_dice(only(shift=limit), 40, seed=0)
    centres = np.array([measure_blob(apply(draw_blob(), dice.slice(i, i + 1))) for i in range(40)])
    moved = centres[:, :2]
    # theta maps output to input, in halves of the side: what is read from the right moves left
    np.testing.assert_allclose(moved, -dice.theta[:, :, 2].numpy() * side / 2, atol=0.1)
    assert (np.abs(moved).max(axis=0) <= limit * side + 0.1).all()
    assert (moved.max(axis=0) > 0.8 * limit * side).all()
    assert (moved.min(axis=0) < -0.8 * limit * side).all()
    assert abs(np.corrcoef(moved.T)[0, 1]) < 0.5


def test_whole_pixels_shift_exactly_and_the_border_repeats() -> None:
    images = draw(1, 32)
    theta = torch.tensor([[[1.0, 0.0, 2 * 3 / 32], [0.0, 1.0, 0.0]]])
    moved = apply(images, still(1, theta=theta))
    assert (moved[..., :-3] - images[..., 3:]).abs().max() < 1e-4
    assert (moved[..., -3:] - images[..., -1:]).abs().max() < 1e-4


# --------------------------------------------------------------------------------------- intensity


def test_brightness_adds_a_share_of_the_range() -> None:
    images = draw(3)
    shares = torch.tensor([0.1, -0.2, 0.0])
    brighter = apply(images, still(3, brightness=shares))
    assert (brighter - images - shares.view(3, 1, 1, 1) * GREY_RANGE).abs().max() < 1e-5
    drawn = roll_dice(only(brightness=0.3), 4000, seed=0).brightness.numpy()
    assert stats.kstest(drawn, stats.uniform(-0.3, 0.6).cdf).pvalue > 0.01


def test_contrast_is_a_factor_about_each_images_mean() -> None:
    images = draw(3) + torch.tensor([0.0, 2.0, -1.0]).view(3, 1, 1, 1)
    factors = torch.tensor([1.5, 0.5, 1.0])
    changed = apply(images, still(3, contrast=factors))
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    assert (changed - (mean + (images - mean) * factors.view(3, 1, 1, 1))).abs().max() < 1e-5
    drawn = roll_dice(only(contrast=0.5), 4000, seed=0).contrast.log().numpy()
    limit = math.log(1.5)
    assert stats.kstest(drawn, stats.uniform(-limit, 2 * limit).cdf).pvalue > 0.01


def test_blur_equals_scipy_for_each_images_own_deviation() -> None:
    images, sigmas = draw(4, 48), (0.0, 1.0, 2.0, 3.0)
    blurred = apply(images, still(4, blur_px=torch.tensor(sigmas)))
    for image, result, sigma in zip(images, blurred, sigmas, strict=True):
        expected = ndimage.gaussian_filter(image[0].numpy(), sigma, mode="nearest", truncate=3.0)
        assert np.abs(result[0].numpy() - expected).max() < 1e-4


def test_blur_keeps_the_mean_and_lowers_the_variance() -> None:
    images = torch.nn.functional.pad(draw(5, 32), [16] * 4)  # nothing is lost over the border
    sigmas = torch.tensor([0.5, 2.0, 1.0, 1.5, 0.7])
    blurred = apply(images, still(5, blur_px=sigmas))
    assert (blurred.mean((1, 2, 3)) - images.mean((1, 2, 3))).abs().max() < 1e-4
    kept = blurred.var((1, 2, 3)) / images.var((1, 2, 3))
    assert kept.max() < 0.95
    assert torch.equal(kept.argsort(descending=True), sigmas.argsort())
    drawn = roll_dice(only(blur_px=2.0), 4000, seed=0).blur_px.numpy()
    assert stats.kstest(drawn, stats.uniform(0, 2).cdf).pvalue > 0.01


def test_noise_has_the_drawn_deviation_and_is_each_images_own() -> None:
    images = draw(3, 96)
    deviations = torch.tensor([0.05, 0.2, 0.0])
    noise = apply(images, still(3, noise=deviations, noise_seed=11)) - images
    assert noise[2].abs().max() < 1e-5
    for field, deviation in zip(noise[:2], deviations.tolist(), strict=False):
        assert float(field.std()) == pytest.approx(deviation * GREY_RANGE, rel=0.03)
        assert abs(float(field.mean())) < 0.05 * deviation * GREY_RANGE
    correlation = np.corrcoef(noise[0].flatten(), noise[1].flatten())[0, 1]
    assert abs(correlation) < 0.05
    again = apply(images, still(3, noise=deviations, noise_seed=11)) - images
    other = apply(images, still(3, noise=deviations, noise_seed=400)) - images
    assert torch.equal(again, noise)
    assert abs(np.corrcoef(noise[1].flatten(), other[1].flatten())[0, 1]) < 0.05
    drawn = roll_dice(only(noise=0.3), 4000, seed=0).noise.numpy()
    assert stats.kstest(drawn, stats.uniform(0, 0.3).cdf).pvalue > 0.01


# ------------------------------------------------------------------------------------------- mixup


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_mixup_share_is_the_larger_half_of_a_beta(alpha: float) -> None:
    shares = [roll_dice(only(mixup_alpha=alpha), 1, seed=seed).mixup for seed in range(600)]
    assert 0.5 <= min(shares) < 0.7
    assert max(shares) <= 1
    beta = stats.beta(alpha, alpha)
    assert stats.kstest(shares, lambda x: beta.cdf(x) - beta.cdf(1 - x)).pvalue > 0.01


def test_mix_images_mixes_pictures_and_targets_alike() -> None:
    images = draw(5, 32)
    targets = torch.eye(4)[torch.tensor([0, 1, 2, 3, 0])]
    mixed, soft = mix_images(images, targets, 0.75)
    assert torch.allclose(soft.sum(1), torch.ones(5))
    assert soft[0].tolist() == [1.0, 0.0, 0.0, 0.0]  # both ends of this batch are of class 0
    assert soft[1].tolist() == [0.0, 0.75, 0.0, 0.25]
    assert torch.allclose(mixed[1], 0.75 * images[1] + 0.25 * images[3])
    assert torch.allclose(mixed[2], images[2])  # the middle one meets itself


def test_a_share_of_one_mixes_nothing() -> None:
    images, targets = draw(2), torch.eye(2)
    mixed, soft = mix_images(images, targets, 1.0)
    assert torch.equal(mixed, images)
    assert torch.equal(soft, targets)


# ------------------------------------------------------------------------------------------ ranges

LIMITS = {"rotation_deg": 180, "shift": 0.5, "blur_px": 5, "mixup_alpha": 10}


@pytest.mark.parametrize("name", [field.name for field in fields(Augmentation)])
def test_ranges_are_checked_and_named(name: str) -> None:
    limit = LIMITS.get(name, 1)
    assert getattr(only(**{name: limit}), name) == limit
    for value in (-0.01, limit * 1.01, math.nan):
        with pytest.raises(ConfigError) as caught:
            only(**{name: value})
        assert str(caught.value) == (f"augmentation.{name} must be in [0, {limit:g}], got {value}.")
