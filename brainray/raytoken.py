"""Protect the token of Ray: whoever can read it can run code as this user."""

import contextlib
import os
import secrets
import tempfile
from pathlib import Path

TOKEN_PATH = (".ray", "auth_token")
"""Path of Ray's token below the home directory (Ray 2.60)."""


def protect_token_file() -> None:
    """Create Ray's token file if it is missing, and set its permissions to 600.

    Ray 2.60 creates the file with the permissions of the umask, so that usually all users can read
    it. If the environment gives a token (``RAY_AUTH_TOKEN``, ``RAY_AUTH_TOKEN_PATH``), nothing is
    changed. If the home directory is not writable, nothing is done; Ray reports the error. Remove
    this function when Ray sets the mode.
    """
    if os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}:
        return
    file = Path.home().joinpath(*TOKEN_PATH)
    try:
        file.parent.mkdir(mode=0o700, exist_ok=True)
        if not file.exists():
            with tempfile.NamedTemporaryFile("w", dir=file.parent) as complete:  # mode 600
                complete.write(secrets.token_hex(32))
                complete.flush()
                with contextlib.suppress(FileExistsError):  # another process created it
                    os.link(complete.name, file)
        file.chmod(0o600)
    except OSError:
        return
