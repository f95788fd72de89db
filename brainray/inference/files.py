"""`brainray classify FILE…`: predictions for a few files, without Ray and without a service.

A file with many slices is summarised first: what its series says, and which slices to look at.

Apart from the command line's other commands, so that Ray is not loaded: more than half of the
time of this one is imports anyway.
"""

import json
import logging
import os
import secrets
import select
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import sha256
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import tyro
from numpy.typing import NDArray
from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from brainray import storage
from brainray.data.slice_columns import describe_slice
from brainray.errors import ConfigError, RejectedImage, StorageError, UserError
from brainray.images.decode import DecodeLimits
from brainray.images.slices import ReadOptions, ScanFile, name_slice, open_file, open_slice
from brainray.inference.engine import Engine, EngineOptions, open_engine
from brainray.inference.schema import SCAN_SCHEMA, build_rows
from brainray.inference.series import SeriesRule, summarise_series
from brainray.io.identifiers import NUM_KEY_BYTES, read_key
from brainray.model.classifier import Classifier, find_default_classifier, load_classifier
from brainray.model.reasons import NOTICE, REASONS

BULK_OPTION = "--scans-uri"
EXIT_UNREAD = 141
"""Exit status where nobody reads the output any more: 128 and SIGPIPE's number, as shells do."""
FLAGS = tuple(
    f"--{prefix}{name}"
    for name in ("json", "slices", "verbose", "explain", "use-gpu", "redact-paths")
    for prefix in ("", "no-")
)
"""Options of either `brainray classify` that no value follows."""

BATCH_SIZE = 32
"""Slices of a file that are decoded and predicted at a time."""
NUM_LINES = 20
"""Slices of a file, more of which are listed only if they are asked for."""
BAR_WIDTH = 14
PIPED_WIDTH = 240
"""Columns where there is no terminal, so that no line is folded."""


@dataclass(frozen=True, kw_only=True)
class FilesJob:
    """Classify a few files at once. With --scans-uri in place of files, classify in bulk."""

    files: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Scans: pictures, DICOM files, NIfTI volumes; local, s3:// or gs://."""
    classifier_uri: str = field(default_factory=find_default_classifier)
    """A classifier bundle; `$BRAINRAY_CLASSIFIER`, else the one that comes with the project, if
    not given."""
    json: bool = False
    """Print rows of the prediction table, and what each series says, as JSON instead of tables for
    people."""
    slices: bool = False
    """List every slice of files with more than 20, too."""
    id_key_file: str | None = None
    """Key of the hashes that stand for identifiers, at least 16 bytes; random, and different each
    time, if not given."""
    rule: SeriesRule = SeriesRule()
    """When the slices of a series give it a class."""
    engine: Annotated[EngineOptions, tyro.conf.arg(name="")] = EngineOptions()
    reading: Annotated[ReadOptions, tyro.conf.arg(name="")] = ReadOptions()
    """How the files are read."""


@dataclass(frozen=True, slots=True)
class FileAnswer:
    """What is said of one file."""

    file: str
    """As it was given."""
    rows: list[dict[str, Any]]
    """A row of the prediction table for each slice; one for a file that is rejected as a whole."""
    details: list[str | None]
    """Of each row: why the slice has no class, in words."""


def find_files(arguments: Sequence[str]) -> list[str]:
    """Return the words of `brainray classify` that are neither options nor their values."""
    files: list[str] = []
    is_value = False
    for place, word in enumerate(arguments):
        if word == "--":
            return files + list(arguments[place + 1 :])
        if is_value:
            is_value = False
        elif word.startswith("-") and word != "-":
            is_value = word.startswith("--") and "=" not in word and word not in FLAGS
        else:
            files.append(word)
    return files


def asks_for_bulk(arguments: Sequence[str]) -> bool:
    """Tell whether `brainray classify` is to classify in bulk."""
    return any(word.partition("=")[0] == BULK_OPTION for word in arguments)


def stop_writing() -> bool:
    """Discard further output if nobody reads it any more, as after `head`; return whether so."""
    try:
        stdout = sys.stdout.fileno()
    except (AttributeError, ValueError, OSError):  # there is none, or it is no file
        return False
    poll = select.poll()
    poll.register(stdout, 0)  # a pipe without a reader is an error whatever is asked
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return True


def run_files(arguments: Sequence[str]) -> None:
    """Run `brainray classify FILE…`; exits with status 2 where the user can fix what is wrong."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        if asks_for_bulk(arguments):
            raise ConfigError(
                f"Got files and {BULK_OPTION}. Give files alone for a table of predictions, or "
                f"{BULK_OPTION} alone to classify in bulk."
            )
        job = tyro.cli(FilesJob, args=arguments, prog="brainray classify")
        classify_files(job)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        if not stop_writing():
            raise
        sys.exit(EXIT_UNREAD)
    sys.stdout.flush()


def classify_files(job: FilesJob) -> None:
    """Predict every file, and print the predictions.

    Raises
    ------
    UserError
        The classifier or the key cannot be opened, or not with these options.
    """
    key = secrets.token_bytes(NUM_KEY_BYTES)
    if job.id_key_file is not None:
        key = read_key(storage.make_absolute(job.id_key_file))
    classifier = load_classifier(job.classifier_uri)
    engine = open_engine(classifier, job.engine)
    answers = predict_files(job.files, classifier, engine, job.reading, key=key)
    if not job.json:
        _print_tables(list(answers), classifier, engine, job)
        return
    rows = [row for answer in answers for row in answer.rows]
    document = {
        "classifier_id": classifier.classifier_id,
        "classes": list(classifier.classes),
        "engine": engine.describe(),
        "notice": NOTICE,
        "predictions": [_make_plain(row) for row in rows],
        "series": summarise_rows(rows, classifier.classes, job.rule),
    }
    print(json.dumps(document, ensure_ascii=False, indent=2))


def _print_tables(
    answers: Sequence[FileAnswer], classifier: Classifier, engine: Engine, job: FilesJob
) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    rows = [row for answer in answers for row in answer.rows]
    series = [
        one for one in summarise_rows(rows, classifier.classes, job.rule) if one["num_slices"] > 1
    ]
    if series:
        console.print(build_series_table(series))
        console.print("Slice evidence: not calibrated for series or patients.\n", style="dim")
    most = None if job.slices else NUM_LINES
    console.print(build_table(answers, classifier.classes, most))
    console.print(f"Classifier {classifier.classifier_id}, {engine.description}.", style="dim")
    console.print(NOTICE, style="dim")


def predict_files(
    files: Iterable[str],
    classifier: Classifier,
    engine: Engine,
    reading: ReadOptions,
    *,
    key: bytes | None = None,
) -> Iterator[FileAnswer]:
    """Yield the rows of every file, in order, whatever it holds.

    Parameters
    ----------
    files : iterable of str
    classifier : Classifier
    engine : Engine
        Of the classifier.
    reading : ReadOptions
        How the files are read.
    key : bytes, optional
        Of the hashes that stand for identifiers; without it there are none, and no series.
    """
    for file in files:
        scan: dict[str, Any] = dict.fromkeys(SCAN_SCHEMA.names)
        scan["scan_uri"] = storage.make_absolute(file)
        slices = list(_open_slices(file, scan, classifier, reading, key))
        rows: list[dict[str, Any]] = []
        for start in range(0, len(slices), BATCH_SIZE):
            rows += _predict(slices[start : start + BATCH_SIZE], classifier, engine)
        details = [
            detail or REASONS.get(row["reason"])
            for row, (_, _, detail) in zip(rows, slices, strict=True)
        ]
        yield FileAnswer(file, rows, details)


_Opened = tuple[dict[str, Any], NDArray[np.uint8] | None, str | None]
"""A slice's row of SCAN_SCHEMA, the network's input, and in words why there is none."""


def _open_slices(
    file: str,
    scan: dict[str, Any],
    classifier: Classifier,
    reading: ReadOptions,
    key: bytes | None,
) -> Iterator[_Opened]:
    """Yield what is known of each slice of a file; of the file where it cannot be opened."""
    try:
        content = _read(file, reading.limits)
        scan["size_bytes"] = len(content)
        if len(content) <= reading.limits.max_bytes:  # else it was not read to its end
            scan["content_sha256"] = sha256(content).hexdigest()
        opened = open_file(content, reading, key=key)
    except RejectedImage as rejection:
        yield scan | {"reason": rejection.reason}, None, rejection.message
        return
    for index in range(len(opened.slices)):
        yield _open_one(opened, index, scan, classifier)


def _open_one(file: ScanFile, index: int, scan: dict[str, Any], classifier: Classifier) -> _Opened:
    info = file.slices[index]
    row = scan | {"scan_uri": name_slice(scan["scan_uri"], info.frame)}
    try:
        opened = open_slice(file, index, classifier.preprocessing)
    except RejectedImage as rejection:
        row |= describe_slice(info, None) | {"reason": rejection.reason}
        return row, None, rejection.message
    height, width = opened.scan.samples.shape
    row |= describe_slice(info, opened.grey_range) | {"height_px": height, "width_px": width}
    return row, opened.scan.image, None


def _predict(
    slices: Sequence[_Opened], classifier: Classifier, engine: Engine
) -> list[dict[str, Any]]:
    images = [image for _, image, _ in slices if image is not None]
    rows: list[dict[str, Any]] = build_rows(
        pa.Table.from_pylist([scan for scan, _, _ in slices], schema=SCAN_SCHEMA),
        engine.predict(np.stack(images) if images else engine.make_batch(0)),
        classes=classifier.classes,
        classifier_id=classifier.classifier_id,
        engine=engine.describe(),
    ).to_pylist()
    return rows


def summarise_rows(
    rows: Iterable[dict[str, Any]], classes: Sequence[str], rule: SeriesRule
) -> list[dict[str, Any]]:
    """Return what :func:`brainray.inference.series.summarise_series` says of each series.

    Parameters
    ----------
    rows : iterable of dict
        Of the prediction table; those without a series are left out.
    classes : sequence of str
        In class order.
    rule : SeriesRule

    Returns
    -------
    list of dict
        With the keyed hashes ``series``, ``study`` and ``patient`` before the rest; in the order in
        which the series come first.
    """
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
        raise RejectedImage("missing", "There is no file at this place.") from error
    except StorageError as error:
        if storage.is_folder(file):
            raise RejectedImage(
                "unreadable", f"This is a folder. Give it as {BULK_OPTION} FOLDER --output-uri OUT."
            ) from error
        raise RejectedImage("unreadable", str(error)) from error


def _make_plain(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row ready for JSON: times as text, a float32 with the digits that it has."""
    plain = {}
    for name, value in row.items():
        if isinstance(value, datetime):
            value = value.isoformat()
        elif isinstance(value, float) and name != "position_mm":
            value = float(str(np.float32(value)))
        plain[name] = value
    return plain


def build_table(
    answers: Iterable[FileAnswer], classes: Sequence[str], most: int | None = None
) -> Table:
    """Build a table for a person, with a line for each slice.

    Parameters
    ----------
    answers : iterable of FileAnswer
    classes : sequence of str
        In class order.
    most : int, optional
        A file with more slices has one line, which counts them.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("scan", overflow="fold")
    table.add_column("prediction", no_wrap=True)
    table.add_column("", width=BAR_WIDTH, no_wrap=True)
    table.add_column("probability", justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for answer in answers:
        if most is not None and len(answer.rows) > most:
            counts = Counter(row["predicted_class"] or row["reason"] for row in answer.rows)
            words = ", ".join(f"{count} {name}" for name, count in counts.most_common())
            title = f"{len(answer.rows)} slices"
            line = (Text(title), Text(), Text(), Text(f"{words}; --slices lists them", "dim"))
            table.add_row(Text(_escape(answer.file)), *line)
            continue
        for row, detail in zip(answer.rows, answer.details, strict=True):
            name = name_slice(answer.file, row["frame"])
            table.add_row(Text(_escape(name)), *_build_cells(row, detail, classes))
    return table


def build_series_table(series: Iterable[dict[str, Any]]) -> Table:
    """Build a table for a person of what :func:`summarise_rows` says."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("series", no_wrap=True)
    table.add_column("answer", no_wrap=True)
    for title in ("evidence", "slices", "key slices"):
        table.add_column(title, overflow="fold")
    for number, one in enumerate(series, 1):
        is_given = one["reason"] is None
        evidence = ", ".join(f"{name} {_percent(v)}" for name, v in one["evidence"].items())
        slices = f"{one['num_used']} of {one['num_slices']} used"
        for reason, count in one["skipped"].items():
            slices += f", {count} {reason}"
        for flag in one["flags"]:
            slices += f"; {flag}"
        table.add_row(
            Text(str(number)),
            Text(one["answer"], "bold" if is_given else "yellow"),
            Text(evidence if is_given else f"{one['reason']}: {evidence}"),
            Text(slices),
            Text(_escape(" ".join(map(_shorten, one["key_slices"])))),
        )
    return table


def _shorten(scan_uri: str) -> str:
    """Return the last part of a name."""
    return scan_uri.rpartition("/")[2]


def _build_cells(
    row: dict[str, Any], detail: str | None, classes: Sequence[str]
) -> tuple[Text | ProgressBar, ...]:
    if row["confidence"] is None:
        words = ": ".join(filter(None, (row["reason"], detail)))
        return Text(row["status"], "yellow"), Text(), Text(), Text(_escape(words))
    ordered = sorted(classes, key=lambda label: -row[f"prob_{label}"])
    most, *others = [f"{label} {_percent(row[f'prob_{label}'])}" for label in ordered[:3]]
    bar = ProgressBar(total=1, completed=row["confidence"], width=BAR_WIDTH, complete_style="cyan")
    is_given = row["predicted_class"] is not None
    return (
        Text(row["predicted_class"] or row["status"], "bold" if is_given else "yellow"),
        bar,
        Text(_percent(row["confidence"])),
        Text(f"then {', '.join(others)}" if is_given else f"most probable {most}", "dim"),
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _escape(text: str) -> str:
    """Return text in which nothing moves the cursor or reorders what is beside it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
