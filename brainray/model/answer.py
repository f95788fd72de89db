"""One scan's answer: the same from every door that is handed bytes.

A scan is opened (:func:`open_scan`), what it shows is predicted by a runtime, and the probabilities
become its answer; or it cannot be opened, and that is its answer.
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
from brainray.pixels.decode import DecodeLimits, decode_image
from brainray.pixels.preprocess import Preprocessing, resize_image

NOTICE = "Research use only; not a medical device."
INTENDED_USE = (
    "Research on classifying slices of brain MRI: comparing classifiers, sorting and finding "
    "scans in research data."
)
NOT_INTENDED_FOR = (
    "Diagnosis, treatment or triage of patients; scans of other organs or modalities; whole "
    "volumes. It answers every picture that can be read, also one that is no brain MRI."
)

Status = Literal["classified", "abstained", "rejected"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What became of one scan; the fields are those of the service's JSON."""

    name: str | None
    status: Status
    reason: str | None = None
    """Why it was rejected: a key of :data:`brainray.pixels.decode.REJECTION_REASONS`."""
    detail: str | None = None
    """The same in words."""
    predicted_class: str | None = None
    confidence: np.float32 | None = None
    """Probability of that class."""
    probs: dict[str, np.float32] | None = None
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
    """
    top = int(probs.argmax())
    height, width = shape
    return Answer(
        name=name,
        status="classified",
        predicted_class=classes[top],
        confidence=probs[top],
        probs=dict(zip(classes, probs, strict=True)),
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
    probs = runtime.predict_probs(scan.image[None])[0]
    height, width = scan.pixels.shape
    return build_answer(name, digest, (height, width), classifier.classes, probs)
