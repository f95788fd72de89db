"""Class folders of DICOM and NIfTI files: a slice is a sample, and no patient is in two splits."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

from brainray.data import fingerprint
from brainray.data.fingerprint import expand_files
from brainray.data.labelled import find_samples
from brainray.data.splits import assign_folds, hash_manifest
from brainray.evaluation.audit import AuditJob, audit
from brainray.evaluation.prepared import IDENTIFIERS, PreparedData
from brainray.images.preprocess import Preprocessing
from brainray.images.slices import ReadOptions, find_slice, open_file, open_slice, split_name
from brainray.training.config import TrainConfig
from brainray.training.loader import LoaderSetup, list_blocks
from brainray.training.run import group_training_data, split_training_data
from tests.conftest import CLASSES
from tests.dicom_files import make_mr

pytestmark = pytest.mark.usefixtures("local_ray")

NUM_PATIENTS, SLICES_OF_PATIENT = 6, 4
CONFIG = TrainConfig(
    weights="none",
    preprocessing=Preprocessing(size_px=32, intensity="percentile"),
    val_fraction=0.25,
    test_fraction=0.25,
)


def draw(rng: np.random.Generator) -> NDArray[np.uint16]:
    """Draw blocks of noise. No two slices are similar, even if they are of one patient."""
    return np.kron(rng.integers(0, 4000, (12, 12)), np.ones((4, 4))).astype(np.uint16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write six patients of each class, in files whose paths do not name the patient."""
    root = tmp_path_factory.mktemp("dicom")
    rng = np.random.default_rng(0)
    for label in CLASSES:
        (root / label / "more").mkdir(parents=True)
        for number in range(NUM_PATIENTS * SLICES_OF_PATIENT):
            patient = f"SECRET-{label}-{number % NUM_PATIENTS}"
            uid = f"1.2.826.0.1.{CLASSES.index(label)}.{number}"
            content = make_mr(
                draw(rng),
                PatientID=patient,
                SOPInstanceUID=uid,
                StudyInstanceUID=f"{uid}.1",
                SeriesInstanceUID=f"{uid}.2",
            )
            name = f"IM{number:04d}" if number % 2 else f"more/{number}.dcm"
            (root / label / name).write_bytes(content)
    (root / "glioma" / "report.dcm").write_bytes(make_mr(Modality="SR"))
    return root


def find_patient(path: str) -> str | None:
    """Return the patient of a file that `folder` wrote; None for the report."""
    label, _, name = path.partition("/")
    digits = "".join(c for c in name if c.isdigit())
    return f"{label}-{int(digits) % NUM_PATIENTS}" if digits else None


def prepare(folder: Path) -> PreparedData:
    found = find_samples(str(folder), CLASSES)
    return split_training_data(group_training_data(found, CONFIG), CONFIG)


@pytest.fixture(scope="module")
def prepared(folder: Path, local_ray: None) -> PreparedData:  # noqa: ARG001 - runs
    return prepare(folder)


def test_no_patient_is_in_two_splits(prepared: PreparedData) -> None:
    splits_of_patient: dict[str, set[str]] = {}
    for row in prepared.manifest.to_pylist():
        if patient := find_patient(row["path"]):
            splits_of_patient.setdefault(patient, set()).add(row["split"])
    assert len(splits_of_patient) == NUM_PATIENTS * len(CLASSES)
    assert all(len(splits) == 1 for splits in splits_of_patient.values())
    assert set.union(*splits_of_patient.values()) == {"train", "val", "test"}
    assert prepared.count_rejected() == {"not_an_image_object": 1}
    assert prepared.num_named == len(CLASSES) * NUM_PATIENTS * SLICES_OF_PATIENT


def test_no_patient_is_in_two_folds(folder: Path) -> None:
    data = group_training_data(find_samples(str(folder), CLASSES), CONFIG, "auto")
    folds = assign_folds(data.labels[data.kept], data.groups, 3, seed=0)
    paths = data.found.samples["path"].take(data.kept).to_pylist()
    found: dict[str | None, set[int]] = {}
    for path, fold in zip(paths, folds.tolist(), strict=True):
        found.setdefault(find_patient(path), set()).add(fold)
    assert {len(of_patient) for of_patient in found.values()} == {1}


def test_no_identifier_is_kept_and_the_split_is_reproducible(
    folder: Path, prepared: PreparedData
) -> None:
    for name in IDENTIFIERS:
        assert prepared.scans[name].null_count == prepared.scans.num_rows
    columns = [name for name in prepared.manifest.column_names if name != "thumbnail"]
    text = json.dumps(prepared.manifest.select(columns).to_pylist())
    assert "SECRET" not in text
    assert "1.2.826" not in text
    # The second run hashes with another random key; the groups do not depend on it.
    assert hash_manifest(prepare(folder).manifest) == hash_manifest(prepared.manifest)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write pictures, DICOM files and volumes into every class folder."""
    root = tmp_path_factory.mktemp("mixed")
    rng = np.random.default_rng(1)
    for label in CLASSES:
        (root / label).mkdir()
        for number in range(3):
            voxels = np.zeros((48, 48, 8), np.int16)
            voxels[..., 2:-2] = np.stack([draw(rng) for _ in range(4)], axis=-1)
            content = nib.Nifti1Image(voxels, np.diag([2.0, 2.0, 3.0, 1.0])).to_bytes()
            (root / label / f"v{number}.nii.gz").write_bytes(gzip.compress(content))
            (root / label / f"d{number}.dcm").write_bytes(
                make_mr(draw(rng), PatientID=f"{label}-{number}")
            )
            Image.fromarray(draw(rng)).save(root / label / f"p{number}.png")
    return root


@pytest.fixture(scope="module")
def mixed_data(mixed: Path, local_ray: None) -> PreparedData:  # noqa: ARG001 - runs
    return prepare(mixed)


def test_every_slice_of_a_volume_is_a_sample(mixed: Path, mixed_data: PreparedData) -> None:
    samples = mixed_data.found.samples
    assert samples.num_rows == len(CLASSES) * 3 * (8 + 1 + 1)
    paths = [split_name(path) for path in samples["path"].to_pylist()]
    frames = [-1 if frame is None else frame for _, frame in paths]
    assert samples["frame"].to_pylist() == frames
    assert [f"{mixed}/{path}" for path, _ in paths] == samples["uri"].to_pylist()
    assert mixed_data.count_rejected() == {"little_tissue": len(CLASSES) * 3 * 4}
    scans = mixed_data.scans.to_pylist()
    volumes = [row for row in scans if ".nii.gz#frame=" in row["scan_uri"]]
    assert [row["frame"] for row in volumes[:8]] == list(range(8))
    assert {row["plane"] for row in volumes} == {"axial"}
    assert {row["grey_range"] for row in scans} == {"percentile", None}
    splits: dict[str, set[str]] = {}
    for row in mixed_data.manifest.to_pylist():
        if row["reason"] is None:
            splits.setdefault(split_name(row["path"])[0], set()).add(row["split"])
    assert all(len(of_file) == 1 for of_file in splits.values())


def decode_files(data: PreparedData, indices: Sequence[int]) -> list[NDArray[np.uint8]]:
    rows = data.found.samples.take(indices).to_pylist()
    images = []
    for row in rows:
        file = open_file(Path(row["uri"]).read_bytes())
        index = find_slice(file, None if row["frame"] < 0 else row["frame"])
        images.append(open_slice(file, index, CONFIG.preprocessing).scan.image)
    return images


def test_pixels_equal_decoded_files_in_and_outside_the_object_store(
    mixed: Path, mixed_data: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    usable = np.flatnonzero(mixed_data.splits != "rejected")
    chosen = np.random.default_rng(0).permutation(usable)[:20].tolist()
    expected = decode_files(mixed_data, chosen)
    assert mixed_data.store.holds_pixels(CONFIG.preprocessing)
    held = mixed_data.store.load_images(chosen, CONFIG.preprocessing)
    np.testing.assert_array_equal(held, expected)
    monkeypatch.setattr(fingerprint, "OBJECT_STORE_SHARE", 0.0)
    outside = prepare(mixed)
    assert not outside.store.in_object_store
    read = outside.store.load_images(chosen, CONFIG.preprocessing)
    np.testing.assert_array_equal(read, expected)


def test_slices_of_a_volume_are_one_block_of_the_stream(mixed_data: PreparedData) -> None:
    ids = np.random.default_rng(0).permutation(np.flatnonzero(mixed_data.splits != "rejected"))
    setup = LoaderSetup(
        kind="stream",
        train_ids=ids,
        val_ids=ids[:0],
        labels=mixed_data.labels,
        store=mixed_data.store,
        preprocessing=CONFIG.preprocessing,
        global_batch_size=4,
        seed=0,
    )
    blocks = list_blocks(setup, ids)
    volumes = [block for block in blocks if block["frame"][0].as_py() >= 0]
    assert all(len(set(block["uri"].to_pylist())) == 1 for block in volumes)
    assert len(volumes) == len(CLASSES) * 3
    found = [number for block in blocks for number in block["index"].to_pylist()]
    assert sorted(found) == sorted(ids.tolist())


def test_an_audit_splits_volumes_and_training_reads_the_split(mixed: Path, tmp_path: Path) -> None:
    job = AuditJob(
        data_uri=str(mixed),
        output_uri=str(tmp_path),
        make_split="grouped",
        folds=2,
        val_fraction=0.25,
        test_fraction=0.25,
    )
    document = audit(job)
    assert document["resolution"]["formats"].keys() == {"NIfTI", "DICOM", "PNG"}
    (rejected,) = document["unreadable"]
    assert (rejected["reason"], rejected["n"]) == ("little_tissue", len(CLASSES) * 3 * 4)
    groups = pq.read_table(tmp_path / "groups.parquet")
    assert not set(IDENTIFIERS) & set(groups.column_names)
    found = find_samples(document["split"]["uri"], CLASSES)
    again = expand_files(found, ReadOptions())
    assert again.samples.num_rows == document["num_usable"]
    assert again.samples.equals(found.samples), "rows that name slices were expanded again"
    by_file: dict[str, set[str]] = {}
    for row in found.samples.to_pylist():
        by_file.setdefault(row["uri"], set()).add(row["split"])
    assert all(len(splits) == 1 for splits in by_file.values())
