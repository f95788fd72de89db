"""Key Object Selections, Secondary Captures, and what all result objects have in common.

These are UIDs, equipment, and the patient and study of their source.

Objects are made by highdicom from a source without a patient, and get the patient at the end: so
nothing that highdicom says in a warning or an exception can hold a name.
"""

import importlib
import io
import logging
import warnings
from typing import Any, Literal
from uuid import UUID, uuid5

import numpy as np
import pydicom
from pydicom.charset import python_encoding
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.valuerep import DA, DT, TM

from brainray.dicom_results.codes import CodeTable
from brainray.dicom_results.result import Instance, SeriesResult, find_time_zone
from brainray.dicom_results.summary_page import draw_page
from brainray.errors import ConfigError, DicomResultsError
from brainray.io.provenance import collect_versions

Kind = Literal["sr", "ko", "sc"]
KINDS: tuple[Kind, ...] = ("sr", "ko", "sc")
"""Comprehensive 3D SR, Key Object Selection, Secondary Capture."""

MANUFACTURER = "brainray"
MODEL_NAME = "brain MRI classifier"
NOTICE = "not for diagnostic use, for research use only"
_SERIES: dict[Kind, tuple[int, str]] = {
    "sr": (7001, f"AI findings: {NOTICE}"),
    "ko": (7002, f"AI key images: {NOTICE}"),
    "sc": (7003, f"AI summary: {NOTICE}"),
}
"""Number and description, which has at most 64 characters (VR LO)."""

_NAMESPACE = UUID("6d7c2a0e-4f0b-5c1e-9d63-0b7f3a9e51c4")
"""Of the names that UIDs are derived from; never changed."""

_PATIENT_AND_STUDY_TEXT = (
    "PatientName PatientID IssuerOfPatientID PatientBirthDate PatientSex "
    "OtherPatientIDsSequence PatientIdentityRemoved DeidentificationMethod "
    "DeidentificationMethodCodeSequence ClinicalTrialSponsorName ClinicalTrialProtocolID "
    "ClinicalTrialProtocolName ClinicalTrialSiteID ClinicalTrialSiteName "
    "ClinicalTrialSubjectID ClinicalTrialSubjectReadingID StudyDate StudyTime AccessionNumber "
    "IssuerOfAccessionNumberSequence ReferringPhysicianName StudyID StudyDescription "
    "PatientAge PatientSize PatientWeight TimezoneOffsetFromUTC"
)
_PATIENT_AND_STUDY = tuple(_PATIENT_AND_STUDY_TEXT.split())
"""What an object takes over from its source, where the source has it."""
_TYPE_2_TEXT = (
    "PatientName PatientID PatientBirthDate PatientSex StudyDate StudyTime AccessionNumber "
    "ReferringPhysicianName StudyID"
)
_TYPE_2 = tuple(_TYPE_2_TEXT.split())
"""What every object has, empty where the source has none."""
_LOSSY = ("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod")


def import_highdicom() -> Any:  # noqa: ANN401 - it may be absent where types are checked
    """Import highdicom, without its log and its warnings: both quote patients' names."""
    logging.getLogger("highdicom").setLevel(logging.CRITICAL + 1)
    warnings.filterwarnings("ignore", module=r"highdicom(\.|$)")
    try:
        return importlib.import_module("highdicom")
    except ImportError as error:
        raise ConfigError(
            "DICOM results need the library highdicom, which is not installed. "
            "Install the extra: pip install 'brainray[dicom]'."
        ) from error


def derive_uid(*names: str) -> str:
    """Return the UID that some names always have: ``2.25.`` and a UUID (PS3.5, B.2)."""
    return f"2.25.{uuid5(_NAMESPACE, chr(10).join(names)).int}"


def describe_object(kind: Kind, object_uid: str, result: SeriesResult) -> dict[str, Any]:
    """Return the arguments that highdicom's constructors have in common."""
    classifier_id, study_uid = result.output.store.classifier_id, result.study_uid
    series_number, series_description = _SERIES[kind]
    return {
        # All results of a kind, study and classifier are one series: the number of an instance
        # tells which series it is about.
        "series_instance_uid": derive_uid("series", kind, study_uid, classifier_id),
        "series_number": series_number,
        "sop_instance_uid": object_uid,
        "instance_number": result.series_number or 1,
        "manufacturer": MANUFACTURER,
        "manufacturer_model_name": MODEL_NAME,
        "software_versions": (get_version(result), classifier_id),
        "device_serial_number": result.output.about["weights_sha256"][:16],
        "series_description": series_description,
    }


def get_version(result: SeriesResult) -> str:
    """Return the version of brainray that classified, else the one that runs."""
    versions = result.output.about.get("versions") or collect_versions()
    return f"brainray {versions['brainray']}"


def make_evidence(result: SeriesResult) -> list[Dataset]:
    """Return the source instances as highdicom takes them: with their UIDs, and no patient."""
    evidence = []
    for instance in result.instances:
        reference = Dataset()
        for keyword in _TYPE_2:
            setattr(reference, keyword, None)
        reference.SOPClassUID = instance.sop_class_uid
        reference.SOPInstanceUID = instance.sop_instance_uid
        reference.StudyInstanceUID = result.study_uid
        reference.SeriesInstanceUID = result.series_uid
        reference.Rows = reference.Columns = 1  # tells highdicom that it is an image
        evidence.append(reference)
    return evidence


def group_frames(result: SeriesResult) -> dict[Instance, list[int]]:
    """Return the instances of the key slices, and the numbers of their frames, if any."""
    frames: dict[Instance, list[int]] = {}
    for key in result.key_slices:
        numbers = frames.setdefault(key.instance, [])
        if key.frame_number is not None:
            numbers.append(key.frame_number)
    return {instance: sorted(numbers) for instance, numbers in frames.items()}


# ---- objects, as encode_object takes them --------------------------------------------------------


def build_key_objects(result: SeriesResult, codes: CodeTable, object_uid: str) -> Dataset:
    """Select the key slices of a series, of which there is at least one (TID 2010)."""
    hd = import_highdicom()
    frames = {instance.sop_instance_uid: own for instance, own in group_frames(result).items()}
    chosen = [one for one in make_evidence(result) if one.SOPInstanceUID in frames]
    content = hd.ko.KeyObjectSelection(
        document_title=hd.sr.CodedConcept(*codes.concepts["key_objects"]),
        referenced_objects=chosen,
        description=f"Slices with the most evidence for {result.shown_class}: {NOTICE}",
    )
    for item in content[0].ContentSequence:
        if item.ValueType == "IMAGE":  # highdicom has no argument for frames here
            (reference,) = item.ReferencedSOPSequence
            if frames[reference.ReferencedSOPInstanceUID]:
                reference.ReferencedFrameNumber = frames[reference.ReferencedSOPInstanceUID]
    document: Dataset = hd.ko.KeyObjectSelectionDocument(
        evidence=chosen, content=content, **describe_object("ko", object_uid, result)
    )
    return document


def build_secondary_capture(
    result: SeriesResult,
    codes: CodeTable,  # noqa: ARG001 - a page has none
    object_uid: str,
) -> Dataset:
    """Make a picture of a series' summary, for viewers that read no reports."""
    page: Dataset = import_highdicom().sc.SCImage(
        pixel_array=np.asarray(draw_page(result)),
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        patient_orientation=("L", "P"),
        study_instance_uid=result.study_uid,
        **describe_object("sc", object_uid, result),
    )
    page.PatientOrientation = None  # highdicom demands one, and a page of text has none
    page.ConversionType = "WSD"  # drawn on a workstation; highdicom says digital interface
    page.BodyPartExamined = "BRAIN"
    page.BurnedInAnnotation = "NO"  # the page names nobody
    page.ImageComments = "Research use only. Not for diagnostic use."
    at = result.computed_at
    page.DateOfSecondaryCapture, page.TimeOfSecondaryCapture = at.date(), at.time()
    page.SourceImageSequence = []
    for instance, frames in group_frames(result).items():
        item = Dataset()
        item.ReferencedSOPClassUID = instance.sop_class_uid
        item.ReferencedSOPInstanceUID = instance.sop_instance_uid
        if frames:
            item.ReferencedFrameNumber = frames
        page.SourceImageSequence.append(item)
    header = result.header
    if header.get("LossyImageCompression") == "01" and all(word in header for word in _LOSSY[:2]):
        for keyword in _LOSSY:
            if keyword in header:
                page[keyword] = header[keyword]
    return page


# ---- files ---------------------------------------------------------------------------------------


def encode_object(dataset: Dataset, result: SeriesResult) -> bytes:
    """Give an object its patient, study and time, and encode it as a file (PS3.10).

    Names are encoded in the source's character set; in UTF-8 where that does not give what the
    source has. Raises DicomResultsError if patient or study cannot be read, or not be written.
    """
    header = result.header
    for keyword in _PATIENT_AND_STUDY:
        if keyword in dataset:
            del dataset[keyword]
        if keyword in _TYPE_2:
            setattr(dataset, keyword, None)
        element = _read_element(header, keyword)
        if element is not None and element.value and _is_valid(header, keyword, element):
            dataset[keyword] = element
    at = result.computed_at
    dataset.InstanceCreationDate = dataset.ContentDate = DA(at.date())
    dataset.InstanceCreationTime = dataset.ContentTime = TM(at.time())
    for equipment in dataset.get("ContributingEquipmentSequence") or ():
        equipment.ContributionDateTime = DT(at.replace(tzinfo=None))  # highdicom's is now
    for charset in (_find_charset(header), "ISO_IR 192"):
        if charset is not None:
            dataset.SpecificCharacterSet = charset
        buffer = io.BytesIO()
        pydicom.dcmwrite(buffer, dataset, enforce_file_format=True)
        content = buffer.getvalue()
        written = pydicom.dcmread(io.BytesIO(content), stop_before_pixels=True)
        pairs = [(written.get(name), dataset.get(name)) for name in _PATIENT_AND_STUDY]
        if all(str(found or "") == str(meant or "") for found, meant in pairs):
            return content
    raise DicomResultsError("The patient's name, or another text of the source, cannot be encoded.")


def _find_charset(header: Dataset) -> str | list[str] | None:
    """Return the source's character set, if any; UTF-8 where it is none of the standard's."""
    value = header.get("SpecificCharacterSet")
    if not value:
        return None
    words = [value] if isinstance(value, str) else list(value)
    return words if all(word in python_encoding for word in words) else "ISO_IR 192"


def _read_element(header: Dataset, keyword: str) -> DataElement | None:
    if keyword not in header:
        return None
    try:
        return header[keyword]
    except Exception:  # what it raises holds the value, and must not be chained
        pass
    raise DicomResultsError(f"The {keyword} of the source cannot be read.")


def _is_valid(header: Dataset, keyword: str, element: DataElement) -> bool:
    """Tell whether an object with this element can be valid."""
    if keyword == "PatientSex":
        return str(element.value) in ("M", "F", "O")
    if keyword == "TimezoneOffsetFromUTC":
        return find_time_zone(header) is not None
    parse = {"DA": DA, "TM": TM}.get(element.VR, str)
    try:
        parse(str(element.value))
    except ValueError:
        return False
    return True
