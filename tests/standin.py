"""A stand-in for the service: it keeps its contract, and does as a file's name says.

``glioma-1.jpg`` is a glioma, ``abstain-….png`` is abstained on; what cannot be decoded is rejected.
"""

import base64
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email import message_from_bytes
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np

import brainray
from brainray.errors import RejectedImage
from brainray.model.answer import NOTICE
from brainray.model.network import STRIDE_PX
from brainray.pixels.decode import decode_image
from brainray.pixels.picture import render_map, render_overlay
from brainray.pixels.preprocess import Preprocessing, resize_image

CLASSES = ("glioma", "meningioma", "notumor", "pituitary")
PREPROCESSING = Preprocessing(size_px=224)
WEB = Path(brainray.__file__).parent / "serving" / "web"
TYPES = {".html": "text/html; charset=utf-8", ".js": "text/javascript", ".css": "text/css"}
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'"
)
MODEL = {
    "classifier_id": "5ca1ab1e0000",
    "classes": CLASSES,
    "preprocessing": {"size_px": 224, "fit": "stretch", "mean": 0.449, "std": 0.226},
    "metrics": {
        "val": {"n": 816, "accuracy": 0.898, "accuracy_ci95": [0.868, 0.926]},
        "test": {
            "n": 653,
            "accuracy": 0.897,
            "accuracy_ci95": [0.871, 0.921],
            "no_twin": {"n": 407, "accuracy": 0.860},
        },
    },
    "runtime": {"description": "OpenVINO 2026.4.1, bf16, 2 threads"},
    "intended_use": "Research on classifying slices of brain MRI: comparing classifiers, sorting "
    "and finding scans in research data.",
    "not_intended_for": "Diagnosis, treatment or triage of patients; scans of other organs or "
    "modalities; whole volumes. It answers every picture that can be read, also one that is no "
    "brain MRI.",
    "limits": {"body_bytes": 2**20, "files": 32},
    "notice": NOTICE,
}


@dataclass
class StandIn:
    """What the service is to do, and what it was asked."""

    url: str = ""
    token: str | None = None
    delay_s: float = 0.0
    refusals: list[tuple[int, str, dict[str, str]]] = field(default_factory=list)
    """Status, code and headers of the next requests' refusals."""
    asked: list[tuple[float, str, str]] = field(default_factory=list)
    """When, path, and file name of each request for an answer."""
    most_at_once: int = 0
    now: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


def answer(name: str, content: bytes, render: str) -> dict[str, Any]:
    """Answer one file as its name says."""
    known: dict[str, Any] = dict.fromkeys(
        ("reason", "detail", "predicted_class", "confidence", "probs", "width_px", "height_px",
         "explained_class", "heat_map_png")
    )  # fmt: skip
    known |= {"name": name, "content_sha256": sha256(content).hexdigest()}
    try:
        pixels = decode_image(content)
    except RejectedImage as rejection:
        words = {"reason": rejection.reason, "detail": rejection.message}
        return known | {"status": "rejected", **words}
    height, width = pixels.shape
    called = next((k for k, label in enumerate(CLASSES) if label in name), 0)
    seed = int(sha256(content).hexdigest()[:8], 16)
    dice = np.random.default_rng(seed)
    spread = 0.3 if name.startswith("abstain") else 0.05 + 0.3 * dice.random()
    probs = dice.dirichlet(np.full(4, 0.4)) * spread
    probs[called] += 1 - spread
    label = CLASSES[int(probs.argmax())]
    small = resize_image(pixels, PREPROCESSING)[16::32, 16::32].astype(np.float32)
    evidence = small - small.mean() + dice.normal(0, 12, small.shape).astype(np.float32)
    if render == "map":
        picture = render_map(evidence, (height, width), PREPROCESSING, STRIDE_PX)
    else:
        picture = render_overlay(evidence, pixels, PREPROCESSING, STRIDE_PX)
    known |= {
        "status": "classified",
        "predicted_class": label,
        "confidence": float(probs.max()),
        "probs": dict(zip(CLASSES, map(float, probs), strict=True)),
        "width_px": width,
        "height_px": height,
        "explained_class": label,
        "heat_map_png": base64.b64encode(picture).decode(),
    }
    if name.startswith("abstain"):
        detail = "The two most probable classes are too close to each other."
        known |= {"status": "abstained", "reason": "uncertain", "detail": detail}
        known |= {"predicted_class": None, "confidence": None}
    return known


class _Handler(BaseHTTPRequestHandler):
    standin: StandIn

    def log_message(self, *_: object) -> None:
        pass

    def _send(self, status: int, kind: str, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {
            "content-type": kind,
            "content-length": str(len(body)),
            **headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _send_json(self, value: object) -> None:
        self._send(200, "application/json", json.dumps(value).encode(), {})

    def _refuse(self, status: int, code: str, headers: dict[str, str]) -> None:
        body = {
            "type": f"urn:brainray:problem:{code}",
            "title": code.replace("_", " ").capitalize(),
            "status": status,
            "detail": f"The stand-in was told to say {status}.",
            "code": code,
            "request_id": "1",
        }
        self._send(status, "application/problem+json", json.dumps(body).encode(), headers)

    def _is_let_in(self) -> bool:
        token = self.standin.token
        if token is None or self.headers.get("authorization") == f"Bearer {token}":
            return True
        self._refuse(401, "unauthorized", {"www-authenticate": "Bearer"})
        return False

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path == "/v1/model":
            if self._is_let_in():
                self._send_json(MODEL)
            return
        file = WEB / ("index.html" if path == "/" else path.removeprefix("/static/"))
        if not file.is_file():
            self._refuse(404, "not_found", {})
            return
        kind = TYPES.get(file.suffix, "image/svg+xml")
        self._send(200, kind, file.read_bytes(), {"content-security-policy": POLICY})

    def do_POST(self) -> None:
        standin, (path, query) = self.standin, urlsplit(self.path)[2:4]
        body = self.rfile.read(int(self.headers["content-length"]))
        if not self._is_let_in():
            return
        form = f"content-type: {self.headers['content-type']}\r\n\r\n".encode() + body
        (part,) = message_from_bytes(form).get_payload()
        said = re.search(r'filename="(.*?)"', str(part["content-disposition"]))
        name, content = said[1] if said else "", part.get_payload(decode=True)
        with standin.lock:
            standin.asked.append((time.monotonic(), self.path, name))
            refusal = standin.refusals.pop(0) if standin.refusals else None
            standin.now += 1
            standin.most_at_once = max(standin.most_at_once, standin.now)
        time.sleep(standin.delay_s)
        with standin.lock:
            standin.now -= 1
        if refusal is not None:
            self._refuse(*refusal)
            return
        assert path == "/v1/explain"
        answered = answer(name, content, parse_qs(query)["render"][0])
        self._send_json(
            {
                "request_id": "1",
                "classifier_id": MODEL["classifier_id"],
                "classes": CLASSES,
                "time_ms": 1.0,
                "notice": NOTICE,
                "answers": [answered],
            }
        )


@contextmanager
def stand_in(**settings: Any) -> Iterator[StandIn]:  # noqa: ANN401 - any field
    """Answer on a port of this machine, until the end of the block."""
    standin = StandIn(**settings)
    handler = type("Handler", (_Handler,), {"standin": standin})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    standin.url = f"http://127.0.0.1:{server.server_port}/"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield standin
    finally:
        server.shutdown()
        server.server_close()
