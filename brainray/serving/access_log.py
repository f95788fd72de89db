"""The access log: a line of JSON for each request."""

import os
from typing import Any

import orjson

from brainray.errors import ConfigError

STDERR = 2


class AccessLog:
    """Writes lines, and never waits for whoever reads them.

    Parameters
    ----------
    path : str, optional
        A file or a pipe, appended to; standard error if not given.

    Raises
    ------
    ConfigError
        The file cannot be opened.
    """

    def __init__(self, path: str | None = None) -> None:
        self.num_dropped = 0
        """Lines that could not be written in time."""
        self._file = STDERR
        if path is not None:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK
            try:
                self._file = os.open(path, flags, 0o600)
            except OSError as error:
                raise ConfigError(
                    f"Cannot write the log to '{path}' ({error.strerror}). Pass another --log-path."
                ) from error

    def write(self, record: dict[str, Any]) -> None:
        """Write one line."""
        try:
            os.write(self._file, orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))
        except OSError:  # a full pipe, a full disk: requests are answered all the same
            self.num_dropped += 1
