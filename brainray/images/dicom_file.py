"""Parse DICOM headers: the few elements that are used, and the position of the pixels.

pydicom parses. It gets a list of the elements to keep, so that it skips names, dates and free text,
and it stops at the pixels. Its logger and its warnings quote values of a file. Importing this
module switches both off for the whole process: switching them for each call is not safe among
threads. Validation of values is off too, since it would only make more warnings.
"""

import io
import logging
import math
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import pydicom.config
from pydicom.dataset import Dataset
from pydicom.encaps import generate_fragments, generate_frames, parse_fragments
from pydicom.filereader import read_dataset, read_partial
from pydicom.tag import Tag
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from brainray.errors import RejectedImage
from brainray.images.headers import corrupt, too_large, truncated

for _name in ("pydicom", "openjpeg"):
    logging.getLogger(_name).setLevel(logging.CRITICAL + 1)
warnings.filterwarnings("ignore", module=r"pydicom(\.|$)")
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE

UNDEFINED_LENGTH = 0xFFFFFFFF
_PIXEL_DATA = Tag("PixelData")
_PIXEL_TAGS = frozenset({_PIXEL_DATA, Tag("FloatPixelData"), Tag("DoubleFloatPixelData")})

MAX_HEADER_BYTES = 32 * 2**20
"""Most bytes before the pixels. Enhanced objects take some kilobytes for each frame."""
MAX_ITEMS = 250_000
"""Most sequence items in a header."""
MAX_VALUES = 500_000
"""Most values in a header: pydicom takes some microseconds and 200 bytes for each."""
MAX_FRAGMENTS = 400_000
"""Most fragments of compressed frames: four times as many as frames."""
_FIRST_BYTES = 2**18  # enough for the header of a classic object
_ITEM_TAGS = (b"\xfe\xff\x00\xe0", b"\xff\xfe\xe0\x00")  # little and big endian
_COUNTED = (
    ("sequence items", _ITEM_TAGS, MAX_ITEMS),
    ("values", (b"\\",), MAX_VALUES),  # a backslash separates values
)
_PIXEL_DATA_TAGS = (b"\xe0\x7f\x10\x00", b"\x7f\xe0\x00\x10")

_KEPT_ELEMENTS = (
    "AcquisitionContrast AnatomicRegionSequence BitsAllocated BitsStored BodyPartExamined "
    "BurnedInAnnotation Columns ComplexImageComponent HighBit ImageOrientationPatient "
    "ImagePositionPatient ImageType LossyImageCompression Modality ModalityLUTSequence "
    "NumberOfFrames PatientID PerFrameFunctionalGroupsSequence PhotometricInterpretation "
    "PixelPaddingRangeLimit PixelPaddingValue PixelRepresentation PixelSpacing "
    "PresentationLUTShape RescaleIntercept RescaleSlope Rows SOPClassUID SOPInstanceUID "
    "SamplesPerPixel ScanningSequence SeriesInstanceUID SharedFunctionalGroupsSequence "
    "StudyInstanceUID VOILUTFunction VOILUTSequence VolumeBasedCalculationTechnique WindowCenter "
    "WindowWidth"
)
"""Keywords of the only elements that are read. Real World Value Maps are left out: they give
quantities such as mm²/s, not grey values."""
_KEPT_TAGS = [Tag(keyword) for keyword in _KEPT_ELEMENTS.split()]

_Result = TypeVar("_Result")


class PixelElement(NamedTuple):
    """The element that holds the pixels."""

    is_integer: bool
    """False where it is Float Pixel Data or Double Float Pixel Data."""
    vr: str
    offset: int
    """Of its value, in bytes from the start of `ParsedFile.content`."""
    length: int
    """Of its value, in bytes; :data:`UNDEFINED_LENGTH` if it is encapsulated."""


@dataclass(frozen=True, eq=False, repr=False)  # a repr would show values
class ParsedFile:
    """A DICOM file up to its pixels."""

    dataset: Dataset
    sop_class: str
    transfer_syntax: str
    pixels: PixelElement | None
    content: bytes
    """The file, or the inflated data set of a deflated file."""
    ends_early: bool
    """The file ends inside the header of an element."""


def call_safely(function: Callable[..., _Result], *arguments: Any) -> _Result:  # noqa: ANN401
    """Call a function on an untrusted file; its exceptions become rejections.

    The rejection is raised outside of the ``except`` block: the exceptions of libraries quote
    values of the file, and must not become the context of the rejection.
    """
    try:
        return function(*arguments)
    except RejectedImage:
        raise
    except MemoryError:
        rejection = too_large("There is not enough memory to read this file.")
    except (EOFError, OSError):
        rejection = truncated("The file ends inside an element.")
    except Exception as error:  # pydicom and the codecs raise a dozen types for bad bytes
        rejection = corrupt(f"The file cannot be decoded ({type(error).__name__}).")
    except BaseException as error:
        # pylibjpeg-rle 2.2 is written in Rust and panics where a segment is too long. In Python a
        # panic is not an Exception, and its type cannot be imported. Remove this when it raises.
        if type(error).__module__ != "pyo3_runtime":
            raise
        rejection = corrupt("A run-length encoded frame is damaged.")
    raise rejection


def parse_file(content: bytes, max_inflated_bytes: int) -> ParsedFile:
    """Read the header of a DICOM file, with or without preamble and meta information.

    pydicom takes some 40 bytes of memory for each byte of a header made of empty elements, and 80
    for each of one made of empty items. So it gets only the start of the file, with at most
    :data:`MAX_HEADER_BYTES` and :data:`MAX_ITEMS`.
    """
    syntax, media_class, at = call_safely(_read_meta, content)
    if syntax == DeflatedExplicitVRLittleEndian:
        content, at = call_safely(_inflate, content[at:], max_inflated_bytes), 0
    for num_bytes in (_FIRST_BYTES, MAX_HEADER_BYTES):
        is_whole = num_bytes >= len(content)
        try:
            parsed = call_safely(_parse_start, content, num_bytes, syntax, media_class, at)
        except RejectedImage:
            if is_whole or num_bytes == MAX_HEADER_BYTES:
                raise
        else:
            if is_whole or parsed.pixels is not None:
                return parsed
    raise too_large(f"The header has more than the {MAX_HEADER_BYTES:,} bytes allowed.")


def _read_meta(content: bytes) -> tuple[str, str, int]:
    """Read the elements of group 2; return transfer syntax, SOP class, and where they end."""
    start = io.BytesIO(content[:_FIRST_BYTES])
    if start.read(132)[128:] != b"DICM":
        start.seek(0)
    meta = read_dataset(start, False, True, stop_when=lambda tag, _vr, _length: tag >> 16 != 2)
    syntax = str(get_value(meta, "TransferSyntaxUID") or "").strip("\0 ")
    return syntax, str(get_value(meta, "MediaStorageSOPClassUID") or ""), start.tell()


def _inflate(deflated: bytes, max_bytes: int) -> bytes:
    """Inflate a deflated data set (PS3.5, annex A.5)."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    inflated = inflater.decompress(deflated, max_bytes + 1)
    if len(inflated) > max_bytes:
        raise too_large(f"The file inflates to more than the {max_bytes:,} bytes allowed.")
    if not inflater.eof:
        raise truncated("The deflated file ends too early.")
    return inflated


def _parse_start(
    content: bytes, num_bytes: int, syntax: str, media_class: str, at: int
) -> ParsedFile:
    """Read the data set, which begins at byte `at`, in the first bytes of a file."""
    start = content[:num_bytes]
    _check_counts(start)
    file = io.BytesIO(start)
    file.seek(at)
    pixels: PixelElement | None = None
    last_end: int | None = None  # of an element; None where its length is undefined

    def stop_at_pixels(tag: int, vr: str | None, length: int) -> bool:
        nonlocal pixels, last_end
        value_at = file.tell()
        has_length = length != UNDEFINED_LENGTH
        if has_length and value_at + length > len(content):
            raise truncated(f"The file ends inside element ({tag >> 16:04X},{tag & 0xFFFF:04X}).")
        if tag in _PIXEL_TAGS:
            pixels = PixelElement(tag == _PIXEL_DATA, vr or "OW", value_at, length)
            return True
        last_end = value_at + length if has_length else None
        return False

    is_little_endian = syntax != ExplicitVRBigEndian
    if not syntax:  # the first element is in group 8
        is_little_endian = start[at : at + 2] != b"\x00\x08"
    dataset = read_dataset(
        file,
        syntax in ("", ImplicitVRLittleEndian),  # pydicom detects explicit VRs itself
        is_little_endian,
        stop_when=stop_at_pixels,
        specific_tags=list(_KEPT_TAGS),
    )
    if not syntax:
        is_implicit = dataset.original_encoding[0]
        little = ImplicitVRLittleEndian if is_implicit else ExplicitVRLittleEndian
        syntax = str(little if is_little_endian else ExplicitVRBigEndian)
    ends_early = pixels is None and last_end not in (None, len(content))
    sop_class = str(get_value(dataset, "SOPClassUID") or media_class)
    return ParsedFile(dataset, sop_class, syntax, pixels, content, ends_early)


def _check_counts(start: bytes) -> None:
    """Check the size of a header before pydicom takes memory and time for it."""
    end = max(map(start.rfind, _PIXEL_DATA_TAGS))
    end = len(start) if end < 0 else end  # pixels may contain the counted bytes
    for what, marks, most in _COUNTED:
        if end > most and sum(start.count(mark, 0, end) for mark in marks) > most:
            raise too_large(f"The header has more than the {most:,} {what} allowed.")


def split_frames(content: bytes, offset: int, num_frames: int) -> list[bytes]:
    """Return the compressed frames; Pixel Data's value begins at byte `offset`.

    They are split once, when the object is opened: pydicom would search all fragments again for
    every frame, which takes a minute for an object of ten thousand frames.
    """
    if content.count(_ITEM_TAGS[0], offset) > MAX_FRAGMENTS:
        raise too_large(f"The pixel data have more than the {MAX_FRAGMENTS:,} fragments allowed.")
    file = io.BytesIO(content)
    file.seek(offset)
    _, starts = parse_fragments(file)
    table, *fragments = generate_fragments(file)  # the first item is the offset table
    last_bytes = int.from_bytes(content[starts[-1] + 4 : starts[-1] + 8], "little")
    if len(fragments) < num_frames or len(fragments[-1]) < last_bytes:
        raise truncated("The file ends before the last compressed frame does.")
    if len(fragments) == num_frames:  # no offset table is needed
        return fragments
    if num_frames == 1:
        return [b"".join(fragments)]
    frames: list[bytes] = []
    if len(table) in (0, 4 * num_frames):
        file.seek(offset)
        frames = list(generate_frames(file, number_of_frames=num_frames))
    if len(frames) != num_frames:
        raise corrupt(
            f"The header says {num_frames:,} frames, but neither the offset table nor end markers "
            f"divide the {len(fragments):,} fragments into as many."
        )
    return frames


# ---- values --------------------------------------------------------------------------------------


def get_value(dataset: Dataset, keyword: str) -> Any:  # noqa: ANN401 - as pydicom's
    """Return an element's value; None where it is absent, empty or malformed."""
    try:
        value = dataset.get(keyword)
    except Exception:  # treat an element that cannot be read as absent
        return None
    return None if value == "" else value


def get_item(dataset: Dataset | None, keyword: str) -> Dataset | None:
    """Return the first item of a sequence; None where there is none."""
    items = None if dataset is None else get_value(dataset, keyword)
    if isinstance(items, str | bytes) or not items:
        return None
    return items[0] if isinstance(items[0], Dataset) else None


def get_words(dataset: Dataset, keyword: str) -> tuple[str, ...]:
    """Return the values of a code string, in upper case."""
    value = get_value(dataset, keyword)
    if value is None:
        return ()
    values = [value] if isinstance(value, str) else list(value)
    return tuple(str(word).strip().upper() for word in values)


def get_numbers(dataset: Dataset, keyword: str, count: int) -> tuple[float, ...] | None:
    """Return the first `count` numbers of an element; None unless all are there and finite."""
    value = get_value(dataset, keyword)
    if value is None:
        return None
    try:
        values = [value] if isinstance(value, str | int | float) else list(value)
        numbers = tuple(float(number) for number in values[:count])
    except (TypeError, ValueError, OverflowError):
        return None
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else None


def get_int(dataset: Dataset, keyword: str) -> int | None:
    """Return a whole number; None where there is none."""
    numbers = get_numbers(dataset, keyword, 1)
    return None if numbers is None else int(numbers[0])


class FunctionalGroups:
    """Finds elements of one frame: in its own functional groups, the shared ones, or the root.

    Enhanced objects have functional groups (PS3.3, C.7.6.16), classic ones use the root alone.
    """

    def __init__(self, dataset: Dataset, frame: int) -> None:
        self.root = dataset
        own = get_value(dataset, "PerFrameFunctionalGroupsSequence")
        item = own[frame] if own and frame < len(own) else None
        self._groups = (item, get_item(dataset, "SharedFunctionalGroupsSequence"))

    def find(self, sequence: str, keyword: str) -> Dataset:
        """Return the data set with this frame's element; the root where no group has it."""
        for group in self._groups:
            item = get_item(group, sequence)
            if item is not None and keyword in item:
                return item
        return self.root

    def get_words(self, sequence: str, keyword: str) -> tuple[str, ...]:
        """Return the values of this frame's code string."""
        return get_words(self.find(sequence, keyword), keyword)

    def get_numbers(self, sequence: str, keyword: str, count: int) -> tuple[float, ...] | None:
        """Return the first `count` numbers of this frame's element."""
        return get_numbers(self.find(sequence, keyword), keyword, count)

    def find_window(self) -> tuple[float, float, Dataset] | None:
        """Return centre, width and the data set that holds them; None without a usable window."""
        item = self.find("FrameVOILUTSequence", "WindowWidth")
        centre, width = get_numbers(item, "WindowCenter", 1), get_numbers(item, "WindowWidth", 1)
        if centre is None or width is None or width[0] <= 0:
            return None
        return centre[0], width[0], item


# ---- DICOMDIR ------------------------------------------------------------------------------------


def list_references(content: bytes) -> list[tuple[str, ...]]:
    """Return the files that a DICOMDIR references (PS3.3, annex F), in its order, each once.

    A reference is the path below the folder of the DICOMDIR: names of folders, then of the file.
    RejectedImage is raised for other files, and for a reference that leaves this folder.
    """
    return call_safely(_list_references, content)


def _list_references(content: bytes) -> list[tuple[str, ...]]:
    if content.count(_ITEM_TAGS[0]) > MAX_ITEMS:
        raise too_large(f"It has more than the {MAX_ITEMS:,} records allowed.")
    file = io.BytesIO(content)

    def check_length(_tag: int, _vr: str | None, length: int) -> bool:
        if length != UNDEFINED_LENGTH and file.tell() + length > len(content):
            raise truncated("It ends inside an element.")
        return False

    dataset = read_partial(
        file, check_length, force=True, specific_tags=[Tag("DirectoryRecordSequence")]
    )
    records = get_value(dataset, "DirectoryRecordSequence")
    if records is None:
        raise RejectedImage("not_an_image", "Expected Directory Records (0004,1220), found none.")
    references: dict[tuple[str, ...], None] = {}
    for record in records:
        value = get_value(record, "ReferencedFileID")
        if not value:
            continue
        parts = (value,) if isinstance(value, str) else tuple(map(str, value))
        if any(not part or "/" in part or "\0" in part or set(part) <= {"."} for part in parts):
            raise corrupt("A Referenced File ID (0004,1500) does not name a file below its folder.")
        references[parts] = None
    return list(references)
