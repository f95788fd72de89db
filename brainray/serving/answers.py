"""Bodies of answers, built from decoded and predicted slices."""

import base64
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from brainray.errors import RejectedImage
from brainray.images.slices import GreyRange, SliceInfo, name_slice, split_name
from brainray.inference.series import summarise_series
from brainray.model.reasons import REASONS, find_status
from brainray.serving.schemas import (
    MAX_COSINE,
    MAX_POSITION_MM,
    AnswerBody,
    PictureBody,
    SeriesBody,
    SliceBody,
    SliceName,
)

Answer = TypeVar("Answer", bound=AnswerBody)
SliceResult = TypeVar("SliceResult")


@dataclass(frozen=True, slots=True)
class ProcessedFile(Generic[SliceResult]):
    """A file and the results of the requested slices; a rejected file has one result."""

    name: str | None
    content_sha256: str
    info: SliceInfo
    """Of the first slice."""
    slices: Sequence[SliceResult]


class ExplainedSlice(SliceBody):
    """The answer to a slice, with its heat map."""

    explained_class: str | None
    heat_map_png: str


def build_answer(body: type[Answer], file: ProcessedFile[SliceBody]) -> Answer:
    """Build the answer to a file, with one for each slice if several were requested."""
    known: dict[str, Any] = {
        "name": file.name,
        "content_sha256": file.content_sha256,
        "series": file.info.series,
        "sop_instance": file.info.sop_instance,
    }
    if len(file.slices) == 1:
        return body(**known, **dict(file.slices[0]))
    return body(**known, status="slices", slices=list(file.slices))


def build_slice(
    info: SliceInfo,
    shape: tuple[int, ...],
    classes: Sequence[str],
    probs: NDArray[np.float32],
    reason: str | None = None,
    *,
    grey_range: GreyRange | None = None,
) -> SliceBody:
    """Build the answer to a slice that was predicted.

    Parameters
    ----------
    info : SliceInfo
    shape : (int, int)
        Height and width of the slice, in pixels.
    classes : sequence of str
        In class order.
    probs : ndarray of float32, shape (K,)
        In class order.
    reason : str, optional
        Why no class is given: a key of :data:`brainray.model.calibration.NO_CLASS_REASONS`.
    grey_range : str, optional
    """
    status, top = find_status(reason), int(probs.argmax())
    shown = [shorten(prob) for prob in probs]
    is_rejected = status == "rejected"
    height, width = shape
    return SliceBody(
        **_describe(info),
        grey_range=grey_range,
        status=status,
        reason=reason,
        detail=None if reason is None else REASONS[reason],
        predicted_class=classes[top] if status == "classified" else None,
        confidence=None if is_rejected else shown[top],
        probs=None if is_rejected else dict(zip(classes, shown, strict=True)),
        width_px=width,
        height_px=height,
    )


def build_rejection(info: SliceInfo, rejection: RejectedImage) -> SliceBody:
    """Build the answer to a slice that is rejected before the network sees it."""
    return SliceBody(
        **_describe(info), status="rejected", reason=rejection.reason, detail=rejection.message
    )


def build_picture(upload: int, info: SliceInfo, found: bytes | RejectedImage) -> PictureBody:
    """Build the body of a slice that was rendered as a PNG, or could not be."""
    if isinstance(found, RejectedImage):
        return PictureBody(
            upload=upload, frame=info.frame, reason=found.reason, detail=found.message
        )
    return PictureBody(upload=upload, frame=info.frame, png=base64.b64encode(found).decode())


def _describe(info: SliceInfo) -> dict[str, Any]:
    position, orientation = info.position_mm, info.orientation
    if position is None or not abs(position) <= MAX_POSITION_MM:
        position = None
    if orientation is None or not all(abs(cosine) <= MAX_COSINE for cosine in orientation):
        orientation = None
    return {
        "frame": info.frame,
        "plane": info.plane,
        "position_mm": position,
        "orientation": None if orientation is None else list(orientation),
        "flags": list(info.flags),
    }


def shorten(value: np.float32) -> float:
    """Return the shortest decimal that reads back as this float32: 0.9, not 0.8999999762."""
    return float(str(value))


def summarise_answers(answers: Sequence[AnswerBody], classes: Sequence[str]) -> list[SeriesBody]:
    """Summarise the slices of each series, in the order in which the series first occur.

    Answers without a series, such as pictures, are skipped.
    """
    series: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for upload, answer in enumerate(answers):
        if answer.series is None:
            continue
        for one in answer.slices or (answer,):
            probs = one.probs or dict.fromkeys(classes)
            row = {
                **one.model_dump(include={"reason", "frame", "plane", "position_mm", "flags"}),
                **{f"prob_{name}": probs[name] for name in classes},
                "scan_uri": name_slice(f"{upload:09d}", one.frame),  # sorts as the files came
                "sop_instance": answer.sop_instance,
                "orientation": one.orientation,
            }
            series[answer.series].append(row)
    return [_summarise(name, rows, classes) for name, rows in series.items()]


def _summarise(name: str, rows: list[dict[str, Any]], classes: Sequence[str]) -> SeriesBody:
    summary = summarise_series(rows, classes)
    names = [split_name(uri) for uri in summary.pop("key_slices")]
    key_slices = [SliceName(upload=int(file), frame=frame) for file, frame in names]
    members = {member: summary[member] for member in SeriesBody.model_fields.keys() & summary}
    return SeriesBody(series=name, key_slices=key_slices, **members)
