"""Read, write and list files by URI: local paths, s3:// and gs://.

All access is through :mod:`pyarrow.fs`, which Ray and Parquet need. :mod:`brainray.io.conditional`
has the conditional writes that pyarrow 26 lacks. A file appears complete or not at all: a local
file is written under a temporary name and renamed, and an object store shows an object after its
upload. Folders are created on disks only.

All functions raise StorageError if a URI cannot be accessed. Those that read one file raise
FileNotFoundError if it does not exist.
"""

import json
import os
import re
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from brainray.errors import StorageError

URI_CHARACTERS = "%/:?#[]@!$&'()*+,;=~"
"""Characters that RFC 3986 allows in a URI besides letters, digits and ``-._``."""

S3_OPTIONS = ("region", "endpoint_override", "scheme", "tls_ca_file_path")
"""Options in the query of an s3:// URI; they override AWS's environment variables."""

MAX_ATTEMPTS = 5
"""Attempts at one S3 request; the pauses between them double, up to 15 s in total."""
TIMEOUT_S = 5.0
"""An attempt fails if S3 does not respond for so long."""
GCS_RETRY_S = 30
"""Time limit for the attempts at one request of Google Cloud Storage; pyarrow's is 900 s."""

_MISSING = fs.FileType.NotFound
_S3_ERROR = re.compile(
    r"AWS Error (?P<name>\w+)(?: \(HTTP status (?P<status>\d+)\))? during \w+ operation: "
    r"(?:Unable to parse ExceptionName: (?P<unparsed>\w+) Message: )?(?P<message>.*)",
    re.DOTALL,
)
_NO_BUCKET = (
    "there is no such bucket. Check its name, and AWS_ENDPOINT_URL where one is set, or create it."
)
OTHER_REGION = "the bucket is in another region. Set AWS_REGION, or add ?region=… to the URI."
DENIED = (
    "access is denied. Give credentials with this permission: AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or a role of the machine."
)
_WRONG_KEY = "Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the profile."
_EXPIRED = "the credentials have expired. Renew them, AWS_SESSION_TOKEN too."
FAILING = f"the service still fails after {MAX_ATTEMPTS} attempts ({{}}). Try again later."
S3_REMEDIES = {
    "NO_SUCH_BUCKET": _NO_BUCKET,
    "ACCESS_DENIED": DENIED,
    "INVALID_ACCESS_KEY_ID": f"the service does not know the access key. {_WRONG_KEY}",
    "SIGNATURE_DOES_NOT_MATCH": f"the secret key does not match the access key. {_WRONG_KEY}",
    "ExpiredToken": _EXPIRED,
    "PermanentRedirect": OTHER_REGION,
    "AuthorizationHeaderMalformed": OTHER_REGION,
    "301": OTHER_REGION,
    "400": "the service refused the request. Check AWS_REGION, and the age of the credentials.",
    "NETWORK_CONNECTION": (
        f"the service did not respond in {MAX_ATTEMPTS} attempts ({{}}). Check the network, and "
        "AWS_ENDPOINT_URL where one is set."
    ),
    "SLOW_DOWN": FAILING,
    "INTERNAL_FAILURE": FAILING,
    "SERVICE_UNAVAILABLE": FAILING,
}
"""Remedies by the error's name, or else its HTTP status; {} is the message of the SDK."""


@dataclass(frozen=True, slots=True)
class FoundFile:
    """One file of a listing."""

    uri: str
    """Absolute URI, for :func:`read_bytes`."""
    relative_path: str
    """Path below the listed folder, with forward slashes."""
    size_bytes: int
    """-1 if the name is not a regular file."""
    modified_ns: int = 0
    """Time of the last change, in nanoseconds since 1970; 0 if unknown."""


def _local_path(uri: str) -> Path | None:
    """Return the path of a local URI, which may have bytes that are not UTF-8; None for others."""
    if "://" not in uri:
        return Path(uri).expanduser().absolute()
    if uri.startswith("file://"):
        return Path(unquote(uri.removeprefix("file://"), errors="surrogateescape"))
    return None


def _name_local(path: str) -> str:
    """Return the URI of a local path: the path, or percent-encoded if it is not UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return "file://" + quote(os.fsencode(path))
    return path


def is_dicomweb(uri: str) -> bool:
    """Tell whether a URI names scans in a PACS, which :mod:`brainray.io.dicomweb` reads."""
    return uri.startswith(("dicomweb+https://", "dicomweb+http://"))


def resolve(uri: str) -> tuple[fs.FileSystem, str]:
    """Return the file system of a URI and the path within it."""
    local = _local_path(uri)
    if local is not None:
        return fs.LocalFileSystem(), str(local)
    if not uri.startswith(("s3://", "gs://", "gcs://")):
        raise StorageError(f"Expected a local path, s3:// or gs://, got '{uri}'.")
    try:
        parts = urlsplit(quote(uri, safe=URI_CHARACTERS))
        if parts.scheme == "s3":  # pyarrow 26 reads the endpoint of AWS's tools in from_uri only
            general = os.environ.get("AWS_ENDPOINT_URL", "")
            endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or general
            filesystem = _open_s3(parts.netloc, parts.query, endpoint)
        else:
            filesystem = _open_gcs(parts.netloc, parts.query)
    except (OSError, ValueError) as error:
        raise explain("open", uri, error) from error
    return filesystem, (parts.netloc.rpartition("@")[2] + unquote(parts.path)).rstrip("/")


@lru_cache(maxsize=64)
def _open_s3(authority: str, query: str, endpoint: str) -> "S3FileSystem":
    """Open a bucket once per process, since each file system has its own connections."""
    return S3FileSystem(authority, query, endpoint)


class S3FileSystem(fs.S3FileSystem):  # type: ignore[misc]  # pyarrow has no types
    """A bucket. It is pickled as its arguments, since pyarrow 26 loses the retries."""

    def __init__(self, authority: str, query: str, endpoint: str) -> None:
        credentials, _, self.bucket = authority.rpartition("@")
        options = dict(parse_qsl(query))
        unknown = set(options) - set(S3_OPTIONS)
        if unknown:
            raise ValueError(
                f"Unknown option '{min(unknown)}'. Expected one of {', '.join(S3_OPTIONS)}."
            )
        options.setdefault("endpoint_override", endpoint)
        if "region" not in options and not options["endpoint_override"]:
            options |= _find_region(self.bucket)
        if credentials:
            key, _, secret = credentials.partition(":")
            options |= {"access_key": unquote(key), "secret_key": unquote(secret)}
        bundle = options.pop("tls_ca_file_path", os.environ.get("AWS_CA_BUNDLE"))
        super().__init__(
            **options,
            tls_ca_file_path=bundle,
            connect_timeout=TIMEOUT_S,
            request_timeout=TIMEOUT_S,
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=MAX_ATTEMPTS),
            allow_delayed_open=True,  # one request for a small file, not three
        )
        self.opened_with = authority, query, endpoint
        self.has_bucket = False  # known to exist

    def __reduce__(self) -> tuple[Callable[..., "S3FileSystem"], tuple[str, str, str]]:
        return _open_s3, self.opened_with


def _find_region(bucket: str) -> dict[str, str]:
    """Ask AWS for the region of a bucket; without an answer the SDK has a default."""
    try:
        return {"region": fs.resolve_s3_region(bucket)}
    except OSError as error:
        if "not found" in str(error):
            raise OSError(_NO_BUCKET) from error
        return {}


@lru_cache(maxsize=64)
def _open_gcs(authority: str, query: str) -> fs.FileSystem:
    if "retry_limit_seconds" not in query:
        query = "&".join(filter(None, [query, f"retry_limit_seconds={GCS_RETRY_S}"]))
    return fs.FileSystem.from_uri(f"gs://{authority}?{query}")[0]


def make_absolute(uri: str) -> str:
    """Return a URI that does not depend on the working directory, without ``..``."""
    if "://" in uri:
        return uri.rstrip("/")
    path = Path(uri).expanduser().absolute()
    if ".." in path.parts:  # the parent of a link is the parent of its target
        end = len(path.parts) - path.parts[::-1].index("..")
        path = Path(*path.parts[:end]).resolve().joinpath(*path.parts[end:])
    return str(path)


def join(uri: str, *parts: str) -> str:
    """Return a URI below another one; a query stays at the end."""
    if "://" in uri:
        base, mark, query = uri.partition("?")
        return "/".join([base.rstrip("/"), *map(quote, parts)]) + mark + query
    return "/".join([uri.rstrip("/") or "/", *parts]).replace("//", "/", int(uri == "/"))


def get_name(uri: str) -> str:
    """Return the last name of a URI, without folders, credentials and query."""
    if "://" not in uri:
        return make_absolute(uri).rpartition("/")[2]
    parts = urlsplit(uri)
    return unquote(parts.path).rstrip("/").rpartition("/")[2] or parts.hostname or ""


def explain(action: str, uri: str, error: Exception) -> StorageError:
    """Return the error to raise if an action on a URI fails."""
    return StorageError(f"Cannot {action} '{uri}': {describe_error(error)}")


def describe_error(error: Exception) -> str:
    """Describe an error; for errors of S3, with a remedy."""
    found = _S3_ERROR.search(str(error))
    if found is None:
        return str(error).partition(" error_info={")[0]  # appended by Google's library
    message = found["message"].partition(" (Request ID")[0]
    names = (found["unparsed"], found["name"])
    return find_remedy(*names, status=found["status"] or "", message=message) or str(error)


def find_remedy(*names: str, status: str, message: str) -> str | None:
    """Return the first remedy of an error of S3, of one of its names or its HTTP status."""
    for name in (*names, status):
        if name in S3_REMEDIES:
            return S3_REMEDIES[name].format(message)
    return FAILING.format(f"HTTP status {status}") if status.startswith("5") else None


def _get_info(uri: str) -> fs.FileInfo:
    """Return the type, size and time of a URI; a missing bucket is an error."""
    filesystem, path = resolve(uri)
    try:
        info = filesystem.get_file_info(path)
        if info.type == _MISSING:
            _check_bucket(filesystem)
    except (OSError, ValueError) as error:
        raise explain("access", uri, error) from error
    return info


def _check_bucket(filesystem: fs.FileSystem) -> None:
    """Raise OSError if a bucket does not exist: S3 reports that as a missing object."""
    if not isinstance(filesystem, S3FileSystem) or filesystem.has_bucket:
        return
    try:
        filesystem.has_bucket = filesystem.get_file_info(filesystem.bucket).type != _MISSING
    except OSError:  # reading an object needs no permission to query the bucket
        filesystem.has_bucket = True
    if not filesystem.has_bucket:
        raise OSError(_NO_BUCKET)


def exists(uri: str) -> bool:
    """Return whether a file or a folder exists."""
    return bool(_get_info(uri).type != _MISSING)


def is_folder(uri: str) -> bool:
    """Return whether a folder exists."""
    local = _local_path(uri)
    if local is not None:
        return local.is_dir()
    return bool(_get_info(uri).type == fs.FileType.Directory)


def list_files(uri: str) -> list[FoundFile]:
    """List the files below a folder, recursively, sorted by path; hidden files are included."""
    base, prefix = make_absolute(uri), resolve(uri)[1].rstrip("/") + "/"
    infos = _get_infos_below(uri, recursive=True)
    found = [_describe_file(info, base, prefix) for info in infos if info.type == fs.FileType.File]
    return sorted(found, key=lambda file: file.relative_path)


def _describe_file(info: fs.FileInfo, base: str, prefix: str) -> FoundFile:
    relative = info.path.removeprefix(prefix)
    return FoundFile(join(base, relative), relative, int(info.size or 0), int(info.mtime_ns or 0))


def list_folders(uri: str) -> list[str]:
    """List the names of the folders directly below a folder, sorted."""
    infos = _get_infos_below(uri, recursive=False)
    return sorted(info.base_name for info in infos if info.type == fs.FileType.Directory)


def _get_infos_below(uri: str, *, recursive: bool) -> list[fs.FileInfo]:
    filesystem, path = resolve(uri)
    try:
        return list(filesystem.get_file_info(fs.FileSelector(path, recursive=recursive)))
    except FileNotFoundError as error:
        raise StorageError(f"No folder at '{uri}'. Check the path, or mount it.") from error
    except (OSError, UnicodeError) as error:
        raise explain("list", uri, error) from error


def list_folder(uri: str, root: str) -> tuple[list[FoundFile], list[str]]:
    """List the direct content of a folder, sorted by name: files, and URIs of folders.

    Hidden files and special files are included. A link to a folder is followed, unless its target
    is below the root or above the link. Relative paths start from the root.

    Raises
    ------
    OSError
        It cannot be listed.
    """
    local = _local_path(uri)
    if local is not None:
        return _list_local(str(local), str(_local_path(root)))
    filesystem, path = resolve(uri)
    base, prefix = make_absolute(root), resolve(root)[1].rstrip("/") + "/"
    files, folders = [], []
    infos = filesystem.get_file_info(fs.FileSelector(path))
    for info in sorted(infos, key=lambda info: str(info.path)):
        found = _describe_file(info, base, prefix)
        if info.type == fs.FileType.Directory:
            folders.append(found.uri)
        else:
            files.append(found)
    return files, folders


def _list_local(folder: str, root: str) -> tuple[list[FoundFile], list[str]]:
    files, folders = [], []
    real_root = None
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        if not entry.is_dir():
            relative = entry.path.removeprefix(root).lstrip(os.sep)
            files.append(FoundFile(_name_local(entry.path), relative, *_measure(entry)))
            continue
        if entry.is_symlink():
            real_root = real_root or os.path.realpath(root) + os.sep
            target = os.path.realpath(entry.path) + os.sep
            above = os.path.realpath(folder) + os.sep
            if target.startswith(real_root) or above.startswith(target):
                continue  # listed under its own name, or a cycle
        folders.append(_name_local(entry.path))
    return files, folders


def _measure(entry: "os.DirEntry[str] | Path") -> tuple[int, int]:
    """Return the ``size_bytes`` and ``modified_ns`` of a FoundFile."""
    try:
        found = entry.stat()
    except OSError:  # a broken link, or it was deleted
        return -1, 0
    return (found.st_size if stat.S_ISREG(found.st_mode) else -1), found.st_mtime_ns


def find_file(uri: str) -> FoundFile | None:
    """Return one file; None if it does not exist."""
    local = _local_path(uri)
    absolute = make_absolute(uri)
    name = absolute.rpartition("/")[2]
    try:
        if local is not None:
            if not os.path.lexists(local) or local.is_dir():
                return None
            return FoundFile(absolute, name, *_measure(local))
    except (OSError, ValueError) as error:
        raise explain("access", uri, error) from error
    info = _get_info(uri)
    if info.type != fs.FileType.File:
        return None
    return FoundFile(absolute, name, int(info.size or 0), int(info.mtime_ns or 0))


def read_bytes(uri: str, *, max_bytes: int | None = None) -> bytes:
    """Read one file, or at most one byte more than ``max_bytes``."""
    limit = None if max_bytes is None else max_bytes + 1
    path = _local_path(uri)
    try:
        if path is not None:
            return _read_local(path, limit)
        filesystem, remote = resolve(uri)
        try:
            # pyarrow 26 sends two requests: HEAD for the size, then GET.
            with filesystem.open_input_file(remote) as stream:
                return bytes(stream.read(limit))
        except FileNotFoundError:
            _check_bucket(filesystem)
            raise
    except (FileNotFoundError, StorageError):
        raise
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        raise explain("read", uri, error) from error


def _read_local(path: Path, limit: int | None) -> bytes:
    # Without O_NONBLOCK, opening a pipe or a device could block for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as stream:  # noqa: PTH123 - of a descriptor
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("it is not a regular file")
        return stream.read(limit)


def write_bytes(uri: str, content: bytes) -> None:
    """Write one file, completely or not at all, and create its folder."""
    filesystem, path = resolve(uri)
    try:
        if isinstance(filesystem, fs.LocalFileSystem):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with write_partial(Path(path), content) as partial:
                partial.replace(path)
        else:
            with filesystem.open_output_stream(path) as stream:
                stream.write(content)
    except OSError as error:
        raise explain("write", uri, error) from error


@contextmanager
def write_partial(path: Path, content: bytes, mode: int = 0o666) -> Iterator[Path]:
    """Write a temporary file beside the final path; yield it, and delete it if it is left.

    ``mode`` gives its permissions, reduced by the process's umask.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with open(descriptor, "wb") as stream:  # noqa: PTH123 - of a descriptor
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def delete_file(uri: str) -> None:
    """Delete one file."""
    filesystem, path = resolve(uri)
    try:
        filesystem.delete_file(path)
    except OSError as error:
        raise explain("delete", uri, error) from error


def delete_folder(uri: str) -> None:
    """Delete a folder with its content, if it exists."""
    filesystem, path = resolve(uri)
    try:
        filesystem.delete_dir(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise explain("delete", uri, error) from error


def read_json(uri: str) -> Any:  # noqa: ANN401 - JSON is any of several types
    """Read a JSON document; raises StorageError if the file is none."""
    content = read_bytes(uri)
    try:
        return json.loads(content)
    except ValueError as error:
        raise StorageError(f"'{uri}' is not a JSON document: {error}") from error


def write_json(uri: str, document: Any) -> None:  # noqa: ANN401 - JSON is any of several types
    """Write a JSON document, indented; NaN raises ValueError."""
    text = json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False)
    write_bytes(uri, (text + "\n").encode())


def write_table(uri: str, table: pa.Table) -> None:
    """Write one Parquet file (zstd), completely or not at all."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_bytes(uri, sink.getvalue().to_pybytes())


def read_table(uri: str) -> pa.Table:
    """Read one Parquet file; raises StorageError if the file is none."""
    content = read_bytes(uri)
    try:
        return pq.read_table(pa.BufferReader(content))
    except (OSError, pa.ArrowInvalid) as error:  # OSError: the footer is intact, the pages are not
        raise StorageError(f"'{uri}' is not a Parquet file: {error}") from error


def check_writable(uri: str) -> None:
    """Check that a folder can be created and written."""
    probe = join(uri, f".probe-{uuid.uuid4().hex}")
    write_bytes(probe, b"brainray")
    delete_file(probe)
