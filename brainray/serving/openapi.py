"""The OpenAPI description of the interface, its Swagger UI, and the page.

Everything that they load comes from here; no page asks a third party for anything.
"""

from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import fastapi_offline
import orjson
from fastapi import FastAPI, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from fastapi.staticfiles import StaticFiles

from brainray.model.reasons import NOTICE
from brainray.serving.middleware import is_public
from brainray.serving.options import ServiceLimits
from brainray.serving.problem import PROBLEM_TYPE
from brainray.serving.schemas import (
    AnswerBody,
    AnsweredBody,
    ExplainedBody,
    InferenceRequest,
    ProblemBody,
    SliceBody,
)
from brainray.serving.uploads import FILES_FIELD, MULTIPART

WEB = Path(str(files("brainray.serving") / "web"))
SWAGGER = Path(fastapi_offline.__file__).parent / "static"
"""Swagger UI's own files, as that package brings them."""

PAGE_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'"
)
DOCS_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; frame-ancestors 'none'"
)
SCANS_PATHS = ("/v1/classify", "/v1/explain", "/v1/render")


READING = (401, 429, 500, 503, 504)
POSTING = (*READING, 400, 406, 408, 413, 415, 422)
"""Statuses of refusals of a path that answers, and of one that takes scans."""
STATUSES = {
    400: "The request cannot be understood.",
    401: "The token is missing or wrong.",
    406: "None of the accepted formats can be given.",
    408: "The body did not arrive in time.",
    413: "The body is larger than the limit.",
    415: "The body is of a type that is not read here.",
    422: "The image, or a parameter, cannot be used.",
    429: "More requests than can be answered; try again after the time in Retry-After.",
    500: "The service failed.",
    503: "The model cannot answer now.",
    504: "The answer took too long.",
}
PICTURE = {"schema": {"type": "string", "format": "binary"}}
SCANS_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "Scans as JPEG, PNG, BMP, GIF, TIFF, WebP, DICOM or NIfTI files: one as the "
        "body itself (image/*, application/dicom, application/gzip or application/octet-stream; "
        "its bytes say what it is), or one or more in a form.",
        "content": {
            MULTIPART: {
                "schema": {
                    "type": "object",
                    "required": [FILES_FIELD],
                    "properties": {
                        FILES_FIELD: {"type": "array", "minItems": 1, "items": PICTURE["schema"]}
                    },
                }
            },
            # application/octet-stream is left to the words above: whoever reads a schema would
            # take it that any bytes are good, and what is no image is a 422.
            "image/*": PICTURE,
        },
    }
}
ANSWERED_SCHEMA = {"$ref": "#/components/schemas/AnsweredBody"}
ANSWERED_BODY: dict[str, Any] = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": ANSWERED_SCHEMA}}}
}
INFERENCE_SCHEMA = {"$ref": "#/components/schemas/InferenceRequest"}
INFERENCE_BODY: dict[str, Any] = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": INFERENCE_SCHEMA}}}
}
EXAMPLE = {
    "request_id": "5f0c2c5b8d3e4a7f9b1d6c3e2a4f8b70",
    "classifier_id": "f4efae25798c",
    "classes": ["glioma", "meningioma", "notumor", "pituitary"],
    "time_ms": 23.1,
    "notice": NOTICE,
    "answers": [
        {
            "name": "a.dcm",
            "frame": None,
            "status": "classified",
            "reason": None,
            "detail": None,
            "predicted_class": "glioma",
            "confidence": 0.93,
            "probs": {"glioma": 0.93, "meningioma": 0.05, "notumor": 0.01, "pituitary": 0.01},
            "width_px": 512,
            "height_px": 512,
            "grey_range": "percentile",
            "plane": "axial",
            "position_mm": 33.0,
            "orientation": [1.0, 0.0, 0.0, 0.0, 1.0, 0.0],
            "flags": ["no_window"],
            "content_sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
            "series": "6a2da20943931e9834fc12cfe5bb47bb",
            "sop_instance": "d4735e3a265e16eee03f59718b9b5d03",
            "slices": None,
        }
    ],
    "series": [
        {
            "series": "6a2da20943931e9834fc12cfe5bb47bb",
            "answer": "indeterminate",
            "reason": "too_few_slices",
            "evidence": {"glioma": 0.93, "meningioma": 0.05, "notumor": 0.01, "pituitary": 0.01},
            "longest_run": {"glioma": 1, "meningioma": 0, "notumor": 0, "pituitary": 0},
            "key_slices": [{"upload": 0, "frame": None}],
            "num_slices": 1,
            "num_used": 1,
            "skipped": {},
            "plane": "axial",
            "flags": ["no_window"],
        }
    ],
}


def describe_refusals(statuses: Iterable[int]) -> dict[str, dict[str, Any]]:
    """Describe the refusals of a path."""
    schema = {"schema": {"$ref": "#/components/schemas/ProblemBody"}}
    described: dict[str, dict[str, Any]] = {
        str(status): {"description": STATUSES[status], "content": {PROBLEM_TYPE: schema}}
        for status in statuses
    }
    seconds = {"type": "string", "pattern": "^[0-9]+$"}
    header = {"description": "Seconds to wait.", "required": True, "schema": seconds}
    described["429"]["headers"] = {"Retry-After": header}
    return described


def describe_interface(
    app: FastAPI, limits: ServiceLimits, classes: Sequence[str], *, needs_token: bool
) -> dict[str, Any]:
    """Build the OpenAPI document of an application's paths."""
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes
    )
    schemas = document["components"]["schemas"]
    for asked in (ProblemBody, InferenceRequest, AnsweredBody):
        schema = asked.model_json_schema(ref_template="#/components/schemas/{model}")
        for name, inner in schema.pop("$defs", {}).items():
            schemas.setdefault(name, inner)  # bodies that are answered, too, are as answered
        schemas[asked.__name__] = schema
    schemas["InputTensor"]["properties"]["data"]["maxItems"] = limits.files
    for body in (SliceBody, AnswerBody, ExplainedBody):
        one_for_each, _ = schemas[body.__name__]["properties"]["probs"]["anyOf"]
        fraction = one_for_each.pop("additionalProperties")
        one_for_each |= {
            "properties": dict.fromkeys(classes, fraction),
            "required": list(classes),
            "additionalProperties": False,
        }
    answer = document["paths"]["/v1/classify"]["post"]["responses"]["200"]
    answer["content"]["application/json"]["example"] = EXAMPLE
    for path in SCANS_PATHS:
        form = document["paths"][path]["post"]["requestBody"]["content"][MULTIPART]
        form["schema"]["properties"][FILES_FIELD]["maxItems"] = limits.files
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            refusals = describe_refusals(POSTING if method == "post" else READING)
            operation["responses"].update(refusals)
            if not needs_token or is_public(path):
                del operation["responses"]["401"]
            if needs_token and is_public(path):
                operation["security"] = []
    if needs_token:
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"token": []}]
    return document


def add_pages(app: FastAPI, document: dict[str, Any]) -> None:
    """Add the page, its files, and the description of the interface."""
    page, content = (WEB / "index.html").read_bytes(), orjson.dumps(document)

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return _html(page, PAGE_POLICY)

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        return Response(content, headers={"content-type": "application/json"})

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        rendered = get_swagger_ui_html(
            openapi_url="openapi.json",
            title=f"{app.title}: HTTP interface",
            swagger_js_url="static/swagger/swagger-ui-bundle.js",
            swagger_css_url="static/swagger/swagger-ui.css",
            swagger_favicon_url="static/swagger/favicon.png",
        )
        return _html(bytes(rendered.body), DOCS_POLICY)

    app.mount("/static/swagger", StaticFiles(directory=SWAGGER))
    app.mount("/static", StaticFiles(directory=WEB))


def _html(content: bytes, policy: str) -> Response:
    headers = {"content-type": "text/html; charset=utf-8", "content-security-policy": policy}
    return Response(content, headers=headers)
