"""The optimiser, its parameter groups, the learning-rate schedule and weight averaging."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.optim.swa_utils import PARAM_LIST, AveragedModel, get_ema_multi_avg_fn

from brainray.errors import ConfigError
from brainray.model.network import STAGES, stage_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimisation:
    """Optimiser and schedule."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with Nesterov momentum 0.9."""
    learning_rate: float = 1e-3
    """Peak learning rate of the head, for the global batch (not per worker)."""
    stage_decay: float = 1.0
    """Learning rate of each stage relative to the stage above it (0 to 1]."""
    weight_decay: float = 0.05
    """Decoupled for AdamW, L2 for SGD; never on biases and normalisation."""
    warmup_epochs: float = 1.0
    """Epochs of linear warm-up, before the cosine decay."""
    final_lr_fraction: float = 0.01
    """Final learning rate, as a share of the peak."""
    clip_norm: float = 1.0
    """Maximum norm of the gradient; 0 does not clip."""
    label_smoothing: float = 0.0
    """Share of each target spread evenly over the classes [0 to 1)."""
    class_weights: Literal["none", "balanced"] = "none"
    """`balanced` weights each class by the inverse of its share of the training images."""
    ema_decay: float = 0.0
    """Decay per step of the exponential moving average of the weights, which is then validated and
    exported; 0 uses the weights themselves."""

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
    """Build the optimiser, with two parameter groups for each stage: without and with decay.

    ``lr_scale`` of a group is its learning rate relative to the head's.
    """
    groups = []
    for depth, stage in enumerate(reversed(STAGES)):
        members = [
            parameter
            for name, parameter in network.named_parameters()
            if parameter.requires_grad and stage_of(name) == stage
        ]
        for decays in (False, True):
            group = {
                "params": [p for p in members if (p.ndim > 1) == decays],
                "lr_scale": optimisation.stage_decay**depth,
                "weight_decay": optimisation.weight_decay if decays else 0.0,
            }
            if group["params"]:
                groups.append(group)
    if optimisation.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=optimisation.learning_rate, fused=True)
    return torch.optim.SGD(groups, lr=optimisation.learning_rate, momentum=0.9, nesterov=True)


def compute_lr_fraction(
    step: int, steps_per_epoch: int, optimisation: Optimisation, num_epochs: int
) -> float:
    """Return a step's learning rate as a share of the peak: linear warm-up, then cosine decay."""
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
    """Set every group's learning rate for a step."""
    fraction = compute_lr_fraction(step, steps_per_epoch, optimisation, num_epochs)
    for group in optimizer.param_groups:
        group["lr"] = optimisation.learning_rate * fraction * group["lr_scale"]


def build_average(network: nn.Module, decay: float) -> AveragedModel:
    """Build the exponential moving average of a network's weights.

    The decay at step n is at most ``(1 + n) / (10 + n)``, as in timm's ModelEmaV3, so that the
    random initial weights are forgotten quickly. Buffers are those of the network.
    """

    def average(averaged: PARAM_LIST, current: PARAM_LIST, _: object) -> None:
        steps = int(model.n_averaged)  # on the CPU; the argument would synchronise with the GPU
        get_ema_multi_avg_fn(min(decay, (1 + steps) / (10 + steps)))(averaged, current, steps)

    model = AveragedModel(network, multi_avg_fn=average)
    model.n_averaged += 1  # count the initial weights; else the first update overwrites them
    return model.requires_grad_(False)
