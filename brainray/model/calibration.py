"""Fit what a classifier says of its own answers, to images that did not move its weights."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax
from sklearn.decomposition import PCA
from sklearn.model_selection import GroupKFold

from brainray.model.trust import (
    ABSTAIN_ALWAYS,
    Cloud,
    Likeness,
    Outputs,
    Trust,
    TrustOptions,
    take_roots,
)

CalibrationMethod = Literal["none", "temperature", "vector"]

MIN_IMAGES = 100
"""Fewer training or validation images settle nothing."""
NUM_COMPONENTS = 64
"""Directions along which the features' spread is measured; in all others it is taken as one."""
NUM_FOLDS = 5
"""Parts of the validation groups on which the ways to calibrate compete."""


def fit_trust(
    train: Outputs,
    train_labels: NDArray[np.int64],
    val: Outputs,
    val_labels: NDArray[np.int64],
    val_groups: NDArray[np.int64],
    options: TrustOptions,
    *,
    widths: Sequence[int],
) -> Trust:
    """Fit what a classifier says of its own answers.

    Parameters
    ----------
    train, train_labels : Outputs, ndarray of int64, shape (N,)
        Of images that the network was trained on, not augmented: where its features lie.
    val, val_labels, val_groups : Outputs, ndarray of int64, shape (M,)
        Of images that moved no weight: for everything else.
    options : TrustOptions
        What is asked for. There are at least :data:`MIN_IMAGES` of either kind.
    widths : sequence of int
        Of the stages that the columns of the features are of.
    """
    assert min(len(train_labels), len(val_labels)) >= MIN_IMAGES
    num_classes = val.logits.shape[1]
    nothing = Trust.nothing(num_classes)
    facts: dict[str, Any] = {
        "num_train_images": len(train_labels),
        "num_val_images": len(val_labels),
        "method": "none",
        "max_risk": options.max_risk,
        "pass_rate": options.pass_rate,
    }
    scale, shift = nothing.scale, nothing.shift
    if options.calibrate:
        method, losses = choose_calibration(val.logits, val_labels, val_groups)
        facts |= {"method": method, "held_out_log_loss": losses}
        scale, shift = fit_calibration(val.logits, val_labels, method)
    probs = Trust(scale, shift).calibrate(val.logits)
    likeness = fit_likeness(train.features, train_labels, num_classes, widths)
    return Trust(
        scale,
        shift,
        choose_min_confidence(probs, val_labels, options.max_risk),
        likeness,
        choose_max_distance(likeness.compute_distances(val.features), options.pass_rate),
        facts,
    )


def fit_calibration(
    logits: NDArray[np.float32], labels: NDArray[np.int64], method: CalibrationMethod
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Fit the scaling of logits that makes the labels most likely.

    Parameters
    ----------
    logits : ndarray of float32, shape (N, K)
    labels : ndarray of int64, shape (N,)
    method : {"none", "temperature", "vector"}
        One scale for all classes, or a scale and a shift for each [1]_.

    Returns
    -------
    scale, shift : ndarray of float32, shape (K,)

    References
    ----------
    .. [1] Guo et al., On calibration of modern neural networks, ICML 2017, section 4.2.
    """
    count, num_classes = logits.shape
    ones, zeros = np.ones(num_classes), np.zeros(num_classes)
    values, truth = logits.astype(np.float64), np.eye(num_classes)[labels]

    def unpack(parameters: NDArray[np.float64]) -> tuple[Any, Any]:
        # A scale is the exponential of its parameter: it stays above 0.
        if method == "temperature":
            return np.exp(parameters[0]) * ones, zeros
        return np.exp(parameters[:num_classes]), parameters[num_classes:]

    def loss(parameters: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        scale, shift = unpack(parameters)
        log_probs = log_softmax(values * scale + shift, axis=1)
        slope = (np.exp(log_probs) - truth) / count
        by_scale, by_shift = (slope * values).sum(0) * scale, slope.sum(0)
        is_single = method == "temperature"
        gradient = np.array([by_scale.sum()]) if is_single else np.append(by_scale, by_shift)
        return -float((log_probs * truth).sum()) / count, gradient

    scale, shift = ones, zeros
    if method != "none":
        start = np.zeros(1 if method == "temperature" else 2 * num_classes)
        scale, shift = unpack(minimize(loss, start, jac=True, method="L-BFGS-B").x)
    return scale.astype(np.float32), (shift - shift.mean()).astype(np.float32)


def choose_calibration(
    logits: NDArray[np.float32], labels: NDArray[np.int64], groups: NDArray[np.int64]
) -> tuple[CalibrationMethod, dict[str, float]]:
    """Choose how to calibrate: what has the least log loss on groups it was not fitted to.

    Returns
    -------
    method : {"none", "temperature", "vector"}
    losses : dict of str to float
        Held-out log loss of each, in nats.
    """
    methods: tuple[CalibrationMethod, ...] = ("none", "temperature", "vector")
    num_folds = min(NUM_FOLDS, len(np.unique(groups)))
    if num_folds < 2:
        return "none", {}
    sums = dict.fromkeys(methods, 0.0)
    for fitted, held_out in GroupKFold(num_folds).split(logits, labels, groups):
        for method in methods:
            scale, shift = fit_calibration(logits[fitted], labels[fitted], method)
            log_probs = log_softmax(logits[held_out] * scale + shift, axis=1)
            sums[method] -= float(log_probs[np.arange(len(held_out)), labels[held_out]].sum())
    losses: dict[str, float] = {name: total / len(labels) for name, total in sums.items()}
    return min(methods, key=lambda method: losses[method]), losses


def choose_min_confidence(
    probs: NDArray[np.float32], labels: NDArray[np.int64], max_risk: float
) -> float:
    """Choose the least confidence at which enough of the classes given are right [1]_.

    Parameters
    ----------
    probs : ndarray of float32, shape (N, K)
    labels : ndarray of int64, shape (N,)
    max_risk : float
        Share of wrong classes among those given.

    Returns
    -------
    float
        The lowest that keeps the risk on these images; 0 where all of them may have a class,
        :data:`ABSTAIN_ALWAYS` where none may.

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


def fit_likeness(
    features: NDArray[np.float32],
    labels: NDArray[np.int64],
    num_classes: int,
    widths: Sequence[int],
) -> Likeness:
    """Fit where the features of training images lie.

    Parameters
    ----------
    features : ndarray of float32, shape (N, C)
        None is negative.
    labels : ndarray of int64, shape (N,)
        A class without images has no mean: nothing is like it.
    widths : sequence of int
        Of the stages that the columns of ``features`` are of; their sum is C.
    """
    assert sum(widths) == features.shape[1], (widths, features.shape)
    present = [k for k in range(num_classes) if (labels == k).any()]
    rows = np.searchsorted(present, labels)
    stages = np.split(take_roots(features), np.cumsum(widths)[:-1], axis=1)
    return Likeness(tuple(_fit_cloud(stage, rows) for stage in stages))


def _fit_cloud(features: NDArray[np.float32], labels: NDArray[np.int64]) -> Cloud:
    """Fit where one stage's features lie; each of the classes, counted from 0, has images."""
    count, width = features.shape
    means = np.stack(
        [features[labels == k].mean(axis=0, dtype=np.float64) for k in range(labels.max() + 1)]
    )
    directions = min(NUM_COMPONENTS, count // 4, width // 2)
    fitted = PCA(directions, svd_solver="covariance_eigh").fit(features - means[labels])
    # A squared distance is about the number of channels; so divided, every stage counts alike.
    variances = width * np.append(fitted.explained_variance_, fitted.noise_variance_)
    least = np.finfo(np.float32).tiny + 1e-9 * variances.max()
    return Cloud(
        means.astype(np.float32),
        np.ascontiguousarray(fitted.components_, np.float32),
        np.maximum(variances, least).astype(np.float32),
    )


def choose_max_distance(distances: NDArray[np.float32], pass_rate: float) -> float:
    """Choose the distance that a new image of the same kind passes at a stated rate.

    Parameters
    ----------
    distances : ndarray of float32, shape (N,)
        Of images that were not used to fit the likeness.
    pass_rate : float
        In (0, 1].

    Returns
    -------
    float
        The conformal quantile [1]_; infinite where so few images cannot tell.

    References
    ----------
    .. [1] Vovk, Gammerman and Shafer, Algorithmic learning in a random world, 2005; the rank
       is (N + 1) times the rate, rounded up.
    """
    rank = math.ceil((len(distances) + 1) * pass_rate - 1e-9)
    return float(np.sort(distances)[rank - 1]) if rank <= len(distances) else math.inf
