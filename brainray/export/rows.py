"""The tables of a de-identified export: its schema, and rows of a bulk output without identity."""

from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa

from brainray.export.pseudonyms import Pseudonyms
from brainray.images.slices import split_name
from brainray.inference.schema import build_schema
from brainray.inference.sources import Row, name_file

EXPORT_SCHEMA_VERSION = 1

_KEPT_COLUMNS_TEXT = (
    "status reason predicted_class confidence width_px height_px classifier_id engine "
    "precision frame patient study series sop_instance plane position_mm orientation flags "
    "grey_range class_map logits features"
)
KEPT_COLUMNS = tuple(_KEPT_COLUMNS_TEXT.split())
"""Columns of the predictions that an export has, beside the probabilities. A column that is not
listed here is left out."""
LEFT_OUT_COLUMNS = ("scan_uri", "content_sha256", "size_bytes", "modified_ns", "classified_at")
"""Columns of the predictions that tell where a file lies, what is in it, or when it came."""
_GROUP_COLUMNS_TEXT = (
    "series study patient answer reason key_slices num_slices num_used num_positions skipped "
    "plane flags classifier_id num_series num_answered series_answers"
)
_GROUP_COLUMNS = frozenset(_GROUP_COLUMNS_TEXT.split())
_PROB = "prob_"
_GROUP_PREFIXES = ("evidence_", "longest_run_", "strongest_series_")
"""Columns of series.parquet and studies.parquet that an export has."""

EXPORT_FIELDS = (
    pa.field("slice_id", pa.string(), nullable=False),  # pseudonym of its name
    pa.field("content_id", pa.string()),  # pseudonym of its file's content
    pa.field("outcome", pa.string(), nullable=False),  # exported or rejected
    pa.field("outcome_reason", pa.string()),  # why it is rejected; else null
    pa.field("image", pa.string()),  # path below the export; null without an image
    pa.field("slope", pa.float64()),  # a sample is a PNG's value times this ...
    pa.field("intercept", pa.float64()),  # ... plus this
    pa.field("burned_in", pa.string()),  # no, as the header says; else unknown
    pa.field("has_text", pa.bool_()),  # whether a search found a line of characters
    pa.field("study_date", pa.date32()),  # moved by the patient's days; null where removed
)
"""Columns that an export adds to those of the predictions."""

IMAGE_COLUMNS = tuple(field.name for field in EXPORT_FIELDS[2:])
"""What was found when the source was opened."""


def build_export_schema(classes: Sequence[str]) -> pa.Schema:
    """Build the schema of ``data/*.parquet`` for some classes, in class order."""
    kept = [field for field in build_schema(classes) if _is_kept(field.name)]
    return pa.schema([*EXPORT_FIELDS, *kept])


def _is_kept(column: str) -> bool:
    return column in KEPT_COLUMNS or column.startswith(_PROB)


def choose_latest(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Choose the rows that hold now: of each file those of its latest content, each slice once.

    Returns file names, sorted, to their rows in the order of slices.
    """
    by_file: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["classified_at"]):
        by_file.setdefault(name_file(row), []).append(row)
    chosen = {}
    for name, own in sorted(by_file.items()):
        content = own[-1]["content_sha256"]
        latest = {row["scan_uri"]: row for row in own if row["content_sha256"] == content}
        chosen[name] = sorted(latest.values(), key=lambda row: row["frame"] or 0)
    return chosen


def hide_row(row: Row, pseudonyms: Pseudonyms) -> Row:
    """Return a row of the predictions without identity, and without what its image adds."""
    hidden = {
        name: hide_value(name, value, pseudonyms) for name, value in row.items() if _is_kept(name)
    }
    hidden["slice_id"] = hide_value("scan_uri", row["scan_uri"], pseudonyms)
    hidden["content_id"] = pseudonyms.name("content", row["content_sha256"])
    return hidden


def hide_table(table: pa.Table, pseudonyms: Pseudonyms) -> pa.Table:
    """Return series.parquet or studies.parquet without identity, and without its metadata."""
    kept = [
        name
        for name in table.column_names
        if name in _GROUP_COLUMNS or name.startswith(_GROUP_PREFIXES)
    ]
    found = table.select(kept)
    rows = [
        {name: hide_value(name, value, pseudonyms) for name, value in row.items()}
        for row in found.to_pylist()
    ]
    return pa.Table.from_pylist(rows, schema=found.schema.remove_metadata())


def hide_value(column: str, value: Any, pseudonyms: Pseudonyms) -> Any:  # noqa: ANN401
    """Return what stands for a value in an export: a pseudonym of identifiers and names of slices.

    The columns are those of the predictions, series.parquet and studies.parquet.
    """
    if value is None:
        return None
    if isinstance(value, list) and column in ("series", "key_slices"):
        return [hide_value(column, one, pseudonyms) for one in value]
    if column in ("scan_uri", "key_slices"):
        name, frame = split_name(value)
        pseudonym = pseudonyms.name("file", name)
        return pseudonym if frame is None else f"{pseudonym}-{frame}"
    if column == "patient":
        return pseudonyms.name("patient", value)
    if column in ("study", "series", "sop_instance") or column.startswith("strongest_series_"):
        return pseudonyms.name("uid", value)
    return value
