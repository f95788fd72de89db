"""The prediction table: a row for each slice with one content.

Bulk jobs, evaluation, cross-validation and ``brainray classify FILE --json`` all write this schema.
Some of them append columns for labels and splits.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from brainray.data.slice_columns import SLICE_FIELDS, describe_slice
from brainray.errors import ClassifierError, RejectedImage
from brainray.images.preprocess import Preprocessing
from brainray.images.slices import ScanFile, name_slice, open_slice
from brainray.inference.engine import Prediction
from brainray.model.explain import STRIDE_PX, count_cells
from brainray.model.reasons import find_status

SCHEMA_VERSION = 4
"""4 added the columns of :data:`brainray.data.slice_columns.SLICE_FIELDS`; 3 added ``engine``,
``precision``, ``logits`` and ``features``, and bulk jobs write below
``predictions/classifier_id=<id>/``; 2 added ``class_map``."""

SCAN_SCHEMA = pa.schema(
    [
        ("scan_uri", pa.string()),
        ("content_sha256", pa.string()),
        ("reason", pa.string()),
        ("width_px", pa.int32()),
        ("height_px", pa.int32()),
        ("size_bytes", pa.int64()),
        ("modified_ns", pa.int64()),
        *SLICE_FIELDS,
    ]
)
"""Columns of a scan before prediction; ``reason`` is null if it could be opened."""


@dataclass(slots=True)
class SliceRow:
    """A slice before prediction, opened or rejected; or a file that is rejected as a whole."""

    columns: dict[str, Any]
    """Columns of :data:`SCAN_SCHEMA`; a missing one is null."""
    image: NDArray[np.uint8] | None = None
    """Network input, shape (size_px, size_px); None if rejected."""
    detail: str | None = None
    """Why it is rejected."""
    decode_s: float = 0.0


def open_slices(
    file: ScanFile, scan: dict[str, Any], preprocessing: Preprocessing
) -> Iterator[SliceRow]:
    """Yield the slices of an opened file; each of them may be rejected.

    ``scan`` has the columns of the file, such as ``scan_uri`` and ``content_sha256``.
    """
    for index, info in enumerate(file.slices):
        started = time.perf_counter()
        name = name_slice(scan["scan_uri"], info.frame)
        row = SliceRow(scan | {"scan_uri": name} | describe_slice(info, None))
        try:
            opened = open_slice(file, index, preprocessing)
            height, width = opened.scan.samples.shape
            row.columns |= {"height_px": height, "width_px": width}
            row.columns["grey_range"] = opened.grey_range
            row.image = opened.scan.image
        except RejectedImage as rejection:
            row.columns["reason"], row.detail = rejection.reason, rejection.message
        row.decode_s = time.perf_counter() - started
        yield row


def build_schema(classes: Sequence[str]) -> pa.Schema:
    """Build the schema of the prediction table for some classes, in class order."""
    floats = pa.list_(pa.float32())
    return pa.schema(
        [
            pa.field("scan_uri", pa.string(), nullable=False),
            pa.field("content_sha256", pa.string()),  # null if the file could not be read
            pa.field("status", pa.string(), nullable=False),  # model.reasons.Status
            pa.field("reason", pa.string()),  # a key of model.reasons.REASONS; null if classified
            pa.field("predicted_class", pa.string()),  # null unless classified
            pa.field("confidence", pa.float32()),  # of the most probable class; null if rejected
            *(pa.field(f"prob_{name}", pa.float32()) for name in classes),
            pa.field("width_px", pa.int32()),
            pa.field("height_px", pa.int32()),
            pa.field("classifier_id", pa.string(), nullable=False),
            pa.field("engine", pa.string(), nullable=False),  # openvino or torch
            pa.field("precision", pa.string(), nullable=False),  # fp32, bf16 or int8
            pa.field("classified_at", pa.timestamp("us", tz="UTC"), nullable=False),
            pa.field("size_bytes", pa.int64()),  # of the file; null if unknown
            pa.field("modified_ns", pa.int64()),  # of the file, since 1970; null if unknown
            *SLICE_FIELDS,
            # Null unless requested, and if a scan could not be opened.
            pa.field("class_map", floats),  # of the most probable class, in logits, row by row;
            # null for every rejected scan
            pa.field("logits", floats),  # in class order, before calibration
            pa.field("features", floats),  # pooled features of the last three stages
        ]
    )


def describe_class_map(size_px: int) -> dict[str, int]:
    """Return the shape of a class map, and its stride in pixels of network input."""
    side = count_cells(size_px)
    return {"height": side, "width": side, "stride_px": STRIDE_PX}


def build_rows(
    scans: pa.Table,
    prediction: Prediction,
    *,
    classes: Sequence[str],
    classifier_id: str,
    engine: dict[str, str],
) -> pa.Table:
    """Build the rows of the prediction table for some scans.

    Parameters
    ----------
    scans : Table
        Columns of :data:`SCAN_SCHEMA`; others are dropped.
    prediction : Prediction
        Predictions for the scans whose ``reason`` is null, in their order.
    engine : dict
        From :meth:`brainray.inference.engine.Engine.describe`.

    Raises
    ------
    ClassifierError
        A probability is not a number.
    """
    count, num_classes = scans.num_rows, len(classes)
    is_opened = scans["reason"].is_null().to_numpy()
    opened = np.flatnonzero(is_opened)
    if not np.isfinite(prediction.probs).all():
        raise ClassifierError("The classifier gives probabilities that are not numbers.")
    probs = np.zeros((count, num_classes), np.float32)
    probs[opened] = prediction.probs
    reasons = scans["reason"].to_pylist()
    for row, reason in zip(opened, prediction.reasons, strict=True):
        reasons[row] = reason
    status = np.array([find_status(reason) for reason in reasons], dtype=object)
    is_rejected = status == "rejected"
    top = probs.argmax(1)
    class_maps = None
    if prediction.class_maps is not None:
        class_maps = prediction.class_maps[np.arange(len(opened)), top[opened]]

    def build_lists(values: NDArray[np.float32] | None, has_value: NDArray[np.bool_]) -> pa.Array:
        rows: list[Any] = [None] * count
        if values is not None:
            for row, value in zip(opened, values, strict=True):
                rows[row] = value.ravel() if has_value[row] else None
        return pa.array(rows, pa.list_(pa.float32()))

    schema = build_schema(classes)
    columns = {
        **{name: scans[name] for name in SCAN_SCHEMA.names},
        "status": pa.array(status, pa.string()),
        "reason": pa.array(reasons, pa.string()),
        "predicted_class": pa.array(
            np.array(classes, dtype=object)[top], pa.string(), mask=status != "classified"
        ),
        "confidence": pa.array(probs[np.arange(count), top], mask=is_rejected),
        **{
            f"prob_{name}": pa.array(probs[:, k], mask=is_rejected)
            for k, name in enumerate(classes)
        },
        "classifier_id": [classifier_id] * count,
        "engine": [engine["backend"]] * count,
        "precision": [engine["precision"]] * count,
        "classified_at": pa.array([datetime.now(UTC)] * count, pa.timestamp("us", tz="UTC")),
        "class_map": build_lists(class_maps, ~is_rejected),
        "logits": build_lists(prediction.logits, is_opened),
        "features": build_lists(prediction.features, is_opened),
    }
    return pa.table({name: columns[name] for name in schema.names}, schema=schema)


def stack_probs(rows: pa.Table, classes: Sequence[str]) -> NDArray[np.float32]:
    """Return the probabilities of n rows, none of them null, shape (n, K), in class order."""
    return np.stack([rows[f"prob_{name}"].to_numpy() for name in classes], axis=1)


def stack_lists(column: pa.ChunkedArray) -> NDArray[np.float32]:
    """Return a column of n lists of equal length, none of them null, as an array with n rows."""
    assert not column.null_count, "every row has a list"
    values: NDArray[np.float32] = column.combine_chunks().flatten().to_numpy()
    return values.reshape(len(column), -1) if len(column) else np.zeros((0, 0), np.float32)
