"""Demonstration without any data: draw phantoms, train on them and evaluate."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from brainray.io import storage
from brainray.phantoms import write_phantom_folder
from brainray.runlog import Log
from brainray.training.config import ScalingOptions, TrainConfig
from brainray.training.run import OnStep, TrainJob
from brainray.training.train import train


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoJob:
    """Draw phantoms, train a classifier on them with two workers, and evaluate it."""

    output_path: str = "runs/demo"
    """Local folder for the phantoms and the run."""
    num_train_per_class: int = 150
    """Phantoms of each class for training and validation."""
    num_test_per_class: int = 40
    """Phantoms of each class for testing."""
    num_workers: int = 2
    """Training workers."""
    seed: int = 0
    """Seeds the phantoms."""


def run_demo(
    job: DemoJob, config: TrainConfig, log: Log, on_step: OnStep
) -> tuple[dict[str, Any], str]:
    """Run the demonstration; return the content of metrics.json, and the run's output."""
    root = Path(storage.make_absolute(job.output_path))
    scans = root / f"phantoms-{job.num_train_per_class}-{job.num_test_per_class}-{job.seed}"
    if not scans.exists():
        log(f"Drawing {4 * (job.num_train_per_class + job.num_test_per_class)} phantoms.")
        partial = root / ".phantoms.partial"
        write_phantom_folder(
            partial,
            num_train_per_class=job.num_train_per_class,
            num_test_per_class=job.num_test_per_class,
            seed=job.seed,
        )
        partial.replace(scans)
    training = TrainJob(
        data_uri=str(scans),
        output_uri=str(root / "run"),
        config=config,
        scaling=ScalingOptions(num_workers=job.num_workers),
        recipe="smoke",
    )
    return train(training, log=log, on_step=on_step), training.output_uri
