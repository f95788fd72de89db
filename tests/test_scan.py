"""Opening every scan of a data set once: what is kept of it, and what is rejected."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from brainray.data import scan as scan_module
from brainray.data.labelled import find_samples
from brainray.data.scan import ScanResult, scan_samples
from brainray.images.decode import DecodeLimits
from brainray.images.preprocess import Preprocessing, load_image
from tests.conftest import CLASSES

pytestmark = pytest.mark.usefixtures("local_ray")


def scan(folder: Path) -> ScanResult:
    samples = find_samples(str(folder), CLASSES, splits=("train",)).samples
    return scan_samples(samples, limits=DecodeLimits())


def test_scan_knows_every_file_and_gives_its_bytes(phantom_folder: Path) -> None:
    found = scan(phantom_folder)
    files = sorted(p for p in (phantom_folder / "Training").rglob("*") if p.is_file())
    assert found.table["index"].to_pylist() == list(range(len(files)))
    assert found.table["reason"].null_count == len(files)
    assert found.store.in_object_store
    assert found.store.read([5, 0, 5]) == [files[i].read_bytes() for i in (5, 0, 5)]


def test_kept_pixels_are_those_that_decoding_again_gives(phantom_folder: Path) -> None:
    samples = find_samples(str(phantom_folder), CLASSES).samples
    sizes = [
        Preprocessing(size_px=48),
        Preprocessing(size_px=32, fit="pad"),
        Preprocessing(size_px=32, fit="pad", crop="head"),
        Preprocessing(size_px=32, fit="pad", intensity="percentile"),
    ]
    limits = DecodeLimits()
    kept = scan_samples(samples, limits=limits, keep=sizes).store
    plain = scan_samples(samples, limits=limits).store
    for preprocessing in sizes:
        again = [load_image(c, preprocessing, limits) for c in plain.read([7, 0, 7])]
        np.testing.assert_array_equal(kept.load_images([7, 0, 7], preprocessing, limits), again)
        np.testing.assert_array_equal(plain.load_images([7, 0, 7], preprocessing, limits), again)


def test_kept_pixels_are_not_decoded_again(
    phantom_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = find_samples(str(phantom_folder), CLASSES).samples
    size = Preprocessing(size_px=48)
    kept = scan_samples(samples, limits=DecodeLimits(), keep=[size]).store
    monkeypatch.setattr("brainray.data.scan.load_image", None)
    assert kept.load_images([3, 1], size, DecodeLimits()).shape == (2, 48, 48)
    with pytest.raises(TypeError):
        kept.load_images([3], Preprocessing(size_px=64), DecodeLimits())


def test_scan_names_the_reason_of_every_scan_it_rejects(
    phantom_folder: Path, tmp_path: Path
) -> None:
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
            scan_samples(found_with_gone.samples, limits=DecodeLimits())
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


def test_parquet_rows_are_the_files_they_were_made_of(
    phantom_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = sorted(p for p in (phantom_folder / "Training").rglob("*") if p.is_file())
    table = pa.table(
        {
            "image_bytes": [file.read_bytes() for file in files],
            "label": [file.parent.name for file in files],
            "path": [file.name for file in files],
        }
    )
    pq.write_table(table, tmp_path / "train.parquet", row_group_size=10)
    for share in (0.4, 0.0):  # held in the object store, and streamed from the file
        monkeypatch.setattr(scan_module, "OBJECT_STORE_SHARE", share)
        found = scan(tmp_path)
        assert found.store.in_object_store == (share > 0)
        assert found.store.read([0, 41, 7]) == [files[i].read_bytes() for i in (0, 41, 7)]


def test_only_the_blocks_of_the_scans_asked_for_are_fetched(
    phantom_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan_module, "SCAN_ROWS_PER_TASK", 10)
    samples = find_samples(str(phantom_folder), CLASSES, splits=("train",)).samples
    size = Preprocessing(size_px=32)
    store = scan_samples(samples, limits=DecodeLimits(), keep=[size]).store
    pixels = store.open_pixels(size, [3, 12])
    expected = [load_image(c, size, DecodeLimits()) for c in store.read([12, 3])]
    np.testing.assert_array_equal(pixels.take(np.array([12, 3])), expected)
    with pytest.raises(KeyError):
        pixels.take(np.array([50]))
