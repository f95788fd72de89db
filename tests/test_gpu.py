"""What is different on a GPU: what Ray is asked for, and, where there is one, every job on it."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from ray.data import Dataset

from brainray.dataset.scan import ScanStore
from brainray.model.classifier import load_classifier
from brainray.model.runtime import RuntimeOptions, open_runtime
from brainray.pipelines.answers import Ledger
from brainray.pipelines.bulk import BulkPlan, open_bulk_stream
from brainray.pipelines.classify import ClassifyJob, classify
from brainray.pipelines.config import Placement, TrainConfig
from brainray.pipelines.evaluate import EvaluateJob, evaluate
from brainray.pipelines.judge import open_answers
from brainray.pipelines.load import LoadPlan
from brainray.pipelines.optimisation import Optimisation
from brainray.pipelines.run import TrainJob
from brainray.pipelines.train import train
from brainray.pixels.decode import DecodeLimits
from brainray.pixels.phantoms import write_phantom_folder
from brainray.pixels.preprocess import Preprocessing

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("use_gpu", [True, False])
def test_only_what_computes_is_given_gpus(
    tiny_classifier: Path, monkeypatch: pytest.MonkeyPatch, use_gpu: bool
) -> None:
    """The streams are built and not run: Ray Data judges its arguments at once."""
    asked: dict[str, float | None] = {}
    map_batches = Dataset.map_batches

    def record(stream: Dataset, work: Any, **options: Any) -> Dataset:  # noqa: ANN401
        asked[work.__name__] = options.get("num_gpus") or None
        return map_batches(stream, work, **options)

    monkeypatch.setattr(Dataset, "map_batches", record)
    plan = BulkPlan(
        load=LoadPlan(
            scans_uris=("nowhere",),
            output_uri="nowhere",
            preprocessing=Preprocessing(size_px=32),
            limits=DecodeLimits(),
        ),
        classifier_uri=str(tiny_classifier),
        runtime=RuntimeOptions(use_gpu=use_gpu),
        num_predictors=1,
        num_decoders=1,
        cpus_per_predictor=0.5,
        gpus_per_predictor=0.5 * use_gpu,
    )
    open_bulk_stream(plan, ray.put(Ledger.of([])))
    open_answers(
        np.arange(4),
        ScanStore(ray.put(pa.table({})), None),
        str(tiny_classifier),
        limits=DecodeLimits(),
        use_gpu=use_gpu,
        with_features=True,
    )
    assert len(asked) > 2
    given = {name: gpus for name, gpus in asked.items() if gpus}
    assert given == ({"_Predictor": 0.5, "_answer_batch": 1} if use_gpu else {})


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
            output_uri=str(tmp_path / "judged"),
            use_gpu=True,
        )
    )
    assert again["test"]["accuracy"] == metrics["test"]["accuracy"]
    answered = classify(
        ClassifyJob(
            scans_uri=(str(scans / "Testing"),),
            classifier_uri=classifier_uri,
            output_uri=str(tmp_path / "answers"),
            use_gpu=True,
        )
    )
    assert answered["runtime"]["backend"] == "torch"
    assert answered["counts"]["total"] == 64


@needs_gpu
def test_a_gpu_and_a_processor_answer_alike(tiny_classifier: Path) -> None:
    classifier = load_classifier(str(tiny_classifier))
    images = np.random.default_rng(0).integers(0, 256, (9, 32, 32), dtype=np.uint8)
    found, expected = (
        open_runtime(
            classifier, RuntimeOptions(backend="torch", precision="fp32", use_gpu=use_gpu)
        ).predict_probs(images)
        for use_gpu in (True, False)
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
