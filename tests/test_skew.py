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
from brainray.model.calibration import fit_likeness
from brainray.model.classifier import load_classifier, save_classifier
from brainray.model.network import STAGE_WIDTHS
from brainray.model.trust import LOW_CONFIDENCE, UNLIKE_TRAINING, Outputs, Trust
from brainray.pipelines.classify import ClassifyJob, classify
from brainray.pipelines.evaluate import EvaluateJob, prepare_evaluation_data
from brainray.pipelines.judge import compute_outputs
from brainray.pixels.decode import DecodeLimits
from brainray.pixels.preprocess import load_image, resize_image
from tests.conftest import CLASSES
from tests.service import Service, start_service

NOISE = np.random.default_rng(3).integers(0, 256, (180, 160), dtype=np.uint8)
"""An image that is no scan, and can be read."""

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
        "static.png": save(Image.fromarray(NOISE), "PNG"),
        "frames.gif": save(grey, "GIF", save_all=True, append_images=[grey.rotate(9)]),
    }
    for name, content in contents.items():
        (folder / "glioma" / name).write_bytes(content)
    return folder.parent


@pytest.fixture(scope="module")
def wary_classifier(
    tiny_classifier: Path, phantom_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Seal the tiny classifier anew: scaled, abstaining, and knowing what phantoms are like."""
    opened = load_classifier(str(tiny_classifier))

    def compute(split: str) -> Outputs:
        files = sorted((phantom_folder / split).glob("*/*"))
        images = [
            load_image(file.read_bytes(), opened.preprocessing, DecodeLimits()) for file in files
        ]
        return opened.compute_outputs(np.stack(images))

    train, test = compute("Training"), compute("Testing")
    scale, shift = np.array([0.7, 0.9, 1.1, 1.3]), np.array([0.02, -0.03, 0.0, 0.01])
    trust = Trust(scale.astype(np.float32), shift.astype(np.float32))
    confidence = np.sort(trust.calibrate(test.logits).max(1))
    middle = len(confidence) // 2 + int(np.diff(confidence[len(confidence) // 2 :][:6]).argmax())
    one_class = np.zeros(len(train.features), np.int64)
    likeness = fit_likeness(train.features, one_class, 1, STAGE_WIDTHS)
    foreign = opened.compute_outputs(resize_image(NOISE, opened.preprocessing)[None]).features
    far, near = likeness.compute_distances(foreign), likeness.compute_distances(test.features)
    assert far[0] > 1.2 * near.max(), "noise is farther from phantoms than phantoms are"
    folder = tmp_path_factory.mktemp("wary") / "classifier"
    save_classifier(
        str(folder),
        opened.network.state_dict(),
        classes=CLASSES,
        preprocessing=opened.preprocessing,
        provenance={},
        trust=Trust(
            trust.scale,
            trust.shift,
            float(confidence[middle] + confidence[middle + 1]) / 2,
            likeness,
            float(near.max() + far[0]) / 2,
        ),
    )
    return folder


@pytest.fixture(scope="module")
def service(wary_classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    service = start_service(wary_classifier, tmp_path_factory.mktemp("skew"))
    yield service
    service.stop()


def ask_evaluation(scans: Path, classifier_uri: str) -> Answers:
    """Ask as `evaluate` does, without the report."""
    job = EvaluateJob(data_uri=str(scans), classifier_uri=classifier_uri, output_uri="unused")
    found = find_samples(job.data_uri, CLASSES, splits=("test",))
    classifier = load_classifier(classifier_uri)
    data = prepare_evaluation_data(found, classifier, None, job)
    rows = data.select("test")
    outputs = compute_outputs(rows, data.store, classifier_uri, limits=job.limits, use_gpu=False)
    probs = classifier.trust.calibrate(outputs["logits"])
    reasons = classifier.trust.find_reasons(probs, outputs["distance"])
    names = [Path(path).name for path in data.manifest["path"].to_pylist()]
    answers: Answers = {
        name: {"reason": reason}
        for name, reason in zip(names, data.manifest["reason"].to_pylist(), strict=True)
    }
    for row, of_row, reason in zip(rows, probs, reasons, strict=True):
        answers[names[row]]["reason"] = reason
        if reason != UNLIKE_TRAINING:
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
        | {name: row[f"prob_{name}"] for name in CLASSES if row["confidence"] is not None}
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
    scans: Path, wary_classifier: Path, service: Service, tmp_path: Path
) -> None:
    doors = {
        "evaluation": ask_evaluation(scans, str(wary_classifier)),
        "bulk": ask_bulk(scans, wary_classifier, tmp_path / "answers"),
        "http": ask_http(scans, service),
    }
    names = {file.name for file in scans.rglob("*.*")}
    assert len(names) == 24
    reference = doors["bulk"]
    assert {answer["reason"] for answer in reference.values()} == {
        *(None, "truncated", "not_an_image", "empty", "multi_frame"),
        *(LOW_CONFIDENCE, UNLIKE_TRAINING),
    }
    assert reference["static.png"]["reason"] == UNLIKE_TRAINING
    for door, answers in doors.items():
        assert set(answers) == names, door
        for name, answer in answers.items():
            expected = reference[name]
            assert answer["reason"] == expected["reason"], (door, name)
            assert answer.keys() == expected.keys(), (door, name)
            for kind in answer.keys() - {"reason"}:
                assert answer[kind] == pytest.approx(expected[kind], abs=1e-5), (door, name)
