"""A service that loses a replica, its classifier, its clients, or its own right to live."""

import os
import shutil
import signal
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from brainray.serving.schemas import ProblemBody
from tests.service import Service, find_port, is_ready, spawn, start_service
from tests.test_serving_handler import seal

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
    """Clients that ask one request after another until they are told to stop."""

    def __init__(self, service: Service, scan: bytes, clients: int = 8) -> None:
        self.statuses: Counter[int] = Counter()
        self.broken: list[str] = []
        self.classifiers: list[str] = []
        self.problems: list[dict[str, object]] = []
        self._service, self._scan = service, scan
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]

    def _ask(self) -> None:
        with httpx.Client(base_url=self._service.url, timeout=90) as client:
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
                    self.problems.append(answer.json())

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()


def find_replica(service: Service, deployment: str) -> psutil.Process:
    """Return the process of a deployment's replica."""
    found = [
        process
        for process in psutil.Process(service.process.pid).children(recursive=True)
        if f"ray::ServeReplica:brainray:{deployment}" in " ".join(process.cmdline())
    ]
    assert len(found) == 1, found
    return found[0]


def wait(until: Callable[[], bool], seconds: float = 90.0) -> float:
    """Wait until something is so, and return how long that took."""
    started = time.monotonic()
    while not until():
        assert time.monotonic() - started < seconds, "it did not come to be"
        time.sleep(0.05)
    return time.monotonic() - started


@pytest.mark.slow
def test_a_killed_model_replica_costs_only_what_it_was_at_work_on(
    tiny_classifier: Path, tmp_path: Path, scan: bytes
) -> None:
    with running(tiny_classifier, tmp_path) as service, Load(service, scan) as load:
        wait(lambda: load.statuses[200] > 50)
        find_replica(service, "Model").kill()
        before = load.statuses[200]
        time.sleep(3)
        wait(lambda: load.statuses[200] > before + 200)
    assert not load.broken, load.broken[:3]
    assert set(load.statuses) <= {200, 503}, load.statuses
    assert load.statuses[503] <= 16, "more failed than two calls of eight scans"
    for problem in load.problems:
        assert ProblemBody.model_validate(problem).code == "model_unavailable"


@pytest.mark.slow
def test_a_killed_ingress_listens_again_on_its_port(
    tiny_classifier: Path, tmp_path: Path, scan: bytes
) -> None:
    with running(tiny_classifier, tmp_path) as service:
        for _ in range(5):  # connections that the service closes, which the kernel remembers
            httpx.get(f"{service.url}/healthz", headers={"connection": "close"})
        find_replica(service, "Ingress").kill()
        wait(lambda: not is_ready(service.url), 30)
        wait(lambda: is_ready(service.url), 180)
        answer = httpx.post(f"{service.url}/v1/classify", content=scan, headers=JPEG)
        assert answer.status_code == 200


@pytest.mark.slow
def test_a_classifier_is_replaced_and_no_request_is_lost(tmp_path: Path, scan: bytes) -> None:
    """The new one even wants another size of image."""
    folder, coming = seal(tmp_path / "classifier", seed=1), tmp_path / "coming"
    seal(coming, seed=2, size_px=48)
    with running(folder, tmp_path, "--follow") as service, Load(service, scan) as load:
        wait(lambda: load.statuses[200] > 50)
        first = load.classifiers[0]
        assert set(load.classifiers) == {first}
        for name in ("model.safetensors", "classifier.json"):  # in between they do not fit
            shutil.copy(coming / name, folder / name)
            time.sleep(0.5)
        wait(lambda: load.classifiers[-1] != first)
        replaced = len(load.classifiers)
        wait(lambda: len(load.classifiers) > replaced + 50)
    assert not load.broken, load.broken[:3]
    assert set(load.statuses) == {200}, load.problems[:3]
    assert len(set(load.classifiers)) == 2
    assert first not in load.classifiers[replaced + 16 :], "it came back"


@pytest.mark.slow
def test_sigterm_lets_what_is_in_flight_finish(tmp_path: Path, scan: bytes) -> None:
    classifier = seal(tmp_path / "classifier", seed=1, size_px=96)  # seconds of work for 256 scans
    service = start_service(classifier, tmp_path, "--limits.queued", 1000)
    files = [("files", (f"{n}.jpg", scan)) for n in range(32)]
    request = httpx.Request("POST", service.url, files=files)
    head = "POST /v1/classify HTTP/1.1\r\nHost: a\r\nConnection: close\r\n" + "".join(
        f"{name}: {request.headers[name]}\r\n" for name in ("content-type", "content-length")
    )
    with httpx.Client(base_url=service.url) as client:
        client.get("/healthz")  # connects
        asking = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(8)]
        for connection in asking:
            connection.sendall(head.encode() + b"\r\n" + request.read())
        wait(lambda: count_in_flight(client) == 1 + len(asking), 10)
    status, said = service.stop(signal.SIGTERM)
    assert status == 0, said
    assert said.rstrip().endswith("Stopped.")
    assert "Traceback" not in said
    for connection in asking:
        answer = b"".join(iter(lambda c=connection: c.recv(65536), b""))  # type: ignore[misc]
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert answer.count(b'"status":"classified"') == 32


def count_in_flight(client: httpx.Client) -> float:
    """Return how many requests the service has, with this one."""
    counts = client.get("/metrics").text.splitlines()
    (line,) = [line for line in counts if line.startswith("brainray_in_flight_requests{")]
    return float(line.split()[-1])


@pytest.mark.slow
def test_ctrl_c_ends_it_without_a_traceback(tiny_classifier: Path, tmp_path: Path) -> None:
    service = start_service(tiny_classifier, tmp_path)
    os.killpg(service.process.pid, signal.SIGINT)  # as a terminal sends it: to all of its group
    status, said = service.stop(signal.SIGCONT)
    assert status == 0, said
    assert "Traceback" not in said
    assert said.rstrip().endswith("Stopped.")


@pytest.mark.slow
def test_slow_and_silent_clients_hold_nobody_up(
    tiny_classifier: Path, tmp_path: Path, scan: bytes
) -> None:
    limits = ("--limits.body-s", 3, "--connections.header-s", 3)
    with running(tiny_classifier, tmp_path, *limits) as service:
        place = ("127.0.0.1", service.port)
        silent = [socket.create_connection(place, timeout=30) for _ in range(200)]
        head = b"POST /v1/classify HTTP/1.1\r\nHost: a\r\nContent-Type: image/jpeg\r\n"
        slow = [socket.create_connection(place, timeout=30) for _ in range(20)]
        for connection in slow:
            connection.sendall(head + b"Content-Length: 1000\r\n\r\n")
        times = []
        for _ in range(20):
            for connection in slow[:10]:
                with_one_more_byte(connection)
            started = time.monotonic()
            answer = httpx.post(f"{service.url}/v1/classify", content=scan, headers=JPEG)
            assert answer.status_code == 200
            times.append(time.monotonic() - started)
            time.sleep(0.2)
        assert sorted(times)[len(times) // 2] < 1
        for connection in slow:
            said = connection.recv(65536)
            assert said.startswith(b"HTTP/1.1 408 ")
        for connection in silent:
            assert connection.recv(1) == b"", "the service still keeps it"
        statuses = Counter(line["status"] for line in service.read_log())
        assert statuses[408] == 20


def with_one_more_byte(connection: socket.socket) -> None:
    try:
        connection.sendall(b"x")
    except OSError:  # it was given up
        return


@pytest.mark.slow
def test_too_much_is_refused_and_then_all_is_well(
    tiny_classifier: Path, tmp_path: Path, scan: bytes
) -> None:
    limits = ("--limits.queued", 8, "--limits.in-flight", 24)
    with running(tiny_classifier, tmp_path, *limits) as service:
        ingress = find_replica(service, "Ingress")
        with Load(service, scan, clients=4) as alone:
            wait(lambda: alone.statuses[200] > 100)
            memory = ingress.memory_info().rss
            with Load(service, scan, clients=64) as load:
                wait(lambda: load.statuses[429] > 200 and load.statuses[200] > 100)
            assert ingress.memory_info().rss < memory + 100 * 2**20
        assert set(load.statuses) == {200, 429}, load.problems[:3]
        assert not load.broken
        with Load(service, scan, clients=4) as after:
            wait(lambda: after.statuses[200] > 100)
        assert set(after.statuses) == {200}
        assert len(set(after.classifiers)) == 1


@pytest.mark.slow
def test_tls_and_a_token(tiny_classifier: Path, tmp_path: Path, scan: bytes) -> None:
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
    trust = ssl.create_default_context(cafile=str(certificate))
    try:
        with httpx.Client(base_url=f"https://localhost:{port}", verify=trust) as client:

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
        status, said = service.stop()
    assert status == 0, said
    assert f"serving     https://0.0.0.0:{port}/" in said
    assert "token       needed" in said


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """Make a certificate for localhost that vouches for itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    files = folder / "tls.crt", folder / "tls.key"
    files[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return files
