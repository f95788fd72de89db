"""From what came of uploaded files to the bodies of answers."""

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
    AnswerBody,
    ExplainedBody,
    PictureBody,
    SeriesBody,
    SliceBody,
    SliceName,
)

Result = TypeVar("Result")

MAX_POSITION_MM, MAX_COSINE = 1e6, 1.01
"""Numbers beyond these are no positions and no directions: headers hold anything."""
_NOTHING_KNOWN = SliceInfo()


@dataclass(frozen=True, slots=True)
class ProcessedFile(Generic[Result]):
    """A file, and what came of the slices that were asked for."""

    name: str | None
    content_sha256: str
    rejection: RejectedImage | None = None
    """Why the file as a whole cannot be read."""
    has_several: bool = False
    slices: Sequence[tuple[SliceInfo, Result | RejectedImage]] = ()


@dataclass(frozen=True, slots=True)
class ExplainedSlice:
    """The answer to a slice, and a picture of the evidence for its most probable class."""

    answer: SliceBody
    explained_class: str | None = None
    picture: bytes | None = None


def build_answer(file: ProcessedFile[SliceBody]) -> AnswerBody:
    """Build the answer to a file, with an answer for each slice where it has several."""
    named: dict[str, Any] = {"name": file.name, "content_sha256": file.content_sha256}
    if file.rejection is not None:
        return AnswerBody(**named, **dict(build_rejection(file.rejection)))
    info, first = file.slices[0]
    named |= {"series": info.series, "sop_instance": info.sop_instance}
    if not file.has_several:
        return AnswerBody(**named, **dict(_complete(info, first)))
    slices = [_complete(info, found) for info, found in file.slices]
    return AnswerBody(**named, status="slices", slices=slices)


def build_explained(file: ProcessedFile[ExplainedSlice]) -> ExplainedBody:
    """Build the answer to the one slice of a file that was asked for."""
    explained = next((one for _, one in file.slices if isinstance(one, ExplainedSlice)), None)
    slices = [
        (info, one.answer if isinstance(one, ExplainedSlice) else one) for info, one in file.slices
    ]
    answer = build_answer(
        ProcessedFile(file.name, file.content_sha256, file.rejection, slices=slices)
    )
    if explained is None or explained.picture is None:
        return ExplainedBody(**dict(answer))
    return ExplainedBody(
        **dict(answer),
        explained_class=explained.explained_class,
        heat_map_png=base64.b64encode(explained.picture).decode(),
    )


def build_pictures(upload: int, file: ProcessedFile[bytes]) -> list[PictureBody]:
    """Build the pictures of a file's slices; one without a picture says why."""
    found: Sequence[tuple[SliceInfo, bytes | RejectedImage]] = file.slices
    if file.rejection is not None:
        found = [(SliceInfo(), file.rejection)]
    return [
        PictureBody(upload=upload, frame=info.frame, reason=one.reason, detail=one.message)
        if isinstance(one, RejectedImage)
        else PictureBody(upload=upload, frame=info.frame, png=base64.b64encode(one).decode())
        for info, one in found
    ]


def _complete(info: SliceInfo, found: SliceBody | RejectedImage) -> SliceBody:
    return build_rejection(found, info) if isinstance(found, RejectedImage) else found


def build_slice(
    shape: tuple[int, ...],
    classes: Sequence[str],
    probs: NDArray[np.float32],
    reason: str | None = None,
    *,
    info: SliceInfo = _NOTHING_KNOWN,
    grey_range: GreyRange | None = None,
) -> SliceBody:
    """Build the answer to a slice that was decoded and predicted.

    Parameters
    ----------
    shape : (int, int)
        Height and width of the slice, in pixels.
    classes : sequence of str
        In class order.
    probs : ndarray of float32, shape (K,)
        In class order.
    reason : str, optional
        Why no class is given: a key of :data:`brainray.model.calibration.NO_CLASS_REASONS`.
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


def build_rejection(rejection: RejectedImage, info: SliceInfo = _NOTHING_KNOWN) -> SliceBody:
    """Build the answer to a slice that could not be decoded, or is not to be classified."""
    return SliceBody(
        **_describe(info), status="rejected", reason=rejection.reason, detail=rejection.message
    )


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
    """Return the shortest decimal that a float32 is read back from: 0.9, not 0.8999999762."""
    return float(str(value))


# ---- series --------------------------------------------------------------------------------------


def summarise_answers(answers: Sequence[AnswerBody], classes: Sequence[str]) -> list[SeriesBody]:
    """Put the slices of answers together to series, in the order in which series begin.

    What belongs to no series (a picture, an object that does not name one) is left out.
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
                "scan_uri": name_slice(f"{upload:09d}", one.frame),  # files in their order
                "sop_instance": answer.sop_instance,
                "orientation": one.orientation,
            }
            series[answer.series].append(row)
    return [_summarise(name, rows, classes) for name, rows in series.items()]


def _summarise(name: str, rows: list[dict[str, Any]], classes: Sequence[str]) -> SeriesBody:
    found = summarise_series(rows, classes)
    key_slices = [split_name(uri) for uri in found["key_slices"]]
    return SeriesBody(
        series=name,
        key_slices=[SliceName(upload=int(file), frame=frame) for file, frame in key_slices],
        **{
            member: found[member]
            for member in SeriesBody.model_fields
            if member not in ("series", "key_slices")
        },
    )
