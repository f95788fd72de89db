"""The training loop: what each Ray Train worker runs."""

import math
import os
import shutil
import tempfile
import time
import uuid
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.collective
import ray.train.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from pyarrow.fs import LocalFileSystem
from ray.data import DataIterator
from ray.train import Checkpoint, CheckpointUploadMode, PreemptionInfo
from ray.util.queue import Queue
from torch import nn

from brainray import runlog, storage
from brainray.data.scan import ScanStore
from brainray.data.stream import LoadedBatch, StreamPlan, iterate_batches, open_stream
from brainray.errors import TrainingError
from brainray.images.normalise import normalise_images
from brainray.metrics import summarise
from brainray.model.network import (
    StateDict,
    build_network,
    compute_features,
    measure_statistics,
    set_batch_norm,
    use_matrix_products,
)
from brainray.model.precision import Precision, choose_precision, has_native_bf16
from brainray.model.resnet50 import NUM_FEATURES
from brainray.provenance import describe_cpu
from brainray.training.augment import augment_images, sample_params
from brainray.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from brainray.training.config import TrainConfig
from brainray.training.optim import build_optimizer, set_learning_rate

MESSAGE_INTERVAL_S = 1.0
"""Seconds between two messages to the person at the driver within an epoch."""

UNFINISHED = ".unfinished-"
"""Begins the name of a checkpoint's folder while it is written."""

NOTICE_STEPS = 10
"""Steps between two looks whether a node is about to be taken away; the workers look together,
which takes some milliseconds, and a cloud says so two minutes ahead at most."""

SETTLING_STEPS = 8
"""Steps at the end of an epoch whose images, as they are, give the validated network its
batch-norm statistics."""

PlaceCheckpoint = Callable[[Checkpoint, str], Checkpoint]

HEAD_BATCH_SIZE = 256
"""Features of one step of the head-only epochs; they cost nothing beside the network."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSetup:
    """What the driver hands to every worker."""

    config: TrainConfig
    train_indices: NDArray[np.int64]
    val_indices: NDArray[np.int64]
    labels: NDArray[np.int64]
    """Class of every sample of the data set, by sample number."""
    row_groups: NDArray[np.int64] | None
    """Row group of each training image, when rows are streamed from Parquet."""
    store: ScanStore
    weights: "ray.ObjectRef[StateDict | None]"
    """Fetched once, by the driver."""
    checkpoints_uri: str
    """Where Ray Train keeps the run's checkpoints."""
    records_uri: str
    """metrics.jsonl."""
    tensorboard_uri: str
    cpus_per_worker: float
    use_gpu: bool
    heeds_notices: bool = False
    """Whether nodes may be taken away with notice, as a cloud's spot machines are."""
    messages: Queue | None = None
    """Takes progress for the person at the driver."""


def sum_in_bf16(
    kept: dict[int, torch.Tensor],
    bucket: dist.GradBucket,  # type: ignore[name-defined]  # mypy does not see torch's C names
) -> torch.futures.Future[torch.Tensor]:
    """Sum a bucket of gradients over the workers, in bf16: a hook for DDP.

    torch's own ``bf16_compress_hook`` averages, with a pass over the gradients to divide them,
    and takes new memory each time.

    Parameters
    ----------
    kept : dict of Tensor
        Memory of each bucket between the steps.
    bucket : GradBucket
        Gradients of fp32, overwritten with the sums.
    """
    gradients, index = bucket.buffer(), bucket.index()
    if index not in kept or kept[index].shape != gradients.shape:  # DDP may build them anew
        kept[index] = torch.empty_like(gradients, dtype=torch.bfloat16)
    work = dist.all_reduce(kept[index].copy_(gradients), async_op=True)
    summed: torch.futures.Future[torch.Tensor] = work.get_future().then(
        lambda done: gradients.copy_(done.value()[0])
    )
    return summed


def all_have_bf16(device: torch.device) -> bool:
    """Tell whether every worker computes where there are bf16 instructions; all ask together."""
    has_bf16 = torch.tensor(has_native_bf16(use_gpu=device.type == "cuda"), dtype=torch.int32)
    if dist.is_initialized() and dist.get_world_size() > 1:
        has_bf16 = has_bf16.to(device)
        dist.all_reduce(has_bf16, op=dist.ReduceOp.MIN)
    return bool(has_bf16)


def compare_work(
    config: TrainConfig, num_train_images: int, num_val_images: int, num_done: int
) -> float:
    """Return the work of the epochs that are left, in that of those which are done.

    It goes with the pixels: small images come first, and say little of how long the rest takes.
    """
    train = num_train_images * np.square(config.list_epoch_sizes())
    val = num_val_images * config.preprocessing.size_px**2
    work = 3 * train + val  # a backward pass is as much as two forward ones
    return float(work[num_done:].sum() / work[:num_done].sum())


class Worker:
    """One training worker: its network, its optimiser and its end of the stream."""

    def __init__(self, setup: WorkerSetup) -> None:
        self.setup = setup
        self.config = setup.config
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        if self.device.type == "cpu":
            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(max(1, cores // context.get_local_world_size()))
        else:
            torch.backends.cudnn.benchmark = True  # a run has few shapes, and thousands of steps
        self.precision = self._choose_precision()
        self.labels = torch.from_numpy(setup.labels)
        torch.manual_seed(self.config.seed)
        self.network = self._build_network()
        self.averaged = deepcopy(self.network) if self.config.optimisation.ema_decay else None
        if self.averaged is not None:
            self.averaged.requires_grad_(False)
        self.optimizer = build_optimizer(self.network, self.config.optimisation)
        self.class_weights = self._compute_class_weights()
        self.progress = Progress()
        self.told_at = time.monotonic()
        self.notice: PreemptionInfo | None = None

    def _choose_precision(self) -> Precision:
        """Return the number format that every worker of the run computes in."""
        asked, has_bf16 = self.config.precision, all_have_bf16(self.device)
        if asked == "bf16" and not has_bf16:
            self._tell({"line": "Computing in bf16, which is emulated here: fp32 is faster."})
        if asked == "auto" and not has_bf16:
            self._tell({"line": "Computing in fp32: there are no bf16 instructions here."})
        return choose_precision(asked, has_bf16=has_bf16)

    def _build_network(self) -> nn.Module:
        num_classes = len(self.config.classes)
        network = build_network(num_classes, weights=ray.get(self.setup.weights))
        network = set_batch_norm(network, self.config.batch_norm, on_gpu=self.setup.use_gpu)
        layout = torch.channels_last if self.config.channels_last else torch.contiguous_format
        if self.config.channels_last and not self.setup.use_gpu:
            network = use_matrix_products(network)
        return network.to(self.device).to(memory_format=layout)

    def _compute_class_weights(self) -> torch.Tensor | None:
        if self.config.optimisation.class_weights == "none":
            return None
        counts = np.bincount(
            self.setup.labels[self.setup.train_indices], minlength=len(self.config.classes)
        )
        weights = torch.from_numpy(counts.sum() / (len(counts) * np.maximum(counts, 1)))
        return weights.float().to(self.device)

    def run(self) -> None:
        """Train from the last checkpoint, or from the start, to the end."""
        records = self._restore()
        if self.progress == Progress() and self.config.starts_with_head:
            self._train_head()
        self.plan = self._plan_stream()
        if self.progress.next_step:
            self._tell({"line": f"Going on {self._name_place(self.progress)}."})
        model = self._wrap()
        batches = iterate_batches(self._open_shard(self.plan), self.plan, self.rank)
        for epoch in range(self.progress.next_epoch, self.config.num_epochs):
            if self._is_patience_over(epoch - 1):
                break
            record = self._run_epoch(model, batches, epoch)
            records.append(record)
            self._report(record, records)

    def _restore(self) -> list[runlog.Record]:
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
        self._clear_unfinished()
        records = runlog.read_records(self.setup.records_uri)
        return [record for record in records if record["epoch"] < self.progress.next_epoch]

    def _plan_stream(self) -> StreamPlan:
        return StreamPlan(
            train_indices=self.setup.train_indices,
            val_indices=self.setup.val_indices,
            epoch_sizes_px=self.config.list_epoch_sizes(),
            start_epoch=self.progress.next_epoch,
            start_step=self.progress.next_step,
            global_batch_size=min(self.config.global_batch_size, len(self.setup.train_indices)),
            world_size=self.world_size,
            seed=self.config.seed,
            preprocessing=self.config.preprocessing,
            limits=self.config.limits,
            row_groups=self.setup.row_groups,
        )

    def _open_shard(self, plan: StreamPlan) -> DataIterator:
        """Rank 0 starts the stream; every worker gets its end of it."""
        shards: list[DataIterator] = []
        if self.rank == 0:
            reserved = self.world_size * self.setup.cpus_per_worker
            free = ray.cluster_resources()["CPU"] - reserved
            shards = open_stream(plan, self.setup.store, num_tasks=max(1, int(free)))
        shards = ray.train.collective.broadcast_from_rank_zero(shards)
        shard: DataIterator = shards[self.rank]
        return shard

    def _wrap(self) -> nn.Module:
        """Make the network data-parallel, and compile it if asked to."""
        network = self.network
        if self.world_size > 1:
            device_ids = [self.device] if self.device.type == "cuda" else None
            network = nn.parallel.DistributedDataParallel(
                network,
                device_ids=device_ids,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                static_graph=True,
            )
            if self.precision == "bf16":
                # Autocast computes the gradients of the weights in bf16: so they may travel.
                network.register_comm_hook({}, sum_in_bf16)
        return torch.compile(network) if self.config.compile else network  # type: ignore[return-value]

    def _describe_hardware(self) -> str:
        """Say what this worker computes on."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return describe_cpu()

    def _autocast(self) -> AbstractContextManager[object]:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _to_device(self, batch: LoadedBatch) -> torch.Tensor:
        pixels = torch.from_numpy(batch.images)
        if self.device.type == "cuda":
            pixels = pixels.pin_memory().to(self.device, non_blocking=True)
        return pixels

    def _to_input(self, batch: LoadedBatch) -> torch.Tensor:
        return normalise_images(self._to_device(batch), self.config.preprocessing)

    def _run_epoch(
        self, model: nn.Module, batches: Iterator[LoadedBatch], epoch: int
    ) -> runlog.Record:
        started = time.monotonic()
        num_steps = self.plan.steps_per_epoch
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        latest: deque[LoadedBatch] = deque(maxlen=SETTLING_STEPS)
        model.train()
        for step in range(self.progress.next_step, num_steps):
            latest.append(next(batches))
            sums += self._train_step(model, latest[-1], epoch * num_steps + step)
            self._tell_step({"epoch": epoch, "step": step + 1, "num_steps": num_steps})
            if self._is_notified(step):
                self._save_within_epoch(sums, step + 1, time.monotonic() - started)
        loss, correct, num_images = self._sum_epoch(sums)
        train_s, num_earlier = time.monotonic() - started, self.progress.epoch_sums[2]
        if not math.isfinite(loss):
            raise TrainingError(
                f"The training loss is {loss} in epoch {epoch + 1}. "
                "Lower --optimisation.learning-rate, or clip harder."
            )
        self._settle_statistics(latest)
        scores = self._validate(batches)
        is_best = scores[self.config.monitor] > self.progress.best_score
        self.progress = replace(
            self.progress,
            next_epoch=epoch + 1,
            next_step=0,
            epoch_sums=(0.0, 0.0, 0.0),
            best_score=scores[self.config.monitor] if is_best else self.progress.best_score,
            best_epoch=epoch if is_best else self.progress.best_epoch,
            time_s=self.progress.time_s + time.monotonic() - started,
        )
        return {
            "epoch": epoch,
            "num_epochs": self.config.num_epochs,
            "size_px": self.config.list_epoch_sizes()[epoch],
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "train_loss": loss / num_images,
            "train_accuracy": correct / num_images,
            **scores,
            "is_best": is_best,
            "num_train_images": round(num_images),
            "world_size": self.world_size,
            "hardware": self._describe_hardware(),
            "precision": self.precision,
            "images_per_s": (num_images - num_earlier) / train_s,
            "time_s": self.progress.time_s,
            "unix_time_s": time.time(),
            "time_left_s": self.progress.time_s
            * compare_work(
                self.config, len(self.setup.train_indices), len(self.setup.val_indices), epoch + 1
            ),
        }

    def _sum_epoch(self, sums: torch.Tensor) -> tuple[float, float, float]:
        """Add up the workers' sums of the epoch, and what was done of it in an earlier life."""
        total = sums.clone()
        if self.world_size > 1:
            dist.all_reduce(total)
        loss, correct, num_images = (total + total.new_tensor(self.progress.epoch_sums)).tolist()
        return loss, correct, num_images

    def _is_notified(self, step: int) -> bool:
        """Tell whether it has just become known that a node will be taken away."""
        if not self.setup.heeds_notices or (step + 1) % NOTICE_STEPS:
            return False
        known, self.notice = self.notice, ray.train.get_preemption_info()
        return self.notice is not None and self.notice != known

    def _save_within_epoch(self, sums: torch.Tensor, next_step: int, elapsed_s: float) -> None:
        """Hand over what the epoch has come to, as long as its workers are all there."""
        self._average_statistics()
        progress = replace(
            self.progress,
            next_step=next_step,
            epoch_sums=self._sum_epoch(sums),
            time_s=self.progress.time_s + elapsed_s,
        )
        # It was not validated: no epoch's score is as low, so it is never taken for the best.
        self._hand_over({self.config.monitor: -1.0}, progress)
        self._tell({"line": f"A node is about to go: saved {self._name_place(progress)}."})

    def _name_place(self, progress: Progress) -> str:
        """Say how far an epoch has come."""
        done, num_steps = progress.next_step, self.plan.steps_per_epoch
        return f"in epoch {progress.next_epoch + 1} after step {done} of {num_steps}"

    def _train_step(self, model: nn.Module, batch: LoadedBatch, step: int) -> torch.Tensor:
        """Take one step; return the worker's sums of loss, of correct images and of images."""
        config, optimisation = self.config, self.config.optimisation
        labels = self.labels[batch.indices].to(self.device)
        global_size = self.plan.global_batch_size
        params = sample_params(
            config.augmentation,
            batch.indices,
            seed=config.seed,
            epoch=step // self.plan.steps_per_epoch,
        )
        images = augment_images(self._to_device(batch), params)
        images = images.sub_(config.preprocessing.mean).div_(config.preprocessing.std)
        with self._autocast():
            logits = model(images)
            loss = F.cross_entropy(
                logits.float(),
                labels,
                weight=self.class_weights,
                label_smoothing=optimisation.label_smoothing,
                reduction="sum",
            )
        set_learning_rate(
            self.optimizer, optimisation, step, self.plan.steps_per_epoch, config.num_epochs
        )
        self.optimizer.zero_grad()
        # Workers' gradients are summed in bf16, averaged in fp32: either way, the batch's mean.
        summed = self.world_size == 1 or self.precision == "bf16"
        (loss * ((1 if summed else self.world_size) / global_size)).backward()
        if optimisation.clip_norm:
            nn.utils.clip_grad_norm_(self.network.parameters(), optimisation.clip_norm)
        self.optimizer.step()
        self._update_average()
        correct = (logits.detach().argmax(1) == labels).sum()
        return torch.stack([loss.detach(), correct, torch.full_like(correct, len(labels))])

    @torch.no_grad()
    def _update_average(self) -> None:
        """Move the averaged weights; early on they forget faster, as timm's do."""
        if self.averaged is None:
            return
        steps = self.progress.ema_steps + 1
        self.progress = replace(self.progress, ema_steps=steps)
        decay = min(self.config.optimisation.ema_decay, (1 + steps) / (10 + steps))
        (averaged, current), (counts, current_counts) = self._averaging
        torch._foreach_lerp_(averaged, current, 1 - decay)
        torch._foreach_copy_(counts, current_counts)

    @cached_property
    def _averaging(self) -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
        """Averaged and current tensors, those of floats first; found once, as it takes a while."""
        assert self.averaged is not None
        averaged, current = self.averaged.state_dict(), self.network.state_dict()
        floats = [name for name, tensor in averaged.items() if tensor.is_floating_point()]
        others = [name for name in averaged if name not in floats]
        return [
            ([averaged[name] for name in names], [current[name] for name in names])
            for names in (floats, others)
        ]

    @property
    def _validated(self) -> nn.Module:
        return self.averaged if self.averaged is not None else self.network

    def _settle_statistics(self, latest: Collection[LoadedBatch]) -> None:
        """Give the validated network the statistics of images as they are, as sealing does.

        Those of the training are of augmented images: validated with them, the networks of
        docs/results.md lost 2.3 and 2.8 points of accuracy. On the images of a few steps this
        costs a thirtieth of an epoch's time, and an epoch's score is that of what would be sealed.
        """
        if self.config.batch_norm != "frozen" and latest:
            with self._autocast():
                measure_statistics(self._validated, (self._to_input(batch) for batch in latest))
        self._average_statistics()

    def _average_statistics(self) -> None:
        """Give every worker the mean of the workers' running statistics."""
        if self.world_size == 1 or self.config.batch_norm != "local":
            return
        for module in (self.network, self.averaged):
            for name, buffer in module.named_buffers() if module is not None else ():
                if not name.endswith("num_batches_tracked"):
                    dist.all_reduce(buffer)
                    buffer /= self.world_size

    @torch.inference_mode()
    def _validate(self, batches: Iterator[LoadedBatch]) -> dict[str, float]:
        """Score the validation images: each exactly once, on all workers together."""
        network = self._validated.eval()
        indices, probs = [], []
        for _ in range(self.plan.num_val_steps):
            batch = next(batches)
            if not len(batch.indices):
                continue
            with self._autocast():
                logits = network(self._to_input(batch))
            indices.append(batch.indices)
            probs.append(logits.float().softmax(1).cpu().numpy())
        empty = np.zeros((0, len(self.config.classes)), np.float32)
        part = (
            np.concatenate(indices or [np.zeros(0, np.int64)]),
            np.concatenate(probs or [empty]),
        )
        parts: list[Any] = [part]
        if self.world_size > 1:
            parts = [None] * self.world_size
            dist.all_gather_object(parts, part)
        seen = np.concatenate([p[0] for p in parts]).astype(np.int64)
        if not np.array_equal(np.sort(seen), np.sort(self.setup.val_indices)):
            raise TrainingError(
                f"Expected each of {len(self.setup.val_indices)} validation images once, "
                f"got {len(seen)}, {len(np.unique(seen))} different ones."
            )
        scores = summarise(
            self.setup.labels[seen], np.concatenate([p[1] for p in parts]), self.config.classes
        )
        return {f"val_{name}": value for name, value in scores.items()}

    def _report(self, record: runlog.Record, records: list[runlog.Record]) -> None:
        """Write the epoch down and hand over its checkpoint."""
        if self.rank == 0:
            runlog.write_records(self.setup.records_uri, records)
            runlog.write_tensorboard(self.setup.tensorboard_uri, records)
            self._tell({"record": record})
        self._hand_over(record, self.progress)

    def _hand_over(self, metrics: dict[str, Any], progress: Progress) -> None:
        """Give Ray Train a checkpoint, which it uploads while training goes on."""
        if self.rank != 0:
            ray.train.report(metrics)
            return
        folder, place = self._open_checkpoint_folder()
        save_checkpoint(
            folder,
            network=self.network.state_dict(),
            averaged=self.averaged.state_dict() if self.averaged is not None else None,
            optimizer=self.optimizer,
            progress=progress,
        )
        ray.train.report(
            metrics,
            checkpoint=Checkpoint.from_directory(folder),
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=place,
            delete_local_checkpoint_after_upload=place is None,
        )

    def _open_checkpoint_folder(self) -> tuple[Path, PlaceCheckpoint | None]:
        """Return a folder to write a checkpoint to, and what puts it in its place.

        On a local disk the folder lies beside its final name and is renamed: a second copy
        of some hundred megabytes took more than a step's time from the next epoch. Elsewhere
        Ray Train uploads it.
        """
        filesystem, path = storage.resolve(self.setup.checkpoints_uri)
        is_here = isinstance(filesystem, LocalFileSystem) and Path(path).is_dir()
        if not is_here:  # where this node lacks the folder, Ray Train says what is wrong
            return Path(tempfile.mkdtemp(prefix="brainray-checkpoint-")), None
        folder = Path(path) / f"{UNFINISHED}{uuid.uuid4().hex}"
        folder.mkdir()

        def place(checkpoint: Checkpoint, name: str) -> Checkpoint:
            placed = Path(path) / name
            Path(checkpoint.path).rename(placed)
            return Checkpoint(str(placed), filesystem)

        return folder, place

    def _clear_unfinished(self) -> None:
        """Delete what a worker that was killed while it wrote a checkpoint has left."""
        filesystem, path = storage.resolve(self.setup.checkpoints_uri)
        if isinstance(filesystem, LocalFileSystem):
            for folder in Path(path).glob(f"{UNFINISHED}*"):
                shutil.rmtree(folder)

    def _is_patience_over(self, epoch: int) -> bool:
        patience = self.config.patience_epochs
        return patience > 0 and epoch - self.progress.best_epoch >= patience

    def _tell(self, message: dict[str, Any]) -> None:
        if self.rank == 0 and self.setup.messages is not None:
            self.setup.messages.put(message, block=False)

    def _tell_step(self, message: dict[str, Any]) -> None:
        if time.monotonic() - self.told_at > MESSAGE_INTERVAL_S:
            self.told_at = time.monotonic()
            self._tell(message)

    def _train_head(self) -> None:
        """Fit the head on features that the frozen network computes once for each image.

        The first half of LP-FT (Kumar et al., ICLR 2022): a fitted head keeps the first
        steps of the whole network from tearing up what it starts from. Every worker sees
        all the features and takes the same steps.
        """
        features, labels = self._collect_features()
        head = self.network.get_submodule("fc")
        optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=0.0)
        generator = torch.Generator().manual_seed(self.config.seed)
        steps = self.config.head_epochs * math.ceil(len(features) / HEAD_BATCH_SIZE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(self.config.head_epochs):
            for part in torch.randperm(len(features), generator=generator).split(HEAD_BATCH_SIZE):
                loss = F.cross_entropy(
                    head(features[part.to(self.device)]),
                    labels[part.to(self.device)],
                    weight=self.class_weights,
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        if self.averaged is not None:
            self.averaged.load_state_dict(self.network.state_dict())

    @torch.no_grad()
    def _collect_features(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return features (N, 2048) and labels (N,) of all training images, on every worker."""
        plan = replace(
            self._plan_stream(),
            train_indices=self.setup.train_indices[:0],
            val_indices=np.sort(self.setup.train_indices),
            epoch_sizes_px=self.config.list_epoch_sizes()[:1],
            preprocessing=replace(
                self.config.preprocessing, size_px=self.config.list_epoch_sizes()[0]
            ),
            start_epoch=0,
            row_groups=None,
        )
        self.network.eval()
        indices, features = [], []
        for batch in iterate_batches(self._open_shard(plan), plan, self.rank):
            if len(batch.indices):
                with self._autocast():
                    found = compute_features(self.network, self._to_input(batch))
                features.append(found.float().cpu().numpy())
                indices.append(batch.indices)
        part = (
            np.concatenate(indices or [np.zeros(0, np.int64)]),
            np.concatenate(features or [np.zeros((0, NUM_FEATURES), np.float32)]),
        )
        parts: list[Any] = [part]
        if self.world_size > 1:
            parts = [None] * self.world_size
            dist.all_gather_object(parts, part)
        seen = np.concatenate([p[0] for p in parts])
        order = np.argsort(seen)
        gathered = np.concatenate([p[1] for p in parts])[order]
        labels = self.labels[seen[order]]
        return torch.from_numpy(gathered).to(self.device), labels.to(self.device)
