"""The command line: `brainray COMMAND`; `python jobs/COMMAND.py` runs the same commands.

To add a command, write a function that runs it and add an entry to ``_TABLE``. The entry
names its options as "module:Class", so that a command imports only its own module: importing torch
or Ray takes seconds.
"""

import dataclasses
import difflib
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import docstring_parser
import tyro

from brainray import storage
from brainray.console import (
    EXIT_FAILED,
    EXIT_LEAKS,
    EXIT_USER,
    ConsoleReporter,
    describe_audit,
    describe_bulk,
    describe_calibration,
    describe_comparison,
    describe_results,
    describe_tuning,
    exit_on_error,
)

if TYPE_CHECKING:
    from brainray.data.kaggle import FetchJob
    from brainray.dicom_results.receiver import ReceiveJob
    from brainray.dicom_results.report import ReportJob
    from brainray.evaluation.audit import AuditJob
    from brainray.evaluation.compare import CompareJob
    from brainray.evaluation.evaluate import EvaluateJob
    from brainray.evaluation.series import CalibrateSeriesJob
    from brainray.export.job import ExportJob
    from brainray.inference.options import ClassifyOptions
    from brainray.recipes import TrainOptions, TuneCommand
    from brainray.serving.options import ServeJob
    from brainray.training.demo import DemoJob
    from brainray.training.run import TrainJob

PRINT_COMPLETION = "--tyro-print-completion"
DEFAULT_RECIPE = "cpu"


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """A command, and what `brainray --help` prints about it."""

    name: str
    group: str
    summary: str
    example: str
    options: str | None
    """Dataclass of its options, as "module:Class"; None where it has none."""
    run: Callable[..., int | None]
    """Takes the options and a reporter; returns the exit status, or None for 0."""
    uris: tuple[str, ...] = ()
    """Options that are made absolute."""
    prints_json: bool = False
    """Whether `--json` prints its result as JSON."""
    uses_ray: bool = True
    """Whether `--verbose` shows Ray's log."""
    interrupted: str = "interrupted; the same command resumes."
    """Printed after Ctrl-C."""
    build_default: Callable[[Sequence[str]], object] | None = None
    """Takes the arguments and returns the options' defaults, where they depend on the arguments."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `brainray COMMAND …`; exits unless it succeeds."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = find_command(given)
    if command is None:
        sys.exit(exit_on_error(lambda: _print_overview(given)))
    words = given[len(command.name.split()) :]
    options, switches = exit_on_error(lambda: parse_options(command, words))
    with ConsoleReporter(**switches) as reporter:
        status = exit_on_error(lambda: command.run(options, reporter), command.interrupted)
    if status:
        sys.exit(status)


def find_command(arguments: Sequence[str]) -> Command | None:
    """Return the command that the first argument, or the first two, name."""
    return COMMANDS.get(" ".join(arguments[:1])) or COMMANDS.get(" ".join(arguments[:2]))


def parse_options(command: Command, arguments: Sequence[str]) -> tuple[Any, dict[str, bool]]:
    """Parse a command's options; exits with status 2 if they are wrong.

    Returns
    -------
    options : object
        An instance of the command's dataclass.
    switches : dict
        ``json`` and ``verbose``, if the command has them.
    """
    kind: Any = _import_options(command)
    switches = {
        "json": (command.prints_json, "Print the result as JSON, other lines to standard error."),
        "verbose": (command.uses_ray, "Show Ray's log too."),
    }
    offered: list[Any] = [
        (name, Annotated[bool, tyro.conf.arg(help=text)], field(default=False))
        for name, (is_offered, text) in switches.items()
        if is_offered
    ]
    # A subclass of the options, so that tyro lists the switches after the command's own options.
    form: Any = dataclasses.make_dataclass(
        kind.__name__, offered, bases=(kind,), frozen=True, kw_only=True
    )
    more = {}
    if command.build_default is not None:
        more["default"] = form(**_get_values(command.build_default(arguments), kind))
    parsed = tyro.cli(
        form,
        args=list(arguments),
        prog=f"brainray {command.name}",
        description=f"{command.summary}\n\nExample: {command.example}",
        **more,
    )
    values = _get_values(parsed, kind)
    values |= {name: _make_absolute(values[name]) for name in command.uris}
    return kind(**values), {name: getattr(parsed, name) for name, *_ in offered}


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """The options of a command without any."""


def _import_options(command: Command) -> type:
    kind: type = NoOptions
    if command.options is not None:
        module, _, name = command.options.partition(":")
        kind = getattr(importlib.import_module(module), name)
    _join_help_lines(kind)
    return kind


def _join_help_lines(kind: Any) -> None:  # noqa: ANN401 - a dataclass
    """Give tyro the fields' docstrings in one line: tyro 1.0 keeps line breaks before indentation.

    tyro reads the ``help`` of a field's metadata before its docstring.
    """
    texts: dict[str, str] = {}
    for base in filter(dataclasses.is_dataclass, reversed(kind.__mro__)):
        parsed = docstring_parser.parse_from_object(base).params
        texts |= {one.arg_name: " ".join((one.description or "").split()) for one in parsed}
    hints = get_type_hints(kind)
    for one in dataclasses.fields(kind):
        if texts.get(one.name):
            one.metadata = MappingProxyType({**one.metadata, "help": texts[one.name]})
        if dataclasses.is_dataclass(hints[one.name]):
            _join_help_lines(hints[one.name])


def _get_values(options: object, kind: Any) -> dict[str, Any]:  # noqa: ANN401 - a dataclass
    return {one.name: getattr(options, one.name) for one in dataclasses.fields(kind)}


def _make_absolute(value: Any) -> Any:  # noqa: ANN401 - a URI, several, or None
    if isinstance(value, tuple):
        return tuple(map(storage.make_absolute, value))
    return value and storage.make_absolute(value)


def _print_overview(given: Sequence[str]) -> int:
    """Print the commands, a completion script or what a mistyped command may mean."""
    if PRINT_COMPLETION in given[:1]:
        forms: dict[str, Any] = {
            name: _import_options(command) for name, command in COMMANDS.items()
        }
        tyro.extras.subcommand_cli_from_dict(forms, prog="brainray", args=list(given))
    longer = [name for name in COMMANDS if given and name.startswith(f"{given[0]} ")]
    asked = bool({"-h", "--help"}.intersection(given[: 2 if longer else 1]))
    if given and not asked:
        close = longer or difflib.get_close_matches(given[0], COMMANDS, n=2)
        hint = (
            f" Did you mean {' or '.join(f'`brainray {name}`' for name in close)}?" if close else ""
        )
        print(
            f"error: Unknown command '{given[0]}'.{hint} `brainray --help` lists all commands.",
            file=sys.stderr,
        )
        return EXIT_USER
    print(describe_commands(), file=sys.stdout if asked else sys.stderr)
    return 0 if asked else EXIT_USER


def describe_commands() -> str:
    """Return the commands by group, each with its summary and an example."""
    lines = ["usage: brainray COMMAND [options]", ""]
    lines += ["Classify slices of brain MRI, on one machine or a Ray cluster. Research use only."]
    for group in dict.fromkeys(command.group for command in COMMANDS.values()):
        lines += ["", group]
        for command in COMMANDS.values():
            if command.group == group:
                lines.append(f"  {command.name:<17} {command.summary}")
                lines.append(f"  {'':<17}   {command.example}")
    lines += [
        "",
        "`brainray COMMAND --help` lists the options of a command.",
        f"`brainray {PRINT_COMPLETION} bash` (or zsh) prints a completion script for the shell.",
    ]
    return "\n".join(lines)


def run_classify(options: "ClassifyOptions", reporter: ConsoleReporter) -> None:
    """Classify files in this process, or in bulk on Ray."""
    from brainray.inference.options import ClassifyJob, check_options

    check_options(options)
    if options.files:
        from brainray.inference.files import build_tables, classify_files

        result = classify_files(options.files, options)
        reporter.report(result.to_json(), build_tables(result, list_slices=options.slices))
        return
    from brainray.inference.bulk import classify

    job = ClassifyJob(**_get_values(options, ClassifyJob))
    metrics = classify(
        job, log=reporter.log, on_progress=reporter.on_progress, verbose=reporter.verbose
    )
    reporter.report(metrics, describe_bulk(metrics, job.output_uri))


def run_serve(job: "ServeJob", reporter: ConsoleReporter) -> None:
    """Serve until SIGINT or SIGTERM."""
    from brainray.serving.local import serve_here

    serve_here(job, log=reporter.log, verbose=reporter.verbose)


def run_evaluate(job: "EvaluateJob", reporter: ConsoleReporter) -> None:
    """Evaluate a classifier."""
    from brainray.evaluation.evaluate import evaluate

    metrics = evaluate(job, log=reporter.log, verbose=reporter.verbose)
    reporter.report(metrics, describe_results(metrics, job.output_uri))


def run_compare(job: "CompareJob", reporter: ConsoleReporter) -> None:
    """Compare two classifiers."""
    from brainray.evaluation.compare import compare

    document = compare(job)
    reporter.report(document, describe_comparison(document))


def run_calibrate_series(job: "CalibrateSeriesJob", reporter: ConsoleReporter) -> None:
    """Fit the rule that gives a series its class."""
    from brainray.evaluation.series import calibrate_series

    document = calibrate_series(job, log=reporter.log)
    reporter.report(document, [*describe_calibration(document), f"written to  {job.output_uri}"])


def run_audit(job: "AuditJob", reporter: ConsoleReporter) -> int:
    """Audit a data set; returns 3 where a split leaks more than ``max_leak`` allows."""
    from brainray.evaluation.audit import audit, list_excessive_leaks

    document = audit(job, log=reporter.log, verbose=reporter.verbose)
    reporter.report(document, describe_audit(document, job.output_uri))
    excessive = list_excessive_leaks(document)
    if not excessive:
        return 0
    shares = " and ".join(f"{share:.1%} of the {name} scans" for name, share in excessive.items())
    print(
        f"leak: {shares} have a near duplicate in training, more than --max-leak {job.max_leak}. "
        "Make a split that keeps groups whole: --make-split grouped.",
        file=sys.stderr,
    )
    return EXIT_LEAKS


def run_train(options: "TrainOptions", reporter: ConsoleReporter) -> None:
    """Train, or cross-validate."""
    from brainray.training.crossval import cross_validate
    from brainray.training.train import train

    job = _make_train_job(options, folds=options.folds, mlflow_uri=options.mlflow_uri)
    run_job = train if job.folds is None else cross_validate
    metrics = run_job(job, log=reporter.log, on_step=reporter.on_step, verbose=reporter.verbose)
    reporter.report(metrics, describe_results(metrics, job.output_uri))


def run_tune(options: "TuneCommand", reporter: ConsoleReporter) -> None:
    """Search for hyperparameters."""
    from brainray.training.tune import tune

    job = _make_train_job(options)
    result = tune(job, options.search, log=reporter.log, verbose=reporter.verbose)
    reporter.report(result, describe_tuning(result, job.output_uri))


def _make_train_job(options: "TrainOptions | TuneCommand", **others: Any) -> "TrainJob":  # noqa: ANN401
    from brainray.training.run import TrainJob

    return TrainJob(
        data_uri=options.data_uri,
        output_uri=options.output_uri,
        config=options.config,
        scaling=options.scaling,
        recipe=options.recipe,
        **others,
    )


@dataclass(frozen=True)
class _RecipeName:
    recipe: str = DEFAULT_RECIPE


def build_recipe_options(kind: str, arguments: Sequence[str]) -> Any:  # noqa: ANN401 - of that kind
    """Return the options of the recipe that the arguments name, as defaults of all options."""
    from brainray import recipes

    chosen, _ = tyro.cli(
        _RecipeName, args=list(arguments), return_unknown_args=True, add_help=False
    )
    name = chosen.recipe if chosen.recipe in recipes.RECIPES else DEFAULT_RECIPE
    return getattr(recipes, kind)(
        data_uri=tyro.MISSING,
        output_uri=tyro.MISSING,
        recipe=name,
        config=recipes.build_recipe(name),
    )


def run_fetch(job: "FetchJob", reporter: ConsoleReporter) -> None:
    """Fetch the public data set."""
    from brainray.data.kaggle import fetch_kaggle_set

    fetch_kaggle_set(job, reporter.log)


def run_demonstration(job: "DemoJob", reporter: ConsoleReporter) -> None:
    """Train on drawn scans."""
    from brainray.recipes import build_recipe
    from brainray.training.demo import run_demo

    metrics, output_uri = run_demo(job, build_recipe("smoke"), reporter.log, reporter.on_step)
    reporter.report(metrics, describe_results(metrics, output_uri))


def run_dicom_results(job: "ReportJob", reporter: ConsoleReporter) -> None:
    """Make DICOM objects of a bulk run's series."""
    from brainray.dicom_results.report import report_dicom

    report_dicom(job, log=reporter.log, verbose=reporter.verbose)


def run_export(job: "ExportJob", reporter: ConsoleReporter) -> None:
    """Export a bulk run and its scans without identity."""
    from brainray.export.job import export

    export(job, log=reporter.log, verbose=reporter.verbose)


def run_receive(job: "ReceiveJob", reporter: ConsoleReporter) -> None:
    """Receive scans by C-STORE until SIGINT or SIGTERM."""
    from brainray.dicom_results.receiver import receive

    receive(job, log=reporter.log)


def run_doctor(_: NoOptions, reporter: ConsoleReporter) -> int:
    """Examine this machine; returns 1 where something that every command needs is missing."""
    from brainray.doctor import examine

    findings = examine()
    reporter.report(
        {"findings": [dataclasses.asdict(finding) for finding in findings]},
        [
            f"{'ok     ' if finding.holds else 'missing'}  {finding.name:<20} {finding.detail}"
            for finding in findings
        ],
    )
    is_usable = all(finding.holds or not finding.needed for finding in findings)
    return 0 if is_usable else EXIT_FAILED


_TABLE = (
    Command(
        name="classify",
        group="Use a classifier",
        summary="Classify files, or all scans below a URI.",
        example="brainray classify scan.dcm",
        options="brainray.inference.options:ClassifyOptions",
        run=run_classify,
        uris=("scans_uri", "output_uri", "classifier_uri", "id_key_file"),
        prints_json=True,
    ),
    Command(
        name="serve",
        group="Use a classifier",
        summary="Answer HTTP requests on this machine until Ctrl-C or SIGTERM.",
        example="brainray serve --port 8000",
        options="brainray.serving.options:ServeJob",
        run=run_serve,
        interrupted="interrupted before the service was ready.",
    ),
    Command(
        name="evaluate",
        group="Measure",
        summary="Evaluate a classifier on labelled scans.",
        example="brainray evaluate --data-uri scans/ --output-uri out/",
        options="brainray.evaluation.evaluate:EvaluateJob",
        run=run_evaluate,
        uris=("data_uri", "classifier_uri", "output_uri"),
        prints_json=True,
    ),
    Command(
        name="compare",
        group="Measure",
        summary="Compare the predictions of two classifiers for the same scans.",
        example="brainray compare runs/a runs/b",
        options="brainray.evaluation.compare:CompareJob",
        run=run_compare,
        uses_ray=False,
        uris=("a_uri", "b_uri", "output_uri"),
        prints_json=True,
    ),
    Command(
        name="calibrate-series",
        group="Measure",
        summary="Fit the rule of slice evidence to labelled series.",
        example="brainray calibrate-series --predictions-uri out/ --labels labels.csv "
        "--output-uri rule.json",
        options="brainray.evaluation.series:CalibrateSeriesJob",
        run=run_calibrate_series,
        uses_ray=False,
        uris=("predictions_uri", "labels", "output_uri"),
        prints_json=True,
    ),
    Command(
        name="audit",
        group="Data",
        summary="Find near duplicates across splits, label conflicts and shortcuts.",
        example="brainray audit --data-uri scans/ --output-uri audit/",
        options="brainray.evaluation.audit:AuditJob",
        run=run_audit,
        uris=("data_uri", "output_uri"),
        prints_json=True,
    ),
    Command(
        name="data fetch",
        group="Data",
        summary="Fetch the public brain-tumour MRI set from Kaggle, or check it.",
        example="brainray data fetch --data-path data/brain-tumor-mri",
        options="brainray.data.kaggle:FetchJob",
        run=run_fetch,
        uses_ray=False,
    ),
    Command(
        name="train",
        group="Train",
        summary="Train a classifier on labelled scans.",
        example="brainray train --data-uri scans/ --output-uri runs/first --recipe cpu",
        options="brainray.recipes:TrainOptions",
        run=run_train,
        uris=("data_uri", "output_uri"),
        prints_json=True,
        build_default=lambda arguments: build_recipe_options("TrainOptions", arguments),
    ),
    Command(
        name="tune",
        group="Train",
        summary="Search for the hyperparameters of a recipe by cross-validation.",
        example="brainray tune --data-uri scans/ --output-uri runs/search",
        options="brainray.recipes:TuneCommand",
        run=run_tune,
        uris=("data_uri", "output_uri"),
        prints_json=True,
        build_default=lambda arguments: build_recipe_options("TuneCommand", arguments),
    ),
    Command(
        name="receive",
        group="Hospital",
        summary="Receive scans by DICOM C-STORE into an inbox of finished studies.",
        example="brainray receive --inbox-path inbox/ --calling-ae-titles SCANNER1",
        options="brainray.dicom_results.receiver:ReceiveJob",
        run=run_receive,
        uses_ray=False,
    ),
    Command(
        name="dicom-results",
        group="Hospital",
        summary="Store a bulk run's results as DICOM objects, in a folder or a PACS.",
        example="brainray dicom-results --predictions-uri out/ --scans-uri scans/ "
        "--output-uri objects/",
        options="brainray.dicom_results.report:ReportJob",
        run=run_dicom_results,
        uris=("predictions_uri", "scans_uri", "output_uri", "id_key_file", "codes_file"),
    ),
    Command(
        name="export",
        group="Hospital",
        summary="Export a bulk run and its scans without identity, for research.",
        example="brainray export --deidentify --predictions-uri out/ --output-uri export/",
        options="brainray.export.job:ExportJob",
        run=run_export,
        uris=("predictions_uri", "output_uri", "scans_uri", "id_key_file"),
    ),
    Command(
        name="demo",
        group="This machine",
        summary="Draw scans, train on them and evaluate: some three minutes.",
        example="brainray demo",
        options="brainray.training.demo:DemoJob",
        run=run_demonstration,
        uses_ray=False,
    ),
    Command(
        name="doctor",
        group="This machine",
        summary="List what this machine can do and what is missing.",
        example="brainray doctor",
        options=None,
        run=run_doctor,
        uses_ray=False,
        prints_json=True,
    ),
)

COMMANDS = {command.name: command for command in _TABLE}
