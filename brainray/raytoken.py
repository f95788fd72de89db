"""The token of this user's Ray clusters: anyone who reads it can run code as this user."""

import contextlib
import os
import secrets
import tempfile
from pathlib import Path

TOKEN_PATH = (".ray", "auth_token")
"""Where Ray 2.60 keeps the token, below the home."""


def protect_token_file() -> None:
    """Create the token file if there is none, and make it readable by this user only.

    Ray 2.60 would create it readable by all users under the usual umask. A token from the
    environment (``RAY_AUTH_TOKEN``, ``RAY_AUTH_TOKEN_PATH``) is not changed. If the home directory
    cannot be written, Ray reports it. Remove this function when Ray sets the mode.
    """
    if os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}:
        return
    file = Path.home().joinpath(*TOKEN_PATH)
    try:
        file.parent.mkdir(mode=0o700, exist_ok=True)
        if not file.exists():
            with tempfile.NamedTemporaryFile("w", dir=file.parent) as whole:  # of mode 600
                whole.write(secrets.token_hex(32))
                whole.flush()
                with contextlib.suppress(FileExistsError):  # another process was first
                    os.link(whole.name, file)
        file.chmod(0o600)
    except OSError:
        return
