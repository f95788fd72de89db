"""From a bulk output and its sources to DICOM objects: three for each series.

Each series is done by itself: its files are opened again, its objects are built, and those that the
destination has not are stored there. UIDs follow from source, classifier and content, so whoever
does a series again finds its objects stored; where that is written down, it is not done again. A
series that fails is listed, and the next one is done. A localizer, and a series without a
classified slice, get no objects; they are counted.

Small outputs are done in this process. In larger ones, or where RAY_ADDRESS names a cluster, the
slices of each study come together in hash partitions of Ray Data, and a task does the study.
"""

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

import pyarrow as pa
import ray
import ray.data

from brainray import storage
from brainray.cluster import TASK_CPUS, connect_ray, raise_own_errors
from brainray.data.scans import list_scans
from brainray.dicom_results.codes import CodeTable, read_codes
from brainray.dicom_results.destinations import (
    Destination,
    FolderDestination,
    PacsDestination,
    StoredRecords,
    Target,
)
from brainray.dicom_results.extra import import_highdicom
from brainray.dicom_results.key_objects import build_key_objects
from brainray.dicom_results.objects import KINDS, Kind, derive_object_uid, encode_object
from brainray.dicom_results.result import (
    SeriesResult,
    choose_slices,
    compute_digest,
    make_result,
)
from brainray.dicom_results.secondary_capture import build_secondary_capture
from brainray.dicom_results.source import (
    BulkOutput,
    Row,
    SourceReader,
    group_by_series,
    open_output,
    read_slices,
    read_source,
)
from brainray.dicom_results.sr import build_sr
from brainray.errors import BrainrayError, ConfigError, DicomResultsError
from brainray.images.decode import DecodeLimits
from brainray.inference.plan import name_scans
from brainray.inference.series import summarise_series

logger = logging.getLogger(__name__)

RESULTS_FILE = "dicom_results.json"
MAX_LOCAL_SLICES = 5_000
"""Slices of an output that are done in this process: some tens of MB, and a few minutes."""
MAX_PARTITION_ROWS = 50_000
"""Slices of one hash partition, about: with class maps some 100 MB."""
MAX_LISTED_FAILURES = 10_000
NUM_LOGGED_FAILURES = 10

Status = Literal["stored", "already_stored", "skipped", "failed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportJob:
    """DICOM results of one bulk output, into a folder or a PACS."""

    predictions_uri: str
    """`--output-uri` of `brainray classify`; with --explain there, key slices have class maps."""
    scans_uri: tuple[str, ...] = ()
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
    kinds: tuple[Kind, ...] = ()
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


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportTask:
    """What a worker needs to know."""

    output: BulkOutput
    reader: SourceReader
    codes: CodeTable
    destination: Destination
    records: StoredRecords
    kinds: tuple[Kind, ...]
    check_again: bool
    limits: DecodeLimits


@dataclass(frozen=True, kw_only=True, slots=True)
class SeriesOutcome:
    """What became of a series."""

    study: str
    series: str
    status: Status
    num_stored: int = 0
    reason: str | None = None
    """Why it was skipped, or failed."""


def report_dicom(
    job: ReportJob, *, log: Callable[[str], None] = logger.info, verbose: bool = False
) -> dict[str, Any]:
    """Make and store the objects of every series of an output.

    Parameters
    ----------
    job : ReportJob
    log : callable
        Takes a line for a person.
    verbose : bool
        Whether Ray's own lines are shown.

    Returns
    -------
    dict
        The content of :data:`RESULTS_FILE`, which is written below ``output_uri``, else below
        ``predictions_uri``: counts, and every series that failed with its reason.

    Raises
    ------
    UserError
        The output, its key, the code table or the destination cannot be used.
    DicomResultsError
        When all is done: series failed.
    """
    import_highdicom()
    output = open_output(job.predictions_uri, job.id_key_file)
    if output.identifiers.redact_paths and not job.scans_uri:
        raise ConfigError(
            f"'{job.predictions_uri}' has hashes in the place of paths. Say where its scans lie, "
            "as --scans-uri."
        )
    codes = read_codes(output.classes, job.codes_file)
    job.open_destination().check()
    counts = _Counts()
    if os.environ.get("RAY_ADDRESS") or output.num_slices > MAX_LOCAL_SLICES:
        connect_ray(verbose=verbose)
        with raise_own_errors():
            counts.add_all(_report_on_ray(job, output, codes), log)
    else:
        counts.add_all(_report_here(_make_task(job, output, codes)), log)
    document = {"classifier_id": output.store.classifier_id, **counts.describe()}
    results_uri = storage.join(job.output_uri or job.predictions_uri, RESULTS_FILE)
    storage.write_json(results_uri, document)
    log(
        f"series      {counts.by_status['stored']:,} stored, "
        f"{counts.by_status['already_stored']:,} stored before, "
        f"{counts.by_status['skipped']:,} skipped, {counts.by_status['failed']:,} failed"
    )
    log(f"results     {results_uri}")
    if counts.by_status["failed"]:
        raise DicomResultsError(
            f"{counts.by_status['failed']:,} series have no DICOM results; '{results_uri}' says "
            "why. The others are stored. The same command tries them again."
        )
    return document


class _Counts:
    """What became of all series."""

    def __init__(self) -> None:
        self.by_status: Counter[str] = Counter()
        self.num_stored = 0
        self.skipped: Counter[str] = Counter()
        self.failures: list[dict[str, Any]] = []

    def add_all(self, outcomes: Iterable[SeriesOutcome], log: Callable[[str], None]) -> None:
        for one in outcomes:
            self.by_status[one.status] += 1
            self.num_stored += one.num_stored
            if one.status == "skipped":
                self.skipped[str(one.reason)] += 1
            if one.status == "failed":
                if len(self.failures) < MAX_LISTED_FAILURES:
                    about = {"study": one.study, "series": one.series, "reason": one.reason}
                    self.failures.append(about)
                if len(self.failures) <= NUM_LOGGED_FAILURES:
                    log(f"failed      series {one.series[:12]}: {one.reason}")

    def describe(self) -> dict[str, Any]:
        return {
            "num_series": self.by_status.total(),
            "num_objects_stored": self.num_stored,
            "by_status": dict(sorted(self.by_status.items())),
            "skipped": dict(sorted(self.skipped.items())),
            "failures": self.failures,
        }


# ---- all series ----------------------------------------------------------------------------------


def _make_task(job: ReportJob, output: BulkOutput, codes: CodeTable) -> ReportTask:
    """List the scans, where their names are not URIs; on Ray this is a task."""
    listed = None
    if job.scans_uri:
        found = list_scans(job.scans_uri, leave_out=[job.predictions_uri])
        listed = name_scans(found, output.identifiers)
    destination = job.open_destination()
    return ReportTask(
        output=output,
        reader=SourceReader(
            key=output.identifiers.key, listed=listed, max_bytes=job.limits.max_bytes
        ),
        codes=codes,
        destination=destination,
        records=StoredRecords(destination.find_records(job.predictions_uri)),
        kinds=job.kinds or KINDS,
        check_again=job.check_again,
        limits=job.limits,
    )


def _report_here(task: ReportTask) -> Iterator[SeriesOutcome]:
    store = task.output.store
    rows = [row for uri in store.list_files() for row in read_slices(store, uri).to_pylist()]
    for slices in group_by_series(rows).values():
        yield report_series(slices, task)


def _report_on_ray(job: ReportJob, output: BulkOutput, codes: CodeTable) -> Iterator[SeriesOutcome]:
    store = output.store
    make: Any = ray.remote(num_cpus=TASK_CPUS, num_returns=2)(_make_task_on_ray)
    task, is_listed = make.remote(job, output, codes)
    ray.get(is_listed)  # raises what the listing raised

    def read(batch: dict[str, Any]) -> Iterator[pa.Table]:
        for uri in batch["item"]:
            yield read_slices(store, str(uri))

    def report(slices: pa.Table) -> pa.Table:
        done = [report_series(own, _get_task(task)) for own in _split(slices)]
        return pa.table({"outcome": [json.dumps(asdict(one)) for one in done]})

    files: Any = ray.data.from_items(store.list_files())
    slices = files.map_batches(read, batch_size=8, num_cpus=TASK_CPUS)
    num_partitions = max(
        1, -(-output.num_slices // MAX_PARTITION_ROWS), min(output.num_series, 4 * job.num_tasks)
    )
    outcomes = slices.groupby("study", num_partitions=num_partitions).map_groups(
        report,
        batch_format="pyarrow",
        num_cpus=TASK_CPUS,
        compute=ray.data.TaskPoolStrategy(size=job.num_tasks),
    )
    for batch in outcomes.iter_batches(batch_size=None, batch_format="pyarrow"):
        for text in batch["outcome"].to_pylist():
            yield SeriesOutcome(**json.loads(text))


def _split(slices: pa.Table) -> Iterable[list[Row]]:
    return group_by_series(slices.to_pylist()).values()


def _make_task_on_ray(
    job: ReportJob, output: BulkOutput, codes: CodeTable
) -> tuple[ReportTask, bool]:
    """Return the task, which stays on the cluster, and that it is made, for the driver."""
    return _make_task(job, output, codes), True


@lru_cache(maxsize=1)
def _get_task(task: "ray.ObjectRef[ReportTask]") -> ReportTask:
    return ray.get(task)


# ---- one series ----------------------------------------------------------------------------------


def report_series(rows: Sequence[Row], task: ReportTask) -> SeriesOutcome:
    """Make and store the objects of one series; whatever happens, there is an outcome.

    Parameters
    ----------
    rows : sequence of dict
        Its slices, at least one.
    task : ReportTask
    """
    about = {"study": rows[0]["study"], "series": rows[0]["series"]}
    try:
        summary = summarise_series(rows, task.output.classes, task.output.rule)
        if summary["reason"] == "localizer" or not summary["num_used"]:
            reason = summary["reason"] if summary["num_used"] else "no_classified_slices"
            return SeriesOutcome(status="skipped", reason=reason, **about)
        num_stored = _store_missing(rows, task)
    except BrainrayError as error:
        return SeriesOutcome(status="failed", reason=" ".join(str(error).split()), **about)
    except Exception as error:  # its text may hold what a header says of a person
        reason = f"{type(error).__name__} while the objects were made."
        return SeriesOutcome(status="failed", reason=reason, **about)
    status: Status = "stored" if num_stored else "already_stored"
    return SeriesOutcome(status=status, num_stored=num_stored, **about)


def _store_missing(rows: Sequence[Row], task: ReportTask) -> int:
    """Store those of a series' objects that are not stored yet; return how many."""
    study, series = rows[0]["study"], rows[0]["series"]
    digests = _compute_digests(rows, task)
    recorded = json.dumps([task.output.store.classifier_id, digests], sort_keys=True)
    is_recorded = not task.check_again and task.records.has(series, recorded)
    if is_recorded and task.destination.keeps(study, series, task.kinds):
        return 0
    used = choose_slices(rows, task.output.classes)
    first = read_source(used[:1], task.reader)
    targets = [
        Target(
            kind=kind,
            study=study,
            series=series,
            study_uid=first.study_uid,
            object_uid=derive_object_uid(
                kind, first.series_uid, task.output.store.classifier_id, digest
            ),
        )
        for kind, digest in digests.items()
    ]
    missing = [target for target in targets if not task.destination.has(target)]
    if missing:
        result = make_result(rows, task.output, task.reader, task.limits)
        task.destination.store([(target, _build(target, result, task.codes)) for target in missing])
    task.records.add(series, recorded)
    return len(missing)


def _compute_digests(rows: Sequence[Row], task: ReportTask) -> dict[Kind, str]:
    """Return, by kind, a hash of what a series' objects depend on."""
    digest = compute_digest(rows, task.output)
    return {kind: digest + (task.codes.digest if kind == "sr" else "") for kind in task.kinds}


def _build(target: Target, result: SeriesResult, codes: CodeTable) -> bytes:
    if target.kind == "sr":
        dataset = build_sr(result, codes, target.object_uid)
    elif target.kind == "ko":
        dataset = build_key_objects(result, codes, target.object_uid)
    else:
        dataset = build_secondary_capture(result, target.object_uid)
    return encode_object(dataset, result)
