"""`brainray classify FILE…`: one row for every file, for a person or as JSON."""

import dataclasses
import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from brainray import cli
from brainray.evaluation.evaluate import EvaluateJob
from brainray.images.decode import DecodeLimits
from brainray.images.preprocess import load_image
from brainray.inference import files
from brainray.inference.bulk import ClassifyJob
from brainray.inference.engine import EngineOptions
from brainray.inference.files import find_files, run_files
from brainray.inference.schema import build_schema
from brainray.model.classifier import load_classifier, read_card
from brainray.model.reasons import NOTICE
from brainray.model.shipped import DEFAULT_VARIABLE, SHIPPED_FOLDER, find_default_classifier
from brainray.serving.predictor import ModelOptions
from tests.conftest import CLASSES
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
        run_files([str(argument) for argument in arguments])
    except SystemExit as exit_:
        status = int(exit_.code or 0)
    said = capsys.readouterr()
    return status, said.out, said.err


def test_every_file_has_one_row_whatever_is_the_matter(
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
    (named,) = {word for word in found if word != "rejected"}
    is_scan = [file.suffix == ".jpg" and file.name != "short.jpg" for file in files]
    assert found == [named if yes else "rejected" for yes in is_scan]
    for row, yes in zip(rows, is_scan, strict=True):
        assert (" % " in row) is yes
    said = "\n".join(rows)
    for reason in ("empty", "truncated", "missing", "unreadable"):
        assert f"{reason}: " in said
    assert "\x1b" not in out, "a file name moves the cursor"
    assert "\u202e" not in out
    assert "[bold]" in out
    assert "--scans-uri" in rows[-1], "a folder is told its door"
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
    image = load_image(content, classifier.preprocessing, DecodeLimits())
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


def test_a_file_that_was_not_read_to_its_end_has_no_hash(
    capsys: pytest.CaptureFixture[str], scans: Path, tiny_classifier: Path
) -> None:
    limit = ("--limits.max-bytes", 200)
    _, out, _ = run(
        capsys, "--json", scans / "scan.jpg", "--classifier-uri", tiny_classifier, *limit
    )
    (row,) = json.loads(out)["predictions"]
    assert (row["reason"], row["content_sha256"]) == ("too_large", None)


def test_what_can_be_mended_is_one_line_and_exit_2(
    capsys: pytest.CaptureFixture[str], scans: Path, tiny_classifier: Path
) -> None:
    scan = scans / "scan.jpg"
    for words, said in (
        ((scan, "--classifier-uri", scans), "No classifier at"),
        (
            (scan, "--classifier-uri", tiny_classifier, "--scans-uri", scans),
            "Got files and --scans-uri",
        ),
        ((scan, f"--scans-uri={scans}"), "Got files and --scans-uri"),
    ):
        status, out, err = run(capsys, *words)
        assert (status, out) == (2, "")
        assert said in err
        assert err.count("\n") == 1


def test_the_default_classifier_is_the_one_of_the_environment_else_the_projects(
    capsys: pytest.CaptureFixture[str],
    scans: Path,
    tiny_classifier: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv(DEFAULT_VARIABLE, str(tiny_classifier))
    status, out, _ = run(capsys, scans / "scan.jpg")
    assert status == 0
    assert read_card(str(tiny_classifier))["classifier_id"] in out
    monkeypatch.setenv(DEFAULT_VARIABLE, str(tmp_path))
    status, out, err = run(capsys, scans / "scan.jpg")
    assert (status, out) == (2, "")
    assert f"No classifier at '{tmp_path}'" in err
    monkeypatch.delenv(DEFAULT_VARIABLE)
    assert find_default_classifier() == str(SHIPPED_FOLDER)
    for job in (ClassifyJob(scans_uri=(), output_uri=""), EvaluateJob(data_uri="", output_uri="")):
        assert job.classifier_uri == str(SHIPPED_FOLDER)
    assert ModelOptions().classifier_uri == str(SHIPPED_FOLDER)


@pytest.mark.parametrize(
    ("arguments", "files"),
    [
        (["a.png", "--classifier-uri", "c"], ["a.png"]),
        (["--classifier-uri", "c", "a.png", "b.png"], ["a.png", "b.png"]),
        (["--json", "a.png", "--classifier-uri=c", "b.png"], ["a.png", "b.png"]),
        (["--classifier-uri", "c", "--", "--odd.png"], ["--odd.png"]),
        (["--scans-uri", "in", "--scans-uri=more", "--output-uri", "o", "--explain"], []),
        (["--scans-uri", "in", "--no-use-gpu", "a.png"], ["a.png"]),
        (["--help"], []),
        (["-h"], []),
        ([], []),
    ],
)
def test_files_are_told_from_options(arguments: list[str], files: list[str]) -> None:
    assert find_files(arguments) == files


def test_every_option_without_a_value_is_known() -> None:
    kinds: tuple[Any, ...] = (ClassifyJob, files.FilesJob, EngineOptions)
    flags = {
        f"--{prefix}{field.name.replace('_', '-')}"
        for kind in kinds
        for field in dataclasses.fields(kind)
        if field.type in (bool, "bool")
        for prefix in ("", "no-")
    }
    assert flags | {"--verbose", "--no-verbose"} == set(files.FLAGS)


def test_both_doors_lead_here_and_the_bulk_job_stays_where_it_was(
    capsys: pytest.CaptureFixture[str], scans: Path, tiny_classifier: Path
) -> None:
    cli.main(["classify", str(scans / "scan.jpg"), "--classifier-uri", str(tiny_classifier)])
    assert NOTICE in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        cli.main(["classify", "--classifier-uri", "c"])
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert "FILE" in err
    assert "--scans-uri" in err
    assert err.count("\n") == 1
    with pytest.raises(SystemExit) as caught:
        cli.main(["classify", "--help"])
    assert caught.value.code == 0
    help_text = capsys.readouterr().out
    assert "--output-uri" in help_text
    assert "brainray classify FILE" in help_text


def test_no_ray_is_loaded(scans: Path, tiny_classifier: Path) -> None:
    script = (
        "import sys; from brainray.__main__ import main; main(); "
        "assert not {'ray', 'sklearn', 'tensorboard'} & set(sys.modules), 'loaded'"
    )
    words = ["classify", str(scans / "scan.jpg"), "--classifier-uri", str(tiny_classifier)]
    done = subprocess.run(
        [sys.executable, "-c", script, *words],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"COLUMNS": "80"},
    )
    assert done.returncode == 0, done.stderr
    assert any(name in done.stdout for name in CLASSES)
