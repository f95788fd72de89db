"""Where result objects go: a folder, or a PACS by DICOMweb. Each object is stored once.

What is stored is written down too, a small file for each series: so a later run neither opens its
sources, which may be deleted by then, nor asks the PACS again.
"""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, Protocol

import pydicom

from brainray import storage
from brainray.dicom_results.objects import Kind
from brainray.errors import DicomResultsError
from brainray.io.deidentified import refuse_deidentified

if TYPE_CHECKING:
    from brainray.dicom_results.dicomweb import DicomWeb


RECORDS_FOLDER = ".dicom_results"


class Target(NamedTuple):
    """One object that is to be stored."""

    kind: Kind
    study: str
    """Keyed hash, as of the series: what folders are called."""
    series: str
    study_uid: str
    object_uid: str


class Destination(Protocol):
    """Takes objects."""

    def find_records(self, predictions_uri: str) -> str:
        """Return the folder of the records of what this destination has of an output."""

    def keeps(self, study: str, series: str, kinds: Sequence[Kind]) -> bool:
        """Tell, without its sources, that nothing of a recorded series has been lost."""

    def check(self) -> None:
        """Find out, before any work, that nothing can be stored.

        Raises
        ------
        BrainrayError
            It cannot be reached, or not be written.
        """

    def has(self, target: Target) -> bool:
        """Tell whether an object is there."""

    def store(self, objects: Sequence[tuple[Target, bytes]]) -> None:
        """Store objects of one study, and make sure that they are there.

        Raises
        ------
        BrainrayError
            Not all of them are.
        """


@dataclass(frozen=True, slots=True)
class FolderDestination:
    """``FOLDER/<study>/<series>/{sr,ko,sc}.dcm``, each whole or absent."""

    folder_uri: str

    def find_records(self, predictions_uri: str) -> str:  # noqa: ARG002 - deleted with the objects
        """See :meth:`Destination.find_records`."""
        return storage.join(self.folder_uri, RECORDS_FOLDER)

    def keeps(self, study: str, series: str, kinds: Sequence[Kind]) -> bool:
        """See :meth:`Destination.keeps`."""
        return all(storage.exists(self._name(study, series, kind)) for kind in kinds)

    def check(self) -> None:
        """See :meth:`Destination.check`."""
        refuse_deidentified(self.folder_uri)
        storage.check_writable(self.folder_uri)

    def has(self, target: Target) -> bool:
        """See :meth:`Destination.has`; a file with an older result counts as absent."""
        try:
            content = storage.read_bytes(self._name(target.study, target.series, target.kind))
            found = pydicom.dcmread(io.BytesIO(content), specific_tags=["SOPInstanceUID"])
        except (FileNotFoundError, pydicom.errors.InvalidDicomError):
            return False
        return bool(found.get("SOPInstanceUID") == target.object_uid)

    def store(self, objects: Sequence[tuple[Target, bytes]]) -> None:
        """See :meth:`Destination.store`."""
        for target, content in objects:
            storage.write_bytes(self._name(target.study, target.series, target.kind), content)

    def _name(self, study: str, series: str, kind: Kind) -> str:
        return storage.join(self.folder_uri, study, series, f"{kind}.dcm")


@dataclass(frozen=True, slots=True)
class PacsDestination:
    """A PACS by STOW-RS, which is asked by QIDO-RS what it has."""

    url: str
    token_env: str | None = None
    certificate_path: str | None = None

    def find_records(self, predictions_uri: str) -> str:
        """See :meth:`Destination.find_records`."""
        name = hashlib.sha256(self.url.encode()).hexdigest()[:16]
        return storage.join(predictions_uri, RECORDS_FOLDER, name)

    def keeps(self, study: str, series: str, kinds: Sequence[Kind]) -> bool:  # noqa: ARG002
        """See :meth:`Destination.keeps`: a PACS is taken to keep what it has stored."""
        return True

    def check(self) -> None:
        """See :meth:`Destination.check`."""
        self._connect().has("1.2.3", "1.2.3")  # the answer is no; that there is one counts

    def has(self, target: Target) -> bool:
        """See :meth:`Destination.has`."""
        return self._connect().has(target.study_uid, target.object_uid)

    def store(self, objects: Sequence[tuple[Target, bytes]]) -> None:
        """See :meth:`Destination.store`."""
        (study_uid,) = {target.study_uid for target, _ in objects}
        answers = self._connect().store(study_uid, [content for _, content in objects])
        failures = {one.sop_instance_uid: one.failure for one in answers}
        for target, _ in objects:
            failure = failures.get(target.object_uid)
            if failure is not None:
                raise DicomResultsError(f"The PACS refused the {target.kind}: {failure}")
            if not self.has(target):
                raise DicomResultsError(
                    f"The PACS accepted the {target.kind}, and does not find it afterwards."
                )

    def _connect(self) -> "DicomWeb":
        return connect_pacs(self)


@lru_cache(maxsize=4)
def connect_pacs(destination: PacsDestination) -> "DicomWeb":
    """Return this process's client of a PACS."""
    from brainray.dicom_results.dicomweb import open_dicomweb  # the extra's libraries

    return open_dicomweb(
        destination.url,
        token_env=destination.token_env,
        certificate_path=destination.certificate_path,
    )


# ---- records -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StoredRecords:
    """Which series have been stored, and with which content."""

    folder_uri: str

    def has(self, series: str, digest: str) -> bool:
        """Tell whether a series has been stored with a content."""
        try:
            return bool(storage.read_json(self._name(series))["digest"] == digest)
        except FileNotFoundError:
            return False

    def add(self, series: str, digest: str) -> None:
        """Write down that a series is stored."""
        storage.write_json(self._name(series), {"digest": digest})

    def _name(self, series: str) -> str:
        return storage.join(self.folder_uri, f"{series}.json")
