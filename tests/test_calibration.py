"""Calibration, abstention and out-of-distribution detection, compared with known distributions."""

import json
import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import softmax
from scipy.stats import chi2
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression

from brainray.errors import ClassifierError, ConfigError
from brainray.model.calibration import (
    ABSTAIN_ALWAYS,
    LOW_CONFIDENCE,
    UNLIKE_TRAINING,
    Calibration,
    CalibrationOptions,
    Outputs,
)
from brainray.model.fit_calibration import (
    choose_calibration_method,
    choose_max_distance,
    choose_min_confidence,
    fit_calibration,
    fit_logit_scaling,
    fit_ood_detector,
)

NUM_CLASSES = 4


def draw(
    count: int, scale: NDArray[np.float64], shift: NDArray[np.float64], seed: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Draw logits, and labels from the softmax of the scaled and shifted logits."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 4, (count, NUM_CLASSES))
    probs = softmax(logits * scale + shift, axis=1)
    labels = (probs.cumsum(1) > rng.random((count, 1))).argmax(1)
    return logits.astype(np.float32), labels


# --- calibration --------------------------------------------------------------------------


def test_the_temperature_is_recovered_and_equals_scikit_learns() -> None:
    logits, labels = draw(8000, np.full(4, 0.4), np.zeros(4), 0)
    scale, shift = fit_logit_scaling(logits, labels, "temperature")
    np.testing.assert_allclose(scale, 0.4, atol=0.02)
    np.testing.assert_array_equal(shift, 0)

    class Logits(LogisticRegression):  # type: ignore[misc]
        """Returns its input as the logits."""

        def decision_function(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
            return x

    given = Logits().fit(logits[:50], np.resize(np.arange(4), 50))
    known = CalibratedClassifierCV(FrozenEstimator(given), method="temperature")
    known.fit(logits, labels)
    np.testing.assert_allclose(
        Calibration(scale, shift).calibrate(logits), known.predict_proba(logits), atol=2e-3
    )


def test_vector_scaling_is_recovered() -> None:
    scale, shift = np.array([0.3, 0.5, 0.8, 0.6]), np.array([0.5, -1.0, 0.7, -0.2])
    logits, labels = draw(20000, scale, shift, 1)
    found = fit_logit_scaling(logits, labels, "vector")
    np.testing.assert_allclose(found[0], scale, atol=0.04)
    np.testing.assert_allclose(found[1], shift, atol=0.08)


@pytest.mark.parametrize(
    ("scale", "shift", "expected"),
    [
        (np.full(4, 0.4), np.zeros(4), "temperature"),
        (np.array([0.3, 0.5, 0.8, 0.6]), np.array([0.5, -1.0, 0.7, -0.2]), "vector"),
    ],
)
def test_the_method_with_the_lowest_loss_on_held_out_groups_is_chosen(
    scale: NDArray[np.float64], shift: NDArray[np.float64], expected: str
) -> None:
    logits, labels = draw(3000, scale, shift, 2)
    method, losses = choose_calibration_method(logits, labels, np.arange(3000) // 3)
    assert method == expected
    assert losses[method] == min(losses.values()) < losses["none"]


def test_no_group_is_both_fitted_and_evaluated() -> None:
    """With near duplicates in both parts, vector scaling would have the lowest loss on noise."""
    rng = np.random.default_rng(0)
    logits = np.repeat(rng.normal(0, 0.3, (12, 4)), 30, axis=0).astype(np.float32)
    labels = np.repeat(rng.integers(0, 4, 12), 30)
    groups = np.repeat(np.arange(12), 30)
    by_group, by_image = (
        choose_calibration_method(logits, labels, given)[1]["vector"]
        for given in (groups, np.arange(360))
    )
    assert by_image < 0.8 * by_group


# --- abstention ---------------------------------------------------------------------------


def make_predictions(
    confidence: list[float], is_right: list[bool]
) -> tuple[NDArray[np.float32], NDArray]:
    top = np.array(confidence, np.float32)
    probs = np.column_stack([top, 1 - top, np.zeros((len(top), 2), np.float32)])
    return probs, np.where(is_right, 0, 2)


def test_the_threshold_keeps_the_stated_risk() -> None:
    probs, labels = make_predictions([0.99, 0.9, 0.8, 0.7, 0.6], [True, True, False, True, True])
    assert choose_min_confidence(probs, labels, 0.2) == 0.0  # 1 of 5
    assert choose_min_confidence(probs, labels, 0.1) == pytest.approx(0.85)  # 0 of 2
    assert choose_min_confidence(probs, labels, 1.0) == 0.0
    probs, labels = make_predictions([0.99, 0.9, 0.8], [False, False, True])
    assert choose_min_confidence(probs, labels, 0.1) == ABSTAIN_ALWAYS


def test_equal_confidences_are_all_above_or_all_below_the_threshold() -> None:
    probs, labels = make_predictions([0.9, 0.8, 0.8, 0.7], [True, True, False, False])
    assert choose_min_confidence(probs, labels, 0.3) == pytest.approx(0.85)


# --- ood_detector -----------------------------------------------------------------------------


def test_distances_are_mahalanobis_and_follow_chi_squared() -> None:
    rng = np.random.default_rng(0)
    spread = np.concatenate([[9.0, 4.0, 2.0], np.full(17, 0.5)])
    means = rng.normal(200, 20, (3, 20))  # of the square roots of the features
    rotation = np.linalg.qr(rng.normal(size=(20, 20)))[0]

    def sample(count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        labels = rng.integers(0, 3, count)
        noise = rng.normal(size=(count, 20)) * spread @ rotation
        return ((means[labels] + noise) ** 2).astype(np.float32), labels

    ood_detector = fit_ood_detector(*sample(20000), 3, (20,))
    features, labels = sample(4000)
    squares = 20 * ood_detector.compute_distances(features) ** 2
    # The fitted covariance, 10 free directions and a common variance, equals the drawn one.
    inverse = np.linalg.inv(rotation.T @ np.diag(spread**2) @ rotation)
    residuals = np.sqrt(features) - means[labels]
    exact = np.einsum("ni,ij,nj->n", residuals, inverse, residuals)
    np.testing.assert_allclose(squares, exact, rtol=0.15)
    shares = [(squares <= chi2(20).ppf(q)).mean() for q in (0.1, 0.5, 0.9, 0.99)]
    np.testing.assert_allclose(shares, [0.1, 0.5, 0.9, 0.99], atol=0.03)


def test_a_new_image_passes_at_the_stated_rate() -> None:
    rng = np.random.default_rng(0)
    passed = []
    for _ in range(400):
        distances = rng.exponential(size=120).astype(np.float32)
        passed.append(rng.exponential(size=100) <= choose_max_distance(distances, 0.95))
    assert np.mean(passed) == pytest.approx(0.95, abs=0.01)
    assert choose_max_distance(np.arange(98, dtype=np.float32), 0.99) == math.inf
    assert choose_max_distance(np.arange(99, dtype=np.float32), 0.99) == 98
    assert choose_max_distance(np.arange(500, dtype=np.float32), 1.0) == math.inf


def test_a_class_without_images_is_left_out() -> None:
    features = np.random.default_rng(0).random((60, 12), np.float32)
    ood_detector = fit_ood_detector(features, np.repeat([0, 2], 30), 4, (12,))
    assert ood_detector.gaussians[0].means.shape == (2, 12)
    assert np.isfinite(ood_detector.compute_distances(features)).all()


@pytest.mark.parametrize("stage", [0, 1])
def test_an_outlier_in_any_stage_has_a_large_distance(stage: int) -> None:
    rng = np.random.default_rng(0)
    features = rng.random((400, 32), np.float32)
    ood_detector = fit_ood_detector(features, np.zeros(400, np.int64), 1, (12, 20))
    squares = ood_detector.compute_distances(features) ** 2
    assert squares.mean() == pytest.approx(2, rel=0.02)  # every stage has the same weight
    features[:, (slice(12), slice(12, 32))[stage]] += 2
    assert ood_detector.compute_distances(features).min() > np.sqrt(squares.max())


# --- fit_calibration ----------------------------------------------------------------------


@pytest.fixture
def fitted() -> Calibration:
    logits, labels = draw(600, np.full(4, 0.4), np.zeros(4), 5)
    rng = np.random.default_rng(5)
    features = np.abs(rng.normal(size=(600, 32)) + np.eye(4, 32)[labels] * 6)
    outputs = Outputs(logits, features.astype(np.float32))
    options = CalibrationOptions(max_risk=0.1, pass_rate=0.98)
    return fit_calibration(
        outputs, labels, outputs, labels, np.arange(600), options, widths=(12, 20)
    )


def test_each_image_has_at_most_one_reason(fitted: Calibration) -> None:
    near, far = np.zeros(3, np.float32), np.full(3, 1e3, np.float32)
    probs = np.array([[1, 0, 0, 0], [0.3, 0.3, 0.2, 0.2], [0.3, 0.3, 0.2, 0.2]], np.float32)
    assert fitted.find_reasons(probs, near) == [None, LOW_CONFIDENCE, LOW_CONFIDENCE]
    assert fitted.find_reasons(probs, far) == [UNLIKE_TRAINING] * 3
    unknown = np.full(3, np.nan, np.float32)
    assert fitted.find_reasons(probs, unknown) == [UNLIKE_TRAINING] * 3


def test_a_saved_calibration_is_loaded_unchanged(fitted: Calibration) -> None:
    described = json.loads(json.dumps(fitted.to_json(), allow_nan=False))
    again = Calibration.from_json(described, fitted.ood_detector.to_arrays())
    logits, _ = draw(50, np.ones(4), np.zeros(4), 6)
    np.testing.assert_array_equal(again.calibrate(logits), fitted.calibrate(logits))
    features = np.random.default_rng(1).random((50, 32), np.float32)
    np.testing.assert_array_equal(
        again.compute_distances(features), fitted.compute_distances(features)
    )
    assert (again.min_confidence, again.max_distance) == (
        fitted.min_confidence,
        fitted.max_distance,
    )
    assert again.facts["method"] == "temperature"


def test_without_calibration_and_thresholds_nothing_changes() -> None:
    logits, labels = draw(300, np.full(4, 0.4), np.zeros(4), 7)
    outputs = Outputs(logits, np.random.default_rng(0).random((300, 8), np.float32))
    options = CalibrationOptions(calibrate=False, max_risk=1.0, pass_rate=1.0)
    calibration = fit_calibration(
        outputs, labels, outputs, labels, np.arange(300), options, widths=(8,)
    )
    np.testing.assert_allclose(calibration.calibrate(logits), softmax(logits, axis=1), atol=1e-6)
    distances = calibration.compute_distances(1e3 * outputs.features)
    assert calibration.find_reasons(calibration.calibrate(logits), distances) == [None] * 300


@pytest.mark.parametrize("change", [{"scale": None}, {"min_confidence": "much"}, {"facts": 3}])
def test_damaged_metadata_is_an_error(fitted: Calibration, change: dict[str, object]) -> None:
    with pytest.raises(ClassifierError, match="is damaged"):
        Calibration.from_json(fitted.to_json() | change, fitted.ood_detector.to_arrays())


def test_an_ood_detector_with_other_arrays_is_an_error(fitted: Calibration) -> None:
    with pytest.raises(ClassifierError, match="is damaged"):
        Calibration.from_json(fitted.to_json(), {"means": np.zeros((1, 2), np.float32)})


@pytest.mark.parametrize("change", [{"max_risk": 0.0}, {"pass_rate": 1.5}])
def test_rates_out_of_range_are_an_error(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"in \(0, 1\]"):
        CalibrationOptions(**change)  # type: ignore[arg-type]


def test_ood_detector_keeps_float32() -> None:
    features = np.random.default_rng(0).random((80, 16), np.float32)
    ood_detector = fit_ood_detector(features, np.zeros(80, np.int64), 1, (16,))
    assert ood_detector.compute_distances(features).dtype == np.float32
