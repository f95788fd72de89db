"""Receive scans from a PACS or a scanner: a C-STORE and C-ECHO service (PS3.4, annex B).

pynetdicom speaks the protocol. It logs what objects hold, and its exceptions quote them; neither is
shown. What it receives is written as it came: only the study's and the object's UID are decoded, to
name the file by their hashes.
"""

import io
import logging
import signal
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from socketserver import BaseServer
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from pydicom.dataset import Dataset
from pydicom.filereader import read_partial
from pydicom.tag import BaseTag, Tag
from pydicom.uid import DeflatedExplicitVRLittleEndian

from brainray.dicom_results.inbox import Inbox, open_inbox
from brainray.errors import ConfigError, RejectedImage
from brainray.images.decode import DecodeLimits
from brainray.images.dicom import PLUGINS
from brainray.images.dicom_file import call_safely
from brainray.runlog import Log

try:
    from pynetdicom import AE, AllStoragePresentationContexts, _config, evt
    from pynetdicom.sop_class import Verification
    from pynetdicom.transport import ThreadedAssociationServer
except ImportError as error:
    raise ConfigError(
        "To receive scans needs the library pynetdicom, which is not installed. Install the extra: "
        "pip install 'brainray[dicom]'."
    ) from error

logging.getLogger("pynetdicom").setLevel(logging.CRITICAL + 1)
_config.LOG_HANDLER_LEVEL = "none"


MR_CLASSES = (
    "1.2.840.10008.5.1.4.1.1.4",  # MR Image
    "1.2.840.10008.5.1.4.1.1.4.1",  # Enhanced MR Image
    "1.2.840.10008.5.1.4.1.1.4.3",  # Enhanced MR Color Image
    "1.2.840.10008.5.1.4.1.1.4.4",  # Legacy Converted Enhanced MR Image
)
TRANSFER_SYNTAXES = [uid for uid in PLUGINS if uid != DeflatedExplicitVRLittleEndian]
"""Those that are decoded; of a deflated object, the UIDs cannot be read without inflating it."""

STORED, OUT_OF_RESOURCES, OTHER_OBJECT, CANNOT_READ = 0x0000, 0xA700, 0xA900, 0xC000
"""Answers to C-STORE (PS3.4, table B.2-1)."""
MAX_PDU_BYTES = 2**17
ASSOCIATION_S = 30.0
"""Longest wait for the request of an association, once there is a connection."""
MAX_POLL_S = 1.0
STOP_S = 5.0
"""Longest wait for each association, when the receiver ends."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReceiveJob:
    """A receiver of scans: who may send, to where, and how much."""

    inbox_path: Path
    """Folder on a local disk. Finished studies lie in it as <study>/<round>/<object>.dcm, all named
    by hashes; give it to `brainray classify` as --scans-uri."""
    calling_ae_titles: tuple[str, ...] = ()
    """AE titles that may send; others are refused."""
    any_caller: bool = False
    """Let every AE title send."""
    ae_title: str = "BRAINRAY"
    """AE title of this receiver, which senders must name."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 11112
    """Port to listen on; 0 for a free one."""
    quiet_s: float = 60.0
    """A study is finished when nothing of it has come for so many seconds. What comes later is a
    round of its own."""
    all_classes: bool = False
    """Take objects of all storage classes, not only MR images."""
    max_associations: int = 10
    """Associations at a time; further ones are refused."""
    max_object_bytes: int = DecodeLimits().max_bytes
    """Largest object, in bytes; a larger one ends its association. Memory for some three of them is
    needed by each association."""
    min_free_bytes: int = 2 * 2**30
    """Free disk space, in bytes, below which objects are refused (status A700)."""
    idle_s: float = 60.0
    """An association that is silent for so many seconds is ended."""
    tls_cert: str | None = None
    """File with the certificate chain (PEM); with --tls-key."""
    tls_key: str | None = None
    """File with the certificate's key (PEM)."""
    tls_client_ca: str | None = None
    """File with the authority (PEM) that certificates of senders must be from; without it, any
    sender may connect."""
    id_key_file: str | None = None
    """File with the key of the hashes, at least 16 bytes: with that of the bulk job, the folders
    are named as its column `study`. If not given, the inbox has a random key of its own."""

    def __post_init__(self) -> None:
        for name in ("quiet_s", "max_associations", "max_object_bytes", "idle_s"):
            value = getattr(self, name)
            if not value > 0:
                raise ConfigError(f"Expected a positive {name}, got {value}.")
        if not self.calling_ae_titles and not self.any_caller:
            raise ConfigError(
                "Expected the AE titles that may send, as --calling-ae-titles PACS …. "
                "To take scans from everybody, give --any-caller."
            )
        if (self.tls_cert is None) != (self.tls_key is None) or (
            self.tls_client_ca is not None and self.tls_cert is None
        ):
            raise ConfigError("Expected --tls-cert and --tls-key together, and before a client's.")


def receive(job: ReceiveJob, *, log: Log) -> None:
    """Receive until SIGTERM or Ctrl-C; no line of the log identifies a patient.

    Raises
    ------
    UserError
        The inbox, the port or the certificate cannot be used.
    """
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    # What is raised in a thread of pynetdicom may quote an object.
    threading.excepthook = lambda raised: log(
        f"failed      a connection ended by {raised.exc_type.__name__}"
    )
    with open_receiver(job, log) as port:
        where = f"{job.host}:{port} as {job.ae_title}"
        log(f"listening   on {where}, {'with' if job.tls_cert else 'without'} TLS")
        stop.wait()
    log("stopped")


@contextmanager
def open_receiver(job: ReceiveJob, log: Log) -> Iterator[int]:
    """Listen, and finish studies, while the block runs; yield the port."""
    tls = _make_tls(job)
    stop = threading.Event()

    def finish_studies() -> None:
        while not stop.wait(min(MAX_POLL_S, job.quiet_s / 4)):
            try:
                for name, num_files in inbox.finish_quiet_studies():
                    log(f"finished    {name}: {num_files:,} objects")
            except OSError as error:
                log(f"failed      a study cannot be moved: {error.strerror}; trying again")

    with open_inbox(
        job.inbox_path,
        job.id_key_file,
        quiet_s=job.quiet_s,
        min_free_bytes=job.min_free_bytes,
    ) as inbox:
        server = _start_server(job, _Service(inbox, job.max_object_bytes, log), tls)
        finishing = threading.Thread(target=finish_studies, daemon=True)
        finishing.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            stop.set()
            finishing.join()


# ---- objects -------------------------------------------------------------------------------------


class _Service:
    """Answers the requests of all associations."""

    def __init__(self, inbox: Inbox, max_object_bytes: int, log: Log) -> None:
        self._inbox, self._max_object_bytes, self._log = inbox, max_object_bytes, log
        self._waiting: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        """Bytes of objects of each association that have come and are not stored yet."""
        self._counting = threading.Lock()

    def store(self, event: Any) -> int:  # noqa: ANN401 - as all below, of pynetdicom
        """Answer C-STORE: the object is on the disk before the sender learns of its success."""
        try:
            content = event.encoded_dataset()
            self._count(event.assoc, -len(event.encoded_dataset(include_meta=False)))
            study_uid, sop_uid = call_safely(_read_uids, content)
            if sop_uid != str(event.request.AffectedSOPInstanceUID):
                return self._refuse(OTHER_OBJECT, "its UID is not that of the request")
            if not self._inbox.has_room_for(len(content)):
                return self._refuse(OUT_OF_RESOURCES, "less than --min-free-bytes are free")
            self._inbox.store(study_uid, sop_uid, content)
        except RejectedImage:
            return self._refuse(CANNOT_READ, "it has no readable study and instance UID")
        except OSError as error:
            return self._refuse(OUT_OF_RESOURCES, str(error.strerror))
        except Exception as error:  # its text may hold what the object says of a person
            return self._refuse(CANNOT_READ, type(error).__name__)
        return STORED

    def _refuse(self, status: int, reason: str) -> int:
        self._log(f"refused     an object: {reason} (status {status:04X})")
        return status

    def limit_size(self, event: Any) -> None:  # noqa: ANN401
        """End an association that sends more than an object may have."""
        fragments = getattr(event.pdu, "presentation_data_value_items", ())
        # The first byte says what a fragment is; odd ones are of commands (PS3.8, annex E.2).
        data = [one.data for one in fragments if one.data and not one.data[0] & 1]
        num_bytes = sum(map(len, data)) - len(data)
        waiting = self._count(event.assoc, num_bytes)
        if waiting - num_bytes <= self._max_object_bytes < waiting:
            self._log("refused     an object: larger than --max-object-bytes; association ended")
            event.assoc.abort()

    def _count(self, association: Any, num_bytes: int) -> int:  # noqa: ANN401
        with self._counting:
            waiting = self._waiting.get(association, 0) + num_bytes
            self._waiting[association] = waiting
            return waiting

    def report_refusal(self, event: Any) -> None:  # noqa: ANN401
        """Log an association that was refused: its AE titles do not fit, or there are too many."""
        sender = event.assoc.requestor
        self._log(
            f"refused     an association of {sender.ae_title!a} at {sender.address}: its AE "
            "title, the called one, or the number of associations"
        )


def _read_uids(content: bytes) -> tuple[str, str]:
    """Return the study's and the object's UID, reading no further than to them."""

    def is_behind(tag: BaseTag, _vr: str | None, _length: int) -> bool:
        return bool(tag > Tag("StudyInstanceUID"))

    tags: list[BaseTag | int] = [Tag("StudyInstanceUID"), Tag("SOPInstanceUID")]
    found: Dataset = read_partial(io.BytesIO(content), is_behind, specific_tags=tags)
    study_uid, sop_uid = found.get("StudyInstanceUID"), found.get("SOPInstanceUID")
    if not study_uid or not sop_uid:
        raise RejectedImage("corrupt", "A UID is missing.")
    return str(study_uid), str(sop_uid)


# ---- network -------------------------------------------------------------------------------------


def _make_tls(job: ReceiveJob) -> ssl.SSLContext | None:
    if job.tls_cert is None:
        return None
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        tls.load_cert_chain(job.tls_cert, job.tls_key)
        if job.tls_client_ca is not None:
            tls.verify_mode = ssl.CERT_REQUIRED
            tls.load_verify_locations(job.tls_client_ca)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"Cannot use --tls-cert, --tls-key or --tls-client-ca: {error.strerror or error}. "
            "Expected PEM files, the key belonging to the certificate."
        ) from error
    return tls


def _start_server(job: ReceiveJob, service: _Service, tls: ssl.SSLContext | None) -> "_Server":
    try:
        entity = AE(job.ae_title)
        entity.require_calling_aet = [] if job.any_caller else list(job.calling_ae_titles)
    except ValueError as error:
        raise ConfigError(f"Expected AE titles of 1 to 16 characters: {error}.") from error
    entity.require_called_aet = True
    entity.maximum_associations = job.max_associations
    entity.maximum_pdu_size = MAX_PDU_BYTES
    entity.acse_timeout = entity.dimse_timeout = ASSOCIATION_S
    entity.network_timeout = job.idle_s
    entity.add_supported_context(Verification)
    classes = [str(context.abstract_syntax) for context in AllStoragePresentationContexts]
    for uid in classes if job.all_classes else MR_CLASSES:
        entity.add_supported_context(uid, TRANSFER_SYNTAXES)
    try:
        server: _Server = entity.make_server(
            (job.host, job.port),
            ssl_context=tls,
            evt_handlers=[
                (evt.EVT_C_STORE, service.store),
                (evt.EVT_PDU_RECV, service.limit_size),
                (evt.EVT_REJECTED, service.report_refusal),
            ],
            server_class=_Server,
        )
    except OSError as error:
        raise ConfigError(
            f"Cannot listen on {job.host}:{job.port}: {error.strerror}. Give another --host or "
            "--port; ports below 1024 need a right of their own."
        ) from error
    threading.Thread(target=server.serve_forever, daemon=True, name="receiver").start()
    return server


class _Server(ThreadedAssociationServer):  # type: ignore[misc]  # it may be absent
    """Listens; a peer that says nothing, or half of something, holds up nobody else."""

    daemon_threads = True

    def __init__(self, *arguments: Any, **options: Any) -> None:  # noqa: ANN401
        self._connections: WeakSet[socket.socket] = WeakSet()
        super().__init__(*arguments, **options)

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection; pynetdicom's own has no timeout, and waits here for TLS."""
        connection, address = self.socket.accept()
        connection.settimeout(self.ae.network_timeout)
        if self.ssl_context is not None:
            connection = self.ssl_context.wrap_socket(
                connection, server_side=True, do_handshake_on_connect=False
            )
        self._connections.add(connection)
        return connection, address

    def verify_request(self, request: Any, client_address: Any) -> bool:  # noqa: ANN401, ARG002
        """Close a connection at once where many wait for their association, or its refusal."""
        return bool(len(self.active_associations) < 2 * self.ae.maximum_associations)

    def finish_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401
        """Agree on TLS, then start the association; runs in a thread of its own."""
        if isinstance(request, ssl.SSLSocket):
            request.do_handshake()
        super().finish_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401
        """Say nothing of a connection that ended before its association, as of a port scan."""

    def shutdown(self) -> None:
        """Stop listening, and end all connections; what was being sent is not acknowledged."""
        BaseServer.shutdown(self)  # pynetdicom's own expects to have started the server itself
        self.server_close()
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for association in self.active_associations:
            if association.is_established:
                association.join(STOP_S)  # it may be storing an object
            else:
                association.kill()
