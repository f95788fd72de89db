"""Training end to end: the files that a run writes, and the errors of an invalid run."""

import base64
import dataclasses
import io
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from brainray import runlog
from brainray.data.labelled import find_samples
from brainray.data.near_duplicates import NEAR_DUPLICATE_CORRELATION
from brainray.data.splits import hash_manifest
from brainray.errors import ConfigError, TrainingError
from brainray.evaluation.evaluate import EvaluateJob, evaluate
from brainray.images.heatmap import GALLERY_OVERLAY_PX, render_overlay
from brainray.images.preprocess import Preprocessing
from brainray.images.slices import open_file, open_slice
from brainray.inference.engine import EngineOptions, open_engine
from brainray.inference.schema import build_schema
from brainray.io import storage
from brainray.io.provenance import describe_cpu
from brainray.model.classifier import load_classifier
from brainray.model.explain import STRIDE_PX
from brainray.model.fit_calibration import choose_max_distance, fit_logit_scaling
from brainray.model.network import normalise_images
from brainray.training import loop
from brainray.training import train as train_module
from brainray.training.augment import NO_AUGMENTATION
from brainray.training.checkpoint import load_network_weights
from brainray.training.config import ScalingOptions, TrainConfig
from brainray.training.optim import Optimisation
from brainray.training.run import TrainJob, group_training_data, split_training_data
from brainray.training.train import calibrate_classifier, train
from tests.open_scans import load_image
from tests.reference import compute_eager
from tests.test_report import Page
from tests.training import read_losses, read_records

pytestmark = pytest.mark.usefixtures("local_ray")

PREPROCESSING = Preprocessing(size_px=40)
TINY = TrainConfig(
    weights="none",
    preprocessing=PREPROCESSING,
    num_epochs=2,
    global_batch_size=16,
    precision="fp32",
    optimisation=Optimisation(learning_rate=3e-4, ema_decay=0.5),
)


BF16_HOLDERS: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (0, 1))
"""Ranks of two workers that have bf16 instructions."""


def build_job(
    data: Path,
    output: Path,
    config: TrainConfig = TINY,
    **scaling: Any,  # noqa: ANN401 - any field of it
) -> TrainJob:
    return TrainJob(
        data_uri=str(data),
        output_uri=str(output),
        config=config,
        scaling=ScalingOptions(**scaling),
        recipe="tiny",
    )


@pytest.fixture(scope="module")
def finished(
    phantom_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainJob, dict[str, Any], list[str]]:
    """Train once with two workers, for the tests that check the output."""
    lines: list[str] = []
    job = build_job(phantom_folder, tmp_path_factory.mktemp("run") / "out", num_workers=2)
    return job, train(job, log=lines.append), lines


def test_a_run_writes_all_its_output_files(
    finished: tuple[TrainJob, dict[str, Any], list[str]],
) -> None:
    job, metrics, lines = finished
    output = Path(job.output_uri)
    for name in (
        "classifier/model.safetensors",
        "classifier/classifier.json",
        "metrics.json",
        "metrics.jsonl",
        "manifest.parquet",
        "predictions/val.parquet",
        "predictions/test.parquet",
        "report.html",
        "tensorboard/events.out.tfevents.0.brainray",
    ):
        assert (output / name).stat().st_size > 0, name
    assert json.loads((output / "metrics.json").read_text()) == metrics
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [record["size_px"] for record in records] == [40, 40]
    assert [record["world_size"] for record in records] == [2, 2]
    assert sum(line.startswith("epoch ") for line in lines) == 2
    assert "32 test images" in lines[0]


def test_an_interrupted_run_resumes_from_its_checkpoint_with_the_same_losses(
    phantom_folder: Path,
    tmp_path: Path,
    finished: tuple[TrainJob, dict[str, Any], list[str]],
) -> None:
    """tests/test_faults.py also kills the driver and a worker."""
    job = build_job(phantom_folder, tmp_path, num_workers=2)
    known = tmp_path / "checkpoints" / "checkpoint_manager_snapshot.json"  # Ray Train's list
    is_interrupted = threading.Event()

    def interrupt(line: str) -> None:
        """Press Ctrl-C after the first epoch, as soon as Ray Train knows its checkpoint."""
        if line.startswith("epoch ") and not is_interrupted.is_set():
            is_interrupted.set()
            deadline = time.monotonic() + 60
            while not known.exists():
                assert time.monotonic() < deadline
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(job, log=interrupt)
    assert not (tmp_path / "metrics.json").exists()
    lines: list[str] = []
    train(job, log=lines.append)
    assert any(line.startswith("Resuming the run") for line in lines)
    assert sum(line.startswith("epoch ") for line in lines) < TINY.num_epochs
    assert read_losses(tmp_path) == read_losses(Path(finished[0].output_uri))


def test_metrics_have_all_names_and_match_the_manifest(
    finished: tuple[TrainJob, dict[str, Any], list[str]],
) -> None:
    job, metrics, _ = finished
    manifest = storage.read_table(job.at("manifest.parquet")).to_pylist()
    for split in ("test", "val"):
        scores, rows = metrics[split], [row for row in manifest if row["split"] == split]
        assert scores["n"] == len(rows)
        low, high = scores["accuracy_ci95"]
        assert low <= scores["accuracy"] <= high
        assert {"macro_f1", "macro_auroc", "mcc", "log_loss", "ece"} <= scores.keys()
        for name in TINY.classes:
            expected = {"sensitivity", "specificity", "precision", "f1", "auroc"}
            assert expected <= scores["per_class"][name].keys()
        correlations = [row["nearest_correlation"] for row in rows]
        assert scores["without_near_duplicates"]["n"] == sum(
            c < NEAR_DUPLICATE_CORRELATION for c in correlations
        )
        right = sum(row["label"] == row["nearest_label"] for row in rows)
        assert scores["baseline_1nn"]["accuracy"] == pytest.approx(right / len(rows))
    assert metrics["test"]["n"] == 32


def test_the_classifier_has_a_model_card(
    finished: tuple[TrainJob, dict[str, Any], list[str]],
) -> None:
    job, metrics, _ = finished
    text = Path(job.at("classifier", "MODEL_CARD.md")).read_text()
    found = load_classifier(job.at("classifier")).metadata["model_card"]
    for split in ("test", "val"):
        accuracy = metrics[split]["accuracy"]
        assert found["results"][split]["accuracy"] == accuracy
        assert f"| Accuracy | {accuracy:.3f} (" in text
    assert found["data"]["splits"]["test"]["per_class"] == [8, 8, 8, 8]
    assert [found["data"]["splits"][split]["given"] for split in ("test", "val")] == [True, False]
    assert found["data"]["name"] == Path(job.data_uri).name
    assert found["training"]["num_workers"] == 2
    assert found["training"]["hardware"] == describe_cpu()
    assert str(Path(job.data_uri).parent) not in text


def test_the_manifest_splits_no_group_and_keeps_the_given_test_set(
    finished: tuple[TrainJob, dict[str, Any], list[str]],
) -> None:
    job, _, _ = finished
    manifest = storage.read_table(job.at("manifest.parquet")).to_pylist()
    splits: dict[int, set[str]] = {}
    for row in manifest:
        assert (row["split"] == "test") == row["path"].startswith("Testing/")
        if row["split"] != "test":
            splits.setdefault(row["group"], set()).add(row["split"])
    assert all(len(found) == 1 for found in splits.values())
    assert {name for found in splits.values() for name in found} == {"train", "val"}
    card = json.loads(Path(job.at("classifier", "classifier.json")).read_text())
    table = storage.read_table(job.at("manifest.parquet"))
    assert card["data_manifest_sha256"] == hash_manifest(table)
    assert card["metrics"]["test"]["n"] == 32
    assert card["training"]["config"]["seed"] == TINY.seed


def load_training_images(job: TrainJob) -> NDArray[np.uint8]:
    return np.stack(
        [
            load_image((Path(job.data_uri) / row["path"]).read_bytes(), PREPROCESSING)
            for row in storage.read_table(job.at("manifest.parquet")).to_pylist()
            if row["split"] == "train"
        ]
    )


def test_checkpoints_have_batch_norm_statistics_of_unaugmented_training_images(
    finished: tuple[TrainJob, dict[str, Any], list[str]],
) -> None:
    job, _, _ = finished
    images = load_training_images(job)
    folders = sorted(Path(job.at("checkpoints")).glob("checkpoint_*/"))
    state = load_network_weights(folders[-1])  # the second epoch's: at the full size
    pixels = normalise_images(torch.from_numpy(images), PREPROCESSING)
    seen = F.conv2d(pixels, state["conv1.weight"], stride=2, padding=3)
    # All training images except those of the last, incomplete batch.
    scale = seen.std((0, 2, 3))
    difference = (state["bn1.running_mean"] - seen.mean((0, 2, 3))).abs() / scale
    assert difference.max() < 0.02
    ratio = state["bn1.running_var"].sqrt() / scale
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=0.03)


def test_the_bundle_has_batch_norm_statistics_of_unaugmented_training_images(
    finished: tuple[TrainJob, dict[str, Any], list[str]],
) -> None:
    job, _, lines = finished
    classifier = load_classifier(job.at("classifier"))
    images = load_training_images(job)
    with torch.no_grad():
        stem = classifier.build_network().get_submodule("conv1")
        seen = stem(normalise_images(torch.from_numpy(images), PREPROCESSING))
    norm = classifier.build_network().get_submodule("bn1")
    assert isinstance(norm, torch.nn.BatchNorm2d)
    torch.testing.assert_close(norm.running_mean, seen.mean((0, 2, 3)), atol=1e-4, rtol=1e-3)
    assert any(f"statistics on {len(images)} unaugmented images" in line for line in lines)


def test_the_predictions_are_those_of_the_exported_classifier(
    finished: tuple[TrainJob, dict[str, Any], list[str]],
) -> None:
    job, metrics, _ = finished
    classifier = load_classifier(job.at("classifier"))
    rows = storage.read_table(job.at("predictions", "test.parquet")).to_pylist()
    images = [
        load_image((Path(job.data_uri) / row["path"]).read_bytes(), classifier.preprocessing)
        for row in rows
    ]
    engine = open_engine(classifier, EngineOptions())
    expected = engine.predict(np.stack(images)).probs
    found = np.array([[row[f"prob_{name}"] for name in classifier.classes] for row in rows])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_array_equal([row["probs"] for row in rows], found)
    assert {(row["engine"], row["precision"]) for row in rows} == {
        (engine.backend, engine.precision)
    }
    assert metrics["runtime"]["precision"] == engine.precision
    assert metrics["runtime"]["description"] in Path(job.at("report.html")).read_text()
    right = sum(row["true_class"] == row["predicted_class"] for row in rows)
    assert metrics["test"]["accuracy"] == pytest.approx(right / len(rows))


def test_an_evaluation_table_is_the_prediction_table_with_labels(
    finished: tuple[TrainJob, dict[str, Any], list[str]],
) -> None:
    job, _, _ = finished
    table = storage.read_table(job.at("predictions", "test.parquet"))
    assert table.column_names == [
        *build_schema(TINY.classes).names,
        *("path", "true_class", "split", "group", "nearest_correlation", "probs"),
    ]
    for row in table.to_pylist():
        file = Path(job.data_uri) / row["path"]
        assert row["scan_uri"] == str(file)
        assert row["content_sha256"] == sha256(file.read_bytes()).hexdigest()
        assert (row["width_px"], row["height_px"]) == Image.open(file).size
        assert row["size_bytes"] == file.stat().st_size
        assert (row["split"], row["true_class"]) == ("test", file.parent.name)


def test_the_bundle_records_the_precision_of_training(
    finished: tuple[TrainJob, dict[str, Any], list[str]],
) -> None:
    job, metrics, _ = finished
    card = load_classifier(job.at("classifier")).metadata
    assert card["training"]["precision"] == "fp32" == metrics["training"]["precision"]
    assert card["model_card"]["training"]["precision"] == "fp32"


def test_calibration_is_fitted_to_predictions_of_the_default_engine(
    finished: tuple[TrainJob, dict[str, Any], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    job, _, _ = finished
    monkeypatch.setattr(train_module, "MIN_IMAGES", 10)
    data = split_training_data(
        group_training_data(find_samples(job.data_uri, TINY.classes), TINY), TINY
    )
    calibration = calibrate_classifier(job, data, log=lambda _: None)
    assert calibration is not None
    classifier = load_classifier(job.at("classifier"))
    engine = open_engine(classifier, EngineOptions())
    fitted_with = {"engine": engine.backend, "precision": engine.precision}
    assert calibration.facts.items() >= fitted_with.items()
    val = data.select("val")
    images = data.store.load_images(val.tolist(), PREPROCESSING)
    outputs = engine.predict(images, ["logits", "features"])
    assert outputs.logits is not None
    assert outputs.features is not None
    scale, shift = fit_logit_scaling(outputs.logits, data.labels[val], calibration.facts["method"])
    np.testing.assert_allclose(calibration.scale, scale, rtol=1e-4)
    np.testing.assert_allclose(calibration.shift, shift, atol=1e-4)
    limit = choose_max_distance(
        calibration.compute_distances(outputs.features), TINY.calibration.pass_rate
    )
    assert calibration.max_distance == pytest.approx(limit, rel=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_exported_statistics_are_computed_in_the_precision_of_the_workers(
    precision: Any,  # noqa: ANN401 - one of a literal's values
    finished: tuple[TrainJob, dict[str, Any], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job, _, _ = finished
    data = split_training_data(
        group_training_data(find_samples(job.data_uri, TINY.classes), TINY), TINY
    )
    seen: list[torch.dtype] = []

    def measure(batches: Iterable[torch.Tensor], network: torch.nn.Module) -> None:
        seen.append(network(next(iter(batches))).dtype)

    monkeypatch.setattr(train_module, "update_bn", measure)
    state = load_classifier(job.at("classifier")).build_network().state_dict()
    indices = data.select("train")[:4]
    train_module._measure_statistics(state, indices, data.store, TINY, precision, use_gpu=False)
    assert seen == [{"fp32": torch.float32, "bf16": torch.bfloat16}[precision]]


def test_the_report_shows_the_class_map_of_a_wrongly_predicted_class(
    finished: tuple[TrainJob, dict[str, Any], list[str]],
) -> None:
    job, _, _ = finished
    images = Page(Path(job.at("report.html")).read_text()).find("img")
    rows = storage.read_table(job.at("predictions", "test.parquet")).to_pylist()
    wrong = [row for row in rows if row["true_class"] != row["predicted_class"]]
    assert len(images) == 2 * min(len(wrong), 24) > 0
    worst = max(wrong, key=lambda row: row["confidence"])
    classifier = load_classifier(job.at("classifier"))
    file = open_file((Path(job.data_uri) / worst["path"]).read_bytes())
    scan = open_slice(file, 0, classifier.preprocessing).scan
    maps = open_engine(classifier, EngineOptions()).predict(scan.image[None], ["class_maps"])
    assert maps.class_maps is not None
    class_map = maps.class_maps[0, classifier.classes.index(worst["predicted_class"])]
    expected = render_overlay(
        class_map, scan.samples, scan.frame, STRIDE_PX, shown_px=GALLERY_OVERLAY_PX
    )
    assert images[1]["alt"] == f"Class activation map of {worst['predicted_class']}"
    shown = base64.b64decode((images[1]["src"] or "").partition(",")[2])
    pictures = [np.asarray(Image.open(io.BytesIO(png)), int) for png in (shown, expected)]
    np.testing.assert_allclose(*pictures, atol=2)


def test_a_finished_run_is_not_trained_again(
    finished: tuple[TrainJob, dict[str, Any], list[str]],
) -> None:
    job, metrics, _ = finished
    before = Path(job.at("metrics.jsonl")).stat().st_mtime_ns
    lines: list[str] = []
    assert train(job, log=lines.append) == metrics
    assert len(lines) == 1
    assert "Already finished" in lines[0]
    assert Path(job.at("metrics.jsonl")).stat().st_mtime_ns == before


def test_another_configuration_in_the_same_folder_is_refused(
    finished: tuple[TrainJob, dict[str, Any], list[str]],
) -> None:
    job, _, _ = finished
    other = dataclasses.replace(
        job,
        config=dataclasses.replace(
            TINY, num_epochs=3, optimisation=Optimisation(learning_rate=1.0, ema_decay=0.5)
        ),
    )
    with pytest.raises(ConfigError) as refusal:
        train(other)
    assert "num_epochs: 2 -> 3" in str(refusal.value)
    assert "optimisation.learning_rate: 0.0003 -> 1.0" in str(refusal.value)


def test_changed_data_is_refused(
    finished: tuple[TrainJob, dict[str, Any], list[str]], tmp_path: Path
) -> None:
    job, _, _ = finished
    copy = tmp_path / "copy"
    for file in Path(job.data_uri).rglob("*.*"):
        target = copy / file.relative_to(job.data_uri)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    output = tmp_path / "out"
    output.mkdir()
    for name in ("manifest.parquet",):
        (output / name).write_bytes(Path(job.at(name)).read_bytes())
    run = json.loads(Path(job.at("run.json")).read_text()) | {"data_uri": str(copy)}
    (output / "run.json").write_text(json.dumps(run))
    next((copy / "Training" / "glioma").iterdir()).unlink()
    with pytest.raises(ConfigError, match="have changed since the run"):
        train(build_job(copy, output))


def test_a_separate_evaluation_gives_the_same_scores(
    finished: tuple[TrainJob, dict[str, Any], list[str]], tmp_path: Path
) -> None:
    job, metrics, _ = finished
    found = evaluate(
        EvaluateJob(
            data_uri=job.data_uri,
            classifier_uri=job.at("classifier"),
            output_uri=str(tmp_path / "evaluated"),
        )
    )
    for name in ("accuracy", "macro_auroc", "log_loss"):
        assert found["test"][name] == pytest.approx(metrics["test"][name], abs=1e-6)
    for part in (found["test"], found["test"]["without_near_duplicates"]):
        assert part["accuracy_ci95"] is not None
    assert found["test"]["accuracy_ci95"] == metrics["test"]["accuracy_ci95"]
    assert (
        found["test"]["without_near_duplicates"]["accuracy_ci95"]
        == metrics["test"]["without_near_duplicates"]["accuracy_ci95"]
    )
    assert (
        found["test"]["without_near_duplicates"]["n"]
        == metrics["test"]["without_near_duplicates"]["n"]
    )
    assert found["test"]["baseline_1nn"]["accuracy"] == pytest.approx(
        metrics["test"]["baseline_1nn"]["accuracy"]
    )
    assert (tmp_path / "evaluated" / "report.html").exists()


def test_evaluation_without_the_manifest_omits_the_baseline_and_logs_this(
    finished: tuple[TrainJob, dict[str, Any], list[str]], tmp_path: Path
) -> None:
    job, _, _ = finished
    moved = tmp_path / "elsewhere" / "classifier"
    moved.mkdir(parents=True)
    for name in ("model.safetensors", "classifier.json"):
        (moved / name).write_bytes(Path(job.at("classifier", name)).read_bytes())
    lines: list[str] = []
    found = evaluate(
        EvaluateJob(
            data_uri=job.data_uri, classifier_uri=str(moved), output_uri=str(tmp_path / "evaluated")
        ),
        log=lines.append,
    )
    assert "baseline_1nn" not in found["test"]
    assert any("baseline" in line for line in lines)


@pytest.mark.slow
def test_two_workers_train_as_one_does(trained: Path, trained_by_two: Path) -> None:
    """In single precision rounding grows with each step; tests/test_step.py compares in double."""
    one, two = (read_records(output)[0] for output in (trained, trained_by_two))
    assert (one["world_size"], two["world_size"]) == (1, 2)
    assert one["num_train_images"] == two["num_train_images"]
    assert two["train_loss"] == pytest.approx(one["train_loss"], abs=3e-4)


def agree_in_worker(rank: int, folder: str) -> None:
    """Run one of two gloo workers; ``BF16_HOLDERS`` says which of them have bf16 instructions."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    agreed = []
    for holders in BF16_HOLDERS:
        loop.has_native_bf16 = lambda *, use_gpu, holds=rank in holders: holds and not use_gpu
        precision = loop.agree_precision("auto", torch.device("cpu"), lambda _: None)
        agreed.append(precision == "bf16")
    (Path(folder) / f"{rank}.json").write_text(json.dumps(agreed))
    dist.destroy_process_group()


def test_the_workers_use_bf16_only_if_all_have_it(tmp_path: Path) -> None:
    mp.spawn(agree_in_worker, (str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call]
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [False, False, False, True]


@pytest.mark.parametrize(
    ("requested", "has_bf16", "expected", "message"),
    [
        ("auto", True, "bf16", None),
        ("auto", False, "fp32", "Training in fp32"),
        ("bf16", True, "bf16", None),
        ("bf16", False, "bf16", "Training in bf16, which this machine emulates"),
        ("fp32", False, "fp32", None),
        ("fp32", True, "fp32", None),
    ],
)
def test_bf16_is_used_if_all_have_it_or_if_it_is_requested(
    requested: Any,  # noqa: ANN401 - one of a literal's values
    has_bf16: bool,
    expected: str,
    message: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loop, "has_native_bf16", lambda *, use_gpu: has_bf16 and not use_gpu)
    sent: list[dict[str, Any]] = []
    assert loop.agree_precision(requested, torch.device("cpu"), sent.append) == expected
    assert [one["line"].startswith(message or "") for one in sent] == [True] * bool(message)


@pytest.fixture(scope="module")
def fine_tuned(
    finished: tuple[TrainJob, dict[str, Any], list[str]],
    phantom_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[TrainJob, dict[str, Any], list[str]]:
    """Fine-tune the exported weights: fit the head, then train with almost no learning rate.

    The data are one folder without splits, with a hidden folder and a file that is not an image.
    """
    data = tmp_path_factory.mktemp("fine-tuned") / "data"
    shutil.copytree(phantom_folder / "Training", data)
    (data / "glioma" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not really")
    (data / ".ipynb_checkpoints").mkdir()
    (data / ".ipynb_checkpoints" / "x.jpg").write_bytes(b"")
    config = dataclasses.replace(
        TINY,
        weights_uri=finished[0].at("classifier", "model.safetensors"),
        head_epochs=200,
        augmentation=NO_AUGMENTATION,
        batch_norm="frozen",
        num_epochs=5,
        patience_epochs=1,
        optimisation=Optimisation(learning_rate=1e-12),
    )
    job = build_job(data, data.parent / "out", config)
    lines: list[str] = []
    return job, train(job, log=lines.append), lines


def test_training_continues_without_rejected_scans(
    fine_tuned: tuple[TrainJob, dict[str, Any], list[str]],
) -> None:
    job, metrics, lines = fine_tuned
    manifest = storage.read_table(job.at("manifest.parquet")).to_pylist()
    rejected = [row for row in manifest if row["split"] == "rejected"]
    assert [row["path"] for row in rejected] == ["glioma/broken.jpg"]
    assert rejected[0]["reason"] in ("truncated", "corrupt", "not_an_image")
    assert "1 hidden" in lines[0]
    assert metrics["test"]["n"] > 0  # no splits are given, so a test set was split off by groups
    by_group: dict[int, set[str]] = {}
    for row in manifest:
        by_group.setdefault(row["group"], set()).add(row["split"])
    assert all(len(splits) == 1 for splits in by_group.values())


def test_training_stops_early_when_validation_does_not_improve(
    fine_tuned: tuple[TrainJob, dict[str, Any], list[str]],
) -> None:
    """With this learning rate the second epoch is not better than the first, so it is the last."""
    _, metrics, _ = fine_tuned
    assert metrics["training"]["num_epochs"] == 2
    assert metrics["training"]["best_epoch"] == 0


def test_training_from_exported_weights_fits_the_head_first(
    finished: tuple[TrainJob, dict[str, Any], list[str]],
    fine_tuned: tuple[TrainJob, dict[str, Any], list[str]],
) -> None:
    """The backbone is unchanged, and only the head is fitted."""
    before = load_classifier(finished[0].at("classifier"))
    job, _, _ = fine_tuned
    manifest = storage.read_table(job.at("manifest.parquet")).to_pylist()
    labels = [TINY.classes.index(row["label"]) for row in manifest if row["split"] == "train"]
    outputs = compute_eager(before, load_training_images(job))
    loss = F.cross_entropy(torch.from_numpy(outputs.logits), torch.tensor(labels)).item()
    assert runlog.read_records(job.at("metrics.jsonl"))[0]["train_loss"] < loss - 0.1
    after = load_classifier(job.at("classifier")).build_network().state_dict()
    for name, tensor in before.build_network().state_dict().items():
        is_unchanged = torch.allclose(tensor, after[name], atol=1e-6)
        assert is_unchanged != name.startswith("fc."), name


def test_a_diverging_run_is_an_error_that_names_the_remedy(
    phantom_folder: Path, tmp_path: Path
) -> None:
    config = dataclasses.replace(
        TINY, optimisation=Optimisation(learning_rate=1e30, clip_norm=0.0, warmup_epochs=0.0)
    )
    job = build_job(phantom_folder, tmp_path, config, max_failures=0)
    with pytest.raises(TrainingError, match="learning-rate"):
        train(job)
