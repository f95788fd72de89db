"""From a bulk output and its scans to tables and images without identity.

The rows of each scan file come together in a shard, whose number follows from the file's name. A
shard's table is whole or absent, and a run goes on with the shards of the run before it. Small
outputs are done in this process; in larger ones, or where RAY_ADDRESS names a cluster, a Ray task
does each shard.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
import tyro

from brainray import storage
from brainray.cluster import TASK_CPUS, connect_ray, raise_own_errors
from brainray.data.scans import list_scans
from brainray.errors import ConfigError
from brainray.export.dicom import Dates, Deidentifier
from brainray.export.profile import EDITION, read_profile
from brainray.export.pseudonyms import Pseudonyms
from brainray.export.rows import EXPORT_SCHEMA_VERSION, find_file_name, hide_table
from brainray.export.shard import (
    DATA_FOLDER,
    NOT_FINAL,
    ImageFormat,
    ShardCounts,
    ShardTask,
    export_shard,
)
from brainray.images.slices import ReadOptions
from brainray.inference.plan import name_scans
from brainray.inference.stats import hash_names
from brainray.inference.store import METADATA_KEY, PREDICTIONS_FOLDER, PredictionStore
from brainray.inference.studies import SERIES_FILE, STUDIES_FILE
from brainray.io.deidentified import claim_for_export
from brainray.io.identifiers import Identifiers, read_identifiers
from brainray.io.lock import hold_output

logger = logging.getLogger(__name__)

SUMMARY_FILE = "export.json"
WORK_FOLDER = ".work"
"""Holds the lock, which names this machine: not to be handed on."""
SLICES_PER_SHARD = 1_000
"""About: what a kill can cost, some ten seconds of a CPU."""
MAX_LOCAL_SLICES = 5_000
"""Slices of an output that are done in this process."""
NUM_FOOTERS_AT_ONCE = 16

NOT_REMOVED = (
    "faces, which can be drawn from the slices of a head",
    "text within the images, beside what has_text and burned_in tell",
)
"""What a person has to decide about before an export is handed on."""

_PARTITION = "classifier_id="
_PROB = "prob_"
_ABOUT = ("classifier_id", "weights_sha256", "preprocessing", "class_map")
"""What the predictions' metadata say that holds no name and no time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportJob:
    """One de-identified export of a bulk output."""

    predictions_uri: str
    """`--output-uri` of `brainray classify`."""
    output_uri: str
    """Folder of the export: an empty one, or one that this command wrote before."""
    deidentify: bool = False
    """Leave out identity. There is no other export; without this the command refuses."""
    images: ImageFormat = "png"
    """Of each slice a PNG file of 8 or 16 bits; or of each DICOM object one without identity; or
    tables only."""
    dates: Dates = "remove"
    """Remove dates, or shift those of each patient back by the same 1 to 3,650 days."""
    project: str = "research"
    """Exports of one project have the same pseudonyms; those of two projects cannot be joined."""
    scans_uri: tuple[str, ...] = ()
    """Where the scans lie, if the output has redacted paths. May be given several times."""
    id_key_file: str | None = None
    """Key of the output's identifiers, if the bulk job was given one."""
    classifier_id: str | None = None
    """Whose predictions, if the output has those of several classifiers."""
    num_tasks: int = 4
    """Shards at a time on Ray."""
    reading: Annotated[ReadOptions, tyro.conf.arg(name="")] = ReadOptions()

    def __post_init__(self) -> None:
        if not self.deidentify:
            raise ConfigError(
                "`brainray export` writes results without identity only. Say so: --deidentify."
            )
        if self.num_tasks < 1:
            raise ConfigError(f"num_tasks must be at least 1, got {self.num_tasks}.")


def export(
    job: ExportJob, *, log: Callable[[str], None] = logger.info, verbose: bool = False
) -> dict[str, Any]:
    """Write the tables and images of an export.

    Parameters
    ----------
    job : ExportJob
    log : callable
        Takes a line for a person.
    verbose : bool
        Whether Ray's own lines are shown.

    Returns
    -------
    dict
        The content of :data:`SUMMARY_FILE`: settings, and counts of slices by outcome and reason.

    Raises
    ------
    UserError
        The predictions, their key or the output cannot be used.
    LockLostError
        Another run took the output over.
    """
    read_profile()  # raises where the library is missing
    _check_apart(job)
    identifiers = read_identifiers(job.predictions_uri, job.id_key_file)
    if identifiers.redact_paths and not job.scans_uri:
        raise ConfigError(
            f"'{job.predictions_uri}' has hashes in the place of paths. Say where its scans lie, "
            "as --scans-uri."
        )
    store = _open_store(job)
    num_slices = _count_slices(store)
    pseudonyms = Pseudonyms.of(identifiers.key, job.project)
    with hold_output(storage.join(job.output_uri, WORK_FOLDER)) as lock, raise_own_errors():
        settings = _describe_settings(job, pseudonyms)
        fixed = {"num_shards": -(-num_slices // SLICES_PER_SHARD) or 1}
        fixed = claim_for_export(job.output_uri, settings, fixed, work_folder=WORK_FOLDER)
        run = _Run(job, store, identifiers, pseudonyms, int(fixed["num_shards"]))
        total = ShardCounts()
        if os.environ.get("RAY_ADDRESS") or num_slices > MAX_LOCAL_SLICES:
            connect_ray(verbose=verbose)
            done = run.export_on_ray()
        else:
            done = run.export_here()
        for counts in done:
            lock.check()
            total.add(counts)
        summary = _describe(total, settings, store)
        storage.write_json(storage.join(job.output_uri, SUMMARY_FILE), summary)
    _log_counts(total, job, log)
    return summary


def _check_apart(job: ExportJob) -> None:
    output, predictions = map(storage.make_absolute, (job.output_uri, job.predictions_uri))
    if f"{output}/".startswith(f"{predictions}/"):
        raise ConfigError(
            "An export must not lie within the predictions, which have identity. Give another "
            "--output-uri."
        )


def _log_counts(total: ShardCounts, job: ExportJob, log: Callable[[str], None]) -> None:
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in total.reasons.most_common())
    rejected = f"{total.outcomes['rejected']:,} rejected" + (f" ({reasons})" if reasons else "")
    log(f"slices      {total.outcomes['exported']:,} exported, {rejected}; {total.num_new:,} new")
    if total.num_with_text:
        log(f"text        in {total.num_with_text:,} images: look at those with has_text")
    if any(total.reasons[reason] for reason in NOT_FINAL):
        log("sources     some could not be read, or have changed; the same command tries again")
    log(f"tables      {storage.join(job.output_uri, DATA_FOLDER)}")
    log("Not removed: " + "; ".join(NOT_REMOVED) + ".")


# ---- the bulk output -----------------------------------------------------------------------------


def _open_store(job: ExportJob) -> PredictionStore:
    """Open the predictions of the classifier that was named, or of the only one."""
    folder = storage.join(job.predictions_uri, PREDICTIONS_FOLDER)
    names = storage.list_folders(folder) if storage.is_folder(folder) else []
    found = [name.removeprefix(_PARTITION) for name in names if name.startswith(_PARTITION)]
    if job.classifier_id is not None:
        found = [name for name in found if name == job.classifier_id]
    if len(found) != 1:
        raise ConfigError(
            f"Expected the predictions of one classifier in '{job.predictions_uri}', found those "
            f"of {', '.join(found) or 'none'}. Give one as --classifier-id."
        )
    opened = PredictionStore(output_uri=job.predictions_uri, classifier_id=found[0], classes=())
    files = opened.list_files()
    if not files:
        raise ConfigError(f"There are no predictions in '{job.predictions_uri}'.")
    filesystem, path = storage.resolve(files[0])
    columns = pq.read_schema(path, filesystem=filesystem).names
    return PredictionStore(
        output_uri=job.predictions_uri,
        classifier_id=found[0],
        classes=tuple(name.removeprefix(_PROB) for name in columns if name.startswith(_PROB)),
        about=opened.read_metadata(files[0]),
    )


def _count_slices(store: PredictionStore) -> int:
    def count(uri: str) -> int:
        filesystem, path = storage.resolve(uri)
        return int(pq.read_metadata(path, filesystem=filesystem).num_rows)

    with ThreadPoolExecutor(NUM_FOOTERS_AT_ONCE) as pool:
        return sum(pool.map(count, store.list_files()))


def read_rows(store: PredictionStore, uri: str, num_shards: int) -> pa.Table:
    """Read a file of predictions, with the shard of each row in the column ``shard``."""
    rows = store.read(uri, store.file_schema.names)
    names = [find_file_name(row) for row in rows.select(["scan_uri", "frame"]).to_pylist()]
    shards = pa.array(hash_names(names) % num_shards, pa.int64())
    ids = pa.repeat(pa.scalar(store.classifier_id), rows.num_rows)
    return rows.append_column("classifier_id", ids).append_column("shard", shards)


# ---- all shards ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Run:
    """One run; may be sent to workers."""

    job: ExportJob
    store: PredictionStore
    identifiers: Identifiers
    pseudonyms: Pseudonyms
    num_shards: int

    def export_here(self) -> Iterator[ShardCounts]:
        """Export shard by shard in this process."""
        task = self.make_task()
        rows: dict[int, list[dict[str, Any]]] = {}
        for uri in self.store.list_files():
            for row in read_rows(self.store, uri, self.num_shards).to_pylist():
                rows.setdefault(row["shard"], []).append(row)
        for shard in sorted(rows):
            yield export_shard(shard, rows[shard], task)
        self.write_groups()

    def export_on_ray(self) -> Iterator[ShardCounts]:
        """Export on the workers, which gather the rows of each shard."""
        make: Any = ray.remote(num_cpus=TASK_CPUS, num_returns=2)(_make_task)
        task, is_made = make.remote(self)
        ray.get(is_made)  # raises what the listing raised
        store, num_shards = self.store, self.num_shards

        def read(batch: dict[str, Any]) -> Iterator[pa.Table]:
            for uri in batch["item"]:
                yield read_rows(store, str(uri), num_shards)

        def export_rows(rows: pa.Table) -> pa.Table:
            shard = int(rows["shard"][0].as_py())
            counts = export_shard(shard, rows.to_pylist(), _get_task(task))
            return pa.table({"counts": [counts.encode()]})

        files: Any = ray.data.from_items(self.store.list_files())
        rows = files.map_batches(read, batch_size=8, num_cpus=TASK_CPUS)
        partitions = min(self.num_shards, 200)
        done = rows.groupby("shard", num_partitions=partitions).map_groups(
            export_rows,
            batch_format="pyarrow",
            num_cpus=TASK_CPUS,
            compute=ray.data.TaskPoolStrategy(size=self.job.num_tasks),
        )
        for batch in done.iter_batches(batch_size=None, batch_format="pyarrow"):
            for text in batch["counts"].to_pylist():
                yield ShardCounts.decode(text)
        groups: Any = ray.remote(num_cpus=TASK_CPUS)(_Run.write_groups)
        ray.get(groups.remote(self))

    def make_task(self) -> ShardTask:
        """List the scans, where their names are not URIs."""
        job, listed = self.job, None
        if job.scans_uri:
            found = list_scans(job.scans_uri, leave_out=[job.predictions_uri, job.output_uri])
            listed = name_scans(found, self.identifiers)
        about = {name: self.store.about[name] for name in _ABOUT if name in self.store.about}
        return ShardTask(
            output_uri=job.output_uri,
            classes=self.store.classes,
            about=about | {"schema_version": EXPORT_SCHEMA_VERSION},
            pseudonyms=self.pseudonyms,
            deidentifier=Deidentifier(pseudonyms=self.pseudonyms, dates=job.dates),
            images=job.images,
            reading=job.reading,
            listed=listed,
        )

    def write_groups(self) -> None:
        """Write the tables of series and studies, where there are those of the classifier."""
        for name in (SERIES_FILE, STUDIES_FILE):
            try:
                table = storage.read_table(storage.join(self.job.predictions_uri, name))
            except FileNotFoundError:
                continue
            about = json.loads((table.schema.metadata or {}).get(METADATA_KEY, b"{}"))
            if about.get("classifier_id") == self.store.classifier_id:
                hidden = hide_table(table, self.pseudonyms)
                storage.write_table(storage.join(self.job.output_uri, name), hidden)


def _make_task(run: _Run) -> tuple[ShardTask, bool]:
    """Return the task, which stays on the cluster, and that it is made, for the driver."""
    return run.make_task(), True


@lru_cache(maxsize=1)
def _get_task(task: "ray.ObjectRef[ShardTask]") -> ShardTask:
    return ray.get(task)


# ---- what is written about the export ------------------------------------------------------------


def _describe_settings(job: ExportJob, pseudonyms: Pseudonyms) -> dict[str, Any]:
    """Return what all runs of an export have in common."""
    return {
        "contents": "de-identified export",
        "schema_version": EXPORT_SCHEMA_VERSION,
        "project or key": pseudonyms.check,
        "images": job.images,
        "dates": job.dates,
        "plane": job.reading.plane,
        "profile": f"DICOM PS3.15 {EDITION}, Basic Application Level Confidentiality Profile",
    }


def _describe(
    total: ShardCounts, settings: dict[str, Any], store: PredictionStore
) -> dict[str, Any]:
    return {
        **{name: value for name, value in settings.items() if name != "project or key"},
        "classifier_id": store.classifier_id,
        "classes": list(store.classes),
        "num_slices": total.outcomes.total(),
        "by_outcome": dict(sorted(total.outcomes.items())),
        "rejected_by_reason": dict(sorted(total.reasons.items())),
        "num_with_text": total.num_with_text,
        "num_burned_in_unknown": total.num_burned_in_unknown,
        "not_removed": list(NOT_REMOVED),
        "notice": "Research use only; not a medical device.",
    }
