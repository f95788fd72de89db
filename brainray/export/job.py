"""From a bulk output and its scans to tables and images without identity.

The rows of each scan file come together in a shard, whose number follows from the file's name. A
shard's table is whole or absent, and a run goes on with the shards of the run before it.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import tyro

from brainray.errors import ConfigError
from brainray.export.dicom import EDITION, Dates, Deidentifier, read_profile
from brainray.export.pseudonyms import Pseudonyms
from brainray.export.rows import EXPORT_SCHEMA_VERSION, hide_table
from brainray.export.shard import DATA_FOLDER, NOT_FINAL, ImageFormat, ShardTask, export_shard
from brainray.images.slices import ReadOptions
from brainray.inference.sources import (
    check_scans_uri,
    name_file,
    open_sources,
    process_groups,
)
from brainray.inference.stats import hash_names
from brainray.inference.store import METADATA_KEY, PREDICTIONS_FOLDER, PredictionStore
from brainray.inference.studies import SERIES_FILE, STUDIES_FILE
from brainray.io import storage
from brainray.io.conditional import create_bytes
from brainray.io.identifiers import DEIDENTIFIED_FILE, Identifiers, read_identifiers
from brainray.io.lock import hold_output

logger = logging.getLogger(__name__)

SUMMARY_FILE = "export.json"
WORK_FOLDER = ".work"
"""Holds the lock, which names this machine: not to be handed on."""
SLICES_PER_SHARD = 1_000
"""About: what a kill can cost, some ten seconds of a CPU."""
MAX_PARTITIONS = 200
"""Hash partitions of Ray Data; one has the rows of several shards where there are more."""

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
        output, predictions = map(storage.make_absolute, (self.output_uri, self.predictions_uri))
        if f"{output}/".startswith(f"{predictions}/"):
            raise ConfigError(
                "An export must not lie within the predictions, which have identity. Give another "
                "--output-uri."
            )


def export(
    job: ExportJob, *, log: Callable[[str], None] = logger.info, verbose: bool = False
) -> dict[str, Any]:
    """Write the tables and images of an export.

    Returns the content of :data:`SUMMARY_FILE`: settings, and counts of slices by outcome and
    reason. Raises LockLostError if another run took the output over.
    """
    read_profile()  # raises where the library is missing
    identifiers = read_identifiers(job.predictions_uri, job.id_key_file)
    check_scans_uri(job.predictions_uri, identifiers, job.scans_uri)
    store = _open_store(job)
    filesystem, _ = storage.resolve(store.folder_uri)
    paths = [storage.resolve(uri)[1] for uri in store.list_files()]
    num_slices = pyarrow.dataset.dataset(paths, filesystem=filesystem).count_rows()
    pseudonyms = Pseudonyms.of(identifiers.key, job.project)
    settings = {
        "contents": "de-identified export",
        "schema_version": EXPORT_SCHEMA_VERSION,
        "project or key": pseudonyms.check,
        "images": job.images,
        "dates": job.dates,
        "plane": job.reading.plane,
        "profile": f"DICOM PS3.15 {EDITION}, Basic Application Level Confidentiality Profile",
    }
    with hold_output(storage.join(job.output_uri, WORK_FOLDER)) as lock:
        num_shards = -(-num_slices // SLICES_PER_SHARD) or 1
        num_shards = _claim_output(job.output_uri, settings, num_shards)
        total: Counter[str] = Counter()
        for counts in _export_shards(
            job,
            store,
            identifiers,
            pseudonyms,
            num_shards,
            num_slices=num_slices,
            verbose=verbose,
        ):
            lock.check()
            total.update(counts)
        outcomes, reasons = _select(total, "outcome "), _select(total, "reason ")
        del settings["project or key"]
        summary = settings | {
            "classifier_id": store.classifier_id,
            "classes": list(store.classes),
            "num_slices": outcomes.total(),
            "by_outcome": dict(sorted(outcomes.items())),
            "rejected_by_reason": dict(sorted(reasons.items())),
            "num_with_text": total["with_text"],
            "num_burned_in_unknown": total["burned_in_unknown"],
            "not_removed": list(NOT_REMOVED),
            "notice": "Research use only; not a medical device.",
        }
        storage.write_json(storage.join(job.output_uri, SUMMARY_FILE), summary)
    for line in _describe_counts(outcomes, reasons, total):
        log(line)
    log(f"tables      {storage.join(job.output_uri, DATA_FOLDER)}")
    log("Not removed: " + "; ".join(NOT_REMOVED) + ".")
    return summary


def _select(counts: Counter[str], prefix: str) -> Counter[str]:
    """Return the counts whose names begin with a prefix, without it."""
    found = {key: count for key, count in counts.items() if key.startswith(prefix)}
    return Counter({key.removeprefix(prefix): count for key, count in found.items()})


def _describe_counts(
    outcomes: Counter[str], reasons: Counter[str], total: Counter[str]
) -> Iterator[str]:
    why = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
    rejected = f"{outcomes['rejected']:,} rejected" + (f" ({why})" if why else "")
    yield f"slices      {outcomes['exported']:,} exported, {rejected}; {total['new']:,} new"
    if total["with_text"]:
        yield f"text        in {total['with_text']:,} images: look at those with has_text"
    if not reasons.keys().isdisjoint(NOT_FINAL):
        yield "sources     some could not be read, or have changed; the same command tries again"


def _claim_output(output_uri: str, settings: dict[str, Any], num_shards: int) -> int:
    """Mark an empty folder as an export, or check that it is one; return its number of shards."""
    mark_uri = storage.join(output_uri, DEIDENTIFIED_FILE)
    try:
        earlier = storage.read_json(mark_uri)
    except FileNotFoundError:
        files, folders = storage.list_folder(output_uri, output_uri)
        names = {file.relative_path for file in files} | set(map(storage.get_name, folders))
        if names - {WORK_FOLDER}:
            raise ConfigError(
                f"Expected an empty folder or a de-identified export at '{output_uri}', found "
                "other files. Exports are not mixed with results that have identity: give another "
                "--output-uri."
            ) from None
        mark = settings | {"num_shards": num_shards}
        create_bytes(mark_uri, json.dumps(mark, indent=2).encode())
        return num_shards
    changed = sorted(name for name in settings if earlier.get(name) != settings[name])
    if changed:
        raise ConfigError(
            f"'{output_uri}' holds a de-identified export that was made with another "
            f"{', '.join(changed)}. Give the options of its first run, or another --output-uri."
        )
    return int(earlier["num_shards"])


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
    return replace(
        opened,
        classes=tuple(name.removeprefix(_PROB) for name in columns if name.startswith(_PROB)),
        about=opened.read_metadata(files[0]),
    )


def read_rows(store: PredictionStore, uri: str, num_shards: int) -> pa.Table:
    """Read a file of predictions, with the shard of each row in the column ``shard``."""
    rows = store.read(uri, store.file_schema.names)
    names = list(map(name_file, rows.select(["scan_uri", "frame"]).to_pylist()))
    shards = pa.array(hash_names(names) % num_shards, pa.int64())
    ids = pa.repeat(pa.scalar(store.classifier_id), rows.num_rows)
    return rows.append_column("classifier_id", ids).append_column("shard", shards)


# ---- all shards ----------------------------------------------------------------------------------


def _export_shards(
    job: ExportJob,
    store: PredictionStore,
    identifiers: Identifiers,
    pseudonyms: Pseudonyms,
    num_shards: int,
    **options: Any,  # noqa: ANN401
) -> Iterator[dict[str, int]]:
    """Write all tables; yield the counts of each shard."""

    def prepare() -> ShardTask:
        _write_groups(job, store, pseudonyms)
        about = {name: store.about[name] for name in _ABOUT if name in store.about}
        return ShardTask(
            output_uri=job.output_uri,
            classes=store.classes,
            about=about | {"schema_version": EXPORT_SCHEMA_VERSION},
            deidentifier=Deidentifier(pseudonyms=pseudonyms, dates=job.dates),
            images=job.images,
            reading=job.reading,
            sources=open_sources(
                job.scans_uri,
                identifiers,
                leave_out=[job.predictions_uri, job.output_uri],
                max_bytes=job.reading.limits.max_bytes,
            ),
        )

    return process_groups(
        store.list_files(),
        lambda uri: read_rows(store, uri, num_shards),
        "shard",
        prepare,
        lambda rows, task: [export_shard(rows[0]["shard"], rows, task)],
        num_partitions=min(num_shards, MAX_PARTITIONS),
        num_tasks=job.num_tasks,
        **options,
    )


def _write_groups(job: ExportJob, store: PredictionStore, pseudonyms: Pseudonyms) -> None:
    """Write the tables of series and studies, where there are those of the classifier."""
    for name in (SERIES_FILE, STUDIES_FILE):
        try:
            table = storage.read_table(storage.join(job.predictions_uri, name))
        except FileNotFoundError:
            continue
        about = json.loads((table.schema.metadata or {}).get(METADATA_KEY, b"{}"))
        if about.get("classifier_id") == store.classifier_id:
            hidden = hide_table(table, pseudonyms)
            storage.write_table(storage.join(job.output_uri, name), hidden)
