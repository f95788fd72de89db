"""Places: the one room that knows whether a URI is a local folder, s3:// or gs://.

Everything speaks :mod:`pyarrow.fs`, as Ray does; but for conditional writes, which pyarrow 26
does not have: those go through :mod:`obstore`. Files are written whole or not at all: a
local file is written beside its final name and renamed, and an object store shows an
object only when its upload is complete. Folders are made on a disk only: an object store has
none, and an empty object in the place of each would cost a request and a right.
"""

import configparser
import errno
import io
import json
import os
import re
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import obstore
import pyarrow as pa
import pyarrow.parquet as pq
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import GCSStore, S3Store
from pyarrow import fs

from brainray.errors import StorageError

if TYPE_CHECKING:  # obstore has these in its stubs only
    from obstore import UpdateVersion
    from obstore.store import (
        ClientConfig,
        GCSCredential,
        RetryConfig,
        S3Credential,
        S3CredentialProvider,
    )

REMOTE_SCHEMES = ("s3", "gs", "gcs")

_URI_CHARACTERS = "%/:?#[]@!$&'()*+,;=~"
"""What RFC 3986 allows in a URI beside letters, digits and ``-._``."""

S3_OPTIONS = ("region", "endpoint_override", "scheme", "tls_ca_file_path")
"""What the query of an s3:// place may give, each in the place of a variable of AWS."""

MAX_ATTEMPTS = 5
"""Attempts at one request of S3; the pauses between them double, to 15 s in all at most."""
TIMEOUT_S = 5.0
"""Silence of S3, on connecting or within a request, after which an attempt has failed."""
GCS_RETRY_S = 30
"""Seconds for which one request of Google Cloud Storage is tried again; it would be 900."""

PROFILE_LIFE_S = 300.0
"""Seconds for which the keys of a profile are used until its file is read again."""

_S3_ERROR = re.compile(
    r"AWS Error (?P<name>\w+)(?: \(HTTP status (?P<status>\d+)\))? during \w+ operation: "
    r"(?:Unable to parse ExceptionName: (?P<unparsed>\w+) Message: )?(?P<message>.*)",
    re.DOTALL,
)
_NO_BUCKET = (
    "there is no such bucket. Check its name, and AWS_ENDPOINT_URL where one is set, or create it."
)
_OTHER_REGION = "the bucket lies in another region. Set AWS_REGION, or add ?region=… to the place."
_DENIED = (
    "access is denied. Give credentials that may do this: AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or a role of the machine."
)
_WRONG_KEY = "Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the profile."
_EXPIRED = "the credentials have expired. Renew them, AWS_SESSION_TOKEN too."
_NO_CONDITIONS = (
    "the service does not support conditional writes (If-None-Match and If-Match), without which "
    "two runs cannot be kept apart. Update it, or give a place on another one."
)
_FAILING = f"the service still fails after {MAX_ATTEMPTS} attempts ({{}}). Try again later."
_S3_REMEDIES = {
    "NO_SUCH_BUCKET": _NO_BUCKET,
    "ACCESS_DENIED": _DENIED,
    "INVALID_ACCESS_KEY_ID": f"the access key is not known there. {_WRONG_KEY}",
    "SIGNATURE_DOES_NOT_MATCH": f"the secret key does not fit the access key. {_WRONG_KEY}",
    "ExpiredToken": _EXPIRED,
    "PermanentRedirect": _OTHER_REGION,
    "AuthorizationHeaderMalformed": _OTHER_REGION,
    "301": _OTHER_REGION,
    "400": "the request is refused. Check AWS_REGION, and whether the credentials have expired.",
    "NETWORK_CONNECTION": (
        f"the service cannot be reached in {MAX_ATTEMPTS} attempts ({{}}). Check the network, and "
        "AWS_ENDPOINT_URL where one is set."
    ),
    "SLOW_DOWN": _FAILING,
    "INTERNAL_FAILURE": _FAILING,
    "SERVICE_UNAVAILABLE": _FAILING,
}
"""What to do about an error, by its name or else its HTTP status; {} is what the SDK says."""


@dataclass(frozen=True, slots=True)
class FoundFile:
    """One file of a listing."""

    uri: str
    """Absolute place of the file, in the form :func:`read_bytes` takes."""
    relative_path: str
    """Path below the listed folder, with forward slashes."""
    size_bytes: int
    """-1 where there is no regular file behind the name."""
    modified_ns: int = 0
    """When it was last written, in nanoseconds since 1970; 0 where that is not known."""


def _local_path(uri: str) -> Path | None:
    """Return the path of a local place, whatever bytes its name is made of; None for others."""
    if "://" not in uri:
        return Path(uri).expanduser().absolute()
    if uri.startswith("file://"):
        return Path(unquote(uri.removeprefix("file://"), errors="surrogateescape"))
    return None


def _name_local(path: str) -> str:
    """Return the URI of a local path: itself, or percent-encoded where it is not UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return "file://" + quote(os.fsencode(path))
    return path


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
        quoted = quote(uri, safe=_URI_CHARACTERS)
        if scheme == "file":
            filesystem, path = fs.FileSystem.from_uri(quoted)
            return filesystem, path.rstrip("/") or "/"
        parts = urlsplit(quoted)
        if scheme == "s3":
            filesystem = _open_s3(parts.netloc, parts.query, _read_endpoint())
        else:
            filesystem = _open_gcs(parts.netloc, parts.query)
    except (OSError, ValueError) as error:
        raise _explain("open", uri, error) from error
    return filesystem, (parts.netloc.rpartition("@")[2] + unquote(parts.path)).rstrip("/")


def _read_endpoint() -> str:
    """Read where S3 is, as AWS's own tools do; pyarrow 26 does so in ``from_uri`` only."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""


@lru_cache(maxsize=64)
def _open_s3(authority: str, query: str, endpoint: str) -> "_S3FileSystem":
    """Open a bucket once in each process: every file system has connections of its own."""
    return _S3FileSystem(authority, query, endpoint)


class _S3FileSystem(fs.S3FileSystem):  # type: ignore[misc]  # pyarrow has no types
    """A bucket; pickled with what opens it again, as pyarrow 26 forgets the retries."""

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
            allow_delayed_open=True,  # what is small takes one request, not three
        )
        self.opened_with = authority, query, endpoint
        self._has_bucket = False

    def __reduce__(self) -> tuple[Callable[..., "_S3FileSystem"], tuple[str, str, str]]:
        return _open_s3, self.opened_with

    def check_bucket(self) -> None:
        """Tell a missing bucket from a missing object, which S3 does not; asks once.

        Raises
        ------
        OSError
            There is no such bucket.
        """
        if self._has_bucket:
            return
        try:
            self._has_bucket = self.get_file_info(self.bucket).type != fs.FileType.NotFound
        except OSError:  # whoever may read a place need not be allowed to ask about its bucket
            self._has_bucket = True
        if not self._has_bucket:
            raise OSError(_NO_BUCKET)


def _find_region(bucket: str) -> dict[str, str]:
    """Ask AWS for the region of a bucket; where it does not say, the SDK has a default."""
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
    """Return a URI that means the same from any working directory, without ``..`` in it."""
    if "://" in uri:
        return uri.rstrip("/")
    path = Path(uri).expanduser().absolute()
    if ".." in path.parts:  # what is above a link depends on where the link leads
        end = len(path.parts) - path.parts[::-1].index("..")
        path = Path(*path.parts[:end]).resolve().joinpath(*path.parts[end:])
    return str(path)


def join(uri: str, *parts: str) -> str:
    """Return the place below another one; a URI keeps its query at its end."""
    if "://" in uri:
        place, mark, query = uri.partition("?")
        return "/".join([place.rstrip("/"), *map(quote, parts)]) + mark + query
    return "/".join([uri.rstrip("/") or "/", *parts]).replace("//", "/", int(uri == "/"))


def get_name(uri: str) -> str:
    """Return the last name of a place: no folder above it, no credentials, no query."""
    if "://" not in uri:
        return make_absolute(uri).rpartition("/")[2]
    parts = urlsplit(uri)
    return unquote(parts.path).rstrip("/").rpartition("/")[2] or parts.hostname or ""


def _explain(action: str, uri: str, error: Exception) -> StorageError:
    return StorageError(f"Cannot {action} '{uri}': {describe_error(error)}")


def describe_error(error: Exception) -> str:
    """Say what went wrong at a place, and, for what S3 answers, what to do about it."""
    found = _S3_ERROR.search(str(error))
    if found is None:
        return str(error).partition(" error_info={")[0]  # what Google's library appends
    status = found["status"] or ""
    for name in (found["unparsed"], found["name"], status):
        if name in _S3_REMEDIES:
            return _S3_REMEDIES[name].format(found["message"].partition(" (Request ID")[0])
    if status.startswith("5"):
        return _FAILING.format(f"HTTP status {status}")
    return str(error)


_METADATA = re.compile("/latest/(api/token|meta-data)")
_DETAIL = re.compile(
    r'(?:message|error): "([^"]+)"|(InvalidCertificate)|(TimedOut|IncompleteMessage)'
)


def _explain_obstore(action: str, uri: str, error: Exception) -> StorageError:
    return StorageError(f"Cannot {action} '{uri}': {_describe_obstore(uri, error)}")


def _describe_obstore(uri: str, error: Exception) -> str:
    """Say what went wrong as :func:`describe_error` does; obstore's own message has many lines."""
    text = " ".join(str(error).partition("\n\nDebug source")[0].split())
    reason = text.rpartition(" - ")[2]
    if not uri.startswith("s3://"):
        return reason
    # The service of the machine's role is the last that obstore asks for credentials.
    if _METADATA.search(text) or isinstance(error, UnauthenticatedError):
        return _DENIED
    if "Received redirect" in reason:
        return _OTHER_REGION
    if reason.startswith("HTTP error"):
        details = _DETAIL.findall(str(error))
        why = "".join(details[-1]) if details else reason
        return _S3_REMEDIES["NETWORK_CONNECTION"].format(why)
    code, status = re.search(r"<Code>(\w+)</Code>", text), re.search(r"status code: (\d+)", text)
    name = code[1] if code else ""
    number = status[1] if status else ""
    for key in (name, re.sub(r"(?<=.)(?=[A-Z])", "_", name).upper(), number):
        if key in _S3_REMEDIES:
            return _S3_REMEDIES[key].format(reason)
    if number == "501":
        return _NO_CONDITIONS
    if number.startswith("5"):
        return _FAILING.format(f"HTTP status {number}")
    return _DENIED if number == "403" and not name else reason


def _look(filesystem: fs.FileSystem, path: str) -> fs.FileInfo:
    """Look at what a path names; that a bucket is missing is an error."""
    info = filesystem.get_file_info(path)
    if info.type == fs.FileType.NotFound:
        _check_bucket(filesystem)
    return info


def _check_bucket(filesystem: fs.FileSystem) -> None:
    if isinstance(filesystem, _S3FileSystem):
        filesystem.check_bucket()


def exists(uri: str) -> bool:
    """Tell whether a file or a folder is there."""
    filesystem, path = resolve(uri)
    try:
        return bool(_look(filesystem, path).type != fs.FileType.NotFound)
    except OSError as error:
        raise _explain("look at", uri, error) from error


def is_folder(uri: str) -> bool:
    """Tell whether a folder is there."""
    local = _local_path(uri)
    if local is not None:
        return local.is_dir()
    filesystem, path = resolve(uri)
    try:
        return bool(_look(filesystem, path).type == fs.FileType.Directory)
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


def list_folder(uri: str, root: str) -> tuple[list[FoundFile], list[str]]:
    """List what lies directly in a folder, sorted by name.

    Hidden files, and what is not a regular file, are listed too; callers decide. A link to a
    folder is followed, unless its target lies below the listed root or above the link.

    Parameters
    ----------
    uri : str
        The folder.
    root : str
        The folder that the listing began with, which relative paths count from.

    Returns
    -------
    files : list of FoundFile
    folders : list of str
        URIs of the folders in it.

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
        relative = info.path.removeprefix(prefix)
        if info.type == fs.FileType.Directory:
            folders.append(join(base, relative))
        else:
            size, modified = int(info.size or 0), int(info.mtime_ns or 0)
            files.append(FoundFile(join(base, relative), relative, size, modified))
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
                continue  # it is listed by its own name, or leads round in a circle
        folders.append(_name_local(entry.path))
    return files, folders


def _measure(entry: "os.DirEntry[str] | Path") -> tuple[int, int]:
    """Return a file's size and time, as FoundFile has them."""
    try:
        found = entry.stat()
    except OSError:  # a broken link, or it vanished
        return -1, 0
    return (found.st_size if stat.S_ISREG(found.st_mode) else -1), found.st_mtime_ns


def find_file(uri: str) -> FoundFile | None:
    """Look at one file; None if there is none.

    Raises
    ------
    StorageError
        The place cannot be looked at.
    """
    local = _local_path(uri)
    place = make_absolute(uri)
    name = place.rpartition("/")[2]
    try:
        if local is not None:
            if not os.path.lexists(local) or local.is_dir():
                return None
            return FoundFile(place, name, *_measure(local))
        filesystem, path = resolve(uri)
        info = _look(filesystem, path)
    except StorageError:
        raise
    except (OSError, ValueError) as error:
        raise _explain("look at", uri, error) from error
    if info.type != fs.FileType.File:
        return None
    return FoundFile(place, name, int(info.size or 0), int(info.mtime_ns or 0))


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


def read_bytes(uri: str, *, max_bytes: int | None = None) -> bytes:
    """Read one file whole.

    Parameters
    ----------
    max_bytes : int, optional
        Read no more than one byte beyond this, which tells that there is more.

    Raises
    ------
    FileNotFoundError
        Nothing is there: callers that hold one scan of many turn this into an answer.
    StorageError
        It is there and cannot be read.
    """
    limit = -1 if max_bytes is None else max_bytes + 1
    path = _local_path(uri)
    try:
        if path is not None:
            return _read_local(path, limit)
        filesystem, remote = resolve(uri)
        try:
            # pyarrow 26 asks for the size first, whatever a listing has said: HEAD, then GET.
            with filesystem.open_input_file(remote) as stream:
                return bytes(stream.read() if limit < 0 else stream.read(limit))
        except FileNotFoundError:
            _check_bucket(filesystem)
            raise
    except (FileNotFoundError, StorageError):
        raise
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        raise _explain("read", uri, error) from error


def _read_local(path: Path, limit: int) -> bytes:
    # A pipe or a device could block for ever; opening one without blocking cannot.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb", buffering=0) as stream:  # noqa: PTH123 - of a descriptor
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("it is not a regular file")
        return stream.readall() if limit < 0 else _read_up_to(stream, limit)


def _read_up_to(stream: "io.FileIO", limit: int) -> bytes:
    parts, left = [], limit
    while left and (part := stream.read(left)):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def write_bytes(uri: str, content: bytes) -> None:
    """Write one file, whole or not at all, creating the folders above it.

    Raises
    ------
    StorageError
        The place cannot be written.
    """
    filesystem, path = resolve(uri)
    try:
        if isinstance(filesystem, fs.LocalFileSystem):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            _write_local(Path(path), content)
        else:
            with filesystem.open_output_stream(path) as stream:
                stream.write(content)
    except OSError as error:
        raise _explain("write", uri, error) from error


def _write_local(path: Path, content: bytes) -> None:
    with _write_partial(path, content) as partial:
        partial.replace(path)


@contextmanager
def _write_partial(path: Path, content: bytes) -> Iterator[Path]:
    """Write a file under another name beside its own; what is left of it is deleted."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def create_bytes(uri: str, content: bytes) -> bool:
    """Write one file, whole or not at all, unless something is there already.

    Of several that create the same file at once, one succeeds.

    Returns
    -------
    bool
        False where something was there, which is left as it is.

    Raises
    ------
    StorageError
        The place cannot be written. On an object store the file may be there nevertheless, where
        the service did not answer.
    """
    filesystem, path = resolve(uri)
    if not isinstance(filesystem, fs.LocalFileSystem):
        return write_object(uri, content, None) is not None
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        return _create_local(Path(path), content)
    except OSError as error:
        raise _explain("write", uri, error) from error


_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def _create_local(path: Path, content: bytes) -> bool:
    with _write_partial(path, content) as partial:
        try:
            os.link(partial, path)
        except FileExistsError:
            # A server of NFS says so, too, if the answer to the first request was lost; then the
            # file has both names.
            return partial.stat().st_nlink == 2
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            return _create_without_links(path, partial)
        return True


def _create_without_links(path: Path, partial: Path) -> bool:
    """Create a file on FAT, or a network's file system without hard links.

    An empty file under the final name decides who is first; then the whole one takes its place.
    Between the two a reader finds an empty file, and whoever comes after a process that was
    killed just there. No other order keeps both promises without links.
    """
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    try:
        partial.replace(path)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True


_WRITE_ID = "brainray-write"
"""The name under which an object keeps the id of the write that made it."""
_TIMED_OUT = "kind: Timeout"  # in what obstore 0.12 says


def write_object(
    uri: str, content: bytes, expected: "UpdateVersion | None"
) -> "UpdateVersion | None":
    """Write one object of an object store, if it is as expected.

    Parameters
    ----------
    uri : str
        ``s3://`` or ``gs://``.
    content : bytes
        The whole object; what has the same content as an older version may have its ETag, too.
    expected : UpdateVersion or None
        The version that is to be replaced; None if nothing is to be there.

    Returns
    -------
    UpdateVersion or None
        The version that was written; None if the object was not as expected, and was left alone.

    Raises
    ------
    StorageError
        The place cannot be written. Where the service did not answer, the object may have been
        written, or may yet be, if it is as expected when the request arrives.
    """
    store, key = _open_obstore(uri, len(content))
    write_id = uuid.uuid4().hex
    try:
        for left in reversed(range(MAX_ATTEMPTS)):
            try:
                written = obstore.put(
                    store,
                    key,
                    content,
                    mode=expected or "create",
                    attributes={_WRITE_ID: write_id},
                )
                return _get_version(written)
            except (AlreadyExistsError, PreconditionError):
                # This is also what the second attempt at a write is told if the first was done
                # and its answer lost. Hence the id.
                found = _find_write(store, key)
                if found is not None and found[0] == write_id:
                    return found[1]
                if found is not None or expected is not None:
                    return None
                # S3 also says so where another write is under way, and that one has failed.
                if not left:
                    raise
            except BaseError as error:
                # obstore itself repeats a write after other errors; not after a timeout, since the
                # first attempt may yet be done. With a condition and an id that does no harm.
                if _TIMED_OUT not in str(error) or not left:
                    raise
    except (BaseError, FileNotFoundError) as error:  # no such bucket
        raise _explain_obstore("write", uri, error) from error
    raise AssertionError("every last attempt returns or raises")


def _find_write(store: S3Store | GCSStore, key: str) -> "tuple[object, UpdateVersion] | None":
    """Return the id of the write that made an object, and its version; None if there is none."""
    try:
        found = obstore.get(store, key, options={"head": True})
    except FileNotFoundError:
        return None
    return found.attributes.get(_WRITE_ID), _get_version(found.meta)


def _get_version(described: Any) -> "UpdateVersion":  # noqa: ANN401 - of a put or a get
    """Take the version out of what obstore says; it takes no None where it takes a version."""
    version: UpdateVersion = {"e_tag": described["e_tag"]}
    if described["version"] is not None:
        version["version"] = described["version"]
    return version


def read_object(uri: str) -> "tuple[bytes, UpdateVersion]":
    """Read one object of an object store, and which version of it that is.

    Raises
    ------
    FileNotFoundError
        Nothing is there.
    StorageError
        It cannot be read.
    """
    store, key = _open_obstore(uri)
    try:
        found = obstore.get(store, key)
        return bytes(found.bytes()), _get_version(found.meta)
    except (BaseError, FileNotFoundError) as error:
        if isinstance(error, FileNotFoundError) and "NoSuchBucket" not in str(error):
            raise
        raise _explain_obstore("read", uri, error) from error


def check_conditional_writes(uri: str, content: bytes) -> None:
    """Make sure that a service heeds the conditions of :func:`write_object`.

    Some that speak the language of S3 do not, and say nothing.

    Parameters
    ----------
    uri : str
        An object that is there.
    content : bytes
        What it holds; it is written once more where a condition is not heeded.

    Raises
    ------
    StorageError
        The service ignores the conditions.
    """
    number = uuid.uuid4()
    other: UpdateVersion = {"e_tag": f'"{number.hex}"', "version": f"{number.int % 10**15}"}
    for expected in (None, other):
        if write_object(uri, content, expected) is not None:
            raise StorageError(f"Cannot rely on '{uri}': {_NO_CONDITIONS}")


def _open_obstore(uri: str, size_bytes: int = 0) -> tuple[S3Store | GCSStore, str]:
    """Open the bucket of a place as :func:`resolve` does; return the key of the place as well.

    Parameters
    ----------
    uri : str
        ``s3://`` or ``gs://``.
    size_bytes : int
        What is to be written in one request: obstore counts the time of all of it.
    """
    filesystem, path = resolve(uri)
    key = path.partition("/")[2]
    timeout_s = TIMEOUT_S * 2 ** (size_bytes // 2**20).bit_length()
    try:
        if isinstance(filesystem, _S3FileSystem):
            return _open_s3_store(*filesystem.opened_with, filesystem.region, timeout_s), key
        parts = urlsplit(quote(uri, safe=_URI_CHARACTERS))
        return _open_gcs_store(parts.netloc, parts.query, timeout_s), key
    except (BaseError, OSError, ValueError) as error:
        if isinstance(error, StorageError):
            raise
        raise _explain("open", uri, error) from error


_NO_PROXY: "ClientConfig" = {
    "proxy_url": "http://127.0.0.1",
    "proxy_excludes": "*,127.0.0.1/0,::1/0",
}
"""Makes obstore ignore HTTPS_PROXY and its like, as pyarrow does for S3; /0 is every address."""


@lru_cache(maxsize=64)
def _open_s3_store(
    authority: str, query: str, endpoint: str, region: str, timeout_s: float
) -> S3Store:
    given, _, bucket = authority.rpartition("@")
    options = dict(parse_qsl(query))
    endpoint = options.get("endpoint_override", endpoint)
    if endpoint and "://" not in endpoint:
        endpoint = f"{options.get('scheme', 'https')}://{endpoint}"
    settings: dict[str, Any] = {"region": region}
    if endpoint:
        settings["aws_endpoint_url_s3"] = endpoint  # goes before all that the environment says
    credentials = _find_credentials(given)
    if credentials is None:
        settings |= _describe_metadata_service()
    client = _describe_client(timeout_s, plain=endpoint.startswith("http://")) | _NO_PROXY
    bundle = options.get("tls_ca_file_path", os.environ.get("AWS_CA_BUNDLE"))
    if bundle:
        client["root_certificate"] = Path(bundle).read_bytes()
    return S3Store(
        bucket,
        config=settings,  # type: ignore[arg-type]
        client_options=client,
        retry_config=_describe_retries(timedelta(minutes=3)),
        credential_provider=credentials,
    )


@lru_cache(maxsize=64)
def _open_gcs_store(authority: str, query: str, timeout_s: float) -> GCSStore:
    user, _, bucket = authority.rpartition("@")
    options = dict(parse_qsl(query))
    scheme, endpoint = options.get("scheme", "https"), options.get("endpoint_override")
    settings: dict[str, Any] = {"base_url": f"{scheme}://{endpoint}"} if endpoint else {}
    # With skip_signature, obstore 0.12 would still want credentials for writing.
    anonymous: GCSCredential = {"token": "", "expires_at": None}
    limit_s = float(options.get("retry_limit_seconds", GCS_RETRY_S))
    return GCSStore(
        bucket,
        config=settings,  # type: ignore[arg-type]
        client_options=_describe_client(timeout_s, plain=scheme == "http"),
        retry_config=_describe_retries(timedelta(seconds=limit_s)),
        credential_provider=(lambda: anonymous) if user == "anonymous" else None,
    )


def _describe_client(timeout_s: float, *, plain: bool) -> "ClientConfig":
    return {
        "connect_timeout": timedelta(seconds=TIMEOUT_S),
        "timeout": timedelta(seconds=timeout_s),
        "allow_http": plain,
    }


def _describe_retries(limit: timedelta) -> "RetryConfig":
    first, longest = timedelta(seconds=0.1), timedelta(seconds=8)
    return {
        "max_retries": MAX_ATTEMPTS - 1,
        "retry_timeout": limit,
        "backoff": {"init_backoff": first, "max_backoff": longest, "base": 4},
    }


def _describe_metadata_service() -> dict[str, Any]:
    """Say where a role of the machine is asked for, as AWS's tools name it and obstore does not."""
    variables = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE")
    containers = ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI")
    if any(os.environ.get(name) for name in (*variables, *containers)):
        return {}
    if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        return {"skip_signature": True}  # there are no credentials: pyarrow does not sign either
    endpoint = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT")
    return {"metadata_endpoint": endpoint} if endpoint else {}


def _find_credentials(given: str) -> "S3CredentialProvider | None":
    """Find what obstore does not: keys in the place itself, and profiles.

    Parameters
    ----------
    given : str
        ``key:secret``, percent-encoded, or nothing.

    Returns
    -------
    S3CredentialProvider or None
        None where obstore finds them: in the environment, or by a role of the pod or machine.

    Raises
    ------
    StorageError
        The profile needs boto3, which is not installed.
    """
    if given:
        key, _, secret = given.partition(":")
        # Not as settings, which would be sent with the AWS_SESSION_TOKEN of other keys.
        credential: S3Credential = {
            "access_key_id": unquote(key),
            "secret_access_key": unquote(secret),
            "token": None,
            "expires_at": None,
        }
        return lambda: credential
    if os.environ.get("AWS_ACCESS_KEY_ID"):
        return None
    profile = _read_profile()
    if "aws_access_key_id" in profile:
        return _read_keys
    if not profile.keys() & _INDIRECT_KEYS:
        return None
    try:
        from botocore.exceptions import BotoCoreError
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError as error:
        raise StorageError(
            f"The profile '{_get_profile()}' of AWS has no keys of its own, but "
            f"{min(profile.keys() & _INDIRECT_KEYS)}, which takes boto3. Install it "
            "(pip install boto3), or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        ) from error
    try:
        return Boto3CredentialProvider(ttl=timedelta(seconds=PROFILE_LIFE_S))
    except BotoCoreError as error:
        raise StorageError(f"Cannot use the profile '{_get_profile()}' of AWS: {error}") from error


_INDIRECT_KEYS = {"role_arn", "credential_process", "sso_session", "sso_start_url"}


def _get_profile() -> str:
    return os.environ.get("AWS_PROFILE") or "default"


def _read_profile() -> dict[str, str]:
    """Read what the files of AWS's tools say of the profile in use."""
    name = _get_profile()
    config = os.environ.get("AWS_CONFIG_FILE") or "~/.aws/config"
    keys = os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials"
    found: dict[str, str] = {}
    for path, section in ((config, name if name == "default" else f"profile {name}"), (keys, name)):
        parser = configparser.RawConfigParser(strict=False)
        try:
            parser.read(Path(path).expanduser())
        except configparser.Error as error:
            raise StorageError(f"Cannot read the profiles in '{path}': {error}") from error
        if parser.has_section(section):
            found |= parser[section]
    return found


def _read_keys() -> "S3Credential":
    """Read the keys of the profile; other tools renew them in its file."""
    profile = _read_profile()
    return {
        "access_key_id": profile["aws_access_key_id"],
        "secret_access_key": profile["aws_secret_access_key"],
        "token": profile.get("aws_session_token"),
        "expires_at": datetime.now(UTC) + timedelta(seconds=PROFILE_LIFE_S),
    }


def delete_file(uri: str) -> None:
    """Delete one file.

    Raises
    ------
    StorageError
        It cannot be deleted.
    """
    filesystem, path = resolve(uri)
    try:
        filesystem.delete_file(path)
    except OSError as error:
        raise _explain("delete", uri, error) from error


def delete_folder(uri: str) -> None:
    """Delete a folder and everything in it; nothing happens where there is none.

    Raises
    ------
    StorageError
        It cannot be deleted.
    """
    filesystem, path = resolve(uri)
    try:
        filesystem.delete_dir(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _explain("delete", uri, error) from error


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
    delete_file(probe)
