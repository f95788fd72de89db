"""Memory of a bulk run against the number of scans: it stays flat.

    python benchmarks/classify_memory.py --scans-uri FOLDER

Every count is a run of its own, in a process of its own, over links to the same files. The
images are small (32 px), so that the network is the fastest stage and whatever can pile up
before it does.
"""

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from brainray.images.preprocess import Preprocessing
from brainray.inference.bulk import classify
from brainray.inference.options import ClassifyJob
from brainray.labels import BRAIN_TUMOUR_CLASSES
from brainray.model.classifier import save_classifier
from brainray.model.network import build_network

FILES_PER_FOLDER = 10_000


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is run."""

    scans_uri: str
    """Local folder of scans."""
    counts: tuple[int, ...] = (2_000, 20_000, 100_000)
    """Scans of each run."""
    size_px: int = 32
    """Side of the network's input."""
    only: int | None = None
    """Run one count in this process."""


def link_scans(options: Options, count: int, folder: Path) -> None:
    """Link the folder's files again and again."""
    files = sorted(p for p in Path(options.scans_uri).rglob("*.jpg"))
    for number in range(count):
        place = folder / f"{number // FILES_PER_FOLDER:04d}" / f"{number:08d}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(files[number % len(files)].absolute())


def run_once(options: Options, count: int) -> None:
    """Classify so many scans and print what it took."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        link_scans(options, count, root / "inbox")
        torch.manual_seed(0)
        save_classifier(
            str(root / "classifier"),
            build_network(len(BRAIN_TUMOUR_CLASSES)).state_dict(),
            classes=BRAIN_TUMOUR_CLASSES,
            preprocessing=Preprocessing(size_px=options.size_px),
            provenance={},
        )
        job = ClassifyJob(
            scans_uri=(str(root / "inbox"),),
            classifier_uri=str(root / "classifier"),
            output_uri=str(root / "out"),
        )
        metrics = classify(job)
    run = metrics["run"]
    assert metrics["counts"]["total"] == count
    print(
        f"{count:>8,} scans  peak {run['memory_peak_bytes'] / 2**20:7,.0f} MiB  "
        f"{run['images_per_s_warm']:7.1f} images/s  {run['bottleneck']}",
        flush=True,
    )


if __name__ == "__main__":
    chosen = tyro.cli(Options)
    if chosen.only is not None:
        run_once(chosen, chosen.only)
    else:
        for number in chosen.counts:
            command = [sys.executable, __file__, *sys.argv[1:], "--only", str(number)]
            subprocess.run(command, check=True)
