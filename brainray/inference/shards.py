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

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from numpy.typing import NDArray
from ray.data import Dataset, ExecutionResources

from brainray.cluster import TASK_CPUS
from brainray.data.read import read_scan
from brainray.data.slice_columns import describe_slice
from brainray.errors import ClassificationError, RejectedImage
from brainray.images.preprocess import Preprocessing
from brainray.images.slices import ReadOptions, name_slice, open_file, open_slice
from brainray.inference.labels import Labels
from brainray.inference.plan import name_part, read_shard
from brainray.inference.predict import PredictStage, pack_images
from brainray.inference.schema import SCAN_SCHEMA
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


@dataclass(frozen=True, kw_only=True, slots=True)
class DoneShard:
    """What the driver receives about a shard."""

    number: int
    num_files: int
    """Scan files of the shard."""
    num_known: int
    """Scan files among them whose content had rows already."""
    stats: RunStats
    stages_s: dict[str, float]
    """Seconds of work, by stage."""
    runtime: dict[str, str] | None
    """From :meth:`brainray.inference.engine.Engine.describe`; None if nothing was written."""


def build_stream(
    task: WaveTask,
    stage: PredictStage,
    part: int,
    shards: list[int],
    num_decoders: int,
) -> Dataset:
    """Build the stream of a wave, which runs when it is iterated.

    Returns
    -------
    Dataset
        Column ``done``: a pickled :class:`DoneShard` for each shard.
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
        Input of :meth:`brainray.inference.predict.PredictStage.apply` with a row for each slice,
        and ``shard``, ``shard_rows``, ``shard_files``, ``read_s`` and ``decode_s``.
    """
    tables = []
    for shard in block["shard"].to_pylist():
        files = read_shard(task.store.name_plan(task.run, name_part(part)), shard)
        opened = [row for file in files.to_pylist() for row in _open_file(file, task)]
        about = {"shard": shard, "shard_rows": len(opened), "shard_files": files.num_rows}
        rows = pa.Table.from_pylist([row.columns for row in opened], schema=SCAN_SCHEMA)
        images = pack_images([row.image for row in opened], task.preprocessing.size_px)
        rows = rows.append_column("image", images)
        for name, number in about.items():
            rows = rows.append_column(name, pa.array([number] * len(opened), pa.int64()))
        for name in ("read_s", "decode_s"):
            seconds = pa.array([getattr(row, name) for row in opened], pa.float32())
            rows = rows.append_column(name, seconds)
        tables.append(rows)
    return pa.concat_tables(tables)


@dataclass(slots=True)
class _OpenedRow:
    """A slice, opened or rejected, or a file that is rejected as a whole."""

    columns: dict[str, Any]
    """Columns of :data:`brainray.inference.schema.SCAN_SCHEMA`; a missing one is null."""
    image: NDArray[np.uint8] | None = None
    """Network input; None if rejected."""
    read_s: float = 0.0
    decode_s: float = 0.0


def _open_file(planned: dict[str, Any], task: WaveTask) -> list[_OpenedRow]:
    """Open the slices of a row of PLAN_SCHEMA; every file has at least one row."""
    whole = _OpenedRow({name: planned[name] for name in ("scan_uri", "size_bytes", "modified_ns")})
    known = planned["known_contents"] or ()
    reason, started = planned["reason"], time.perf_counter()
    try:
        if reason is None:
            content = read_scan(
                *(planned[name] for name in ("uri", "row_group", "row")),
                max_bytes=task.reading.limits.max_bytes,
            )
            if (
                len(content) <= task.reading.limits.max_bytes
            ):  # a larger file was not read to its end
                whole.columns["content_sha256"] = sha256(content).hexdigest()
            whole.read_s = time.perf_counter() - started
            if whole.columns.get("content_sha256") not in known:
                return _open_slices(content, whole, task)
    except RejectedImage as rejection:
        reason = rejection.reason
    if (whole.columns.get("content_sha256") or reason) in known:
        reason = ALREADY_ANSWERED
    whole.columns["reason"] = reason
    return [whole]


def _open_slices(content: bytes, whole: _OpenedRow, task: WaveTask) -> list[_OpenedRow]:
    """Open a file's slices; each of them may be rejected.

    Raises
    ------
    RejectedImage
        The file as a whole is rejected.
    """
    started = time.perf_counter()
    file = open_file(content, task.reading, key=task.key)
    num_bytes = len(file.slices) * task.preprocessing.size_px**2
    if num_bytes > MAX_FILE_BYTES:
        raise RejectedImage("too_large", f"The file has {len(file.slices):,} slices, too many.")
    rows = []
    for index, info in enumerate(file.slices):
        name = name_slice(whole.columns["scan_uri"], info.frame)
        row = _OpenedRow(whole.columns | {"scan_uri": name} | describe_slice(info, None))
        try:
            opened = open_slice(file, index, task.preprocessing)
            height, width = opened.scan.samples.shape
            row.columns |= {"height_px": height, "width_px": width}
            row.columns["grey_range"] = opened.grey_range
            row.image = opened.scan.image
        except RejectedImage as rejection:
            row.columns["reason"] = rejection.reason
        ended = time.perf_counter()
        row.decode_s, started = ended - started, ended
        rows.append(row)
    rows[0].read_s = whole.read_s
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
        num_files=rows["shard_files"][0].as_py(),
        num_known=rows.num_rows - new.num_rows,
        stats=stats,
        stages_s=stages_s,
        runtime=runtime,
    )


@lru_cache(maxsize=1)
def _get_labels(labels: "ray.ObjectRef[Labels | None]") -> Labels | None:
    """Return the labels; cached, since unpickling a million of them takes a second."""
    return ray.get(labels)
