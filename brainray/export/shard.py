"""One shard of a de-identified export: some scan files to their images and one Parquet file.

::

    OUT/
      data/part-<shard>.parquet        rows of the shard, whole or absent
      images/<2 digits>/<id>.png       or .dcm

Images are written before the table that names them, under names that follow from the key. Whoever
does a shard again writes the same files. A table that is there saves the work for the rows that it
has; those whose source could not be read are tried again.
"""

import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal

import cv2
import numpy as np
import pyarrow as pa
import pydicom
from numpy.typing import NDArray

from brainray.errors import RejectedImage
from brainray.export.dicom import Deidentifier
from brainray.export.rows import (
    IMAGE_COLUMNS,
    build_export_schema,
    choose_latest,
    hide_row,
    hide_value,
)
from brainray.export.text import has_text
from brainray.images.dicom_file import call_safely, get_value, get_words
from brainray.images.intensity import to_unsigned
from brainray.images.slices import ReadOptions, ScanFile, find_slice, open_file, recognise_format
from brainray.inference.sources import Row, SourceReader
from brainray.inference.store import METADATA_KEY
from brainray.io import storage

ImageFormat = Literal["png", "dicom", "none"]

DATA_FOLDER, IMAGES_FOLDER = "data", "images"
CHANGED, NOT_DICOM = "changed", "not_dicom"
"""Reasons of an export: the source is not what was classified; it is no DICOM object."""
NOT_FINAL = ("missing", "unreadable", CHANGED)
"""Reasons of sources that are tried again in every run."""

_FACTS = ("BurnedInAnnotation", "StudyDate")


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardTask:
    """What every shard needs; may be sent to workers."""

    output_uri: str
    classes: tuple[str, ...]
    about: dict[str, Any]
    """Metadata of the Parquet files."""
    deidentifier: Deidentifier
    images: ImageFormat
    reading: ReadOptions
    sources: SourceReader


def export_shard(shard: int, rows: Iterable[Row], task: ShardTask) -> Counter[str]:
    """Export all slices of some scan files; `rows` are all rows of their predictions.

    Returns the numbers of slices by ``outcome NAME`` and ``reason NAME``; of those ``new``, whose
    source was opened in this run; of those ``with_text`` and with ``burned_in_unknown``.
    """
    files = choose_latest(rows)
    sources = task.sources.select(files)
    table_uri = storage.join(task.output_uri, DATA_FOLDER, f"part-{shard:05d}.parquet")
    try:
        columns = ["slice_id", "content_id", *IMAGE_COLUMNS]
        found = storage.read_table(table_uri).select(columns).to_pylist()
    except FileNotFoundError:
        found = []
    earlier = {row["slice_id"]: row for row in found}
    counts: Counter[str] = Counter()
    exported: list[Row] = []
    for name, slices in files.items():
        hidden = [hide_row(row, task.deidentifier.pseudonyms) for row in slices]
        known = [earlier.get(row["slice_id"], {}) for row in hidden]
        if not all(_is_final(row, old) for row, old in zip(hidden, known, strict=True)):
            known = _export_file(name, slices, hidden, sources, task)
            counts["new"] += len(slices)
        exported += [row | old for row, old in zip(hidden, known, strict=True)]
    schema = build_export_schema(task.classes)
    schema = schema.with_metadata({METADATA_KEY: json.dumps(task.about)})
    storage.write_table(table_uri, pa.Table.from_pylist(exported, schema=schema))
    kept = {row["image"] for row in exported}
    for image in {row["image"] for row in found} - kept - {None}:  # of what is rejected now
        uri = storage.join(task.output_uri, *image.split("/"))
        if storage.exists(uri):
            storage.delete_file(uri)
    for row in exported:
        counts[f"outcome {row['outcome']}"] += 1
        if row["outcome_reason"] is not None:
            counts[f"reason {row['outcome_reason']}"] += 1
        counts["with_text"] += bool(row["has_text"])
        counts["burned_in_unknown"] += row["burned_in"] == "unknown"
    return counts


def _is_final(row: Row, earlier: Row) -> bool:
    """Tell whether an earlier run exported a slice, or rejected it for good."""
    is_same = bool(earlier) and earlier["content_id"] == row["content_id"]
    return is_same and earlier["outcome_reason"] not in NOT_FINAL


# ---- files ---------------------------------------------------------------------------------------


def _export_file(
    name: str,
    slices: Sequence[Row],
    hidden: Sequence[Row],
    sources: SourceReader,
    task: ShardTask,
) -> list[Row]:
    """Export the slices of one file; return the values of :data:`IMAGE_COLUMNS` of each."""
    reasons = [row["reason"] if row["status"] == "rejected" else None for row in slices]
    if task.images == "none" or all(reasons):
        return [_reject(reason) if reason else _accept() for reason in reasons]
    found = []
    try:
        content = sources.read(name)
        if sha256(content).hexdigest() != slices[0]["content_sha256"]:
            raise RejectedImage(CHANGED, "The source has changed since it was classified.")
        if task.images == "dicom" and recognise_format(content) != "dicom":
            raise RejectedImage(NOT_DICOM, "The source is no DICOM object. Give --images png.")
        file = open_file(content, task.reading)
        facts = _read_facts(content, hidden[0]["patient"], task)
        for row, own, reason in zip(slices, hidden, reasons, strict=True):
            try:
                one = _reject(reason) if reason else _export_slice(file, row, own, task) | facts
            except RejectedImage as rejection:
                if task.images == "dicom":  # an object is exported with all of its frames
                    raise
                one = _reject(rejection.reason)
            found.append(one)
        if task.images == "dicom":
            converted = task.deidentifier.convert(content, task.reading.limits)
            file_id = hide_value("scan_uri", name, task.deidentifier.pseudonyms)
            image = _write_image(f"{file_id}.dcm", converted, task)
            found = [one if one["outcome_reason"] else one | {"image": image} for one in found]
    except RejectedImage as rejection:
        return [_reject(reason or rejection.reason) for reason in reasons]
    return found


def _accept(**values: Any) -> Row:  # noqa: ANN401 - of any column
    return dict.fromkeys(IMAGE_COLUMNS) | {"outcome": "exported"} | values


def _reject(reason: str) -> Row:
    return dict.fromkeys(IMAGE_COLUMNS) | {"outcome": "rejected", "outcome_reason": reason}


def _export_slice(file: ScanFile, row: Row, hidden: Row, task: ShardTask) -> Row:
    samples = file.decode(find_slice(file, row["frame"]))
    if task.images == "dicom":
        return _accept(has_text=has_text(samples))
    png, slope, intercept = _encode_png(samples)
    image = _write_image(f"{hidden['slice_id']}.png", png, task)
    return _accept(image=image, slope=slope, intercept=intercept, has_text=has_text(samples))


def _encode_png(samples: NDArray[Any]) -> tuple[bytes, float, float]:
    """Encode grey samples losslessly: whole numbers that 16 bits hold keep their steps.

    Other values are mapped linearly onto 16 bits, those that are not finite to the lowest. A sample
    is the picture's value times the slope, plus the intercept; both are returned with the file.
    """
    unsigned = to_unsigned(samples)
    finite = samples[np.isfinite(samples)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    darkest, brightest = float(unsigned.min()), float(unsigned.max())
    slope = (high - low) / (brightest - darkest) if brightest > darkest else 1.0
    _, encoded = cv2.imencode(".png", unsigned)
    return encoded.tobytes(), slope, low - slope * darkest


def _write_image(name: str, content: bytes, task: ShardTask) -> str:
    """Write an image; return its path below the output."""
    folder = name[:2]
    storage.write_bytes(storage.join(task.output_uri, IMAGES_FOLDER, folder, name), content)
    return f"{IMAGES_FOLDER}/{folder}/{name}"


def _read_facts(content: bytes, patient: str | None, task: ShardTask) -> Row:
    """Return what a DICOM header says of burned-in text, and the study's date, moved."""
    if recognise_format(content) != "dicom":
        return {"burned_in": "unknown"}
    header = call_safely(_read_header, content)
    is_free = get_words(header, "BurnedInAnnotation")[:1] == ("NO",)
    study_date = get_value(header, "StudyDate")
    return {
        "burned_in": "no" if is_free else "unknown",
        "study_date": task.deidentifier.shift(study_date and str(study_date), patient),
    }


def _read_header(content: bytes) -> pydicom.Dataset:
    return pydicom.dcmread(
        io.BytesIO(content), force=True, stop_before_pixels=True, specific_tags=list(_FACTS)
    )
