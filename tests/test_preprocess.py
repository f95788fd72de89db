"""From pixels to network input: Pillow's and torch's resampling, padding, normalisation."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F

from brainray.errors import ConfigError, RejectedImage
from brainray.images.decode import DecodeLimits
from brainray.images.normalise import normalise_images
from brainray.images.preprocess import (
    IMAGENET_GREY_MEAN,
    IMAGENET_GREY_STD,
    Preprocessing,
    load_image,
    resize_image,
)


def draw(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)


def resize_by_torch(pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    image = torch.from_numpy(pixels.copy())[None, None]
    resized: NDArray[np.uint8] = F.interpolate(
        image, (side, side), mode="bilinear", antialias=True, align_corners=False
    )[0, 0].numpy()
    return resized


@given(
    height=st.integers(1, 400),
    width=st.integers(1, 400),
    side=st.integers(32, 256),
    seed=st.integers(0, 99),
)
def test_stretch_equals_pillow_and_within_a_grey_level_torch(
    height: int, width: int, side: int, seed: int
) -> None:
    pixels = draw(height, width, seed)
    resized = resize_image(pixels, Preprocessing(size_px=side))
    assert resized.dtype == np.uint8
    assert resized.shape == (side, side)
    pillow = Image.fromarray(pixels).resize((side, side), Image.Resampling.BILINEAR)
    assert np.array_equal(resized, np.asarray(pillow))
    # torch keeps its weights in 16 bits, Pillow in 32: a rounding may fall the other way
    assert np.abs(resized.astype(int) - resize_by_torch(pixels, side)).max() <= 1


def test_reduction_is_antialiased() -> None:
    fine = np.tile(np.array([[0, 255], [255, 0]], np.uint8), (128, 128))
    resized = resize_image(fine, Preprocessing(size_px=32))
    assert np.abs(resized[1:-1, 1:-1].astype(int) - 127).max() <= 2


def test_pixels_in_any_memory_layout() -> None:
    pixels = draw(90, 70)
    for view in (pixels[::-1, ::2], pixels.T, np.asfortranarray(pixels)):
        expected = resize_image(np.ascontiguousarray(view), Preprocessing(size_px=48))
        assert np.array_equal(resize_image(view, Preprocessing(size_px=48)), expected)


@pytest.mark.parametrize("fit", ["stretch", "pad"])
def test_already_that_size_is_left_alone(fit: str) -> None:
    pixels = draw(64, 64)
    preprocessing = Preprocessing(size_px=64, fit=fit)  # type: ignore[arg-type]
    assert np.array_equal(resize_image(pixels, preprocessing), pixels)


@pytest.mark.parametrize("shape", [(120, 60), (60, 120), (200, 150), (33, 90)])
def test_pad_keeps_a_circle_a_circle_and_centres_it(shape: tuple[int, int]) -> None:
    y, x = np.indices(shape) - (np.array(shape)[:, None, None] - 1) / 2
    disc = (np.hypot(y, x) < 0.45 * min(shape)).astype(np.uint8) * 255
    padded = resize_image(disc, Preprocessing(size_px=96, fit="pad"))
    rows, columns = (np.flatnonzero((padded > 127).any(axis=axis)) for axis in (1, 0))
    assert abs(len(rows) - len(columns)) <= 1
    assert len(rows) == pytest.approx(0.9 * min(shape) * 96 / max(shape), abs=2)
    for inside in (rows, columns):
        assert inside.mean() == pytest.approx(47.5, abs=1)
    stretched = resize_image(disc, Preprocessing(size_px=96)) > 127
    assert abs(int(stretched.any(axis=0).sum()) - int(stretched.any(axis=1).sum())) > 10


def test_pad_is_black_and_loses_nothing() -> None:
    padded = resize_image(np.full((50, 100), 200, np.uint8), Preprocessing(size_px=64, fit="pad"))
    assert not padded[:16].any()
    assert not padded[48:].any()
    assert (padded[16:48] == 200).all()


@given(height=st.integers(1, 300), width=st.integers(1, 300), side=st.integers(32, 128))
def test_pad_fills_the_longer_side(height: int, width: int, side: int) -> None:
    pixels = np.full((height, width), 255, np.uint8)
    padded = resize_image(pixels, Preprocessing(size_px=side, fit="pad"))
    rows, columns = int(padded.any(axis=1).sum()), int(padded.any(axis=0).sum())
    assert max(rows, columns) == side
    expected = min(height, width) * side / max(height, width)
    assert min(rows, columns) == pytest.approx(max(1, expected), abs=0.51)
    assert set(np.unique(padded)) <= {0, 255}


@pytest.mark.parametrize("fit", ["stretch", "pad"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2000), (2000, 1), (3, 700)])
def test_extreme_shapes_keep_their_grey(fit: str, shape: tuple[int, int]) -> None:
    preprocessing = Preprocessing(size_px=32, fit=fit)  # type: ignore[arg-type]
    resized = resize_image(np.full(shape, 99, np.uint8), preprocessing)
    assert resized.shape == (32, 32)
    assert set(np.unique(resized)) <= ({99} if fit == "stretch" else {0, 99})
    assert (resized == 99).any()


def test_load_image_decodes_then_resizes() -> None:
    pixels, buffer = draw(80, 50), io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    loaded = load_image(buffer.getvalue(), Preprocessing(size_px=40, fit="pad"), DecodeLimits())
    assert np.array_equal(loaded, resize_image(pixels, Preprocessing(size_px=40, fit="pad")))
    with pytest.raises(RejectedImage):
        load_image(b"not an image", Preprocessing(), DecodeLimits())


def test_normalise_is_the_formula() -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(2, 8, 16)
    before = images.clone()
    normal = normalise_images(images, Preprocessing(mean=0.25, std=0.5))
    assert (normal.dtype, tuple(normal.shape)) == (torch.float32, (2, 1, 8, 16))
    expected = (images.double().unsqueeze(1) / 255 - 0.25) / 0.5
    assert (normal - expected).abs().max() < 1e-6
    assert torch.equal(images, before)


def test_default_normalisation_is_imagenets_grey() -> None:
    assert pytest.approx(np.mean([0.485, 0.456, 0.406]), abs=5e-4) == IMAGENET_GREY_MEAN
    assert pytest.approx(np.mean([0.229, 0.224, 0.225]), abs=5e-4) == IMAGENET_GREY_STD
    ends = normalise_images(torch.tensor([[[0, 255]]], dtype=torch.uint8), Preprocessing())
    assert ends.flatten().tolist() == pytest.approx([-0.449 / 0.226, 0.551 / 0.226], rel=1e-5)


@pytest.mark.parametrize("size_px", [31, 0, -1, 1025])
def test_sizes_out_of_range_are_refused(size_px: int) -> None:
    with pytest.raises(ConfigError, match=rf"size_px must be in \[32, 1024\], got {size_px}\."):
        Preprocessing(size_px=size_px)


def test_sizes_at_the_borders_are_taken() -> None:
    assert [Preprocessing(size_px=side).size_px for side in (32, 1024)] == [32, 1024]


@pytest.mark.parametrize("std", [0.0, -0.2, float("nan")])
def test_deviation_must_be_positive(std: float) -> None:
    with pytest.raises(ConfigError, match="std must be positive"):
        Preprocessing(std=std)
