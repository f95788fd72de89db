"""GPUs: what a job requests from Ray and, if there is a GPU, every job on it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import ray.data
import torch
from ray.data import Dataset

from brainray.evaluation.evaluate import EvaluateJob, evaluate
from brainray.images.preprocess import Preprocessing
from brainray.images.slices import ReadOptions
from brainray.inference.bulk import classify
from brainray.inference.engine import EngineOptions, open_engine
from brainray.inference.options import ClassifyJob
from brainray.inference.predict import EnginePool, PredictStage
from brainray.inference.shards import WaveTask, build_stream
from brainray.inference.store import PredictionStore
from brainray.model.classifier import load_classifier, read_classifier_metadata
from brainray.phantoms import write_phantom_folder
from brainray.training.config import ScalingOptions, TrainConfig
from brainray.training.optim import Optimisation
from brainray.training.run import TrainJob
from brainray.training.train import train
from tests.fakes import prepare_fake_engine

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("gpus", [0.5, 0.0])
def test_only_the_predict_stage_of_a_bulk_job_requests_gpus(
    tiny_classifier: Path, monkeypatch: pytest.MonkeyPatch, gpus: float
) -> None:
    """The stream is built but not executed."""
    requested: dict[str, float | None] = {}
    map_batches = Dataset.map_batches

    def record(stream: Dataset, work: Any, **options: Any) -> Dataset:  # noqa: ANN401
        requested[work.__name__] = options.get("num_gpus") or None
        return map_batches(stream, work, **options)

    monkeypatch.setattr(Dataset, "map_batches", record)
    metadata = read_classifier_metadata(str(tiny_classifier))
    pool = EnginePool(options=EngineOptions(use_gpu=bool(gpus)), num_engines=1, cpus=0.5, gpus=gpus)
    stage = PredictStage.of(metadata, prepare_fake_engine(str(tiny_classifier), pool.options), pool)
    task = WaveTask(
        store=PredictionStore.of("nowhere", metadata),
        run="run",
        preprocessing=stage.preprocessing,
        reading=ReadOptions(),
        key=bytes(16),
        labels=ray.put(None),
    )
    build_stream(task, stage, 0, [0, 1], num_decoders=1)
    with_gpus = {name: number for name, number in requested.items() if number}
    assert len(requested) == 3
    assert with_gpus == ({"_PredictBatch": 0.5} if gpus else {})


@needs_gpu
@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_every_job_runs_on_a_gpu(tmp_path: Path) -> None:
    scans = tmp_path / "scans"
    write_phantom_folder(scans, num_train_per_class=180, num_test_per_class=16)
    job = TrainJob(
        data_uri=str(scans),
        output_uri=str(tmp_path / "run"),
        config=TrainConfig(
            weights="none",
            preprocessing=Preprocessing(size_px=64),
            num_epochs=2,
            batch_norm="sync",
            optimisation=Optimisation(ema_decay=0.9),
        ),
        scaling=ScalingOptions(use_gpu=True),
    )
    metrics = train(job)
    assert metrics["training"]["hardware"] == torch.cuda.get_device_name()
    classifier_uri = job.at("classifier")
    evaluated = evaluate(
        EvaluateJob(
            data_uri=str(scans),
            classifier_uri=classifier_uri,
            output_uri=str(tmp_path / "evaluation"),
            engine=EngineOptions(use_gpu=True),
        )
    )
    assert evaluated["test"]["accuracy"] == metrics["test"]["accuracy"]
    assert evaluated["runtime"]["backend"] == metrics["runtime"]["backend"] == "torch"
    classified = classify(
        ClassifyJob(
            scans_uri=(str(scans / "Testing"),),
            classifier_uri=classifier_uri,
            output_uri=str(tmp_path / "predictions"),
            engine=EngineOptions(use_gpu=True),
        )
    )
    assert classified["runtime"]["backend"] == "torch"
    assert classified["counts"]["total"] == 64


@needs_gpu
def test_predictions_on_gpu_and_cpu_agree(tiny_classifier: Path) -> None:
    classifier = load_classifier(str(tiny_classifier))
    images = np.random.default_rng(0).integers(0, 256, (9, 32, 32), dtype=np.uint8)
    found, expected = (
        open_engine(classifier, EngineOptions(backend="torch", precision="fp32", use_gpu=use_gpu))
        .predict(images)
        .probs
        for use_gpu in (True, False)
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
