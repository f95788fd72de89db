"""Every error brainray raises on purpose, as one tree.

::

    BrainrayError
    ├── UserError(ValueError)     what a user can mend; a job prints one line and exits 2
    │   ├── ConfigError           a recipe field, a flag, a run directory that does not match
    │   ├── DataError             folders, tables, labels
    │   ├── StorageError          a place that cannot be read or written
    │   │   └── DicomWebError     a PACS that does not answer, or refuses
    │   ├── WeightsError          pretrained weights that cannot be had or do not fit
    │   ├── ClassifierError       a damaged or foreign classifier folder
    │   └── RejectedImage         one scan's bytes; carries a stable reason code
    ├── TrainingError             what a user cannot mend; exit 1
    ├── ClassificationError       likewise, of a bulk run
    ├── DicomResultsError         likewise, of a result that becomes no DICOM object
    ├── LockLostError             another run has taken the output over
    └── ServingError              likewise, of the service

A message says what was expected, what was found, where, and the remedy.
"""


class BrainrayError(Exception):
    """Base of every error that brainray raises on purpose."""


class UserError(BrainrayError, ValueError):
    """Something the user can mend: one line, exit status 2."""


class ConfigError(UserError):
    """A recipe field, a flag, or a run directory that does not match the command."""


class DataError(UserError):
    """A folder, a table, or the labels in it."""


class StorageError(UserError):
    """A place that cannot be read or written."""


class DicomWebError(StorageError):
    """A PACS that does not answer, or refuses; the message holds no identifier of a patient."""


class WeightsError(UserError):
    """Pretrained weights that cannot be had, or do not fit the network."""


class ClassifierError(UserError):
    """A classifier folder that is damaged, foreign, or from another schema version."""


class TrainingError(BrainrayError):
    """Training failed for a reason that the user cannot mend from the command line."""


class ClassificationError(BrainrayError):
    """A bulk run failed for a reason that the user cannot mend from the command line."""


class DicomResultsError(BrainrayError):
    """A DICOM object that cannot be made or delivered; its message names no patient."""


class LockLostError(BrainrayError):
    """Another run has taken the output over, or may have: what this one writes would meet it."""


class ServingError(BrainrayError):
    """The service failed for a reason that the user cannot mend from the command line."""


class RejectedImage(UserError):  # noqa: N818 - a rejection is an answer, not a fault
    """One scan whose bytes cannot be turned into pixels.

    Parameters
    ----------
    reason : str
        Stable code, one of :data:`brainray.images.decode.REJECTION_REASONS`.
    message : str
        The same in words.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"
