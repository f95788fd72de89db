"""Store objects in a PACS by STOW-RS, and ask it by QIDO-RS what it has (PS3.18)."""

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from pydicom import dcmread

from brainray.io.dicomweb import DicomWebClient, check_root, check_uid, open_client

MAX_REQUEST_BYTES = 64 * 2**20
"""Objects of one request, about; a larger object has a request for itself."""

_REFERENCED, _FAILED = "00081199", "00081198"
"""Sequences of the objects that were stored, and of those that were not."""
_REFERENCED_UID, _FAILURE_REASON = "00081155", "00081197"
_SOP_UID = "00080018"
_REASONS = {
    0x0110: "processing failure",
    0x0122: "it does not store objects of this class",
    0x0124: "not authorised",
    0xA700: "out of resources",
    0xA900: "the object does not match its class",
    0xC000: "it cannot read the object",
}
"""PS3.18, table I.2-2; the last digits of some say more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredObject:
    """What became of one object."""

    sop_instance_uid: str = field(repr=False)
    failure: str | None
    """Why it is not stored; None where it is."""


def open_dicomweb(
    url: str, *, token_env: str | None = None, certificate_path: str | None = None
) -> "DicomWeb":
    """Return this process's client of a PACS.

    Parameters
    ----------
    url : str
        Address of its DICOMweb service, such as ``https://pacs.example/dicom-web``.
    token_env : str, optional
        Variable with a bearer token; $BRAINRAY_DICOMWEB_TOKEN, where that is set, if not given.
        Without a token, ~/.netrc may give a name and a password.
    certificate_path : str, optional
        PEM file with the client's certificate and key; that of $BRAINRAY_DICOMWEB_CERTIFICATE,
        where that is set, if not given.

    Raises
    ------
    ConfigError
        The address, the token or the certificate cannot be used. Nothing is sent yet.
    """
    return DicomWeb(open_client(check_root(url), token_env, certificate_path))


class DicomWeb:
    """A PACS that objects are stored in. No error names a patient, a study or an object."""

    def __init__(self, client: DicomWebClient) -> None:
        self._client = client

    def has(self, study_uid: str, sop_instance_uid: str) -> bool:
        """Tell whether the PACS has an object in a study.

        Raises
        ------
        DicomWebError
            It does not answer, or refuses.
        """
        found = self._client.search(
            f"studies/{check_uid(study_uid)}/instances",
            [("SOPInstanceUID", check_uid(sop_instance_uid))],
            _SOP_UID,
        )
        return sop_instance_uid in found

    def store(self, study_uid: str, objects: Sequence[bytes]) -> list[StoredObject]:
        """Store objects in a study. Whoever stores the same ones again changes nothing.

        A service may answer with success, and have stored nothing; or with failure, because it has
        the object. So every object that the answer does not name as stored is searched for.

        Parameters
        ----------
        study_uid : str
            Of all objects.
        objects : sequence of bytes
            DICOM files.

        Returns
        -------
        list of StoredObject
            In the order of the objects.

        Raises
        ------
        DicomWebError
            The PACS does not answer, or refuses the request as a whole.
        """
        return [
            stored
            for batch in _cut(objects)
            for stored in self._store_batch(check_uid(study_uid), batch)
        ]

    def _store_batch(self, study_uid: str, objects: Sequence[bytes]) -> Iterator[StoredObject]:
        boundary = uuid4().hex
        answer = self._client.send(
            "POST",
            f"studies/{study_uid}",
            accept="application/dicom+json",
            body=_encode(objects, boundary),
            content_type=f'multipart/related; type="application/dicom"; boundary={boundary}',
            expected=(200, 202, 204, 409),  # 409: none of them is stored
        )
        referenced, failed = self._client.parse(_read_answer, answer.content)
        for content in objects:
            uid = str(dcmread(io.BytesIO(content), specific_tags=["SOPInstanceUID"]).SOPInstanceUID)
            failure = None
            if uid not in referenced and not self.has(study_uid, uid):
                silence = f"it answered with HTTP status {answer.status}, and does not have it"
                failure = failed.get(uid, silence)
            yield StoredObject(sop_instance_uid=uid, failure=failure)


def _cut(objects: Sequence[bytes]) -> Iterator[list[bytes]]:
    """Cut objects into requests of about :data:`MAX_REQUEST_BYTES`."""
    batch: list[bytes] = []
    for content in objects:
        if batch and sum(map(len, batch)) + len(content) > MAX_REQUEST_BYTES:
            yield batch
            batch = []
        batch.append(content)
    if batch:
        yield batch


def _encode(objects: Sequence[bytes], boundary: str) -> bytes:
    parts = [
        f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode() + content + b"\r\n"
        for content in objects
    ]
    return b"".join([*parts, f"--{boundary}--\r\n".encode()])


def _read_answer(content: bytes) -> tuple[set[str], dict[str, str]]:
    """Return the UIDs of what is stored, and of what is not, with the reason.

    A sequence may be there without items.
    """
    answer = json.loads(content) if content.strip() else {}
    stored = {_get(item, _REFERENCED_UID) for item in _list_items(answer, _REFERENCED)}
    failed = {
        str(_get(item, _REFERENCED_UID)): _describe_failure(_get(item, _FAILURE_REASON))
        for item in _list_items(answer, _FAILED)
    }
    return set(map(str, stored)), failed


def _list_items(answer: dict[str, Any], tag: str) -> list[dict[str, Any]]:
    return list(answer.get(tag, {}).get("Value") or [])


def _get(item: dict[str, Any], tag: str) -> Any:  # noqa: ANN401 - as JSON has it
    return (item.get(tag, {}).get("Value") or [None])[0]


def _describe_failure(reason: Any) -> str:  # noqa: ANN401 - as JSON has it
    if not isinstance(reason, int):
        return "it gives no reason"
    words = _REASONS.get(reason) or _REASONS.get(reason & 0xFF00) or _REASONS.get(reason & 0xF000)
    return f"{words or 'for a reason of its own'} (failure reason 0x{reason:04X})"
