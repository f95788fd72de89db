"""Fit calibration, abstention and the out-of-distribution detector after training."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax
from sklearn.decomposition import PCA
from sklearn.model_selection import GroupKFold

from brainray.model.calibration import (
    ABSTAIN_ALWAYS,
    Calibration,
    CalibrationOptions,
    ClassGaussian,
    OODDetector,
    Outputs,
    take_square_roots,
)

CalibrationMethod = Literal["none", "temperature", "vector"]

NUM_COMPONENTS = 64
"""Principal components with a variance of their own."""
NUM_FOLDS = 5
"""Folds of the validation groups on which the calibration methods are compared."""


def fit_calibration(
    train: Outputs,
    train_labels: NDArray[np.int64],
    val: Outputs,
    val_labels: NDArray[np.int64],
    val_groups: NDArray[np.int64],
    options: CalibrationOptions,
    *,
    widths: Sequence[int],
) -> Calibration:
    """Fit how a classifier's outputs are calibrated, and when an image gets no class.

    Parameters
    ----------
    train, train_labels : Outputs, ndarray of int64, shape (N,)
        Of images that the network was trained on, not augmented; the detector is fitted to them.
    val, val_labels, val_groups : Outputs, ndarray of int64, shape (M,)
        Of images that the network was not trained on; the rest is fitted to them.
    options : CalibrationOptions
    widths : sequence of int
        Number of feature columns of each stage.
    """
    num_classes = val.logits.shape[1]
    facts: dict[str, Any] = {
        "num_train_images": len(train_labels),
        "num_val_images": len(val_labels),
        "method": "none",
        "max_risk": options.max_risk,
        "pass_rate": options.pass_rate,
    }
    calibration = Calibration.identity(num_classes)
    if options.calibrate:
        method, losses = choose_calibration_method(val.logits, val_labels, val_groups)
        facts |= {"method": method, "held_out_log_loss": losses}
        calibration = Calibration(*fit_logit_scaling(val.logits, val_labels, method))
    detector = fit_ood_detector(train.features, train_labels, num_classes, widths)
    distances = detector.compute_distances(val.features)
    probs = calibration.calibrate(val.logits)
    return replace(
        calibration,
        min_confidence=choose_min_confidence(probs, val_labels, options.max_risk),
        ood_detector=detector,
        max_distance=choose_max_distance(distances, options.pass_rate),
        facts=facts,
    )


def fit_logit_scaling(
    logits: NDArray[np.float32], labels: NDArray[np.int64], method: CalibrationMethod
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Fit the scale and the shift of logits, (N, K), that maximise the likelihood of the labels.

    There is one scale for all classes (temperature), or a scale and a shift for each (vector) [1]_.

    References
    ----------
    .. [1] Guo et al., On calibration of modern neural networks, ICML 2017, section 4.2.
    """
    count, num_classes = logits.shape
    ones, zeros = np.ones(num_classes), np.zeros(num_classes)
    values, y_true = logits.astype(np.float64), np.eye(num_classes)[labels]
    is_single = method == "temperature"

    def unpack(parameters: NDArray[np.float64]) -> tuple[Any, Any]:
        # A scale is the exponential of its parameter: it stays above 0.
        if is_single:
            return np.exp(parameters[0]) * ones, zeros
        return np.exp(parameters[:num_classes]), parameters[num_classes:]

    def loss(parameters: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        scale, shift = unpack(parameters)
        log_probs = log_softmax(values * scale + shift, axis=1)
        slope = (np.exp(log_probs) - y_true) / count
        by_scale, by_shift = (slope * values).sum(0) * scale, slope.sum(0)
        gradient = np.array([by_scale.sum()]) if is_single else np.append(by_scale, by_shift)
        return -float((log_probs * y_true).sum()) / count, gradient

    scale, shift = ones, zeros
    if method != "none":
        start = np.zeros(1 if is_single else 2 * num_classes)
        scale, shift = unpack(minimize(loss, start, jac=True, method="L-BFGS-B").x)
    return scale.astype(np.float32), (shift - shift.mean()).astype(np.float32)


def choose_calibration_method(
    logits: NDArray[np.float32], labels: NDArray[np.int64], groups: NDArray[np.int64]
) -> tuple[CalibrationMethod, dict[str, float]]:
    """Choose the method of the lowest log loss, in nats, on held-out groups; return all losses."""
    methods: tuple[CalibrationMethod, ...] = ("none", "temperature", "vector")
    num_folds = min(NUM_FOLDS, len(np.unique(groups)))
    if num_folds < 2:
        return "none", {}
    sums = dict.fromkeys(methods, 0.0)
    for fitted, held_out in GroupKFold(num_folds).split(logits, labels, groups):
        for method in methods:
            scale, shift = fit_logit_scaling(logits[fitted], labels[fitted], method)
            log_probs = log_softmax(logits[held_out] * scale + shift, axis=1)
            sums[method] -= float(log_probs[np.arange(len(held_out)), labels[held_out]].sum())
    losses: dict[str, float] = {name: total / len(labels) for name, total in sums.items()}
    return min(methods, key=lambda method: losses[method]), losses


def choose_min_confidence(
    probs: NDArray[np.float32], labels: NDArray[np.int64], max_risk: float
) -> float:
    """Choose the lowest confidence at which at most ``max_risk`` of the classes are wrong [1]_.

    It is 0 if no abstention is needed, :data:`ABSTAIN_ALWAYS` if no threshold keeps the risk.

    References
    ----------
    .. [1] El-Yaniv and Wiener, On the foundations of noise-free selective classification, JMLR
       11, 2010.
    """
    confidence = probs.max(axis=1).astype(np.float64)
    order = np.argsort(-confidence, kind="stable")
    falling, wrong = confidence[order], (probs.argmax(axis=1) != labels)[order]
    risk = np.cumsum(wrong) / np.arange(1, len(wrong) + 1)
    is_last_of_equals = np.append(falling[:-1] > falling[1:], True)
    allowed = np.flatnonzero((risk <= max_risk) & is_last_of_equals)
    if not len(allowed):
        return ABSTAIN_ALWAYS
    last = int(allowed[-1])
    if last == len(falling) - 1:
        return 0.0
    return float(falling[last] + falling[last + 1]) / 2


def fit_ood_detector(
    features: NDArray[np.float32],
    labels: NDArray[np.int64],
    num_classes: int,
    widths: Sequence[int],
) -> OODDetector:
    """Fit the detector to features, (N, C), of training images; not negative.

    ``widths`` are the columns of each stage, in sum C. A class without images gets no mean.
    """
    present = [k for k in range(num_classes) if (labels == k).any()]
    rows = np.searchsorted(present, labels)
    stages = np.split(take_square_roots(features), np.cumsum(widths)[:-1], axis=1)
    return OODDetector(tuple(_fit_gaussian(stage, rows) for stage in stages))


def _fit_gaussian(features: NDArray[np.float32], labels: NDArray[np.int64]) -> ClassGaussian:
    """Fit one stage; every class, numbered from 0, must have images."""
    count, width = features.shape
    means = np.stack(
        [features[labels == k].mean(axis=0, dtype=np.float64) for k in range(labels.max() + 1)]
    )
    directions = min(NUM_COMPONENTS, count // 4, width // 2)
    fitted = PCA(directions, svd_solver="covariance_eigh").fit(features - means[labels])
    # Squared distances grow with the number of channels; this gives every stage the same weight.
    variances = width * np.append(fitted.explained_variance_, fitted.noise_variance_)
    least = np.finfo(np.float32).tiny + 1e-9 * variances.max()
    return ClassGaussian(
        means.astype(np.float32),
        np.ascontiguousarray(fitted.components_, np.float32),
        np.maximum(variances, least).astype(np.float32),
    )


def choose_max_distance(distances: NDArray[np.float32], pass_rate: float) -> float:
    """Choose the distance that a new in-distribution image stays below at a stated rate.

    ``distances`` are of images that the detector was not fitted to. The result is their conformal
    quantile [1]_, or infinite if there are too few.

    References
    ----------
    .. [1] Vovk, Gammerman and Shafer, Algorithmic learning in a random world, 2005; the rank
       is (N + 1) times the rate, rounded up.
    """
    rank = math.ceil((len(distances) + 1) * pass_rate - 1e-9)
    return float(np.sort(distances)[rank - 1]) if rank <= len(distances) else math.inf
