"""From a PACS and back, with every process killed on the way: nothing is lost or duplicated.

Orthanc is the PACS. It sends series by C-STORE to `brainray receive`, the bulk job classifies the
finished files, STOW-RS stores the results in the PACS, and QIDO-RS finds them in their study.
"""

import io
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pydicom
import pytest

from brainray.data.scans import list_scans
from brainray.io.dicomweb import open_client
from tests.conftest import REPOSITORY
from tests.dicom_files import make_mr
from tests.pacs import Orthanc, run_orthanc, send

pytest.importorskip("highdicom")
pytest.importorskip("pynetdicom")
pytest.importorskip("brainray.dicom_results.report")

pytestmark = [pytest.mark.slow, pytest.mark.ray]

STUDIES = ("1.2.826.51", "1.2.826.52")
NUM_SERIES, NUM_SLICES = 2, 8
NUM_SOURCES = len(STUDIES) * NUM_SERIES * NUM_SLICES
RESULTS = ("SR", "KO", "OT")
"""Modalities of the results of each series."""
NAME = "山田^太郎"
WAIT_S = 120.0


def make_slice(study: str, series: int, number: int) -> bytes:
    y, x = np.indices((64, 64)) - 32
    head = np.hypot(y, x) < 16 + number + 4 * series
    pixels = np.where(head, 400 + 10 * np.abs(x), 5).astype(np.uint16)
    return make_mr(
        pixels,
        SpecificCharacterSet="ISO_IR 192",
        PatientName=NAME,
        PatientBirthDate="19620317",
        PatientSex="M",
        StudyDate="20240229",
        StudyTime="101112",
        StudyID="7",
        AccessionNumber="A7",
        ReferringPhysicianName="",
        StudyInstanceUID=study,
        SeriesInstanceUID=f"{study}.{series}",
        SeriesNumber=series,
        SOPInstanceUID=f"{study}.{series}.{number}",
        InstanceNumber=number + 1,
        FrameOfReferenceUID=f"{study}.9",
        ImagePositionPatient=[0, 0, 5 * number],
        SliceThickness=5,
    )


@pytest.fixture
def orthanc(tmp_path: Path) -> Iterator[Orthanc]:
    """Run a PACS that has two studies of two series."""
    with run_orthanc(tmp_path / "orthanc") as running:
        slices = [
            make_slice(study, series, number)
            for study in STUDIES
            for series in range(1, NUM_SERIES + 1)
            for number in range(NUM_SLICES)
        ]
        statuses = send(running.dicom_port, *slices, called="ORTHANC")
        assert statuses == [0] * NUM_SOURCES
        yield running


def start(program: str, *words: object) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, "-m", *program.split(), *map(str, words)],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill_after(seconds: float, process: subprocess.Popen[str]) -> None:
    time.sleep(seconds)
    process.kill()
    process.communicate()


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    return output


def start_receiver(orthanc: Orthanc, inbox: Path) -> subprocess.Popen[str]:
    process = start(
        "brainray receive",
        *("--inbox-path", inbox, "--port", orthanc.receiver_port, "--quiet-s", 2),
        *("--calling-ae-titles", "ORTHANC", "--min-free-bytes", 0),
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("listening")
    return process


def start_classify(scans_uri: object, classifier: Path, output: Path) -> subprocess.Popen[str]:
    # `brainray classify` with a fake engine, which needs no network.
    words = ("--scans-uri", scans_uri, "--classifier-uri", classifier, "--output-uri", output)
    return start("tests.fakes", *words, "--explain")


def start_report(scans_uri: object, output: Path, orthanc: Orthanc) -> subprocess.Popen[str]:
    words = ("--predictions-uri", output, "--scans-uri", scans_uri, "--dicomweb-url", orthanc.root)
    return start("brainray dicom-results", *words)


def check_predictions(output: Path) -> None:
    rows = pq.read_table(output / "predictions").to_pylist()
    assert {row["status"] for row in rows} <= {"classified", "abstained"}
    counts = Counter(row["sop_instance"] for row in rows)
    assert len(counts) == NUM_SOURCES
    assert set(counts.values()) == {1}, "a slice has two rows"


def check_results(orthanc: Orthanc) -> None:
    """Check that each series has one result of each kind, with its study and its patient."""
    instances = orthanc.read_instances()
    found = Counter((str(one.StudyInstanceUID), str(one.Modality)) for one in instances)
    assert found == {
        (study, modality): count
        for study in STUDIES
        for modality, count in [("MR", NUM_SERIES * NUM_SLICES)]
        + [(result, NUM_SERIES) for result in RESULTS]
    }
    assert len({str(one.SOPInstanceUID) for one in instances}) == len(instances)
    pacs = open_client(orthanc.root)
    for one in instances:
        assert (str(one.PatientName), one.PatientID) == (NAME, "patient-7")
        assert pacs.has(str(one.StudyInstanceUID), str(one.SOPInstanceUID))
    sources = {str(one.SOPInstanceUID): one for one in instances if one.Modality == "MR"}
    first = pydicom.dcmread(io.BytesIO(make_slice(STUDIES[0], 1, 0)))
    assert sources[f"{STUDIES[0]}.1.0"] == first, "the sources are unchanged"


def test_series_come_by_c_store_and_their_results_go_back(
    orthanc: Orthanc, tiny_classifier: Path, tmp_path: Path
) -> None:
    inbox, output = tmp_path / "inbox", tmp_path / "out"
    rng = random.Random()
    orthanc.kill()
    orthanc.start()
    assert len(orthanc.get("instances")) == NUM_SOURCES

    for _ in range(3):
        receiver = start_receiver(orthanc, inbox)
        names = orthanc.get("instances")
        orthanc.send(*rng.sample(names, rng.randint(1, len(names))))
        kill_after(rng.uniform(0.0, 3.0), receiver)
    receiver = start_receiver(orthanc, inbox)
    while not orthanc.send(*orthanc.get("instances")):
        time.sleep(0.5)
    deadline = time.monotonic() + WAIT_S
    while list_scans([str(inbox)]).num_rows < NUM_SOURCES:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    kill_after(3.0, receiver)
    assert list_scans([str(inbox)]).num_rows == NUM_SOURCES, "an object was stored twice"

    for _ in range(2):
        kill_after(rng.uniform(2.0, 40.0), start_classify(inbox, tiny_classifier, output))
    finish(start_classify(inbox, tiny_classifier, output))
    check_predictions(output)

    kill_after(rng.uniform(2.0, 15.0), start_report(inbox, output, orthanc))
    report = start_report(inbox, output, orthanc)
    time.sleep(rng.uniform(2.0, 15.0))
    orthanc.kill()
    report.kill()
    report.communicate()
    orthanc.start()
    finish(start_report(inbox, output, orthanc))
    check_results(orthanc)
    assert "0 stored, 4 stored before" in finish(start_report(inbox, output, orthanc))
    check_results(orthanc)


def test_series_are_fetched_by_dicomweb_and_their_results_go_back(
    orthanc: Orthanc, tiny_classifier: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    scans_uri = f"dicomweb+{orthanc.root}/studies?PatientID=patient-7&Modality=MR"
    rng = random.Random()
    job = start_classify(scans_uri, tiny_classifier, output)
    time.sleep(rng.uniform(2.0, 40.0))
    orthanc.kill()
    job.kill()
    job.communicate()
    orthanc.start()
    finish(start_classify(scans_uri, tiny_classifier, output))
    finish(start_report(scans_uri, output, orthanc))
    check_results(orthanc)
    # The stored results are not scans, so the next run has nothing to do.
    output_text = finish(start_classify(scans_uri, tiny_classifier, output))
    assert "0 new" in output_text, output_text
    counts = Counter(
        row["sop_instance"]
        for row in pq.read_table(output / "predictions").to_pylist()
        if row["reason"] not in ("missing", "unreadable")
    )
    assert len(counts) == NUM_SOURCES
    assert set(counts.values()) == {1}
