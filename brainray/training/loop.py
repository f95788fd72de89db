"""The training loop of a Ray Train worker."""

import math
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import ray.train.collective
import ray.train.torch
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from ray.train import Checkpoint, CheckpointUploadMode
from ray.util.queue import Queue
from torch import nn
from torch.optim.swa_utils import update_bn

from brainray import runlog
from brainray.errors import TrainingError
from brainray.io.provenance import describe_cpu
from brainray.model.network import (
    StateDict,
    build_network,
    choose_norm_layer,
    compute_features,
    normalise_images,
    use_matrix_products,
)
from brainray.model.precision import (
    AskedPrecision,
    Precision,
    choose_precision,
    has_native_bf16,
)
from brainray.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from brainray.training.config import TrainConfig
from brainray.training.loader import Batch, LoaderSetup, ResidentLoader, StreamLoader
from brainray.training.optim import build_average, build_optimizer
from brainray.training.step import TrainStep, compute_class_weights, fit_head, open_autocast

MESSAGE_INTERVAL_S = 1.0
"""Seconds between two progress messages to the driver within an epoch."""

STATISTICS_STEPS = 8
"""Steps at the end of an epoch whose images, without augmentation, are used to estimate the
batch-norm statistics of the validated network."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSetup:
    """What the driver passes to every worker."""

    config: TrainConfig
    loader: LoaderSetup
    weights: StateDict | None
    records_uri: str
    tensorboard_uri: str
    messages: Queue
    """Receives progress messages for the driver."""


class Worker:
    """One training worker: its network, its optimiser and its share of the images."""

    def __init__(self, setup: WorkerSetup) -> None:
        self.setup, self.config = setup, setup.config
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        if self.device.type == "cpu":
            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(max(1, cores // context.get_local_world_size()))
        else:
            torch.backends.cudnn.benchmark = True  # few shapes, thousands of steps
        self.told_at = time.monotonic()
        self.precision = agree_precision(self.config.precision, self.device, self._tell)
        torch.manual_seed(self.config.seed)
        self.network = self._build_network()
        decay = self.config.optimisation.ema_decay
        self.averaged = build_average(self.network, decay) if decay else None
        self.optimizer = build_optimizer(self.network, self.config.optimisation)
        open_loader = ResidentLoader if setup.loader.kind == "resident" else StreamLoader
        self.loader = open_loader(setup.loader, self.rank, self.world_size, self.device)
        if self.loader.global_batch_size < self.world_size:
            raise TrainingError(
                f"Expected a batch with an image for each of {self.world_size} workers, got "
                f"batches of {self.loader.global_batch_size}. Raise --global-batch-size, or lower "
                "--num-workers."
            )
        self.class_weights = None
        if self.config.optimisation.class_weights == "balanced":
            labels = setup.loader.labels[setup.loader.train_ids]
            weights = compute_class_weights(labels, len(self.config.classes))
            self.class_weights = weights.to(self.device)
        self.progress = Progress()

    def _build_network(self) -> nn.Module:
        is_gpu = self.device.type == "cuda"
        network = build_network(
            len(self.config.classes),
            weights=self.setup.weights,
            norm_layer=choose_norm_layer(self.config.batch_norm, on_gpu=is_gpu),
        )
        layout = torch.channels_last if self.config.channels_last else torch.contiguous_format
        if self.config.channels_last and not is_gpu:
            network = use_matrix_products(network)
        return network.to(self.device).to(memory_format=layout)

    def run(self) -> None:
        """Train from the last checkpoint, or from the start, to the last epoch."""
        records = self._restore()
        if self.progress == Progress() and self.config.starts_with_head:
            self._fit_head()
        step = TrainStep(
            self.config,
            self.network,
            self.optimizer,
            self.loader,
            precision=self.precision,
            device=self.device,
            class_weights=self.class_weights,
        )
        for epoch in range(self.progress.next_epoch, self.config.num_epochs):
            patience, waited = self.config.patience_epochs, epoch - 1 - self.progress.best_epoch
            if 0 < patience <= waited:
                break
            records.append(self._run_epoch(step, epoch))
            self._report(records)

    def _restore(self) -> list[runlog.Record]:
        """Load the last checkpoint, if any; return the records of its epochs."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is not None:
            with checkpoint.as_directory() as folder:
                self.progress = load_checkpoint(
                    Path(folder),
                    network=self.network,
                    averaged=self.averaged,
                    optimizer=self.optimizer,
                )
        if self.rank != 0:
            return []
        records = runlog.read_records(self.setup.records_uri)
        return [record for record in records if record["epoch"] < self.progress.next_epoch]

    def _run_epoch(self, step: TrainStep, epoch: int) -> runlog.Record:
        """Train for an epoch and validate; return the epoch's record."""
        started = time.monotonic()
        loss, accuracy, num_images, latest = self._train_epoch(step, epoch)
        train_s = time.monotonic() - started
        self._measure_statistics(latest)
        scores = self._validate()
        score, best = scores[self.config.monitor], self.progress
        is_best = score > best.best_score
        self.progress = Progress(
            next_epoch=epoch + 1,
            best_score=score if is_best else best.best_score,
            best_epoch=epoch if is_best else best.best_epoch,
            time_s=best.time_s + time.monotonic() - started,
        )
        is_gpu = self.device.type == "cuda"
        return {
            "epoch": epoch,
            "num_epochs": self.config.num_epochs,
            "percent_done": 100 * (epoch + 1) // self.config.num_epochs,
            "size_px": self.config.preprocessing.size_px,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "train_loss": loss,
            "train_accuracy": accuracy,
            **scores,
            "is_best": is_best,
            "num_train_images": num_images,
            "world_size": self.world_size,
            "hardware": torch.cuda.get_device_name(self.device) if is_gpu else describe_cpu(),
            "precision": self.precision,
            "loader": self.setup.loader.kind,
            "images_per_s": num_images / train_s,
            "time_s": self.progress.time_s,
            "unix_time_s": time.time(),
            "time_left_s": self.progress.time_s * (self.config.num_epochs / (epoch + 1) - 1),
        }

    def _train_epoch(
        self, step: TrainStep, epoch: int
    ) -> tuple[float, float, int, Collection[Batch]]:
        """Take an epoch's steps; return loss, accuracy, images, and this worker's last batches."""
        num_steps = self.loader.steps_per_epoch
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        latest: deque[Batch] = deque(maxlen=STATISTICS_STEPS)
        self.network.train()
        for number, batch in enumerate(self.loader.iterate_epoch(epoch)):
            sums += step(batch, epoch, number)
            if self.averaged is not None:
                self.averaged.update_parameters(self.network)
            latest.append(batch)
            if time.monotonic() - self.told_at > MESSAGE_INTERVAL_S:
                self.told_at = time.monotonic()
                self._tell({"epoch": epoch, "step": number + 1, "num_steps": num_steps})
        dist.all_reduce(sums)
        loss, correct, num_images = sums.tolist()
        if not math.isfinite(loss):
            raise TrainingError(
                f"The training loss is {loss} in epoch {epoch + 1}. "
                "Lower --optimisation.learning-rate or --optimisation.clip-norm."
            )
        return loss / num_images, correct / num_images, round(num_images), latest

    @property
    def _validated(self) -> nn.Module:
        """The network that is validated and exported."""
        return self.network if self.averaged is None else self.averaged.module

    def _measure_statistics(self, latest: Collection[Batch]) -> None:
        """Estimate batch-norm statistics of the validated network on unaugmented images.

        The running statistics are of augmented images; with them, the networks of
        docs/results.md lost 2.3 and 2.8 points of validation accuracy. The exported network gets
        statistics in the same way, so the validation score is the exported network's. It takes a
        thirtieth of an epoch's time.
        """
        if self.config.batch_norm == "frozen":
            return
        images = (normalise_images(batch.images, self.config.preprocessing) for batch in latest)
        with open_autocast(self.device, self.precision):
            update_bn(images, self._validated)
        if self.config.batch_norm == "local" and self.world_size > 1:
            for network in dict.fromkeys([self.network, self._validated]):  # one, without average
                for name, buffer in network.named_buffers():
                    if name.endswith(("running_mean", "running_var")):
                        dist.all_reduce(buffer)
                        buffer /= self.world_size

    def _validate(self) -> dict[str, float]:
        """Score the validation images, each exactly once, divided among the workers."""
        ids, logits = self._compute_once(self.setup.loader.val_ids, self._validated)
        scores: dict[str, float] = {}
        if self.rank == 0:
            from brainray.metrics import summarise  # scikit-learn: 0.8 s of CPU

            probs = torch.from_numpy(logits).softmax(1).numpy()
            found = summarise(self.setup.loader.labels[ids], probs, self.config.classes)
            scores = {f"val_{name}": value for name, value in found.items()}
        shared: dict[str, float] = ray.train.collective.broadcast_from_rank_zero(scores)
        return shared

    @torch.no_grad()
    def _compute_once(
        self, ids: NDArray[np.int64], compute: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Compute outputs of images divided among the workers; return all rows on every worker."""
        self._validated.eval()
        seen, rows = [], []
        for batch in self.loader.iterate_once(ids):
            with open_autocast(self.device, self.precision):
                found = compute(normalise_images(batch.images, self.config.preprocessing))
            seen.append(batch.image_ids)
            rows.append(found.float().cpu().numpy())
        parts: list[Any] = [(seen, rows)]
        if self.world_size > 1:
            parts = [None] * self.world_size
            dist.all_gather_object(parts, (seen, rows))
        all_ids = np.concatenate([batch for part in parts for batch in part[0]])
        order = np.argsort(all_ids)
        if not np.array_equal(all_ids[order], np.sort(ids)):
            raise TrainingError(
                f"Expected each of {len(ids)} images exactly once, "
                f"got {len(all_ids)} images, {len(np.unique(all_ids))} of them different."
            )
        return all_ids[order], np.concatenate([b for part in parts for b in part[1]])[order]

    def _fit_head(self) -> None:
        """Train the head alone, on features computed once."""
        self.network.eval()
        ids, features = self._compute_once(
            self.setup.loader.train_ids, lambda images: compute_features(self.network, images)
        )
        fit_head(
            self.network.get_submodule("fc"),
            torch.from_numpy(features).to(self.device),
            torch.from_numpy(self.setup.loader.labels[ids]).to(self.device),
            num_epochs=self.config.head_epochs,
            seed=self.config.seed,
            class_weights=self.class_weights,
        )
        if self.averaged is not None:
            self.averaged.module.load_state_dict(self.network.state_dict())

    def _report(self, records: list[runlog.Record]) -> None:
        """Write the last epoch's record, and report it to Ray Train with a checkpoint."""
        record = records[-1]
        if self.rank != 0:
            ray.train.report(record)
            return
        runlog.write_records(self.setup.records_uri, records)
        runlog.write_tensorboard(self.setup.tensorboard_uri, records)
        self._tell({"record": record})
        folder = tempfile.mkdtemp(prefix="brainray-checkpoint-")
        save_checkpoint(
            Path(folder),
            network=self.network,
            averaged=self.averaged,
            optimizer=self.optimizer,
            progress=self.progress,
        )
        ray.train.report(  # the upload does not block training
            record,
            checkpoint=Checkpoint.from_directory(folder),
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )

    def _tell(self, message: dict[str, Any]) -> None:
        if self.rank == 0:
            self.setup.messages.put(message, block=False)


def agree_precision(
    asked: AskedPrecision, device: torch.device, tell: Callable[[dict[str, Any]], None]
) -> Precision:
    """Return the precision that all workers use; every worker must call this."""
    all_have = torch.tensor(has_native_bf16(use_gpu=device.type == "cuda"), dtype=torch.int32)
    if dist.is_initialized():
        all_have = all_have.to(device)
        dist.all_reduce(all_have, op=dist.ReduceOp.MIN)
    has_bf16 = bool(all_have)
    if asked == "bf16" and not has_bf16:
        tell({"line": "Training in bf16, which this machine emulates; fp32 is faster."})
    if asked == "auto" and not has_bf16:
        tell({"line": "Training in fp32: this machine has no bf16 instructions."})
    return choose_precision(asked, has_bf16=has_bf16)
