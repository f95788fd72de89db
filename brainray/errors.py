"""The errors of brainray. A message gives what was expected, what was found, where, and a remedy.

The user can fix a UserError; a command exits with status 2. Of any other, with status 1.
"""


class BrainrayError(Exception):
    """Base of all errors of brainray."""


class UserError(BrainrayError, ValueError):
    """An error that the user can fix: one line, exit status 2."""


class ConfigError(UserError):
    """A wrong option, or an output that does not match the options."""


class DataError(UserError):
    """A wrong folder, table or label."""


class StorageError(UserError):
    """A URI that cannot be read or written."""


class DicomWebError(StorageError):
    """A PACS that does not answer, or refuses; the message holds no identifier of a patient."""


class WeightsError(UserError):
    """Pretrained weights that are missing or do not fit the network."""


class ClassifierError(UserError):
    """A classifier bundle that is damaged, foreign, or of another schema version."""


class TrainingError(BrainrayError):
    """Training failed, and no option can fix it."""


class ClassificationError(BrainrayError):
    """A bulk run failed, and no option can fix it."""


class DicomResultsError(BrainrayError):
    """A DICOM object that cannot be made or delivered; its message names no patient."""


class LockLostError(BrainrayError):
    """Another run has, or may have, taken over the output."""


class ServingError(BrainrayError):
    """The service failed, and no option can fix it."""


class RejectedImage(UserError):  # noqa: N818 - a rejection is a result
    """A scan that cannot be decoded; the reason is a key of ``decode.REJECTION_REASONS``."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"
