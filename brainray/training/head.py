"""Train the classification head alone, on features that the frozen network computes once."""

import math

import torch
import torch.nn.functional as F
from torch import nn

BATCH_SIZE = 256
"""Feature vectors of one step."""
LEARNING_RATE = 1e-2


def fit_head(
    head: nn.Module,
    features: torch.Tensor,
    labels: torch.Tensor,
    *,
    num_epochs: int,
    seed: int,
    class_weights: torch.Tensor | None,
) -> None:
    """Train the head by AdamW with a cosine schedule: the linear probing of LP-FT [1]_.

    Fine-tuning with a random head would distort the pretrained features in its first steps.
    Every worker takes the same steps on all features.

    Parameters
    ----------
    head : Module
        Changed in place.
    features : Tensor of float32, shape (N, F)
    labels : Tensor of int64, shape (N,)
    class_weights : Tensor of float32, shape (K,), optional

    References
    ----------
    .. [1] Kumar et al., Fine-Tuning can Distort Pretrained Features, ICLR 2022.
    """
    optimizer = torch.optim.AdamW(head.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    num_steps = num_epochs * math.ceil(len(features) / BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_epochs):
        for rows in torch.randperm(len(features), generator=generator).split(BATCH_SIZE):
            rows = rows.to(features.device)
            loss = F.cross_entropy(head(features[rows]), labels[rows], weight=class_weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
