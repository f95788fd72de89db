"""Bulk throughput: this job against its own ceiling and against the loops most people write.

    python benchmarks/classify_throughput.py --scans-uri FOLDER

Four sides take turns within one run, each in a process of its own:

* ``job``: the bulk job, image files to Parquet. Counted are the scans after the first chunk,
  from the first chunk's answer to the last one's (once warm); the whole run is printed too.
* ``ceiling``: the same backend on images that are decoded, resized and in memory.
* ``plain``: Pillow, torchvision transforms, a DataLoader, the network in eager fp32.
* ``timm``: the loop of timm's inference.py: channels-last, bf16 autocast, a DataLoader.

All have the same machine, network, weights, size and images; rates are images/s. With
``--use-gpu`` all sides compute on it; give them large batches, and loader workers to feed it. With
``--explain``, the job's turns alternate with those of ``explained`` instead, the job with the
class maps of its answers.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import tyro
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from brainray.labels import BRAIN_TUMOUR_CLASSES
from brainray.model.classifier import load_classifier, save_classifier
from brainray.model.network import build_network
from brainray.inference.engine import EngineOptions, open_engine
from brainray.pixels.decode import DecodeLimits
from brainray.pixels.preprocess import Preprocessing, load_image

SIDES = ("job", "ceiling", "plain", "timm")
EXPLAIN_SIDES = ("job", "explained")
SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is compared, and how often."""

    scans_uri: str
    """Local folder of scans."""
    classifier_uri: str | None = None
    """A sealed classifier; random weights at 224 px if not given, which are as fast."""
    num_images: int = 2048
    """Scans of a turn of the job; the folder's are linked again and again."""
    num_loop_images: int = 512
    """Images of a turn of the other sides: enough for a rate, in less time."""
    batch_size: int = 32
    """Images of one forward pass."""
    loader_workers: int = 2
    """DataLoader processes of the plain and the timm side."""
    rounds: int = 5
    """Turns of each side."""
    use_gpu: bool = False
    """Compute on a GPU."""
    explain: bool = False
    """Compare the job with itself when it explains its answers."""
    side: Literal["all", "job", "ceiling", "plain", "timm", "explained"] = "all"
    """`all` compares; the others run one turn of one side."""


def list_images(options: Options, count: int) -> list[Path]:
    """Take so many images, from the start again when there are too few."""
    found = sorted(p for p in Path(options.scans_uri).rglob("*") if p.suffix.lower() in SUFFIXES)
    found = found[:: max(1, len(found) // count)]  # spread over the classes
    return list(islice(cycle(found), count))


class ImageFiles(Dataset[tuple[torch.Tensor, str]]):
    """Image files, opened and resized one by one."""

    def __init__(self, files: list[Path], preprocessing: Preprocessing) -> None:
        side = preprocessing.size_px
        self._files = files
        self._transform = v2.Compose(
            [
                v2.Resize((side, side)),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize([preprocessing.mean], [preprocessing.std]),
            ]
        )

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        with Image.open(self._files[index]) as image:
            return self._transform(image.convert("L")), str(self._files[index])


def run_loop(options: Options, classifier_uri: str, *, like_timm: bool) -> float:
    """Run a turn of a hand-written loop, files to Parquet, and return images/s once warm."""
    device = torch.device("cuda" if options.use_gpu else "cpu")
    classifier = load_classifier(classifier_uri)
    network = classifier.network.to(device).to(memory_format=torch.contiguous_format)
    if like_timm:
        network = network.to(memory_format=torch.channels_last)
    files = list_images(options, options.num_loop_images + options.batch_size)
    loader = DataLoader(
        ImageFiles(files, classifier.preprocessing),
        batch_size=options.batch_size,
        num_workers=options.loader_workers,
        pin_memory=options.use_gpu,
    )
    probs, names, started = [], [], 0.0
    with torch.inference_mode():
        for number, (images, paths) in enumerate(loader):
            inputs = images.to(device, non_blocking=True)
            if like_timm:
                inputs = inputs.contiguous(memory_format=torch.channels_last)
                with torch.autocast(device.type, dtype=torch.bfloat16):
                    logits = network(inputs)
            else:
                logits = network(inputs)
            probs.append(logits.float().softmax(1).cpu().numpy())
            names += paths
            if number == 0:
                started = time.perf_counter()
    table = pa.table({"scan_uri": names, "prob": list(np.concatenate(probs))})
    with tempfile.TemporaryDirectory() as folder:
        pq.write_table(table, Path(folder) / "predictions.parquet")
    return options.num_loop_images / (time.perf_counter() - started)


def run_ceiling(options: Options, classifier_uri: str) -> float:
    """Run the network alone and return images/s."""
    classifier = load_classifier(classifier_uri)
    runtime = open_engine(classifier, EngineOptions(use_gpu=options.use_gpu))
    files = list_images(options, options.num_loop_images)
    images = np.stack(
        [load_image(p.read_bytes(), classifier.preprocessing, DecodeLimits()) for p in files]
    )
    runtime.predict_probs(images[: options.batch_size])
    started = time.perf_counter()
    runtime.predict_probs(images)
    return len(images) / (time.perf_counter() - started)


def run_job(options: Options, classifier_uri: str, *, explain: bool = False) -> tuple[float, float]:
    """Run the bulk job and return images/s once warm, and with the start."""
    from brainray.pipelines.classify import ClassifyJob, classify

    with tempfile.TemporaryDirectory() as folder:
        inbox = Path(folder) / "inbox"
        inbox.mkdir()
        for number, file in enumerate(list_images(options, options.num_images)):
            (inbox / f"{number:06d}{file.suffix}").symlink_to(file.absolute())
        job = ClassifyJob(
            scans_uri=(str(inbox),),
            classifier_uri=classifier_uri,
            output_uri=str(Path(folder) / "out"),
            explain=explain,
            use_gpu=options.use_gpu,
        )
        run = classify(job)["run"]
    print({name: run[name] for name in ("stages_s", "stages_busy", "bottleneck")}, file=sys.stderr)
    return run["images_per_s_warm"], run["images_per_s"]


def measure(side: str, classifier_uri: str) -> list[float]:
    """Run one turn of a side in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
    if "--classifier-uri" not in " ".join(sys.argv):
        command += ["--classifier-uri", classifier_uri]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [float(word) for word in output.strip().splitlines()[-1].split()]


def seal_random(folder: Path) -> str:
    """Seal a classifier with random weights."""
    torch.manual_seed(0)
    save_classifier(
        str(folder),
        build_network(len(BRAIN_TUMOUR_CLASSES)).state_dict(),
        classes=BRAIN_TUMOUR_CLASSES,
        preprocessing=Preprocessing(),
        provenance={},
    )
    return str(folder)


def compare(options: Options, classifier_uri: str) -> None:
    """Let the sides take turns; print every turn, the medians and the ratios."""
    sides = EXPLAIN_SIDES if options.explain else SIDES
    rates: dict[str, list[float]] = {side: [] for side in (*sides, "whole")}
    for turn in range(options.rounds):
        for side in sides if turn % 2 == 0 else sides[::-1]:
            warm, *whole = measure(side, classifier_uri)
            rates[side].append(warm)
            rates["whole"] += whole
        latest = "  ".join(f"{side} {rates[side][-1]:6.1f}" for side in rates)
        print(f"round {turn + 1}  {latest}  images/s", flush=True)
    middle = "  ".join(f"{side} {statistics.median(values):6.1f}" for side, values in rates.items())
    print(f"median   {middle}  images/s")
    for other in sides[1:]:
        ratios = [a / b for a, b in zip(rates["job"], rates[other], strict=True)]
        print(
            f"job / {other:<8} {statistics.median(ratios):6.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f})"
        )


def main(options: Options) -> None:
    """Compare, or run one turn of one side."""
    with tempfile.TemporaryDirectory() as folder:
        uri = options.classifier_uri or seal_random(Path(folder) / "classifier")
        turns: dict[str, Callable[[], tuple[float, ...]]] = {
            "job": lambda: run_job(options, uri),
            "explained": lambda: run_job(options, uri, explain=True)[:1],
            "ceiling": lambda: (run_ceiling(options, uri),),
            "plain": lambda: (run_loop(options, uri, like_timm=False),),
            "timm": lambda: (run_loop(options, uri, like_timm=True),),
        }
        if options.side == "all":
            compare(options, uri)
        else:
            print(*turns[options.side]())


if __name__ == "__main__":
    main(tyro.cli(Options))
