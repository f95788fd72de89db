"""The OpenAPI description of the service."""

from collections.abc import Collection, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from brainray.serving.middleware import is_public
from brainray.serving.options import ServiceLimits
from brainray.serving.problem import PROBLEM_TYPE, PROBLEMS
from brainray.serving.schemas import (
    AnswerBody,
    AnsweredBody,
    ExplainedBody,
    InferenceRequest,
    ProblemBody,
    SliceBody,
)
from brainray.serving.uploads import FILES_FIELD, MULTIPART

FRAME_PATHS = ("/v1/explain", "/v1/render")
SCANS_PATHS = ("/v1/classify", *FRAME_PATHS)
GET_REFUSALS = {401, 429, 500, 503, 504}
POST_REFUSALS = {400, 406, 408, 413, 415, 422} | GET_REFUSALS
SCHEMAS = "#/components/schemas/"
PNG: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
SCANS_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "Scans as JPEG, PNG, BMP, GIF, TIFF, WebP, DICOM or NIfTI files: one file "
        "as the body itself (image/*, application/dicom, application/gzip or "
        "application/octet-stream; its bytes determine the format), or several in a form.",
        "content": {
            MULTIPART: {
                "schema": {
                    "type": "object",
                    "required": [FILES_FIELD],
                    "properties": {
                        FILES_FIELD: {"type": "array", "minItems": 1, "items": PNG["schema"]}
                    },
                }
            },
            # application/octet-stream is only in the description: a schema would promise that any
            # bytes are accepted, and bytes that are no image are a 422.
            "image/*": PNG,
        },
    }
}


def describe_json_body(model: type) -> dict[str, Any]:
    """Describe a request body of JSON that the service parses itself."""
    content = {"application/json": {"schema": {"$ref": SCHEMAS + model.__name__}}}
    return {"requestBody": {"required": True, "content": content}}


def describe_interface(
    app: FastAPI, limits: ServiceLimits, classes: Sequence[str], *, needs_token: bool
) -> dict[str, Any]:
    """Build the OpenAPI document of an application's paths."""
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes
    )
    _complete_schemas(document["components"]["schemas"], limits, classes)
    for path, operations in document["paths"].items():
        if path in SCANS_PATHS:
            form = operations["post"]["requestBody"]["content"][MULTIPART]["schema"]
            form["properties"][FILES_FIELD]["maxItems"] = limits.files
        for method, operation in operations.items():
            statuses = POST_REFUSALS if method == "post" else GET_REFUSALS
            if path in FRAME_PATHS:
                statuses = statuses | {404}
            if not needs_token or is_public(path):
                statuses = statuses - {401}
            operation["responses"].update(_describe_refusals(statuses))
            if needs_token and is_public(path):
                operation["security"] = []
    if needs_token:
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"token": []}]
    return document


def _describe_refusals(statuses: Collection[int]) -> dict[str, dict[str, Any]]:
    described: dict[str, dict[str, Any]] = {}
    for status in statuses:
        titles = [title for known, title in PROBLEMS.values() if known == status]
        content = {PROBLEM_TYPE: {"schema": {"$ref": f"{SCHEMAS}ProblemBody"}}}
        described[str(status)] = {"description": "; or: ".join(titles), "content": content}
    seconds = {"type": "string", "pattern": "^[0-9]+$"}
    retry_after = {"description": "Seconds to wait.", "required": True, "schema": seconds}
    described["429"]["headers"] = {"Retry-After": retry_after}
    return described


def _complete_schemas(
    schemas: dict[str, Any], limits: ServiceLimits, classes: Sequence[str]
) -> None:
    """Add the bodies that FastAPI does not see, and what only this service knows."""
    for model in (ProblemBody, InferenceRequest, AnsweredBody):
        schema = model.model_json_schema(ref_template=SCHEMAS + "{model}")
        schemas |= {**schema.pop("$defs", {}), **schemas, model.__name__: schema}
    tensor = schemas["InputTensor"]
    tensor["required"].append("data")  # without the binary data extension
    tensor["properties"]["data"]["maxItems"] = limits.files
    del tensor["properties"]["data"]["default"]
    for body in (SliceBody, AnswerBody, ExplainedBody):
        probs, _ = schemas[body.__name__]["properties"]["probs"]["anyOf"]
        fraction = probs.pop("additionalProperties")
        probs |= {
            "properties": dict.fromkeys(classes, fraction),
            "required": list(classes),
            "additionalProperties": False,
        }
