"""Keyed hashes that replace the identifiers of patients, and paths if they are redacted.

Only with the key can one test whether a guessed identifier is in a table. Hashes with the same key
can be joined; so all runs of an output use one key.
"""

import hmac
import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256

from brainray.errors import ConfigError
from brainray.io import storage
from brainray.io.conditional import create_bytes

MIN_KEY_BYTES = 16
NUM_KEY_BYTES = 32
"""Size of a generated key."""
KEY_FILE = ".identifier-key"
"""The key below an output, if none is given."""
CHECK_FILE = ".identifiers.json"
"""Below an output: a check that all runs use the same key and the same kind of names."""
DEIDENTIFIED_FILE = ".deidentified.json"
"""File in a de-identified export with its settings."""
REDACTED = "redacted:"
"""Prefix of the names of scans with redacted paths."""


@dataclass(frozen=True, slots=True)
class Identifiers:
    """How an output names scans and hashes identifiers."""

    key: bytes = field(repr=False)
    redact_paths: bool = False
    """Whether hashes replace paths too."""

    def name(self, uri: str) -> str:
        """Return the name of a scan or another URI: the URI, or its hash if paths are redacted.

        The hash includes spaces at the end, which hashes of identifiers ignore.
        """
        if not self.redact_paths:
            return uri
        return REDACTED + hmac.new(self.key, f"path {uri}".encode(), sha256).hexdigest()[:32]


def refuse_deidentified(folder_uri: str) -> None:
    """Raise ConfigError if a folder holds a de-identified export.

    Call this before writing paths, keys or DICOM objects that identify patients.
    """
    if storage.exists(storage.join(folder_uri, DEIDENTIFIED_FILE)):
        raise ConfigError(
            f"'{folder_uri}' holds a de-identified export, which results with identity must not "
            "be mixed with. Give another --output-uri."
        )


def read_key(key_uri: str) -> bytes:
    """Read a key: all bytes of a file; raises ConfigError if it is missing or too short."""
    try:
        key = storage.read_bytes(key_uri)
    except FileNotFoundError:
        key = b""
    if len(key) < MIN_KEY_BYTES:
        raise ConfigError(
            f"Expected a key of at least {MIN_KEY_BYTES} bytes in '{key_uri}', got {len(key)}. "
            f"Make one: head -c {NUM_KEY_BYTES} /dev/urandom > FILE."
        )
    return key


def open_identifiers(
    output_uri: str, key_uri: str | None = None, *, redact_paths: bool = False
) -> Identifiers:
    """Find the key of an output, and check that its earlier runs used the same.

    Parameters
    ----------
    output_uri : str
        Folder of the output; the caller holds its lock.
    key_uri : str, optional
        File with the key. Default: :data:`KEY_FILE` below the output, which is created from random
        bytes if it does not exist; on a disk only its owner may read it.
    redact_paths : bool
        Whether hashes replace paths.

    Raises
    ------
    ConfigError
        The key is too short, earlier runs used another key or the other ``redact_paths``, or the
        folder holds a de-identified export.
    """
    refuse_deidentified(output_uri)
    check_uri, own_uri = (storage.join(output_uri, name) for name in (CHECK_FILE, KEY_FILE))
    try:
        earlier = storage.read_json(check_uri)
    except FileNotFoundError:
        earlier = None
    remedy = (
        "Its rows could not be joined with new ones. Give that key as --id-key-file, or another "
        "--output-uri."
    )
    if key_uri is None and earlier is None:
        create_bytes(own_uri, secrets.token_bytes(NUM_KEY_BYTES), mode=0o600)
    elif key_uri is None and not storage.exists(own_uri):
        raise ConfigError(
            f"This output's identifiers were hashed with a key outside of it. {remedy}"
        )
    key = read_key(key_uri or own_uri)
    check = {"key_check": _compute_check(key), "redact_paths": redact_paths}
    if earlier is None:
        create_bytes(check_uri, json.dumps(check).encode())
        return Identifiers(key, redact_paths)
    if earlier["key_check"] != check["key_check"]:
        raise ConfigError(f"This output's identifiers were hashed with another key. {remedy}")
    if earlier["redact_paths"] != redact_paths:
        change = "Leave out" if redact_paths else "Give"
        raise ConfigError(
            "All rows of an output have either paths or hashes. "
            f"{change} --redact-paths, or give another --output-uri."
        )
    return Identifiers(key, redact_paths)


def read_identifiers(output_uri: str, key_uri: str | None = None) -> Identifiers:
    """Find the key of an output with predictions, and how its runs named scans; write nothing.

    Raises ConfigError if the output has no identifiers, or this is not their key.
    """
    check_uri, own_uri = (storage.join(output_uri, name) for name in (CHECK_FILE, KEY_FILE))
    try:
        earlier = storage.read_json(check_uri)
    except FileNotFoundError as error:
        raise ConfigError(
            f"Expected the output of `brainray classify` in '{output_uri}', found no {CHECK_FILE}."
        ) from error
    if key_uri is None and not storage.exists(own_uri):
        raise ConfigError(
            f"The key of the identifiers in '{output_uri}' is not in it. "
            "Give the file that its runs were given, as --id-key-file."
        )
    key = read_key(key_uri or own_uri)
    if _compute_check(key) != earlier["key_check"]:
        raise ConfigError(
            f"The identifiers in '{output_uri}' were hashed with another key than that in "
            f"'{key_uri or own_uri}'. Give the file that its runs were given, as --id-key-file."
        )
    return Identifiers(key, bool(earlier["redact_paths"]))


def _compute_check(key: bytes) -> str:
    return hmac.new(key, b"check", sha256).hexdigest()[:32]


def hide_paths(text: str, uris: Sequence[str]) -> str:
    """Replace the paths below some URIs in a message.

    Since a path may contain any character, everything from its start to the last quotation mark, or
    else to the end, is replaced. A glob counts up to its first wild card.
    """
    roots = {re.split(r"[*?\[]", uri)[0].rstrip("/") or "/" for uri in uris}
    pattern = "|".join(map(re.escape, sorted(roots, key=len, reverse=True)))
    return re.sub(rf"(?s)(?:{pattern})(?:.*(?=')|.*)", "redacted", text)
