"""The answer to one uploaded scan, in the fields of the service's JSON."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from brainray.errors import RejectedImage
from brainray.model.reasons import REASONS, Status, find_status


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """The answer to one scan; the fields are those of the service's JSON."""

    name: str | None
    status: Status
    reason: str | None = None
    """Why it has no class: a key of :data:`REASONS`."""
    detail: str | None = None
    """The same in words."""
    predicted_class: str | None = None
    confidence: np.float32 | None = None
    """Probability of the most probable class, given or withheld."""
    probs: dict[str, np.float32] | None = None
    """None where it was rejected."""
    width_px: int | None = None
    height_px: int | None = None
    content_sha256: str | None = None
    """Of the encoded bytes; None where they could not be read."""


def build_answer(
    name: str | None,
    content_sha256: str,
    shape: tuple[int, int],
    classes: Sequence[str],
    probs: NDArray[np.float32],
    reason: str | None = None,
) -> Answer:
    """Build the answer to a scan that was opened and predicted.

    Parameters
    ----------
    shape : (int, int)
        Height and width of the scan, in pixels.
    classes : sequence of str
        In class order.
    probs : ndarray of float32, shape (K,)
        In class order.
    reason : str, optional
        Why no class is given: a key of :data:`brainray.model.trust.TRUST_REASONS`.
    """
    top = int(probs.argmax())
    height, width = shape
    status = find_status(reason)
    is_rejected = status == "rejected"
    return Answer(
        name=name,
        status=status,
        reason=reason,
        detail=None if reason is None else REASONS[reason],
        predicted_class=classes[top] if status == "classified" else None,
        confidence=None if is_rejected else probs[top],
        probs=None if is_rejected else dict(zip(classes, probs, strict=True)),
        width_px=width,
        height_px=height,
        content_sha256=content_sha256,
    )


def build_rejection(
    name: str | None, content_sha256: str | None, rejection: RejectedImage
) -> Answer:
    """Build the answer to a scan that could not be opened."""
    return Answer(
        name=name,
        status="rejected",
        reason=rejection.reason,
        detail=rejection.message,
        content_sha256=content_sha256,
    )
