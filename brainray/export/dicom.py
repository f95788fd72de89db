"""A DICOM image object to one without identity.

The Basic Application Level Confidentiality Profile decides about the elements that it lists, at any
depth. What it does not list is kept only where it cannot say anything of a person: numbers, terms
of the standard, registered UIDs and codes. Other text becomes :data:`REMOVED`, other UIDs those of
their pseudonyms. Private elements, curves and overlays are left out. Pixels are decoded and written
anew, so that no comment of a codestream, no unused bit and no byte behind them is kept.
"""

import importlib
import io
import math
from dataclasses import dataclass, field
from datetime import date, timedelta
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import pydicom
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.multival import MultiValue
from pydicom.tag import BaseTag, Tag
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage
from pydicom.valuerep import format_number_as_ds

from brainray.errors import ConfigError, RejectedImage
from brainray.export.pseudonyms import Pseudonyms
from brainray.images.decode import DecodeLimits
from brainray.images.dicom import DicomImage, name_uid, open_dicom
from brainray.images.dicom_file import call_safely, get_value, get_words
from brainray.images.dicom_pixels import decode_stored

# ---- profile -------------------------------------------------------------------------------------

EDITION = "2026c"
"""Of the standard."""
_TABLE = f"dicomanonymizer.dicom_anonymization_databases.dicomfields_{EDITION}"
"""PS3.15, table E.1-1, as data. Other functions of the library dicom-anonymizer are not used: they
leave elements within sequences as they are, and make UIDs that no key can make again."""

Action = Literal["remove", "empty", "replace", "map_uid"]
_ACTIONS: dict[str, Action] = {
    "X_TAGS": "remove",
    "Z_TAGS": "empty",
    "X_Z_TAGS": "empty",
    "D_TAGS": "replace",
    "Z_D_TAGS": "replace",
    "X_D_TAGS": "replace",
    "X_Z_D_TAGS": "replace",
    "U_TAGS": "map_uid",
    "X_Z_U_STAR_TAGS": "map_uid",
}
"""Of the library's lists, which are named after the profile's codes. Where the profile leaves a
choice, the one that keeps an object valid."""


@lru_cache(maxsize=1)
def read_profile() -> dict[int, Action]:
    """Return what the Basic Application Level Confidentiality Profile does with each tag.

    Elements that it does not list are missing, and so are curves and overlays, whose groups repeat.
    """
    try:
        table = importlib.import_module(_TABLE)
    except ImportError as error:
        raise ConfigError(
            "A de-identified export needs the library dicom-anonymizer, 2.1 or later, which is not "
            "installed. Install the extra: pip install 'brainray[dicom]'."
        ) from error
    return {
        tag[0] << 16 | tag[1]: action
        for name, action in _ACTIONS.items()
        for tag in getattr(table, name)
        if len(tag) == 2
    }


# ---- objects -------------------------------------------------------------------------------------

Dates = Literal["remove", "shift"]

REMOVED = "REMOVED"
"""In the place of text."""
_NO_DATE, _NO_TIME = "19000101", "000000"
"""In the place of dates that an object cannot do without."""

_TEXT = frozenset({"AE", "AS", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT"})
_NUMBERS = frozenset({"DS", "IS", "FD", "FL", "SL", "SS", "SV", "UL", "US", "UV"})
_SHIFTED_TEXT = (
    "AcquisitionDate AcquisitionDateTime ContentDate FrameAcquisitionDateTime "
    "FrameReferenceDateTime SeriesDate StudyDate"
)
_SHIFTED = frozenset(map(Tag, _SHIFTED_TEXT.split()))
"""Dates that are kept, moved; all others are removed."""
_LUT_DATA = Tag("LUTData")
_CHARACTER_SET = Tag("SpecificCharacterSet")
"""Of no use: what is left is ASCII."""

_TERMS_TEXT = (
    # Every element
    "YES|NO|NONE|OTHER|UNKNOWN|MIXED|0|1|00|01|"
    # Image Type, Frame Type, and what the large vendors write in their later values
    "ORIGINAL|PRIMARY|SECONDARY|DERIVED|M|ND|NORM|DIS2D|DIS3D|FM|FIL|SH|M_SE|M_FFE|M_IR|SE|FFE|IR|"
    "MAGNITUDE|VOLUME|ANGIO|ANGIO_TIME|CARDIAC|DIFFUSION|DYNAMIC|FLUOROSCOPY|MULTIECHO|PERFUSION|"
    "STATIC|TRACEW|RESAMPLED|SAMPLED|FLOW_ENCODED|FLUID_ATTENUATED|PROTON_DENSITY|STIR|TAGGING|"
    "TOF|T1|T2|T2_STAR|ADD|SUBTRACTION|EPI|PERPENDICULAR|"
    # Patient, body and geometry
    "MR|HFS|HFP|HFDR|HFDL|FFS|FFP|FFDR|FFDL|R|L|U|B|A|P|H|F|BRAIN|HEAD|HEADNECK|SKULL|ORBIT|FACE|"
    "PITUITARY|IAC|ROW|COL|COLUMN|2D|3D|3D_TEMPORAL|DISTORTED|UNIFORM|HUMAN_CLASS|"
    # MR: sequences, options, coils, pulses
    "EP|GR|RM|SK|MTC|SS|TRSS|SP|MP|OSP|PER|RG|CG|PPG|FC|PFF|PFP|FS|SPIN|GRADIENT|BOTH|ECHO_PLANAR|"
    "FULL|CYLINDRICAL|ELLIPSOIDAL|WEIGHTED|COSINE|COSINE_SQUARED|FERMI|GAUSSIAN|HAMMING|HANNING|"
    "LORENTZIAN|LRNTZ_GSS_TRNSFM|RIESZ|TUKEY|USER_DEFINED|SLICE_AND_FREQ|PRODUCT|RESEARCH|SERVICE|"
    "RECTILINEAR|SPIRAL|RADIAL|LINEAR|REVERSE_LINEAR|CENTRIC|REVERSE_CENTRIC|SEGMENTED|PHASE|"
    "FREQUENCY|SLICE|SLICE_AND_FREQUENCY|SINGLE|PARTIAL|MULTIPLE|ON_RESONANCE|OFF_RESONANCE|WATER|"
    "FAT|WATER_AND_FAT|WATER_FAT|SILICON|FREE_PRECESSION|TRANSVERSE|LONGITUDINAL|RF|"
    "RF_AND_GRADIENT|BODY|SURFACE|HEAD_COIL|MULTICOIL|QUADRATURE|EXTREMITY|LARMOR|SENSE|SMASH|PILS|"
    "GRAPPA|SLAB|BREATH_HOLD|REALTIME|GATING|FLOW_COMP|ACCELERATION|VELOCITY|DIRECTIONAL|ISOTROPIC|"
    "BIPOLAR|QUANTITY|PARALLEL|SLICE_SELECT|CORONAL|SAGITTAL|AXIAL|OBLIQUE|IEC|FDA|NONSELECTIVE|"
    "FIRST_LEVEL|SECOND_LEVEL|NORMAL|STIMULATED|DB_DT|E_FIELD|WHOLE_BODY|PARTIAL_BODY|"
    # Pixels
    "MONOCHROME|MONOCHROME1|MONOCHROME2|IDENTITY|INVERSE|LINEAR_EXACT|SIGMOID|US|HU|ISO_10918_1|ISO_14495_1|"
    "ISO_15444_1|CONTRAST|SPATIAL|TEMPORAL|1H"
)
_TERMS = frozenset(_TERMS_TEXT.split("|"))
"""Words that may stand in a code string (CS). Others become OTHER: a program may have written
anything there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Deidentifier:
    """Removes identity from DICOM objects, always in the same way."""

    pseudonyms: Pseudonyms = field(repr=False)
    dates: Dates = "remove"

    def convert(self, content: bytes, limits: DecodeLimits) -> bytes:
        """Make a file (Explicit VR Little Endian) without identity of one with an MR image.

        Raises RejectedImage if it cannot be read or decoded, or could not be classified.
        """
        image = open_dicom(content, limits=limits)
        return call_safely(self._convert, content, image)

    def shift(self, study_date: str | None, patient: str | None) -> date | None:
        """Move a date (YYYYMMDD) back by the days of a patient, given by the pseudonym.

        Returns None where that is not possible.
        """
        if self.dates == "remove" or not study_date or patient is None:
            return None
        try:
            found = date.fromisoformat(study_date.strip()[:8])
            return found - timedelta(days=self.pseudonyms.choose_shift_days(patient))
        except (ValueError, OverflowError):
            return None

    def _convert(self, content: bytes, image: DicomImage) -> bytes:
        source = pydicom.dcmread(io.BytesIO(content), force=True, stop_before_pixels=True)
        patient_id = get_value(source, "PatientID")
        patient = None if patient_id is None else self.pseudonyms.name_patient(str(patient_id))
        target = self._clean(source, patient)
        target.PatientName = target.PatientID = patient or ""
        target.PatientIdentityRemoved = "YES"
        target.DeidentificationMethod = f"brainray, PS3.15 {EDITION} Basic Profile, and more"
        methods = {"113100": "Basic Application Confidentiality Profile"}  # PS3.16, CID 7050
        modified = "REMOVED"
        if self.dates == "shift":
            methods["113107"] = "Retain Longitudinal Temporal Information Modified Dates Option"
            modified = "MODIFIED"
        target.DeidentificationMethodCodeSequence = [
            _make_code(value, "DCM", meaning) for value, meaning in methods.items()
        ]
        target.LongitudinalTemporalInformationModified = modified
        target.SOPClassUID = image.sop_class or MRImageStorage
        if not target.get("SOPInstanceUID"):
            raise RejectedImage("corrupt", "The object has no SOP Instance UID (0008,0018).")
        _set_pixels(target, image)
        return _encode(target)

    # ---- elements

    def _clean(self, source: Dataset, patient: str | None) -> Dataset:
        """Return a data set of the elements that may be kept, changed where they must be."""
        target = Dataset()
        for tag in source.keys():  # noqa: SIM118 - its items would be read
            if not _is_kept_group(tag) or tag == _CHARACTER_SET:
                continue
            try:
                cleaned = self._clean_element(source[tag], patient)
            except Exception:  # an element that cannot be read is not kept
                continue
            if cleaned is not None:
                target.add(cleaned)
        return target

    def _clean_element(self, element: DataElement, patient: str | None) -> DataElement | None:
        action, vr = read_profile().get(int(element.tag)), element.VR
        if vr == "SQ":
            return self._clean_sequence(element, action, patient)
        if vr in ("DA", "DT", "TM"):
            return self._clean_date(element, action, patient)
        if action == "remove":
            return None
        if vr == "UI":
            return _change(element, [self._map_uid(str(uid)) for uid in _list_values(element)])
        if action is not None:
            return _change(element, [REMOVED] if action == "replace" and vr in _TEXT else [])
        return _clean_unlisted(element)

    def _map_uid(self, uid: str) -> str:
        """Keep a UID that the standard registers."""
        return uid if name_uid(uid) == uid else self.pseudonyms.make_uid(uid)

    def _clean_sequence(
        self, element: DataElement, action: Action | None, patient: str | None
    ) -> DataElement | None:
        if action not in (None, "map_uid"):
            return None
        items = []
        for item in element.value:
            is_code = "CodeValue" in item or "CodeMeaning" in item
            cleaned = _find_code(item) if is_code else self._clean(item, patient)
            # The groups of frames are counted: an item stays, even if nothing is left of it.
            if cleaned is not None and (len(cleaned) or len(element.value) > 1):
                items.append(cleaned)
        return DataElement(element.tag, "SQ", items) if items else None

    def _clean_date(
        self, element: DataElement, action: Action | None, patient: str | None
    ) -> DataElement | None:
        if element.VR != "TM" and element.tag in _SHIFTED:
            moved = self.shift(str(element.value), patient)
            if moved is not None:
                text = f"{moved:%Y%m%d}" + ("000000" if element.VR == "DT" else "")
                return _change(element, [text])
        if action == "replace":
            none = {"DA": _NO_DATE, "TM": _NO_TIME, "DT": _NO_DATE + _NO_TIME}
            return _change(element, [none[element.VR]])
        return _change(element, []) if action == "empty" else None


def _set_pixels(target: Dataset, image: DicomImage) -> None:
    layout, num_frames = image.layout, len(image.slices)
    frames = np.stack([decode_stored(image, frame) for frame in range(num_frames)])
    data = frames.astype(frames.dtype.newbyteorder("<")).tobytes()
    target.SamplesPerPixel = 1
    photometric = get_words(image.dataset, "PhotometricInterpretation")[:1]
    target.PhotometricInterpretation = "".join(photometric) or "MONOCHROME2"
    target.Rows, target.Columns = layout.rows, layout.columns
    target.BitsAllocated, target.BitsStored = layout.bits_allocated, layout.bits_stored
    target.HighBit = layout.bits_stored - 1
    target.PixelRepresentation = int(layout.is_signed)
    if num_frames > 1:
        target.NumberOfFrames = num_frames
    target.add_new("PixelData", "OW" if layout.bits_allocated > 8 else "OB", data)


def _encode(target: Dataset) -> bytes:
    target.file_meta = FileMetaDataset()
    target.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    target.file_meta.MediaStorageSOPClassUID = target.SOPClassUID
    target.file_meta.MediaStorageSOPInstanceUID = target.SOPInstanceUID
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, target, enforce_file_format=True)
    return buffer.getvalue()


def _is_kept_group(tag: BaseTag) -> bool:
    is_repeating = tag.group & 0xFF00 in (0x5000, 0x6000)  # curves and overlays
    is_image = 0x0008 <= tag.group < 0x7FE0
    return is_image and tag.element != 0 and not tag.is_private and not is_repeating


def _list_values(element: DataElement) -> list[Any]:
    value = element.value
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, MultiValue | list | tuple) else [value]


def _change(element: DataElement, values: list[Any]) -> DataElement:
    value = values[0] if len(values) == 1 else values or None
    return DataElement(element.tag, element.VR, value)


def _clean_unlisted(element: DataElement) -> DataElement | None:
    """Keep an element that the profile does not list, if it is known to be no text of a person."""
    vr, values = element.VR, _list_values(element)
    if element.tag == _LUT_DATA or vr == "AT":
        return element
    if vr in _NUMBERS:
        is_whole = vr in ("IS", "SL", "SS", "SV", "UL", "US", "UV")
        numbers = [int(value) if is_whole else float(value) for value in values]
        if not all(map(math.isfinite, numbers)):
            return None
        shown = [format_number_as_ds(one) for one in numbers] if vr == "DS" else []
        return _change(element, shown or numbers)
    if vr == "CS":
        words = [str(value).strip().upper() for value in values]
        return _change(element, [word if word in _TERMS else "OTHER" for word in words])
    return _change(element, [REMOVED] if values else []) if vr in _TEXT else None


# ---- codes ---------------------------------------------------------------------------------------


_HEAD_CODES = {("SRT", "T-D1100"): "69536005", ("SRT", "T-A0100"): "12738006"}
"""Codes of SNOMED RT for head and brain, which older objects have, to those of SNOMED CT."""
_MAX_MEANING = 64
"""Characters of a Code Meaning (LO)."""


@lru_cache(maxsize=1)
def _read_codes() -> dict[tuple[str, str], str]:
    """Return the codes that pydicom knows of SNOMED CT, DICOM and UCUM, and their meanings."""
    from pydicom.sr.codedict import codes  # takes a second

    return {
        (code.scheme_designator, code.value): code.meaning
        for scheme in (codes.SCT, codes.DCM, codes.UCUM)
        for code in scheme.concepts.values()
    }


def _find_code(item: Dataset) -> Dataset | None:
    """Return a code as the standard has it; None of one that a site may have made up."""
    scheme = str(get_value(item, "CodingSchemeDesignator"))
    value = str(get_value(item, "CodeValue"))
    if (scheme, value) in _HEAD_CODES:
        scheme, value = "SCT", _HEAD_CODES[scheme, value]
    meaning = _read_codes().get((scheme, value))
    if meaning is None:
        return None
    return _make_code(value, scheme, meaning[:_MAX_MEANING])


def _make_code(value: str, scheme: str, meaning: str) -> Dataset:
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, scheme, meaning
    return code
