"""Evaluation, bulk, HTTP and `classify FILE` give the same prediction for the same bytes.

The engine is the default: OpenVINO, in bf16 if the processor has bf16 instructions.
"""

import asyncio
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import pytest
from PIL import Image

from brainray import cli
from brainray.evaluation.evaluate import EvaluateJob, evaluate
from brainray.images.preprocess import preprocess_image
from brainray.inference.bulk import classify
from brainray.inference.engine import Engine, EngineOptions, open_engine
from brainray.inference.options import ClassifyJob
from brainray.io import storage
from brainray.model.calibration import LOW_CONFIDENCE, UNLIKE_TRAINING, Calibration, Outputs
from brainray.model.classifier import load_classifier, save_classifier
from brainray.model.fit_calibration import fit_ood_detector
from brainray.model.network import STAGE_WIDTHS
from brainray.model.precision import choose_precision, has_native_bf16
from tests.conftest import CLASSES
from tests.open_scans import load_image
from tests.service import build_test_app, open_client, open_predictor

NOISE = np.random.default_rng(3).integers(0, 256, (180, 160), dtype=np.uint8)
"""An image that can be read, but is not a scan."""

Rows = dict[str, dict[str, Any]]
"""By file name: status, reason, predicted_class and, unless rejected, the probabilities."""


def save(pixels: Image.Image, kind: str, **options: Any) -> bytes:  # noqa: ANN401
    sink = io.BytesIO()
    pixels.save(sink, kind, **options)
    return sink.getvalue()


@pytest.fixture(scope="module")
def scans(phantom_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a folder of scans in many formats, and of files that are not scans."""
    folder = tmp_path_factory.mktemp("skew") / "Testing"
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
def calibrated_classifier(
    tiny_classifier: Path, phantom_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Export the tiny classifier with a calibration, an abstention limit and an OOD detector."""
    opened = load_classifier(str(tiny_classifier))
    engine = open_engine(opened, EngineOptions())
    train, test = (
        compute_outputs(
            engine,
            [
                load_image(file.read_bytes(), opened.preprocessing)
                for file in sorted((phantom_folder / split).glob("*/*"))
            ],
        )
        for split in ("Training", "Testing")
    )
    foreign = compute_outputs(engine, [preprocess_image(NOISE, opened.preprocessing)]).features
    scale, shift = np.array([0.7, 0.9, 1.1, 1.3]), np.array([0.02, -0.03, 0.0, 0.01])
    calibration = Calibration(scale.astype(np.float32), shift.astype(np.float32))
    confidence = np.sort(calibration.calibrate(test.logits).max(1))
    middle = len(confidence) // 2 + int(np.diff(confidence[len(confidence) // 2 :][:6]).argmax())
    one_class = np.zeros(len(train.features), np.int64)
    ood_detector = fit_ood_detector(train.features, one_class, 1, STAGE_WIDTHS)
    far, near = (
        ood_detector.compute_distances(foreign),
        ood_detector.compute_distances(test.features),
    )
    assert far[0] > 1.2 * near.max(), "noise is farther than the test phantoms"
    folder = tmp_path_factory.mktemp("calibrated") / "classifier"
    save_classifier(
        str(folder),
        opened.build_network().state_dict(),
        classes=CLASSES,
        preprocessing=opened.preprocessing,
        provenance={},
        calibration=Calibration(
            calibration.scale,
            calibration.shift,
            float(confidence[middle] + confidence[middle + 1]) / 2,
            ood_detector,
            float(near.max() + far[0]) / 2,
        ),
    )
    return folder


def compute_outputs(engine: Engine, images: list[Any]) -> Outputs:
    found = engine.predict(np.stack(images), ["logits", "features"])
    assert found.logits is not None
    assert found.features is not None
    return Outputs(found.logits, found.features)


def collect(rows: list[dict[str, Any]]) -> Rows:
    """Collect rows of the prediction table."""
    names = ("status", "reason", "predicted_class", *(f"prob_{name}" for name in CLASSES))
    return {Path(row["scan_uri"]).name: {name: row[name] for name in names} for row in rows}


def predict_files(
    scans: Path, classifier: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[Rows, str]:
    """Return the rows, and the precision of the engine."""
    files = map(str, sorted(scans.rglob("*.*")))
    cli.main(["classify", "--json", *files, "--classifier-uri", str(classifier)])
    body = json.loads(capsys.readouterr().out)
    return collect(body["predictions"]), body["engine"]["precision"]


def predict_http(scans: Path, classifier: Path) -> Rows:
    app = build_test_app(open_predictor(classifier, EngineOptions()))

    async def post_files() -> Rows:
        rows: Rows = {}
        async with open_client(app) as client:
            for file in scans.rglob("*.*"):
                upload = [("files", (file.name, file.read_bytes()))]
                (answer,) = (await client.post("/v1/classify", files=upload)).json()["answers"]
                probs = answer["probs"] or dict.fromkeys(CLASSES)
                rows[answer["name"]] = {
                    **{name: answer[name] for name in ("status", "reason", "predicted_class")},
                    **{f"prob_{name}": probs[name] for name in CLASSES},
                }
        return rows

    return asyncio.run(post_files())


def predict_in_bulk(scans: Path, classifier: Path, output: Path) -> Rows:
    classify(
        ClassifyJob(scans_uri=(str(scans),), classifier_uri=str(classifier), output_uri=str(output))
    )
    (folder,) = (output / "predictions").glob("classifier_id=*")
    assert folder.name.endswith(load_classifier(str(classifier)).classifier_id)
    return collect(ds.dataset(folder, format="parquet").to_table().to_pylist())


def predict_in_evaluation(
    scans: Path, classifier: Path, output: Path
) -> tuple[Rows, dict[str, int]]:
    """Return the rows, and how many scans could not be opened, by reason."""
    metrics = evaluate(
        EvaluateJob(data_uri=str(scans), classifier_uri=str(classifier), output_uri=str(output))
    )
    table = storage.read_table(str(output / "predictions" / "test.parquet"))
    return collect(table.to_pylist()), metrics["test"]["rejected"]


@pytest.mark.usefixtures("local_ray")
def test_every_way_to_predict_gives_the_same_prediction(
    scans: Path, calibrated_classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, precision = predict_files(scans, calibrated_classifier, capsys)
    found = {
        "http": predict_http(scans, calibrated_classifier),
        "bulk": predict_in_bulk(scans, calibrated_classifier, tmp_path / "bulk"),
    }
    evaluated, rejected = predict_in_evaluation(
        scans, calibrated_classifier, tmp_path / "evaluation"
    )
    found["evaluation"] = evaluated

    assert precision == choose_precision("auto", has_bf16=has_native_bf16(use_gpu=False))
    assert len(expected) == 24
    assert {row["reason"] for row in expected.values()} == {
        *(None, "truncated", "not_an_image", "empty", "multi_frame"),
        *(LOW_CONFIDENCE, UNLIKE_TRAINING),
    }
    assert expected["static.png"]["reason"] == UNLIKE_TRAINING
    unreadable = {
        name: row["reason"]
        for name, row in expected.items()
        if row["status"] == "rejected" and row["reason"] != UNLIKE_TRAINING
    }
    assert rejected == Counter(unreadable.values())
    for way, rows in found.items():
        names = expected.keys() - (unreadable if way == "evaluation" else ())
        assert rows.keys() == names, way
        for name in names:
            assert rows[name] == pytest.approx(expected[name], abs=1e-5), (way, name)
