"""One scan's answer: the same from every door that is handed bytes.

A scan is opened (:func:`open_scan`), what it shows is predicted by a runtime, and the prediction
becomes its answer; or it cannot be opened, and that is its answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from brainray.errors import RejectedImage
from brainray.model.classifier import Classifier
from brainray.model.runtime import Runtime
from brainray.model.trust import TRUST_REASONS, UNLIKE_TRAINING
from brainray.pixels.decode import REJECTION_REASONS, DecodeLimits, decode_image
from brainray.pixels.preprocess import Preprocessing, resize_image

NOTICE = "Research use only; not a medical device."
INTENDED_USE = (
    "Research on classifying slices of brain MRI: comparing classifiers, sorting and finding "
    "scans in research data."
)
NOT_INTENDED_FOR = (
    "Diagnosis, treatment or triage of patients; scans of other organs or modalities; whole "
    "volumes. A picture that is no brain MRI may get a class all the same."
)

Status = Literal["classified", "abstained", "rejected"]

REASONS: dict[str, str] = REJECTION_REASONS | TRUST_REASONS
"""Why a scan may get no class: stable code to one sentence."""


def name_status(reason: str | None) -> Status:
    """Return what became of a scan that could be read: a class, or none for this reason."""
    if reason is None:
        return "classified"
    return "rejected" if reason == UNLIKE_TRAINING else "abstained"


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What became of one scan; the fields are those of the service's JSON."""

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


@dataclass(frozen=True, slots=True)
class OpenedScan:
    """A scan that could be read."""

    pixels: NDArray[np.uint8]
    """The scan itself, shape (height, width)."""
    image: NDArray[np.uint8]
    """What the network is given, shape (size_px, size_px)."""


def open_scan(content: bytes, preprocessing: Preprocessing, limits: DecodeLimits) -> OpenedScan:
    """Decode and resize one scan.

    Raises
    ------
    RejectedImage
        The bytes cannot be turned into pixels.
    """
    pixels = decode_image(content, limits)
    return OpenedScan(pixels, resize_image(pixels, preprocessing))


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
    status = name_status(reason)
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


def answer_scan(
    name: str | None,
    content: bytes,
    *,
    classifier: Classifier,
    runtime: Runtime,
    limits: DecodeLimits,
) -> Answer:
    """Answer one scan from its bytes; any bytes have an answer."""
    digest = sha256(content).hexdigest()
    try:
        scan = open_scan(content, classifier.preprocessing, limits)
    except RejectedImage as rejection:
        return build_rejection(name, digest, rejection)
    found = runtime.predict(scan.image[None])
    height, width = scan.pixels.shape
    shape = (height, width)
    return build_answer(name, digest, shape, classifier.classes, found.probs[0], found.reasons[0])
