"""What stands for patients, UIDs, files and days in a de-identified export.

All of it is derived from one key by HMAC-SHA256: the same patient has the same pseudonym in every
export of one project, and nobody without the key can test a guess. The key itself is derived from
that of the bulk output and the project's name, so that an export cannot be joined with the bulk
output, nor with the export of another project.
"""

import hmac
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Literal

from brainray.images.dicom import hash_identifier

MAX_SHIFT_DAYS = 3650
"""Dates move back by 1 to so many days."""

Kind = Literal["patient", "uid", "file", "content"]
"""UIDs of studies, series and objects are of one kind: a reference has the pseudonym of its target.
"""


@dataclass(frozen=True, slots=True)
class Pseudonyms:
    """Makes pseudonyms: 32 hexadecimal digits each."""

    id_key: bytes = field(repr=False)
    """Key of the identifiers' hashes in the bulk output."""
    key: bytes = field(repr=False)
    """Key of the export."""

    @classmethod
    def of(cls, id_key: bytes, project: str) -> "Pseudonyms":
        """Derive the key of a project's exports."""
        return cls(id_key, hmac.new(id_key, f"export {project}".encode(), sha256).digest())

    @property
    def check(self) -> str:
        """What tells another key from this one."""
        return self._compute("check")

    def name(self, kind: Kind, value: str | None) -> str | None:
        """Return the pseudonym of what the bulk output calls `value`; None of None."""
        return None if value is None else self._compute(f"{kind} {value}")

    def name_patient(self, patient_id: str) -> str | None:
        """Return the pseudonym of a Patient ID, that of its hash in the bulk output."""
        return self.name("patient", hash_identifier(patient_id, self.id_key))

    def make_uid(self, uid: str) -> str:
        """Return the UID that stands for another: ``2.25.`` and its pseudonym as a number."""
        pseudonym = self.name("uid", hash_identifier(uid, self.id_key))
        assert pseudonym is not None, "of a value"
        return f"2.25.{int(pseudonym, 16)}"

    def choose_shift_days(self, patient: str) -> int:
        """Return by how many days the dates of a patient, given by the pseudonym, move back."""
        return 1 + int(self._compute(f"days {patient}"), 16) % MAX_SHIFT_DAYS

    def _compute(self, text: str) -> str:
        return hmac.new(self.key, text.encode(), sha256).hexdigest()[:32]
