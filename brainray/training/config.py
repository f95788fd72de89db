"""Options of training: everything that determines the classifier, and where it is trained."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from brainray.errors import ConfigError
from brainray.images.preprocess import Preprocessing
from brainray.images.slices import ReadOptions
from brainray.labels import BRAIN_TUMOUR_CLASSES, check_classes
from brainray.model.calibration import CalibrationOptions
from brainray.model.network import BatchNormMode
from brainray.training.augment import Augmentation
from brainray.training.optim import Optimisation

LoaderName = Literal["auto", "resident", "stream"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """A recipe: everything that determines the classifier, not where it is trained."""

    classes: tuple[str, ...] = BRAIN_TUMOUR_CLASSES
    """Class names in class order; also the names of the class folders."""
    seed: int = 0
    """Seed of the split, the weights, the order of the images and the augmentation."""
    weights: Literal["imagenet", "none"] = "imagenet"
    """Start from torchvision's IMAGENET1K_V2, or from random weights."""
    weights_uri: str | None = None
    """Start from this .safetensors or .pth state dict instead."""
    preprocessing: Preprocessing = Preprocessing()
    """How pixels become the network's input; exported with the classifier."""
    augmentation: Augmentation = Augmentation()
    """Random changes of training images."""
    optimisation: Optimisation = Optimisation()
    """Optimiser and schedule."""
    calibration: CalibrationOptions = CalibrationOptions()
    """Calibration, abstention and out-of-distribution detection; exported with the classifier."""
    reading: Annotated[ReadOptions, tyro.conf.arg(name="")] = ReadOptions()
    """How files are read."""
    val_fraction: float = 0.15
    """Share of the training images used for validation, in whole groups, if there is no val
    folder."""
    test_fraction: float = 0.15
    """Share of the images used for testing, if the data set has no splits; 0 uses none."""
    group_correlation: float = 0.96
    """Slices whose thumbnails correlate at least this much belong to one group (0 to 1)."""
    num_epochs: int = 30
    """Passes of the whole network over the training images."""
    head_epochs: int = 0
    """Epochs of the head alone before that, on features computed once. Skipped with random
    weights."""
    global_batch_size: int = 64
    """Images of one optimiser step, over all workers together."""
    batch_norm: BatchNormMode = "local"
    """Statistics of each worker's images (`local`), of all workers' (`sync`), or as loaded
    (`frozen`)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`bf16` is autocast; weights stay fp32. `auto` is bf16 if all workers' CPUs or GPUs support
    it, else fp32."""
    channels_last: bool = True
    """Memory layout; faster on CPUs with oneDNN and on tensor cores."""
    compile: bool = False
    """torch.compile the network; takes a minute at the start. For GPUs: on a CPU its speed was
    0.92 to 1.02 of eager (96 px, batch 32, bf16)."""
    patience_epochs: int = 0
    """Stop after this many epochs without a better validation score; 0 never stops early."""
    monitor: Literal["val_macro_f1", "val_accuracy", "val_macro_auroc"] = "val_macro_f1"
    """Validation score that chooses the exported epoch."""

    def __post_init__(self) -> None:
        check_classes(self.classes)
        checks = {
            "num_epochs": (self.num_epochs >= 1, "must be at least 1"),
            "global_batch_size": (self.global_batch_size >= 1, "must be at least 1"),
            "head_epochs": (self.head_epochs >= 0, "must not be negative"),
            "patience_epochs": (self.patience_epochs >= 0, "must not be negative"),
            "val_fraction": (0 < self.val_fraction <= 0.5, "must be in (0, 0.5]"),
            "test_fraction": (0 <= self.test_fraction <= 0.5, "must be in [0, 0.5]"),
            "group_correlation": (0 < self.group_correlation <= 1, "must be in (0, 1]"),
        }
        for name, (holds, expected) in checks.items():
            if not holds:
                raise ConfigError(f"{name} {expected}, got {getattr(self, name)}.")

    @property
    def starts_with_head(self) -> bool:
        """Whether head-only epochs come first: requested, and with pretrained weights."""
        has_weights = self.weights_uri is not None or self.weights != "none"
        return self.head_epochs > 0 and has_weights


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingOptions:
    """Where a run is trained; it may change when a run is resumed."""

    num_workers: int = 1
    """Training workers; each uses a GPU with --use-gpu, else a share of the CPUs."""
    min_workers: int | None = None
    """Continue with at least this many workers while nodes are missing (elastic training)."""
    use_gpu: bool = False
    """Train on GPUs."""
    max_failures: int = 3
    """Restarts of a failed worker group from its last checkpoint."""
    loader: LoaderName = "auto"
    """`resident` decodes once and keeps all pixels in every node's object store; `stream` decodes
    again in each epoch. `auto` is `resident` if the pixels fit the smallest node's object store."""

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise ConfigError(f"num_workers must be at least 1, got {self.num_workers}.")
        if self.min_workers is not None and not 1 <= self.min_workers <= self.num_workers:
            raise ConfigError(
                f"min_workers must be in [1, num_workers={self.num_workers}], "
                f"got {self.min_workers}."
            )


RANGES = ("learning_rate", "weight_decay", "grey_strength", "geometric_strength")
"""Fields of :class:`SearchSpace` that are ranges."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchSpace:
    """Ranges of the search; equal ends fix a value."""

    learning_rate: tuple[float, float] = (3e-4, 3e-3)
    """Range of the peak learning rate, log-uniform."""
    weight_decay: tuple[float, float] = (0.01, 0.2)
    """Range of the weight decay, log-uniform."""
    grey_strength: tuple[float, float] = (0.5, 2.0)
    """Factor on the recipe's CLAHE probability, gamma, bias field, gain, noise and blur,
    log-uniform."""
    geometric_strength: tuple[float, float] = (0.5, 2.0)
    """Factor on the recipe's rotation, zoom, stretch and shift, log-uniform."""
    num_epochs: tuple[int, ...] = ()
    """Choices of the number of epochs; the recipe's, if none is given."""

    def __post_init__(self) -> None:
        for name in RANGES:
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ConfigError(
                    f"{name} must be two positive numbers in order, got {low} {high}."
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneOptions:
    """Size of the search."""

    space: SearchSpace = SearchSpace()
    num_configurations: int = 8
    """Number of configurations."""
    num_folds: int = 3
    """Folds of groups; the best configurations are trained once without each."""
    max_concurrent: int = 1
    """Concurrent trials; each uses --num-workers workers."""

    def __post_init__(self) -> None:
        for name, least in (("num_configurations", 1), ("num_folds", 2), ("max_concurrent", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}.")


def find_differences(saved: dict[str, Any], given: dict[str, Any], prefix: str = "") -> list[str]:
    """List differences of two JSON-ready configurations as `name: saved -> given`."""
    lines = []
    for name in sorted(saved.keys() | given.keys()):
        old, new = saved.get(name), given.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += find_differences(old, new, f"{prefix}{name}.")
        elif old != new:
            lines.append(f"{prefix}{name}: {old} -> {new}")
    return lines
