"""Something done again and again beside the main work."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def repeat(action: Callable[[], object], every_s: float, name: str) -> Iterator[None]:
    """Call an action in a thread of its own, at such intervals, until the block ends.

    The first call is an interval after the beginning. The end waits for a call that is under way.
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
