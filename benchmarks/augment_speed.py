"""One affine sampling a batch against torchvision's transforms one after the other: images/s.

    python benchmarks/augment_speed.py

Both make the same kinds of changes, with the same ranges, to the same random grey images, in one
thread, in rounds by turns. ``benchmarks/ablations.py --variations whole torchvision-chain`` says
what the difference is worth in accuracy.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from torchvision.transforms import InterpolationMode, v2

from brainray.images.normalise import normalise_images
from brainray.images.preprocess import Preprocessing
from brainray.recipes import RECIPES, build_recipe
from brainray.training.augment import Augmentation, augment_images, roll_dice


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured."""

    recipe: str = "cpu"
    """Whose augmentation."""
    sizes_px: tuple[int, ...] = (64, 96, 160, 224)
    """Sides of the images."""
    batch_size: int = 64
    """Images that are sampled at once."""
    rounds: int = 9
    """Of each side, by turns."""


def build_chain(augmentation: Augmentation) -> v2.Compose:
    """Return torchvision's transforms with an augmentation's ranges.

    Flip, rotation, zoom and shift, brightness and contrast: each geometric step interpolates
    anew. Factors are uniform where ours are log-uniform; outside the image it is black, as
    torchvision has it. What the ``cpu`` recipes leave at zero is not among them.

    Takes grey images in [0, 1], shape (1, H, W), one by one.
    """
    a = augmentation
    bilinear = InterpolationMode.BILINEAR
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(a.flip_horizontal),
            v2.RandomRotation(a.rotation_deg, bilinear),
            v2.RandomAffine(
                0,
                translate=(a.shift, a.shift),
                scale=(1 / (1 + a.zoom), 1 + a.zoom),
                interpolation=bilinear,
            ),
            v2.ColorJitter(
                brightness=a.brightness, contrast=(1 / (1 + a.contrast), 1 + a.contrast)
            ),
        ]
    )


def apply_chain(
    chain: v2.Compose, images: torch.Tensor, preprocessing: Preprocessing
) -> torch.Tensor:
    """Apply a chain to each image of a normalised batch, shape (N, 1, H, W).

    Outside autocast: it makes the sampling grid bf16, and torchvision takes images of another
    type than their grid for whole numbers, which leaves 0 and 1 of the greys.
    """
    mean, std = preprocessing.mean, preprocessing.std
    with torch.autocast(images.device.type, enabled=False):
        return torch.stack([(chain(image * std + mean) - mean) / std for image in images])


def measure(options: Options, size_px: int) -> dict[str, float]:
    """Return the median images per second of either side."""
    preprocessing = Preprocessing(size_px=size_px)
    augmentation = build_recipe(options.recipe).augmentation
    chain = build_chain(augmentation)
    images = torch.randint(0, 256, (options.batch_size, size_px, size_px), dtype=torch.uint8)
    normalised = normalise_images(images, preprocessing)

    def sample_once(seed: int) -> None:
        dice = roll_dice(augmentation, options.batch_size, seed=seed)
        augment_images(normalised, dice, grey_range=1 / preprocessing.std)

    def sample_each(_: int) -> None:
        apply_chain(chain, normalised, preprocessing)

    sides: dict[str, Callable[[int], None]] = {"one affine": sample_once, "chain": sample_each}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for seed in range(options.rounds + 1):
        for name, run in sides.items():
            started = time.perf_counter()
            run(seed)
            rates[name].append(options.batch_size / (time.perf_counter() - started))
    return {name: statistics.median(found[1:]) for name, found in rates.items()}


def main(options: Options) -> None:
    """Print a line for each size."""
    if options.recipe not in RECIPES:
        raise SystemExit(f"Unknown recipe. Expected one of {', '.join(RECIPES)}.")
    torch.set_num_threads(1)
    for size_px in options.sizes_px:
        found = measure(options, size_px)
        ratio = found["one affine"] / found["chain"]
        shown = ", ".join(f"{name} {rate:,.0f} images/s" for name, rate in found.items())
        print(f"{size_px:>4} px  {shown}, ratio {ratio:.1f}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options))
