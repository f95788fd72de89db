"""A real service, started by its command, over HTTP."""

import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import tritonclient.http as triton

from brainray.serving.schemas import AnswersBody, ProblemBody
from tests.conftest import CLASSES
from tests.service import Service, start_service

JPEG = {"content-type": "image/jpeg"}


@pytest.fixture(scope="module")
def service(tiny_classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Start a service with low limits, and check that it drains at the end."""
    service = start_service(
        tiny_classifier, tmp_path_factory.mktemp("service"), "--limits.body-bytes", 400_000
    )
    yield service
    status, output = service.stop()
    assert status == 0, output
    assert "Traceback" not in output, output
    assert output.rstrip().endswith("Stopped.")


@pytest.fixture(scope="module")
def scans(phantom_folder: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted((phantom_folder / "Testing").rglob("*.jpg"))]


def test_a_scan_is_classified(service: Service, scans: list[bytes]) -> None:
    answer = httpx.post(f"{service.url}/v1/classify", content=scans[0], headers=JPEG)
    assert answer.status_code == 200
    body = AnswersBody.model_validate(answer.json())
    assert body.answers[0].predicted_class in CLASSES
    assert answer.headers.get_list("x-request-id") == [body.request_id]
    health = httpx.get(f"{service.url}/healthz", headers={"x-request-id": "mine-1"})
    assert health.headers.get_list("x-request-id") == ["mine-1"]


def test_many_clients_get_their_own_answers(service: Service, scans: list[bytes]) -> None:
    """A scan has the same probabilities in a batch as alone."""
    with httpx.Client(base_url=service.url, timeout=60) as client:

        def classify(scan: bytes) -> list[float]:
            answer = client.post("/v1/classify", content=scan, headers=JPEG).json()["answers"][0]
            return list(answer["probs"].values())

        alone = [classify(scan) for scan in scans[:12]]
        with ThreadPoolExecutor(12) as pool:
            together = list(pool.map(classify, scans[:12] * 4))
    np.testing.assert_allclose(together, alone * 4, atol=1e-5)


def test_limits_hold_over_http(service: Service, scans: list[bytes]) -> None:
    for content in (b"x" * 400_001, iter([b"x" * 10_000] * 100)):
        answer = httpx.post(f"{service.url}/v1/classify", content=content, headers=JPEG)
        assert answer.status_code == 413
        assert ProblemBody.model_validate(answer.json()).code == "body_too_large"
    answer = httpx.post(f"{service.url}/v1/classify", content=iter([scans[0]]), headers=JPEG)
    assert answer.status_code == 200, "a body of unknown length is accepted"


def test_a_web_socket_is_refused(service: Service) -> None:
    headers = {
        "connection": "upgrade",
        "upgrade": "websocket",
        "sec-websocket-version": "13",
        "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    answer = httpx.get(f"{service.url}/v1/classify", headers=headers)
    assert answer.status_code in (403, 404, 405), answer.text
    assert httpx.get(f"{service.url}/healthz").status_code == 200


def test_tritonclient_reads_the_answers(service: Service, scans: list[bytes]) -> None:
    client = triton.InferenceServerClient(f"127.0.0.1:{service.port}")
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("brainray")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    metadata = client.get_model_metadata("brainray")
    assert [tensor["name"] for tensor in metadata["outputs"]] == [
        *("probs", "predicted_class", "status", "reason"),
    ]
    images = np.array([scans[0], b"no image", scans[1]], dtype=object)
    tensor = triton.InferInput("image", [3], "BYTES")
    tensor.set_data_from_numpy(images, binary_data=True)
    wanted = [
        triton.InferRequestedOutput("probs", binary_data=True),
        triton.InferRequestedOutput("status", binary_data=True),
        triton.InferRequestedOutput("reason", binary_data=False),
    ]
    for outputs in (wanted, None):
        answer = client.infer("brainray", [tensor], outputs=outputs, request_id="r1")
        probs = answer.as_numpy("probs")
        assert probs.shape == (3, 4)
        assert probs.dtype == np.float32
        for row, scan in ((0, scans[0]), (2, scans[1])):
            direct = httpx.post(f"{service.url}/v1/classify", content=scan, headers=JPEG).json()
            expected = list(direct["answers"][0]["probs"].values())
            np.testing.assert_allclose(probs[row], expected, atol=1e-5)
        assert not probs[1].any()
        statuses = [s.decode() for s in answer.as_numpy("status")]
        assert statuses == ["classified", "rejected", "classified"]
        assert answer.get_response()["id"] == "r1"
    bad = triton.InferInput("scan", [3], "BYTES")
    bad.set_data_from_numpy(images, binary_data=True)
    with pytest.raises(triton.InferenceServerException, match=r"inputs\.0\.name"):
        client.infer("brainray", [bad])


def test_metrics_and_log_have_all_their_fields(service: Service) -> None:
    text = httpx.get(f"{service.url}/metrics").text
    for name in (
        *("requests_total", "request_seconds_bucket", "answers_total", "in_flight_requests"),
        *("buffered_bytes", "waiting_scans", "log_lines_dropped"),
    ):
        assert f"\nbrainray_{name}{{" in text, name
    lines = service.read_log()
    assert {"time", "request_id", "method", "path", "status", "duration_ms"} <= set(lines[0])
    assert {200, 413} <= {line["status"] for line in lines}


def test_serves_proxy_listens_only_on_loopback(service: Service) -> None:
    listening = subprocess.run(
        ["ss", "-ltnH", f"sport = :{service.port}"], capture_output=True, text=True, check=False
    ).stdout.splitlines()
    if not listening:
        pytest.skip("ss is not installed, or shows nothing here")
    assert [line.split()[3] for line in listening] == [f"127.0.0.1:{service.port}"]
