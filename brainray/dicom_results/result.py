"""From a bulk output back to its series: what is said of each, and the DICOM instances it is of.

The output has keyed hashes of the UIDs. So the files are opened again, and the UIDs in each are
checked to be those of its row. Its bytes may be others: a PACS corrects patients, and changes how
pixels are encoded. Other pixels are another object, with another UID (PS3.3, C.12.1.1).
"""

import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, tzinfo
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pydicom
from PIL import Image
from pydicom.dataset import Dataset

from brainray.errors import ConfigError, DicomResultsError, RejectedImage, StorageError
from brainray.images.decode import DecodeLimits
from brainray.images.dicom import hash_identifier
from brainray.images.dicom_file import call_safely, get_value
from brainray.images.heatmap import render_overlay
from brainray.images.preprocess import Preprocessing
from brainray.images.slices import ReadOptions, find_slice, open_file, open_slice, show_slice
from brainray.inference.series import INDETERMINATE, NO_TUMOUR, SeriesRule, summarise_series
from brainray.inference.sources import Row, SourceReader, name_file
from brainray.inference.store import METADATA_KEY, PredictionStore
from brainray.inference.studies import SERIES_FILE
from brainray.io import storage
from brainray.io.identifiers import Identifiers, read_identifiers

KEY_SLICE_PX = 512
"""Longer side of a key slice's picture, at most."""
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
    """Read what the output of a bulk job says of its series as a whole.

    Raises UserError if it has none, cannot be read, or the key is not that of its identifiers.
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


def choose_latest(rows: Iterable[Row]) -> Iterable[Row]:
    """Choose the latest row of each slice."""
    ordered = sorted(rows, key=lambda row: row["classified_at"])
    return {row["scan_uri"]: row for row in ordered}.values()


def choose_slices(rows: Sequence[Row], classes: Sequence[str]) -> list[Row]:
    """Return the slices with probabilities, each once, in the order of their positions."""

    def place(row: Row) -> tuple[float, int, str]:
        frame = -1 if row["frame"] is None else row["frame"]
        return row["position_mm"] or 0.0, frame, str(row["scan_uri"])

    once: dict[Any, Row] = {}
    for row in sorted(rows, key=lambda row: str(row["scan_uri"])):
        if row[f"prob_{classes[0]}"] is not None:
            once.setdefault((row["sop_instance"], row["frame"]), row)
    return sorted(once.values(), key=place)


def list_tumours(classes: Sequence[str]) -> list[str]:
    """Return the classes that a finding can be of."""
    return [name for name in classes if name != NO_TUMOUR]


def compute_digest(rows: Sequence[Row], output: BulkOutput) -> str:
    """Return a hash of what a series' result depends on, besides the classifier.

    That is the content of its slices, which of them were rejected, and the rule. It needs no key:
    outputs with different keys give the same objects.
    """
    slices = sorted(
        [row["content_sha256"], -1 if row["frame"] is None else row["frame"], row["reason"] or ""]
        for row in rows
    )
    text = json.dumps([slices, asdict(output.rule)])
    return hashlib.sha256(text.encode()).hexdigest()


# ---- sources -------------------------------------------------------------------------------------


class Instance(NamedTuple):
    """A source instance, as objects refer to it."""

    sop_class_uid: str
    sop_instance_uid: str
    number: int | None
    """Instance Number (0020,0013)."""


def read_file(row: Row, reader: SourceReader) -> bytes:
    """Read the file that a row was made from; raises DicomResultsError if that is not possible."""
    name = name_file(row)
    try:
        return reader.read(name)
    except RejectedImage as rejection:
        reason = rejection.reason
    is_listed = reader.listed is not None and reason == "missing"
    where = " among the files of --scans-uri" if is_listed else ""
    raise DicomResultsError(f"The source '{name}' is {reason}{where}.")


def read_header(row: Row, reader: SourceReader, key: bytes) -> Dataset:
    """Read the header of the file that a row was made from; `key` is that of the hashes.

    Raises DicomResultsError if the file is missing, or holds another object now.
    """
    content = read_file(row, reader)
    try:
        header = call_safely(_parse_header, content)
    except RejectedImage as rejection:
        raise DicomResultsError(
            f"The header of '{row['scan_uri']}' cannot be read: {rejection.message}"
        ) from None
    for keyword, column in _UIDS.items():
        value = str(get_value(header, keyword) or "")
        if not value or hash_identifier(value, key) != row[column]:
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


def find_time_zone(header: Dataset) -> tzinfo | None:
    """Return the time zone that a header says its times are of; None where it says none."""
    try:
        return datetime.strptime(str(header.get("TimezoneOffsetFromUTC")), "%z").tzinfo
    except ValueError:
        return None


# ---- results -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class KeySlice:
    """One of the strongest slices of a series."""

    row: Row = field(repr=False)
    instance: Instance = field(repr=False)
    picture: Image.Image = field(repr=False)
    """Grey, with square pixels."""
    overlay: Image.Image | None = field(repr=False)
    """The same with the class map on it; None where the bulk job wrote no maps."""
    map_class: str
    """Class of the map: the most probable one of the slice."""

    @property
    def frame_number(self) -> int | None:
        """Number of the frame in its instance, from 1; None where that has one frame."""
        return None if self.row["frame"] is None else self.row["frame"] + 1


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SeriesResult:
    """All that the objects of a series are made of."""

    output: BulkOutput = field(repr=False)
    summary: dict[str, Any] = field(repr=False)
    """Of :func:`brainray.inference.series.summarise_series`."""
    slices: tuple[Row, ...] = field(repr=False)
    """Those with probabilities, each once, in the order of their positions."""
    header: Dataset = field(repr=False)
    """Of the first slice's instance, without pixels."""
    instances: tuple[Instance, ...] = field(repr=False)
    """Of these slices."""
    key_slices: tuple[KeySlice, ...] = field(repr=False)
    """The strongest first."""

    @property
    def study_uid(self) -> str:  # noqa: D102
        return str(self.header.StudyInstanceUID)

    @property
    def series_uid(self) -> str:  # noqa: D102
        return str(self.header.SeriesInstanceUID)

    @property
    def series_number(self) -> int | None:  # noqa: D102
        return _get_count(self.header, "SeriesNumber")

    @property
    def has_answer(self) -> bool:
        """Whether the series has a class."""
        return bool(self.summary["answer"] != INDETERMINATE)

    @property
    def shown_class(self) -> str:
        """The answer, else the tumour with the most evidence: whose key slices these are."""
        if self.has_answer:
            return str(self.summary["answer"])
        evidence = self.summary["evidence"]
        return max(list_tumours(self.output.classes), key=lambda name: evidence[name])

    @property
    def computed_at(self) -> datetime:
        """When the last slice was classified, in the source's time zone, else in this machine's."""
        latest: datetime = max(row["classified_at"] for row in self.slices)
        return latest.astimezone(find_time_zone(self.header))

    @property
    def engine(self) -> str:
        """What computed, such as ``openvino bf16``."""
        found = sorted({f"{row['engine']} {row['precision']}" for row in self.slices})
        return ", ".join(found)


def make_result(
    rows: Sequence[Row], output: BulkOutput, reader: SourceReader, limits: DecodeLimits
) -> SeriesResult:
    """Put together what is said of a series, reading its files again.

    `rows` are all of its slices, at least one of them with probabilities. Raises DicomResultsError
    if a file is missing, holds another object now, or cannot be decoded.
    """
    summary = summarise_series(rows, output.classes, output.rule)
    slices = choose_slices(rows, output.classes)
    header: Dataset | None = None
    instances: dict[str, Instance] = {}
    for row in slices:
        if row["sop_instance"] not in instances:
            own = read_header(row, reader, output.identifiers.key)
            number = _get_count(own, "InstanceNumber")
            uids = str(own.SOPClassUID), str(own.SOPInstanceUID)
            instances[row["sop_instance"]] = Instance(*uids, number)
            header = header or own
    assert header is not None, "a series has at least one slice"
    by_name = {row["scan_uri"]: row for row in slices}
    keys = []
    for row in (by_name[name] for name in summary["key_slices"]):
        try:
            picture, overlay = _draw(row, read_file(row, reader), output, limits)
        except RejectedImage as rejection:
            raise DicomResultsError(
                f"The key slice '{row['scan_uri']}' cannot be decoded: {rejection.reason}."
            ) from None
        key = KeySlice(
            row=row,
            instance=instances[row["sop_instance"]],
            picture=picture,
            overlay=overlay,
            map_class=max(output.classes, key=lambda name: row[f"prob_{name}"]),
        )
        keys.append(key)
    return SeriesResult(
        output=output,
        summary=summary,
        slices=tuple(slices),
        header=header,
        instances=tuple(instances.values()),
        key_slices=tuple(keys),
    )


def _draw(
    row: Row, content: bytes, output: BulkOutput, limits: DecodeLimits
) -> tuple[Image.Image, Image.Image | None]:
    """Return a slice with square pixels, and the same with its class map, if it has one."""
    file = open_file(content, ReadOptions(limits=limits))
    index = find_slice(file, row["frame"])
    shown = show_slice(file, index)
    row_mm, column_mm = file.slices[index].spacing_mm or (1.0, 1.0)
    height, width = shown.shape[0] * row_mm, shown.shape[1] * column_mm
    scale = KEY_SLICE_PX / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    picture = Image.fromarray(shown).resize(size, Image.Resampling.BICUBIC)
    if row["class_map"] is None:
        return picture, None
    shape = output.about["class_map"]
    png = render_overlay(
        np.array(row["class_map"], np.float32).reshape(shape["height"], shape["width"]),
        shown,
        open_slice(file, index, Preprocessing(**output.about["preprocessing"])).scan.frame,
        shape["stride_px"],
        shown_px=KEY_SLICE_PX,
    )
    overlay = Image.open(io.BytesIO(png)).convert("RGB")
    return picture, overlay.resize(size, Image.Resampling.BICUBIC)
