"""NIfTI: orientation, values, slices with little tissue, and damaged files."""

import gzip
import tracemalloc
from importlib.util import find_spec
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from brainray.errors import RejectedImage
from brainray.images.decode import REJECTION_REASONS, DecodeLimits
from brainray.images.dicom import open_dicom
from brainray.images.dicom_pixels import decode_frame
from brainray.images.nifti import MIN_TISSUE_FRACTION, Volume, read_nifti
from brainray.images.slices import Plane
from tests.dicom_files import make_mr

NIBABEL_FILES = Path(find_spec("nibabel").submodule_search_locations[0]) / "tests" / "data"  # type: ignore[union-attr,index]

# Axes point right, front and top; random voxels make every orientation different.
BRAIN = np.random.default_rng(11).integers(200, 900, (6, 8, 5)).astype(np.int16)
RAS = np.diag([2.0, 3.0, 4.0, 1.0])


def make_nifti(volume: NDArray = BRAIN, affine: NDArray | None = RAS, **header) -> bytes:
    image = nib.Nifti1Image(volume, affine)
    for name, value in header.items():
        image.header[name] = value
    return image.to_bytes()


def patch(content: bytes, **fields) -> bytes:
    """Change header fields without the checks of nibabel."""
    header = nib.Nifti1Header(content[:348], check=False)
    for name, value in fields.items():
        header[name] = value
    return header.binaryblock + content[348:]


def reorient(volume: NDArray, affine: NDArray, axes: str) -> tuple[NDArray, NDArray]:
    """Store the same anatomy with other axes."""
    now = nib.io_orientation(affine)
    turns = nib.orientations.ornt_transform(now, nib.orientations.axcodes2ornt(tuple(axes)))
    turned_affine = affine @ nib.orientations.inv_ornt_aff(turns, volume.shape)
    return nib.apply_orientation(volume, turns), turned_affine


def check_rejected(content: bytes, reason: str, limits: DecodeLimits | None = None) -> str:
    with pytest.raises(RejectedImage) as caught:
        read_nifti(content, limits=limits or DecodeLimits())
    assert caught.value.reason == reason, caught.value.message
    assert reason in REJECTION_REASONS
    assert caught.value.__context__ is None, "a library's exception may quote the file"
    return caught.value.message


def read_or_reject(content: bytes) -> str:
    """Read all slices; return "read", or the reason."""
    try:
        assert np.isfinite(get_all(read_nifti(content))).all()
    except RejectedImage as rejected:
        return rejected.reason
    return "read"


def get_all(volume: Volume) -> NDArray:
    return np.stack([volume.get_slice(index) for index in range(volume.num_slices)])


# ---- orientation ---------------------------------------------------------------------------------

# DICOM directions of a row and of a column, for the standard radiological display of each plane.
RADIOLOGICAL = {
    "axial": ([1, 0, 0], [0, 1, 0]),
    "coronal": ([1, 0, 0], [0, 0, -1]),
    "sagittal": ([0, 1, 0], [0, 0, -1]),
}


def make_dicom_slices(plane: str) -> list[NDArray]:
    """Make a DICOM series of the volume, pixel by pixel, and decode it.

    DICOM's axes point to the patient's left, back and top, NIfTI's to the right, front and top.
    """
    row, column = (np.array(direction) for direction in RADIOLOGICAL[plane])
    spacing, shape = RAS.diagonal()[:3], np.array(BRAIN.shape)
    right, front = -spacing[:2] * (shape[:2] - 1)
    top = spacing[2] * (shape[2] - 1)
    corner = np.array([right, front, top if column[2] == -1 else 0])
    normal = np.abs(np.cross(row, column))
    slices = []
    for index in range(shape @ normal):
        origin = corner + normal * spacing * index
        pixels = np.empty((shape @ np.abs(column), shape @ np.abs(row)), np.int16)
        for r, c in np.ndindex(pixels.shape):
            voxel = origin + spacing * (row * c + column * r)
            pixels[r, c] = BRAIN[tuple(np.rint(voxel * [-1, -1, 1] / spacing).astype(int))]
        content = make_mr(
            pixels,
            ImageOrientationPatient=[*row.tolist(), *column.tolist()],
            ImagePositionPatient=origin.tolist(),
        )
        slices.append(decode_frame(open_dicom(content)))
    return slices


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
@pytest.mark.parametrize("axes", ["RAS", "LAS", "LPS", "PSR", "IRP"])
def test_slices_have_the_orientation_of_a_dicom_series(plane: Plane, axes: str) -> None:
    stored, affine = reorient(BRAIN, RAS, axes)
    volume = read_nifti(make_nifti(stored, affine), plane=plane)
    expected = make_dicom_slices(plane)
    if plane != "axial":  # counted from the left or the back; DICOM's axes point the other way
        expected = expected[::-1]
    np.testing.assert_array_equal(get_all(volume), expected)


@pytest.mark.parametrize(
    ("plane", "voxel", "pixel", "spacing"),
    [
        # A voxel at the patient's right, front and top, and where it is displayed.
        ("axial", (5, 7, 2), (0, 0), (3, 2)),
        ("coronal", (5, 3, 4), (0, 0), (4, 2)),
        ("sagittal", (2, 7, 4), (0, 0), (4, 3)),
        ("axial", (0, 7, 2), (0, 5), (3, 2)),
    ],
)
def test_a_marked_voxel_is_displayed_at_the_expected_pixel(
    plane: Plane, voxel: tuple, pixel: tuple, spacing: tuple
) -> None:
    marked = BRAIN.copy()
    marked[voxel] = 5000
    volume = read_nifti(make_nifti(marked), plane=plane)
    index = voxel[{"axial": 2, "coronal": 1, "sagittal": 0}[plane]]
    grey = volume.get_slice(index)
    assert np.unravel_index(grey.argmax(), grey.shape) == pixel
    assert grey.max() == 5000
    assert volume.spacing_mm == spacing


@pytest.mark.parametrize("name", ["anatomical.nii", "example4d.nii.gz", "example_nifti2.nii.gz"])
def test_bundled_volumes_are_read_as_by_nibabel(name: str) -> None:
    """Slices equal those of nibabel, reoriented and scaled."""
    image = nib.as_closest_canonical(nib.load(NIBABEL_FILES / name))
    expected = image.get_fdata()
    volume = read_nifti((NIBABEL_FILES / name).read_bytes())
    assert ("multi_volume" in volume.flags) == (expected.ndim == 4)
    expected = expected if expected.ndim == 3 else expected[..., 0]
    shown = np.stack([expected[::-1, ::-1, k].T for k in range(expected.shape[2])])
    np.testing.assert_allclose(get_all(volume), shown, rtol=1e-5)


@pytest.mark.parametrize("path", sorted(NIBABEL_FILES.glob("*.nii*")), ids=lambda path: path.name)
def test_every_file_bundled_with_nibabel_is_read(path: Path) -> None:
    volume = read_nifti(path.read_bytes())
    assert np.isfinite(get_all(volume)).all()


# ---- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("slope", [0.0, np.nan, 2.5])
def test_scale_factors_are_applied_if_valid(slope: float) -> None:
    volume = read_nifti(patch(make_nifti(), scl_slope=slope, scl_inter=-10))
    expected = get_all(read_nifti(make_nifti()))
    if slope == 2.5:
        expected = expected * 2.5 - 10
    np.testing.assert_allclose(get_all(volume), expected)


def test_a_nan_intercept_is_corrupt() -> None:
    check_rejected(patch(make_nifti(), scl_slope=1, scl_inter=np.nan), "corrupt")


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float32, np.float64, ">i2", ">f4"])
def test_voxel_types_and_byte_orders(dtype: str) -> None:
    kind = np.dtype(dtype)
    volume = BRAIN.astype(kind) if kind.itemsize > 1 else (BRAIN // 4).astype(kind)
    header = nib.Nifti1Header(endianness=">" if kind.byteorder == ">" else "<")
    image = nib.Nifti1Image(volume, RAS, header)
    image.set_data_dtype(kind)
    grey = read_nifti(image.to_bytes()).get_slice(1)
    np.testing.assert_array_equal(grey, volume[::-1, ::-1, 1].T)


def test_nan_and_infinite_voxels_get_the_minimum() -> None:
    floats = BRAIN.astype(np.float32)
    floats[0, 0, 0], floats[1, 0, 0] = np.nan, np.inf
    grey = read_nifti(make_nifti(floats)).get_slice(0)
    assert grey[-1, -1] == grey[-1, -2] == grey.min() >= 200


def test_only_the_first_of_several_volumes_is_read() -> None:
    several = np.stack([BRAIN, BRAIN * 2], axis=-1)
    volume = read_nifti(make_nifti(several))
    assert volume.flags == ("multi_volume",)
    np.testing.assert_array_equal(get_all(volume), get_all(read_nifti(make_nifti())))
    assert read_nifti(make_nifti(several[..., :1])).flags == ()


def test_a_missing_orientation_is_flagged() -> None:
    content = patch(make_nifti(), sform_code=0, qform_code=0)
    volume = read_nifti(content)
    assert volume.flags == ("orientation_unknown",)
    assert volume.get_slice(0).shape == (8, 6)
    invalid = patch(make_nifti(), sform_code=1, srow_x=np.nan)
    assert read_nifti(invalid).flags == ("orientation_unknown",)


# ---- tissue --------------------------------------------------------------------------------------


def test_slices_with_little_tissue_are_skipped() -> None:
    """Background at 2 to 6 % of the brightest, which is below the tissue level of 10 %."""
    head = np.full((20, 20, 10), 20, np.int16)
    head[::2] = 60
    head[4:16, 4:16, 3:8] = 1000
    head[0, 0, 8] = 1000  # one bright voxel of 400: 0.25 %
    volume = read_nifti(make_nifti(head))
    assert volume.kept == (3, 4, 5, 6, 7)
    assert (volume.num_slices, len(volume.kept)) == (10, 5)
    just_enough = head.copy()
    just_enough[:, 0, 8] = 1000  # 20 of 400 voxels
    assert MIN_TISSUE_FRACTION == 0.05
    assert read_nifti(make_nifti(just_enough)).kept == (3, 4, 5, 6, 7, 8)


def test_no_slice_of_a_uniform_volume_is_kept() -> None:
    volume = read_nifti(make_nifti(np.full((4, 4, 3), 7, np.int16)))
    assert (volume.kept, volume.num_slices) == ((), 3)


# ---- damaged files and decompression bombs -------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "content"),
    [
        ("empty", b""),
        ("truncated", make_nifti()[:200]),
        ("truncated", make_nifti()[:-1]),
        ("truncated", gzip.compress(make_nifti(), mtime=0)[:-30]),
        ("not_an_image", bytes(400)),
        ("not_an_image", gzip.compress(bytes(400), mtime=0)),
        ("unsupported", patch(make_nifti(), magic=b"ni1")),
        ("unsupported", make_nifti(BRAIN.astype(np.complex64))),
        ("colour", patch(make_nifti(), datatype=128, bitpix=24)),
        ("corrupt", patch(make_nifti(), dim=[3, 6, -8, 5, 1, 1, 1, 1])),
        ("corrupt", patch(make_nifti(), vox_offset=20)),
        ("corrupt", patch(make_nifti(), vox_offset=np.inf)),
        ("corrupt", patch(make_nifti(), datatype=77)),
        ("too_large", patch(make_nifti(), dim=[3, 30000, 30000, 30000, 1, 1, 1, 1])),
    ],
)
def test_damaged_and_unsupported_files_are_rejected(reason: str, content: bytes) -> None:
    check_rejected(content, reason)


def test_a_damaged_gzip_stream_is_rejected() -> None:
    packed = bytearray(gzip.compress(make_nifti()))
    packed[-6] ^= 1  # of the checksum
    check_rejected(bytes(packed), "corrupt")


def test_files_above_the_limits_are_rejected() -> None:
    check_rejected(make_nifti(), "too_large", DecodeLimits(max_bytes=300))
    check_rejected(make_nifti(), "too_large", DecodeLimits(max_pixels=BRAIN.size - 1))


def test_a_million_slices_of_one_voxel_are_rejected() -> None:
    header = nib.Nifti2Header()
    header.set_data_dtype(np.uint8)
    header.set_data_shape((1, 1, 1_000_000))
    header["vox_offset"] = 544
    packed = gzip.compress(header.binaryblock + bytes(4 + 1_000_000))
    assert len(packed) < 5000
    assert "1,000,000 axial slices" in check_rejected(packed, "too_large")
    assert read_nifti(packed, plane="coronal").num_slices == 1


@pytest.mark.parametrize("spacing", [0, np.nan, np.inf])
def test_invalid_spacing_is_none(spacing: float) -> None:
    volume = read_nifti(patch(make_nifti(), pixdim=[1, 2, 3, spacing, 1, 1, 1, 1]))
    assert (volume.spacing_mm, volume.thickness_mm) == (None, None)


@pytest.mark.parametrize(("unit", "factor"), [("meter", 1000), ("micron", 0.001), ("mm", 1)])
def test_spacing_is_in_mm(unit: str, factor: float) -> None:
    header = nib.Nifti1Header()
    header.set_xyzt_units(unit)
    volume = read_nifti(
        patch(make_nifti(), xyzt_units=header["xyzt_units"], pixdim=[1, *[0.5] * 7])
    )
    assert volume.thickness_mm == pytest.approx(0.5 * factor)


def test_only_the_first_volume_is_decompressed() -> None:
    bomb = gzip.compress(patch(make_nifti(), dim=[4, 6, 8, 5, 30000, 1, 1, 1]) + bytes(64 * 2**20))
    tracemalloc.start()
    try:
        assert read_nifti(bomb).flags == ("multi_volume",)
        assert tracemalloc.get_traced_memory()[1] < 2 * 2**20
        far = gzip.compress(patch(make_nifti(), vox_offset=2**31) + bytes(2**20))
        check_rejected(far, "corrupt")
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    finally:
        tracemalloc.stop()


@given(
    is_packed=st.booleans(),
    edits=st.lists(st.tuples(st.integers(0, 350), st.binary(min_size=1, max_size=4)), max_size=4),
    end=st.none() | st.integers(0, 900),
)
def test_damaged_bytes_are_read_or_rejected(
    is_packed: bool, edits: list[tuple[int, bytes]], end: int | None
) -> None:
    content = bytearray(make_nifti())
    for at, bytes_ in edits:
        content[at : at + len(bytes_)] = bytes_
    damaged = bytes(content[:end])
    tracemalloc.start()
    try:
        outcome = read_or_reject(gzip.compress(damaged) if is_packed else damaged)
        assert outcome in ("read", *REJECTION_REASONS)
        assert tracemalloc.get_traced_memory()[1] < 32 * 2**20
    finally:
        tracemalloc.stop()


def test_free_text_is_neither_in_messages_nor_in_output(capfd: pytest.CaptureFixture[str]) -> None:
    token = b"QZTOKEN"
    image = nib.Nifti1Image(BRAIN, RAS)
    for name in ("descrip", "intent_name", "db_name", "aux_file"):
        image.header[name] = token
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", token))
    content = image.to_bytes()
    texts = [repr(read_nifti(content))]
    for damaged in (content[:-5], patch(content, datatype=77), patch(content, scl_inter=np.nan)):
        with pytest.raises(RejectedImage) as caught:
            read_nifti(patch(damaged, scl_slope=2))
        texts.append(repr(caught.value))
    texts.extend(capfd.readouterr())
    assert content.count(token) == 5
    assert not any("QZTOKEN" in text for text in texts)
