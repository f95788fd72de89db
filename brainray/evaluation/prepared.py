"""From a data set's place to samples that are scanned, grouped and split."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from brainray.data.expand import expand_files
from brainray.data.findings import REFERENCES
from brainray.data.fingerprint import Fingerprints, fingerprint_samples
from brainray.data.labelled import FoundSamples
from brainray.data.near_duplicates import (
    find_nearest,
    group_near_duplicates,
    merge_groups,
    standardise_thumbnails,
)
from brainray.data.scan_store import ScanStore
from brainray.data.splits import MANIFEST_SCHEMA
from brainray.errors import DataError
from brainray.images.preprocess import Preprocessing
from brainray.images.slices import ReadOptions
from brainray.inference.schema import SCAN_SCHEMA

MANIFEST_FILE = "manifest.parquet"
IDENTIFIERS = ("patient", "study", "series", "sop_instance")
"""Columns of a scan whose hashes are forgotten once they have made groups."""


@dataclass(frozen=True, slots=True)
class GroupedData:
    """A data set that is scanned and grouped, and not split yet."""

    found: FoundSamples
    scan: Fingerprints
    labels: NDArray[np.int64]
    """Class of every sample, shape (N,)."""
    kept: NDArray[np.int64]
    """Numbers of the samples that could be opened, shape (n,)."""
    standardised: NDArray[np.float32]
    """Their thumbnails, shape (n, 576)."""
    groups: NDArray[np.int64]
    """Their groups, shape (n,)."""
    num_named: int
    """Scans for which the data set, or the scan's own file, names a group or a patient."""


@dataclass(frozen=True, slots=True)
class PreparedData:
    """A data set that is ready to be trained or judged on."""

    found: FoundSamples
    manifest: pa.Table
    """Rows of :data:`brainray.data.splits.MANIFEST_SCHEMA`, in sample order."""
    labels: NDArray[np.int64]
    """Class of every sample, shape (N,)."""
    splits: NDArray[np.str_]
    """train, val, test or rejected, shape (N,); in place of the first three, fold-0, fold-1 …
    where a data set is cross-validated."""
    store: ScanStore
    """Opens any sample."""
    scans: pa.Table
    """Rows of :data:`brainray.inference.schema.SCAN_SCHEMA`, in sample order, without hashes of
    identifiers."""
    num_named: int
    """Of :class:`GroupedData`."""

    def select(self, split: str) -> NDArray[np.int64]:
        """Return the sample numbers of a split, ascending."""
        return np.flatnonzero(self.splits == split)

    def count_rejected(self, given_split: str | None = None) -> dict[str, int]:
        """Return how many scans were rejected, by reason; of all, or of a given split."""
        given = self.found.samples["split"].to_pylist()
        reasons = [
            reason
            for reason, split in zip(self.manifest["reason"].to_pylist(), given, strict=True)
            if reason and given_split in (None, split)
        ]
        return {reason: reasons.count(reason) for reason in sorted(set(reasons))}


def group_samples(
    found: FoundSamples,
    classes: Sequence[str],
    *,
    keep: Sequence[Preprocessing],
    reading: ReadOptions,
    min_correlation: float,
) -> GroupedData:
    """Open every scan of a data set once, and group those of one patient, or that look alike.

    Files with several slices are expanded first: a scan is one slice.

    Parameters
    ----------
    keep : sequence of Preprocessing
        What pixels to leave in the object store, if they fit.
    reading : ReadOptions
        How the files are read.
    min_correlation : float
        Of the thumbnails of two slices of one group, in (0, 1].

    Raises
    ------
    DataError
        Not one scan of a class can be opened.
    """
    found = expand_files(found, reading)
    samples = found.samples
    scan = fingerprint_samples(samples, reading=reading, keep=keep)
    labels = samples["label"].to_numpy().astype(np.int64)
    kept = check_usable(labels, scan.table, classes)
    standardised = standardise_thumbnails(stack_thumbnails(scan.table["thumbnail"].take(kept)))
    near_duplicates = group_near_duplicates(standardised, min_correlation=min_correlation)
    groups = join_groups(near_duplicates, samples, scan.table, kept)
    named = pc.coalesce(samples["group"], find_patients(samples, scan.table))
    num_named = len(named) - named.null_count
    return GroupedData(found, scan, labels, kept, standardised, groups, num_named)


def join_groups(
    near_duplicates: NDArray[np.int64], samples: pa.Table, scan: pa.Table, kept: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Join groups of near-identical slices with the data set's own groups, and with patients.

    Parameters
    ----------
    near_duplicates : ndarray of int64, shape (n,)
        Of the samples ``kept``.
    samples, scan : Table
        Sample table, and what opening its scans brought.
    kept : ndarray of int64, shape (n,)
        Numbers of the samples that could be opened.

    Returns
    -------
    ndarray of int64, shape (n,)
        Connected components: no patient, and no group that is given, is in two of them. Their
        numbers do not depend on the key of the hashes.
    """
    for names in (samples["group"], find_patients(samples, scan)):
        near_duplicates = merge_groups(near_duplicates, names.take(pa.array(kept)).to_pylist())
    return near_duplicates


def find_patients(samples: pa.Table, scan: pa.Table) -> pa.ChunkedArray:
    """Return what stands for the patient of each scan; null for pictures, which name none.

    The keyed hash of the patient's identifier; where the file has none, that of its study, else of
    its series, which for a NIfTI volume is its content, else the file's URI if it has several
    slices.
    """
    several = pc.if_else(
        pc.greater_equal(samples["frame"], 0), samples["uri"], pa.scalar(None, pa.string())
    )
    return pc.coalesce(scan["patient"], scan["study"], scan["series"], several)


def split_samples(
    data: GroupedData,
    classes: Sequence[str],
    splits: NDArray[np.str_],
    references: Mapping[str, Sequence[str]] = REFERENCES,
) -> PreparedData:
    """Give the scans their splits, and look up what each resembles most elsewhere.

    Parameters
    ----------
    splits : ndarray of str, shape (n,)
        Of the scans that could be opened.
    references : mapping of str to sequence of str
        The splits that those of a held-out split are looked up in.
    """
    every_split = np.full(len(data.labels), "rejected", dtype="<U12")
    every_split[data.kept] = splits
    manifest = build_manifest(
        data.found, data.scan.table, classes, data.kept, data.groups, every_split
    )
    for split, others in references.items():
        manifest = look_up_nearest(
            manifest, data.standardised, data.kept, every_split, split, others
        )
    table = data.scan.table.drop_columns(list(IDENTIFIERS))
    for name in set(SCAN_SCHEMA.names).difference(table.column_names):
        table = table.append_column(name, pa.nulls(table.num_rows, SCAN_SCHEMA.field(name).type))
    scans = table.select(SCAN_SCHEMA.names).cast(SCAN_SCHEMA)
    return PreparedData(
        found=data.found,
        manifest=manifest,
        labels=data.labels,
        splits=every_split,
        store=data.scan.store,
        scans=scans,
        num_named=data.num_named,
    )


def stack_thumbnails(column: pa.ChunkedArray) -> NDArray[np.uint8]:
    """Return thumbnails as an array of uint8, shape (N, 576)."""
    rows = [np.frombuffer(value, np.uint8) for value in column.to_pylist()]
    return np.stack(rows) if rows else np.zeros((0, 576), np.uint8)


def check_usable(
    labels: NDArray[np.int64], scan: pa.Table, classes: Sequence[str]
) -> NDArray[np.int64]:
    """Return the numbers of the scans that can be opened.

    Raises
    ------
    DataError
        Not one scan of a class can be.
    """
    reasons = scan["reason"].to_pylist()
    usable = np.array([reason is None for reason in reasons])
    for label in np.unique(labels):
        of_class = np.flatnonzero(labels == label)
        if not usable[of_class].any():
            raise DataError(
                f"None of the {len(of_class)} images of class {classes[label]} can be opened "
                f"(the first is {reasons[of_class[0]]}). "
                "Expected JPEG, PNG, BMP, GIF, TIFF or WebP pictures, DICOM or NIfTI files."
            )
    return np.flatnonzero(usable)


def build_manifest(
    found: FoundSamples,
    scan: pa.Table,
    classes: Sequence[str],
    kept: NDArray[np.int64],
    groups: NDArray[np.int64],
    splits: NDArray[np.str_],
) -> pa.Table:
    """Write down what became of every sample; the nearest images are not looked up yet.

    Parameters
    ----------
    kept : ndarray of int64, shape (n,)
        Numbers of the samples that could be opened.
    groups : ndarray of int64, shape (n,)
        Their groups; a rejected sample gets one of its own.
    splits : ndarray of str, shape (N,)
        Of every sample.
    """
    count = found.samples.num_rows
    every_group = np.arange(count) + (groups.max(initial=-1) + 1)
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


def look_up_nearest(
    manifest: pa.Table,
    standardised: NDArray[np.float32],
    kept: NDArray[np.int64],
    splits: NDArray[np.str_],
    split: str,
    references: Sequence[str],
) -> pa.Table:
    """Write down each image's most similar one among the splits it is held out from."""
    queries = np.flatnonzero(splits[kept] == split)
    pool = np.flatnonzero(np.isin(splits[kept], references))
    if not len(queries) or not len(pool):
        return manifest
    nearest, correlation = find_nearest(standardised[queries], standardised[pool])
    labels = manifest["label"].take(pa.array(kept[pool[nearest]])).to_pylist()
    return write_nearest(manifest, kept[queries], correlation, labels)


def write_nearest(
    manifest: pa.Table,
    rows: NDArray[np.int64],
    correlation: NDArray[np.float32],
    labels: Sequence[str],
) -> pa.Table:
    """Fill the nearest images' columns of some rows of a manifest."""
    columns = {"nearest_correlation": correlation.tolist(), "nearest_label": labels}
    for name, values in columns.items():
        filled = manifest[name].to_pylist()
        for row, value in zip(rows, values, strict=True):
            filled[row] = value
        place = MANIFEST_SCHEMA.get_field_index(name)
        field = MANIFEST_SCHEMA.field(name)
        manifest = manifest.set_column(place, field, pa.array(filled, field.type))
    return manifest
