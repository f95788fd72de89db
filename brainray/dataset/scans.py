"""Find the scans to classify: folders, globs, files, Parquet tables and lists, as a stream.

Nothing here opens an image, and nothing waits for a listing to end: the first scan of a
million is known at once. Every visible file is a scan until its bytes say otherwise, whatever
its name, so that whatever lies in an inbox gets an answer.
"""

import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain

import pyarrow as pa
import pyarrow.parquet as pq
from wcmatch import glob

from brainray import storage
from brainray.dataset.scan import read_scan
from brainray.dataset.source import is_hidden
from brainray.errors import DataError, RejectedImage, StorageError

TABLE_SUFFIX = ".parquet"
LIST_SUFFIXES = (".txt", ".csv")
LIST_COLUMNS = ("scan_uri", "uri", "path")
"""Columns of a CSV list that may hold the places, the first one found counts; else its first."""

CHUNK_ROWS = 128
"""Scans of one task: seconds of work for a CPU, a tenth of a second for a GPU."""
FIRST_CHUNK_ROWS = 16
"""The first chunks are small, so that every stage has something to do at once."""
CHUNK_BYTES = 64 * 2**20
"""A chunk of large files is cut short at this many encoded bytes."""

_WILD = re.compile(r"[*?\\[]")
_GLOB_FLAGS = glob.GLOBSTAR | glob.DOTGLOB | glob.FORCEUNIX

SCAN_SCHEMA = pa.schema(
    [
        ("scan_uri", pa.string()),  # unique name of the scan
        ("uri", pa.string()),  # file that holds the bytes
        ("row_group", pa.int32()),  # of a Parquet file; -1 for a file
        ("row", pa.int64()),  # within the row group; -1 for a file
        ("size_bytes", pa.int64()),  # of the file; -1 where it is not known
        ("modified_ns", pa.int64()),  # of the file; 0 where it is not known
        ("reason", pa.string()),  # why it is rejected unopened; else null
    ]
)


@dataclass(frozen=True, slots=True)
class FoundScan:
    """One scan of an inbox; fields as in :data:`SCAN_SCHEMA`."""

    scan_uri: str
    uri: str
    row_group: int = -1
    row: int = -1
    size_bytes: int = -1
    modified_ns: int = 0
    reason: str | None = None
    weight_bytes: int = 0
    """What reading it is expected to bring."""


def list_scans(
    scans_uris: Sequence[str],
    *,
    leave_out: Sequence[str] = (),
    hidden: Callable[[], object] = lambda: None,
) -> Iterator[FoundScan]:
    """Yield every scan of some places, each once, while they are still being listed.

    Parameters
    ----------
    scans_uris : sequence of str
        Folders (all that lies below them), globs (``**`` for any depth), single files, Parquet
        tables with a column ``image_bytes``, and ``.txt`` or ``.csv`` lists of places; local,
        s3:// or gs://. A place in a list that is not absolute counts from the list's folder.
    leave_out : sequence of str
        Folders whose files are no scans: the job's own output.
    hidden : callable
        Called for every hidden file passed over.

    Raises
    ------
    DataError
        A given place is not there, or a table lacks ``image_bytes``.
    """
    prefixes = tuple(storage.make_absolute(uri) + "/" for uri in leave_out)
    several = len(scans_uris) > 1 or scans_uris[0].lower().endswith(LIST_SUFFIXES)
    seen: set[str] = set()
    for scan in chain.from_iterable(_list_place(uri, hidden) for uri in scans_uris):
        if prefixes and scan.uri.startswith(prefixes):
            continue
        if several:
            if scan.scan_uri in seen:
                continue
            seen.add(scan.scan_uri)
        yield scan


def _list_place(scans_uri: str, hidden: Callable[[], object]) -> Iterator[FoundScan]:
    place = storage.make_absolute(scans_uri)
    if storage.is_folder(place):
        return _list_folder(place, place, None, hidden)
    found = storage.find_file(place)
    if found is None:
        if _WILD.search(scans_uri):
            return _list_glob(place, hidden)
        raise DataError(
            f"No scans at '{scans_uri}': it is neither a folder nor a file. "
            "Check the path, or mount it."
        )
    if place.endswith(TABLE_SUFFIX):
        return _list_table(found)
    if place.lower().endswith(LIST_SUFFIXES):
        return _list_list(place)
    return iter([_as_scan(found)])


def _as_scan(file: storage.FoundFile) -> FoundScan:
    size = file.size_bytes
    return FoundScan(
        file.uri, file.uri, -1, -1, size, file.modified_ns, None, weight_bytes=max(0, size)
    )


def _list_folder(
    folder: str, root: str, pattern: str | None, hidden: Callable[[], object]
) -> Iterator[FoundScan]:
    """List a folder; with a pattern, the files whose path below ``root`` matches it."""
    unlistable: list[FoundScan] = []

    def on_error(uri: str, error: OSError) -> None:
        reason = "missing" if isinstance(error, FileNotFoundError) else "unreadable"
        unlistable.append(FoundScan(uri, uri, reason=reason))

    for file in storage.iterate_files(folder, on_error):
        if is_hidden(file.relative_path):
            hidden()
        elif pattern is not None and not glob.globmatch(
            file.uri.removeprefix(root).lstrip("/"), pattern, flags=_GLOB_FLAGS
        ):
            continue
        elif file.uri.endswith(TABLE_SUFFIX):
            yield from _list_found_table(file)
        else:
            yield _as_scan(file)
        yield from unlistable
        unlistable.clear()
    yield from unlistable


def _list_glob(place: str, hidden: Callable[[], object]) -> Iterator[FoundScan]:
    wild = _WILD.search(place)
    assert wild is not None
    root = place[: wild.start()].rpartition("/")[0] or "/"
    if not storage.is_folder(root):
        raise DataError(f"No scans at '{place}': there is no folder '{root}'. Check the path.")
    return _list_folder(root, root, place[len(root) :].lstrip("/"), hidden)


def _list_found_table(file: storage.FoundFile) -> Iterator[FoundScan]:
    """List a table that lay in a folder; what cannot be opened is one rejected scan."""
    try:
        yield from _list_table(file)
    except DataError:
        yield FoundScan(file.uri, file.uri, reason="unsupported")


def _list_table(file: storage.FoundFile) -> Iterator[FoundScan]:
    filesystem, path = storage.resolve(file.uri)
    try:
        with pq.ParquetFile(path, filesystem=filesystem) as parquet:
            metadata = parquet.metadata
            names = parquet.schema_arrow.names
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(
            f"Cannot read '{file.uri}' as Parquet: {storage.describe_error(error)}"
        ) from error
    if "image_bytes" not in names:
        raise DataError(
            f"Expected a column 'image_bytes' in '{file.uri}', found {', '.join(names)}."
        )
    number = 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        weight = metadata.row_group(group).total_byte_size // max(1, rows)
        for row in range(rows):
            yield FoundScan(
                f"{file.uri}#row={number}",
                file.uri,
                group,
                row,
                -1,
                file.modified_ns,
                None,
                weight_bytes=weight,
            )
            number += 1


def _list_list(place: str) -> Iterator[FoundScan]:
    try:
        text = storage.read_bytes(place).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"Expected UTF-8 text in the list '{place}': {error}") from error
    folder = place.rpartition("/")[0]
    for entry in _read_list(text, is_csv=place.lower().endswith(".csv")):
        is_absolute = "://" in entry or entry.startswith(("/", "~"))
        uri = storage.make_absolute(entry) if is_absolute else storage.join(folder, entry)
        yield FoundScan(uri, uri)


def _read_list(text: str, *, is_csv: bool) -> Iterator[str]:
    if not is_csv:
        yield from (line for line in text.splitlines() if line.strip())
        return
    rows = csv.reader(io.StringIO(text, newline=""))
    header = next(rows, [])
    named = [header.index(name) for name in LIST_COLUMNS if name in header]
    column = named[0] if named else 0
    for row in rows if named else chain([header], rows):
        if len(row) > column and row[column].strip():
            yield row[column]


def chunk_scans(scans: Iterable[FoundScan]) -> Iterator[pa.Table]:
    """Gather scans into tables of :data:`SCAN_SCHEMA`, each the work of one task.

    The first are small; after that a table holds :data:`CHUNK_ROWS` scans, or fewer when
    they are large.
    """
    rows: list[FoundScan] = []
    limit, weight = FIRST_CHUNK_ROWS, 0
    for scan in scans:
        rows.append(scan)
        weight += scan.weight_bytes
        if len(rows) >= limit or weight >= CHUNK_BYTES:
            yield _tabulate(rows)
            rows, weight, limit = [], 0, min(2 * limit, CHUNK_ROWS)
    if rows:
        yield _tabulate(rows)


def _tabulate(scans: Sequence[FoundScan]) -> pa.Table:
    return pa.Table.from_pylist([asdict(scan) for scan in scans], schema=SCAN_SCHEMA)


def read_named_scan(scan_uri: str) -> bytes:
    """Read a scan again by the name that :func:`list_scans` gave it.

    Raises
    ------
    RejectedImage
        It has vanished or cannot be read.
    """
    table, mark, number = scan_uri.rpartition("#row=")
    if not mark or not table.endswith(TABLE_SUFFIX):
        return read_scan(scan_uri, -1, -1)
    filesystem, path = storage.resolve(table)
    row = int(number)
    try:
        with pq.ParquetFile(path, filesystem=filesystem) as parquet:
            for group in range(parquet.metadata.num_row_groups):
                rows = parquet.metadata.row_group(group).num_rows
                if row < rows:
                    return read_scan(table, group, row)
                row -= rows
    except (OSError, StorageError) as error:
        raise RejectedImage("unreadable", str(error)) from error
    raise RejectedImage("missing", f"No row {number} in '{table}'.")
