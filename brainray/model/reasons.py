"""The status of a prediction, and the reasons why a scan may get no class."""

from typing import Literal

from brainray.images.decode import REJECTION_REASONS
from brainray.model.calibration import NO_CLASS_REASONS, UNLIKE_TRAINING

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

REASONS: dict[str, str] = REJECTION_REASONS | NO_CLASS_REASONS
"""Why a scan may get no class: stable code to one sentence."""


def find_status(reason: str | None) -> Status:
    """Return the status that follows from a reason: a key of :data:`REASONS`, or None."""
    if reason is None:
        return "classified"
    is_rejected = reason in REJECTION_REASONS or reason == UNLIKE_TRAINING
    return "rejected" if is_rejected else "abstained"
