"""The paths of the service: each reads a request, asks the pipeline, and returns a body."""

import base64
import time
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

import brainray
from brainray.model.reasons import INTENDED_USE, NOT_INTENDED_FOR, NOTICE, REASONS
from brainray.serving import open_inference
from brainray.serving.access_log import AccessLog
from brainray.serving.metrics import CONTENT_TYPE, Metrics
from brainray.serving.middleware import RequestContext, RequestLimits, TokenAuth
from brainray.serving.openapi import (
    PICTURE,
    SCANS_BODY,
    add_pages,
    describe_interface,
)
from brainray.serving.pipeline import Pipeline, Render
from brainray.serving.problem import Problem, name_status
from brainray.serving.schemas import (
    AnswerBody,
    AnswersBody,
    ExplainedAnswersBody,
    HealthBody,
    InferenceResponse,
    ModelBody,
    ModelMetadata,
    ServerBody,
)
from brainray.serving.uploads import OCTETS, read_body, read_uploads

MODEL_PATH = f"/v2/models/{open_inference.MODEL_NAME}"
HEALTHY = HealthBody(status="ok")


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
    _add_operations(app, pipeline, metrics)
    _add_answers(app, pipeline, metrics)
    _add_open_inference(app, pipeline, metrics)
    document = describe_interface(app, pipeline.limits, needs_token=token is not None)
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


def _add_operations(app: FastAPI, pipeline: Pipeline, metrics: Metrics) -> None:
    @app.get("/healthz", tags=["operations"])
    async def healthz() -> HealthBody:
        """Tell that this process answers; of the model it says nothing."""
        return HEALTHY

    @app.get("/readyz", tags=["operations"])
    async def readyz() -> HealthBody:
        """Tell that a model is loaded and gives the right answers to images drawn for the test."""
        await pipeline.check_ready()
        return HEALTHY

    @app.get(
        "/metrics",
        tags=["operations"],
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def show_metrics() -> Response:
        """Count requests, times and answers, and what waits, in Prometheus' text format.

        They are those of one replica, named by the label `replica`.
        """
        return Response(metrics.render(), headers={"content-type": CONTENT_TYPE})


def _add_answers(app: FastAPI, pipeline: Pipeline, metrics: Metrics) -> None:
    @app.post("/v1/classify", tags=["answers"], openapi_extra=SCANS_BODY)
    async def classify(request: Request) -> AnswersBody:
        """Classify scans.

        Every file gets one answer, in order; one that cannot be read is answered `rejected` with a
        reason. Only where the body itself is the scan, what cannot be read is a 422.

            curl -F files=@a.jpg -F files=@b.png http://127.0.0.1:8000/v1/classify
            curl --data-binary @a.jpg -H "Content-Type: image/jpeg" http://127.0.0.1:8000/v1/classify
        """
        pipeline.predictions.check_room(1)
        uploads, is_raw = await read_uploads(request, pipeline.limits)
        answers = await pipeline.classify(uploads)
        _finish(answers, is_raw, metrics)
        return AnswersBody(**_describe_request(request, pipeline), answers=answers)

    @app.post(
        "/v1/explain",
        tags=["answers"],
        response_model=ExplainedAnswersBody,
        responses={200: {"content": {"image/png": PICTURE}}},
        openapi_extra=SCANS_BODY,
    )
    async def explain(
        request: Request,
        render: Annotated[
            Render,
            Query(description="The map alone, to be laid over the scan, or the scan under it."),
        ] = "map",
    ) -> ExplainedAnswersBody | Response:
        """Classify scans, and show where in each the network saw its class.

        With `Accept: image/png` and one raw body the answer is the picture itself.
        """
        pipeline.explanations.check_room(1)
        uploads, is_raw = await read_uploads(request, pipeline.limits)
        accepted = request.headers.get("accept", "*/*")
        wants_picture = accepted.partition(";")[0].strip() == "image/png"
        if wants_picture and not is_raw:
            raise Problem("not_acceptable", "image/png is given for one scan as the body itself.")
        answers = await pipeline.explain(uploads, render)
        _finish(answers, is_raw, metrics)
        if wants_picture:
            picture = base64.b64decode(answers[0].heat_map_png or "")
            return Response(picture, headers={"content-type": "image/png"})
        return ExplainedAnswersBody(**_describe_request(request, pipeline), answers=answers)

    @app.get("/v1/model", tags=["answers"])
    async def model() -> ModelBody:
        """Describe the classifier, its scores, its intended use, and the limits of requests."""
        card = pipeline.card
        return ModelBody(
            classifier_id=card["classifier_id"],
            classes=card["classes"],
            preprocessing=card["preprocessing"],
            metrics=card.get("metrics") or card.get("evaluation"),
            runtime=pipeline.runtime,
            intended_use=INTENDED_USE,
            not_intended_for=NOT_INTENDED_FOR,
            model_card=card.get("model_card"),
            limits=asdict(pipeline.limits),
            rejection_reasons=REASONS,
            notice=NOTICE,
        )


def _finish(answers: list[Any], is_raw: bool, metrics: Metrics) -> None:
    """Count answers; where the body itself is the scan, one that cannot be read is a refusal."""
    metrics.count_answers(answers)
    first: AnswerBody = answers[0]
    if is_raw and first.status == "rejected":
        raise Problem("image_rejected", first.detail or "", members={"reason": first.reason})


def _describe_request(request: Request, pipeline: Pipeline) -> dict[str, Any]:
    return {
        "request_id": request.state.request_id,
        "classifier_id": pipeline.classifier_id,
        "classes": pipeline.classes,
        "time_ms": round((time.perf_counter() - request.state.started) * 1e3, 2),
        "notice": NOTICE,
    }


def _add_open_inference(app: FastAPI, pipeline: Pipeline, metrics: Metrics) -> None:
    tags: list[Any] = ["Open Inference Protocol"]

    @app.get("/v2", tags=tags)
    async def server() -> ServerBody:
        """Describe the server."""
        return ServerBody(name=app.title, version=app.version, extensions=open_inference.EXTENSIONS)

    @app.get("/v2/health/live", tags=tags)
    async def live() -> HealthBody:
        """Tell that this process answers."""
        return HEALTHY

    @app.get("/v2/health/ready", tags=tags)
    @app.get(f"{MODEL_PATH}/ready", tags=tags)
    async def ready() -> HealthBody:
        """Tell the same as /readyz."""
        await pipeline.check_ready()
        return HEALTHY

    @app.get(MODEL_PATH, response_model_exclude_none=True, tags=tags)
    async def metadata() -> ModelMetadata:
        """Describe the model's tensors."""
        return ModelMetadata(**open_inference.describe_model(pipeline))

    @app.post(
        f"{MODEL_PATH}/infer",
        response_model=InferenceResponse,
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": {
                        "schema": {"$ref": "#/components/schemas/InferenceRequest"}
                    }
                },
            }
        },
        tags=tags,
    )
    async def infer(request: Request) -> Response:
        """Classify scans. The input `image` holds encoded images, in JSON each as base64.

        With the header `Inference-Header-Content-Length` the images may follow the JSON as they
        are (the protocol's binary data extension), and outputs may be asked for in that way.
        """
        pipeline.predictions.check_room(1)
        body = await read_body(request, pipeline.limits)
        header_length = request.headers.get(open_inference.LENGTH_HEADER)
        asked = open_inference.read_inference(body, header_length, most=pipeline.limits.files)
        answers = await pipeline.classify(asked.uploads)
        metrics.count_answers(answers)
        content, length = open_inference.render_inference(asked, pipeline, answers)
        if length is None:
            return Response(content, headers={"content-type": "application/json"})
        headers = {"content-type": OCTETS, open_inference.LENGTH_HEADER: str(length)}
        return Response(content, headers=headers)
