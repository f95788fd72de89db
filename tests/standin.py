"""A server that answers the page as the service would, with answers that are fixed by file name."""

import asyncio
import base64
import io
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np
import uvicorn
from PIL import Image, UnidentifiedImageError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from tests.conftest import CLASSES, REPOSITORY

WEB = REPOSITORY / "brainray" / "serving" / "web"
TOKEN = "correct-horse-battery"
CLASSIFIER_ID = "3f9a61c07b2e"
MAX_BYTES = 2**20
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
NOTICE = "Research use only; not a medical device."
CARD: dict[str, Any] = {
    "classifier_id": CLASSIFIER_ID,
    "classes": list(CLASSES),
    "preprocessing": {"size_px": 224},
    "metrics": {
        "val": {"n": 640, "accuracy": 0.981, "accuracy_ci95": [0.969, 0.991]},
        "test": {
            "n": 1311,
            "accuracy": 0.9634,
            "accuracy_ci95": [0.9521, 0.974],
            "no_twin": {"n": 702, "accuracy": 0.9402},
        },
    },
    "runtime": {"backend": "openvino", "precision": "fp32", "description": "OpenVINO, fp32"},
    "intended_use": "Research on classifying slices of brain MRI: comparing classifiers, sorting "
    "and finding scans in research data.",
    "not_intended_for": "Diagnosis, treatment or triage of patients; scans of other organs or "
    "modalities; whole volumes.",
    "model_card": {
        "notice": NOTICE,
        "data": {"name": "<b>ours</b>", "num_scans": 6361, "hardware": None, "rejected": {}},
        "results": {
            "test": {"accuracy": 0.9634123, "accuracy_ci95": [0.9521, 0.974], "given": True},
            "confusion": [[140, 2], [1, 144]],
        },
        "limits": ["Only slices were judged.", "One hospital."],
        "guidelines": [{"name": "CLAIM", "items": [{"item": "1", "answer": "title"}]}],
    },
    "limits": {"body_bytes": MAX_BYTES, "files": 32},
    "rejection_reasons": {},
    "notice": NOTICE,
}


@dataclass
class StandIn:
    """What the server does, and what it was asked."""

    needs_token: bool = False
    metrics: Any = field(default_factory=lambda: CARD["metrics"])
    model_card: Any = field(default_factory=lambda: CARD["model_card"])
    asked: Counter[str] = field(default_factory=Counter)
    """Requests for each file name."""
    renders: list[str] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    delay_s: float = 0.0
    moments: dict[str, list[float]] = field(default_factory=dict)
    url: str = ""


def build_standin(state: StandIn) -> Starlette:
    """Build the application."""

    async def index(request: Request) -> Response:
        del request
        return FileResponse(WEB / "index.html", headers=HEADERS)

    async def model(request: Request) -> Response:
        card = {**CARD, "metrics": state.metrics, "model_card": state.model_card}
        return refuse_stranger(request, state) or JSONResponse(card)

    async def explain(request: Request) -> Response:
        name, content = read_file(await request.body())
        refusal = refuse_stranger(request, state)
        if refusal is not None:
            await asyncio.sleep(1.0 if name.startswith("late") else 0)
            return refusal
        render = request.query_params["render"]
        state.asked[name] += 1
        state.renders.append(render)
        state.moments.setdefault(name, []).append(time.monotonic())
        if name.startswith("busy") and state.asked[name] == 1:
            return write_problem(429, "too_busy", "128 scans wait already.", {"retry-after": "2"})
        if name.startswith("fault") and state.asked[name] == 1:
            return write_problem(500, "internal", "The service's log says what.")
        state.at_once += 1
        state.most_at_once = max(state.at_once, state.most_at_once)
        await asyncio.sleep(state.delay_s)
        state.at_once -= 1
        return JSONResponse(
            {
                "request_id": "r1",
                "classifier_id": CLASSIFIER_ID,
                "classes": CLASSES,
                "time_ms": 12.5,
                "notice": NOTICE,
                "answers": [answer_file(name, content, render)],
            },
            headers=HEADERS,
        )

    return Starlette(
        routes=[
            Route("/", index),
            Route("/v1/model", model),
            Route("/v1/explain", explain, methods=["POST"]),
            Mount("/static", StaticFiles(directory=WEB)),
        ]
    )


def refuse_stranger(request: Request, state: StandIn) -> Response | None:
    if not state.needs_token or request.headers.get("authorization") == f"Bearer {TOKEN}":
        return None
    return write_problem(401, "unauthorized", "Expected the header Authorization.")


def write_problem(
    status: int, code: str, detail: str, headers: dict[str, str] | None = None
) -> Response:
    body = {
        "type": f"urn:brainray:problem:{code}",
        "title": code,
        "status": status,
        "detail": detail,
        "code": code,
        "request_id": "r1",
    }
    return Response(
        json.dumps(body),
        status,
        HEADERS | {"content-type": "application/problem+json"} | (headers or {}),
    )


def read_file(body: bytes) -> tuple[str, bytes]:
    """Read the one part `files` of a form, as a browser writes it."""
    head, _, rest = body.partition(b"\r\n\r\n")
    found = re.search(rb'form-data; name="files"; filename="(.*)"', head)
    assert found, head
    return found[1].decode(), rest.rpartition(b"\r\n--")[0]


def answer_file(name: str, content: bytes, render: str) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "name": name,
        "status": "rejected",
        "reason": "not_an_image",
        "detail": None,
        "predicted_class": None,
        "confidence": None,
        "probs": None,
        "width_px": None,
        "height_px": None,
        "content_sha256": sha256(content).hexdigest(),
        "explained_class": None,
        "heat_map_png": None,
    }
    try:
        image = Image.open(io.BytesIO(content)).convert("L")
    except UnidentifiedImageError:
        return answer
    except OSError:
        return answer | {
            "reason": "truncated",
            "detail": "The PNG file ends before its image does. Resend it.",
        }
    probs = choose_probs(name)
    best = max(probs, key=lambda one: probs[one])
    is_sure = not name.startswith("abstain")
    return answer | {
        "status": "classified" if is_sure else "abstained",
        "reason": None,
        "predicted_class": best if is_sure else None,
        "confidence": probs[best] if is_sure else None,
        "probs": probs,
        "width_px": image.width,
        "height_px": image.height,
        "explained_class": best,
        "heat_map_png": base64.b64encode(draw_map(image, render)).decode(),
    }


def choose_probs(name: str) -> dict[str, float]:
    """Choose probabilities by the class that a name has in it; the first one if it has none."""
    if name.startswith("abstain"):
        return dict(zip(CLASSES, (0.38, 0.34, 0.08, 0.2), strict=True))
    best = next((one for one in CLASSES if one in name), CLASSES[0])
    rest = iter((0.043, 0.02, 0.0004))
    return {one: 0.9366 if one == best else next(rest) for one in CLASSES}


def draw_map(image: Image.Image, render: str) -> bytes:
    """Draw a spot of evidence, right of the middle."""
    rows, columns = np.mgrid[0 : image.height, 0 : image.width]
    away = np.hypot(rows / image.height - 0.42, columns / image.width - 0.6) / 0.22
    strength = np.exp(-(away**2))
    place = np.linspace(0, 1, 5)
    anchors = np.array(
        [(0, 0, 60), (120, 20, 130), (220, 50, 60), (250, 150, 20), (255, 245, 120)], np.float64
    )
    channels = [np.interp(strength, place, anchors[:, c]) for c in range(3)]
    layer = np.stack([*channels, strength * 255 * 0.7], axis=-1).round().astype(np.uint8)
    picture = Image.fromarray(layer, "RGBA")
    if render == "overlay":
        picture = Image.alpha_composite(image.convert("RGBA"), picture).convert("RGB")
    sink = io.BytesIO()
    picture.save(sink, "PNG")
    return sink.getvalue()


@contextmanager
def serve_standin(state: StandIn) -> Iterator[StandIn]:
    """Serve on a free port, in a thread, for the time of a `with`."""
    config = uvicorn.Config(build_standin(state), port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while not server.started:
        assert time.monotonic() < deadline, "the stand-in did not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    state.url = f"http://127.0.0.1:{port}/"
    try:
        yield state
    finally:
        server.should_exit = True
        thread.join(10)
