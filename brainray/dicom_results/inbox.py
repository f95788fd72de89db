"""The folder that a receiver fills, and that a bulk job takes finished studies from.

::

    INBOX/
      <study>/<round>/<object>.dcm     finished: what `brainray classify --scans-uri INBOX` reads
      .receiving/<study>/<object>.dcm  still arriving; bulk jobs skip hidden folders
      .receiving/.partial/             being written
      .identifier-key                  key of the hashes that <study> and <object> are

A file is written under another name and synchronised with the disk before it gets its own. A study
is finished when nothing has come for a while; its folder is then moved, in one step, and that is
the mark of it: nobody sees a part of it. What comes later of the same study is its next round. All
of that is on the disk, and nothing in memory, so a receiver may be killed at any time.
"""

import fcntl
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from brainray.errors import ConfigError, StorageError
from brainray.images.dicom import hash_identifier
from brainray.io.identifiers import open_identifiers
from brainray.io.storage import write_partial

RECEIVING_FOLDER, PARTIAL_FOLDER = ".receiving", ".partial"
LOCK_FILE = ".receiver.lock"
FOLDER_MODE, FILE_MODE = 0o750, 0o640


@contextmanager
def open_inbox(
    path: Path, key_uri: str | None, *, quiet_s: float, min_free_bytes: int
) -> Iterator["Inbox"]:
    """Open an inbox on a local disk for one receiver alone, making it where it is not there.

    Without a file with the key of the names, the inbox has a random one of its own. Raises
    UserError if another receiver has it, its names have another key, or it cannot be written.
    """
    with ExitStack() as opened:
        try:
            path.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
            lock = opened.enter_context((path / LOCK_FILE).open("a"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            inbox = Inbox(path, open_identifiers(str(path), key_uri).key, quiet_s, min_free_bytes)
        except BlockingIOError:
            raise ConfigError(
                f"Another receiver is writing to the inbox '{path}'. Stop it, or give another "
                "--inbox-path."
            ) from None
        except OSError as error:
            raise StorageError(f"Cannot write to the inbox '{path}': {error.strerror}.") from error
        yield inbox


class Inbox:
    """Stores objects, each once; threads may share it."""

    def __init__(self, path: Path, key: bytes, quiet_s: float, min_free_bytes: int) -> None:
        self._path, self._key = path, key
        self._quiet_s, self._min_free_bytes = quiet_s, min_free_bytes
        """Time without a new object after which a study is finished; disk space that is left."""
        self._receiving = path / RECEIVING_FOLDER
        self._partial = self._receiving / PARTIAL_FOLDER
        self._moving = threading.Lock()
        """Held while a file or a study gets its name."""
        shutil.rmtree(self._partial, ignore_errors=True)  # of a receiver that was killed
        _make_folder(self._receiving)
        _make_folder(self._partial)

    def has_room_for(self, num_bytes: int) -> bool:
        """Tell whether the disk has as many bytes beyond those that are left free."""
        return shutil.disk_usage(self._path).free - num_bytes >= self._min_free_bytes

    def store(self, study_uid: str, sop_instance_uid: str, content: bytes) -> None:
        """Store a file, unless a finished round has the same; when this returns, it is on the disk.

        Of the UIDs only hashes are written. Of a file that raises OSError nothing is left.
        """
        study = hash_identifier(study_uid, self._key)
        name = f"{hash_identifier(sop_instance_uid, self._key)}.dcm"
        with write_partial(self._partial / name, content, FILE_MODE) as partial, self._moving:
            for file in (self._path / study).glob(f"*/{name}"):
                if file.stat().st_size == len(content) and file.read_bytes() == content:
                    return
            folder = self._receiving / study
            _make_folder(folder)
            partial.replace(folder / name)
            _synchronise(folder)

    def finish_quiet_studies(self) -> list[tuple[str, int]]:
        """Let bulk jobs see the studies that nothing has come of for a while.

        Returns the names of their rounds below the inbox, and the numbers of files. Raises OSError
        if one cannot be moved; the next call tries again.
        """
        finished = []
        for folder in sorted(self._receiving.iterdir()):
            if folder == self._partial or not folder.is_dir():
                continue
            with self._moving:
                # The time of a folder is that of the last file that came into it.
                age_s = time.time() - folder.stat().st_mtime
                num_files = sum(1 for _ in folder.iterdir())
                # A time in the future is one of a clock that was put back.
                if num_files and not 0 <= age_s < self._quiet_s:
                    finished.append((self._finish(folder), num_files))
        return finished

    def _finish(self, folder: Path) -> str:
        study = self._path / folder.name
        _make_folder(study)
        numbers = [int(one.name) for one in study.iterdir() if one.name.isdecimal()]
        target = study / f"{max(numbers, default=0) + 1:04d}"
        folder.rename(target)
        _synchronise(study)
        _synchronise(self._receiving)
        return str(target.relative_to(self._path))


def _make_folder(path: Path) -> None:
    """Make a folder below one that is there, so that it survives a loss of power."""
    if not path.is_dir():
        path.mkdir(mode=FOLDER_MODE, exist_ok=True)
        _synchronise(path.parent)


def _synchronise(folder: Path) -> None:
    """Write a folder's names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
