"""List the scans to classify: folders, globs, files, Parquet tables and lists of URIs.

Nothing here opens an image. Every visible file counts as a scan, whatever its name, so that every
file gets a row. Each :class:`ScanSource` is listed by one task for a bounded time. The task returns
the sources that are left.
"""

import csv
import io
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
from wcmatch import glob

from brainray.data.labelled import is_hidden, make_absolute_below
from brainray.data.read import TABLE_SUFFIX, open_table
from brainray.errors import DataError, DicomWebError, RejectedImage
from brainray.io import storage

LIST_SUFFIXES = (".txt", ".csv")
LIST_COLUMNS = ("scan_uri", "uri", "path")
"""Columns of a CSV list with the URIs; the first found is used, or else the first column."""

MAX_ROWS_PER_TASK = 200_000
"""A task that has listed as many scans returns the rest."""

UNCHANGED_NS = 0
"""The time of every instance in a PACS, which tells none: what is answered is not fetched again. A
change gives an instance a new UID (PS3.3, C.12.1.1)."""

MAX_INDEX_BYTES = 64 * 2**20
"""Longest DICOMDIR that is read."""

_WILD = re.compile(r"[*?\\[]")
_GLOB_FLAGS = glob.GLOBSTAR | glob.DOTGLOB | glob.FORCEUNIX

LISTING_SCHEMA = pa.schema(
    [
        ("scan_uri", pa.string()),  # unique name of the scan
        ("uri", pa.string()),  # file with the bytes
        ("row_group", pa.int32()),  # of a Parquet file; -1 for a file
        ("row", pa.int64()),  # within the row group; -1 for a file
        ("size_bytes", pa.int64()),  # of the file; null if unknown
        ("modified_ns", pa.int64()),  # of the file; null if unknown
        ("reason", pa.string()),  # of a rejection without opening; else null
    ]
)


@dataclass(frozen=True, slots=True)
class ScanSource:
    """One `--scans-uri`, or a part of it."""

    kind: Literal["folder", "file", "table", "list", "index", "dicomweb"]
    """An index is a DICOMDIR, the list of the files of a medium; "dicomweb" is in a PACS."""
    uri: str
    root: str = ""
    """Of a folder: the given folder; globs and hidden names refer to paths below it."""
    pattern: str | None = None
    """Of a folder: the glob that paths below ``root`` must match."""
    first_row_group: int = 0
    """Of a table."""
    row_offset: int = 0
    """Of a table: rows before the first row group."""
    is_given: bool = True
    """Of a table or what is in a PACS: whether it was named. What was found instead, and cannot be
    listed, is one rejected scan."""


@dataclass(frozen=True, slots=True)
class Listing:
    """Result of one task."""

    scans: pa.Table
    """Rows of :data:`LISTING_SCHEMA`."""
    rest: tuple[ScanSource, ...] = ()
    """Sources that are left."""
    num_hidden: int = 0
    """Hidden files and folders skipped."""
    num_indices: int = 0
    """DICOMDIR files skipped in folders, whose files are listed anyway."""


def find_sources(scans_uris: Sequence[str]) -> list[ScanSource]:
    """Determine the kind of each `--scans-uri`.

    They are folders (everything below them), globs (``**`` for any depth), single files, Parquet
    tables with a column ``image_bytes``, a DICOMDIR for the files that it references, and ``.txt``
    or ``.csv`` lists of URIs; local, s3:// or gs://. Or scans in a PACS, as
    :func:`brainray.io.dicomweb.parse_uri` has them.

    Raises
    ------
    ConfigError
        The address of scans in a PACS is malformed.
    DataError
        One does not exist.
    StorageError
        One cannot be accessed.
    """
    return [_find_source(uri) for uri in scans_uris]


def _find_source(scans_uri: str) -> ScanSource:
    if storage.is_dicomweb(scans_uri):
        from brainray.io.dicomweb import parse_uri  # files do without its libraries

        return ScanSource("dicomweb", parse_uri(scans_uri).to_uri())
    uri = storage.make_absolute(scans_uri)
    if storage.is_folder(uri):
        return ScanSource("folder", uri, uri)
    if storage.find_file(uri) is not None:
        if uri.endswith(TABLE_SUFFIX):
            return ScanSource("table", uri)
        if _is_index(uri):
            return ScanSource("index", uri)
        return ScanSource("list" if uri.lower().endswith(LIST_SUFFIXES) else "file", uri)
    wild = _WILD.search(uri)
    if wild is None or not _WILD.search(scans_uri):
        raise DataError(
            f"No scans at '{scans_uri}': it is neither a folder nor a file. "
            "Check the path, or mount it."
        )
    root = uri[: wild.start()].rpartition("/")[0] or "/"
    if not storage.is_folder(root):
        raise DataError(f"No scans at '{uri}': there is no folder '{root}'. Check the path.")
    return ScanSource("folder", root, root, uri[len(root) :].lstrip("/"))


def _is_index(uri: str) -> bool:
    return storage.get_name(uri).upper() == "DICOMDIR"


Row = tuple[str, str, int, int, int | None, int | None, str | None]
"""A row of :data:`LISTING_SCHEMA`."""


def _describe_file(
    uri: str,
    size_bytes: int | None = None,
    modified_ns: int | None = None,
    reason: str | None = None,
) -> Row:
    return (uri, uri, -1, -1, size_bytes, modified_ns, reason)


def _describe_found(file: storage.FoundFile) -> Row:
    size = file.size_bytes if file.size_bytes >= 0 else None
    return _describe_file(file.uri, size, file.modified_ns or None)


def _build_listing(rows: Sequence[Row], rest: Sequence[ScanSource] = (), **skipped: int) -> Listing:
    columns: list[Sequence[object]] = list(zip(*rows, strict=True))
    columns = columns or [()] * len(LISTING_SCHEMA)
    return Listing(pa.table(columns, LISTING_SCHEMA), tuple(rest), **skipped)


def list_source(
    source: ScanSource, *, leave_out: Sequence[str] = (), max_seconds: float = float("inf")
) -> Listing:
    """List a source, up to a time and :data:`MAX_ROWS_PER_TASK`; the others are its ``rest``.

    ``leave_out`` are folders to exclude: the job's own output.

    Raises
    ------
    DataError
        A table that was named lacks ``image_bytes``, or cannot be read; a list is not UTF-8, or
        names scans in a PACS; a DICOMDIR is damaged.
    DicomWebError
        A PACS that was named does not answer, or refuses.
    """
    if source.kind == "folder":
        return _list_folder(source, leave_out, time.monotonic() + max_seconds)
    if source.kind == "dicomweb":
        return _list_dicomweb(source)
    if source.kind == "list":
        return _build_listing([_describe_file(uri) for uri in _read_list(source.uri)])
    if source.kind == "index":
        return _build_listing([_describe_referenced(uri) for uri in _read_index(source.uri)])
    file = storage.find_file(source.uri)
    if file is None:  # deleted since
        return _build_listing([_describe_file(source.uri, reason="missing")])
    if source.kind == "file":
        return _build_listing([_describe_found(file)])
    return _list_table(source, file)


def _list_folder(source: ScanSource, leave_out: Sequence[str], deadline: float) -> Listing:
    omitted = tuple(storage.make_absolute(uri) + "/" for uri in leave_out)
    rows: list[Row] = []
    num_hidden = num_indices = 0
    waiting, tables = [source.uri], []
    while waiting:
        folder = waiting.pop()
        try:
            files, folders = storage.list_folder(folder, source.root)
        except OSError as error:
            files, folders = [], []
            if is_hidden(_name_below(folder, source.root)):
                num_hidden += 1
            else:
                reason = "missing" if isinstance(error, FileNotFoundError) else "unreadable"
                rows.append(_describe_file(folder, reason=reason))
        waiting += [name for name in reversed(folders) if not f"{name}/".startswith(omitted)]
        for file in files:
            if file.uri.startswith(omitted):
                continue
            if is_hidden(file.relative_path):
                num_hidden += 1
            elif source.pattern and not _matches(file, source.root, source.pattern):
                continue
            elif _is_index(file.uri):
                num_indices += 1
            elif file.uri.endswith(TABLE_SUFFIX):
                tables.append(ScanSource("table", file.uri, is_given=False))
            else:
                rows.append(_describe_found(file))
        if len(rows) >= MAX_ROWS_PER_TASK or time.monotonic() >= deadline:
            break
    rest = [replace(source, uri=folder) for folder in waiting]
    skipped = {"num_hidden": num_hidden, "num_indices": num_indices}
    return _build_listing(rows, (*rest, *tables), **skipped)


def _list_dicomweb(source: ScanSource) -> Listing:
    """List the instances of a study or series; of a search its studies, each another source."""
    from brainray.io.dicomweb import list_resources

    try:
        found = list_resources(source.uri)
    except DicomWebError:
        if source.is_given:
            raise
        return _build_listing([_describe_file(source.uri, reason="unreadable")])
    rows = [_describe_file(uri, modified_ns=UNCHANGED_NS) for uri in found.instances]
    studies = [ScanSource("dicomweb", uri, is_given=False) for uri in found.studies]
    return _build_listing(rows, studies)


def _matches(file: storage.FoundFile, root: str, pattern: str) -> bool:
    """Return whether a file's path, plain or encoded as in its URI, matches."""
    names = {file.relative_path, _name_below(file.uri, root)}
    return any(glob.globmatch(name, pattern, flags=_GLOB_FLAGS) for name in names)


def _name_below(uri: str, root: str) -> str:
    return uri.removeprefix(root).lstrip("/")


def _list_table(source: ScanSource, file: storage.FoundFile) -> Listing:
    """List a table's rows. A table without scans in a folder is listed as one rejected scan."""
    try:
        metadata = _read_table_metadata(file.uri)
    except DataError:
        if source.is_given:
            raise
        return _build_listing([_describe_file(file.uri, reason="unsupported")])
    uri, modified_ns, offset = file.uri, file.modified_ns or None, source.row_offset
    rows: list[Row] = []
    for group in range(source.first_row_group, metadata.num_row_groups):
        if len(rows) >= MAX_ROWS_PER_TASK:
            rest = replace(source, first_row_group=group, row_offset=offset)
            return _build_listing(rows, [rest])
        for row in range(metadata.row_group(group).num_rows):
            rows.append((f"{uri}#row={offset + row}", uri, group, row, None, modified_ns, None))
        offset += metadata.row_group(group).num_rows
    return _build_listing(rows)


def _read_table_metadata(uri: str) -> pq.FileMetaData:
    with open_table(uri) as parquet:
        names = parquet.schema_arrow.names
        if "image_bytes" not in names:
            raise DataError(
                f"Expected a column 'image_bytes' in '{uri}', found {', '.join(names)}."
            )
        return parquet.metadata


def _read_list(list_uri: str) -> Iterator[str]:
    """Yield the URIs of a list; relative ones are below the list's folder."""
    try:
        text = storage.read_bytes(list_uri).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"Expected UTF-8 text in the list '{list_uri}': {error}") from error
    folder = list_uri.rpartition("/")[0]
    for entry in _read_entries(text, is_csv=list_uri.lower().endswith(".csv")):
        if storage.is_dicomweb(entry):
            raise DataError(
                f"The list '{list_uri}' names scans in a PACS. Give their address as --scans-uri."
            )
        yield make_absolute_below(folder, entry)


def _read_index(index_uri: str) -> list[str]:
    """Return the URIs of the files that a DICOMDIR references."""
    from brainray.images.dicom_file import list_references  # imports pydicom

    try:
        references = list_references(storage.read_bytes(index_uri, max_bytes=MAX_INDEX_BYTES))
    except FileNotFoundError:
        reason = "It does not exist any more."
    except RejectedImage as rejection:
        reason = rejection.message
    else:
        # Some systems mount a medium with all names in lower case.
        is_lower = storage.get_name(index_uri).islower()
        folder = index_uri.rpartition("/")[0]
        return [
            storage.join(folder, *(part.lower() if is_lower else part for part in parts))
            for parts in references
        ]
    # Not within the except block: an error in the file may hold identifiers of a patient.
    raise DataError(f"Cannot read the DICOMDIR at '{index_uri}': {reason} Give its folder instead.")


def _describe_referenced(uri: str) -> Row:
    """Describe a file of an index; size and time only if local: an object store takes a request."""
    if "://" in uri:
        return _describe_file(uri)
    file = storage.find_file(uri)
    return _describe_found(file) if file else _describe_file(uri, reason="missing")


def _read_entries(text: str, *, is_csv: bool) -> Iterator[str]:
    if not is_csv:
        yield from (line for line in text.splitlines() if line.strip())
        return
    rows = csv.reader(io.StringIO(text, newline=""))
    header = next(rows, [])
    named = [header.index(name) for name in LIST_COLUMNS if name in header]
    column = named[0] if named else 0
    for row in rows if named else [header, *rows]:
        if len(row) > column and row[column].strip():
            yield row[column]


def list_scans(scans_uris: Sequence[str], *, leave_out: Sequence[str] = ()) -> pa.Table:
    """List a few thousand scans in this process, as rows of :data:`LISTING_SCHEMA`.

    A scan that is given twice has two rows.
    """
    waiting = find_sources(scans_uris)[::-1]
    tables = [LISTING_SCHEMA.empty_table()]
    while waiting:
        listing = list_source(waiting.pop(), leave_out=leave_out)
        tables.append(listing.scans)
        waiting += listing.rest[::-1]
    return pa.concat_tables(tables)
