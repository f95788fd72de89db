"""What Ray Data does with the shards of a bulk run: read, decode, predict, write, count.

A shard is some scans that were chosen before any of them was predicted. They pass through the
stream as the rows of one block, and end as one file.
"""

import json
import pickle
import time
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from ray.data import Dataset, ExecutionResources

from brainray import storage
from brainray.cluster import TASK_CPUS
from brainray.data.read import read_scan
from brainray.errors import ClassificationError, RejectedImage
from brainray.images.decode import DecodeLimits
from brainray.images.preprocess import Preprocessing, open_scan
from brainray.inference.labels import Labels
from brainray.inference.plan import PLAN_SCHEMA, name_part, read_shard
from brainray.inference.predict import PredictStage, pack_images
from brainray.inference.schema import SCAN_SCHEMA
from brainray.inference.stats import RunStats, compute_statistics
from brainray.inference.store import PredictionStore

MAX_BLOCK_BYTES = 128 * 2**20
"""Network input of one shard, at most."""
OPENED_FILE = "opened.json"
"""In the plan's folder: how many shards the first wave has; null until the plan is made."""
POLL_S, MAX_POLL_S = 0.05, 0.25
"""Pause between two looks for the plan, at the start; each is longer than the one before."""
ALREADY_ANSWERED = "already_answered"
"""Reason that a scan has within the stream whose content has a row; it gets no other one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WaveTask:
    """What the tasks of a run need to know."""

    store: PredictionStore
    run: str
    preprocessing: Preprocessing
    limits: DecodeLimits
    labels: "ray.ObjectRef[Labels | None]"


@dataclass(frozen=True, kw_only=True, slots=True)
class DoneShard:
    """What the driver learns of a shard."""

    number: int
    num_known: int
    """Scans whose content had a row already."""
    stats: RunStats
    stages_s: dict[str, float]
    """Seconds of work, by stage."""
    runtime: dict[str, str] | None
    """What computed; None where nothing was written."""


def build_stream(
    task: WaveTask,
    stage: PredictStage,
    part: int,
    shards: list[int],
    num_decoders: int,
    *,
    is_first: bool = False,
) -> Dataset:
    """Build the stream of a wave; nothing runs until it is read.

    The first wave waits for its plan, and has fewer shards where that has.

    Returns
    -------
    Dataset
        Column ``done``: a pickled :class:`DoneShard` for each shard that has scans.
    """
    numbers = ray.data.from_items(
        [{"shard": shard} for shard in shards], override_num_blocks=len(shards)
    )
    opened = numbers.map_batches(
        open_shard,  # type: ignore[arg-type]  # Ray's hint knows no fn_kwargs
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={"task": task, "part": part, "is_first": is_first},
        num_cpus=TASK_CPUS,
        compute=ray.data.TaskPoolStrategy(size=num_decoders),
    )
    done: Dataset = stage.apply(opened).map_batches(
        write_shards,  # type: ignore[arg-type]
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={"task": task, "part": part},
        num_cpus=TASK_CPUS,
    )
    context = done.context
    context.target_max_block_size = 2 * MAX_BLOCK_BYTES  # a shard stays one block
    context.execution_options.resource_limits = ExecutionResources.for_limits(
        object_store_memory=(4 + 4 * stage.pool.num_engines) * MAX_BLOCK_BYTES
    )
    return done


def open_shard(block: pa.Table, *, task: WaveTask, part: int, is_first: bool) -> pa.Table:
    """Read, decode and resize the scans of a shard; runs as a Ray Data task.

    Returns
    -------
    Table
        What :meth:`brainray.inference.predict.PredictStage.apply` takes, with ``shard``,
        ``shard_rows``, ``read_s`` and ``decode_s``; no rows for a shard that the plan has not.
    """
    size_px = task.preprocessing.size_px
    num_opened = _wait_for_plan(task) if is_first else None
    tables = []
    for shard in block["shard"].to_pylist():
        is_planned = num_opened is None or shard < num_opened
        plan_uri = task.store.name_plan(task.run, name_part(part))
        scans = read_shard(plan_uri, shard) if is_planned else PLAN_SCHEMA.empty_table()
        loaded = [_open_scan(row, task) for row in scans.to_pylist()]
        columns = {
            name: pa.array(
                [getattr(scan, name, None) for scan in loaded], SCAN_SCHEMA.field(name).type
            )
            for name in SCAN_SCHEMA.names
        }
        tables.append(
            pa.table(
                columns
                | {
                    "image": pack_images([scan.image for scan in loaded], size_px),
                    "shard": pa.array([shard] * len(loaded), pa.int64()),
                    "shard_rows": pa.array([len(loaded)] * len(loaded), pa.int64()),
                    "read_s": pa.array([scan.read_s for scan in loaded], pa.float32()),
                    "decode_s": pa.array([scan.decode_s for scan in loaded], pa.float32()),
                }
            )
        )
    return pa.concat_tables(tables)


def _wait_for_plan(task: WaveTask) -> int:
    """Wait until the plan is made, and return how many shards the first wave has."""
    opened_uri = task.store.name_plan(task.run, OPENED_FILE)
    pause_s = POLL_S
    try:
        while (num_opened := storage.read_json(opened_uri)) is None:
            time.sleep(pause_s)
            pause_s = min(1.5 * pause_s, MAX_POLL_S)
    except FileNotFoundError:
        return 0  # the plan failed; the driver says why
    return int(num_opened)


@dataclass(slots=True)
class _OpenedScan:
    """One scan, opened or rejected."""

    scan_uri: str
    size_bytes: int | None
    modified_ns: int | None
    reason: str | None
    content_sha256: str | None = None
    width_px: int | None = None
    height_px: int | None = None
    image: Any = None
    read_s: float = 0.0
    decode_s: float = 0.0


def _open_scan(row: dict[str, Any], task: WaveTask) -> _OpenedScan:
    scan = _OpenedScan(row["scan_uri"], row["size_bytes"], row["modified_ns"], row["reason"])
    known = row["known_contents"] or ()
    started = time.perf_counter()
    try:
        if scan.reason is None:
            limits = task.limits
            content = read_scan(
                row["uri"], row["row_group"], row["row"], max_bytes=limits.max_bytes
            )
            if len(content) <= limits.max_bytes:  # else it was not read to its end
                scan.content_sha256 = sha256(content).hexdigest()
            scan.read_s = time.perf_counter() - started
            if scan.content_sha256 not in known:
                opened = open_scan(content, task.preprocessing, limits)
                scan.height_px, scan.width_px = opened.samples.shape
                scan.image = opened.image
                scan.decode_s = time.perf_counter() - started - scan.read_s
    except RejectedImage as rejection:
        scan.reason = rejection.reason
    if (scan.content_sha256 or scan.reason) in known:
        scan.reason, scan.image = ALREADY_ANSWERED, None
    return scan


def write_shards(block: pa.Table, *, task: WaveTask, part: int) -> pa.Table:
    """Write the predictions of whole shards, a file for each; runs as a Ray Data task."""
    done = []
    for shard in pc.unique(block["shard"]).to_pylist():
        rows = block.filter(pc.equal(block["shard"], shard))
        expected = rows["shard_rows"][0].as_py()
        if rows.num_rows != expected:
            raise ClassificationError(
                f"Ray Data cut a shard of {expected:,} scans: {rows.num_rows:,} came together. "
                "This is a defect of brainray; please report it."
            )
        done.append(pickle.dumps(_write_shard(rows, task, part, shard)))
    return pa.table({"done": pa.array(done, pa.binary())})


def _write_shard(rows: pa.Table, task: WaveTask, part: int, shard: int) -> DoneShard:
    started = time.perf_counter()
    store = task.store
    stages_s = {
        name: float(pc.sum(rows[f"{name}_s"]).as_py()) for name in ("read", "decode", "predict")
    }
    is_known = pc.fill_null(pc.equal(rows["reason"], ALREADY_ANSWERED), False)
    new = rows.filter(pc.invert(is_known))
    stats, runtime = RunStats(), None
    if new.num_rows:
        runtime = json.loads(new["runtime"][0].as_py())
        counted = compute_statistics(new, store.classes)
        uri = store.name_file(task.run, part, shard)
        there = store.write_shard(uri, new, runtime, counted.to_json())
        labels = _get_labels(task.labels)
        if labels is not None or there is not new:
            counted = compute_statistics(there, store.classes, labels)
        stats = counted
    stages_s["write"] = time.perf_counter() - started
    return DoneShard(
        number=shard,
        num_known=rows.num_rows - new.num_rows,
        stats=stats,
        stages_s=stages_s,
        runtime=runtime,
    )


@lru_cache(maxsize=1)
def _get_labels(labels: "ray.ObjectRef[Labels | None]") -> Labels | None:
    """Return the labels; unpickling a million of them for each shard would take a second."""
    return ray.get(labels)
