"""The key slices of a series as a Key Object Selection (TID 2010)."""

from pydicom.dataset import Dataset

from brainray.dicom_results.codes import CodeTable
from brainray.dicom_results.extra import import_highdicom
from brainray.dicom_results.objects import (
    NOTICE,
    describe_object,
    group_frames,
    make_evidence,
)
from brainray.dicom_results.result import SeriesResult


def build_key_objects(result: SeriesResult, codes: CodeTable, object_uid: str) -> Dataset:
    """Build the selection of a series' key slices, of which there is at least one.

    Parameters
    ----------
    result : SeriesResult
    codes : CodeTable
        Of the site.
    object_uid : str
        SOP Instance UID.

    Returns
    -------
    Dataset
        What :func:`brainray.dicom_results.objects.encode_object` takes.
    """
    hd = import_highdicom()
    frames = group_frames(result)
    uids = {instance.sop_instance_uid for instance in frames}
    chosen = [one for one in make_evidence(result.source) if one.SOPInstanceUID in uids]
    content = hd.ko.KeyObjectSelection(
        document_title=hd.sr.CodedConcept(*codes.concepts["key_objects"]),
        referenced_objects=chosen,
        description=f"Slices with the most evidence for {result.shown_class}: {NOTICE}",
    )
    numbers = {instance.sop_instance_uid: own for instance, own in frames.items()}
    for item in content[0].ContentSequence:
        if item.ValueType == "IMAGE":  # highdicom has no argument for frames here
            (reference,) = item.ReferencedSOPSequence
            if numbers[reference.ReferencedSOPInstanceUID]:
                reference.ReferencedFrameNumber = numbers[reference.ReferencedSOPInstanceUID]
    document: Dataset = hd.ko.KeyObjectSelectionDocument(
        evidence=chosen, content=content, **describe_object("ko", object_uid, result)
    )
    return document
