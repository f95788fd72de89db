"""Draw the boxes that the head crop finds on scans of a folder, and count what it finds.

    python benchmarks/head_boxes.py --scans-uri Training --output boxes.png
    python benchmarks/head_boxes.py --scans-uri Training --output small.png --which smallest

Every scan is opened: the counts are of all, the sheet shows some.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from PIL import Image, ImageDraw

from brainray.data.read import read_scan
from brainray.data.scans import list_scans
from brainray.errors import RejectedImage
from brainray.images.intensity import to_display
from brainray.images.preprocess import OpenedScan, Preprocessing
from brainray.images.slices import open_file, open_slice

CELL_PX = 168
NUM_COLUMNS = 8
PREPROCESSING = Preprocessing(crop="head", intensity="percentile", fit="pad")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which scans, and where the sheet goes."""

    scans_uri: str
    """Folder, glob, Parquet table or list of scans."""
    output: Path
    """PNG file."""
    num_images: int = 48
    """Scans on the sheet."""
    which: Literal["random", "smallest"] = "random"
    """A random choice, or the scans whose boxes cover the least of them."""
    seed: int = 0
    """Of the random choice."""


def open_scans(scans_uri: str) -> list[OpenedScan]:
    """Open every scan that can be decoded."""
    opened = []
    for row in list_scans([scans_uri]).to_pylist():
        try:
            content = read_scan(row["uri"], row["row_group"], row["row"])
            opened.append(open_slice(open_file(content), 0, PREPROCESSING).scan)
        except RejectedImage as rejection:
            print(f"{row['scan_uri']}: {rejection.message}")
    return opened


def measure_box(scan: OpenedScan) -> float:
    """Return the share of a scan that its box covers."""
    source = scan.frame.source
    return source.width * source.height / scan.samples.size


def draw_cell(scan: OpenedScan) -> Image.Image:
    """Draw a scan with its box, and beside it what the network sees, at half the size."""
    source = scan.frame.source
    image = Image.fromarray(to_display(scan.samples)).convert("RGB")
    corners = (source.left, source.top, source.left + source.width, source.top + source.height)
    scale = CELL_PX / max(image.size)
    image = image.resize([max(1, round(side * scale)) for side in image.size])
    ImageDraw.Draw(image).rectangle(
        [round(end * scale) - (n > 1) for n, end in enumerate(corners)], outline=(255, 210, 0)
    )
    cell = Image.new("RGB", (CELL_PX + CELL_PX // 2, CELL_PX))
    cell.paste(image, (0, 0))
    cell.paste(Image.fromarray(scan.image).resize((CELL_PX // 2, CELL_PX // 2)), (CELL_PX, 0))
    return cell


def main(options: Options) -> None:
    """Print the counts and write the sheet."""
    scans = open_scans(options.scans_uri)
    shares = np.array([measure_box(scan) for scan in scans])
    quantiles = np.quantile(shares, [0, 0.01, 0.25, 0.5, 0.75])
    print(f"{len(scans):,} scans; the box is the whole scan in {(shares == 1).mean():.2%}")
    print(f"share of the scan: least, 1 %, quartiles {', '.join(f'{q:.3f}' for q in quantiles)}")
    if options.which == "smallest":
        chosen = shares.argsort(kind="stable")[: options.num_images]
    else:
        rng = np.random.default_rng(options.seed)
        chosen = rng.permutation(len(scans))[: options.num_images]
    cells = [draw_cell(scans[index]) for index in chosen]
    width, height = (length + 4 for length in cells[0].size)
    num_rows = -(-len(cells) // NUM_COLUMNS)
    sheet = Image.new("RGB", (NUM_COLUMNS * width, num_rows * height), (60, 60, 60))
    for place, cell in enumerate(cells):
        sheet.paste(cell, (place % NUM_COLUMNS * width, place // NUM_COLUMNS * height))
    sheet.save(options.output)
    print(f"{len(cells)} on {options.output}")


if __name__ == "__main__":
    main(tyro.cli(Options))
