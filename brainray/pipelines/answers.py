"""The answers of bulk runs: their table, and what is answered already.

::

    O/
      predictions/<classifier_id>-<run>-<number>.parquet   whole or absent
      .next/<classifier_id>/                               a set that will replace the others
      .replaced/<unix time>-…/                             replaced sets, for readers on their way
      .lock, .state.json                                   of the run that writes: io/lock.py

A row is the answer to one scan with one content; nothing is ever changed in place, so a run
that was killed has lost what it had not written, and the next one finds out which that is.
"""

import ctypes
import json
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import fs

from brainray import storage
from brainray.errors import StorageError
from brainray.model.explain import STRIDE_PX
from brainray.provenance import collect_versions, read_code_revision

ANSWERS_SCHEMA_VERSION = 2
"""2 added ``class_map``; files of 1 are read as if it were null."""
PREDICTIONS_FOLDER = "predictions"
NEXT_FOLDER = ".next"
REPLACED_FOLDER = ".replaced"
REPLACED_LIFE_S = 3600.0
"""What was replaced is deleted by the first run after this time: whoever was reading is done."""

STATUSES = ("classified", "abstained", "rejected")

_KEY = "S16"  # numpy's type of a key


def build_schema(classes: Sequence[str]) -> pa.Schema:
    """Build the schema of the answers for some classes."""
    return pa.schema(
        [
            pa.field("scan_uri", pa.string(), nullable=False),
            pa.field("content_sha256", pa.string()),  # null when no byte could be read
            pa.field("status", pa.string(), nullable=False),  # one of STATUSES
            pa.field("reason", pa.string()),  # a key of model.answer.REASONS; null when classified
            pa.field("predicted_class", pa.string()),  # null unless classified
            pa.field("confidence", pa.float32()),  # of the most probable class; null if rejected
            *(pa.field(f"prob_{name}", pa.float32()) for name in classes),
            pa.field("width_px", pa.int32()),
            pa.field("height_px", pa.int32()),
            pa.field("classifier_id", pa.string(), nullable=False),
            pa.field("classified_at", pa.timestamp("us", tz="UTC"), nullable=False),
            pa.field("size_bytes", pa.int64()),  # of the file; null where it was not known
            pa.field("modified_ns", pa.int64()),  # of the file, since 1970; null likewise
            # In logits, row by row; null unless it was asked for and the scan is classified.
            pa.field("class_map", pa.list_(pa.float32())),
        ]
    )


def describe_class_map(size_px: int) -> dict[str, int]:
    """Say how a class map lies over the network's square, as the files of answers do."""
    side = -(-size_px // STRIDE_PX)
    return {"height": side, "width": side, "stride_px": STRIDE_PX}


def key_of(*parts: object) -> bytes:
    """Return 16 bytes that stand for some values; 10**9 scans collide with odds of 1e-21."""
    joined = json.dumps(parts, ensure_ascii=True).encode()
    return blake2b(joined, digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class Ledger:
    """What is answered already, as sorted keys of 16 bytes; tasks share one copy."""

    files: NDArray[np.bytes_]
    """Of (scan_uri, size_bytes, modified_ns): the file is as it was and needs no reading."""
    contents: NDArray[np.bytes_]
    """Of (scan_uri, content_sha256), or of (scan_uri, reason) where nothing could be read."""

    @classmethod
    def of(cls, parts: Iterable[pa.Table]) -> "Ledger":
        """Collect the keys of some tables of answers, one table after the other.

        A key takes 16 bytes, the row that it stands for most of a kilobyte of Python's objects.
        A scan of which no byte could be read is never done with: it is tried again.
        """
        files, contents = [np.zeros(0, _KEY)], [np.zeros(0, _KEY)]
        for part in parts:
            uris = part["scan_uri"].to_pylist()
            hashes = part["content_sha256"].to_pylist()
            sizes, times = part["size_bytes"].to_pylist(), part["modified_ns"].to_pylist()
            reasons = part["reason"].to_pylist()
            of_files = [
                key_of(uri, size, modified)
                for uri, size, modified, reason in zip(uris, sizes, times, reasons, strict=True)
                if modified and reason not in ("missing", "unreadable")
            ]
            of_contents = [
                key_of(uri, found or reason)
                for uri, found, reason in zip(uris, hashes, reasons, strict=True)
            ]
            files.append(np.array(of_files, _KEY))
            contents.append(np.array(of_contents, _KEY))
        return cls(np.unique(np.concatenate(files)), np.unique(np.concatenate(contents)))

    def has_file(self, scan_uri: str, size_bytes: int, modified_ns: int) -> bool:
        """Tell whether this very file is answered, as its size and time say."""
        if not modified_ns:
            return False
        size = size_bytes if size_bytes >= 0 else None
        return _contains(self.files, key_of(scan_uri, size, modified_ns))

    def has_content(self, scan_uri: str, found: str | None) -> bool:
        """Tell whether the scan is answered with this content hash, or this reason."""
        return _contains(self.contents, key_of(scan_uri, found))


def _contains(keys: NDArray[np.bytes_], key: bytes) -> bool:
    wanted = np.array(key, _KEY)
    place = int(np.searchsorted(keys, wanted))
    return place < len(keys) and bool(keys[place] == wanted)


class AnswerSet:
    """The answers of one classifier below one output."""

    def __init__(self, output_uri: str, card: dict[str, Any], *, replace: bool) -> None:
        self.output_uri = output_uri
        self.classifier_id = str(card["classifier_id"])
        self.classes = tuple(card["classes"])
        self.published_uri = storage.join(output_uri, PREDICTIONS_FOLDER)
        self._next_uri = storage.join(output_uri, NEXT_FOLDER, self.classifier_id)
        others = [n for n in self._list(self.published_uri) if not self._is_ours(n)]
        self.replaces = replace and bool(others)
        """Whether the set is gathered out of sight, to take the place of what is there."""
        self.folder_uri = self._next_uri if self.replaces else self.published_uri
        self._run = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"
        self._number = 0
        self._about = {
            "schema_version": ANSWERS_SCHEMA_VERSION,
            "classifier_id": self.classifier_id,
            "weights_sha256": card["weights"]["sha256"],
            "preprocessing": card["preprocessing"],
            "class_map": describe_class_map(card["preprocessing"]["size_px"]),
            "versions": collect_versions(),
            "code_revision": read_code_revision(),
        }
        self.schema = build_schema(self.classes)
        self._sweep()

    def _sweep(self) -> None:
        """Set aside what a killed exchange left, and delete what was replaced long ago."""
        left = self._list(self._next_uri)
        if left and not any(map(self._is_ours, left)):
            self._set_aside()
        replaced = storage.join(self.output_uri, REPLACED_FOLDER)
        for name in storage.list_folders(replaced) if storage.is_folder(replaced) else ():
            if time.time() - float(name.partition("-")[0]) > REPLACED_LIFE_S:
                filesystem, path = storage.resolve(storage.join(replaced, name))
                filesystem.delete_dir(path)

    def _set_aside(self) -> None:
        """Move what lies where the next set was gathered: the set that it replaced."""
        name = f"{time.time():.0f}-{uuid.uuid4().hex[:6]}"
        filesystem, path = storage.resolve(self._next_uri)
        _, folder = storage.resolve(storage.join(self.output_uri, REPLACED_FOLDER))
        filesystem.create_dir(folder, recursive=True)
        filesystem.move(path, f"{folder}/{name}")
        filesystem.delete_dir(path.rpartition("/")[0])

    @staticmethod
    def _list(folder_uri: str) -> list[str]:
        if not storage.is_folder(folder_uri):
            return []
        names = [file.relative_path for file in storage.list_files(folder_uri)]
        return [n for n in names if n.endswith(".parquet") and not n.startswith(".")]

    def _is_ours(self, name: str) -> bool:
        return name.startswith(f"{self.classifier_id}-")

    def list_parts(self) -> list[str]:
        """Return the places of this set's files."""
        return [
            storage.join(self.folder_uri, name)
            for name in self._list(self.folder_uri)
            if self._is_ours(name)
        ]

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Read the set, or some columns of it.

        Raises
        ------
        StorageError
            A file of it is damaged, or cannot be read.
        """
        parts = list(self.iterate(columns))
        return pa.concat_tables(parts or [self._choose(columns).empty_table()])

    def iterate(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Yield the set, or some columns of it, file by file.

        Raises
        ------
        StorageError
            A file of it is damaged, or cannot be read.
        """
        schema = self._choose(columns)
        for uri in self.list_parts():
            try:
                content = pa.BufferReader(storage.read_bytes(uri))
                # With a schema, a column that an older file lacks is null.
                part = pq.read_table(content, schema=schema)
            except (OSError, pa.ArrowInvalid) as error:
                raise StorageError(
                    f"'{uri}' is damaged: {error}. Delete it; its scans are classified again."
                ) from error
            yield part

    def _choose(self, columns: Sequence[str] | None) -> pa.Schema:
        if columns is None:
            return self.schema
        return pa.schema([self.schema.field(name) for name in columns])

    def read_ledger(self) -> Ledger:
        """Find out what is answered already."""
        columns = ["scan_uri", "content_sha256", "size_bytes", "modified_ns", "reason"]
        return Ledger.of(self.iterate(columns))

    def write(self, answers: pa.Table, runtime: dict[str, str]) -> None:
        """Write some answers as one file, whole or not at all, and what computed them.

        ``answers`` has the columns of the schema but for ``classifier_id``.
        """
        name = f"{self.classifier_id}-{self._run}-{self._number:06d}.parquet"
        about = json.dumps(self._about | {"runtime": runtime})
        ids = pa.array([self.classifier_id] * answers.num_rows, pa.string())
        table = answers.append_column("classifier_id", ids).select(self.schema.names)
        table = table.cast(self.schema).replace_schema_metadata({"brainray": about})
        storage.write_table(storage.join(self.folder_uri, name), table)
        self._number += 1

    def publish(self) -> None:
        """Put a gathered set in the place of the others; a reader sees the old or the new.

        On a local disk the two folders change places in one step. On an object store nothing
        can do that: the new files are copied under their final names, then the old ones are
        deleted; a reader that asks for ``predictions/<classifier_id>-*`` sees no mixture.
        """
        if not self.replaces:
            return
        filesystem, published = storage.resolve(self.published_uri)
        _, gathered = storage.resolve(self._next_uri)
        if isinstance(filesystem, fs.LocalFileSystem):
            _exchange(Path(gathered), Path(published))
            self._set_aside()
        else:
            old = [n for n in self._list(self.published_uri) if not self._is_ours(n)]
            for name in self._list(self._next_uri):
                filesystem.copy_file(f"{gathered}/{name}", f"{published}/{name}")
            for name in old:
                filesystem.delete_file(f"{published}/{name}")
            filesystem.delete_dir(gathered)
        self.replaces, self.folder_uri = False, self.published_uri


_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # fcntl.h, linux/fs.h


def _exchange(new: Path, old: Path) -> None:
    """Let two folders change places in one step; where the system cannot, in two."""
    new.mkdir(parents=True, exist_ok=True)
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # Linux, glibc 2.28
    if rename is not None:
        places = (_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old))
        if rename(*places, _RENAME_EXCHANGE) == 0:
            return
    aside = old.with_name(f".{old.name}-{uuid.uuid4().hex}")
    old.rename(aside)
    new.rename(old)
    aside.rename(new)
