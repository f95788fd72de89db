"""Cross-validation: no image is evaluated by a run that saw its group; finished folds are kept."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brainray import cli, console
from brainray.data.labelled import find_samples
from brainray.data.splits import assign_folds
from brainray.errors import ConfigError, DataError
from brainray.evaluation.audit import AuditJob, audit
from brainray.evaluation.compare import CompareJob, compare
from brainray.images.preprocess import Preprocessing
from brainray.io import storage
from brainray.metrics import compute_evaluation
from brainray.recipes import smoke
from brainray.training.config import ScalingOptions, TrainConfig
from brainray.training.crossval import (
    cross_validate,
    find_training_samples,
    split_fold,
    summarise_folds,
)
from brainray.training.run import TrainJob, group_training_data
from brainray.training.train import train
from tests.test_report import Page

TINY = dataclasses.replace(
    smoke(),
    preprocessing=Preprocessing(size_px=32),
    num_epochs=1,
    global_batch_size=16,
    val_fraction=0.25,
)

Outcome = tuple[TrainJob, dict[str, Any], list[str]]


def build_job(data: Path, output: Path, folds: int, config: TrainConfig = TINY) -> TrainJob:
    return TrainJob(
        data_uri=str(data),
        output_uri=str(output),
        config=config,
        scaling=ScalingOptions(),
        recipe="smoke",
        folds=folds,
    )


def read_rows(job: TrainJob, *parts: str) -> list[dict[str, Any]]:
    return list(storage.read_table(job.at(*parts)).to_pylist())


# ---------------------------------------------------------------------------------------- folds


@given(num_folds=st.integers(2, 6), seed=st.integers(0, 20))
def test_each_image_is_held_out_once_by_a_run_that_sees_none_of_its_group(
    num_folds: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 5, 120)
    order = rng.permutation(sizes.sum())
    groups = np.repeat(np.arange(120), sizes)[order]
    labels = np.repeat(np.arange(120) % 4, sizes)[order]
    folds = assign_folds(labels, groups, num_folds, seed=seed)
    config = dataclasses.replace(TINY, seed=seed)
    held_out = np.zeros(len(labels), np.int64)
    for number in range(num_folds):
        splits = split_fold(folds, number, labels, groups, config)
        parts = {name: set(groups[splits == name]) for name in ("train", "val", "test")}
        assert not parts["test"] & (parts["train"] | parts["val"])
        assert not parts["train"] & parts["val"]
        for name in parts:
            assert set(labels[splits == name]) == {0, 1, 2, 3}
        assert ((splits == "test") == (folds == number)).all()
        held_out += splits == "test"
    assert (held_out == 1).all()


def test_a_test_split_is_left_out_and_a_val_split_is_training_data(
    phantom_folder: Path, tmp_path: Path
) -> None:
    for name, split in (("Training", "train"), ("Training", "val"), ("Testing", "test")):
        for file in (phantom_folder / name).rglob("*.*"):
            target = tmp_path / split / file.relative_to(phantom_folder / name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(file)
    samples = find_training_samples(build_job(tmp_path, tmp_path / "out", 2)).samples
    assert set(samples["split"].to_pylist()) == {""}
    tops = [path.split("/")[0] for path in samples["path"].to_pylist()]
    assert {top: tops.count(top) for top in tops} == {"train": 4 * 24, "val": 4 * 24}


def test_all_data_without_splits_are_cross_validated(phantom_folder: Path, tmp_path: Path) -> None:
    job = build_job(phantom_folder / "Training", tmp_path, 2)
    assert find_training_samples(job).samples.num_rows == 4 * 24


def test_data_with_only_a_test_split_are_an_error(phantom_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "test").symlink_to(phantom_folder / "Testing")
    with pytest.raises(DataError, match=r"Expected train or val scans in .*, found only test"):
        find_training_samples(build_job(tmp_path, tmp_path / "out", 2))


@pytest.mark.usefixtures("local_ray")
def test_the_folds_equal_those_of_a_split_of_the_audit(
    phantom_folder: Path, tmp_path: Path
) -> None:
    audit(
        AuditJob(
            data_uri=str(phantom_folder),
            output_uri=str(tmp_path),
            make_split="grouped",
            folds=3,
            seed=5,
        )
    )
    config = dataclasses.replace(TINY, seed=5)
    job = build_job(tmp_path / "split.parquet", tmp_path / "out", 3, config)
    data = group_training_data(find_training_samples(job), config, "auto")
    paths = data.found.samples["path"].to_pylist()
    assigned = dict(
        zip(paths, assign_folds(data.labels, data.groups, 3, seed=5).tolist(), strict=True)
    )
    rows = storage.read_table(str(tmp_path / "split.parquet")).to_pylist()
    assert assigned == {row["path"]: row["fold"] for row in rows if row["split"] != "test"}


# --------------------------------------------------------------------------------------- errors


def test_one_fold_is_a_one_line_error(
    capsys: pytest.CaptureFixture[str], phantom_folder: Path, tmp_path: Path
) -> None:
    words = ["train", "--data-uri", str(phantom_folder), "--output-uri", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        cli.main([*words, "--folds", "1"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: folds must be at least 2, got 1.\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("local_ray")
def test_more_folds_than_groups_of_a_class_are_an_error_before_anything_is_written(
    phantom_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"97 folds need at least as many.*lower --folds"):
        cross_validate(build_job(phantom_folder, tmp_path / "out", 97))
    assert not list(tmp_path.glob("out/*"))


# ------------------------------------------------------------------------------------ the spread


def test_the_summary_has_the_sample_standard_deviation_over_folds() -> None:
    scores = [0.5, 0.75, 0.7]
    folds = [{"accuracy": s, "macro_f1": s / 2, "macro_auroc": 1.0} for s in scores]
    spread = summarise_folds(folds)
    assert spread["accuracy"] == pytest.approx(
        {"mean": 0.65, "sd": np.sqrt((0.15**2 + 0.1**2 + 0.05**2) / 2), "min": 0.5, "max": 0.75}
    )
    assert spread["macro_f1"]["mean"] == pytest.approx(0.325)
    assert spread["macro_auroc"] == {"mean": 1.0, "sd": 0.0, "min": 1.0, "max": 1.0}


def test_the_variation_is_not_printed_as_an_interval() -> None:
    row = {"mean": 0.65, "sd": 0.132, "min": 0.5, "max": 0.75}
    line = console.describe_variation({"accuracy": row, "macro_f1": row, "macro_auroc": row}, 3)
    assert line.startswith("spread over the 3 folds, no interval: accuracy 0.500 to 0.750 (mean")
    assert "SD 0.132" in line


# -------------------------------------------------------------------------------- two real folds


@pytest.fixture(scope="module")
def two_folds(
    local_ray: None,  # noqa: ARG001 - the folds run on it
    phantom_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Outcome:
    """Cross-validate with two folds; interrupt the first call when the second fold begins."""
    job = build_job(phantom_folder, tmp_path_factory.mktemp("folds") / "out", 2)

    def stop(line: str) -> None:
        if line.startswith("Fold 2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cross_validate(job, log=stop)
    assert not Path(job.at("metrics.json")).exists()
    before = Path(job.at("fold-0", "classifier", "model.safetensors")).stat()
    lines: list[str] = []
    metrics = cross_validate(job, log=lines.append)
    after = Path(job.at("fold-0", "classifier", "model.safetensors")).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    return job, metrics, lines


def test_a_finished_fold_is_not_trained_again(two_folds: Outcome) -> None:
    _, _, lines = two_folds
    assert lines[0].startswith("Resuming the run in ")
    assert "Fold 1 of 2 is finished." in lines
    (second,) = [line for line in lines if line.startswith("Fold 2 of 2: ")]
    assert "for validation" in second
    assert sum(line.startswith("epoch ") for line in lines) == TINY.num_epochs


def test_each_fold_is_an_ordinary_run(two_folds: Outcome) -> None:
    job, _, _ = two_folds
    for name in ("fold-0", "fold-1"):
        for file in (
            "classifier/model.safetensors",
            "metrics.json",
            "metrics.jsonl",
            "manifest.parquet",
            "predictions/val.parquet",
            "predictions/test.parquet",
            "report.html",
        ):
            assert Path(job.at(name, file)).stat().st_size > 0, (name, file)


def test_every_training_image_is_evaluated_once_by_a_run_that_never_saw_its_group(
    two_folds: Outcome,
) -> None:
    job, _, _ = two_folds
    pooled = read_rows(job, "predictions", "cv.parquet")
    expected = find_samples(job.data_uri, TINY.classes, splits=("train",)).samples
    assert sorted(row["path"] for row in pooled) == sorted(expected["path"].to_pylist())
    for number, name in enumerate(("fold-0", "fold-1")):
        manifest = read_rows(job, name, "manifest.parquet")
        held_out = {row["path"] for row in manifest if row["split"] == "test"}
        assert held_out == {row["path"] for row in pooled if row["fold"] == number}
        seen = {row["group"] for row in manifest if row["split"] in ("train", "val")}
        assert not seen & {row["group"] for row in manifest if row["split"] == "test"}
        assert {row["split"] for row in manifest} == {"train", "val", "test"}
        card = json.loads(Path(job.at(name, "classifier", "classifier.json")).read_text())
        evaluated_by = {row["classifier_id"] for row in pooled if row["fold"] == number}
        assert evaluated_by == {card["classifier_id"]}


def test_the_pooled_scores_are_those_of_the_pooled_predictions(two_folds: Outcome) -> None:
    job, metrics, _ = two_folds
    pooled = read_rows(job, "predictions", "cv.parquet")
    expected = compute_evaluation(
        [TINY.classes.index(row["true_class"]) for row in pooled],
        [[row[f"prob_{name}"] for name in TINY.classes] for row in pooled],
        TINY.classes,
        groups=[row["group"] for row in pooled],
    )
    scores = metrics["cv"]
    for name in ("n", "num_groups", "accuracy", "accuracy_ci95", "macro_auroc", "log_loss"):
        assert scores[name] == pytest.approx(expected[name]), name
    assert scores["confusion"] == expected["confusion"]
    assert scores["baseline_1nn"]["n"] == scores["n"] == 4 * 24
    assert scores["without_near_duplicates"]["n"] <= scores["n"]
    assert [fold["fold"] for fold in metrics["folds"]] == [0, 1]
    assert sum(fold["n"] for fold in metrics["folds"]) == scores["n"]
    right = sum(fold["n"] * fold["accuracy"] for fold in metrics["folds"])
    assert scores["accuracy"] == pytest.approx(right / scores["n"])
    assert all(fold["best_epoch"] == 0 for fold in metrics["folds"])
    spread = metrics["spread"]["accuracy"]
    assert spread["min"] <= scores["accuracy"] <= spread["max"]
    assert json.loads(Path(job.at("metrics.json")).read_text()) == metrics
    report = Path(job.at("report.html")).read_text()
    assert "Accuracy on the pooled folds" in report
    assert "fold-1" in report
    assert metrics["runtime"]["description"] in report
    wrong = sum(row["true_class"] != row["predicted_class"] for row in pooled)
    # The folds' tables hold the class maps of the mistakes that can be among the worst of all.
    assert len(Page(report).find("img")) == 2 * min(wrong, 24) > 0


def test_the_nearest_image_is_looked_up_outside_the_fold(two_folds: Outcome) -> None:
    job, _, _ = two_folds
    whole = {row["path"]: row for row in read_rows(job, "manifest.parquet")}
    for row in read_rows(job, "predictions", "cv.parquet"):
        assert whole[row["path"]]["split"] == f"fold-{row['fold']}"
        assert whole[row["path"]]["nearest_correlation"] == row["nearest_correlation"]


def test_a_finished_cross_validation_returns_at_once(two_folds: Outcome) -> None:
    job, metrics, _ = two_folds
    lines: list[str] = []
    assert cross_validate(job, log=lines.append) == metrics
    assert [line.partition(":")[0] for line in lines] == ["Already finished"]


def test_another_number_of_folds_or_configuration_is_an_error(two_folds: Outcome) -> None:
    job, _, _ = two_folds
    with pytest.raises(ConfigError, match="folds: 2 -> 3"):
        cross_validate(dataclasses.replace(job, folds=3))
    config = dataclasses.replace(TINY, num_epochs=9)
    with pytest.raises(ConfigError, match="num_epochs: 1 -> 9"):
        cross_validate(dataclasses.replace(job, config=config))
    with pytest.raises(ConfigError, match="folds: 2 -> None"):
        train(dataclasses.replace(job, folds=None))
    with pytest.raises(ConfigError, match="fold: 1 -> None; folds: 2 -> None"):
        train(dataclasses.replace(job, folds=None, output_uri=job.at("fold-1")))


def test_two_cross_validations_can_be_compared(two_folds: Outcome) -> None:
    job, metrics, _ = two_folds
    found = compare(CompareJob(a_uri=job.output_uri, b_uri=job.output_uri, split="cv"))
    assert (found["n"], found["num_groups"]) == (96, metrics["cv"]["num_groups"])
    assert found["scores"]["accuracy"]["a"] == pytest.approx(metrics["cv"]["accuracy"])


def test_the_command_prints_scores_variation_and_report(
    two_folds: Outcome, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job, metrics, _ = two_folds
    monkeypatch.setattr("brainray.training.crossval.cross_validate", lambda *_, **__: metrics)
    cli.main(
        [
            *("train", "--data-uri", job.data_uri, "--output-uri", job.output_uri),
            *("--recipe", "smoke", "--folds", "2"),
        ]
    )
    scores, spread, report, notice = capsys.readouterr().out.strip().splitlines()
    assert scores.split()[:3] == ["cv", "96", "images"]
    low, high = metrics["cv"]["accuracy_ci95"]
    assert f"[{low:.1%}, {high:.1%}]" in scores
    assert "macro F1" in scores
    assert "AUROC" in scores
    assert spread.startswith("spread over the 2 folds")
    assert report.split() == ["report", job.at("report.html")]
    assert "Research use only" in notice
