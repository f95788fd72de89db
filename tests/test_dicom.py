"""DICOM: supported and rejected objects, the steps from samples to pixels, hashed identifiers."""

import gzip
import io
import struct
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.uid import (
    HTJ2K,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLSLossless,
    RLELossless,
)

from brainray.errors import RejectedImage
from brainray.images.decode import REJECTION_REASONS, DecodeLimits
from brainray.images.dicom import hash_identifier, open_dicom
from brainray.images.dicom_file import (
    MAX_FRAGMENTS,
    MAX_HEADER_BYTES,
    MAX_ITEMS,
    MAX_VALUES,
)
from brainray.images.dicom_pixels import decode_frame, render_frame
from tests.dicom_files import (
    PYDICOM_FILES,
    RAMP,
    as_mr,
    compress,
    make_compressed,
    make_dataset,
    make_enhanced,
    make_item,
    make_mr,
    write,
)

KEY = b"0123456789abcdef"
REPOSITORY = Path(__file__).parents[1]


def decode(content: bytes, frame: int = 0) -> NDArray[np.float32]:
    return decode_frame(open_dicom(content), frame)


def render(content: bytes, frame: int = 0) -> NDArray[np.uint8]:
    return render_frame(open_dicom(content), frame).pixels


def reject(content: bytes, reason: str, limits: DecodeLimits | None = None) -> str:
    with pytest.raises(RejectedImage) as caught:
        decode_frame(open_dicom(content, limits=limits or DecodeLimits()))
    assert caught.value.reason == reason, caught.value.message
    assert caught.value.__context__ is None, "a library's exception may quote the file"
    return caught.value.message


def decode_or_reject(content: bytes) -> str:
    """Decode every frame both ways; return "decoded", or the reason."""
    try:
        image = open_dicom(content)
        for index in range(min(len(image.slices), 4)):
            grey = decode_frame(image, index)
            assert grey.shape == (image.layout.rows, image.layout.columns)
            assert np.isfinite(grey).all()
            assert render_frame(image, index).pixels.shape == grey.shape
    except RejectedImage as rejected:
        return rejected.reason if rejected.reason in REJECTION_REASONS else "no known reason"
    return "decoded"


def find_pydicom_data(name: str) -> Path:
    spec = find_spec("data_store")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        pytest.skip("pydicom-data is not installed")
    return Path(folders[0]) / "data" / name


# ---- files of pydicom and nibabel ----------------------------------------------------------------

EXPECTED = {
    "MR_small.dcm": "decoded",
    "MR_small_bigendian.dcm": "decoded",
    "MR_truncated.dcm": "truncated",
    "CT_small.dcm": "not_mr",
    "examples_overlay.dcm": "other_body_part",
    "liver_1frame.dcm": "not_an_image_object",
    "test-SR.dcm": "not_an_image_object",
    "rtplan.dcm": "not_an_image_object",
    "rtdose.dcm": "not_mr",
    "waveform_ecg.dcm": "not_an_image_object",
    "DICOMDIR": "not_an_image_object",
    "SC_rgb.dcm": "secondary_capture",
    "image_dfl.dcm": "secondary_capture",
    "README.txt": "not_an_image",
}


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(PYDICOM_FILES.rglob("*")) if path.is_file()],
    ids=lambda path: str(path.relative_to(PYDICOM_FILES)),
)
def test_every_bundled_file_is_decoded_or_gets_a_reason(path: Path) -> None:
    outcome = decode_or_reject(path.read_bytes())
    assert outcome != "no known reason"
    assert outcome == EXPECTED.get(path.name, outcome)


def test_a_real_brain_study_is_flagged_as_unknown_body_part_and_non_axial() -> None:
    study = PYDICOM_FILES / "dicomdirtests" / "98892003"
    outcomes = [decode_or_reject(path.read_bytes()) for path in sorted(study.rglob("*/*"))]
    assert outcomes.count("decoded") == 10
    assert outcomes.count("projection") == 7
    flags = open_dicom((study / "MR1" / "4919").read_bytes()).slices[0].flags
    assert "body_part_unknown" in flags
    assert "non_axial" in flags


@pytest.mark.parametrize(
    "name",
    ["RLE", "bigendian", "expb", "implicit", "jp2klossless", "jpeg_ls_lossless", "padded"],
)
def test_lossless_syntaxes_agree(name: str) -> None:
    expected = pydicom.dcmread(PYDICOM_FILES / "MR_small.dcm").pixel_array
    grey = decode((PYDICOM_FILES / f"MR_small_{name}.dcm").read_bytes())
    np.testing.assert_array_equal(grey, expected)


@pytest.mark.parametrize("name", ["RLE", "big_endian", "jpeg_2k_lossless", "jpeg_ls_lossless"])
def test_lossless_syntaxes_of_an_enhanced_file_agree(name: str) -> None:
    reference = open_dicom(find_pydicom_data("emri_small.dcm").read_bytes())
    image = open_dicom(find_pydicom_data(f"emri_small_{name}.dcm").read_bytes())
    assert len(image.slices) == 10
    for index in range(10):
        np.testing.assert_array_equal(decode_frame(image, index), decode_frame(reference, index))


@pytest.mark.parametrize(
    "name",
    ["J2K_pixelrep_mismatch.dcm", "693_J2KI.dcm", "JPEG2000.dcm", "JPEGLSNearLossless_16.dcm"],
)
def test_stored_samples_equal_those_of_pydicom(name: str) -> None:
    """One is JPEG 2000 with another sign in the codestream than in the header (pydicom#1149)."""
    dataset = pydicom.dcmread(PYDICOM_FILES / name)
    slope = float(dataset.get("RescaleSlope", 1))
    intercept = float(dataset.get("RescaleIntercept", 0))
    image = open_dicom(as_mr(PYDICOM_FILES / name))
    expected = dataset.pixel_array.astype(np.float32) * slope + intercept
    if "PixelPaddingValue" in dataset:
        is_padding = dataset.pixel_array == dataset.PixelPaddingValue
        expected[is_padding] = expected[~is_padding].min()
    np.testing.assert_allclose(decode_frame(image), expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["JPEG-LL.dcm", "JPGLosslessP14SV1_1s_1f_8b.dcm"])
def test_jpeg_lossless_is_decoded(name: str) -> None:
    path = find_pydicom_data(name)
    grey = decode(as_mr(path))
    low, high = np.percentile(grey, (1, 99))
    assert high > low
    np.testing.assert_array_equal(grey, pydicom.dcmread(path).pixel_array.reshape(grey.shape))


@pytest.mark.parametrize("name", ["JPGExtended.dcm", "JPEG-lossy.dcm"])
def test_jpeg_of_12_bits_is_unsupported(name: str) -> None:
    assert "12-bit" in reject(as_mr(PYDICOM_FILES / name), "unsupported")


@pytest.mark.parametrize("name", ["philips_mprage.dcm.gz", "siemens_dwi_0.dcm.gz"])
def test_files_of_vendors_are_decoded_or_rejected(name: str) -> None:
    folder = Path(find_spec("nibabel").submodule_search_locations[0])  # type: ignore[union-attr,index]
    content = gzip.decompress((folder / "nicom" / "tests" / "data" / name).read_bytes())
    expected = {"philips_mprage.dcm.gz": "decoded", "siemens_dwi_0.dcm.gz": "mosaic"}
    assert decode_or_reject(content) == expected[name]


# ---- encodings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]
)
@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16, np.uint32])
def test_uncompressed_samples_are_decoded_exactly(syntax: str, dtype: type) -> None:
    info = np.iinfo(dtype)
    pixels = np.linspace(info.min, min(info.max, 2**24), 5 * 8).astype(dtype).reshape(5, 8)
    stored = pixels
    if syntax == ExplicitVRBigEndian and pixels.itemsize == 1:  # bytes of an OW word are swapped
        stored = pixels.reshape(-1, 2)[:, ::-1].reshape(5, 8)
    np.testing.assert_array_equal(decode(make_mr(stored, syntax)), pixels)


def test_big_endian_words_may_span_two_frames() -> None:
    """Frames of an odd number of bytes, in OW words of swapped bytes."""
    frames = np.arange(2 * 3 * 5, dtype=np.uint8).reshape(2, 3, 5)
    swapped = frames.reshape(-1, 2)[:, ::-1].reshape(2, 3, 5)
    content = make_mr(swapped, ExplicitVRBigEndian)
    for index in range(2):
        np.testing.assert_array_equal(decode(content, index), frames[index])


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, "1.2.840.10008.1.2.1"])
@pytest.mark.parametrize("keeps_meta", [True, False])
def test_files_without_preamble(syntax: str, keeps_meta: bool) -> None:
    content = make_mr(syntax=syntax)
    if keeps_meta:
        bare = content[132:]
    else:
        buffer = io.BytesIO()
        is_implicit = syntax == ImplicitVRLittleEndian
        pydicom.dcmwrite(buffer, make_dataset(), implicit_vr=is_implicit, little_endian=True)
        bare = buffer.getvalue()
    np.testing.assert_array_equal(decode(bare), RAMP)


def test_big_endian_without_meta() -> None:
    buffer = io.BytesIO()
    dataset = make_dataset(RAMP.astype(">u2"))
    pydicom.dcmwrite(buffer, dataset, implicit_vr=False, little_endian=False)
    np.testing.assert_array_equal(decode(buffer.getvalue()), RAMP)


def test_unused_bits_are_cleared() -> None:
    """Old files keep overlays in the bits above the samples."""
    pixels = RAMP & 0xFFF
    np.testing.assert_array_equal(decode(make_mr(pixels | 0xF000, BitsStored=12)), pixels)


def test_signed_samples_of_12_bits() -> None:
    pixels = np.array([[-2048, -1, 0, 2047]], np.int16)
    np.testing.assert_array_equal(decode(make_mr(pixels & 0xFFF, BitsStored=12)), pixels)


def test_a_high_bit_that_shifts_the_samples_is_unsupported() -> None:
    reject(make_mr(BitsStored=12, HighBit=15), "unsupported")


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGLSLossless])
def test_frames_are_separated(syntax: str) -> None:
    frames = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]])
    content = make_compressed(compress(frames, syntax), syntax, frames)
    for index, frame in enumerate(frames):
        np.testing.assert_array_equal(decode(content, index), frame)


@pytest.mark.parametrize(
    ("name", "syntax", "tolerance"),
    [
        ("lossless", HTJ2KLossless, 0),
        ("lossless", HTJ2KLosslessRPCL, 0),
        ("lossless", HTJ2K, 0),
        ("lossy", HTJ2K, 8),
    ],
)
def test_high_throughput_jpeg_2000(name: str, syntax: str, tolerance: int) -> None:
    frame = (Path(__file__).parent / "data" / f"ramp-{name}.htj2k").read_bytes()
    decoded = decode(make_compressed([frame], syntax))
    np.testing.assert_allclose(decoded, RAMP, rtol=0, atol=tolerance)
    reject(make_compressed([frame[: len(frame) // 2]], syntax), "corrupt")


@pytest.mark.parametrize("num_frames", [1, 3])
def test_a_frame_in_several_fragments(num_frames: int) -> None:
    """dcm2niix#1017."""
    noise = np.random.default_rng(5).integers(0, 4096, (num_frames, 64, 64), dtype=np.uint16)
    encoded = compress(noise, JPEG2000Lossless)
    fragments = [[frame[:100], frame[100:]] for frame in encoded]
    content = make_compressed(fragments, JPEG2000Lossless, noise)
    for index, frame in enumerate(noise):
        np.testing.assert_array_equal(decode(content, index), frame)


def test_the_offset_table_separates_frames() -> None:
    """Run lengths have no end marker: without the table the frame of a fragment is unknown."""
    frames = np.stack([RAMP, RAMP[::-1], RAMP.T])
    first, *others = compress(frames, RLELossless)
    fragments = [first[:100], first[100:], *others]
    dataset = make_dataset(frames)
    items = b"".join(map(pydicom.encaps.itemize_fragment, fragments))
    starts = np.cumsum([0, *(len(frame) + 8 for frame in (first, *others))])
    starts[1:] += 8  # the first frame has two fragments
    table = pydicom.encaps.itemize_fragment(starts[:3].astype("<u4").tobytes())
    for has_table in (True, False):
        start = table if has_table else pydicom.encaps.itemize_fragment(b"")
        dataset.add_new("PixelData", "OB", start + items)
        dataset["PixelData"].is_undefined_length = True
        content = write(dataset, RLELossless)
        if not has_table:
            assert "divide the 4 fragments" in reject(content, "corrupt")
            continue
        for index, frame in enumerate(frames):
            np.testing.assert_array_equal(decode(content, index), frame)


def test_an_element_between_fragments_is_corrupt() -> None:
    (frame,) = compress(RAMP[None], RLELossless)
    content = make_compressed([frame], RLELossless)
    reject(content.replace(b"\xfe\xff\xdd\xe0", b"\x10\x00\x10\x00"), "corrupt")


def test_jpeg_baseline() -> None:
    smooth = np.add.outer(np.arange(32), np.arange(48)).astype(np.uint8) * 3
    buffer = io.BytesIO()
    Image.fromarray(smooth).save(buffer, "JPEG", quality=95)
    content = make_compressed([buffer.getvalue()], JPEGBaseline8Bit, smooth)
    assert np.abs(decode(content) - smooth).max() <= 4
    with Image.open(buffer) as image:
        np.testing.assert_array_equal(decode(content), np.asarray(image))


def test_the_icon_is_not_read_as_the_image() -> None:
    """dcm2niix#638."""
    icon = make_dataset(np.full((4, 4), 9, np.uint8))
    for keyword in ("SOPClassUID", "SOPInstanceUID"):
        del icon[keyword]
    np.testing.assert_array_equal(decode(make_mr(IconImageSequence=[icon])), RAMP)
    reject(make_mr(IconImageSequence=[icon], PixelData=None), "no_pixels")


def test_threads_get_the_same_frames() -> None:
    contents = [path.read_bytes() for path in sorted(PYDICOM_FILES.glob("MR_small*.dcm"))] * 4
    with ThreadPoolExecutor(8) as pool:
        frames = list(pool.map(decode, contents))
    assert all((frame == frames[0]).all() for frame in frames)


# ---- modality transform --------------------------------------------------------------------------


def test_rescaling_is_applied() -> None:
    grey = decode(make_mr(RescaleSlope="2.5", RescaleIntercept="-100"))
    np.testing.assert_allclose(grey, RAMP * 2.5 - 100)


def test_a_slope_of_zero_is_not_applied() -> None:
    np.testing.assert_array_equal(decode(make_mr(RescaleSlope="0", RescaleIntercept="0")), RAMP)


def make_scaling(slope: str, intercept: str = "0") -> Dataset:
    item = make_item(RescaleSlope=slope, RescaleIntercept=intercept, RescaleType="US")
    return make_item(PixelValueTransformationSequence=[item])


def test_functional_groups_rescale_each_frame() -> None:
    """pydicom#2353, dcm2niix#363: a frame's own slope has priority, the root's is used last."""
    frames = np.stack([RAMP, RAMP])
    content = make_enhanced(
        frames,
        make_scaling("2.108"),
        [Dataset(), make_scaling("3", "7")],
        RescaleSlope="50",
        RescaleIntercept="0",
    )
    np.testing.assert_allclose(decode(content, 0), RAMP * 2.108, rtol=1e-6)
    np.testing.assert_allclose(decode(content, 1), RAMP * 3.0 + 7)


@pytest.mark.parametrize("is_packed", [True, False])
def test_modality_lut(is_packed: bool) -> None:
    table = (np.arange(100) ** 2).astype(np.uint16)
    lut = make_item(LUTDescriptor=[100, 10, 16], ModalityLUTType="US")
    if is_packed:
        lut.add_new("LUTData", "OW", table.tobytes())
    else:
        lut.add_new("LUTData", "US", table.tolist())
    pixels = np.array([[0, 10, 50, 109, 4000]], np.uint16)
    grey = decode(make_mr(pixels, ModalityLUTSequence=[lut]))
    np.testing.assert_array_equal(grey, [[0, 0, 40**2, 99**2, 99**2]])


def test_real_world_values_are_ignored() -> None:
    mapping = make_item(RealWorldValueSlope=0.001, RealWorldValueIntercept=5.0)
    mapping.RealWorldValueFirstValueMapped, mapping.RealWorldValueLastValueMapped = 0, 4000
    content = make_mr(RealWorldValueMappingSequence=[mapping], RescaleSlope=2, RescaleIntercept=0)
    np.testing.assert_array_equal(decode(content), RAMP * 2.0)


def test_an_infinite_slope_is_corrupt() -> None:
    reject(make_mr(RescaleSlope="1e300", RescaleIntercept="0"), "corrupt")


# ---- inversion and padding -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("elements", "is_inverted"),
    [
        ({"PhotometricInterpretation": "MONOCHROME1"}, True),
        ({"PhotometricInterpretation": "MONOCHROME2"}, False),
        ({"PresentationLUTShape": "INVERSE"}, True),
        ({"PhotometricInterpretation": "MONOCHROME1", "PresentationLUTShape": "IDENTITY"}, False),
        ({"PhotometricInterpretation": "MONOCHROME1", "PresentationLUTShape": "INVERSE"}, True),
    ],
)
def test_grey_values_are_inverted_as_the_header_says(elements: dict, is_inverted: bool) -> None:
    """MONAI Deploy#282."""
    content = make_mr(WindowCenter=1900, WindowWidth=3900, **elements)
    grey, shown = decode(content), render(content).astype(int)
    if is_inverted:
        np.testing.assert_array_equal(grey, RAMP.max() - RAMP.astype(int))
        assert shown[0, 0] > shown[-1, -1]
    else:
        np.testing.assert_array_equal(grey, RAMP)
        assert shown[0, 0] < shown[-1, -1]


def test_inversion_comes_after_the_window() -> None:
    """cornerstone3D PR 2215: with inversion first, an off-centre window shows other values."""
    window = {"WindowCenter": 500, "WindowWidth": 400}
    plain = render(make_mr(**window))
    inverted = render(make_mr(PhotometricInterpretation="MONOCHROME1", **window))
    np.testing.assert_array_equal(inverted, 255 - plain)
    assert (plain == 255).mean() > 0.5


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_darkest(photometric: str) -> None:
    pixels = np.array([[-2000, -2000, 100, 200, 300]], np.int16)
    content = make_mr(pixels, PixelPaddingValue=-2000, PhotometricInterpretation=photometric)
    grey = decode(content)
    image = [300, 200, 100] if photometric == "MONOCHROME1" else [100, 200, 300]
    np.testing.assert_array_equal(grey, [[100, 100, *image]])
    assert render(content)[0, :2].tolist() == [0, 0]


def test_padding_as_a_range() -> None:
    pixels = np.array([[0, 5, 9, 10, 60]], np.uint16)
    content = make_mr(pixels, PixelPaddingValue=9, PixelPaddingRangeLimit=0)
    np.testing.assert_array_equal(decode(content), [[10, 10, 10, 10, 60]])


def test_padding_written_with_the_other_sign() -> None:
    dataset = make_dataset(np.array([[-2000, 100, 200]], np.int16))
    dataset.add_new("PixelPaddingValue", "US", 2**16 - 2000)
    np.testing.assert_array_equal(decode(write(dataset)), [[100, 100, 200]])


def test_a_frame_of_padding_only_is_dark() -> None:
    content = make_mr(np.full((3, 4), 7, np.uint16), PixelPaddingValue=7)
    assert not decode(content).any()
    assert not render(content).any()


# ---- windows -------------------------------------------------------------------------------------

VALUES = np.array([[0, 10, 20, 30, 40, 50, 60]], np.uint16)


@pytest.mark.parametrize(
    ("elements", "expected"),
    [
        # PS3.3, C.11.2.1.2.1: ((x - 29.5) / 20 + 0.5) * 255
        ({"WindowWidth": 21}, [0, 0, 7, 134, 255, 255, 255]),
        ({"WindowWidth": 20, "VOILUTFunction": "LINEAR_EXACT"}, [0, 0, 0, 128, 255, 255, 255]),
        ({"WindowWidth": 40, "VOILUTFunction": "SIGMOID"}, [12, 30, 69, 128, 186, 225, 243]),
        ({"WindowWidth": 1}, [0, 0, 0, 255, 255, 255, 255]),
        ({"WindowWidth": 0.5}, [0, 0, 0, 128, 255, 255, 255]),
        ({"WindowCenter": [30, 99], "WindowWidth": [21, 3]}, [0, 0, 7, 134, 255, 255, 255]),
    ],
)
def test_windows_follow_the_standard(elements: dict, expected: list[int]) -> None:
    rendered = render_frame(open_dicom(make_mr(VALUES, **({"WindowCenter": 30} | elements))))
    assert rendered.grey_range == "window"
    np.testing.assert_allclose(rendered.pixels[0], expected, atol=1)


@pytest.mark.parametrize("elements", [{}, {"WindowCenter": 30, "WindowWidth": 0}])
def test_without_a_window_the_range_of_the_samples_is_shown(elements: dict) -> None:
    image = open_dicom(make_mr(RAMP, **elements))
    rendered = render_frame(image)
    assert rendered.grey_range == "samples"
    assert (rendered.pixels.min(), rendered.pixels.max()) == (0, 255)
    assert "no_window" in image.slices[0].flags


def test_the_window_does_not_change_grey_values() -> None:
    narrow = make_mr(WindowCenter=10, WindowWidth=5)
    np.testing.assert_array_equal(decode(narrow), RAMP)
    assert "no_window" not in open_dicom(narrow).slices[0].flags


def test_the_window_applies_to_rescaled_values() -> None:
    rescaled = make_mr(VALUES, WindowCenter=3, WindowWidth=2, RescaleSlope="0.1",
                       RescaleIntercept=0, VOILUTFunction="LINEAR_EXACT")  # fmt: skip
    np.testing.assert_allclose(render(rescaled)[0], [0, 0, 0, 128, 255, 255, 255], atol=1)


def test_voi_lut_comes_before_the_window() -> None:
    lut = make_item(LUTDescriptor=[61, 0, 8])
    lut.add_new("LUTData", "US", [0] * 40 + [255] * 21)
    content = make_mr(VALUES, VOILUTSequence=[lut], WindowCenter=10, WindowWidth=5)
    rendered = render_frame(open_dicom(content))
    assert rendered.grey_range == "voi_lut"
    assert rendered.pixels[0].tolist() == [0, 0, 0, 0, 255, 255, 255]


def test_each_frame_has_its_window() -> None:
    """Windows differ from slice to slice; grey values of the same samples do not."""

    def make_window(centre: int) -> Dataset:
        return make_item(FrameVOILUTSequence=[make_item(WindowCenter=centre, WindowWidth=21)])

    content = make_enhanced(
        np.stack([VALUES, VALUES]), Dataset(), [make_window(30), make_window(50)]
    )
    assert render(content, 0)[0].tolist() != render(content, 1)[0].tolist()
    np.testing.assert_array_equal(decode(content, 0), decode(content, 1))


# ---- rejections and flags ------------------------------------------------------------------------

STORAGE = "1.2.840.10008.5.1.4.1.1."


@pytest.mark.parametrize(
    ("reason", "elements"),
    [
        ("not_an_image_object", {"SOPClassUID": f"{STORAGE}88.33", "Modality": "SR"}),
        ("not_an_image_object", {"SOPClassUID": f"{STORAGE}11.1", "Modality": "PR"}),
        ("not_an_image_object", {"SOPClassUID": None, "Modality": "KO"}),
        ("not_an_image_object", {"SOPClassUID": f"{STORAGE}66.4", "Modality": "SEG"}),
        ("no_pixels", {"PixelData": None}),
        ("not_mr", {"Modality": "CT"}),
        ("not_mr", {"SOPClassUID": f"{STORAGE}2"}),
        ("other_body_part", {"BodyPartExamined": "KNEE"}),
        ("localizer", {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}),
        ("projection", {"ImageType": ["DERIVED", "SECONDARY", "PROJECTION IMAGE", "MIP"]}),
        ("projection", {"ImageType": ["DERIVED", "SECONDARY", "MPR"]}),
        ("projection", {"VolumeBasedCalculationTechnique": "MAX_IP"}),
        ("derived_map", {"ImageType": ["DERIVED", "PRIMARY", "DIFFUSION", "ADC"]}),
        ("derived_map", {"ImageType": ["ORIGINAL", "PRIMARY", "P", "ND"]}),
        ("derived_map", {"ComplexImageComponent": "PHASE"}),
        ("derived_map", {"SOPClassUID": f"{STORAGE}30"}),
        ("mosaic", {"ImageType": ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]}),
        ("secondary_capture", {"SOPClassUID": f"{STORAGE}7", "Modality": "OT"}),
        ("colour", {"PhotometricInterpretation": "PALETTE COLOR"}),
        ("colour", {"SamplesPerPixel": 3}),
        ("burned_in", {"BurnedInAnnotation": "YES"}),
        ("corrupt", {"Rows": None}),
        ("corrupt", {"NumberOfFrames": -3}),
        ("truncated", {"NumberOfFrames": 2}),
        ("truncated", {"NumberOfFrames": 2**31 - 1}),
        ("unsupported", {"BitsAllocated": 64}),
    ],
)
def test_objects_are_rejected_with_a_reason(reason: str, elements: dict) -> None:
    reject(make_mr(**elements), reason)


@pytest.mark.parametrize(
    "elements",
    [
        {"ImageType": ["DERIVED", "SECONDARY", "M"]},
        {"BodyPartExamined": "ORBIT"},
        {"BurnedInAnnotation": "NO"},
        {"Modality": None},
        {"SOPClassUID": "1.3.46.670589.11.0.0.12.1"},
        {"VolumeBasedCalculationTechnique": "NONE"},
        {"NumberOfFrames": 0},
        {"WindowCenter": None, "PixelSpacing": None},
    ],
)
def test_absent_or_uncommon_elements_are_accepted(elements: dict) -> None:
    present = {"WindowCenter": 5, "WindowWidth": 5}
    dataset = make_dataset(**present, PixelSpacing=[1, 1])
    for keyword, value in elements.items():
        if value is None:
            del dataset[keyword]
        else:
            setattr(dataset, keyword, value)
    np.testing.assert_array_equal(decode(write(dataset)), RAMP)


@pytest.mark.parametrize(
    ("flag", "elements"),
    [
        ("body_part_unknown", {"BodyPartExamined": None}),
        ("body_part_unknown", {"BodyPartExamined": "ROUTINE"}),
        ("no_window", {}),
        ("non_axial", {"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}),
        ("orientation_unknown", {"ImageOrientationPatient": None}),
        ("orientation_unknown", {"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}),
        ("orientation_unknown", {"ImageOrientationPatient": [1e9, 0, 0, 0, 1e-9, 0]}),
        ("orientation_unknown", {"ImageOrientationPatient": ["1e300", 0, 0, 0, "1e300", 0]}),
        ("lossy", {"LossyImageCompression": "01"}),
        ("modality_unknown", {"Modality": None, "SOPClassUID": None}),
        ("contrast_diffusion", {"AcquisitionContrast": "DIFFUSION"}),
        ("echo_planar", {"ScanningSequence": ["EP", "SE"]}),
    ],
)
def test_uncertain_properties_are_flagged(flag: str, elements: dict) -> None:
    dataset = make_dataset(**elements)
    content = write(dataset)
    if "SOPClassUID" not in dataset:
        content = io.BytesIO()  # type: ignore[assignment]
        pydicom.dcmwrite(content, make_dataset(**elements), implicit_vr=False, little_endian=True)
        content = content.getvalue()  # type: ignore[attr-defined]
    flags = open_dicom(content).slices[0].flags
    assert flag in flags
    assert flags == tuple(sorted(set(flags)))


def test_the_anatomic_region_has_priority_over_the_body_part() -> None:
    def make_region(code: str) -> list[Dataset]:
        return [make_item(CodeValue=code, CodingSchemeDesignator="SCT", CodeMeaning="x")]

    chest = make_mr(BodyPartExamined=None, AnatomicRegionSequence=make_region("51185008"))
    reject(chest, "other_body_part")
    brain = make_mr(BodyPartExamined="KNEE", AnatomicRegionSequence=make_region("12738006"))
    assert "body_part_unknown" not in open_dicom(brain).slices[0].flags


def test_frames_of_an_enhanced_file_are_rejected_one_by_one() -> None:
    def make_type(*words: str) -> Dataset:
        return make_item(MRImageFrameTypeSequence=[make_item(FrameType=list(words))])

    magnitude = make_type("ORIGINAL", "PRIMARY", "DIFFUSION", "NONE")
    adc = make_type("DERIVED", "PRIMARY", "DIFFUSION", "ADC")
    frames = np.stack([RAMP, RAMP])
    mixed = make_enhanced(frames, Dataset(), [magnitude, adc], ImageType=["MIXED", "PRIMARY"])
    image = open_dicom(mixed)
    assert [one.rejection and one.rejection.reason for one in image.slices] == [
        None,
        "derived_map",
    ]
    assert "frames_rejected" in image.slices[0].flags
    np.testing.assert_array_equal(decode_frame(image, 0), RAMP)
    with pytest.raises(RejectedImage, match="derived_map"):
        decode_frame(image, 1)
    with pytest.raises(IndexError, match="from 0 to 1, got 2"):
        decode_frame(image, 2)
    reject(make_enhanced(frames, Dataset(), [adc, adc]), "derived_map")


def test_an_unknown_transfer_syntax_is_named_only_if_it_is_registered() -> None:
    jpip = "1.2.840.10008.1.2.4.94"
    assert jpip in reject(make_compressed([b"ab"], jpip), "unsupported")
    assert "1.9.8.7" not in reject(make_mr(syntax="1.9.8.7"), "unsupported")


# ---- geometry ------------------------------------------------------------------------------------


def test_geometry_of_a_classic_file() -> None:
    (frame,) = open_dicom(make_mr()).slices
    assert frame.orientation == (1, 0, 0, 0, 1, 0)
    assert (frame.position_mm, frame.spacing_mm, frame.plane) == (33, (1.5, 0.5), "axial")


@pytest.mark.parametrize(
    ("orientation", "plane", "position"),
    [
        ([1, 0, 0, 0, 0, -1], "coronal", -90),
        ([0, 1, 0, 0, 0, -1], "sagittal", 100),
        ([1, 0, 0, 0, 0.866025, 0.5], "axial", -0.5 * -90 + 0.866025 * 33),
    ],
)
def test_the_plane_and_position_follow_from_the_orientation(
    orientation: list[float], plane: str, position: float
) -> None:
    (frame,) = open_dicom(make_mr(ImageOrientationPatient=orientation)).slices
    assert frame.plane == plane
    assert frame.position_mm == pytest.approx(position)


def test_an_impossible_position_is_none() -> None:
    (frame,) = open_dicom(make_mr(ImagePositionPatient=["1e308", 0, "1e308"])).slices
    assert (frame.position_mm, frame.plane) == (None, "axial")


def test_geometry_of_each_frame() -> None:
    """MONAI#8468: the geometry of an enhanced file is in its functional groups."""
    shared = make_item(
        PlaneOrientationSequence=[make_item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
        PixelMeasuresSequence=[make_item(PixelSpacing=[2, 3])],
    )
    per_frame = [
        make_item(PlanePositionSequence=[make_item(ImagePositionPatient=[0, 0, z])])
        for z in (7, -4)
    ]
    frames = open_dicom(make_enhanced(np.stack([RAMP, RAMP]), shared, per_frame)).slices
    assert [frame.position_mm for frame in frames] == [7, -4]
    assert {(frame.spacing_mm, frame.plane) for frame in frames} == {((2, 3), "axial")}


def test_another_number_of_functional_groups_than_frames_is_corrupt() -> None:
    reject(make_enhanced(np.stack([RAMP, RAMP]), Dataset(), [Dataset()] * 3), "corrupt")


# ---- damage and bombs ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["MR_small.dcm", "MR_small_RLE.dcm", "MR_small_jp2klossless.dcm"])
def test_a_file_truncated_anywhere_is_rejected(name: str) -> None:
    content = (PYDICOM_FILES / name).read_bytes()
    end = content.rindex(b"\xe0\x7f\x10\x00") + 12 + 64 * 64 * 2  # padding follows the pixels
    if name != "MR_small.dcm":
        end = content.rindex(b"\xfe\xff\xdd\xe0")
    outcomes = {decode_or_reject(content[:cut]) for cut in np.linspace(1, end - 1, 40).astype(int)}
    assert outcomes <= {"truncated", "not_an_image", "no_pixels", "corrupt", "not_mr"}
    assert decode_or_reject(content[: end - 1]) == "truncated"
    assert decode_or_reject(content[:end]) == "decoded"


def test_an_empty_file_is_rejected() -> None:
    reject(b"", "empty")


def measure_peak(content: bytes, reason: str, limits: DecodeLimits | None = None) -> int:
    reject(content, reason, limits)  # imports and caches
    tracemalloc.start()
    try:
        reject(content, reason, limits)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_deflate_bomb_is_not_inflated() -> None:
    deflater = zlib.compressobj(wbits=-15)
    bomb = deflater.compress(bytes(40 * 2**20)) + deflater.flush()
    plain = write(make_dataset(), DeflatedExplicitVRLittleEndian)
    start = plain.index(b"1.2.840.10008.1.2.1.99") + 22
    limits = DecodeLimits(max_bytes=2**20)
    assert (
        measure_peak(plain[: start + len(plain[start:]) % 2] + bomb, "too_large", limits)
        < 8 * 2**20
    )


def make_items(num_items: int) -> bytes:
    """Make a file with a sequence of empty items and undefined length."""
    plain = make_mr()
    at = plain.index(b"\xe0\x7f\x10\x00")
    start = b"\x00\x52\x30\x92SQ\0\0\xff\xff\xff\xff"
    items = b"\xfe\xff\x00\xe0\0\0\0\0" * num_items
    return plain[:at] + start + items + b"\xfe\xff\xdd\xe0\0\0\0\0" + plain[at:]


def test_a_header_of_many_empty_items_is_rejected() -> None:
    """They would take 80 times the memory of the file."""
    content = make_items(MAX_ITEMS + 1)
    assert measure_peak(content, "too_large") < 64 * 2**20
    reject(make_items(33_000), "corrupt")  # not one for each frame; longer than the first read


def test_a_header_that_is_too_long_is_rejected() -> None:
    dataset = make_dataset()
    dataset.add_new(0x00291001, "OB", bytes(MAX_HEADER_BYTES + 2))
    reject(write(dataset), "too_large")
    dataset.add_new(0x00291001, "OB", bytes(2**20))
    np.testing.assert_array_equal(decode(write(dataset)), RAMP)


def insert_element(tag: tuple[int, int], value: bytes) -> bytes:
    """Put an element before the pixels of a file with implicit value representations."""
    plain = make_mr(syntax=ImplicitVRLittleEndian)
    at = plain.index(b"\xe0\x7f\x10\x00")
    return plain[:at] + struct.pack("<HHL", *tag, len(value)) + value + plain[at:]


@pytest.mark.parametrize("tag", [(0x0028, 0x1050), (0x0008, 0x0008), (0x0008, 0x0005)])
def test_a_header_of_many_values_is_rejected(tag: tuple[int, int]) -> None:
    """Window, image type and character set: pydicom would take 46 s and 6 GB for 30 MB of them."""
    content = insert_element(tag, b"1\\" * (15 * 2**20))
    assert measure_peak(content, "too_large") < 100 * 2**20
    few = insert_element((0x0028, 0x1050), b"1\\" * 1000)
    np.testing.assert_array_equal(decode(few), RAMP)


def test_backslashes_in_the_pixels_are_not_counted_as_values() -> None:
    frames = np.full((300, 64, 64), 0x5C5C, np.uint16)
    groups = [make_scaling("1")] * 300
    for group in groups:
        group.add_new(0x00291001, "OB", bytes(2**10))  # longer than the first read
    content = make_enhanced(frames, Dataset(), groups)
    assert content.count(b"\\") > MAX_VALUES
    np.testing.assert_array_equal(decode(content, 299), frames[0])


def test_a_lut_of_millions_of_numbers_is_not_read_as_a_list() -> None:
    """A descriptor of one entry makes pydicom read the table as a list of numbers."""
    descriptor = struct.pack("<HHLHHH", 0x0028, 0x3002, 6, 1, 0, 16)
    table = b"\5\0" * (5 * 2**20)
    item = descriptor + struct.pack("<HHL", 0x0028, 0x3006, len(table)) + table
    content = insert_element(
        (0x0028, 0x3000), struct.pack("<HHL", 0xFFFE, 0xE000, len(item)) + item
    )
    assert (decode(content) == 5).all()
    tracemalloc.start()
    try:
        decode(content)
        assert tracemalloc.get_traced_memory()[1] < 4 * len(content)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("tag", [(0x0040, 0xA730), (0x5200, 0x9229)])
def test_deeply_nested_sequences_are_corrupt(tag: tuple[int, int]) -> None:
    undefined = struct.pack("<HHL", *tag, 2**32 - 1) + b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
    plain = make_mr(syntax=ImplicitVRLittleEndian)
    at = plain.index(b"\xe0\x7f\x10\x00")
    reject(plain[:at] + undefined * 20_000 + plain[at:], "corrupt")


def test_a_frame_of_many_empty_fragments_is_rejected() -> None:
    fragments = b"\xfe\xff\x00\xe0\0\0\0\0" * (MAX_FRAGMENTS + 2)
    content = make_compressed([b"ab"], RLELossless).replace(b"\xfe\xff\xdd\xe0", fragments)
    assert measure_peak(content, "too_large") < 100 * 2**20


def test_sizes_are_checked_before_memory_is_allocated() -> None:
    huge = make_mr(Rows=60_000, Columns=60_000)
    assert measure_peak(huge, "too_large") < 2**20
    many = make_compressed(compress(RAMP[None], RLELossless), RLELossless, NumberOfFrames=2**30)
    assert measure_peak(many, "truncated") < 2**20


def test_a_compressed_frame_of_another_size_than_the_header_is_corrupt() -> None:
    (frame,) = compress(RAMP[None], JPEG2000Lossless)
    at = frame.index(b"\xff\x4f\xff\x51") + 8
    mismatched = frame[:at] + (60_000).to_bytes(4, "big") * 2 + frame[at + 8 :]
    assert "60000 x 60000" in reject(make_compressed([mismatched], JPEG2000Lossless), "corrupt")
    (frame,) = compress(RAMP[None], JPEGLSLossless)
    at = frame.index(b"\xff\xf7") + 5
    mismatched = frame[:at] + (60_000).to_bytes(2, "big") * 2 + frame[at + 4 :]
    assert "60000 x 60000" in reject(make_compressed([mismatched], JPEGLSLossless), "corrupt")


def test_a_jpeg_frame_of_many_scans_or_segments_is_rejected() -> None:
    """A decoder passes over the whole frame for each scan of a hundred bytes."""
    buffer = io.BytesIO()
    Image.fromarray(RAMP.astype(np.uint8)).save(buffer, "JPEG", progressive=True)
    jpeg = buffer.getvalue()
    at = jpeg.index(b"\xff\xda")
    scans = jpeg[:at] + jpeg[at:-2] * 60 + jpeg[-2:]
    pixels = RAMP.astype(np.uint8)
    reject(make_compressed([scans], JPEGBaseline8Bit, pixels), "too_large")
    for filler in (b"\xff\xe0\0\2", b"\xff"):
        filled = jpeg[:2] + filler * 2**18 + jpeg[2:]
        reject(make_compressed([filled], JPEGBaseline8Bit, pixels), "corrupt")


def test_a_run_length_that_goes_beyond_the_frame_is_corrupt() -> None:
    """pylibjpeg-rle panics, which is not an Exception."""
    (frame,) = compress(RAMP[None], RLELossless)
    second = int.from_bytes(frame[8:12], "little")
    longer = frame[:second] + b"\xfe\x07" + frame[second:]  # three more bytes of 7
    reject(make_compressed([longer], RLELossless), "corrupt")


def test_pixels_and_bytes_are_limited() -> None:
    reject(make_mr(), "too_large", DecodeLimits(max_pixels=RAMP.size - 1))
    reject(make_mr(), "too_large", DecodeLimits(max_bytes=500))
    reject(make_compressed([b"\xff\xd8"], JPEGExtended12Bit, np.zeros((4, 4), np.uint8)), "corrupt")


def list_mutated() -> list[bytes]:
    frames = np.stack([RAMP, RAMP])
    scaled = [make_scaling("2"), make_scaling("3")]
    names = ("", "_RLE", "_jp2klossless", "_jpeg_ls_lossless", "_bigendian", "_implicit")
    return [
        *((PYDICOM_FILES / f"MR_small{name}.dcm").read_bytes() for name in names),
        make_enhanced(frames, Dataset(), scaled),
        write(make_dataset(), DeflatedExplicitVRLittleEndian),
    ]


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    source=st.sampled_from(list_mutated()),
    edits=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=6)), max_size=6
    ),
    is_in_header=st.booleans(),
    end=st.none() | st.floats(0, 1),
)
def test_damaged_bytes_get_an_answer(
    source: bytes, edits: list[tuple[float, bytes]], is_in_header: bool, end: float | None
) -> None:
    damaged = bytearray(source)
    for share, bytes_ in edits:
        at = int(share * (2000 if is_in_header else len(source)))
        damaged[at : at + len(bytes_)] = bytes_
    damaged = damaged[: None if end is None else int(end * len(source))]
    tracemalloc.start()
    try:
        assert decode_or_reject(bytes(damaged)) != "no known reason"
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()


# ---- identifiers ---------------------------------------------------------------------------------


def test_identifiers_are_keyed_hashes() -> None:
    (instance,) = open_dicom(make_mr(), key=KEY).slices
    assert instance.patient == "2ac14a4ef450c8bff9b023310f7630db"  # of Python's hmac and hashlib
    assert len({instance.patient, instance.study, instance.series, instance.sop_instance}) == 4
    assert instance.patient != hash_identifier("patient-7", KEY[::-1])
    assert all(len(value or "") == 32 for value in (instance.study, instance.series))
    assert open_dicom(make_mr()).slices[0].patient is None
    assert open_dicom(make_mr(PatientID=None), key=KEY).slices[0].patient is None
    # Padding does not change a hash, so that outputs can be joined on it.
    assert hash_identifier("a", KEY) == hash_identifier("a\0", KEY)
    with pytest.raises(ValueError, match="at least 16 bytes, got 3"):
        hash_identifier("a", b"key")
