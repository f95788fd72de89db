"""What is said of one series: its summary, its slices in order, and its key slices as pictures."""

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, tzinfo
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset

from brainray.dicom_results.source import (
    BulkOutput,
    Instance,
    Row,
    SeriesSource,
    SourceReader,
    read_source,
)
from brainray.errors import DicomResultsError, RejectedImage
from brainray.images.decode import DecodeLimits
from brainray.images.heatmap import render_overlay
from brainray.images.preprocess import Preprocessing
from brainray.images.slices import ReadOptions, find_slice, open_file, open_slice, show_slice
from brainray.inference.series import INDETERMINATE, NO_TUMOUR, summarise_series

KEY_SLICE_PX = 512
"""Longer side of a key slice's picture, at most."""


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
    source: SeriesSource = field(repr=False)
    """Of these slices."""
    key_slices: tuple[KeySlice, ...] = field(repr=False)
    """The strongest first."""

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
        return latest.astimezone(find_time_zone(self.source.header))

    @property
    def engine(self) -> str:
        """What computed, such as ``openvino bf16``."""
        found = sorted({f"{row['engine']} {row['precision']}" for row in self.slices})
        return ", ".join(found)


def find_time_zone(header: Dataset) -> tzinfo | None:
    """Return the time zone that a header says its times are of; None where it says none."""
    try:
        return datetime.strptime(str(header.get("TimezoneOffsetFromUTC")), "%z").tzinfo
    except ValueError:
        return None


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


def make_result(
    rows: Sequence[Row], output: BulkOutput, reader: SourceReader, limits: DecodeLimits
) -> SeriesResult:
    """Put together what is said of a series, reading its files again.

    Parameters
    ----------
    rows : sequence of dict
        All slices of the series, at least one of them with probabilities.
    output : BulkOutput
    reader : SourceReader
    limits : DecodeLimits
        Of the key slices.

    Raises
    ------
    DicomResultsError
        A file is missing, holds another object now, or cannot be decoded.
    """
    summary = summarise_series(rows, output.classes, output.rule)
    slices = choose_slices(rows, output.classes)
    source = read_source(slices, reader)
    by_name = {row["scan_uri"]: row for row in slices}
    keys = [by_name[name] for name in summary["key_slices"]]
    return SeriesResult(
        output=output,
        summary=summary,
        slices=tuple(slices),
        source=source,
        key_slices=tuple(_draw(row, output, source, reader, limits) for row in keys),
    )


def _draw(
    row: Row, output: BulkOutput, source: SeriesSource, reader: SourceReader, limits: DecodeLimits
) -> KeySlice:
    content = reader.read(row)
    try:
        file = open_file(content, ReadOptions(limits=limits))
        index = find_slice(file, row["frame"])
        shown = show_slice(file, index)
        overlay = None
        if row["class_map"] is not None:
            preprocessing = Preprocessing(**output.about["preprocessing"])
            frame = open_slice(file, index, preprocessing).scan.frame
            shape = output.about["class_map"]
            cells = np.array(row["class_map"], np.float32)
            png = render_overlay(
                cells.reshape(shape["height"], shape["width"]),
                shown,
                frame,
                shape["stride_px"],
                shown_px=KEY_SLICE_PX,
            )
            overlay = Image.open(io.BytesIO(png)).convert("RGB")
        spacing = file.slices[index].spacing_mm or (1.0, 1.0)
    except RejectedImage as rejection:
        raise DicomResultsError(
            f"The key slice '{row['scan_uri']}' cannot be decoded: {rejection.reason}."
        ) from None
    size = _find_size(shown, spacing)
    return KeySlice(
        row=row,
        instance=source.instances[row["sop_instance"]],
        picture=Image.fromarray(shown).resize(size, Image.Resampling.BICUBIC),
        overlay=overlay and overlay.resize(size, Image.Resampling.BICUBIC),
        map_class=max(output.classes, key=lambda name: row[f"prob_{name}"]),
    )


def _find_size(pixels: NDArray[np.uint8], spacing_mm: tuple[float, float]) -> tuple[int, int]:
    """Return the width and height of a picture with square pixels."""
    height, width = pixels.shape[0] * spacing_mm[0], pixels.shape[1] * spacing_mm[1]
    scale = KEY_SLICE_PX / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))
