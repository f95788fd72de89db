"""`brainray classify FILE …`: classify a few files in this process, without Ray.

The output has a row for each slice, and before them the slice evidence of each series.
"""

import secrets
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from brainray.errors import RejectedImage, StorageError
from brainray.images.decode import DecodeLimits
from brainray.images.slices import ReadOptions, name_slice, open_file
from brainray.inference.engine import Engine, open_engine
from brainray.inference.options import ClassifyJob
from brainray.inference.schema import SCAN_SCHEMA, SliceRow, build_rows, open_slices
from brainray.inference.series import SeriesRule, summarise_series
from brainray.io import storage
from brainray.io.identifiers import NUM_KEY_BYTES, read_key
from brainray.model.classifier import Classifier, load_classifier
from brainray.model.reasons import NOTICE, REASONS

BATCH_SIZE = 32
"""Slices of a file that are decoded and predicted at a time."""
MAX_LISTED_SLICES = 20
"""A file with more slices has one line in the table, unless all slices are asked for."""
BAR_WIDTH = 14


@dataclass(frozen=True, slots=True)
class FilePredictions:
    """The predictions for one file."""

    file: str
    """The name as given by the user."""
    rows: list[dict[str, Any]]
    """Rows of the prediction table: one for each slice, or one for a file that was rejected."""
    details: list[str | None]
    """For each row, why it has no class."""


@dataclass(frozen=True, slots=True)
class FilesResult:
    """The predictions for some files, and what computed them."""

    files: list[FilePredictions]
    classifier: Classifier
    engine: dict[str, str]
    """From :meth:`brainray.inference.engine.Engine.describe`."""
    series: list[dict[str, Any]]
    """For each, the keyed hashes ``series``, ``study`` and ``patient``, and the entries of
    :func:`brainray.inference.series.summarise_series`."""

    def to_json(self) -> dict[str, Any]:
        """Return everything but the details, ready for JSON."""
        return {
            "classifier_id": self.classifier.classifier_id,
            "classes": list(self.classifier.classes),
            "engine": self.engine,
            "notice": NOTICE,
            "predictions": [_to_json(row) for file in self.files for row in file.rows],
            "series": self.series,
        }


def classify_files(files: Iterable[str], job: ClassifyJob) -> FilesResult:
    """Classify files, each a path or URI, with the fields in ``options.FILE_OPTIONS`` of a job.

    Raises
    ------
    UserError
        The classifier or the key cannot be opened, or the options do not fit them.
    """
    key = secrets.token_bytes(NUM_KEY_BYTES)
    if job.id_key_file is not None:
        key = read_key(storage.make_absolute(job.id_key_file))
    classifier = load_classifier(job.classifier_uri)
    engine = open_engine(classifier, job.engine)
    predicted = [_predict_file(file, classifier, engine, job.reading, key) for file in files]
    rows = [row for file in predicted for row in file.rows]
    series = _summarise_series(rows, classifier.classes, job.rule)
    return FilesResult(predicted, classifier, engine.describe(), series)


def _predict_file(
    file: str, classifier: Classifier, engine: Engine, reading: ReadOptions, key: bytes
) -> FilePredictions:
    slices = _open(file, classifier, reading, key)
    rows: list[dict[str, Any]] = []
    for start in range(0, len(slices), BATCH_SIZE):
        batch = slices[start : start + BATCH_SIZE]
        images = [row.image for row in batch if row.image is not None]
        rows += build_rows(
            pa.Table.from_pylist([row.columns for row in batch], schema=SCAN_SCHEMA),
            engine.predict(np.stack(images) if images else engine.make_batch(0)),
            classes=classifier.classes,
            classifier_id=classifier.classifier_id,
            engine=engine.describe(),
        ).to_pylist()
    details = [
        opened.detail or REASONS.get(row["reason"])
        for row, opened in zip(rows, slices, strict=True)
    ]
    return FilePredictions(file, rows, details)


def _open(file: str, classifier: Classifier, reading: ReadOptions, key: bytes) -> list[SliceRow]:
    scan: dict[str, Any] = {"scan_uri": storage.make_absolute(file)}
    try:
        content = _read(file, reading.limits)
        scan["size_bytes"] = len(content)
        if len(content) <= reading.limits.max_bytes:  # a larger file was not read to its end
            scan["content_sha256"] = sha256(content).hexdigest()
        opened = open_file(content, reading, key=key)
        return list(open_slices(opened, scan, classifier.preprocessing))
    except RejectedImage as rejection:
        return [SliceRow(scan | {"reason": rejection.reason}, detail=rejection.message)]


def _summarise_series(
    rows: Iterable[dict[str, Any]], classes: Sequence[str], rule: SeriesRule
) -> list[dict[str, Any]]:
    """Summarise each series, in order of its first row."""
    by_series: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["series"] is not None:
            by_series.setdefault(row["series"], []).append(row)
    return [
        {name: own[0][name] for name in ("series", "study", "patient")}
        | summarise_series(own, classes, rule)
        for own in by_series.values()
    ]


def _read(file: str, limits: DecodeLimits) -> bytes:
    try:
        return storage.read_bytes(storage.make_absolute(file), max_bytes=limits.max_bytes)
    except FileNotFoundError as error:
        raise RejectedImage("missing", "The file does not exist.") from error
    except StorageError as error:
        if storage.is_folder(file):
            raise RejectedImage(
                "unreadable", "This is a folder. Give it as --scans-uri FOLDER --output-uri OUT."
            ) from error
        raise RejectedImage("unreadable", str(error)) from error


def _to_json(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with times as text and the shortest digits of each float32."""
    converted = {}
    for name, value in row.items():
        if isinstance(value, datetime):
            value = value.isoformat()
        elif isinstance(value, float) and name != "position_mm":
            value = float(str(np.float32(value)))
        converted[name] = value
    return converted


def build_tables(result: FilesResult, *, list_slices: bool) -> list[RenderableType]:
    """Build the tables that the command line prints; ``list_slices`` lists them all."""
    series = [one for one in result.series if one["num_slices"] > 1]
    shown: list[RenderableType] = []
    if series:
        note = "Slice evidence: not calibrated for series or patients.\n"
        shown += [_build_series_table(series), Text(note, "dim")]
    classifier = result.classifier
    about = f"Classifier {classifier.classifier_id}, {result.engine['description']}.\n{NOTICE}"
    table = _build_table(result.files, classifier.classes, list_slices=list_slices)
    return [*shown, table, Text(about, "dim")]


def _build_table(
    files: Iterable[FilePredictions], classes: Sequence[str], *, list_slices: bool
) -> Table:
    """Build a table with a line for each slice, or one for a file that has many."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("scan", overflow="fold")
    table.add_column("prediction", no_wrap=True)
    table.add_column("", width=BAR_WIDTH, no_wrap=True)
    table.add_column("probability", justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for file in files:
        if len(file.rows) > MAX_LISTED_SLICES and not list_slices:
            counts = Counter(row["predicted_class"] or row["reason"] for row in file.rows)
            words = ", ".join(f"{count} {name}" for name, count in counts.most_common())
            title = f"{len(file.rows)} slices"
            line = (Text(title), Text(), Text(), Text(f"{words}; --slices lists them", "dim"))
            table.add_row(Text(_escape(file.file)), *line)
            continue
        for row, detail in zip(file.rows, file.details, strict=True):
            name = name_slice(file.file, row["frame"])
            table.add_row(Text(_escape(name)), *_build_cells(row, detail, classes))
    return table


def _build_series_table(series: Iterable[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("series", no_wrap=True)
    table.add_column("answer", no_wrap=True)
    for title in ("evidence", "slices", "key slices"):
        table.add_column(title, overflow="fold")
    for number, one in enumerate(series, 1):
        has_class = one["reason"] is None
        evidence = ", ".join(f"{name} {_percent(v)}" for name, v in one["evidence"].items())
        slices = f"{one['num_used']} of {one['num_slices']} used"
        slices += "".join(f", {count} {reason}" for reason, count in one["skipped"].items())
        slices += "".join(f"; {flag}" for flag in one["flags"])
        names = [scan_uri.rpartition("/")[2] for scan_uri in one["key_slices"]]
        table.add_row(
            Text(str(number)),
            Text(one["answer"], "bold" if has_class else "yellow"),
            Text(evidence if has_class else f"{one['reason']}: {evidence}"),
            Text(slices),
            Text(_escape(" ".join(names))),
        )
    return table


def _build_cells(
    row: dict[str, Any], detail: str | None, classes: Sequence[str]
) -> tuple[Text | ProgressBar, ...]:
    if row["confidence"] is None:
        words = ": ".join(filter(None, (row["reason"], detail)))
        return Text(row["status"], "yellow"), Text(), Text(), Text(_escape(words))
    ordered = sorted(classes, key=lambda label: -row[f"prob_{label}"])
    most, *others = [f"{label} {_percent(row[f'prob_{label}'])}" for label in ordered[:3]]
    bar = ProgressBar(total=1, completed=row["confidence"], width=BAR_WIDTH, complete_style="cyan")
    has_class = row["predicted_class"] is not None
    return (
        Text(row["predicted_class"] or row["status"], "bold" if has_class else "yellow"),
        bar,
        Text(_percent(row["confidence"])),
        Text(f"then {', '.join(others)}" if has_class else f"most probable {most}", "dim"),
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _escape(text: str) -> str:
    """Escape the characters that move the cursor or reverse the direction of text."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
