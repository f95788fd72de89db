"""What the augmentation of a batch costs, as a whole and by its parts: milliseconds, one thread.

    python benchmarks/augment_speed.py

Beside it, CLAHE of a whole batch by torch and by OpenCV, image by image. The batch is of random
grey levels; the sides take turns, and the median is printed.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
import tyro

from brainray.training.augment import (
    NO_AUGMENTATION,
    Augmentation,
    augment_images,
    sample_params,
)
from brainray.training.clahe import apply_clahe

PARTS = {
    "geometry": ("rotation_deg", "flip_horizontal", "zoom", "stretch", "shift"),
    "CLAHE": ("clahe", "grey_probability"),
    "gamma, bias, gain": ("gamma", "bias_field", "gain", "grey_probability"),
    "blur": ("blur", "blur_probability", "grey_probability"),
    "noise": ("noise", "noise_probability", "grey_probability"),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured."""

    augmentation: Augmentation = Augmentation()
    """Ranges of the changes."""
    sizes_px: tuple[int, ...] = (64, 128, 224)
    """Sides of the images."""
    batch_size: int = 64
    """Images that are augmented at once."""
    rounds: int = 15
    """Of each side, by turns."""


def list_sides(options: Options, size_px: int) -> dict[str, Callable[[int], object]]:
    """Return what is timed: functions of an epoch number."""
    shape = (options.batch_size, size_px, size_px)
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    ids = np.arange(options.batch_size)

    def augment(augmentation: Augmentation) -> Callable[[int], object]:
        return lambda epoch: augment_images(
            images, sample_params(augmentation, ids, seed=0, epoch=epoch)
        )

    def equalise_by_opencv(_: int) -> object:
        clahe = cv2.createCLAHE(2.0, (8, 8))
        return np.stack([clahe.apply(image) for image in images.numpy()])

    sides = {"whole": augment(options.augmentation), "nothing": augment(NO_AUGMENTATION)}
    for name, fields in PARTS.items():
        ranges = {field: getattr(options.augmentation, field) for field in fields}
        sides[name] = augment(replace(NO_AUGMENTATION, **ranges))
    sides["CLAHE of all, torch"] = lambda _: apply_clahe(images, torch.full((len(images),), 2.0))
    sides["CLAHE of all, OpenCV"] = equalise_by_opencv
    return sides


def measure(options: Options, size_px: int) -> dict[str, float]:
    """Return the median milliseconds a batch of each side."""
    sides = list_sides(options, size_px)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for epoch in range(options.rounds + 1):
        for name, run in sides.items():
            started = time.perf_counter()
            run(epoch)
            times[name].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def main(options: Options) -> None:
    """Print a table."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    columns = [measure(options, size_px) for size_px in options.sizes_px]
    print(f"{'ms a batch':<22}" + "".join(f"{size:>7} px" for size in options.sizes_px))
    for name in columns[0]:
        print(f"{name:<22}" + "".join(f"{column[name]:>10.1f}" for column in columns))


if __name__ == "__main__":
    main(tyro.cli(Options))
