"""Fitting the series rule: the best threshold is found, and its score is out of fold."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from brainray import cli
from brainray.errors import ConfigError, DataError
from brainray.evaluation.series import CalibrateSeriesJob, calibrate_series
from brainray.inference.schema import build_schema
from brainray.inference.series import SeriesRule, summarise_series
from brainray.inference.store import PredictionStore

CLASSES = ("glioma", "notumor")
NUM_SLICES = 20
START = datetime(2026, 1, 1, tzinfo=UTC)
ENGINE = {"backend": "torch", "precision": "fp32", "description": "torch, fp32"}


def make_series(name: str, patient: str, probability: float, later_s: int = 0) -> list[dict]:
    """Make the rows of a series: eight neighbours have this glioma probability, others 0.02."""
    return [
        {
            "scan_uri": f"/scans/{name}-{number}.dcm",
            "status": "classified",
            "prob_glioma": value,
            "prob_notumor": 1 - value,
            "classifier_id": "aaa",
            "engine": "torch",
            "precision": "fp32",
            "classified_at": START + timedelta(seconds=later_s),
            "patient": patient,
            "study": f"study of {patient}",
            "series": name,
            "sop_instance": f"{name}-{number}",
            "frame": None,
            "flags": None,
            "plane": "axial",
            "position_mm": 5.0 * number,
            "orientation": [1.0, 0.0, 0.0, 0.0, 1.0, 0.0],
        }
        for number in range(NUM_SLICES)
        for value in [probability if 6 <= number < 14 else 0.02]
    ]


def write_output(output: Path, *series: list[dict]) -> Path:
    card = {
        "classifier_id": "aaa",
        "classes": list(CLASSES),
        "weights": {"sha256": "0" * 64},
        "preprocessing": {"size_px": 32},
    }
    store = PredictionStore.of(str(output), card)
    picture = {"scan_uri": "/scans/picture.png", "reason": None, "series": None}
    for shard, rows in enumerate(series):
        whole = [*rows, rows[0] | picture]
        table = pa.Table.from_pylist(whole, schema=build_schema(CLASSES))
        store.write_shard(store.name_file("run", 0, shard), table, ENGINE, {})
    return output


def write_labels(file: Path, rows: Sequence[tuple[str, str]], by: str = "series") -> Path:
    file.write_text("\n".join([f"{by},label", *(f"{name},{label}" for name, label in rows)]))
    return file


def make_data(
    gliomas: Sequence[float], others: Sequence[float]
) -> tuple[list[list[dict]], list[tuple[str, str]]]:
    """Make a series, of a different patient, and a label for each probability."""
    series, labels = [], []
    for label, probabilities in (("glioma", gliomas), ("notumor", others)):
        for number, probability in enumerate(probabilities):
            name = f"{label}-{number}"
            series.append(make_series(name, f"patient {name}", probability))
            labels.append((name, label))
    return series, labels


def fit(folder: Path, series: list[list[dict]], labels: Sequence[tuple[str, str]]) -> Any:  # noqa: ANN401
    job = CalibrateSeriesJob(
        predictions_uri=str(write_output(folder / "out", *series)),
        labels=str(write_labels(folder / "labels.csv", labels)),
        output_uri=str(folder / "rule.json"),
        num_resamples=200,
    )
    return calibrate_series(job)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Fit to gliomas with probabilities of 0.37, below the default threshold of 0.5."""
    folder = tmp_path_factory.mktemp("fitted")
    return folder, fit(folder, *make_data([0.37] * 12, [0.18] * 12))


def test_the_nearest_threshold_that_separates_the_classes_is_found(
    fitted: tuple[Path, dict[str, Any]],
) -> None:
    folder, document = fitted
    assert document["rule"] == {
        "top_fraction": 0.1,
        "threshold": 0.35,
        "min_run": 3,
        "min_slices": 5,
    }
    before, after = (document[name]["per_class"] for name in ("before", "after"))
    assert before["glioma"]["sensitivity"] == 0
    assert before["glioma"]["specificity"] == 1
    assert after["glioma"]["sensitivity"] == after["notumor"]["sensitivity"] == 1
    assert (document["before"]["score"], document["after"]["score"]) == (0, 1)
    assert (document["num_series"], document["num_patients"]) == (24, 24)
    assert json.loads((folder / "rule.json").read_text()) == document
    rule = SeriesRule(**document["rule"])
    assert summarise_series(make_series("x", "y", 0.37), CLASSES, rule)["answer"] == "glioma"


def test_scores_are_out_of_fold_by_patients(tmp_path: Path) -> None:
    series, labels = make_data([0.47] * 12, [0.1] * 12)
    for number in range(3):  # one patient with low probabilities: without it, 0.45 is found
        name = f"faint-{number}"
        series.append(make_series(name, "faint", 0.27))
        labels.append((name, "glioma"))
    document = fit(tmp_path, series, labels)
    assert document["rule"]["threshold"] == 0.25
    assert document["after"]["per_class"]["glioma"]["sensitivity"] == pytest.approx(12 / 15)
    thresholds = sorted(rule["threshold"] for rule in document["fold_rules"])
    assert thresholds == [0.25] * 4 + [0.45]
    low, high = document["after"]["per_class"]["glioma"]["sensitivity_ci95"]
    assert low < 12 / 15 < high <= 1


def test_no_answer_is_better_than_a_wrong_one(tmp_path: Path) -> None:
    """Both classes have runs of eight slices at 0.62: to answer glioma for all gains nothing."""
    document = fit(tmp_path, *make_data([0.62] * 12, [0.62] * 12))
    assert document["before"]["score"] == 0
    assert document["before"]["indeterminate"] == 0
    assert document["after"]["score"] == 0


def test_the_last_prediction_of_a_slice_is_used(tmp_path: Path) -> None:
    series, labels = make_data([0.37] * 12, [0.18] * 12)
    series.append(make_series("glioma-0", "patient glioma-0", 0.01, later_s=60))
    document = fit(tmp_path, series, labels)
    assert document["num_series"] == 24
    assert document["after"]["per_class"]["glioma"]["sensitivity"] == pytest.approx(11 / 12)


@pytest.mark.parametrize("by", ["study", "patient"])
def test_a_label_of_a_study_or_patient_applies_to_its_series(tmp_path: Path, by: str) -> None:
    series, labels = make_data([0.37] * 12, [0.18] * 12)
    series.append(make_series("second", "patient glioma-0", 0.37))
    prefix = "study of " if by == "study" else ""
    job = CalibrateSeriesJob(
        predictions_uri=str(write_output(tmp_path / "out", *series)),
        labels=str(
            write_labels(
                tmp_path / "labels.csv",
                [(f"{prefix}patient {name}", label) for name, label in labels],
                by,
            )
        ),
        output_uri=str(tmp_path / "rule.json"),
        num_resamples=10,
    )
    document = calibrate_series(job)
    assert (document["labelled_by"], document["num_series"]) == (by, 25)
    assert document["num_patients"] == 24


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("glioma-0", "glioma"), ("notumor-0", "notumor")], "10 patients of each, found patients"),
        ([(f"glioma-{n}", "glioma") for n in range(12)], "at least two classes"),
        ([("unknown", "glioma")], "None of the 1 labels"),
        ([("glioma-0", "cyst")], "Unknown class 'cyst' in line 2"),
        ([("glioma-0", "glioma"), ("glioma-0", "notumor")], "another label than a line before"),
    ],
)
def test_unusable_labels_are_an_error(
    tmp_path: Path, rows: list[tuple[str, str]], message: str
) -> None:
    series, _ = make_data([0.4] * 12, [0.1] * 12)
    with pytest.raises(DataError, match=message):
        fit(tmp_path, series, rows)
    assert not (tmp_path / "rule.json").exists()


def test_predictions_without_series_are_an_error(tmp_path: Path) -> None:
    rows = [row | {"series": None} for row in make_series("a", "b", 0.4)]
    with pytest.raises(DataError, match="pictures are of no series"):
        fit(tmp_path, [rows], [("a", "glioma")])


def test_a_folder_without_predictions_is_an_error(tmp_path: Path) -> None:
    job = CalibrateSeriesJob(predictions_uri=str(tmp_path), labels="x", output_uri="y")
    with pytest.raises(ConfigError, match="Expected predictions of one classifier"):
        calibrate_series(job)


def test_the_command_prints_a_table_and_the_options_of_the_rule(
    fitted: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder, _ = fitted
    words = {
        "--predictions-uri": folder / "out",
        "--labels": folder / "labels.csv",
        "--output-uri": tmp_path / "rule.json",
        "--num-resamples": 50,
    }
    cli.main(["calibrate-series", *(str(word) for pair in words.items() for word in pair)])
    printed = capsys.readouterr().out
    assert "--rule.top-fraction 0.1 --rule.threshold 0.35 --rule.min-run 3" in printed
    (line,) = (line for line in printed.splitlines() if line.startswith("glioma (12), sensitivity"))
    assert "0.0%" in line
    assert "100.0%" in line
    assert "indeterminate" in printed
