"""From a data set's place to samples that are scanned, grouped and split."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from brainray.dataset.scan import ScanStore, scan_samples
from brainray.dataset.source import FoundSamples
from brainray.dataset.split import MANIFEST_SCHEMA, assign_splits
from brainray.dataset.twins import (
    find_nearest,
    group_twins,
    merge_groups,
    standardise_thumbnails,
)
from brainray.errors import DataError
from brainray.pipelines.config import TrainConfig


@dataclass(frozen=True, slots=True)
class PreparedData:
    """A data set that is ready to be trained or judged on."""

    found: FoundSamples
    manifest: pa.Table
    """Rows of :data:`brainray.dataset.split.MANIFEST_SCHEMA`, in sample order."""
    labels: NDArray[np.int64]
    """Class of every sample, shape (N,)."""
    splits: NDArray[np.str_]
    """train, val, test or rejected, shape (N,)."""
    store: ScanStore
    """Gives the encoded bytes of any sample."""

    def select(self, split: str) -> NDArray[np.int64]:
        """Return the sample numbers of a split, ascending."""
        return np.flatnonzero(self.splits == split)

    def count_rejected(self) -> dict[str, int]:
        """Return how many scans were rejected, by reason."""
        reasons = [reason for reason in self.manifest["reason"].to_pylist() if reason]
        return {reason: reasons.count(reason) for reason in sorted(set(reasons))}


def prepare_training_data(found: FoundSamples, config: TrainConfig) -> PreparedData:
    """Scan, group and split a data set for training.

    Raises
    ------
    DataError
        The folders, labels or images do not make a data set.
    """
    samples = found.samples
    scan = scan_samples(samples, limits=config.limits)
    usable = np.array([reason is None for reason in scan.table["reason"].to_pylist()])
    labels = samples["label"].to_numpy().astype(np.int64)
    _check_usable(labels, usable, config.classes, scan.table)
    kept = np.flatnonzero(usable)
    standardised = standardise_thumbnails(stack_thumbnails(scan.table["thumbnail"].take(kept)))
    given = samples["group"].take(kept).to_pylist()
    groups = merge_groups(
        group_twins(standardised, min_correlation=config.group_correlation), given
    )
    splits = np.full(len(labels), "rejected", dtype="<U8")
    splits[kept] = assign_splits(
        samples["split"].take(kept).to_pylist(),
        labels[kept],
        groups,
        val_fraction=config.val_fraction,
        test_fraction=config.test_fraction,
        seed=config.seed,
    )
    manifest = _build_manifest(found, scan.table, config.classes, kept, groups, splits)
    manifest = add_nearest(manifest, standardised, kept, splits)
    return PreparedData(found, manifest, labels, splits, scan.store)


def stack_thumbnails(column: pa.ChunkedArray) -> NDArray[np.uint8]:
    """Return thumbnails as an array of uint8, shape (N, 576)."""
    rows = [np.frombuffer(value, np.uint8) for value in column.to_pylist()]
    return np.stack(rows) if rows else np.zeros((0, 576), np.uint8)


def _check_usable(
    labels: NDArray[np.int64], usable: NDArray[np.bool_], classes: tuple[str, ...], scan: pa.Table
) -> None:
    for label in np.unique(labels):
        if not usable[labels == label].any():
            reasons = [scan["reason"][int(i)].as_py() for i in np.flatnonzero(labels == label)]
            raise DataError(
                f"None of the {len(reasons)} images of class {classes[label]} can be opened "
                f"(first reason: {reasons[0]}). Expected JPEG, PNG, BMP, GIF, TIFF or WebP files."
            )


def _build_manifest(
    found: FoundSamples,
    scan: pa.Table,
    classes: tuple[str, ...],
    kept: NDArray[np.int64],
    groups: NDArray[np.int64],
    splits: NDArray[np.str_],
) -> pa.Table:
    count = found.samples.num_rows
    every_group = np.arange(count) + (groups.max(initial=-1) + 1)  # a rejected scan is alone
    every_group[kept] = groups
    return pa.table(
        {
            "path": found.samples["path"],
            "content_sha256": scan["content_sha256"],
            "label": [classes[label] for label in found.samples["label"].to_pylist()],
            "group": every_group,
            "split": splits.tolist(),
            "reason": scan["reason"],
            "nearest_correlation": pa.nulls(count, pa.float32()),
            "nearest_label": pa.nulls(count, pa.string()),
            "thumbnail": scan["thumbnail"].cast(pa.binary()),
        },
        schema=MANIFEST_SCHEMA,
    )


def add_nearest(
    manifest: pa.Table,
    standardised: NDArray[np.float32],
    kept: NDArray[np.int64],
    splits: NDArray[np.str_],
) -> pa.Table:
    """Write down each held-out image's most similar image among those it is held out from.

    Validation images look among the training images, test images among those of training
    and validation.
    """
    count = manifest.num_rows
    correlation = np.full(count, np.nan, np.float32)
    nearest_label: list[str | None] = [None] * count
    labels = manifest["label"].to_pylist()
    for split, references in (("val", ("train",)), ("test", ("train", "val"))):
        queries = np.flatnonzero(splits[kept] == split)
        pool = np.flatnonzero(np.isin(splits[kept], references))
        if not len(queries) or not len(pool):
            continue
        nearest, found = find_nearest(standardised[queries], standardised[pool])
        correlation[kept[queries]] = found
        for query, reference in zip(kept[queries], kept[pool[nearest]], strict=True):
            nearest_label[query] = labels[reference]
    columns = {
        "nearest_correlation": pa.array(correlation, pa.float32(), mask=np.isnan(correlation)),
        "nearest_label": pa.array(nearest_label, pa.string()),
    }
    for name, column in columns.items():
        manifest = manifest.set_column(manifest.column_names.index(name), name, column)
    return manifest
