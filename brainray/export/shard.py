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
from dataclasses import dataclass, field, fields
from hashlib import sha256
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pydicom

from brainray import storage
from brainray.data.read import read_named_scan, read_scan
from brainray.errors import RejectedImage
from brainray.export.dicom import Deidentifier
from brainray.export.images import encode_png
from brainray.export.pseudonyms import Pseudonyms
from brainray.export.rows import (
    IMAGE_COLUMNS,
    Row,
    build_export_schema,
    choose_latest,
    hide_row,
    hide_value,
)
from brainray.export.text import has_text
from brainray.images.dicom_file import call_safely, get_value, get_words
from brainray.images.slices import ReadOptions, ScanFile, find_slice, open_file, recognise_format
from brainray.inference.store import METADATA_KEY

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
    pseudonyms: Pseudonyms = field(repr=False)
    deidentifier: Deidentifier
    images: ImageFormat
    reading: ReadOptions
    listed: pa.Table | None
    """Rows of :data:`brainray.data.scans.LISTING_SCHEMA`, named as in the predictions; None where
    these names are the URIs."""


@dataclass(slots=True)
class ShardCounts:
    """What became of the slices of a shard."""

    outcomes: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    num_new: int = 0
    """Slices whose source was opened in this run."""
    num_with_text: int = 0
    num_burned_in_unknown: int = 0

    def encode(self) -> str:
        """Return the counts as JSON; ``asdict`` would count the pairs of a Counter."""
        return json.dumps({one.name: getattr(self, one.name) for one in fields(self)})

    @classmethod
    def decode(cls, text: str) -> "ShardCounts":
        """Return the counts that :meth:`encode` made a text of."""
        document = json.loads(text)
        counts = {name: Counter(document[name]) for name in ("outcomes", "reasons")}
        return cls(**(document | counts))

    def add(self, other: "ShardCounts") -> None:
        """Add the counts of another shard."""
        self.outcomes.update(other.outcomes)
        self.reasons.update(other.reasons)
        self.num_new += other.num_new
        self.num_with_text += other.num_with_text
        self.num_burned_in_unknown += other.num_burned_in_unknown


def export_shard(shard: int, rows: Iterable[Row], task: ShardTask) -> ShardCounts:
    """Export all slices of some scan files.

    Parameters
    ----------
    shard : int
    rows : iterable of dict
        All rows of the predictions of these files.
    task : ShardTask
    """
    files = choose_latest(rows)
    sources = _Sources(task, files)
    earlier = _read_earlier(shard, task)
    counts, exported = ShardCounts(), []
    for name, slices in files.items():
        hidden = [hide_row(row, task.pseudonyms) for row in slices]
        known: Sequence[Row | None] = [earlier.get(row["slice_id"]) for row in hidden]
        if not all(_is_final(row, old) for row, old in zip(hidden, known, strict=True)):
            known = _export_file(name, slices, hidden, sources, task)
            counts.num_new += len(slices)
        exported += [row | old for row, old in zip(hidden, known, strict=True) if old is not None]
    _write_table(shard, exported, task)
    _delete_images({row["image"] for row in earlier.values()}, exported, task)
    _count(exported, counts)
    return counts


def _count(exported: Sequence[Row], counts: ShardCounts) -> None:
    for row in exported:
        counts.outcomes[row["outcome"]] += 1
        if row["outcome_reason"] is not None:
            counts.reasons[row["outcome_reason"]] += 1
        counts.num_with_text += bool(row["has_text"])
        counts.num_burned_in_unknown += row["burned_in"] == "unknown"


# ---- the table of the shard ----------------------------------------------------------------------


def name_table(output_uri: str, shard: int) -> str:
    """Return the URI of a shard's table."""
    return storage.join(output_uri, DATA_FOLDER, f"part-{shard:05d}.parquet")


def _read_earlier(shard: int, task: ShardTask) -> dict[str, Row]:
    """Return what an earlier run found of each slice, by ``slice_id``."""
    try:
        table = storage.read_table(name_table(task.output_uri, shard))
    except FileNotFoundError:
        return {}
    columns = ["slice_id", "content_id", *IMAGE_COLUMNS]
    return {row["slice_id"]: row for row in table.select(columns).to_pylist()}


def _is_final(row: Row, earlier: Row | None) -> bool:
    if earlier is None or earlier["content_id"] != row["content_id"]:
        return False
    return earlier["outcome_reason"] not in NOT_FINAL


def _write_table(shard: int, rows: Sequence[Row], task: ShardTask) -> None:
    schema = build_export_schema(task.classes)
    metadata = {METADATA_KEY: json.dumps(task.about)}
    table = pa.Table.from_pylist(list(rows), schema=schema.with_metadata(metadata))
    storage.write_table(name_table(task.output_uri, shard), table)


def _delete_images(earlier: set[str | None], rows: Sequence[Row], task: ShardTask) -> None:
    """Delete the images of sources that are rejected now."""
    for image in earlier - {row["image"] for row in rows} - {None}:
        uri = storage.join(task.output_uri, *str(image).split("/"))
        if storage.exists(uri):
            storage.delete_file(uri)


# ---- sources -------------------------------------------------------------------------------------


class _Sources:
    """Reads the files of a shard again."""

    def __init__(self, task: ShardTask, names: Iterable[str]) -> None:
        self._max_bytes = task.reading.limits.max_bytes
        self._listed: dict[str, Row] | None = None
        if task.listed is not None:
            own = task.listed.filter(
                pc.is_in(task.listed["scan_uri"], pa.array(list(names), pa.string()))
            )
            self._listed = {row["scan_uri"]: row for row in own.to_pylist()}

    def read(self, name: str, content_sha256: str | None) -> bytes:
        """Read a file, and check that it is the one that was classified.

        Raises
        ------
        RejectedImage
            ``missing``, ``unreadable`` or ``changed``.
        """
        if self._listed is None:
            content = read_named_scan(name, max_bytes=self._max_bytes)
        elif name in self._listed:
            found = self._listed[name]
            content = read_scan(
                found["uri"], found["row_group"], found["row"], max_bytes=self._max_bytes
            )
        else:
            raise RejectedImage("missing", "The source is not among the files of --scans-uri.")
        if sha256(content).hexdigest() != content_sha256:
            raise RejectedImage(CHANGED, "The source has changed since it was classified.")
        return content


def _export_file(
    name: str, slices: Sequence[Row], hidden: Sequence[Row], sources: _Sources, task: ShardTask
) -> list[Row]:
    """Export the slices of one file; return the values of :data:`IMAGE_COLUMNS` of each."""
    reasons = [row["reason"] if row["status"] == "rejected" else None for row in slices]
    if task.images == "none" or all(reasons):
        return [_reject(reason) if reason else _accept() for reason in reasons]
    try:
        content = sources.read(name, slices[0]["content_sha256"])
        if task.images == "dicom":
            found = _export_dicom(name, content, slices, hidden, task)
        else:
            found = _export_pngs(content, slices, hidden, task)
    except RejectedImage as rejection:
        found = [_reject(rejection.reason)] * len(slices)
    return [_reject(reason) if reason else one for reason, one in zip(reasons, found, strict=True)]


def _accept(**values: Any) -> Row:  # noqa: ANN401 - of any column
    return dict.fromkeys(IMAGE_COLUMNS) | {"outcome": "exported"} | values


def _reject(reason: str) -> Row:
    return dict.fromkeys(IMAGE_COLUMNS) | {"outcome": "rejected", "outcome_reason": reason}


# ---- images --------------------------------------------------------------------------------------


def _export_pngs(
    content: bytes, slices: Sequence[Row], hidden: Sequence[Row], task: ShardTask
) -> list[Row]:
    file = open_file(content, task.reading)
    facts = _read_facts(content, hidden[0]["patient"], task)
    found = []
    for row, own in zip(slices, hidden, strict=True):
        try:
            found.append(_export_png(file, row, own["slice_id"], task) | facts)
        except RejectedImage as rejection:
            found.append(_reject(rejection.reason))
    return found


def _export_png(file: ScanFile, row: Row, slice_id: str, task: ShardTask) -> Row:
    if row["status"] == "rejected":
        return _reject(row["reason"])
    samples = file.decode(find_slice(file, row["frame"]))
    png = encode_png(samples)
    return _accept(
        image=_write_image(f"{slice_id}.png", png.content, task),
        slope=png.slope,
        intercept=png.intercept,
        has_text=has_text(samples),
    )


def _export_dicom(
    name: str, content: bytes, slices: Sequence[Row], hidden: Sequence[Row], task: ShardTask
) -> list[Row]:
    """Export an object with all of its frames."""
    if recognise_format(content) != "dicom":
        raise RejectedImage(NOT_DICOM, "The source is no DICOM object. Give --images png.")
    file = open_file(content, task.reading)
    texts = [
        None
        if row["status"] == "rejected"
        else has_text(file.decode(find_slice(file, row["frame"])))
        for row in slices
    ]
    converted = task.deidentifier.convert(content, task.reading.limits)
    file_id = hide_value("scan_uri", name, task.pseudonyms)
    image = _write_image(f"{file_id}.dcm", converted, task)
    facts = _read_facts(content, hidden[0]["patient"], task)
    return [_accept(image=image, has_text=text) | facts for text in texts]


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
