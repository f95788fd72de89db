"""The paths of the service: each reads a request, calls the pipeline, and returns a body."""

import base64
import time
from dataclasses import asdict
from enum import Enum
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.staticfiles import StaticFiles
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse

import brainray
from brainray.model.reasons import INTENDED_USE, NOT_INTENDED_FOR, NOTICE, REASONS
from brainray.serving import open_inference
from brainray.serving.metrics import CONTENT_TYPE, Metrics
from brainray.serving.middleware import AccessLog, ServiceMiddleware
from brainray.serving.openapi import (
    PNG,
    SCANS_BODY,
    describe_interface,
    describe_json_body,
)
from brainray.serving.pipeline import Pipeline, Render
from brainray.serving.problem import PROBLEMS, Problem
from brainray.serving.schemas import (
    AnswerBody,
    AnsweredBody,
    AnswersBody,
    ExplainedAnswersBody,
    HealthBody,
    InferenceRequest,
    ModelBody,
    PictureBody,
    PicturesBody,
    SeriesAnswersBody,
    read_json,
)
from brainray.serving.uploads import OCTETS, read_body, read_uploads

WEB = Path(str(files("brainray.serving") / "web"))
PAGE_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'"
)
MODEL_PATH = f"/v2/models/{open_inference.MODEL_NAME}"
OPERATIONS: list[str | Enum] = ["operations"]
ANSWERS: list[str | Enum] = ["answers"]
PROTOCOL: list[str | Enum] = ["Open Inference Protocol"]
"""Tags, by which the OpenAPI description groups paths."""
HEALTHY = HealthBody(status="ok")

router = APIRouter()


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
    app.include_router(router)
    document = describe_interface(
        app, pipeline.limits, pipeline.classes, needs_token=token is not None
    )
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


@router.get("/", include_in_schema=False)
async def show_page() -> Response:
    """Return the page."""
    return FileResponse(WEB / "index.html", headers={"content-security-policy": PAGE_POLICY})


# ---- operations ----------------------------------------------------------------------------------


@router.get("/healthz", tags=OPERATIONS)
@router.get("/v2/health/live", tags=PROTOCOL)
async def healthz() -> HealthBody:
    """Report that this process answers. The model is not checked."""
    return HEALTHY


@router.get("/readyz", tags=OPERATIONS)
@router.get("/v2/health/ready", tags=PROTOCOL)
@router.get(f"{MODEL_PATH}/ready", tags=PROTOCOL)
async def readyz(pipeline: PipelineParam) -> HealthBody:
    """Report that a model is loaded and passes its self-test."""
    await pipeline.check_ready()
    return HEALTHY


@router.get(
    "/metrics",
    tags=OPERATIONS,
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def show_metrics(metrics: MetricsParam) -> Response:
    """Return the metrics of one replica, named by the label `replica`, for Prometheus."""
    return Response(metrics.render(), headers={"content-type": CONTENT_TYPE})


# ---- answers -------------------------------------------------------------------------------------


@router.post("/v1/classify", tags=ANSWERS, openapi_extra=SCANS_BODY)
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
        raise image_rejected(answers[0])
    series = await pipeline.summarise(answers)
    return AnswersBody(**describe_request(request, pipeline), answers=answers, series=series)


@router.post("/v1/series", tags=ANSWERS, openapi_extra=describe_json_body(AnsweredBody))
async def summarise(request: Request, pipeline: PipelineParam) -> SeriesAnswersBody:
    """Summarise the series among the `answers` of several requests.

    For a series with more files than a request may have: send the answers to all of its files.
    """
    answered = read_json(AnsweredBody, await read_body(request, pipeline.limits))
    series = await pipeline.summarise(answered.answers)
    return SeriesAnswersBody(**describe_request(request, pipeline), series=series)


@router.post(
    "/v1/explain",
    tags=ANSWERS,
    response_model=ExplainedAnswersBody,
    responses={200: {"content": {"image/png": PNG}}},
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
    wants_png = check_accept(request, is_raw=is_raw)
    answers = await pipeline.explain(uploads, render, frame)
    metrics.count_answers(answers)
    if is_raw and answers[0].status == "rejected":
        raise image_rejected(answers[0])
    if wants_png:
        return respond_with_png(answers[0].heat_map_png)
    return ExplainedAnswersBody(**describe_request(request, pipeline), answers=answers)


@router.post(
    "/v1/render",
    tags=ANSWERS,
    response_model=PicturesBody,
    responses={200: {"content": {"image/png": PNG}}},
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
    wants_png = check_accept(request, is_raw=is_raw)
    pictures = await pipeline.render(uploads, 0 if wants_png and frame is None else frame)
    if is_raw and all(picture.png is None for picture in pictures):
        raise image_rejected(pictures[0])
    if wants_png:
        return respond_with_png(pictures[0].png)
    return PicturesBody(**describe_request(request, pipeline), pictures=pictures)


def check_accept(request: Request, *, is_raw: bool) -> bool:
    """Return whether the client wants a picture instead of JSON."""
    wants_png = request.headers.get("accept", "").partition(";")[0].strip() == "image/png"
    if wants_png and not is_raw:
        raise Problem("not_acceptable", "image/png needs one file as the body itself.")
    return wants_png


def respond_with_png(png: str | None) -> Response:
    """Return a picture, given in base64, as it is."""
    return Response(base64.b64decode(png or ""), headers={"content-type": "image/png"})


def image_rejected(answer: AnswerBody | PictureBody) -> Problem:
    """Build the refusal of a request whose one file was rejected."""
    return Problem("image_rejected", answer.detail or "", members={"reason": answer.reason})


def describe_request(request: Request, pipeline: Pipeline) -> dict[str, Any]:
    """Return the members of :class:`~brainray.serving.schemas.ResponseBody`."""
    return {
        "request_id": request.state.request_id,
        "classifier_id": pipeline.classifier_id,
        "classes": pipeline.classes,
        "time_ms": round((time.perf_counter() - request.state.started) * 1e3, 2),
        "notice": NOTICE,
    }


@router.get("/v1/model", tags=ANSWERS)
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


@router.get("/v2", tags=PROTOCOL)
async def describe_server(request: Request) -> dict[str, Any]:
    """Describe the server."""
    app: FastAPI = request.app
    return {
        "name": app.title,
        "version": app.version,
        "extensions": open_inference.EXTENSIONS,
    }


@router.get(MODEL_PATH, tags=PROTOCOL)
async def describe_tensors(pipeline: PipelineParam) -> dict[str, Any]:
    """Describe the model's tensors."""
    return open_inference.describe_model(pipeline.classes, pipeline.classifier_id)


@router.post(
    f"{MODEL_PATH}/infer", tags=PROTOCOL, openapi_extra=describe_json_body(InferenceRequest)
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
        return Response(content, headers={"content-type": "application/json"})
    headers = {"content-type": OCTETS, open_inference.LENGTH_HEADER: str(length)}
    return Response(content, headers=headers)
