"""One run at a time writes below an output, and leaves a document for the next one.

::

    O/
      .lock         who writes; on an object store also the document, and when it was renewed
      .state.json   the document; on a local disk only

On a local disk the system locks a file, and forgets that with the process, however it ends.

On an object store ``.lock`` is a lease: an object that its holder renews every LEASE_RENEWAL_S, and
that another run may take over when that has not happened for LEASE_LIFE_S. It is never deleted, and
every write of it names the version that it replaces (``If-Match``; ``If-None-Match`` for the
first). So whoever writes knows what it replaces: it has read the document that was last written,
and of a holder that was stopped, or of a request that was under way, while another took over,
nothing is written any more.

Whether a lease has expired is told by the clock of whoever wants it, against the time that the
holder wrote down. Clocks that differ cannot break what is promised above; they only move the time
at which a lease may be taken over. Where they differ by nearly LEASE_LIFE_S, a run that is alive
may lose its output, and end.
"""

import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyarrow import fs

from brainray import storage
from brainray.errors import ConfigError, LockLostError, StorageError
from brainray.io import conditional
from brainray.io.repeat import repeat

if TYPE_CHECKING:
    from obstore import UpdateVersion

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
STATE_FILE = ".state.json"

LEASE_RENEWAL_S = 10.0
LEASE_LIFE_S = 60.0
"""A lease that was not renewed for so long may be taken over, and its holder takes it for lost."""

MAX_ATTEMPTS = 5
"""At a write that meets something else than expected, each after another look at it."""


class OutputLock(ABC):
    """What a run holds while it may write below an output."""

    def __init__(self, output_uri: str) -> None:
        self._output_uri = output_uri
        self._state: dict[str, Any] = {}

    @property
    def state(self) -> dict[str, Any]:
        """A copy of the document: of the previous holder's until the first update; {} at first."""
        return dict(json.loads(json.dumps(self._state)))

    @abstractmethod
    def update(self, state: dict[str, Any]) -> None:
        """Replace the document, if the output is still held; the next holder finds it.

        Parameters
        ----------
        state : dict
            JSON; NaN is refused.

        Raises
        ------
        LockLostError
            The output is no longer held. The document is as whoever holds it now left it.
        StorageError
            The document cannot be written. Where a service did not answer, it may have been
            replaced: the next holder finds the one or the other. The output is still held.
        """

    @abstractmethod
    def check(self) -> None:
        """Raise what :meth:`update` would, as far as that is known; asks nobody.

        Raises
        ------
        LockLostError
            The output is no longer held.
        """


@contextmanager
def hold_output(output_uri: str) -> Iterator[OutputLock]:
    """Be the only run that writes below an output.

    Raises
    ------
    ConfigError
        Another run holds it.
    StorageError
        The output cannot be written, or the service has no conditional writes.
    """
    storage.check_writable(output_uri)
    filesystem, path = storage.resolve(storage.join(output_uri, LOCK_FILE))
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "id": uuid.uuid4().hex}
    if isinstance(filesystem, fs.LocalFileSystem):
        with _lock_file(output_uri, Path(path), holder) as lock:
            yield lock
        return
    lease = _Lease(output_uri, holder)
    lease.acquire()
    try:
        lease.check_service()
        with repeat(lease.renew, LEASE_RENEWAL_S, "lease"):
            yield lease
    finally:
        lease.release()


def _refuse(output_uri: str, holder: dict[str, Any]) -> ConfigError:
    return ConfigError(
        f"Another run is writing to '{output_uri}' (process {holder.get('pid')} on "
        f"{holder.get('host')}). Wait for it to end, or give another --output-uri."
    )


@contextmanager
def _lock_file(output_uri: str, path: Path, holder: dict[str, Any]) -> Iterator[OutputLock]:
    try:
        stream = path.open("a+")
    except OSError as error:  # it may belong to another user
        raise StorageError(f"Cannot open '{path}': {error}") from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            text = stream.read()
            raise _refuse(output_uri, json.loads(text) if text else {}) from None
        except OSError as error:  # a network's file system whose server does not lock
            raise StorageError(f"Cannot lock '{path}': {error}") from error
        stream.truncate(0)
        stream.write(json.dumps(holder))
        stream.flush()
        lock = _FileLock(output_uri, path.with_name(STATE_FILE))
        try:
            yield lock
        finally:
            lock.is_held = False


class _FileLock(OutputLock):
    """A file that the system locks: nobody takes it from a process that lives."""

    def __init__(self, output_uri: str, path: Path) -> None:
        super().__init__(output_uri)
        self.is_held = True
        self._path = path
        if path.exists():
            self._state = dict(storage.read_json(str(path)))

    def update(self, state: dict[str, Any]) -> None:
        self.check()
        storage.write_json(str(self._path), state)
        self._state = json.loads(json.dumps(state))

    def check(self) -> None:
        if not self.is_held:
            raise _report_released(self._output_uri)


def _report_released(output_uri: str) -> LockLostError:
    return LockLostError(f"This run has given '{output_uri}' back.")


class _Lease(OutputLock):
    """An object that is renewed."""

    def __init__(self, output_uri: str, holder: dict[str, Any]) -> None:
        super().__init__(output_uri)
        self._uri = storage.join(output_uri, LOCK_FILE)
        self._holder = holder
        self._writing = threading.Lock()
        self._version: UpdateVersion | None = None
        self._number = 0
        self._content = b""
        self._renewed_s = 0.0
        self._lost: LockLostError | None = None

    def acquire(self) -> None:
        """Create the lease, or take it over where it has expired or was given back."""
        for _ in range(MAX_ATTEMPTS):
            found, version = self._read()
            if _is_held(found):
                break
            if self._put(found.get("state", {}), version):
                if found and not found.get("released"):
                    logger.warning(
                        "%s is taken over from process %s on %s, which has not renewed its lease.",
                        *(self._output_uri, found.get("pid"), found.get("host")),
                    )
                return
        raise _refuse(self._output_uri, found)

    def check_service(self) -> None:
        """Make sure that the service heeds conditions, without which this is no lock."""
        conditional.check_conditional_writes(self._uri, self._content)

    def renew(self) -> None:
        """Write the lease once more; where that fails, there is time for another attempt or two."""
        if self._lost is not None:
            return
        with self._writing:
            try:
                self.check()
                self._write(self._state)
            except (StorageError, LockLostError) as error:
                logger.warning("The lease on %s was not renewed: %s", self._output_uri, error)

    def update(self, state: dict[str, Any]) -> None:
        copy = json.loads(json.dumps(state, allow_nan=False))  # renewals write it again
        with self._writing:
            self.check()
            self._write(copy)

    def check(self) -> None:
        # Not under the mutex: a renewal holds it for as long as the service does not answer.
        if self._lost is None and time.monotonic() - self._renewed_s > LEASE_LIFE_S:
            self._lose(f"It could not renew its lease for {LEASE_LIFE_S:.0f} s.")
        if self._lost is not None:
            raise self._lost

    def release(self) -> None:
        """Let the next run begin at once; of a lease that was taken over nothing is written."""
        with self._writing:
            try:
                self._write(self._state, released=True)
            except StorageError as error:
                logger.warning(
                    "%s was not given back, so it is held for %.0f s more: %s",
                    *(self._output_uri, LEASE_LIFE_S, error),
                )
            except LockLostError:
                pass
            self._lost = _report_released(self._output_uri)

    def _write(self, state: dict[str, Any], *, released: bool = False) -> None:
        """Replace what this lease has written last; the caller holds the mutex."""
        for _ in range(MAX_ATTEMPTS):
            if self._put(state, self._version, released=released):
                return
            found, version = self._read()
            if found.get("id") != self._holder["id"]:
                who = f"process {found.get('pid')} on {found.get('host')}"
                self._lose(f"It was taken over by {who}." if found else "Its lock was deleted.")
                break
            # A write of our own, whose answer never came: nobody else writes our id.
            self._version = version
        if self._lost is not None:
            raise self._lost
        raise StorageError(f"Cannot write '{self._uri}': another write is always under way.")

    def _put(
        self, state: dict[str, Any], version: "UpdateVersion | None", *, released: bool = False
    ) -> bool:
        """Write the lease if what is there has this version; tell whether it had."""
        self._number += 1  # S3 makes ETags of the content, so that no two may be alike
        started_s = time.monotonic()
        document = {
            **self._holder,
            "number": self._number,
            "renewed_unix_s": time.time(),
            "released": released,
            "state": state,
        }
        self._content = json.dumps(document, indent=2).encode()
        written = conditional.write_object(self._uri, self._content, version)
        if written is None:
            return False
        self._version, self._state, self._renewed_s = written, state, started_s
        return True

    def _read(self) -> "tuple[dict[str, Any], UpdateVersion | None]":
        """Read the lease, {} where there is none, and its version."""
        try:
            content, version = conditional.read_object(self._uri)
        except FileNotFoundError:
            return {}, None
        try:
            found = dict(json.loads(content))
            found["renewed_unix_s"] = float(found["renewed_unix_s"])
        except (ValueError, TypeError, KeyError) as error:
            raise StorageError(
                f"'{self._uri}' is not a lock of brainray. If no run writes to "
                f"'{self._output_uri}', delete it."
            ) from error
        return found, version

    def _lose(self, why: str) -> None:
        self._lost = LockLostError(
            f"This run has lost '{self._output_uri}'. {why} What it has written is kept; run the "
            "same command again when no other run writes there."
        )


def _is_held(found: dict[str, Any]) -> bool:
    if not found or found.get("released"):
        return False
    return bool(time.time() - found["renewed_unix_s"] < LEASE_LIFE_S)
