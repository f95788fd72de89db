"""The paths of the service: each reads a request, calls the pipeline, and returns a body.

Their docstrings and bodies are what OpenAPI describes.
"""

import base64
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.staticfiles import StaticFiles
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, PlainTextResponse

import brainray
from brainray.model.reasons import INTENDED_USE, NOT_INTENDED_FOR, NOTICE, REASONS
from brainray.serving import open_inference
from brainray.serving.metrics import CONTENT_TYPE, Metrics
from brainray.serving.middleware import AccessLog, ServiceMiddleware, is_public
from brainray.serving.options import ServiceLimits
from brainray.serving.pipeline import Pipeline, Render
from brainray.serving.problem import PROBLEM_TYPE, PROBLEMS, Problem
from brainray.serving.schemas import (
    AnswerBody,
    AnsweredBody,
    AnswersBody,
    ExplainedAnswersBody,
    ExplainedBody,
    HealthBody,
    InferenceRequest,
    ModelBody,
    PictureBody,
    PicturesBody,
    ProblemBody,
    SeriesAnswersBody,
    SliceBody,
    read_json,
)
from brainray.serving.uploads import FILES_FIELD, MULTIPART, OCTETS, read_body, read_uploads

WEB = Path(__file__).with_name("web")
PAGE_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'"
)
MODEL_PATH = f"/v2/models/{open_inference.MODEL_NAME}"
SCHEMAS = "#/components/schemas/"


def describe_refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe refusals with problem bodies."""
    described: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        titles = [title for known, title in PROBLEMS.values() if known == status]
        content = {PROBLEM_TYPE: {"schema": {"$ref": f"{SCHEMAS}ProblemBody"}}}
        described[status] = {"description": "; or: ".join(titles), "content": content}
    if 429 in described:
        seconds = {"type": "string", "pattern": "^[0-9]+$"}
        retry_after = {"description": "Seconds to wait.", "required": True, "schema": seconds}
        described[429]["headers"] = {"Retry-After": retry_after}
    return described


def describe_json_body(model: type) -> dict[str, Any]:
    """Describe a request body of JSON that the service parses itself."""
    content = {"application/json": {"schema": {"$ref": SCHEMAS + model.__name__}}}
    return {"requestBody": {"required": True, "content": content}}


PNG: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
SCANS_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "Scans as JPEG, PNG, BMP, GIF, TIFF, WebP, DICOM or NIfTI files: one file "
        "as the body itself (image/*, application/dicom, application/gzip or "
        "application/octet-stream; its bytes determine the format), or several in a form.",
        # application/octet-stream is only in the description: a schema would promise that any bytes
        # are accepted, and bytes that are no image are a 422.
        "content": {MULTIPART: {"schema": {"$ref": f"{SCHEMAS}ScansForm"}}, "image/*": PNG},
    }
}
POST_REFUSALS = describe_refusals(400, 406, 408, 413, 415, 422)
FRAME_RESPONSES = POST_REFUSALS | describe_refusals(404) | {200: {"content": {"image/png": PNG}}}
REFUSALS = describe_refusals(401, 429, 500, 503, 504)
operations = APIRouter(tags=["operations"], responses=REFUSALS)
scans = APIRouter(tags=["answers"], responses=REFUSALS)
protocol = APIRouter(tags=["Open Inference Protocol"], responses=REFUSALS)


async def _get_pipeline(request: Request) -> Any:  # noqa: ANN401 - as the state has it
    return request.app.state.pipeline


async def _get_metrics(request: Request) -> Any:  # noqa: ANN401
    return request.app.state.metrics


PipelineParam = Annotated[Pipeline, Depends(_get_pipeline)]
MetricsParam = Annotated[Metrics, Depends(_get_metrics)]
FrameParam = Annotated[
    int | None,
    Query(ge=0, le=2**31 - 1, description="Number of a slice in its file, from 0."),
]


def build_app(
    pipeline: Pipeline,
    *,
    token: str | None,
    metrics: Metrics,
    access_log: AccessLog,
    sends_request_id: bool = True,
) -> FastAPI:
    """Build the ASGI application; its requests need the token, if one is given."""
    app = FastAPIOffline(  # /docs loads no file from a third party
        title="brainray",
        version=brainray.__version__,
        description=f"Classifies slices of brain MRI. **{NOTICE}**",
        redoc_url=None,
        static_url="/static/swagger",
        redirect_slashes=False,
    )
    metrics.add_gauge("waiting_scans", "Slices waiting.", lambda: pipeline.predictions.num_queued)
    app.add_exception_handler(HTTPException, _refuse_http)
    app.add_exception_handler(RequestValidationError, _refuse_parameter)
    app.state.pipeline, app.state.metrics = pipeline, metrics
    for router in (operations, scans, protocol):
        app.include_router(router)
    document = _describe(app, pipeline.limits, pipeline.classes, needs_token=token is not None)
    app.openapi = lambda: document  # type: ignore[method-assign]  # as FastAPI's docs have it
    app.mount("/static", StaticFiles(directory=WEB))
    app.add_middleware(
        ServiceMiddleware,
        paths=[*document["paths"], "/", "/docs", "/openapi.json"],
        token=token,
        limits=pipeline.limits,
        metrics=metrics,
        access_log=access_log,
        sends_request_id=sends_request_id,
    )
    return app


def _describe(
    app: FastAPI, limits: ServiceLimits, classes: Sequence[str], *, needs_token: bool
) -> dict[str, Any]:
    """Add to the OpenAPI document what FastAPI does not see, and what only this service knows."""
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes
    )
    components = document["components"]
    schemas = components["schemas"]
    for model in (ProblemBody, InferenceRequest, AnsweredBody):
        schema = model.model_json_schema(ref_template=SCHEMAS + "{model}")
        schemas |= {**schema.pop("$defs", {}), **schemas, model.__name__: schema}
    uploads = {"type": "array", "minItems": 1, "maxItems": limits.files, "items": PNG["schema"]}
    schemas["ScansForm"] = {
        "type": "object",
        "required": [FILES_FIELD],
        "properties": {FILES_FIELD: uploads},
    }
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
    for path, methods in document["paths"].items():
        for operation in methods.values():
            if not needs_token or is_public(path):
                del operation["responses"]["401"]
            if needs_token and is_public(path):
                operation["security"] = []
    if needs_token:
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"token": []}]
    return document


async def _refuse_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    details = {
        404: "This path does not exist. /docs lists the paths.",
        405: f"This path does not have {request.method}. The header Allow lists its methods.",
    }
    codes = [code for code, (status, _) in PROBLEMS.items() if status == error.status_code]
    detail = details.get(error.status_code, str(error.detail))
    raise Problem(codes[0] if codes else "invalid_request", detail, error.headers or {})


async def _refuse_parameter(request: Request, error: Exception) -> Response:
    del request
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    location = ".".join(map(str, first["loc"]))
    raise Problem("invalid_parameter", f"{location}: {first['msg']}.")


@operations.get("/", include_in_schema=False)
async def show_page() -> Response:
    """Return the page."""
    return FileResponse(WEB / "index.html", headers={"content-security-policy": PAGE_POLICY})


# ---- operations ----------------------------------------------------------------------------------


@operations.get("/healthz")
@protocol.get("/v2/health/live")
async def healthz() -> HealthBody:
    """Report that this process answers. The model is not checked."""
    return HealthBody(status="ok")


@operations.get("/readyz")
@protocol.get("/v2/health/ready")
@protocol.get(f"{MODEL_PATH}/ready")
async def readyz(pipeline: PipelineParam) -> HealthBody:
    """Report that a model is loaded and passes its self-test."""
    await pipeline.check_ready()
    return HealthBody(status="ok")


@operations.get("/metrics", response_class=PlainTextResponse)
async def show_metrics(metrics: MetricsParam) -> Response:
    """Return the metrics of one replica, named by the label `replica`, for Prometheus."""
    return Response(metrics.render(), headers={"content-type": CONTENT_TYPE})


# ---- answers -------------------------------------------------------------------------------------


@scans.post("/v1/classify", responses=POST_REFUSALS, openapi_extra=SCANS_BODY)
async def classify(request: Request, pipeline: PipelineParam, metrics: MetricsParam) -> AnswersBody:
    """Classify scans: pictures, DICOM objects and NIfTI volumes.

    Every file gets one answer, in order; an unreadable file is `rejected` with a reason. If the
    body itself is the file, an unreadable file is a 422. The answer to a file with several slices
    has an answer for each in `slices`. `series` has a summary of each series.

        curl -F files=@a.jpg -F files=@b.dcm http://127.0.0.1:8000/v1/classify
        curl --data-binary @a.jpg -H "Content-Type: image/jpeg" http://127.0.0.1:8000/v1/classify
    """
    pipeline.predictions.check_capacity()
    uploads, is_raw = await read_uploads(request, pipeline.limits)
    answers = await pipeline.classify(uploads)
    metrics.count_answers(answers)
    if is_raw and answers[0].status == "rejected":
        raise _image_rejected(answers[0])
    series = await pipeline.summarise(answers)
    return AnswersBody(**_describe_request(request, pipeline), answers=list(answers), series=series)


@scans.post("/v1/series", responses=POST_REFUSALS, openapi_extra=describe_json_body(AnsweredBody))
async def summarise(request: Request, pipeline: PipelineParam) -> SeriesAnswersBody:
    """Summarise the series among the `answers` of several requests.

    For a series with more files than a request may have: send the answers to all of its files.
    """
    answered = read_json(AnsweredBody, await read_body(request, pipeline.limits))
    series = await pipeline.summarise(answered.answers)
    return SeriesAnswersBody(**_describe_request(request, pipeline), series=series)


@scans.post(
    "/v1/explain",
    response_model=ExplainedAnswersBody,
    responses=FRAME_RESPONSES,
    openapi_extra=SCANS_BODY,
)
async def explain(
    request: Request,
    pipeline: PipelineParam,
    metrics: MetricsParam,
    render: Annotated[Render, Query(description="The heat map alone, or on the scan.")] = "map",
    frame: FrameParam = None,
) -> ExplainedAnswersBody | Response:
    """Classify one slice of each file, with a heat map of the evidence for its class.

    With `Accept: image/png` and a file as the body, the response is the picture itself. A file with
    several slices needs `frame`.
    """
    pipeline.explanations.check_capacity()
    uploads, is_raw = await read_uploads(request, pipeline.limits)
    wants_png = _check_accept(request, is_raw=is_raw)
    answers = await pipeline.classify(uploads, render=render, frame=frame, needs_one_slice=True)
    metrics.count_answers(answers)
    if is_raw and answers[0].status == "rejected":
        raise _image_rejected(answers[0])
    if wants_png:
        return Response(base64.b64decode(answers[0].heat_map_png or ""), media_type="image/png")
    return ExplainedAnswersBody(**_describe_request(request, pipeline), answers=answers)


@scans.post(
    "/v1/render",
    response_model=PicturesBody,
    responses=FRAME_RESPONSES,
    openapi_extra=SCANS_BODY,
)
async def render(
    request: Request, pipeline: PipelineParam, frame: FrameParam = None
) -> PicturesBody | Response:
    """Render slices as 8-bit pictures, through their window if they have one.

    With `Accept: image/png` and a file as the body, the response is the picture of slice `frame`,
    or of the first. No text of a header is shown.
    """
    uploads, is_raw = await read_uploads(request, pipeline.limits)
    wants_png = _check_accept(request, is_raw=is_raw)
    pictures = await pipeline.render(uploads, 0 if wants_png and frame is None else frame)
    if is_raw and all(picture.png is None for picture in pictures):
        raise _image_rejected(pictures[0])
    if wants_png:
        return Response(base64.b64decode(pictures[0].png or ""), media_type="image/png")
    return PicturesBody(**_describe_request(request, pipeline), pictures=pictures)


def _check_accept(request: Request, *, is_raw: bool) -> bool:
    """Return whether the client wants a picture instead of JSON."""
    wants_png = request.headers.get("accept", "").partition(";")[0].strip() == "image/png"
    if wants_png and not is_raw:
        raise Problem("not_acceptable", "image/png needs one file as the body itself.")
    return wants_png


def _image_rejected(answer: AnswerBody | PictureBody) -> Problem:
    return Problem("image_rejected", answer.detail or "", members={"reason": answer.reason})


def _describe_request(request: Request, pipeline: Pipeline) -> dict[str, Any]:
    """Return the members of :class:`~brainray.serving.schemas.ResponseBody`."""
    return {
        "request_id": request.state.request_id,
        "classifier_id": pipeline.classifier_id,
        "classes": pipeline.classes,
        "time_ms": round((time.perf_counter() - request.state.started) * 1e3, 2),
        "notice": NOTICE,
    }


@scans.get("/v1/model")
async def describe_model(pipeline: PipelineParam) -> ModelBody:
    """Describe the classifier, its scores, its intended use, and the limits of requests."""
    metadata = pipeline.metadata
    return ModelBody(
        classifier_id=metadata["classifier_id"],
        classes=metadata["classes"],
        preprocessing=metadata["preprocessing"],
        metrics=metadata.get("metrics") or metadata.get("evaluation"),
        runtime=pipeline.runtime,
        intended_use=INTENDED_USE,
        not_intended_for=NOT_INTENDED_FOR,
        model_card=metadata.get("model_card"),
        limits=asdict(pipeline.limits),
        rejection_reasons=REASONS,
        notice=NOTICE,
    )


# ---- Open Inference Protocol ---------------------------------------------------------------------


@protocol.get("/v2")
async def describe_server(request: Request) -> dict[str, Any]:
    """Describe the server."""
    app: FastAPI = request.app
    return {"name": app.title, "version": app.version, "extensions": open_inference.EXTENSIONS}


@protocol.get(MODEL_PATH)
async def describe_tensors(pipeline: PipelineParam) -> dict[str, Any]:
    """Describe the model's tensors."""
    return open_inference.describe_model(pipeline.classes, pipeline.classifier_id)


@protocol.post(
    f"{MODEL_PATH}/infer",
    responses=POST_REFUSALS,
    openapi_extra=describe_json_body(InferenceRequest),
)
async def infer(request: Request, pipeline: PipelineParam, metrics: MetricsParam) -> Response:
    """Classify scans. The input `image` has files with one slice, in JSON as base64.

    With the header `Inference-Header-Content-Length` binary data may follow the JSON (the
    protocol's binary data extension); outputs may be requested in that form.
    """
    pipeline.predictions.check_capacity()
    body = await read_body(request, pipeline.limits)
    header_length = request.headers.get(open_inference.LENGTH_HEADER)
    inference = open_inference.read_inference(body, header_length)
    answers = await pipeline.classify(inference.uploads, needs_one_slice=True)
    metrics.count_answers(answers)
    content, length = open_inference.render_inference(
        inference, answers, pipeline.classes, pipeline.classifier_id
    )
    if length is None:
        return Response(content, media_type="application/json")
    headers = {open_inference.LENGTH_HEADER: str(length)}
    return Response(content, headers=headers, media_type=OCTETS)
