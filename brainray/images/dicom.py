"""DICOM objects: what one is, where its slices lie, and its pixels if they are MR of a head.

:func:`read_header` stops before the pixels; :func:`open_dicom` keeps them for
:mod:`brainray.images.dicom_pixels`. Neither returns, logs or raises anything that the file says of
a person: identifiers leave only as keyed hashes, and messages name elements, never their values.
"""

import hashlib
import hmac
import io
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from pydicom.dataset import Dataset

from brainray.errors import RejectedImage
from brainray.images.decode import DecodeLimits
from brainray.images.dicom_file import (
    UNDEFINED_LENGTH,
    FunctionalGroups,
    ParsedFile,
    PixelElement,
    call_safely,
    get_int,
    get_item,
    get_numbers,
    get_value,
    get_words,
    parse_file,
)
from brainray.images.dicom_frames import Span, find_frames
from brainray.images.dicom_rules import (
    find_frame_rejection,
    find_image_rejection,
    find_object_rejection,
    find_sequence_flags,
    is_head,
    name_uid,
    reject,
)
from brainray.images.headers.signatures import is_dicom

Plane = Literal["axial", "coronal", "sagittal"]

_DEFAULT_LIMITS = DecodeLimits()

_MAX_POSITION_MM = 1e6  # what is farther away is no scanner's
_NOT_DICOM = "Expected a DICOM file, got bytes of another format."

MAX_FRAMES = 100_000
"""Most frames of one object. Each costs some hundred bytes before any pixel is decoded."""

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
"""Transfer syntaxes that are read, to the pydicom plugin that decodes them; None is uncompressed.
One plugin each, so that pixels do not depend on what else is installed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """One slice of an object: where it lies, in the patient's coordinates (PS3.3, C.7.6.2)."""

    orientation: tuple[float, ...] | None
    """Direction cosines of a row, then of a column; None where the header gives none."""
    position_mm: float | None
    """Of the slice along its normal, in mm: what orders the slices of a series."""
    spacing_mm: tuple[float, float] | None
    """Between rows, then between columns, in mm."""
    plane: Plane | None
    """The anatomical plane that is nearest."""
    rejection: str | None
    """Why this frame is not to be classified, a key of REJECTION_REASONS; None if it may be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Instance:
    """What a DICOM image object is; nothing in it identifies a person without the key."""

    transfer_syntax: str
    """UID of how the pixels are encoded."""
    sop_class: str | None
    """UID of the kind of object; None where it is absent or private."""
    rows: int
    columns: int
    frames: tuple[Frame, ...]
    flags: tuple[str, ...]
    """What is not known or is unusual, sorted; see docs/dicom.md."""
    patient: str | None
    """Keyed hash of Patient ID, as of the three below; None without a key or the element."""
    study: str | None
    series: str | None
    sop_instance: str | None


class PixelFormat(NamedTuple):
    """How stored samples are laid out (PS3.3, C.7.6.3)."""

    rows: int
    columns: int
    bits_allocated: int
    bits_stored: int
    is_signed: bool


@dataclass(frozen=True, eq=False, slots=True)
class DicomImage:
    """An object whose pixels can be decoded. Its repr shows the instance only."""

    instance: Instance
    layout: PixelFormat = field(repr=False)
    dataset: Dataset = field(repr=False)
    pixels: PixelElement = field(repr=False)
    content: bytes = field(repr=False)
    """The file, or what it inflates to."""
    fragments: tuple[tuple[Span, ...], ...] = field(repr=False)
    """Of every frame, if the frames are compressed."""


def hash_identifier(value: str, key: bytes) -> str:
    """Return a keyed hash of an identifier: HMAC-SHA256, the first 32 hexadecimal digits.

    UIDs hold times and serial numbers, and an unkeyed hash of a patient number is found by trying
    all numbers. The same value and key give the same hash, so series can be put together.

    Raises
    ------
    ValueError
        The key has fewer than 16 bytes.
    """
    if len(key) < 16:
        raise ValueError(f"The hash key must have at least 16 bytes, got {len(key)}.")
    return hmac.new(key, value.strip("\0 ").encode(), hashlib.sha256).hexdigest()[:32]


def read_header(
    source: bytes | Path,
    *,
    key: bytes | None = None,
    limits: DecodeLimits = _DEFAULT_LIMITS,
) -> Instance:
    """Read what an object is, and stop before its pixels.

    Parameters
    ----------
    source : bytes or Path
        A whole DICOM file, or a local path to one, of which only the header is read.
    key : bytes, optional
        Key of the identifiers' hashes, at least 16 bytes. Without it they are None.
    limits : DecodeLimits
        The largest file (bytes) and frame (pixels) accepted.

    Raises
    ------
    RejectedImage
        The object is not an MR image of a head that can be decoded; ``reason`` is a key of
        :data:`brainray.images.decode.REJECTION_REASONS`.
    """
    if isinstance(source, bytes):
        return _make_instance(_parse_bytes(source, limits), key, limits)
    with source.open("rb") as file:
        _check_start(file.read(132), source.stat().st_size, limits)
        file.seek(0)
        parsed = parse_file(file, source.stat().st_size, limits.max_bytes)
    return _make_instance(parsed, key, limits)


def open_dicom(
    image_bytes: bytes,
    *,
    key: bytes | None = None,
    limits: DecodeLimits = _DEFAULT_LIMITS,
) -> DicomImage:
    """Open an object to decode its frames; parameters and exceptions as of :func:`read_header`."""
    parsed = _parse_bytes(image_bytes, limits)
    instance = _make_instance(parsed, key, limits)
    content = image_bytes if parsed.inflated is None else parsed.inflated
    assert parsed.pixels is not None
    fragments: tuple[tuple[Span, ...], ...] = ()
    if PLUGINS[instance.transfer_syntax] is not None:
        fragments = call_safely(find_frames, content, parsed.pixels.offset, len(instance.frames))
    layout = _read_pixel_format(parsed.dataset, limits)
    return DicomImage(instance, layout, parsed.dataset, parsed.pixels, content, fragments)


def _parse_bytes(image_bytes: bytes, limits: DecodeLimits) -> ParsedFile:
    _check_start(image_bytes[:132], len(image_bytes), limits)
    return parse_file(io.BytesIO(image_bytes), len(image_bytes), limits.max_bytes)


def _check_start(start: bytes, size_bytes: int, limits: DecodeLimits) -> None:
    if not start:
        raise RejectedImage("empty", "Expected a DICOM file, got no bytes. Send the file again.")
    if size_bytes > limits.max_bytes:
        raise RejectedImage(
            "too_large",
            f"The file has {size_bytes:,} bytes, more than the {limits.max_bytes:,} allowed.",
        )
    if not is_dicom(start):
        raise RejectedImage("not_an_image", _NOT_DICOM)


# ---- from the header to an Instance --------------------------------------------------------------


def _make_instance(parsed: ParsedFile, key: bytes | None, limits: DecodeLimits) -> Instance:
    """Check a header in the order that gives the most useful reason."""
    dataset = parsed.dataset
    if not parsed.sop_class and "Modality" not in dataset and "Rows" not in dataset:
        raise RejectedImage("not_an_image", _NOT_DICOM)
    if reason := find_object_rejection(dataset, parsed.sop_class):
        raise reject(reason)
    if parsed.pixels is None:
        if parsed.ends_early:
            raise RejectedImage("truncated", "The file ends before its pixels. Resend it.")
        raise RejectedImage("no_pixels", "The object has no Pixel Data (7FE0,0010). Resend it.")
    if not parsed.pixels.is_integer:
        raise reject("derived_map")
    if reason := find_image_rejection(dataset):
        raise reject(reason)
    if parsed.transfer_syntax not in PLUGINS:
        raise RejectedImage(
            "unsupported",
            f"Transfer syntax {name_uid(parsed.transfer_syntax)} is not supported. "
            "Convert the file to Explicit VR Little Endian.",
        )
    layout = _read_pixel_format(dataset, limits)
    num_frames = _count_frames(parsed, layout)
    frames = call_safely(_read_frames, dataset, num_frames)
    if all(frame.rejection for frame in frames):
        raise reject(str(frames[0].rejection))
    return Instance(
        transfer_syntax=parsed.transfer_syntax,
        sop_class=parsed.sop_class if name_uid(parsed.sop_class) == parsed.sop_class else None,
        rows=layout.rows,
        columns=layout.columns,
        frames=frames,
        flags=_find_flags(dataset, parsed.sop_class, frames),
        patient=_hash_element(dataset, "PatientID", key),
        study=_hash_element(dataset, "StudyInstanceUID", key),
        series=_hash_element(dataset, "SeriesInstanceUID", key),
        sop_instance=_hash_element(dataset, "SOPInstanceUID", key),
    )


def _read_pixel_format(dataset: Dataset, limits: DecodeLimits) -> PixelFormat:
    """Read and check how the samples are stored.

    Raises
    ------
    RejectedImage
        ``corrupt``, ``colour``, ``unsupported`` or ``too_large``.
    """
    rows, columns = get_int(dataset, "Rows"), get_int(dataset, "Columns")
    allocated = get_int(dataset, "BitsAllocated")
    stored = get_int(dataset, "BitsStored") or allocated
    if not rows or not columns or not allocated or not stored or min(rows, columns) < 1:
        raise RejectedImage(
            "corrupt",
            "Rows (0028,0010), Columns (0028,0011) or Bits Allocated (0028,0100) is missing or "
            "not positive. Export the image again.",
        )
    if get_int(dataset, "SamplesPerPixel") not in (None, 1):
        raise reject("colour")
    high_bit = get_int(dataset, "HighBit")
    if allocated not in (8, 16, 32) or not 1 <= stored <= allocated:
        raise RejectedImage(
            "unsupported",
            f"Samples of {stored} bits in {allocated} are not supported, 8, 16 and 32 are.",
        )
    if high_bit not in (None, stored - 1):
        raise RejectedImage(
            "unsupported", "High Bit (0028,0102) is not Bits Stored less one. Export it again."
        )
    if rows * columns > limits.max_pixels:
        raise RejectedImage(
            "too_large",
            f"A frame of {columns} x {rows} is larger than the {limits.max_pixels:,} pixels "
            "allowed.",
        )
    is_signed = get_int(dataset, "PixelRepresentation") == 1
    return PixelFormat(rows, columns, allocated, stored, is_signed)


def _count_frames(parsed: ParsedFile, layout: PixelFormat) -> int:
    """Return the number of frames, if the file is long enough to hold them."""
    assert parsed.pixels is not None
    claimed = get_int(parsed.dataset, "NumberOfFrames")
    num_frames = 1 if claimed in (None, 0) else int(claimed)  # 0 is written for 1
    length = parsed.pixels.length
    is_native = PLUGINS[parsed.transfer_syntax] is None
    if num_frames < 0 or (is_native and length == UNDEFINED_LENGTH):
        raise RejectedImage(
            "corrupt",
            "Number of Frames (0028,0008) or the length of Pixel Data (7FE0,0010) is impossible. "
            "Export the image again.",
        )
    available = parsed.size_bytes - parsed.pixels.offset if length == UNDEFINED_LENGTH else length
    least = layout.rows * layout.columns * layout.bits_allocated // 8
    if not is_native:
        least = 8  # the header of a fragment
    if num_frames * least > available:
        raise RejectedImage(
            "truncated",
            f"The header says {num_frames:,} frames, the pixel data have {available:,} bytes: too "
            "few. Resend the file.",
        )
    if num_frames > MAX_FRAMES:
        raise RejectedImage(
            "too_large", f"The object has {num_frames:,} frames, {MAX_FRAMES:,} are allowed."
        )
    return num_frames


def _hash_element(dataset: Dataset, keyword: str, key: bytes | None) -> str | None:
    value = None if key is None else get_value(dataset, keyword)
    return None if key is None or value is None else hash_identifier(str(value), key)


# ---- frames and flags ----------------------------------------------------------------------------


def _read_frames(dataset: Dataset, num_frames: int) -> tuple[Frame, ...]:
    own_groups = get_value(dataset, "PerFrameFunctionalGroupsSequence")
    if not own_groups:
        return (_read_frame(dataset, 0),) * num_frames
    if len(own_groups) != num_frames:
        raise RejectedImage(
            "corrupt",
            f"The header says {num_frames:,} frames and describes {len(own_groups):,} "
            "(5200,9230). Export the image again.",
        )
    return tuple(_read_frame(dataset, index) for index in range(num_frames))


def _read_frame(dataset: Dataset, index: int) -> Frame:
    groups = FunctionalGroups(dataset, index)
    orientation = get_numbers(
        groups.find("PlaneOrientationSequence", "ImageOrientationPatient"),
        "ImageOrientationPatient",
        6,
    )
    origin = get_numbers(
        groups.find("PlanePositionSequence", "ImagePositionPatient"), "ImagePositionPatient", 3
    )
    spacing = get_numbers(groups.find("PixelMeasuresSequence", "PixelSpacing"), "PixelSpacing", 2)
    frame = Frame(
        orientation=None,
        position_mm=None,
        spacing_mm=(spacing[0], spacing[1]) if spacing and min(spacing) > 0 else None,
        plane=None,
        rejection=find_frame_rejection(groups),
    )
    if orientation is None or not _is_orthonormal(orientation):
        return frame
    normal = np.cross(orientation[:3], orientation[3:])
    position = math.inf if origin is None else float(np.dot(normal, origin))
    planes: tuple[Plane, ...] = ("sagittal", "coronal", "axial")
    return replace(
        frame,
        orientation=orientation,
        position_mm=position if abs(position) < _MAX_POSITION_MM else None,
        plane=planes[int(np.abs(normal).argmax())],
    )


def _is_orthonormal(orientation: tuple[float, ...]) -> bool:
    """Tell whether these are two perpendicular unit vectors, rounding apart."""
    if max(map(abs, orientation)) > 1.1:
        return False
    pair = np.reshape(orientation, (2, 3))
    return bool(np.abs(pair @ pair.T - np.eye(2)).max() < 0.1)


def _find_flags(dataset: Dataset, sop_class: str, frames: tuple[Frame, ...]) -> tuple[str, ...]:
    groups = FunctionalGroups(dataset, 0)
    flags = find_sequence_flags(groups)
    if is_head(dataset) is None:
        flags.add("body_part_unknown")
    if not sop_class and not get_words(dataset, "Modality"):
        flags.add("modality_unknown")
    if get_words(dataset, "LossyImageCompression")[:1] == ("01",):
        flags.add("lossy")
    if get_item(dataset, "VOILUTSequence") is None and groups.find_window() is None:
        flags.add("no_window")
    planes = {frame.plane for frame in frames}
    if None in planes:
        flags.add("orientation_unknown")
    if planes - {None, "axial"}:
        flags.add("non_axial")
    if any(frame.rejection for frame in frames):
        flags.add("frames_rejected")
    return tuple(sorted(flags))
