"""How the weights move: the optimiser, its parameter groups and its learning rate."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from brainray.errors import ConfigError
from brainray.model.network import STAGES, stage_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimisation:
    """How the weights move."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with Nesterov momentum 0.9."""
    learning_rate: float = 1e-3
    """Peak rate of the head, for the global batch as it is (not per worker)."""
    stage_decay: float = 1.0
    """Each stage below the head learns this much slower than the one above it (0 to 1]."""
    weight_decay: float = 0.05
    """Decoupled for AdamW, L2 for SGD; never on biases and normalisation."""
    warmup_epochs: float = 1.0
    """The rate climbs linearly over this many epochs, then falls as a cosine."""
    final_lr_fraction: float = 0.01
    """Share of the peak rate left at the end."""
    clip_norm: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    label_smoothing: float = 0.0
    """Share of each target spread evenly over the classes [0 to 1)."""
    class_weights: Literal["none", "balanced"] = "none"
    """`balanced` weighs each class by the inverse of its share of the training images."""
    ema_decay: float = 0.0
    """Decay a step of the averaged weights that are validated and sealed; 0 keeps none."""

    def __post_init__(self) -> None:
        checks = {
            "learning_rate": self.learning_rate > 0,
            "stage_decay": 0 < self.stage_decay <= 1,
            "weight_decay": self.weight_decay >= 0,
            "warmup_epochs": self.warmup_epochs >= 0,
            "final_lr_fraction": 0 <= self.final_lr_fraction <= 1,
            "clip_norm": self.clip_norm >= 0,
            "label_smoothing": 0 <= self.label_smoothing < 1,
            "ema_decay": 0 <= self.ema_decay < 1,
        }
        for name, holds in checks.items():
            if not holds:
                raise ConfigError(f"optimisation.{name} is out of range: {getattr(self, name)}.")


def build_optimizer(network: nn.Module, optimisation: Optimisation) -> torch.optim.Optimizer:
    """Build the optimiser: a parameter group for each stage, with and without decay.

    Each group keeps its share of the peak rate as ``lr_scale``.
    """
    members: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            members.setdefault((stage_of(name), parameter.ndim > 1), []).append(parameter)
    groups = [
        {
            "params": parameters,
            "lr_scale": optimisation.stage_decay ** (len(STAGES) - 1 - STAGES.index(stage)),
            "weight_decay": optimisation.weight_decay if decays else 0.0,
        }
        for (stage, decays), parameters in sorted(
            members.items(), key=lambda item: (-STAGES.index(item[0][0]), item[0][1])
        )
    ]
    if optimisation.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=optimisation.learning_rate, fused=True)
    return torch.optim.SGD(groups, lr=optimisation.learning_rate, momentum=0.9, nesterov=True)


def compute_lr_fraction(
    step: int, steps_per_epoch: int, optimisation: Optimisation, num_epochs: int
) -> float:
    """Return the share of the peak learning rate at a step: a linear climb, then a cosine."""
    warmup = optimisation.warmup_epochs * steps_per_epoch
    if step < warmup:
        return (step + 1) / (warmup + 1)
    total = max(1.0, num_epochs * steps_per_epoch - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / total)))
    return optimisation.final_lr_fraction + (1 - optimisation.final_lr_fraction) * cosine


def set_learning_rate(
    optimizer: torch.optim.Optimizer,
    optimisation: Optimisation,
    step: int,
    steps_per_epoch: int,
    num_epochs: int,
) -> None:
    """Set every group's rate for a step."""
    fraction = compute_lr_fraction(step, steps_per_epoch, optimisation, num_epochs)
    for group in optimizer.param_groups:
        group["lr"] = optimisation.learning_rate * fraction * group["lr_scale"]


Tensors = list[torch.Tensor] | tuple[torch.Tensor, ...]


def build_average(network: nn.Module, decay: float) -> AveragedModel:
    """Build the exponential moving average of a network's weights.

    Early on it forgets faster, as timm's does: of the first n steps it has the decay
    ``(1 + n) / (10 + n)`` at most. Buffers are those of the network.
    """

    def average(averaged: Tensors, current: Tensors, _: object) -> None:
        steps = int(model.n_averaged)  # on the CPU: the one that is passed here waits for a GPU
        get_ema_multi_avg_fn(min(decay, (1 + steps) / (10 + steps)))(averaged, current, steps)

    model = AveragedModel(network, multi_avg_fn=average)
    model.n_averaged += 1  # the weights as they are; else those of the first step replace them
    return model.requires_grad_(False)
