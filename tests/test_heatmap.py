"""Evidence as a picture: colours that rise, nothing where there is none, over the right pixels."""

import io

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from brainray.images import heatmap as room
from brainray.images.heatmap import SHOWN_PX, render_map, render_overlay
from brainray.images.preprocess import Preprocessing, find_frame, resize_image

STRETCH, PAD = Preprocessing(size_px=96), Preprocessing(size_px=96, fit="pad")
STRIDE = 32


def read(content: bytes) -> tuple[str, NDArray[np.uint8]]:
    image = Image.open(io.BytesIO(content))
    assert image.format == "PNG"
    return image.mode, np.asarray(image)


def spot(row: int, column: int, value: float = 5.0, cells: int = 3) -> NDArray[np.float32]:
    class_map = np.full((cells, cells), -1, np.float32)
    class_map[row, column] = value
    return class_map


def test_the_strongest_evidence_is_the_strongest_colour_whatever_its_size() -> None:
    weak, strong = (
        read(render_map(spot(1, 1, value), (96, 96), STRETCH, STRIDE))[1] for value in (1e-3, 50)
    )
    assert weak[..., 3].max() == strong[..., 3].max() >= 254
    assert (np.argwhere(strong[..., 3] == strong[..., 3].max()).mean(0) == (32, 32)).all()
    assert tuple(strong[32, 32, :3]) == (0xFC, 0xFF, 0xA4)


@pytest.mark.parametrize("value", [0.0, -1.0, -1e6])
def test_no_evidence_for_the_class_is_an_empty_picture(value: float) -> None:
    nothing = np.full((3, 3), value, np.float32)
    mode, picture = read(render_map(nothing, (40, 50), STRETCH, STRIDE))
    assert (mode, picture.shape) == ("RGBA", (40, 50, 4))
    assert not picture[..., 3].any()
    scan = np.arange(2000, dtype=np.uint8).reshape(40, 50)
    mode, overlay = read(render_overlay(nothing, scan, STRETCH, STRIDE))
    assert mode == "RGB"
    np.testing.assert_array_equal(overlay, np.repeat(scan[..., None], 3, axis=2))


@pytest.mark.parametrize("shape", [(300, 200), (90, 160), (20, 30)])
def test_an_overlay_among_many_is_small(shape: tuple[int, int]) -> None:
    scan = np.full(shape, 90, np.uint8)
    class_map = spot(1, 2)
    small = read(render_overlay(class_map, scan, STRETCH, STRIDE, shown_px=100))[1]
    assert max(small.shape) == min(100, max(shape))
    whole = read(render_overlay(class_map, scan, STRETCH, STRIDE))[1]
    expected = Image.fromarray(whole).resize(small.shape[1::-1], Image.Resampling.BOX)
    assert np.abs(small - np.asarray(expected, float)).max() < 16


def test_the_overlay_is_the_scan_with_its_share_of_the_map() -> None:
    scan = np.random.default_rng(0).integers(0, 256, (60, 96), dtype=np.uint8)
    class_map = spot(0, 2)
    layer = read(render_map(class_map, scan.shape, STRETCH, STRIDE))[1].astype(float)
    overlay = read(render_overlay(class_map, scan, STRETCH, STRIDE))[1]
    alpha = layer[..., 3:] / 255 * room.OVERLAY_ALPHA
    expected = scan[..., None] * (1 - alpha) + layer[..., :3] * alpha
    assert np.abs(overlay - expected).max() <= 1
    assert (overlay[layer[..., 3] == 0] == scan[layer[..., 3] == 0][:, None]).all()


def test_colours_rise_in_lightness_evenly() -> None:
    linear = room._COLOURS / 255
    linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
    luminance = linear @ (0.2126, 0.7152, 0.0722)
    lightness = 116 * np.cbrt(luminance) - 16  # CIE L*, above its linear part
    steps = np.diff(lightness)
    assert steps.min() > 0
    assert steps.max() < 2.5 * steps.mean()


def test_padding_is_taken_away_again() -> None:
    """A wide scan lies in the middle rows; evidence beside it is out of the picture."""
    frame = find_frame(48, 96, PAD)
    assert (frame.left, frame.top, frame.width, frame.height) == (0, 24, 96, 48)
    scan = np.full((48, 96), 200, np.uint8)
    square = resize_image(scan, PAD)
    assert square[24:72].min() == 200
    assert not square[:24].any()
    layer = read(render_map(spot(1, 2), scan.shape, PAD, STRIDE))[1]
    assert layer.shape == (48, 96, 4)
    alpha = layer[..., 3].astype(int)
    # The cell is centred on pixel (32, 64) of the square: (8, 64) of the scan.
    assert np.unravel_index(alpha.argmax(), alpha.shape) == (8, 64)
    stretched = read(render_map(spot(1, 2), scan.shape, STRETCH, STRIDE))[1][..., 3]
    assert abs(int(stretched.argmax()) // 96 - 16) <= 1
    beside = read(render_map(spot(0, 1), scan.shape, PAD, STRIDE))[1][..., 3]
    assert beside.max() < 60, "what is hottest in the padding is not shown as if in the scan"


def test_a_tall_scan_is_shown_as_the_same_scan_lying() -> None:
    class_map = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)
    for preprocessing in (STRETCH, PAD):
        lying = read(render_map(class_map, (50, 90), preprocessing, STRIDE))[1]
        tall = read(render_map(class_map.T, (90, 50), preprocessing, STRIDE))[1]
        np.testing.assert_array_equal(tall, lying.transpose(1, 0, 2))


def test_a_large_scan_is_shown_smaller_and_a_small_one_as_it_is() -> None:
    class_map = spot(1, 1)
    assert read(render_map(class_map, (2048, 1024), PAD, STRIDE))[1].shape == (SHOWN_PX, 512, 4)
    large = np.zeros((1024, 3000), np.uint8)
    assert read(render_overlay(class_map, large, PAD, STRIDE))[1].shape == (350, SHOWN_PX, 3)
    assert read(render_map(class_map, (1, 5000), PAD, STRIDE))[1].shape == (1, SHOWN_PX, 4)
    assert read(render_map(class_map, (7, 5), PAD, STRIDE))[1].shape == (7, 5, 4)


def test_one_cell_is_one_colour() -> None:
    layer = read(render_map(np.ones((1, 1), np.float32), (9, 9), Preprocessing(size_px=32), 32))[1]
    assert (layer[..., 3] == 255).all()
