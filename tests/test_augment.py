"""Augmentation: each transform against a reference; no dependence on batches and workers."""

import math
from dataclasses import fields, replace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage, stats

from brainray.errors import ConfigError
from brainray.phantoms import draw_phantom
from brainray.training.augment import (
    NO_AUGMENTATION,
    Augmentation,
    AugmentParams,
    augment_images,
    sample_params,
)
from brainray.training.clahe import apply_clahe

EVERYTHING = Augmentation(
    rotation_deg=20.0, flip_vertical=0.5, clahe=1.0, blur_probability=1.0, noise_probability=1.0
)


def draw(count: int = 4, side: int = 64, seed: int = 0) -> torch.Tensor:
    """Draw images of uniform random grey levels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, side, side), generator=generator, dtype=torch.uint8)


def draw_heads(count: int, side: int) -> NDArray[np.uint8]:
    """Draw heads on black, shape (count, side, side)."""
    rng = np.random.default_rng(0)
    labels = ("glioma", "meningioma", "notumor", "pituitary")
    heads = [draw_phantom(labels[number % 4], rng) for number in range(count)]
    return np.stack([cv2.resize(head, (side, side)) for head in heads])


def draw_blob(side: int = 96, sigma_px: float = 7.0) -> torch.Tensor:
    """Draw a round blob in the middle."""
    y, x = np.indices((side, side)) - (side - 1) / 2
    blob = np.exp(-(x**2 + y**2) / (2 * sigma_px**2)) * 255
    return torch.from_numpy(blob.round().astype(np.uint8))[None]


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
    """Enable only the given ranges; grey values, blur and noise always change if they have one."""
    return replace(
        NO_AUGMENTATION,
        **{"grey_probability": 1.0, "blur_probability": 1.0, "noise_probability": 1.0} | ranges,
    )


def sample(augmentation: Augmentation, count: int, seed: int = 0) -> AugmentParams:
    return sample_params(augmentation, np.arange(count), seed=seed, epoch=0)


def unchanged(count: int, **values: Any) -> AugmentParams:  # noqa: ANN401 - any of the tensors
    """Return parameters that change nothing, except for the given values."""
    return replace(sample(NO_AUGMENTATION, count), **values)


def scale(images: torch.Tensor) -> torch.Tensor:
    return images.unsqueeze(1).float() / 255


def take(params: AugmentParams, index: int) -> AugmentParams:
    values = (getattr(params, field.name)[index : index + 1] for field in fields(AugmentParams))
    return AugmentParams(*values)


# ---------------------------------------------------------------------------------- reproducibility


@pytest.mark.parametrize("side", [32, 224])
def test_no_augmentation_changes_nothing(side: int) -> None:
    images = draw(side=side)
    assert torch.equal(augment_images(images, sample(NO_AUGMENTATION, 4)), scale(images))
    assert all(getattr(NO_AUGMENTATION, field.name) == 0 for field in fields(Augmentation))


@pytest.mark.parametrize("side", [50, 64])
def test_an_image_is_augmented_the_same_in_any_batch(side: int) -> None:
    count = 24
    images, ids = draw(count, side), np.arange(count) * 1000 + 7
    augmented = augment_images(images, sample_params(EVERYTHING, ids, seed=5, epoch=3))
    for rows in ([11], [3, 0], list(reversed(range(count))), list(range(5, 16))):
        params = sample_params(EVERYTHING, ids[rows], seed=5, epoch=3)
        assert torch.equal(augment_images(images[rows], params), augmented[rows])


def test_seed_epoch_and_id_each_change_the_result() -> None:
    images = draw(1)

    def augment(image_id: int, seed: int, epoch: int) -> torch.Tensor:
        params = sample_params(EVERYTHING, np.array([image_id]), seed=seed, epoch=epoch)
        return augment_images(images, params)

    first = augment(7, 0, 0)
    assert torch.equal(augment(7, 0, 0), first)
    for others in ((8, 0, 0), (7, 1, 0), (7, 0, 1), (0, 7, 0), (0, 0, 7)):
        assert (augment(*others) - first).abs().mean() > 0.05


def test_the_global_generators_are_not_used() -> None:
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002 - the test is about the global one
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
    augment_images(draw(), sample(EVERYTHING, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)  # noqa: NPY002


def test_autocast_changes_nothing() -> None:
    images, params = draw(side=224), sample(EVERYTHING, 4)
    outside = augment_images(images, params)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(augment_images(images, params), outside)


def test_parameters_are_independent_of_each_other_and_of_other_images() -> None:
    params = sample(EVERYTHING, 5000)
    columns = [params.theta[:, 0, 2], params.theta[:, 1, 2], params.bias[:, 0], params.bias[:, 1]]
    names = ("clahe_weight", "clip_limit", "gamma", "gain", "blur", "noise", "noise_key")
    columns += [getattr(params, name).double() for name in names]
    drawn = torch.stack([column.double() for column in columns]).numpy()
    correlation = np.corrcoef(np.concatenate([drawn[:, 1:], drawn[:, :-1]]))
    # 231 correlations of 4999 pairs: the largest of as many normal deviates is near 3 / sqrt(4999)
    assert np.abs(correlation - np.eye(len(correlation))).max() < 0.07


def test_a_range_does_not_change_the_other_parameters() -> None:
    params, other = sample(EVERYTHING, 8), sample(replace(EVERYTHING, gamma=0.0), 8)
    assert (other.gamma == 1).all()
    for name in ("theta", "clahe_weight", "bias", "gain", "blur", "noise", "noise_key"):
        assert torch.equal(getattr(params, name), getattr(other, name))


# ----------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize(("name", "axis"), [("flip_horizontal", -1), ("flip_vertical", -2)])
def test_flip_equals_torch_flip(name: str, axis: int) -> None:
    images = draw(3)
    flipped = augment_images(images, sample(only(**{name: 1.0}), 3))
    assert (flipped - scale(images).flip(axis)).abs().max() < 1e-4


def test_flip_probability() -> None:
    theta = sample(only(flip_horizontal=0.3), 5000).theta
    assert (theta[:, 0, 0] < 0).float().mean() == pytest.approx(0.3, abs=0.03)
    assert (theta[:, 1, 1] > 0).all()


@pytest.mark.parametrize("index", range(4))
def test_rotation_equals_scipy_and_fills_with_black(index: int) -> None:
    params = take(sample(only(rotation_deg=90.0), 4), index)
    ((cosine, _, _), (sine, _, _)) = params.theta[0].tolist()
    degrees = math.degrees(math.atan2(sine, cosine))
    assert abs(degrees) > 5
    smooth = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(64, 64)), 3.0)
    image = np.clip(128 + 500 * smooth, 1, 255).astype(np.uint8)
    rotated = augment_images(torch.from_numpy(image)[None], params)[0, 0].numpy()
    expected = ndimage.rotate(image / 255, degrees, reshape=False, order=1, mode="grid-constant")
    assert np.abs(rotated - expected).max() < 1e-3
    assert (rotated[[0, 0, -1, -1], [0, -1, 0, -1]] == 0).all()


def test_rotation_is_uniform_in_its_range() -> None:
    theta = sample(only(rotation_deg=20.0), 4000).theta
    degrees = torch.rad2deg(torch.atan2(theta[:, 1, 0], theta[:, 0, 0])).numpy()
    assert stats.kstest(degrees, stats.uniform(-20, 40).cdf).pvalue > 0.01
    assert np.abs(degrees).max() <= 20.001


def test_zoom_magnifies_about_the_middle() -> None:
    params = sample(only(zoom=0.5), 6)
    before = measure_blob(scale(draw_blob()))
    for index in range(6):
        after = measure_blob(augment_images(draw_blob(), take(params, index)))
        magnification = 1 / float(params.theta[index, 0, 0])
        for axis in (2, 3):
            assert after[axis] / before[axis] == pytest.approx(magnification, rel=0.02)
        assert max(map(abs, after[:2])) < 0.01


def test_zoom_is_log_uniform_in_its_range() -> None:
    theta = sample(only(zoom=0.5), 4000).theta
    assert torch.equal(theta[:, 0, 0], theta[:, 1, 1])
    limit = math.log(1.5)
    logarithms = -theta[:, 0, 0].log().numpy()
    assert stats.kstest(logarithms, stats.uniform(-limit, 2 * limit).cdf).pvalue > 0.01


def test_stretch_changes_width_to_height_and_keeps_the_area() -> None:
    params = sample(only(stretch=0.5), 40)
    ratios = (params.theta[:, 1, 1] / params.theta[:, 0, 0]).tolist()
    assert 1 / 1.5 - 1e-5 <= min(ratios) < 0.75
    assert 1.35 < max(ratios) <= 1.5 + 1e-5
    for index in (ratios.index(min(ratios)), ratios.index(max(ratios))):
        *_, wide, high = measure_blob(augment_images(draw_blob(), take(params, index)))
        assert wide / high == pytest.approx(ratios[index], rel=0.02)
        assert wide * high == pytest.approx(7.0**2, rel=0.02)


def test_shift_moves_along_both_axes_by_shares_of_the_side() -> None:
    side, limit = 96, 0.15
    params = sample(only(shift=limit), 40)
    moved = np.array(
        [measure_blob(augment_images(draw_blob(), take(params, i)))[:2] for i in range(40)]
    )
    # theta maps output to input, in halves of the side: the image moves by the opposite shift
    np.testing.assert_allclose(moved, -params.theta[:, :, 2].numpy() * side / 2, atol=0.1)
    assert (np.abs(moved).max(axis=0) <= limit * side + 0.1).all()
    assert (moved.max(axis=0) > 0.8 * limit * side).all()
    assert (moved.min(axis=0) < -0.8 * limit * side).all()
    assert abs(np.corrcoef(moved.T)[0, 1]) < 0.5


def test_a_shift_by_whole_pixels_is_exact_and_fills_with_black() -> None:
    images = draw(1, 32)
    theta = torch.tensor([[[1.0, 0.0, 2 * 3 / 32], [0.0, 1.0, 0.0]]])
    moved = augment_images(images, unchanged(1, theta=theta))
    assert (moved[..., :-3] - scale(images)[..., 3:]).abs().max() < 1e-4
    assert (moved[..., -3:] == 0).all()


# -------------------------------------------------------------------------------------- grey values


@pytest.mark.parametrize("limit", [1.0, 2.0, 4.0])
def test_clahe_equals_opencv(limit: float) -> None:
    heads = draw_heads(2, 1024)  # large tiles: OpenCV's rounding errors are small
    expected = np.stack([cv2.createCLAHE(limit, (8, 8)).apply(head) for head in heads])
    found = apply_clahe(torch.from_numpy(heads), torch.full((2,), limit)).numpy() * 255
    assert np.abs(found - expected).max() <= 2.0
    assert np.abs(found - expected).mean() <= 0.35


@pytest.mark.parametrize("limit", [1.0, 2.0, 4.0])
def test_clahe_of_a_small_image_matches_that_of_a_large_one(limit: float) -> None:
    heads = draw_heads(4, 1024)
    equalised = [cv2.createCLAHE(limit, (8, 8)).apply(head) for head in heads]
    small, expected = (
        np.stack([cv2.resize(image, (128, 128), interpolation=cv2.INTER_AREA) for image in images])
        for images in (heads, equalised)
    )
    found = apply_clahe(torch.from_numpy(small), torch.full((4,), limit)).numpy() * 255
    assert np.abs(found - expected).mean() < 3.5
    assert np.abs(small.astype(np.float64) - expected).mean() > 10


@pytest.mark.parametrize("side", [33, 50, 64])
def test_clahe_accepts_any_size_and_treats_both_axes_equally(side: int) -> None:
    images, limits = draw(2, side), torch.tensor([1.0, 3.0])
    found = apply_clahe(images, limits)
    assert found.shape == images.shape
    transposed = apply_clahe(images.transpose(1, 2), limits).transpose(1, 2)
    assert torch.allclose(found, transposed, atol=1e-6)


def test_clahe_blends_by_weight_and_keeps_black() -> None:
    heads = torch.from_numpy(draw_heads(3, 128))
    weight, limit = torch.tensor([0.0, 0.5, 1.0]), torch.tensor([2.0, 2.0, 3.0])
    blended = augment_images(heads, unchanged(3, clahe_weight=weight, clip_limit=limit))[:, 0]
    stored, equalised = scale(heads)[:, 0], apply_clahe(heads, limit)
    expected = torch.lerp(stored, equalised, weight.view(3, 1, 1))
    assert torch.allclose(blended[heads > 0], expected[heads > 0], atol=1e-6)
    assert (blended[heads == 0] == 0).all()
    assert (heads == 0).any()


def test_clahe_probability_weight_and_clip_limit() -> None:
    params = sample(only(clahe=0.3), 20_000)
    weights = params.clahe_weight[params.clahe_weight > 0].numpy()
    assert len(weights) / 20_000 == pytest.approx(0.3, abs=0.015)
    assert stats.kstest(weights, stats.uniform(0, 1).cdf).pvalue > 0.01
    assert stats.kstest(params.clip_limit.numpy(), stats.uniform(1, 3).cdf).pvalue > 0.01


def test_gamma_is_the_exponent() -> None:
    images, gamma = draw(3), torch.tensor([0.5, 1.0, 2.0])
    changed = augment_images(images, unchanged(3, gamma=gamma))
    assert torch.allclose(changed, scale(images) ** gamma.view(3, 1, 1, 1), atol=1e-6)
    drawn = sample(only(gamma=0.4), 4000).gamma.log().numpy()
    assert stats.kstest(drawn, stats.uniform(-0.4, 0.8).cdf).pvalue > 0.01


def test_gain_is_a_factor_that_saturates() -> None:
    images, gain = draw(3), torch.tensor([0.5, 1.0, 2.0])
    changed = augment_images(images, unchanged(3, gain=gain))
    expected = (scale(images) * gain.view(3, 1, 1, 1)).clamp(max=1)
    assert torch.allclose(changed, expected, atol=1e-6)
    drawn = sample(only(gain=0.3), 4000).gain.log().numpy()
    assert stats.kstest(drawn, stats.uniform(-0.3, 0.6).cdf).pvalue > 0.01


def test_bias_field_is_a_linear_factor_along_both_axes() -> None:
    images = torch.full((2, 100, 100), 102, dtype=torch.uint8)  # 0.4
    field = augment_images(images, unchanged(2, bias=torch.tensor([[0.2, 0.0], [-0.1, 0.3]])))[:, 0]
    rows = torch.linspace(-0.99, 0.99, 100)
    assert torch.allclose(field[0], 0.4 * (1 + 0.2 * rows).expand(100, 100), atol=1e-6)
    expected = 0.4 * (1 - 0.1 * rows + 0.3 * rows[:, None])
    assert torch.allclose(field[1], expected, atol=1e-6)
    drawn = sample(only(bias_field=0.2), 4000).bias.flatten().numpy()
    assert stats.kstest(drawn, stats.uniform(-0.2, 0.4).cdf).pvalue > 0.01


def test_blur_equals_scipy_for_each_images_own_deviation() -> None:
    images, sigmas_px = draw(4, 48), (0.0, 0.6, 1.0, 2.0)
    blurred = augment_images(images, unchanged(4, blur=torch.tensor(sigmas_px) / 48))
    for image, result, sigma_px in zip(scale(images), blurred, sigmas_px, strict=True):
        radius = math.floor(3 * sigma_px)
        expected = ndimage.gaussian_filter(
            image[0].numpy(), sigma_px, mode="nearest", radius=radius
        )
        assert np.abs(result[0].numpy() - expected).max() < 1e-5
    drawn = sample(only(blur=0.02), 4000).blur.numpy()
    assert stats.kstest(drawn, stats.uniform(0, 0.02).cdf).pvalue > 0.01


@pytest.mark.parametrize("grey", [0, 128])
def test_noise_is_rician(grey: int) -> None:
    images = torch.full((2, 128, 128), grey, dtype=torch.uint8)
    params = unchanged(2, noise=torch.tensor([0.1, 0.0]), noise_key=torch.tensor([3, 4]))
    noisy, clean = augment_images(images, params)[:, 0].numpy()
    assert (clean == np.float32(grey / 255)).all()
    rician = stats.rice(grey / 255 / 0.1, scale=0.1)
    assert stats.kstest(noisy.ravel(), rician.cdf).pvalue > 0.01
    for axis in (0, 1):  # the noise of neighbours is independent
        assert abs(np.corrcoef(noisy.ravel(), np.roll(noisy, 1, axis).ravel())[0, 1]) < 0.03


def test_each_image_and_epoch_has_its_own_noise() -> None:
    images = torch.full((3, 64, 64), 128, dtype=torch.uint8)
    noise = [
        augment_images(images, sample_params(only(noise=0.1), np.arange(3), seed=0, epoch=epoch))
        for epoch in (0, 1)
    ]
    correlation = np.corrcoef(torch.cat(noise).flatten(1).numpy())
    assert np.abs(correlation - np.eye(6)).max() < 0.07
    drawn = sample(only(noise=0.04), 4000).noise.numpy()
    assert stats.kstest(drawn, stats.uniform(0, 0.04).cdf).pvalue > 0.01


@pytest.mark.parametrize("name", ["blur", "noise"])
def test_blur_and_noise_have_probabilities(name: str) -> None:
    params = sample(only(**{name: 0.04, f"{name}_probability": 0.3}), 5000)
    assert (getattr(params, name) > 0).float().mean() == pytest.approx(0.3, abs=0.03)


def test_only_images_chosen_by_grey_probability_change_their_grey_values() -> None:
    augmentation = replace(EVERYTHING, grey_probability=0.4, rotation_deg=0.0, stretch=0.0)
    params = sample(replace(augmentation, flip_vertical=0.0, zoom=0.0, shift=0.0), 2000)
    is_grey = params.gamma != 1
    assert is_grey.float().mean() == pytest.approx(0.4, abs=0.04)
    for name in ("clahe_weight", "blur", "noise"):
        assert torch.equal(getattr(params, name) > 0, is_grey)
    assert torch.equal(params.gain != 1, is_grey)
    assert torch.equal((params.bias != 0).all(1), is_grey)


# ------------------------------------------------------------------------------------------- ranges

LIMITS = {
    "rotation_deg": 180,
    "shift": 0.5,
    "gamma": 2,
    "bias_field": 0.5,
    "gain": 2,
    "blur": 0.05,
}


@pytest.mark.parametrize("name", [field.name for field in fields(Augmentation)])
def test_a_value_out_of_range_is_an_error_that_names_the_field(name: str) -> None:
    limit = LIMITS.get(name, 1)
    assert getattr(only(**{name: limit}), name) == limit
    for value in (-0.01, limit * 1.01, math.nan):
        with pytest.raises(ConfigError) as caught:
            only(**{name: value})
        assert str(caught.value) == (f"augmentation.{name} must be in [0, {limit:g}], got {value}.")


@pytest.mark.parametrize("side", [32, 64])
def test_augmented_images_are_in_range(side: int) -> None:
    strong = Augmentation(
        **{field.name: LIMITS.get(field.name, 1) for field in fields(Augmentation)}
    )
    augmented = augment_images(draw(16, side), sample(strong, 16))
    assert augmented.shape == (16, 1, side, side)
    assert augmented.dtype == torch.float32
    assert augmented.min() >= 0
    assert augmented.max() <= 1
