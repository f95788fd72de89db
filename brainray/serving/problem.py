"""Refusals, as RFC 9457 has them; the one place that maps what went wrong to HTTP."""

from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import orjson

PROBLEM_TYPE = "application/problem+json"
RETRY_AFTER_S = 1

PROBLEMS: dict[str, tuple[int, str]] = {
    "invalid_request": (400, "The request cannot be understood"),
    "unauthorized": (401, "A token is needed"),
    "not_found": (404, "There is nothing at this path"),
    "method_not_allowed": (405, "This path does not know this method"),
    "not_acceptable": (406, "None of the accepted formats can be given"),
    "body_too_slow": (408, "The body did not arrive in time"),
    "body_too_large": (413, "The body is larger than the limit"),
    "unsupported_media_type": (415, "The body is of a type that is not read here"),
    "image_rejected": (422, "The image cannot be read"),
    "invalid_parameter": (422, "A parameter is not valid"),
    "no_files": (422, "There is no file in the request"),
    "too_many_files": (422, "There are more files than one request may have"),
    "too_many_slices": (422, "There are more slices than one request may have"),
    "several_slices": (422, "The file has several slices, and one is needed"),
    "too_busy": (429, "There are more requests than can be answered"),
    "internal": (500, "The service failed"),
    "model_unavailable": (503, "The model cannot answer now"),
    "timeout": (504, "The answer took too long"),
}
"""Stable code to status and title."""


@dataclass(slots=True)
class Problem(Exception):  # noqa: N818 - RFC 9457 calls it so
    """A request that gets no answer but a reason."""

    code: str
    """A key of :data:`PROBLEMS`."""
    detail: str
    """What was expected, what was found, and the remedy."""
    headers: dict[str, str] = field(default_factory=dict)
    members: dict[str, Any] = field(default_factory=dict)
    """Further members of the body."""

    @property
    def status(self) -> int:
        """HTTP status."""
        return PROBLEMS[self.code][0]


def render_problem(problem: Problem, request_id: str) -> tuple[bytes, dict[str, str]]:
    """Return the body and the headers of a refusal."""
    status, title = PROBLEMS[problem.code]
    body = {
        "type": f"urn:brainray:problem:{problem.code}",
        "title": title,
        "status": status,
        "detail": problem.detail,
        "code": problem.code,
        "request_id": request_id,
        **problem.members,
    }
    headers = {"content-type": PROBLEM_TYPE, **problem.headers}
    if status in (429, 503):
        headers.setdefault("retry-after", str(RETRY_AFTER_S))
    return orjson.dumps(body), headers


def name_status(status: int) -> str:
    """Return the code that stands for a status when nothing more is known."""
    for code, (known, _) in PROBLEMS.items():
        if known == status:
            return code
    return "invalid_request" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "internal"
