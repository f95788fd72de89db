"""Where result objects go: a folder, or a PACS by DICOMweb. Each object is stored once."""

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

    def check(self) -> None:
        """See :meth:`Destination.check`."""
        refuse_deidentified(self.folder_uri)
        storage.check_writable(self.folder_uri)

    def has(self, target: Target) -> bool:
        """See :meth:`Destination.has`; a file with an older result counts as absent."""
        try:
            content = storage.read_bytes(self._name(target))
            found = pydicom.dcmread(io.BytesIO(content), specific_tags=["SOPInstanceUID"])
        except (FileNotFoundError, pydicom.errors.InvalidDicomError):
            return False
        return bool(found.get("SOPInstanceUID") == target.object_uid)

    def store(self, objects: Sequence[tuple[Target, bytes]]) -> None:
        """See :meth:`Destination.store`."""
        for target, content in objects:
            storage.write_bytes(self._name(target), content)

    def _name(self, target: Target) -> str:
        name = f"{target.kind}.dcm"
        return storage.join(self.folder_uri, target.study, target.series, name)


@dataclass(frozen=True, slots=True)
class PacsDestination:
    """A PACS by STOW-RS, which is asked by QIDO-RS what it has."""

    url: str
    token_env: str | None = None
    certificate_path: str | None = None

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
