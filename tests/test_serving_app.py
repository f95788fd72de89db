"""The whole ASGI application without Ray: requests and responses."""

import asyncio
import base64
import io
import json
import re
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from socket import socket
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from numpy.typing import NDArray
from PIL import Image
from starlette.types import ASGIApp

from brainray import cli
from brainray.inference.engine import Prediction
from brainray.model.reasons import REASONS
from brainray.serving.local import check_job, divide_cpus
from brainray.serving.options import ServeJob, ServiceConfig, ServiceLimits
from brainray.serving.predictor import ModelOptions, Predictor
from brainray.serving.problem import PROBLEMS, Problem
from brainray.serving.schemas import AnswersBody, ExplainedAnswersBody, ModelBody, ProblemBody
from tests.conftest import CLASSES
from tests.service import LocalPredictor, build_test_app, find_port, open_client, open_predictor

TOKEN = "0123456789abcdef"
JPEG = {"content-type": "image/jpeg"}
INFER = "/v2/models/brainray/infer"
RUNNER = asyncio.Runner()
"""One event loop for all requests of this process, as in a service."""


@pytest.fixture(scope="module")
def predictor(tiny_classifier: Path) -> Predictor:
    return open_predictor(tiny_classifier)


@pytest.fixture
def model(predictor: Predictor) -> LocalPredictor:
    return LocalPredictor(predictor)


@pytest.fixture(scope="module")
def scan(phantom_folder: Path) -> bytes:
    return next((phantom_folder / "Testing" / "glioma").iterdir()).read_bytes()


def send(
    app: ASGIApp,
    method: str,
    path: str,
    **request: Any,  # noqa: ANN401
) -> httpx.Response:
    """Send one request."""

    async def run() -> httpx.Response:
        async with open_client(app) as client:
            return await client.request(method, path, **request)

    return RUNNER.run(run())


def check_problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert (answer.status_code, answer.headers["content-type"]) == (
        status,
        "application/problem+json",
    ), answer.text
    body: dict[str, Any] = answer.json()
    ProblemBody.model_validate(body)
    assert (body["status"], body["code"]) == (status, code)
    assert body["request_id"] == answer.headers["x-request-id"]
    assert "Traceback" not in answer.text
    return body


# --- answers -------------------------------------------------------------------------------------


def test_one_scan_as_the_body(model: LocalPredictor, scan: bytes) -> None:
    for kind in ("image/jpeg", "application/octet-stream", "image/x-anything; q=1", None):
        headers = {} if kind is None else {"content-type": kind}
        answer = send(build_test_app(model), "POST", "/v1/classify", content=scan, headers=headers)
        assert answer.status_code == 200, answer.text
        body = AnswersBody.model_validate(answer.json())
        assert body.notice == "Research use only; not a medical device."
        assert body.classes == list(CLASSES)
        (one,) = body.answers
        assert (one.name, one.status, one.reason) == (None, "classified", None)
        assert one.probs is not None
        assert sum(one.probs.values()) == pytest.approx(1, abs=1e-5)
        assert one.confidence == max(one.probs.values())


def test_several_files_in_a_form(model: LocalPredictor, scan: bytes) -> None:
    files = [("files", ("a.jpg", scan)), ("files", ("b.jpg", b"no")), ("files", ("c.jpg", scan))]
    answer = send(build_test_app(model), "POST", "/v1/classify", files=files)
    assert answer.status_code == 200
    answers = AnswersBody.model_validate(answer.json()).answers
    assert [(a.name, a.status) for a in answers] == [
        ("a.jpg", "classified"),
        ("b.jpg", "rejected"),
        ("c.jpg", "classified"),
    ]
    assert answers[1].reason == "not_an_image"


def test_an_unreadable_file_as_the_body_is_a_422(model: LocalPredictor, scan: bytes) -> None:
    app = build_test_app(model)
    for content, reason in ((b"text", "not_an_image"), (scan[:900], "truncated"), (b"", "empty")):
        answer = send(app, "POST", "/v1/classify", content=content, headers=JPEG)
        body = check_problem(answer, 422, "image_rejected")
        assert body["reason"] == reason
    form = [("files", ("b.jpg", b"no"))]
    assert send(app, "POST", "/v1/classify", files=form).status_code == 200


def test_json_and_binary_responses_of_the_protocol_agree(
    model: LocalPredictor, scan: bytes
) -> None:
    app = build_test_app(model)
    tensor = {"name": "image", "datatype": "BYTES", "shape": [2]}
    data = [base64.b64encode(content).decode() for content in (scan, b"no")]
    plain = send(app, "POST", INFER, json={"inputs": [{**tensor, "data": data}]})
    assert plain.status_code == 200, plain.text
    outputs = {t["name"]: t["data"] for t in plain.json()["outputs"]}
    wanted = [{"name": "probs", "parameters": {"binary_data": True}}]
    request = {"id": "5", "inputs": [{**tensor, "data": data}], "outputs": wanted}
    packed = send(app, "POST", INFER, json=request)
    length = int(packed.headers["inference-header-content-length"])
    document = json.loads(packed.content[:length])
    assert document["id"] == "5"
    assert document["outputs"][0]["shape"] == [2, 4]
    probs = np.frombuffer(packed.content[length:], "<f4")
    np.testing.assert_allclose(probs, outputs["probs"], atol=1e-6)
    direct = send(app, "POST", "/v1/classify", content=scan, headers=JPEG).json()["answers"][0]
    np.testing.assert_allclose(list(direct["probs"].values()), outputs["probs"][:4], atol=1e-6)


def test_a_length_of_thousands_of_digits_is_refused(model: LocalPredictor, scan: bytes) -> None:
    headers = {**JPEG, "content-length": "9" * 5000}
    answer = send(build_test_app(model), "POST", "/v1/classify", content=scan, headers=headers)
    check_problem(answer, 400, "invalid_request")


def test_errors_of_the_protocol_have_an_error_member(model: LocalPredictor) -> None:
    answer = send(build_test_app(model), "POST", INFER, content=b"{", headers={})
    assert check_problem(answer, 400, "invalid_request")["error"].startswith("The body is not JSON")


def test_the_model_endpoint_describes_the_intended_use_and_the_limits(
    model: LocalPredictor,
) -> None:
    body = send(build_test_app(model, ServiceLimits(files=3)), "GET", "/v1/model").json()
    assert body["limits"]["files"] == 3
    assert body["preprocessing"]["size_px"] == 32
    assert body["rejection_reasons"] == REASONS
    assert "Diagnosis" in body["not_intended_for"]
    metadata = send(build_test_app(model), "GET", "/v2/models/brainray").json()
    assert metadata["versions"] == [body["classifier_id"]]
    assert metadata["inputs"] == [{"name": "image", "datatype": "BYTES", "shape": [-1]}]


def test_the_model_endpoint_returns_the_model_card(model: LocalPredictor) -> None:
    app = build_test_app(model)
    assert send(app, "GET", "/v1/model").json()["model_card"] is None
    card = {"limits": ["It sees one slice."]}
    model.metadata["model_card"] = card
    app = build_test_app(model)
    body = ModelBody.model_validate(send(app, "GET", "/v1/model").json())
    assert body.model_card == card


def test_a_heat_map_has_the_size_of_the_scan(
    model: LocalPredictor, scan: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    explain = model.explain

    def explain_with_evidence(images: NDArray[np.uint8]) -> Prediction:
        found = explain(images)  # random weights may give no positive evidence
        assert found.class_maps is not None
        return replace(found, class_maps=np.abs(found.class_maps) + 1)

    monkeypatch.setattr(model, "explain", explain_with_evidence)
    app = build_test_app(model)
    size = Image.open(io.BytesIO(scan)).size
    files = [("files", ("a.jpg", scan)), ("files", ("b.jpg", b"no"))]
    body = ExplainedAnswersBody.model_validate(send(app, "POST", "/v1/explain", files=files).json())
    shown, rejected = body.answers
    assert shown.explained_class == shown.predicted_class
    assert shown.heat_map_png is not None
    picture = Image.open(io.BytesIO(base64.b64decode(shown.heat_map_png)))
    assert (picture.format, picture.mode, picture.size) == ("PNG", "RGBA", size)
    assert np.asarray(picture)[..., 3].max() == 255, "opaque where the evidence is strongest"
    assert (rejected.status, rejected.heat_map_png, rejected.explained_class) == (
        *("rejected", None, None),
    )
    answer = send(
        app,
        "POST",
        "/v1/explain?render=overlay",
        content=scan,
        headers={**JPEG, "accept": "image/png"},
    )
    assert answer.headers["content-type"] == "image/png"
    overlay = Image.open(io.BytesIO(answer.content))
    assert (overlay.mode, overlay.size) == ("RGB", size)
    colours = np.asarray(overlay).astype(int)
    assert np.ptp(colours, axis=2).max() > 50, "the heat map is in colour"
    answer = send(app, "POST", "/v1/explain", files=files, headers={"accept": "image/png"})
    check_problem(answer, 406, "not_acceptable")


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/v1/classify/", 404, "not_found"),
        ("GET", "/static/../../limits.py", 404, "not_found"),
        ("GET", "/static/%2e%2e/limits.py", 404, "not_found"),
        ("GET", "/v1/classify", 405, "method_not_allowed"),
        ("DELETE", "/healthz", 405, "method_not_allowed"),
        ("POST", "/v2/models/other/infer", 404, "not_found"),
    ],
)
def test_unknown_paths_and_methods_are_problems(
    model: LocalPredictor, method: str, path: str, status: int, code: str
) -> None:
    answer = send(build_test_app(model), method, path)
    check_problem(answer, status, code)
    if status == 405:
        assert answer.headers["allow"] in ("POST", "GET")


def test_types_and_parameters_are_checked(model: LocalPredictor, scan: bytes) -> None:
    app = build_test_app(model)
    answer = send(app, "POST", "/v1/classify", content=scan, headers={"content-type": "text/plain"})
    check_problem(answer, 415, "unsupported_media_type")
    answer = send(app, "POST", "/v1/classify", content=b"{}", headers={"content-type": "x"})
    check_problem(answer, 415, "unsupported_media_type")
    answer = send(app, "POST", "/v1/explain?render=unknown", content=scan, headers=JPEG)
    check_problem(answer, 422, "invalid_parameter")


def test_a_body_with_a_length_over_the_limit_is_refused_unread(model: LocalPredictor) -> None:
    app = build_test_app(model, ServiceLimits(body_bytes=1000))
    reads = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal reads
        reads += 1
        yield b"x" * 5000

    headers = {**JPEG, "content-length": "5000"}
    answer = send(app, "POST", "/v1/classify", content=body(), headers=headers)
    check_problem(answer, 413, "body_too_large")
    assert answer.headers["connection"] == "close"
    assert reads == 0


def test_a_body_of_unknown_length_is_stopped_at_the_limit(model: LocalPredictor) -> None:
    app = build_test_app(model, ServiceLimits(body_bytes=1000))
    sent = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 100
            yield b"x" * 100

    answer = send(app, "POST", "/v1/classify", content=body(), headers=JPEG)
    check_problem(answer, 413, "body_too_large")
    assert sent <= 1200


def test_a_body_that_does_not_arrive_is_refused(model: LocalPredictor, scan: bytes) -> None:
    app = build_test_app(model, ServiceLimits(body_s=0.2))

    async def body() -> AsyncIterator[bytes]:
        yield scan[:10]
        await asyncio.sleep(60)

    started = time.monotonic()
    answer = send(app, "POST", "/v1/classify", content=body(), headers=JPEG)
    check_problem(answer, 408, "body_too_slow")
    assert time.monotonic() - started < 5


def test_bodies_in_memory_and_requests_in_flight_are_bounded(
    model: LocalPredictor, scan: bytes
) -> None:
    limits = ServiceLimits(in_flight=2, buffered_bytes=10**6)
    app = build_test_app(model, limits)
    model.delay_s = 0.5

    async def run() -> tuple[list[httpx.Response], httpx.Response, httpx.Response]:
        async with open_client(app) as client:

            async def post(content: bytes) -> httpx.Response:
                return await client.post("/v1/classify", content=content, headers=JPEG)

            three = [asyncio.create_task(post(scan)) for _ in range(3)]
            await asyncio.sleep(0.2)
            health = await client.get("/healthz")
            answers = [await one for one in three]
            return answers, health, await post(b"x" * 2 * 10**6)

    answers, health, large = asyncio.run(run())
    assert sorted(answer.status_code for answer in answers) == [200, 200, 429]
    busy = next(answer for answer in answers if answer.status_code == 429)
    check_problem(busy, 429, "too_busy")
    assert busy.headers["retry-after"] == "1"
    assert health.status_code == 200, "health is answered under any load"
    check_problem(large, 429, "too_busy")
    after = send(app, "POST", "/v1/classify", content=scan, headers=JPEG)
    assert after.status_code == 200, "refused bodies are released"


def test_an_unavailable_model_is_a_503_and_not_ready(model: LocalPredictor, scan: bytes) -> None:
    model.error = Problem("model_unavailable", "Not available.", {"retry-after": "1"})
    app = build_test_app(model)
    answer = send(app, "POST", "/v1/classify", content=scan, headers=JPEG)
    check_problem(answer, 503, "model_unavailable")
    assert answer.headers["retry-after"] == "1"
    check_problem(send(app, "GET", "/readyz"), 503, "model_unavailable")
    assert send(app, "GET", "/healthz").json() == {"status": "ok"}


def test_an_internal_error_is_a_500_without_details(
    model: LocalPredictor, scan: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    model.error = RuntimeError("secret detail")
    answer = send(build_test_app(model), "POST", "/v1/classify", content=scan, headers=JPEG)
    body = check_problem(answer, 500, "internal")
    assert "secret" not in answer.text
    assert "secret detail" in caplog.text
    assert body["request_id"] in caplog.text


@given(
    path=st.sampled_from(["/v1/classify", INFER, "/v1/explain", "/v1/render", "/v1/series"]),
    kind=st.one_of(
        st.sampled_from(
            [
                *("multipart/form-data; boundary=B", "multipart/", "image/png"),
                *("application/json", "application/dicom"),
            ]
        ),
        st.text(st.characters(max_codepoint=255, exclude_categories=("Cc",)), max_size=30),
    ),
    content=st.one_of(
        st.binary(max_size=300),
        st.binary(max_size=60).map(lambda tail: b"--B\r\nContent-Disposition: form-data;" + tail),
        st.binary(max_size=60).map(lambda tail: b'{"inputs":[{"name":"image"' + tail),
    ),
    length=st.sampled_from([None, "0", "-1", "7", "x", "99999999999999999999", "9" * 5000]),
)
def test_no_request_causes_an_internal_error(
    predictor: Predictor, path: str, kind: str, content: bytes, length: str | None
) -> None:
    headers = {"content-type": kind.encode("latin-1")}
    if length is not None:
        headers["inference-header-content-length"] = length.encode()
    app = build_test_app(LocalPredictor(predictor))
    answer = send(app, "POST", path, content=content, headers=headers)
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        check_problem(answer, answer.status_code, answer.json()["code"])


# --- request IDs, log, metrics -------------------------------------------------------------------


def test_a_valid_request_id_is_kept_and_an_invalid_one_is_replaced(model: LocalPredictor) -> None:
    app = build_test_app(model)
    given = {"x-request-id": "scan-7:a.b_c"}
    assert send(app, "GET", "/healthz", headers=given).headers["x-request-id"] == "scan-7:a.b_c"
    for name in ("", "a b", "x" * 65, "<script>", "a\tb"):
        answer = send(app, "GET", "/healthz", headers={"x-request-id": name})
        assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])


def test_the_log_has_a_line_for_each_request_and_no_content(
    model: LocalPredictor, scan: bytes, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    app = build_test_app(model, log_path=log)
    files = [("files", ("patient-name.jpg", scan))]
    answer = send(app, "POST", "/v1/classify?patient=name", files=files)
    send(app, "GET", "/patient-name")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(line["path"], line["status"]) for line in lines] == [
        ("/v1/classify", 200),
        ("other", 404),
    ]
    assert lines[0]["request_id"] == answer.headers["x-request-id"]
    assert lines[0]["duration_ms"] >= lines[0]["body_ms"] >= 0
    assert "patient" not in log.read_text()


def test_requests_and_answers_are_counted(model: LocalPredictor, scan: bytes) -> None:
    app = build_test_app(model)
    send(app, "POST", "/v1/classify", content=scan, headers=JPEG)
    send(app, "POST", "/v1/classify", content=b"no", headers=JPEG)
    send(app, "GET", "/wp-login.php")
    answer = send(app, "GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    for line in (
        '{method="POST",path="/v1/classify",replica="here",status="200"} 1.0',
        '{method="POST",path="/v1/classify",replica="here",status="422"} 1.0',
        'brainray_requests_total{method="GET",path="other",replica="here",status="404"} 1.0',
        'brainray_request_seconds_count{path="/v1/classify",replica="here"} 2.0',
        'reason="not_an_image",replica="here",status="rejected"} 1.0',
        'brainray_in_flight_requests{replica="here"} 1.0',
        'brainray_waiting_scans{replica="here"} 0.0',
    ):
        assert line in answer.text
    assert 'reason="",replica="here",status="classified"} 1.0' in answer.text


# --- documents -----------------------------------------------------------------------------------


def test_the_docs_load_nothing_from_third_parties(model: LocalPredictor) -> None:
    app = build_test_app(model)
    page = send(app, "GET", "/docs").text
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert loaded
    for path in loaded:
        assert path.startswith("/static/")
        assert send(app, "GET", path).status_code == 200
    assert "http" not in re.sub(r"window\.location\.\w+", "", page)


def test_the_page_loads_only_the_services_files(model: LocalPredictor) -> None:
    app = build_test_app(model, token=TOKEN)
    page = send(app, "GET", "/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "script-src" not in page.headers["content-security-policy"]
    assert "default-src 'self'" in page.headers["content-security-policy"]
    loaded = re.findall(r'(?:src|href)="(static/[^"]+)"', page.text)
    assert {Path(path).suffix for path in loaded} == {".js", ".css", ".svg"}
    for path in loaded:
        answer = send(app, "GET", "/" + path)
        assert answer.status_code == 200
        assert answer.headers["content-type"].split(";")[0] in (
            *("text/javascript", "text/css", "image/svg+xml"),
        )


def test_the_openapi_document_has_every_status(model: LocalPredictor) -> None:
    document = send(
        build_test_app(model, token=TOKEN),
        "GET",
        "/openapi.json",
        headers={"authorization": f"Bearer {TOKEN}"},
    ).json()
    assert document["openapi"].startswith("3.1")
    operations = {
        (path, method): operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    assert len(operations) == 14
    for (path, method), operation in operations.items():
        statuses = set(operation["responses"])
        assert "500" in statuses
        if method == "post":
            others = "400 401 408 413 415 422 429 503 504"
            assert {"200", *others.split()} <= statuses
        assert ("401" in statuses) == (operation.get("security") != []) or path == "/metrics"
    schemas = document["components"]["schemas"]
    assert set(schemas["ProblemBody"]["properties"]["code"]["enum"]) == set(PROBLEMS)
    open_document = send(build_test_app(model), "GET", "/openapi.json").json()
    assert "401" not in json.dumps(open_document)


def test_responses_match_the_openapi_document(model: LocalPredictor, scan: bytes) -> None:
    app = build_test_app(model)
    document = send(app, "GET", "/openapi.json").json()
    files = [("files", ("a.jpg", scan)), ("files", ("b.jpg", b"no"))]
    for path, answer in (
        ("/v1/classify", send(app, "POST", "/v1/classify", files=files)),
        ("/v1/model", send(app, "GET", "/v1/model")),
        ("/v2", send(app, "GET", "/v2")),
        ("/v2/models/brainray", send(app, "GET", "/v2/models/brainray")),
    ):
        operation = next(iter(document["paths"][path].values()))
        schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
        Draft202012Validator({**schema, "components": document["components"]}).validate(
            answer.json()
        )


# --- the command ----------------------------------------------------------------------------------


def test_cpus_are_divided_and_a_replacement_fits() -> None:
    model = ModelOptions(classifier_uri="x")
    for replicas, cpus, threads in ((1, 2, 2), (2, 8, 4), (3, 2, 1)):
        config = divide_cpus(ServiceConfig(model=model, max_replicas=replicas), cpus)
        assert config.model.engine.num_threads == threads
        assert config.replica_cpus is not None
        assert 2 * replicas * config.replica_cpus <= cpus + 0.01


@pytest.mark.parametrize(
    ("host", "needs_token"),
    [
        ("127.0.0.1", False),
        ("::1", False),
        ("localhost", False),
        ("127.8.8.8", False),
        ("0.0.0.0", True),
        ("::", True),
        ("10.0.0.7", True),
        ("gpu-3", True),
    ],
)
def test_an_address_that_other_machines_can_reach_needs_a_token(
    host: str, needs_token: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BRAINRAY_API_TOKEN", raising=False)
    service = ServiceConfig(model=ModelOptions(classifier_uri="x"))
    job = ServeJob(service=service, host=host)
    if needs_token:
        with pytest.raises(ValueError, match="--insecure"):
            check_job(job)
    else:
        check_job(job)
    check_job(ServeJob(service=service, host=host, insecure=True))
    monkeypatch.setenv("BRAINRAY_API_TOKEN", TOKEN)
    check_job(job)


def test_a_user_error_is_one_line_and_exit_2(
    tiny_classifier: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("BRAINRAY_API_TOKEN", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    short, token, taken = tmp_path / "short", tmp_path / "token", socket()
    short.write_text("short")
    token.write_text(TOKEN)
    tls = ("--tls-cert", short, "--tls-key", short)
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    base = ("--classifier-uri", tiny_classifier, "--port", find_port())
    for words, expected in (
        (("--classifier-uri", tmp_path, "--port", find_port()), "No classifier at"),
        ((*base, "--port", taken.getsockname()[1]), "Cannot listen on 127.0.0.1"),
        ((*base, "--port", 99999), "from 1 to 65535"),
        ((*base, "--host", "0.0.0.0"), "there is no token"),
        ((*base, "--host", "no-such-host.invalid", "--insecure"), "Cannot listen on"),
        ((*base, "--api-token-file", short), "at least 16 ASCII characters"),
        ((*base, "--id-key-file", short), "at least 16 bytes"),
        ((*base, "--api-token-file", tmp_path / "nowhere"), "Cannot read the token file"),
        ((*base, "--tls-cert", short), "both --tls-cert and --tls-key"),
        ((*base, "--tls-cert", short, "--tls-key", short), "Cannot use the certificate"),
        ((*base, "--production"), "there is no token"),
        (
            (*base, "--production", "--api-token-file", token, *tls),
            "--production has no TLS",
        ),
        ((*base, "--log-path", tmp_path / "no" / "log"), "Cannot write the log"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(["serve", *map(str, words)])
        lines = capsys.readouterr().err.splitlines()
        assert ended.value.code == 2, lines
        assert [expected in line for line in lines if line.startswith("error: ")] == [True], lines
    monkeypatch.setenv("RAY_ADDRESS", "ray://somewhere")
    with pytest.raises(SystemExit):
        cli.main(["serve", *map(str, base)])
    assert "serve deploy" in capsys.readouterr().err
