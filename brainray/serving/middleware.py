"""Work on every request: its id, the token, the limits, its problem body and its log line."""

import hashlib
import hmac
import logging
import os
import re
import stat
import time
import uuid
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import orjson
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from brainray.errors import ConfigError
from brainray.serving.metrics import Metrics
from brainray.serving.options import ServiceLimits
from brainray.serving.problem import CLOSE, LENGTH, Problem, make_response

STATIC, OTHER = "/static/", "other"
"""In logs and metrics: files of the page; paths and methods that the service does not have."""
SAFE_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
HEALTH_PATHS = ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready")
"""A load balancer requests them without a token."""
PAGE_PATHS = ("/", "/favicon.ico")
"""The page, which prompts for the token; also everything below /static/."""
CLIENT_DISCONNECTED = 499
VALID_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
TOKEN_VARIABLE = "BRAINRAY_API_TOKEN"
MIN_TOKEN_CHARACTERS = 16

logger = logging.getLogger(__name__)


class AccessLog:
    """Appends a line of JSON for each request to a file or a pipe, without ever blocking."""

    def __init__(self, path: str | None = None) -> None:
        self.num_dropped = 0
        """Lines that could not be written at once."""
        self._file = 2  # standard error
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
        except OSError:  # a full pipe or disk must not fail the request
            self.num_dropped += 1


def read_token(path: str | None, environment: Mapping[str, str]) -> str | None:
    """Read the token from a file, else from the environment; return None if neither has one."""
    if path is None and TOKEN_VARIABLE not in environment:
        return None
    if path is None:
        token, where = environment[TOKEN_VARIABLE], f"${TOKEN_VARIABLE}"
    else:
        file, where = Path(path).expanduser(), f"'{path}'"
        try:
            mode, token = file.stat().st_mode, file.read_bytes().decode("ascii", errors="replace")
        except OSError as error:
            raise ConfigError(
                f"Cannot read the token file '{path}' ({error.strerror}). "
                "Make one with `openssl rand -hex 32 > FILE; chmod 600 FILE`."
            ) from error
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            logger.warning("Other users may read the token file %s: `chmod 600` it.", path)
    token = token.strip()
    if len(token) < MIN_TOKEN_CHARACTERS or not token.isascii() or len(token.split()) != 1:
        raise ConfigError(
            f"Expected a token of at least {MIN_TOKEN_CHARACTERS} ASCII characters without spaces "
            f"in {where}, got {len(token)} characters. Make one with `openssl rand -hex 32`."
        )
    return token


def is_public(path: str) -> bool:
    """Return whether a path needs no token."""
    return path in HEALTH_PATHS or path in PAGE_PATHS or path.startswith(STATIC)


def _hash(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


class ServiceMiddleware:
    """Checks the token and the limits, turns exceptions into problem bodies, counts and logs.

    Log and metrics name only ``paths``. Without a token no request needs one. Ray Serve returns the
    request's id in a header itself; elsewhere ``sends_request_id`` does it.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        paths: Collection[str],
        token: str | None,
        limits: ServiceLimits,
        metrics: Metrics,
        access_log: AccessLog,
        sends_request_id: bool,
    ) -> None:
        self._app, self._paths, self._limits = app, frozenset(paths), limits
        self._digest = None if token is None else _hash(token.encode())
        self._metrics, self._access_log = metrics, access_log
        self._sends_request_id = sends_request_id
        self._in_flight = self._buffered_bytes = 0
        metrics.add_gauge("in_flight_requests", "Requests in flight.", lambda: self._in_flight)
        metrics.add_gauge("buffered_bytes", "Body bytes in memory.", lambda: self._buffered_bytes)
        metrics.add_gauge("log_lines_dropped", "Lost log lines.", lambda: access_log.num_dropped)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "websocket":  # not supported
            await send({"type": "websocket.close", "code": 1000})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if VALID_REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state.update(request_id=request_id, started=time.perf_counter(), body_bytes=0, body_ms=0.0)
        status = CLIENT_DISCONNECTED  # until the response starts

        async def send_response(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in SAFE_HEADERS.items():
                    headers.setdefault(name, value)
                if self._sends_request_id:
                    headers["x-request-id"] = request_id
            await send(message)

        error: Exception | None = None
        try:
            self._check_token(scope)
            await self._answer(scope, receive, send_response)
        except ClientDisconnect:
            pass
        except Exception as raised:
            error = raised
            if status == CLIENT_DISCONNECTED:
                await make_response(raised, scope)(scope, receive, send_response)
        finally:
            self._record(scope, status, error)

    def _check_token(self, scope: Scope) -> None:
        if self._digest is None or is_public(scope["path"]):
            return
        given = Headers(scope=scope).get("authorization", "").encode("latin-1")
        scheme, _, token = given.partition(b" ")
        is_valid = hmac.compare_digest(_hash(token.strip()), self._digest)
        if scheme.lower() != b"bearer" or not is_valid:
            raise Problem(
                "unauthorized",
                "Expected the header `Authorization: Bearer TOKEN` with this service's token.",
                {"www-authenticate": 'Bearer realm="brainray"'},
            )

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._in_flight += 1
        try:
            is_exempt = scope["path"] in (*HEALTH_PATHS, "/metrics")  # answered under any load
            if self._in_flight > self._limits.in_flight and not is_exempt:
                raise Problem(
                    "too_busy",
                    f"{self._limits.in_flight} requests are in flight, which is the limit. "
                    "Try again later.",
                )
            declared = Headers(scope=scope).get("content-length", "0")
            if not LENGTH.fullmatch(declared):
                raise Problem("invalid_request", "Content-Length is not a number.", CLOSE)
            self._check_size(int(declared))
            await self._app(scope, partial(self._receive, scope["state"], receive), send)
        finally:
            self._in_flight -= 1
            self._buffered_bytes -= scope["state"]["body_bytes"]

    def _check_size(self, size: int) -> None:
        if size > self._limits.body_bytes:
            raise Problem(
                "body_too_large",
                f"A request body may have {self._limits.body_bytes:,} bytes. "
                "Send fewer or smaller files.",
                CLOSE,
            )

    async def _receive(self, state: dict[str, Any], receive: Receive) -> Message:
        """Receive a part of the body, and count its bytes."""
        message = await receive()
        size = len(message.get("body", b""))
        self._check_size(state["body_bytes"] + size)
        if self._buffered_bytes + size > self._limits.buffered_bytes:
            detail = "Too many bytes of request bodies are in memory. Try again later."
            raise Problem("too_busy", detail, CLOSE)
        state["body_bytes"] += size
        state["body_ms"] = (time.perf_counter() - state["started"]) * 1e3
        self._buffered_bytes += size
        return message

    def _record(self, scope: Scope, status: int, error: Exception | None) -> None:
        state, path = scope["state"], scope["path"]
        if path not in self._paths:
            path = STATIC if path.startswith(STATIC) else OTHER
        method = scope["method"] if scope["method"] in ("GET", "POST") else OTHER
        seconds = time.perf_counter() - state["started"]
        self._metrics.count_request(path, method, status, seconds)
        record = {
            "time": time.time(),
            "request_id": state["request_id"],
            "method": method,
            "path": path,
            "status": status,
            "duration_ms": round(seconds * 1e3, 2),
            "body_bytes": state["body_bytes"],
            "body_ms": round(state["body_ms"], 2),
        }
        if error is not None and not isinstance(error, Problem):
            record["error"] = type(error).__name__
        self._access_log.write(record)
