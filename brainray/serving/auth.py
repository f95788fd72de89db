"""The token that opens the service."""

import hashlib
import hmac
import logging
import stat
from collections.abc import Mapping
from pathlib import Path

from brainray.errors import ConfigError
from brainray.serving.problem import Problem

TOKEN_VARIABLE = "BRAINRAY_API_TOKEN"
MIN_TOKEN_CHARACTERS = 16
OPEN_PATHS = ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready")
"""Paths that need no token: what a load balancer asks."""
PAGE_PATHS = ("/", "/favicon.ico")
"""The page, which asks for the token; with everything below /static/."""

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


class Guard:
    """Lets through who has the token; everybody where there is none."""

    def __init__(self, token: str | None) -> None:
        self._digest = None if token is None else _digest(token.encode())

    @property
    def is_closed(self) -> bool:
        """Whether a token is needed."""
        return self._digest is not None

    def check(self, path: str, authorization: bytes | None) -> None:
        """Check a request's header, in a time that tells nothing of the token.

        Raises
        ------
        Problem
            ``unauthorized``.
        """
        if self._digest is None or is_open(path):
            return
        scheme, _, given = (authorization or b"").partition(b" ")
        known = hmac.compare_digest(_digest(given.strip()), self._digest)
        if scheme.lower() != b"bearer" or not known:
            raise Problem(
                "unauthorized",
                "Expected the header `Authorization: Bearer TOKEN` with this service's token.",
                {"www-authenticate": 'Bearer realm="brainray"'},
            )


def is_open(path: str) -> bool:
    """Tell whether a path needs no token."""
    return path in OPEN_PATHS or path in PAGE_PATHS or path.startswith("/static/")


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()
