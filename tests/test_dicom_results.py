"""DICOM results: the content of the objects, no error of a validator, and no duplicate objects."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from brainray import cli
from brainray.dicom_results import destinations
from brainray.dicom_results.codes import read_codes
from brainray.dicom_results.objects import KINDS, NOTICE, derive_uid
from brainray.dicom_results.report import RESULTS_FILE, ReportJob, report_dicom
from brainray.dicom_results.summary_page import HEIGHT_PX, WIDTH_PX
from brainray.errors import ConfigError, DataError, DicomResultsError
from brainray.inference import sources as sources_module
from tests.bulk_output import (
    CLASSES,
    CLASSIFIER_ID,
    predict_no_tumour,
    predict_weak_glioma,
    write_output,
)
from tests.conftest import REPOSITORY
from tests.dicom_files import RAMP, make_enhanced, make_item, make_mr
from tests.identities import find_tokens, find_tokens_in_folder, make_objects

pytest.importorskip("highdicom", reason="the extra `dicom` is not installed")

STUDY_UID, SERIES_UID = "1.2.826.0.1.3680043.9.77", "1.2.826.0.1.3680043.9.77.1"
KANJI_NAME = "Yamada^Tarou=山田^太郎=やまだ^たろう"
PATIENT = {
    "PatientName": "Doe^Jane",
    "PatientID": "P-7",
    "PatientBirthDate": "19620317",
    "PatientSex": "F",
    "StudyInstanceUID": STUDY_UID,
    "StudyDate": "20260228",
    "StudyTime": "101112",
    "StudyID": "S-7",
    "AccessionNumber": "A-7",
    "ReferringPhysicianName": "House^Gregory",
    "StudyDescription": "MR head",
    "SeriesInstanceUID": SERIES_UID,
    "SeriesNumber": 5,
}


# ---- sources -------------------------------------------------------------------------------------


def make_slices(count: int = 10, **elements: Any) -> list[bytes]:  # noqa: ANN401
    """Make a classic series; an element set to None is deleted."""
    slices = []
    for index in range(count):
        own = {
            "SOPInstanceUID": f"{SERIES_UID}.{index + 1}",
            "InstanceNumber": index + 1,
            "ImagePositionPatient": [-100, -90, 5 * index],
        }
        pixels = np.roll(RAMP, index, 0)
        content = make_mr(pixels, **(PATIENT | own | elements))
        slices.append(content)
    return slices


def make_frames(count: int = 10) -> list[bytes]:
    """Make an enhanced object."""
    shared = make_item(
        PlaneOrientationSequence=[make_item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
        PixelMeasuresSequence=[make_item(PixelSpacing=[1.0, 1.0], SliceThickness=5)],
    )
    own = [
        make_item(PlanePositionSequence=[make_item(ImagePositionPatient=[0, 0, 5 * index])])
        for index in range(count)
    ]
    frames = np.stack([np.roll(RAMP, index, 0) for index in range(count)])
    return [make_enhanced(frames, shared, own, **PATIENT, SOPInstanceUID=f"{SERIES_UID}.1")]


def make_bare_slices() -> list[bytes]:
    """Make a series without half of its attributes, including those of the patient."""
    bare = []
    for content in make_slices(BodyPartExamined=None, PixelSpacing=None, ImagePositionPatient=None):
        dataset = pydicom.dcmread(io.BytesIO(content))
        for keyword in {*PATIENT, "InstanceNumber"} - {"StudyInstanceUID", "SeriesInstanceUID"}:
            del dataset[keyword]
        buffer = io.BytesIO()
        dataset.save_as(buffer)
        bare.append(buffer.getvalue())
    return bare


SOURCES: dict[str, Callable[[], list[bytes]]] = {
    "classic": make_slices,
    "enhanced": make_frames,
    "single frame": lambda: make_slices(1),
    "MONOCHROME1": lambda: make_slices(PhotometricInterpretation="MONOCHROME1"),
    "half of the attributes": make_bare_slices,
    "names in UTF-8": lambda: make_slices(
        SpecificCharacterSet="ISO_IR 192", PatientName=KANJI_NAME
    ),
    "names in JIS": lambda: make_slices(
        SpecificCharacterSet=["", "ISO 2022 IR 87"], PatientName=KANJI_NAME
    ),
    "a time zone and a single-component name": lambda: make_slices(
        TimezoneOffsetFromUTC="+0900", PatientName="Doe"
    ),
    "names in Latin-1": lambda: make_slices(
        SpecificCharacterSet="ISO_IR 100", PatientName="Müller^Jürgen"
    ),
    "an unknown character set": lambda: make_slices(SpecificCharacterSet="LATIN"),
    "malformed date and sex": lambda: make_slices(StudyDate="unknown", PatientSex="X"),
}


def write_files(folder: Path, contents: Sequence[bytes]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:03}.dcm" for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return paths


def report(tmp_path: Path, name: str = "objects", **changes: Any) -> dict[str, Any]:  # noqa: ANN401
    options = {"predictions_uri": str(tmp_path / "out"), "output_uri": str(tmp_path / name)}
    return report_dicom(ReportJob(**(options | changes)))


def read_objects(folder: Path) -> dict[str, Dataset]:
    """Return the objects of the only series, by kind."""
    return {path.stem: pydicom.dcmread(path) for path in folder.rglob("*.dcm")}


@pytest.fixture
def objects(tmp_path: Path) -> dict[str, Dataset]:
    """Return the objects of a classic series with a glioma."""
    write_output(tmp_path / "out", write_files(tmp_path / "in", make_slices()))
    report(tmp_path)
    return read_objects(tmp_path / "objects")


# ---- content of the objects ----------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy is not installed")
@pytest.mark.parametrize("source", SOURCES)
def test_a_validator_finds_no_error(source: str, tmp_path: Path) -> None:
    write_output(tmp_path / "out", write_files(tmp_path / "in", SOURCES[source]()))
    assert report(tmp_path)["num_objects_stored"] == 3
    for path in (tmp_path / "objects").rglob("*.dcm"):
        found = subprocess.run(["dciodvfy", path], capture_output=True, check=False)
        lines = (found.stdout + found.stderr).decode(errors="replace").splitlines()
        assert not [line for line in lines if line.startswith("Error")], (path.stem, lines)


@pytest.mark.parametrize("source", SOURCES)
def test_objects_have_the_patient_and_study_of_their_source(source: str, tmp_path: Path) -> None:
    contents = SOURCES[source]()
    write_output(tmp_path / "out", write_files(tmp_path / "in", contents))
    report(tmp_path)
    header = pydicom.dcmread(io.BytesIO(contents[0]))
    malformed = {"StudyDate", "PatientSex"} if source.startswith("malformed") else set()
    found = read_objects(tmp_path / "objects")
    assert set(found) == set(KINDS)
    for dataset in found.values():
        for keyword in {*PATIENT} - {"SeriesInstanceUID", "SeriesNumber"} - malformed:
            assert str(dataset.get(keyword, "")) == str(header.get(keyword, "")), keyword
        assert {str(dataset.get(keyword, "")) for keyword in malformed} <= {""}
        assert dataset.SeriesInstanceUID != header.SeriesInstanceUID
        assert NOTICE in dataset.SeriesDescription
    assert len({dataset.SeriesInstanceUID for dataset in found.values()}) == 3


def list_items(item: Dataset, depth: int = 0) -> list[str]:
    """Return the content tree of a report as lines."""
    value = ""
    if "MeasuredValueSequence" in item:
        measured = item.MeasuredValueSequence[0]
        unit = measured.MeasurementUnitsCodeSequence[0].CodeValue
        value = f"{float(measured.NumericValue):g} {unit}"
    elif "ConceptCodeSequence" in item:
        value = item.ConceptCodeSequence[0].CodeMeaning
    elif "ReferencedSOPSequence" in item:
        reference = item.ReferencedSOPSequence[0]
        frames = reference.get("ReferencedFrameNumber", "")
        value = f"{reference.ReferencedSOPInstanceUID} {frames}".strip()
    elif "TextValue" in item:
        value = item.TextValue
    name = item.ConceptNameCodeSequence[0].CodeMeaning
    lines = [f"{'  ' * depth}{name}: {value}".rstrip(": ")]
    for child in item.get("ContentSequence", []):
        lines += list_items(child, depth + 1)
    return lines


def find_groups(document: Dataset) -> list[list[str]]:
    """Return the lines of each measurement group."""
    groups: list[list[str]] = []
    for line in list_items(document):
        if line.strip() == "Measurement Group":
            groups.append([])
        elif groups:
            groups[-1].append(line.strip())
    return groups


def test_a_report_has_finding_certainty_and_key_images(objects: dict[str, Dataset]) -> None:
    document = objects["sr"]
    assert document.SOPClassUID.name == "Comprehensive 3D SR Storage"
    assert document.ContentTemplateSequence[0].TemplateIdentifier == "1500"
    assert (document.CompletionFlag, document.VerificationFlag) == ("COMPLETE", "UNVERIFIED")
    assert document.PreliminaryFlag == "PRELIMINARY"
    answer, *others = find_groups(document)
    assert "Finding: Glioma" in answer
    assert "Presence of property: Present" in answer
    assert "Certainty of Finding: 90 %" in answer
    assert "Longest run of neighbouring positions: 4 {slices}" in answer
    images = [line.split()[-1] for line in answer if line.startswith("Source of Measurement")]
    assert images == [f"{SERIES_UID}.{number}" for number in (3, 5, 1)], "no neighbours"
    findings = [line for group in others for line in group if line.startswith("Finding:")]
    assert findings == ["Finding: Intracranial meningioma", "Finding: Pituitary adenoma"]
    assert not [line for group in others for line in group if "Present" in line]
    evidence = document.CurrentRequestedProcedureEvidenceSequence[0]
    assert evidence.StudyInstanceUID == STUDY_UID
    (series,) = evidence.ReferencedSeriesSequence
    assert len(series.ReferencedSOPSequence) == 10


def test_a_report_names_the_algorithm_and_its_version(objects: dict[str, Dataset]) -> None:
    lines = [line.strip() for line in list_items(objects["sr"])]
    (version,) = {line for line in lines if line.startswith("Algorithm Version")}
    assert CLASSIFIER_ID in version
    assert any("threshold=0.5" in line and "min_run=3" in line for line in lines)
    text = json.dumps(objects["sr"].to_json_dict())
    assert derive_uid("device", "5a" * 32) in text


def test_frames_of_an_enhanced_object_are_referenced_by_number(tmp_path: Path) -> None:
    write_output(tmp_path / "out", write_files(tmp_path / "in", make_frames()))
    report(tmp_path)
    found = read_objects(tmp_path / "objects")
    lines = [line.strip() for line in list_items(found["sr"])]
    assert f"Source of Measurement: {SERIES_UID}.1 [1, 3, 5]" in lines
    assert f"Source: {SERIES_UID}.1 [1, 3, 5]" in [line.strip() for line in list_items(found["ko"])]
    assert found["sc"].SourceImageSequence[0].ReferencedFrameNumber == [1, 3, 5]


def test_no_tumour_is_reported_as_an_absent_finding(tmp_path: Path) -> None:
    files = write_files(tmp_path / "in", make_slices())
    write_output(tmp_path / "out", files, predict_no_tumour)
    report(tmp_path)
    answer, *others = find_groups(read_objects(tmp_path / "objects")["sr"])
    assert "Finding: Intracranial tumor" in answer
    assert "Presence of property: Absent" in answer
    assert not [line for line in answer if line.startswith("Certainty")]
    assert len(others) == 3


def test_a_series_without_an_answer_has_a_reason(tmp_path: Path) -> None:
    files = write_files(tmp_path / "in", make_slices())
    write_output(tmp_path / "out", files, predict_weak_glioma)
    report(tmp_path)
    answer, *_ = find_groups(read_objects(tmp_path / "objects")["sr"])
    assert "Presence of property: Undetermined" in answer
    assert "Reason why there is no answer: Weak evidence" in answer


def test_key_objects_reference_the_key_slices(objects: dict[str, Dataset]) -> None:
    document = objects["ko"]
    lines = [line.strip() for line in list_items(document)]
    assert lines[0] == "Of Interest"
    assert set(lines[-3:]) == {f"Source: {SERIES_UID}.{number}" for number in (1, 3, 5)}
    (series,) = document.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence
    assert series.SeriesInstanceUID == SERIES_UID


def test_the_summary_is_an_image_without_markers_or_names(objects: dict[str, Dataset]) -> None:
    page = objects["sc"]
    assert (page.Rows, page.Columns, page.SamplesPerPixel) == (HEIGHT_PX, WIDTH_PX, 3)
    assert page.BurnedInAnnotation == "NO"
    assert not page.PatientOrientation
    pixels = page.pixel_array
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 200, "text, lines and grey slices"
    is_coloured = np.ptp(pixels.astype(int), axis=2) > 60
    assert is_coloured[130:440, 1250:1560].any(), "the map of the first key slice"
    assert not is_coloured[130:440, 920:1230].any(), "the first key slice is grey"


def test_a_summary_without_class_maps_has_a_blank_area(tmp_path: Path) -> None:
    files = write_files(tmp_path / "in", make_slices())
    write_output(tmp_path / "out", files, with_maps=False)
    report(tmp_path)
    pixels = read_objects(tmp_path / "objects")["sc"].pixel_array
    assert len(np.unique(pixels[130:440, 1250:1560].reshape(-1, 3), axis=0)) == 1


# ---- each object once ----------------------------------------------------------------------------


def test_a_second_run_stores_nothing(tmp_path: Path) -> None:
    write_output(tmp_path / "out", write_files(tmp_path / "in", make_slices()))
    first = report(tmp_path)
    assert first["by_status"] == {"stored": 1}
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "objects").rglob("*.dcm")}
    assert len(before) == 3
    again = report(tmp_path)
    assert (again["num_objects_stored"], again["by_status"]) == (0, {"already_stored": 1})
    next(iter(before)).unlink()
    assert report(tmp_path)["num_objects_stored"] == 1
    changed = [path for path, time in before.items() if path.stat().st_mtime_ns != time]
    assert len(changed) == 1


def test_another_key_and_folder_give_the_same_objects(tmp_path: Path) -> None:
    contents = make_slices()
    found = []
    for name in ("a", "b"):
        write_output(tmp_path / name / "out", write_files(tmp_path / name / "in", contents))
        report(tmp_path / name)
        files = {path.stem: path for path in (tmp_path / name / "objects").rglob("*.dcm")}
        found.append({kind: path.read_bytes() for kind, path in files.items()})
        found.append(str(sorted(files["sr"].parts[-3:-1])))
    assert found[0] == found[2], "the objects must have the same bytes"
    assert found[1] != found[3], "folders are named by keyed hashes"


def test_another_slice_or_code_gives_another_object(tmp_path: Path) -> None:
    contents = make_slices(11)
    uids = []
    (tmp_path / "codes.json").write_text(
        json.dumps({"classes": {"glioma": {"finding": ["1", "99X", "G"], "presence": "present"}}})
    )
    for count, codes in ((10, None), (11, None), (11, str(tmp_path / "codes.json"))):
        files = write_files(tmp_path / "in", contents[:count])
        write_output(tmp_path / "out", files)
        report(tmp_path, codes_file=codes)
        found = read_objects(tmp_path / "objects")
        uids.append([found[kind].SOPInstanceUID for kind in KINDS])
        assert all(uid.startswith("2.25.") for uid in uids[-1])
    assert not set(uids[0]) & set(uids[1])
    assert uids[1][0] != uids[2][0]
    assert uids[1][1:] == uids[2][1:], "only the report has codes"


def test_a_killed_job_is_resumed(tmp_path: Path) -> None:
    for number in range(6):
        files = write_files(tmp_path / "in" / str(number), make_series(number))
        write_output(tmp_path / "out", files)
    options = ["--predictions-uri", tmp_path / "out", "--output-uri", tmp_path / "objects"]
    command = [sys.executable, REPOSITORY / "jobs" / "report_dicom.py", *options]
    job = subprocess.Popen(command, env=os.environ | {"RAY_ADDRESS": ""})
    deadline = time.monotonic() + 120
    while not list(tmp_path.rglob("ko.dcm")) and time.monotonic() < deadline:
        time.sleep(0.01)
    job.kill()
    assert job.wait() == -signal.SIGKILL
    before = list((tmp_path / "objects").rglob("*.dcm"))
    uids = {pydicom.dcmread(path).SOPInstanceUID for path in before}
    assert 1 <= len(uids) == len(before) < 18
    assert report(tmp_path)["num_objects_stored"] == 18 - len(before)
    paths = list((tmp_path / "objects").rglob("*.dcm"))
    after = {pydicom.dcmread(path).SOPInstanceUID for path in paths}
    assert len(after) == 18
    assert uids <= after


# ---- missing sources, and series without objects -------------------------------------------------


def make_series(number: int, count: int = 10) -> list[bytes]:
    """Make the slices of a study with this number."""
    uid = f"{STUDY_UID}.{number}"
    return [
        make_mr(
            np.roll(RAMP, index, 0),
            **(
                PATIENT
                | {"StudyInstanceUID": uid, "SeriesInstanceUID": f"{uid}.1"}
                | {"SOPInstanceUID": f"{uid}.1.{index}", "InstanceNumber": index + 1}
                | {"ImagePositionPatient": [0, 0, 5 * index]}
            ),
        )
        for index in range(count)
    ]


def test_sources_may_be_deleted_when_their_objects_are_stored(tmp_path: Path) -> None:
    files = write_files(tmp_path / "in", make_slices())
    write_output(tmp_path / "out", files)
    report(tmp_path)
    for path in files:
        path.unlink()
    assert report(tmp_path)["by_status"] == {"already_stored": 1}
    with pytest.raises(DicomResultsError, match="1 series"):
        report(tmp_path, check_again=True)


@pytest.mark.parametrize(
    ("damage", "reason"), [("missing", "is missing"), ("replaced", "another object")]
)
def test_a_series_that_fails_is_listed_and_the_others_are_stored(
    damage: str, reason: str, tmp_path: Path
) -> None:
    one = write_files(tmp_path / "in" / "1", make_series(1))
    two = write_files(tmp_path / "in" / "2", make_series(2))
    write_output(tmp_path / "out", one)
    write_output(tmp_path / "out", two)
    if damage == "missing":
        one[3].unlink()
    else:
        one[3].write_bytes(one[4].read_bytes())
    lines: list[str] = []
    job = ReportJob(predictions_uri=str(tmp_path / "out"), output_uri=str(tmp_path / "objects"))
    with pytest.raises(DicomResultsError, match="1 series have no DICOM results"):
        report_dicom(job, log=lines.append)
    document = json.loads((tmp_path / "objects" / RESULTS_FILE).read_text())
    assert document["by_status"] == {"failed": 1, "stored": 1}
    (failure,) = document["failures"]
    assert reason in failure["reason"]
    assert "003.dcm" in failure["reason"]
    assert any(failure["series"][:12] in line for line in lines)
    assert len(read_objects(tmp_path / "objects")) == 3


def test_localizers_and_rejected_series_get_no_objects(tmp_path: Path) -> None:
    planes = ([1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, -1], [0, 1, 0, 0, 0, -1])
    localizer = [
        make_slices(1, ImageOrientationPatient=plane, SOPInstanceUID=f"{SERIES_UID}.{number}")[0]
        for number, plane in enumerate(planes, 1)
    ]
    write_output(tmp_path / "out", write_files(tmp_path / "in", localizer))
    found = report(tmp_path)
    assert (found["by_status"], found["skipped"]) == ({"skipped": 1}, {"localizer": 1})
    assert not read_objects(tmp_path / "objects")


def test_an_output_with_redacted_paths_needs_its_scans(tmp_path: Path) -> None:
    files = write_files(tmp_path / "Doe", make_slices())
    write_output(tmp_path / "out", files, redact_paths=True)
    with pytest.raises(ConfigError, match="--scans-uri"):
        report(tmp_path)
    assert report(tmp_path, scans_uri=(str(tmp_path / "Doe"),))["num_objects_stored"] == 3
    assert "Doe" not in (tmp_path / "objects" / RESULTS_FILE).read_text()


def test_a_folder_that_is_no_output_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"series\.parquet"):
        report(tmp_path)
    write_output(tmp_path / "out", write_files(tmp_path / "in", make_slices(1)))
    (tmp_path / "key").write_bytes(b"0123456789abcdef")
    with pytest.raises(ConfigError, match="another key"):
        report(tmp_path, id_key_file=str(tmp_path / "key"))
    with pytest.raises(ConfigError, match="either --output-uri"):
        report(tmp_path, dicomweb_url="https://pacs.example")


# ---- codes ---------------------------------------------------------------------------------------


def test_a_code_table_replaces_single_codes(tmp_path: Path) -> None:
    table = tmp_path / "codes.toml"
    table.write_text('[concepts]\nsite = ["T-A0100", "SRT", "Brain"]\n')
    found = read_codes(CLASSES, str(table))
    assert found.concepts["site"] == ("T-A0100", "SRT", "Brain")
    assert found.classes == read_codes(CLASSES).classes
    table.write_text(
        '[classes.cyst]\nfinding = ["441457006", "SCT", "Cyst"]\npresence = "present"\n'
    )
    assert read_codes(["cyst"], str(table)).classes["cyst"].finding.meaning == "Cyst"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[classes", "Expected TOML"),
        ("[colours]", "'colours' is not known in the table"),
        ('[concepts]\nsites = ["1", "SCT", "Brain"]', "'sites' is not known in concepts"),
        ('[concepts]\nsite = ["1", "SCT"]', "Expected concepts.site"),
        ('[concepts]\nsite = ["12345678901234567", "SCT", "x"]', "1 to 16 printable"),
        ('[concepts]\nsite = ["1", "SCT", "a\\\\b"]', "without a backslash"),
        ('[classes.glioma]\nfinding = ["1", "SCT", "x"]', "classes.glioma.presence"),
        ("[classes]\nglioma = 1", "Expected names and values for classes.glioma"),
    ],
)
def test_a_wrong_code_table_is_an_error(text: str, message: str, tmp_path: Path) -> None:
    table = tmp_path / "codes.toml"
    table.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        read_codes(CLASSES, str(table))
    assert str(table) in str(error.value)


def test_a_class_without_a_code_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"none for cyst.*\[classes\.cyst\]"):
        read_codes([*CLASSES, "cyst"])


# ---- a PACS --------------------------------------------------------------------------------------


class FakePacs:
    """Stores received objects, as a DICOMweb service does."""

    def __init__(self) -> None:
        self.stored: dict[str, bytes] = {}
        self.refused: set[str] = set()
        self.forgotten: set[str] = set()
        self.num_requests = 0

    def has(self, study_uid: str, sop_instance_uid: str) -> bool:
        return sop_instance_uid in self.stored and bool(study_uid)

    def store(self, study_uid: str, objects: dict[str, bytes]) -> dict[str, str]:
        self.num_requests += 1
        failures = {}
        for uid, content in objects.items():
            dataset = pydicom.dcmread(io.BytesIO(content), stop_before_pixels=True)
            assert (dataset.StudyInstanceUID, dataset.SOPInstanceUID) == (study_uid, uid)
            if dataset.Modality in self.refused:
                failures[uid] = "0xA700"
            elif dataset.Modality not in self.forgotten:
                self.stored[uid] = content
        return failures


@pytest.fixture
def pacs(monkeypatch: pytest.MonkeyPatch) -> FakePacs:
    fake = FakePacs()
    monkeypatch.setattr(destinations, "open_client", lambda *_: fake)
    return fake


def send(tmp_path: Path, url: str = "https://pacs.example", **changes: Any) -> dict[str, Any]:  # noqa: ANN401
    return report(tmp_path, output_uri=None, dicomweb_url=url, **changes)


def test_objects_are_sent_once(pacs: FakePacs, tmp_path: Path) -> None:
    write_output(tmp_path / "out", write_files(tmp_path / "in", make_slices()))
    assert send(tmp_path, kinds=("ko",))["num_objects_stored"] == 1
    assert send(tmp_path)["num_objects_stored"] == 2
    assert (len(pacs.stored), pacs.num_requests) == (3, 2)
    assert send(tmp_path, "https://other.example")["by_status"] == {"already_stored": 1}
    assert send(tmp_path)["by_status"] == {"already_stored": 1}
    assert pacs.num_requests == 2
    del pacs.stored[next(iter(pacs.stored))]
    assert send(tmp_path, check_again=True)["num_objects_stored"] == 1
    assert (tmp_path / "out" / RESULTS_FILE).exists()


@pytest.mark.parametrize(
    ("trouble", "message"),
    [("refused", "refused the ko: 0xA700"), ("forgotten", "accepted the ko, and does not find it")],
)
def test_an_object_that_a_pacs_does_not_store_is_a_failure(
    trouble: str, message: str, pacs: FakePacs, tmp_path: Path
) -> None:
    write_output(tmp_path / "out", write_files(tmp_path / "in", make_slices()))
    getattr(pacs, trouble).add("KO")
    with pytest.raises(DicomResultsError, match="1 series"):
        send(tmp_path)
    (failure,) = json.loads((tmp_path / "out" / RESULTS_FILE).read_text())["failures"]
    assert message in failure["reason"]
    getattr(pacs, trouble).clear()
    assert send(tmp_path)["num_objects_stored"] == 1


# ---- identity ------------------------------------------------------------------------------------


def run_quietly(job: ReportJob, lines: list[str]) -> None:
    """Run the job; append the lines that the command would print."""
    try:
        report_dicom(job, log=lines.append)
    except DicomResultsError as error:
        lines.append(str(error))


def test_only_the_objects_contain_patient_identifiers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """No value of a header, however malformed, is in a message, a log or another file."""
    lines: list[str] = []
    files = make_objects()
    sets = {"valid": [content for name, content in files.items() if name.startswith("valid")]}
    sets |= {name: [content] for name, content in files.items() if "malformed" in name}
    sets["japanese"] = [files["name-in-japanese"]]
    with caplog.at_level(0):
        for name, contents in sets.items():
            folder = tmp_path / name
            paths = write_files(folder / "in", contents)
            write_output(folder / "out", paths, redact_paths=True)
            if not (folder / "out" / "series.parquet").exists():
                continue
            job = ReportJob(
                predictions_uri=str(folder / "out"),
                scans_uri=(str(folder / "in"),),
                output_uri=str(folder / "objects"),
                kinds=("ko",),
            )
            paths[0].write_bytes(b"changed")
            run_quietly(job, lines)
            paths[0].write_bytes(contents[0])
            run_quietly(job, lines)
            lines.append((folder / "objects" / RESULTS_FILE).read_text())
            assert find_tokens_in_folder(folder / "out") == {}
    assert len(list(tmp_path.rglob("ko.dcm"))) > 10
    assert any("another object" in line for line in lines)
    printed = capsys.readouterr()
    assert find_tokens("\n".join([*lines, caplog.text, printed.out, printed.err])) == []


# ---- Ray, the command, and the libraries ---------------------------------------------------------


@pytest.mark.usefixtures("local_ray")
def test_studies_are_processed_on_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources_module, "MAX_LOCAL_SLICES", 0)
    for number in range(3):
        files = write_files(tmp_path / "in" / str(number), make_series(number))
        write_output(tmp_path / "out", files)
    files[2].unlink()
    with pytest.raises(DicomResultsError, match="1 series"):
        report(tmp_path)
    document = json.loads((tmp_path / "objects" / RESULTS_FILE).read_text())
    assert document["by_status"] == {"failed": 1, "stored": 2}
    assert len(list((tmp_path / "objects").rglob("*.dcm"))) == 6
    write_files(tmp_path / "in" / "2", make_series(2))
    again = report(tmp_path)
    assert again["by_status"] == {"already_stored": 2, "stored": 1}
    with pytest.raises(DataError, match="No scans at"):
        report(tmp_path, scans_uri=(str(tmp_path / "nothing"),))


def test_the_command_prints_counts_and_failures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = write_files(tmp_path / "in", make_slices())
    write_output(tmp_path / "out", files)
    options = [
        "--predictions-uri",
        str(tmp_path / "out"),
        "--output-uri",
        str(tmp_path / "objects"),
    ]
    cli.main(["dicom-results", *options, "--kinds", "sr", "--kinds", "ko"])
    assert "1 stored, 0 stored before, 0 skipped, 0 failed" in capsys.readouterr().out
    assert set(read_objects(tmp_path / "objects")) == {"sr", "ko"}
    files[0].unlink()
    with pytest.raises(SystemExit) as ended:
        cli.main(["dicom-results", *options])
    assert ended.value.code == 1
    printed = capsys.readouterr()
    assert "is missing" in printed.out
    assert printed.err.startswith("failed: 1 series")


def test_without_the_extra_the_error_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(ConfigError, match=r"brainray\[dicom\]"):
        report(tmp_path)
