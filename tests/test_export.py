"""De-identified exports: outcomes, pixels, removed identifiers, and separate folders."""

import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pydicom
import pytest
from PIL import Image, ImageDraw
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset

from brainray import cli
from brainray.dicom_results.destinations import FolderDestination
from brainray.errors import ConfigError
from brainray.export import dicom as dicom_module
from brainray.export import job as job_module
from brainray.export.dicom import Dates, Deidentifier
from brainray.export.job import ExportJob, export
from brainray.export.pseudonyms import Pseudonyms
from brainray.export.rows import KEPT_COLUMNS, LEFT_OUT_COLUMNS
from brainray.export.text import has_text
from brainray.images.decode import DecodeLimits
from brainray.images.dicom import open_dicom
from brainray.images.dicom_pixels import decode_stored
from brainray.images.slices import open_file
from brainray.inference import sources as sources_module
from brainray.inference.schema import build_schema
from brainray.io.identifiers import open_identifiers
from tests.bulk_output import CLASSES, write_output
from tests.dicom_files import RAMP, as_mr, make_enhanced, make_item, make_mr

KEY = b"0123456789abcdef"


def make_series(folder: Path, count: int = 8, **elements) -> list[Path]:
    """Write slices of one series, whose pixels differ."""
    folder.mkdir(exist_ok=True)
    paths = []
    for index in range(count):
        path = folder / f"Doe-{elements.get('PatientID', 'x')}-{index}.dcm"
        own = {
            "SOPInstanceUID": f"1.2.3.{len(list(folder.iterdir()))}.{index}",
            "ImagePositionPatient": [-100, -90, 5 * index],
            "StudyDate": "20240229",
            "PatientName": "Doe^Jane",
        }
        path.write_bytes(make_mr(RAMP + index, **(own | elements)))
        paths.append(path)
    return paths


def run_export(predictions: Path, output: Path, **options) -> dict[str, Any]:
    return export(
        ExportJob(
            predictions_uri=str(predictions), output_uri=str(output), deidentify=True, **options
        )
    )


def read_rows(output: Path) -> list[dict[str, Any]]:
    """Read the rows of all tables."""
    return pq.read_table(output / "data").to_pylist()


def read_objects(output: Path) -> list[Dataset]:
    return [pydicom.dcmread(path) for path in sorted(output.glob("images/*/*.dcm"))]


# ---- tables and pictures -------------------------------------------------------------------------


def test_every_slice_has_one_outcome(tmp_path: Path) -> None:
    files = make_series(tmp_path / "scans")
    broken, picture = tmp_path / "scans" / "broken.dcm", tmp_path / "scans" / "picture.png"
    broken.write_bytes(files[0].read_bytes()[:-100])
    Image.fromarray((RAMP >> 4).astype(np.uint8)).save(picture)
    frames = np.stack([RAMP, RAMP + 1, RAMP + 2])
    many = tmp_path / "scans" / "many.dcm"
    many.write_bytes(make_mr(frames, SOPInstanceUID="1.2.3.99"))
    gone = make_series(tmp_path / "gone", 1, PatientID="gone")
    write_output(tmp_path / "bulk", [*files, broken, picture, many, *gone])
    gone[0].unlink()

    summary = run_export(tmp_path / "bulk", tmp_path / "out")

    rows = read_rows(tmp_path / "out")
    assert len(rows) == len({row["slice_id"] for row in rows}) == 8 + 1 + 1 + 3 + 1
    assert Counter(row["outcome"] for row in rows) == {"exported": 12, "rejected": 2}
    assert summary["by_outcome"] == {"exported": 12, "rejected": 2}
    assert summary["rejected_by_reason"] == {"missing": 1, "truncated": 1}
    in_rows = {row["image"] for row in rows} - {None}
    on_disk = {str(path.relative_to(tmp_path / "out")) for path in tmp_path.glob("out/images/*/*")}
    assert in_rows == on_disk
    assert len(in_rows) == 12
    assert {row["frame"] for row in rows} == {None, 0, 1, 2}
    series = {row["series"] for row in rows if row["series"] is not None}
    assert len(series) == 1, "all DICOM objects here are of one series"


@pytest.mark.parametrize(
    "pixels",
    [
        RAMP,
        (RAMP.astype(np.int16) - 2000),
        (RAMP >> 4).astype(np.uint8),
    ],
    ids=["12 bits", "signed", "8 bits"],
)
@pytest.mark.parametrize("slope", [1, 2.108])
def test_samples_are_recovered_from_the_exported_picture(
    pixels: np.ndarray, slope: float, tmp_path: Path
) -> None:
    path = tmp_path / "a.dcm"
    path.write_bytes(make_mr(pixels, RescaleSlope=slope, RescaleIntercept=-7))
    write_output(tmp_path / "bulk", [path])
    run_export(tmp_path / "bulk", tmp_path / "out")
    (row,) = read_rows(tmp_path / "out")
    picture = cv2.imread(str(tmp_path / "out" / row["image"]), cv2.IMREAD_UNCHANGED)
    assert picture.ndim == 2
    samples = open_file(path.read_bytes()).decode(0)
    step = max(1e-3, np.ptp(samples) / 65535) if slope != 1 else 1e-3
    np.testing.assert_allclose(picture * row["slope"] + row["intercept"], samples, atol=step)
    chunks = (tmp_path / "out" / row["image"]).read_bytes()
    assert b"tEXt" not in chunks
    assert b"eXIf" not in chunks


def test_predictions_and_groups_are_kept(tmp_path: Path) -> None:
    files = make_series(tmp_path / "scans")
    store = write_output(tmp_path / "bulk", files)
    run_export(tmp_path / "bulk", tmp_path / "out", images="none")
    before = store.read(store.list_files()[0], store.file_schema.names).to_pylist()
    after = read_rows(tmp_path / "out")
    by_position = {row["position_mm"]: row for row in after}
    for row in before:
        kept = by_position[row["position_mm"]]
        assert kept["image"] is None
        for name in ("status", "prob_glioma", "plane", "orientation", "class_map", "flags"):
            assert kept[name] == row[name], name
        for name in ("patient", "study", "series", "sop_instance"):
            assert kept[name] is not None
            assert kept[name] != row[name], "hashes of the bulk output would link the two"
    (series,) = pq.read_table(tmp_path / "out" / "series.parquet").to_pylist()
    assert series["series"] == after[0]["series"]
    assert series["study"] == after[0]["study"]
    assert set(series["key_slices"]) <= {row["slice_id"] for row in after}
    assert series["answer"] == "glioma"
    schema = pq.read_schema(tmp_path / "out" / "series.parquet")
    assert b"brainray" not in (schema.metadata or {})


def test_every_column_is_listed_as_kept_or_left_out() -> None:
    """A new column of the predictions must be added to one of the two lists."""
    columns = {name for name in build_schema(CLASSES).names if not name.startswith("prob_")}
    assert set(KEPT_COLUMNS) | set(LEFT_OUT_COLUMNS) == columns


# ---- DICOM objects -------------------------------------------------------------------------------


def make_full_object() -> bytes:
    """Make an object with elements to remove, also nested ones, and elements to keep."""
    return make_mr(
        StudyDate="20240229",
        StudyTime="101112",
        SeriesDate="20240229",
        PatientName="Doe^Jane",
        PatientBirthDate="19620317",
        PatientSex="F",
        PatientAge="061Y",
        StationName="STATION-1",
        Manufacturer="Doe and Sons",
        SequenceName="doe_se",
        EchoTime="12.5",
        ImageType=["ORIGINAL", "PRIMARY", "M", "DOE"],
        FrameOfReferenceUID="1.2.3.4",
        ReferencedImageSequence=[
            make_item(
                ReferencedSOPClassUID="1.2.840.10008.5.1.4.1.1.4",
                ReferencedSOPInstanceUID="1.2.826.0.1.3680043.9.1.1",
            )
        ],
        AnatomicRegionSequence=[
            make_item(CodeValue="T-D1100", CodingSchemeDesignator="SRT", CodeMeaning="Doe's head")
        ],
        PrimaryAnatomicStructureSequence=[
            make_item(CodeValue="1", CodingSchemeDesignator="99DOE", CodeMeaning="Doe")
        ],
        SharedFunctionalGroupsSequence=[
            make_item(
                MRTimingAndRelatedParametersSequence=[
                    make_item(OperatorsName="Doe", RepetitionTime=500.0, StationName="STATION-1")
                ]
            )
        ],
    )


def export_object(tmp_path: Path, content: bytes, **options) -> Dataset:
    path = tmp_path / "a.dcm"
    path.write_bytes(content)
    write_output(tmp_path / "bulk", [path])
    run_export(tmp_path / "bulk", tmp_path / "out", images="dicom", **options)
    (found,) = read_objects(tmp_path / "out")
    return found


def test_identifiers_are_removed_and_technical_elements_kept(tmp_path: Path) -> None:
    content = make_full_object()
    found = export_object(tmp_path, content)
    (row,) = read_rows(tmp_path / "out")
    assert found.PatientID == found.PatientName == row["patient"]
    assert found.StudyInstanceUID == f"2.25.{int(row['study'], 16)}"
    assert found.SeriesInstanceUID == f"2.25.{int(row['series'], 16)}"
    assert found.SOPInstanceUID == f"2.25.{int(row['sop_instance'], 16)}"
    reference = found.ReferencedImageSequence[0]
    assert reference.ReferencedSOPInstanceUID == found.SOPInstanceUID, "the object refers to itself"
    assert reference.ReferencedSOPClassUID == "1.2.840.10008.5.1.4.1.1.4"
    assert found.FrameOfReferenceUID.startswith("2.25.")
    assert found.EchoTime == 12.5
    assert found.ImageType == ["ORIGINAL", "PRIMARY", "M", "OTHER"]
    assert found.ImagePositionPatient == [-100, -90, 33]
    assert found.AnatomicRegionSequence[0].CodeValue == "69536005"
    timing = found.SharedFunctionalGroupsSequence[0].MRTimingAndRelatedParametersSequence[0]
    assert timing.RepetitionTime == 500
    assert timing.StationName == timing.OperatorsName == "REMOVED"
    assert "PrimaryAnatomicStructureSequence" not in found
    assert not found.StudyDate
    assert not found.StudyTime
    assert found.PatientIdentityRemoved == "YES"
    assert [code.CodeValue for code in found.DeidentificationMethodCodeSequence] == ["113100"]
    written = (tmp_path / "out" / row["image"]).read_bytes()
    removed = (b"Doe", b"DOE", b"doe", b"STATION", b"19620317", b"20240229", b"061Y")
    for word in (*removed, b"1.2.826.0.1.3680043.9"):
        assert word not in written
    opened = open_dicom((tmp_path / "out" / row["image"]).read_bytes())
    np.testing.assert_array_equal(decode_stored(opened), RAMP)


def test_unused_bits_and_trailing_bytes_of_the_pixels_are_cleared(tmp_path: Path) -> None:
    """Old objects keep overlays in the unused bits of the pixels."""
    with_overlay = RAMP % 4096 | (1 << 15)
    content = make_mr(with_overlay, BitsStored=12) + b"Doe^Jane"
    found = export_object(tmp_path, content)
    np.testing.assert_array_equal(found.pixel_array, RAMP % 4096)
    assert len(found.PixelData) == RAMP.nbytes


@pytest.mark.parametrize(
    "name", ["MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "MR_small_bigendian.dcm"]
)
def test_pixels_of_compressed_and_big_endian_objects_are_kept(name: str, tmp_path: Path) -> None:
    content = as_mr(Path(pydicom.__file__).parent / "data" / "test_files" / name)
    found = export_object(tmp_path, content)
    assert found.file_meta.TransferSyntaxUID == pydicom.uid.ExplicitVRLittleEndian
    np.testing.assert_array_equal(found.pixel_array, decode_stored(open_dicom(content)))


def validate(path: Path) -> set[str]:
    """Return the errors that dciodvfy finds, without the values that it quotes."""
    found = subprocess.run(["dciodvfy", "-new", path], capture_output=True, check=False)
    lines = (found.stdout + found.stderr).decode(errors="replace").splitlines()
    return {re.sub(r"= <.*", "", line) for line in lines if line.startswith("Error")}


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy is not installed")
@pytest.mark.parametrize("name", ["MR_small.dcm", "emri_small.dcm", "MR2_UNCR.dcm"])
@pytest.mark.parametrize("dates", ["remove", "shift"])
def test_a_validator_finds_no_error_that_the_source_does_not_have(
    name: str, dates: Dates, tmp_path: Path
) -> None:
    source = Path(get_testdata_file(name))
    deidentifier = Deidentifier(pseudonyms=Pseudonyms.of(KEY, "test"), dates=dates)
    written = tmp_path / "a.dcm"
    written.write_bytes(deidentifier.convert(source.read_bytes(), DecodeLimits()))
    assert validate(written) <= validate(source)


def test_an_enhanced_object_is_exported_with_all_frames(tmp_path: Path) -> None:
    frames = np.stack([RAMP, RAMP + 1, RAMP + 2])
    shared = make_item(
        PlaneOrientationSequence=[make_item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
        PixelMeasuresSequence=[make_item(PixelSpacing=[1.0, 1.0])],
    )
    per_frame = [
        make_item(
            PlanePositionSequence=[make_item(ImagePositionPatient=[0, 0, 5 * index])],
            FrameContentSequence=[make_item(FrameAcquisitionDateTime="20240229101112")],
        )
        for index in range(3)
    ]
    found = export_object(tmp_path, make_enhanced(frames, shared, per_frame))
    np.testing.assert_array_equal(found.pixel_array, frames)
    groups = found.PerFrameFunctionalGroupsSequence
    assert [group.PlanePositionSequence[0].ImagePositionPatient[2] for group in groups] == [
        0,
        5,
        10,
    ]
    assert groups[0].FrameContentSequence[0].FrameAcquisitionDateTime == "19000101000000"
    rows = read_rows(tmp_path / "out")
    assert len(rows) == 3
    assert len({row["image"] for row in rows}) == 1, "an object is exported whole"


def test_a_file_that_is_not_dicom_is_rejected(tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    Image.fromarray((RAMP >> 4).astype(np.uint8)).save(picture)
    write_output(tmp_path / "bulk", [*make_series(tmp_path / "scans"), picture])
    summary = run_export(tmp_path / "bulk", tmp_path / "out", images="dicom")
    assert summary["rejected_by_reason"] == {"not_dicom": 1}
    assert len(read_objects(tmp_path / "out")) == 8


# ---- dates and pseudonyms ------------------------------------------------------------------------


def export_dates(tmp_path: Path, dates: Sequence[tuple[str, str]], **options) -> list[Dataset]:
    """Export an object for each (patient, study date)."""
    files = []
    for index, (patient, day) in enumerate(dates):
        files += make_series(
            tmp_path / f"scans-{index}",
            1,
            PatientID=patient,
            StudyDate=day,
            SOPInstanceUID=f"1.2.3.{index}",
            InstanceNumber=index,
        )
    write_output(tmp_path / "bulk", files)
    run_export(tmp_path / "bulk", tmp_path / "out", images="dicom", dates="shift", **options)
    return sorted(read_objects(tmp_path / "out"), key=lambda found: found.InstanceNumber)


def test_shifted_dates_keep_the_intervals_of_a_patient(tmp_path: Path) -> None:
    given = [("a", "20240229"), ("a", "20240331"), ("b", "20240229")]
    found = export_dates(tmp_path, given)
    days = [date.fromisoformat(one.StudyDate) for one in found]
    assert (days[1] - days[0]).days == 31
    assert 1 <= (date(2024, 2, 29) - days[0]).days <= 3650
    assert days[2] != days[0], "each patient has its own shift"
    assert found[0].LongitudinalTemporalInformationModified == "MODIFIED"
    codes = [code.CodeValue for code in found[0].DeidentificationMethodCodeSequence]
    assert codes == ["113100", "113107"]
    in_table = {(row["sop_instance"], row["study_date"]) for row in read_rows(tmp_path / "out")}
    uids = [int(one.SOPInstanceUID.removeprefix("2.25.")) for one in found]
    assert in_table == {(f"{uid:032x}", day) for uid, day in zip(uids, days, strict=True)}


@pytest.mark.parametrize("day", ["", "2024", "20240231", "yesterday"])
def test_an_invalid_date_is_removed(day: str, tmp_path: Path) -> None:
    (found,) = export_dates(tmp_path, [("a", day)])
    assert not found.StudyDate
    assert read_rows(tmp_path / "out")[0]["study_date"] is None


def test_pseudonyms_repeat_in_a_project_and_differ_between_projects(tmp_path: Path) -> None:
    write_output(tmp_path / "bulk", make_series(tmp_path / "scans"))

    def find_patient(name: str, project: str) -> str:
        run_export(tmp_path / "bulk", tmp_path / name, images="none", project=project)
        return str(read_rows(tmp_path / name)[0]["patient"])

    assert find_patient("1", "one") == find_patient("2", "one")
    assert find_patient("1", "one") != find_patient("3", "two")


# ---- text in the pixels --------------------------------------------------------------------------


def draw_head(text: str = "", *, size: int = 256) -> np.ndarray:
    """Draw a bright disc with noise around it, and text beside it."""
    y, x = np.indices((size, size)) - size / 2
    disc = np.where(np.hypot(y, x) < 0.3 * size, 160 + 60 * np.sin(x / 5), 0)
    noise = np.random.default_rng(0).rayleigh(6, disc.shape)
    canvas = Image.fromarray(np.clip(disc + noise, 0, 255).astype(np.uint8))
    ImageDraw.Draw(canvas).text((5, 5), text, fill=255)
    return np.asarray(canvas)


@pytest.mark.parametrize("text", ["DOE JANE", "19620317"])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
def test_text_beside_the_head_is_detected(text: str, kind: type, tmp_path: Path) -> None:
    samples = draw_head(text).astype(kind) * (1 if kind is np.uint8 else 7)
    assert has_text(samples)
    path = tmp_path / "a.dcm"
    path.write_bytes(make_mr(draw_head(text).astype(np.uint16)))
    write_output(tmp_path / "bulk", [path])
    summary = run_export(tmp_path / "bulk", tmp_path / "out")
    (row,) = read_rows(tmp_path / "out")
    assert row["has_text"]
    assert row["burned_in"] == "unknown"
    assert summary["num_with_text"] == summary["num_burned_in_unknown"] == 1


@pytest.mark.parametrize("text", ["", "R"])
def test_heads_and_side_markers_are_not_text(text: str) -> None:
    assert not has_text(draw_head(text))


def test_burned_in_text_is_read_from_the_header(tmp_path: Path) -> None:
    path = tmp_path / "a.dcm"
    path.write_bytes(make_mr(BurnedInAnnotation="NO"))
    write_output(tmp_path / "bulk", [path])
    run_export(tmp_path / "bulk", tmp_path / "out")
    assert read_rows(tmp_path / "out")[0]["burned_in"] == "no"


# ---- runs ----------------------------------------------------------------------------------------


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_module, "SLICES_PER_SHARD", 2)


def read_all(output: Path) -> dict[str, bytes]:
    found = [path for path in output.rglob("*") if path.is_file() and ".work" not in path.parts]
    return {str(path.relative_to(output)): path.read_bytes() for path in found}


@pytest.mark.usefixtures("small_shards")
def test_an_interrupted_export_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_output(tmp_path / "bulk", make_series(tmp_path / "scans"))
    run_export(tmp_path / "bulk", tmp_path / "whole")
    calls = []

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return export_shard(*arguments)

    export_shard = job_module.export_shard
    with monkeypatch.context() as patched:
        patched.setattr(job_module, "export_shard", fail)
        with pytest.raises(KeyboardInterrupt):
            run_export(tmp_path / "bulk", tmp_path / "cut")
    assert 0 < len(list(tmp_path.glob("cut/data/*"))) < len(list(tmp_path.glob("whole/data/*")))

    run_export(tmp_path / "bulk", tmp_path / "cut")

    assert read_all(tmp_path / "cut") == read_all(tmp_path / "whole")


def test_exported_scans_are_not_read_again(tmp_path: Path) -> None:
    files = make_series(tmp_path / "scans")
    write_output(tmp_path / "bulk", files)
    run_export(tmp_path / "bulk", tmp_path / "out")
    before = read_all(tmp_path / "out")
    for file in files:
        file.unlink()
    run_export(tmp_path / "bulk", tmp_path / "out")
    assert read_all(tmp_path / "out") == before


def test_a_scan_that_changed_after_classification_is_rejected_until_it_is_restored(
    tmp_path: Path,
) -> None:
    files = make_series(tmp_path / "scans")
    write_output(tmp_path / "bulk", files)
    content = files[0].read_bytes()
    files[0].write_bytes(content + b"\0\0")
    summary = run_export(tmp_path / "bulk", tmp_path / "out")
    assert summary["rejected_by_reason"] == {"changed": 1}
    files[0].write_bytes(content)
    summary = run_export(tmp_path / "bulk", tmp_path / "out")
    assert summary["by_outcome"] == {"exported": 8}


def test_new_predictions_are_added(tmp_path: Path) -> None:
    first = make_series(tmp_path / "first", PatientID="a")
    write_output(tmp_path / "bulk", first)
    run_export(tmp_path / "bulk", tmp_path / "out")
    known = {row["slice_id"]: row for row in read_rows(tmp_path / "out")}
    write_output(tmp_path / "bulk", make_series(tmp_path / "second", PatientID="b"))
    run_export(tmp_path / "bulk", tmp_path / "out")
    rows = {row["slice_id"]: row for row in read_rows(tmp_path / "out")}
    assert len(rows) == 16
    assert {name: rows[name] for name in known} == known


def test_an_export_of_redacted_predictions_needs_scans_uri(tmp_path: Path) -> None:
    files = make_series(tmp_path / "scans")
    write_output(tmp_path / "bulk", files, redact_paths=True)
    with pytest.raises(ConfigError, match="--scans-uri"):
        run_export(tmp_path / "bulk", tmp_path / "out")
    summary = run_export(tmp_path / "bulk", tmp_path / "out", scans_uri=(str(tmp_path / "scans"),))
    assert summary["by_outcome"] == {"exported": 8}


@pytest.mark.usefixtures("local_ray", "small_shards")
def test_an_export_on_ray_equals_a_local_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_output(tmp_path / "bulk", make_series(tmp_path / "scans"))
    local = run_export(tmp_path / "bulk", tmp_path / "here")
    monkeypatch.setattr(sources_module, "MAX_LOCAL_SLICES", 0)
    assert run_export(tmp_path / "bulk", tmp_path / "out") == local
    by_id = {row["slice_id"]: row for row in read_rows(tmp_path / "here")}
    assert {row["slice_id"]: row for row in read_rows(tmp_path / "out")} == by_id
    rows = read_rows(tmp_path / "out")
    assert len(rows) == len({row["slice_id"] for row in rows}) == 8
    assert {row["outcome"] for row in rows} == {"exported"}
    assert (tmp_path / "out" / "series.parquet").exists()
    assert json.loads((tmp_path / "out" / "export.json").read_text())["num_slices"] == 8


# ---- separate folders ----------------------------------------------------------------------------


def test_an_export_into_a_folder_with_other_files_is_rejected(tmp_path: Path) -> None:
    write_output(tmp_path / "bulk", make_series(tmp_path / "scans"))
    for name in ("bulk", "bulk/export"):
        with pytest.raises(ConfigError, match="must not lie within"):
            run_export(tmp_path / "bulk", tmp_path / name)
    results = tmp_path / "results"
    FolderDestination(str(results)).check()
    (results / "study").mkdir(parents=True, exist_ok=True)
    (results / "study" / "sr.dcm").write_bytes(b"with identity")
    with pytest.raises(ConfigError, match="not mixed"):
        run_export(tmp_path / "bulk", results)
    assert not list(results.glob("data"))


def test_results_with_identifiers_are_not_written_into_an_export(tmp_path: Path) -> None:
    write_output(tmp_path / "bulk", make_series(tmp_path / "scans"))
    run_export(tmp_path / "bulk", tmp_path / "out", images="none")
    before = read_all(tmp_path / "out")
    with pytest.raises(ConfigError, match="must not be mixed"):
        FolderDestination(str(tmp_path / "out")).check()
    with pytest.raises(ConfigError, match="must not be mixed"):
        open_identifiers(str(tmp_path / "out"))
    assert read_all(tmp_path / "out") == before


@pytest.mark.parametrize(
    "changed", [{"dates": "shift"}, {"images": "png"}, {"project": "another"}], ids=str
)
def test_a_later_run_with_other_settings_is_rejected(
    changed: dict[str, str], tmp_path: Path
) -> None:
    write_output(tmp_path / "bulk", make_series(tmp_path / "scans"))
    run_export(tmp_path / "bulk", tmp_path / "out", images="none")
    with pytest.raises(ConfigError, match=f"another {next(iter(changed))}"):
        run_export(tmp_path / "bulk", tmp_path / "out", **({"images": "none"} | changed))


def test_an_export_requires_the_option_deidentify(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_output(tmp_path / "bulk", make_series(tmp_path / "scans"))
    options = ["--predictions-uri", str(tmp_path / "bulk"), "--output-uri", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", *options])
    assert ended.value.code == 2
    assert "--deidentify" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    cli.main(["export", *options, "--deidentify"])
    printed = capsys.readouterr().out
    assert "8 exported, 0 rejected" in printed
    assert "faces" in printed


def test_without_the_library_the_error_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_output(tmp_path / "bulk", make_series(tmp_path / "scans", 1))
    monkeypatch.setattr(dicom_module, "_TABLE", "no_such_library.table")
    dicom_module.read_profile.cache_clear()
    with pytest.raises(ConfigError, match=r"brainray\[dicom\]"):
        run_export(tmp_path / "bulk", tmp_path / "out")
    dicom_module.read_profile.cache_clear()


def test_the_profile_has_the_actions_of_well_known_elements() -> None:
    """A table that is parsed wrongly would leave identifiers in objects without an error."""
    actions = dicom_module.read_profile()
    assert len(actions) > 600
    expected = {
        "PatientName": "empty",
        "StudyDescription": "remove",
        "StudyInstanceUID": "map_uid",
        "OperatorsName": "replace",
        "DeviceSerialNumber": "replace",
    }
    found = {name: actions.get(int(pydicom.tag.Tag(name))) for name in expected}
    assert found == expected
    assert int(pydicom.tag.Tag("Rows")) not in actions
