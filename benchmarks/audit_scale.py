"""The audit's search for near duplicates against the number of scans, and what it misses.

    python benchmarks/audit_scale.py --folder /tmp/phantoms
    python benchmarks/audit_scale.py --folder /tmp/phantoms --audit-uri /tmp/audited

The scans are phantoms and, of each, four changed copies as this kind of data set has them: saved
anew, shifted by a pixel, brighter, smaller. The smaller copies of every other phantom of a class
are a test split. They are drawn once, to a folder that is kept and may be asked again, of fewer
scans too.

Each count is searched by both ways, every pair and by cells, in one thread of one process. The
seconds are that thread's, whatever else the machine does; products of sketches are counted. What
was found is held against the planted copies, against the products of a sample with all (pairs
that reach 0.96), and against the groups of every pair. The power is the slope of log over log. With
--audit-uri, the whole audit runs over all files of the folder instead.
"""

import io
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from numpy.typing import NDArray
from PIL import Image
from threadpoolctl import threadpool_limits

from brainray.data.near_duplicates import (
    compute_thumbnail,
    group_near_duplicates,
    measure_recall,
    standardise_thumbnails,
)
from brainray.data.neighbours import (
    EXACT_PAIRS,
    Block,
    Found,
    count_products,
    run_blocks_locally,
)
from brainray.evaluation.audit import AuditJob, audit
from brainray.images.decode import DecodeLimits, decode_image
from brainray.labels import BRAIN_TUMOUR_CLASSES
from brainray.phantoms import iterate_phantoms

MIN_CORRELATION = 0.96
WAYS = {"every pair": EXACT_PAIRS, "by cells": 0}
CHANGES = ("saved", "shifted", "brighter", "smaller")
PHANTOMS_PER_PART = 100
SCANS_PER_PART = PHANTOMS_PER_PART * (1 + len(CHANGES))


@dataclass(frozen=True, kw_only=True)
class Options:
    """How many scans are searched."""

    folder: str
    """Local folder of the drawn scans; what it lacks is drawn (100,000 take 1.3 GB)."""
    counts: tuple[int, ...] = (10_000, 30_000, 100_000)
    """Scans of each search, in parts of 500."""
    num_samples: int = 2_000
    """Scans whose pairs with all others are held against what was found."""
    audit_uri: str | None = None
    """Audit the whole folder to here, instead of only searching."""


def draw_part(folder: Path, part: int) -> None:
    """Draw a hundred phantoms and their changed copies, and keep their thumbnails."""
    place = locate_thumbnails(folder, part)
    if place.exists():
        return
    thumbnails = []
    num_per_class = PHANTOMS_PER_PART // len(BRAIN_TUMOUR_CLASSES)
    phantoms = iterate_phantoms(num_per_class=num_per_class, seed=part, slices_per_subject=1)
    for number, phantom in enumerate(phantoms):
        pixels = decode_image(phantom.image_bytes, DecodeLimits())
        contents = {phantom.name: phantom.image_bytes}
        for change in CHANGES:
            rng = np.random.default_rng([part, number, CHANGES.index(change)])
            contents[f"{Path(phantom.name).stem}-{change}.jpg"] = change_scan(pixels, change, rng)
        for name, content in contents.items():
            is_test = CHANGES[-1] in name and number // len(BRAIN_TUMOUR_CLASSES) % 2
            scan = folder / "scans" / ("Testing" if is_test else "Training") / phantom.label / name
            scan.parent.mkdir(parents=True, exist_ok=True)
            scan.write_bytes(content)
            thumbnails.append(compute_thumbnail(decode_image(content, DecodeLimits())))
    place.parent.mkdir(exist_ok=True)
    np.save(place, np.stack(thumbnails))


def locate_thumbnails(folder: Path, part: int) -> Path:
    """Return the file of a part's thumbnails, of a phantom and its copies by turns."""
    return folder / "thumbnails" / f"{part:04d}.npy"


def change_scan(pixels: NDArray[np.uint8], change: str, rng: np.random.Generator) -> bytes:
    """Change a scan as one that was copied from folder to folder, and encode it."""
    if change == "shifted":
        pixels = np.roll(pixels, rng.choice([-1, 1]), axis=rng.integers(2))
    if change == "brighter":
        pixels = np.minimum(pixels * rng.uniform(1.03, 1.1), 255).astype(np.uint8)
    image = Image.fromarray(pixels)
    if change == "smaller":
        image = image.resize((image.width * 3 // 4, image.height * 3 // 4))
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=int(rng.integers(60, 90)))
    return sink.getvalue()


def read_thumbnails(folder: Path, count: int) -> NDArray[np.float32]:
    """Return the standardised thumbnails of so many scans."""
    parts = [np.load(locate_thumbnails(folder, part)) for part in range(count // SCANS_PER_PART)]
    return standardise_thumbnails(np.concatenate(parts))


def search(standardised: NDArray[np.float32], way: str) -> tuple[float, int, NDArray[np.int64]]:
    """Group by one way, as the audit does; return the thread's seconds, products and groups."""
    products = 0

    def count_and_do(
        work: Callable[..., Found],
        blocks: Sequence[Block],
        *shared: Any,  # noqa: ANN401
    ) -> Iterator[Found]:
        nonlocal products
        products += count_products(blocks)
        return run_blocks_locally(work, blocks, *shared)

    with threadpool_limits(1):
        started = time.process_time()
        groups = group_near_duplicates(
            standardised,
            min_correlation=MIN_CORRELATION,
            exact_pairs=WAYS[way],
            run_blocks=count_and_do,
        )
        return time.process_time() - started, products, groups


def describe(
    standardised: NDArray[np.float32],
    found: NDArray[np.int64],
    exact: NDArray[np.int64],
    num_samples: int,
) -> str:
    """Hold groups against the planted copies, a sample's pairs, and the groups of every pair."""
    planted = found.reshape(-1, 1 + len(CHANGES))
    together = (planted[:, 1:] == planted[:, :1]).mean()
    recall = measure_recall(
        standardised, found, min_correlation=MIN_CORRELATION, num_samples=num_samples
    )
    _, first = np.unique(found, return_index=True)
    within = (exact == exact[first][found]).mean()
    return (
        f"planted {together:.4%}  pairs {recall['num_grouped']:,} of {recall['num_pairs']:,}"
        f"  in a right group {within:.4%}  groups {len(first):,}"
    )


def compare(options: Options) -> None:
    """Search each count by each way, and print what that took and found."""
    took: dict[str, list[tuple[float, int]]] = {way: [] for way in WAYS}
    for count in options.counts:
        standardised = read_thumbnails(Path(options.folder), count)
        found = {way: search(standardised, way) for way in WAYS}
        for way, (seconds, products, groups) in found.items():
            took[way].append((seconds, products))
            words = describe(standardised, groups, found["every pair"][2], options.num_samples)
            figures = f"{seconds:7.2f} s  {products / 1e6:8,.1f} M products"
            print(f"{count:>9,}  {way:<10}  {figures}  {words}", flush=True)
    for way, pairs in took.items():
        if len(pairs) > 1:
            of_time, of_products = np.polyfit(np.log(options.counts), np.log(pairs), 1)[0]
            print(f"{way:<10}  power of the count: time {of_time:.2f}, products {of_products:.2f}")


def audit_folder(options: Options, audit_uri: str) -> None:
    """Audit all scans of the folder, and print what that took."""
    job = AuditJob(data_uri=str(Path(options.folder) / "scans"), output_uri=audit_uri)
    document = audit(job, log=print)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    groups, (leak,) = document["groups"], document["leaks"].values()
    print(f"{document['num_scans']:,} scans  {document['audit_s']} s  driver's peak {peak:.1f} GiB")
    print(f"{groups['num_groups']:,} groups  largest {groups['largest']}  {groups['search']}")
    print(f"{leak['share_same_group']:.2%} of {leak['n']:,} held-out scans in a group of training")


def main(options: Options) -> None:
    """Draw what the folder lacks, then search or audit."""
    folder = Path(options.folder)
    num_parts = max(options.counts) // SCANS_PER_PART
    with ProcessPoolExecutor() as pool:
        list(pool.map(draw_part, [folder] * num_parts, range(num_parts)))
    if options.audit_uri is None:
        compare(options)
    else:
        audit_folder(options, options.audit_uri)


if __name__ == "__main__":
    main(tyro.cli(Options))
