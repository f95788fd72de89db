"""Locks: one run at a time writes below an output, and leaves its state for the next run.

::

    OUT/
      .lock         the holder; on an object store also the state and the time of renewal
      .state.json   the state, on a local disk

On a local disk the operating system locks a file, and releases it when the process ends.

On an object store ``.lock`` is a lease. Its holder renews it every LEASE_RENEWAL_S; after
LEASE_LIFE_S without renewal another run may take it over. The object is never deleted, and every
write names the version that it replaces (``If-Match``, or ``If-None-Match`` for the first). So a
new holder always has the last state, and no late write of a former holder succeeds.

A run that wants the lease compares its own clock with the time that the holder wrote. If clocks
differ, leases expire earlier or later, and a live run may lose its output; the guarantees above
still hold.
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
from typing import IO, TYPE_CHECKING, Any

from pyarrow import fs

from brainray.errors import ConfigError, LockLostError, StorageError
from brainray.io import conditional, storage
from brainray.io.repeat import repeat

if TYPE_CHECKING:
    from obstore import UpdateVersion

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
STATE_FILE = ".state.json"

LEASE_RENEWAL_S = 10.0
LEASE_LIFE_S = 60.0
"""After so long without renewal a lease may be taken over; its holder considers it lost."""

MAX_ATTEMPTS = 5
"""Attempts at a write that finds another version; each reads the lease again."""


class OutputLock(ABC):
    """The right to write below an output."""

    def __init__(self, output_uri: str) -> None:
        self._output_uri = output_uri
        self._state: dict[str, Any] = {}

    @property
    def state(self) -> dict[str, Any]:
        """A copy of the state: the previous holder's until the first update, or {}."""
        return dict(json.loads(json.dumps(self._state)))

    @abstractmethod
    def update(self, state: dict[str, Any]) -> None:
        """Replace the state, JSON without NaN, which the next holder reads.

        Raises
        ------
        LockLostError
            Another run holds the output. The state is not changed.
        StorageError
            The state cannot be written. If the service did not respond, it may be replaced
            nevertheless. The lock is still held.
        """

    @abstractmethod
    def check(self) -> None:
        """Raise LockLostError if the lock is known to be lost; sends no request."""

    def _report_released(self) -> LockLostError:
        return LockLostError(f"This run has released '{self._output_uri}'.")


@contextmanager
def hold_output(output_uri: str) -> Iterator[OutputLock]:
    """Hold the lock of an output.

    Raises
    ------
    ConfigError
        Another run holds the lock.
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
        conditional.check_conditional_writes(lease.uri, lease.content)
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
    except OSError as error:  # such as the file of another user
        raise StorageError(f"Cannot open '{path}': {error}") from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            text = stream.read()
            raise _refuse(output_uri, json.loads(text) if text else {}) from None
        except OSError as error:  # a network file system without locks
            raise StorageError(f"Cannot lock '{path}': {error}") from error
        stream.truncate(0)
        stream.write(json.dumps(holder))
        stream.flush()
        yield _FileLock(output_uri, path.with_name(STATE_FILE), stream)


class _FileLock(OutputLock):
    """A file locked by the operating system."""

    def __init__(self, output_uri: str, path: Path, stream: IO[str]) -> None:
        super().__init__(output_uri)
        self._stream = stream
        self._path = path
        if path.exists():
            self._state = dict(storage.read_json(str(path)))

    def update(self, state: dict[str, Any]) -> None:
        self.check()
        storage.write_json(str(self._path), state)
        self._state = json.loads(json.dumps(state))

    def check(self) -> None:
        if self._stream.closed:
            raise self._report_released()


class _Lease(OutputLock):
    """A lease on an object store."""

    def __init__(self, output_uri: str, holder: dict[str, Any]) -> None:
        super().__init__(output_uri)
        self.uri = storage.join(output_uri, LOCK_FILE)
        self._holder = holder
        self._number = 0
        self._writing = threading.Lock()
        self._version: UpdateVersion | None = None
        self.content = b""
        self._renewed_s = 0.0
        self._lost: LockLostError | None = None

    def acquire(self) -> None:
        """Create the lease, or take it over if it has expired or was released."""
        for _ in range(MAX_ATTEMPTS):
            found, version = self._read()
            is_fresh = found and time.time() - found["renewed_unix_s"] < LEASE_LIFE_S
            if is_fresh and not found.get("released"):
                break
            if self._put(found.get("state", {}), version):
                if found and not found.get("released"):
                    logger.warning(
                        "Taking over %s from process %s on %s, which did not renew its lease.",
                        *(self._output_uri, found.get("pid"), found.get("host")),
                    )
                return
        raise _refuse(self._output_uri, found)

    def renew(self) -> None:
        """Write the lease again; a failure leaves time for further attempts."""
        if self._lost is not None:
            return
        with self._writing:
            try:
                self.check()
                self._write(self._state)
            except (StorageError, LockLostError) as error:
                logger.warning("The lease on %s was not renewed: %s", self._output_uri, error)

    def update(self, state: dict[str, Any]) -> None:
        copy = json.loads(json.dumps(state, allow_nan=False))  # renewals write it too
        with self._writing:
            self.check()
            self._write(copy)

    def check(self) -> None:
        # Without the mutex, which a renewal holds until the service responds.
        if self._lost is None and time.monotonic() - self._renewed_s > LEASE_LIFE_S:
            self._lose(f"It could not renew its lease for {LEASE_LIFE_S:.0f} s.")
        if self._lost is not None:
            raise self._lost

    def release(self) -> None:
        """Let the next run start at once, unless another run took the lease over."""
        with self._writing:
            try:
                self._write(self._state, released=True)
            except StorageError as error:
                logger.warning(
                    "%s was not released; it stays locked for another %.0f s: %s",
                    *(self._output_uri, LEASE_LIFE_S, error),
                )
            except LockLostError:
                pass
            self._lost = self._report_released()

    def _write(self, state: dict[str, Any], *, released: bool = False) -> None:
        """Replace the last version of this holder; the caller holds the mutex."""
        for _ in range(MAX_ATTEMPTS):
            if self._put(state, self._version, released=released):
                return
            found, version = self._read()
            if found.get("id") != self._holder["id"]:
                who = f"process {found.get('pid')} on {found.get('host')}"
                self._lose(f"It was taken over by {who}." if found else "Its lock was deleted.")
                break
            # Our own write, whose response was lost: no other process writes our id.
            self._version = version
        if self._lost is not None:
            raise self._lost
        raise StorageError(f"Cannot write '{self.uri}': other writes conflict.")

    def _put(
        self, state: dict[str, Any], version: "UpdateVersion | None", *, released: bool = False
    ) -> bool:
        """Write the lease if it has this version; return whether it had."""
        self._number += 1  # ETags of S3 depend on the content, which must therefore differ
        started_s = time.monotonic()
        document = {
            **self._holder,
            "number": self._number,
            "renewed_unix_s": time.time(),
            "released": released,
            "state": state,
        }
        self.content = json.dumps(document, indent=2).encode()
        written = conditional.write_object(self.uri, self.content, version)
        if written is None:
            return False
        self._version, self._state, self._renewed_s = written, state, started_s
        return True

    def _read(self) -> "tuple[dict[str, Any], UpdateVersion | None]":
        """Read the lease, {} if there is none, and its version."""
        try:
            content, version = conditional.read_object(self.uri)
        except FileNotFoundError:
            return {}, None
        try:
            found = dict(json.loads(content))
            found["renewed_unix_s"] = float(found["renewed_unix_s"])
        except (ValueError, TypeError, KeyError) as error:
            raise StorageError(
                f"'{self.uri}' is not a lock of brainray. If no run writes to "
                f"'{self._output_uri}', delete it."
            ) from error
        return found, version

    def _lose(self, why: str) -> None:
        self._lost = LockLostError(
            f"This run has lost '{self._output_uri}'. {why} Its output is kept; give the same "
            "command again when no other run writes there."
        )
