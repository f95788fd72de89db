"""One training step: augmentation, forward and backward pass, optimiser step."""

from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from brainray.model.network import standardise
from brainray.model.precision import Precision
from brainray.training.augment import augment_images, sample_params
from brainray.training.config import TrainConfig
from brainray.training.distributed import count_workers, make_data_parallel
from brainray.training.loader import Batch, Loader
from brainray.training.optim import set_learning_rate


def open_autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Return an autocast context for a precision; the weights stay fp32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


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
        self._loader = loader
        self._precision: Precision = precision
        self._device = device
        self._class_weights = class_weights
        model = make_data_parallel(network, device, in_bf16=precision == "bf16")
        self._model = torch.compile(model) if config.compile else model
        # DDP averages the workers' gradients, but their shares of a batch may differ by one image.
        self._scale = count_workers() / loader.global_batch_size

    def __call__(self, batch: Batch, epoch: int, step: int) -> torch.Tensor:
        """Run one step.

        Parameters
        ----------
        batch : Batch
            This worker's share of the global batch.
        epoch, step : int
            Epoch, and step within it, from 0.

        Returns
        -------
        Tensor of float64, shape (3,)
            This worker's sums: loss, images classified correctly, images.
        """
        optimisation, steps_per_epoch = self._config.optimisation, self._loader.steps_per_epoch
        images = self._augment(batch, epoch)
        with open_autocast(self._device, self._precision):
            logits = self._model(images).float()
        loss = F.cross_entropy(
            logits,
            batch.labels,
            weight=self._class_weights,
            label_smoothing=optimisation.label_smoothing,
            reduction="sum",
        )
        number = epoch * steps_per_epoch + step
        set_learning_rate(
            self._optimizer, optimisation, number, steps_per_epoch, self._config.num_epochs
        )
        self._optimizer.zero_grad()
        (loss * self._scale).backward()
        if optimisation.clip_norm:
            nn.utils.clip_grad_norm_(self._network.parameters(), optimisation.clip_norm)
        self._optimizer.step()
        correct = (logits.detach().argmax(1) == batch.labels).sum()
        count = torch.full_like(correct, len(batch.labels))
        return torch.stack([loss.detach().double(), correct.double(), count.double()])

    def _augment(self, batch: Batch, epoch: int) -> torch.Tensor:
        """Return the network's input: the augmented, normalised images of a batch."""
        params = sample_params(
            self._config.augmentation, batch.image_ids, seed=self._config.seed, epoch=epoch
        )
        preprocessing = self._config.preprocessing
        images = augment_images(batch.images, params, preprocessing.size_px)
        return standardise(images, preprocessing)
