"""A bulk run of a million scans, with everything real but the network.

    python benchmarks/classify_scale.py --data-path /var/tmp/scale

Listing, reading, hashing, decoding, comparison with earlier rows, writing, lock, metrics and report
are those of the bulk job. Only the network is the tests' fake one, which looks at the mean grey of
a scan, so that all else has to keep up with a fast GPU. Every size is run in a process of its own,
and then again, when nothing is new. Each row is checked: one for every scan, with the hash of what
was written.

``--num-nodes 3`` runs the workers on so many nodes of one CPU each, processes on this machine, and
none beside the driver. What the driver received over its TCP connections is then what it would
receive over a network: tasks' results, and Ray's own messages.

The scans are 32-px PNGs, no two alike, in Parquet tables below ``--data-path``, where a later call
finds them again; with ``--kind files`` each is a file.
"""

import io
import os
import resource
import shutil
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import tyro
from PIL import Image
from ray.cluster_utils import Cluster

sys.path.insert(0, str(Path(__file__).parents[1]))

from brainray.images.preprocess import Preprocessing
from brainray.inference import bulk
from brainray.inference.bulk import classify
from brainray.inference.options import ClassifyJob
from brainray.inference.stats import Progress
from brainray.io.repeat import repeat
from brainray.labels import BRAIN_TUMOUR_CLASSES
from brainray.model.classifier import save_classifier
from brainray.model.network import build_network
from tests.fakes import prepare_fake_engine

SIDE_PX = 32
SHARD_ROWS = 10_000
ROW_GROUP_ROWS = 1_024
PROGRESS_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is run."""

    data_path: Path
    """Folder for the scans, which are kept, and the output of the last run of each size."""
    sizes: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    """Scans of each run, in ten thousands."""
    kind: Literal["tables", "files"] = "tables"
    """Rows of Parquet tables, or a file for each."""
    num_nodes: int = 0
    """Nodes of one CPU each that the workers run on; 0 starts Ray as the command does."""
    only: int | None = None
    """Run one size in this process."""


# --- the scans ------------------------------------------------------------------------------------


def draw_scans(shard: int) -> Iterator[bytes]:
    """Draw a shard's scans: a grey ramp with noise, and the scan's number in its last pixels."""
    rng = np.random.default_rng(shard)
    ramp = np.add.outer(np.arange(SIDE_PX), np.arange(SIDE_PX)).astype(np.uint8)
    for number in range(shard * SHARD_ROWS, (shard + 1) * SHARD_ROWS):
        noise = rng.integers(0, 16, ramp.shape, np.uint8)
        pixels = ramp * np.uint8(number % 3) + noise
        pixels[-1, -4:] = np.frombuffer(number.to_bytes(4, "little"), np.uint8)
        sink = io.BytesIO()
        Image.fromarray(pixels).save(sink, "png", compress_level=1)
        yield sink.getvalue()


def write_shard(folder: Path, kind: str, shard: int) -> None:
    """Write a shard whole or not at all, unless it is there."""
    place = name_shard(folder, kind, shard)
    if place.exists():
        return
    half = place.with_name(f".{place.name}")
    if kind == "tables":
        table = pa.table({"image_bytes": pa.array(draw_scans(shard), pa.binary())})
        pq.write_table(table, half, row_group_size=ROW_GROUP_ROWS)
    else:
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir()
        for row, content in enumerate(draw_scans(shard)):
            (half / f"{row:04d}.png").write_bytes(content)
    half.rename(place)


def name_shard(folder: Path, kind: str, shard: int) -> Path:
    """Return where a shard lies: a table, or a folder of files."""
    return folder / f"{shard:05d}{'.parquet' if kind == 'tables' else ''}"


def read_shard(place: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the name that the job has for each scan of a shard, and its content."""
    if place.is_dir():
        yield from ((str(file), file.read_bytes()) for file in sorted(place.iterdir()))
        return
    for row, content in enumerate(pq.read_table(place)["image_bytes"].to_pylist()):
        yield f"{place}#row={row}", content


# --- a run ----------------------------------------------------------------------------------------


def run_once(options: Options, count: int) -> None:
    """Classify so many scans twice, check the answers, and print what it took."""
    root = options.data_path.absolute()
    inbox, output = root / f"inbox-{count}", root / f"output-{count}"
    for folder in (inbox, output):
        shutil.rmtree(folder, ignore_errors=True)
    inbox.mkdir()
    for shard in range(count // SHARD_ROWS):
        place = name_shard(root / options.kind, options.kind, shard)
        (inbox / place.name).symlink_to(place)
    job = ClassifyJob(
        scans_uri=(str(inbox),), classifier_uri=str(root / "classifier"), output_uri=str(output)
    )
    bulk.prepare_engine = prepare_fake_engine
    cluster = start_nodes(options.num_nodes) if options.num_nodes else None
    for title in ("new", "again"):
        started = time.perf_counter()
        received = Received()
        with repeat(received.measure, 1.0, "received"):
            metrics = classify(job, log=print_line, on_progress=partial(print_progress, Clock()))
            received.measure()
        print_run(title, metrics, time.perf_counter() - started)
        if options.num_nodes:
            print_line(
                f"  the driver received {received.total / 2**20:.1f} MiB, "
                f"{received.total / count:.0f} bytes a scan"
            )
        num_new = count if title == "new" else 0
        assert metrics["run"]["num_new"] == num_new, metrics["run"]
        assert metrics["counts"]["total"] == count, metrics["counts"]
    if cluster is not None:
        ray.shutdown()
        cluster.shutdown()
    check_rows(inbox, output, count)


def start_nodes(count: int) -> Cluster:
    """Start a head without CPUs, which the job joins, and nodes of one CPU."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(count):
        cluster.add_node(num_cpus=1, object_store_memory=500 * 2**20)
    cluster.wait_for_nodes()
    os.environ["RAY_ADDRESS"] = cluster.address
    return cluster


TCP_BYTES_RECEIVED = 128
"""Offset of ``tcpi_bytes_received`` in Linux's ``struct tcp_info``, a 64-bit integer."""


class Received:
    """Bytes that this process has received over its TCP connections."""

    def __init__(self) -> None:
        self._connections: dict[tuple[Any, Any], int] = {}
        self.measure()
        self._before = sum(self._connections.values())

    @property
    def total(self) -> int:
        """Bytes since the start; what came in a connection's last second may be missing."""
        return sum(self._connections.values()) - self._before

    def measure(self) -> None:
        """Look at the connections that are open now."""
        for path in Path("/proc/self/fd").iterdir():
            try:
                if not stat.S_ISSOCK(path.stat().st_mode):
                    continue
                with socket.socket(fileno=os.dup(int(path.name))) as one:
                    if one.family in (socket.AF_INET, socket.AF_INET6):
                        info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                        (count,) = struct.unpack_from("Q", info, TCP_BYTES_RECEIVED)
                        self._connections[one.getsockname(), one.getpeername()] = count
            except OSError:  # it listens, or was closed meanwhile
                continue


def check_rows(inbox: Path, output: Path, count: int) -> None:
    """Check that every scan has one row, and that it is about this scan's content."""
    table = pq.read_table(output / "predictions", columns=["scan_uri", "content_sha256"])
    table = table.sort_by("scan_uri")
    assert table.num_rows == count, table.num_rows
    start = 0
    for shard in sorted(inbox.iterdir()):
        expected = sorted((uri, sha256(content).hexdigest()) for uri, content in read_shard(shard))
        rows = table.slice(start, len(expected))
        start += len(expected)
        found = zip(*(column.to_pylist() for column in rows.columns), strict=True)
        assert list(found) == expected, shard
    assert start == count, start
    print_line(f"every one of {count:,} scans has its one row")


@dataclass
class Clock:
    """When a line was printed last."""

    printed: float = 0.0


def print_progress(clock: Clock, progress: Progress) -> None:
    """Print now and then how far a run is."""
    now = time.perf_counter()
    if now - clock.printed > PROGRESS_S:
        clock.printed = now
        print_line(f"  {progress.done:,}/{progress.total or 0:,} in {progress.elapsed_s:,.0f} s")


def print_run(title: str, metrics: dict[str, Any], total_s: float) -> None:
    """Print a run's figures."""
    run, count = metrics["run"], metrics["counts"]["total"]
    driver_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    line = (
        f"{count:>9,} scans {title:<5}  {total_s:8,.1f} s  {count / total_s:8,.0f} scans/s  "
        f"peak {run['memory_peak_bytes'] / 2**20:7,.0f} MiB, of it the driver {driver_mib:6,.0f}"
    )
    if title == "new":
        stages = " ".join(f"{k} {1e6 * s / count:.0f}" for k, s in run["stages_s"].items())
        line += f"\n  microseconds a scan: {stages}; {run['bottleneck']}"
        line += "\n  scans/s in each tenth of the scans: " + describe_tenths(run["timeline"])
    print_line(line)


def describe_tenths(timeline: list[list[float]]) -> str:
    """Say how fast each tenth of the scans was: a falling rate is a cost that grows."""
    seconds, done = np.array(timeline).T
    edges = np.linspace(done[0], done[-1], 11)
    taken = np.diff(np.interp(edges, done, seconds))
    return " ".join(f"{rate:.0f}" for rate in np.diff(edges) / taken.clip(1e-9))


def print_line(text: str) -> None:
    """Print at once, also where the output is a file."""
    print(text, flush=True)


def prepare(options: Options) -> None:
    """Write the scans and the classifier that are not there yet."""
    assert all(size % SHARD_ROWS == 0 for size in options.sizes), f"sizes are n * {SHARD_ROWS:,}"
    folder = options.data_path / options.kind
    folder.mkdir(parents=True, exist_ok=True)
    shards = range(max(options.sizes) // SHARD_ROWS)
    with ProcessPoolExecutor() as pool:
        for number, _ in enumerate(pool.map(partial(write_shard, folder, options.kind), shards), 1):
            if number % 10 == 0 or number == len(shards):
                print_line(f"scans ready: {number * SHARD_ROWS:,}")
    if not (options.data_path / "classifier").exists():
        save_classifier(
            str(options.data_path / "classifier"),
            build_network(len(BRAIN_TUMOUR_CLASSES)).state_dict(),
            classes=BRAIN_TUMOUR_CLASSES,
            preprocessing=Preprocessing(size_px=SIDE_PX),
            provenance={},
        )


if __name__ == "__main__":
    chosen = tyro.cli(Options)
    if chosen.only is not None:
        run_once(chosen, chosen.only)
    else:
        prepare(chosen)
        for number in chosen.sizes:
            command = [sys.executable, __file__, *sys.argv[1:], "--only", str(number)]
            subprocess.run(command, check=True)
