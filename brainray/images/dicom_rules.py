"""Which DICOM objects hold MR images of a head, by what their headers say.

Headers are often silent and sometimes wrong. So an object is rejected only for what it says of
itself; what it does not say becomes a flag beside the answer. DERIVED alone rejects nothing:
compressing an image with loss makes it DERIVED too.
"""

from pydicom.dataset import Dataset
from pydicom.uid import UID

from brainray.errors import RejectedImage
from brainray.images.dicom_file import FunctionalGroups, get_item, get_value, get_words


def _terms(text: str) -> frozenset[str]:
    return frozenset(text.split("|"))


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
_NO_IMAGE_MODALITIES = _terms("AU|DOC|ECG|FID|KO|PLAN|PR|REG|RTPLAN|RTRECORD|RTSTRUCT|SEG|SR")

# PS3.3, C.8.3.1.1.1 and C.8.13.3.1.1, and what the large vendors write in the third value and
# later ones.
_PROJECTIONS = frozenset({"PROJECTION IMAGE", "MIP", "MINIP", "MPR", "CSA MPR", "MAX_IP", "MIN_IP"})
_DERIVED_MAPS = _terms(
    "ADC|EADC|FA|FRACTIONAL_ANISOTROPY|TENSOR|PHASE|PHASE MAP|PHASE_MAP|P|R|I|REAL|IMAGINARY|"
    "VELOCITY|VELOCITY MAP|B0 MAP|FIELD MAP|T1 MAP|T2 MAP|T2_STAR MAP|CBF|CBV|RCBF|RCBV|MTT|TTP|"
    "TMAX|KTRANS"
)
_NOT_MAGNITUDE = frozenset({"PHASE", "REAL", "IMAGINARY"})  # Complex Image Component

# PS3.16, annex L. Parts next to the brain are accepted: a head study may be filed under them.
_HEAD_PARTS = frozenset({"BRAIN", "HEAD", "HEADNECK", "SKULL", "ORBIT", "FACE", "PITUITARY", "IAC"})
_OTHER_PARTS = _terms(
    "ABDOMEN|ABDOMENPELVIS|ANKLE|AORTA|ARM|BLADDER|BREAST|CALF|CERVIX|CHEST|CHESTABDOMEN|CLAVICLE|"
    "COCCYX|CSPINE|CTSPINE|ELBOW|EXTREMITY|FEMUR|FINGER|FOOT|FOREARM|HAND|HEART|HIP|HUMERUS|KIDNEY|"
    "KNEE|LEG|LIVER|LOWERLIMB|LSPINE|LSSPINE|LUNG|PANCREAS|PELVIS|PROSTATE|RIB|SHOULDER|SPINE|"
    "SPLEEN|SSPINE|STERNUM|TESTIS|THIGH|THORAX|TLSPINE|TSPINE|UPPERLIMB|UTERUS|WHOLEBODY|WRIST"
)
# Code values of Anatomic Region Sequence: SNOMED CT, then SNOMED RT.
_HEAD_CODES = frozenset({"69536005", "12738006", "774007", "T-D1100", "T-A0100", "T-D1000"})
_OTHER_CODES = _terms(
    # chest, abdomen, pelvis, breast, heart, cervical, thoracic and lumbar spine, knee
    "51185008|818981001|113345001|816092008|12921003|76752008|80891009|122494005|122495006|"
    "122496007|72696002|T-D3000|T-D4000|T-D6000|T-04000|T-32000|T-11501|T-11502|T-11503|"
    "T-D9200"
)

_CONTRASTS = _terms(
    "DIFFUSION|FLOW_ENCODED|FLUID_ATTENUATED|PERFUSION|PROTON_DENSITY|STIR|TAGGING|T2|T2_STAR|TOF"
)
"""Defined terms of Acquisition Contrast other than T1, which the public slices mostly are."""

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
    """Return the rejection of a reason that a DICOM header gave."""
    return RejectedImage(reason, _MESSAGES[reason])


def name_uid(uid: str) -> str:
    """Return a registered UID, or a word for another: what a file invents never gets out."""
    return uid if UID(uid).name != uid else "a private UID"


def find_object_rejection(dataset: Dataset, sop_class: str) -> str | None:
    """Return the reason to reject a whole object, before its pixels are looked for."""
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


def find_image_rejection(dataset: Dataset) -> str | None:
    """Return the reason to reject all images of an MR object."""
    photometric = get_words(dataset, "PhotometricInterpretation")
    if photometric and photometric[0] not in ("MONOCHROME1", "MONOCHROME2"):
        return "colour"
    if get_words(dataset, "BurnedInAnnotation")[:1] == ("YES",):
        return "burned_in"
    if is_head(dataset) is False:
        return "other_body_part"
    return None


def is_head(dataset: Dataset) -> bool | None:
    """Tell whether the header says that this is a head; None where it does not say.

    The coded region counts before Body Part Examined, which many scanners fill from a protocol.
    """
    anatomy = FunctionalGroups(dataset, 0).find("FrameAnatomySequence", "AnatomicRegionSequence")
    region = get_item(anatomy, "AnatomicRegionSequence")
    code = None if region is None else get_value(region, "CodeValue")
    part = "".join(get_words(dataset, "BodyPartExamined")[:1])
    if code in _HEAD_CODES or part in _HEAD_PARTS:
        return True
    if code in _OTHER_CODES or part in _OTHER_PARTS:
        return False
    return None


def find_frame_rejection(groups: FunctionalGroups) -> str | None:
    """Return the reason to reject one frame, by what kind of image it says it is."""
    kind = "MRImageFrameTypeSequence"
    types = get_words(groups.find(kind, "FrameType"), "FrameType")
    types = types or get_words(groups.root, "ImageType")
    words = frozenset(types[2:])
    component = get_words(groups.find(kind, "ComplexImageComponent"), "ComplexImageComponent")
    technique = get_words(
        groups.find(kind, "VolumeBasedCalculationTechnique"), "VolumeBasedCalculationTechnique"
    )
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


def find_sequence_flags(groups: FunctionalGroups) -> set[str]:
    """Return flags of the MR sequence, from elements whose terms the standard enumerates."""
    flags: set[str] = set()
    contrast = get_words(
        groups.find("MRImageFrameTypeSequence", "AcquisitionContrast"), "AcquisitionContrast"
    )
    flags.update(f"contrast_{word.lower()}" for word in contrast if word in _CONTRASTS)
    if "EP" in get_words(groups.root, "ScanningSequence"):
        flags.add("echo_planar")
    return flags
