"""Splits: no group is split, classes keep their shares, given splits are kept."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from brainray.data.splits import (
    MANIFEST_SCHEMA,
    assign_folds,
    assign_splits,
    describe_balance,
    hash_manifest,
    split_groups,
)
from brainray.errors import DataError

Labels = NDArray[np.int64]

# scikit-learn's warning about a rare class; assign_folds checks the result
pytestmark = pytest.mark.filterwarnings("ignore:The least populated class:UserWarning")


def draw(
    num_groups: int,
    seed: int = 0,
    largest: int = 4,
    shares: tuple[float, ...] = (0.4, 0.3, 0.2, 0.1),
) -> tuple[Labels, Labels]:
    """Draw groups of one class each, with 1 to ``largest`` images, in mixed order."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, largest + 1, num_groups)
    order = rng.permutation(sizes.sum())
    labels = np.repeat(rng.choice(len(shares), num_groups, p=shares), sizes)
    return labels[order].astype(np.int64), np.repeat(np.arange(num_groups), sizes)[order]


def splits_a_group(groups: Labels, *parts: NDArray[np.bool_]) -> bool:
    found = [set(groups[part]) for part in parts]
    return sum(map(len, found)) != len(set().union(*found))


def split_or_get_error(
    labels: Labels, groups: Labels, fraction: float, *, seed: int
) -> NDArray[np.bool_] | str:
    try:
        return split_groups(labels, groups, fraction, seed=seed)
    except DataError as error:
        return str(error)


# ------------------------------------------------------------------------------------ split_groups


@pytest.mark.parametrize(
    ("fraction", "expected"), [(0.5, 1 / 2), (0.2, 1 / 5), (0.15, 1 / 7), (0.1, 0.1)]
)
def test_a_split_has_its_size_and_class_shares_and_splits_no_group(
    fraction: float, expected: float
) -> None:
    labels, groups = draw(600)
    held_out = split_groups(labels, groups, fraction, seed=0)
    assert held_out.dtype == np.bool_
    assert held_out.mean() == pytest.approx(expected, rel=0.05)
    assert not splits_a_group(groups, held_out, ~held_out)
    whole = np.bincount(labels) / len(labels)
    part = np.bincount(labels[held_out]) / held_out.sum()
    assert np.abs(part - whole).max() < 0.02


def test_a_split_depends_on_the_seed() -> None:
    labels, groups = draw(200)
    first = split_groups(labels, groups, 0.2, seed=1)
    assert (split_groups(labels, groups, 0.2, seed=1) == first).all()
    assert (split_groups(labels, groups, 0.2, seed=2) != first).any()


@given(
    rows=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12)), min_size=2, max_size=60),
    fraction=st.floats(0.05, 0.5),
    seed=st.integers(0, 5),
)
def test_any_input_is_split_by_groups_or_refused_with_a_remedy(
    rows: list[tuple[int, int]], fraction: float, seed: int
) -> None:
    labels, groups = (np.array(part, np.int64) for part in zip(*rows, strict=True))
    held_out = split_or_get_error(labels, groups, fraction, seed=seed)
    if isinstance(held_out, str):
        assert "Add images" in held_out
        return
    assert not splits_a_group(groups, held_out, ~held_out)
    assert set(labels[held_out]) == set(labels[~held_out]) == set(labels)


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.15, 0.5])
@pytest.mark.parametrize("per_class", [2, 3, 5])
def test_tiny_but_even_classes_can_be_split(per_class: int, fraction: float) -> None:
    labels = np.repeat(np.arange(4), per_class)
    held_out = split_groups(labels, np.arange(len(labels)), fraction, seed=0)
    assert set(labels[held_out]) == set(labels[~held_out]) == {0, 1, 2, 3}
    assert held_out.sum() <= max(4, len(labels) // 2 + 2)


def test_one_group_of_a_class_is_refused() -> None:
    labels = np.array([0] * 6 + [1] * 6)
    groups = np.array([*range(6), *[9] * 6])
    with pytest.raises(DataError, match="Class number 1 has 1 group") as caught:
        split_groups(labels, groups, 0.2, seed=0)
    assert "at least 2 to hold out 20%" in str(caught.value)
    assert "Add images, or lower the group threshold." in str(caught.value)
    assert str(caught.value).endswith("may all name the same patient.")


def test_class_too_rare_for_the_fraction_is_refused() -> None:
    labels = np.array([0] * 98 + [1] * 2)
    results = [split_or_get_error(labels, np.arange(100), 0.1, seed=seed) for seed in range(8)]
    refusals = [result for result in results if isinstance(result, str)]
    assert refusals  # 2 of 10 folds hold the rare class
    for message in refusals:
        assert message.startswith("Too few groups of class number 1 to split off 10%.")
        assert message.endswith("use a larger fraction, or give val and test folders.")
    for held_out in results:
        assert isinstance(held_out, str) or set(labels[held_out]) == {0, 1}


# ----------------------------------------------------------------------------------- assign_splits


def assign(given_splits: list[str], labels: Labels, groups: Labels, **options: Any) -> NDArray[Any]:  # noqa: ANN401
    defaults = {"val_fraction": 0.2, "test_fraction": 0.2, "seed": 0}
    return assign_splits(given_splits, labels, groups, **(defaults | options))


def test_data_without_splits_gets_three_splits() -> None:
    labels, groups = draw(500)
    splits = assign([""] * len(labels), labels, groups)
    parts = {name: splits == name for name in ("train", "val", "test")}
    assert sum(parts.values()).tolist() == [1] * len(labels)
    assert not splits_a_group(groups, *parts.values())
    assert parts["test"].mean() == pytest.approx(0.2, abs=0.02)
    assert parts["val"].mean() == pytest.approx(0.8 * 0.2, abs=0.02)
    for part in parts.values():
        assert set(labels[part]) == {0, 1, 2, 3}


def test_no_test_set_when_its_fraction_is_zero() -> None:
    labels, groups = draw(200)
    splits = assign([""] * len(labels), labels, groups, test_fraction=0.0)
    assert set(splits) == {"train", "val"}


def test_a_given_test_set_is_kept_and_val_is_split_off_training() -> None:
    labels, groups = draw(400)
    is_test = groups % 5 == 0
    splits = assign(np.where(is_test, "test", "train").tolist(), labels, groups)
    assert ((splits == "test") == is_test).all()
    assert (splits == "val").sum() / (~is_test).sum() == pytest.approx(0.2, abs=0.03)
    assert not splits_a_group(groups, splits == "train", splits == "val")


def test_a_given_val_set_is_kept_and_no_split_is_added() -> None:
    labels, groups = draw(100)
    given_splits = [("train", "val", "test")[group % 3] for group in groups]
    assert assign(given_splits, labels, groups).tolist() == given_splits
    without_test = [("train", "val")[group % 2] for group in groups]
    assert assign(without_test, labels, groups).tolist() == without_test


def test_images_without_a_split_are_for_training_if_others_have_one() -> None:
    labels, groups = draw(300)
    given_splits = [("", "test", "train")[group % 3] for group in groups]
    splits = assign(given_splits, labels, groups)
    assert ((splits == "test") == (groups % 3 == 1)).all()
    assert set(splits[groups % 3 != 1]) == {"train", "val"}
    assert set(splits[groups % 3 == 0]) == {"train", "val"}


def test_splits_follow_the_seed() -> None:
    labels, groups = draw(200)
    no_splits = [""] * len(labels)
    first = assign(no_splits, labels, groups, seed=4)
    assert (assign(no_splits, labels, groups, seed=4) == first).all()
    assert (assign(no_splits, labels, groups, seed=5) != first).any()


def test_no_training_images_is_refused() -> None:
    labels, groups = draw(50)
    with pytest.raises(DataError, match=r"No training images\. Expected a train or Training"):
        assign(["test"] * len(labels), labels, groups)


# ----------------------------------------------------------------------------------- hash_manifest


def build_manifest() -> pa.Table:
    rows = [
        {
            "path": f"train/glioma/{i}.jpg",
            "content_sha256": f"{i:064x}",
            "label": "glioma",
            "group": i // 2,
            "split": "train",
            "reason": None,
            "nearest_correlation": 0.5,
            "nearest_label": "glioma",
            "thumbnail": b"\0" * 576,
        }
        for i in range(6)
    ]
    return pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA)


def change(table: pa.Table, name: str, value: object) -> pa.Table:
    values = table[name].to_pylist()
    values[2] = value
    index = table.schema.get_field_index(name)
    return table.set_column(
        index, table.schema.field(index), pa.array(values, table.schema[index].type)
    )


def test_the_hash_depends_on_the_rows_and_not_on_how_they_are_stored() -> None:
    manifest = build_manifest()
    digest = hash_manifest(manifest)
    assert len(digest) == 64
    assert hash_manifest(manifest.take(pa.array([5, 0, 3, 1, 4, 2]))) == digest
    assert hash_manifest(manifest.select(manifest.column_names[::-1])) == digest
    chunked = pa.concat_tables([manifest.slice(0, 1), manifest.slice(1)])
    assert hash_manifest(chunked) == digest
    assert hash_manifest(manifest.slice(0, 5)) != digest


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("path", "train/glioma/x.jpg"),
        ("content_sha256", "f" * 64),
        ("content_sha256", None),
        ("label", "notumor"),
        ("group", 9),
        ("split", "val"),
    ],
)
def test_the_hash_depends_on_every_column_that_affects_a_run(name: str, value: object) -> None:
    manifest = build_manifest()
    assert hash_manifest(change(manifest, name, value)) != hash_manifest(manifest)


# ------------------------------------------------------------------------------- folds and balance


@given(
    rows=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 15)), min_size=4, max_size=80),
    num_folds=st.integers(2, 5),
    seed=st.integers(0, 5),
)
def test_folds_split_no_group_or_are_refused_with_a_remedy(
    rows: list[tuple[int, int]], num_folds: int, seed: int
) -> None:
    labels, groups = (np.array(part, np.int64) for part in zip(*rows, strict=True))
    refusal = None
    try:
        folds = assign_folds(labels, groups, num_folds, seed=seed)
    except DataError as caught:
        refusal = caught
    if refusal is not None:
        assert "--folds" in str(refusal)
        return
    assert not splits_a_group(groups, *(folds == number for number in range(num_folds)))
    for number in range(num_folds):
        assert set(labels[folds == number]) == set(labels)


def test_folds_are_even_stratified_and_seeded() -> None:
    labels, groups = draw(500)
    folds = assign_folds(labels, groups, 5, seed=0)
    whole = np.bincount(labels) / len(labels)
    for number in range(5):
        part = np.bincount(labels[folds == number]) / (folds == number).sum()
        assert (folds == number).mean() == pytest.approx(0.2, rel=0.05)
        assert np.abs(part - whole).max() < 0.02
    assert (assign_folds(labels, groups, 5, seed=0) == folds).all()
    assert (assign_folds(labels, groups, 5, seed=1) != folds).any()


def test_imbalance_is_the_largest_difference_of_a_share() -> None:
    parts = np.array(["a"] * 4 + ["b"] * 6)
    labels = np.array([0, 0, 0, 1, 0, 1, 1, 1, 1, 1])
    rows = describe_balance(parts, ("b", "c", "a"), labels, 3)
    assert [row["part"] for row in rows] == ["b", "a"]
    assert rows[1] == {
        "part": "a",
        "n": 4,
        "share": 0.4,
        "per_class": [3, 1, 0],
        "imbalance": pytest.approx(0.75 - 0.4),
    }
