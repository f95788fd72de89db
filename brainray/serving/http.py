"""The paths of the service: each reads a request, asks the handler, and writes what it says."""

import base64
import time
from collections.abc import Awaitable, Callable
from copy import deepcopy
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

import brainray
from brainray.model.reasons import INTENDED_USE, NOT_INTENDED_FOR, NOTICE, REASONS
from brainray.serving import bodies, inference
from brainray.serving.auth import Guard
from brainray.serving.bodies import part_uploads
from brainray.serving.gate import FAULT, Gate, dump_json
from brainray.serving.handler import Answers, Handler, Render, Upload
from brainray.serving.journal import Journal
from brainray.serving.meters import METRICS_TYPE, Meters
from brainray.serving.pages import add_pages, describe_interface
from brainray.serving.problem import PROBLEM_TYPE, Problem, name_status, render_problem
from brainray.serving.schemas import (
    AnswersBody,
    ExplainedAnswersBody,
    HealthBody,
    InferenceResponse,
    ModelBody,
    ModelMetadata,
    ServerBody,
)

JSON_TYPE = "application/json"
OCTETS = "application/octet-stream"
CARD_METRICS = ("metrics", "evaluation")

PROTOCOL = "Open Inference Protocol"


def build_app(
    handler: Handler,
    *,
    guard: Guard,
    meters: Meters,
    journal: Journal,
    render_meters: Callable[[], Awaitable[bytes]] | None = None,
    echo_id: bool = True,
) -> Gate:
    """Build the ASGI application.

    Parameters
    ----------
    handler : Handler
        Answers.
    guard : Guard
        Knows the token.
    meters : Meters
        Count what this replica does.
    journal : Journal
        Takes a line for each request.
    render_meters : callable, optional
        Gives the text of /metrics; of this replica alone, if not given.
    echo_id : bool
        Whether to send the request's id back; Ray Serve does it by itself.
    """

    async def render_own() -> bytes:
        return meters.render()

    app = FastAPI(
        title="brainray",
        version=brainray.__version__,
        description=f"Classifies slices of brain MRI. **{NOTICE}**",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    meters.watch("waiting_scans", "Scans waiting for a call.", lambda: handler.courier.num_waiting)
    meters.watch("model_calls", "Calls under way to the model.", lambda: handler.courier.num_calls)
    meters.watch("log_lines_dropped", "Log lines nobody took in time.", lambda: journal.dropped)
    _add_refusals(app)
    _add_operations(app, handler, render_meters or render_own)
    _add_answers(app, handler, meters)
    _add_inference(app, handler, meters)
    document = describe_interface(app, handler.limits, is_guarded=guard.is_closed)
    add_pages(app, document)
    paths = [*document["paths"], "/", "/docs", "/openapi.json"]
    return Gate(
        app,
        paths=paths,
        limits=handler.limits,
        guard=guard,
        meters=meters,
        journal=journal,
        admit=lambda: handler.courier.check_room(1),
        echo_id=echo_id,
    )


# --- refusals ------------------------------------------------------------------------------------


def _refusals(*codes: int) -> dict[int | str, dict[str, Any]]:
    """Describe the refusals of a path, for OpenAPI."""
    described: dict[int | str, dict[str, Any]] = {}
    for status in codes:
        described[status] = {
            "description": _DESCRIPTIONS[status],
            "content": {PROBLEM_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemBody"}}},
        }
        if status == 429:
            described[status]["headers"] = {
                "Retry-After": {
                    "description": "Seconds to wait.",
                    "required": True,
                    "schema": {"type": "string", "pattern": "^[0-9]+$"},
                }
            }
    return described


_DESCRIPTIONS = {
    400: "The request cannot be understood.",
    401: "The token is missing or wrong.",
    404: "There is no such model.",
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
READING, POSTING = (401, 429, 500, 503, 504), (400, 401, 408, 413, 415, 422, 429, 500, 503, 504)


def _add_refusals(app: FastAPI) -> None:
    def refuse(request: Request, problem: Problem) -> Response:
        if request.url.path.startswith("/v2"):  # where that protocol's clients look for it
            problem.members["error"] = problem.detail
        body, headers = render_problem(problem, request.state.request_id)
        return Response(body, problem.status, headers)

    async def on_problem(request: Request, error: Exception) -> Response:
        assert isinstance(error, Problem)
        return refuse(request, error)

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        details = {
            404: "There is nothing at this path. /docs lists what there is.",
            405: f"{request.method} is not known here. The header Allow lists what is.",
        }
        detail = details.get(error.status_code, str(error.detail))
        return refuse(
            request, Problem(name_status(error.status_code), detail, dict(error.headers or {}))
        )

    async def on_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        return refuse(request, Problem("invalid_parameter", f"{place}: {first['msg']}."))

    async def on_fault(request: Request, error: Exception) -> Response:
        del error  # the gate logs it, to whom it is raised after this
        return refuse(request, Problem("internal", FAULT))

    app.add_exception_handler(Problem, on_problem)
    app.add_exception_handler(Exception, on_fault)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(RequestValidationError, on_invalid)


# --- operations ----------------------------------------------------------------------------------


def _add_operations(
    app: FastAPI, handler: Handler, render_meters: Callable[[], Awaitable[bytes]]
) -> None:
    @app.get("/healthz", tags=["operations"], response_model=HealthBody, responses=_refusals(500))
    async def healthz() -> Response:
        """Tell that this process answers; of the model it says nothing."""
        return _json({"status": "ok"})

    @app.get(
        "/readyz", tags=["operations"], response_model=HealthBody, responses=_refusals(500, 503)
    )
    async def readyz() -> Response:
        """Tell that a model is loaded and gives the right answers to images drawn for the test."""
        await handler.check_ready()
        return _json({"status": "ok"})

    @app.get(
        "/metrics",
        tags=["operations"],
        response_class=Response,
        responses={
            200: {"content": {"text/plain": {"schema": {"type": "string"}}}},
            **_refusals(401, 500),
        },
    )
    async def metrics() -> Response:
        """Count requests, times and answers, and what waits, in Prometheus' text format.

        All ingress replicas are in it, told apart by the label `replica`.
        """
        return Response(await render_meters(), headers={"content-type": METRICS_TYPE})


# --- answers -------------------------------------------------------------------------------------

_EXAMPLE = {
    "request_id": "5f0c2c5b8d3e4a7f9b1d6c3e2a4f8b70",
    "classifier_id": "f4efae25798c",
    "classes": ["glioma", "meningioma", "notumor", "pituitary"],
    "time_ms": 23.1,
    "notice": NOTICE,
    "answers": [
        {
            "name": "a.jpg",
            "status": "classified",
            "reason": None,
            "detail": None,
            "predicted_class": "glioma",
            "confidence": 0.93,
            "probs": {"glioma": 0.93, "meningioma": 0.05, "notumor": 0.01, "pituitary": 0.01},
            "width_px": 512,
            "height_px": 512,
            "content_sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        }
    ],
}
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_SCANS_BODY = {
    "requestBody": {
        "required": True,
        "description": "Scans as JPEG, PNG, BMP, GIF, TIFF or WebP files: one as the body itself "
        "(image/*, or application/octet-stream), or one or more in a form.",
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["files"],
                    "properties": {
                        "files": {
                            "type": "array",
                            "minItems": 1,
                            "items": {"type": "string", "format": "binary"},
                        }
                    },
                }
            },
            # application/octet-stream is left to the words above: whoever reads a schema would
            # take it that any bytes are good, and what is no image is a 422.
            "image/*": _BINARY,
        },
    }
}


def _add_answers(app: FastAPI, handler: Handler, meters: Meters) -> None:
    @app.post(
        "/v1/classify",
        tags=["answers"],
        response_model=AnswersBody,
        responses={200: {"content": {JSON_TYPE: {"example": _EXAMPLE}}}, **_refusals(*POSTING)},
        openapi_extra=deepcopy(_SCANS_BODY),
    )
    async def classify(request: Request) -> Response:
        """Classify scans.

        Every file gets one answer, in order; one that cannot be read is answered `rejected` with a
        reason. Only where the body itself is the scan, what cannot be read is a 422.

            curl -F files=@a.jpg -F files=@b.png http://127.0.0.1:8000/v1/classify
            curl --data-binary @a.jpg -H "Content-Type: image/jpeg" http://127.0.0.1:8000/v1/classify
        """
        started = time.perf_counter()
        uploads, is_raw = await _read_uploads(request, handler.limits.files)
        answered = await handler.classify(uploads)
        meters.count_answers(answered.answers)
        if is_raw:
            _refuse_rejected(answered)
        return _json(_build_body(request, answered, started))

    @app.post(
        "/v1/explain",
        tags=["answers"],
        response_model=ExplainedAnswersBody,
        responses={200: {"content": {"image/png": _BINARY}}, **_refusals(*POSTING, 406)},
        openapi_extra=deepcopy(_SCANS_BODY),
    )
    async def explain(
        request: Request,
        render: Annotated[
            Render,
            Query(description="The map alone, to be laid over the scan, or the scan under it."),
        ] = "map",
    ) -> Response:
        """Classify scans, and show where in each the network saw its class.

        With `Accept: image/png` and one raw body the answer is the picture itself.
        """
        started = time.perf_counter()
        uploads, is_raw = await _read_uploads(request, handler.limits.files)
        accepted = request.headers.get("accept", "*/*")
        wants_picture = accepted.partition(";")[0].strip() == "image/png"
        if wants_picture and not is_raw:
            raise Problem("not_acceptable", "image/png is given for one scan as the body itself.")
        answered = await handler.explain(uploads)
        meters.count_answers(answered.answers)
        if is_raw:
            _refuse_rejected(answered)
        pictures = await handler.draw(answered, render)
        if wants_picture:
            return Response(pictures[0] or b"", headers={"content-type": "image/png"})
        body = _build_body(request, answered, started)
        body["answers"] = [
            {
                **{name: getattr(answer, name) for name in answer.__slots__},
                "explained_class": shown.explained_class if shown else None,
                "heat_map_png": base64.b64encode(picture).decode() if picture else None,
            }
            for answer, shown, picture in zip(
                answered.answers, answered.evidence, pictures, strict=True
            )
        ]
        return _json(body)

    @app.get("/v1/model", tags=["answers"], response_model=ModelBody, responses=_refusals(*READING))
    async def model() -> Response:
        """Say what answers, what it was measured to do, what it is for, and what is too much."""
        return _json(_build_card(await handler.describe(), handler))


async def _read_uploads(request: Request, most: int) -> tuple[list[Upload], bool]:
    """Read the scans of a request, and whether the body itself is the scan."""
    given = request.headers.get("content-type", OCTETS)
    kind = given.partition(";")[0].strip().lower()
    if kind == bodies.MULTIPART:
        return part_uploads(await request.body(), given, most=most), False
    if kind.startswith("image/") or kind == OCTETS:
        return [Upload(None, await request.body())], True
    raise Problem(
        "unsupported_media_type",
        f"Expected multipart/form-data, image/* or {OCTETS} as Content-Type.",
    )


def _refuse_rejected(answered: Answers) -> None:
    (answer,) = answered.answers
    if answer.status == "rejected":
        raise Problem("image_rejected", answer.detail or "", members={"reason": answer.reason})


def _build_body(request: Request, answered: Answers, started: float) -> dict[str, Any]:
    return {
        "request_id": request.state.request_id,
        "classifier_id": answered.meaning.classifier_id,
        "classes": answered.meaning.classes,
        "time_ms": round((time.perf_counter() - started) * 1e3, 2),
        "notice": NOTICE,
        "answers": answered.answers,
    }


def _build_card(description: dict[str, Any], handler: Handler) -> dict[str, Any]:
    card = description["card"]
    return {
        "classifier_id": card["classifier_id"],
        "classes": card["classes"],
        "preprocessing": card["preprocessing"],
        "metrics": next((card[name] for name in CARD_METRICS if card.get(name)), None),
        "runtime": description["runtime"],
        "intended_use": INTENDED_USE,
        "not_intended_for": NOT_INTENDED_FOR,
        "model_card": card.get("model_card"),
        "limits": asdict(handler.limits),
        "rejection_reasons": REASONS,
        "notice": NOTICE,
    }


# --- Open Inference Protocol ---------------------------------------------------------------------

_INFERENCE_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            JSON_TYPE: {"schema": {"$ref": "#/components/schemas/InferenceRequest"}},
        },
    }
}
_MODEL_PATH = f"/v2/models/{inference.MODEL_NAME}"


def _add_inference(app: FastAPI, handler: Handler, meters: Meters) -> None:
    @app.get("/v2", response_model=ServerBody, responses=_refusals(401, 429, 500), tags=[PROTOCOL])
    async def server() -> Response:
        """Describe the server."""
        return _json(
            {
                "name": app.title,
                "version": app.version,
                "extensions": inference.EXTENSIONS,
            }
        )

    @app.get(
        "/v2/health/live", response_model=HealthBody, responses=_refusals(500), tags=[PROTOCOL]
    )
    async def live() -> Response:
        """Tell that this process answers."""
        return _json({"status": "ok"})

    @app.get(
        "/v2/health/ready",
        response_model=HealthBody,
        responses=_refusals(500, 503),
        tags=[PROTOCOL],
    )
    async def ready() -> Response:
        """Tell the same as /readyz."""
        await handler.check_ready()
        return _json({"status": "ok"})

    @app.get(
        _MODEL_PATH,
        response_model=ModelMetadata,
        response_model_exclude_none=True,
        responses=_refusals(*READING),
        tags=[PROTOCOL],
    )
    async def metadata() -> Response:
        """Describe the model's tensors."""
        meaning = await handler.get_meaning()
        return _json(inference.describe_model(meaning.classifier_id, meaning.classes))

    @app.get(
        f"{_MODEL_PATH}/ready",
        response_model=HealthBody,
        responses=_refusals(*READING),
        tags=[PROTOCOL],
    )
    async def model_ready() -> Response:
        """Tell the same as /readyz."""
        await handler.check_ready()
        return _json({"status": "ok"})

    @app.post(
        f"{_MODEL_PATH}/infer",
        response_model=InferenceResponse,
        responses=_refusals(*POSTING),
        openapi_extra=_INFERENCE_BODY,
        tags=[PROTOCOL],
    )
    async def infer(request: Request) -> Response:
        """Classify scans. The input `image` holds encoded images, in JSON each as base64.

        With the header `Inference-Header-Content-Length` the images may follow the JSON as they
        are (the protocol's binary data extension), and outputs may be asked for in that way.
        """
        asked = inference.read_inference(
            await request.body(),
            request.headers.get(inference.LENGTH_HEADER),
            most=handler.limits.files,
        )
        answered = await handler.classify(asked.uploads)
        meters.count_answers(answered.answers)
        body, header_length = inference.render_inference(asked, answered)
        if header_length is None:
            return Response(body, headers={"content-type": JSON_TYPE})
        return Response(
            body, headers={"content-type": OCTETS, inference.LENGTH_HEADER: str(header_length)}
        )


def _json(value: object) -> Response:
    return Response(dump_json(value), headers={"content-type": JSON_TYPE})
