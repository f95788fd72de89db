"""Heatmaps: colour scale, transparency without evidence, and alignment with the scan."""

import io

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from brainray.images import heatmap
from brainray.images.heatmap import SHOWN_PX, render_map, render_overlay, render_picture
from brainray.images.preprocess import Box, Frame, Preprocessing, open_samples

STRETCH, PAD = Preprocessing(size_px=96), Preprocessing(size_px=96, fit="pad")
STRIDE = 32


def make_frame(shape: tuple[int, int], preprocessing: Preprocessing = STRETCH) -> Frame:
    return open_samples(np.zeros(shape, np.uint8), preprocessing).frame


def read_png(content: bytes) -> tuple[str, NDArray[np.uint8]]:
    image = Image.open(io.BytesIO(content))
    assert image.format == "PNG"
    return image.mode, np.asarray(image)


def make_map(row: int, column: int, value: float = 5.0, cells: int = 3) -> NDArray[np.float32]:
    class_map = np.full((cells, cells), -1, np.float32)
    class_map[row, column] = value
    return class_map


def test_the_maximum_has_the_strongest_colour_at_any_scale() -> None:
    weak, strong = (
        read_png(render_map(make_map(1, 1, value), make_frame((96, 96)), STRIDE))[1]
        for value in (1e-3, 50)
    )
    assert weak[..., 3].max() == strong[..., 3].max() >= 254
    assert (np.argwhere(strong[..., 3] == strong[..., 3].max()).mean(0) == (32, 32)).all()
    assert tuple(strong[32, 32, :3]) == (0xFC, 0xFF, 0xA4)


@pytest.mark.parametrize("value", [0.0, -1.0, -1e6])
def test_a_map_without_evidence_is_transparent(value: float) -> None:
    nothing = np.full((3, 3), value, np.float32)
    mode, picture = read_png(render_map(nothing, make_frame((40, 50)), STRIDE))
    assert (mode, picture.shape) == ("RGBA", (40, 50, 4))
    assert not picture[..., 3].any()
    scan = np.arange(2000, dtype=np.uint8).reshape(40, 50)
    mode, overlay = read_png(render_overlay(nothing, scan, make_frame(scan.shape), STRIDE))
    assert mode == "RGB"
    np.testing.assert_array_equal(overlay, np.repeat(scan[..., None], 3, axis=2))


@pytest.mark.parametrize("shape", [(300, 200), (90, 160), (20, 30)])
def test_shown_px_limits_the_size_of_an_overlay(shape: tuple[int, int]) -> None:
    scan = np.full(shape, 90, np.uint8)
    class_map = make_map(1, 2)
    small = read_png(render_overlay(class_map, scan, make_frame(shape), STRIDE, shown_px=100))[1]
    assert max(small.shape) == min(100, max(shape))
    full = read_png(render_overlay(class_map, scan, make_frame(shape), STRIDE))[1]
    expected = Image.fromarray(full).resize(small.shape[1::-1], Image.Resampling.BOX)
    assert np.abs(small - np.asarray(expected, float)).max() < 16


def test_the_overlay_blends_the_map_over_the_scan() -> None:
    scan = np.random.default_rng(0).integers(0, 256, (60, 96), dtype=np.uint8)
    class_map = make_map(0, 2)
    layer = read_png(render_map(class_map, make_frame(scan.shape), STRIDE))[1].astype(float)
    overlay = read_png(render_overlay(class_map, scan, make_frame(scan.shape), STRIDE))[1]
    alpha = layer[..., 3:] / 255 * heatmap.OVERLAY_ALPHA
    expected = scan[..., None] * (1 - alpha) + layer[..., :3] * alpha
    assert np.abs(overlay - expected).max() <= 1
    assert (overlay[layer[..., 3] == 0] == scan[layer[..., 3] == 0][:, None]).all()


def test_the_lightness_of_the_colours_rises_evenly() -> None:
    linear = heatmap._COLOURS / 255
    linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
    luminance = linear @ (0.2126, 0.7152, 0.0722)
    lightness = 116 * np.cbrt(luminance) - 16  # CIE L*, above its linear part
    steps = np.diff(lightness)
    assert steps.min() > 0
    assert steps.max() < 2.5 * steps.mean()


def test_padding_is_removed_from_the_heatmap() -> None:
    """A wide scan fills the middle rows; evidence outside it is not shown."""
    scan = np.full((48, 96), 200, np.uint8)
    opened = open_samples(scan, PAD)
    assert opened.frame == Frame((48, 96), Box(0, 0, 96, 48), Box(0, 24, 96, 48))
    square = opened.image
    assert square[24:72].min() == 200
    assert not square[:24].any()
    layer = read_png(render_map(make_map(1, 2), make_frame(scan.shape, PAD), STRIDE))[1]
    assert layer.shape == (48, 96, 4)
    alpha = layer[..., 3].astype(int)
    # The cell is centred on pixel (32, 64) of the square: (8, 64) of the scan.
    assert np.unravel_index(alpha.argmax(), alpha.shape) == (8, 64)
    stretched = read_png(render_map(make_map(1, 2), make_frame(scan.shape), STRIDE))[1][..., 3]
    assert abs(int(stretched.argmax()) // 96 - 16) <= 1
    beside = read_png(render_map(make_map(0, 1), make_frame(scan.shape, PAD), STRIDE))[1][..., 3]
    assert beside.max() < 60, "the maximum in the padding is not shown in the scan"


def test_a_transposed_scan_has_the_transposed_heatmap() -> None:
    class_map = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)
    for preprocessing in (STRETCH, PAD):
        wide = read_png(render_map(class_map, make_frame((50, 90), preprocessing), STRIDE))[1]
        tall = read_png(render_map(class_map.T, make_frame((90, 50), preprocessing), STRIDE))[1]
        np.testing.assert_array_equal(tall, wide.transpose(1, 0, 2))


def test_large_scans_are_reduced_and_small_scans_keep_their_size() -> None:
    class_map = make_map(1, 1)
    shown = {(2048, 1024): (SHOWN_PX, 512), (1, 5000): (1, SHOWN_PX), (7, 5): (7, 5)}
    for shape, expected in shown.items():
        picture = read_png(render_map(class_map, make_frame(shape, PAD), STRIDE))[1]
        assert picture.shape == (*expected, 4)
    large = np.zeros((1024, 3000), np.uint8)
    overlay = read_png(render_overlay(class_map, large, make_frame(large.shape, PAD), STRIDE))[1]
    assert overlay.shape == (350, SHOWN_PX, 3)


def test_a_map_of_one_cell_is_uniform() -> None:
    layer = read_png(
        render_map(np.ones((1, 1), np.float32), make_frame((9, 9), Preprocessing(size_px=32)), 32)
    )[1]
    assert (layer[..., 3] == 255).all()


@pytest.mark.parametrize("fit", ["pad", "stretch"])
@pytest.mark.parametrize("crop", ["head", "none"])
@pytest.mark.parametrize("shape", [(300, 300), (240, 480), (481, 260), (700, 1500)])
def test_evidence_is_drawn_over_the_pixels_it_came_from(
    shape: tuple[int, int], crop: str, fit: str
) -> None:
    preprocessing = Preprocessing(size_px=224, crop=crop, fit=fit)  # type: ignore[arg-type]
    height, width = shape
    rows, columns = np.mgrid[:height, :width]
    # A grey head in the upper left of its frame, with a bright spot in its lower right.
    radius = 0.4 * min(shape)
    head = np.hypot(rows - 0.45 * height, columns - 0.42 * width) < radius
    y, x = 0.45 * height + 0.4 * radius, 0.42 * width + 0.3 * radius
    spotted = np.hypot(rows - y, columns - x) < 0.25 * radius
    scan = np.where(spotted, 250, np.where(head, 90, 0)).astype(np.uint8)
    opened = open_samples(scan, preprocessing)
    stride = 16
    # A network that finds evidence in bright pixels: cell i is centred on pixel i * stride.
    seen = np.pad((opened.image > 170).astype(np.float32), stride // 2)
    class_map = seen.reshape(15, stride, 15, stride).mean((1, 3))[:14, :14] - 0.05
    alpha = read_png(render_map(class_map, opened.frame, stride))[1][..., 3].astype(float)
    scale = alpha.shape[1] / width
    assert alpha.shape == tuple(round(side * scale) for side in shape)
    centre = [(alpha * np.indices(alpha.shape)[axis]).sum() / alpha.sum() for axis in (0, 1)]
    source, target = opened.frame.source, opened.frame.target
    cell = stride * np.array([source.height / target.height, source.width / target.width])
    assert (np.abs(np.array(centre) / scale - (y, x)) < cell / 3).all()
    _, overlay = read_png(render_overlay(class_map, scan, opened.frame, stride))
    hottest = np.unravel_index(
        (overlay[..., 0].astype(int) - overlay[..., 2]).argmax(), alpha.shape
    )
    assert np.hypot(hottest[0] / scale - y, hottest[1] / scale - x) < 0.25 * radius + max(cell)


def test_outside_the_crop_nothing_is_drawn() -> None:
    scan = np.zeros((200, 300), np.uint8)
    scan[40:120, 50:150] = 90
    opened = open_samples(scan, Preprocessing(size_px=96, crop="head", fit="pad"))
    box = opened.frame.source
    alpha = read_png(render_map(np.ones((3, 3), np.float32), opened.frame, STRIDE))[1][..., 3]
    expected = np.zeros(scan.shape, np.uint8)
    expected[box.top : box.top + box.height, box.left : box.left + box.width] = 255
    np.testing.assert_array_equal(alpha, expected)
    assert expected.mean() < 128


@pytest.mark.parametrize("render", ["picture", "overlay"])
def test_12_bit_data_in_a_16_bit_file_are_shown_bright(render: str) -> None:
    grey = np.tile(np.arange(0, 256, dtype=np.uint16), (200, 1))
    deep = (grey * 16).astype(np.uint16)
    if render == "picture":
        shown = read_png(render_picture(deep))[1]
        grey = np.asarray(Image.fromarray(grey.astype(np.uint8)).resize((224, 175)))
    else:
        nothing = np.zeros((3, 3), np.float32)
        shown = read_png(render_overlay(nothing, deep, make_frame(deep.shape), STRIDE))[1][..., 0]
    assert np.abs(shown - grey.astype(float)).max() < 8
