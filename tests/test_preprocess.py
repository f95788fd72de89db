"""From samples to network input: head crop, percentiles, resampling, padding, normalisation."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from torch.nn import functional as F

from brainray.errors import ConfigError, RejectedImage
from brainray.images.preprocess import (
    IMAGENET_GREY_MEAN,
    IMAGENET_GREY_STD,
    Preprocessing,
    open_samples,
    preprocess_image,
)
from brainray.model.network import normalise_images
from brainray.phantoms import draw_phantom
from tests.open_scans import load_image

ROBUST = Preprocessing(size_px=160, crop="head", intensity="percentile", fit="pad")
STORED = Preprocessing(size_px=160, crop="head", fit="pad")


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
def test_stretch_equals_pillow_exactly_and_torch_within_one_grey_level(
    height: int, width: int, side: int, seed: int
) -> None:
    pixels = draw(height, width, seed)
    resized = preprocess_image(pixels, Preprocessing(size_px=side))
    assert resized.dtype == np.uint8
    assert resized.shape == (side, side)
    pillow = Image.fromarray(pixels).resize((side, side), Image.Resampling.BILINEAR)
    assert np.array_equal(resized, np.asarray(pillow))
    # torch has weights of 16 bits and Pillow of 32, so they can round differently
    assert np.abs(resized.astype(int) - resize_by_torch(pixels, side)).max() <= 1


def test_reduction_is_antialiased() -> None:
    fine = np.tile(np.array([[0, 255], [255, 0]], np.uint8), (128, 128))
    resized = preprocess_image(fine, Preprocessing(size_px=32))
    assert np.abs(resized[1:-1, 1:-1].astype(int) - 127).max() <= 2


def test_the_memory_layout_of_the_pixels_does_not_matter() -> None:
    pixels = draw(90, 70)
    for view in (pixels[::-1, ::2], pixels.T, np.asfortranarray(pixels)):
        expected = preprocess_image(np.ascontiguousarray(view), Preprocessing(size_px=48))
        assert np.array_equal(preprocess_image(view, Preprocessing(size_px=48)), expected)


@pytest.mark.parametrize("fit", ["stretch", "pad"])
def test_an_image_of_the_target_size_is_unchanged(fit: str) -> None:
    pixels = draw(64, 64)
    preprocessing = Preprocessing(size_px=64, fit=fit)  # type: ignore[arg-type]
    assert np.array_equal(preprocess_image(pixels, preprocessing), pixels)


@pytest.mark.parametrize("shape", [(120, 60), (60, 120), (200, 150), (33, 90)])
def test_pad_keeps_the_aspect_ratio_and_centres_the_image(shape: tuple[int, int]) -> None:
    y, x = np.indices(shape) - (np.array(shape)[:, None, None] - 1) / 2
    disc = (np.hypot(y, x) < 0.45 * min(shape)).astype(np.uint8) * 255
    padded = preprocess_image(disc, Preprocessing(size_px=96, fit="pad"))
    rows, columns = (np.flatnonzero((padded > 127).any(axis=axis)) for axis in (1, 0))
    assert abs(len(rows) - len(columns)) <= 1
    assert len(rows) == pytest.approx(0.9 * min(shape) * 96 / max(shape), abs=2)
    for inside in (rows, columns):
        assert inside.mean() == pytest.approx(47.5, abs=1)
    stretched = preprocess_image(disc, Preprocessing(size_px=96)) > 127
    assert abs(int(stretched.any(axis=0).sum()) - int(stretched.any(axis=1).sum())) > 10


def test_pad_adds_black_borders_and_crops_nothing() -> None:
    padded = preprocess_image(
        np.full((50, 100), 200, np.uint8), Preprocessing(size_px=64, fit="pad")
    )
    assert not padded[:16].any()
    assert not padded[48:].any()
    assert (padded[16:48] == 200).all()


@given(height=st.integers(1, 300), width=st.integers(1, 300), side=st.integers(32, 128))
def test_pad_fills_the_longer_side(height: int, width: int, side: int) -> None:
    pixels = np.full((height, width), 255, np.uint8)
    padded = preprocess_image(pixels, Preprocessing(size_px=side, fit="pad"))
    rows, columns = int(padded.any(axis=1).sum()), int(padded.any(axis=0).sum())
    assert max(rows, columns) == side
    expected = min(height, width) * side / max(height, width)
    assert min(rows, columns) == pytest.approx(max(1, expected), abs=0.51)
    assert set(np.unique(padded)) <= {0, 255}


@pytest.mark.parametrize("fit", ["stretch", "pad"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2000), (2000, 1), (3, 700)])
def test_extreme_shapes_keep_their_grey(fit: str, shape: tuple[int, int]) -> None:
    preprocessing = Preprocessing(size_px=32, fit=fit)  # type: ignore[arg-type]
    resized = preprocess_image(np.full(shape, 99, np.uint8), preprocessing)
    assert resized.shape == (32, 32)
    assert set(np.unique(resized)) <= ({99} if fit == "stretch" else {0, 99})
    assert (resized == 99).any()


def test_load_image_decodes_then_resizes() -> None:
    pixels, buffer = draw(80, 50), io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    loaded = load_image(buffer.getvalue(), Preprocessing(size_px=40, fit="pad"))
    assert np.array_equal(loaded, preprocess_image(pixels, Preprocessing(size_px=40, fit="pad")))
    with pytest.raises(RejectedImage):
        load_image(b"not an image", Preprocessing())


def test_normalise_subtracts_the_mean_and_divides_by_the_deviation() -> None:
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


def test_sizes_at_the_limits_are_accepted() -> None:
    assert [Preprocessing(size_px=side).size_px for side in (32, 1024)] == [32, 1024]


@pytest.mark.parametrize("std", [0.0, -0.2, float("nan")])
def test_deviation_must_be_positive(std: float) -> None:
    with pytest.raises(ConfigError, match="std must be positive"):
        Preprocessing(std=std)


@pytest.mark.parametrize("name", ["crop", "intensity", "fit"])
def test_unknown_choices_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be .* or .*, got 'squeeze'"):
        Preprocessing(**{name: "squeeze"})  # type: ignore[arg-type]


# ---- the head ------------------------------------------------------------------------------------

Scan = NDArray[np.uint8]
FRAME = (400, 520)
"""Height and width of the scans below; the heads in them are 160 to 320 px large."""


def draw_scan(seed: int, corner: tuple[int, int] = (60, 150)) -> Scan:
    """Draw a head somewhere in a wide black frame."""
    scan = np.zeros(FRAME, np.uint8)
    head = draw_phantom("glioma", np.random.default_rng(seed), plane="axial")
    scan[corner[0] : corner[0] + head.shape[0], corner[1] : corner[1] + head.shape[1]] = head
    return scan


def find_edges(scan: Scan) -> NDArray[np.float64]:
    """Return left, top, right and bottom of the largest bright object in a scan without noise."""
    labels, _ = ndimage.label(ndimage.median_filter(scan, 5) > 20)
    largest = np.bincount(labels.ravel())[1:].argmax() + 1
    rows, columns = ndimage.find_objects((labels == largest).astype(int))[0]
    return np.array([columns.start, rows.start, columns.stop, rows.stop], float)


def find_box(scan: NDArray[Any], preprocessing: Preprocessing = ROBUST) -> NDArray[np.float64]:
    box = open_samples(scan, preprocessing).frame.source
    return np.array([box.left, box.top, box.left + box.width, box.top + box.height], float)


def rotate(scan: Scan) -> Scan:
    turned: Scan = ndimage.rotate(scan, 24, reshape=False, order=1)
    return turned


def add_noise(scan: Scan) -> Scan:
    """Add Rician noise of 3 % of white, which fills the air too."""
    noise = np.random.default_rng(3).normal(0, 8, (2, *scan.shape))
    return np.hypot(scan + noise[0], noise[1]).clip(0, 255).astype(np.uint8)


def strip_skull(scan: Scan) -> Scan:
    """Keep the inner part of the head, in two halves with a gap between them."""
    left, top, right, bottom = find_edges(scan)
    y, x = np.indices(scan.shape)
    down, across = (y - (top + bottom) / 2) / (bottom - top), (x - (left + right) / 2)
    inside = np.hypot(down, across / (right - left)) < 0.37
    return np.where(inside & (np.abs(across) > 5), np.maximum(scan, 40), 0).astype(np.uint8)


def write_text(scan: Scan) -> Scan:
    """Burn in white annotations, 8 px high, near two corners."""
    marked = scan.copy()
    for left in range(0, 60, 6):
        marked[5:13, 5 + left : 9 + left] = 255
        marked[-13:-5, -70 + left : -66 + left] = 255
    return marked


CHANGES: dict[str, Callable[[Scan], Scan]] = {
    "as drawn": lambda scan: scan,
    "rotated": rotate,
    "dim": lambda scan: (scan // 8).astype(np.uint8),
    "noisy": add_noise,
    "skull-stripped": strip_skull,
    "annotated": write_text,
    "one bright pixel": lambda scan: np.where(np.arange(scan.size).reshape(scan.shape), scan, 255),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("seed", range(4))
def test_the_box_contains_the_head_with_a_small_margin(seed: int, change: str) -> None:
    scan = CHANGES[change](draw_scan(seed))
    edges = find_edges(rotate(draw_scan(seed)) if change == "rotated" else draw_scan(seed))
    if change == "skull-stripped":
        rows, columns = ndimage.find_objects((scan > 0).astype(int))[0]
        edges = np.array([columns.start, rows.start, columns.stop, rows.stop], float)
    outwards = (find_box(scan) - edges) * (-1, -1, 1, 1)
    sides = np.tile(edges[2:] - edges[:2], 2)
    assert (outwards >= -3).all(), "the box cuts off the head"  # blur and reduction
    assert (outwards <= 0.04 * sides + 8).all(), "the box is too large"


NOT_A_HEAD: dict[str, NDArray[Any]] = {
    "empty": np.zeros((90, 140), np.uint8),
    "white": np.full((90, 140), 255, np.uint8),
    "grey": np.full((90, 140), 1000, np.uint16),
    "noise": draw(300, 200),
    "text": write_text(np.zeros(FRAME, np.uint8)),
    "filled": draw(90, 140) // 4 + 150,
}


@pytest.mark.parametrize("name", NOT_A_HEAD)
def test_a_scan_without_a_head_or_filled_by_one_is_not_cropped(name: str) -> None:
    scan = NOT_A_HEAD[name]
    height, width = scan.shape
    assert find_box(scan).tolist() == [0, 0, width, height]


@pytest.mark.parametrize("level", [0, 1, 255])
def test_a_constant_scan_becomes_black_with_percentile_intensity(level: int) -> None:
    assert not preprocess_image(np.full((50, 70), level, np.uint8), ROBUST).any()


def test_two_grey_levels_become_black_and_white() -> None:
    scan = np.zeros((100, 100), np.uint8)
    scan[30:70, 20:80] = 17
    image = preprocess_image(scan, Preprocessing(size_px=100, intensity="percentile"))
    np.testing.assert_array_equal(image, np.where(scan, 255, 0))


# ---- intensity -----------------------------------------------------------------------------------


def test_percentiles_are_of_the_pixels_in_the_box_that_are_not_air() -> None:
    rng = np.random.default_rng(0)
    scan = np.zeros((256, 256), np.uint16)
    scan[40:200, 60:180] = rng.normal(2000, 250, (160, 120)).clip(600, 4000)
    low, high = np.percentile(scan[40:200, 60:180], [1, 99])
    expected = np.clip((scan - low) / (high - low), 0, 1) * 255
    for preprocessing in (ROBUST, Preprocessing(intensity="percentile")):
        opened = open_samples(scan, preprocessing)
        source, target = opened.frame.source, opened.frame.target
        assert (source.width < 256) == (preprocessing.crop == "head")
        cut = Image.fromarray(source.cut(expected)).resize((target.width, target.height), 2)
        image = target.cut(opened.image)
        assert np.abs(image - np.asarray(cut)).max() < 2  # two roundings, and one of the range


def export_12_bit(scan: Scan, file_format: str) -> bytes:
    """Write a scan as 12-bit data in a 16-bit file: white is 4095 of 65535."""
    buffer = io.BytesIO()
    Image.fromarray(np.rint(scan / 255 * 4095).astype(np.uint16)).save(buffer, file_format)
    return buffer.getvalue()


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
@pytest.mark.parametrize("seed", range(3))
def test_a_12_bit_export_gives_the_same_input_as_its_8_bit_copy(
    seed: int, file_format: str
) -> None:
    scan = draw_scan(seed)
    copy = preprocess_image(scan, ROBUST).astype(int)
    image = load_image(export_12_bit(scan, file_format), ROBUST)
    difference = np.abs(image - copy)
    assert difference.max() <= 2
    assert difference.mean() < 0.5
    stored = load_image(export_12_bit(scan, file_format), STORED)
    assert stored.max() <= 16, "scaled by the 16-bit range, it is nearly black"


def test_a_dim_export_keeps_its_bit_depth() -> None:
    """Only 256 of 4096 levels are used. Rounding to 8 bits first would leave one grey level."""
    ramp = np.tile(np.linspace(40, 295, 256).astype(np.uint16), (256, 1))
    image = preprocess_image(ramp, Preprocessing(size_px=256, intensity="percentile"))
    assert len(np.unique(image)) > 200


SAME_HEAD: dict[str, Callable[[Scan], NDArray[Any]]] = {
    "half the gain": lambda scan: np.rint(scan / 2).astype(np.uint8),
    "a frame a fifth larger": lambda scan: np.pad(scan, [(side // 10,) * 2 for side in scan.shape]),
    "another place": lambda scan: np.roll(scan, (-40, 60), (0, 1)),
    "a hot pixel": lambda scan: np.where(
        np.arange(scan.size).reshape(scan.shape), scan.astype(np.uint16) * 16, 65535
    ).astype(np.uint16),
    "another offset": lambda scan: scan.astype(np.int16) * 8 - 1024,
    "floats": lambda scan: scan.astype(np.float32) / 7,
    "floats that are missing in the air": lambda scan: np.where(
        np.arange(scan.size).reshape(scan.shape) < 99, np.nan, scan.astype(np.float64)
    ),
    "another byte order": lambda scan: scan.astype(">u2"),
    "columns first in memory": np.asfortranarray,
}


@pytest.mark.parametrize("change", SAME_HEAD)
@pytest.mark.parametrize("seed", range(3))
def test_the_same_head_gives_the_same_network_input(seed: int, change: str) -> None:
    scan = draw_scan(seed)
    expected = preprocess_image(scan, ROBUST).astype(int)
    difference = np.abs(preprocess_image(SAME_HEAD[change](scan), ROBUST) - expected)
    assert difference.mean() < 1.5


@pytest.mark.parametrize("seed", range(3))
def test_a_border_around_a_tight_frame_does_not_change_the_input(seed: int) -> None:
    tight = draw_phantom("pituitary", np.random.default_rng(seed))
    expected = preprocess_image(tight, ROBUST).astype(int)
    padded = preprocess_image(np.pad(tight, ((9, 0), (5, 17))), ROBUST)
    assert np.abs(padded - expected).mean() < 1.5


@pytest.mark.parametrize("border", [30, 100, 333])
def test_the_box_does_not_depend_on_the_width_of_the_border(border: int) -> None:
    scan = draw_scan(0)
    expected, found = find_box(scan), find_box(np.pad(scan, border)) - border
    # With the widest border, the head is reduced to 36 px for the search, and the blur is 5 px.
    assert (np.abs(found - expected) < 0.06 * (expected[2:] - expected[:2]).max()).all()


@pytest.mark.parametrize("fit", ["pad", "stretch"])
@pytest.mark.parametrize("factor", [1, 2, 4])
def test_the_frame_maps_the_network_input_to_pixels_of_the_scan(fit: str, factor: int) -> None:
    scan = np.zeros((130 * factor + 1, 230 * factor + 3), np.uint8)
    scan[20 * factor : 110 * factor, 30 * factor : 90 * factor] = 60
    scan[80 * factor : 84 * factor, 70 * factor : 74 * factor] = 250
    preprocessing = Preprocessing(size_px=128, crop="head", fit=fit)  # type: ignore[arg-type]
    opened = open_samples(scan, preprocessing)
    source, target = opened.frame.source, opened.frame.target
    assert opened.frame.shape == scan.shape
    assert source.width < scan.shape[1] / 2
    bright = np.argwhere(opened.image > 150)
    row, column = bright.mean(0) + 0.5
    assert (row - target.top) / target.height * source.height + source.top == pytest.approx(
        82 * factor, abs=0.7 * factor
    )
    assert (column - target.left) / target.width * source.width + source.left == pytest.approx(
        72 * factor, abs=0.7 * factor
    )


DTYPES = ["?", "u1", "<u2", ">u2", "i1", "<i2", ">i4", "<u4", "<i8", "<f2", "<f4", ">f8"]


@given(
    samples=st.sampled_from(DTYPES).flatmap(
        lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40))
    ),
    crop=st.sampled_from(["none", "head"]),
    intensity=st.sampled_from(["stored", "percentile"]),
    fit=st.sampled_from(["stretch", "pad"]),
)
def test_any_samples_give_a_square(samples: NDArray[Any], **chosen: Any) -> None:  # noqa: ANN401
    opened = open_samples(samples, Preprocessing(size_px=48, **chosen))
    assert opened.image.dtype == np.uint8
    assert opened.image.shape == (48, 48)
    source = opened.frame.source
    assert source.left >= 0
    assert source.top >= 0
    assert 1 <= source.width <= samples.shape[1] - source.left
    assert 1 <= source.height <= samples.shape[0] - source.top


@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    seed=st.integers(0, 9),
    depth=st.sampled_from([np.uint8, np.uint16]),
)
def test_any_shape_gives_a_square(
    height: int, width: int, seed: int, depth: type[np.uint8 | np.uint16]
) -> None:
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, np.iinfo(depth).max, (-(-height // 32), -(-width // 32)), depth)
    scan = np.kron(blocks, np.ones((32, 32), depth))[:height, :width]
    image = preprocess_image(scan, ROBUST)
    assert (image.dtype, image.shape) == (np.uint8, (160, 160))


@pytest.mark.parametrize(
    "samples", [np.zeros((4, 4, 3)), np.zeros((0, 5)), np.zeros((3, 3), complex), np.zeros(9)]
)
def test_samples_that_are_not_a_grey_image_are_refused(samples: NDArray[Any]) -> None:
    with pytest.raises(ValueError, match=r"Expected real samples of shape \(height, width\)"):
        preprocess_image(samples, ROBUST)
