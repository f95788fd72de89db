"""Refusals (RFC 9457): the one place that maps codes to HTTP statuses."""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Scope

PROBLEM_TYPE = "application/problem+json"
RETRY_AFTER_S = 1
CLOSE = {"connection": "close"}
"""The rest of a refused body is not read, so the connection cannot be reused."""
LENGTH = re.compile(r"[0-9]{1,20}")
"""A length in a header. Python's `int` raises for more than 4,300 digits."""
INTERNAL_ERROR = "The service's log has the error under this request_id."

PROBLEMS: dict[str, tuple[int, str]] = {
    "invalid_request": (400, "The request cannot be parsed"),
    "unauthorized": (401, "The token is missing or wrong"),
    "not_found": (404, "This path does not exist"),
    "slice_not_found": (404, "The file has no such slice"),
    "method_not_allowed": (405, "This path does not have this method"),
    "not_acceptable": (406, "No accepted format is available"),
    "body_too_slow": (408, "The body did not arrive in time"),
    "body_too_large": (413, "The body is larger than the limit"),
    "unsupported_media_type": (415, "Bodies of this type are not supported"),
    "image_rejected": (422, "The image cannot be classified"),
    "invalid_parameter": (422, "A parameter is not valid"),
    "no_files": (422, "The request has no files"),
    "too_many_files": (422, "The request has too many files"),
    "too_many_slices": (422, "The request has too many slices"),
    "several_slices": (422, "The file has several slices, and one is needed"),
    "too_busy": (429, "The service has too many requests"),
    "internal": (500, "The service failed"),
    "model_unavailable": (503, "The model is not available"),
    "timeout": (504, "The answer took too long"),
}
"""Stable code to status and title."""

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Problem(Exception):  # noqa: N818 - the name in RFC 9457
    """A request is refused."""

    code: str
    """A key of :data:`PROBLEMS`."""
    detail: str
    """What was expected, what was found, and the remedy."""
    headers: Mapping[str, str] = field(default_factory=dict)
    members: dict[str, Any] = field(default_factory=dict)
    """Further members of the body."""


def make_response(error: Exception, scope: Scope) -> Response:
    """Return the problem body for an exception; log it unless it is a :class:`Problem`."""
    request_id = scope["state"]["request_id"]
    if not isinstance(error, Problem):
        logger.error("Request %s failed.", request_id, exc_info=error)
        error = Problem("internal", INTERNAL_ERROR)
    status, title = PROBLEMS[error.code]
    body = {
        "type": f"urn:brainray:problem:{error.code}",
        "title": title,
        "status": status,
        "detail": error.detail,
        "code": error.code,
        "request_id": request_id,
        **error.members,
    }
    if scope["path"].startswith("/v2"):  # clients of the Open Inference Protocol read this member
        body["error"] = error.detail
    headers = {"content-type": PROBLEM_TYPE, **error.headers}
    if status in (429, 503):
        headers.setdefault("retry-after", str(RETRY_AFTER_S))
    return Response(orjson.dumps(body), status, headers)


@asynccontextmanager
async def limit_time(
    seconds: float, code: str, failure: str, headers: Mapping[str, str] | None = None
) -> AsyncIterator[None]:
    """Raise a Problem if the block takes longer; its detail begins with ``failure``."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        detail = f"{failure} in {seconds:g} s. Try again later, with fewer files in a request."
        raise Problem(code, detail, headers or {}) from None
