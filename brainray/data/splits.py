"""Split a data set by groups; the manifest records the split of every image."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold

from brainray.errors import DataError

MANIFEST_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("content_sha256", pa.string()),
        ("label", pa.string()),
        ("group", pa.int64()),
        ("split", pa.string()),  # train, val, test or rejected
        ("reason", pa.string()),  # of a rejection; else null
        ("nearest_correlation", pa.float32()),  # val: to train; test: to train and val
        ("nearest_label", pa.string()),
        ("thumbnail", pa.binary()),  # 576 grey bytes; null when rejected
    ]
)


def split_groups(
    labels: NDArray[np.int64], groups: NDArray[np.int64], fraction: float, *, seed: int
) -> NDArray[np.bool_]:
    """Choose groups for a held-out part, stratified by class; True, shape (N,), is held out.

    ``fraction`` is the share of the images to hold out, in (0, 0.5], rounded to 1/2, 1/3, 1/4 …
    Images of one group stay together.

    Raises
    ------
    DataError
        A class has fewer groups than a split needs.
    """
    for label in np.unique(labels):
        present = len(np.unique(groups[labels == label]))
        if present < 2:
            raise DataError(
                f"Class number {label} has {present} group of near duplicates or patients. "
                f"Expected at least 2 to hold out {fraction:.0%}. Add images, or lower the "
                "group threshold. Anonymised DICOM files may all name the same patient."
            )
    largest = int(np.unique(labels, return_counts=True)[1].max())
    num_folds = min(max(2, round(1 / fraction)), len(np.unique(groups)), largest)
    held_out: NDArray[np.bool_] = _divide_groups(labels, groups, num_folds, seed) == 0
    for part in (held_out, ~held_out):
        absent = np.setdiff1d(labels, labels[part])
        if len(absent):
            raise DataError(
                f"Too few groups of class number {absent[0]} to split off {fraction:.0%}. "
                "Add images, use a larger fraction, or give val and test folders."
            )
    return held_out


def _divide_groups(
    labels: NDArray[np.int64], groups: NDArray[np.int64], num_folds: int, seed: int
) -> NDArray[np.int64]:
    """Return the fold of every image, stratified by class; groups stay whole."""
    splitter = StratifiedGroupKFold(n_splits=num_folds, shuffle=True, random_state=seed)
    folds = np.empty(len(labels), np.int64)
    for number, (_, chosen) in enumerate(splitter.split(labels, labels, groups)):
        folds[chosen] = number
    return folds


def assign_splits(
    given: Sequence[str],
    labels: NDArray[np.int64],
    groups: NDArray[np.int64],
    *,
    val_fraction: float,
    test_fraction: float,
    seed: int,
) -> NDArray[np.str_]:
    """Assign a split to every image; splits of the data set are kept.

    In a data set without splits, ``test_fraction`` of the images becomes the test set. Without a
    validation split, ``val_fraction`` of the training images becomes one.

    Parameters
    ----------
    given : sequence of str, length N
        "train", "val", "test", or "" without a given split.
    """

    def hold_out(name: str, fraction: float) -> None:
        pool = np.flatnonzero(splits == "train")
        if not len(pool):
            raise DataError("No training images. Expected a train or Training folder.")
        held_out = split_groups(labels[pool], groups[pool], fraction, seed=seed)
        splits[pool[held_out]] = name

    splits = np.array(given, dtype="<U5")
    is_undivided = bool((splits == "").all())
    splits[splits == ""] = "train"
    if is_undivided and test_fraction > 0:
        hold_out("test", test_fraction)
    if not (splits == "val").any():
        hold_out("val", val_fraction)
    return splits


def assign_folds(
    labels: NDArray[np.int64], groups: NDArray[np.int64], num_folds: int, *, seed: int
) -> NDArray[np.int64]:
    """Assign a fold to every image, stratified by class; splits no group.

    Returns
    -------
    ndarray of int64, shape (N,)
        0 to ``num_folds`` − 1; each has images of every class.

    Raises
    ------
    DataError
        A class has fewer groups than there are folds.
    """
    for label in np.unique(labels):
        present = len(np.unique(groups[labels == label]))
        if present < num_folds:
            raise DataError(
                f"Class number {label} has {present} groups of near duplicates or patients; "
                f"{num_folds} folds need at least as many. Add images, or lower --folds."
            )
    folds = _divide_groups(labels, groups, num_folds, seed)
    for number in range(num_folds):
        absent = np.setdiff1d(labels, labels[folds == number])
        if len(absent):
            raise DataError(
                f"The groups of class number {absent[0]} are too uneven for {num_folds} folds: one "
                "would have no image of it. Lower --folds, or give another --seed."
            )
    return folds


def describe_balance(
    parts: NDArray[np.str_], names: Sequence[str], labels: NDArray[np.int64], num_classes: int
) -> list[dict[str, Any]]:
    """Compare the class shares of each part with those of the whole.

    ``parts`` has the name of each image's part. Those in ``names`` are described; those without
    images are omitted.

    Returns
    -------
    list of dict
        For each part: ``part``, ``n``, ``share`` of all images, ``per_class`` counts, and
        ``imbalance``, the largest difference between a class's shares in the part and in the whole.
    """
    whole = np.bincount(labels, minlength=num_classes) / len(labels)
    rows = []
    for name in names:
        counts = np.bincount(labels[parts == name], minlength=num_classes)
        if not counts.any():
            continue
        rows.append(
            {
                "part": name,
                "n": int(counts.sum()),
                "share": float(counts.sum() / len(labels)),
                "per_class": counts.tolist(),
                "imbalance": float(np.abs(counts / counts.sum() - whole).max()),
            }
        )
    return rows


def hash_manifest(manifest: pa.Table) -> str:
    """Compute the SHA-256 of a manifest's rows, independent of order and encoding."""
    columns = ("path", "content_sha256", "label", "group", "split")
    rows = zip(*(manifest[name].to_pylist() for name in columns), strict=True)
    digest = hashlib.sha256()
    for row in sorted(rows, key=lambda row: str(row[0])):
        digest.update(repr(row).encode())
    return digest.hexdigest()
