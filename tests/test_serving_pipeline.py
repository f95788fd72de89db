"""The serving pipeline from uploads to answers, without HTTP and without Ray."""

import asyncio
import base64
import json
import struct
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI, Request
from numpy.typing import NDArray

from brainray.errors import ClassifierError, ConfigError, ServingError
from brainray.images.preprocess import Preprocessing
from brainray.inference.engine import Prediction
from brainray.model.classifier import load_classifier, save_classifier
from brainray.model.network import build_network
from brainray.serving.middleware import read_token
from brainray.serving.open_inference import read_inference, render_inference
from brainray.serving.options import ServiceLimits, read_arguments
from brainray.serving.pipeline import Pipeline
from brainray.serving.predictor import Batcher, Predictor
from brainray.serving.problem import Problem
from brainray.serving.uploads import Upload, read_uploads
from tests.conftest import CLASSES
from tests.open_scans import load_image
from tests.reference import predict_eager
from tests.service import LocalPredictor, build_test_app, open_client, open_predictor

TOKEN = "a token of sixteen".replace(" ", "-")


@pytest.fixture(scope="module")
def predictor(tiny_classifier: Path) -> Predictor:
    return open_predictor(tiny_classifier)


@pytest.fixture
def model(predictor: Predictor) -> LocalPredictor:
    return LocalPredictor(predictor)


@pytest.fixture(scope="module")
def scans(phantom_folder: Path) -> list[bytes]:
    files = sorted((phantom_folder / "Testing").rglob("*.jpg"))
    return [file.read_bytes() for file in files[::4]]


def save_random_classifier(folder: Path, *, seed: int, size_px: int = 32) -> Path:
    import torch

    torch.manual_seed(seed)
    save_classifier(
        str(folder),
        build_network(len(CLASSES)).state_dict(),
        classes=CLASSES,
        preprocessing=Preprocessing(size_px=size_px),
        provenance={},
    )
    return folder


# --- answers -------------------------------------------------------------------------------------


def test_every_upload_has_one_answer_in_order(
    model: LocalPredictor, tiny_classifier: Path, scans: list[bytes]
) -> None:
    uploads = [
        Upload("a.jpg", scans[0]),
        Upload("b.txt", b"text"),
        Upload(None, scans[1]),
        Upload("cut.jpg", scans[2][: len(scans[2]) // 2]),
        Upload("none", b""),
    ]
    answers = asyncio.run(Pipeline(model, ServiceLimits()).classify(uploads))
    assert [a.name for a in answers] == ["a.jpg", "b.txt", None, "cut.jpg", "none"]
    assert [a.reason for a in answers] == [
        *(None, "not_an_image", None, "truncated", "empty"),
    ]
    classifier = load_classifier(str(tiny_classifier))
    for row in (0, 2):
        image = load_image(uploads[row].content, classifier.preprocessing)
        expected = predict_eager(classifier, image[None])[0]
        answer = answers[row]
        assert answer.probs is not None
        np.testing.assert_allclose(list(answer.probs.values()), expected, atol=1e-5)
        assert list(answer.probs) == list(CLASSES)
        assert answer.predicted_class == CLASSES[int(expected.argmax())]
        assert answer.confidence == max(answer.probs.values())
        assert answer.status == "classified"
    rejected = answers[1]
    assert (rejected.status, rejected.probs, rejected.confidence) == ("rejected", None, None)
    assert rejected.detail is not None
    assert not rejected.detail.startswith("not_an_image"), "the code is not repeated"


def test_the_sizes_and_the_hash_are_those_of_the_file(model: LocalPredictor) -> None:
    import io
    from hashlib import sha256

    from PIL import Image

    sink = io.BytesIO()
    Image.new("L", (70, 40), 90).save(sink, "PNG")
    (answer,) = asyncio.run(
        Pipeline(model, ServiceLimits()).classify([Upload(None, sink.getvalue())])
    )
    assert (answer.width_px, answer.height_px) == (70, 40)
    assert answer.content_sha256 == sha256(sink.getvalue()).hexdigest()


def test_exceeded_limits_of_a_request_are_problems(
    model: LocalPredictor, scans: list[bytes]
) -> None:
    upload = Upload(None, scans[0])

    def get_problem_code(limits: ServiceLimits, uploads: list[Upload]) -> str:
        with pytest.raises(Problem) as caught:
            asyncio.run(Pipeline(model, limits).classify(uploads))
        return caught.value.code

    assert get_problem_code(ServiceLimits(files=2), [upload] * 3) == "too_many_files"
    model.delay_s = 1
    assert get_problem_code(ServiceLimits(request_s=0.05), [upload]) == "timeout"
    pixels = ServiceLimits(pixels=100)
    model.delay_s = 0
    (answer,) = asyncio.run(Pipeline(model, pixels).classify([upload]))
    assert answer.reason == "too_large"


# --- batcher -------------------------------------------------------------------------------------


class SlowEngine:
    """Blocks calls until ``release`` is set; a call with the number 13 fails."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.release = threading.Event()

    def predict(self, images: NDArray[np.uint8]) -> Prediction:
        numbers = [int(image[0, 0]) for image in images]
        self.calls.append(numbers)
        assert self.release.wait(10)
        if 13 in numbers:
            raise ServingError("failed")
        return Prediction(np.array([[2.0 * n] for n in numbers], np.float32), [None] * len(images))


async def start_predicting(
    batcher: Batcher, numbers: Sequence[int]
) -> list["asyncio.Task[Prediction]"]:
    """Request the first image, and the others while it is being computed."""
    tasks = []
    for number in numbers:
        image = np.full((1, 1), number, np.uint8)
        tasks.append(asyncio.create_task(batcher.predict(image)))
        await asyncio.sleep(0.02 if number == numbers[0] else 0)
    return tasks


def read_number(found: Prediction) -> int:
    return int(found.probs[0, 0])


def test_images_that_arrive_while_the_engine_computes_are_batched() -> None:
    async def run() -> None:
        engine = SlowEngine()
        batcher = Batcher(engine.predict, max_batch_size=3, max_queued=10)
        tasks = await start_predicting(batcher, range(1, 7))
        assert engine.calls == [[1]], "no image waits for further ones"
        assert batcher.num_queued == 5
        engine.release.set()
        assert [read_number(p) for p in await asyncio.gather(*tasks)] == [2, 4, 6, 8, 10, 12]
        assert engine.calls[1:] == [[2, 3, 4], [5, 6]], "bounded, and in order"
        assert read_number(await batcher.predict(np.full((1, 1), 9, np.uint8))) == 18

    asyncio.run(run())


def test_the_queue_is_bounded() -> None:
    async def run() -> None:
        engine = SlowEngine()
        batcher = Batcher(engine.predict, max_batch_size=1, max_queued=2)
        tasks = await start_predicting(batcher, (1, 2, 3))
        with pytest.raises(Problem) as caught:
            await batcher.predict(np.full((1, 1), 4, np.uint8))
        assert caught.value.code == "too_busy"
        engine.release.set()
        assert [read_number(p) for p in await asyncio.gather(*tasks)] == [2, 4, 6]

    asyncio.run(run())


def test_a_cancelled_image_is_not_computed() -> None:
    async def run() -> None:
        engine = SlowEngine()
        batcher = Batcher(engine.predict, max_batch_size=4, max_queued=9)
        tasks = await start_predicting(batcher, (1, 2, 3))
        tasks[1].cancel()
        await asyncio.sleep(0)
        engine.release.set()
        assert read_number(await tasks[2]) == 6
        assert engine.calls == [[1], [3]]

    asyncio.run(run())


def test_a_failed_call_fails_only_its_own_images() -> None:
    async def run() -> None:
        engine = SlowEngine()
        batcher = Batcher(engine.predict, max_batch_size=2, max_queued=9)
        tasks = await start_predicting(batcher, (1, 13, 2, 3))
        engine.release.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(r) for r in results] == [Prediction, ServingError, ServingError, Prediction]

    asyncio.run(run())


# --- predictor -----------------------------------------------------------------------------------


def test_the_self_test_fails_for_wrong_results(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor.check()
    engine = predictor._engine
    original = engine.predict

    def patch_probabilities(change: Any) -> None:  # noqa: ANN401
        def predict(images: NDArray[np.uint8]) -> Prediction:
            found = original(images)
            return Prediction(change(found.probs), found.reasons)

        monkeypatch.setattr(engine, "predict", predict)

    for change, message in (
        (lambda probs: np.roll(probs, 1, axis=1), "differ from fp32's"),
        (lambda probs: probs * np.float32("nan"), "not probabilities"),
        (lambda probs: probs * np.float32(0.5), "not probabilities"),
    ):
        patch_probabilities(change)
        with pytest.raises(ServingError, match=message):
            predictor.check()


def test_probabilities_that_are_not_finite_are_an_error(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch, scans: list[bytes]
) -> None:
    monkeypatch.setattr(
        predictor._engine,
        "predict",
        lambda images: Prediction(
            np.full((len(images), 4), np.nan, np.float32), [None] * len(images)
        ),
    )
    with pytest.raises(ServingError, match="not finite"):
        asyncio.run(Pipeline(predictor, ServiceLimits()).classify([Upload(None, scans[0])]))


def test_a_missing_classifier_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ClassifierError, match="No classifier at"):
        open_predictor(tmp_path)


def test_a_passed_self_test_is_valid_for_a_short_time(model: LocalPredictor) -> None:
    pipeline = Pipeline(model, ServiceLimits())

    async def run() -> None:
        await pipeline.check_ready()
        model.error = ServingError("broken")
        await pipeline.check_ready()  # it passed recently
        with pytest.raises(ServingError):
            await pipeline.check_ready(max_age_s=0)

    asyncio.run(run())


# --- uploads -------------------------------------------------------------------------------------


def make_form(*parts: tuple[str, bytes], end: str = "--B--\r\n") -> bytes:
    made = b"".join(
        b"--B\r\n" + head.encode() + b"\r\n\r\n" + content + b"\r\n" for head, content in parts
    )
    return made + end.encode()


def file_head(name: str, field: str = "files") -> str:
    return f'Content-Disposition: form-data; name="{field}"; filename="{name}"'


FORM = "multipart/form-data; boundary=B"


def post_form(body: bytes, kind: str = FORM, max_files: int = 9) -> list[Upload]:
    """Post a body to an application that only reads its uploads."""
    app, found = FastAPI(), []

    @app.post("/")
    async def read(request: Request) -> None:
        try:
            found.append((await read_uploads(request, ServiceLimits(files=max_files)))[0])
        except Problem as problem:
            found.append(problem)

    async def run() -> None:
        async with open_client(app) as client:
            await client.post("/", content=body, headers={"content-type": kind})

    asyncio.run(run())
    (uploads,) = found
    if isinstance(uploads, Problem):
        raise uploads
    return uploads


def test_a_form_is_split_into_its_files() -> None:
    body = make_form(
        (file_head("a.jpg") + "\r\nContent-Type: image/jpeg", b"\xff\r\n--\x00"),
        (file_head("c.jpg", "other"), b"another field"),
        ('Content-Disposition: form-data; name="files"', b"not a file"),
        (file_head(""), b""),
        (file_head("C:\\\\scans\\\\x.png"), b""),
        (file_head("../../etc/passwd"), b"3"),
    )
    uploads = post_form(body)
    assert uploads == [
        Upload("a.jpg", b"\xff\r\n--\x00"),
        Upload("x.png", b""),
        Upload("passwd", b"3"),
    ]


def test_files_of_a_form_are_not_written_to_a_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise AssertionError("a scan is written to a temporary file")

    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "rollover", refuse)
    large = b"x" * 3 * 2**20
    assert post_form(make_form((file_head("a.jpg"), large))) == [Upload("a.jpg", large)]


@pytest.mark.parametrize(
    ("body", "kind", "code"),
    [
        (b"", FORM, "invalid_request"),
        (b"nonsense", FORM, "invalid_request"),
        (make_form((file_head("a"), b"1"), end=""), FORM, "invalid_request"),
        (make_form((file_head("a"), b"1")), "multipart/form-data", "invalid_request"),
        (make_form((file_head("a", "scan"), b"1")), FORM, "no_files"),
        (make_form(), FORM, "no_files"),
        (make_form(*[(file_head("a"), b"1")] * 3), FORM, "too_many_files"),
        (b"--B\r\nno colon\r\n\r\n1\r\n--B--\r\n", FORM, "invalid_request"),
    ],
)
def test_an_invalid_form_has_a_code(body: bytes, kind: str, code: str) -> None:
    with pytest.raises(Problem) as caught:
        post_form(body, kind, max_files=2)
    assert caught.value.code == code


# --- Open Inference Protocol ---------------------------------------------------------------------


def make_inference(**changes: Any) -> dict[str, Any]:  # noqa: ANN401
    tensor = {
        "name": "image",
        "datatype": "BYTES",
        "shape": [2],
        "data": [base64.b64encode(content).decode() for content in (b"one", b"")],
    }
    return {"id": "7", "inputs": [tensor | changes]}


def test_json_and_binary_data_are_the_same_request() -> None:
    plain = read_inference(json.dumps(make_inference()).encode(), None)
    binary = struct.pack("<I", 3) + b"one" + struct.pack("<I", 0)
    document = make_inference(parameters={"binary_data_size": len(binary)})
    del document["inputs"][0]["data"]
    header = json.dumps(document).encode()
    packed = read_inference(header + binary, str(len(header)))
    assert plain == packed
    assert [upload.content for upload in plain.uploads] == [b"one", b""]
    assert plain.outputs == dict.fromkeys(("probs", "predicted_class", "status", "reason"), False)


@pytest.mark.parametrize(
    ("body", "header_length"),
    [
        (b"{", None),
        (b"[]", None),
        (b"[" * 100_000, None),
        (b"\xff\xfe", None),
        (json.dumps({"inputs": []}).encode(), None),
        (json.dumps({"inputs": [3]}).encode(), None),
        (json.dumps(make_inference(name="scan")).encode(), None),
        (json.dumps(make_inference(datatype="FP32")).encode(), None),
        (json.dumps(make_inference(data=["!"])).encode(), None),
        (json.dumps(make_inference(data=[[1]])).encode(), None),
        (json.dumps(make_inference(parameters=[])).encode(), None),
        (json.dumps(make_inference()).encode(), "9999"),
        (json.dumps(make_inference()).encode(), "9" * 5000),
        (json.dumps(make_inference()).encode(), "²"),
        (json.dumps(make_inference(parameters={"binary_data_size": 4})).encode(), "1"),
    ],
)
def test_an_invalid_inference_request_has_a_code(body: bytes, header_length: str | None) -> None:
    with pytest.raises(Problem) as caught:
        read_inference(body, header_length)
    assert caught.value.code == "invalid_request"


@pytest.mark.parametrize("binary", [b"\x09\0\0\0abc", b"\x01\0", b"", b"\xff\xff\xff\xff"])
def test_truncated_binary_data_has_a_code(binary: bytes) -> None:
    document = make_inference(parameters={"binary_data_size": len(binary)})
    header = json.dumps(document).encode()
    with pytest.raises(Problem) as caught:
        read_inference(header + binary, str(len(header)))
    assert caught.value.code == "invalid_request"


def test_outputs_have_a_row_for_each_upload(model: LocalPredictor, scans: list[bytes]) -> None:
    inference = read_inference(json.dumps(make_inference()).encode(), None)
    pipeline = Pipeline(model, ServiceLimits())
    answers = asyncio.run(pipeline.classify([Upload(None, scans[0]), Upload(None, b"x")]))
    body, header_length = render_inference(
        inference, answers, pipeline.classes, pipeline.classifier_id
    )
    assert header_length is None
    outputs = {tensor["name"]: tensor for tensor in json.loads(body)["outputs"]}
    probs = np.array(outputs["probs"]["data"]).reshape(outputs["probs"]["shape"])
    assert probs.shape == (2, 4)
    assert probs[0].sum() == pytest.approx(1, abs=1e-5)
    assert not probs[1].any(), "a rejected scan has no probabilities"
    assert outputs["status"]["data"] == ["classified", "rejected"]
    assert outputs["reason"]["data"] == ["", "not_an_image"]
    assert outputs["predicted_class"]["data"][1] == ""


# --- token, configuration ----------------------------------------------------------------


def test_the_token_is_read_and_checked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    file.chmod(0o644)
    assert read_token(str(file), {}) == TOKEN
    assert "chmod 600" in caplog.text
    assert read_token(None, {"BRAINRAY_API_TOKEN": TOKEN}) == TOKEN
    assert read_token(None, {}) is None
    for text in ("short", "two words that are long", "", "é" * 20):
        file.write_text(text)
        with pytest.raises(ConfigError, match="openssl rand"):
            read_token(str(file), {})
    with pytest.raises(ConfigError, match="Cannot read the token file"):
        read_token(str(tmp_path / "nowhere"), {})


@pytest.mark.parametrize(
    ("path", "given", "passes"),
    [
        ("/v1/classify", f"Bearer {TOKEN}", True),
        ("/v1/classify", f"bearer {TOKEN}", True),
        ("/v1/classify", TOKEN, False),
        ("/v1/classify", f"Basic {TOKEN}", False),
        ("/v1/classify", f"Bearer {TOKEN}x", False),
        ("/v1/classify", None, False),
        ("/metrics", None, False),
        ("/docs", None, False),
        ("/openapi.json", None, False),
        ("/v2/models/brainray/ready", None, False),
        ("/healthz", None, True),
        ("/readyz", None, True),
        ("/v2/health/live", None, True),
        ("/", None, True),
        ("/static/page.js", None, True),
        ("/static/swagger/swagger-ui.css", None, True),
        ("/v1/model", None, False),
        ("/nowhere", None, False),
        ("/static", None, False),
    ],
)
def test_requests_need_the_token(
    model: LocalPredictor, path: str, given: str | None, passes: bool
) -> None:
    app = build_test_app(model, token=TOKEN)
    headers = {} if given is None else {"authorization": given}

    async def run() -> httpx.Response:
        async with open_client(app) as client:
            return await client.get(path, headers=headers)

    answer = asyncio.run(run())
    assert (answer.status_code != 401) is passes
    if not passes:
        assert "Bearer" in answer.headers["www-authenticate"]
        assert TOKEN not in answer.text


def test_the_arguments_of_a_config_file_are_checked() -> None:
    config = read_arguments(
        {"model": {"classifier_uri": "s3://b/c"}, "limits": {"queued": 3}, "max_replicas": 4}
    )
    assert config.max_replicas == 4
    assert (config.model.classifier_uri, config.limits.queued) == ("s3://b/c", 3)
    assert asdict(config)["limits"]["files"] == 32
    good = {"model": {"classifier_uri": "x"}}
    for arguments, message in (
        ({**good, "max_replica": 3}, "args.max_replica: Unexpected"),
        ({"model": {"classifier_uri": "x", "gpu": True}}, "args.model.gpu: Unexpected"),
        ({"model": {"engine": {"threads": 1}}}, "args.model.engine.threads: Unexpected"),
        ({**good, "limits": {"queued": "many"}}, "limits.queued"),
        ({**good, "limits": {"queued": 0}}, "queued must be positive"),
        ({**good, "min_replicas": 3}, "min_replicas <= max_replicas"),
        ({}, "model"),
        ({"model": "x"}, "model"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_arguments(arguments)
