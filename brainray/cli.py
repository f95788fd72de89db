"""The command line: `brainray COMMAND`; `python jobs/COMMAND.py` runs the same commands.

To add a command, add an entry to ``_GROUPS``. It names its options and its function as
"module:name", so that a command imports only its own modules: importing torch or Ray takes seconds.
"""

import dataclasses
import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import docstring_parser
import tyro

from brainray import console
from brainray.console import ConsoleReporter, exit_on_error
from brainray.io import storage

if TYPE_CHECKING:
    from brainray.evaluation.audit import AuditJob
    from brainray.inference.options import ClassifyOptions
    from brainray.recipes import TrainOptions, TuneCommand
    from brainray.training.demo import DemoJob

Options = TypeVar("Options")
PRINT_COMPLETION = "--tyro-print-completion"
DEFAULT_RECIPE = "cpu"


@dataclass(frozen=True, slots=True)
class Command:
    """A command, and what `brainray --help` prints about it."""

    name: str
    summary: str
    _: dataclasses.KW_ONLY
    example: str
    options: str
    """Dataclass of its options, as "module:Class"."""
    run: str | Callable[[Any, ConsoleReporter], int | None]
    """Function of the options, as "module:function"; it may take ``log``, ``verbose`` and
    ``on_step``. Or a function of this module, which may return an exit status."""
    describe: Callable[[Any, str], list[str]] | None = None
    """Takes the result and the output's URI; returns the lines to print."""
    uris: tuple[str, ...] = ()
    """Options that are made absolute."""
    prints_json: bool = True
    """Whether `--json` prints its result as JSON."""
    uses_ray: bool = True
    """Whether `--verbose` shows Ray's log."""
    has_recipe: bool = False
    """Whether the defaults of its options are those of a recipe."""
    interrupted: str = "interrupted; the same command resumes."
    """Printed after Ctrl-C."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `brainray COMMAND …`; exits unless it succeeds."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = COMMANDS.get(" ".join(given[:1])) or COMMANDS.get(" ".join(given[:2]))
    if command is None:
        sys.exit(exit_on_error(lambda: _print_overview(given)))
    words = given[len(command.name.split()) :]
    options, switches = exit_on_error(lambda: parse_options(command, words))
    with ConsoleReporter(**switches) as reporter:
        status = exit_on_error(lambda: _run(command, options, reporter), command.interrupted)
    if status:
        sys.exit(status)


def parse_options(command: Command, arguments: Sequence[str]) -> tuple[Any, dict[str, bool]]:
    """Parse a command's options; exits with status 2 if they are wrong.

    Returns
    -------
    options : object
        An instance of the command's dataclass.
    switches : dict
        ``json`` and ``verbose``, if the command has them.
    """
    kind = _import_options(command)
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
    more = {"default": form(**_read_recipe(arguments))} if command.has_recipe else {}
    parsed = tyro.cli(
        form,
        args=list(arguments),
        prog=f"brainray {command.name}",
        description=f"{command.summary}\n\nExample: {command.example}",
        **more,
    )
    absolute = {name: _make_absolute(getattr(parsed, name)) for name in command.uris}
    return _convert(parsed, kind, **absolute), {name: getattr(parsed, name) for name, *_ in offered}


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """The options of a command without any."""


def _import(name: str) -> Any:  # noqa: ANN401 - a class or a function
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _import_options(command: Command) -> Any:  # noqa: ANN401 - a dataclass
    kind = _import(command.options)
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


def _convert(options: Any, kind: type[Options], **changes: object) -> Options:  # noqa: ANN401
    """Make an object of a dataclass, with the values of the fields that the options have too."""
    names = {one.name for one in dataclasses.fields(options)}
    values = {
        one.name: getattr(options, one.name)
        for one in dataclasses.fields(kind)  # type: ignore[arg-type]  # it is a dataclass
        if one.name in names
    }
    return kind(**values | changes)


def _make_absolute(value: Any) -> Any:  # noqa: ANN401 - a URI, several, or None
    if isinstance(value, tuple):
        return tuple(map(storage.make_absolute, value))
    return value and storage.make_absolute(value)


@dataclass(frozen=True)
class _RecipeName:
    recipe: str = DEFAULT_RECIPE


def _read_recipe(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the defaults that the recipe named in the arguments gives to the options."""
    from brainray import recipes

    chosen, _ = tyro.cli(
        _RecipeName, args=list(arguments), return_unknown_args=True, add_help=False
    )
    name = chosen.recipe if chosen.recipe in recipes.RECIPES else DEFAULT_RECIPE
    required = {"data_uri": tyro.MISSING, "output_uri": tyro.MISSING}
    return {**required, "recipe": name, "config": recipes.build_recipe(name)}


def _print_overview(given: Sequence[str]) -> int:
    """Print the commands, a completion script or what a mistyped command may mean."""
    if PRINT_COMPLETION in given[:1]:
        forms = {name: _import_options(command) for name, command in COMMANDS.items()}
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
        return console.EXIT_USER
    print(_describe_commands(), file=sys.stdout if asked else sys.stderr)
    return 0 if asked else console.EXIT_USER


def _describe_commands() -> str:
    lines = ["usage: brainray COMMAND [options]", ""]
    lines += ["Classify slices of brain MRI, on one machine or a Ray cluster. Research use only."]
    for group, commands in _GROUPS.items():
        lines += ["", group]
        for command in commands:
            lines.append(f"  {command.name:<17} {command.summary}")
            lines.append(f"  {'':<17}   {command.example}")
    lines += [
        "",
        "`brainray COMMAND --help` lists the options of a command.",
        f"`brainray {PRINT_COMPLETION} bash` (or zsh) prints a completion script for the shell.",
    ]
    return "\n".join(lines)


def _run(command: Command, options: Any, reporter: ConsoleReporter) -> int | None:  # noqa: ANN401
    """Run a command, and report its result."""
    if not isinstance(command.run, str):
        return command.run(options, reporter)
    function = _import(command.run)
    taken = {"log", "verbose", "on_step"} & inspect.signature(function).parameters.keys()
    result = function(options, **{name: getattr(reporter, name) for name in taken})
    if command.describe is not None:
        reporter.report(result, command.describe(result, options.output_uri))
    return None


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

    job = _convert(options, ClassifyJob)
    metrics = classify(
        job, log=reporter.log, on_progress=reporter.on_progress, verbose=reporter.verbose
    )
    reporter.report(metrics, console.describe_bulk(metrics, job.output_uri))


def run_audit(job: "AuditJob", reporter: ConsoleReporter) -> int:
    """Audit a data set; returns 3 where a split leaks more than ``max_leak`` allows."""
    from brainray.evaluation.audit import audit, list_excessive_leaks

    document = audit(job, log=reporter.log, verbose=reporter.verbose)
    reporter.report(document, console.describe_audit(document, job.output_uri))
    excessive = list_excessive_leaks(document)
    if not excessive:
        return 0
    shares = " and ".join(f"{share:.1%} of the {name} scans" for name, share in excessive.items())
    print(
        f"leak: {shares} have a near duplicate in training, more than --max-leak {job.max_leak}. "
        "Make a split that keeps groups whole: --make-split grouped.",
        file=sys.stderr,
    )
    return console.EXIT_LEAKS


def run_train(options: "TrainOptions", reporter: ConsoleReporter) -> None:
    """Train, or cross-validate."""
    from brainray.training.crossval import cross_validate
    from brainray.training.run import TrainJob
    from brainray.training.train import train

    job = _convert(options, TrainJob)
    run_job = train if job.folds is None else cross_validate
    metrics = run_job(job, log=reporter.log, on_step=reporter.on_step, verbose=reporter.verbose)
    reporter.report(metrics, console.describe_results(metrics, job.output_uri))


def run_tune(options: "TuneCommand", reporter: ConsoleReporter) -> None:
    """Search for hyperparameters."""
    from brainray.training.run import TrainJob
    from brainray.training.tune import tune

    job = _convert(options, TrainJob)
    result = tune(job, options.search, log=reporter.log, verbose=reporter.verbose)
    reporter.report(result, console.describe_tuning(result, job.output_uri))


def run_demonstration(job: "DemoJob", reporter: ConsoleReporter) -> None:
    """Train on drawn scans."""
    from brainray.recipes import build_recipe
    from brainray.training.demo import run_demo

    metrics, output_uri = run_demo(job, build_recipe("smoke"), reporter.log, reporter.on_step)
    reporter.report(metrics, console.describe_results(metrics, output_uri))


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
    return 0 if is_usable else console.EXIT_FAILED


_GROUPS = {
    "Use a classifier": (
        Command(
            "classify",
            "Classify files, or all scans below a URI.",
            example="brainray classify scan.dcm",
            options="brainray.inference.options:ClassifyOptions",
            run=run_classify,
            uris=("scans_uri", "output_uri", "classifier_uri", "id_key_file"),
        ),
        Command(
            "serve",
            "Answer HTTP requests on this machine until Ctrl-C or SIGTERM.",
            example="brainray serve --port 8000",
            options="brainray.serving.options:ServeJob",
            run="brainray.serving.local:serve_here",
            prints_json=False,
            interrupted="interrupted before the service was ready.",
        ),
    ),
    "Measure": (
        Command(
            "evaluate",
            "Evaluate a classifier on labelled scans.",
            example="brainray evaluate --data-uri scans/ --output-uri out/",
            options="brainray.evaluation.evaluate:EvaluateJob",
            run="brainray.evaluation.evaluate:evaluate",
            describe=console.describe_results,
            uris=("data_uri", "classifier_uri", "output_uri"),
        ),
        Command(
            "compare",
            "Compare the predictions of two classifiers for the same scans.",
            example="brainray compare runs/a runs/b",
            options="brainray.evaluation.compare:CompareJob",
            run="brainray.evaluation.compare:compare",
            describe=console.describe_comparison,
            uris=("a_uri", "b_uri", "output_uri"),
            uses_ray=False,
        ),
        Command(
            "calibrate-series",
            "Fit the rule of slice evidence to labelled series.",
            example="brainray calibrate-series --predictions-uri out/ --labels labels.csv "
            "--output-uri rule.json",
            options="brainray.evaluation.series:CalibrateSeriesJob",
            run="brainray.evaluation.series:calibrate_series",
            describe=console.describe_calibration,
            uris=("predictions_uri", "labels", "output_uri"),
            uses_ray=False,
        ),
    ),
    "Data": (
        Command(
            "audit",
            "Find near duplicates across splits, label conflicts and shortcuts.",
            example="brainray audit --data-uri scans/ --output-uri audit/",
            options="brainray.evaluation.audit:AuditJob",
            run=run_audit,
            uris=("data_uri", "output_uri"),
        ),
        Command(
            "data fetch",
            "Fetch the public brain-tumour MRI set from Kaggle, or check it.",
            example="brainray data fetch --data-path data/brain-tumor-mri",
            options="brainray.data.kaggle:FetchJob",
            run="brainray.data.kaggle:fetch_kaggle_set",
            prints_json=False,
            uses_ray=False,
        ),
    ),
    "Train": (
        Command(
            "train",
            "Train a classifier on labelled scans.",
            example="brainray train --data-uri scans/ --output-uri runs/first --recipe cpu",
            options="brainray.recipes:TrainOptions",
            run=run_train,
            uris=("data_uri", "output_uri"),
            has_recipe=True,
        ),
        Command(
            "tune",
            "Search for the hyperparameters of a recipe by cross-validation.",
            example="brainray tune --data-uri scans/ --output-uri runs/search",
            options="brainray.recipes:TuneCommand",
            run=run_tune,
            uris=("data_uri", "output_uri"),
            has_recipe=True,
        ),
    ),
    "Hospital": (
        Command(
            "receive",
            "Receive scans by DICOM C-STORE into an inbox of finished studies.",
            example="brainray receive --inbox-path inbox/ --calling-ae-titles SCANNER1",
            options="brainray.dicom_results.receiver:ReceiveJob",
            run="brainray.dicom_results.receiver:receive",
            prints_json=False,
            uses_ray=False,
        ),
        Command(
            "dicom-results",
            "Store a bulk run's results as DICOM objects, in a folder or a PACS.",
            example="brainray dicom-results --predictions-uri out/ --scans-uri scans/ "
            "--output-uri objects/",
            options="brainray.dicom_results.report:ReportJob",
            run="brainray.dicom_results.report:report_dicom",
            uris=("predictions_uri", "scans_uri", "output_uri", "id_key_file", "codes_file"),
            prints_json=False,
        ),
        Command(
            "export",
            "Export a bulk run and its scans without identity, for research.",
            example="brainray export --deidentify --predictions-uri out/ --output-uri export/",
            options="brainray.export.job:ExportJob",
            run="brainray.export.job:export",
            uris=("predictions_uri", "output_uri", "scans_uri", "id_key_file"),
            prints_json=False,
        ),
    ),
    "This machine": (
        Command(
            "demo",
            "Draw scans, train on them and evaluate: some three minutes.",
            example="brainray demo",
            options="brainray.training.demo:DemoJob",
            run=run_demonstration,
            prints_json=False,
            uses_ray=False,
        ),
        Command(
            "doctor",
            "List what this machine can do and what is missing.",
            example="brainray doctor",
            options="brainray.cli:NoOptions",
            run=run_doctor,
            uses_ray=False,
        ),
    ),
}

COMMANDS = {command.name: command for commands in _GROUPS.values() for command in commands}
