"""The steps of training: of the whole network, and before that of its head alone."""

import math
from contextlib import AbstractContextManager

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from brainray.model.network import standardise
from brainray.model.precision import Precision
from brainray.training.augment import augment_images, sample_params
from brainray.training.config import TrainConfig
from brainray.training.loader import Batch, Loader
from brainray.training.optim import set_learning_rate

HEAD_BATCH_SIZE = 256
"""Feature vectors of one step of the head."""
HEAD_LEARNING_RATE = 1e-2


def open_autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Return an autocast context for a precision; the weights stay fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def compute_class_weights(labels: NDArray[np.int64], num_classes: int) -> torch.Tensor:
    """Return each class's inverse share of the labels; float32, shape (num_classes,)."""
    counts = np.bincount(labels, minlength=num_classes)
    return torch.from_numpy(counts.sum() / (num_classes * np.maximum(counts, 1))).float()


class TrainStep:
    """Augments a batch and updates the network with the gradient of all workers."""

    def __init__(
        self,
        config: TrainConfig,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        loader: Loader,
        *,
        precision: Precision,
        device: torch.device,
        class_weights: torch.Tensor | None,
    ) -> None:
        self._config = config
        self._network = network
        self._optimizer = optimizer
        self._steps_per_epoch = loader.steps_per_epoch
        self._autocast = open_autocast(device, precision)
        self._class_weights = class_weights
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        model = network
        if world_size > 1:
            model = nn.parallel.DistributedDataParallel(
                network,
                device_ids=[device] if device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                static_graph=True,
            )
            if precision == "bf16":
                model.register_comm_hook(None, bf16_compress_hook)
        self._model = torch.compile(model) if config.compile else model
        # DDP averages the workers' gradients, but their shares of a batch may differ by one image.
        self._scale = world_size / loader.global_batch_size

    def __call__(self, batch: Batch, epoch: int, step: int) -> torch.Tensor:
        """Run one step on this worker's share of the global batch.

        Epoch, and step within it, count from 0. Returns this worker's sums as float64, shape (3,):
        loss, images classified correctly, images.
        """
        config = self._config
        params = sample_params(config.augmentation, batch.image_ids, seed=config.seed, epoch=epoch)
        images = standardise(augment_images(batch.images, params), config.preprocessing)
        with self._autocast:
            logits = self._model(images).float()
        loss = F.cross_entropy(
            logits,
            batch.labels,
            weight=self._class_weights,
            label_smoothing=config.optimisation.label_smoothing,
            reduction="sum",
        )
        number = epoch * self._steps_per_epoch + step
        set_learning_rate(
            self._optimizer, config.optimisation, number, self._steps_per_epoch, config.num_epochs
        )
        self._optimizer.zero_grad()
        (loss * self._scale).backward()
        if config.optimisation.clip_norm:
            nn.utils.clip_grad_norm_(self._network.parameters(), config.optimisation.clip_norm)
        self._optimizer.step()
        correct = (logits.detach().argmax(1) == batch.labels).sum()
        count = torch.full_like(correct, len(batch.labels))
        return torch.stack([loss.detach().double(), correct.double(), count.double()])


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
    Every worker takes the same steps on all features, which the frozen network computes once.

    References
    ----------
    .. [1] Kumar et al., Fine-Tuning can Distort Pretrained Features, ICLR 2022.
    """
    optimizer = torch.optim.AdamW(head.parameters(), lr=HEAD_LEARNING_RATE, weight_decay=0.0)
    num_steps = num_epochs * math.ceil(len(features) / HEAD_BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_epochs):
        for rows in torch.randperm(len(features), generator=generator).split(HEAD_BATCH_SIZE):
            rows = rows.to(features.device)
            loss = F.cross_entropy(head(features[rows]), labels[rows], weight=class_weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
