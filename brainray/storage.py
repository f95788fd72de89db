"""Places: the one room that knows whether a URI is a local folder, s3:// or gs://.

Everything speaks :mod:`pyarrow.fs`, as Ray does. Files are written whole or not at all: a
local file is written beside its final name and renamed, and an object store shows an
object only when its upload is complete.
"""

import json
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from brainray.errors import StorageError

REMOTE_SCHEMES = ("s3", "gs", "gcs")

_URI_CHARACTERS = "%/:?#[]@!$&'()*+,;=~"
"""What RFC 3986 allows in a URI beside letters, digits and ``-._``."""


@dataclass(frozen=True, slots=True)
class FoundFile:
    """One file of a listing."""

    uri: str
    """Absolute place of the file, in the form :func:`read_bytes` takes."""
    relative_path: str
    """Path below the listed folder, with forward slashes."""
    size_bytes: int


def resolve(uri: str) -> tuple[fs.FileSystem, str]:
    """Return the file system of a place and the path within it.

    Parameters
    ----------
    uri : str
        Local path (absolute or relative), ``file://``, ``s3://`` or ``gs://``.

    Raises
    ------
    StorageError
        A scheme that brainray does not read, or credentials that cannot be set up.
    """
    scheme = urlsplit(uri).scheme if "://" in uri else ""
    if scheme == "":
        return fs.LocalFileSystem(), str(Path(uri).expanduser().absolute())
    if scheme != "file" and scheme not in REMOTE_SCHEMES:
        raise StorageError(f"Expected a local path, s3:// or gs://, got '{uri}'.")
    try:
        filesystem, path = fs.FileSystem.from_uri(quote(uri, safe=_URI_CHARACTERS))
    except (OSError, ValueError) as error:
        raise StorageError(f"Cannot open '{uri}': {error}") from error
    return filesystem, path.rstrip("/") or "/"


def make_absolute(uri: str) -> str:
    """Return a URI that means the same from any working directory."""
    return uri.rstrip("/") if "://" in uri else str(Path(uri).expanduser().absolute())


def join(uri: str, *parts: str) -> str:
    """Return the place below another one; a URI keeps its query at its end."""
    if "://" in uri:
        place, mark, query = uri.partition("?")
        return "/".join([place.rstrip("/"), *map(quote, parts)]) + mark + query
    return "/".join([uri.rstrip("/") or "/", *parts]).replace("//", "/", int(uri == "/"))


def _explain(action: str, uri: str, error: Exception) -> StorageError:
    return StorageError(f"Cannot {action} '{uri}': {error}")


def exists(uri: str) -> bool:
    """Tell whether a file or a folder is there."""
    filesystem, path = resolve(uri)
    try:
        return bool(filesystem.get_file_info(path).type != fs.FileType.NotFound)
    except OSError as error:
        raise _explain("look at", uri, error) from error


def is_folder(uri: str) -> bool:
    """Tell whether a folder is there."""
    filesystem, path = resolve(uri)
    try:
        return bool(filesystem.get_file_info(path).type == fs.FileType.Directory)
    except OSError as error:
        raise _explain("look at", uri, error) from error


def list_files(uri: str) -> list[FoundFile]:
    """List the files below a folder, recursively, sorted by path.

    Hidden files are listed too; callers decide what to pass over.

    Raises
    ------
    StorageError
        The folder is missing, is a file, or may not be read.
    """
    filesystem, root = resolve(uri)
    base = make_absolute(uri)
    try:
        infos = filesystem.get_file_info(fs.FileSelector(root, recursive=True))
    except FileNotFoundError as error:
        raise StorageError(f"No folder at '{uri}'. Check the path, or mount it.") from error
    except (OSError, UnicodeError) as error:
        raise _explain("list", uri, error) from error
    prefix = root.rstrip("/") + "/"
    found = [
        FoundFile(join(base, relative), relative, int(info.size or 0))
        for info in infos
        if info.type == fs.FileType.File
        for relative in [info.path.removeprefix(prefix)]
    ]
    return sorted(found, key=lambda file: file.relative_path)


def list_folders(uri: str) -> list[str]:
    """List the names of the folders directly below a folder, sorted.

    Raises
    ------
    StorageError
        The folder is missing, is a file, or may not be read.
    """
    filesystem, root = resolve(uri)
    try:
        infos = filesystem.get_file_info(fs.FileSelector(root))
    except FileNotFoundError as error:
        raise StorageError(f"No folder at '{uri}'. Check the path, or mount it.") from error
    except OSError as error:
        raise _explain("list", uri, error) from error
    return sorted(info.base_name for info in infos if info.type == fs.FileType.Directory)


def read_bytes(uri: str) -> bytes:
    """Read one file whole.

    Raises
    ------
    FileNotFoundError
        Nothing is there: callers that hold one scan of many turn this into an answer.
    StorageError
        It is there and cannot be read.
    """
    filesystem, path = resolve(uri)
    try:
        with filesystem.open_input_file(path) as stream:
            return bytes(stream.readall())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _explain("read", uri, error) from error


def write_bytes(uri: str, content: bytes) -> None:
    """Write one file, whole or not at all, creating the folders above it.

    Raises
    ------
    StorageError
        The place cannot be written.
    """
    filesystem, path = resolve(uri)
    parent = path.rpartition("/")[0]
    try:
        if parent:
            filesystem.create_dir(parent, recursive=True)
        if isinstance(filesystem, fs.LocalFileSystem):
            _write_local(Path(path), content)
        else:
            with filesystem.open_output_stream(path) as stream:
                stream.write(content)
    except OSError as error:
        raise _explain("write", uri, error) from error


def _write_local(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_json(uri: str) -> Any:  # noqa: ANN401 - JSON is any of several types
    """Read a JSON document.

    Raises
    ------
    FileNotFoundError
        Nothing is there.
    StorageError
        It cannot be read, or is not JSON.
    """
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"'{uri}' is not a JSON document: {error}") from error


def write_json(uri: str, document: Any) -> None:  # noqa: ANN401 - JSON is any of several types
    """Write a JSON document, indented; NaN is refused."""
    text = json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False)
    write_bytes(uri, (text + "\n").encode())


def write_table(uri: str, table: pa.Table) -> None:
    """Write one Parquet file (zstd), whole or not at all."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_bytes(uri, sink.getvalue().to_pybytes())


def read_table(uri: str) -> pa.Table:
    """Read one Parquet file.

    Raises
    ------
    FileNotFoundError
        Nothing is there.
    StorageError
        It cannot be read, or is not Parquet.
    """
    content = read_bytes(uri)
    try:
        return pq.read_table(pa.BufferReader(content))
    except (OSError, pa.ArrowInvalid) as error:  # OSError: its ends are whole, its inside is not
        raise StorageError(f"'{uri}' is not a Parquet file: {error}") from error


def check_writable(uri: str) -> None:
    """Find out, before hours of work, that a folder cannot be written.

    Raises
    ------
    StorageError
        The folder cannot be created or written.
    """
    probe = join(uri, f".probe-{uuid.uuid4().hex}")
    write_bytes(probe, b"brainray")
    filesystem, path = resolve(probe)
    filesystem.delete_file(path)
