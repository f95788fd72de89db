"""What happens to every request: an id, a problem body, a line of log; the token; the limits.

Plain ASGI middleware, outermost first: :class:`RequestContext`, :class:`TokenAuth`,
:class:`RequestLimits`.
"""

import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from brainray.serving.access_log import AccessLog
from brainray.serving.metrics import Metrics
from brainray.serving.options import ServiceLimits
from brainray.serving.problem import Problem, render_problem

FAULT = "Something went wrong; the service's log says what, under the request_id."
STATIC, OTHER = "/static/", "other"
"""What logs call the files of the page, and paths and methods that the service does not have."""
SAFE_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
HEALTH_PATHS = ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready")
"""Paths that a load balancer asks: they need no token."""
PAGE_PATHS = ("/", "/favicon.ico")
"""The page, which asks for the token; with everything below /static/."""
CLIENT_LEFT = 499
CLOSE = {"connection": "close"}
"""The rest of a refused body is not read, so nothing else can follow on the connection."""
VALID_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")

logger = logging.getLogger(__name__)


class RequestContext:
    """Gives a request its id, turns what is raised into a problem body, and counts and logs it.

    Parameters
    ----------
    paths : collection of str
        Paths that log and metrics name.
    sends_request_id : bool
        Whether to send the id back; Ray Serve does it by itself.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        paths: Collection[str],
        metrics: Metrics,
        access_log: AccessLog,
        sends_request_id: bool,
    ) -> None:
        self._app, self._paths = app, frozenset(paths)
        self._metrics, self._access_log = metrics, access_log
        self._sends_request_id = sends_request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "websocket":  # there is none here
            await send({"type": "websocket.close", "code": 1000})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        request_id = read_request_id(scope)
        state = scope.setdefault("state", {})
        state.update(request_id=request_id, started=started, body_bytes=0, body_ms=0.0)
        status = CLIENT_LEFT  # until an answer starts

        async def send_answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._complete_headers(message, request_id)
            await send(message)

        error: Exception | None = None
        try:
            await self._app(scope, receive, send_answer)
        except ClientDisconnect:
            pass
        except Exception as raised:
            error = raised
            if status == CLIENT_LEFT:
                await make_response(raised, scope)(scope, receive, send_answer)
        finally:
            self._record(scope, status, error)

    def _complete_headers(self, start: Message, request_id: str) -> None:
        headers = MutableHeaders(scope=start)
        for name, value in SAFE_HEADERS.items():
            headers.setdefault(name, value)
        if self._sends_request_id:
            headers["x-request-id"] = request_id

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


def read_request_id(scope: Scope) -> str:
    """Return the client's id for a request if it is short and plain, else a new one."""
    given = Headers(scope=scope).get("x-request-id", "")
    return given if VALID_REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def make_response(error: Exception, scope: Scope) -> Response:
    """Return the problem body of what a request raised; what is no :class:`Problem` is logged."""
    request_id = scope["state"]["request_id"]
    if not isinstance(error, Problem):
        logger.error("Request %s failed.", request_id, exc_info=error)
        error = Problem("internal", FAULT)
    if scope["path"].startswith("/v2"):  # where that protocol's clients look for it
        error.members["error"] = error.detail
    body, headers = render_problem(error, request_id)
    return Response(body, error.status, headers)


class TokenAuth:
    """Refuses requests without the token, in a time that tells nothing of it.

    Parameters
    ----------
    token : str, optional
        Without one every request passes.
    """

    def __init__(self, app: ASGIApp, *, token: str | None) -> None:
        self._app = app
        self._digest = None if token is None else _hash(token.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on.

        Raises
        ------
        Problem
            ``unauthorized``.
        """
        if scope["type"] == "http" and self._digest and not is_public(scope["path"]):
            given = Headers(scope=scope).get("authorization", "").encode("latin-1")
            scheme, _, token = given.partition(b" ")
            is_known = hmac.compare_digest(_hash(token.strip()), self._digest)
            if scheme.lower() != b"bearer" or not is_known:
                raise Problem(
                    "unauthorized",
                    "Expected the header `Authorization: Bearer TOKEN` with this service's token.",
                    {"www-authenticate": 'Bearer realm="brainray"'},
                )
        await self._app(scope, receive, send)


def is_public(path: str) -> bool:
    """Tell whether a path needs no token."""
    return path in HEALTH_PATHS or path in PAGE_PATHS or path.startswith(STATIC)


def _hash(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


class RequestLimits:
    """Bounds requests in flight, the size of a body, and the bytes of all bodies in memory."""

    def __init__(self, app: ASGIApp, *, limits: ServiceLimits, metrics: Metrics) -> None:
        self._app, self._limits = app, limits
        self._in_flight = self._buffered_bytes = 0
        metrics.watch("in_flight_requests", "Requests in flight.", lambda: self._in_flight)
        metrics.watch("buffered_bytes", "Bytes of bodies held.", lambda: self._buffered_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on.

        Raises
        ------
        Problem
            ``too_busy`` or ``body_too_large``; the latter also from ``receive``.
        """
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self._in_flight += 1
        state = scope["state"]
        try:
            self._check_request(scope)
            await self._app(scope, self._count_body(state, receive), send)
        finally:
            self._in_flight -= 1
            self._buffered_bytes -= state["body_bytes"]

    def _check_request(self, scope: Scope) -> None:
        is_patient = scope["path"] in (*HEALTH_PATHS, "/metrics")  # answered whatever the load
        if self._in_flight > self._limits.in_flight and not is_patient:
            raise Problem(
                "too_busy",
                f"{self._limits.in_flight} requests are in flight, the most at a time. "
                "Try again later.",
            )
        declared = Headers(scope=scope).get("content-length", "0")
        if not (declared.isascii() and declared.isdigit()):
            raise Problem("invalid_request", "Content-Length is not a number.", dict(CLOSE))
        self._check_size(int(declared))

    def _check_size(self, size: int) -> None:
        if size > self._limits.body_bytes:
            raise Problem(
                "body_too_large",
                f"A request body may have {self._limits.body_bytes:,} bytes. "
                "Send fewer or smaller files.",
                dict(CLOSE),
            )

    def _count_body(self, state: dict[str, float], receive: Receive) -> Receive:
        async def receive_counted() -> Message:
            message = await receive()
            size = len(message.get("body", b""))
            self._check_size(int(state["body_bytes"]) + size)
            if self._buffered_bytes + size > self._limits.buffered_bytes:
                detail = "Too many bytes of requests are held. Try again later."
                raise Problem("too_busy", detail, dict(CLOSE))
            state["body_bytes"] += size
            state["body_ms"] = (time.perf_counter() - state["started"]) * 1e3
            self._buffered_bytes += size
            return message

        return receive_counted
