"""`brainray classify FILE…`: predictions for a few files, without Ray and without a service.

Apart from the command line's other commands, so that Ray is not loaded: more than half of the
time of this one is imports anyway.
"""

import json
import logging
import os
import select
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import sha256
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import tyro
from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from brainray import storage
from brainray.errors import ConfigError, RejectedImage, StorageError, UserError
from brainray.images.decode import DecodeLimits
from brainray.images.preprocess import open_scan
from brainray.inference.engine import Engine, EngineOptions, open_engine
from brainray.inference.schema import SCAN_SCHEMA, build_rows
from brainray.model.classifier import Classifier, load_classifier
from brainray.model.reasons import NOTICE, REASONS
from brainray.model.shipped import find_default_classifier

BULK_OPTION = "--scans-uri"
EXIT_UNREAD = 141
"""Exit status where nobody reads the output any more: 128 and SIGPIPE's number, as shells do."""
FLAGS = tuple(
    f"--{prefix}{name}"
    for name in ("json", "verbose", "explain", "use-gpu", "redact-paths")
    for prefix in ("", "no-")
)
"""Options of either `brainray classify` that no value follows."""

BAR_WIDTH = 14
PIPED_WIDTH = 240
"""Columns where there is no terminal, so that no line is folded."""


@dataclass(frozen=True, kw_only=True)
class FilesJob:
    """Classify a few files at once. With --scans-uri in place of files, classify in bulk."""

    files: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Scans: local, s3:// or gs://."""
    classifier_uri: str = field(default_factory=find_default_classifier)
    """A classifier bundle; `$BRAINRAY_CLASSIFIER`, else the one that comes with the project, if
    not given."""
    json: bool = False
    """Print rows of the prediction table as JSON, instead of a table for people."""
    engine: Annotated[EngineOptions, tyro.conf.arg(name="")] = EngineOptions()
    limits: DecodeLimits = DecodeLimits()
    """What is too large to open."""


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
        The classifier cannot be opened, or not with these options.
    """
    classifier = load_classifier(job.classifier_uri)
    engine = open_engine(classifier, job.engine)
    found = predict_files(job.files, classifier, engine, job.limits)
    if job.json:
        document = {
            "classifier_id": classifier.classifier_id,
            "classes": list(classifier.classes),
            "engine": engine.describe(),
            "notice": NOTICE,
            "predictions": [_make_plain(row) for _, row, _ in found],
        }
        print(json.dumps(document, ensure_ascii=False, indent=2))
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    console.print(build_table(found, classifier.classes))
    console.print(f"Classifier {classifier.classifier_id}, {engine.description}.", style="dim")
    console.print(NOTICE, style="dim")


def predict_files(
    files: Iterable[str], classifier: Classifier, engine: Engine, limits: DecodeLimits
) -> Iterator[tuple[str, dict[str, Any], str | None]]:
    """Yield one row of the prediction table for every file, in order, whatever it holds.

    Yields
    ------
    file : str
        As it was given.
    row : dict
        Column to value, of :func:`brainray.inference.schema.build_schema`.
    detail : str or None
        Why the scan has no class, in words.
    """
    for file in files:
        uri = storage.make_absolute(file)
        scan: dict[str, Any] = dict.fromkeys(SCAN_SCHEMA.names) | {"scan_uri": uri}
        detail = None
        images = engine.make_batch(0)
        try:
            content = _read(file, limits)
            scan["size_bytes"] = len(content)
            if len(content) <= limits.max_bytes:  # else it was not read to its end
                scan["content_sha256"] = sha256(content).hexdigest()
            opened = open_scan(content, classifier.preprocessing, limits)
            scan["height_px"], scan["width_px"] = opened.samples.shape
            images = opened.image[None]
        except RejectedImage as rejection:
            scan["reason"], detail = rejection.reason, rejection.message
        (row,) = build_rows(
            pa.Table.from_pylist([scan], schema=SCAN_SCHEMA),
            engine.predict(images),
            classes=classifier.classes,
            classifier_id=classifier.classifier_id,
            engine=engine.describe(),
        ).to_pylist()
        yield file, row, detail or REASONS.get(row["reason"])


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
        elif isinstance(value, float):
            value = float(str(np.float32(value)))
        plain[name] = value
    return plain


def build_table(
    found: Iterable[tuple[str, dict[str, Any], str | None]], classes: Sequence[str]
) -> Table:
    """Build a table for a person from what :func:`predict_files` yields."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("scan", overflow="fold")
    table.add_column("prediction", no_wrap=True)
    table.add_column("", width=BAR_WIDTH, no_wrap=True)
    table.add_column("probability", justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for file, row, detail in found:
        table.add_row(Text(_escape(file)), *_build_cells(row, detail, classes))
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
