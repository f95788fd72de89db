"""Opening scan files: their formats, and their slices."""

import gzip
import io
import re
import struct
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset

from brainray.errors import RejectedImage
from brainray.images.decode import REJECTION_REASONS, DecodeLimits
from brainray.images.preprocess import Preprocessing, open_samples
from brainray.images.slices import (
    OpenedSlice,
    ReadOptions,
    name_slice,
    open_file,
    open_slice,
    split_name,
)
from tests.dicom_files import PYDICOM_FILES, RAMP, make_dataset, make_enhanced, make_item, make_mr
from tests.open_scans import open_slices

KEY = b"0123456789abcdef"
REPOSITORY = Path(__file__).parents[1]
STORED = Preprocessing(size_px=64)
PERCENTILE = Preprocessing(size_px=64, intensity="percentile")


def draw_volume() -> NDArray[np.int16]:
    """Draw a ball in a volume of 24 x 20 x 16 (right, front, top); its end slices are empty."""
    x, y, z = np.indices((24, 20, 16))
    inside = (x - 12) ** 2 + (y - 10) ** 2 + 2 * (z - 8) ** 2 < 80
    return np.where(inside, 300 + 9 * x + 5 * y + 3 * z, 2).astype(np.int16)


def make_nifti(kind: type = nib.Nifti1Image, volume: NDArray | None = None) -> bytes:
    volume = draw_volume() if volume is None else volume
    content: bytes = kind(volume, np.diag([1, 1, 3, 1])).to_bytes()
    return content


def make_png(pixels: NDArray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def make_bare(is_little_endian: bool, is_implicit: bool) -> bytes:
    """Make DICOM without preamble and meta information."""
    buffer = io.BytesIO()
    dataset = make_dataset(RAMP.astype("<u2" if is_little_endian else ">u2"))
    pydicom.dcmwrite(buffer, dataset, implicit_vr=is_implicit, little_endian=is_little_endian)
    return buffer.getvalue()


def make_tiff_and_dicom() -> bytes:
    """Make a DICOM file whose preamble begins a TIFF file, as PS3.10 allows."""
    return struct.pack("<2sHL", b"II", 42, 8).ljust(128, b"\0") + make_mr()[128:]


# ---- formats -------------------------------------------------------------------------------------

FILES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "part 10": ("dicom", make_mr),
    "without preamble": ("dicom", lambda: make_mr()[132:]),
    "implicit, no meta": ("dicom", lambda: make_bare(True, True)),
    "explicit, no meta": ("dicom", lambda: make_bare(True, False)),
    "big endian, no meta": ("dicom", lambda: make_bare(False, False)),
    "DICOM behind a TIFF header": ("dicom", make_tiff_and_dicom),
    "NIfTI-1": ("nifti", make_nifti),
    "NIfTI-2": ("nifti", lambda: make_nifti(nib.Nifti2Image)),
    "NIfTI-1, gzipped": ("nifti", lambda: gzip.compress(make_nifti())),
    "NIfTI-2, gzipped": ("nifti", lambda: gzip.compress(make_nifti(nib.Nifti2Image))),
    "PNG": ("picture", lambda: make_png(RAMP.astype(np.uint8))),
    "16-bit PNG": ("picture", lambda: make_png(RAMP)),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_recognised_by_its_bytes(name: str) -> None:
    expected, make = FILES[name]
    file = open_file(make())
    assert file.format == expected
    index = len(file.slices) // 2
    opened = open_slice(file, index, PERCENTILE)
    assert opened.scan.image.shape == (64, 64)
    assert len(np.unique(opened.scan.image)) > 50, "not blank"
    assert opened.info == file.slices[index]


def test_dicom_behind_a_tiff_header_has_its_own_pixels() -> None:
    np.testing.assert_array_equal(open_file(make_tiff_and_dicom()).decode(0), RAMP)


@pytest.mark.parametrize(
    ("reason", "content"),
    [
        ("empty", b""),
        ("not_an_image", b"Dear colleague, the patient"),
        ("not_an_image", bytes(500)),
        ("not_an_image", gzip.compress(b"Dear colleague" * 99, mtime=0)),
        ("not_an_image", gzip.compress(make_mr(), mtime=0)),
        ("truncated", gzip.compress(make_nifti(), mtime=0)[:40]),
        ("truncated", make_nifti()[:3000]),
        ("not_an_image", bytes(128) + b"DICM" + bytes(40)),
        ("no_pixels", make_mr(PixelData=None)),
        ("unsupported", b"%PDF-1.7\n"),
        ("unsupported", b"PK\x03\x04" + bytes(30)),
    ],
)
def test_a_file_without_a_scan_is_rejected(reason: str, content: bytes) -> None:
    with pytest.raises(RejectedImage) as caught:
        list(open_slices(content, PERCENTILE))
    assert caught.value.reason == reason, caught.value.message


def test_limits_hold_for_every_format() -> None:
    for _, make in FILES.values():
        options = ReadOptions(limits=DecodeLimits(max_pixels=100))
        with pytest.raises(RejectedImage) as caught:
            list(open_slices(make(), PERCENTILE, options))
        assert caught.value.reason == "too_large"


def test_the_guide_lists_all_reasons() -> None:
    guide = (REPOSITORY / "docs" / "dicom.md").read_text()
    section = guide.partition("\n## Reasons\n")[2].partition("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    named = re.findall("`([a-z_]+)`", " ".join(cells))
    assert sorted(named) == sorted(REJECTION_REASONS)


def list_test_files() -> list[Path]:
    """List the files of pydicom and nibabel, and of pydicom-data if it is installed."""
    folders = [PYDICOM_FILES]
    for name, inner in (
        ("nibabel", "tests/data"),
        ("nibabel", "nicom/tests/data"),
        ("data_store", "data"),
    ):
        spec = find_spec(name)
        locations = (spec.submodule_search_locations or ()) if spec else ()
        folders += [Path(one) / inner for one in locations]
    return [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]


@pytest.mark.heavy
def test_every_test_file_of_the_libraries_is_opened_or_rejected() -> None:
    counts: Counter[str] = Counter()
    for path in list_test_files():
        try:
            for one in islice(open_slices(path.read_bytes(), PERCENTILE), 3):
                outcome = "opened" if isinstance(one, OpenedSlice) else one[1].reason
                counts[outcome] += 1
        except RejectedImage as rejection:
            counts[rejection.reason] += 1
    assert set(counts) - {"opened"} <= set(REJECTION_REASONS)
    assert counts["opened"] >= 30
    assert {"not_mr", "not_an_image_object", "truncated", "secondary_capture"} <= set(counts)


# ---- names ---------------------------------------------------------------------------------------


@given(uri=st.text(), frame=st.none() | st.integers(0, 10**6))
def test_the_name_of_a_slice_is_split_into_uri_and_frame(uri: str, frame: int | None) -> None:
    if frame is None and split_name(uri)[1] is not None:
        return  # a file whose own name ends like a slice's
    assert split_name(name_slice(uri, frame)) == (uri, frame)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("/scans/a.dcm", ("/scans/a.dcm", None)),
        ("/scans/a.dcm#frame=12", ("/scans/a.dcm", 12)),
        ("s3://b/#1/a#frame=2.nii#frame=0", ("s3://b/#1/a#frame=2.nii", 0)),
        ("/scans/#frame=x", ("/scans/#frame=x", None)),
        ("/scans/a\n#frame=3", ("/scans/a\n", 3)),
        ("/scans/a#frame=3\n", ("/scans/a#frame=3\n", None)),
        ("/scans/a#frame=٣", ("/scans/a#frame=٣", None)),
    ],
)
def test_only_a_valid_frame_suffix_is_split_off(name: str, parts: tuple[str, int | None]) -> None:
    assert split_name(name) == parts


# ---- slices of a file ----------------------------------------------------------------------------


def test_a_file_of_one_slice_has_no_frame() -> None:
    for content in (make_mr(), make_png(RAMP)):
        (opened,) = open_slices(content, PERCENTILE)
        assert isinstance(opened, OpenedSlice)
        assert opened.info.frame is None


def make_volume(second: Dataset) -> bytes:
    """Make an enhanced object of three frames."""
    shared = make_item(
        PlaneOrientationSequence=[make_item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
        PixelMeasuresSequence=[make_item(PixelSpacing=[2, 3])],
    )

    def move(item: Dataset, height: float) -> Dataset:
        item.PlanePositionSequence = [make_item(ImagePositionPatient=[0, 0, height])]
        return item

    groups = [move(Dataset(), 5), move(second, 9), move(Dataset(), 13)]
    return make_enhanced(np.stack([RAMP, RAMP[::-1], RAMP.T]), shared, groups)


def test_an_enhanced_object_has_a_slice_for_each_frame() -> None:
    slices = list(open_slices(make_volume(Dataset()), PERCENTILE, key=KEY))
    assert all(isinstance(one, OpenedSlice) for one in slices)
    infos = [one.info for one in slices if isinstance(one, OpenedSlice)]
    assert [info.frame for info in infos] == [0, 1, 2]
    assert [info.position_mm for info in infos] == [5, 9, 13]
    assert {(info.plane, info.spacing_mm) for info in infos} == {("axial", (2, 3))}
    assert len({(info.series, info.sop_instance, info.patient) for info in infos}) == 1
    assert None not in (infos[0].series, infos[0].study, infos[0].patient, infos[0].sop_instance)


@pytest.mark.parametrize(
    ("reason", "second"),
    [
        (
            "derived_map",
            make_item(
                MRImageFrameTypeSequence=[make_item(FrameType=["DERIVED", "PRIMARY", "X", "ADC"])]
            ),
        ),
        (
            "corrupt",  # only when its pixels are scaled
            make_item(
                PixelValueTransformationSequence=[
                    make_item(RescaleSlope="1e300", RescaleIntercept="0", RescaleType="US")
                ]
            ),
        ),
    ],
)
def test_a_rejected_frame_does_not_reject_its_neighbours(reason: str, second: Dataset) -> None:
    first, rejected, third = open_slices(make_volume(second), PERCENTILE)
    assert isinstance(first, OpenedSlice)
    assert isinstance(third, OpenedSlice)
    assert not isinstance(rejected, OpenedSlice)
    info, rejection = rejected
    assert (info.frame, info.position_mm, rejection.reason) == (1, 9, reason)
    np.testing.assert_array_equal(third.scan.samples, RAMP.T)


@pytest.mark.parametrize("is_gzipped", [True, False])
def test_slices_with_little_tissue_are_rejected_one_by_one(is_gzipped: bool) -> None:
    content = gzip.compress(make_nifti()) if is_gzipped else make_nifti()
    slices = list(open_slices(content, PERCENTILE, key=KEY))
    opened = [one for one in slices if isinstance(one, OpenedSlice)]
    rejected = [one for one in slices if not isinstance(one, OpenedSlice)]
    assert (len(slices), len(opened)) == (16, 11)
    assert {rejection.reason for _, rejection in rejected} == {"little_tissue"}
    infos = [one.info if isinstance(one, OpenedSlice) else one[0] for one in slices]
    assert [info.frame for info in infos] == list(range(16))
    assert [info.position_mm for info in infos] == [3.0 * index for index in range(16)]
    assert len({info.series for info in infos}) == 1
    assert infos[0].sop_instance == infos[0].series, "so that a copy of the file is a duplicate"
    assert open_file(content).slices[0].series is None, "without a key"


def test_each_rejection_of_a_slice_raises_a_new_exception() -> None:
    file = open_file(make_nifti())
    caught = []
    for _ in range(2):
        with pytest.raises(RejectedImage) as raised:
            file.decode(0)
        caught.append(raised.value)
    assert caught[0] is not caught[1]
    assert caught[0].reason == "little_tissue"


@pytest.mark.parametrize(("plane", "count"), [("axial", 16), ("coronal", 20), ("sagittal", 24)])
def test_a_volume_is_sliced_in_the_chosen_plane(plane: str, count: int) -> None:
    file = open_file(make_nifti(), ReadOptions(plane=plane))  # type: ignore[arg-type]
    assert len(file.slices) == count
    (flags,) = {info.flags for info in file.slices}
    assert ("non_axial" in flags) == (plane != "axial")


def test_a_volume_without_an_orientation_has_no_plane() -> None:
    image = nib.Nifti1Image(draw_volume(), None)
    image.header["sform_code"] = image.header["qform_code"] = 0
    info = open_file(image.to_bytes()).slices[8]
    assert (info.plane, info.flags) == (None, ("orientation_unknown",))


# ---- grey ranges ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "elements"),
    [
        ("window", {"WindowCenter": 1000, "WindowWidth": 500}),
        ("samples", {}),
        ("voi_lut", {"VOILUTSequence": [make_item(LUTDescriptor=[4, 0, 8], LUTData=b"\0\1\2\3")]}),
    ],
)
def test_stored_intensity_uses_the_displayed_grey_levels(expected: str, elements: dict) -> None:
    file = open_file(make_mr(**elements))
    opened = open_slice(file, 0, STORED)
    assert opened.grey_range == expected
    np.testing.assert_array_equal(opened.scan.image, file.render(0)[0])


def test_percentile_intensity_ignores_the_window() -> None:
    narrow = make_mr(WindowCenter=10, WindowWidth=5)
    opened = open_slice(open_file(narrow), 0, PERCENTILE)
    assert opened.grey_range == "percentile"
    np.testing.assert_array_equal(opened.scan.image, open_samples(RAMP, PERCENTILE).image)


def test_a_picture_keeps_its_stored_grey_levels() -> None:
    pixels = (RAMP // 16).astype(np.uint8)
    opened = open_slice(open_file(make_png(pixels)), 0, STORED)
    assert opened.grey_range == "stored"
    np.testing.assert_array_equal(opened.scan.image, pixels)


def test_a_volume_is_displayed_by_its_percentiles() -> None:
    shown, grey_range = open_file(make_nifti()).render(8)
    assert grey_range == "samples"
    assert (shown.min(), shown.max(), shown.dtype) == (0, 255, np.uint8)
    flat = np.zeros((8, 8, 3), np.int16)
    flat[..., 1] = 7
    shown, _ = open_file(make_nifti(volume=flat)).render(1)
    assert not shown.any()
