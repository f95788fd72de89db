"""Stream decoded batches to the training workers by Ray Data.

One stream carries everything that is left of a run: each epoch's training images in that
epoch's order and size, then the validation images, and so on. It is a Ray Data pipeline
whose tasks each decode a stretch of one worker's batches, in order, and which
``streaming_split`` deals out in turn. So:

* the global batch of a step is the same images whatever the number of workers;
* an order depends on the seed and the epoch alone, also after a resume;
* the next epoch is being decoded while this one still computes;
* no image is dropped or seen twice in an epoch, but for the training images that do not
  fill a last batch, which differ from epoch to epoch.

Why not ``ray.train.get_dataset_shard``: it repeats one plan every epoch, so it can neither
start at a resumed epoch's order nor change the size of the images between epochs.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import ray.data
from numpy.typing import NDArray
from ray.data import DataContext, DataIterator, Dataset, ExecutionResources
from ray.data._internal.execution.execution_callback import ExecutionCallback

from brainray.data.scan import ScanStore
from brainray.errors import TrainingError
from brainray.images.decode import DecodeLimits
from brainray.images.preprocess import Preprocessing

CHUNK_BYTES = 8 * 2**20
"""Decoded pixels of one task: some 900 images at 96 px, 170 at 224 px; Ray's cost per task
(a few milliseconds) is then small beside the decoding."""

LOOP_PAUSE_S = 0.2
"""Pause between two looks of Ray Data's scheduling loop: a few percent of a core instead of
most of one. A look deals out everything that is ready, so a chunk waits at most this long."""

TASK_CPUS = 0.01
"""Logical CPUs of a task that reads and decodes. How many run at a time is said beside; asking for
whole ones, they would wait for ever where training workers or predictors hold part of each node."""

MIN_CHUNKS_PER_WORKER, MAX_CHUNKS_PER_WORKER = 3, 15
"""Chunks of each worker that may wait in the object store: one in use and two ahead; more where
more tasks decode for it, as each needs room for what it makes."""

SHUFFLE_WINDOW_ROW_GROUPS = 8
"""Row groups mixed together when Parquet rows are streamed from storage."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamPlan:
    """What a training run still has to read, and in what order."""

    train_indices: NDArray[np.int64]
    """Sample numbers to train on."""
    val_indices: NDArray[np.int64]
    """Sample numbers to validate on."""
    epoch_sizes_px: tuple[int, ...]
    """Side of the training images, for every epoch of the run."""
    start_epoch: int
    """First epoch to deliver, from 0."""
    global_batch_size: int
    """Images of one step, over all workers."""
    world_size: int
    """Number of workers."""
    seed: int
    """Seeds every epoch's order."""
    preprocessing: Preprocessing
    """Gives the validation size and how an image is fitted to its square."""
    limits: DecodeLimits
    """What is too large to open."""
    row_groups: NDArray[np.int64] | None = None
    """Number of each training image's row group, when rows are streamed from Parquet."""
    start_step: int = 0
    """First training step of the first epoch to deliver, from 0."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of one epoch."""
        return len(self.train_indices) // self.global_batch_size

    @property
    def num_val_steps(self) -> int:
        """Steps that show every validation image once; the last may be short."""
        return -(-len(self.val_indices) // self.global_batch_size)

    @property
    def batch_size_per_worker(self) -> int:
        """Rows of a worker's batch; the last workers' may hold one image fewer."""
        return -(-self.global_batch_size // self.world_size)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A stretch of batches of one kind, before it is dealt out to the workers."""

    kind: Literal["train", "val"]
    epoch: int
    start: int
    stop: int
    size_px: int


@dataclass(frozen=True, slots=True)
class LoadedBatch:
    """One worker's share of one step."""

    kind: Literal["train", "val"]
    epoch: int
    images: NDArray[np.uint8]
    """Shape (n, size, size)."""
    indices: NDArray[np.int64]
    """Sample numbers, shape (n,); padding is gone."""
    offset: int
    """Place of this share's first image within the global batch."""


def list_chunks(plan: StreamPlan) -> list[Chunk]:
    """List the stretches of the run that is left, in order."""
    chunks = []
    for epoch in range(plan.start_epoch, len(plan.epoch_sizes_px)):
        start_step = plan.start_step if epoch == plan.start_epoch else 0
        for kind, first, steps, size_px in (
            ("train", start_step, plan.steps_per_epoch, plan.epoch_sizes_px[epoch]),
            ("val", 0, plan.num_val_steps, plan.preprocessing.size_px),
        ):
            stride = max(1, CHUNK_BYTES // (plan.batch_size_per_worker * size_px**2))
            chunks += [
                Chunk(kind, epoch, start, min(start + stride, steps), size_px)  # type: ignore[arg-type]
                for start in range(first, steps, stride)
            ]
    return chunks


def shuffle_epoch(plan: StreamPlan, epoch: int) -> NDArray[np.int64]:
    """Return an epoch's order of the training images.

    Returns
    -------
    ndarray of int64, shape (number of training images,)
        Sample numbers. Rows streamed from Parquet are shuffled by row group, then within
        windows of :data:`SHUFFLE_WINDOW_ROW_GROUPS` of them, so that a task reads few.
    """
    rng = np.random.default_rng([plan.seed, epoch])
    if plan.row_groups is None:
        order: NDArray[np.int64] = rng.permutation(plan.train_indices)
        return order
    names = rng.permutation(np.unique(plan.row_groups))
    windows = [
        np.flatnonzero(np.isin(plan.row_groups, names[start : start + SHUFFLE_WINDOW_ROW_GROUPS]))
        for start in range(0, len(names), SHUFFLE_WINDOW_ROW_GROUPS)
    ]
    shuffled = np.concatenate([rng.permutation(window) for window in windows])
    return np.asarray(plan.train_indices[shuffled], dtype=np.int64)


def share_of(rank: int, world_size: int, num_images: int) -> tuple[int, int]:
    """Return the first and the last-but-one place of a worker's share of a global batch."""
    base, extra = divmod(num_images, world_size)
    start = rank * base + min(rank, extra)
    return start, start + base + (rank < extra)


def list_indices(plan: StreamPlan, chunk: Chunk, rank: int) -> NDArray[np.int64]:
    """Return the sample numbers of a worker's share of a chunk, a row for every step.

    Returns
    -------
    ndarray of int64, shape (steps, batch_size_per_worker)
        Padded with -1.
    """
    order = shuffle_epoch(plan, chunk.epoch) if chunk.kind == "train" else plan.val_indices
    shares = np.full((chunk.stop - chunk.start, plan.batch_size_per_worker), -1, np.int64)
    for row, step in enumerate(range(chunk.start, chunk.stop)):
        batch = order[step * plan.global_batch_size : (step + 1) * plan.global_batch_size]
        start, stop = share_of(rank, plan.world_size, len(batch))
        shares[row, : stop - start] = batch[start:stop]
    return shares


def _decode_chunk(
    batch: dict[str, NDArray[np.int64]], *, plan: StreamPlan, store: ScanStore
) -> dict[str, Any]:
    """Decode one worker's share of one chunk; runs as a Ray Data task."""
    ticket = int(batch["id"][0])
    number, rank = divmod(ticket, plan.world_size)
    chunk = list_chunks(plan)[number]
    indices = list_indices(plan, chunk, rank).reshape(-1)
    preprocessing = replace(plan.preprocessing, size_px=chunk.size_px)
    images = np.zeros((len(indices), chunk.size_px, chunk.size_px), np.uint8)
    real = np.flatnonzero(indices >= 0)
    images[real] = store.load_images(indices[real].tolist(), preprocessing, plan.limits)
    return {"ticket": np.full(len(indices), ticket), "index": indices, "image": images}


def pause_scheduling(context: DataContext, pause_s: float) -> None:
    """Let Ray Data's scheduling loop rest between two looks.

    While nothing runs because enough is decoded ahead, the loop of Ray 2.60 spins: it took
    most of a core from two that were training. Remove this when it no longer does.
    """

    class Pause(ExecutionCallback):
        def on_execution_step(self, executor: object) -> None:  # noqa: ARG002 - Ray's signature
            time.sleep(pause_s)

    context.custom_execution_callback_classes.append(Pause)


def count_off(count: int) -> Dataset:
    """Return the numbers from 0, each a block of its own, as the column ``id``.

    ``ray.data.range`` makes each block by a task. Where training workers hold all CPUs, Ray Data
    runs one task at a time and looks in between, upstream first: a run of 312 chunks for each of
    two workers had no batch after three minutes.
    """
    numbers: Dataset = ray.data.from_items(
        [{"id": number} for number in range(count)], override_num_blocks=max(1, count)
    )
    return numbers


def open_stream(plan: StreamPlan, store: ScanStore, *, num_tasks: int) -> list[DataIterator]:
    """Start the stream of a run and return every worker's end of it.

    Parameters
    ----------
    plan : StreamPlan
        What is left of the run.
    store : ScanStore
        Where the encoded bytes are.
    num_tasks : int
        Tasks that decode at a time: as many as there are CPUs that the training workers leave.
    """
    chunks = list_chunks(plan)
    tickets = len(chunks) * plan.world_size
    stream = count_off(tickets).map_batches(
        _decode_chunk,  # type: ignore[arg-type]  # Ray's hint knows no fn_kwargs
        batch_size=None,
        fn_kwargs={"plan": plan, "store": store},
        num_cpus=TASK_CPUS,
        compute=ray.data.TaskPoolStrategy(size=num_tasks),
    )
    pause_scheduling(stream.context, LOOP_PAUSE_S)
    options = stream.context.execution_options
    options.preserve_order = True
    tasks_per_worker = num_tasks // plan.world_size
    ahead = min(max(MIN_CHUNKS_PER_WORKER, tasks_per_worker), MAX_CHUNKS_PER_WORKER)
    largest = max((c.stop - c.start) * plan.batch_size_per_worker * c.size_px**2 for c in chunks)
    options.resource_limits = ExecutionResources.for_limits(
        object_store_memory=2 * ahead * plan.world_size * max(CHUNK_BYTES, largest),
    )
    return list(stream.streaming_split(plan.world_size, equal=False))


def iterate_batches(shard: DataIterator, plan: StreamPlan, rank: int) -> Iterator[LoadedBatch]:
    """Yield a worker's share of every step of the run that is left, in order.

    Raises
    ------
    TrainingError
        Ray Data dealt a chunk to the wrong worker, or out of order.
    """
    rows = iter(
        shard.iter_batches(
            batch_size=plan.batch_size_per_worker, prefetch_batches=2, batch_format="numpy"
        )
    )
    for number, chunk in enumerate(list_chunks(plan)):
        expected = number * plan.world_size + rank
        for step in range(chunk.start, chunk.stop):
            batch = next(rows)
            if not (batch["ticket"] == expected).all():
                raise TrainingError(
                    f"Expected part {expected} of the stream, got {batch['ticket'][0]}."
                )
            real = batch["index"] >= 0
            yield LoadedBatch(
                chunk.kind,
                chunk.epoch,
                batch["image"][real],
                batch["index"][real],
                share_of(rank, plan.world_size, _count_images(plan, chunk, step))[0],
            )


def _count_images(plan: StreamPlan, chunk: Chunk, step: int) -> int:
    total = len(plan.train_indices if chunk.kind == "train" else plan.val_indices)
    return min(plan.global_batch_size, total - step * plan.global_batch_size)
