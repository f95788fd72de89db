"""Named training configurations, each with its time and its measured score.

Any field can be overridden on the command line; ``brainray train --help`` lists them.
"""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from brainray.errors import ConfigError
from brainray.images.preprocess import Preprocessing
from brainray.model.calibration import CalibrationOptions
from brainray.training.augment import Augmentation
from brainray.training.config import ScalingOptions, TrainConfig, TuneOptions
from brainray.training.optim import Optimisation


def preprocess(size_px: int) -> Preprocessing:
    """Return the preprocessing of every recipe: crop to the head, stretch its grey range, pad.

    A border around the head, or another grey scale of the export, then changes the input little;
    docs/results.md has the accuracy under 17 such shifts.
    """
    return Preprocessing(size_px=size_px, crop="head", intensity="percentile", fit="pad")


def smoke() -> TrainConfig:
    """Check that everything works: 64 px, 14 epochs, random weights, 2 to 3 minutes."""
    return TrainConfig(
        weights="none",
        preprocessing=preprocess(64),
        num_epochs=14,
        global_batch_size=32,
        optimisation=Optimisation(learning_rate=1e-3, ema_decay=0.95),
    )


def cpu() -> TrainConfig:
    """Train on a few CPU cores: 64 px, 24 epochs, about 20 minutes on two Zen 4 cores.

    Random weights on the Kaggle set have a validation accuracy by groups of 0.967, 0.967 and 0.971
    with three seeds (docs/results.md). In a search at 48 px and 12 epochs, weaker geometric
    augmentation with a higher learning rate was three points better, but not at this length: 0.963
    with seed 0. Batch size was not searched.
    """
    return TrainConfig(
        preprocessing=preprocess(64),
        num_epochs=24,
        head_epochs=5,
        global_batch_size=64,
        optimisation=Optimisation(
            learning_rate=1e-3, label_smoothing=0.1, ema_decay=0.995, warmup_epochs=2.0
        ),
        calibration=CalibrationOptions(max_risk=0.05),
    )


def cpu_long() -> TrainConfig:
    """Train on a few CPU cores for hours: 96 px, 56 epochs, stronger grey augmentation.

    It took 103 minutes on two Zen 4 cores beside other work. From random weights on the Kaggle
    set, one seed has 0.973 on validation by groups and 0.982 on Testing (docs/results.md).
    """
    short = cpu()
    return dataclasses.replace(
        short,
        preprocessing=preprocess(96),
        num_epochs=56,
        augmentation=Augmentation(
            stretch=0.25,
            grey_probability=0.7,
            clahe=0.5,
            gamma=0.6,
            bias_field=0.25,
            gain=0.2,
            blur_probability=0.25,
            noise=0.05,
            noise_probability=0.4,
        ),
        optimisation=dataclasses.replace(short.optimisation, ema_decay=0.998),
    )


def gpu() -> TrainConfig:
    """Train on GPUs: 224 px, bf16, compiled, batches of 512. Not measured."""
    return TrainConfig(
        preprocessing=preprocess(224),
        num_epochs=100,
        head_epochs=10,
        global_batch_size=512,
        batch_norm="sync",
        compile=True,
        optimisation=Optimisation(
            learning_rate=2e-3,
            stage_decay=0.7,
            label_smoothing=0.1,
            ema_decay=0.99,
            warmup_epochs=5.0,
        ),
        calibration=CalibrationOptions(max_risk=0.05),
    )


RECIPES = {"smoke": smoke, "cpu": cpu, "cpu-long": cpu_long, "gpu": gpu}


def build_recipe(name: str) -> TrainConfig:
    """Build a recipe by its name.

    Raises
    ------
    ConfigError
        The name is unknown.
    """
    if name not in RECIPES:
        raise ConfigError(f"Unknown recipe '{name}'. Expected one of {', '.join(RECIPES)}.")
    return RECIPES[name]()


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Train a classifier on labelled scans."""

    data_uri: str
    """Class folders of pictures, DICOM or NIfTI files, alone or below Training/ and Testing/ (or
    train/, val/, test/), or Parquet tables. Local, s3:// or gs://."""
    output_uri: str
    """Output folder. Running the same command again resumes an interrupted run."""
    recipe: Literal["smoke", "cpu", "cpu-long", "gpu"] = "cpu"
    """Named configuration; the other options override it."""
    folds: int | None = None
    """Cross-validate with this many folds of the training images; groups stay whole."""
    scaling: Annotated[ScalingOptions, tyro.conf.arg(name="")] = ScalingOptions()
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = TrainConfig()
    mlflow_uri: str | None = None
    """Log the run to this MLflow tracking server too (needs `pip install brainray[mlflow]`)."""


@dataclass(frozen=True, kw_only=True)
class TuneCommand:
    """Search a recipe's learning rate, weight decay, augmentation and epochs on folds."""

    data_uri: str
    """Labelled scans, as for `brainray train`; test images are not used."""
    output_uri: str
    """Output folder. Running the same command again resumes an interrupted search."""
    recipe: Literal["smoke", "cpu", "cpu-long", "gpu"] = "cpu"
    """Recipe to start from; the other options override it."""
    search: Annotated[TuneOptions, tyro.conf.arg(name="")] = TuneOptions()
    scaling: Annotated[ScalingOptions, tyro.conf.arg(name="")] = ScalingOptions()
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = TrainConfig()
