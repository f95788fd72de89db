"""The shift suite: each shift changes a scan, and more with a higher severity."""

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.robustness import SHIFTS, apply_shift
from brainray.errors import ConfigError
from brainray.phantoms import draw_phantom

WITHOUT_LEVELS = {"inverted", "export_16_bit"}
RESIZING = {"downsampled", "border", "tighter_crop", "stretched"}


def draw_scan(width: int = 240, height: int = 200) -> NDArray[np.uint8]:
    """Draw a head that fills the frame."""
    head = draw_phantom("glioma", np.random.default_rng(5), plane="axial")
    rows, columns = (np.flatnonzero((head > 40).any(axis=axis)) for axis in (1, 0))
    head = head[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return np.asarray(cv2.resize(head, (width, height)), np.uint8)


def measure_distance(scan: NDArray[np.uint8], name: str, severity: int) -> float:
    """Return the mean difference of grey levels between a scan and its shifted version."""
    shifted = apply_shift(scan, name, severity, seed=1)
    height, width = scan.shape
    resized = cv2.resize(shifted, (width, height)).astype(np.float64)
    return float(np.abs(resized - scan).mean())


@pytest.mark.parametrize("name", SHIFTS)
def test_shift_changes_the_scan_and_not_its_input(name: str) -> None:
    scan = draw_scan()
    before = scan.copy()
    for severity in (1, 2, 3):
        shifted = apply_shift(scan, name, severity, seed=0)
        assert shifted.dtype == (np.uint16 if name == "export_16_bit" else np.uint8)
        assert shifted.ndim == 2
        assert (shifted.shape == scan.shape) == (name not in RESIZING)
        assert shifted.shape != scan.shape or (shifted != scan).mean() > 0.1
    assert np.array_equal(scan, before)


@pytest.mark.parametrize("name", SHIFTS)
def test_a_seed_gives_the_same_scan_again(name: str) -> None:
    scan = draw_scan()
    first = apply_shift(scan, name, 2, seed=3)
    assert np.array_equal(apply_shift(scan, name, 2, seed=3), first)


@pytest.mark.parametrize("name", ["bias_field", "noise", "rotation", "stretched"])
def test_another_seed_gives_another_scan(name: str) -> None:
    scan = draw_scan()
    found = {apply_shift(scan, name, 2, seed=seed).tobytes() for seed in range(8)}
    assert len(found) > 1


@pytest.mark.parametrize("name", sorted(set(SHIFTS) - WITHOUT_LEVELS - {"stretched"}))
def test_distance_to_the_scan_grows_with_the_severity(name: str) -> None:
    scan = draw_scan()
    distances = [measure_distance(scan, name, severity) for severity in (1, 2, 3)]
    assert 0.3 < distances[0] < distances[1]
    # Histogram equalisation is complete at severity 2.
    assert distances[1] <= distances[2] if name == "equalized" else distances[1] < distances[2]


def test_grey_levels_at_severity_2() -> None:
    scan = np.arange(256, dtype=np.uint8).reshape(16, 16)
    exact = np.arange(256).reshape(16, 16)
    expected = {
        "gain_dark": exact / 2,
        "gain_bright": np.minimum(exact * 1.5, 255),
        "gamma_bright": 255 * (exact / 255) ** 0.6,
        "gamma_dark": 255 * (exact / 255) ** 1.7,
        "inverted": 255 - exact,
        "export_16_bit": exact * (4095 / 255),
    }
    for name, values in expected.items():
        assert np.abs(apply_shift(scan, name, 2, seed=0) - values).max() <= 0.5


def test_sizes_at_severity_2() -> None:
    scan = draw_scan(width=300, height=200)
    assert apply_shift(scan, "downsampled", 2, seed=0).shape == (100, 150)
    assert apply_shift(scan, "border", 2, seed=0).shape == (280, 420)
    assert apply_shift(scan, "tighter_crop", 2, seed=0).shape == (168, 252)


def test_stretch_is_along_either_axis_and_grows_with_the_severity() -> None:
    scan = draw_scan(width=300, height=200)
    expected = {
        1: {(200, 350), (233, 300)},
        2: {(200, 400), (267, 300)},
        3: {(200, 450), (300, 300)},
    }
    for severity, sizes in expected.items():
        found = {apply_shift(scan, "stretched", severity, seed=seed).shape for seed in range(16)}
        assert found == sizes


def test_border_and_crop_keep_the_pixels() -> None:
    scan = draw_scan(width=300, height=200)
    bordered = apply_shift(scan, "border", 2, seed=0)
    assert np.array_equal(bordered[40:-40, 60:-60], scan)
    assert bordered.sum() == scan.sum()
    assert np.array_equal(apply_shift(scan, "tighter_crop", 2, seed=0), scan[16:-16, 24:-24])


def test_rotation_turns_by_its_level() -> None:
    scan = np.zeros((201, 201), np.uint8)
    scan[95:106, 170:181] = 255  # to the right of the middle
    for severity, degrees in ((1, 6), (2, 12), (3, 20)):
        angles = set()
        for seed in range(8):
            rows, columns = np.nonzero(apply_shift(scan, "rotation", severity, seed=seed) > 127)
            angles.add(round(np.degrees(np.arctan2(100 - rows.mean(), columns.mean() - 100)), 1))
        assert sorted(angles) == pytest.approx([-degrees, degrees], abs=0.3)


def test_noise_has_its_deviation_where_the_scan_is_bright() -> None:
    scan = np.full((200, 200), 128, np.uint8)
    for severity, deviation in ((1, 6), (2, 12), (3, 24)):
        noisy = apply_shift(scan, "noise", severity, seed=0)
        assert float(noisy.std()) == pytest.approx(deviation, rel=0.05)
    black = apply_shift(np.zeros((200, 200), np.uint8), "noise", 2, seed=0)
    assert float(black.mean()) == pytest.approx(12 * np.sqrt(np.pi / 2), rel=0.02)  # Rayleigh's


def test_blur_is_wider_in_a_larger_scan() -> None:
    for size in (112, 224, 448):
        scan = np.zeros((size, size), np.uint8)
        scan[:, size // 2 :] = 255
        slope = np.diff(apply_shift(scan, "blur", 2, seed=0)[size // 2].astype(np.float64))
        distance = np.arange(size - 1) - (size / 2 - 1)
        deviation = np.sqrt((slope * distance**2).sum() / slope.sum())
        assert deviation == pytest.approx(2 * size / 224, rel=0.1)


@pytest.mark.parametrize("name", SHIFTS)
def test_every_shift_accepts_the_smallest_and_empty_scans(name: str) -> None:
    for scan in (np.zeros((32, 32), np.uint8), np.full((33, 65), 255, np.uint8)):
        shifted = apply_shift(scan, name, 3, seed=0)
        assert min(shifted.shape) >= 8


def test_unknown_names_and_severities_are_an_error() -> None:
    scan = draw_scan()
    with pytest.raises(ConfigError, match=r"Unknown shift 'fog'. Expected one of clahe, "):
        apply_shift(scan, "fog", 2, seed=0)
    with pytest.raises(ConfigError, match=r"Expected a severity of 1, 2 or 3, got 4\."):
        apply_shift(scan, "blur", 4, seed=0)


def test_every_shift_is_described() -> None:
    for shift in SHIFTS.values():
        assert 10 < len(shift.description) < 100
        assert len(shift.levels) == 3
