"""What all result objects have in common: UIDs, equipment, the patient and study of their source.

Objects are made by highdicom from a source without a patient, and get the patient at the end: so
nothing that highdicom says in a warning or an exception can hold a name.
"""

import io
from typing import Any, Literal
from uuid import UUID, uuid5

import pydicom
from pydicom.charset import python_encoding
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.valuerep import DA, DT, TM

from brainray.dicom_results.result import SeriesResult, find_time_zone
from brainray.dicom_results.source import Instance, SeriesSource
from brainray.errors import DicomResultsError
from brainray.provenance import collect_versions

Kind = Literal["sr", "ko", "sc"]
KINDS: tuple[Kind, ...] = ("sr", "ko", "sc")
"""Comprehensive 3D SR, Key Object Selection, Secondary Capture."""

MANUFACTURER = "brainray"
MODEL_NAME = "brain MRI classifier"
NOTICE = "not for diagnostic use, for research use only"
SERIES_DESCRIPTIONS: dict[Kind, str] = {
    "sr": f"AI findings: {NOTICE}",
    "ko": f"AI key images: {NOTICE}",
    "sc": f"AI summary: {NOTICE}",
}
"""At most 64 characters each (VR LO)."""
SERIES_NUMBERS: dict[Kind, int] = {"sr": 7001, "ko": 7002, "sc": 7003}

_NAMESPACE = UUID("6d7c2a0e-4f0b-5c1e-9d63-0b7f3a9e51c4")
"""Of the names that UIDs are derived from; never changed."""
UNICODE = "ISO_IR 192"

_PATIENT_AND_STUDY_TEXT = (
    "PatientName PatientID IssuerOfPatientID PatientBirthDate PatientSex OtherPatientIDsSequence "
    "PatientIdentityRemoved DeidentificationMethod DeidentificationMethodCodeSequence "
    "ClinicalTrialSponsorName ClinicalTrialProtocolID ClinicalTrialProtocolName "
    "ClinicalTrialSiteID ClinicalTrialSiteName ClinicalTrialSubjectID "
    "ClinicalTrialSubjectReadingID StudyDate StudyTime AccessionNumber "
    "IssuerOfAccessionNumberSequence ReferringPhysicianName StudyID StudyDescription PatientAge "
    "PatientSize PatientWeight TimezoneOffsetFromUTC"
)
_PATIENT_AND_STUDY = tuple(_PATIENT_AND_STUDY_TEXT.split())
"""What an object takes over from its source, where the source has it."""
_TYPE_2_TEXT = (
    "PatientName PatientID PatientBirthDate PatientSex StudyDate StudyTime AccessionNumber "
    "ReferringPhysicianName StudyID"
)
_TYPE_2 = tuple(_TYPE_2_TEXT.split())
"""What every object has, empty where the source has none."""
_SEXES = ("M", "F", "O")


# ---- UIDs ----------------------------------------------------------------------------------------


def derive_uid(*names: str) -> str:
    """Return the UID that some names always have: ``2.25.`` and a UUID (PS3.5, B.2)."""
    return f"2.25.{uuid5(_NAMESPACE, chr(10).join(names)).int}"


def derive_series_uid(kind: Kind, study_uid: str, classifier_id: str) -> str:
    """Return the series in a study of all objects of one kind from one classifier."""
    return derive_uid("series", kind, study_uid, classifier_id)


def derive_object_uid(kind: Kind, source_series_uid: str, classifier_id: str, digest: str) -> str:
    """Return the UID of an object: the same for the same source, classifier and content.

    Parameters
    ----------
    kind : str
    source_series_uid : str
        Series Instance UID of the classified series.
    classifier_id : str
    digest : str
        Of what else the object depends on: a series with another slice gives another object, as
        DICOM demands.
    """
    return derive_uid("object", kind, source_series_uid, classifier_id, digest)


# ---- making an object ----------------------------------------------------------------------------


def describe_object(kind: Kind, object_uid: str, result: SeriesResult) -> dict[str, Any]:
    """Return the arguments that highdicom's constructors have in common."""
    classifier_id = result.output.store.classifier_id
    return {
        "series_instance_uid": derive_series_uid(kind, result.source.study_uid, classifier_id),
        "series_number": SERIES_NUMBERS[kind],
        "sop_instance_uid": object_uid,
        # All results of a study are one series: the number tells which series they are about.
        "instance_number": result.source.series_number or 1,
        "manufacturer": MANUFACTURER,
        "manufacturer_model_name": MODEL_NAME,
        "software_versions": (get_version(result), classifier_id),
        "device_serial_number": result.output.about["weights_sha256"][:16],
        "series_description": SERIES_DESCRIPTIONS[kind],
    }


def get_version(result: SeriesResult) -> str:
    """Return the version of brainray that classified, else the one that runs."""
    versions = result.output.about.get("versions") or collect_versions()
    return f"brainray {versions['brainray']}"


def make_evidence(source: SeriesSource) -> list[Dataset]:
    """Return the source's instances as highdicom takes them: with their UIDs, and no patient."""
    return [_make_reference(source, instance) for instance in source.instances.values()]


def _make_reference(source: SeriesSource, instance: Instance) -> Dataset:
    reference = Dataset()
    for keyword in _TYPE_2:
        setattr(reference, keyword, None)
    reference.SOPClassUID = instance.sop_class_uid
    reference.SOPInstanceUID = instance.sop_instance_uid
    reference.StudyInstanceUID = source.study_uid
    reference.SeriesInstanceUID = source.series_uid
    reference.Rows = reference.Columns = 1  # tells highdicom that it is an image
    return reference


def group_frames(result: SeriesResult) -> dict[Instance, list[int]]:
    """Return the instances of the key slices, and the numbers of their frames, if any."""
    frames: dict[Instance, list[int]] = {}
    for key in result.key_slices:
        numbers = frames.setdefault(key.instance, [])
        if key.frame_number is not None:
            numbers.append(key.frame_number)
    return {instance: sorted(numbers) for instance, numbers in frames.items()}


def encode_object(dataset: Dataset, result: SeriesResult) -> bytes:
    """Give an object its patient, study and time, and encode it as a file (PS3.10).

    Names are encoded in the source's character set; in UTF-8 where that does not give what the
    source has.

    Raises
    ------
    DicomResultsError
        The source's patient or study cannot be read, or not be written.
    """
    header = result.source.header
    for keyword in _PATIENT_AND_STUDY:
        if keyword in dataset:
            del dataset[keyword]
        if keyword in _TYPE_2:
            setattr(dataset, keyword, None)
        if keyword in header:
            _copy_element(header, dataset, keyword)
    at = result.computed_at
    dataset.InstanceCreationDate = dataset.ContentDate = DA(at.date())
    dataset.InstanceCreationTime = dataset.ContentTime = TM(at.time())
    for equipment in dataset.get("ContributingEquipmentSequence") or ():
        equipment.ContributionDateTime = DT(at.replace(tzinfo=None))  # highdicom's is now
    for charset in (_find_charset(header), UNICODE):
        if charset is not None:
            dataset.SpecificCharacterSet = charset
        buffer = io.BytesIO()
        pydicom.dcmwrite(buffer, dataset, enforce_file_format=True)
        content = buffer.getvalue()
        written = pydicom.dcmread(io.BytesIO(content), stop_before_pixels=True)
        if _list_identity(written) == _list_identity(dataset):
            return content
    raise DicomResultsError("The patient's name, or another text of the source, cannot be encoded.")


def _find_charset(header: Dataset) -> str | list[str] | None:
    """Return the source's character set, if any; UTF-8 where it is none of the standard's."""
    value = header.get("SpecificCharacterSet")
    if not value:
        return None
    words = [value] if isinstance(value, str) else list(value)
    return words if all(word in python_encoding for word in words) else UNICODE


def _copy_element(header: Dataset, dataset: Dataset, keyword: str) -> None:
    """Copy an element, unless its value is one that a valid object cannot have."""
    try:
        element = header[keyword]
    except Exception:  # what it raises holds the value
        element = None
    if element is None:
        raise DicomResultsError(f"The {keyword} of the source cannot be read.")
    if element.value and _is_valid(header, keyword, element):
        dataset[keyword] = element


def _is_valid(header: Dataset, keyword: str, element: DataElement) -> bool:
    if keyword == "PatientSex":
        return str(element.value) in _SEXES
    if keyword == "TimezoneOffsetFromUTC":
        return find_time_zone(header) is not None
    parse = {"DA": DA, "TM": TM}.get(element.VR, str)
    try:
        parse(str(element.value))
    except ValueError:
        return False
    return True


def _list_identity(dataset: Dataset) -> list[str]:
    """Return what a reader finds of the patient and the study."""
    return [str(dataset.get(keyword) or "") for keyword in _PATIENT_AND_STUDY]
