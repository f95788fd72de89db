"""From a bulk output back to the DICOM instances that its series were made of.

The output has keyed hashes of the UIDs. So the files are opened again, and the UIDs in each are
checked to be those of its row. Its bytes may be others: a PACS corrects patients, and changes how
pixels are encoded. Other pixels are another object, with another UID (PS3.3, C.12.1.1).
"""

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pydicom
from pydicom.dataset import Dataset

from brainray import storage
from brainray.data.read import read_named_scan, read_scan
from brainray.errors import ConfigError, DicomResultsError, RejectedImage, StorageError
from brainray.images.dicom import hash_identifier
from brainray.images.dicom_file import call_safely, get_value
from brainray.images.slices import split_name
from brainray.inference.series import SeriesRule
from brainray.inference.store import METADATA_KEY, PredictionStore
from brainray.inference.studies import SERIES_FILE
from brainray.io.identifiers import Identifiers, read_identifiers

EVIDENCE = "evidence_"
"""What the columns of series.parquet begin with that name the classes."""

_SLICE_COLUMNS_TEXT = (
    "scan_uri content_sha256 reason engine precision classified_at frame patient study series "
    "sop_instance plane position_mm orientation flags class_map"
)
_SLICE_COLUMNS = tuple(_SLICE_COLUMNS_TEXT.split())
_UIDS = {
    "StudyInstanceUID": "study",
    "SeriesInstanceUID": "series",
    "SOPInstanceUID": "sop_instance",
}
"""Elements of a source, and the columns that have their keyed hashes."""

Row = dict[str, Any]
"""A slice: a row of the prediction table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BulkOutput:
    """An output of ``brainray classify``, as its series.parquet describes it."""

    store: PredictionStore
    rule: SeriesRule
    about: dict[str, Any]
    """Metadata of series.parquet: classifier, weights, preprocessing, versions."""
    identifiers: Identifiers
    num_slices: int
    """Of all series."""
    num_series: int

    @property
    def classes(self) -> tuple[str, ...]:
        """Of the classifier, in class order."""
        return self.store.classes


def open_output(predictions_uri: str, key_uri: str | None = None) -> BulkOutput:
    """Read what an output says of its series as a whole.

    Parameters
    ----------
    predictions_uri : str
        ``--output-uri`` of a bulk job.
    key_uri : str, optional
        Its ``--id-key-file``, if it was given one.

    Raises
    ------
    ConfigError
        The folder has no series, or the key is not that of its identifiers.
    StorageError
        It cannot be read.
    """
    uri = storage.join(predictions_uri, SERIES_FILE)
    if not storage.exists(uri):
        raise ConfigError(
            f"Expected {SERIES_FILE} in '{predictions_uri}'. Give the output of `brainray classify "
            "--scans-uri …` over DICOM files."
        )
    filesystem, path = storage.resolve(uri)
    try:
        table = pq.read_table(path, filesystem=filesystem, columns=["num_slices"])
        names = pq.read_schema(path, filesystem=filesystem).names
        about = json.loads((table.schema.metadata or {})[METADATA_KEY])
    except (OSError, pa.ArrowInvalid, KeyError) as error:
        raise StorageError(
            f"'{uri}' is damaged: {error}. Run `brainray classify` again."
        ) from error
    return BulkOutput(
        store=PredictionStore(
            output_uri=predictions_uri,
            classifier_id=about["classifier_id"],
            classes=tuple(
                name.removeprefix(EVIDENCE) for name in names if name.startswith(EVIDENCE)
            ),
        ),
        rule=SeriesRule(**about["rule"]),
        about=about,
        identifiers=read_identifiers(predictions_uri, key_uri),
        num_slices=int(pc.sum(table["num_slices"]).as_py() or 0),
        num_series=table.num_rows,
    )


def read_slices(store: PredictionStore, uri: str) -> pa.Table:
    """Read from a file of predictions the slices that have a study: those of DICOM objects."""
    rows = store.read(uri, [*_SLICE_COLUMNS, *(f"prob_{name}" for name in store.classes)])
    return rows.filter(pc.and_(rows["study"].is_valid(), rows["series"].is_valid()))


def group_by_series(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Put the slices of each series together; of a slice with several rows the latest counts."""
    latest = {row["scan_uri"]: row for row in sorted(rows, key=lambda row: row["classified_at"])}
    series: dict[str, list[Row]] = {}
    for row in latest.values():
        series.setdefault(row["series"], []).append(row)
    return dict(sorted(series.items()))


# ---- files ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceReader:
    """Reads the file of a row again."""

    key: bytes = field(repr=False)
    """Of the identifiers' hashes."""
    listed: pa.Table | None
    """Rows of :data:`brainray.data.scans.LISTING_SCHEMA`, named as in the predictions; None where
    these names are the URIs."""
    max_bytes: int

    def read(self, row: Row) -> bytes:
        """Read the file that a row was made from.

        Raises
        ------
        DicomResultsError
            It is missing, or cannot be read.
        """
        name = row["scan_uri"] if row["frame"] is None else split_name(row["scan_uri"])[0]
        try:
            return self._read(name)
        except RejectedImage as rejection:
            raise DicomResultsError(f"The source '{name}' is {rejection.reason}.") from None

    def _read(self, name: str) -> bytes:
        if self.listed is None:
            return read_named_scan(name, max_bytes=self.max_bytes)
        index = pc.index(self.listed["scan_uri"], name).as_py()
        if index < 0:
            raise DicomResultsError(f"The source '{name}' is not among the files of --scans-uri.")
        found = self.listed.slice(index, 1).to_pylist()[0]
        return read_scan(found["uri"], found["row_group"], found["row"], max_bytes=self.max_bytes)


# ---- instances -----------------------------------------------------------------------------------


class Instance(NamedTuple):
    """A source instance, as objects refer to it."""

    sop_class_uid: str
    sop_instance_uid: str
    number: int | None
    """Instance Number (0020,0013)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SeriesSource:
    """The instances of a series."""

    header: Dataset = field(repr=False)
    """Of the first instance, without pixels."""
    instances: dict[str, Instance] = field(repr=False)
    """By ``sop_instance``, the keyed hash that rows have."""

    @property
    def study_uid(self) -> str:
        """Study Instance UID."""
        return str(self.header.StudyInstanceUID)

    @property
    def series_uid(self) -> str:
        """Series Instance UID."""
        return str(self.header.SeriesInstanceUID)

    @property
    def series_number(self) -> int | None:
        """Series Number (0020,0011)."""
        return _get_count(self.header, "SeriesNumber")


def read_source(rows: Sequence[Row], reader: SourceReader) -> SeriesSource:
    """Read the headers of the files that some rows of one series were made from.

    Parameters
    ----------
    rows : sequence of dict
        At least one; several may be of one file.
    reader : SourceReader

    Raises
    ------
    DicomResultsError
        A file is missing, or holds another object now.
    """
    header: Dataset | None = None
    instances: dict[str, Instance] = {}
    for row in rows:
        if row["sop_instance"] in instances:
            continue
        own = _read_header(row, reader)
        header = header or own
        instances[row["sop_instance"]] = Instance(
            str(own.SOPClassUID),
            str(own.SOPInstanceUID),
            _get_count(own, "InstanceNumber"),
        )
    assert header is not None, "a series has at least one slice"
    return SeriesSource(header=header, instances=instances)


def _read_header(row: Row, reader: SourceReader) -> Dataset:
    content = reader.read(row)
    try:
        header = call_safely(_parse_header, content)
    except RejectedImage as rejection:
        raise DicomResultsError(
            f"The header of '{row['scan_uri']}' cannot be read: {rejection.message}"
        ) from None
    for keyword, column in _UIDS.items():
        value = str(get_value(header, keyword) or "")
        if not value or hash_identifier(value, reader.key) != row[column]:
            raise DicomResultsError(
                f"The source '{row['scan_uri']}' holds another object than the one that was "
                f"classified: its {keyword} differs. Run `brainray classify` again."
            )
    if not get_value(header, "SOPClassUID"):
        raise DicomResultsError(
            f"'{row['scan_uri']}' has no SOP Class UID (0008,0016): nothing can refer to it."
        )
    return header


def _parse_header(content: bytes) -> Dataset:
    return pydicom.dcmread(io.BytesIO(content), force=True, stop_before_pixels=True)


def _get_count(header: Dataset, keyword: str) -> int | None:
    """Return a number that counts; None where there is none, or another value."""
    text = str(get_value(header, keyword) or "").strip()
    return int(text) if text.isdecimal() else None
