"""Run logs: the format of durations, records on disk, and the line of an epoch."""

from pathlib import Path

import pytest

from brainray import runlog
from brainray.errors import StorageError

EPOCH = {
    "epoch": 2,
    "num_epochs": 30,
    "size_px": 96,
    "train_loss": 0.51234,
    "train_accuracy": 0.8125,
    "val_loss": 0.42,
    "val_accuracy": 0.90625,
    "val_macro_f1": 0.9012,
    "val_macro_auroc": 0.98765,
    "images_per_s": 123.4,
    "time_left_s": 200.0,
    "is_best": True,
}


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-3, "0 s"),
        (0, "0 s"),
        (0.4, "0 s"),
        (12, "12 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (60, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 00 min"),
        (3600, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (90000, "25 h 00 min"),
    ],
)
def test_durations_are_formatted_at_the_limits_of_units(seconds: float, words: str) -> None:
    assert runlog.format_duration(seconds) == words


def test_records_round_trip_with_one_line_each(tmp_path: Path) -> None:
    uri = str(tmp_path / "metrics.jsonl")
    records: list[runlog.Record] = [EPOCH, {"note": "line\nbreak \u2028 größe", "none": None}]
    runlog.write_records(uri, records)
    assert runlog.read_records(uri) == records
    assert Path(uri).read_bytes().count(b"\n") == 2
    runlog.write_records(uri, records[:1])
    assert runlog.read_records(uri) == records[:1]


def test_a_missing_file_has_no_records_and_empty_lines_are_ignored(tmp_path: Path) -> None:
    assert runlog.read_records(str(tmp_path / "metrics.jsonl")) == []
    (tmp_path / "metrics.jsonl").write_text('\n{"epoch": 0}\n\n')
    assert runlog.read_records(str(tmp_path / "metrics.jsonl")) == [{"epoch": 0}]
    with pytest.raises(StorageError, match="Cannot read"):
        runlog.read_records(str(tmp_path))


def test_nan_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    uri = str(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="Out of range float"):
        runlog.write_records(uri, [EPOCH, {"val_loss": float("nan")}])
    assert not Path(uri).exists()


def test_an_epoch_is_formatted_as_one_line() -> None:
    assert runlog.format_epoch(EPOCH) == (
        "epoch   3/30   96 px  train loss 0.512 acc 81.2%  val loss 0.420 acc 90.6% "
        "F1 0.901 AUROC 0.9877  123 images/s  left 3 min 20 s *"
    )
    plain = runlog.format_epoch(EPOCH | {"is_best": False})
    assert plain.endswith("left 3 min 20 s")
