"""`brainray classify FILE…`: one row for every file, as text or as JSON."""

import gzip
import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from brainray import cli
from brainray.evaluation.evaluate import EvaluateJob
from brainray.images.dicom import hash_identifier
from brainray.images.slices import open_file, open_slice
from brainray.inference.options import ClassifyJob
from brainray.inference.schema import build_schema
from brainray.model.classifier import (
    DEFAULT_VARIABLE,
    SHIPPED_FOLDER,
    find_default_classifier,
    load_classifier,
    read_classifier_metadata,
)
from brainray.model.reasons import NOTICE
from brainray.serving.predictor import ModelOptions
from tests.conftest import CLASSES
from tests.dicom_files import make_mr
from tests.open_scans import load_image
from tests.reference import predict_eager

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory, phantom_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("files")
    content = next(phantom_folder.glob("Testing/glioma/*")).read_bytes()
    (folder / "scan.jpg").write_bytes(content)
    (folder / "[bold]\x1b[31mred\u202e.jpg").write_bytes(content)
    (folder / "short.jpg").write_bytes(content[:300])
    (folder / "empty.png").write_bytes(b"")
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = 0
    try:
        cli.main(["classify", *map(str, arguments)])
    except SystemExit as exit_:
        status = int(exit_.code or 0)
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_every_file_has_one_row_even_if_it_is_rejected(
    capsys: pytest.CaptureFixture[str], scans: Path, tiny_classifier: Path
) -> None:
    files = [*sorted(scans.iterdir()), scans / "nowhere.png", scans]
    status, out, err = run(capsys, *files, "--classifier-uri", tiny_classifier)
    assert (status, err) == (0, "")
    rows = [line for line in out.splitlines() if str(scans) in line]
    assert len(rows) == len(files)
    found = [
        next(word for word in (*CLASSES, "rejected") if word in row.replace(str(scans), "", 1))
        for row in rows
    ]
    (predicted,) = {word for word in found if word != "rejected"}
    is_scan = [file.suffix == ".jpg" and file.name != "short.jpg" for file in files]
    assert found == [predicted if valid else "rejected" for valid in is_scan]
    for row, valid in zip(rows, is_scan, strict=True):
        assert (" % " in row) is valid
    printed = "\n".join(rows)
    for reason in ("empty", "truncated", "missing", "unreadable"):
        assert f"{reason}: " in printed
    assert "\x1b" not in out, "an escape sequence of a file name was printed"
    assert "\u202e" not in out
    assert "[bold]" in out
    assert "--scans-uri" in rows[-1], "the row of a folder names the option for it"
    assert NOTICE in out


def test_json_holds_rows_of_the_prediction_table(
    capsys: pytest.CaptureFixture[str], scans: Path, tiny_classifier: Path
) -> None:
    names = (scans / "scan.jpg", scans / "short.jpg", scans / "nowhere.png")
    options = ("--classifier-uri", tiny_classifier, "--precision", "fp32")
    status, out, err = run(capsys, "--json", *names, *options)
    assert (status, err) == (0, "")
    body = json.loads(out)
    classifier = load_classifier(str(tiny_classifier))
    assert body["classifier_id"] == classifier.classifier_id
    assert (tuple(body["classes"]), body["notice"]) == (CLASSES, NOTICE)
    assert body["engine"]["precision"] == "fp32"
    scan, short, missing = body["predictions"]
    content = names[0].read_bytes()
    image = load_image(content, classifier.preprocessing)
    expected = predict_eager(classifier, image[None])[0]
    probs = [scan[f"prob_{name}"] for name in CLASSES]
    np.testing.assert_allclose(probs, expected, atol=1e-5)
    assert scan["predicted_class"] == CLASSES[int(expected.argmax())]
    assert scan["confidence"] == max(probs)
    assert len(str(scan["confidence"])) <= 12, "digits that a float32 does not have"
    assert scan["content_sha256"] == sha256(content).hexdigest()
    assert scan["scan_uri"] == str(names[0])
    assert (short["status"], short["reason"]) == ("rejected", "truncated")
    assert (missing["status"], missing["reason"]) == ("rejected", "missing")
    assert missing["content_sha256"] is None
    for row in (scan, short, missing):
        assert list(row) == build_schema(CLASSES).names


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a volume of 30 slices, a series of six DICOM files, and a report."""
    folder = tmp_path_factory.mktemp("volumes")
    rng = np.random.default_rng(0)
    voxels = np.zeros((40, 40, 30), np.int16)
    voxels[6:34, 6:34, 3:-3] = rng.integers(200, 900, (28, 28, 24))
    image = nib.Nifti1Image(voxels, np.diag([2.0, 2.0, 3.0, 1.0]))
    (folder / "brain.nii.gz").write_bytes(gzip.compress(image.to_bytes()))
    for number in range(6):
        pixels = rng.integers(0, 900, (48, 48)).astype(np.uint16)
        instance = {"SOPInstanceUID": f"1.2.3.{number}", "PatientID": "secret-7"}
        position = {"ImagePositionPatient": [-100, -90, 5 * number]}
        content = make_mr(pixels, **instance, **position)
        (folder / f"{number}.dcm").write_bytes(content)
    (folder / "again.dcm").write_bytes(content)
    (folder / "report.dcm").write_bytes(make_mr(Modality="SR"))
    return folder


def test_each_slice_has_a_row_and_each_series_a_summary(
    capsys: pytest.CaptureFixture[str], volumes: Path, tiny_classifier: Path, tmp_path: Path
) -> None:
    (tmp_path / "key").write_bytes(b"k" * 16)
    names = ["brain.nii.gz", *(f"{number}.dcm" for number in range(6)), "again.dcm", "report.dcm"]
    options = ("--classifier-uri", tiny_classifier, "--id-key-file", tmp_path / "key")
    files = [volumes / name for name in names]
    status, out, err = run(capsys, "--json", *files, *options, "--rule.min-run", 1)
    assert (status, err) == (0, "")
    assert "secret-7" not in out
    assert "1.2.3." not in out
    body = json.loads(out)
    rows = {row["scan_uri"].removeprefix(f"{volumes}/"): row for row in body["predictions"]}
    expected = [*(f"brain.nii.gz#frame={number}" for number in range(30)), *names[1:]]
    assert list(rows) == expected
    file = open_file(files[0].read_bytes())
    classifier = load_classifier(str(tiny_classifier))
    image = open_slice(file, 9, classifier.preprocessing).scan.image
    row = rows["brain.nii.gz#frame=9"]
    probs = [row[f"prob_{name}"] for name in CLASSES]
    np.testing.assert_allclose(probs, predict_eager(classifier, image[None])[0], atol=0.01)
    assert (row["plane"], row["position_mm"], row["width_px"]) == ("axial", 27.0, 40)
    assert (rows["brain.nii.gz#frame=0"]["reason"], rows["report.dcm"]["reason"]) == (
        "little_tissue",
        "not_an_image_object",
    )
    volume, series = body["series"]
    assert (volume["num_slices"], volume["num_used"]) == (30, 24)
    assert volume["skipped"] == {"little_tissue": 6}
    assert (series["num_slices"], series["skipped"]) == (7, {"duplicate": 1})
    assert series["patient"] == hash_identifier("secret-7", b"k" * 16)
    assert series["series"] == rows["0.dcm"]["series"]
    for one in body["series"]:
        assert set(one["key_slices"]) <= {row["scan_uri"] for row in body["predictions"]}
        assert one["evidence"].keys() == set(CLASSES)


def test_slices_are_summarised_and_listed_only_with_the_option_slices(
    capsys: pytest.CaptureFixture[str], volumes: Path, tiny_classifier: Path
) -> None:
    options = ("--classifier-uri", tiny_classifier)
    arguments = (volumes / "brain.nii.gz", volumes / "0.dcm", *options)
    _, out, _ = run(capsys, *arguments)
    assert out.index("key slices") < out.index("30 slices")
    assert "24 of 30 used, 6 little_tissue" in out
    assert "Slice evidence: not calibrated for series or patients." in out
    assert f"{volumes}/brain.nii.gz#frame=9" not in out
    assert f"{volumes}/0.dcm" in out
    _, out, _ = run(capsys, *arguments, "--slices")
    for number in range(30):
        assert f"{volumes}/brain.nii.gz#frame={number} " in out


def test_volumes_are_sliced_along_the_given_plane(
    capsys: pytest.CaptureFixture[str], volumes: Path, tiny_classifier: Path
) -> None:
    arguments = ("--json", volumes / "brain.nii.gz", "--classifier-uri", tiny_classifier)
    _, out, _ = run(capsys, *arguments, "--plane", "coronal")
    rows = json.loads(out)["predictions"]
    assert len(rows) == 40
    assert {row["plane"] for row in rows} == {"coronal"}


def test_a_short_key_is_rejected(
    capsys: pytest.CaptureFixture[str], volumes: Path, tiny_classifier: Path, tmp_path: Path
) -> None:
    (tmp_path / "key").write_bytes(b"short")
    arguments = (volumes / "0.dcm", "--classifier-uri", tiny_classifier)
    status, out, err = run(capsys, *arguments, "--id-key-file", tmp_path / "key")
    assert (status, out) == (2, "")
    assert "at least 16 bytes" in err


def test_a_file_above_the_size_limit_has_no_hash(
    capsys: pytest.CaptureFixture[str], scans: Path, tiny_classifier: Path
) -> None:
    limit = ("--limits.max-bytes", 200)
    _, out, _ = run(
        capsys, "--json", scans / "scan.jpg", "--classifier-uri", tiny_classifier, *limit
    )
    (row,) = json.loads(out)["predictions"]
    assert (row["reason"], row["content_sha256"]) == ("too_large", None)


def test_a_user_error_prints_one_line_and_exits_with_2(
    capsys: pytest.CaptureFixture[str], scans: Path, tiny_classifier: Path
) -> None:
    scan = scans / "scan.jpg"
    for arguments, printed in (
        ((scan, "--classifier-uri", scans), "No classifier at"),
        (
            (scan, "--classifier-uri", tiny_classifier, "--scans-uri", scans),
            "Got files and --scans-uri",
        ),
        ((f"--scans-uri={scans}", scan), "Got files and --scans-uri"),
        ((scan, "--labels", "folder"), "Got files and --labels"),
    ):
        status, out, err = run(capsys, *arguments)
        assert (status, out) == (2, "")
        assert printed in err
        assert err.count("\n") == 1


def test_the_default_classifier_is_set_by_the_environment_or_is_the_shipped_one(
    capsys: pytest.CaptureFixture[str],
    scans: Path,
    tiny_classifier: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv(DEFAULT_VARIABLE, str(tiny_classifier))
    status, out, _ = run(capsys, scans / "scan.jpg")
    assert status == 0
    assert read_classifier_metadata(str(tiny_classifier))["classifier_id"] in out
    monkeypatch.setenv(DEFAULT_VARIABLE, str(tmp_path))
    status, out, err = run(capsys, scans / "scan.jpg")
    assert (status, out) == (2, "")
    assert f"No classifier at '{tmp_path}'" in err
    monkeypatch.delenv(DEFAULT_VARIABLE)
    assert find_default_classifier() == str(SHIPPED_FOLDER)
    for job in (ClassifyJob(scans_uri=(), output_uri=""), EvaluateJob(data_uri="", output_uri="")):
        assert job.classifier_uri == str(SHIPPED_FOLDER)
    assert ModelOptions().classifier_uri == str(SHIPPED_FOLDER)


def test_without_scans_the_error_names_files_and_scans_uri(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for arguments in (["--classifier-uri", "c"], [], ["--scans-uri", "in"]):
        status, out, err = run(capsys, *arguments)
        assert (status, out) == (2, "")
        assert "FILE" in err
        assert "--scans-uri" in err
        assert err.count("\n") == 1
    status, out, _ = run(capsys, "--help")
    assert status == 0
    assert "--output-uri" in out
    assert "FILE" in out


def test_an_error_about_a_mistyped_option_suggests_the_right_one(
    capsys: pytest.CaptureFixture[str], scans: Path
) -> None:
    status, _, err = run(capsys, "--jsn", scans / "scan.jpg")
    assert status == 2
    assert "--json" in err


def test_neither_ray_nor_torch_is_loaded(scans: Path, tiny_classifier: Path) -> None:
    script = (
        "import sys; from brainray.cli import main; main(); "
        "found = {'ray', 'torch', 'sklearn', 'scipy', 'boto3'} & set(sys.modules); "
        "assert not found, found"
    )
    arguments = ["classify", str(scans / "scan.jpg"), "--classifier-uri", str(tiny_classifier)]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"COLUMNS": "80"},
    )
    assert done.returncode == 0, done.stderr
    assert any(name in done.stdout for name in CLASSES)
