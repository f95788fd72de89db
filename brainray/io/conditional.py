"""Write a file only if it is absent, or is the version that is expected.

On a disk a file is created by a hard link. On object stores this goes through :mod:`obstore`, since
pyarrow 26 has no conditional writes (``If-None-Match``, ``If-Match``; generations on Google's).
"""

import errno
import os
import re
import uuid
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import GCSStore, S3Store
from pyarrow import fs

from brainray import storage
from brainray.errors import StorageError
from brainray.storage import GCS_RETRY_S, MAX_ATTEMPTS, TIMEOUT_S, S3FileSystem

if TYPE_CHECKING:  # obstore has these in its stubs only
    from obstore import UpdateVersion
    from obstore.store import ClientConfig, RetryConfig, S3Credential, S3CredentialProvider

KEYS_LIFE_S = 300.0
"""Seconds after which boto3 is asked again for the keys of a profile or a role."""

_NO_CONDITIONS = (
    "the service does not support conditional writes (If-None-Match and If-Match), without which "
    "two runs cannot be kept apart. Update it, or give a place on another one."
)


def create_bytes(uri: str, content: bytes, *, mode: int = 0o666) -> bool:
    """Write one file, whole or not at all, unless something is there already.

    Of several that create the same file at once, one succeeds.

    Parameters
    ----------
    uri : str
    content : bytes
    mode : int
        Permissions of a local file, from which the process's umask is taken.

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
    filesystem, path = storage.resolve(uri)
    if not isinstance(filesystem, fs.LocalFileSystem):
        return write_object(uri, content, None) is not None
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        return _create_local(Path(path), content, mode)
    except OSError as error:
        raise storage.explain("write", uri, error) from error


_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def _create_local(path: Path, content: bytes, mode: int) -> bool:
    with storage.write_partial(path, content, mode) as partial:
        try:
            os.link(partial, path)
        except FileExistsError:
            # A server of NFS also says so if the answer to the first request was lost; then the
            # file has both names.
            return partial.stat().st_nlink == 2
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            return _create_without_links(path, partial)
        return True


def _create_without_links(path: Path, partial: Path) -> bool:
    """Create a file on FAT, or on a network's file system without hard links.

    An empty file under the final name decides who is first; then the whole one replaces it. A
    process that is killed just between the two leaves the empty file.
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
    store, key = _open_store(uri, len(content))
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
        raise _explain("write", uri, error) from error
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
    store, key = _open_store(uri)
    try:
        found = obstore.get(store, key)
        return bytes(found.bytes()), _get_version(found.meta)
    except (BaseError, FileNotFoundError) as error:
        if isinstance(error, FileNotFoundError) and "NoSuchBucket" not in str(error):
            raise
        raise _explain("read", uri, error) from error


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


def _open_store(uri: str, size_bytes: int = 0) -> tuple[S3Store | GCSStore, str]:
    """Open the bucket of a URI as :func:`brainray.storage.resolve` does; return the key as well.

    Parameters
    ----------
    uri : str
        ``s3://`` or ``gs://``.
    size_bytes : int
        What is to be written in one request: obstore's timeout is for all of it.
    """
    filesystem, path = storage.resolve(uri)
    key = path.partition("/")[2]
    timeout_s = TIMEOUT_S * 2 ** (size_bytes // 2**20).bit_length()
    try:
        if isinstance(filesystem, S3FileSystem):
            return _open_s3(*filesystem.opened_with, filesystem.region, timeout_s), key
        parts = urlsplit(quote(uri, safe=storage.URI_CHARACTERS))
        return _open_gcs(parts.netloc, parts.query, timeout_s), key
    except (BaseError, OSError, ValueError) as error:
        if isinstance(error, StorageError):
            raise
        raise _explain("open", uri, error) from error


@lru_cache(maxsize=64)
def _open_s3(authority: str, query: str, endpoint: str, region: str, timeout_s: float) -> S3Store:
    given, _, bucket = authority.rpartition("@")
    options = dict(parse_qsl(query))
    endpoint = options.get("endpoint_override", endpoint)
    if endpoint and "://" not in endpoint:
        endpoint = f"{options.get('scheme', 'https')}://{endpoint}"
    credentials = _find_credentials(given)
    settings: dict[str, Any] = {"region": region, "skip_signature": credentials is None}
    if endpoint:
        settings["aws_endpoint_url_s3"] = endpoint  # goes before all that the environment says
    # pyarrow ignores HTTPS_PROXY and its like for S3; /0 is every address.
    client = _describe_client(timeout_s, plain=endpoint.startswith("http://")) | {
        "proxy_url": "http://127.0.0.1",
        "proxy_excludes": "*,127.0.0.1/0,::1/0",
    }
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


def _find_credentials(given: str) -> "S3CredentialProvider | None":
    """Find credentials as AWS's own tools do, which obstore does not in all cases.

    Parameters
    ----------
    given : str
        ``key:secret`` of the URI, percent-encoded, or nothing.

    Returns
    -------
    S3CredentialProvider or None
        None where there are no credentials.

    Raises
    ------
    StorageError
        The profile cannot be used.
    """
    if given:
        key, _, secret = given.partition(":")
        credential: S3Credential = {
            "access_key_id": unquote(key),
            "secret_access_key": unquote(secret),
            "token": None,
            "expires_at": None,
        }
        return lambda: credential
    import boto3  # half a second of imports
    from botocore.exceptions import BotoCoreError
    from obstore.auth.boto3 import Boto3CredentialProvider

    try:
        if boto3.Session().get_credentials() is None:
            return None
    except BotoCoreError as error:
        raise StorageError(f"Cannot use AWS's credentials: {error}") from error
    # A new session each time: other tools renew the keys of a profile in its file.
    return lambda: Boto3CredentialProvider(ttl=timedelta(seconds=KEYS_LIFE_S))()


@lru_cache(maxsize=64)
def _open_gcs(authority: str, query: str, timeout_s: float) -> GCSStore:
    user, _, bucket = authority.rpartition("@")
    options = dict(parse_qsl(query))
    scheme, endpoint = options.get("scheme", "https"), options.get("endpoint_override")
    settings: dict[str, Any] = {"base_url": f"{scheme}://{endpoint}"} if endpoint else {}
    limit_s = float(options.get("retry_limit_seconds", GCS_RETRY_S))
    # With skip_signature, obstore 0.12 would still want credentials for writing.
    anonymous: Any = {"token": "", "expires_at": None}
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


_METADATA = re.compile("/latest/(api/token|meta-data)")
_DETAIL = re.compile(
    r'(?:message|error): "([^"]+)"|(InvalidCertificate)|(TimedOut|IncompleteMessage)'
)


def _explain(action: str, uri: str, error: Exception) -> StorageError:
    return StorageError(f"Cannot {action} '{uri}': {_describe(uri, error)}")


def _describe(uri: str, error: Exception) -> str:
    """Say what went wrong as :func:`describe_error` does; obstore's own message has many lines."""
    text = " ".join(str(error).partition("\n\nDebug source")[0].split())
    reason = text.rpartition(" - ")[2]
    if not uri.startswith("s3://"):
        return reason
    # The service of the machine's role is the last that obstore asks for credentials.
    if _METADATA.search(text) or isinstance(error, UnauthenticatedError):
        return storage.DENIED
    if "Received redirect" in reason:
        return storage.OTHER_REGION
    if reason.startswith("HTTP error"):
        details = _DETAIL.findall(str(error))
        why = "".join(details[-1]) if details else reason
        return storage.S3_REMEDIES["NETWORK_CONNECTION"].format(why)
    code, status = re.search(r"<Code>(\w+)</Code>", text), re.search(r"status code: (\d+)", text)
    name = code[1] if code else ""
    number = status[1] if status else ""
    for key in (name, re.sub(r"(?<=.)(?=[A-Z])", "_", name).upper(), number):
        if key in storage.S3_REMEDIES:
            return storage.S3_REMEDIES[key].format(reason)
    if number == "501":
        return _NO_CONDITIONS
    if number.startswith("5"):
        return storage.FAILING.format(f"HTTP status {number}")
    return storage.DENIED if number == "403" and not name else reason
