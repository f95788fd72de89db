"""The words of ASGI, and the name that a request goes by."""

import re
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Scope = Message
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

SANE_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,64}")


def name_request(given: bytes | None) -> str:
    """Return the client's name for a request if it is sane, else a new one."""
    if given is not None and SANE_REQUEST_ID.fullmatch(given):
        return given.decode()
    return uuid.uuid4().hex
