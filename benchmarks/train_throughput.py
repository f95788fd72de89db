"""Training throughput: this pipeline against plain PyTorch DDP with a DataLoader.

    python benchmarks/train_throughput.py --data-uri FOLDER

Both sides train the same network on the same images at the same size, batch, dtype and
number of workers, with the same optimiser, the same augmentations (torchvision's own on the
plain side) and the same allocator. The sides take turns within one run, each in processes
of its own, so that neither pays for the other. Counted are the training steps of whole
epochs after a first one, waiting for data included; start-up and validation are not.
"""

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
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
from torchvision.transforms import v2

from brainray import runlog
from brainray.model.network import build_network
from brainray.pipelines.config import Placement, TrainConfig
from brainray.pipelines.optimisation import Optimisation
from brainray.pixels.preprocess import Preprocessing

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
    side: Literal["both", "brainray", "plain"] = "both"
    """`both` compares; the others run one turn of one side and print images/s."""


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


def train_plainly(rank: int, options: Options, port: int, results: "mp.Queue[float]") -> None:
    """Train as most write it; rank 0 puts images/s into the queue."""
    world_size = options.num_workers
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    dataset = ImageFiles(list_images(options), options.size_px)
    sampler: DistributedSampler[tuple[torch.Tensor, int]] = DistributedSampler(dataset)
    loader = DataLoader(
        dataset,
        batch_size=options.global_batch_size // world_size,
        sampler=sampler,
        num_workers=options.loader_workers,
        persistent_workers=True,
        drop_last=True,
    )
    network = build_network(4).to(memory_format=torch.channels_last)
    model = nn.parallel.DistributedDataParallel(network, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
    )
    seen, elapsed = 0, 0.0
    for epoch in range(options.num_epochs + 1):
        sampler.set_epoch(epoch)
        started = time.perf_counter()
        for images, labels in loader:
            inputs = images.contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.cross_entropy(model(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            optimizer.step()
            seen += (epoch > 0) * len(labels) * world_size
        elapsed += (epoch > 0) * (time.perf_counter() - started)
    if rank == 0:
        results.put(seen / elapsed)
    dist.destroy_process_group()


def run_plain(options: Options) -> float:
    """Run one turn of plain PyTorch and return images/s."""
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
    rate = float(results.get())
    for worker in workers:
        worker.join()
    return rate


def run_brainray(options: Options) -> float:
    """Run one turn of this pipeline and return images/s."""
    import ray

    from brainray.dataset.source import find_samples
    from brainray.pipelines.cluster import connect_ray
    from brainray.pipelines.data import prepare_training_data
    from brainray.pipelines.fit import fit
    from brainray.pipelines.run import TrainJob

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
            placement=Placement(num_workers=options.num_workers),
        )
        connect_ray()
        data = prepare_training_data(find_samples(job.data_uri, config.classes), config)
        fit(job, data, ray.put(None), lambda _: None, lambda _: None)
        records = runlog.read_records(job.at("metrics.jsonl"))
        ray.shutdown()
    counted = records[1:]
    seconds = sum(record["num_train_images"] / record["images_per_s"] for record in counted)
    return sum(record["num_train_images"] for record in counted) / seconds


def measure(side: str) -> float:
    """Run one turn of a side in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(output.strip().splitlines()[-1])


def compare(options: Options) -> None:
    """Let the sides take turns, and print every turn, the medians and the ratio."""
    rates: dict[str, list[float]] = {"brainray": [], "plain": []}
    for turn in range(options.rounds):
        for side in ("brainray", "plain") if turn % 2 == 0 else ("plain", "brainray"):
            rates[side].append(measure(side))
        ours, plain = rates["brainray"][-1], rates["plain"][-1]
        print(
            f"round {turn + 1}  brainray {ours:6.1f}  plain {plain:6.1f} images/s  "
            f"ratio {ours / plain:.3f}",
            flush=True,
        )
    ratios = [a / b for a, b in zip(rates["brainray"], rates["plain"], strict=True)]
    print(
        f"median   brainray {statistics.median(rates['brainray']):6.1f}  "
        f"plain {statistics.median(rates['plain']):6.1f} images/s  "
        f"ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
    )


if __name__ == "__main__":
    chosen = tyro.cli(Options)
    sides: dict[str, Callable[[Options], float]] = {"brainray": run_brainray, "plain": run_plain}
    if chosen.side == "both":
        compare(chosen)
    else:
        print(sides[chosen.side](chosen))
