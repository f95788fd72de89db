"""What is different on a GPU: what Ray is asked for, and, where there is one, every job on it."""

from pathlib import Path

import numpy as np
import pytest
import ray.data
import torch
from ray.data import Dataset

from brainray.inference.bulk import ClassifyJob, classify
from brainray.inference.engine import EngineOptions, open_engine
from brainray.inference.predict import EnginePool, PredictStage, pack_images
from brainray.inference.schema import SCAN_SCHEMA
from brainray.model.classifier import load_classifier
from brainray.pipelines.config import Placement, TrainConfig
from brainray.pipelines.evaluate import EvaluateJob, evaluate
from brainray.pipelines.optimisation import Optimisation
from brainray.pipelines.run import TrainJob
from brainray.pipelines.train import train
from brainray.pixels.phantoms import write_phantom_folder
from brainray.pixels.preprocess import Preprocessing

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@pytest.mark.usefixtures("local_ray")
def test_ray_takes_the_stage_that_predicts_on_gpus(tiny_classifier: Path) -> None:
    """It is built and not run: Ray Data checks its arguments at once."""
    pool = EnginePool(options=EngineOptions(use_gpu=True), num_engines=1, cpus=0.5, gpus=0.5)
    stage = PredictStage.open(str(tiny_classifier), pool, ["logits", "features"])
    scans = SCAN_SCHEMA.empty_table().append_column("image", pack_images([], 32))
    assert isinstance(stage.apply(ray.data.from_arrow(scans)), Dataset)


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
            train_sizes_px=(32, 64),
            num_epochs=2,
            batch_norm="sync",
            optimisation=Optimisation(ema_decay=0.9),
        ),
        placement=Placement(use_gpu=True),
    )
    metrics = train(job)
    assert metrics["training"]["hardware"] == torch.cuda.get_device_name()
    classifier_uri = job.at("classifier")
    again = evaluate(
        EvaluateJob(
            data_uri=str(scans),
            classifier_uri=classifier_uri,
            output_uri=str(tmp_path / "evaluation"),
            engine=EngineOptions(use_gpu=True),
        )
    )
    assert again["test"]["accuracy"] == metrics["test"]["accuracy"]
    assert again["runtime"]["backend"] == metrics["runtime"]["backend"] == "torch"
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
def test_a_gpu_and_a_processor_answer_alike(tiny_classifier: Path) -> None:
    classifier = load_classifier(str(tiny_classifier))
    images = np.random.default_rng(0).integers(0, 256, (9, 32, 32), dtype=np.uint8)
    found, expected = (
        open_engine(classifier, EngineOptions(backend="torch", precision="fp32", use_gpu=use_gpu))
        .predict(images)
        .probs
        for use_gpu in (True, False)
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
