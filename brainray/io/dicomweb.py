"""A DICOMweb client (PS3.18) to read instances from a PACS and to store objects in it.

It uses requests and not dicomweb-client, which decodes each object that it receives and encodes
each one that it sends. Predictions refer to the hash of a scan, so its bytes must not change.

UIDs and the keys of a search identify patients. Error messages name only the service: they contain
no UID, no key, and no text of an exception of requests, which quotes the URL.
"""

import json
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit
from uuid import uuid4

import requests

from brainray.errors import ConfigError, DicomWebError, RejectedImage

# At lower levels it quotes the address of every request, and so what was searched for.
logging.getLogger("urllib3").setLevel(logging.ERROR)

TOKEN_VARIABLE = "BRAINRAY_DICOMWEB_TOKEN"
CERTIFICATE_VARIABLE = "BRAINRAY_DICOMWEB_CERTIFICATE"

MAX_ATTEMPTS = 6
"""Attempts at one request; the pauses between them double, to 15 s in all, about."""
FIRST_PAUSE_S, MAX_PAUSE_S = 0.5, 30.0
CONNECT_S, SILENCE_S = 10.0, 60.0
"""Longest wait for a connection, and for the next bytes of an answer."""
ANSWER_S = 600.0
"""Longest time that one answer takes."""
PAGE_SIZE = 500
"""Results of one request of a search, if the service does not give fewer."""
MAX_ANSWER_BYTES = 64 * 2**20
"""Longest answer other than an instance."""
MAX_INSTANCE_BYTES = 2 * 2**30
MAX_REQUEST_BYTES = 64 * 2**20
"""Objects of one request, about; a larger object has a request for itself."""

SERIES_KEYS = (
    *("Modality", "SeriesInstanceUID", "SeriesNumber", "SeriesDescription"),
    *("00080060", "0020000E", "00200011", "0008103E"),
)
"""Keys of a search that are about series; the others are about studies."""
PAGING_KEYS = ("limit", "offset", "includefield")

_BUSY = (408, 425, 429, 500, 502, 503, 504)
"""Statuses after which the same request may succeed."""
_MULTIPART_HEADER_BYTES = 2**16
_JSON = "application/dicom+json"
_UID = re.compile(r"[0-9.]{1,64}")
_STUDY_UID, _SERIES_UID, _SOP_UID = "0020000D", "0020000E", "00080018"
_STORED_SEQUENCE, _FAILED_SEQUENCE = "00081199", "00081198"
_REFERENCED_UID, _FAILURE_REASON = "00081155", "00081197"
_REASONS = {
    0x0110: "processing failure",
    0x0122: "it does not store objects of this class",
    0x0124: "not authorised",
    0xA700: "out of resources",
    0xA900: "the object does not match its class",
    0xC000: "it cannot read the object",
}
"""PS3.18, table I.2-2; the last digits of some say more."""
_URI = re.compile(
    r"dicomweb\+(?P<root>https?://[^?#]+?)/studies"
    r"(?:/(?P<study>[0-9.]+)(?:/series/(?P<series>[0-9.]+)(?:/instances/(?P<sop>[0-9.]+))?)?)?"
    r"(?:\?(?P<query>[^#]*))?"
)

_Value = TypeVar("_Value")


# ---- addresses -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Resource:
    """A search for studies, a study, a series or an instance, as a URI names it."""

    root: str
    """Address of the service."""
    uids: tuple[str, ...] = field(repr=False)
    """Of the study, the series and the instance; fewer if the URI names fewer levels."""
    query: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    @property
    def path(self) -> str:  # noqa: D102 - below the service
        names = ("studies", "series", "instances")
        return "/".join(part for pair in zip(names, self.uids, strict=False) for part in pair)

    def find_below(self, uid: str) -> "Resource":
        """Return a study, series or instance of this; keys that are about series stay."""
        kept = tuple(pair for pair in self.query if pair[0] in SERIES_KEYS)
        return Resource(self.root, (*self.uids, uid), () if self.uids else kept)

    def to_uri(self) -> str:
        """Return the URI; :func:`parse_uri` is the inverse."""
        query = f"?{urlencode(self.query)}" if self.query else ""
        return f"dicomweb+{self.root}/{self.path or 'studies'}{query}"


def parse_uri(uri: str) -> Resource:
    """Parse ``dicomweb+https://HOST/PATH/studies?KEY=VALUE``; raises ConfigError if it is none."""
    parts = _URI.fullmatch(uri.rstrip("/"))
    if parts is None:
        raise ConfigError(
            "Expected scans in a PACS as dicomweb+https://HOST/PATH/studies?KEY=VALUE, or with "
            "/studies/UID, /series/UID and /instances/UID at the end of the address."
        )
    query = tuple(parse_qsl(parts["query"] or "", keep_blank_values=True))
    refused = {key for key, _ in query}.intersection(PAGING_KEYS)
    if refused:
        raise ConfigError(
            f"The key '{min(refused)}' cannot be given in the address of scans: all results are "
            "asked for, page after page. Leave it out."
        )
    uids = tuple(filter(None, (parts["study"], parts["series"], parts["sop"])))
    return Resource(_check_root(parts["root"]), uids, query)


def _check_root(url: str) -> str:
    """Return the address of a service without a slash at its end; it must hold no credentials."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
        raise ConfigError(
            "Expected the address of a DICOMweb service, such as https://pacs.example/dicom-web."
        )
    if "@" in parts.netloc:
        raise ConfigError(
            "The address of a DICOMweb service must not hold credentials: it would be seen in the "
            f"list of processes. Give a token in ${TOKEN_VARIABLE}, or a name and a password in "
            "~/.netrc."
        )
    return url.rstrip("/")


# ---- reading -------------------------------------------------------------------------------------


class FoundResources(NamedTuple):
    """What a URI names: URIs of studies, which are to be listed, or of instances."""

    studies: list[str]
    instances: list[str]


def list_resources(uri: str) -> FoundResources:
    """List one level: the studies of a search, or the instances of a study or series."""
    resource = parse_uri(uri)
    client = open_client(resource.root)
    if not resource.uids:
        keys = [pair for pair in resource.query if pair[0] not in SERIES_KEYS]
        studies = client.search("studies", keys, _STUDY_UID)
        return FoundResources([resource.find_below(uid).to_uri() for uid in studies], [])
    if len(resource.uids) == 3:
        return FoundResources([], [resource.to_uri()])
    series = [resource]
    if len(resource.uids) == 1:
        found = client.search(f"{resource.path}/series", resource.query, _SERIES_UID)
        series = [resource.find_below(uid) for uid in found]
    instances = [
        one.find_below(uid).to_uri()
        for one in series
        for uid in client.search(f"{one.path}/instances", (), _SOP_UID)
    ]
    return FoundResources([], instances)


def read_instance(uri: str, *, max_bytes: int | None = None) -> bytes:
    """Read an instance, of :func:`list_resources`, as the service has it: a DICOM file.

    Of a larger file than `max_bytes` one byte more is read, which tells that there is more.

    Raises
    ------
    RejectedImage
        ``missing``, or ``unreadable`` where the service does not answer or refuses.
    """
    resource = parse_uri(uri)
    try:
        content = open_client(resource.root).fetch(resource.path, max_bytes or MAX_INSTANCE_BYTES)
        reason, message = "missing", "The PACS no longer has this instance."
    except DicomWebError as error:
        content, reason, message = None, "unreadable", str(error)
    if content is None:  # raised outside the except block, so that no other error is chained to it
        raise RejectedImage(reason, message)
    return content


# ---- requests ------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def open_client(
    root: str, token_env: str | None = None, certificate_path: str | None = None
) -> "DicomWebClient":
    """Return this process's client of a service; nothing is sent yet.

    `token_env` is a variable with a bearer token (:data:`TOKEN_VARIABLE`, if not given). Without a
    token, ~/.netrc may give a name and a password. `certificate_path` is a PEM file with a client's
    certificate and key (that of :data:`CERTIFICATE_VARIABLE`, if not given).

    Raises
    ------
    ConfigError
        The address cannot be used, the variable is not set, the file is not there, or a token would
        go unencrypted to another machine.
    """
    root = _check_root(root)
    token = os.environ.get(token_env or TOKEN_VARIABLE, "").strip()
    if token_env and not token:
        raise ConfigError(f"Expected a bearer token in ${token_env}, which is not set.")
    certificate = certificate_path or os.environ.get(CERTIFICATE_VARIABLE) or None
    if certificate and not Path(certificate).is_file():
        raise ConfigError(f"No client certificate at '{certificate}'. Check the path.")
    if token and root.startswith("http://") and not _is_loopback(root):
        raise ConfigError(
            f"A token would go to {root} unencrypted. Give an https:// address, or no token."
        )
    return DicomWebClient(root, token or None, certificate)


def _is_loopback(root: str) -> bool:
    host = urlsplit(root).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class DicomWebClient:
    """Sends requests to one service, again where that may help.

    Its methods raise DicomWebError where the service does not answer, or refuses.
    """

    def __init__(self, root: str, token: str | None, certificate_path: str | None) -> None:
        self.root = root
        self._session = requests.Session()

        def add_token(request: requests.PreparedRequest) -> requests.PreparedRequest:
            request.headers["Authorization"] = f"Bearer {token}"
            return request

        # In a plain header, requests would replace it by a password of ~/.netrc.
        self._session.auth = None if token is None else add_token
        self._session.cert = certificate_path
        self._session.headers["Accept-Encoding"] = "identity"  # pixels are compressed already

    def search(self, path: str, keys: Sequence[tuple[str, str]], uid_tag: str) -> Iterator[str]:
        """Search by QIDO-RS, page after page; yield the UID of each result, once.

        `uid_tag` is the element that has it, such as ``0020000D``. A service may give fewer results
        than a page has without saying so. So the last page is the one without a new result.
        """
        seen: set[str] = set()
        offset = 0
        while True:
            paging = [("limit", str(PAGE_SIZE)), ("offset", str(offset))]
            response, content = self._send("GET", path, accept=_JSON, params=[*keys, *paging])
            uids = self._parse(_read_uids, content, uid_tag)
            new = [uid for uid in dict.fromkeys(uids) if uid not in seen]
            if not new:
                if uids and "additional results" in response.headers.get("Warning", ""):
                    raise DicomWebError(
                        f"The DICOMweb service at {self.root} has more results than it gives, and "
                        "gives the same ones for each offset. Narrow the search, by StudyDate for "
                        "example."
                    )
                return
            yield from new
            seen.update(new)
            offset += len(uids)

    def has(self, study_uid: str, sop_uid: str) -> bool:
        """Tell whether the service has an object in a study."""
        path, keys = f"studies/{_check_uid(study_uid)}/instances", [("SOPInstanceUID", sop_uid)]
        return sop_uid in self.search(path, keys, _SOP_UID)

    def fetch(self, path: str, max_bytes: int) -> bytes | None:
        """Fetch an instance by WADO-RS, in the encoding that the service has it in.

        Returns the file, or one byte more than `max_bytes` of it; None where it is not there.
        """
        response, content = self._send(
            "GET",
            path,
            accept='multipart/related; type="application/dicom"; transfer-syntax=*',
            max_bytes=max_bytes + _MULTIPART_HEADER_BYTES,
            expected=(200, 404, 410),
        )
        if response.status_code != 200:
            return None
        kind = response.headers.get("Content-Type", "")
        if not kind.lower().startswith("multipart/"):
            return content[: max_bytes + 1]
        return self._parse(_read_first_part, content, kind, max_bytes)

    def store(self, study_uid: str, objects: Mapping[str, bytes]) -> dict[str, str]:
        """Store objects in a study by STOW-RS. Storing the same ones again changes nothing.

        A service may answer with success, and have stored nothing; or with failure, because it has
        the object. So every object that the answer does not name as stored is searched for.

        Takes SOP Instance UIDs and DICOM files; returns the UIDs of those that the service does not
        have afterwards, and why.
        """
        path, failures = f"studies/{_check_uid(study_uid)}", {}
        for batch in _split_requests(objects):
            boundary = uuid4().hex
            part = f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode()
            parts = [piece for uid in batch for piece in (part, objects[uid], b"\r\n")]
            response, content = self._send(
                "POST",
                path,
                accept=_JSON,
                body=b"".join([*parts, f"--{boundary}--\r\n".encode()]),
                content_type=f'multipart/related; type="application/dicom"; boundary={boundary}',
                expected=(200, 202, 204, 409),  # 409: none of them is stored
            )
            stored, failed = self._parse(_read_stored, content)
            for uid in batch:
                if uid not in stored and not self.has(study_uid, uid):
                    answer = f"it answered with HTTP status {response.status_code}"
                    failures[uid] = failed.get(uid, f"{answer}, and does not have it")
        return failures

    def _parse(self, read: Callable[..., _Value], *arguments: object) -> _Value:
        """Parse an answer; errors of the parser may quote it, and become DicomWebError."""
        try:
            return read(*arguments)
        except (ValueError, LookupError, TypeError, AttributeError):
            pass
        raise DicomWebError(
            f"The DICOMweb service at {self.root} gave an answer that is not DICOMweb. Check the "
            "address: it ends before /studies."
        )

    def _send(
        self,
        method: str,
        path: str,
        *,
        accept: str,
        params: Sequence[tuple[str, str]] = (),
        body: bytes | None = None,
        content_type: str | None = None,
        max_bytes: int = MAX_ANSWER_BYTES,
        expected: Sequence[int] = (200, 204),
    ) -> tuple[requests.Response, bytes]:
        """Send a request, up to :data:`MAX_ATTEMPTS` times; return the answer and its content.

        Every request may be sent again: objects that are stored keep their UIDs.
        """
        headers = {"Accept": accept} | ({"Content-Type": content_type} if content_type else {})
        pause_s, failure = FIRST_PAUSE_S, ""
        for attempt in range(MAX_ATTEMPTS):
            if attempt:
                time.sleep(min(MAX_PAUSE_S, pause_s * random.uniform(0.75, 1.25)))
                pause_s *= 2
            try:
                with self._session.request(
                    method,
                    f"{self.root}/{path}",
                    params=list(params),
                    data=body,
                    headers=headers,
                    stream=True,
                    timeout=(CONNECT_S, SILENCE_S),
                    allow_redirects=False,
                ) as response:
                    status = response.status_code
                    if status in _BUSY:
                        failure = f"HTTP status {status}"
                        retry_after = response.headers.get("Retry-After", "")
                        pause_s = max(pause_s, float(retry_after) if retry_after.isdecimal() else 0)
                        continue
                    if status in expected:
                        return response, _read_up_to(response, max_bytes)
                    failure = _explain_status(status)
                    break
            except requests.exceptions.SSLError:
                failure = (
                    "its certificate, or the client's, is refused. Name the file with its "
                    "authority in $REQUESTS_CA_BUNDLE"
                )
                break
            except requests.Timeout:
                failure = "it does not answer"
            except requests.ConnectionError:
                failure = "it cannot be reached"
            except requests.exceptions.ChunkedEncodingError:
                failure = "an answer broke off"
            except (requests.RequestException, OSError) as error:
                failure = type(error).__name__
                break
        else:
            failure += f", after {MAX_ATTEMPTS} attempts"
        # Raised outside the except block: the chained error of requests would quote the URL.
        raise DicomWebError(f"The DICOMweb service at {self.root} failed: {failure}.")


def _explain_status(status: int) -> str:
    if status in (401, 403):
        return (
            f"access is denied (HTTP status {status}). Give a token in ${TOKEN_VARIABLE}, a client "
            f"certificate in ${CERTIFICATE_VARIABLE}, or a name and a password in ~/.netrc"
        )
    if status == 404:
        return "it has no such address (HTTP status 404). Check it: it ends before /studies"
    if 300 <= status < 400:
        return f"it answers with another address (HTTP status {status}). Give that one"
    return f"it refuses the request (HTTP status {status})"


def _read_up_to(response: requests.Response, max_bytes: int) -> bytes:
    """Read an answer, or one byte more of it than is allowed."""
    deadline = time.monotonic() + ANSWER_S
    parts, left = [], max_bytes + 1
    for part in response.iter_content(2**16):
        parts.append(part[:left])
        left -= len(parts[-1])
        if not left:
            break
        if time.monotonic() > deadline:
            raise requests.Timeout
    return b"".join(parts)


def _split_requests(objects: Mapping[str, bytes]) -> Iterator[list[str]]:
    """Yield the UIDs of the objects of each request, of about :data:`MAX_REQUEST_BYTES`."""
    batch: list[str] = []
    num_bytes = 0
    for uid, content in objects.items():
        if batch and num_bytes + len(content) > MAX_REQUEST_BYTES:
            yield batch
            batch, num_bytes = [], 0
        batch.append(uid)
        num_bytes += len(content)
    if batch:
        yield batch


# ---- answers; errors of these functions become DicomWebError -------------------------------------


def _read_first_part(content: bytes, content_type: str, max_bytes: int) -> bytes:
    """Return the first part of a multipart answer, or one byte more of it than is allowed."""
    found = re.search(r'boundary="?([^";]+)"?', content_type, re.IGNORECASE)
    if found is None:
        raise ValueError("no boundary")
    boundary = b"--" + found[1].strip().encode("latin-1")
    header = content.index(boundary) + len(boundary)
    start = content.index(b"\r\n\r\n", header) + 4
    end = content.find(b"\r\n" + boundary, start)
    if end < 0:
        if len(content) - start <= max_bytes:
            raise ValueError("no end")
        end = len(content)
    return content[start:end][: max_bytes + 1]


def _read_uids(content: bytes, uid_tag: str) -> list[str]:
    """Return the UID of each result of a search, in the DICOM JSON Model (PS3.18, annex F)."""
    results = json.loads(content) if content.strip() else []
    return [_check_uid(result[uid_tag]["Value"][0]) for result in results]


def _check_uid(value: Any) -> str:  # noqa: ANN401 - what a service sent
    """Return a UID that is safe in a URL."""
    if not isinstance(value, str) or _UID.fullmatch(value) is None:
        raise ValueError("no UID")
    return value


def _read_stored(content: bytes) -> tuple[set[str], dict[str, str]]:
    """Return the UIDs of what is stored, and of what is not, with the reason (PS3.18, 10.5).

    A sequence may be there without items.
    """
    answer = json.loads(content) if content.strip() else {}

    def list_items(tag: str) -> list[dict[str, Any]]:
        return answer.get(tag, {}).get("Value") or []

    def get(item: dict[str, Any], tag: str) -> Any:  # noqa: ANN401 - as JSON has it
        return (item.get(tag, {}).get("Value") or [None])[0]

    stored = {get(item, _REFERENCED_UID) for item in list_items(_STORED_SEQUENCE)}
    failed = {
        get(item, _REFERENCED_UID): _describe_failure(get(item, _FAILURE_REASON))
        for item in list_items(_FAILED_SEQUENCE)
    }
    return stored, failed


def _describe_failure(reason: Any) -> str:  # noqa: ANN401 - as JSON has it
    if not isinstance(reason, int):
        return "it gives no reason"
    words = _REASONS.get(reason) or _REASONS.get(reason & 0xFF00) or _REASONS.get(reason & 0xF000)
    return f"{words or 'for a reason of its own'} (failure reason 0x{reason:04X})"
