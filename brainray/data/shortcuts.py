"""Shortcuts: how well properties of the files, without their content, predict the class.

A network that recognises the hospital by the size of its images need not find the tumour. So a
shallow decision tree is trained on one property of the images at a time.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
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
    """Compute the features of each property, float64 of shape (N, d), by its name.

    ``scan`` has the columns :data:`brainray.data.fingerprint.PROPERTY_TYPES`, without nulls.
    """
    width, height = scan["width_px"].to_numpy(), scan["height_px"].to_numpy()
    properties = {
        "size in pixels": [width, height],
        "aspect ratio": [width / height],
        "colour mode": _encode(scan["mode"].to_pylist()),
        "file type": _encode(scan["format"].to_pylist()),
        "bytes per pixel": [scan["size_bytes"].to_numpy() / (width.astype(np.float64) * height)],
        "mean brightness": [scan["mean_grey"].to_numpy()],
        "border brightness": [scan["border_grey"].to_numpy(), scan["border_dark_share"].to_numpy()],
    }
    return {
        name: np.column_stack(columns).astype(np.float64) for name, columns in properties.items()
    }


def _encode(names: Sequence[str]) -> list[NDArray[np.bool_]]:
    """Return one column of 0 and 1 for each name."""
    return [np.array(names) == name for name in np.unique(names)]


def evaluate_shortcuts(
    properties: dict[str, FloatArray],
    labels: NDArray[np.int64],
    groups: NDArray[np.int64],
    *,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Measure how well each property, and all of them together, predict the class.

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
    row: dict[str, Any] = {"property": name, "n": len(labels), "balanced_accuracy": chance}
    row |= {"balanced_accuracy_ci95": None, "chance": chance}
    if (values == values[0]).all():
        return row | {"is_constant": True, "is_above_chance": False}
    tree = DecisionTreeClassifier(
        max_depth=MAX_DEPTH,
        min_samples_leaf=MIN_LEAF_SHARE,
        class_weight="balanced",
        random_state=seed,
    )
    predicted = cross_val_predict(tree, values, labels, cv=parts)
    scores = compute_accuracy(
        labels, predicted, groups=groups, num_resamples=NUM_RESAMPLES, seed=seed
    )
    interval = scores["balanced_accuracy_ci95"]
    return row | {
        "balanced_accuracy": scores["balanced_accuracy"],
        "balanced_accuracy_ci95": interval,
        "is_constant": False,
        "is_above_chance": bool(interval and interval[0] > chance),
    }
