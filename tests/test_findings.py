"""Findings of an audit, on data sets with known answers."""

import numpy as np
import pytest
from numpy.typing import NDArray

from brainray.data import findings
from brainray.data.findings import Nearest, Pair


def ints(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def on_circle(*degrees: float) -> NDArray[np.float32]:
    turn = np.deg2rad(degrees)
    return np.stack([np.cos(turn), np.sin(turn)], 1).astype(np.float32)


def test_copies_are_numbered_in_order_of_appearance() -> None:
    numbers = findings.number_exact_duplicates(["z", "b", "a", "z", "c", "b", "z"])
    assert numbers.tolist() == [0, 1, -1, 0, -1, 1, 0]


def test_groups_are_counted_with_those_that_mix_labels() -> None:
    found = findings.describe_groups(ints(0, 0, 0, 1, 2, 2, -1, -1), ints(0, 0, 1, 2, 3, 3, 0, 1))
    assert found == {
        "num_groups": 3,
        "num_repeated": 2,
        "num_images_in_repeated": 5,
        "largest": 3,
        "num_mixed": 1,
        "num_images_in_mixed": 3,
    }


def test_no_groups_at_all() -> None:
    found = findings.describe_groups(ints(-1, -1), ints(0, 1))
    assert set(found.values()) == {0}


def test_sizes_of_groups_add_up() -> None:
    groups = np.repeat(np.arange(6), [1, 2, 3, 5, 6, 30])
    rows = {
        row["low"]: (row["high"], row["groups"], row["images"])
        for row in findings.count_sizes(groups)
    }
    assert rows == {
        1: (1, 1, 1), 2: (2, 1, 2), 3: (5, 2, 8), 6: (10, 1, 6), 11: (20, 0, 0), 21: (None, 1, 30),
    }  # fmt: skip


def test_a_conflict_is_the_most_similar_pair_that_disagrees() -> None:
    standardised = on_circle(0, 1, 9, 15, 90, 91)
    pairs = findings.find_conflicts(ints(0, 0, 0, 0, 1, 1), ints(0, 0, 1, 1, 2, 2), standardised)
    assert [(pair.left, pair.right) for pair in pairs] in ([(1, 2)], [(2, 1)])
    assert pairs[0].correlation == pytest.approx(np.cos(np.deg2rad(8)))


def test_images_of_no_group_do_not_conflict() -> None:
    assert findings.find_conflicts(ints(-1, -1), ints(0, 1), on_circle(0, 0)) == []


def build_split() -> tuple[NDArray[np.str_], NDArray[np.float32], NDArray[np.int64]]:
    """Return four training images, one for validation, three to test on, and their labels."""
    splits = np.array(["train"] * 4 + ["val"] + ["test"] * 3)
    return splits, on_circle(0, 30, 60, 90, 120, 0, 61, 121), ints(0, 1, 0, 1, 1, 0, 1, 1)


def test_test_images_are_held_against_train_and_val_and_val_against_train() -> None:
    splits, standardised, _ = build_split()
    found = findings.find_nearest_references(splits, standardised)
    assert found["test"].rows.tolist() == [5, 6, 7]
    assert found["test"].nearest.tolist() == [0, 2, 4]
    assert found["val"].nearest.tolist() == [3]
    assert findings.find_nearest_references(np.array([""] * 8), standardised) == {}


def test_a_leak_counts_exact_and_near_duplicates_and_groups() -> None:
    splits, standardised, labels = build_split()
    found = findings.find_nearest_references(splits, standardised)["test"]
    copies = ints(7, -1, -1, -1, -1, 7, 8, 8)  # 6 and 7 are copies of each other only
    groups = ints(0, 1, 2, 3, 4, 0, 2, 5)
    leak = findings.measure_leak(found, np.isin(splits, ("train", "val")), copies, groups, labels)
    assert (leak["num_exact_duplicate"], leak["num_near_duplicate"], leak["num_same_group"]) == (
        1,
        3,
        2,
    )
    assert leak["share_near_duplicate"] == 1.0
    assert leak["share_exact_duplicate"] == pytest.approx(1 / 3)
    assert leak["baseline_1nn"][0]["accuracy"] == pytest.approx(2 / 3)  # 6 resembles a 0


def test_a_copy_counts_as_a_near_duplicate_whatever_its_thumbnail_says() -> None:
    blank = Nearest(rows=ints(1), nearest=ints(0), correlation=np.zeros(1, np.float32))
    leak = findings.measure_leak(blank, np.array([True, False]), ints(0, 0), ints(0, 1), ints(0, 0))
    assert (leak["num_exact_duplicate"], leak["num_near_duplicate"]) == (1, 1)


def test_the_baseline_is_cut_by_correlation() -> None:
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


def test_a_step_without_images_has_no_accuracy() -> None:
    rows = findings.evaluate_baseline(ints(0, 1), ints(0, 1), np.ones(2, np.float32), np.arange(2))
    assert [row["accuracy"] for row in rows[2:]] == [None] * 4


def test_pairs_across_splits() -> None:
    splits, standardised, _ = build_split()
    found = findings.find_nearest_references(splits, standardised)["test"]
    copies = ints(7, -1, -1, -1, -1, 7, 8, 8)
    known = np.isin(splits, ("train", "val"))
    assert findings.list_crossing_exact_duplicates(copies, found, known, 9) == [
        Pair(left=5, right=0, correlation=1.0)
    ]
    near = findings.list_crossing_near_duplicates(copies, found, 9)
    assert sorted((pair.left, pair.right) for pair in near) == [(6, 2), (7, 4)]
    assert near == sorted(near, key=lambda pair: pair.correlation)


def test_galleries_are_thinned_evenly() -> None:
    copies = np.repeat(np.arange(20), 2)
    pairs = findings.list_exact_duplicates(copies, 4)
    assert [(pair.left, pair.right) for pair in pairs] == [(0, 1), (12, 13), (26, 27), (38, 39)]
    assert len(findings.list_exact_duplicates(copies, 50)) == 20
