"""The token that requests to the service need."""

import logging
import stat
from collections.abc import Mapping
from pathlib import Path

from brainray.errors import ConfigError

TOKEN_VARIABLE = "BRAINRAY_API_TOKEN"
MIN_TOKEN_CHARACTERS = 16

logger = logging.getLogger(__name__)


def read_token(path: str | None, environment: Mapping[str, str]) -> str | None:
    """Read the token from a file, else from the environment; None where there is neither.

    Raises
    ------
    ConfigError
        The file cannot be read, or the token is too short or not one word.
    """
    if path is not None:
        token, where = _read_file(path), f"'{path}'"
    elif TOKEN_VARIABLE in environment:
        token, where = environment[TOKEN_VARIABLE], f"${TOKEN_VARIABLE}"
    else:
        return None
    token = token.strip()
    if len(token) < MIN_TOKEN_CHARACTERS or not token.isascii() or len(token.split()) != 1:
        raise ConfigError(
            f"Expected a token of at least {MIN_TOKEN_CHARACTERS} ASCII characters without spaces "
            f"in {where}, got {len(token)} characters. Make one with `openssl rand -hex 32`."
        )
    return token


def _read_file(path: str) -> str:
    file = Path(path).expanduser()
    try:
        mode = file.stat().st_mode
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"Cannot read the token file '{path}' ({error.strerror}). "
            "Make one with `openssl rand -hex 32 > FILE; chmod 600 FILE`."
        ) from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        logger.warning("Others may read the token file %s: `chmod 600` it.", path)
    return content.decode("ascii", errors="replace")
