"""Minutes to an accuracy on grouped validation: a recipe against the script that most would write.

    python benchmarks/time_to_accuracy.py --data-uri FOLDER/Training --output-uri OUT

Both start from random weights, on the same training images, and are validated on the same images
after each epoch. The plain side is torchvision's ResNet-50 at 224 px in fp32 with Adam,
torchvision's transforms and a DataLoader. One side runs after the other; each ends when its
validation accuracy reaches the target, or at its time limit. Minutes are from the start of the
side's process to the end of the validation. Not reached is said as that, with the speed, and with
the minutes that the plain side would take if its error went on falling as a power of the epochs.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from brainray import runlog
from brainray.io import storage


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is compared, and how far."""

    data_uri: str
    """Local class folders to train and validate on, with no split of their own."""
    output_uri: str
    """Local folder for the run and the result, ``time_to_accuracy.json``."""
    recipe: str = "cpu"
    """What the product's side trains."""
    num_epochs: int | None = None
    """Of the product's side; the recipe's if not given."""
    num_workers: int = 2
    """Training workers of the product's side."""
    target: float = 0.95
    """Validation accuracy to reach."""
    limit_min: float = 60.0
    """Minutes after which a side is stopped."""
    batch_size: int = 32
    """Of the plain side."""
    num_loaders: int = 2
    """DataLoader processes of the plain side."""
    seed: int = 0
    """Seeds the split and the product's side."""
    side: Literal["both", "brainray", "plain"] = "both"
    """`plain` needs the split that `brainray` has written."""


def run_brainray(options: Options) -> None:
    """Train by the recipe; the records go where every run's go."""
    from brainray.recipes import build_recipe
    from brainray.training.config import ScalingOptions
    from brainray.training.run import TrainJob
    from brainray.training.train import train

    recipe = build_recipe(options.recipe)
    config = replace(
        recipe,
        weights="none",
        test_fraction=0.0,
        seed=options.seed,
        num_epochs=options.num_epochs or recipe.num_epochs,
    )
    job = TrainJob(
        data_uri=storage.make_absolute(options.data_uri),
        output_uri=storage.join(options.output_uri, "brainray"),
        config=config,
        scaling=ScalingOptions(num_workers=options.num_workers),
        recipe=options.recipe,
    )
    train(job, log=lambda line: print(line, flush=True))


def run_plainly(options: Options) -> None:
    """Train as most write it, on the split of the product's side."""
    import torch
    from PIL import Image
    from torch import nn
    from torch.utils.data import DataLoader, Dataset
    from torchvision.models import resnet50
    from torchvision.transforms import v2

    manifest = storage.read_table(storage.join(options.output_uri, "brainray/manifest.parquet"))
    rows = manifest.to_pylist()
    names = sorted({row["label"] for row in rows})
    to_tensor = [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
    transforms = {
        "train": v2.Compose(
            [
                v2.Resize((224, 224)),
                v2.RandomHorizontalFlip(),
                v2.RandomRotation(15),
                v2.RandomAffine(0, scale=(0.85, 1.15)),
                *to_tensor,
            ]
        ),
        "val": v2.Compose([v2.Resize((224, 224)), *to_tensor]),
    }

    class Scans(Dataset[tuple[torch.Tensor, int]]):
        def __init__(self, split: str) -> None:
            self.rows = [row for row in rows if row["split"] == split]
            self.transform = transforms[split]

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            row = self.rows[index]
            with Image.open(Path(options.data_uri) / row["path"]) as image:
                return self.transform(image.convert("RGB")), names.index(row["label"])

    loaders = {
        split: DataLoader(
            Scans(split),
            batch_size=options.batch_size,
            shuffle=split == "train",
            num_workers=options.num_loaders,
        )
        for split in ("train", "val")
    }
    network = resnet50(weights=None, num_classes=len(names))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    measure_loss = nn.CrossEntropyLoss()
    for epoch in range(10_000):
        network.train()
        for step, (images, labels) in enumerate(loaders["train"], start=1):
            optimizer.zero_grad()
            measure_loss(network(images), labels).backward()
            optimizer.step()
            print(json.dumps({"epoch": epoch, "step": step}), flush=True)
        network.eval()
        correct = 0
        with torch.no_grad():
            for images, labels in loaders["val"]:
                correct += int((network(images).argmax(1) == labels).sum())
        accuracy = correct / len(loaders["val"].dataset)  # type: ignore[arg-type]
        print(json.dumps({"epoch": epoch, "val_accuracy": accuracy}), flush=True)


def read_brainray(options: Options, _: Path) -> list[dict[str, Any]]:
    """Return the epochs that the product's side has finished."""
    place = storage.join(options.output_uri, "brainray/metrics.jsonl")
    return [
        {"accuracy": record["val_accuracy"], "unix_time_s": record["unix_time_s"]}
        for record in runlog.read_records(place)
    ]


def read_plain(_: Options, log: Path) -> list[dict[str, Any]]:
    """Return the epochs that the plain side has finished."""
    records = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    return [{"accuracy": r["val_accuracy"]} for r in records if "val_accuracy" in r]


def measure(options: Options, side: str) -> dict[str, Any]:
    """Run a side in a process of its own until the target or the limit; say how far it came."""
    log = Path(options.output_uri) / f"{side}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    read = read_brainray if side == "brainray" else read_plain
    command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
    started, minutes = time.time(), 0.0
    epochs: list[dict[str, Any]] = []
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None and minutes < options.limit_min:
                time.sleep(1.0)
                minutes = (time.time() - started) / 60
                for epoch in read(options, log)[len(epochs) :]:
                    at = (epoch.get("unix_time_s", time.time()) - started) / 60
                    epochs.append({"accuracy": epoch["accuracy"], "minutes": at})
                    print(f"{side:<9} {at:6.1f} min  accuracy {epoch['accuracy']:.3f}", flush=True)
                if epochs and epochs[-1]["accuracy"] >= options.target:
                    break
        finally:
            process.terminate()
            process.wait()
    if not epochs and process.returncode > 0:
        raise SystemExit(f"The {side} side failed; see {log}.")
    reached = [epoch for epoch in epochs if epoch["accuracy"] >= options.target]
    return {
        "reached_min": reached[0]["minutes"] if reached else None,
        "ran_min": minutes,
        "steps": log.read_text().count('"step"') if side == "plain" else None,
        "epochs": epochs,
    }


def project(epochs: list[dict[str, Any]], target: float) -> float:
    """Return the minutes to the target if the error goes on as ``a · epoch ** -b``; inf if never.

    Fitted by least squares to the logarithms, with two epochs or more.
    """
    number = np.arange(1, len(epochs) + 1)
    error = np.maximum(1 - np.array([epoch["accuracy"] for epoch in epochs]), 1e-4)
    slope, offset = np.polyfit(np.log(number), np.log(error), 1)
    if slope >= 0:
        return float("inf")
    needed = np.exp((np.log(1 - target) - offset) / slope)
    return float(np.ceil(needed) * epochs[-1]["minutes"] / len(epochs))


def compare(options: Options) -> None:
    """Run both sides, and print and keep what came out."""
    found = {side: measure(options, side) for side in ("brainray", "plain")}
    place = storage.join(options.output_uri, "time_to_accuracy.json")
    storage.write_json(place, {"target": options.target, "sides": found})
    for side, result in found.items():
        best = max((epoch["accuracy"] for epoch in result["epochs"]), default=float("nan"))
        if result["reached_min"] is None:
            print(
                f"{side:<9} not reached in {result['ran_min']:.1f} min "
                f"({len(result['epochs'])} epochs, best {best:.3f})"
            )
        else:
            print(f"{side:<9} {result['reached_min']:.1f} min to {options.target:.1%}")
    plain = found["plain"]
    if plain["reached_min"] is None and len(plain["epochs"]) > 1:
        print(f"plain     {project(plain['epochs'], options.target):.0f} min projected")
    if plain["steps"]:
        rate = plain["steps"] * options.batch_size / plain["ran_min"] / 60
        print(f"plain     {rate:.1f} images/s, validation's time included")


if __name__ == "__main__":
    chosen = tyro.cli(Options)
    sides = {"brainray": run_brainray, "plain": run_plainly}
    if chosen.side == "both":
        compare(chosen)
    else:
        sides[chosen.side](chosen)
