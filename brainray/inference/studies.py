"""Tables of series and studies: slice evidence from all predictions of a classifier.

::

    OUT/series.parquet      a row for each series
    OUT/studies.parquet     a row for each study

Each run replaces both, from all rows of the predictions. Workers collect the slices of a study in
hash partitions of Ray Data; the driver receives counts.
"""

import io
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.data

from brainray.cluster import TASK_CPUS
from brainray.inference.schema import SCHEMA_VERSION
from brainray.inference.series import SeriesRule, summarise_series, summarise_study
from brainray.inference.store import METADATA_KEY, PredictionStore
from brainray.io import storage

SERIES_FILE = "series.parquet"
STUDIES_FILE = "studies.parquet"
NOT_CALIBRATED = "Slice evidence: not a probability of the series, the study or the patient."

_SLICE_COLUMNS = (
    "scan_uri",
    "reason",
    "patient",
    "study",
    "series",
    "sop_instance",
    "frame",
    "plane",
    "position_mm",
    "orientation",
    "flags",
    "classified_at",
)
_MAX_PARTITION_ROWS = 200_000
"""Approximate slices of one hash partition, some 60 MB."""
_GROUP = "group"
"""Column to group by: the study, or the series if the file names no study."""


def build_series_schema(classes: Sequence[str]) -> pa.Schema:
    """Build the schema of series.parquet for some classes, in class order."""
    return pa.schema(
        [
            pa.field("series", pa.string(), nullable=False),  # keyed hash, as in the predictions
            pa.field("study", pa.string()),
            pa.field("patient", pa.string()),
            pa.field("answer", pa.string(), nullable=False),  # a class, or indeterminate
            pa.field("reason", pa.string()),  # why it is indeterminate; else null
            *(pa.field(f"evidence_{name}", pa.float32()) for name in classes),
            *(pa.field(f"longest_run_{name}", pa.int32()) for name in classes),  # slices
            pa.field("key_slices", pa.list_(pa.string())),  # scan_uri of each
            pa.field("num_slices", pa.int32()),
            pa.field("num_used", pa.int32()),
            pa.field("skipped", pa.map_(pa.string(), pa.int32())),  # slices by reason
            pa.field("plane", pa.string()),
            pa.field("flags", pa.list_(pa.string())),
            pa.field("classifier_id", pa.string(), nullable=False),
        ]
    )


def build_study_schema(classes: Sequence[str]) -> pa.Schema:
    """Build the schema of studies.parquet for some classes, in class order."""
    return pa.schema(
        [
            pa.field("study", pa.string(), nullable=False),
            pa.field("patient", pa.string()),
            pa.field("answer", pa.string(), nullable=False),
            pa.field("reason", pa.string()),
            pa.field("num_series", pa.int32()),
            pa.field("num_answered", pa.int32()),  # series with a class
            pa.field("series", pa.list_(pa.string())),
            pa.field("series_answers", pa.list_(pa.string())),  # in the same order
            *(pa.field(f"evidence_{name}", pa.float32()) for name in classes),
            *(pa.field(f"strongest_series_{name}", pa.string()) for name in classes),
            pa.field("classifier_id", pa.string(), nullable=False),
        ]
    )


def write_series(store: PredictionStore, rule: SeriesRule, num_slices: int) -> dict[str, Any]:
    """Replace both tables by those of all predictions, with ``num_slices`` rows in series.

    Returns
    -------
    dict
        ``series`` and ``studies`` for metrics.json, each with ``total`` and ``by_answer``; empty if
        there are no tables, since there are no series.

    Raises
    ------
    StorageError
        Predictions are damaged, or the output cannot be written.
    """
    if not num_slices:  # delete the tables of another classifier's predictions
        there, _ = storage.list_folder(store.output_uri, store.output_uri)
        for file in there:
            if file.relative_path in (SERIES_FILE, STUDIES_FILE):
                storage.delete_file(file.uri)
        return {}

    def read(batch: dict[str, Any]) -> Iterator[pa.Table]:
        for uri in batch["item"]:
            yield read_slices(store, str(uri))

    def summarise(slices: pa.Table) -> pa.Table:
        return summarise_group(slices, store, rule)

    files: Any = ray.data.from_items(store.list_files())
    slices = files.map_batches(read, batch_size=64, num_cpus=TASK_CPUS)
    num_partitions = math.ceil(num_slices / _MAX_PARTITION_ROWS)
    groups = slices.groupby(_GROUP, num_partitions=num_partitions)
    found = groups.map_groups(summarise, batch_format="pyarrow", num_cpus=TASK_CPUS).materialize()
    task: Any = ray.remote(num_cpus=TASK_CPUS)(_write_tables)
    counts: dict[str, Any] = ray.get(task.remote(found.to_arrow_refs(), store, rule))
    return counts


def read_slices(store: PredictionStore, uri: str) -> pa.Table:
    """Read the rows of a prediction file that belong to a series, for :func:`summarise_group`."""
    probs = [f"prob_{name}" for name in store.classes]
    rows = store.read(uri, [*_SLICE_COLUMNS, *probs])
    rows = rows.filter(rows["series"].is_valid())
    return rows.append_column(_GROUP, pc.coalesce(rows["study"], rows["series"]))


def summarise_group(slices: pa.Table, store: PredictionStore, rule: SeriesRule) -> pa.Table:
    """Summarise the series of a study, from all of its rows; or one series without a study.

    Returns
    -------
    Table
        One row: ``series``, a list of rows of :func:`build_series_schema`; ``study``, a row of
        :func:`build_study_schema`, null without a study.
    """
    latest = {row["scan_uri"]: row for row in slices.sort_by("classified_at").to_pylist()}
    rows_of: dict[str, list[dict[str, Any]]] = {}
    for row in latest.values():
        rows_of.setdefault(row["series"], []).append(row)
    found = [
        _name_group(rows, store) | {"series": series} | summarise_series(rows, store.classes, rule)
        for series, rows in sorted(rows_of.items())
    ]
    study = None
    if found[0]["study"] is not None:
        named = _name_group(list(latest.values()), store)
        study = _flatten(named | summarise_study(found, store.classes))
    row = {"series": [_flatten(one) for one in found], "study": study}
    schemas = build_series_schema(store.classes), build_study_schema(store.classes)
    types = pa.list_(pa.struct(schemas[0])), pa.struct(schemas[1])
    return pa.Table.from_pylist([row], pa.schema(zip(("series", "study"), types, strict=True)))


def _name_group(rows: Sequence[dict[str, Any]], store: PredictionStore) -> dict[str, Any]:
    """Return the study, the most frequent patient, and the classifier of some rows."""
    patients = Counter(row["patient"] for row in rows if row["patient"] is not None)
    return {
        "study": rows[0]["study"],
        "patient": max(sorted(patients), key=patients.__getitem__, default=None),
        "classifier_id": store.classifier_id,
    }


def _flatten(summary: dict[str, Any]) -> dict[str, Any]:
    """Turn dicts by class into columns, and counts by reason into pairs."""
    flat: dict[str, Any] = {}
    for name, value in summary.items():
        if name == "skipped":
            flat[name] = list(value.items())
        elif isinstance(value, dict):
            flat |= {f"{name}_{label}": one for label, one in value.items()}
        else:
            flat[name] = value
    return flat


def _write_tables(
    groups: "Sequence[ray.ObjectRef[pa.Table]]", store: PredictionStore, rule: SeriesRule
) -> dict[str, Any]:
    """Write the rows of :func:`summarise_group` as two tables; runs as a Ray task."""
    about = store.about | {"rule": asdict(rule), "notice": NOT_CALIBRATED}
    metadata = {METADATA_KEY: json.dumps(about | {"schema_version": SCHEMA_VERSION})}
    counts = {}
    for name, file, schema in (
        ("series", SERIES_FILE, build_series_schema(store.classes)),
        ("studies", STUDIES_FILE, build_study_schema(store.classes)),
    ):
        answers, sink = Counter[str](), io.BytesIO()
        with pq.ParquetWriter(sink, schema.with_metadata(metadata), compression="zstd") as writer:
            for group in groups:
                table = ray.get(group)
                structs = (
                    pc.list_flatten(table["series"])
                    if name == "series"
                    else table["study"].drop_null()
                )
                rows = pa.Table.from_struct_array(structs).cast(writer.schema)
                answers.update(rows["answer"].to_pylist())
                if rows.num_rows:
                    writer.write_table(rows)
        storage.write_bytes(storage.join(store.output_uri, file), sink.getvalue())
        counts[name] = {"total": answers.total(), "by_answer": dict(sorted(answers.items()))}
    return counts
