"""The paths of the service: each reads a request, asks the pipeline, and returns a body."""

import base64
import time
from dataclasses import asdict
from enum import Enum
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

import brainray
from brainray.model.reasons import INTENDED_USE, NOT_INTENDED_FOR, NOTICE, REASONS
from brainray.serving import open_inference
from brainray.serving.access_log import AccessLog
from brainray.serving.metrics import CONTENT_TYPE, Metrics
from brainray.serving.middleware import RequestContext, RequestLimits, TokenAuth
from brainray.serving.openapi import (
    ANSWERED_BODY,
    INFERENCE_BODY,
    PICTURE,
    SCANS_BODY,
    add_pages,
    describe_interface,
)
from brainray.serving.pipeline import Pipeline, Render
from brainray.serving.problem import Problem, name_status
from brainray.serving.schemas import (
    AnswerBody,
    AnsweredBody,
    AnswersBody,
    ExplainedAnswersBody,
    HealthBody,
    InferenceResponse,
    ModelBody,
    ModelMetadata,
    PictureBody,
    PicturesBody,
    SeriesAnswersBody,
    ServerBody,
    read_json,
)
from brainray.serving.uploads import OCTETS, read_body, read_uploads

MODEL_PATH = f"/v2/models/{open_inference.MODEL_NAME}"
HEALTHY = HealthBody(status="ok")
OPERATIONS: list[str | Enum] = ["operations"]
ANSWERS: list[str | Enum] = ["answers"]
PROTOCOL: list[str | Enum] = ["Open Inference Protocol"]
"""Tags, by which the description of the interface groups paths."""

router = APIRouter()


async def get_pipeline(request: Request) -> Pipeline:
    """Return the application's pipeline."""
    pipeline: Pipeline = request.app.state.pipeline
    return pipeline


async def get_metrics(request: Request) -> Metrics:
    """Return the application's metrics."""
    metrics: Metrics = request.app.state.metrics
    return metrics


ThePipeline = Annotated[Pipeline, Depends(get_pipeline)]
TheMetrics = Annotated[Metrics, Depends(get_metrics)]
Frame = Annotated[
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
    """Build the ASGI application.

    Parameters
    ----------
    pipeline : Pipeline
        Answers.
    token : str, optional
        What requests need; without one they need none.
    metrics : Metrics
        Counts what this replica does.
    access_log : AccessLog
        Takes a line for each request.
    sends_request_id : bool
        Whether to send the request's id back; Ray Serve does it by itself.
    """
    app = FastAPI(
        title="brainray",
        version=brainray.__version__,
        description=f"Classifies slices of brain MRI. **{NOTICE}**",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    metrics.watch("waiting_scans", "Scans waiting.", lambda: pipeline.predictions.num_queued)
    metrics.watch("log_lines_dropped", "Unwritten log lines.", lambda: access_log.num_dropped)
    app.add_exception_handler(HTTPException, _refuse_http)
    app.add_exception_handler(RequestValidationError, _refuse_parameter)
    app.state.pipeline, app.state.metrics = pipeline, metrics
    app.include_router(router)
    document = describe_interface(
        app, pipeline.limits, pipeline.classes, needs_token=token is not None
    )
    add_pages(app, document)
    app.add_middleware(RequestLimits, limits=pipeline.limits, metrics=metrics)
    app.add_middleware(TokenAuth, token=token)
    app.add_middleware(  # the last that is added is the first to see a request
        RequestContext,
        paths=[*document["paths"], "/", "/docs", "/openapi.json"],
        metrics=metrics,
        access_log=access_log,
        sends_request_id=sends_request_id,
    )
    return app


async def _refuse_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    details = {
        404: "There is nothing at this path. /docs lists what there is.",
        405: f"{request.method} is not known here. The header Allow lists what is.",
    }
    detail = details.get(error.status_code, str(error.detail))
    raise Problem(name_status(error.status_code), detail, dict(error.headers or {}))


async def _refuse_parameter(request: Request, error: Exception) -> Response:
    del request
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    location = ".".join(map(str, first["loc"]))
    raise Problem("invalid_parameter", f"{location}: {first['msg']}.")


@router.get("/healthz", tags=OPERATIONS)
@router.get("/v2/health/live", tags=PROTOCOL)
async def healthz() -> HealthBody:
    """Tell that this process answers; of the model it says nothing."""
    return HEALTHY


@router.get("/readyz", tags=OPERATIONS)
@router.get("/v2/health/ready", tags=PROTOCOL)
@router.get(f"{MODEL_PATH}/ready", tags=PROTOCOL)
async def readyz(pipeline: ThePipeline) -> HealthBody:
    """Tell that a model is loaded and gives the right answers to images drawn for the test."""
    await pipeline.check_ready()
    return HEALTHY


@router.get(
    "/metrics",
    tags=OPERATIONS,
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def show_metrics(metrics: TheMetrics) -> Response:
    """Count requests, times and answers, and what waits, in Prometheus' text format.

    They are those of one replica, named by the label `replica`.
    """
    return Response(metrics.render(), headers={"content-type": CONTENT_TYPE})


@router.post("/v1/classify", tags=ANSWERS, openapi_extra=SCANS_BODY)
async def classify(request: Request, pipeline: ThePipeline, metrics: TheMetrics) -> AnswersBody:
    """Classify scans: pictures, DICOM objects and NIfTI volumes.

    Every file gets one answer, in order; one that cannot be read is answered `rejected` with a
    reason. Only where the body itself is the scan, what cannot be read is a 422. The answer to a
    file with several slices has an answer for each in `slices`. `series` puts the slices of each
    series together.

        curl -F files=@a.jpg -F files=@b.dcm http://127.0.0.1:8000/v1/classify
        curl --data-binary @a.jpg -H "Content-Type: image/jpeg" http://127.0.0.1:8000/v1/classify
    """
    pipeline.predictions.check_disk_space(1)
    uploads, is_raw = await read_uploads(request, pipeline.limits)
    answers = await pipeline.classify(uploads)
    metrics.count_answers(answers)
    if is_raw:
        refuse_rejected(answers[0])
    series = await pipeline.summarise(answers)
    return AnswersBody(**describe_request(request, pipeline), answers=answers, series=series)


@router.post("/v1/series", tags=ANSWERS, openapi_extra=ANSWERED_BODY)
async def summarise(request: Request, pipeline: ThePipeline) -> SeriesAnswersBody:
    """Put the `answers` of several requests together to series.

    For a series whose files are more than one request may have: send the answers to all of its
    files, as they came.
    """
    answered = read_json(AnsweredBody, await read_body(request, pipeline.limits))
    series = await pipeline.summarise(answered.answers)
    return SeriesAnswersBody(**describe_request(request, pipeline), series=series)


@router.post(
    "/v1/explain",
    tags=ANSWERS,
    response_model=ExplainedAnswersBody,
    responses={200: {"content": {"image/png": PICTURE}}},
    openapi_extra=SCANS_BODY,
)
async def explain(
    request: Request,
    pipeline: ThePipeline,
    metrics: TheMetrics,
    render: Annotated[
        Render,
        Query(description="The map alone, to be laid over the scan, or the scan under it."),
    ] = "map",
    frame: Frame = None,
) -> ExplainedAnswersBody | Response:
    """Classify one slice of each file, and show where in it the network saw its class.

    With `Accept: image/png` and one raw body the answer is the picture itself. A file with several
    slices needs `frame`.
    """
    pipeline.explanations.check_disk_space(1)
    uploads, is_raw = await read_uploads(request, pipeline.limits)
    wants_picture = check_picture(request, is_raw=is_raw)
    answers = await pipeline.explain(uploads, render, frame)
    metrics.count_answers(answers)
    if is_raw:
        refuse_rejected(answers[0])
    if wants_picture:
        return show_picture(answers[0].heat_map_png or "")
    return ExplainedAnswersBody(**describe_request(request, pipeline), answers=answers)


@router.post(
    "/v1/render",
    tags=ANSWERS,
    response_model=PicturesBody,
    responses={200: {"content": {"image/png": PICTURE}}},
    openapi_extra=SCANS_BODY,
)
async def render(
    request: Request, pipeline: ThePipeline, frame: Frame = None
) -> PicturesBody | Response:
    """Show slices as 8-bit pictures, through their window where they have one.

    With `Accept: image/png` and one raw body the answer is the picture of one slice: `frame`, else
    the first. Nothing of a header is shown.
    """
    uploads, is_raw = await read_uploads(request, pipeline.limits)
    wants_picture = check_picture(request, is_raw=is_raw)
    if wants_picture and frame is None:
        frame = 0
    pictures = await pipeline.render(uploads, frame)
    if wants_picture:
        (picture,) = pictures
        if picture.png is None:
            raise refuse_image(picture)
        return show_picture(picture.png)
    return PicturesBody(request_id=request.state.request_id, pictures=pictures)


def check_picture(request: Request, *, is_raw: bool) -> bool:
    """Tell whether a request wants a picture alone, which is given for one raw body."""
    accepted = request.headers.get("accept", "*/*")
    wants_picture = accepted.partition(";")[0].strip() == "image/png"
    if wants_picture and not is_raw:
        raise Problem("not_acceptable", "image/png is given for one scan as the body itself.")
    return wants_picture


def show_picture(png: str) -> Response:
    """Return a picture, base64, as it is."""
    return Response(base64.b64decode(png), headers={"content-type": "image/png"})


def refuse_rejected(answer: AnswerBody) -> None:
    """Refuse a request whose body itself is the scan, and cannot be read."""
    if answer.status == "rejected":
        raise refuse_image(answer)


def refuse_image(rejected: AnswerBody | PictureBody) -> Problem:
    """Build the refusal of a scan that cannot be read."""
    return Problem("image_rejected", rejected.detail or "", members={"reason": rejected.reason})


def describe_request(request: Request, pipeline: Pipeline) -> dict[str, Any]:
    """Return the members that an answer has beside those for its scans."""
    return {
        "request_id": request.state.request_id,
        "classifier_id": pipeline.classifier_id,
        "classes": pipeline.classes,
        "time_ms": round((time.perf_counter() - request.state.started) * 1e3, 2),
        "notice": NOTICE,
    }


@router.get("/v1/model", tags=ANSWERS)
async def describe_model(pipeline: ThePipeline) -> ModelBody:
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


@router.get("/v2", tags=PROTOCOL)
async def describe_server(request: Request) -> ServerBody:
    """Describe the server."""
    app: FastAPI = request.app
    return ServerBody(name=app.title, version=app.version, extensions=open_inference.EXTENSIONS)


@router.get(MODEL_PATH, tags=PROTOCOL, response_model_exclude_none=True)
async def describe_tensors(pipeline: ThePipeline) -> ModelMetadata:
    """Describe the model's tensors."""
    return ModelMetadata(**open_inference.describe_model(pipeline))


@router.post(
    f"{MODEL_PATH}/infer",
    tags=PROTOCOL,
    response_model=InferenceResponse,
    openapi_extra=INFERENCE_BODY,
)
async def infer(request: Request, pipeline: ThePipeline, metrics: TheMetrics) -> Response:
    """Classify scans. The input `image` holds files with one slice, in JSON each as base64.

    With the header `Inference-Header-Content-Length` the images may follow the JSON as they
    are (the protocol's binary data extension), and outputs may be asked for in that way.
    """
    pipeline.predictions.check_disk_space(1)
    body = await read_body(request, pipeline.limits)
    header_length = request.headers.get(open_inference.LENGTH_HEADER)
    asked = open_inference.read_inference(body, header_length, most=pipeline.limits.files)
    answers = await pipeline.classify(asked.uploads, one_slice=True)
    metrics.count_answers(answers)
    content, length = open_inference.render_inference(asked, pipeline, answers)
    if length is None:
        return Response(content, headers={"content-type": "application/json"})
    headers = {"content-type": OCTETS, open_inference.LENGTH_HEADER: str(length)}
    return Response(content, headers=headers)
