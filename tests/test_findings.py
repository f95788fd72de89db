"""Findings of an audit, on small data sets with known results."""

import numpy as np
import pytest
from numpy.typing import NDArray

from brainray.data import findings
from brainray.data.findings import Nearest, Pair


def ints(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def on_circle(*degrees: float) -> NDArray[np.float32]:
    radians = np.deg2rad(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], 1).astype(np.float32)


def test_exact_duplicates_are_numbered_in_order_of_appearance() -> None:
    numbers = findings.number_exact_duplicates(["z", "b", "a", "z", "c", "b", "z"])
    assert numbers.tolist() == [0, 1, -1, 0, -1, 1, 0]


def test_groups_and_those_with_mixed_labels_are_counted() -> None:
    found = findings.describe_groups(ints(0, 0, 0, 1, 2, 2, -1, -1), ints(0, 0, 1, 2, 3, 3, 0, 1))
    assert found == {
        "num_groups": 3,
        "num_repeated": 2,
        "num_images_in_repeated": 5,
        "largest": 3,
        "num_mixed": 1,
        "num_images_in_mixed": 3,
    }


def test_without_groups_all_counts_are_zero() -> None:
    found = findings.describe_groups(ints(-1, -1), ints(0, 1))
    assert set(found.values()) == {0}


def test_group_sizes_are_binned() -> None:
    groups = np.repeat(np.arange(6), [1, 2, 3, 5, 6, 30])
    rows = {
        row["low"]: (row["high"], row["groups"], row["images"])
        for row in findings.count_sizes(groups)
    }
    assert rows == {
        1: (1, 1, 1), 2: (2, 1, 2), 3: (5, 2, 8), 6: (10, 1, 6), 11: (20, 0, 0), 21: (None, 1, 30),
    }  # fmt: skip


def test_a_conflict_is_the_most_similar_pair_with_different_labels() -> None:
    standardised = on_circle(0, 1, 9, 15, 90, 91)
    pairs = findings.find_conflicts(ints(0, 0, 0, 0, 1, 1), ints(0, 0, 1, 1, 2, 2), standardised)
    assert [(pair.left, pair.right) for pair in pairs] in ([(1, 2)], [(2, 1)])
    assert pairs[0].correlation == pytest.approx(np.cos(np.deg2rad(8)))


def test_images_without_a_group_do_not_conflict() -> None:
    assert findings.find_conflicts(ints(-1, -1), ints(0, 1), on_circle(0, 0)) == []


def build_split() -> tuple[NDArray[np.str_], NDArray[np.float32], NDArray[np.int64]]:
    """Return four training images, one for validation, three to test on, and their labels."""
    splits = np.array(["train"] * 4 + ["val"] + ["test"] * 3)
    return splits, on_circle(0, 30, 60, 90, 120, 0, 61, 121), ints(0, 1, 0, 1, 1, 0, 1, 1)


def test_test_images_are_compared_with_train_and_val_and_val_with_train() -> None:
    splits, standardised, _ = build_split()
    found = findings.find_nearest_references(splits, standardised)
    assert found["test"].rows.tolist() == [5, 6, 7]
    assert found["test"].nearest.tolist() == [0, 2, 4]
    assert found["val"].nearest.tolist() == [3]
    assert findings.find_nearest_references(np.array([""] * 8), standardised) == {}


def test_a_leak_counts_exact_and_near_duplicates_and_groups() -> None:
    splits, standardised, labels = build_split()
    found = findings.find_nearest_references(splits, standardised)["test"]
    duplicates = ints(7, -1, -1, -1, -1, 7, 8, 8)  # 6 and 7 duplicate only each other
    groups = ints(0, 1, 2, 3, 4, 0, 2, 5)
    leak = findings.measure_leak(
        found, np.isin(splits, ("train", "val")), duplicates, groups, labels
    )
    assert (leak["num_exact_duplicate"], leak["num_near_duplicate"], leak["num_same_group"]) == (
        1,
        3,
        2,
    )
    assert leak["share_near_duplicate"] == 1.0
    assert leak["share_exact_duplicate"] == pytest.approx(1 / 3)
    # The image nearest to 6 is of class 0, so the prediction for 6 is wrong.
    assert leak["baseline_1nn"][0]["accuracy"] == pytest.approx(2 / 3)


def test_an_exact_duplicate_counts_as_a_near_duplicate_whatever_its_correlation() -> None:
    blank = Nearest(rows=ints(1), nearest=ints(0), correlation=np.zeros(1, np.float32))
    leak = findings.measure_leak(blank, np.array([True, False]), ints(0, 0), ints(0, 1), ints(0, 0))
    assert (leak["num_exact_duplicate"], leak["num_near_duplicate"]) == (1, 1)


def test_the_baseline_is_binned_by_correlation() -> None:
    correlation = np.array([0.999, 0.995, 0.99, 0.97, 0.95, 0.5], np.float32)
    rows = findings.evaluate_baseline(
        ints(0, 1, 0, 1, 0, 1), ints(0, 1, 0, 1, 1, 0), correlation, np.arange(6)
    )
    assert [(row["low"], row["high"], row["n"]) for row in rows] == [
        (None, None, 6),
        (0.995, None, 1 + 1),
        (0.98, 0.995, 1),
        (0.96, 0.98, 1),
        (0.9, 0.96, 1),
        (None, 0.9, 1),
    ]
    assert [row["accuracy"] for row in rows] == [pytest.approx(4 / 6), 1, 1, 1, 0, 0]


def test_a_bin_without_images_has_no_accuracy() -> None:
    rows = findings.evaluate_baseline(ints(0, 1), ints(0, 1), np.ones(2, np.float32), np.arange(2))
    assert [row["accuracy"] for row in rows[2:]] == [None] * 4


def test_pairs_across_splits_are_listed() -> None:
    splits, standardised, _ = build_split()
    found = findings.find_nearest_references(splits, standardised)["test"]
    duplicates = ints(7, -1, -1, -1, -1, 7, 8, 8)
    known = np.isin(splits, ("train", "val"))
    assert findings.list_crossing_exact_duplicates(duplicates, found, known, 9) == [
        Pair(left=5, right=0, correlation=1.0)
    ]
    near = findings.list_crossing_near_duplicates(duplicates, found, 9)
    assert sorted((pair.left, pair.right) for pair in near) == [(6, 2), (7, 4)]
    assert near == sorted(near, key=lambda pair: pair.correlation)


def test_long_galleries_are_subsampled_evenly() -> None:
    duplicates = np.repeat(np.arange(20), 2)
    pairs = findings.list_exact_duplicates(duplicates, 4)
    assert [(pair.left, pair.right) for pair in pairs] == [(0, 1), (12, 13), (26, 27), (38, 39)]
    assert len(findings.list_exact_duplicates(duplicates, 50)) == 20
