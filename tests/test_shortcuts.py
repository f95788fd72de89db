"""Shortcuts: a planted one is found, noise is not, and folds split no group."""

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from PIL import Image

from brainray.data import shortcuts
from brainray.data.fingerprint import hash_pixels, measure_properties
from brainray.data.shortcuts import ALL_TOGETHER, build_properties, evaluate_shortcuts
from brainray.images.decode import DecodeLimits
from brainray.images.slices import open_file


def evaluate_by_property(
    properties: dict[str, NDArray[np.float64]], labels: NDArray[np.int64], groups: NDArray[np.int64]
) -> dict[str, dict[str, object]]:
    return {row["property"]: row for row in evaluate_shortcuts(properties, labels, groups)}


def test_a_planted_shortcut_is_found_and_noise_is_not() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(1200) % 4
    wide = np.where(rng.random(1200) < 0.9, labels == 2, rng.random(1200) < 0.25)
    properties = {
        "size": np.column_stack([np.where(wide, 512, 630.0), np.full(1200, 512.0)]),
        "noise": rng.normal(size=(1200, 1)),
        "constant": np.ones((1200, 1)),
    }
    rows = evaluate_by_property(properties, labels, np.arange(1200))
    assert list(rows) == ["size", "noise", "constant", ALL_TOGETHER]
    assert rows["size"]["balanced_accuracy"] == pytest.approx(0.47, abs=0.04)  # (1 + 0.9) / 4
    assert rows["size"]["is_above_chance"]
    assert not rows["noise"]["is_above_chance"]
    assert rows["constant"]["is_constant"]
    assert rows["constant"]["balanced_accuracy"] == 0.25
    assert rows[ALL_TOGETHER]["is_above_chance"]
    low, high = rows["size"]["balanced_accuracy_ci95"]  # type: ignore[misc]
    assert low < rows["size"]["balanced_accuracy"] < high


def test_a_property_of_the_group_is_not_a_shortcut() -> None:
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(60), 10)
    labels = rng.permutation(np.arange(60) % 4)[groups]
    patient = rng.normal(size=60)[groups][:, None]
    rows = evaluate_by_property({"patient": patient}, labels, groups)
    assert not rows["patient"]["is_above_chance"]
    alone = evaluate_by_property({"patient": patient}, labels, np.arange(600))
    assert alone["patient"]["is_above_chance"]  # the result if groups were split


def test_too_few_groups_give_no_result() -> None:
    labels = np.array([0, 0, 1, 1])
    properties = {"a": np.ones((4, 1))}
    assert evaluate_shortcuts(properties, labels, np.array([0, 0, 1, 2])) == []
    assert evaluate_shortcuts(properties, np.zeros(4, np.int64), np.arange(4)) == []


def test_large_data_sets_are_sampled_by_whole_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortcuts, "MAX_IMAGES", 100)
    groups = np.repeat(np.arange(50), 8)
    labels = groups % 2
    (row, _) = evaluate_shortcuts({"a": labels[:, None].astype(np.float64)}, labels, groups)
    assert row["n"] == 96
    assert row["balanced_accuracy"] == 1.0


# ------------------------------------------------------------------------------------------
# properties


def encode(pixels: NDArray[np.uint8], kind: str, mode: str) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(sink, kind)
    return sink.getvalue()


def measure(content: bytes) -> dict[str, Any]:
    file = open_file(content)
    return measure_properties(content, file, file.render(0)[0], DecodeLimits())


def test_properties_of_an_image() -> None:
    pixels = np.zeros((40, 80), np.uint8)
    pixels[2:-2, 2:-2] = 200
    pixels[:2, :] = 50
    properties = measure(encode(pixels, "PNG", "RGB"))
    assert (properties["width_px"], properties["height_px"]) == (80, 40)
    assert (properties["mode"], properties["format"]) == ("RGB", "PNG")
    assert properties["mean_grey"] == pytest.approx(pixels.mean())
    num_border = 40 * 80 - 36 * 76
    assert properties["border_grey"] == pytest.approx(50 * 160 / num_border)
    assert properties["border_dark_share"] == pytest.approx(1 - 160 / num_border)


def test_the_hash_depends_on_the_pixels_and_not_on_the_file_format() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 20), dtype=np.uint8)
    hashes = {
        measure(encode(pixels, kind, mode))["pixel_sha256"]
        for kind, mode in (("PNG", "L"), ("PNG", "RGB"), ("BMP", "L"), ("TIFF", "L"))
    }
    assert hashes == {hash_pixels(pixels)}
    assert hash_pixels(pixels.reshape(20, 30)) not in hashes
    assert hash_pixels(pixels ^ 1) not in hashes


@pytest.mark.parametrize("shape", [(1, 1), (2, 50), (3, 3)])
def test_the_border_of_a_tiny_image_is_the_whole_image(shape: tuple[int, int]) -> None:
    properties = measure(encode(np.full(shape, 90, np.uint8), "PNG", "L"))
    assert (properties["border_grey"], properties["border_dark_share"]) == (90, 0)


def test_a_16_bit_image_has_its_own_mode() -> None:
    sink = io.BytesIO()
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(sink, "PNG")
    assert measure(sink.getvalue())["mode"].endswith(", 16 bit")


def test_columns_become_properties() -> None:
    scan = pa.table(
        {
            "width_px": [10, 20], "height_px": [10, 10], "mode": ["L", "RGB"],
            "format": ["PNG", "PNG"], "size_bytes": [50, 100], "mean_grey": [1.0, 2.0],
            "border_grey": [0.0, 1.0], "border_dark_share": [1.0, 0.5],
        }
    )  # fmt: skip
    properties = build_properties(scan)
    assert properties["aspect ratio"].tolist() == [[1], [2]]
    assert properties["colour mode"].tolist() == [[1, 0], [0, 1]]
    assert properties["file type"].tolist() == [[1], [1]]
    assert properties["bytes per pixel"].tolist() == [[0.5], [0.5]]
    assert properties["border brightness"].shape == (2, 2)
