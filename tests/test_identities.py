"""No output contains an identifier of a patient, whether a file is classified or rejected."""

import asyncio
import json
import logging
import os
import subprocess
import sys
import textwrap
import traceback
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from brainray import cli
from brainray.data.slice_columns import describe_slice
from brainray.errors import RejectedImage
from brainray.export import dicom as export_dicom
from brainray.images.preprocess import Preprocessing
from brainray.images.slices import OpenedSlice, name_slice
from brainray.inference import bulk as bulk_module
from brainray.inference.schema import SCAN_SCHEMA, build_rows
from brainray.inference.series import summarise_series
from tests.bulk_output import write_output
from tests.conftest import CLASSES, REPOSITORY
from tests.dicom_files import make_mr
from tests.fakes import FakeEngine, prepare_fake_engine
from tests.identities import (
    FILE_NAME,
    NAME,
    TOKENS,
    find_tokens,
    find_tokens_in_folder,
    make_objects,
)
from tests.open_scans import open_slices
from tests.service import LocalPredictor, build_test_app, open_client, open_predictor

KEY = b"0123456789abcdef"


@pytest.fixture(scope="module")
def objects() -> dict[str, bytes]:
    return make_objects()


@pytest.fixture
def folder(objects: dict[str, bytes], tmp_path: Path) -> Path:
    """Write the objects under file names without a token."""
    scans = tmp_path / "scans"
    scans.mkdir()
    for name, content in objects.items():
        (scans / f"{name}.dcm").write_bytes(content)
    return scans


def check_logs(caplog: pytest.LogCaptureFixture) -> None:
    """Check all captured log records, and their exceptions."""
    assert find_tokens(caplog.text) == []
    for record in caplog.records:
        assert find_tokens(repr(record.__dict__)) == [], record.name


def test_the_search_finds_every_planted_token(objects: dict[str, bytes], tmp_path: Path) -> None:
    """Otherwise the tests below could not fail."""
    found = {token for content in objects.values() for token in find_tokens(content)}
    assert found == set(TOKENS)
    for form in ("{}", "é {}", "x{}", "xy{}"):
        for token in TOKENS:
            text = form.format(token)
            assert find_tokens(text) == [token]
            assert find_tokens(json.dumps({"a": text})) == [token]
            assert find_tokens(text.encode("utf-16")) == [token]
    for name, token in (("a", TOKENS[0]), ("b", TOKENS[1])):
        table = pa.table({"column": [token * 3] * 99}).replace_schema_metadata({"x": TOKENS[2]})
        pa.parquet.write_table(table, tmp_path / f"{name}.parquet", compression="zstd")
    (tmp_path / f"{FILE_NAME}.txt").write_text("nothing")
    assert {name: set(tokens) for name, tokens in find_tokens_in_folder(tmp_path).items()} == {
        "a.parquet": {TOKENS[0], TOKENS[2]},
        "b.parquet": {TOKENS[1], TOKENS[2]},
    }
    assert f"{FILE_NAME}.txt" in find_tokens_in_folder(tmp_path, and_file_names=True)


@pytest.mark.parametrize("has_key", [True, False])
def test_rows_and_series_contain_no_identifier(objects: dict[str, bytes], has_key: bool) -> None:
    preprocessing = Preprocessing(size_px=32, intensity="percentile")
    engine = FakeEngine(CLASSES, preprocessing)
    scans, images = [], []
    for name, content in objects.items():
        scan = dict.fromkeys(SCAN_SCHEMA.names) | {"scan_uri": f"/scans/{name}.dcm"}
        try:
            slices = list(open_slices(content, preprocessing, key=KEY if has_key else None))
        except RejectedImage as rejection:
            scans.append(scan | {"reason": rejection.reason})
            continue
        for one in slices:
            is_open = isinstance(one, OpenedSlice)
            info = one.info if is_open else one[0]
            row = scan | describe_slice(info, one.grey_range if is_open else None)
            row["scan_uri"] = name_slice(str(row["scan_uri"]), info.frame)
            scans.append(row if is_open else row | {"reason": one[1].reason})
            images += [one.scan.image] if is_open else []
    rows = build_rows(
        pa.Table.from_pylist(scans, schema=SCAN_SCHEMA),
        engine.predict(np.stack(images)),
        classes=CLASSES,
        classifier_id="abc",
        engine=engine.describe(),
    ).to_pylist()
    assert find_tokens(repr(rows)) == []
    valid = [row for row in rows if "valid" in row["scan_uri"]]
    assert [row["reason"] for row in valid] == [None] * 8
    assert len({row["series"] for row in valid}) == 1
    assert (valid[0]["series"] is not None) == has_key
    summary = summarise_series(valid, CLASSES)
    assert summary["num_used"] == 8
    assert find_tokens(repr(summary)) == []
    assert {"truncated", "corrupt", "not_mr", "burned_in", "no_pixels"} <= {
        row["reason"] for row in rows
    }


def test_rejections_contain_no_identifier(objects: dict[str, bytes]) -> None:
    """Checks all that a logger may print: traceback, arguments, attributes and context."""
    rejections: dict[str, BaseException] = {}
    for name, content in objects.items():
        try:
            list(open_slices(content, Preprocessing(size_px=32), key=KEY))
        except RejectedImage as rejection:
            rejections[name] = rejection
    assert len(rejections) > 15
    for name, rejection in rejections.items():
        printed = "".join(traceback.format_exception(rejection))
        assert find_tokens(printed) == [], name
        assert find_tokens(repr((rejection.args, vars(rejection)))) == [], name
        assert rejection.__context__ is None, name


SCRIPT = """
    import logging, sys, warnings
    from pathlib import Path
    from brainray.errors import RejectedImage
    from brainray.images.preprocess import Preprocessing
    from brainray.images.slices import open_file, open_slice
    logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
    if sys.argv[2] == "reset":
        warnings.simplefilter("always")
    for path in sorted(Path(sys.argv[1]).iterdir()):
        try:
            file = open_file(path.read_bytes(), key=b"k" * 16)
            print(path.stem, file, "" if file.format == "picture" else vars(file))
            for index in range(len(file.slices)):
                print(open_slice(file, index, Preprocessing(size_px=32)), file.render(index)[1])
        except RejectedImage:
            logging.exception("rejected")
"""


@pytest.mark.heavy
@pytest.mark.parametrize("filters", ["kept", "reset"])
def test_a_process_with_all_logs_and_warnings_prints_no_identifier(
    folder: Path, filters: str
) -> None:
    """Runs another process, because pytest changes the warning filters and the loggers."""
    if filters == "reset":  # only a warning filter keeps pydicom from quoting its value
        (folder / "malformed-SpecificCharacterSet.dcm").unlink()
    paths = [str(REPOSITORY), *filter(None, sys.path)]
    command = [sys.executable, "-W", "default", "-X", "dev", "-c", textwrap.dedent(SCRIPT)]
    done = subprocess.run(
        [*command, str(folder), filters],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.count(b"valid") >= 8
    assert done.stderr.count(b"RejectedImage") > 15
    assert find_tokens(done.stdout) == []
    assert find_tokens(done.stderr) == []


@pytest.mark.parametrize("form", [["--json"], []])
def test_classifying_files_prints_no_identifier(
    folder: Path,
    tiny_classifier: Path,
    form: list[str],
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    files = [str(path) for path in sorted(folder.iterdir())]
    options = ["--classifier-uri", str(tiny_classifier), "--precision", "fp32"]
    with warnings.catch_warnings(record=True) as warned:
        cli.main(["classify", *form, *files, *options])
    out, err = capfd.readouterr()
    assert len(out.splitlines()) >= len(files), "fewer lines than files"
    assert (find_tokens(out), find_tokens(err)) == ([], [])
    assert (
        find_tokens(repr([str(one.message) for one in warned if "brainray" in one.filename])) == []
    )
    check_logs(caplog)


def test_http_answers_contain_no_identifier(
    objects: dict[str, bytes],
    tiny_classifier: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each object is sent as a body, and in a form with others, under a name without a token."""
    caplog.set_level(logging.DEBUG)
    log_path = tmp_path / "access.log"
    app = build_test_app(LocalPredictor(open_predictor(tiny_classifier)), log_path=log_path)

    async def send_objects() -> list[bytes]:
        parts = []
        async with open_client(app) as client:
            for content in objects.values():
                headers = {"content-type": "application/dicom"}
                for path in ("/v1/classify", "/v1/explain"):
                    answer = await client.post(path, content=content, headers=headers)
                    assert answer.status_code < 500
                    parts.append(answer.content + repr(answer.headers).encode())
            names = sorted(objects)
            for start in range(0, len(names), 8):
                files = [("files", (f"{name}.dcm", objects[name])) for name in names[start:][:8]]
                answer = await client.post("/v1/classify", files=files)
                assert answer.status_code < 500
                parts.append(answer.content)
            for path in ("/metrics", "/v1/model"):
                parts.append((await client.get(path)).content)
        return parts

    for part in asyncio.run(send_objects()):
        assert find_tokens(part) == []
    assert find_tokens_in_folder(tmp_path) == {}
    check_logs(caplog)


# ---- the bulk job --------------------------------------------------------------------------------


@pytest.fixture
def named_folder(objects: dict[str, bytes], tmp_path: Path) -> Path:
    """Write the objects into a folder and files that are named after the patient."""
    scans = tmp_path / f"{FILE_NAME}^1962"
    scans.mkdir()
    for name, content in objects.items():
        (scans / f"{FILE_NAME}-{name}.dcm").write_bytes(content)
    (scans / f"{FILE_NAME}-picture.txt").write_bytes(b"no scan")
    (scans / f"{FILE_NAME}-many.dcm").write_bytes(make_mr(np.ones((3, 8, 8), np.uint16)))
    return scans


@pytest.mark.parametrize("redacts", [True, False])
@pytest.mark.usefixtures("local_ray")
def test_a_bulk_job_writes_and_prints_no_identifier(
    named_folder: Path,
    tiny_classifier: Path,
    tmp_path: Path,
    redacts: bool,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Checks tables, footers, metrics, report and console; the second run resumes."""
    monkeypatch.setattr(bulk_module, "prepare_engine", prepare_fake_engine)
    key = tmp_path / "key"
    key.write_bytes(KEY)
    output = tmp_path / "out"
    arguments = ["--scans-uri", named_folder, "--output-uri", output, "--id-key-file", key]
    arguments += ["--classifier-uri", tiny_classifier, "--max-rejected", "100%"]
    for _ in range(2):
        cli.main(["classify", *map(str, arguments), *["--redact-paths"] * redacts])
    printed = "".join(capfd.readouterr())
    names = {path.name for path in output.rglob("*")}
    assert "report.html" in names
    assert "series.parquet" in names
    assert find_tokens_in_folder(output, and_file_names=redacts) == {}
    assert find_tokens(printed, and_file_names=redacts) == []
    if not redacts:
        assert find_tokens_in_folder(output, and_file_names=True), "paths are kept by default"
    assert KEY not in b"".join(path.read_bytes() for path in output.rglob("*") if path.is_file())


# ---- the de-identified export --------------------------------------------------------------------


@pytest.mark.parametrize("redacts", [True, False])
@pytest.mark.parametrize("images", ["png", "dicom", "none"])
def test_a_deidentified_export_contains_no_identifier(
    named_folder: Path,
    tmp_path: Path,
    images: str,
    redacts: bool,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Checks tables, images, settings and console; a second run lacks half of the scans."""
    caplog.set_level(logging.DEBUG)
    files = sorted(named_folder.iterdir())
    write_output(tmp_path / "predicted", files, redact_paths=redacts)
    output = tmp_path / "research"
    arguments = ["--deidentify", "--predictions-uri", tmp_path / "predicted"]
    arguments += ["--output-uri", output, "--images", images, "--dates", "shift"]
    arguments += ["--scans-uri", named_folder] * redacts
    cli.main(["export", *map(str, arguments)])
    rows = pa.parquet.read_table(output / "data").to_pylist()
    assert sum(row["outcome"] == "exported" for row in rows) > 20
    assert (images == "none") == (not list(output.glob("images/*/*")))
    assert find_tokens_in_folder(output, and_file_names=True) == {}
    for file in files[::2]:
        file.unlink()
    for table in output.glob("data/*"):
        table.unlink()
    cli.main(["export", *map(str, arguments)])
    assert find_tokens_in_folder(output, and_file_names=True) == {}
    assert find_tokens("".join(capfd.readouterr()), and_file_names=True) == []
    check_logs(caplog)


def test_a_failing_export_contains_no_identifier(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A library's exception that quotes the object is not written into an outcome."""

    def fail(dataset: object) -> bytes:
        raise ValueError(f"{NAME} {dataset}")

    monkeypatch.setattr(export_dicom, "_encode", fail)
    write_output(tmp_path / "predicted", sorted(folder.iterdir()))
    output = tmp_path / "research"
    arguments = ["--deidentify", "--images", "dicom", "--output-uri", str(output)]
    cli.main(["export", *arguments, "--predictions-uri", str(tmp_path / "predicted")])
    rows = pa.parquet.read_table(output / "data").to_pylist()
    assert {row["outcome"] for row in rows} == {"rejected"}
    assert find_tokens_in_folder(output, and_file_names=True) == {}
    assert find_tokens("".join(capfd.readouterr())) == []
