"""Bulk throughput: this job against its own ceiling and against what one would use instead.

    python benchmarks/classify_throughput.py --scans-uri FOLDER

The sides take turns within one run, each in a process of its own:

* ``job``: the bulk job, image files to Parquet.
* ``ceiling``: the same engine on images that are decoded, resized and in memory.
* ``plain``: Pillow, torchvision transforms, a DataLoader, the network in eager fp32.
* ``timm``: the loop of timm's inference.py: channels-last, bf16 autocast, a DataLoader.
* ``ray``: the batch-inference example of Ray's documentation: ``read_images``, a transform in
  ``map``, an actor pool with eager torch in ``map_batches``, ``write_parquet``.
* ``daft``: Daft's way: ``from_glob_path``, its own download, decode and resize, a class with eager
  torch, ``write_parquet``. Daft 0.7 wants an older pyarrow: ``pip install --target FOLDER daft``,
  and give ``--daft-path FOLDER``; without it this side is left out.

The ready-made loops run what their documentation shows, with the eager network in fp32; with
``--bf16-loops`` under bf16 autocast and channels-last, as an expert would.

All have the same machine, network, weights, size and images; rates are images/s once warm: from the
first batch's end to the last one's. ``whole`` is the job with its start. With
``--use-gpu`` all sides compute on it; give them large batches, and loader workers to feed it. With
``--explain``, the job's turns alternate with those of ``explained`` instead, the job with class
maps.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import tyro
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from brainray.images.preprocess import Preprocessing
from brainray.images.slices import open_file, open_slice
from brainray.inference.engine import EngineOptions, open_engine
from brainray.labels import BRAIN_TUMOUR_CLASSES
from brainray.model.classifier import load_classifier, save_classifier
from brainray.model.network import build_network

SIDES = ("job", "ceiling", "plain", "timm", "ray")
EXPLAIN_SIDES = ("job", "explained")
SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is compared, and how often."""

    scans_uri: str
    """Local folder of scans."""
    classifier_uri: str | None = None
    """A classifier; random weights at 224 px if not given, which are as fast."""
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
    """Compare the job with itself with class maps."""
    daft_path: str | None = None
    """Folder that ``pip install --target FOLDER daft`` filled."""
    bf16_loops: bool = False
    """Give the ray and the daft side bf16 autocast and channels-last."""
    side: Literal["all", "job", "ceiling", "plain", "timm", "ray", "daft", "explained"] = "all"
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
    network = classifier.build_network().to(device).to(memory_format=torch.contiguous_format)
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
    engine = open_engine(classifier, EngineOptions(use_gpu=options.use_gpu))
    files = list_images(options, options.num_loop_images)
    images = np.stack(
        [
            open_slice(open_file(p.read_bytes()), 0, classifier.preprocessing).scan.image
            for p in files
        ]
    )
    engine.predict(images[: options.batch_size])
    started = time.perf_counter()
    engine.predict(images)
    return len(images) / (time.perf_counter() - started)


def link_images(options: Options, count: int, folder: Path) -> Path:
    """Fill a folder with so many links to scans, and return it."""
    folder.mkdir()
    for number, file in enumerate(list_images(options, count)):
        (folder / f"{number:06d}{file.suffix}").symlink_to(file.absolute())
    return folder


class EagerModel:
    """The network as Ray's and Daft's examples hold one: eager torch in an actor."""

    def __init__(self, classifier_uri: str, use_gpu: bool, bf16: bool) -> None:
        self._device = torch.device("cuda" if use_gpu else "cpu")
        classifier = load_classifier(classifier_uri)
        self._bf16 = bf16
        layout = torch.channels_last if bf16 else torch.contiguous_format
        self._network = classifier.build_network().to(self._device).to(memory_format=layout)
        self._layout = layout
        preprocessing = classifier.preprocessing
        self._mean, self._std = preprocessing.mean, preprocessing.std

    @torch.inference_mode()
    def predict(self, pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> list[list[float]]:
        """Return the probabilities of images, (N, side, side)."""
        values = torch.from_numpy(np.ascontiguousarray(pixels))[:, None].float() / 255
        values = ((values - self._mean) / self._std).to(self._device, memory_format=self._layout)
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._bf16):
            logits = self._network(values)
        probs: list[list[float]] = logits.float().softmax(1).cpu().tolist()
        return probs

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Predict a batch of Ray Data."""
        probs = self.predict(batch["image"])
        done_at = np.full(len(probs), time.time())
        return {"path": batch["path"], "prob": probs, "done_at": done_at}


def compute_warm_rate(folder: Path) -> float:
    """Compute images/s between the first and the last batch, from the rows' ``done_at``."""
    done_at = np.sort(pq.read_table(folder, columns=["done_at"])["done_at"].to_numpy())
    later = done_at[done_at > done_at[0]]
    return len(later) / (done_at[-1] - done_at[0])


def run_ray(options: Options, classifier_uri: str) -> float:
    """Run a turn of Ray's documented example, and return images/s once warm."""
    import ray
    import ray.data

    from brainray.cluster import connect_ray

    connect_ray()
    side = load_classifier(classifier_uri).preprocessing.size_px
    num_gpus = 1 if options.use_gpu else 0
    with tempfile.TemporaryDirectory() as folder:
        inbox = link_images(
            options, options.num_loop_images + options.batch_size, Path(folder, "in")
        )
        resize = v2.Resize((side, side))

        def transform(row: dict[str, Any]) -> dict[str, Any]:
            image = resize(Image.fromarray(row["image"]))
            return {"image": np.asarray(image), "path": row["path"]}

        images = ray.data.read_images(str(inbox), mode="L", include_paths=True).map(transform)
        predictions = images.map_batches(
            EagerModel,
            fn_constructor_args=(classifier_uri, options.use_gpu, options.bf16_loops),
            batch_size=options.batch_size,
            num_gpus=num_gpus or None,
            compute=ray.data.ActorPoolStrategy(size=1),
        )
        predictions.write_parquet(str(Path(folder, "out")))
        return compute_warm_rate(Path(folder, "out"))


def run_daft(options: Options, classifier_uri: str) -> float:
    """Run a turn of Daft, and return images/s once warm."""
    import daft
    from daft import col
    from daft.functions import decode_image, download, resize

    classifier = load_classifier(classifier_uri)
    side = classifier.preprocessing.size_px
    kind = daft.DataType.struct(
        {"prob": daft.DataType.list(daft.DataType.float32()), "done_at": daft.DataType.float64()}
    )

    @daft.cls(gpus=1 if options.use_gpu else 0, max_concurrency=1)
    class Model:
        def __init__(self) -> None:
            self._model = EagerModel(classifier_uri, options.use_gpu, options.bf16_loops)

        @daft.method.batch(return_dtype=kind, batch_size=options.batch_size)
        def __call__(self, images: "daft.Series") -> list[dict[str, Any]]:
            pixels = np.stack([np.asarray(image)[..., 0] for image in images.to_pylist()])
            now = time.time()
            return [{"prob": p, "done_at": now} for p in self._model.predict(pixels)]

    with tempfile.TemporaryDirectory() as folder:
        inbox = link_images(
            options, options.num_loop_images + options.batch_size, Path(folder, "in")
        )
        images = daft.from_glob_path(f"{inbox}/*").with_column(
            "image", resize(decode_image(download(col("path")), mode="L"), side, side)
        )
        found = images.with_column("found", Model()(col("image")))
        found.select("path", col("found").get("prob"), col("found").get("done_at")).write_parquet(
            str(Path(folder, "out"))
        )
        return compute_warm_rate(Path(folder, "out"))


def run_job(options: Options, classifier_uri: str, *, explain: bool = False) -> tuple[float, float]:
    """Run the bulk job and return images/s once warm, and with the start."""
    from brainray.inference.bulk import classify
    from brainray.inference.options import ClassifyJob

    with tempfile.TemporaryDirectory() as folder:
        inbox = link_images(options, options.num_images, Path(folder) / "inbox")
        job = ClassifyJob(
            scans_uri=(str(inbox),),
            classifier_uri=classifier_uri,
            output_uri=str(Path(folder) / "out"),
            explain=explain,
            engine=EngineOptions(use_gpu=options.use_gpu),
        )
        run = classify(job)["run"]
    print({name: run[name] for name in ("stages_s", "stages_busy", "bottleneck")}, file=sys.stderr)
    return run["images_per_s_warm"], run["images_per_s"]


def measure(side: str, classifier_uri: str) -> list[float]:
    """Run one turn of a side in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
    if "--classifier-uri" not in " ".join(sys.argv):
        command += ["--classifier-uri", classifier_uri]
    paths = [Path(__file__).parents[1], *sys.path[1:]]
    environment = dict(os.environ)
    if side == "daft":
        found = [word.partition("=")[2] for word in sys.argv if word.startswith("--daft-path=")]
        place = found[0] if found else sys.argv[sys.argv.index("--daft-path") + 1]
        environment["PYTHONPATH"] = os.pathsep.join([place, *map(str, paths)])
    output = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=environment
    ).stdout
    return [float(word) for word in output.strip().splitlines()[-1].split()]


def seal_random(folder: Path) -> str:
    """Export a classifier with random weights."""
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
    if options.daft_path is not None and not options.explain:
        sides = (*sides, "daft")
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
            "ray": lambda: (run_ray(options, uri),),
            "daft": lambda: (run_daft(options, uri),),
        }
        if options.side == "all":
            compare(options, uri)
        else:
            print(*turns[options.side]())


if __name__ == "__main__":
    main(tyro.cli(Options))
