"""The tasks of a bulk run on Ray Data: read and decode a shard; write its predictions.

A shard is a set of scan files, fixed by the plan. Its slices are the rows of one block of the
stream, and of one output file.
"""

import json
import pickle
import time
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from ray.data import Dataset, ExecutionResources

from brainray.cluster import TASK_CPUS
from brainray.data.read import read_scan
from brainray.errors import ClassificationError, RejectedImage
from brainray.images.preprocess import Preprocessing
from brainray.images.slices import ReadOptions, open_file
from brainray.inference.labels import Labels
from brainray.inference.plan import name_part, read_shard
from brainray.inference.predict import PredictStage, pack_images
from brainray.inference.schema import SCAN_SCHEMA, SliceRow, open_slices
from brainray.inference.stats import RunStats, compute_statistics
from brainray.inference.store import PredictionStore

MAX_BLOCK_BYTES = 128 * 2**20
"""Approximate size of a shard's network input; files may have more slices than estimated."""
MAX_FILE_BYTES = 2**30
"""Largest network input of one file: 21,399 slices at 224 px."""
ALREADY_ANSWERED = "already_answered"
"""Reason, within the stream only, of a file whose content has rows already."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WaveTask:
    """Options of the tasks of a run."""

    store: PredictionStore
    run: str
    preprocessing: Preprocessing
    reading: ReadOptions
    key: bytes = field(repr=False)
    """Key of the hashes of identifiers."""
    labels: "ray.ObjectRef[Labels | None]"


def build_stream(
    task: WaveTask, stage: PredictStage, part: int, shards: list[int], num_decoders: int
) -> Dataset:
    """Build the stream of a wave, which runs when it is iterated.

    Its column ``done`` has for each shard a pickle of its number and of the arguments of
    :meth:`brainray.inference.stats.Progress.add`.
    """
    numbers = ray.data.from_items(
        [{"shard": shard} for shard in shards], override_num_blocks=len(shards)
    )
    opened = numbers.map_batches(
        open_shard,  # type: ignore[arg-type]  # Ray's hint knows no fn_kwargs
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={"task": task, "part": part},
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
    context.target_max_block_size = None  # keep a shard in one block
    context.execution_options.resource_limits = ExecutionResources.for_limits(
        object_store_memory=(4 + 4 * stage.pool.num_engines) * MAX_BLOCK_BYTES
    )
    return done


def open_shard(block: pa.Table, *, task: WaveTask, part: int) -> pa.Table:
    """Read the files of a shard, and decode and resize their slices; runs as a Ray Data task.

    Returns
    -------
    Table
        Input of :meth:`brainray.inference.predict.PredictStage.apply` with a row for each slice.
        ``shard``, ``shard_rows``, ``shard_files``, ``read_s`` and ``decode_s`` are those of the
        whole shard.
    """
    tables = []
    for shard in block["shard"].to_pylist():
        files = read_shard(task.store.name_plan(task.run, name_part(part)), shard)
        opened, read_s = [], 0.0
        for file in files.to_pylist():
            rows, seconds = _open_file(file, task)
            opened += rows
            read_s += seconds
        table = pa.Table.from_pylist([row.columns for row in opened], schema=SCAN_SCHEMA)
        images = pack_images([row.image for row in opened], task.preprocessing.size_px)
        table = table.append_column("image", images)
        about = {"shard": shard, "shard_rows": len(opened), "shard_files": files.num_rows}
        about |= {"read_s": read_s, "decode_s": sum(row.decode_s for row in opened)}
        for name, number in about.items():
            table = table.append_column(name, pa.array([number] * len(opened)))
        tables.append(table)
    return pa.concat_tables(tables)


def _open_file(planned: dict[str, Any], task: WaveTask) -> tuple[list[SliceRow], float]:
    """Open a file of PLAN_SCHEMA; return its slices, or one row, and the seconds of reading."""
    scan = {name: planned[name] for name in ("scan_uri", "size_bytes", "modified_ns")}
    known = planned["known_contents"] or ()
    max_bytes = task.reading.limits.max_bytes
    reason, read_s, started = planned["reason"], 0.0, time.perf_counter()
    try:
        if reason is None:
            location = [planned[name] for name in ("uri", "row_group", "row")]
            content = read_scan(*location, max_bytes=max_bytes)
            if len(content) <= max_bytes:  # a larger file was not read to its end
                scan["content_sha256"] = sha256(content).hexdigest()
            read_s = time.perf_counter() - started
            if scan.get("content_sha256") not in known:
                return _open_slices(content, scan, task), read_s
    except RejectedImage as rejection:
        reason = rejection.reason
    if (scan.get("content_sha256") or reason) in known:
        reason = ALREADY_ANSWERED
    return [SliceRow(scan | {"reason": reason})], read_s


def _open_slices(content: bytes, scan: dict[str, Any], task: WaveTask) -> list[SliceRow]:
    started = time.perf_counter()
    file = open_file(content, task.reading, key=task.key)
    if len(file.slices) * task.preprocessing.size_px**2 > MAX_FILE_BYTES:
        raise RejectedImage("too_large", f"The file has {len(file.slices):,} slices, too many.")
    opening_s = time.perf_counter() - started
    rows = list(open_slices(file, scan, task.preprocessing))
    rows[0].decode_s += opening_s
    return rows


def write_shards(block: pa.Table, *, task: WaveTask, part: int) -> pa.Table:
    """Write one file for each shard; runs as a Ray Data task."""
    done = []
    for shard in pc.unique(block["shard"]).to_pylist():
        rows = block.filter(pc.equal(block["shard"], shard))
        expected = rows["shard_rows"][0].as_py()
        if rows.num_rows != expected:
            raise ClassificationError(
                f"Ray Data split a shard: expected {expected:,} slices, got {rows.num_rows:,}. "
                "This is a defect of brainray; please report it."
            )
        done.append(pickle.dumps(_write_shard(rows, task, part, shard)))
    return pa.table({"done": pa.array(done, pa.binary())})


def _write_shard(
    rows: pa.Table, task: WaveTask, part: int, shard: int
) -> tuple[int, dict[str, Any]]:
    started = time.perf_counter()
    store = task.store
    is_known = pc.fill_null(pc.equal(rows["reason"], ALREADY_ANSWERED), False)
    new = rows.filter(pc.invert(is_known))
    stats, runtime = RunStats(), None
    if new.num_rows:
        runtime = json.loads(new["runtime"][0].as_py())
        stats = compute_statistics(new, store.classes)
        uri = store.name_file(task.run, part, shard)
        there = store.write_shard(uri, new, runtime, stats.to_json())
        labels = _get_labels(task.labels)
        if labels is not None or there is not new:
            stats = compute_statistics(there, store.classes, labels)
    return shard, {
        "stats": stats,
        "num_files": rows["shard_files"][0].as_py(),
        "num_known": rows.num_rows - new.num_rows,
        "stages_s": {
            "read": rows["read_s"][0].as_py(),
            "decode": rows["decode_s"][0].as_py(),
            "predict": pc.sum(rows["predict_s"]).as_py(),
            "write": time.perf_counter() - started,
        },
        "runtime": runtime,
    }


@lru_cache(maxsize=1)
def _get_labels(labels: "ray.ObjectRef[Labels | None]") -> Labels | None:
    """Return the labels; cached, since unpickling a million of them takes a second."""
    return ray.get(labels)
