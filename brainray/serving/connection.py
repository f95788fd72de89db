"""What stands before Ray Serve's HTTP server: limits on connections, and on control headers.

Ray Serve runs uvicorn and offers no option for these; uvicorn itself has none for the time and the
size of headers. :func:`install` is what Ray's RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names: the
process that listens calls it before it does. (uvicorn 0.54, Ray 2.60.)
"""

import asyncio
import json
import os
from asyncio import TimerHandle
from dataclasses import asdict
from typing import Any

import orjson
import ray
from ray.serve._private import replica
from ray.serve._private.http_util import start_asgi_http_server
from starlette.middleware import Middleware
from uvicorn import config as uvicorn_config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from brainray.serving.asgi import App, Message, Receive, Scope, Send, name_request
from brainray.serving.limits import ConnectionLimits
from brainray.serving.problem import PROBLEM_TYPE, name_status

INSTALLER = "brainray.serving.connection.install"
DIRECT_VARIABLE = "RAY_SERVE_ENABLE_DIRECT_INGRESS"
LIMITS_VARIABLE = "BRAINRAY_CONNECTION_LIMITS"
FOR_RAY = frozenset(
    {
        b"x-request-timeout-seconds",
        b"x-request-disconnect-disabled",
        b"serve_multiplexed_model_id",
        b"serve-multiplexed-model-id",
        b"x-session-id",
        b"x_session_id",
    }
)
"""Headers with which Ray lets a client turn off its limits, or choose replicas."""

_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
    b"content-length: 0\r\nconnection: close\r\n\r\n"
)


def install() -> list[Middleware]:
    """Put :class:`WatchedConnection` in the place of uvicorn's, and return the threshold.

    Where the ingress listens itself, Serve starts its proxy all the same, on a port of its own:
    that one is closed.
    """
    uvicorn_config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{WatchedConnection.__name__}"
    replica.start_asgi_http_server = _listen_at_once  # type: ignore[attr-defined]
    name = ray.get_runtime_context().get_actor_name() or ""
    if os.environ.get(DIRECT_VARIABLE) == "1" and name.startswith("SERVE_PROXY"):
        return [Middleware(Closed)]
    return [Middleware(Threshold)]


async def _listen_at_once(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401 - Ray's own
    """Start the server of a replica, also on a port that had connections a moment ago.

    Ray 2.60 binds it without SO_REUSEADDR. After an ingress was killed, the kernel keeps its port
    for a minute; the one that took its place failed to bind, Ray struck the port off its list, and
    the service never listened again. Drop this when Ray's direct ingress sets the option.
    """
    return await start_asgi_http_server(*arguments, **{**options, "enable_so_reuseport": True})


def write_environment(limits: ConnectionLimits) -> dict[str, str]:
    """Return the variables under which the listening process applies these limits."""
    return {
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": INSTALLER,
        LIMITS_VARIABLE: json.dumps(asdict(limits)),
    }


def read_limits() -> ConnectionLimits:
    """Read the limits that :func:`write_environment` wrote."""
    return ConnectionLimits(**json.loads(os.environ.get(LIMITS_VARIABLE, "{}")))


class WatchedConnection(HttpToolsProtocol):
    """A connection that has to say something, in time, and not too much."""

    _limits: ConnectionLimits | None = None

    def connection_made(self, transport: Any) -> None:  # noqa: ANN401 - as uvicorn has it
        """Start the time for headers, or close when there are too many connections."""
        super().connection_made(transport)
        if WatchedConnection._limits is None:
            WatchedConnection._limits = read_limits()
        self._most = WatchedConnection._limits
        self._header_bytes = 0
        self._timer: TimerHandle | None = None
        if len(self.connections) > self._most.connections:
            transport.close()
            return
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the time."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count what belongs to headers, and stop when it is too much."""
        if self._is_between_requests():
            self._header_bytes += len(data)
            if self._timer is None:
                self._start_timer()
            # A body may come with its headers: 64 KiB, what is read at a time, is not judged.
            if self._header_bytes - len(data) > self._most.header_bytes:
                self._refuse()
                return
        super().data_received(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Refuse a header too much."""
        super().on_header(name, value)
        size = len(self.url) + sum(len(a) + len(b) for a, b in self.headers)
        if size > self._most.header_bytes:
            self._refuse()

    def on_headers_complete(self) -> None:
        """End the time for headers."""
        self._stop_timer()
        self._header_bytes = 0
        if not self.transport.is_closing():
            super().on_headers_complete()

    def _is_between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(self._most.header_s, self._end)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end(self) -> None:
        self._timer = None
        if not self.transport.is_closing():
            self.transport.close()

    def _refuse(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(_TOO_LARGE)
            self.transport.close()


class Closed:
    """Answers nothing."""

    def __init__(self, app: App) -> None:
        del app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse one request."""
        del receive
        if scope["type"] == "http":
            headers = [(b"content-length", b"0"), (b"connection", b"close")]
            await send({"type": "http.response.start", "status": 404, "headers": headers})
            await send({"type": "http.response.body", "body": b""})


class Threshold:
    """Takes what is meant for Ray out of requests, and gives Ray's own refusals a problem body."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = [(name, value) for name, value in scope["headers"] if name not in FOR_RAY]
        given = next((value for name, value in headers if name == b"x-request-id"), None)
        request_id = name_request(given)
        scope["headers"] = [
            *((name, value) for name, value in headers if _is_sane(name)),
            (b"x-request-id", request_id.encode()),
        ]
        try:
            await self._app(scope, receive, _Translator(send, request_id))
        except asyncio.CancelledError:  # the client has left; uvicorn would print a traceback
            return


def _is_sane(name: bytes) -> bool:
    return name != b"x-request-id" and name.isascii()


class _Translator:
    """Sends an answer on, with a problem in the place of Ray's plain text."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send, self._request_id = send, request_id
        self._start: Message | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = dict(message.get("headers", ()))
            kind = headers.get(b"content-type", b"")
            if message["status"] >= 400 and kind.startswith(b"text/plain"):
                self._start = message
                return
        elif self._start is not None:
            if not message.get("more_body", False):
                await self._send_problem(self._start)
            return
        await self._send(message)

    async def _send_problem(self, start: Message) -> None:
        status = 503 if start["status"] == 500 else start["status"]  # a replica died under it
        code = name_status(status)
        body = orjson.dumps(
            {
                "type": f"urn:brainray:problem:{code}",
                "title": "The service is busy or restarting",
                "status": status,
                "detail": "The request reached no replica that could answer it. Try again.",
                "code": code,
                "request_id": self._request_id,
            }
        )
        kept = [pair for pair in start["headers"] if pair[0] in (b"retry-after", b"x-request-id")]
        headers = [
            *kept,
            (b"content-type", PROBLEM_TYPE.encode()),
            (b"content-length", str(len(body)).encode()),
        ]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})
