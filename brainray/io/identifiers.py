"""The key of the hashes that stand for identifiers.

Whoever holds the key can test whether a guessed identifier is in a table; nobody else can. Hashes
of one key can be joined, those of two cannot.
"""

from brainray import storage
from brainray.errors import ConfigError

MIN_KEY_BYTES = 16
NUM_KEY_BYTES = 32
"""Of a key that is made here."""


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
