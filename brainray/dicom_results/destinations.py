"""Where result objects go: a folder, or a PACS by DICOMweb. Each object is stored once.

What is stored is written down too, a small file for each series: so a later run neither opens its
sources, which may be deleted by then, nor asks the PACS again.
"""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pydicom

from brainray.dicom_results.objects import Kind
from brainray.errors import DicomResultsError
from brainray.io import storage
from brainray.io.dicomweb import DicomWebClient, open_client
from brainray.io.identifiers import refuse_deidentified

RECORDS_FOLDER = ".dicom_results"


class Target(NamedTuple):
    """One object that is to be stored."""

    kind: Kind
    study: str
    """Keyed hash, as of the series: what folders are called."""
    series: str
    study_uid: str
    object_uid: str


@dataclass(frozen=True, slots=True)
class FolderDestination:
    """``FOLDER/<study>/<series>/{sr,ko,sc}.dcm``, each whole or absent."""

    folder_uri: str

    def find_records(self, predictions_uri: str) -> str:  # noqa: ARG002 - deleted with the objects
        """Return the folder of the records of what this destination has of an output."""
        return storage.join(self.folder_uri, RECORDS_FOLDER)

    def keeps(self, study: str, series: str, kinds: Sequence[Kind]) -> bool:
        """Tell, without its sources, that nothing of a recorded series has been lost."""
        return all(storage.exists(self._name(study, series, kind)) for kind in kinds)

    def check(self) -> None:
        """Find out, before any work, that nothing can be stored; raises BrainrayError."""
        refuse_deidentified(self.folder_uri)
        storage.check_writable(self.folder_uri)

    def has(self, target: Target) -> bool:
        """Tell whether an object is there; a file with an older result counts as absent."""
        try:
            content = storage.read_bytes(self._name(target.study, target.series, target.kind))
            found = pydicom.dcmread(io.BytesIO(content), specific_tags=["SOPInstanceUID"])
        except (FileNotFoundError, pydicom.errors.InvalidDicomError):
            return False
        return bool(found.get("SOPInstanceUID") == target.object_uid)

    def store(self, objects: Sequence[tuple[Target, bytes]]) -> None:
        """Store objects of one study, and make sure that they are there.

        Raises
        ------
        BrainrayError
            Not all of them are.
        """
        for target, content in objects:
            storage.write_bytes(self._name(target.study, target.series, target.kind), content)

    def _name(self, study: str, series: str, kind: Kind) -> str:
        return storage.join(self.folder_uri, study, series, f"{kind}.dcm")


@dataclass(frozen=True, slots=True)
class PacsDestination:
    """A PACS by STOW-RS, which is asked by QIDO-RS what it has: methods of a folder."""

    url: str
    token_env: str | None = None
    certificate_path: str | None = None

    def find_records(self, predictions_uri: str) -> str:  # noqa: D102
        name = hashlib.sha256(self.url.encode()).hexdigest()[:16]
        return storage.join(predictions_uri, RECORDS_FOLDER, name)

    def keeps(self, study: str, series: str, kinds: Sequence[Kind]) -> bool:  # noqa: ARG002
        """Tell that a PACS is taken to keep what it has stored."""
        return True

    def check(self) -> None:  # noqa: D102
        self._client.has("1.2.3", "1.2.3")  # the answer is no; that there is one counts

    def has(self, target: Target) -> bool:  # noqa: D102
        return self._client.has(target.study_uid, target.object_uid)

    def store(self, objects: Sequence[tuple[Target, bytes]]) -> None:  # noqa: D102
        (study_uid,) = {target.study_uid for target, _ in objects}
        contents = {target.object_uid: content for target, content in objects}
        failures = self._client.store(study_uid, contents)
        for target, _ in objects:
            if target.object_uid in failures:
                failure = failures[target.object_uid]
                raise DicomResultsError(f"The PACS refused the {target.kind}: {failure}")
            if not self.has(target):
                raise DicomResultsError(
                    f"The PACS accepted the {target.kind}, and does not find it afterwards."
                )

    @property
    def _client(self) -> DicomWebClient:
        return open_client(self.url, self.token_env, self.certificate_path)


Destination = FolderDestination | PacsDestination
