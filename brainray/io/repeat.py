"""Call a function periodically in a thread."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def repeat(action: Callable[[], object], every_s: float, name: str) -> Iterator[None]:
    """Call an action every ``every_s`` seconds in a thread, until the block ends.

    The first call is after one interval. The end of the block waits for a running call.
    """
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(every_s):
            action()

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
