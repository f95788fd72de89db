"""The service's application in a thread, with a stub predictor that returns preset results.

Only the network is replaced: the stub looks up each result by the hash of the input image.
"""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import numpy as np
import uvicorn
from numpy.typing import NDArray
from starlette.types import ASGIApp, Receive, Scope, Send

from brainray.images.preprocess import Preprocessing
from brainray.images.slices import OpenedSlice
from brainray.inference.engine import Prediction
from brainray.model.explain import STRIDE_PX
from brainray.serving.options import ServiceLimits
from tests.conftest import CLASSES
from tests.open_scans import open_slices
from tests.service import build_test_app

PREPROCESSING = Preprocessing(size_px=64)
CLASSIFIER_ID = "3f9a61c07b2e"
METADATA: dict[str, Any] = {
    "classifier_id": CLASSIFIER_ID,
    "classes": list(CLASSES),
    "preprocessing": {"size_px": PREPROCESSING.size_px},
    "metrics": {
        "val": {"n": 640, "accuracy": 0.981, "accuracy_ci95": [0.969, 0.991]},
        "test": {
            "n": 1311,
            "accuracy": 0.9634,
            "accuracy_ci95": [0.9521, 0.974],
            "without_near_duplicates": {"n": 702, "accuracy": 0.9402},
        },
    },
    "model_card": {
        "notice": "Research use only; not a medical device.",
        "data": {"name": "<b>ours</b>", "num_scans": 6361, "hardware": None, "rejected": {}},
        "results": {
            "test": {"accuracy": 0.9634123, "accuracy_ci95": [0.9521, 0.974], "given": True},
            "confusion": [[140, 2], [1, 144]],
        },
        "limits": ["Only slices were evaluated.", "One hospital."],
        "guidelines": [{"name": "CLAIM", "items": [{"item": "1", "answer": "title"}]}],
    },
}


@dataclass(frozen=True, slots=True)
class FixedResult:
    """The preset prediction for a slice."""

    probs: tuple[float, ...]
    """In the order of the classes."""
    reason: str | None = None
    """Reason of an abstention or a rejection."""
    error: Exception | None = None
    """Raised by the first call with this slice."""


class FixedPredictor:
    """A stub predictor: has results only for the scans that a test has set."""

    def __init__(self) -> None:
        self.metadata = dict(METADATA)
        self.runtime = {
            "backend": "openvino",
            "precision": "fp32",
            "description": "OpenVINO, fp32",
        }
        self.preprocessing = PREPROCESSING
        self.delay_s = 0.0
        self.num_calls = 0
        self._results: dict[str, FixedResult] = {}
        self._failed: set[str] = set()

    def set_results(self, scan: Path, *results: FixedResult) -> None:
        """Set the results for the slices of a file."""
        slices = [
            one
            for one in open_slices(scan.read_bytes(), PREPROCESSING)
            if isinstance(one, OpenedSlice)
        ]
        for one, result in zip(slices, results, strict=True):
            digest = hash_image(one.scan.image)
            assert self._results.setdefault(digest, result) == result, "equal pixels, other result"

    def predict(self, images: NDArray[np.uint8]) -> Prediction:
        self.num_calls += 1
        time.sleep(self.delay_s)
        found = [self._look_up(hash_image(image)) for image in images]
        probs = np.array([result.probs for result in found], np.float32)
        return Prediction(probs, [result.reason for result in found])

    def explain(self, images: NDArray[np.uint8]) -> Prediction:
        found = self.predict(images)
        maps = np.broadcast_to(draw_spot(), (*found.probs.shape, *draw_spot().shape))
        return Prediction(found.probs, found.reasons, class_maps=maps)

    def check(self) -> None:
        """Pass the self-test."""

    def _look_up(self, digest: str) -> FixedResult:
        result = self._results[digest]
        if result.error is not None and digest not in self._failed:
            self._failed.add(digest)
            raise result.error
        return result


def hash_image(image: NDArray[np.uint8]) -> str:
    return sha256(image.tobytes()).hexdigest()


def draw_spot() -> NDArray[np.float32]:
    """Draw a class map with one spot, right of the middle."""
    side = PREPROCESSING.size_px // STRIDE_PX
    rows, columns = (np.mgrid[:side, :side] + 0.5) / side
    return np.exp(-((np.hypot(rows - 0.42, columns - 0.6) / 0.3) ** 2)).astype(np.float32)


@dataclass
class FixedService:
    """The application, its predictor, and a record of the requests to `/v1/explain`."""

    model: FixedPredictor = field(default_factory=FixedPredictor)
    limits: ServiceLimits = field(default_factory=lambda: ServiceLimits(body_bytes=2**20))
    url: str = ""
    renders: list[str] = field(default_factory=list)
    """The parameter `render` of each request."""
    requested_at: list[float] = field(default_factory=list)
    delay_first_s: float = 0.0
    max_concurrent: int = 0
    _num_concurrent: int = 0

    def __post_init__(self) -> None:
        self.require(None)

    def require(self, token: str | None) -> None:
        """Rebuild the application; it requires this token, or none."""
        # Batches of one: the failure of a scan does not affect other scans.
        self._app: ASGIApp = build_test_app(self.model, self.limits, token, max_batch_size=1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; record it if it is for `/v1/explain`."""
        if scope.get("path") != "/v1/explain":
            await self._app(scope, receive, send)
            return
        self._num_concurrent += 1
        self.max_concurrent = max(self.max_concurrent, self._num_concurrent)
        try:
            self.requested_at.append(time.monotonic())
            (render,) = parse_qs(scope["query_string"].decode())["render"]
            self.renders.append(render)
            if len(self.renders) == 1:
                await asyncio.sleep(self.delay_first_s)
            await self._app(scope, receive, send)
        finally:
            self._num_concurrent -= 1


@contextmanager
def serve_fixed(service: FixedService, app: ASGIApp | None = None) -> Iterator[FixedService]:
    """Serve on a free port in a thread; ``app`` may wrap the service."""
    config = uvicorn.Config(app or service, port=0, log_level="error", lifespan="off")
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
