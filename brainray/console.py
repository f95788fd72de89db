"""What commands print: progress, results in a few lines, errors as one line and an exit status."""

import logging
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console

from brainray import runlog, storage
from brainray.errors import BrainrayError, UserError
from brainray.inference.files import EXIT_UNREAD, stop_writing

if TYPE_CHECKING:
    from brainray.inference.stats import Progress

SETTLING_S = 3.0
"""Seconds into an epoch before its pace says anything about its end."""

REDRAW_S = 0.5

EXIT_FAILED, EXIT_USER, EXIT_LEAKS, EXIT_INTERRUPTED = 1, 2, 3, 130

Answer = TypeVar("Answer")


class ConsoleReporter:
    """Prints lines, and one line of progress that is rewritten in place on a terminal."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._epoch_started = (-1, 0.0)
        self._told_at = time.monotonic()
        self._shown_at = 0.0

    def log(self, line: str) -> None:
        """Print one line."""
        self._clear()
        self._console.print(line, markup=False)

    def on_step(self, message: dict[str, Any]) -> None:
        """Show how far an epoch is; without a terminal, a line every half minute."""
        now = time.monotonic()
        if self._epoch_started[0] != message["epoch"]:
            self._epoch_started = (message["epoch"], now)
        done, total = message["step"], message["num_steps"]
        elapsed = now - self._epoch_started[1]
        if elapsed < SETTLING_S:
            return
        left = runlog.format_duration(elapsed / done * (total - done))
        self._show(f"epoch {message['epoch'] + 1:>3}  step {done}/{total}  {left} left in it", now)

    def on_progress(self, progress: "Progress") -> None:
        """Show how far a bulk run is, in the same way."""
        now = time.monotonic()
        if now - self._shown_at > REDRAW_S or progress.done == progress.total:
            self._shown_at = now
            self._show(describe_progress(progress), now)

    def _show(self, line: str, now: float) -> None:
        if self._console.is_terminal:
            self._clear()
            self._console.print(line, end="", markup=False)
        elif now - self._told_at > 30:
            self._told_at = now
            self._console.print(line, markup=False)

    def _clear(self) -> None:
        if self._console.is_terminal:
            self._console.print("\r\x1b[2K", end="", markup=False)


def report_scores(reporter: ConsoleReporter, metrics: dict[str, Any], output_uri: str) -> None:
    """Print the scores, each beside what it must be read beside, and where things are."""
    for split in ("val", "test", "cv"):
        if split in metrics:
            reporter.log(describe_scores(split, metrics[split]))
    if "spread" in metrics:
        reporter.log(describe_variation(metrics["spread"], len(metrics["folds"])))
    if "training" in metrics:
        reporter.log(f"classifier  {storage.join(output_uri, 'classifier')}")
    reporter.log(f"report      {storage.join(output_uri, 'report.html')}")
    reporter.log("Research use only; not a medical device.")


def report_tuning(reporter: ConsoleReporter, result: dict[str, Any], output_uri: str) -> None:
    """Print the configurations of a search, the best first, and where things are."""
    for one in result["configurations"]:
        numbers = ", ".join(f"{name} {value:.3g}" for name, value in one["parameters"].items())
        folds = " ".join("-" if score is None else f"{score:.4f}" for score in one["scores"])
        reporter.log(f"{one['score']:.4f} ({folds}), {one['percent_done']:>3} %: {numbers}")
    reporter.log(f"report      {storage.join(output_uri, 'tune.html')}")


def report_bulk(reporter: ConsoleReporter, metrics: dict[str, Any], output_uri: str) -> None:
    """Print what a bulk run did, and where things are."""
    run = metrics["run"]
    if "evaluation" in metrics:
        reporter.log(describe_scores("labelled", metrics["evaluation"]))
    reporter.log(describe_counts(run))
    for name in ("series", "studies"):
        if metrics.get(name, {}).get("total"):
            reporter.log(describe_answers(name, metrics[name]))
    reporter.log(
        f"speed       {run['images_per_s']:.1f} images/s with the start; {run['bottleneck']}"
    )
    reporter.log(f"predictions {storage.join(output_uri, 'predictions')}")
    reporter.log(f"report      {storage.join(output_uri, 'report.html')}")
    reporter.log("Research use only; not a medical device.")


def report_audit(reporter: ConsoleReporter, document: dict[str, Any], output_uri: str) -> None:
    """Print what an audit found, and where things are."""
    for line in describe_audit(document):
        reporter.log(line)
    if "split" in document:
        worst = max(row["imbalance"] for row in document["split"]["splits"])
        reporter.log(f"new split   {document['split']['uri']} (class shares within {worst:.1%})")
    reporter.log(f"report      {storage.join(output_uri, 'audit.html')}")
    reporter.log("Research use only; not a medical device.")


def describe_audit(document: dict[str, Any]) -> list[str]:
    """Say what an audit found, a line for each kind.

    Parameters
    ----------
    document : dict
        The content of audit.json.
    """
    unreadable = document["num_scans"] - document["num_usable"]
    groups, near, copies = (
        document["groups"],
        document["near_duplicates"],
        document["exact_duplicates"],
    )
    lines = [f"scans       {document['num_scans']:,}, of which {unreadable:,} cannot be read"]
    for split, leak in document["leaks"].items():
        baseline = leak["baseline_1nn"][0]["accuracy"]
        lines.append(
            f"{split:<11} {leak['share_near_duplicate']:.1%} of {leak['n']:,} have a near duplicate in "
            f"training ({leak['num_near_duplicate']:,}; {leak['num_exact_duplicate']:,} pixel for pixel); "
            f"the nearest thumbnail scores {baseline:.1%}"
        )
    lines.append(
        f"copies      {copies['num_repeated']:,} sets of identical pixels "
        f"({copies['num_images_in_repeated']:,} scans); {groups['num_groups']:,} groups of "
        f"look-alikes, the largest {groups['largest']:,}"
    )
    lines.append(
        f"conflicts   {copies['num_mixed']:,} sets of copies, {near['num_mixed']:,} of near duplicates "
        f"and {groups['num_mixed']:,} groups mix classes"
    )
    if document["shortcuts"]:
        strongest = max(document["shortcuts"][:-1], key=lambda row: row["balanced_accuracy"])
        lines.append(
            f"shortcut    {strongest['property']} alone: balanced accuracy "
            f"{strongest['balanced_accuracy']:.1%} (chance {strongest['chance']:.1%})"
        )
    return lines


def describe_comparison(document: dict[str, Any]) -> list[str]:
    """Say how two classifiers compare, as the lines of a table.

    Parameters
    ----------
    document : dict
        What :func:`brainray.evaluation.compare.compare` returned.
    """
    kind = "groups" if document["join"]["has_groups"] else "images, each a group of its own"
    lines = [
        *(f"{name.upper()}  {document[name]['uri']}" for name in ("a", "b")),
        f"{document['n']:,} images, {document['num_groups']:,} {kind}; differences are B - A, "
        "with 95 % intervals",
        "",
        f"{'':<18} {'A':>7} {'B':>7} {'difference':>11}  {'interval':<18} {'p':>6}  B is",
    ]
    lines += [_describe_difference(name, row) for name, row in document["scores"].items()]
    lines += [
        _describe_difference(f"AUROC {name}"[:18], row)
        for name, row in document["auroc"].items()
        if row is not None
    ]
    test = document["mcnemar"]
    corrected = (
        "Holm's correction over the five scores, and over the classes"
        if document["primary"] is None
        else f"{document['primary']} alone decides among the scores"
    )
    return [
        *lines,
        "",
        f"only A is right on {test['only_a']:,} images, only B on {test['only_b']:,}: "
        f"McNemar mid-p {test['p_mid']:.3g}, exact {test['p_exact']:.3g}",
        f"p: paired bootstrap over groups; for AUROC DeLong, which knows no groups. {corrected}.",
        "Research use only; not a medical device.",
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


def describe_calibration(document: dict[str, Any]) -> list[str]:
    """Say what fitting the rule of slice evidence brought, as the lines of a table.

    Parameters
    ----------
    document : dict
        What :func:`brainray.evaluation.series.calibrate_series` returned.
    """
    before, after = document["before"], document["after"]
    lines = [
        f"{document['num_series']:,} labelled series of {document['num_patients']:,} patients; "
        "after: out of fold; with 95 % intervals over patients",
        "",
        f"{'':<30} {'before':<24} after",
    ]
    for name, row in before["per_class"].items():
        later = after["per_class"][name]
        for score in ("sensitivity", "specificity"):
            title = f"{name} ({row['num_series']:,}), {score}"
            lines.append(_describe_change(title, score, row, later))
    lines.append(_describe_change("indeterminate", "indeterminate", before, after))
    lines.append(_describe_change("right less wrong, mean", "score", before, after))
    options = " ".join(
        f"--rule.{name.replace('_', '-')} {value:g}" for name, value in document["rule"].items()
    )
    return [
        *lines,
        "",
        f"rule        {options}",
        "Fitted to all labelled series. It says nothing of scanners and hospitals that are not "
        "among them.",
        "Research use only; not a medical device.",
    ]


def _describe_change(title: str, name: str, before: dict[str, Any], after: dict[str, Any]) -> str:
    def show(row: dict[str, Any]) -> str:
        ends = row[f"{name}_ci95"]
        around = f" [{ends[0]:.1%}, {ends[1]:.1%}]" if ends else ""
        return "-" if row[name] is None else f"{row[name]:.1%}{around}"

    return f"{title:<30} {show(before):<24} {show(after)}"


def describe_counts(run: dict[str, Any]) -> str:
    """Say in one line what became of a bulk run's scans."""
    counts = run["new_counts"]
    line = f"scans       {run['num_new']:,} new: {counts['by_status']['classified']:,} classified"
    if counts["by_status"]["rejected"]:
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in counts["by_reason"].items())
        line += f", {counts['by_status']['rejected']:,} rejected ({reasons})"
    if run["num_known"]:
        line += f"; {run['num_known']:,} looked at again and unchanged"
    return line


def describe_answers(name: str, counts: dict[str, Any]) -> str:
    """Say in one line what the series, or the studies, of a bulk run's output say."""
    answers = ", ".join(f"{n:,} {answer}" for answer, n in counts["by_answer"].items())
    return f"{name:<11} {counts['total']:,}: {answers}"


def describe_progress(progress: "Progress") -> str:
    """Say in one line how far a bulk run is."""
    total = "?" if progress.total is None else f"{progress.total:,}"
    line = f"{progress.done:,}/{total} scans"
    rate = progress.rate
    if rate and progress.warm_s > SETTLING_S:
        line += f"  {rate:.1f} images/s"
        if progress.left_s is not None:
            line += f"  {runlog.format_duration(progress.left_s)} left"
    rejected = progress.num_rejected
    return line + (f"  {rejected:,} rejected" if rejected else "")


def describe_scores(split: str, scores: dict[str, Any]) -> str:
    """Say a split's scores in one line.

    Parameters
    ----------
    split : str
        Name shown in front.
    scores : dict
        A split's part of metrics.json.
    """
    parts = [f"accuracy {_percent(scores)}", f"macro F1 {scores['macro_f1']:.3f}"]
    if scores["macro_auroc"] is not None:
        parts.append(f"AUROC {scores['macro_auroc']:.4f}")
    line = f"{split:<5} {scores['n']:>6,} images  " + "  ".join(parts)
    if "without_near_duplicates" in scores:
        without_near_duplicates, nearest = scores["without_near_duplicates"], scores["baseline_1nn"]
        apart = _percent(without_near_duplicates) if without_near_duplicates["n"] else "none"
        line += f"  | without near duplicates ({without_near_duplicates['n']:,}) {apart}"
        line += f"  | nearest thumbnail {nearest['accuracy']:.1%}"
    return line


def describe_variation(spread: dict[str, dict[str, float]], num_folds: int) -> str:
    """Say in one line how the folds of a cross-validation differ.

    Parameters
    ----------
    spread : dict
        ``spread`` of metrics.json.
    """
    names = {"accuracy": "accuracy", "macro_f1": "macro F1", "macro_auroc": "AUROC"}
    parts = [
        f"{names[name]} {row['min']:.3f} to {row['max']:.3f} (mean {row['mean']:.3f}, "
        f"SD {row['sd']:.3f})"
        for name, row in spread.items()
    ]
    return f"spread over the {num_folds} folds, no interval: " + "; ".join(parts)


def _percent(scores: dict[str, Any]) -> str:
    interval = scores["accuracy_ci95"]
    around = f" [{interval[0]:.1%}, {interval[1]:.1%}]" if interval else ""
    return f"{scores['accuracy']:.1%}{around}"


def exit_on_error(
    run: Callable[[], Answer],
    interrupted: str = "interrupted: the same command goes on where this one was.",
) -> Answer:
    """Call a function; turn its errors into one line and an exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        return run()
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
        if not stop_writing():  # it was another pipe
            raise
        status = EXIT_UNREAD
    sys.stdout.flush()
    sys.exit(status)
