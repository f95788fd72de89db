"""The findings of a series as a Comprehensive 3D SR (TID 1500, Imaging Measurement Report).

The first measurement group (TID 1501) is the answer: the finding, whether it is present, absent or
undetermined, why there is no answer, and the key images. One more group for each other tumour has
its evidence alone. Numbers are the evidence (Certainty of Finding, in percent) and the longest run
of neighbouring positions; their method says that they are means over slices. The report is
PRELIMINARY and UNVERIFIED: a person has not seen it.
"""

from dataclasses import asdict
from typing import Any

from pydicom.dataset import Dataset

from brainray.dicom_results.codes import OWN_SCHEME, Code, CodeTable
from brainray.dicom_results.objects import (
    MANUFACTURER,
    MODEL_NAME,
    derive_uid,
    describe_object,
    get_version,
    group_frames,
    import_highdicom,
    make_evidence,
)
from brainray.dicom_results.result import SeriesResult, list_tumours

PERCENT = Code("%", "UCUM", "Percent")
SLICES = Code("{slices}", "UCUM", "slices")


def build_sr(result: SeriesResult, codes: CodeTable, object_uid: str) -> Dataset:
    """Build the structured report of a series, as ``encode_object`` takes it."""
    hd = import_highdicom()
    weights = result.output.about["weights_sha256"]
    device = hd.sr.DeviceObserverIdentifyingAttributes(
        uid=derive_uid("device", weights),
        name=f"{MANUFACTURER} {MODEL_NAME}",
        manufacturer_name=MANUFACTURER,
        model_name=MODEL_NAME,
        serial_number=weights[:16],
    )
    report = hd.sr.MeasurementReport(
        observation_context=hd.sr.ObservationContext(
            observer_device_context=hd.sr.ObserverContext(
                observer_type=_make_code(Code("121007", "DCM", "Device")),
                observer_identifying_attributes=device,
            )
        ),
        procedure_reported=_make_code(codes.concepts["procedure"]),
        imaging_measurements=_build_groups(result, codes),
    )
    document: Dataset = hd.sr.Comprehensive3DSR(
        evidence=make_evidence(result),
        content=report,
        is_complete=True,
        is_final=False,
        is_verified=False,
        **describe_object("sr", object_uid, result),
    )
    if codes.has_own_codes:
        scheme = Dataset()
        scheme.CodingSchemeDesignator = OWN_SCHEME
        scheme.CodingSchemeName = scheme.CodingSchemeResponsibleOrganization = MANUFACTURER
        document.CodingSchemeIdentificationSequence = [scheme]
    return document


def _make_code(code: Code) -> Any:  # noqa: ANN401 - as all below, of highdicom
    return import_highdicom().sr.CodedConcept(*code)


def _build_groups(result: SeriesResult, codes: CodeTable) -> list[Any]:
    """Build the group with the answer, and one for each other tumour."""
    hd = import_highdicom()
    answer, reason = result.summary["answer"], result.summary["reason"]
    tumours, concepts = list_tumours(result.output.classes), codes.concepts
    finding, presence = concepts["tumour"], "indeterminate"
    if result.has_answer:
        finding, presence = codes.classes[answer]
    said = [(concepts["presence"], concepts[presence])]
    if reason is not None:
        said.append((concepts["reason"], codes.reasons[reason]))
    images = [
        hd.sr.SourceImageForMeasurementGroup(
            instance.sop_class_uid, instance.sop_instance_uid, frames or None
        )
        for instance, frames in group_frames(result).items()
    ]
    first = _build_group(
        result,
        codes,
        "answer",
        finding,
        answer if answer in tumours else None,
        qualitative_evaluations=[
            hd.sr.QualitativeEvaluation(_make_code(name), _make_code(value)) for name, value in said
        ],
        source_images=images,
    )
    others = [
        _build_group(result, codes, f"evidence {name}", codes.classes[name].finding, name)
        for name in tumours
        if name != answer
    ]
    return [first, *others]


def _build_group(
    result: SeriesResult,
    codes: CodeTable,
    identifier: str,
    finding: Code,
    measured: str | None,
    **parts: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """Build a measurement group; ``measured`` is the class whose evidence it has."""
    hd = import_highdicom()
    output, concepts = result.output, codes.concepts
    classifier_id = output.store.classifier_id
    rule = " ".join(f"{name}={value:g}" for name, value in asdict(output.rule).items())
    algorithm = hd.sr.AlgorithmIdentification(
        name=f"{MANUFACTURER} {MODEL_NAME}",
        version=f"{get_version(result)}, classifier {classifier_id}",
        parameters=[
            f"rule: {rule}",
            f"engine: {result.engine}",
            f"weights: sha256 {output.about['weights_sha256']}",
        ],
    )
    measurements = []
    if measured is not None:
        certainty = hd.sr.Measurement(
            name=_make_code(concepts["certainty"]),
            value=round(100 * result.summary["evidence"][measured], 2),
            unit=_make_code(PERCENT),
            method=_make_code(concepts["evidence_method"]),
        )
        longest_run = hd.sr.Measurement(
            name=_make_code(concepts["longest_run"]),
            value=result.summary["longest_run"][measured],
            unit=_make_code(SLICES),
        )
        measurements = [certainty, longest_run]
    return hd.sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=hd.sr.TrackingIdentifier(
            uid=derive_uid("tracking", identifier, result.series_uid, classifier_id),
            identifier=f"{MANUFACTURER} {identifier}",
        ),
        finding_type=_make_code(finding),
        finding_sites=[hd.sr.FindingSite(_make_code(concepts["site"]))],
        algorithm_id=algorithm,
        measurements=measurements,
        **parts,
    )
