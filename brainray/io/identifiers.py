"""The key of the hashes that stand for identifiers, and for paths that are not to be seen.

Whoever holds the key can test whether a guessed identifier is in a table; nobody else can. Hashes
of one key can be joined, those of two cannot: so an output has one key for all of its runs.
"""

import hmac
import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256

from brainray import storage
from brainray.errors import ConfigError
from brainray.io.conditional import create_bytes

MIN_KEY_BYTES = 16
NUM_KEY_BYTES = 32
"""Of a key that is made here."""
KEY_FILE = ".identifier-key"
"""Below an output: the key, where none is given."""
CHECK_FILE = ".identifiers.json"
"""Below an output: what tells whether a run has the key and the names of the runs before."""
_GIVE_KEY = (
    "Nothing could be joined with them. Give that key as --id-key-file, or another --output-uri."
)
REDACTED = "redacted:"
"""What the name of a scan begins with whose path is not to be seen."""


@dataclass(frozen=True, slots=True)
class Identifiers:
    """How the scans of an output, and what their files say of persons, are named."""

    key: bytes = field(repr=False)
    """Of the identifiers' hashes."""
    redact_paths: bool = False
    """Whether hashes stand for paths, too."""

    def name(self, uri: str) -> str:
        """Return the name of a scan, or of another URI: itself, or its hash.

        The hash is that of all its characters. That of identifiers leaves spaces at the end out,
        and would give two files one name.
        """
        if not self.redact_paths:
            return uri
        return REDACTED + hmac.new(self.key, f"path {uri}".encode(), sha256).hexdigest()[:32]


def read_key(key_uri: str) -> bytes:
    """Read a key from a file, all of whose bytes count.

    Raises
    ------
    ConfigError
        There is none, or it is too short.
    StorageError
        It cannot be read.
    """
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
    """Find the key of an output, and make sure that its earlier runs had the same.

    Parameters
    ----------
    output_uri : str
        Folder of the output, which this process alone writes to.
    key_uri : str, optional
        File with the key. Without it the output's own is used, :data:`KEY_FILE`, which is made
        from random bytes where there is none; on a disk only its owner may read it.
    redact_paths : bool
        Whether hashes stand for paths.

    Raises
    ------
    ConfigError
        The key is too short, is not that of the runs before, or they named scans the other way.
    StorageError
        The output cannot be written.
    """
    check_uri = storage.join(output_uri, CHECK_FILE)
    try:
        earlier = storage.read_json(check_uri)
    except FileNotFoundError:
        earlier = None
    own_uri = storage.join(output_uri, KEY_FILE)
    if key_uri is None and earlier is None:
        create_bytes(own_uri, secrets.token_bytes(NUM_KEY_BYTES), mode=0o600)
    elif key_uri is None and not storage.exists(own_uri):
        raise ConfigError(f"The key of this output's identifiers is not in it. {_GIVE_KEY}")
    key = read_key(key_uri or own_uri)
    check = {
        "key_check": _compute_check(key),
        "redact_paths": redact_paths,
    }
    if earlier is None:
        create_bytes(check_uri, json.dumps(check).encode())
        return Identifiers(key, redact_paths)
    if earlier["key_check"] != check["key_check"]:
        raise ConfigError(f"This output's identifiers were hashed with another key. {_GIVE_KEY}")
    if earlier["redact_paths"] != redact_paths:
        change = "Leave out" if redact_paths else "Give"
        raise ConfigError(
            "An output has either paths or their hashes in all of its rows. "
            f"{change} --redact-paths, or give another --output-uri."
        )
    return Identifiers(key, redact_paths)


def read_identifiers(output_uri: str, key_uri: str | None = None) -> Identifiers:
    """Find the key of an output and how its runs named scans; nothing is written.

    Parameters
    ----------
    output_uri : str
        Folder of an output that has predictions.
    key_uri : str, optional
        File with the key, if it is not in the output.

    Raises
    ------
    ConfigError
        The output has no identifiers, or this is not their key.
    StorageError
        The output cannot be read.
    """
    try:
        earlier = storage.read_json(storage.join(output_uri, CHECK_FILE))
    except FileNotFoundError as error:
        raise ConfigError(
            f"Expected the output of `brainray classify` in '{output_uri}', found no {CHECK_FILE}."
        ) from error
    own_uri = storage.join(output_uri, KEY_FILE)
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
    """Return a message without the paths that begin with some URIs.

    Each is cut out up to the last quotation mark behind it, or the end: a path may hold anything.
    A pattern counts up to its first wild card.
    """
    roots = {re.split(r"[*?\[]", uri)[0].rstrip("/") or "/" for uri in uris}
    pattern = "|".join(map(re.escape, sorted(roots, key=len, reverse=True)))
    return re.sub(rf"(?s)(?:{pattern})(?:.*(?=')|.*)", "redacted", text)
