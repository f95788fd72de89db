"""The robustness table, tested with a simple engine whose scores are known."""

import json

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.robustness import (
    SHIFTS,
    measure_robustness,
    render_robustness,
    score_predictions,
)
from brainray.errors import ConfigError, DataError
from brainray.images.preprocess import Preprocessing
from brainray.inference.engine import Prediction
from brainray.model.calibration import LOW_CONFIDENCE, UNLIKE_TRAINING

CLASSES = ("dark", "bright")
PREPROCESSING = Preprocessing(size_px=32)


class BrightnessEngine:
    """Predicts by mean grey: over 100 bright with 0.95, over 64 bright with 0.6, else dark."""

    def predict(self, images: NDArray[np.uint8]) -> Prediction:
        assert images.shape[1:] == (32, 32)
        assert images.dtype == np.uint8
        mean = images.mean(axis=(1, 2))
        bright = np.where(mean > 100, 0.95, np.where(mean > 64, 0.6, 0.05)).astype(np.float32)
        reasons = [
            UNLIKE_TRAINING if value == 0 else LOW_CONFIDENCE if 64 < value <= 100 else None
            for value in mean
        ]
        return Prediction(np.stack([1 - bright, bright], 1), reasons)


def draw_scans() -> tuple[list[NDArray[np.uint8]], list[int]]:
    """Draw 75 uniform scans of three sizes: 50 dark, 25 bright."""
    greys, labels = [40] * 50 + [120] * 25, [0] * 50 + [1] * 25
    sizes = [(40, 40), (64, 48), (100, 120)]
    scans = [np.full(sizes[i % 3], grey, np.uint8) for i, grey in enumerate(greys)]
    return scans, labels


def measure(**options: int) -> dict[str, object]:
    scans, labels = draw_scans()
    return measure_robustness(BrightnessEngine(), PREPROCESSING, CLASSES, scans, labels, **options)


def test_scores_of_known_predictions_are_exact() -> None:
    found = measure()
    plain = found["plain"]
    assert plain == {
        "accuracy": 1.0,
        "relative_accuracy": 1.0,
        "ece": pytest.approx(0.05),
        "confidently_wrong": 0.0,
        "abstained": 0.0,
        "rejected": 0.0,
    }
    shifts = found["shifts"]
    assert set(shifts) == set(SHIFTS)
    for name in ("blur", "downsampled", "stretched", "tighter_crop"):  # keep grey levels
        assert shifts[name] == plain
    # Half as bright, 120 becomes 60: predicted dark with 0.95, which is wrong.
    assert shifts["gain_dark"]["accuracy"] == pytest.approx(2 / 3)
    assert shifts["gain_dark"]["relative_accuracy"] == pytest.approx(2 / 3)
    assert shifts["gain_dark"]["confidently_wrong"] == pytest.approx(1 / 3)
    assert shifts["gain_dark"]["ece"] == pytest.approx(0.95 - 2 / 3, abs=1e-6)
    # 255 (40 / 255) ** 0.6 = 84: predicted bright with 0.6, which is wrong, but abstained.
    assert shifts["gamma_bright"]["accuracy"] == pytest.approx(1 / 3)
    assert shifts["gamma_bright"]["confidently_wrong"] == 0
    assert shifts["gamma_bright"]["abstained"] == pytest.approx(2 / 3)
    # 215 and 135: every dark scan is predicted bright with 0.95.
    assert shifts["inverted"]["confidently_wrong"] == pytest.approx(2 / 3)
    # 12 bits of 16 are a sixteenth as bright: 2 and 7 of 255, dark with 0.95, and neither is 0.
    assert shifts["export_16_bit"]["accuracy"] == pytest.approx(2 / 3)
    assert shifts["export_16_bit"]["rejected"] == 0


def test_mean_and_worst_are_over_the_shifts() -> None:
    found = measure()
    accuracies = {name: scores["accuracy"] for name, scores in found["shifts"].items()}
    assert found["mean"]["accuracy"] == pytest.approx(np.mean(list(accuracies.values())))
    assert accuracies[found["worst"]] == min(accuracies.values()) < 0.5
    assert found["num_images"] == 75


def test_severity_and_seed_are_passed_on() -> None:
    assert measure(severity=1) != measure(severity=3)
    assert measure(seed=1)["shifts"] == measure(seed=1)["shifts"]
    assert (measure(severity=1)["severity"], measure(seed=4)["seed"]) == (1, 4)
    with pytest.raises(ConfigError, match="severity"):
        measure(severity=0)


def test_each_scan_is_shifted_by_a_seed_of_its_own() -> None:
    seen: list[NDArray[np.uint8]] = []

    class Recorder(BrightnessEngine):
        def predict(self, images: NDArray[np.uint8]) -> Prediction:
            seen.extend(images)
            return super().predict(images)

    scans = [np.full((64, 64), 90, np.uint8)] * 6
    measure_robustness(Recorder(), PREPROCESSING, CLASSES, scans, [0, 1] * 3)
    noisy = seen[6 * (1 + list(SHIFTS).index("noise")) :][:6]
    assert len({image.tobytes() for image in noisy}) == 6


def test_scores_count_statuses_over_all_images() -> None:
    first = np.array([0.95, 0.2, 0.95, 0.95, 0.6], np.float32)
    reasons = [None, LOW_CONFIDENCE, UNLIKE_TRAINING, None, None]
    scores = score_predictions([0, 1, 1, 1, 1], np.stack([first, 1 - first], 1), reasons, CLASSES)
    assert scores["accuracy"] == pytest.approx(0.4)
    # Only the fourth: the third is rejected, and the fifth is wrong with less than 0.9.
    assert scores["confidently_wrong"] == pytest.approx(0.2)
    assert (scores["abstained"], scores["rejected"]) == pytest.approx((0.2, 0.2))


def test_result_is_json_and_a_table() -> None:
    found = measure()
    assert json.loads(json.dumps(found)) == found
    lines = render_robustness(found).splitlines()
    assert len(lines) == 2 + 1 + len(SHIFTS) + 2
    assert lines[2] == "| plain | 1.000 | 1.000 | 0.050 | 0.000 | 0.000 | 0.000 |"
    assert lines[-1].startswith(f"| **worst: {found['worst']}** | 0.333 |")
    assert {line.count("|") for line in lines} == {8}


def test_no_scans_are_an_error() -> None:
    with pytest.raises(DataError, match="empty"):
        measure_robustness(BrightnessEngine(), PREPROCESSING, CLASSES, [], [])
