"""From a bulk output and its sources to DICOM objects: three for each series.

Each series is done by itself: its files are opened again, its objects are built, and those that the
destination has not are stored there. UIDs follow from source, classifier and content, so whoever
does a series again finds its objects stored; where that is written down, it is not done again. A
series that fails is listed, and the next one is done. A localizer, and a series without a
classified slice, get no objects; they are counted.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from brainray.dicom_results.codes import CodeTable, read_codes
from brainray.dicom_results.destinations import (
    Destination,
    FolderDestination,
    PacsDestination,
    Target,
)
from brainray.dicom_results.objects import (
    KINDS,
    Kind,
    build_key_objects,
    build_secondary_capture,
    derive_uid,
    encode_object,
    import_highdicom,
)
from brainray.dicom_results.result import (
    BulkOutput,
    choose_latest,
    choose_slices,
    compute_digest,
    make_result,
    open_output,
    read_header,
    read_slices,
)
from brainray.dicom_results.sr import build_sr
from brainray.errors import BrainrayError, ConfigError, DicomResultsError
from brainray.images.decode import DecodeLimits
from brainray.inference.series import summarise_series
from brainray.inference.sources import (
    Row,
    SourceReader,
    check_scans_uri,
    name_file,
    open_sources,
    process_groups,
)
from brainray.io import storage

logger = logging.getLogger(__name__)

RESULTS_FILE = "dicom_results.json"
MAX_PARTITION_ROWS = 50_000
"""Slices of one hash partition, about: with class maps some 100 MB."""
MAX_LISTED_FAILURES = 10_000
NUM_LOGGED_FAILURES = 10

_BUILDERS = {"sr": build_sr, "ko": build_key_objects, "sc": build_secondary_capture}

Status = Literal["stored", "already_stored", "skipped", "failed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportJob:
    """DICOM results of one bulk output, into a folder or a PACS."""

    predictions_uri: str
    """`--output-uri` of `brainray classify`; with --explain there, key slices have class maps."""
    scans_uri: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Where the scans lie, if they were moved or the output has redacted paths. May be given
    several times."""
    output_uri: str | None = None
    """Folder that the objects are written to, as <study>/<series>/{sr,ko,sc}.dcm."""
    dicomweb_url: str | None = None
    """DICOMweb service of the PACS that the objects are sent to, such as
    https://pacs.example/dicom-web."""
    token_env: str | None = None
    """Environment variable with the PACS's bearer token."""
    certificate_path: str | None = None
    """Client certificate and key for the PACS, in one PEM file."""
    id_key_file: str | None = None
    """Key of the output's identifiers, if the bulk job was given one."""
    codes_file: str | None = None
    """TOML or JSON file with the site's codes; its entries replace those of the default table."""
    kinds: Annotated[tuple[Kind, ...], tyro.conf.UseAppendAction] = ()
    """Objects of each series: `sr`, structured report; `ko`, key object selection; `sc`, summary
    as a secondary capture. All three, if not given; may be given several times."""
    check_again: bool = False
    """Ask the PACS, too, for objects that earlier runs stored, and store what it has lost."""
    num_tasks: int = 4
    """Studies at a time on Ray, so connections that a PACS sees at most."""
    limits: DecodeLimits = DecodeLimits()
    """What is too large to open."""

    def __post_init__(self) -> None:
        if (self.output_uri is None) == (self.dicomweb_url is None):
            raise ConfigError("Expected either --output-uri FOLDER or --dicomweb-url URL.")
        if self.num_tasks < 1:
            raise ConfigError(f"--num-tasks must be at least 1, got {self.num_tasks}.")

    def open_destination(self) -> Destination:
        """Return where the objects go."""
        if self.output_uri is not None:
            return FolderDestination(self.output_uri)
        assert self.dicomweb_url is not None, "checked above"
        return PacsDestination(self.dicomweb_url, self.token_env, self.certificate_path)


def report_dicom(
    job: ReportJob, *, log: Callable[[str], None] = logger.info, verbose: bool = False
) -> dict[str, Any]:
    """Make and store the objects of every series of an output.

    Returns the content of :data:`RESULTS_FILE`, which is written below ``output_uri``, else below
    ``predictions_uri``: counts, and every series that failed with its reason. Where one did, raises
    DicomResultsError when all is done.
    """
    import_highdicom()
    output = open_output(job.predictions_uri, job.id_key_file)
    check_scans_uri(job.predictions_uri, output.identifiers, job.scans_uri)
    codes = read_codes(output.classes, job.codes_file)
    job.open_destination().check()
    by_status: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    failures: list[dict[str, Any]] = []
    num_stored = 0
    for one in _report_all(job, output, codes, verbose=verbose):
        by_status[one["status"]] += 1
        num_stored += one["num_stored"]
        if one["status"] == "skipped":
            skipped[one["reason"]] += 1
        elif one["status"] == "failed" and len(failures) < MAX_LISTED_FAILURES:
            failures.append({name: one[name] for name in ("study", "series", "reason")})
            if len(failures) <= NUM_LOGGED_FAILURES:
                log(f"failed      series {one['series'][:12]}: {one['reason']}")
    document = {
        "classifier_id": output.store.classifier_id,
        "num_series": by_status.total(),
        "num_objects_stored": num_stored,
        "by_status": dict(sorted(by_status.items())),
        "skipped": dict(sorted(skipped.items())),
        "failures": failures,
    }
    results_uri = storage.join(job.output_uri or job.predictions_uri, RESULTS_FILE)
    storage.write_json(results_uri, document)
    log(
        f"series      {by_status['stored']:,} stored, "
        f"{by_status['already_stored']:,} stored before, "
        f"{by_status['skipped']:,} skipped, {by_status['failed']:,} failed"
    )
    log(f"results     {results_uri}")
    if by_status["failed"]:
        raise DicomResultsError(
            f"{by_status['failed']:,} series have no DICOM results; '{results_uri}' says "
            "why. The others are stored. The same command tries them again."
        )
    return document


def _report_all(
    job: ReportJob, output: BulkOutput, codes: CodeTable, *, verbose: bool
) -> Iterator[dict[str, Any]]:
    """Do study by study; yield the outcome of each series."""
    store, identifiers = output.store, output.identifiers

    def prepare() -> ReportTask:
        reader = open_sources(
            job.scans_uri,
            identifiers,
            leave_out=[job.predictions_uri],
            max_bytes=job.limits.max_bytes,
        )
        destination = job.open_destination()
        return ReportTask(
            job=job, output=output, codes=codes, reader=reader, destination=destination
        )

    def process(rows: list[Row], task: ReportTask) -> list[dict[str, Any]]:
        series: dict[str, list[Row]] = {}
        for row in rows:
            series.setdefault(row["series"], []).append(row)
        return [report_series(own, task) for _, own in sorted(series.items())]

    num_partitions = min(output.num_series, 4 * job.num_tasks)
    return process_groups(
        store.list_files(),
        lambda uri: read_slices(store, uri),
        "study",
        prepare,
        process,
        choose=choose_latest,
        num_slices=output.num_slices,
        num_partitions=max(1, -(-output.num_slices // MAX_PARTITION_ROWS), num_partitions),
        num_tasks=job.num_tasks,
        verbose=verbose,
    )


# ---- one series ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportTask:
    """What a worker needs to know."""

    job: ReportJob
    output: BulkOutput
    codes: CodeTable
    reader: SourceReader
    destination: Destination


def report_series(rows: Sequence[Row], task: ReportTask) -> dict[str, Any]:
    """Make and store the objects of one series; whatever happens, there is an outcome."""

    def describe(status: Status, reason: str | None = None, num_stored: int = 0) -> dict[str, Any]:
        names = {"study": rows[0]["study"], "series": rows[0]["series"]}
        return names | {"status": status, "reason": reason, "num_stored": num_stored}

    try:
        summary = summarise_series(rows, task.output.classes, task.output.rule)
        if not summary["num_used"]:
            return describe("skipped", "no_classified_slices")
        if summary["reason"] == "localizer":
            return describe("skipped", "localizer")
        num_stored = _store_missing(rows, task)
    except BrainrayError as error:
        return describe("failed", " ".join(str(error).split()))
    except Exception as error:  # its text may hold what a header says of a person
        return describe("failed", f"{type(error).__name__} while the objects were made.")
    return describe("stored" if num_stored else "already_stored", num_stored=num_stored)


def _store_missing(rows: Sequence[Row], task: ReportTask) -> int:
    """Store those of a series' objects that are not stored yet; return how many.

    What is stored is written down, with a hash of what the objects depend on.
    """
    study, series = rows[0]["study"], rows[0]["series"]
    output, destination = task.output, task.destination
    classifier_id, kinds = output.store.classifier_id, task.job.kinds or KINDS
    # A series with another slice, and a report with other codes, is another object.
    digest = compute_digest(rows, output)
    digests = {kind: digest + (task.codes.digest if kind == "sr" else "") for kind in kinds}
    record = {"digest": json.dumps([classifier_id, digests], sort_keys=True)}
    record_uri = storage.join(destination.find_records(task.job.predictions_uri), f"{series}.json")
    if not task.job.check_again and destination.keeps(study, series, kinds):
        try:
            if storage.read_json(record_uri)["digest"] == record["digest"]:
                return 0
        except FileNotFoundError:
            pass
    reader = task.reader.select(map(name_file, rows))
    first = read_header(choose_slices(rows, output.classes)[0], reader, output.identifiers.key)
    study_uid, series_uid = str(first.StudyInstanceUID), str(first.SeriesInstanceUID)
    targets = [
        Target(
            kind=kind,
            study=study,
            series=series,
            study_uid=study_uid,
            object_uid=derive_uid("object", kind, series_uid, classifier_id, own),
        )
        for kind, own in digests.items()
    ]
    missing = [target for target in targets if not destination.has(target)]
    if missing:
        result = make_result(rows, output, reader, task.job.limits)
        objects = []
        for target in missing:
            dataset = _BUILDERS[target.kind](result, task.codes, target.object_uid)
            objects.append((target, encode_object(dataset, result)))
        destination.store(objects)
    storage.write_json(record_uri, record)
    return len(missing)
