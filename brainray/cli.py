"""The command line: `brainray COMMAND`; jobs/*.py are the same commands.

Each command imports what it needs itself: torch alone takes seconds, and a bulk job's driver does
without.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import tyro

from brainray import storage
from brainray.console import (
    EXIT_FAILED,
    EXIT_LEAKS,
    EXIT_USER,
    ConsoleReporter,
    describe_calibration,
    describe_comparison,
    guard,
    report_audit,
    report_bulk,
    report_scores,
    report_tuning,
)
from brainray.errors import ConfigError
from brainray.inference.files import asks_for_bulk, find_files, run_files

if TYPE_CHECKING:
    pass

DEFAULT_RECIPE = "cpu"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `brainray COMMAND …` and exit."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    commands: dict[str, Callable[[list[str]], None]] = {
        "train": run_train,
        "tune": run_tune,
        "classify": run_classify,
        "evaluate": run_evaluate,
        "serve": run_serve,
        "audit": run_audit,
        "compare": run_compare,
        "calibrate-series": run_calibrate_series,
        "dicom-results": run_dicom_results,
        "data": run_data,
        "receive": run_receive,
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


Job = TypeVar("Job")


def parse_job(
    kind: type[Job],
    arguments: Sequence[str],
    command: str,
    description: str,
    *,
    uris: Sequence[str] = (),
    flag: tuple[str, str] = ("verbose", "Show Ray's own lines too."),
    **options: Any,  # noqa: ANN401 - of tyro
) -> tuple[Job, bool]:
    """Parse a job's options and one more flag; errors end the process.

    Parameters
    ----------
    kind : type
        The job's dataclass.
    uris : sequence of str
        Fields that are made absolute.
    flag : (str, str)
        Its name, and its help.

    Returns
    -------
    job, flag
    """
    name, flag_help = flag
    fields: list[Any] = [
        ("job", Annotated[kind, tyro.conf.arg(name="")]),
        (name, Annotated[bool, tyro.conf.arg(help=flag_help)], dataclasses.field(default=False)),
    ]
    form = dataclasses.make_dataclass("Options", fields, frozen=True, kw_only=True)
    prog = f"brainray {command}"
    parsed: Any = guard(
        lambda: tyro.cli(form, args=arguments, prog=prog, description=description, **options)
    )

    def complete(value: Any) -> Any:  # noqa: ANN401 - a URI, several, or None
        if isinstance(value, tuple):
            return tuple(map(storage.make_absolute, value))
        return value and storage.make_absolute(value)

    job = parsed.job
    changes = {uri: complete(getattr(job, uri)) for uri in uris}
    return dataclasses.replace(job, **changes), getattr(parsed, name)


def run_train(arguments: list[str]) -> None:
    """`brainray train`, `python jobs/train.py`."""
    from brainray.recipes import TrainOptions
    from brainray.training.crossval import cross_validate
    from brainray.training.run import TrainJob
    from brainray.training.train import train

    options = guard(lambda: _parse_recipe(TrainOptions, arguments, "train"))
    reporter = ConsoleReporter()

    def run() -> None:
        job = TrainJob(
            data_uri=storage.make_absolute(options.data_uri),
            output_uri=storage.make_absolute(options.output_uri),
            config=options.config,
            scaling=options.scaling,
            recipe=options.recipe,
            folds=options.folds,
            mlflow_uri=options.mlflow_uri,
        )
        run_job = train if job.folds is None else cross_validate
        metrics = run_job(job, say=reporter.log, tick=reporter.on_step, verbose=options.verbose)
        report_scores(reporter, metrics, job.output_uri)

    guard(run)


def run_tune(arguments: list[str]) -> None:
    """`brainray tune`, `python jobs/tune.py`."""
    from brainray.recipes import TuneCommand
    from brainray.training.run import TrainJob
    from brainray.training.tune import tune

    options = guard(lambda: _parse_recipe(TuneCommand, arguments, "tune"))
    reporter = ConsoleReporter()

    def run() -> None:
        job = TrainJob(
            data_uri=storage.make_absolute(options.data_uri),
            output_uri=storage.make_absolute(options.output_uri),
            config=options.config,
            scaling=options.scaling,
            recipe=options.recipe,
        )
        result = tune(job, options.search, say=reporter.log, verbose=options.verbose)
        report_tuning(reporter, result, job.output_uri)

    guard(run)


def _parse_recipe(kind: Any, arguments: list[str], command: str) -> Any:  # noqa: ANN401 - a form
    """Parse twice: first for the recipe, whose values are the defaults of the rest."""
    from brainray.recipes import build_recipe

    name = _find_recipe(arguments)
    default = kind(
        data_uri=tyro.MISSING,
        output_uri=tyro.MISSING,
        recipe=name,
        config=build_recipe(name),
    )
    return tyro.cli(kind, default=default, args=arguments, prog=f"brainray {command}")


def _find_recipe(arguments: Sequence[str]) -> str:
    for place, word in enumerate(arguments):
        if word.startswith("--recipe="):
            return word.partition("=")[2]
        if word == "--recipe" and place + 1 < len(arguments):
            return arguments[place + 1]
    return DEFAULT_RECIPE


def run_evaluate(arguments: list[str]) -> None:
    """`brainray evaluate`, `python jobs/evaluate.py`."""
    from brainray.evaluation.evaluate import EvaluateJob, evaluate

    job, verbose = parse_job(
        EvaluateJob,
        arguments,
        "evaluate",
        "Evaluate a classifier on labelled scans.",
        uris=("data_uri", "classifier_uri", "output_uri"),
    )
    reporter = ConsoleReporter()

    def run() -> None:
        metrics = evaluate(job, say=reporter.log, verbose=verbose)
        report_scores(reporter, metrics, job.output_uri)

    guard(run)


def run_classify(arguments: list[str]) -> None:
    """`brainray classify`, `python jobs/classify.py`; with files in place of --scans-uri, those."""
    if find_files(arguments):
        run_files(arguments)
        return
    if not asks_for_bulk(arguments) and not {"-h", "--help"} & set(arguments):
        guard(_refuse_no_scans)
    from brainray.inference.bulk import ClassifyJob, classify

    job, verbose = parse_job(
        ClassifyJob,
        arguments,
        "classify",
        "Classify scans in bulk; a row of Parquet for every scan.\n\n"
        "`brainray classify FILE…` prints the predictions of a few files.",
        uris=("scans_uri", "classifier_uri", "output_uri", "id_key_file"),
        config=(tyro.conf.UseAppendAction,),
    )
    reporter = ConsoleReporter()

    def run() -> None:
        metrics = classify(job, say=reporter.log, on_progress=reporter.on_progress, verbose=verbose)
        report_bulk(reporter, metrics, job.output_uri)

    guard(run)


def _refuse_no_scans() -> None:
    raise ConfigError(
        "Expected scans to classify. Give FILE … for a table of predictions, or "
        "--scans-uri URI --output-uri OUT for a bulk run, each with "
        "--classifier-uri CLASSIFIER if another than the default one is to answer; "
        "--help lists all options."
    )


def run_serve(arguments: list[str]) -> None:
    """`brainray serve`, `python jobs/serve.py`."""
    from brainray.serving.options import ServeJob

    job, verbose = parse_job(
        ServeJob,
        arguments,
        "serve",
        "Answer over HTTP with a classifier, on this machine, until Ctrl-C or SIGTERM.",
    )
    reporter = ConsoleReporter()

    def run() -> None:
        from brainray.serving.local import serve_here  # Ray Serve takes seconds to import

        serve_here(job, log=reporter.log, verbose=verbose)

    guard(run, interrupted="interrupted before the service was ready.")


def run_receive(arguments: list[str]) -> None:
    """`brainray receive`."""

    def run() -> None:
        from brainray.dicom_results.receiver import ReceiveJob, receive  # needs the extra `dicom`

        description = "Receive scans by DICOM C-STORE into an inbox, until Ctrl-C or SIGTERM."
        job = tyro.cli(ReceiveJob, args=arguments, prog="brainray receive", description=description)
        receive(job, log=ConsoleReporter().log)

    guard(run)


def run_audit(arguments: list[str]) -> None:
    """`brainray audit`, `python jobs/audit.py`; exits 3 when more leaks than was allowed."""
    from brainray.evaluation.audit import AuditJob, audit, list_excessive_leaks

    job, verbose = parse_job(
        AuditJob,
        arguments,
        "audit",
        "Look for near duplicates across splits, label conflicts and shortcuts in a data set.",
        uris=("data_uri", "output_uri"),
    )
    reporter = ConsoleReporter()

    def run() -> dict[str, Any]:
        document = audit(job, say=reporter.log, verbose=verbose)
        report_audit(reporter, document, job.output_uri)
        return document

    excessive = list_excessive_leaks(guard(run))
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
    from brainray.evaluation.compare import CompareJob, compare

    job, as_json = parse_job(
        CompareJob,
        arguments,
        "compare",
        "Compare two classifiers by their predictions for the same images.",
        uris=("a_uri", "b_uri", "output_uri"),
        flag=("json", "Print compare.json instead of a table."),
    )
    document = guard(lambda: compare(job))
    if as_json:
        print(json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False))
        return
    print("\n".join(describe_comparison(document)))


def run_calibrate_series(arguments: list[str]) -> None:
    """`brainray calibrate-series`."""
    from brainray.evaluation.series import CalibrateSeriesJob, calibrate_series

    job, as_json = parse_job(
        CalibrateSeriesJob,
        arguments,
        "calibrate-series",
        "Fit the rule of slice evidence to series whose class is known, grouped by patient.",
        uris=("predictions_uri", "labels", "output_uri"),
        flag=("json", "Print the JSON file too, instead of a table."),
    )
    reporter = ConsoleReporter()

    def run() -> dict[str, Any]:
        return calibrate_series(job, say=(lambda _: None) if as_json else reporter.log)

    document = guard(run)
    if as_json:
        print(json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False))
        return
    for line in describe_calibration(document):
        reporter.log(line)
    reporter.log(f"written to  {job.output_uri}")


def run_dicom_results(arguments: list[str]) -> None:
    """`brainray dicom-results`, `python jobs/report_dicom.py`."""
    from brainray.dicom_results.report import ReportJob, report_dicom

    job, verbose = parse_job(
        ReportJob,
        arguments,
        "dicom-results",
        "Make DICOM objects of the series in a bulk output, and store them in a folder or a PACS.",
        uris=("predictions_uri", "scans_uri", "output_uri", "id_key_file", "codes_file"),
        config=(tyro.conf.UseAppendAction,),
    )
    reporter = ConsoleReporter()
    guard(lambda: report_dicom(job, log=reporter.log, verbose=verbose))


def run_data(arguments: list[str]) -> None:
    """`brainray data fetch`."""
    from brainray.data.kaggle import FetchJob, fetch_kaggle_set

    if not arguments or arguments[0] != "fetch":
        asked = bool(arguments) and arguments[0] in ("-h", "--help")
        print("usage: brainray data fetch [options]", file=sys.stdout if asked else sys.stderr)
        sys.exit(0 if asked else EXIT_USER)
    job = guard(lambda: tyro.cli(FetchJob, args=arguments[1:], prog="brainray data fetch"))
    guard(lambda: fetch_kaggle_set(job, ConsoleReporter().log))


def run_demonstration(arguments: list[str]) -> None:
    """`brainray demo`."""
    from brainray.recipes import build_recipe
    from brainray.training.demo import DemoJob, run_demo

    job = guard(lambda: tyro.cli(DemoJob, args=arguments, prog="brainray demo"))
    reporter = ConsoleReporter()

    def run() -> None:
        metrics, output_uri = run_demo(job, build_recipe("smoke"), reporter.log, reporter.on_step)
        report_scores(reporter, metrics, output_uri)

    guard(run)


def run_doctor(arguments: list[str]) -> None:
    """`brainray doctor`."""
    from brainray.doctor import examine

    if arguments:
        print("usage: brainray doctor", file=sys.stderr)
        sys.exit(0 if arguments[0] in ("-h", "--help") else EXIT_USER)
    findings = examine()
    for finding in findings:
        print(f"{'ok     ' if finding.holds else 'missing'}  {finding.name:<20} {finding.detail}")
    if not all(finding.holds or not finding.needed for finding in findings):
        sys.exit(EXIT_FAILED)
