"""Console output of commands: progress, results in a few lines, and errors with exit statuses."""

import json
import logging
import os
import select
import sys
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Self, TypeVar

from rich.console import Console, RenderableType

from brainray import runlog
from brainray.errors import BrainrayError, UserError
from brainray.io import storage

if TYPE_CHECKING:
    import rich.progress

    from brainray.inference.stats import Progress

SETTLING_S = 3.0
"""Seconds before a rate is stable enough to predict the time left."""
LINE_INTERVAL_S = 30.0
"""Between two lines of progress where there is no terminal."""
PIPED_WIDTH = 240
"""Columns where there is no terminal, so that no line of a table is folded."""
DISCLAIMER = "Research use only; not a medical device."

EXIT_FAILED, EXIT_USER, EXIT_LEAKS, EXIT_INTERRUPTED = 1, 2, 3, 130
EXIT_UNREAD = 141
"""Nobody reads the output: 128 and the number of SIGPIPE, as shells do."""

Result = TypeVar("Result")


class ConsoleReporter:
    """Prints lines and results, and progress: a bar on a terminal, a line every half minute else.

    With ``json`` it prints results as JSON on standard output, and all else on standard error.
    ``verbose`` is for commands: whether they show Ray's log.
    """

    def __init__(self, *, json: bool = False, verbose: bool = False) -> None:
        self.verbose = verbose
        self._prints_json = json
        self._console = Console(highlight=False, soft_wrap=True, stderr=json)
        if not self._console.is_terminal:
            self._console.width = PIPED_WIDTH
        self._bar: rich.progress.Progress | None = None
        self._epoch, self._epoch_started_s = -1, 0.0
        self._printed_s = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._remove_bar()

    def log(self, line: str) -> None:
        """Print one line."""
        self._console.print(line, markup=False)

    def report(self, document: Any, lines: Iterable[RenderableType]) -> None:  # noqa: ANN401 - JSON
        """Print a result: the lines, or the document where JSON is asked for."""
        self._remove_bar()
        if self._prints_json:
            print(json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False))
            return
        for line in lines:
            if isinstance(line, str):
                self.log(line)
            else:
                self._console.print(line, soft_wrap=False)

    def on_step(self, message: dict[str, Any]) -> None:
        """Show the progress of an epoch."""
        now = time.monotonic()
        if self._epoch != message["epoch"]:
            self._epoch, self._epoch_started_s = message["epoch"], now
        done, total = message["step"], message["num_steps"]
        elapsed = now - self._epoch_started_s
        if elapsed >= SETTLING_S:
            left = runlog.format_duration(elapsed / done * (total - done))
            self._show(f"epoch {message['epoch'] + 1}", done, total, f"{left} left")

    def on_progress(self, progress: "Progress") -> None:
        """Show a bulk run's progress, rate, time left and rejected scans."""
        parts = []
        if progress.rate and progress.warm_s > SETTLING_S:
            parts.append(f"{progress.rate:.1f} images/s")
            if progress.left_s is not None:
                parts.append(f"{runlog.format_duration(progress.left_s)} left")
        if progress.num_rejected:
            parts.append(f"{progress.num_rejected:,} rejected")
        self._show("scans", progress.done, progress.total, "  ".join(parts))

    def _show(self, name: str, done: int, total: int | None, detail: str) -> None:
        if self._console.is_terminal:
            bar = self._bar = self._bar or _start_bar(self._console)
            (task,) = bar.task_ids
            bar.update(task, description=name, completed=done, total=total, detail=detail)
        elif time.monotonic() - self._printed_s > LINE_INTERVAL_S:
            self._printed_s = time.monotonic()
            count = "?" if total is None else f"{total:,}"
            self.log(f"{name} {done:,}/{count}  {detail}")

    def _remove_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _start_bar(console: Console) -> "rich.progress.Progress":
    """Start a progress bar with one task, which is removed from the terminal when it stops."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[detail]}"),
        console=console,
        transient=True,
    )
    bar.add_task("", total=None, detail="")
    bar.start()
    return bar


def describe_results(metrics: dict[str, Any], output_uri: str) -> list[str]:
    """List the scores of a training or an evaluation, and where the results are."""
    splits = [split for split in ("val", "test", "cv") if split in metrics]
    lines = [describe_scores(split, metrics[split]) for split in splits]
    if "spread" in metrics:
        lines.append(describe_variation(metrics["spread"], len(metrics["folds"])))
    if "training" in metrics:
        lines.append(f"classifier  {storage.join(output_uri, 'classifier')}")
    return [*lines, f"report      {storage.join(output_uri, 'report.html')}", DISCLAIMER]


def describe_tuning(result: dict[str, Any], output_uri: str) -> list[str]:
    """List the configurations of a search, best first."""
    lines = []
    for one in result["configurations"]:
        numbers = ", ".join(f"{name} {value:.3g}" for name, value in one["parameters"].items())
        folds = " ".join("-" if score is None else f"{score:.4f}" for score in one["scores"])
        lines.append(f"{one['score']:.4f} ({folds}), {one['percent_done']:>3} %: {numbers}")
    return [*lines, f"report      {storage.join(output_uri, 'tune.html')}"]


def describe_bulk(metrics: dict[str, Any], output_uri: str) -> list[str]:
    """List the counts of a bulk run, and where the results are."""
    run, counts = metrics["run"], metrics["run"]["new_counts"]
    lines = []
    if "evaluation" in metrics:
        lines.append(describe_scores("labelled", metrics["evaluation"]))
    line = f"scans       {run['num_new']:,} new: {counts['by_status']['classified']:,} classified"
    if counts["by_status"]["rejected"]:
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in counts["by_reason"].items())
        line += f", {counts['by_status']['rejected']:,} rejected ({reasons})"
    if run["num_known"]:
        line += f"; {run['num_known']:,} unchanged"
    lines.append(line)
    for name in ("series", "studies"):
        found = metrics.get(name, {})
        if found.get("total"):
            answers = ", ".join(f"{n:,} {answer}" for answer, n in found["by_answer"].items())
            lines.append(f"{name:<11} {found['total']:,}: {answers}")
    return [
        *lines,
        f"speed       {run['images_per_s']:.1f} images/s with the start; {run['bottleneck']}",
        f"predictions {storage.join(output_uri, 'predictions')}",
        f"report      {storage.join(output_uri, 'report.html')}",
        DISCLAIMER,
    ]


def describe_audit(document: dict[str, Any], output_uri: str) -> list[str]:
    """List the findings of audit.json, and where the results are."""
    unreadable = document["num_scans"] - document["num_usable"]
    groups, near = document["groups"], document["near_duplicates"]
    exact = document["exact_duplicates"]
    lines = [f"scans       {document['num_scans']:,}, of which {unreadable:,} cannot be read"]
    for split, leak in document["leaks"].items():
        baseline = leak["baseline_1nn"][0]["accuracy"]
        lines.append(
            f"{split:<11} {leak['share_near_duplicate']:.1%} of {leak['n']:,} have a near "
            f"duplicate in training ({leak['num_near_duplicate']:,}; "
            f"{leak['num_exact_duplicate']:,} exact); nearest-thumbnail accuracy {baseline:.1%}"
        )
    lines.append(
        f"duplicates  {exact['num_repeated']:,} sets of identical pixels "
        f"({exact['num_images_in_repeated']:,} scans); {groups['num_groups']:,} groups of similar "
        f"scans, the largest {groups['largest']:,}"
    )
    lines.append(
        f"conflicts   {exact['num_mixed']:,} sets of exact duplicates, {near['num_mixed']:,} of "
        f"near duplicates and {groups['num_mixed']:,} groups have scans of several classes"
    )
    if document["shortcuts"]:
        strongest = max(document["shortcuts"][:-1], key=lambda row: row["balanced_accuracy"])
        lines.append(
            f"shortcut    {strongest['property']} alone: balanced accuracy "
            f"{strongest['balanced_accuracy']:.1%} (chance {strongest['chance']:.1%})"
        )
    if "split" in document:
        worst = max(row["imbalance"] for row in document["split"]["splits"])
        lines.append(f"new split   {document['split']['uri']} (class shares within {worst:.1%})")
    return [*lines, f"report      {storage.join(output_uri, 'audit.html')}", DISCLAIMER]


def describe_comparison(document: dict[str, Any], _: str) -> list[str]:
    """Describe what :func:`brainray.evaluation.compare.compare` returned, as lines of a table."""
    kind = "groups" if document["join"]["has_groups"] else "images, each a group of its own"
    rows = [*document["scores"].items()]
    rows += [(f"AUROC {name}"[:18], row) for name, row in document["auroc"].items() if row]
    test = document["mcnemar"]
    corrected = (
        "Holm's correction over the five scores, and over the classes"
        if document["primary"] is None
        else f"{document['primary']} alone decides among the scores"
    )
    return [
        *(f"{name.upper()}  {document[name]['uri']}" for name in ("a", "b")),
        f"{document['n']:,} images, {document['num_groups']:,} {kind}; differences are B - A, "
        "with 95 % intervals",
        "",
        f"{'':<18} {'A':>7} {'B':>7} {'difference':>11}  {'interval':<18} {'p':>6}  B is",
        *(_describe_difference(name, row) for name, row in rows),
        "",
        f"only A is right on {test['only_a']:,} images, only B on {test['only_b']:,}: "
        f"McNemar mid-p {test['p_mid']:.3g}, exact {test['p_exact']:.3g}",
        f"p: paired bootstrap over groups; for AUROC DeLong, which ignores groups. {corrected}.",
        DISCLAIMER,
    ]


def _describe_difference(name: str, row: dict[str, Any]) -> str:
    numbers = [f"{row[key]:.4f}" if row[key] is not None else "-" for key in ("a", "b")]
    difference = f"{row['difference']:+.4f}" if row["difference"] is not None else "-"
    ends = row["difference_ci95"]
    interval = f"[{ends[0]:+.4f}, {ends[1]:+.4f}]" if ends else ""
    p = row["p_adjusted"] if row["p_adjusted"] is not None else row["p_value"]
    shown = "-" if p is None else f"{p:.3f}" if p >= 0.0005 else "<.0005"
    return (
        f"{name:<18} {numbers[0]:>7} {numbers[1]:>7} {difference:>11}  {interval:<18} {shown:>6}  "
        f"{row['verdict'] or '(not tested)'}"
    )


def describe_calibration(document: dict[str, Any], output_uri: str) -> list[str]:
    """Describe a fit of the rule of slice evidence, as lines of a table."""
    before, after = document["before"], document["after"]
    lines = [
        f"{document['num_series']:,} labelled series of {document['num_patients']:,} patients; "
        "after: out of fold; with 95 % intervals over patients",
        "",
        f"{'':<30} {'before':<24} after",
    ]

    def add(title: str, score: str, *rows: dict[str, Any]) -> None:
        shown = ["-" if row[score] is None else _percent(row, score) for row in rows]
        lines.append(f"{title:<30} {shown[0]:<24} {shown[1]}")

    for name, row in before["per_class"].items():
        for score in ("sensitivity", "specificity"):
            title = f"{name} ({row['num_series']:,}), {score}"
            add(title, score, row, after["per_class"][name])
    add("indeterminate", "indeterminate", before, after)
    add("right minus wrong, mean", "score", before, after)
    options = " ".join(
        f"--rule.{name.replace('_', '-')} {value:g}" for name, value in document["rule"].items()
    )
    return [
        *lines,
        "",
        f"rule        {options}",
        "Fitted to all labelled series. It may not hold for other scanners and hospitals.",
        DISCLAIMER,
        f"written to  {output_uri}",
    ]


def describe_scores(split: str, scores: dict[str, Any]) -> str:
    """Describe a split's scores, of metrics.json, in one line."""
    parts = [f"accuracy {_percent(scores)}", f"macro F1 {scores['macro_f1']:.3f}"]
    if scores["macro_auroc"] is not None:
        parts.append(f"AUROC {scores['macro_auroc']:.4f}")
    line = f"{split:<5} {scores['n']:>6,} images  " + "  ".join(parts)
    if "without_near_duplicates" in scores:
        rest, nearest = scores["without_near_duplicates"], scores["baseline_1nn"]
        line += f"  | without near duplicates ({rest['n']:,}) "
        line += _percent(rest) if rest["n"] else "-"
        line += f"  | nearest thumbnail {nearest['accuracy']:.1%}"
    return line


def describe_variation(spread: dict[str, dict[str, float]], num_folds: int) -> str:
    """Describe the range of the scores over folds, ``spread`` of metrics.json, in one line."""
    names = {"accuracy": "accuracy", "macro_f1": "macro F1", "macro_auroc": "AUROC"}
    parts = [
        f"{names[name]} {row['min']:.3f} to {row['max']:.3f} (mean {row['mean']:.3f}, "
        f"SD {row['sd']:.3f})"
        for name, row in spread.items()
    ]
    return f"spread over the {num_folds} folds, no interval: " + "; ".join(parts)


def _percent(scores: dict[str, Any], name: str = "accuracy") -> str:
    interval = scores[f"{name}_ci95"]
    around = f" [{interval[0]:.1%}, {interval[1]:.1%}]" if interval else ""
    return f"{scores[name]:.1%}{around}"


def exit_on_error(
    run: Callable[[], Result], interrupted: str = "interrupted; the same command resumes."
) -> Result:
    """Call a function; on an error of ours print one line and exit with its status."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        result = run()
        sys.stdout.flush()
        return result
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        status = EXIT_USER
    except BrainrayError as error:
        print(f"failed: {' '.join(str(error).split())}", file=sys.stderr)
        status = EXIT_FAILED
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        status = EXIT_INTERRUPTED
    except BrokenPipeError:
        if not _discard_unread_output():
            raise  # the broken pipe is not standard output
        status = EXIT_UNREAD
    sys.stdout.flush()
    sys.exit(status)


def _discard_unread_output() -> bool:
    """Discard further output if nobody reads it, as after `head`; return whether that is so."""
    try:
        stdout = sys.stdout.fileno()
    except (AttributeError, ValueError, OSError):  # closed, or not a file
        return False
    poll = select.poll()
    poll.register(stdout, 0)  # a pipe without a reader reports an error whatever is polled
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return True
