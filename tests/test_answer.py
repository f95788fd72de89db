"""A prediction as a row of the prediction table and as an answer of the service."""

import numpy as np
import pyarrow as pa
import pytest

from brainray.errors import ClassifierError, RejectedImage
from brainray.images.slices import SliceInfo
from brainray.inference.engine import Prediction
from brainray.inference.schema import SCAN_SCHEMA, build_rows, build_schema, stack_lists
from brainray.model.calibration import LOW_CONFIDENCE, UNLIKE_TRAINING
from brainray.model.reasons import REASONS
from brainray.serving.pipeline import build_answer, build_rejection, build_slice

CLASSES = ("x", "y")
PROBS = np.array([[0.25, 0.75], [0.6, 0.4], [0.9, 0.1]], np.float32)
PREDICTION = Prediction(
    PROBS,
    [None, LOW_CONFIDENCE, UNLIKE_TRAINING],
    logits=np.log(PROBS),
    features=np.arange(12, dtype=np.float32).reshape(3, 4),
    class_maps=np.arange(12, dtype=np.float32).reshape(3, 2, 1, 2),
)
SCANS = pa.Table.from_pylist(
    [
        {"scan_uri": "a.png", "content_sha256": "a" * 64, "height_px": 2, "width_px": 3},
        {"scan_uri": "cut.png", "content_sha256": "b" * 64, "reason": "truncated", "size_bytes": 9},
        {"scan_uri": "c.png", "content_sha256": "c" * 64, "height_px": 2, "width_px": 3},
        {"scan_uri": "d.png", "content_sha256": "d" * 64, "height_px": 2, "width_px": 3},
    ],
    schema=SCAN_SCHEMA,
)
ENGINE = {"backend": "openvino", "precision": "bf16", "description": "OpenVINO"}


def build(prediction: Prediction) -> pa.Table:
    return build_rows(SCANS, prediction, classes=CLASSES, classifier_id="c0", engine=ENGINE)


def test_every_scan_has_a_row_with_the_values_that_its_status_allows() -> None:
    table = build(PREDICTION)
    assert table.schema == build_schema(CLASSES)
    classified, cut, unsure, unlike = table.to_pylist()
    assert [row["status"] for row in (classified, cut, unsure, unlike)] == [
        *("classified", "rejected", "abstained", "rejected"),
    ]
    assert (classified["predicted_class"], classified["confidence"]) == ("y", 0.75)
    assert (classified["prob_x"], classified["prob_y"], classified["reason"]) == (0.25, 0.75, None)
    assert (unsure["predicted_class"], unsure["reason"]) == (None, LOW_CONFIDENCE)
    assert unsure["confidence"] == unsure["prob_x"] == pytest.approx(0.6)
    for row in (cut, unlike):
        assert {row[name] for name in ("predicted_class", "confidence", "prob_x", "prob_y")} == {
            None
        }
    assert (cut["size_bytes"], cut["height_px"]) == (9, None)
    assert {(row["engine"], row["precision"]) for row in table.to_pylist()} == {
        ("openvino", "bf16")
    }


def test_opened_scans_have_logits_and_features_and_only_accepted_scans_have_maps() -> None:
    table = build(PREDICTION)
    assert table["class_map"].to_pylist() == [[2, 3], None, [4, 5], None]
    opened = table.filter(pa.array([True, False, True, True]))
    assert PREDICTION.logits is not None
    assert PREDICTION.features is not None
    np.testing.assert_array_equal(stack_lists(opened["logits"]), PREDICTION.logits)
    np.testing.assert_array_equal(stack_lists(opened["features"]), PREDICTION.features)
    assert table["logits"][1].as_py() is None
    assert build(Prediction(PROBS, PREDICTION.reasons))["logits"].null_count == 4


def test_probabilities_of_nan_are_an_error() -> None:
    with pytest.raises(ClassifierError, match="not numbers"):
        build(Prediction(PROBS * np.float32("nan"), PREDICTION.reasons))


@pytest.mark.parametrize("row", [0, 2, 3])
def test_the_service_and_the_table_agree_on_a_scan(row: int) -> None:
    expected = build(PREDICTION).to_pylist()[row]
    number = [0, None, 1, 2][row]
    reason = expected["reason"]
    found = build_slice(SliceInfo(), (2, 3), CLASSES, PROBS[number], reason)
    file = {"name": "a", "content_sha256": expected["content_sha256"]}
    answer = build_answer(file, [found])
    same = ("status", "reason", "predicted_class", "width_px", "height_px", "content_sha256")
    for name in same:
        assert getattr(answer, name) == expected[name], name
    shown = [answer.confidence, *(answer.probs or dict.fromkeys(CLASSES)).values()]
    # As float32: the service writes the shortest decimals that read back as the table's numbers.
    assert [None if value is None else np.float32(value) for value in shown] == [
        expected[name] for name in ("confidence", "prob_x", "prob_y")
    ]
    assert answer.detail == (REASONS[reason] if reason else None)


def test_a_rejection_has_a_reason_and_a_detail() -> None:
    rejected = build_rejection(SliceInfo(), RejectedImage("truncated", "It ends too soon."))
    answer = build_answer({"name": "a", "content_sha256": "b" * 64}, [rejected])
    assert (answer.status, answer.reason, answer.detail) == (
        *("rejected", "truncated", "It ends too soon."),
    )
    assert (answer.predicted_class, answer.probs, answer.width_px) == (None, None, None)
    assert answer.content_sha256 == "b" * 64
