"""PACS for tests: a fake one that injects faults, and Orthanc if it is installed."""

import io
import json
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

import pydicom
import pytest

ORTHANC = shutil.which("Orthanc")
ORTHANC_PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
START_S = 60.0
PEER_S = 10.0
"""Timeout of a DICOM peer that waits for a response."""

STUDY, SERIES, SOP = "0020000D", "0020000E", "00080018"
KEYS = {"PatientID": "PatientID", "Modality": "Modality", "SOPInstanceUID": "SOPInstanceUID"}


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ---- a fake PACS ---------------------------------------------------------------------------------


class Request(NamedTuple):
    """A received request."""

    method: str
    path: str
    keys: dict[str, str]
    headers: Message


@dataclass
class FakePacs:
    """The stored instances, and the behaviour of the service."""

    files: dict[str, bytes] = field(default_factory=dict)
    """By SOP Instance UID."""
    max_results: int = 1000
    """Maximum of one answer, whatever limit the request has."""
    ignores_offset: bool = False
    warns: bool = False
    """Whether an incomplete answer has a header that says that there are more results."""
    statuses: list[int] = field(default_factory=list)
    """Statuses of the next answers; 0 closes the connection in the middle of an answer."""
    broken_paths: tuple[str, ...] = ()
    """Requests with one of these in their path get status 500."""
    as_one_part: bool = False
    stow_answer: Callable[[list[str]], tuple[int, dict[str, Any] | None]] | None = None
    """From the received UIDs to status and body of the answer; if set, nothing is stored."""
    requests: list[Request] = field(default_factory=list)
    root: str = ""

    def add(self, *contents: bytes) -> None:
        for content in contents:
            uid = str(pydicom.dcmread(io.BytesIO(content)).SOPInstanceUID)
            self.files[uid] = content

    def search(self, path: str, keys: dict[str, str]) -> list[dict[str, Any]]:
        """Return the results of a search, one for each study, series or instance."""
        level = {"studies": STUDY, "series": SERIES, "instances": SOP}[path.rpartition("/")[2]]
        wanted = dict(re.findall(r"(studies|series)/([0-9.]+)", path))
        found = {}
        for content in self.files.values():
            data = pydicom.dcmread(io.BytesIO(content), stop_before_pixels=True)
            fits = all(str(data.get(key)) == keys[key] for key in KEYS.values() if key in keys)
            fits &= wanted.get("studies") in (None, str(data.StudyInstanceUID))
            fits &= wanted.get("series") in (None, str(data.SeriesInstanceUID))
            if fits:
                uid = str(data[level].value)
                found[uid] = {level: {"vr": "UI", "Value": [uid]}}
        return [found[uid] for uid in sorted(found)]

    @property
    def uri(self) -> str:
        """The URI of all its scans."""
        return f"dicomweb+{self.root}/studies"

    def count(self, pattern: str) -> int:
        return sum(re.search(pattern, request.path) is not None for request in self.requests)


class _Handler(BaseHTTPRequestHandler):
    pacs: FakePacs
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:  # noqa: ANN401
        pass

    def do_GET(self) -> None:
        path, keys = self._note()
        if self._misbehave(path):
            return
        pacs = self.pacs
        one = re.fullmatch(r"studies/[0-9.]+/series/[0-9.]+/instances/([0-9.]+)", path)
        if one:
            content = pacs.files.get(one[1])
            if content is None:
                self._answer(404, b"no such instance")
            elif pacs.as_one_part:
                self._answer(200, content, "application/dicom")
            else:
                body = (
                    b"--x\r\nContent-Type: application/dicom\r\n\r\n" + content + b"\r\n--x--\r\n"
                )
                self._answer(200, body, 'multipart/related; type="application/dicom"; boundary="x"')
            return
        results = pacs.search(path, keys)
        first = 0 if pacs.ignores_offset else int(keys.get("offset", 0))
        page = results[first : first + min(pacs.max_results, int(keys["limit"]))]
        headers = {}
        if pacs.warns and len(page) < len(results):
            headers = {"Warning": '299 fake "There are 9 additional results that can be requested"'}
        if page:
            self._answer(200, json.dumps(page).encode(), "application/dicom+json", headers)
        else:
            self._answer(204, b"")

    def do_POST(self) -> None:
        path, _ = self._note()
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self._misbehave(path):
            return
        boundary = b"--" + self.headers.get_param("boundary", "").encode()  # type: ignore[union-attr]
        parts = [part.partition(b"\r\n\r\n")[2][:-2] for part in body.split(boundary)[1:-1]]
        uids = [str(pydicom.dcmread(io.BytesIO(part)).SOPInstanceUID) for part in parts]
        if self.pacs.stow_answer is not None:
            status, document = self.pacs.stow_answer(uids)
        else:
            self.pacs.add(*parts)
            status, document = 200, describe_stored(uids) | {"00081198": {"vr": "SQ"}}
        content = b"" if document is None else json.dumps(document).encode()
        self._answer(status, content, "application/dicom+json")

    def _note(self) -> tuple[str, dict[str, str]]:
        parts = urlsplit(self.path)
        path, keys = parts.path.removeprefix("/dicom-web/"), dict(parse_qsl(parts.query))
        self.pacs.requests.append(Request(self.command, path, keys, self.headers))
        return path, keys

    def _misbehave(self, path: str) -> bool:
        status = self.pacs.statuses.pop(0) if self.pacs.statuses else 200
        if any(part in path for part in self.pacs.broken_paths):
            status = 500
        if status == 0:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"--x\r\n")
            self.close_connection = True
        elif status != 200:
            self._answer(status, f"refused {self.path}".encode(), headers={"Retry-After": "0"})
        return status != 200

    def _answer(
        self,
        status: int,
        content: bytes,
        kind: str = "text/plain",
        headers: dict[str, str] | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def describe_stored(uids: Sequence[str]) -> dict[str, Any]:
    """Return the part of an answer to STOW that lists stored objects."""
    items = [{"00081155": {"vr": "UI", "Value": [uid]}} for uid in uids]
    return {"00081199": {"vr": "SQ", "Value": items}}


def describe_failed(uids: Sequence[str], reason: int) -> dict[str, Any]:
    """Return the part of an answer to STOW that lists failed objects."""
    items = [
        {
            "00081155": {"vr": "UI", "Value": [uid]},
            "00081197": {"vr": "US", "Value": [reason]},
        }
        for uid in uids
    ]
    return {"00081198": {"vr": "SQ", "Value": items}}


@contextmanager
def serve_fake_pacs(*contents: bytes, tls: ssl.SSLContext | None = None) -> Iterator[FakePacs]:
    """Serve a fake PACS with some instances, on this machine."""
    pacs = FakePacs()
    pacs.add(*contents)
    handler = type("Handler", (_Handler,), {"pacs": pacs})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    scheme, host = ("http", "127.0.0.1") if tls is None else ("https", "localhost")
    pacs.root = f"{scheme}://{host}:{server.server_port}/dicom-web"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield pacs
    finally:
        server.shutdown()
        server.server_close()


# ---- Orthanc -------------------------------------------------------------------------------------


class Orthanc:
    """An Orthanc process with the DICOMweb plugin; it can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True)
        self.http_port, self.dicom_port = find_free_port(), find_free_port()
        self.receiver_port = find_free_port()
        """Port of the receiver that it sends to."""
        self.root = f"http://127.0.0.1:{self.http_port}/dicom-web"
        self._process: subprocess.Popen[bytes] | None = None
        configuration = {
            "Name": "test",
            "StorageDirectory": str(folder / "db"),
            "IndexDirectory": str(folder / "db"),
            "HttpPort": self.http_port,
            "DicomPort": self.dicom_port,
            "DicomAet": "ORTHANC",
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": False,
            "DicomModalities": {"receiver": ["BRAINRAY", "127.0.0.1", self.receiver_port]},
            "DicomScuTimeout": 20,
            "Plugins": [str(ORTHANC_PLUGIN)],
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
        }
        (folder / "orthanc.json").write_text(json.dumps(configuration))

    def start(self) -> None:
        """Start it, and wait until it answers."""
        log = (self._folder / "log").open("ab")
        command = [str(ORTHANC), str(self._folder / "orthanc.json")]
        self._process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + START_S
        while True:
            try:
                self.get("system")
                return
            except OSError:
                assert self._process.poll() is None, (self._folder / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.1)

    def kill(self) -> None:
        """Kill it with SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def get(self, path: str) -> Any:  # noqa: ANN401 - JSON
        """Return an answer of Orthanc's own REST API, which is independent of DICOMweb."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}/{path}") as answer:
            return json.loads(answer.read())

    def send(self, *instances: str) -> bool:
        """Let it send instances, given by Orthanc's ids, by C-STORE; return whether all arrived."""
        url = f"http://127.0.0.1:{self.http_port}/modalities/receiver/store"
        request = urllib.request.Request(url, json.dumps(instances).encode())
        try:
            with urllib.request.urlopen(request) as answer:
                return int(json.loads(answer.read())["FailedInstancesCount"]) == 0
        except urllib.error.HTTPError:  # the receiver stopped, or rejected an instance
            return False

    def read_instances(self) -> list[pydicom.Dataset]:
        """Return all stored instances."""
        found = []
        for name in self.get("instances"):
            url = f"http://127.0.0.1:{self.http_port}/instances/{name}/file"
            with urllib.request.urlopen(url) as answer:
                found.append(pydicom.dcmread(io.BytesIO(answer.read())))
        return found


@contextmanager
def run_orthanc(folder: Path) -> Iterator[Orthanc]:
    """Run Orthanc on this machine, or skip the test."""
    if ORTHANC is None or not ORTHANC_PLUGIN.exists():
        pytest.skip("Orthanc and its DICOMweb plugin are not installed (apt: orthanc-dicomweb)")
    orthanc = Orthanc(folder)
    orthanc.start()
    try:
        yield orthanc
    finally:
        orthanc.kill()


# ---- DIMSE ---------------------------------------------------------------------------------------


def send(
    port: int,
    *contents: bytes,
    calling: str = "PACS",
    called: str = "BRAINRAY",
    tls: ssl.SSLContext | None = None,
) -> list[int] | None:
    """Send files by C-STORE.

    Returns
    -------
    list of int or None
        The status of each file, -1 if the association ended; None if it was rejected.
    """
    from pynetdicom import AE

    entity = AE(calling)
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = PEER_S
    datasets = [pydicom.dcmread(io.BytesIO(content)) for content in contents]
    wanted = {(str(one.SOPClassUID), str(one.file_meta.TransferSyntaxUID)) for one in datasets}
    for sop_class, syntax in sorted(wanted or {("1.2.840.10008.1.1", "1.2.840.10008.1.2")}):
        entity.add_requested_context(sop_class, syntax)
    security = None if tls is None else (tls, "localhost")
    association = entity.associate("127.0.0.1", port, ae_title=called, tls_args=security)
    if not association.is_established:
        return None
    statuses = []
    for dataset in datasets:
        try:
            statuses.append(int(association.send_c_store(dataset).get("Status", -1)))
        except (RuntimeError, ValueError):  # it ended, or it does not accept this class
            statuses.append(-1)
    if association.is_established:
        association.release()
    return statuses


def echo(port: int, *, calling: str = "PACS", called: str = "BRAINRAY") -> int | None:
    """Send C-ECHO; return its status, or None if the association was rejected."""
    from pynetdicom import AE

    entity = AE(calling)
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = PEER_S
    entity.add_requested_context("1.2.840.10008.1.1")
    association = entity.associate("127.0.0.1", port, ae_title=called)
    if not association.is_established:
        return None
    status = int(association.send_c_echo().Status)
    association.release()
    return status
