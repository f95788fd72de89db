"""Named configurations, each with the time it takes and the score to expect.

Any field can be overridden on the command line; ``brainray train --help`` lists them.
"""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from brainray.errors import ConfigError
from brainray.images.preprocess import Preprocessing
from brainray.model.trust import TrustOptions
from brainray.training.augment import Augmentation
from brainray.training.config import ScalingOptions, TrainConfig, TuneOptions
from brainray.training.optim import Optimisation


def smoke() -> TrainConfig:
    """Show that everything works: 64 px, 14 epochs, from random weights.

    `make demo` (512 phantoms to train on, two workers on two Zen 5 cores): 2 to 3 minutes,
    accuracy about 0.9 on held-out phantoms; 9 minutes on two cores with AVX2 alone, in fp32.
    """
    return TrainConfig(
        weights="none",
        preprocessing=Preprocessing(size_px=64),
        num_epochs=14,
        global_batch_size=32,
        optimisation=Optimisation(learning_rate=1e-3, ema_decay=0.95),
    )


def cpu() -> TrainConfig:
    """Train on a few CPU cores: 96 px.

    Measured with small images first (64, 80, 96 px), which this recipe no longer has: on the
    Kaggle brain-tumour set from random weights, two workers on two Zen 5 cores with bf16, 25
    minutes, accuracy 0.951 on Testing, 0.929 on its images without a near-twin in training
    (`--weights none`, seed 0). From ImageNet weights: not measured yet.
    """
    return TrainConfig(
        preprocessing=Preprocessing(size_px=96),
        num_epochs=20,
        head_epochs=5,
        global_batch_size=64,
        optimisation=Optimisation(
            learning_rate=1e-3, label_smoothing=0.05, ema_decay=0.995, warmup_epochs=2.0
        ),
        trust=TrustOptions(max_risk=0.05),
    )


def cpu_long() -> TrainConfig:
    """Train on a few CPU cores, longer: 160 px, stronger augmentation.

    Measured with small images first (64 to 160 px) and mixup, which this recipe no longer has: on
    the Kaggle brain-tumour set from random weights, two workers on two Zen 4 cores with bf16, 108
    minutes, accuracy 0.975 on Testing, 0.971 on its images without a near-twin in training
    (`--weights none`, seed 0).
    """
    short = cpu()
    return dataclasses.replace(
        short,
        preprocessing=Preprocessing(size_px=160),
        num_epochs=56,
        augmentation=Augmentation(rotation_deg=20.0, zoom=0.25, shift=0.1),
        optimisation=dataclasses.replace(short.optimisation, ema_decay=0.997),
    )


def gpu() -> TrainConfig:
    """Train on GPUs: 224 px, bf16, from ImageNet weights.

    At 224 px one H100 takes 3,341 images/s (docs/results.md); never run to its end.
    """
    return TrainConfig(
        preprocessing=Preprocessing(size_px=224),
        num_epochs=40,
        head_epochs=10,
        global_batch_size=256,
        batch_norm="sync",
        optimisation=Optimisation(
            learning_rate=1e-3,
            stage_decay=0.7,
            label_smoothing=0.05,
            ema_decay=0.998,
            warmup_epochs=3.0,
        ),
        trust=TrustOptions(max_risk=0.05),
    )


RECIPES = {"smoke": smoke, "cpu": cpu, "cpu-long": cpu_long, "gpu": gpu}


def build_recipe(name: str) -> TrainConfig:
    """Build a recipe by its name.

    Raises
    ------
    ConfigError
        There is none of that name.
    """
    if name not in RECIPES:
        raise ConfigError(f"Unknown recipe '{name}'. Expected one of {', '.join(RECIPES)}.")
    return RECIPES[name]()


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Train a classifier on a folder (or Parquet tables) of labelled scans."""

    data_uri: str
    """Class folders, alone or below Training/ and Testing/ (or train/, val/, test/), or
    Parquet tables. Local, s3:// or gs://."""
    output_uri: str
    """Where everything is written. The same command goes on with what it finds here."""
    recipe: Literal["smoke", "cpu", "cpu-long", "gpu"] = "cpu"
    """Named configuration that the other options override."""
    folds: int | None = None
    """Cross-validate: train so many times, each time without one of as many parts of the training
    images (groups stay whole), and evaluate each part by the classifier that never saw it."""
    scaling: Annotated[ScalingOptions, tyro.conf.arg(name="")] = ScalingOptions()
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = TrainConfig()
    mlflow_uri: str | None = None
    """Log the run to this MLflow tracking server too (needs `pip install brainray[mlflow]`)."""
    verbose: bool = False
    """Show Ray's own lines too."""


@dataclass(frozen=True, kw_only=True)
class TuneCommand:
    """Search for a recipe's learning rate, weight decay, augmentation and epochs on folds."""

    data_uri: str
    """Labelled scans, as for `brainray train`; Testing images have no part in it."""
    output_uri: str
    """Where everything is written. The same command resumes the search that it finds here."""
    recipe: Literal["smoke", "cpu", "cpu-long", "gpu"] = "cpu"
    """The recipe to begin with, which the other options override."""
    search: Annotated[TuneOptions, tyro.conf.arg(name="")] = TuneOptions()
    scaling: Annotated[ScalingOptions, tyro.conf.arg(name="")] = ScalingOptions()
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = TrainConfig()
    verbose: bool = False
    """Show Ray's own lines too."""
