"""The service's own application, served in a thread before a model whose answers a test fixes.

What comes over HTTP is what the service sends: only what the network would say to a scan is made
up, and found by what the scan looks like to it.
"""

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import numpy as np
import uvicorn
from numpy.typing import NDArray

from brainray.images.decode import DecodeLimits
from brainray.images.preprocess import Preprocessing, open_scan
from brainray.inference.engine import Prediction
from brainray.model.explain import STRIDE_PX
from brainray.serving.asgi import App, Receive, Scope, Send
from brainray.serving.limits import ServiceLimits
from brainray.serving.predictor import Meaning, Reply
from tests.conftest import CLASSES
from tests.service import build_test_app

PREPROCESSING = Preprocessing(size_px=64)
CLASSIFIER_ID = "3f9a61c07b2e"
CARD: dict[str, Any] = {
    "classifier_id": CLASSIFIER_ID,
    "classes": list(CLASSES),
    "preprocessing": {"size_px": PREPROCESSING.size_px},
    "metrics": {
        "val": {"n": 640, "accuracy": 0.981, "accuracy_ci95": [0.969, 0.991]},
        "test": {
            "n": 1311,
            "accuracy": 0.9634,
            "accuracy_ci95": [0.9521, 0.974],
            "no_twin": {"n": 702, "accuracy": 0.9402},
        },
    },
    "model_card": {
        "notice": "Research use only; not a medical device.",
        "data": {"name": "<b>ours</b>", "num_scans": 6361, "hardware": None, "rejected": {}},
        "results": {
            "test": {"accuracy": 0.9634123, "accuracy_ci95": [0.9521, 0.974], "given": True},
            "confusion": [[140, 2], [1, 144]],
        },
        "limits": ["Only slices were judged.", "One hospital."],
        "guidelines": [{"name": "CLAIM", "items": [{"item": "1", "answer": "title"}]}],
    },
}


@dataclass(frozen=True, slots=True)
class Said:
    """What the network says to a scan."""

    probs: tuple[float, ...]
    """In the order of the classes."""
    reason: str | None = None
    """Why it gives no class all the same."""
    error: Exception | None = None
    """What befalls the first call with it."""


class FixedModel:
    """Stands where the model replicas are; knows no scan but those it was taught."""

    def __init__(self) -> None:
        self.card = dict(CARD)
        self.delay_s = 0.0
        self.num_calls = 0
        self.most_at_once = 0
        self._said: dict[str, Said] = {}
        self._failed: set[str] = set()
        self._at_once = 0
        self._meaning = Meaning(CLASSIFIER_ID, CLASSES, PREPROCESSING)

    def teach(self, scan: Path, said: Said) -> None:
        """Fix what is said to every scan that looks like this one."""
        seen = hash_image(open_scan(scan.read_bytes(), PREPROCESSING, DecodeLimits()).image)
        assert self._said.setdefault(seen, said) == said, "two scans look the same"

    async def predict(
        self, preprocessing: Preprocessing, images: Sequence[NDArray[np.uint8]]
    ) -> Reply:
        assert preprocessing == PREPROCESSING
        self.num_calls += 1
        self._at_once += 1
        self.most_at_once = max(self._at_once, self.most_at_once)
        try:
            await asyncio.sleep(self.delay_s)
        finally:
            self._at_once -= 1
        found = [self._look_up(hash_image(image)) for image in images]
        probs = np.array([said.probs for said in found], np.float32)
        return Reply(self._meaning, Prediction(probs, [said.reason for said in found]))

    async def explain(
        self, preprocessing: Preprocessing, images: Sequence[NDArray[np.uint8]]
    ) -> Reply:
        found = (await self.predict(preprocessing, images)).prediction
        assert found is not None
        maps = np.broadcast_to(draw_spot(), (*found.probs.shape, *draw_spot().shape))
        return Reply(self._meaning, Prediction(found.probs, found.reasons, class_maps=maps))

    async def describe(self) -> dict[str, Any]:
        runtime = {"backend": "openvino", "precision": "fp32", "description": "OpenVINO, fp32"}
        return {"card": self.card, "meaning": self._meaning, "runtime": runtime}

    async def check(self) -> None:
        """Pass the self-test."""

    def _look_up(self, seen: str) -> Said:
        said = self._said[seen]
        if said.error is not None and seen not in self._failed:
            self._failed.add(seen)
            raise said.error
        return said


def hash_image(image: NDArray[np.uint8]) -> str:
    return sha256(image.tobytes()).hexdigest()


def draw_spot() -> NDArray[np.float32]:
    """Draw evidence in one place, right of the middle."""
    side = PREPROCESSING.size_px // STRIDE_PX
    rows, columns = (np.mgrid[:side, :side] + 0.5) / side
    return np.exp(-((np.hypot(rows - 0.42, columns - 0.6) / 0.3) ** 2)).astype(np.float32)


@dataclass
class FixedService:
    """The application, its model, and who asked it for what."""

    model: FixedModel = field(default_factory=FixedModel)
    limits: ServiceLimits = field(default_factory=lambda: ServiceLimits(body_bytes=2**20))
    url: str = ""
    renders: list[str] = field(default_factory=list)
    """The pictures that scans were asked for with, one a request."""
    asked_at: list[float] = field(default_factory=list)
    """When."""
    hold_first_s: float = 0.0
    """Time for which the first of these requests is kept from the application."""

    def __post_init__(self) -> None:
        self.require(None)

    def require(self, token: str | None) -> None:
        """Begin anew with a token, or with none, as a service that was started again."""
        bounds = {"max_calls": 8, "max_images": 1}  # a call is of one scan, and fails alone
        self._app: App = build_test_app(self.model, self.limits, token, **bounds)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["path"] == "/v1/explain":
            self.asked_at.append(time.monotonic())
            (render,) = parse_qs(scope["query_string"].decode())["render"]
            self.renders.append(render)
            if len(self.renders) == 1:
                await asyncio.sleep(self.hold_first_s)
        await self._app(scope, receive, send)


@contextmanager
def serve_fixed(service: FixedService) -> Iterator[FixedService]:
    """Serve on a free port, in a thread, for the time of a `with`."""
    config = uvicorn.Config(service, port=0, log_level="error", lifespan="off")  # type: ignore[arg-type]
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while not server.started:
        assert time.monotonic() < deadline, "the server did not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    service.url = f"http://127.0.0.1:{port}/"
    try:
        yield service
    finally:
        server.should_exit = True
        thread.join(10)
