"""A service under load: killed replica and proxy, new classifier, overload, SIGTERM."""

import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest

from brainray.serving.schemas import ProblemBody
from tests.certificate import make_certificate
from tests.conftest import REPOSITORY
from tests.service import Service, find_port, is_ready, spawn, start_service
from tests.test_serving_pipeline import save_random_classifier

JPEG = {"content-type": "image/jpeg"}


@pytest.fixture(scope="module")
def scan(phantom_folder: Path) -> bytes:
    return next((phantom_folder / "Testing" / "glioma").iterdir()).read_bytes()


@contextmanager
def running(classifier: Path, folder: Path, *words: object) -> Iterator[Service]:
    service = start_service(classifier, folder, *words)
    try:
        yield service
    finally:
        service.stop()


class Load:
    """Clients that send one request after another until they are stopped."""

    def __init__(self, url: str, scan: bytes, clients: int = 8) -> None:
        self.statuses: Counter[int] = Counter()
        self.broken: list[str] = []
        self.classifiers: list[str] = []
        self.refusals: list[httpx.Response] = []
        self._url, self._scan = url, scan
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._send_requests) for _ in range(clients)]

    def _send_requests(self) -> None:
        with httpx.Client(base_url=self._url, timeout=90) as client:
            while not self._stopped.is_set():
                try:
                    answer = client.post("/v1/classify", content=self._scan, headers=JPEG)
                except httpx.HTTPError as error:
                    self.broken.append(repr(error))
                    continue
                self.statuses[answer.status_code] += 1
                if answer.status_code == 200:
                    self.classifiers.append(answer.json()["classifier_id"])
                else:
                    self.refusals.append(answer)

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()


def find_process(service: Service, name: str) -> psutil.Process:
    """Return the only process of a service whose title starts with ``name``."""
    found = [
        process
        for process in psutil.Process(service.process.pid).children(recursive=True)
        if process.cmdline()[0].startswith(name)
    ]
    assert len(found) == 1, found
    return found[0]


def wait(until: Callable[[], bool], seconds: float = 90.0) -> float:
    """Wait until a condition holds; return how long that took."""
    started = time.monotonic()
    while not until():
        assert time.monotonic() - started < seconds, "the condition did not hold in time"
        time.sleep(0.05)
    return time.monotonic() - started


@pytest.mark.slow
def test_a_killed_replica_fails_only_its_own_requests(
    tiny_classifier: Path, tmp_path: Path, scan: bytes
) -> None:
    """Serve's proxy answers these with status 500; later requests wait for the next replica."""
    with running(tiny_classifier, tmp_path) as service, Load(service.url, scan) as load:
        wait(lambda: load.statuses[200] > 50)
        find_process(service, "ray::ServeReplica:brainray:Model").kill()
        before = load.statuses[200]
        time.sleep(3)
        wait(lambda: load.statuses[200] > before + 200)
    assert not load.broken, load.broken[:3]
    assert set(load.statuses) <= {200, 500}, load.statuses
    assert load.statuses[500] <= 8, "more failed than there were clients"


@pytest.mark.slow
def test_a_killed_proxy_listens_again_on_its_port(
    tiny_classifier: Path, tmp_path: Path, scan: bytes
) -> None:
    with running(tiny_classifier, tmp_path) as service:
        find_process(service, "ray::ProxyActor").kill()
        wait(lambda: not is_ready(service.url), 30)
        wait(lambda: is_ready(service.url), 180)
        answer = httpx.post(f"{service.url}/v1/classify", content=scan, headers=JPEG)
        assert answer.status_code == 200


DEPLOY = """
import sys
import ray
from ray import serve
from brainray.serving.app import build
port, *classifiers = sys.argv[1:]
ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
serve.start(http_options={"port": int(port)})
for classifier in classifiers:
    model = {"classifier_uri": classifier, "engine": {"backend": "torch", "precision": "fp32"}}
    serve.run(build({"model": model}), name="brainray", route_prefix="/")
    print("deployed", flush=True)
    sys.stdin.readline()
"""
"""The same as `serve deploy` with a config file, repeated for each further classifier."""


@pytest.mark.slow
def test_a_new_classifier_is_deployed_without_losing_a_request(tmp_path: Path, scan: bytes) -> None:
    """The new classifier has another input size."""
    first = save_random_classifier(tmp_path / "first", seed=1)
    second = save_random_classifier(tmp_path / "second", seed=2, size_px=48)
    port = find_port()
    process = subprocess.Popen(
        [sys.executable, "-c", DEPLOY, str(port), str(first), str(second)],
        cwd=REPOSITORY,
        env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "deployed\n"
        with Load(f"http://127.0.0.1:{port}", scan) as load:
            wait(lambda: load.statuses[200] > 50)
            process.stdin.write("\n")
            process.stdin.flush()
            wait(lambda: load.classifiers[-1] != load.classifiers[0])
            assert process.stdout.readline() == "deployed\n"
            time.sleep(3)  # the old replica stops meanwhile
            replaced = len(load.classifiers)
            wait(lambda: len(load.classifiers) > replaced + 50)
    finally:
        process.communicate("\n", timeout=60)
    assert not load.broken, load.broken[:3]
    assert set(load.statuses) == {200}, [answer.text for answer in load.refusals[:3]]
    assert len(set(load.classifiers)) == 2
    assert load.classifiers[0] not in load.classifiers[replaced:], (
        "the old classifier still answers"
    )


@pytest.mark.slow
def test_sigterm_lets_requests_in_flight_finish(tmp_path: Path, scan: bytes) -> None:
    classifier = save_random_classifier(
        tmp_path / "classifier", seed=1, size_px=96
    )  # seconds of work for 256 scans
    service = start_service(classifier, tmp_path, "--limits.queued", 1000)
    files = [("files", (f"{n}.jpg", scan)) for n in range(32)]
    request = httpx.Request("POST", service.url, files=files)
    head = "POST /v1/classify HTTP/1.1\r\nHost: a\r\nConnection: close\r\n" + "".join(
        f"{name}: {request.headers[name]}\r\n" for name in ("content-type", "content-length")
    )
    with httpx.Client(base_url=service.url) as client:
        client.get("/healthz")  # connects
        connections = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(8)]
        for connection in connections:
            connection.sendall(head.encode() + b"\r\n" + request.read())
        wait(lambda: count_in_flight(client) == 1 + len(connections), 10)
    status, output = service.stop(signal.SIGTERM)
    assert status == 0, output
    assert output.rstrip().endswith("Stopped.")
    assert "Traceback" not in output
    for connection in connections:
        answer = b"".join(iter(lambda c=connection: c.recv(65536), b""))  # type: ignore[misc]
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert answer.count(b'"status":"classified"') == 32


def count_in_flight(client: httpx.Client) -> float:
    """Return the number of requests in flight, including this one."""
    counts = client.get("/metrics").text.splitlines()
    (line,) = [line for line in counts if line.startswith("brainray_in_flight_requests{")]
    return float(line.split()[-1])


@pytest.mark.slow
def test_ctrl_c_ends_the_service_without_a_traceback(tiny_classifier: Path, tmp_path: Path) -> None:
    service = start_service(tiny_classifier, tmp_path)
    os.killpg(service.process.pid, signal.SIGINT)  # to the whole process group, as a terminal does
    status, output = service.stop(signal.SIGCONT)
    assert status == 0, output
    assert "Traceback" not in output
    assert output.rstrip().endswith("Stopped.")


@pytest.mark.slow
def test_overload_is_refused_and_the_service_recovers(
    tiny_classifier: Path, tmp_path: Path, scan: bytes
) -> None:
    limits = ("--limits.queued", 8, "--limits.in-flight", 24)
    with running(tiny_classifier, tmp_path, *limits) as service:
        replica = find_process(service, "ray::ServeReplica:brainray:Model")
        with Load(service.url, scan, clients=4) as alone:
            wait(lambda: alone.statuses[200] > 100)
            memory = replica.memory_info().rss
            with Load(service.url, scan, clients=64) as load:
                wait(lambda: load.statuses[429] > 200 and load.statuses[200] > 100)
            assert replica.memory_info().rss < memory + 100 * 2**20
        assert set(load.statuses) == {200, 429}
        assert not load.broken
        for answer in load.refusals[:20]:
            assert answer.headers["retry-after"] == "1"
            assert ProblemBody.model_validate(answer.json()).code == "too_busy"
        with Load(service.url, scan, clients=4) as after:
            wait(lambda: after.statuses[200] > 100)
        assert set(after.statuses) == {200}
        assert len(set(after.classifiers)) == 1


@pytest.mark.slow
def test_a_service_with_tls_and_a_token_requires_both(
    tiny_classifier: Path, tmp_path: Path, scan: bytes
) -> None:
    certificate, key = make_certificate(tmp_path)
    token = tmp_path / "token"
    token.write_text("0123456789abcdef")
    token.chmod(0o600)
    port = find_port()
    process = spawn(
        *("--classifier-uri", tiny_classifier, "--port", port, "--log-path", tmp_path / "log"),
        *("--host", "0.0.0.0", "--api-token-file", token),
        *("--tls-cert", certificate, "--tls-key", key),
    )
    service = Service(process, port, tmp_path / "log")
    context = ssl.create_default_context(cafile=str(certificate))
    try:
        with httpx.Client(base_url=f"https://localhost:{port}", verify=context) as client:

            def is_up() -> bool:
                with suppress(httpx.HTTPError):
                    return client.get("/readyz").status_code == 200
                return False

            wait(is_up)
            answer = client.post("/v1/classify", content=scan, headers=JPEG)
            assert answer.status_code == 401
            headers = {**JPEG, "authorization": "Bearer 0123456789abcdef"}
            answer = client.post("/v1/classify", content=scan, headers=headers)
            assert answer.status_code == 200
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://localhost:{port}/healthz")
    finally:
        status, output = service.stop()
    assert status == 0, output
    assert f"serving     https://0.0.0.0:{port}/" in output
    assert "token       required" in output


@pytest.mark.slow
def test_production_serves_with_haproxy_and_drains(
    tiny_classifier: Path, tmp_path: Path, scan: bytes
) -> None:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef")
    token.chmod(0o600)
    words = ("--production", "--api-token-file", token)
    service = start_service(tiny_classifier, tmp_path, *words)
    try:
        processes = psutil.Process(service.process.pid).children(recursive=True)
        proxies = [process for process in processes if process.name() == "haproxy"]
        assert proxies
        url = f"{service.url}/v1/classify"
        assert httpx.post(url, content=scan, headers=JPEG).status_code == 401
        headers = {**JPEG, "authorization": "Bearer 0123456789abcdef"}
        assert httpx.post(url, content=scan, headers=headers).status_code == 200
    finally:
        status, output = service.stop()
    assert status == 0, output
    assert output.rstrip().endswith("Stopped.")
    assert not [proxy for proxy in proxies if proxy.is_running()]
