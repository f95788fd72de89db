"""Batches of training images for one worker: from pixels in memory, or streamed by Ray Data.

Both loaders yield uint8 images and have the same interface.

* :class:`ResidentLoader`, if the pixels fit: every image is decoded once, before training, and
  stays in the object store of each node or in the GPU's memory. An epoch's order is a permutation
  that depends on the seed and the epoch alone. So the global batch of a step has the same images
  on any number of workers, and after a resume.
* :class:`StreamLoader`, if they do not fit: Ray Data decodes every image again in each epoch. Its
  order is reproducible for a seed and a number of workers, but not after a resume, because Ray
  Data counts epochs from its own start.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import ray
import ray.data
import ray.train
import torch
from numpy.typing import NDArray
from ray.data import DataIterator, Dataset, RandomSeedConfig

from brainray.cluster import TASK_CPUS
from brainray.data.read import open_rows
from brainray.data.scan_store import ScanStore
from brainray.errors import ConfigError, TrainingError
from brainray.images.preprocess import Preprocessing
from brainray.images.slices import ReadOptions, open_slice
from brainray.training.config import LoaderName

Indices = NDArray[np.int64]

TRAIN_DATASET = "train"
"""Name of the streamed dataset in Ray Train."""

GPU_MEMORY_SHARE = 0.25
"""Pixels are copied to the GPU if they need at most this share of its free memory."""

BLOCK_ROWS = 256
"""Images that one task decodes."""

SHUFFLE_BLOCKS = 8
"""Blocks in a worker's shuffle buffer."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One worker's share of a step's global batch."""

    images: torch.Tensor
    """uint8, shape (n, size_px, size_px)."""
    labels: torch.Tensor
    """int64, shape (n,)."""
    image_ids: Indices
    """Sample numbers, shape (n,)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderSetup:
    """What a loader reads; the same for all workers."""

    kind: Literal["resident", "stream"]
    train_ids: Indices
    val_ids: Indices
    labels: Indices
    """Class of every sample of the data set, by sample number."""
    store: ScanStore
    preprocessing: Preprocessing
    global_batch_size: int
    seed: int
    num_tasks: int = 1
    """Concurrent decoding tasks of the stream."""


def choose_loader(
    asked: LoaderName, store: ScanStore, preprocessing: Preprocessing
) -> Literal["resident", "stream"]:
    """Choose the loader; raise ConfigError if `resident` is requested and the pixels do not fit."""
    fits = store.holds_pixels(preprocessing)
    if asked == "resident" and not fits:
        raise ConfigError(
            f"--loader resident: the pixels at {preprocessing.size_px} px do not fit the object "
            "store of the smallest node. Give nodes more memory, lower --preprocessing.size-px, or "
            "use --loader auto or stream."
        )
    return "resident" if fits and asked != "stream" else "stream"


def share_of(rank: int, world_size: int, num_images: int) -> slice:
    """Return a worker's slice of a global batch; slices differ by at most one image."""
    base, extra = divmod(num_images, world_size)
    start = rank * base + min(rank, extra)
    return slice(start, start + base + (rank < extra))


class Loader(ABC):
    """Yields one worker's share of the images."""

    global_batch_size: int
    """Images of one step, over all workers."""
    steps_per_epoch: int
    """Steps of one epoch; an incomplete last step is dropped."""

    def __init__(
        self, setup: LoaderSetup, rank: int, world_size: int, device: torch.device
    ) -> None:
        self._setup, self._rank, self._world_size, self._device = setup, rank, world_size, device
        self._labels = torch.tensor(setup.labels)

    @abstractmethod
    def iterate_epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield an epoch's batches in random order, one for each step."""

    @abstractmethod
    def iterate_once(self, image_ids: Indices) -> Iterator[Batch]:
        """Yield each image once, divided among the workers; the last batch may be shorter."""

    def _to_device(self, images: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cuda":
            return images.pin_memory().to(self._device, non_blocking=True)
        return images


class ResidentLoader(Loader):
    """Takes batches from pixels in the node's object store or in the GPU's memory."""

    def __init__(
        self, setup: LoaderSetup, rank: int, world_size: int, device: torch.device
    ) -> None:
        super().__init__(setup, rank, world_size, device)
        self.global_batch_size = min(setup.global_batch_size, len(setup.train_ids))
        self.steps_per_epoch = len(setup.train_ids) // self.global_batch_size
        self._ids = np.concatenate([setup.train_ids, setup.val_ids])
        self._pixels = setup.store.open_pixels(setup.preprocessing, self._ids.tolist())
        self._on_gpu = self._copy_to_gpu() if device.type == "cuda" else None

    def iterate_epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield this worker's slice of each global batch of an epoch's permutation."""
        order = np.random.default_rng([self._setup.seed, epoch]).permutation(self._setup.train_ids)
        share = share_of(self._rank, self._world_size, self.global_batch_size)
        for step in range(self.steps_per_epoch):
            start = step * self.global_batch_size
            yield self._load(order[start : start + self.global_batch_size][share])

    def iterate_once(self, image_ids: Indices) -> Iterator[Batch]:
        """Yield each image once."""
        share = image_ids[share_of(self._rank, self._world_size, len(image_ids))]
        size = -(-self.global_batch_size // self._world_size)
        for start in range(0, len(share), size):
            yield self._load(share[start : start + size])

    def _load(self, image_ids: Indices) -> Batch:
        labels = self._labels[image_ids].to(self._device)
        if self._on_gpu is None:
            images = self._to_device(torch.from_numpy(self._pixels.take(image_ids)))
        else:
            rows = np.searchsorted(self._ids, image_ids)
            images = self._on_gpu[torch.from_numpy(rows).to(self._device)]
        return Batch(images, labels, image_ids)

    def _copy_to_gpu(self) -> torch.Tensor | None:
        """Copy all pixels to the GPU, ordered by sample number, if they fit."""
        num_bytes = len(self._ids) * self._setup.preprocessing.size_px**2
        if num_bytes > GPU_MEMORY_SHARE * torch.cuda.mem_get_info(self._device)[0]:
            return None
        self._ids.sort()
        parts = np.array_split(self._ids, -(-len(self._ids) // 1024))
        return torch.cat([torch.from_numpy(self._pixels.take(p)).to(self._device) for p in parts])


class StreamLoader(Loader):
    """Reads batches from a Ray Dataset that decodes images while the network trains.

    Ray Train splits the training dataset equally among the workers and drops the remainder.
    Images that must be read exactly once therefore come from a dataset of each worker's own.
    """

    def __init__(
        self, setup: LoaderSetup, rank: int, world_size: int, device: torch.device
    ) -> None:
        super().__init__(setup, rank, world_size, device)
        # Otherwise batches arrive in the order in which threads finish them.
        ray.data.DataContext.get_current().execution_options.preserve_order = True
        images_of_worker = len(setup.train_ids) // world_size
        self._batch_size = min(max(1, setup.global_batch_size // world_size), images_of_worker)
        self.global_batch_size = self._batch_size * world_size
        self.steps_per_epoch = images_of_worker // max(1, self._batch_size)

    def iterate_epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield this worker's batches, from blocks in random order through a shuffle buffer."""
        shuffle_seed = np.random.SeedSequence([self._setup.seed, epoch, self._rank])
        batches = self._iterate(
            ray.train.get_dataset_shard(TRAIN_DATASET),
            drop_last=True,
            local_shuffle_buffer_size=SHUFFLE_BLOCKS * BLOCK_ROWS,
            local_shuffle_seed=int(shuffle_seed.generate_state(1)[0]),
        )
        num_batches = 0
        for batch in batches:
            num_batches += 1
            yield batch
        if num_batches != self.steps_per_epoch:
            raise TrainingError(
                f"Expected {self.steps_per_epoch} batches of worker {self._rank} in epoch "
                f"{epoch + 1}, got {num_batches} from Ray Data."
            )

    def iterate_once(self, image_ids: Indices) -> Iterator[Batch]:
        """Yield each image once; this worker decodes its share as a dataset of its own."""
        share = image_ids[share_of(self._rank, self._world_size, len(image_ids))]
        if len(share):
            # from_arrow would start tasks that need a whole CPU; the workers may hold them all.
            blocks = ray.data.from_blocks(list_blocks(self._setup, share))
            yield from self._iterate(_decode(blocks, self._setup, self._world_size).iterator())

    def _iterate(self, source: DataIterator, **options: Any) -> Iterator[Batch]:  # noqa: ANN401 - Ray's
        for rows in source.iter_torch_batches(
            batch_size=self._batch_size, prefetch_batches=2, device="cpu", **options
        ):
            labels = self._labels[rows["index"]].to(self._device)
            yield Batch(self._to_device(rows["image"]), labels, rows["index"].numpy())


def build_train_dataset(setup: LoaderSetup) -> Dataset:
    """Build the dataset of the training images; the order of its blocks changes in each epoch.

    Image files are listed class by class. They are shuffled once, before they are cut into blocks.
    """
    order = np.random.default_rng(setup.seed).permutation(setup.train_ids)
    blocks: Dataset = ray.data.from_blocks(list_blocks(setup, order))
    return _decode(blocks.randomize_block_order(seed=RandomSeedConfig(seed=setup.seed)), setup)


def build_data_config() -> ray.train.DataConfig:
    """Return options that make the order of the stream depend on its seeds alone.

    See Ray Train's guide "Data Loading and Preprocessing", section "Enabling reproducibility".
    """
    options = ray.train.DataConfig.default_ingest_options()
    options.preserve_order = True
    return ray.train.DataConfig(execution_options=options)


def list_blocks(setup: LoaderSetup, image_ids: Indices) -> list[pa.Table]:
    """Cut samples into blocks, each read and decoded by one task.

    Image files keep the given order. Rows of one row group of a Parquet file, and slices of one
    file, go into the same blocks, because they are read together.
    """
    samples: pa.Table = ray.get(setup.store.samples)
    rows = samples.select(["uri", "row_group", "row", "frame"]).take(image_ids)
    rows = rows.append_column("index", pa.array(image_ids))
    uris, row_groups = rows["uri"].to_numpy(), rows["row_group"].to_numpy()
    _, numbers = np.unique(uris.astype(str), return_inverse=True)
    is_alone = (row_groups < 0) & (rows["frame"].to_numpy() < 0)
    keys = np.where(is_alone, -1, numbers * (row_groups.max(initial=0) + 2) + row_groups + 1)
    parts = [np.flatnonzero(keys == key) for key in np.unique(keys)]
    return [
        rows.take(part[start : start + BLOCK_ROWS])
        for part in parts
        for start in range(0, len(part), BLOCK_ROWS)
    ]


def _decode(blocks: Dataset, setup: LoaderSetup, num_parts: int = 1) -> Dataset:
    """Read, decode and preprocess samples, with one of ``num_parts`` shares of the tasks."""
    return blocks.map_batches(
        _decode_batch,  # type: ignore[arg-type]  # Ray's hint knows no fn_kwargs
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={"preprocessing": setup.preprocessing, "reading": setup.store.reading},
        num_cpus=TASK_CPUS,
        compute=ray.data.TaskPoolStrategy(size=-(-setup.num_tasks // num_parts)),
    )


def _decode_batch(
    batch: pa.Table, *, preprocessing: Preprocessing, reading: ReadOptions
) -> dict[str, NDArray[Any]]:
    opened = open_rows(batch, reading)
    images = [open_slice(file, index, preprocessing).scan.image for file, index in opened]
    return {"index": batch["index"].to_numpy(), "image": np.stack(images)}
