"""The doors for a person: `brainray COMMAND`; jobs/*.py are the same doors."""

import dataclasses
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import tyro
from rich.console import Console

from brainray import runlog, storage
from brainray.dataset.kaggle import FetchJob, fetch_kaggle_set
from brainray.errors import BrainrayError, ConfigError, UserError
from brainray.inference.bulk import ClassifyJob, classify
from brainray.inference.files import (
    EXIT_UNREAD,
    asks_for_bulk,
    find_files,
    run_files,
    stop_writing,
)
from brainray.inference.stats import Progress, count_rejected
from brainray.pipelines.audit import AuditJob, audit, list_excessive_leaks
from brainray.pipelines.compare import CompareJob, compare
from brainray.pipelines.config import Placement, TrainConfig
from brainray.pipelines.demo import DemoJob, run_demo
from brainray.pipelines.doctor import examine
from brainray.pipelines.evaluate import EvaluateJob, evaluate
from brainray.pipelines.folds import cross_validate
from brainray.pipelines.run import TrainJob
from brainray.pipelines.train import train
from brainray.recipes import RECIPES, build_recipe
from brainray.serving.config import ServeJob

SETTLING_S = 3.0
"""Seconds into an epoch before its pace says anything about its end."""

REDRAW_S = 0.5

EXIT_FAILED, EXIT_USER, EXIT_LEAKS, EXIT_INTERRUPTED = 1, 2, 3, 130

DEFAULT_RECIPE: Literal["cpu"] = "cpu"
Answer = TypeVar("Answer")
RecipeName = Literal["smoke", "cpu", "cpu-long", "gpu"]
assert set(RecipeName.__args__) == set(RECIPES)  # type: ignore[attr-defined]


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Train a classifier on a folder (or Parquet tables) of labelled scans."""

    data_uri: str
    """Class folders, alone or below Training/ and Testing/ (or train/, val/, test/), or
    Parquet tables. Local, s3:// or gs://."""
    output_uri: str
    """Where everything is written. The same command goes on with what it finds here."""
    recipe: RecipeName = DEFAULT_RECIPE
    """Named configuration that the other options override."""
    folds: int | None = None
    """Cross-validate: train so many times, each time without one of as many parts of the training
    images (groups stay whole), and judge each part by the classifier that never saw it."""
    placement: Annotated[Placement, tyro.conf.arg(name="")] = Placement()
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = TrainConfig()
    verbose: bool = False
    """Show Ray's own lines too."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Judge a sealed classifier on labelled scans."""

    job: Annotated[EvaluateJob, tyro.conf.arg(name="")]
    verbose: bool = False
    """Show Ray's own lines too."""


@dataclass(frozen=True, kw_only=True)
class ClassifyOptions:
    """Classify scans in bulk; a row of Parquet for every scan.

    `brainray classify FILE…` prints the predictions of a few files.
    """

    job: Annotated[ClassifyJob, tyro.conf.arg(name="")]
    verbose: bool = False
    """Show Ray's own lines too."""


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Answer over HTTP with a sealed classifier, on this machine, until Ctrl-C or SIGTERM."""

    job: Annotated[ServeJob, tyro.conf.arg(name="")]
    verbose: bool = False
    """Show Ray's own lines too."""


@dataclass(frozen=True, kw_only=True)
class AuditOptions:
    """Look for twins across splits, label conflicts and shortcuts in a data set."""

    job: Annotated[AuditJob, tyro.conf.arg(name="")]
    verbose: bool = False
    """Show Ray's own lines too."""


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Compare two classifiers by their predictions for the same images."""

    job: Annotated[CompareJob, tyro.conf.arg(name="")]
    json: bool = False
    """Print compare.json instead of a table."""


class Voice:
    """Speaks to the person at the door: lines, and one line of progress that is rewritten."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._epoch_started = (-1, 0.0)
        self._told_at = time.monotonic()
        self._shown_at = 0.0

    def say(self, line: str) -> None:
        """Print one line."""
        self._clear()
        self._console.print(line, markup=False)

    def tick(self, message: dict[str, Any]) -> None:
        """Show how far an epoch is: in place on a terminal, else a line every half minute."""
        now = time.monotonic()
        if self._epoch_started[0] != message["epoch"]:
            self._epoch_started = (message["epoch"], now)
        done, total = message["step"], message["num_steps"]
        elapsed = now - self._epoch_started[1]
        if elapsed < SETTLING_S:
            return
        left = runlog.format_duration(elapsed / done * (total - done))
        self._show(f"epoch {message['epoch'] + 1:>3}  step {done}/{total}  {left} left in it", now)

    def progress(self, progress: Progress) -> None:
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `brainray COMMAND …` and exit."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    commands: dict[str, Callable[[list[str]], None]] = {
        "train": run_train,
        "classify": run_classify,
        "evaluate": run_evaluate,
        "serve": run_serve,
        "audit": run_audit,
        "compare": run_compare,
        "data": run_data,
        "demo": run_demonstration,
        "doctor": run_doctor,
    }
    if not given or given[0] in ("-h", "--help") or given[0] not in commands:
        names = " | ".join(commands)
        asked = bool(given) and given[0] in ("-h", "--help")
        stream = sys.stdout if asked else sys.stderr
        print(f"usage: brainray {{{names}}} [options]", file=stream)
        print("`brainray COMMAND --help` lists a command's options.", file=stream)
        sys.exit(0 if asked else EXIT_USER)
    commands[given[0]](given[1:])


def run_train(arguments: list[str]) -> None:
    """`brainray train`, `python jobs/train.py`."""
    options = _guard(lambda: _parse_train(arguments))
    voice = Voice()

    def run() -> None:
        job = TrainJob(
            data_uri=storage.make_absolute(options.data_uri),
            output_uri=storage.make_absolute(options.output_uri),
            config=options.config,
            placement=options.placement,
            recipe=options.recipe,
            folds=options.folds,
        )
        run_job = train if job.folds is None else cross_validate
        metrics = run_job(job, say=voice.say, tick=voice.tick, verbose=options.verbose)
        _conclude(voice, metrics, job.output_uri)

    _guard(run)


def _parse_train(arguments: list[str]) -> TrainOptions:
    """Parse twice: first for the recipe, whose values are the defaults of the rest."""
    name = _find_recipe(arguments)
    default = TrainOptions(
        data_uri=tyro.MISSING,
        output_uri=tyro.MISSING,
        recipe=name,  # type: ignore[arg-type]
        config=build_recipe(name),
    )
    return tyro.cli(TrainOptions, default=default, args=arguments, prog="brainray train")


def _find_recipe(arguments: Sequence[str]) -> str:
    for place, word in enumerate(arguments):
        if word.startswith("--recipe="):
            return word.partition("=")[2]
        if word == "--recipe" and place + 1 < len(arguments):
            return arguments[place + 1]
    return DEFAULT_RECIPE


def run_evaluate(arguments: list[str]) -> None:
    """`brainray evaluate`, `python jobs/evaluate.py`."""
    options = _guard(lambda: tyro.cli(EvaluateOptions, args=arguments, prog="brainray evaluate"))
    voice = Voice()
    job = dataclasses.replace(
        options.job,
        data_uri=storage.make_absolute(options.job.data_uri),
        classifier_uri=storage.make_absolute(options.job.classifier_uri),
        output_uri=storage.make_absolute(options.job.output_uri),
    )

    def run() -> None:
        _conclude(voice, evaluate(job, say=voice.say, verbose=options.verbose), job.output_uri)

    _guard(run)


def run_classify(arguments: list[str]) -> None:
    """`brainray classify`, `python jobs/classify.py`; with files in place of --scans-uri, those."""
    if find_files(arguments):
        run_files(arguments)
        return
    options = _guard(lambda: _parse_classify(arguments))
    voice = Voice()
    job = dataclasses.replace(
        options.job,
        scans_uri=tuple(map(storage.make_absolute, options.job.scans_uri)),
        classifier_uri=storage.make_absolute(options.job.classifier_uri),
        output_uri=storage.make_absolute(options.job.output_uri),
    )

    def run() -> None:
        metrics = classify(job, say=voice.say, on_progress=voice.progress, verbose=options.verbose)
        _conclude_bulk(voice, metrics, job.output_uri)

    _guard(run)


def _parse_classify(arguments: list[str]) -> ClassifyOptions:
    if not asks_for_bulk(arguments) and not {"-h", "--help"} & set(arguments):
        raise ConfigError(
            "Expected scans to classify. Give FILE … for a table of answers, or "
            "--scans-uri PLACE --output-uri OUT for a bulk run, each with "
            "--classifier-uri CLASSIFIER if another than the default one is to answer; "
            "--help lists all options."
        )
    return tyro.cli(
        ClassifyOptions,
        args=arguments,
        prog="brainray classify",
        config=(tyro.conf.UseAppendAction,),
    )


def run_serve(arguments: list[str]) -> None:
    """`brainray serve`, `python jobs/serve.py`."""
    options = _guard(lambda: tyro.cli(ServeOptions, args=arguments, prog="brainray serve"))
    voice = Voice()

    def run() -> None:
        from brainray.serving.server import serve_here  # Ray Serve: seconds that others save

        serve_here(options.job, say=voice.say, verbose=options.verbose)

    _guard(run, interrupted="interrupted before the service was ready.")


def run_audit(arguments: list[str]) -> None:
    """`brainray audit`, `python jobs/audit.py`; exits 3 when more leaks than was allowed."""
    options = _guard(lambda: tyro.cli(AuditOptions, args=arguments, prog="brainray audit"))
    voice = Voice()
    job = dataclasses.replace(
        options.job,
        data_uri=storage.make_absolute(options.job.data_uri),
        output_uri=storage.make_absolute(options.job.output_uri),
    )

    def run() -> dict[str, Any]:
        document = audit(job, say=voice.say, verbose=options.verbose)
        _conclude_audit(voice, document, job.output_uri)
        return document

    excessive = list_excessive_leaks(_guard(run))
    if excessive:
        shares = " and ".join(
            f"{share:.1%} of the {name} scans" for name, share in excessive.items()
        )
        print(
            f"leak: {shares} have a near-twin in training, more than --max-leak {job.max_leak}. "
            "Make a split that parts no group: --make-split grouped.",
            file=sys.stderr,
        )
        sys.exit(EXIT_LEAKS)


def run_compare(arguments: list[str]) -> None:
    """`brainray compare A B`, `python jobs/compare.py A B`."""
    options = _guard(lambda: tyro.cli(CompareOptions, args=arguments, prog="brainray compare"))
    job = dataclasses.replace(
        options.job,
        a_uri=storage.make_absolute(options.job.a_uri),
        b_uri=storage.make_absolute(options.job.b_uri),
        output_uri=options.job.output_uri and storage.make_absolute(options.job.output_uri),
    )
    document = _guard(lambda: compare(job))
    if options.json:
        print(json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False))
        return
    print("\n".join(describe_comparison(document)))


def run_data(arguments: list[str]) -> None:
    """`brainray data fetch`."""
    if not arguments or arguments[0] != "fetch":
        asked = bool(arguments) and arguments[0] in ("-h", "--help")
        print("usage: brainray data fetch [options]", file=sys.stdout if asked else sys.stderr)
        sys.exit(0 if asked else EXIT_USER)
    job = _guard(lambda: tyro.cli(FetchJob, args=arguments[1:], prog="brainray data fetch"))
    _guard(lambda: fetch_kaggle_set(job, Voice().say))


def run_demonstration(arguments: list[str]) -> None:
    """`brainray demo`."""
    job = _guard(lambda: tyro.cli(DemoJob, args=arguments, prog="brainray demo"))
    voice = Voice()

    def run() -> None:
        metrics, output_uri = run_demo(job, build_recipe("smoke"), voice.say, voice.tick)
        _conclude(voice, metrics, output_uri)

    _guard(run)


def run_doctor(arguments: list[str]) -> None:
    """`brainray doctor`."""
    if arguments:
        print("usage: brainray doctor", file=sys.stderr)
        sys.exit(0 if arguments[0] in ("-h", "--help") else EXIT_USER)
    findings = examine()
    for finding in findings:
        print(f"{'ok     ' if finding.holds else 'missing'}  {finding.name:<20} {finding.detail}")
    if not all(finding.holds or not finding.needed for finding in findings):
        sys.exit(EXIT_FAILED)


def _conclude(voice: Voice, metrics: dict[str, Any], output_uri: str) -> None:
    """Print the scores, each beside what it must be read beside, and where things are."""
    for split in ("val", "test", "cv"):
        if split in metrics:
            voice.say(describe_scores(split, metrics[split]))
    if "spread" in metrics:
        voice.say(describe_spread(metrics["spread"], len(metrics["folds"])))
    if "training" in metrics:
        voice.say(f"classifier  {storage.join(output_uri, 'classifier')}")
    voice.say(f"report      {storage.join(output_uri, 'report.html')}")
    voice.say("Research use only; not a medical device.")


def _conclude_bulk(voice: Voice, metrics: dict[str, Any], output_uri: str) -> None:
    """Print what a bulk run did, and where things are."""
    run = metrics["run"]
    if "evaluation" in metrics:
        voice.say(describe_scores("truth", metrics["evaluation"]))
    voice.say(describe_counts(run))
    voice.say(f"speed       {run['images_per_s']:.1f} images/s with the start; {run['bottleneck']}")
    voice.say(f"predictions {storage.join(output_uri, 'predictions')}")
    voice.say(f"report      {storage.join(output_uri, 'report.html')}")
    voice.say("Research use only; not a medical device.")


def _conclude_audit(voice: Voice, document: dict[str, Any], output_uri: str) -> None:
    """Print what an audit found, and where things are."""
    for line in describe_audit(document):
        voice.say(line)
    if "split" in document:
        worst = max(row["imbalance"] for row in document["split"]["splits"])
        voice.say(f"new split   {document['split']['uri']} (class shares within {worst:.1%})")
    voice.say(f"report      {storage.join(output_uri, 'audit.html')}")
    voice.say("Research use only; not a medical device.")


def describe_audit(document: dict[str, Any]) -> list[str]:
    """Say what an audit found, a line for each kind.

    Parameters
    ----------
    document : dict
        The content of audit.json.
    """
    unreadable = document["num_scans"] - document["num_usable"]
    groups, near, copies = document["groups"], document["near_twins"], document["copies"]
    lines = [f"scans       {document['num_scans']:,}, of which {unreadable:,} cannot be read"]
    for split, leak in document["leaks"].items():
        baseline = leak["baseline_1nn"][0]["accuracy"]
        lines.append(
            f"{split:<11} {leak['share_near_twin']:.1%} of {leak['n']:,} have a near-twin in "
            f"training ({leak['num_near_twin']:,}; {leak['num_exact_twin']:,} pixel for pixel); "
            f"the nearest thumbnail scores {baseline:.1%}"
        )
    lines.append(
        f"copies      {copies['num_repeated']:,} sets of identical pixels "
        f"({copies['num_images_in_repeated']:,} scans); {groups['num_groups']:,} groups of "
        f"look-alikes, the largest {groups['largest']:,}"
    )
    lines.append(
        f"conflicts   {copies['num_mixed']:,} sets of copies, {near['num_mixed']:,} of near-twins "
        f"and {groups['num_mixed']:,} groups mix classes"
    )
    if document["shortcuts"]:
        strongest = max(document["shortcuts"][:-1], key=lambda row: row["balanced_accuracy"])
        lines.append(
            f"shortcut    {strongest['trait']} alone: balanced accuracy "
            f"{strongest['balanced_accuracy']:.1%} (chance {strongest['chance']:.1%})"
        )
    return lines


def describe_comparison(document: dict[str, Any]) -> list[str]:
    """Say how two classifiers compare, as the lines of a table.

    Parameters
    ----------
    document : dict
        What :func:`brainray.pipelines.compare.compare` returned.
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


def describe_progress(progress: Progress) -> str:
    """Say in one line how far a bulk run is."""
    total = "?" if progress.total is None else f"{progress.total:,}"
    line = f"{progress.done:,}/{total} scans"
    rate = progress.rate
    if rate and progress.warm_s > SETTLING_S:
        line += f"  {rate:.1f} images/s"
        if progress.total is not None:
            left = (progress.total - progress.done) / rate
            line += f"  {runlog.format_duration(left)} left"
    rejected = count_rejected(progress.new.reasons)
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
    if "no_twin" in scores:
        no_twin, nearest = scores["no_twin"], scores["baseline_1nn"]
        apart = _percent(no_twin) if no_twin["n"] else "none"
        line += f"  | without near-twins ({no_twin['n']:,}) {apart}"
        line += f"  | nearest thumbnail {nearest['accuracy']:.1%}"
    return line


def describe_spread(spread: dict[str, dict[str, float]], num_folds: int) -> str:
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


def _guard(
    run: Callable[[], Answer],
    interrupted: str = "interrupted: the same command goes on where this one was.",
) -> Answer:
    """Turn errors into one line and an exit status."""
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
