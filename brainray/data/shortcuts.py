"""Shortcuts: how well properties of the files, without their content, predict the class.

A network that recognises the hospital by the size of its images need not find the tumour. So a
shallow decision tree is trained on one property of the images at a time.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.tree import DecisionTreeClassifier

from brainray.metrics import compute_accuracy

FloatArray = NDArray[np.float64]

MAX_DEPTH = 4
"""Depth of the trees: at most 16 leaves."""

MIN_LEAF_SHARE = 0.005
"""Smallest share of the images in a leaf, so that a tree cannot learn single images."""

NUM_FOLDS = 5

MAX_IMAGES = 50_000
"""Most images used, drawn by whole groups; more would hardly narrow the intervals."""

NUM_RESAMPLES = 1000

ALL_TOGETHER = "all together"


def build_properties(scan: pa.Table) -> dict[str, FloatArray]:
    """Compute the features of each property.

    Parameters
    ----------
    scan : pyarrow.Table
        Columns of :data:`brainray.data.fingerprint.PROPERTY_TYPES`; without nulls.

    Returns
    -------
    dict of str to ndarray of float64, shape (N, d)
        By the name of the property.
    """

    def stack(*columns: Any) -> FloatArray:  # noqa: ANN401 - whatever column_stack takes
        return np.column_stack(columns).astype(np.float64)

    width, height = scan["width_px"].to_numpy(), scan["height_px"].to_numpy()
    size_bytes = scan["size_bytes"].to_numpy()
    return {
        "size in pixels": stack(width, height),
        "aspect ratio": stack(width / height),
        "colour mode": _encode(scan["mode"].to_pylist()),
        "file type": _encode(scan["format"].to_pylist()),
        "bytes per pixel": stack(size_bytes / (width.astype(np.float64) * height)),
        "mean brightness": stack(scan["mean_grey"].to_numpy()),
        "border brightness": stack(
            scan["border_grey"].to_numpy(), scan["border_dark_share"].to_numpy()
        ),
    }


def _encode(names: Sequence[str]) -> FloatArray:
    """Return one column of 0 and 1 for each name."""
    kinds, index = np.unique(np.array(names), return_inverse=True)
    return np.asarray(np.eye(len(kinds))[index], dtype=np.float64)


def evaluate_shortcuts(
    properties: dict[str, FloatArray],
    labels: NDArray[np.int64],
    groups: NDArray[np.int64],
    *,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Measure how well each property, and all of them together, predict the class.

    Parameters
    ----------
    properties : dict of str to ndarray, shape (N, d)
        From :func:`build_properties`.
    labels, groups : ndarray of int64, shape (N,)
        Images of one group are never on both sides of a fold.

    Returns
    -------
    list of dict
        For each: ``property``; ``balanced_accuracy``, cross-validated, with its
        ``balanced_accuracy_ci95`` over groups; ``chance``; ``is_constant`` (equal in all images,
        so without an interval); ``is_above_chance`` (the whole interval is). Empty where a class
        has fewer than two groups.

    References
    ----------
    .. [1] Breiman, Friedman, Olshen and Stone, "Classification and regression trees" (1984).
    .. [2] Zech et al., "Variable generalization performance of a deep learning model to detect
       pneumonia in chest radiographs", PLOS Medicine 15 (2018): a network that recognised
       hospitals.
    """
    kept = _draw_groups(groups, seed)
    labels, groups = labels[kept], groups[kept]
    per_class = [len(np.unique(groups[labels == label])) for label in np.unique(labels)]
    num_folds = min(NUM_FOLDS, *per_class)
    if len(per_class) < 2 or num_folds < 2:
        return []
    folds = StratifiedGroupKFold(n_splits=num_folds, shuffle=True, random_state=seed)
    parts = list(folds.split(labels, labels, groups))
    columns = {name: values[kept] for name, values in properties.items()}
    columns[ALL_TOGETHER] = np.hstack(list(columns.values()))
    return [
        _evaluate_property(name, values, labels, groups, parts, 1 / len(per_class), seed)
        for name, values in columns.items()
    ]


def _draw_groups(groups: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Return the rows of whole groups, at most :data:`MAX_IMAGES` of them."""
    if len(groups) <= MAX_IMAGES:
        return np.arange(len(groups))
    names, sizes = np.unique(groups, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(names))
    drawn = names[order][np.cumsum(sizes[order]) <= MAX_IMAGES]
    return np.flatnonzero(np.isin(groups, drawn))


def _evaluate_property(
    name: str,
    values: FloatArray,
    labels: NDArray[np.int64],
    groups: NDArray[np.int64],
    parts: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]],
    chance: float,
    seed: int,
) -> dict[str, Any]:
    if (values == values[0]).all():
        return {
            "property": name,
            "n": len(labels),
            "balanced_accuracy": chance,
            "balanced_accuracy_ci95": None,
            "chance": chance,
            "is_constant": True,
            "is_above_chance": False,
        }
    predicted = np.empty_like(labels)
    for train, held_out in parts:
        tree = DecisionTreeClassifier(
            max_depth=MAX_DEPTH,
            min_samples_leaf=MIN_LEAF_SHARE,
            class_weight="balanced",
            random_state=seed,
        )
        predicted[held_out] = tree.fit(values[train], labels[train]).predict(values[held_out])
    scores = compute_accuracy(
        labels, predicted, groups=groups, num_resamples=NUM_RESAMPLES, seed=seed
    )
    interval = scores["balanced_accuracy_ci95"]
    return {
        "property": name,
        "n": scores["n"],
        "balanced_accuracy": scores["balanced_accuracy"],
        "balanced_accuracy_ci95": interval,
        "chance": chance,
        "is_constant": False,
        "is_above_chance": bool(interval and interval[0] > chance),
    }
