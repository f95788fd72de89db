"""Bulk runs on Ray: one row for every scan, only new scans are predicted, no incomplete files."""

import contextlib
import json
import os
import random
import re
import shutil
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from ray.exceptions import ActorDiedError

from brainray import cli
from brainray.errors import (
    ClassificationError,
    ConfigError,
    DataError,
    LockLostError,
    StorageError,
)
from brainray.images.decode import REJECTION_REASONS, DecodeLimits, decode_image
from brainray.images.heatmap import GALLERY_OVERLAY_PX
from brainray.images.preprocess import Preprocessing
from brainray.inference import bulk as bulk_module
from brainray.inference import plan as plan_module
from brainray.inference.bulk import WavePredictor, classify, parse_max_rejected
from brainray.inference.engine import Engine, EngineOptions, open_engine
from brainray.inference.options import ClassifyJob
from brainray.inference.schema import build_schema
from brainray.inference.series import SeriesRule
from brainray.inference.stats import Progress
from brainray.inference.store import PredictionStore, Wave
from brainray.io import storage
from brainray.io.lock import OutputLock, hold_output
from brainray.model.classifier import load_classifier, read_classifier_metadata, save_classifier
from brainray.model.network import build_network
from tests.conftest import CLASSES, REPOSITORY
from tests.dicom_files import PYDICOM_FILES, RAMP, make_mr
from tests.fakes import prepare_fake_engine
from tests.open_scans import load_image
from tests.test_decode import SAMPLES, mutate

GUIDE = REPOSITORY / "docs" / "bulk.md"

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture
def fake_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predict without a network: most tests only check which scans are predicted."""
    monkeypatch.setattr(bulk_module, "prepare_engine", prepare_fake_engine)


@pytest.fixture
def inbox(phantom_folder: Path, tmp_path: Path) -> Path:
    """Return a folder of some phantoms that a test may modify."""
    folder = tmp_path / "inbox"
    for name in CLASSES:
        for scan in sorted((phantom_folder / "Testing" / name).iterdir())[:5]:
            (folder / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(scan, folder / name / scan.name)
    return folder


def make_job(inbox: Path, classifier: Path, output: Path, **changes: Any) -> ClassifyJob:  # noqa: ANN401
    job = ClassifyJob(
        scans_uri=(str(inbox),),
        classifier_uri=str(classifier),
        output_uri=str(output),
        engine=EngineOptions(backend="torch", precision="fp32"),
    )
    return replace(job, **changes)


def list_scan_files(inbox: Path) -> list[Path]:
    return sorted(file for file in inbox.rglob("*") if file.is_file())


def list_files(output: Path) -> list[Path]:
    return sorted((output / "predictions").glob("*/*.parquet"))


def read_rows(output: Path) -> list[dict[str, Any]]:
    """Return all rows as other programs read them: with the partition column of the folder."""
    return pq.read_table(output / "predictions").to_pylist()


def save_bomb(file: Path, side: int = 60_000) -> None:
    """Write a valid PNG of 60,000 × 60,000 black pixels, in a few hundred kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    header = side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])  # one bit a pixel
    packer = zlib.compressobj(9)
    line = bytes(1 + side // 8)
    data = b"".join(packer.compress(line) for _ in range(side)) + packer.flush()
    content = chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def make_bad_inbox(folder: Path, good: Path) -> dict[str, str | None]:
    """Fill a folder with valid, unusual and damaged files; return the expected reasons by name."""
    whole = good.read_bytes()
    image = Image.open(good).convert("L")
    reasons: dict[str, str | None] = {
        "empty.jpg": "empty",
        "cut.jpg": "truncated",
        "noise.jpg": "not_an_image",
        "text.png": "not_an_image",
        "archive.zip": "unsupported",
        "a jpeg named.png": None,
        "no-suffix": None,
        "bomb.png": "too_large",
        "sixteen-bit.png": None,
        "palette.png": None,
        "cmyk.jpg": None,
        "animated.gif": "multi_frame",
        "gone.jpg": "missing",
        "quote\"and'quote.jpg": None,
        "new\nline.jpg": None,
        "x" * 251 + ".jpg": None,
    }
    contents = {
        "empty.jpg": b"",
        "cut.jpg": whole[: len(whole) // 2],
        "noise.jpg": np.random.default_rng(0).bytes(5000),
        "text.png": b"this is not an image",
        "archive.zip": b"PK\x03\x04" + bytes(100),
    }
    folder.mkdir()
    for name in reasons:
        (folder / name).write_bytes(contents.get(name, whole))
    save_bomb(folder / "bomb.png")
    Image.fromarray(np.asarray(image, np.uint16) * 257).save(folder / "sixteen-bit.png")
    image.convert("P").save(folder / "palette.png")
    image.convert("CMYK").save(folder / "cmyk.jpg")
    image.save(folder / "animated.gif", save_all=True, append_images=[image.rotate(90)])
    (folder / "gone.jpg").unlink()
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    odd = os.fsencode(folder) + b"/caf\xe9.jpg"
    Path(os.fsdecode(odd)).write_bytes(whole)
    return reasons | {"caf%E9.jpg": None}


# ----------------------------------------------------------------------- with the real network


def test_every_scan_has_a_row_with_the_prediction_of_the_classifier(
    inbox: Path, tiny_classifier: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    printed: list[str] = []
    metrics = classify(make_job(inbox, tiny_classifier, output), log=printed.append)
    rows = {row["scan_uri"]: row for row in read_rows(output)}
    assert {row["class_map"] for row in rows.values()} == {None}
    files = list_scan_files(inbox)
    assert sorted(rows) == [str(file) for file in files]
    classifier = load_classifier(str(tiny_classifier))
    images = [load_image(file.read_bytes(), classifier.preprocessing) for file in files]
    engine = open_engine(classifier, EngineOptions(backend="torch", precision="fp32"))
    probs = engine.predict(np.stack(images)).probs
    for file, expected in zip(files, probs, strict=True):
        row = rows[str(file)]
        assert set(row) == set(build_schema(CLASSES).names)
        assert row["status"] == "classified"
        assert row["reason"] is None
        assert row["content_sha256"] == sha256(file.read_bytes()).hexdigest()
        found = [row[f"prob_{name}"] for name in CLASSES]
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert row["predicted_class"] == CLASSES[int(np.argmax(found))]
        assert row["confidence"] == max(found)
        assert (row["width_px"], row["height_px"]) == Image.open(file).size
        assert row["size_bytes"] == file.stat().st_size
        assert row["modified_ns"] == file.stat().st_mtime_ns
        assert row["classifier_id"] == classifier.classifier_id
        assert (row["engine"], row["precision"]) == ("torch", "fp32")
    assert metrics["counts"]["total"] == len(files)
    assert metrics["counts"]["by_status"] == {
        "classified": len(files),
        "abstained": 0,
        "rejected": 0,
    }
    assert sum(metrics["counts"]["by_class"].values()) == len(files)
    assert sum(metrics["confidence_histogram"]["counts"]) == len(files)
    assert metrics["run"]["images_per_s"] > 0
    assert metrics["run"]["memory_peak_bytes"] > 100 * 2**20
    assert set(metrics["run"]["stages_s"]) == {"read", "decode", "predict", "write"}
    assert all(seconds > 0 for seconds in metrics["run"]["stages_s"].values())
    assert metrics["runtime"]["backend"] == "torch"
    assert f"Predicting with {metrics['runtime']['description']}." in printed
    assert metrics == json.loads((output / "metrics.json").read_text())
    report = (output / "report.html").read_text()
    assert classifier.classifier_id in report
    assert "Class activation map of" not in report
    assert {path.name for path in output.iterdir()} >= {"predictions", "report.html", ".lock"}
    assert not (output / ".plan").exists()


def test_explained_rows_have_the_map_of_their_class(
    inbox: Path, phantom_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, output = str(tmp_path / "classifier"), tmp_path / "out"
    save_classifier(
        uri,
        build_network(len(CLASSES)).state_dict(),
        classes=CLASSES,
        preprocessing=Preprocessing(size_px=64),
        provenance={},
    )
    (inbox / "empty.jpg").touch()
    job = make_job(inbox, Path(uri), output, explain=True, labels="folder")
    classify(job)
    rows = {row["scan_uri"]: row for row in read_rows(output)}
    classifier = load_classifier(uri)
    engine = open_engine(classifier, EngineOptions(backend="torch", precision="fp32"))
    for scan, row in rows.items():
        if row["status"] == "rejected":
            assert row["class_map"] is None
            continue
        content = Path(scan).read_bytes()
        image = load_image(content, classifier.preprocessing)
        maps = engine.predict(image[None], ["class_maps"]).class_maps
        assert maps is not None
        expected = maps[0, CLASSES.index(row["predicted_class"])]
        np.testing.assert_allclose(np.reshape(row["class_map"], (8, 8)), expected, atol=1e-4)
        assert row["confidence"] == max(row[f"prob_{name}"] for name in CLASSES)
    mistakes = sum(
        row["predicted_class"] != Path(scan).parent.name
        for scan, row in rows.items()
        if row["predicted_class"]
    )
    assert mistakes
    report = (output / "report.html").read_text()
    assert report.count('alt="Class activation map of ') == len(rows) - 1 + mistakes

    monkeypatch.setattr(bulk_module, "prepare_engine", prepare_fake_engine)
    shutil.copy(next(phantom_folder.glob("Training/*/*")), inbox / "new.jpg")
    plain = replace(job, explain=False)
    assert classify(plain)["run"]["num_new"] == 1
    assert classify(job)["run"]["num_new"] == 0, "a scan without a map is not predicted again"
    later = {row["scan_uri"]: row for row in read_rows(output)}
    assert later.pop(str(inbox / "new.jpg"))["class_map"] is None
    assert later == rows
    check_that_the_guide_draws_a_map(output, tmp_path)


def test_the_classifier_is_read_before_ray_starts(
    inbox: Path, tiny_classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that reads it from S3 while Ray sets environment variables can crash the process."""
    events = []

    def prepare_slowly(classifier_uri: str, options: EngineOptions) -> Callable[[], Engine]:
        prepared = prepare_fake_engine(classifier_uri, options)
        time.sleep(0.5)
        events.append("read")
        return prepared

    def refuse_to_start(**_: object) -> None:
        events.append("started")
        raise ConfigError("no Ray in this test")

    monkeypatch.setattr(bulk_module, "prepare_engine", prepare_slowly)
    monkeypatch.setattr(bulk_module, "connect_ray", refuse_to_start)
    with pytest.raises(ConfigError, match="no Ray in this test"):
        classify(make_job(inbox, tiny_classifier, tmp_path / "out"))
    assert events == ["read", "started"]


def check_that_the_guide_draws_a_map(output: Path, folder: Path) -> None:
    """Run the example of docs/bulk.md on predictions with and without maps."""
    (code,) = re.findall(
        r"```python\n((?:(?!```).)*?class_map.*?)```", GUIDE.read_text(), re.DOTALL
    )
    (folder / "PREDICTED").symlink_to(output)
    named: dict[str, Any] = {}
    with contextlib.chdir(folder):
        exec(compile(code, str(GUIDE), "exec"), named)
    shown = np.asarray(Image.open(folder / "overlay.png"))
    pixels = decode_image(Path(named["row"]["scan_uri"]).read_bytes(), DecodeLimits())
    assert max(shown.shape[:2]) == GALLERY_OVERLAY_PX
    assert shown.shape[0] / shown.shape[1] == pytest.approx(
        pixels.shape[0] / pixels.shape[1], rel=0.02
    )
    assert np.ptp(shown, axis=2).any(), "the map must be in colour over the grey scan"


def test_int8_logs_its_difference_from_fp32(
    inbox: Path, tiny_classifier: Path, tmp_path: Path
) -> None:
    pytest.importorskip("nncf", reason="int8 needs NNCF: pip install 'brainray[int8]'")
    printed: list[str] = []
    engine = EngineOptions(precision="int8", calibration_uri=str(inbox))
    job = make_job(inbox, tiny_classifier, tmp_path / "out", engine=engine)
    metrics = classify(job, log=printed.append)
    assert metrics["runtime"]["precision"] == "int8"
    assert any("int8 against fp32 on 20 of the calibration images" in line for line in printed)
    assert {row["precision"] for row in read_rows(tmp_path / "out")} == {"int8"}


# ----------------------------------------------------------------------- rows of an output


@pytest.mark.usefixtures("fake_engine")
def test_every_file_in_an_inbox_gets_a_row(
    phantom_folder: Path, tiny_classifier: Path, tmp_path: Path
) -> None:
    good = next((phantom_folder / "Testing").rglob("*.jpg"))
    expected = make_bad_inbox(tmp_path / "in", good)
    (tmp_path / "in" / ".hidden").touch()
    (tmp_path / "in" / ".cache").mkdir()
    shutil.copy(good, tmp_path / "in" / ".cache" / "a.jpg")
    output = tmp_path / "in" / "out"
    printed: list[str] = []
    job = make_job(tmp_path / "in", tiny_classifier, output)
    metrics = classify(job, log=printed.append)
    assert "Skipped 2 hidden files." in printed
    found = {row["scan_uri"].rpartition("/")[2]: row for row in read_rows(output)}
    assert {name: row["reason"] for name, row in found.items()} == expected
    for row in found.values():
        assert (row["status"] == "classified") == (row["reason"] is None)
        assert (row["predicted_class"] is None) == (row["status"] == "rejected")
        assert (row["prob_glioma"] is None) == (row["status"] == "rejected")
    assert found["bomb.png"]["content_sha256"] is not None
    assert found["gone.jpg"]["content_sha256"] is None
    assert sum(metrics["counts"]["by_reason"].values()) == sum(map(bool, expected.values()))
    again = classify(job)
    assert again["run"]["num_new"] == 0, "the output in the inbox is not scanned"
    assert again["run"]["num_known"] == 1, "a missing scan is tried again"


@pytest.mark.usefixtures("fake_engine")
def test_a_second_run_predicts_only_new_scans(
    inbox: Path, tiny_classifier: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    job = make_job(inbox, tiny_classifier, output)
    classify(job)
    first, files = read_rows(output), list_files(output)
    metrics = classify(job)
    assert (metrics["run"]["num_new"], metrics["run"]["num_known"]) == (0, 0)
    assert metrics["counts"]["total"] == len(first)
    assert list_files(output) == files, "a run with nothing new writes no file"
    scans = list_scan_files(inbox)
    shutil.copy(scans[0], inbox / "new.jpg")  # a new name
    scans[1].write_bytes(scans[2].read_bytes())  # a new content
    os.utime(scans[3])  # neither: opened again, but not new
    (inbox / "late.jpg").symlink_to(inbox / "later.jpg")
    metrics = classify(job)
    assert (metrics["run"]["num_new"], metrics["run"]["num_known"]) == (3, 1)
    rows = read_rows(output)
    assert len(rows) == len(first) + 3
    assert len({(row["scan_uri"], row["content_sha256"]) for row in rows}) == len(rows)
    assert metrics["counts"]["total"] == len(rows)
    shutil.copy(scans[4], inbox / "later.jpg")  # the missing file now exists
    metrics = classify(job)
    assert metrics["run"]["num_new"] == 2  # later.jpg, and the link late.jpg
    late = [row for row in read_rows(output) if row["scan_uri"].endswith("late.jpg")]
    assert [row["reason"] for row in sorted(late, key=lambda row: row["classified_at"])] == [
        "missing",
        None,
    ]


@pytest.mark.usefixtures("fake_engine")
def test_rows_of_two_classifiers_are_kept_side_by_side(
    inbox: Path, tiny_classifier: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    new_id = save_classifier(
        str(other),
        build_network(len(CLASSES)).state_dict(),
        classes=CLASSES,
        preprocessing=Preprocessing(size_px=32),
        provenance={},
    )
    old_id = read_classifier_metadata(str(tiny_classifier))["classifier_id"]
    output = tmp_path / "out"
    count = len(list_scan_files(inbox))
    assert classify(make_job(inbox, tiny_classifier, output))["classifier_id"] == old_id
    metrics = classify(make_job(inbox, other, output))
    assert metrics["classifier_id"] == new_id
    assert metrics["counts"]["total"] == metrics["run"]["num_new"] == count
    found = Counter((row["scan_uri"], row["classifier_id"]) for row in read_rows(output))
    files = [str(file) for file in list_scan_files(inbox)]
    assert found == Counter((file, one) for file in files for one in (old_id, new_id))
    folders = {folder.name for folder in (output / "predictions").iterdir()}
    assert folders == {f"classifier_id={one}" for one in (old_id, new_id)}


@pytest.mark.usefixtures("fake_engine")
def test_one_run_reads_tables_lists_and_files(
    inbox: Path, tiny_classifier: Path, tmp_path: Path
) -> None:
    scans = sorted(inbox.rglob("*.jpg"))
    table = pa.table({"image_bytes": [scan.read_bytes() for scan in scans[:7]]})
    pq.write_table(table, tmp_path / "scans.parquet", row_group_size=3)
    (tmp_path / "list.txt").write_text(f"{scans[0]}\n{tmp_path}/nowhere.jpg\n{scans[0]}\n")
    uris = (tmp_path / "scans.parquet", tmp_path / "list.txt", scans[1], scans[0])
    job = make_job(inbox, tiny_classifier, tmp_path / "out", scans_uri=tuple(map(str, uris)))
    metrics = classify(job)
    assert metrics["counts"]["total"] == 7 + 2 + 1
    assert metrics["counts"]["by_reason"] == {"missing": 1}
    rows = {row["scan_uri"]: row for row in read_rows(tmp_path / "out")}
    assert len(rows) == 10
    from_table, from_file = rows[f"{tmp_path}/scans.parquet#row=0"], rows[str(scans[0])]
    assert from_table["content_sha256"] == from_file["content_sha256"]
    assert from_table["prob_glioma"] == pytest.approx(from_file["prob_glioma"], abs=1e-6)
    assert classify(job)["run"]["num_new"] == 0


@pytest.mark.usefixtures("fake_engine")
def test_scores_are_computed_for_labelled_scans(
    inbox: Path, tiny_classifier: Path, tmp_path: Path
) -> None:
    (inbox / "elsewhere").mkdir()
    shutil.copy(next(inbox.rglob("*.jpg")), inbox / "elsewhere" / "unknown.jpg")
    output = tmp_path / "out"
    metrics = classify(make_job(inbox, tiny_classifier, output, labels="folder"))
    rows = [row for row in read_rows(output) if "elsewhere" not in row["scan_uri"]]
    right = sum(row["scan_uri"].split("/")[-2] == row["predicted_class"] for row in rows)
    assert metrics["evaluation"]["accuracy"] == pytest.approx(right / len(rows))
    assert metrics["evaluation"]["n"] == metrics["evaluation"]["num_labelled"] == len(rows)
    assert metrics["evaluation"]["num_without_truth"] == 1
    wrong = [row for row in rows if row["scan_uri"].split("/")[-2] != row["predicted_class"]]
    assert wrong
    assert Path(wrong[0]["scan_uri"]).name in (output / "report.html").read_text()
    lines = [f'"{row["scan_uri"]}",{row["predicted_class"]}' for row in rows[:8]]
    (tmp_path / "labels.csv").write_text("scan_uri,label\n" + "\n".join(lines))
    labels = str(tmp_path / "labels.csv")
    metrics = classify(make_job(inbox, tiny_classifier, output, labels=labels))
    assert (metrics["evaluation"]["n"], metrics["evaluation"]["accuracy"]) == (8, 1.0)
    assert metrics["run"]["num_new"] == 0, "a scan with a new label is not predicted again"


@pytest.mark.usefixtures("fake_engine")
def test_too_many_rejections_are_an_error_after_everything_is_written(
    inbox: Path, tiny_classifier: Path, tmp_path: Path
) -> None:
    (inbox / "empty.jpg").touch()
    (inbox / "text.jpg").write_text("text")
    total = len(list_scan_files(inbox))
    job = make_job(inbox, tiny_classifier, tmp_path / "out", max_rejected="5%")
    with pytest.raises(DataError, match=f"2 of {total} new scans were rejected"):
        classify(job)
    assert len(read_rows(tmp_path / "out")) == total
    assert (tmp_path / "out" / "report.html").exists()
    classify(job)  # it has no new scans, so it rejects none


def test_max_rejected_is_parsed_as_a_share_or_a_number() -> None:
    assert [parse_max_rejected("5%")(count) for count in (0, 200)] == [0.0, 10.0]
    assert parse_max_rejected("20")(1_000_000) == 20.0


@pytest.mark.parametrize("text", ["", "five", "-1", "101%", "nan", "inf"])
def test_other_text_for_max_rejected_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError, match="max-rejected"):
        parse_max_rejected(text)


# ------------------------------------------------------------------- files with several slices


def fill_hospital_inbox(folder: Path) -> None:
    """Write two series of a study, a volume, a PNG and a report, with a name in each path."""
    folder.mkdir(parents=True)
    for series in ("1.2.3.1", "1.2.3.2"):
        for number in range(6):
            content = make_mr(
                np.full((64, 64), 100 * number + 200, np.uint16) + RAMP,
                SeriesInstanceUID=series,
                SOPInstanceUID=f"{series}.{number}",
                ImagePositionPatient=[0, 0, 5 * number],
            )
            (folder / f"Doe-{series}-{number}.dcm").write_bytes(content)
    voxels = np.zeros((32, 32, 9), np.int16)
    voxels[4:28, 4:28, 1:8] = np.random.default_rng(0).integers(300, 900, (24, 24, 7))
    nib.save(nib.Nifti1Image(voxels, np.diag([-1.0, 1.0, 2.0, 1.0])), folder / "Doe.nii.gz")
    Image.fromarray(np.asarray(RAMP % 256, np.uint8)).save(folder / "Doe.png")
    shutil.copy(PYDICOM_FILES / "test-SR.dcm", folder / "Doe-SR.dcm")
    shutil.copy(PYDICOM_FILES / "dicomdirtests" / "DICOMDIR", folder)


@pytest.mark.usefixtures("fake_engine")
def test_slices_have_rows_and_series_and_studies_have_answers(
    tiny_classifier: Path, tmp_path: Path
) -> None:
    inbox, output = tmp_path / "in", tmp_path / "out"
    fill_hospital_inbox(inbox)
    printed: list[str] = []
    progress: list[tuple[int, int | None]] = []
    job = make_job(inbox, tiny_classifier, output)
    metrics = classify(
        job, log=printed.append, on_progress=lambda now: progress.append((now.done, now.total))
    )
    rows = {row["scan_uri"]: row for row in read_rows(output)}
    assert len(rows) == metrics["run"]["num_new"] == 12 + 9 + 1 + 1
    assert progress[-1] == (15, 15), "progress is counted in files"
    assert any("1 DICOMDIR" in line for line in printed)
    assert rows[str(inbox / "Doe-SR.dcm")]["reason"] == "not_an_image_object"
    slices = [rows[f"{inbox}/Doe.nii.gz#frame={number}"] for number in range(9)]
    assert [row["reason"] == "little_tissue" for row in slices] == [True] + [False] * 7 + [True]
    series = pq.read_table(output / "series.parquet").to_pylist()
    assert sorted(row["num_slices"] for row in series) == [6, 6, 9]
    (study,) = pq.read_table(output / "studies.parquet").to_pylist()
    assert study["num_series"] == 2
    assert len(study["patient"]) == 32
    assert metrics["series"]["total"] == 3
    assert metrics["studies"]["total"] == 1
    assert "Series and studies" in (output / "report.html").read_text()
    assert metrics == json.loads((output / "metrics.json").read_text())

    (inbox / "Doe.nii.gz").write_bytes((inbox / "Doe.nii.gz").read_bytes())  # a new mtime
    strict = replace(job, max_rejected="0", rule=SeriesRule(min_slices=7))
    again = classify(strict)
    assert (again["run"]["num_new"], again["run"]["num_known"]) == (0, 1)
    assert again["counts"] == metrics["counts"]
    found = pq.read_table(output / "series.parquet").to_pylist()
    reasons = {row["num_slices"]: row["reason"] for row in found}
    assert reasons[6] == "too_few_slices", "the rule of the last run, applied to all rows"
    nib.save(nib.Nifti1Image(np.ones((32, 32, 5), np.int16), np.eye(4)), inbox / "Doe.nii.gz")
    changed = classify(job)
    assert changed["run"]["num_new"] == 5
    assert len(read_rows(output)) == len(rows) + 5


@pytest.mark.usefixtures("fake_engine")
def test_no_output_of_a_redacted_run_contains_a_path(tiny_classifier: Path, tmp_path: Path) -> None:
    inbox, output = tmp_path / "Doe", tmp_path / "out"
    fill_hospital_inbox(inbox)
    lines = [f"{inbox}/Doe.png,glioma", f"{inbox}/Doe.nii.gz,notumor"]
    (tmp_path / "Doe.csv").write_text("\n".join(["scan_uri,label", *lines]))
    printed: list[str] = []
    job = make_job(
        inbox, tiny_classifier, output, redact_paths=True, labels=str(tmp_path / "Doe.csv")
    )
    metrics = classify(job, log=printed.append)
    assert metrics["evaluation"]["n"] == 1 + 7
    rows = read_rows(output)
    assert len(rows) == 23
    assert {row["scan_uri"][:9] for row in rows} == {"redacted:"}
    assert sum(row["scan_uri"].endswith("#frame=4") for row in rows) == 1
    for table in ("series.parquet", "studies.parquet"):
        assert "Doe" not in str(pq.read_table(output / table).to_pylist())
    assert "Doe" not in str(rows)
    files = [file for file in output.rglob("*") if file.is_file()]
    assert len(files) > 6
    for file in files:
        assert b"Doe" not in file.read_bytes(), file
    assert "Doe" not in str(printed)
    report = (output / "report.html").read_text()
    assert "data:image/png" not in report
    assert classify(job)["run"]["num_new"] == 0
    with pytest.raises(ConfigError, match="Give --redact-paths"):
        classify(make_job(inbox, tiny_classifier, output))


@pytest.mark.usefixtures("fake_engine")
def test_slices_outside_the_head_do_not_count_for_max_rejected(
    tiny_classifier: Path, tmp_path: Path
) -> None:
    voxels = np.zeros((32, 32, 20), np.int16)
    voxels[4:28, 4:28, 8:14] = np.random.default_rng(0).integers(300, 900, (24, 24, 6))
    (tmp_path / "in").mkdir()
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / "in" / "volume.nii")
    job = make_job(tmp_path / "in", tiny_classifier, tmp_path / "out", max_rejected="0")
    metrics = classify(job)
    assert metrics["counts"]["by_reason"]["little_tissue"] == 14
    (tmp_path / "in" / "empty.dcm").touch()
    with pytest.raises(DataError, match=r"1 of 1 new scans were rejected \(1 empty\)"):
        classify(job)


# -------------------------------------------------------------------------------------- errors


def test_unusable_inputs_and_options_are_an_error_before_any_prediction(
    inbox: Path, tiny_classifier: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "labels.csv").write_text("scan_uri,label\na.jpg,sarcoma\n")
    output = tmp_path / "out"
    int8 = EngineOptions(precision="int8")
    gpu = EngineOptions(use_gpu=True)
    cases: list[tuple[ClassifyJob, type[Exception], str]] = [
        (make_job(tmp_path / "nowhere", tiny_classifier, output), DataError, "neither a folder"),
        (make_job(inbox, tmp_path / "nowhere", output), ValueError, "nowhere"),
        (make_job(inbox, tiny_classifier, tmp_path / "file"), StorageError, "Cannot write"),
        (make_job(inbox, tiny_classifier, output, engine=int8), ConfigError, "calibration"),
        (make_job(inbox, tiny_classifier, output, engine=gpu), ConfigError, "GPU"),
        (make_job(inbox, tiny_classifier, output, labels="no.csv"), DataError, "No labels"),
        (
            make_job(inbox, tiny_classifier, output, labels=str(tmp_path / "labels.csv")),
            DataError,
            "Unknown class 'sarcoma'",
        ),
    ]
    for job, error, message in cases:
        with pytest.raises(error, match=message):
            classify(job)
        assert not storage.exists(str(output / "predictions"))


@pytest.mark.usefixtures("fake_engine")
def test_an_inbox_without_a_visible_file_is_an_error(tiny_classifier: Path, tmp_path: Path) -> None:
    (tmp_path / "in" / ".cache").mkdir(parents=True)
    (tmp_path / "in" / ".cache" / "a.jpg").touch()
    with pytest.raises(DataError, match=r"No scans at .*/in: there is no visible file"):
        classify(make_job(tmp_path / "in", tiny_classifier, tmp_path / "out"))
    assert not list_files(tmp_path / "out")


@pytest.mark.usefixtures("fake_engine")
def test_a_table_without_images_is_a_one_line_error_and_exit_2(
    tiny_classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A Ray task raises the error; its traceback is not printed."""
    pq.write_table(pa.table({"x": [1]}), tmp_path / "other.parquet")
    words = ["classify", "--scans-uri", tmp_path / "other.parquet", "--output-uri", tmp_path / "o"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*map(str, words), "--classifier-uri", str(tiny_classifier)])
    line = capsys.readouterr().err
    assert ended.value.code == 2
    assert re.fullmatch(
        r"error: Expected a column 'image_bytes' in '.*other\.parquet', found x\.\n", line
    )


@pytest.mark.usefixtures("fake_engine")
def test_a_damaged_file_of_predictions_is_named_in_the_error(
    inbox: Path, tiny_classifier: Path, tmp_path: Path
) -> None:
    job = make_job(inbox, tiny_classifier, tmp_path / "out")
    classify(job)
    (file, *_) = list_files(tmp_path / "out")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(StorageError, match=rf"^'.*{file.name}' is damaged: .*Delete it.*again\.$"):
        classify(job)
    file.unlink()
    assert classify(job)["counts"]["total"] == len(list_scan_files(inbox))


def test_an_output_of_an_older_schema_is_an_error(
    inbox: Path, tiny_classifier: Path, tmp_path: Path
) -> None:
    (tmp_path / "out" / "predictions").mkdir(parents=True)
    (tmp_path / "out" / "predictions" / "0a1b-1-000000.parquet").touch()
    with pytest.raises(ConfigError, match="older schema"):
        classify(make_job(inbox, tiny_classifier, tmp_path / "out"))


def test_a_concurrent_run_on_the_same_output_is_an_error(
    inbox: Path, tiny_classifier: Path, tmp_path: Path
) -> None:
    with (
        hold_output(str(tmp_path / "out")),
        pytest.raises(ConfigError, match="Another run is writing"),
    ):
        classify(make_job(inbox, tiny_classifier, tmp_path / "out"))


# ------------------------------------------------------------------------- waves and failures


@pytest.fixture
def small_waves(fake_engine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a few scans to each file, and a few files in each wave."""
    del fake_engine
    monkeypatch.setattr(bulk_module, "choose_shard_rows", lambda *_: 3)
    monkeypatch.setattr(bulk_module, "SHARDS_PER_ENGINE", 2)


@pytest.fixture
def opened_waves(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Wave, set[str]]]:
    """Record each wave that a run opens, and the files that exist at that time."""
    opened: list[tuple[Wave, set[str]]] = []
    describe = PredictionStore.describe_wave

    def record(store: PredictionStore, wave: Wave) -> dict[str, Any]:
        opened.append((wave, set(store.list_files())))
        return describe(store, wave)

    monkeypatch.setattr(PredictionStore, "describe_wave", record)
    return opened


def check_complete(inbox: Path, output: Path, first: Sequence[dict[str, Any]] = ()) -> None:
    """Check that every scan has one row, and that the first rows are unchanged."""
    rows = read_rows(output)
    assert Counter(row["scan_uri"] for row in rows) == Counter(map(str, list_scan_files(inbox)))
    assert all(row in rows for row in first)
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["counts"]["total"] == len(rows)


def read_state(output: Path) -> dict[str, Any]:
    with hold_output(str(output)) as lock:
        return lock.state


@pytest.mark.usefixtures("small_waves")
def test_each_wave_is_in_the_lock_before_its_first_file_is_written(
    inbox: Path,
    tiny_classifier: Path,
    tmp_path: Path,
    opened_waves: list[tuple[Wave, set[str]]],
) -> None:
    output = tmp_path / "out"
    progress: list[tuple[int, int | None]] = []
    (inbox / "empty.jpg").touch()
    metrics = classify(
        make_job(inbox, tiny_classifier, output),
        on_progress=lambda now: progress.append((now.done, now.total)),
    )
    check_complete(inbox, output)
    assert [(wave.first_shard, wave.num_shards) for wave, _ in opened_waves] == [
        (0, 2),
        (2, 2),
        (4, 2),
        (6, 1),
    ]
    store = PredictionStore.of(str(output), read_classifier_metadata(str(tiny_classifier)))
    written: set[str] = set()
    for wave, existing in opened_waves:
        assert existing == written, "all files of earlier waves, and none of this one"
        written |= {store.name_file(wave.run, wave.part, shard) for shard in wave.list_shards()}
    assert set(store.list_files()) == written
    assert read_state(output) == {}
    assert progress[0] == (3, 21)
    assert progress[-1] == (21, 21)
    assert progress == sorted(progress)
    assert metrics["run"]["num_new"] == 21
    assert metrics["counts"]["by_reason"] == {"empty": 1}


@pytest.mark.usefixtures("small_waves")
def test_a_plan_of_several_parts_and_more_predictors_than_cpus(
    inbox: Path, tiny_classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "MAX_PART_ROWS", 12)
    output = tmp_path / "out"
    job = make_job(inbox, tiny_classifier, output, num_predictors=3, num_decoders=8)
    metrics = classify(job)
    check_complete(inbox, output)
    assert metrics["runtime"]["num_predictors"] == 3
    assert len({file.name.split("-")[2] for file in list_files(output)}) == 2, "two parts"


@pytest.mark.usefixtures("small_waves")
def test_an_interrupted_run_is_closed_and_resumed(
    inbox: Path, tiny_classifier: Path, tmp_path: Path
) -> None:
    """A stalled worker of the first run cannot add a row after the second run."""
    output = tmp_path / "out"
    job = make_job(inbox, tiny_classifier, output)

    def interrupt(progress: Progress) -> None:
        if progress.done >= 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        classify(job, on_progress=interrupt)
    state = read_state(output)
    wave = Wave(**state["wave"])
    assert (wave.first_shard, wave.num_shards) == (2, 2)
    # Tasks may have finished since. Delete a file, so that the next run has one to leave empty.
    store = PredictionStore.of(str(output), read_classifier_metadata(str(tiny_classifier)))
    late = store.name_file(wave.run, wave.part, 3)
    rows = pq.read_table(late, partitioning=None)
    Path(late).unlink()
    first = read_rows(output)
    with hold_output(str(output)) as lock:
        lock.update(state)

    printed: list[str] = []
    metrics = classify(job, log=printed.append)
    assert "The last run was interrupted; 1 of its files are left empty." in printed
    check_complete(inbox, output, first)
    assert metrics["run"]["num_new"] == 20 - len(first)
    with pytest.raises(LockLostError, match="Another run has taken over"):
        store.write_shard(late, rows, {"backend": "torch"}, {})
    check_complete(inbox, output, first)


def break_stream(
    monkeypatch: pytest.MonkeyPatch, action: Callable[[Iterator[Any]], Iterator[Any]]
) -> None:
    """Apply an action to each stream of finished shards."""
    stream = WavePredictor.stream

    def changed(run: Any, *arguments: Any) -> Iterator[Any]:  # noqa: ANN401
        return action(stream(run, *arguments))

    monkeypatch.setattr(WavePredictor, "stream", changed)


@pytest.mark.usefixtures("fake_engine")
def test_a_failed_wave_continues_with_the_other_shards(
    inbox: Path, tiny_classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if a worker dies after it wrote a shard."""
    monkeypatch.setattr(bulk_module, "choose_shard_rows", lambda *_: 3)
    left = iter([1, 2])

    def lose(done: Iterator[Any]) -> Iterator[Any]:
        count = next(left, 100)
        for number, shard in enumerate(done):
            if number == count:  # this shard is written, but not reported
                raise ActorDiedError
            yield shard

    break_stream(monkeypatch, lose)
    printed: list[str] = []
    metrics = classify(make_job(inbox, tiny_classifier, tmp_path / "out"), log=printed.append)
    assert sum("continuing with the other shards" in line for line in printed) == 2
    check_complete(inbox, tmp_path / "out")
    assert metrics["run"]["num_new"] == 20
    assert len(list_files(tmp_path / "out")) == 7


@pytest.mark.usefixtures("fake_engine")
def test_a_wave_that_keeps_failing_ends_in_an_error(
    inbox: Path, tiny_classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed: list[str] = []

    def break_at_once(_: Iterator[Any]) -> Iterator[Any]:
        raise ActorDiedError
        yield

    break_stream(monkeypatch, break_at_once)
    with pytest.raises(ClassificationError, match="3 times in a row without a new prediction"):
        classify(make_job(inbox, tiny_classifier, tmp_path / "out"), log=printed.append)
    assert sum("continuing with the other shards" in line for line in printed) == 2


@pytest.mark.usefixtures("small_waves")
def test_no_wave_begins_after_the_lock_is_lost(
    inbox: Path, tiny_classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next run can only close a wave that is in the lock."""
    opened: list[Wave] = []
    describe_wave = PredictionStore.describe_wave

    def lose(store: PredictionStore, wave: Wave) -> dict[str, Any]:
        opened.append(wave)
        if len(opened) == num_good + 1:
            raise LockLostError("This run has lost the output.")
        return describe_wave(store, wave)

    monkeypatch.setattr(PredictionStore, "describe_wave", lose)
    for num_good, output in ((0, tmp_path / "none"), (2, tmp_path / "two")):
        opened.clear()
        with pytest.raises(LockLostError):
            classify(make_job(inbox, tiny_classifier, output))
        good = [
            f"{wave.run}-0000-{shard:06d}.parquet"
            for wave in opened[:num_good]
            for shard in wave.list_shards()
        ]
        assert [file.name for file in list_files(output)] == good


@pytest.mark.usefixtures("small_waves")
def test_a_run_that_has_lost_its_lock_ends_after_the_next_shard(
    inbox: Path, tiny_classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int] = []

    def lose(_: OutputLock) -> None:
        if done:
            raise LockLostError("This run has lost the output.")

    with hold_output(str(tmp_path / "out")) as lock:
        monkeypatch.setattr(type(lock), "check", lose)
    with pytest.raises(LockLostError):
        classify(
            make_job(inbox, tiny_classifier, tmp_path / "out"),
            on_progress=lambda progress: done.append(progress.done),
        )
    assert done == [3]


@pytest.mark.slow
def test_twenty_thousand_damaged_scans_get_a_row_each(
    real_data: Path, tiny_classifier: Path, tmp_path: Path
) -> None:
    real = [path.read_bytes() for path in sorted(real_data.glob("Testing/*/*.jpg"))[::20]]
    drawn = list(SAMPLES.values())
    names = set()
    for seed in range(20_000):
        file = tmp_path / "inbox" / f"{seed // 1000:02d}" / f"{seed:05d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(mutate(random.Random(seed), real if seed % 2 else drawn))
        names.add(str(file))
    metrics = classify(make_job(tmp_path / "inbox", tiny_classifier, tmp_path / "out"))
    rows = read_rows(tmp_path / "out")
    assert len(rows) == len(names)
    assert {row["scan_uri"] for row in rows} == names
    for row in rows:
        probs = [row[f"prob_{name}"] for name in CLASSES]
        if row["status"] == "classified":
            assert row["reason"] is None
            assert sum(probs) == pytest.approx(1, abs=1e-5)
        else:
            assert row["status"] == "rejected"
            assert row["reason"] in REJECTION_REASONS
            assert probs == [None] * len(CLASSES)
    counts = metrics["counts"]["by_reason"]
    assert {"truncated", "corrupt", "too_large", "unsupported"} <= set(counts), counts
    print(metrics["counts"])  # noqa: T201 - shown with -s
