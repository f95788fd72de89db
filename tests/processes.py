"""Waits for commands that a test has started."""

import subprocess
import time
from collections.abc import Callable

TIMEOUT_S = 900.0
"""Longer than any slow command: a submitted training took 210 s on two cores."""


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait until a command ends; return its exit status and output."""
    output, _ = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, output


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait until a condition holds; fail if the command ends before."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
