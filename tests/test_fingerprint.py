"""Fingerprints of a data set: hashes, kept pixels, and rejections."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from brainray.data import fingerprint
from brainray.data.fingerprint import Fingerprints, fingerprint_samples
from brainray.data.labelled import find_samples
from brainray.images.preprocess import Preprocessing
from brainray.images.slices import ReadOptions
from tests.conftest import CLASSES
from tests.open_scans import load_image

pytestmark = pytest.mark.usefixtures("local_ray")


def fingerprint_folder(folder: Path) -> Fingerprints:
    samples = find_samples(str(folder), CLASSES, splits=("train",)).samples
    return fingerprint_samples(samples, reading=ReadOptions())


SIZE = Preprocessing(size_px=48)


def load_files(files: Sequence[Path], preprocessing: Preprocessing = SIZE) -> list[NDArray]:
    return [load_image(file.read_bytes(), preprocessing) for file in files]


def list_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_every_file_has_a_fingerprint_and_can_be_opened_again(phantom_folder: Path) -> None:
    found = fingerprint_folder(phantom_folder)
    files = list_files(phantom_folder / "Training")
    assert found.table["index"].to_pylist() == list(range(len(files)))
    assert found.table["reason"].null_count == len(files)
    assert found.store.in_object_store
    chosen = [files[i] for i in (5, 0, 5)]
    np.testing.assert_array_equal(found.store.load_images([5, 0, 5], SIZE), load_files(chosen))


def test_kept_pixels_equal_freshly_decoded_ones(phantom_folder: Path) -> None:
    samples = find_samples(str(phantom_folder), CLASSES).samples
    sizes = [
        Preprocessing(size_px=48),
        Preprocessing(size_px=32, fit="pad"),
        Preprocessing(size_px=32, fit="pad", crop="head"),
        Preprocessing(size_px=32, fit="pad", intensity="percentile"),
    ]
    kept = fingerprint_samples(samples, reading=ReadOptions(), keep=sizes).store
    plain = fingerprint_samples(samples, reading=ReadOptions()).store
    uris = [samples["uri"][index].as_py() for index in (7, 0, 7)]
    for preprocessing in sizes:
        again = load_files(list(map(Path, uris)), preprocessing)
        np.testing.assert_array_equal(kept.load_images([7, 0, 7], preprocessing), again)
        np.testing.assert_array_equal(plain.load_images([7, 0, 7], preprocessing), again)


def test_kept_pixels_are_not_decoded_again(
    phantom_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = find_samples(str(phantom_folder), CLASSES).samples
    size = Preprocessing(size_px=48)
    kept = fingerprint_samples(samples, reading=ReadOptions(), keep=[size]).store
    monkeypatch.setattr("brainray.data.scan_store.open_slice", None)
    assert kept.load_images([3, 1], size).shape == (2, 48, 48)
    with pytest.raises(TypeError):
        kept.load_images([3], Preprocessing(size_px=64))


def test_every_rejected_scan_has_a_reason(phantom_folder: Path, tmp_path: Path) -> None:
    for name in CLASSES:
        source = next((phantom_folder / "Testing" / name).iterdir())
        (tmp_path / name).mkdir()
        (tmp_path / name / source.name).write_bytes(source.read_bytes())
    (tmp_path / "glioma" / "a-empty.jpg").write_bytes(b"")
    (tmp_path / "glioma" / "b-text.png").write_text("hello")
    whole = next(p for p in (phantom_folder / "Testing").rglob("*.jpg")).read_bytes()
    (tmp_path / "glioma" / "c-cut.jpg").write_bytes(whole[: len(whole) // 2])
    found = find_samples(str(tmp_path), CLASSES)
    (tmp_path / "meningioma" / "gone.jpg").write_bytes(whole)
    found_with_gone = find_samples(str(tmp_path), CLASSES)
    (tmp_path / "meningioma" / "gone.jpg").unlink()
    reasons = dict(
        zip(
            found_with_gone.samples["path"].to_pylist(),
            fingerprint_samples(found_with_gone.samples, reading=ReadOptions())
            .table["reason"]
            .to_pylist(),
            strict=True,
        )
    )
    assert {p: r for p, r in reasons.items() if r} == {
        "glioma/a-empty.jpg": "empty",
        "glioma/b-text.png": "not_an_image",
        "glioma/c-cut.jpg": "truncated",
        "meningioma/gone.jpg": "missing",
    }
    assert found.samples.num_rows + 1 == len(reasons)


def test_images_in_parquet_equal_those_in_files(
    phantom_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = list_files(phantom_folder / "Training")
    table = pa.table(
        {
            "image_bytes": [file.read_bytes() for file in files],
            "label": [file.parent.name for file in files],
            "path": [file.name for file in files],
        }
    )
    pq.write_table(table, tmp_path / "train.parquet", row_group_size=10)
    for share in (0.4, 0.0):  # pixels in the object store, or read from the file
        monkeypatch.setattr(fingerprint, "OBJECT_STORE_SHARE", share)
        found = fingerprint_folder(tmp_path)
        assert found.store.in_object_store == (share > 0)
        chosen = load_files([files[i] for i in (0, 41, 7)])
        np.testing.assert_array_equal(found.store.load_images([0, 41, 7], SIZE), chosen)


def test_only_blocks_with_requested_scans_are_fetched(
    phantom_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "ROWS_PER_TASK", 10)
    samples = find_samples(str(phantom_folder), CLASSES, splits=("train",)).samples
    size = Preprocessing(size_px=32)
    store = fingerprint_samples(samples, reading=ReadOptions(), keep=[size]).store
    pixels = store.open_pixels(size, [3, 12])
    expected = load_files([Path(samples["uri"][index].as_py()) for index in (12, 3)], size)
    np.testing.assert_array_equal(pixels.take(np.array([12, 3])), expected)
    with pytest.raises(KeyError):
        pixels.take(np.array([50]))
