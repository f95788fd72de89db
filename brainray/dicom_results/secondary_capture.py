"""The summary page of a series as a Secondary Capture, for viewers that read no reports."""

import numpy as np
from pydicom.dataset import Dataset

from brainray.dicom_results.extra import import_highdicom
from brainray.dicom_results.objects import describe_object, group_frames
from brainray.dicom_results.result import SeriesResult
from brainray.dicom_results.summary_page import draw_page

_LOSSY = ("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod")


def build_secondary_capture(result: SeriesResult, object_uid: str) -> Dataset:
    """Build the picture of a series' summary.

    Parameters
    ----------
    result : SeriesResult
    object_uid : str
        SOP Instance UID.

    Returns
    -------
    Dataset
        What :func:`brainray.dicom_results.objects.encode_object` takes.
    """
    hd = import_highdicom()
    page: Dataset = hd.sc.SCImage(
        pixel_array=np.asarray(draw_page(result)),
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        patient_orientation=("L", "P"),
        study_instance_uid=result.source.study_uid,
        **describe_object("sc", object_uid, result),
    )
    page.PatientOrientation = None  # highdicom demands one, and a page of text has none
    page.ConversionType = "WSD"  # drawn on a workstation; highdicom says digital interface
    page.BodyPartExamined = "BRAIN"
    page.BurnedInAnnotation = "NO"  # the page names nobody
    page.ImageComments = "Research use only. Not for diagnostic use."
    at = result.computed_at
    page.DateOfSecondaryCapture, page.TimeOfSecondaryCapture = at.date(), at.time()
    page.SourceImageSequence = [
        _reference(instance.sop_class_uid, instance.sop_instance_uid, frames)
        for instance, frames in group_frames(result).items()
    ]
    header = result.source.header
    if header.get("LossyImageCompression") == "01" and all(word in header for word in _LOSSY[:2]):
        for keyword in _LOSSY:
            if keyword in header:
                page[keyword] = header[keyword]
    return page


def _reference(sop_class_uid: str, sop_instance_uid: str, frames: list[int]) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID = sop_class_uid
    item.ReferencedSOPInstanceUID = sop_instance_uid
    if frames:
        item.ReferencedFrameNumber = frames
    return item
