"""DICOM objects with tokens in all identifying elements, and a search for the tokens in outputs.

Each token marks one kind of element. :func:`find_tokens` searches bytes for every token, in all
encodings that an output may use. :func:`find_tokens_in_folder` also decompresses Parquet files and
gzip streams.
"""

import base64
import gzip
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pyarrow.parquet as pq
import pydicom
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.tag import Tag
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from tests.dicom_files import RAMP, compress, make_compressed, make_dataset, make_item, write

NAME, KANJI = "QZNAME", "山田太郎"
UID = "1.2.826.0.1.99.20260317.313373"
BIRTH_DATE, STUDY_DATE = "19620317", "20240229"
FILE_NAME = "QZFILENAME"
"""Token of file names: outputs contain file names unless a job redacts paths."""
WORDS = {
    "PatientID": "QZPATIENTID",
    "OtherPatientNames": "QZOTHERNAME",
    "AccessionNumber": "QZACCESSION",
    "InstitutionName": "QZHOSPITAL",
    "InstitutionAddress": "QZADDRESS",
    "StationName": "QZSTATION",
    "DeviceSerialNumber": "QZSERIAL",
    "ReferringPhysicianName": "QZPHYSICIAN",
    "OperatorsName": "QZOPERATOR",
    "StudyDescription": "QZSTUDYTEXT",
    "SeriesDescription": "QZSERIESTEXT",
    "ProtocolName": "QZPROTOCOL",
    "ImageComments": "QZCOMMENT",
    "PatientComments": "QZPATIENTTEXT",
}
_NESTED, _PRIVATE, _OVERLAY, _PIXELS = "QZNESTED", "QZPRIVATE", "QZOVERLAY", "QZPIXELS"
_MALFORMED = "QZMALFORMED"

TOKENS = (
    *(NAME, KANJI, UID, BIRTH_DATE, STUDY_DATE, _NESTED, _PRIVATE, _OVERLAY, _PIXELS, _MALFORMED),
    *WORDS.values(),
)
"""Tokens that must not be in any output. :data:`FILE_NAME` is not one of them."""


# ---- objects -------------------------------------------------------------------------------------


def plant_tokens(**elements) -> Dataset:
    """Build an MR object of a head with a token in every identifying element."""
    planted = {
        "SpecificCharacterSet": "ISO_IR 192",
        "PatientName": f"{NAME}^{KANJI}",
        "PatientBirthDate": BIRTH_DATE,
        "StudyDate": STUDY_DATE,
        "AcquisitionDateTime": f"{STUDY_DATE}101112",
        "StudyInstanceUID": UID,
        "SeriesInstanceUID": f"{UID}.1",
        "SOPInstanceUID": f"{UID}.2",
        "FrameOfReferenceUID": f"{UID}.3",
        "RequestAttributesSequence": [
            make_item(
                ScheduledProcedureStepID=_NESTED,
                RequestedProcedureDescription=_NESTED,
                ReferencedStudySequence=[make_item(ReferencedSOPInstanceUID=f"{UID}.4")],
            )
        ],
    }
    dataset = make_dataset(**(planted | WORDS | elements))
    block = dataset.private_block(0x0029, _PRIVATE, create=True)
    block.add_new(0x01, "LO", _PRIVATE)
    block.add_new(0x02, "UN", _PRIVATE.encode())
    for offset, (vr, value) in enumerate([("US", 8), ("US", 8), ("CS", "G"), ("LO", _OVERLAY)]):
        dataset.add_new(0x60000010 + offset * 0x10, vr, value)
    dataset.add_new(0x60003000, "OW", _OVERLAY.encode())
    return dataset


def make_objects() -> dict[str, bytes]:
    """Make files with tokens: some that are classified, and some for each reason of rejection.

    Returns
    -------
    dict
        From a short name without a token to the file. The files with names that begin with "valid"
        are one series of eight slices that can be classified.
    """
    plain = write(plant_tokens())
    files = {f"valid-{index}": _make_slice(index) for index in range(8)}
    files |= _make_encodings() | _make_rejected() | _make_malformed()
    files["name-in-japanese"] = _make_japanese()
    files["cut-in-pixels"] = plain[:-100]
    files["cut-in-header"] = plain[:700]
    files["cut-in-a-name"] = plain[: plain.index(NAME.encode()) + 3]
    files["padded"] = plain + b"\0" * 64
    flipped = bytearray(plain)
    for at in range(200, len(plain) - RAMP.nbytes, 97):
        flipped[at] ^= 0x55
    files["corrupt-header"] = bytes(flipped)
    files["text"] = f"{NAME} born {BIRTH_DATE}".encode()
    return files


def _make_slice(index: int) -> bytes:
    """Make one slice of a series: a disc with a radius that grows with the index."""
    y, x = np.indices((64, 64)) - 32
    pixels = np.where(np.hypot(y, x) < 20 + index, RAMP // 2 + 1000, 5).astype(np.uint16)
    dataset = plant_tokens(
        ImagePositionPatient=[-100, -90, 5 * index], SOPInstanceUID=f"{UID}.2.{index}"
    )
    dataset.PixelData = pixels.tobytes()
    return write(dataset)


def _make_encodings() -> dict[str, bytes]:
    swapped = plant_tokens()
    swapped.PixelData = RAMP.astype(">u2").tobytes()
    files = {
        "big-endian": write(swapped, ExplicitVRBigEndian),
        "implicit": write(plant_tokens(), ImplicitVRLittleEndian),
        "deflated": write(plant_tokens(), DeflatedExplicitVRLittleEndian),
        "no-preamble": write(plant_tokens())[132:],
    }
    (frame,) = compress(RAMP[None], RLELossless)
    for name, data in (("rle", frame), ("rle-cut", frame[:200])):
        dataset = plant_tokens()
        dataset.add_new("PixelData", "OB", encapsulate([data]))
        dataset["PixelData"].is_undefined_length = True
        files[name] = write(dataset, RLELossless)
    return files


def _make_rejected() -> dict[str, bytes]:
    elements = {
        "report": {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.88.33", "Modality": "SR"},
        "ct": {"Modality": "CT"},
        "knee": {"BodyPartExamined": "KNEE"},
        "localizer": {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]},
        "map": {"ImageType": ["DERIVED", "PRIMARY", "DIFFUSION", "ADC"]},
        "colour": {"PhotometricInterpretation": "PALETTE COLOR"},
        "burned-in": {"BurnedInAnnotation": "YES"},
        "no-rows": {"Rows": None},
        "no-pixels": {"PixelData": None},
        "too-many-frames": {"NumberOfFrames": 999},
        "64-bits": {"BitsAllocated": 64},
        "infinite": {"RescaleSlope": "1e300", "RescaleIntercept": "0"},
    }
    return {name: write(plant_tokens(**changed)) for name, changed in elements.items()}


def _make_malformed() -> dict[str, bytes]:
    """Make files with values that a library would quote in a warning or an exception."""
    files = {}
    words = {
        "DS": "WindowCenter WindowWidth RescaleSlope PixelSpacing ImagePositionPatient",
        "CS": "Modality BodyPartExamined ImageType SpecificCharacterSet PhotometricInterpretation",
        "IS": "NumberOfFrames",
        "UI": "SOPClassUID StudyInstanceUID",
        "LO": "PatientID",
    }
    for vr, keyword in ((vr, one) for vr, keywords in words.items() for one in keywords.split()):
        dataset = plant_tokens()
        raw = f"{_MALFORMED} ".encode()
        tag = Tag(keyword)
        dataset[tag] = RawDataElement(tag, vr, len(raw), raw, 0, False, True)
        buffer = io.BytesIO()
        pydicom.dcmwrite(buffer, dataset, implicit_vr=False, little_endian=True)
        files[f"malformed-{keyword}"] = buffer.getvalue()
    frame = _PIXELS.encode() * 3
    syntaxes = (RLELossless, JPEG2000Lossless, JPEGLSLossless, JPEGLosslessSV1, JPEGBaseline8Bit)
    for syntax in (*syntaxes, f"{UID}.9"):
        dataset = plant_tokens()
        dataset.add_new("PixelData", "OB", encapsulate([frame]))
        dataset["PixelData"].is_undefined_length = True
        files[f"pixels-{syntax.removeprefix(UID)}"] = write(dataset, syntax)
    (codestream,) = compress(RAMP[None], JPEG2000Lossless)
    commented = codestream[:200] + _PIXELS.encode() + codestream[200:]
    files["pixels-damaged"] = make_compressed([commented], JPEG2000Lossless, ImageComments=NAME)
    return files


def _make_japanese() -> bytes:
    """Make a file with a name in a character set with escape sequences (PS3.5, annex H)."""
    dataset = plant_tokens(SpecificCharacterSet=["", "ISO 2022 IR 87"])
    dataset.PatientName = f"{NAME}={KANJI}"
    return write(dataset)


# ---- search --------------------------------------------------------------------------------------


def _list_variants(token: str) -> Iterator[bytes]:
    """Yield the byte sequences that may represent a token in an output."""
    for encoding in ("utf-8", "latin-1", "utf-16-le", "utf-16-be", "iso2022_jp", "shift_jis"):
        try:
            encoded = token.encode(encoding)
        except UnicodeEncodeError:
            continue
        yield encoded
        # Base64 has three alignments. Characters that depend on neighbouring bytes are cut off.
        for shift in range(3):
            packed = base64.b64encode(bytes(shift) + encoded)
            yield packed[4 if shift else 0 : len(packed) // 4 * 4 - 4]
    raw = token.encode()
    yield from (raw.hex().encode(), raw.hex(" ").encode(), repr(raw)[2:-1].encode())
    yield from (json.dumps(token)[1:-1].encode(), quote(token).encode())
    yield token[::-1].encode()


def _make_pattern(token: str) -> re.Pattern[bytes]:
    variants = {re.escape(one) for one in _list_variants(token) if len(one) >= 6}
    # The decimals of a number may contain the digits of a date.
    start = rb"(?<![0-9.])" if token.isdigit() else b""
    return re.compile(start + b"(?:" + b"|".join(sorted(variants)) + b")", re.IGNORECASE)


_PATTERNS = {token: _make_pattern(token) for token in (*TOKENS, FILE_NAME)}


def find_tokens(data: bytes | str, *, and_file_names: bool = False) -> list[str]:
    """Return the tokens that some bytes contain, in any encoding.

    Parameters
    ----------
    data : bytes or str
        Text is searched as UTF-8.
    and_file_names : bool
        Search for :data:`FILE_NAME` too.
    """
    searched = data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data
    wanted = (*TOKENS, FILE_NAME) if and_file_names else TOKENS
    return [token for token in wanted if _PATTERNS[token].search(searched)]


def find_tokens_in_folder(folder: Path, *, and_file_names: bool = False) -> dict[str, list[str]]:
    """Return the tokens in each file of a folder, and in its name.

    The search covers the stored bytes of every file. It also covers all values, the schema
    metadata and the statistics of Parquet files, and the decompressed data of gzip streams.
    """
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        parts = [name.encode(), path.read_bytes()]
        if path.suffix == ".parquet":
            table = pq.read_table(path, partitioning=None)
            footer = pq.read_metadata(path)
            parts += [repr(table.to_pylist()).encode(), repr(table.schema.metadata).encode()]
            parts.append(repr(footer.to_dict()).encode())
        elif parts[1].startswith(b"\x1f\x8b"):
            parts.append(gzip.decompress(parts[1]))
        tokens = find_tokens(b"\n".join(parts), and_file_names=and_file_names)
        if tokens:
            found[name] = tokens
    return found
