"""Waiting for a command that a test has started."""

import subprocess
import time
from collections.abc import Callable

TIMEOUT_S = 900.0
"""Tells a command that hangs from a slow one: a submit of training took 210 s on two cores."""


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Return the status and the output of a command that comes to its end."""
    output, _ = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, output


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait until something has happened while a command runs."""
    deadline = time.monotonic() + TIMEOUT_S
    while not happened():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
