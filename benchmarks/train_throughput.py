"""Training throughput: this pipeline against plain PyTorch DDP with a DataLoader.

    python benchmarks/train_throughput.py --data-uri FOLDER

Both sides train the same network on the same images at the same size, batch, dtype and
number of workers, with the same optimiser, the same augmentations (torchvision's own on the
plain side) and the same allocator. The sides take turns within one run, each in processes
of its own, so that neither pays for the other. Counted are the training steps of whole
epochs after a first one, waiting for data included; start-up and validation are not. The
DataLoader and the stream begin each epoch anew within the counted time.
``brainray`` keeps the pixels in the object store; ``stream`` is the same training with images that
Ray Data decodes in each epoch. Beside them stands the ceiling: the same steps on one batch that is
in memory already, with no augmentation and no data to wait for; it is of one worker.

With ``--use-gpu``, the share of the time from the first counted step to the last in which the
GPU was busy is printed too, as nvidia-smi samples it: all of it where a single kernel always runs,
however small. For this pipeline, validating and saving lie within it.
"""

import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
import tyro
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

from brainray import runlog
from brainray.images.preprocess import Preprocessing
from brainray.model.network import build_network
from brainray.training.config import ScalingOptions, TrainConfig
from brainray.training.optim import Optimisation

LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.05
CLIP_NORM = 1.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is compared, and how often."""

    data_uri: str
    """Local folder in the Kaggle layout (Training/<class>/*)."""
    size_px: int = 96
    """Side of the training images."""
    global_batch_size: int = 64
    """Images of one step, over all workers."""
    num_workers: int = 2
    """Data-parallel workers on each side."""
    loader_workers: int = 1
    """DataLoader processes of each plain worker."""
    num_images: int = 2560
    """Images of an epoch; in a short one the upload of its checkpoint weighs too much."""
    num_epochs: int = 1
    """Epochs counted, after one that is not."""
    rounds: int = 5
    """Turns of each side."""
    use_gpu: bool = False
    """Train on a GPU for each worker."""
    side: Literal["all", "brainray", "stream", "plain", "ceiling"] = "all"
    """`all` compares; the others run one turn of one side and print images/s."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What came of one turn of one side."""

    images_per_s: float
    started: float
    """Unix time of the first step counted."""
    finished: float
    """Of the last."""


def list_images(options: Options) -> list[tuple[Path, int]]:
    """Take the same number of images of every class."""
    root = Path(options.data_uri) / "Training"
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    per_class = options.num_images // len(folders)
    return [
        (path, label)
        for label, folder in enumerate(folders)
        for path in sorted(folder.iterdir())[:per_class]
    ]


class ImageFiles(Dataset[tuple[torch.Tensor, int]]):
    """Image files, opened, resized and augmented one by one, as torchvision's guides do."""

    def __init__(self, files: list[tuple[Path, int]], size_px: int) -> None:
        mean, std = Preprocessing().mean, Preprocessing().std
        self._files = files
        self._transform = v2.Compose(
            [
                v2.Resize((size_px, size_px)),
                v2.RandomAffine(
                    degrees=15,
                    translate=(0.08, 0.08),
                    scale=(1 / 1.15, 1.15),
                    interpolation=v2.InterpolationMode.BILINEAR,
                ),
                v2.RandomHorizontalFlip(),
                v2.ColorJitter(brightness=0.1, contrast=0.2),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize([mean], [std]),
            ]
        )

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, label = self._files[index]
        with Image.open(path) as image:
            return self._transform(image.convert("L")), label


class Trainer:
    """The network, its optimiser and the step of those sides that are not this pipeline."""

    def __init__(self, options: Options, rank: int = 0) -> None:
        self.device = torch.device("cuda", rank) if options.use_gpu else torch.device("cpu")
        torch.backends.cudnn.benchmark = True
        network = build_network(4).to(self.device).to(memory_format=torch.channels_last)
        self.model = (
            nn.parallel.DistributedDataParallel(network, gradient_as_bucket_view=True)
            if dist.is_initialized()
            else network
        )
        self.optimizer = torch.optim.AdamW(
            network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
        )

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """Take one step in bf16 autocast."""
        inputs = images.to(self.device, memory_format=torch.channels_last, non_blocking=True)
        targets = labels.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            loss = F.cross_entropy(self.model(inputs), targets)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        self.optimizer.step()

    def wait(self) -> float:
        """Wait until what was begun is done, and return the Unix time."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.time()


def train_plainly(rank: int, options: Options, port: int, results: "mp.Queue[Turn]") -> None:
    """Train as most write it; rank 0 puts what came of it into the queue."""
    world_size = options.num_workers
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    backend = "nccl" if options.use_gpu else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=world_size)
    dataset = ImageFiles(list_images(options), options.size_px)
    sampler: DistributedSampler[tuple[torch.Tensor, int]] = DistributedSampler(dataset)
    loader = DataLoader(
        dataset,
        batch_size=options.global_batch_size // world_size,
        sampler=sampler,
        num_workers=options.loader_workers,
        persistent_workers=True,
        pin_memory=options.use_gpu,
        drop_last=True,
    )
    trainer = Trainer(options, rank)
    seen, started = 0, 0.0
    for epoch in range(options.num_epochs + 1):
        sampler.set_epoch(epoch)
        if epoch == 1:
            started = trainer.wait()
        for images, labels in loader:
            trainer.step(images, labels)
            seen += (epoch > 0) * len(labels) * world_size
    finished = trainer.wait()
    if rank == 0:
        results.put(Turn(seen / (finished - started), started, finished))
    dist.destroy_process_group()


def run_plain(options: Options) -> Turn:
    """Run one turn of plain PyTorch."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.Queue()
    workers = [
        context.Process(target=train_plainly, args=(rank, options, port, results))
        for rank in range(options.num_workers)
    ]
    for worker in workers:
        worker.start()
    turn: Turn = results.get()
    for worker in workers:
        worker.join()
    return turn


def run_ceiling(options: Options) -> Turn:
    """Run one turn of the steps alone."""
    batch_size = options.global_batch_size // options.num_workers
    trainer = Trainer(options)
    images = torch.randn(batch_size, 1, options.size_px, options.size_px, device=trainer.device)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(0, 4, (batch_size,), device=trainer.device)
    num_steps = options.num_epochs * options.num_images // options.global_batch_size
    for _ in range(max(3, num_steps // 4)):
        trainer.step(images, labels)
    started = trainer.wait()
    for _ in range(num_steps):
        trainer.step(images, labels)
    finished = trainer.wait()
    return Turn(num_steps * batch_size / (finished - started), started, finished)


def run_brainray(options: Options, loader: Literal["resident", "stream"] = "resident") -> Turn:
    """Run one turn of this pipeline."""
    import ray

    from brainray.cluster import connect_ray
    from brainray.data.labelled import find_samples
    from brainray.training.fit import fit
    from brainray.training.run import TrainJob, group_training_data, split_training_data

    config = TrainConfig(
        weights="none",
        preprocessing=Preprocessing(size_px=options.size_px),
        num_epochs=options.num_epochs + 1,
        precision="bf16",  # as the plain side
        global_batch_size=options.global_batch_size,
        optimisation=Optimisation(
            learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY, clip_norm=CLIP_NORM
        ),
    )
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for path, label in list_images(options):
            place = root / "train" / config.classes[label] / path.name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(path.absolute())
        # A second, small folder to validate on: every image above is trained on.
        for label, name in enumerate(config.classes):
            place = root / "val" / name / "one.jpg"
            place.parent.mkdir(parents=True)
            place.symlink_to(next(p for p, k in list_images(options) if k == label).absolute())
        job = TrainJob(
            data_uri=str(root),
            output_uri=str(root / "out"),
            config=config,
            scaling=ScalingOptions(
                num_workers=options.num_workers, use_gpu=options.use_gpu, loader=loader
            ),
        )
        connect_ray()
        found = find_samples(job.data_uri, config.classes)
        data = split_training_data(group_training_data(found, config, loader), config)
        fit(job, data, None, lambda _: None, lambda _: None)
        records = runlog.read_records(job.at("metrics.jsonl"))
        ray.shutdown()
    counted = records[1:]
    seconds = sum(record["num_train_images"] / record["images_per_s"] for record in counted)
    seen = sum(record["num_train_images"] for record in counted)
    return Turn(seen / seconds, records[0]["unix_time_s"], records[-1]["unix_time_s"])


@contextmanager
def watch_gpu(*, used: bool) -> Iterator[list[tuple[float, float]]]:
    """Gather Unix times and the share, 0 to 1, in which the GPU was busy just before."""
    samples: list[tuple[float, float]] = []
    if not used:
        yield samples
        return
    query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    with subprocess.Popen([*query, "-lms", "100"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = process.stdout

        def read() -> None:
            for line in lines:
                samples.append((time.time(), float(line) / 100))

        thread = threading.Thread(target=read)
        thread.start()
        yield samples
        process.terminate()
        thread.join()


def measure(side: str, options: Options) -> tuple[float, float]:
    """Run one turn of a side in a process of its own; return images/s and how busy the GPU was."""
    command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
    with watch_gpu(used=options.use_gpu) as samples:
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    turn = Turn(*map(float, output.strip().splitlines()[-1].split()))
    busy = [share for when, share in samples if turn.started < when < turn.finished]
    return turn.images_per_s, statistics.mean(busy or [math.nan])


def count_flops(size_px: int) -> int:
    """Return the floating-point operations of one image's step: multiply and add are two."""
    network = build_network(4)
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(2, 1, size_px, size_px)).sum().backward()
    return int(counter.get_total_flops()) // 2


def compare(options: Options) -> None:
    """Let the sides take turns, and print every turn, the medians and the ratios."""
    sides = ("brainray", "stream", "plain", "ceiling")
    rates: dict[str, list[float]] = {side: [] for side in sides}
    shares: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(options.rounds):
        for side in sides if turn % 2 == 0 else sides[::-1]:
            rate, busy = measure(side, options)
            rates[side].append(rate)
            shares[side].append(busy)
        latest = "  ".join(f"{side} {rates[side][-1]:6.1f}" for side in sides)
        print(f"round {turn + 1}  {latest}  images/s", flush=True)
    flops = count_flops(options.size_px)
    for side in sides:
        rate = statistics.median(rates[side])
        busy = statistics.median(shares[side])
        print(
            f"{side:<8} {rate:6.1f} images/s, {rate * flops / 1e12:.2f} TFLOP/s"
            + f", GPU busy {busy:.0%} of the time" * options.use_gpu
        )
    for other in sides[1:]:
        ratios = [a / b for a, b in zip(rates["brainray"], rates[other], strict=True)]
        print(
            f"brainray / {other:<8} {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f})"
        )


if __name__ == "__main__":
    chosen = tyro.cli(Options)
    turns: dict[str, Callable[[Options], Turn]] = {
        "brainray": run_brainray,
        "stream": partial(run_brainray, loader="stream"),
        "plain": run_plain,
        "ceiling": run_ceiling,
    }
    if chosen.side == "all":
        compare(chosen)
    else:
        print(*astuple(turns[chosen.side](chosen)))
