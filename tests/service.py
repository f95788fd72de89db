"""A service for tests: in this process without Ray, or started with `jobs/serve.py`."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from fastapi import FastAPI
from numpy.typing import NDArray
from starlette.types import ASGIApp

from brainray.inference.engine import EngineOptions, Prediction
from brainray.serving.metrics import Metrics
from brainray.serving.middleware import AccessLog
from brainray.serving.options import ServiceLimits
from brainray.serving.pipeline import Pipeline
from brainray.serving.predictor import ModelOptions, Predictor
from brainray.serving.routes import build_app
from tests.conftest import REPOSITORY

START_S = 120.0


class LocalPredictor:
    """Records the calls of a predictor, and can delay them or make them fail."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self.metadata, self.runtime = dict(predictor.metadata), predictor.runtime
        self.preprocessing = predictor.preprocessing
        self.calls: list[int] = []
        self.delay_s = 0.0
        self.error: Exception | None = None

    def predict(self, images: NDArray[np.uint8]) -> Prediction:
        self._begin(len(images))
        return self._predictor.predict(images)

    def explain(self, images: NDArray[np.uint8]) -> Prediction:
        self._begin(len(images))
        return self._predictor.explain(images)

    def check(self) -> None:
        if self.error is not None:
            raise self.error
        self._predictor.check()

    def _begin(self, count: int) -> None:
        self.calls.append(count)
        time.sleep(self.delay_s)
        if self.error is not None:
            raise self.error


EXACT = EngineOptions(backend="torch", precision="fp32")


def open_predictor(classifier: Path, engine: EngineOptions = EXACT) -> Predictor:
    return Predictor(ModelOptions(classifier_uri=str(classifier), engine=engine))


def build_test_app(
    predictor: Predictor,
    limits: ServiceLimits | None = None,
    token: str | None = None,
    log_path: Path | None = None,
    max_batch_size: int = 8,
) -> FastAPI:
    return build_app(
        Pipeline(predictor, limits or ServiceLimits(), max_batch_size=max_batch_size),
        token=token,
        metrics=Metrics("here"),
        access_log=AccessLog(str(log_path or os.devnull)),
    )


def open_client(app: ASGIApp, **headers: str) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app)
    return httpx.AsyncClient(transport=transport, base_url="http://here", headers=headers)


def find_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Service:
    """A running service."""

    process: subprocess.Popen[str]
    port: int
    log_path: Path
    scheme: str = "http"

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    def read_log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log_path.read_text().splitlines()]

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        if self.process.poll() is None:
            self.process.send_signal(number)
        output, _ = self.process.communicate(timeout=START_S)
        return self.process.returncode, output


def spawn(*words: object, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Start `jobs/serve.py`."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS",)}
    return subprocess.Popen(
        [sys.executable, "jobs/serve.py", *map(str, words)],
        cwd=REPOSITORY,
        env=inherited | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def start_service(classifier: Path, folder: Path, *words: object) -> Service:
    """Start a service; return when it is ready."""
    port, log_path = find_port(), folder / "log.jsonl"
    process = spawn(
        *("--classifier-uri", classifier, "--port", port, "--log-path", log_path),
        *("--backend", "torch", "--precision", "fp32", *words),
    )
    service = Service(process, port, log_path)
    deadline = time.monotonic() + START_S
    while not is_ready(service.url):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the service did not become ready"
        time.sleep(0.2)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("Research use only"):  # the last line of the start
            break
    return service


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=10) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False
