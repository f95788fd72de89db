"""Files with several slices: finding them, opening slices, and grouping."""

import gzip
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

from brainray.data import read
from brainray.data.fingerprint import count_slices, measure_properties
from brainray.data.labelled import find_samples
from brainray.data.read import SampleReader, open_rows
from brainray.errors import RejectedImage
from brainray.evaluation.prepared import find_patients, join_groups
from brainray.images.decode import DecodeLimits
from brainray.images.preprocess import Preprocessing
from brainray.images.slices import ReadOptions, find_slice, open_file, open_slice, show_slice
from tests.dicom_files import make_enhanced, make_item, make_mr

CLASSES = ("a", "b")
READING = ReadOptions()


def make_volume(num_slices: int = 12) -> bytes:
    """Make a NIfTI volume whose first and last slices are empty."""
    voxels = np.zeros((32, 30, num_slices), np.int16)
    voxels[4:28, 4:26, 2:-2] = 100 + np.arange(num_slices - 4)
    content: bytes = nib.Nifti1Image(voxels, np.diag([2.0, 2.0, 3.0, 1.0])).to_bytes()
    return content


def make_frames(count: int = 3) -> bytes:
    frames = np.arange(count * 256, dtype=np.uint16).reshape(count, 16, 16)
    position = {
        "PlanePositionSequence": [make_item(ImagePositionPatient=[0, 0, 1])],
        "PlaneOrientationSequence": [make_item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
    }
    return make_enhanced(frames, make_item(), [make_item(**position) for _ in range(count)])


# ----------------------------------------------------------------------------- finding files


def test_dicom_and_nifti_files_are_found_by_their_names(tmp_path: Path) -> None:
    scans = ["1.dcm", "2.DICOM", "3.ima", "4.nii", "5.nii.gz", "IM0001", "1.2.840.7", "6.png"]
    others = ["notes.txt", "DICOMDIR", "map.gz"]
    for label in CLASSES:
        for name in (*scans, *others):
            file = tmp_path / "train" / label / "series 1" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"x")
    (tmp_path / "LICENSE").write_bytes(b"no suffix, and in no class folder")
    found = find_samples(str(tmp_path), CLASSES)
    names = {path.rpartition("/")[2] for path in found.samples["path"].to_pylist()}
    assert names == set(scans)
    assert len(found.other_files) == 2 * len(others) + 1
    assert set(found.samples["frame"].to_pylist()) == {-1}


def test_a_manifest_names_slices(tmp_path: Path) -> None:
    uris = ["a.nii", "a.nii", "b.dcm"]
    table = {"uri": uris, "frame": pa.array([0, 7, None], pa.int64()), "label": ["a", "b", "b"]}
    pq.write_table(pa.table(table), tmp_path / "manifest.parquet")
    samples = find_samples(str(tmp_path / "manifest.parquet"), CLASSES).samples
    assert samples["frame"].to_pylist() == [0, 7, -1]
    assert samples["path"].to_pylist() == ["a.nii#frame=0", "a.nii#frame=7", "b.dcm"]
    assert samples["uri"].to_pylist() == [str(tmp_path / uri) for uri in uris]


@pytest.mark.parametrize(
    ("content", "count"),
    [
        (make_mr(), 0),
        (make_frames(3), 3),
        (make_volume(12), 12),
        (gzip.compress(make_volume(9), mtime=0), 9),
        (b"no image", 0),
        (b"", 0),
    ],
    ids=["classic", "enhanced", "nifti", "gzip", "text", "empty"],
)
def test_slices_are_counted_whatever_the_file_name(
    tmp_path: Path, content: bytes, count: int
) -> None:
    (tmp_path / "file").write_bytes(content)
    assert count_slices(str(tmp_path / "file"), READING) == count


def test_a_missing_file_has_no_slices(tmp_path: Path) -> None:
    assert count_slices(str(tmp_path / "file"), READING) == 0


# ----------------------------------------------------------------------------- opening slices


def make_rows(*slices: tuple[Path, int]) -> pa.Table:
    rows = [
        {"uri": str(file), "row_group": -1, "row": -1, "frame": frame} for file, frame in slices
    ]
    return pa.Table.from_pylist(rows)


def test_a_file_is_opened_once_for_all_its_slices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume, single = tmp_path / "v.nii.gz", tmp_path / "s.dcm"
    volume.write_bytes(gzip.compress(make_volume()))
    single.write_bytes(make_mr())
    opened: list[bytes] = []
    open_one: Callable[..., object] = read.open_file

    def count(content: bytes, *given: object, **options: object) -> object:
        opened.append(content)
        return open_one(content, *given, **options)

    monkeypatch.setattr(read, "open_file", count)
    slices = [(volume, 3), (volume, 4), (volume, 5), (single, -1)]
    found = [file.decode(index).mean() for file, index in open_rows(make_rows(*slices), READING)]
    assert len(opened) == 2
    volume_file = open_file(make_volume())
    expected = [volume_file.decode(index).mean() for index in (3, 4, 5)]
    assert found == [*expected, open_file(make_mr()).decode(0).mean()]


def test_a_row_with_a_missing_or_invalid_frame_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "v.nii").write_bytes(make_volume(12))
    reader = SampleReader(READING)
    for frame, reason in ((-1, "multi_frame"), (12, "missing")):
        with pytest.raises(RejectedImage) as caught:
            reader.open(str(tmp_path / "v.nii"), -1, -1, frame)
        assert caught.value.reason == reason
    _, index = reader.open(str(tmp_path / "v.nii"), -1, -1, 11)
    assert index == 11


def test_a_16_bit_png_is_read_at_full_depth(tmp_path: Path) -> None:
    pixels = (np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64)
    Image.fromarray(pixels).save(tmp_path / "deep.png")
    file = open_file((tmp_path / "deep.png").read_bytes())
    opened = open_slice(file, 0, Preprocessing(size_px=32))
    assert opened.scan.samples.dtype == np.uint16
    assert opened.grey_range == "stored"
    assert show_slice(file, 0).max() == 255
    with pytest.raises(RejectedImage):
        find_slice(file, 1)


@pytest.mark.parametrize("intensity", ["stored", "percentile"])
def test_samples_decoded_before_give_the_same_input(intensity: str) -> None:
    preprocessing = Preprocessing(size_px=32, intensity=intensity)  # type: ignore[arg-type]
    for content, index in ((make_mr(), 0), (make_volume(), 5)):
        file = open_file(content)
        again = open_slice(file, index, preprocessing, file.decode(index)).scan.image
        np.testing.assert_array_equal(open_slice(file, index, preprocessing).scan.image, again)


# -------------------------------------------------------------------------------- groups


def group(rows: list[dict], near_duplicates: list[int]) -> list[int]:
    """Group samples; columns that a row leaves out are null."""
    names = ("uri", "frame", "group", "patient", "study", "series")
    whole = [dict.fromkeys(names) | {"uri": f"{n}", "frame": -1} | r for n, r in enumerate(rows)]
    schema = pa.schema([(name, pa.int32() if name == "frame" else pa.string()) for name in names])
    table = pa.Table.from_pylist(whole, schema=schema)
    groups: NDArray[np.int64] = join_groups(
        np.array(near_duplicates, np.int64), table, table, np.arange(len(rows))
    )
    return groups.tolist()


def test_slices_of_one_patient_are_one_group() -> None:
    rows = [{"patient": "p", "study": "s1"}, {"patient": "p", "study": "s2"}, {"patient": "q"}, {}]
    first, second, other, picture = group(rows, [0, 1, 2, 3])
    assert first == second
    assert len({first, other, picture}) == 3


def test_without_a_patient_slices_are_grouped_by_study_then_series_then_file() -> None:
    for rows in (
        [{"study": "s", "series": "1"}, {"study": "s", "series": "2"}],
        [{"series": "n", "uri": "x.nii"}, {"series": "n", "uri": "copy.nii"}],
        [{"uri": "x.dcm", "frame": 0}, {"uri": "x.dcm", "frame": 1}],
    ):
        assert len(set(group(rows, [0, 1]))) == 1
        assert len(set(group([rows[0], {}], [0, 1]))) == 2
    assert len(set(group([{"uri": "x.png"}, {"uri": "y.png"}], [0, 1]))) == 2


def test_given_groups_patients_and_near_duplicates_are_merged() -> None:
    rows = [{"patient": "p"}, {"patient": "p", "group": "g"}, {"group": "g"}, {}, {"patient": "q"}]
    assert len(set(group(rows, [0, 1, 2, 2, 4])[:4])) == 1
    assert len(set(group(rows, [0, 1, 2, 2, 4]))) == 2


def test_group_numbers_do_not_depend_on_the_hashes() -> None:
    rows = [{"patient": name} for name in "pqprq"]
    renamed = [{"patient": {"p": "z", "q": "a", "r": "m"}[row["patient"]]} for row in rows]
    assert group(rows, [0, 1, 2, 3, 4]) == group(renamed, [0, 1, 2, 3, 4])


def test_pictures_have_no_patient() -> None:
    table = pa.table(
        {
            "uri": ["a.png"],
            "frame": pa.array([-1], pa.int32()),
            **{name: pa.nulls(1, pa.string()) for name in ("patient", "study", "series")},
        }
    )
    assert find_patients(table, table).to_pylist() == [None]


# -------------------------------------------------------------------------------- properties


@pytest.mark.parametrize(
    ("content", "name", "num_slices"), [(make_mr(), "DICOM", 1), (make_volume(12), "NIfTI", 12)]
)
def test_properties_of_dicom_and_nifti(content: bytes, name: str, num_slices: int) -> None:
    file = open_file(content)
    pixels = show_slice(file, num_slices // 2)
    properties = measure_properties(content, file, pixels, DecodeLimits())
    assert (properties["format"], properties["mode"]) == (name, "grey")
    assert properties["size_bytes"] == len(content) // num_slices
    assert (properties["height_px"], properties["width_px"]) == pixels.shape
