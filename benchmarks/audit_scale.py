"""Time and recall of the audit's search for near duplicates, by the number of scans.

    python benchmarks/audit_scale.py --folder /tmp/phantoms
    python benchmarks/audit_scale.py --folder /tmp/phantoms --audit-uri /tmp/audited

The scans are phantoms and four changed copies of each, as such data sets have them: saved again,
shifted by a pixel, brighter, smaller. The smaller copies of every other phantom of a class are a
test split. They are drawn once, to a folder that is kept.

For each count both searches run in one thread of one process, and print the CPU seconds of that
thread. Their groups are compared with the copies, with all pairs of a sample of scans, and with the
groups of the exact search. With --audit-uri, the whole audit runs over all files of the folder
instead.
"""

import io
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from numpy.typing import NDArray
from PIL import Image
from threadpoolctl import threadpool_limits

from brainray.data.near_duplicates import (
    EXACT_PAIRS,
    compute_thumbnail,
    group_near_duplicates,
    measure_recall,
    standardise_thumbnails,
)
from brainray.evaluation.audit import AuditJob, audit
from brainray.images.decode import DecodeLimits, decode_image
from brainray.labels import BRAIN_TUMOUR_CLASSES
from brainray.phantoms import iterate_phantoms

MIN_CORRELATION = 0.96
SEARCHES = {"exact": EXACT_PAIRS, "by cells": 0}
"""``exact_pairs`` of each search."""
CHANGES = ("saved", "shifted", "brighter", "smaller")
PHANTOMS_PER_PART = 100
SCANS_PER_PART = PHANTOMS_PER_PART * (1 + len(CHANGES))


@dataclass(frozen=True, kw_only=True)
class Options:
    """Scans to search."""

    folder: str
    """Local folder of the scans; missing ones are drawn (100,000 take 1.3 GB)."""
    counts: tuple[int, ...] = (10_000, 30_000, 100_000)
    """Scans of each search, in parts of 500."""
    num_samples: int = 2_000
    """Size of the sample of scans."""
    audit_uri: str | None = None
    """Audit the whole folder to here, instead of only searching."""


def draw_part(folder: Path, part: int) -> None:
    """Draw a hundred phantoms and their changed copies, and keep their thumbnails."""
    path = locate_thumbnails(folder, part)
    if path.exists():
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
    path.parent.mkdir(exist_ok=True)
    np.save(path, np.stack(thumbnails))


def locate_thumbnails(folder: Path, part: int) -> Path:
    """Return the file of a part's thumbnails: each phantom, then its copies."""
    return folder / "thumbnails" / f"{part:04d}.npy"


def change_scan(pixels: NDArray[np.uint8], change: str, rng: np.random.Generator) -> bytes:
    """Change and encode a scan."""
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
    """Return the standardised thumbnails of the first scans."""
    parts = [np.load(locate_thumbnails(folder, part)) for part in range(count // SCANS_PER_PART)]
    return standardise_thumbnails(np.concatenate(parts))


def search(standardised: NDArray[np.float32], exact_pairs: int) -> tuple[float, NDArray[np.int64]]:
    """Group as the audit does, in one thread; return its CPU seconds and the groups."""
    with threadpool_limits(1):
        started = time.process_time()
        groups = group_near_duplicates(
            standardised, min_correlation=MIN_CORRELATION, exact_pairs=exact_pairs
        )
        return time.process_time() - started, groups


def describe(
    standardised: NDArray[np.float32],
    found: NDArray[np.int64],
    exact: NDArray[np.int64],
    num_samples: int,
) -> str:
    """Compare groups with the copies, a sample's pairs, and the groups of the exact search."""
    copies = found.reshape(-1, 1 + len(CHANGES))
    together = (copies[:, 1:] == copies[:, :1]).mean()
    recall = measure_recall(
        standardised, found, min_correlation=MIN_CORRELATION, num_samples=num_samples
    )
    _, first = np.unique(found, return_index=True)
    within = (exact == exact[first][found]).mean()
    return (
        f"copies {together:.4%}  pairs {recall['num_grouped']:,} of {recall['num_pairs']:,}"
        f"  in a right group {within:.4%}  groups {len(first):,}"
    )


def compare(options: Options) -> None:
    """Run both searches for each count, and print their times and findings."""
    times: dict[str, list[float]] = {name: [] for name in SEARCHES}
    for count in options.counts:
        standardised = read_thumbnails(Path(options.folder), count)
        found = {name: search(standardised, pairs) for name, pairs in SEARCHES.items()}
        for name, (seconds, groups) in found.items():
            times[name].append(seconds)
            quality = describe(standardised, groups, found["exact"][1], options.num_samples)
            print(f"{count:>9,}  {name:<8}  {seconds:7.2f} s  {quality}", flush=True)
    for name, seconds in times.items():
        if len(seconds) > 1:
            power = np.polyfit(np.log(options.counts), np.log(seconds), 1)[0]
            print(f"{name:<8}  time rises with count to the power of {power:.2f}")


def audit_folder(options: Options, audit_uri: str) -> None:
    """Audit all scans of the folder, and print its time and findings."""
    job = AuditJob(data_uri=str(Path(options.folder) / "scans"), output_uri=audit_uri)
    document = audit(job, log=print)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    groups, (leak,) = document["groups"], document["leaks"].values()
    print(f"{document['num_scans']:,} scans  {document['audit_s']} s  driver's peak {peak:.1f} GiB")
    print(f"{groups['num_groups']:,} groups  largest {groups['largest']}  {groups['search']}")
    print(f"{leak['share_same_group']:.2%} of {leak['n']:,} held-out scans in a group of training")


def main(options: Options) -> None:
    """Draw missing scans, then search or audit."""
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
