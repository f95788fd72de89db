"""DICOM objects: what an object holds, the geometry of its slices, and why it may be rejected.

Nothing here returns, logs or raises anything that identifies a person: identifiers become keyed
hashes, and messages name elements, never their values.

Headers are often incomplete and sometimes wrong. So an object is rejected only for what its header
says. What the header does not say becomes a flag beside the answer. DERIVED alone is no reason to
reject: lossy compression makes an image DERIVED too.
"""

import hashlib
import hmac
import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import UID

from brainray.errors import RejectedImage
from brainray.images.decode import DecodeLimits, check_length
from brainray.images.dicom_file import (
    UNDEFINED_LENGTH,
    FunctionalGroups,
    ParsedFile,
    PixelElement,
    call_safely,
    get_int,
    get_item,
    get_value,
    get_words,
    parse_file,
    split_frames,
)
from brainray.images.headers import corrupt, is_dicom, too_large, truncated, unsupported
from brainray.images.slices import SliceInfo

_DEFAULT_LIMITS = DecodeLimits()

_MAX_POSITION_MM = 1e6  # larger values are errors
_NOT_DICOM = "Expected a DICOM file, got bytes of another format."

MAX_FRAMES = 100_000
"""Most frames of one object. Each takes some hundred bytes before any pixel is decoded."""

PLUGINS: dict[str, str | None] = {
    "1.2.840.10008.1.2": None,  # implicit VR, little endian
    "1.2.840.10008.1.2.1": None,  # explicit VR, little endian
    "1.2.840.10008.1.2.1.99": None,  # deflated
    "1.2.840.10008.1.2.2": None,  # explicit VR, big endian
    "1.2.840.10008.1.2.4.50": "pillow",  # JPEG baseline, 8 bit
    "1.2.840.10008.1.2.4.51": "pillow",  # JPEG extended: 8 bit only
    "1.2.840.10008.1.2.4.57": "gdcm",  # JPEG lossless
    "1.2.840.10008.1.2.4.70": "gdcm",  # JPEG lossless, first-order prediction
    "1.2.840.10008.1.2.4.80": "pyjpegls",  # JPEG-LS lossless
    "1.2.840.10008.1.2.4.81": "pyjpegls",  # JPEG-LS near lossless
    "1.2.840.10008.1.2.4.90": "pylibjpeg",  # JPEG 2000 lossless
    "1.2.840.10008.1.2.4.91": "pylibjpeg",  # JPEG 2000
    "1.2.840.10008.1.2.4.201": "pylibjpeg",  # HTJ2K lossless
    "1.2.840.10008.1.2.4.202": "pylibjpeg",  # HTJ2K lossless, RPCL
    "1.2.840.10008.1.2.4.203": "pylibjpeg",  # HTJ2K
    "1.2.840.10008.1.2.5": "pylibjpeg",  # RLE
}
"""Supported transfer syntaxes, and the pydicom plugin that decodes each; None is uncompressed.
Each has one plugin, so that pixels do not depend on what else is installed."""


class PixelFormat(NamedTuple):
    """Layout of stored samples (PS3.3, C.7.6.3)."""

    rows: int
    columns: int
    bits_allocated: int
    bits_stored: int
    is_signed: bool


@dataclass(frozen=True, kw_only=True, eq=False, repr=False, slots=True)
class DicomImage:
    """An opened object, for :mod:`brainray.images.dicom_pixels`. A repr would show identifiers."""

    slices: tuple[SliceInfo, ...]
    sop_class: str | None
    """UID of the type of object; None where it is absent or private."""
    transfer_syntax: str
    """UID of the encoding of the pixels."""
    layout: PixelFormat
    dataset: Dataset
    pixels: PixelElement
    content: bytes
    """The file, or the inflated data set of a deflated file."""
    compressed_frames: list[bytes]
    """Empty where frames are not compressed."""


def hash_identifier(value: str, key: bytes) -> str:
    """Return a keyed hash of an identifier: HMAC-SHA256, the first 32 hexadecimal digits.

    UIDs contain times and serial numbers, and trying all numbers finds the patient number of an
    unkeyed hash. The same value and key give the same hash, so that series can be grouped.
    """
    if len(key) < 16:
        raise ValueError(f"The hash key must have at least 16 bytes, got {len(key)}.")
    return hmac.new(key, value.strip("\0 ").encode(), hashlib.sha256).hexdigest()[:32]


def open_dicom(
    content: bytes,
    *,
    key: bytes | None = None,
    limits: DecodeLimits = _DEFAULT_LIMITS,
) -> DicomImage:
    """Read an object's header, and find its frames.

    `key`, of at least 16 bytes, is the key of the identifiers' hashes; without it they are None.
    RejectedImage is raised where the object is not an MR image of a head that can be decoded; its
    ``reason`` is a key of :data:`brainray.images.decode.REJECTION_REASONS`.
    """
    check_length(content, limits)
    if not is_dicom(content[:132]):
        raise RejectedImage("not_an_image", _NOT_DICOM)
    parsed = parse_file(content, limits.max_bytes)
    pixels = _check_object(parsed)
    layout = _read_pixel_format(parsed.dataset, limits)
    num_frames = _count_frames(parsed, pixels, layout)
    identified = _hash_identifiers(parsed.dataset, key)
    slices = call_safely(_read_slices, parsed, num_frames, identified)
    rejections = [one.rejection for one in slices if one.rejection]
    if len(rejections) == num_frames:
        raise rejections[0]
    frames: list[bytes] = []
    if PLUGINS[parsed.transfer_syntax] is not None:
        frames = call_safely(split_frames, parsed.content, pixels.offset, num_frames)
    return DicomImage(
        slices=slices,
        sop_class=parsed.sop_class if name_uid(parsed.sop_class) == parsed.sop_class else None,
        transfer_syntax=parsed.transfer_syntax,
        layout=layout,
        dataset=parsed.dataset,
        pixels=pixels,
        content=parsed.content,
        compressed_frames=frames,
    )


# ---- checks --------------------------------------------------------------------------------------


def _check_object(parsed: ParsedFile) -> PixelElement:
    """Check a header in the order that gives the most useful reason; return the pixel element."""
    dataset = parsed.dataset
    if not parsed.sop_class and "Modality" not in dataset and "Rows" not in dataset:
        raise RejectedImage("not_an_image", _NOT_DICOM)
    if reason := _find_object_rejection(dataset, parsed.sop_class):
        raise reject(reason)
    if parsed.pixels is None:
        if parsed.ends_early:
            raise truncated("The file ends before its pixels.")
        raise RejectedImage("no_pixels", "The object has no Pixel Data (7FE0,0010). Send it again.")
    if not parsed.pixels.is_integer:
        raise reject("derived_map")
    if reason := _find_image_rejection(dataset):
        raise reject(reason)
    if parsed.transfer_syntax not in PLUGINS:
        raise unsupported(
            f"Transfer syntax {name_uid(parsed.transfer_syntax)} is not supported. "
            "Convert the file to Explicit VR Little Endian."
        )
    return parsed.pixels


def _read_pixel_format(dataset: Dataset, limits: DecodeLimits) -> PixelFormat:
    """Read and check how the samples are stored."""
    rows, columns = get_int(dataset, "Rows"), get_int(dataset, "Columns")
    allocated = get_int(dataset, "BitsAllocated")
    stored = get_int(dataset, "BitsStored") or allocated
    if not rows or not columns or not allocated or not stored or min(rows, columns) < 1:
        raise corrupt(
            "Rows (0028,0010), Columns (0028,0011) or Bits Allocated (0028,0100) is missing or "
            "not positive."
        )
    if get_int(dataset, "SamplesPerPixel") not in (None, 1):
        raise reject("colour")
    high_bit = get_int(dataset, "HighBit")
    if allocated not in (8, 16, 32) or not 1 <= stored <= allocated:
        raise unsupported(
            f"Samples of {stored} bits in {allocated} are not supported, 8, 16 and 32 are."
        )
    if high_bit not in (None, stored - 1):
        raise unsupported("High Bit (0028,0102) is not Bits Stored less one. Export it again.")
    if rows * columns > limits.max_pixels:
        raise too_large(
            f"A frame of {columns} x {rows} is larger than the {limits.max_pixels:,} pixels "
            "allowed."
        )
    is_signed = get_int(dataset, "PixelRepresentation") == 1
    return PixelFormat(rows, columns, allocated, stored, is_signed)


def _count_frames(parsed: ParsedFile, pixels: PixelElement, layout: PixelFormat) -> int:
    """Return the number of frames; check that the file is long enough for them."""
    claimed = get_int(parsed.dataset, "NumberOfFrames")
    num_frames = claimed or 1  # some writers give 0 for one frame
    length = pixels.length
    is_native = PLUGINS[parsed.transfer_syntax] is None
    if num_frames < 0 or (is_native and length == UNDEFINED_LENGTH):
        raise corrupt(
            "Number of Frames (0028,0008) or the length of Pixel Data (7FE0,0010) is impossible."
        )
    available = len(parsed.content) - pixels.offset if length == UNDEFINED_LENGTH else length
    least = layout.rows * layout.columns * layout.bits_allocated // 8
    if not is_native:
        least = 8  # the header of a fragment
    if num_frames * least > available:
        raise truncated(
            f"The header says {num_frames:,} frames, but the pixel data have only {available:,} "
            "bytes."
        )
    if num_frames > MAX_FRAMES:
        raise too_large(f"The object has {num_frames:,} frames, {MAX_FRAMES:,} are allowed.")
    return num_frames


# ---- slices --------------------------------------------------------------------------------------


def _hash_identifiers(dataset: Dataset, key: bytes | None) -> SliceInfo:
    def hash_element(keyword: str) -> str | None:
        value = None if key is None else get_value(dataset, keyword)
        return None if key is None or value is None else hash_identifier(str(value), key)

    return SliceInfo(
        sop_instance=hash_element("SOPInstanceUID"),
        series=hash_element("SeriesInstanceUID"),
        study=hash_element("StudyInstanceUID"),
        patient=hash_element("PatientID"),
    )


def _read_slices(
    parsed: ParsedFile, num_frames: int, identified: SliceInfo
) -> tuple[SliceInfo, ...]:
    dataset = parsed.dataset
    groups = get_value(dataset, "PerFrameFunctionalGroupsSequence")
    if groups and len(groups) != num_frames:
        raise corrupt(
            f"The header says {num_frames:,} frames and describes {len(groups):,} (5200,9230)."
        )

    frames = [_read_frame(dataset, index) for index in range(num_frames if groups else 1)]
    flags = _find_flags(dataset, parsed.sop_class, frames)
    return tuple(
        replace(
            identified,
            frame=index if num_frames > 1 else None,
            flags=flags,
            **(frames[index] if groups else frames[0]),
        )
        for index in range(num_frames)
    )


def _read_frame(dataset: Dataset, index: int) -> dict[str, Any]:
    """Read the geometry of a frame (PS3.3, C.7.6.2), and its reason for a rejection."""
    groups = FunctionalGroups(dataset, index)
    orientation = groups.get_numbers("PlaneOrientationSequence", "ImageOrientationPatient", 6)
    origin = groups.get_numbers("PlanePositionSequence", "ImagePositionPatient", 3)
    spacing = groups.get_numbers("PixelMeasuresSequence", "PixelSpacing", 2)
    reason = _find_frame_rejection(groups)
    frame: dict[str, Any] = {
        "spacing_mm": spacing if spacing and min(spacing) > 0 else None,
        "rejection": reject(reason) if reason else None,
        "plane": None,
    }
    if orientation is None or not _is_orthonormal(orientation):
        return frame
    normal = np.cross(orientation[:3], orientation[3:])
    position = math.inf if origin is None else float(np.dot(normal, origin))
    return frame | {
        "orientation": orientation,
        "position_mm": position if abs(position) < _MAX_POSITION_MM else None,
        "plane": ("sagittal", "coronal", "axial")[int(np.abs(normal).argmax())],
    }


def _is_orthonormal(orientation: tuple[float, ...]) -> bool:
    """Return whether these are two perpendicular unit vectors, up to rounding."""
    if max(map(abs, orientation)) > 1.1:
        return False
    pair = np.reshape(orientation, (2, 3))
    return bool(np.abs(pair @ pair.T - np.eye(2)).max() < 0.1)


# ---- rejections and flags ------------------------------------------------------------------------


def _split(terms: str) -> frozenset[str]:
    return frozenset(terms.split("|"))


_STORAGE = "1.2.840.10008.5.1.4.1.1."
MR_IMAGE_CLASSES = frozenset(f"{_STORAGE}4{suffix}" for suffix in ("", ".1", ".3", ".4"))
"""Classic, enhanced, enhanced colour and legacy converted enhanced MR images."""
_PARAMETRIC_MAP = f"{_STORAGE}30"
_SECONDARY_CAPTURE = f"{_STORAGE}7"
_NO_IMAGE_CLASSES = tuple(
    f"{_STORAGE}{suffix}"
    # Spectra, waveforms, presentation states, raw data and segmentations, reports and key object
    # selections, encapsulated documents, radiotherapy structures and plans.
    for suffix in ("4.2", "9.", "11.", "66", "67", "68.", "88.", "104.", "481.3", "481.5", "481.8")
)
_DICOMDIR = "1.2.840.10008.1.3.10"
_NO_IMAGE_MODALITIES = _split("AU|DOC|ECG|FID|KO|PLAN|PR|REG|RTPLAN|RTRECORD|RTSTRUCT|SEG|SR")

# Third and later values of Image Type: PS3.3, C.8.3.1.1.1 and C.8.13.3.1.1, and terms of the large
# vendors.
_PROJECTIONS = frozenset({"PROJECTION IMAGE", "MIP", "MINIP", "MPR", "CSA MPR", "MAX_IP", "MIN_IP"})
_DERIVED_MAPS = _split(
    "ADC|EADC|FA|FRACTIONAL_ANISOTROPY|TENSOR|PHASE|PHASE MAP|PHASE_MAP|P|R|I|REAL|IMAGINARY|"
    "VELOCITY|VELOCITY MAP|B0 MAP|FIELD MAP|T1 MAP|T2 MAP|T2_STAR MAP|CBF|CBV|RCBF|RCBV|MTT|TTP|"
    "TMAX|KTRANS"
)
_NOT_MAGNITUDE = frozenset({"PHASE", "REAL", "IMAGINARY"})  # Complex Image Component

# PS3.16, annex L. Parts next to the brain are accepted: head studies are filed under them too.
_HEAD_PARTS = frozenset({"BRAIN", "HEAD", "HEADNECK", "SKULL", "ORBIT", "FACE", "PITUITARY", "IAC"})
_OTHER_PARTS = _split(
    "ABDOMEN|ABDOMENPELVIS|ANKLE|AORTA|ARM|BLADDER|BREAST|CALF|CERVIX|CHEST|CHESTABDOMEN|CLAVICLE|"
    "COCCYX|CSPINE|CTSPINE|ELBOW|EXTREMITY|FEMUR|FINGER|FOOT|FOREARM|HAND|HEART|HIP|HUMERUS|KIDNEY|"
    "KNEE|LEG|LIVER|LOWERLIMB|LSPINE|LSSPINE|LUNG|PANCREAS|PELVIS|PROSTATE|RIB|SHOULDER|SPINE|"
    "SPLEEN|SSPINE|STERNUM|TESTIS|THIGH|THORAX|TLSPINE|TSPINE|UPPERLIMB|UTERUS|WHOLEBODY|WRIST"
)
# Code values of Anatomic Region Sequence: SNOMED CT, then SNOMED RT.
_HEAD_CODES = frozenset({"69536005", "12738006", "774007", "T-D1100", "T-A0100", "T-D1000"})
_OTHER_CODES = _split(
    # chest, abdomen, pelvis, breast, heart, cervical, thoracic and lumbar spine, knee
    "51185008|818981001|113345001|816092008|12921003|76752008|80891009|122494005|122495006|"
    "122496007|72696002|T-D3000|T-D4000|T-D6000|T-04000|T-32000|T-11501|T-11502|T-11503|"
    "T-D9200"
)

_CONTRASTS = _split(
    "DIFFUSION|FLOW_ENCODED|FLUID_ATTENUATED|PERFUSION|PROTON_DENSITY|STIR|TAGGING|T2|T2_STAR|TOF"
)
"""Defined terms of Acquisition Contrast, except T1: most of the public slices are T1."""

_MESSAGES = {
    "not_an_image_object": "The DICOM object is not an image. Send the MR images themselves.",
    "not_mr": "The image is not MR by its modality (0008,0060) or SOP class. Send MR images.",
    "other_body_part": "Body Part Examined (0018,0015) or Anatomic Region (0008,2218) names a part "
    "other than the head. Send head images, or correct the header.",
    "localizer": "Image Type (0008,0008) says that this is a localizer. Send the series itself.",
    "projection": "The header says that this is a projection or a reformatted image. "
    "Send the original slices.",
    "derived_map": "The header says that this is a computed map or a phase image. "
    "Send the magnitude images.",
    "mosaic": "Image Type (0008,0008) says that this frame is a mosaic of many slices. "
    "Convert it to one frame for each slice.",
    "secondary_capture": "The object is a screen capture. Send the MR images themselves.",
    "colour": "The image has colours. Send the grey MR images.",
    "burned_in": "Burned In Annotation (0028,0301) is YES: text may identify the patient. "
    "Send the image without it.",
}


def reject(reason: str) -> RejectedImage:
    """Return the rejection for a reason found in a DICOM header."""
    return RejectedImage(reason, _MESSAGES[reason])


def name_uid(uid: str) -> str:
    """Return a registered UID; others may identify a device or a person."""
    return uid if UID(uid).name != uid else "a private UID"


def _find_object_rejection(dataset: Dataset, sop_class: str) -> str | None:
    """Return the reason to reject a whole object, with or without pixels."""
    modality = get_words(dataset, "Modality")[:1]
    if (
        sop_class.startswith(_NO_IMAGE_CLASSES)
        or sop_class == _DICOMDIR
        or (modality and modality[0] in _NO_IMAGE_MODALITIES)
    ):
        return "not_an_image_object"
    if sop_class == _SECONDARY_CAPTURE or sop_class.startswith(f"{_SECONDARY_CAPTURE}."):
        return "secondary_capture"
    if sop_class == _PARAMETRIC_MAP:
        return "derived_map"
    is_other_class = sop_class not in MR_IMAGE_CLASSES and name_uid(sop_class) == sop_class != ""
    if is_other_class or modality not in ((), ("MR",)):
        return "not_mr"
    return None


def _find_image_rejection(dataset: Dataset) -> str | None:
    """Return the reason to reject all images of an MR object."""
    photometric = get_words(dataset, "PhotometricInterpretation")
    if photometric and photometric[0] not in ("MONOCHROME1", "MONOCHROME2"):
        return "colour"
    if get_words(dataset, "BurnedInAnnotation")[:1] == ("YES",):
        return "burned_in"
    if _is_head(dataset) is False:
        return "other_body_part"
    return None


def _is_head(dataset: Dataset) -> bool | None:
    """Return whether the header names the head; None where it names no body part."""
    anatomy = FunctionalGroups(dataset, 0).find("FrameAnatomySequence", "AnatomicRegionSequence")
    region = get_item(anatomy, "AnatomicRegionSequence")
    code = None if region is None else get_value(region, "CodeValue")
    part = "".join(get_words(dataset, "BodyPartExamined")[:1])
    if code in _HEAD_CODES or part in _HEAD_PARTS:
        return True
    if code in _OTHER_CODES or part in _OTHER_PARTS:
        return False
    return None


def _find_frame_rejection(groups: FunctionalGroups) -> str | None:
    """Return the reason to reject one frame, by its image type."""
    kind = "MRImageFrameTypeSequence"
    types = groups.get_words(kind, "FrameType") or get_words(groups.root, "ImageType")
    words = frozenset(types[2:])
    component = groups.get_words(kind, "ComplexImageComponent")
    technique = groups.get_words(kind, "VolumeBasedCalculationTechnique")
    if "LOCALIZER" in words:
        return "localizer"
    if "MOSAIC" in words:
        return "mosaic"
    if "SCREEN SAVE" in words:
        return "secondary_capture"
    if words & _PROJECTIONS or not frozenset(technique) <= {"NONE", "MIXED"}:
        return "projection"
    if words & _DERIVED_MAPS or frozenset(component) & _NOT_MAGNITUDE:
        return "derived_map"
    return None


def _find_flags(dataset: Dataset, sop_class: str, frames: list[dict[str, Any]]) -> tuple[str, ...]:
    groups = FunctionalGroups(dataset, 0)
    contrast = groups.get_words("MRImageFrameTypeSequence", "AcquisitionContrast")
    planes = {frame["plane"] for frame in frames}
    found = {
        "body_part_unknown": _is_head(dataset) is None,
        "echo_planar": "EP" in get_words(dataset, "ScanningSequence"),
        "frames_rejected": any(frame["rejection"] for frame in frames),
        "lossy": get_words(dataset, "LossyImageCompression")[:1] == ("01",),
        "modality_unknown": not sop_class and not get_words(dataset, "Modality"),
        "no_window": get_item(dataset, "VOILUTSequence") is None and groups.find_window() is None,
        "non_axial": bool(planes - {None, "axial"}),
        "orientation_unknown": None in planes,
        **{f"contrast_{word.lower()}": word in _CONTRASTS for word in contrast},
    }
    return tuple(sorted(flag for flag, is_set in found.items() if is_set))
