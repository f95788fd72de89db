"""The same bytes through three doors: evaluation, bulk and HTTP give the same answer."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from brainray.dataset.source import find_samples
from brainray.model.classifier import load_classifier
from brainray.pipelines.classify import ClassifyJob, classify
from brainray.pipelines.evaluate import EvaluateJob, prepare_evaluation_data
from brainray.pipelines.judge import predict_samples
from tests.conftest import CLASSES
from tests.service import Service, start_service

Answers = dict[str, dict[str, Any]]
"""By file name: what became of it."""


def save(pixels: Image.Image, kind: str, **options: Any) -> bytes:  # noqa: ANN401
    sink = io.BytesIO()
    pixels.save(sink, kind, **options)
    return sink.getvalue()


@pytest.fixture(scope="module")
def scans(phantom_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fill a folder with scans of many kinds, and with what is no scan."""
    folder = tmp_path_factory.mktemp("doors") / "Testing"
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for file in sorted((phantom_folder / "Testing" / name).iterdir())[:3]:
            (folder / name / file.name).write_bytes(file.read_bytes())
    whole = next((phantom_folder / "Testing" / "glioma").iterdir()).read_bytes()
    grey = Image.open(io.BytesIO(whole)).convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    turned = Image.Exif()
    turned[274] = 6
    contents = {
        "deep.png": save(deep, "PNG"),
        "colour.png": save(grey.convert("RGB").resize((500, 411)), "PNG"),
        "palette.png": save(grey.convert("P"), "PNG"),
        "turned.jpg": save(grey, "JPEG", quality=60, exif=turned),
        "cmyk.jpg": save(grey.convert("CMYK"), "JPEG"),
        "tiny.bmp": save(grey.resize((9, 7)), "BMP"),
        "frame.webp": save(grey, "WEBP", lossless=True),
        "cut.jpg": whole[: len(whole) // 2],
        "noise.jpg": bytes(range(256)) * 4,
        "empty.png": b"",
        "frames.gif": save(grey, "GIF", save_all=True, append_images=[grey.rotate(9)]),
    }
    for name, content in contents.items():
        (folder / "glioma" / name).write_bytes(content)
    return folder.parent


@pytest.fixture(scope="module")
def service(tiny_classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    service = start_service(tiny_classifier, tmp_path_factory.mktemp("skew"))
    yield service
    service.stop()


def ask_evaluation(scans: Path, classifier_uri: str) -> Answers:
    """Ask as `evaluate` does, without the report."""
    job = EvaluateJob(data_uri=str(scans), classifier_uri=classifier_uri, output_uri="unused")
    found = find_samples(job.data_uri, CLASSES, splits=("test",))
    data = prepare_evaluation_data(found, load_classifier(classifier_uri), None, job)
    rows = data.select("test")
    probs = predict_samples(rows, data.store, classifier_uri, limits=job.limits, use_gpu=False)
    names = [Path(path).name for path in data.manifest["path"].to_pylist()]
    answers: Answers = {
        name: {"reason": reason}
        for name, reason in zip(names, data.manifest["reason"].to_pylist(), strict=True)
    }
    for row, of_row in zip(rows, probs, strict=True):
        answers[names[row]] |= dict(zip(CLASSES, of_row.tolist(), strict=True))
    return answers


def ask_bulk(scans: Path, classifier: Path, output: Path) -> Answers:
    classify(
        ClassifyJob(
            scans_uri=(str(scans),),
            classifier_uri=str(classifier),
            output_uri=str(output),
            backend="torch",
            precision="fp32",
        )
    )
    return {
        Path(row["scan_uri"]).name: {"reason": row["reason"]}
        | {name: row[f"prob_{name}"] for name in CLASSES if row["reason"] is None}
        for row in pq.read_table(output / "predictions").to_pylist()
    }


def ask_http(scans: Path, service: Service) -> Answers:
    answers: Answers = {}
    for file in scans.rglob("*.*"):
        upload = [("files", (file.name, file.read_bytes()))]
        answer = httpx.post(f"{service.url}/v1/classify", files=upload, timeout=60).json()
        (one,) = answer["answers"]
        answers[one["name"]] = {"reason": one["reason"]} | (one["probs"] or {})
    return answers


@pytest.mark.usefixtures("local_ray")
def test_three_doors_give_one_answer(
    scans: Path, tiny_classifier: Path, service: Service, tmp_path: Path
) -> None:
    doors = {
        "evaluation": ask_evaluation(scans, str(tiny_classifier)),
        "bulk": ask_bulk(scans, tiny_classifier, tmp_path / "answers"),
        "http": ask_http(scans, service),
    }
    names = {file.name for file in scans.rglob("*.*")}
    assert len(names) == 23
    reference = doors["bulk"]
    assert {answer["reason"] for answer in reference.values()} == {
        *(None, "truncated", "not_an_image", "empty", "multi_frame"),
    }
    for door, answers in doors.items():
        assert set(answers) == names, door
        for name, answer in answers.items():
            expected = reference[name]
            assert answer["reason"] == expected["reason"], (door, name)
            assert answer.keys() == expected.keys(), (door, name)
            for kind in answer.keys() - {"reason"}:
                assert answer[kind] == pytest.approx(expected[kind], abs=1e-5), (door, name)
