"""The page, and the description of the interface; everything they load comes from here."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import fastapi_offline
import orjson
from fastapi import FastAPI, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from fastapi.staticfiles import StaticFiles

from brainray.serving import bodies
from brainray.serving.auth import is_open
from brainray.serving.limits import ServiceLimits
from brainray.serving.problem import Problem
from brainray.serving.schemas import InferenceRequest, ProblemBody

WEB = Path(str(files("brainray.serving") / "web"))
SWAGGER = Path(fastapi_offline.__file__).parent / "static"
"""Swagger UI's own files, as that package brings them: no page asks a third party for anything."""

PAGE_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'"
)
DOCS_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; frame-ancestors 'none'"
)
SCANS_PATHS = ("/v1/classify", "/v1/explain")


def describe_interface(app: FastAPI, limits: ServiceLimits, *, is_guarded: bool) -> dict[str, Any]:
    """Build the OpenAPI document of an application's paths."""
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes
    )
    schemas = document["components"]["schemas"]
    for body in (ProblemBody, InferenceRequest):
        schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schemas[body.__name__] = schema
    schemas["InputTensor"]["properties"]["data"]["maxItems"] = limits.files
    for path in SCANS_PATHS:
        form = document["paths"][path]["post"]["requestBody"]["content"][bodies.MULTIPART]
        form["schema"]["properties"]["files"]["maxItems"] = limits.files
    for path, operations in document["paths"].items():
        for operation in operations.values():
            if not is_guarded:
                operation["responses"].pop("401", None)
            elif is_open(path):
                operation["security"] = []
    if is_guarded:
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"token": []}]
    return document


def add_pages(app: FastAPI, document: dict[str, Any]) -> None:
    """Add the page, its files, and the description of the interface."""
    page, content = WEB / "index.html", orjson.dumps(document)

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        if not page.exists():
            raise Problem("not_found", "This installation has no page. /docs lists what there is.")
        return _html(page.read_bytes(), PAGE_POLICY)

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
    app.mount("/static", StaticFiles(directory=WEB, check_dir=False))


def _html(content: bytes, policy: str) -> Response:
    headers = {"content-type": "text/html; charset=utf-8", "content-security-policy": policy}
    return Response(content, headers=headers)
