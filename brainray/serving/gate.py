"""What every request passes, whatever it is for: a name, a token, limits, a count, a line of log.

It wraps the whole application (plain ASGI), so that nothing gets around it, and a body is in
memory, whole and within its limits, before anything else looks at the request.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Collection

import orjson

from brainray.serving.asgi import App, Message, Receive, Scope, Send, name_request
from brainray.serving.auth import OPEN_PATHS, Guard
from brainray.serving.bodies import CLOSE, Buffers, ClientLeft, read_body
from brainray.serving.journal import Journal
from brainray.serving.limits import ServiceLimits
from brainray.serving.meters import Meters
from brainray.serving.problem import RETRY_AFTER_S, Problem, render_problem, too_busy

FAULT = "Something went wrong; the service's log says what, under the request_id."
STATIC = "/static/"
OTHER = "other"
"""Stands for every path that the application does not have: they may hold anything."""
SAFE_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)
LIVE_PATHS = ("/healthz", "/v2/health/live")
"""Answered to the end; to be ready is over when the service takes no more requests."""
DRAIN_POLL_S = 0.05
PATIENT_PATHS = (*OPEN_PATHS, "/metrics")
"""Answered however many requests are in flight."""

logger = logging.getLogger(__name__)


class Gate:
    """The ASGI application around the application.

    Parameters
    ----------
    app : ASGI application
        Raises :class:`Problem` or answers.
    paths : collection of str
        Paths that logs and metrics name.
    admit : callable
        Raises :class:`Problem` when a body need not be read because nothing could be answered.
    echo_id : bool
        Whether to send the request's id back; Ray Serve does it by itself.
    """

    def __init__(
        self,
        app: App,
        *,
        paths: Collection[str],
        limits: ServiceLimits,
        guard: Guard,
        meters: Meters,
        journal: Journal,
        admit: Callable[[], None] = lambda: None,
        echo_id: bool = True,
    ) -> None:
        self._app, self._paths, self._limits = app, frozenset(paths), limits
        self._guard, self._meters, self._journal = guard, meters, journal
        self._admit, self._echo_id = admit, echo_id
        self._buffers = Buffers(limits.buffered_bytes)
        self._in_flight = 0
        self._is_closing = False
        meters.watch("in_flight_requests", "Requests in flight.", lambda: self._in_flight)
        meters.watch("buffered_bytes", "Bytes of bodies held.", lambda: self._buffers.held)

    async def drain(self) -> None:
        """Take no further request, and return when those in flight are answered."""
        self._is_closing = True
        while self._in_flight:
            await asyncio.sleep(DRAIN_POLL_S)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # a web socket: there is none here
            await send({"type": "websocket.close", "code": 1000})
            return
        self._in_flight += 1
        visit = _Visit(scope, send, self._echo_id)
        try:
            await self._pass(visit, scope, receive)
        except Problem as problem:
            await visit.refuse(problem)
        except ClientLeft:
            visit.status = 499
        except Exception as error:
            logger.exception("Request %s failed.", visit.request_id)
            visit.error = type(error).__name__
            await visit.refuse(Problem("internal", FAULT))
        finally:
            self._in_flight -= 1
            self._record(visit, scope)

    async def _pass(self, visit: "_Visit", scope: Scope, receive: Receive) -> None:
        """Check a request, read its body, and let it through."""
        path = scope["path"]
        if self._is_closing and path not in LIVE_PATHS:
            raise Problem(
                "model_unavailable",
                "The service is stopping. Ask another one, or try again later.",
                {"retry-after": str(RETRY_AFTER_S), **CLOSE},
            )
        self._guard.check(path, visit.headers.get(b"authorization"))
        if path not in PATIENT_PATHS and self._in_flight > self._limits.in_flight:
            raise too_busy(
                f"{self._limits.in_flight} requests are in flight, the most at a time. "
                "Try again later."
            )
        declared = _read_length(visit.headers)
        if declared == 0 and b"transfer-encoding" not in visit.headers:
            await self._app(scope, receive, visit.send)
            return
        self._admit()
        body = await read_body(
            receive,
            declared=declared,
            most=self._limits.body_bytes,
            seconds=self._limits.body_s,
            buffers=self._buffers,
        )
        visit.body_bytes, visit.body_at = len(body), time.perf_counter()
        try:
            await self._app(scope, _replay(body, receive), visit.send)
        finally:
            self._buffers.give_back(len(body))

    def _record(self, visit: "_Visit", scope: Scope) -> None:
        path = self._name_path(scope["path"])
        method = scope["method"] if scope["method"] in ("GET", "POST") else OTHER
        seconds = time.perf_counter() - visit.started
        self._meters.count_request(path, method, visit.status, seconds)
        self._journal.write(
            {
                "time": time.time(),
                "request_id": visit.request_id,
                "method": method,
                "path": path,
                "status": visit.status,
                "duration_ms": round(seconds * 1e3, 2),
                "body_bytes": visit.body_bytes,
                "body_ms": round((visit.body_at - visit.started) * 1e3, 2),
                **({"error": visit.error} if visit.error else {}),
            }
        )

    def _name_path(self, path: str) -> str:
        if path in self._paths:
            return path
        return STATIC if path.startswith(STATIC) else OTHER


class _Visit:
    """One request on its way, and what became of it."""

    def __init__(self, scope: Scope, send: Send, echo_id: bool) -> None:
        self.started = self.body_at = time.perf_counter()
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.request_id = name_request(self.headers.get(b"x-request-id"))
        scope.setdefault("state", {})["request_id"] = self.request_id
        self.status = 499  # nobody was there to be answered, until somebody is
        self.body_bytes = 0
        self.error: str | None = None
        self._send, self._echo_id = send, echo_id
        self._is_started = False

    async def send(self, message: Message) -> None:
        """Send a message of the answer."""
        if message["type"] == "http.response.start":
            self._is_started = True
            self.status = message["status"]
            headers = message["headers"] = list(message.get("headers", ()))
            known = {name for name, _ in headers}
            headers += [header for header in SAFE_HEADERS if header[0] not in known]
            if self._echo_id:
                headers.append((b"x-request-id", self.request_id.encode()))
        await self._send(message)

    async def refuse(self, problem: Problem) -> None:
        """Answer with a problem, unless an answer is on its way."""
        if self._is_started:
            return
        body, headers = render_problem(problem, self.request_id)
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        raw.append((b"content-length", str(len(body)).encode()))
        await self.send({"type": "http.response.start", "status": problem.status, "headers": raw})
        await self.send({"type": "http.response.body", "body": body})


def _read_length(headers: dict[bytes, bytes]) -> int | None:
    """Return what Content-Length says: 0 without a body, None where only the end tells."""
    given = headers.get(b"content-length")
    if given is None:
        return None if b"transfer-encoding" in headers else 0
    if not given.isdigit():
        raise Problem("invalid_request", "Content-Length is not a number.")
    return int(given)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return what gives the whole body first, and then whatever comes."""
    is_given = False

    async def give() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return give


def dump_json(value: object) -> bytes:
    """Encode an answer."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
