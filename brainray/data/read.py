"""Read a scan's encoded bytes from a file or a row of a Parquet table, and open its slices."""

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate

import pyarrow as pa
import pyarrow.parquet as pq

from brainray.errors import DataError, RejectedImage, StorageError
from brainray.images.slices import ReadOptions, ScanFile, find_slice, open_file, split_name
from brainray.io import storage

TABLE_SUFFIX = ".parquet"


@contextmanager
def open_table(uri: str) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file; a DataError if it cannot be read."""
    filesystem, path = storage.resolve(uri)
    try:
        with pq.ParquetFile(path, filesystem=filesystem) as parquet:
            yield parquet
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(
            f"Cannot read '{uri}' as Parquet: {storage.describe_error(error)}"
        ) from error


def read_scan(uri: str, row_group: int, row: int, *, max_bytes: int | None = None) -> bytes:
    """Read one scan's encoded bytes: a file, an instance in a PACS, or a row of a Parquet table.

    ``max_bytes`` is that of :func:`brainray.io.storage.read_bytes`.

    Raises
    ------
    RejectedImage
        ``missing`` or ``unreadable``.
    """
    if storage.is_dicomweb(uri):
        from brainray.io.dicomweb import read_instance  # files do without its libraries

        return read_instance(uri, max_bytes=max_bytes)
    try:
        if row_group < 0:
            return storage.read_bytes(uri, max_bytes=max_bytes)
        return bytes(_read_row_group(uri, row_group)[row].as_py() or b"")
    except FileNotFoundError as error:
        raise RejectedImage("missing", f"No file at '{uri}'.") from error
    except (StorageError, OSError) as error:
        raise RejectedImage("unreadable", storage.describe_error(error)) from error


def name_scan(uri: str, row_group: int, row: int) -> str:
    """Return the ``scan_uri`` of a file, or of a row of a Parquet table."""
    return uri if row_group < 0 else f"{uri}#row={_find_first_rows(uri)[row_group] + row}"


@lru_cache(maxsize=8)
def _find_first_rows(uri: str) -> list[int]:
    """Return the number of each row group's first row in a Parquet file; last, that of all rows."""
    filesystem, path = storage.resolve(uri)
    with pq.ParquetFile(path, filesystem=filesystem) as parquet:
        groups = range(parquet.num_row_groups)
        sizes = [parquet.metadata.row_group(group).num_rows for group in groups]
    return list(accumulate(sizes, initial=0))


@lru_cache(maxsize=8)
def _read_row_group(uri: str, row_group: int) -> pa.ChunkedArray:
    filesystem, path = storage.resolve(uri)
    with pq.ParquetFile(path, filesystem=filesystem) as parquet:
        return parquet.read_row_group(row_group, columns=["image_bytes"])["image_bytes"]


def open_named_slice(scan_uri: str, options: ReadOptions | None = None) -> tuple[ScanFile, int]:
    """Open a slice by its ``scan_uri``, a file or ``FILE#frame=N``; return file and index.

    Raises
    ------
    RejectedImage
        The file is gone, cannot be read, or has no such slice.
    """
    options = options or ReadOptions()
    file_uri, frame = split_name(scan_uri)
    try:
        content = read_named_scan(file_uri, max_bytes=options.limits.max_bytes)
    except RejectedImage as rejection:
        if frame is None or rejection.reason != "missing":
            raise
        # The name of a file may end like that of a slice.
        content, frame = read_named_scan(scan_uri, max_bytes=options.limits.max_bytes), None
    file = open_file(content, options)
    return file, find_slice(file, frame)


def read_named_scan(scan_uri: str, *, max_bytes: int | None = None) -> bytes:
    """Read a file or a row (``FILE#row=N``) by its ``scan_uri``.

    Raises
    ------
    RejectedImage
        The scan is gone, or cannot be read.
    """
    table, mark, number = scan_uri.rpartition("#row=")
    if not mark or not table.endswith(TABLE_SUFFIX):
        return read_scan(scan_uri, -1, -1, max_bytes=max_bytes)
    row = int(number)
    try:
        first_rows = _find_first_rows(table)
        if 0 <= row < first_rows[-1]:
            group = bisect_right(first_rows, row) - 1
            return read_scan(table, group, row - first_rows[group])
    except (OSError, StorageError) as error:
        raise RejectedImage("unreadable", str(error)) from error
    raise RejectedImage("missing", f"No row {number} in '{table}'.")


class SampleReader:
    """Opens the files of samples; keeps the last one, since slices of a file are neighbours."""

    def __init__(self, reading: ReadOptions, *, key: bytes | None = None) -> None:
        self._reading, self._key = reading, key
        self._location: tuple[str, int, int] | None = None
        self._content = b""
        self._file: ScanFile | None = None

    def read(self, uri: str, row_group: int, row: int, content: bytes | None = None) -> bytes:
        """Return a file's bytes: `content` if they are available, else by :func:`read_scan`."""
        if (uri, row_group, row) != self._location:
            if content is None:
                content = read_scan(uri, row_group, row)
            self._location, self._content, self._file = (uri, row_group, row), content, None
        return self._content

    def open(
        self, uri: str, row_group: int, row: int, frame: int, *, content: bytes | None = None
    ) -> tuple[ScanFile, int]:
        """Open a sample, of ``SAMPLE_SCHEMA``; return its file, and the index of its slice.

        Raises
        ------
        RejectedImage
            The file or its header cannot be read, or it has no such slice.
        """
        content = self.read(uri, row_group, row, content)
        if self._file is None:
            self._file = open_file(content, self._reading, key=self._key)
        return self._file, find_slice(self._file, None if frame < 0 else frame)


def open_rows(rows: pa.Table, reading: ReadOptions) -> Iterator[tuple[ScanFile, int]]:
    """Yield the file of each sample (:meth:`SampleReader.open`), and the index of its slice."""
    reader = SampleReader(reading)
    for row in rows.select(["uri", "row_group", "row", "frame"]).to_pylist():
        yield reader.open(**row)
