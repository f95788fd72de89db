"""Statistics of a bulk run: they add up, in any order, to those of all rows at once."""

import json
import pickle
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brainray.inference import stats as stats_module
from brainray.inference.labels import Labels
from brainray.inference.schema import build_schema
from brainray.inference.stats import (
    MAX_TIMELINE,
    NUM_BINS,
    NUM_SCANS_SHOWN,
    STAGES,
    LabelledSample,
    Progress,
    RunStats,
    compute_statistics,
    find_bottleneck,
    hash_names,
)

CLASSES = ("glioma", "meningioma", "notumor")
LABELS = Labels(CLASSES)


def make_rows(count: int, seed: int) -> pa.Table:
    """Draw rows of the prediction table: some rejected, some abstained, many with equal values."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        folder = rng.choice([*CLASSES, "elsewhere"])
        row: dict[str, Any] = {"scan_uri": f"/in/{folder}/{number:05d}.jpg"}
        reason = rng.choice([None, None, None, "low_confidence", "corrupt", "unlike_training"])
        is_rejected = reason in ("corrupt", "unlike_training")
        if not is_rejected:
            probs = rng.choice([[0.75, 0.25, 0], [0.5, 0.25, 0.25], [0.0625, 0.125, 0.8125]])
            row |= {f"prob_{name}": probs[k] for k, name in enumerate(CLASSES)}
            row |= {"confidence": max(probs), "class_map": [float(number)] * 4}
            row["predicted_class"] = None if reason else CLASSES[int(np.argmax(probs))]
        row |= {"reason": reason, "series": rng.choice([None, "s1", "s2"])}
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=build_schema(CLASSES))


def describe(stats: RunStats) -> dict[str, Any]:
    """Return all fields of statistics in a form that can be compared."""
    labelled = stats.labelled
    return stats.to_json() | {
        "mistakes": stats.mistakes,
        "counts": stats.describe_counts(),
        "labelled": labelled
        and {
            "rows": sorted(
                zip(
                    labelled.hashes.tolist(),
                    labelled.y_true.tolist(),
                    map(tuple, labelled.y_prob.tolist()),
                    strict=True,
                )
            ),
            "total": labelled.total,
            "num_unlabelled": labelled.num_unlabelled,
        },
    }


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(0, 150),
    num_parts=st.integers(1, 8),
    labels=st.sampled_from([None, LABELS]),
)
def test_the_statistics_of_parts_add_up_in_any_order(
    seed: int, count: int, num_parts: int, labels: Labels | None
) -> None:
    rows = make_rows(count, seed)
    rng = np.random.default_rng(seed)
    part_of = rng.integers(0, num_parts, count)
    parts = [rows.filter(pa.array(part_of == part)) for part in range(num_parts)]
    expected = describe(compute_statistics(rows, CLASSES, labels))

    def add(order: Any) -> RunStats:  # noqa: ANN401
        joined = RunStats()
        for part in order:
            joined.add(compute_statistics(parts[part], CLASSES, labels))
        return joined

    assert describe(add(rng.permutation(num_parts))) == expected
    left, right = add(range(num_parts // 2)), add(range(num_parts // 2, num_parts))
    left.add(right)
    assert describe(left) == expected


def test_the_counts_are_those_of_the_rows() -> None:
    rows = make_rows(400, 1)
    found = compute_statistics(rows, CLASSES, LABELS)
    table = rows.to_pylist()
    with_probs = [row for row in table if row["confidence"] is not None]
    counts = found.describe_counts()
    assert counts["total"] == 400
    assert counts["by_status"] == {
        "classified": sum(row["reason"] is None for row in table),
        "abstained": sum(row["reason"] == "low_confidence" for row in table),
        "rejected": sum(row["reason"] in ("corrupt", "unlike_training") for row in table),
    }
    assert list(counts["by_reason"]) == ["corrupt", "low_confidence", "unlike_training"]
    assert sum(counts["by_class"].values()) == counts["by_status"]["classified"]
    assert found.histogram.sum() == len(with_probs)
    assert found.histogram[NUM_BINS // 2] == sum(row["confidence"] == 0.5 for row in with_probs)
    assert found.num_in_series == sum(row["series"] is not None for row in table) > 0
    least = sorted(with_probs, key=lambda row: (row["confidence"], row["scan_uri"]))
    assert [scan["scan_uri"] for scan in found.least_certain] == [
        row["scan_uri"] for row in least[:NUM_SCANS_SHOWN]
    ]
    assert found.least_certain[0]["class_map"] == least[0]["class_map"]
    assert found.labelled is not None
    folders = [row["scan_uri"].split("/")[2] for row in with_probs]
    assert (
        found.labelled.total
        == len(found.labelled.y_true)
        == len(folders) - folders.count("elsewhere")
    )
    assert found.labelled.num_unlabelled == folders.count("elsewhere")


def test_the_mistakes_are_the_most_confident_ones() -> None:
    rows = make_rows(400, 2)
    found = compute_statistics(rows, CLASSES, LABELS).mistakes
    wrong = []
    for row in rows.to_pylist():
        label = LABELS.find(row["scan_uri"])
        if row["confidence"] is not None and label is not None:
            probs = [row[f"prob_{name}"] for name in CLASSES]
            if CLASSES[int(np.argmax(probs))] != label:
                wrong.append((-row["confidence"], row["scan_uri"], label))
    assert len(wrong) > NUM_SCANS_SHOWN
    assert [(scan["scan_uri"], scan["true_class"]) for scan in found] == [
        (uri, label) for _, uri, label in sorted(wrong)[:NUM_SCANS_SHOWN]
    ]


def test_statistics_without_labels_round_trip_through_json() -> None:
    stats = compute_statistics(make_rows(100, 3), CLASSES)
    document = json.loads(json.dumps(stats.to_json(), allow_nan=False))
    again = RunStats.from_json(document)
    assert describe(again) == describe(stats)
    again.add(RunStats.from_json(document))
    assert again.num_rows == 200
    assert again.histogram.sum() == 2 * stats.histogram.sum()


def test_the_size_of_statistics_does_not_grow_with_the_scans() -> None:
    """The driver receives the statistics of each shard, and keeps their sum."""
    sizes = {
        count: len(pickle.dumps(compute_statistics(make_rows(count, 4), CLASSES)))
        for count in (100, 4000)
    }
    assert sizes[4000] < 1.1 * sizes[100]


# ---------------------------------------------------------------------------- labelled scans


@pytest.fixture
def max_labelled(monkeypatch: pytest.MonkeyPatch) -> int:
    """Lower the maximum of labelled scans, so that a sample is drawn."""
    monkeypatch.setattr(stats_module, "MAX_LABELLED", 50)
    return 50


def test_a_sample_of_labelled_scans_is_bounded_and_the_same_in_any_order(max_labelled: int) -> None:
    rows = make_rows(1000, 5)
    rng = np.random.default_rng(5)
    found = []
    for num_parts in (1, 7, 40):
        part_of = rng.integers(0, num_parts, rows.num_rows)
        joined = RunStats()
        for part in rng.permutation(num_parts):
            chosen = rows.filter(pa.array(part_of == part))
            joined.add(compute_statistics(chosen, CLASSES, LABELS))
        found.append(joined)
    for stats in found:
        assert stats.labelled is not None
        assert len(stats.labelled.y_true) == len(stats.labelled.y_prob) == max_labelled
        assert stats.labelled.total > 400
        assert describe(stats) == describe(found[0])


def test_every_labelled_scan_has_the_same_chance_to_be_in_the_sample(max_labelled: int) -> None:
    """Of ten classes with equally many scans, each has about a tenth of many samples."""
    counts = np.zeros(10)
    for draw in range(40):
        samples = [
            LabelledSample(
                hash_names([f"/{draw}/{label}/{number}.jpg" for number in range(50)]),
                np.full(50, label),
                np.zeros((50, 2), np.float32),
                50,
                0,
            )
            for label in range(10)
        ]
        joined = samples[0]
        for sample in samples[1:]:
            joined = joined.add(sample)
        assert (len(joined.y_true), joined.total) == (max_labelled, 500)
        counts += np.bincount(joined.y_true, minlength=10)
    # Binomial with n = 2,000 and p = 0.1: a standard deviation of 13.
    assert np.abs(counts - 200).max() < 60, counts


def test_a_name_has_the_same_hash_in_every_process() -> None:
    assert hash_names(["/in/a.jpg", "", "脳"]).tolist() == [
        4093652065579935700,
        1760245841805064774,
        12817497159903168094,
    ]
    assert hash_names([]).shape == (0,)


# -------------------------------------------------------------------------------- progress


def add_shards(progress: Progress, count: int) -> None:
    for _ in range(count):
        progress.add(RunStats(num_rows=2), 3, 1, dict.fromkeys(STAGES, 0.5), None)


@pytest.mark.parametrize("count", [1, 2, 400, 401, 402, 1000, 3001])
def test_a_timeline_is_bounded_and_keeps_its_first_and_last_point(count: int) -> None:
    progress = Progress()
    add_shards(progress, count)
    done = [point[1] for point in progress.timeline]
    assert len(done) <= MAX_TIMELINE
    assert len(done) > min(count, MAX_TIMELINE) // 2 - 1
    assert done[0] == 3
    assert done[-1] == progress.done == 3 * count
    assert done == sorted(done)


def test_speed_is_measured_from_the_first_shard_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate excludes the start, with its imports."""
    progress = Progress()
    clock = [100.0]
    monkeypatch.setattr(Progress, "elapsed_s", property(lambda _: clock[0]))
    assert progress.rate is None
    progress.add(RunStats(num_rows=10), 5, 0, {"predict": 90.0}, {"backend": "torch"})
    assert (progress.rate, progress.warm_s) == (None, 0.0)
    assert progress.compute_busy(dict.fromkeys(STAGES, 1)) == dict.fromkeys(STAGES, 0.0)
    clock[0] = 110.0
    add = {"predict": 9.0, "read": 2.0}
    progress.add(RunStats(num_rows=30), 25, 20, add, {"backend": "other"})
    assert progress.rate == pytest.approx(5.0)
    assert progress.left_s is None
    progress.total = 80
    assert progress.left_s == pytest.approx(50 * 10 / 25), "the remaining files, not slices"
    assert progress.runtime == {"backend": "torch"}
    busy = progress.compute_busy({"read": 2, "decode": 2, "predict": 1, "write": 2})
    assert busy == {"read": 0.1, "decode": 0.0, "predict": 0.9, "write": 0.0}


@pytest.mark.parametrize(
    ("busy", "words"),
    [
        ({"decode": 0.95, "predict": 0.3}, "decode-bound: add CPUs"),
        ({"decode": 0.2, "predict": 0.9}, "predict-bound"),
        ({"read": 0.85, "predict": 0.2}, "read-bound"),
        ({"predict": 0.2, "write": 0.9}, "write-bound"),
        ({"decode": 0.2, "predict": 0.4}, "nothing is saturated"),
    ],
)
def test_the_bottleneck_is_named(busy: dict[str, float], words: str) -> None:
    assert words in find_bottleneck(busy)
