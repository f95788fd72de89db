"""Write a file only if it does not exist, or only if it has the expected version.

On a disk a hard link creates the file. On object stores :mod:`obstore` sends the conditions
(``If-None-Match``, ``If-Match``, or a generation), which pyarrow 26 cannot.
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

from brainray.errors import StorageError
from brainray.io import storage
from brainray.io.storage import GCS_RETRY_S, MAX_ATTEMPTS, TIMEOUT_S, S3FileSystem

if TYPE_CHECKING:  # obstore has these in its stubs only
    from obstore import UpdateVersion
    from obstore.store import S3Credential, S3CredentialProvider

KEYS_LIFE_S = 300.0
"""Time after which the keys of a profile or a role are read again."""

_NO_CONDITIONS = (
    "the service does not support conditional writes (If-None-Match and If-Match), which brainray "
    "needs to exclude a second run. Update the service, or give a URI on another one."
)


def create_bytes(uri: str, content: bytes, *, mode: int = 0o666) -> bool:
    """Create one file, completely or not at all, unless it exists; return whether it did not.

    Of several concurrent calls for the same file one succeeds. If an object store does not respond,
    which raises StorageError, the file may exist nevertheless. ``mode`` gives the permissions of a
    local file, reduced by the process's umask.
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
            # NFS also reports this if the response to the first request was lost. Then the file
            # has both names.
            return partial.stat().st_nlink == 2
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            return _create_without_links(path, partial)
        return True


def _create_without_links(path: Path, partial: Path) -> bool:
    """Create a file on a file system without hard links, such as FAT.

    Creating an empty file decides which process is first; the complete file then replaces it. A
    process that is killed in between leaves the empty file.
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
"""Attribute of an object with the id of the write that created it."""
_TIMED_OUT = "kind: Timeout"  # in messages of obstore 0.12


def write_object(
    uri: str, content: bytes, expected: "UpdateVersion | None"
) -> "UpdateVersion | None":
    """Write one object if its present version is the expected one.

    Parameters
    ----------
    uri : str
        ``s3://`` or ``gs://``.
    content : bytes
        Versions with the same content may have the same ETag.
    expected : UpdateVersion or None
        The version to replace; None if the object must not exist.

    Returns
    -------
    UpdateVersion or None
        The new version; None if the present version is another, which is not changed.

    Raises
    ------
    StorageError
        The object cannot be written. If the service did not respond, it may still execute the
        request, under the same condition.
    """
    store, key = _open_store(uri, len(content))
    write_id = uuid.uuid4().hex
    about = {_WRITE_ID: write_id}
    try:
        for left in reversed(range(MAX_ATTEMPTS)):
            try:
                written = obstore.put(
                    store, key, content, mode=expected or "create", attributes=about
                )
                return _get_version(written)
            except (AlreadyExistsError, PreconditionError):
                # This also happens if the first attempt was executed and its response was lost.
                # The id tells.
                found = _find_write(store, key)
                if found is not None and found[0] == write_id:
                    return found[1]
                if found is not None or expected is not None:
                    return None
                # S3 also reports this during another write, which may have failed since.
                if not left:
                    raise
            except BaseError as error:
                # obstore repeats a write after other errors, but not after a timeout, since the
                # first attempt may still be executed. The condition and the id make that safe.
                if _TIMED_OUT not in str(error) or not left:
                    raise
    except (BaseError, FileNotFoundError) as error:  # no such bucket
        raise _explain("write", uri, error) from error
    raise AssertionError("every last attempt returns or raises")


def _find_write(store: S3Store | GCSStore, key: str) -> "tuple[object, UpdateVersion] | None":
    """Return the id of the write that created an object, and the version; None without object."""
    try:
        found = obstore.get(store, key, options={"head": True})
    except FileNotFoundError:
        return None
    return found.attributes.get(_WRITE_ID), _get_version(found.meta)


def _get_version(described: Any) -> "UpdateVersion":  # noqa: ANN401 - of a put or a get
    """Return the version; obstore accepts no None in it."""
    version: UpdateVersion = {"e_tag": described["e_tag"]}
    if described["version"] is not None:
        version["version"] = described["version"]
    return version


def read_object(uri: str) -> "tuple[bytes, UpdateVersion]":
    """Read one object and its version; FileNotFoundError if it does not exist."""
    store, key = _open_store(uri)
    try:
        found = obstore.get(store, key)
        return bytes(found.bytes()), _get_version(found.meta)
    except (BaseError, FileNotFoundError) as error:
        if isinstance(error, FileNotFoundError) and "NoSuchBucket" not in str(error):
            raise
        raise _explain("read", uri, error) from error


def check_conditional_writes(uri: str, content: bytes) -> None:
    """Raise StorageError if a service ignores the conditions of :func:`write_object`.

    Some services with the API of S3 do so without an error, and then write the content, which must
    be the object's present one.
    """
    number = uuid.uuid4()
    other: UpdateVersion = {"e_tag": f'"{number.hex}"', "version": f"{number.int % 10**15}"}
    for expected in (None, other):
        if write_object(uri, content, expected) is not None:
            raise StorageError(f"Cannot use '{uri}': {_NO_CONDITIONS}")


def _open_store(uri: str, size_bytes: int = 0) -> tuple[S3Store | GCSStore, str]:
    """Open the bucket of a URI with the settings of :func:`brainray.io.storage.resolve`."""
    filesystem, path = storage.resolve(uri)
    key = path.partition("/")[2]
    # obstore's timeout is for the whole request.
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
        settings["aws_endpoint_url_s3"] = endpoint  # overrides the environment
    # Ignore HTTPS_PROXY and the like, as pyarrow does for S3; /0 is every address.
    more: dict[str, Any] = {
        "proxy_url": "http://127.0.0.1",
        "proxy_excludes": "*,127.0.0.1/0,::1/0",
    }
    bundle = options.get("tls_ca_file_path", os.environ.get("AWS_CA_BUNDLE"))
    if bundle:
        more["root_certificate"] = Path(bundle).read_bytes()
    return S3Store(
        bucket,
        config=settings,  # type: ignore[arg-type]
        credential_provider=credentials,
        **_limit(timeout_s, 180.0, allow_http=endpoint.startswith("http://"), **more),
    )


def _find_credentials(given: str) -> "S3CredentialProvider | None":
    """Find credentials as AWS's tools do, since obstore supports fewer sources; None without any.

    ``given`` is ``key:secret`` of the URI, percent-encoded, or an empty string.
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
    # A new session each time, since other tools renew the keys in the profile's file.
    return lambda: Boto3CredentialProvider(ttl=timedelta(seconds=KEYS_LIFE_S))()


@lru_cache(maxsize=64)
def _open_gcs(authority: str, query: str, timeout_s: float) -> GCSStore:
    user, _, bucket = authority.rpartition("@")
    options = dict(parse_qsl(query))
    scheme, endpoint = options.get("scheme", "https"), options.get("endpoint_override")
    settings: dict[str, Any] = {"base_url": f"{scheme}://{endpoint}"} if endpoint else {}
    limit_s = float(options.get("retry_limit_seconds", GCS_RETRY_S))
    # With skip_signature obstore 0.12 still requires credentials for writing.
    anonymous: Any = {"token": "", "expires_at": None}
    return GCSStore(
        bucket,
        config=settings,  # type: ignore[arg-type]
        credential_provider=(lambda: anonymous) if user == "anonymous" else None,
        **_limit(timeout_s, limit_s, allow_http=scheme == "http"),
    )


def _limit(timeout_s: float, limit_s: float, **client: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return obstore's options of a client: its time limits, and others."""
    return {
        "client_options": {
            "connect_timeout": timedelta(seconds=TIMEOUT_S),
            "timeout": timedelta(seconds=timeout_s),
            **client,
        },
        "retry_config": {
            "max_retries": MAX_ATTEMPTS - 1,
            "retry_timeout": timedelta(seconds=limit_s),
            "backoff": {
                "init_backoff": timedelta(seconds=0.1),
                "max_backoff": timedelta(seconds=8),
                "base": 4,
            },
        },
    }


_METADATA = re.compile("/latest/(api/token|meta-data)")
_DETAIL = re.compile(
    r'(?:message|error): "([^"]+)"|(InvalidCertificate)|(TimedOut|IncompleteMessage)'
)


def _explain(action: str, uri: str, error: Exception) -> StorageError:
    return StorageError(f"Cannot {action} '{uri}': {_describe(uri, error)}")


def _describe(uri: str, error: Exception) -> str:
    """Describe an error like :func:`brainray.io.storage.describe_error`, in one line."""
    text = " ".join(str(error).partition("\n\nDebug source")[0].split())
    reason = text.rpartition(" - ")[2]
    if not uri.startswith("s3://"):
        return reason
    # The last source of credentials that obstore tries is the metadata service.
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
    if number == "501":
        return _NO_CONDITIONS
    of_pyarrow = re.sub(r"(?<=.)(?=[A-Z])", "_", name).upper()
    remedy = storage.find_remedy(name, of_pyarrow, status=number, message=reason)
    return remedy or (storage.DENIED if number == "403" and not name else reason)
