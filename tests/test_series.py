"""Slice evidence: each part of the rule is tested with hand-made rows."""

import random
from typing import Any

import pytest

from brainray.errors import ConfigError
from brainray.inference.series import (
    DUPLICATE,
    INDETERMINATE,
    MAX_LOCALIZER_SLICES,
    SeriesRule,
    summarise_series,
)

CLASSES = ("glioma", "meningioma", "notumor", "pituitary")
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
CORONAL = (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)
SAGITTAL = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)
Row = dict[str, Any]


def make_row(index: int, glioma: float = 0.0, **columns: Any) -> Row:  # noqa: ANN401
    """Make the row of an axial slice; the remaining probability is that of no tumour."""
    probs = {f"prob_{name}": 0.0 for name in CLASSES}
    probs["prob_glioma"], probs["prob_notumor"] = glioma, 1 - glioma
    row = {
        "scan_uri": f"/scans/{index:03}.dcm",
        "reason": None,
        "sop_instance": f"object-{index}",
        "frame": None,
        "plane": "axial",
        "position_mm": 5.0 * index,
        "orientation": AXIAL,
        "flags": None,
    }
    return row | probs | columns


def make_series(*glioma: float) -> list[Row]:
    return [make_row(index, prob) for index, prob in enumerate(glioma)]


def reject_row(row: Row, reason: str) -> Row:
    return row | {"reason": reason} | {f"prob_{name}": None for name in CLASSES}


def summarise(slices: list[Row], **rule: Any) -> Row:  # noqa: ANN401
    """Summarise rows, and check that two other orders of them give the same summary."""
    found = summarise_series(slices, CLASSES, SeriesRule(**rule))
    for seed in range(2):
        mixed = random.Random(seed).sample(slices, len(slices))
        assert summarise_series(mixed, CLASSES, SeriesRule(**rule)) == found
    return found


# ---- answers -------------------------------------------------------------------------------------


def test_a_run_of_strong_slices_gives_a_class() -> None:
    found = summarise(make_series(0, 0, 0.7, 0.9, 0.8, 0, 0, 0, 0, 0))
    assert (found["answer"], found["reason"]) == ("glioma", None)
    assert found["longest_run"]["glioma"] == 3
    assert (found["num_slices"], found["num_used"], found["skipped"]) == (10, 10, {})
    assert (found["plane"], found["flags"]) == ("axial", [])


@pytest.mark.parametrize(
    ("top_fraction", "evidence"),
    # The mean of the 1, 2, 3 and 10 largest of ten; the number of slices is rounded up.
    [(0.1, 0.9), (0.11, 0.85), (0.2, 0.85), (0.3, 0.8), (1.0, 0.28), (0.001, 0.9)],
)
def test_evidence_is_the_mean_of_the_top_fraction(top_fraction: float, evidence: float) -> None:
    slices = make_series(0, 0, 0.7, 0.9, 0.8, 0.4, 0, 0, 0, 0)
    found = summarise(slices, top_fraction=top_fraction)
    assert found["evidence"]["glioma"] == pytest.approx(evidence)


def test_one_strong_slice_among_many_is_weak_evidence() -> None:
    """With the maximum of the slices, this and nearly every other series would be a glioma."""
    found = summarise(make_series(*[0] * 9, 0.99))
    assert (found["answer"], found["reason"]) == (INDETERMINATE, "weak_evidence")


def test_strong_slices_that_are_not_neighbours_are_weak_evidence() -> None:
    found = summarise(make_series(0.9, 0, 0.9, 0, 0.9, 0, 0.9, 0))
    assert (found["answer"], found["reason"]) == (INDETERMINATE, "weak_evidence")
    assert found["longest_run"]["glioma"] == 1


def test_a_long_run_below_the_threshold_is_weak_evidence() -> None:
    slices = make_series(0, 0, 0, 0, 0.6, 0.6, 0.6, 0, 0, 0)
    found = summarise(slices, top_fraction=0.5, threshold=0.55)
    assert found["evidence"]["glioma"] == pytest.approx(0.36)
    assert found["longest_run"]["glioma"] == 3
    assert (found["answer"], found["reason"]) == (INDETERMINATE, "weak_evidence")


def test_no_evidence_of_a_tumour_is_no_tumour() -> None:
    found = summarise(make_series(*[0.2] * 8))
    assert (found["answer"], found["reason"]) == ("notumor", None)
    without = [name for name in CLASSES if name != "notumor"]
    answer = summarise_series(make_series(*[0.2] * 8), without)
    assert (answer["answer"], answer["reason"]) == (INDETERMINATE, "weak_evidence")


def test_two_classes_with_evidence_are_indeterminate() -> None:
    slices = make_series(*[0.9] * 4, *[0] * 8)
    for row in slices[8:]:
        row |= {"prob_pituitary": 0.8, "prob_notumor": 0.2}
    found = summarise(slices)
    assert (found["answer"], found["reason"]) == (INDETERMINATE, "several_classes")
    assert found["longest_run"] == {"glioma": 4, "meningioma": 0, "notumor": 4, "pituitary": 4}


@pytest.mark.parametrize("count", [0, 1, 4])
def test_too_few_slices_are_indeterminate(count: int) -> None:
    found = summarise(make_series(*[0.9] * count))
    assert (found["answer"], found["reason"]) == (INDETERMINATE, "too_few_slices")
    assert found["num_used"] == count
    assert summarise(make_series(*[0.9] * 4), min_slices=4)["answer"] == "glioma"


def test_a_series_of_rejected_slices_is_indeterminate() -> None:
    slices = [reject_row(row, "little_tissue") for row in make_series(0, 0)]
    slices.append(reject_row(make_row(2), "unlike_training"))
    found = summarise(slices)
    assert (found["answer"], found["reason"]) == (INDETERMINATE, "too_few_slices")
    assert found["skipped"] == {"little_tissue": 2, "unlike_training": 1}
    assert (found["key_slices"], found["plane"], found["num_used"]) == ([], None, 0)
    assert found["evidence"] == dict.fromkeys(CLASSES, 0.0)


@pytest.mark.parametrize(
    "rule",
    [{"top_fraction": 0}, {"top_fraction": 1.1}, {"threshold": -1}, {"min_run": 0},
     {"min_slices": 0}],
)  # fmt: skip
def test_rules_out_of_range_are_refused(rule: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(rule))):
        SeriesRule(**rule)  # type: ignore[arg-type]


# ---- duplicates ----------------------------------------------------------------------------------


def test_the_same_object_counts_once() -> None:
    slices = make_series(*[0.9] * 4, *[0] * 4)
    copies = [row | {"scan_uri": f"/copies/{index}"} for index, row in enumerate(slices[:3])]
    found = summarise(slices + copies)
    assert (found["num_slices"], found["num_used"]) == (11, 8)
    assert found["skipped"] == {DUPLICATE: 3}
    assert "repeated_positions" not in found["flags"]


def test_frames_of_one_object_are_not_duplicates() -> None:
    slices = [
        row | {"sop_instance": "one", "frame": index, "scan_uri": f"/scan.dcm#frame={index}"}
        for index, row in enumerate(make_series(*[0.1] * 12))
    ]
    assert summarise(slices)["num_used"] == 12


def test_a_damaged_copy_does_not_replace_the_intact_one() -> None:
    slices = make_series(*[0.9] * 5)
    damaged = [reject_row(row, "truncated") | {"scan_uri": "/a"} for row in slices[:1]]
    found = summarise(slices + damaged)
    assert (found["num_used"], found["skipped"]) == (5, {DUPLICATE: 1})


def test_slices_without_an_identifier_all_count() -> None:
    """Without a key, duplicates cannot be recognised."""
    slices = [row | {"sop_instance": None} for row in make_series(*[0.1] * 6)]
    assert summarise(slices)["num_used"] == 6


# ---- order ---------------------------------------------------------------------------------------


def test_neighbours_are_found_by_position_and_not_by_name() -> None:
    strong = {1, 4, 7}
    slices = [
        make_row(index, 0.9 if index in strong else 0.0, position_mm=position)
        for index, position in enumerate([0, 30, 5, 10, 25, 40, 15, 20, 45])
    ]
    found = summarise(slices)  # at 20, 25 and 30 mm
    assert found["longest_run"]["glioma"] == 3
    assert found["answer"] == "glioma"
    apart = [row | {"position_mm": 5.0 * index} for index, row in enumerate(slices)]
    assert summarise(apart)["longest_run"]["glioma"] == 1


def test_volumes_of_one_position_count_once() -> None:
    """A diffusion series has six slices at each position; these are not a run of six."""
    slices = [
        make_row(6 * position + volume, 0.9 if position == 4 else 0.0, position_mm=5.0 * position)
        for position in range(8)
        for volume in range(6)
    ]
    found = summarise(slices)
    assert found["longest_run"]["glioma"] == 1
    assert (found["answer"], found["reason"]) == (INDETERMINATE, "weak_evidence")
    assert (found["num_used"], found["num_positions"]) == (48, 8)
    assert found["flags"] == ["repeated_positions"]
    assert len(found["key_slices"]) == 3


def test_slices_of_one_position_count_with_their_mean() -> None:
    slices = make_series(*[0.9] * 6)
    others = [make_row(10 + index, 0.3, position_mm=5.0 * index) for index in range(6)]
    assert summarise(slices + others)["evidence"]["glioma"] == pytest.approx(0.6)


def test_nine_slices_of_one_position_are_too_few() -> None:
    found = summarise([make_row(index, 0.9, position_mm=7.0) for index in range(9)])
    assert found["reason"] == "too_few_slices"


def test_without_positions_frames_are_in_order() -> None:
    slices = [
        make_row(0, 0.9 if index in (9, 10, 11) else 0.0, position_mm=None, orientation=None)
        | {"frame": index, "scan_uri": f"/scan.dcm#frame={index}"}
        for index in range(20)
    ]
    found = summarise(slices)
    assert found["answer"] == "glioma"
    assert found["flags"] == ["position_unknown"]


def test_a_slice_without_a_position_has_no_neighbours() -> None:
    slices = make_series(*[0] * 6, 0.9, 0.9)
    slices.append(make_row(8, 0.9, position_mm=None))
    found = summarise(slices)
    assert found["longest_run"]["glioma"] == 2
    assert found["flags"] == ["position_unknown"]


def test_a_gap_ends_a_run_and_is_flagged() -> None:
    slices = make_series(0, 0, 0, 0.9, 0.9, 0.9, 0.9, 0, 0, 0)
    whole = summarise(slices)
    assert (whole["longest_run"]["glioma"], whole["flags"]) == (4, [])
    found = summarise(slices[:5] + slices[6:])
    assert (found["longest_run"]["glioma"], found["flags"]) == (2, ["incomplete"])


def test_uneven_positions_are_not_a_gap() -> None:
    slices = make_series(*[0.9] * 7)
    for row in slices:
        row["position_mm"] += 0.3 * (-1) ** int(row["position_mm"])
    assert summarise(slices)["flags"] == []


# ---- directions ----------------------------------------------------------------------------------


def make_localizer(count: int) -> list[Row]:
    """Make slices of three alternating planes; no header says that they are a localizer."""
    planes = [("axial", AXIAL), ("coronal", CORONAL), ("sagittal", SAGITTAL)]
    return [
        make_row(index, 0.9, plane=planes[index % 3][0], orientation=planes[index % 3][1])
        for index in range(count)
    ]


@pytest.mark.parametrize("count", [3, 9, MAX_LOCALIZER_SLICES])
def test_a_few_slices_of_several_planes_are_a_localizer(count: int) -> None:
    """dcm2niix#894 and #731: such a series was stacked into one volume."""
    found = summarise(make_localizer(count))
    assert (found["answer"], found["reason"]) == (INDETERMINATE, "localizer")
    assert "mixed" in found["flags"]


def test_many_slices_of_several_planes_are_mixed() -> None:
    found = summarise(make_localizer(MAX_LOCALIZER_SLICES + 3))
    assert (found["answer"], found["flags"]) == ("glioma", ["mixed"])


def test_slices_of_two_planes_are_not_neighbours() -> None:
    """By position alone these would be one run of six."""
    slices = make_series(*[0] * 20, *[0.9] * 2, *[0] * 20)
    slices += [
        make_row(50 + index, 0.9, plane="coronal", orientation=CORONAL, position_mm=102.5 + index)
        for index in range(2)
    ]
    found = summarise(slices)
    assert found["longest_run"]["glioma"] == 2
    assert found["flags"] == ["mixed"]


def test_cosines_that_round_differently_are_the_same_direction() -> None:
    """A cosine of 0.0499 and one of 0.0501 round to different tenths."""
    slices = make_series(*[0.9] * 10)
    for index, row in enumerate(slices):
        tilt = 0.0499 + 0.0002 * (index % 2)
        row["orientation"] = (1.0, 0.0, tilt, 0.0, 1.0, 0.0)
    found = summarise(slices)
    assert (found["answer"], found["flags"]) == ("glioma", [])
    assert found["longest_run"]["glioma"] == 10


def test_slightly_tilted_slabs_are_mixed_and_not_a_localizer() -> None:
    slices = make_series(*[0.9] * 8)
    for row in slices[4:]:
        row["orientation"] = (1.0, 0.0, 0.0, 0.0, 0.966, 0.259)  # 15 degrees
    found = summarise(slices)
    assert (found["answer"], found["flags"]) == ("glioma", ["mixed"])
    assert found["longest_run"]["glioma"] == 4


# ---- key slices and flags ------------------------------------------------------------------------


def test_key_slices_are_the_strongest_that_are_not_neighbours() -> None:
    found = summarise(make_series(0, 0.7, 0.8, 0.9, 0.85, 0.6, 0.1, 0.5, 0))
    assert found["key_slices"] == ["/scans/003.dcm", "/scans/001.dcm", "/scans/005.dcm"]


def test_key_slices_without_a_tumour_class_are_of_the_strongest_tumour() -> None:
    slices = make_series(0.1, 0.2, 0, 0, 0, 0)
    slices[4] |= {"prob_pituitary": 0.4, "prob_notumor": 0.6}
    found = summarise(slices)
    assert found["answer"] == "notumor"
    assert found["key_slices"][0] != "/scans/004.dcm"
    slices[4] |= {"prob_pituitary": 0.9, "prob_notumor": 0.1}
    found = summarise(slices)
    assert found["reason"] == "weak_evidence"
    assert found["key_slices"][0] == "/scans/004.dcm"


def test_flags_of_used_slices_are_kept() -> None:
    slices = make_series(*[0.1] * 6)
    slices[1]["flags"] = ["contrast_t2"]
    slices[2]["flags"] = ["no_window", "contrast_t2"]
    slices.append(reject_row(make_row(6, flags=["lossy"]), "corrupt"))
    assert summarise(slices)["flags"] == ["contrast_t2", "no_window"]
