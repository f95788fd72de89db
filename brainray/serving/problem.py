"""Refusals (RFC 9457): the one place that maps codes to HTTP statuses."""

from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import orjson

PROBLEM_TYPE = "application/problem+json"
RETRY_AFTER_S = 1

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


@dataclass(slots=True)
class Problem(Exception):  # noqa: N818 - the name in RFC 9457
    """A request is refused."""

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


def find_code(status: int) -> str:
    """Return the first code with this status, else the general one of its class."""
    fallback = "invalid_request" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "internal"
    return next((code for code, (known, _) in PROBLEMS.items() if known == status), fallback)
