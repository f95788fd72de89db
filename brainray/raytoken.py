"""The token of the Ray clusters that this user starts: who reads it runs code as this user."""

import contextlib
import os
import secrets
import tempfile
from pathlib import Path

TOKEN_PATH = (".ray", "auth_token")
"""Where Ray 2.60 keeps the token, below the home."""


def use_token_file() -> None:
    """Make the token before Ray does, and take it from all other users of this machine.

    Ray 2.60 makes one when it is started without, readable by all under the usual umask. A token
    that the environment gives (``RAY_AUTH_TOKEN``, ``RAY_AUTH_TOKEN_PATH``) is left alone, as is a
    home that cannot be written: Ray then says so itself. Drop this when Ray sets the mode.
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
