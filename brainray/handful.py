"""A handful of scans, answered at once by `brainray classify FILE…`; no Ray, no service.

It is a room of its own so that neither is loaded: more than half of its time is imports anyway.
"""

import json
import logging
import os
import select
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from brainray import storage
from brainray.errors import ConfigError, RejectedImage, StorageError, UserError
from brainray.model.answer import NOTICE, Answer, answer_scan, build_rejection
from brainray.model.classifier import Classifier, load_classifier
from brainray.model.runtime import Runtime, RuntimeOptions, open_runtime
from brainray.model.shipped import find_default_classifier
from brainray.pixels.decode import DecodeLimits

BULK_OPTION = "--scans-uri"
EXIT_UNREAD = 141
"""Exit status where nobody reads the output any more: 128 and SIGPIPE's number, as shells say."""
FLAGS = tuple(
    f"--{prefix}{name}"
    for name in ("json", "verbose", "replace", "explain", "use-gpu")
    for prefix in ("", "no-")
)
"""Options of either `brainray classify` that no value follows."""

BAR_WIDTH = 14
PIPED_WIDTH = 240
"""Columns where there is no terminal: whoever reads it gets whole lines."""


@dataclass(frozen=True, kw_only=True)
class HandfulJob:
    """Answer a few files at once. With --scans-uri in place of files, classify in bulk."""

    files: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Scans: local, s3:// or gs://."""
    classifier_uri: str = field(default_factory=find_default_classifier)
    """A sealed classifier folder; `$BRAINRAY_CLASSIFIER`, else the one that comes with the
    project, if not given."""
    json: bool = False
    """Print the answers as the service does, instead of a table."""
    backend: Literal["auto", "torch", "openvino"] = "auto"
    """What computes; `auto` takes the fastest for the machine."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto` is bf16 where the processor has it, else fp32."""
    use_gpu: bool = False
    """Compute on a GPU."""
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
    """Write nowhere from now on if whoever read the output has gone, as `head` goes; tell so."""
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


def run_handful(arguments: Sequence[str]) -> None:
    """`brainray classify FILE…`; exits with status 2 where the user can mend what is wrong."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        if asks_for_bulk(arguments):
            raise ConfigError(
                f"Got files and {BULK_OPTION}. Give files alone for a table of answers, or "
                f"{BULK_OPTION} alone to classify in bulk."
            )
        job = tyro.cli(HandfulJob, args=arguments, prog="brainray classify")
        answer_handful(job)
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


def answer_handful(job: HandfulJob) -> None:
    """Answer every file, and print the answers.

    Raises
    ------
    UserError
        The classifier cannot be opened, or not with these options.
    """
    classifier = load_classifier(job.classifier_uri)
    options = RuntimeOptions(backend=job.backend, precision=job.precision, use_gpu=job.use_gpu)
    runtime = open_runtime(classifier, options)
    answers = answer_files(job.files, classifier, runtime, job.limits)
    if job.json:
        print(json.dumps(describe_answers(answers, classifier), ensure_ascii=False, indent=2))
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    console.print(build_table(answers))
    console.print(f"Classifier {classifier.classifier_id}, {runtime.description}.", style="dim")
    console.print(NOTICE, style="dim")


def answer_files(
    files: Iterable[str], classifier: Classifier, runtime: Runtime, limits: DecodeLimits
) -> Iterator[Answer]:
    """Yield one answer for every file, in order, whatever is the matter with it."""
    for file in files:
        try:
            content = _read(file, limits)
        except RejectedImage as rejection:
            yield build_rejection(file, None, rejection)
        else:
            answer = answer_scan(
                file, content, classifier=classifier, runtime=runtime, limits=limits
            )
            is_whole = len(content) <= limits.max_bytes
            yield answer if is_whole else replace(answer, content_sha256=None)


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


def describe_answers(answers: Iterable[Answer], classifier: Classifier) -> dict[str, Any]:
    """Return answers as the service's JSON has them."""
    return {
        "classifier_id": classifier.classifier_id,
        "classes": list(classifier.classes),
        "notice": NOTICE,
        "answers": [_plain(asdict(answer)) for answer in answers],
    }


def _plain(value: Any) -> Any:  # noqa: ANN401 - any field of an answer
    """Return a value ready for JSON; a float32 with the digits that it has."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return float(str(value)) if isinstance(value, np.floating) else value


def build_table(answers: Iterable[Answer]) -> Table:
    """Build a table for a person: a row for every answer."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("scan", overflow="fold")
    table.add_column("answer", no_wrap=True)
    table.add_column("", width=BAR_WIDTH, no_wrap=True)
    table.add_column("probability", justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for answer in answers:
        table.add_row(*_build_row(answer))
    return table


def _build_row(answer: Answer) -> tuple[Text | ProgressBar, ...]:
    name = Text(_show(answer.name or ""))
    if answer.confidence is None or answer.probs is None:
        words = ": ".join(filter(None, (answer.reason, answer.detail)))
        return name, Text(answer.status, "yellow"), Text(), Text(), Text(_show(words))
    ordered = sorted(answer.probs.items(), key=lambda pair: -pair[1])
    most, *others = [f"{label} {_percent(prob)}" for label, prob in ordered[:3]]
    bar = ProgressBar(
        total=1, completed=float(answer.confidence), width=BAR_WIDTH, complete_style="cyan"
    )
    is_given = answer.predicted_class is not None
    return (
        name,
        Text(answer.predicted_class or answer.status, "bold" if is_given else "yellow"),
        bar,
        Text(_percent(answer.confidence)),
        Text(f"then {', '.join(others)}" if is_given else f"most probable {most}", "dim"),
    )


def _percent(share: np.float32) -> str:
    return f"{100 * float(share):.1f} %"


def _show(text: str) -> str:
    """Return text in which nothing moves the cursor or reorders what is beside it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
