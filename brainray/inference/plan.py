"""The plan of a bulk run: list the scans, drop those with predictions, divide the rest into shards.

The workers list the scans and compare them with earlier predictions. They write the plan below the
output, in parts of about a million scans. The driver receives the number of scans and shards of
each part. Planning opens no file: a file counts as one scan, however many slices it has.
"""

import io
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.data
from numpy.typing import NDArray

from brainray.cluster import TASK_CPUS
from brainray.data.labelled import IMAGE_SUFFIXES
from brainray.data.read import TABLE_SUFFIX
from brainray.data.scans import LISTING_SCHEMA, ScanSource, list_source
from brainray.errors import BrainrayError
from brainray.inference.stats import hash_names
from brainray.inference.store import KNOWN_SCHEMA, PredictionStore, Wave
from brainray.io import storage
from brainray.io.identifiers import Identifiers

MAX_PART_ROWS = 1_000_000
"""Listed scans and earlier predictions that one task compares."""
MAX_LISTING_S = 2.0
"""After this time a listing task returns the folders that are left, for other tasks."""
TABLE_ROWS_PER_PART = 65_536
"""Consecutive rows of a table that stay in one part, so that few tasks read a row group."""
FIRST_SHARD_ROWS = 16
"""The first shards are small, so that the first predictions come soon; sizes then double."""
BYTES_PER_SLICE = 64 * 2**10
"""Estimates the number of slices of DICOM and NIfTI files from their size. An uncompressed slice of
256 x 256 has twice as many bytes, a gzipped one about half."""
NOT_FINAL = ("missing", "unreadable")
"""Reasons of scans that every run tries again."""

PLAN_SCHEMA = LISTING_SCHEMA.append(pa.field("known_contents", pa.list_(pa.string())))
"""``known_contents``: content hashes (or reasons) for which the scan has rows already."""

_PICTURE_NAME = f"(?i)({'|'.join(map(re.escape, IMAGE_SUFFIXES))})$"

_ROWS_SCHEMA = pa.unify_schemas([LISTING_SCHEMA, KNOWN_SCHEMA])
"""Listed scans, and earlier predictions, whose ``uri`` is null."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanOptions:
    """The input of a plan."""

    sources: tuple[ScanSource, ...]
    store: PredictionStore
    run: str
    max_shard_rows: int
    """Estimated slices of a shard, at most."""
    num_engines: int
    identifiers: Identifiers


@dataclass(frozen=True, slots=True)
class Plan:
    """The size of a plan."""

    num_listed: int
    """Scans of all sources, with repetitions."""
    num_scans: int
    """Scans to open."""
    num_hidden: int
    """Hidden files that were skipped."""
    num_shards: tuple[int, ...]
    """Of each part."""
    num_indices: int = 0
    """Files named DICOMDIR that were skipped."""

    def list_waves(self, run: str, max_shards: int) -> Iterator[Wave]:
        """Yield the waves of a run, each with shards of one part."""
        for part, num_shards in enumerate(self.num_shards):
            for first in range(0, num_shards, max_shards):
                yield Wave(run, part, first, min(max_shards, num_shards - first))


def make_plan(options: PlanOptions) -> Plan:
    """Make the plan of a run, and write it below the output.

    Raises
    ------
    DataError
        A source is a table without images, or a list that is not UTF-8.
    StorageError
        Earlier predictions are damaged, or the plan cannot be written.
    """
    listed, counts = _list_all(options)
    known, num_known = _read_known(options.store)
    num_parts = math.ceil((counts["scans"] + num_known) / MAX_PART_ROWS) or 1
    written = {part["part"]: part for part in _write_parts([*listed, *known], num_parts, options)}
    parts = [written.get(part, {"num_rows": 0, "num_shards": 0}) for part in range(num_parts)]
    return Plan(
        counts["scans"],
        sum(part["num_rows"] for part in parts),
        counts["hidden"],
        tuple(part["num_shards"] for part in parts),
        counts["indices"],
    )


def _list_all(options: PlanOptions) -> tuple[list[Any], Counter[str]]:
    """List all sources in tasks; a task passes on the folders that it has no time for.

    Return references to rows of :data:`_ROWS_SCHEMA`, and counts.
    """
    task: Any = ray.remote(num_cpus=TASK_CPUS, num_returns=2)(_list_source)
    num_at_once = max(2, int(ray.cluster_resources().get("CPU", 1)))
    shared = ray.put((options.store.output_uri, options.identifiers))
    waiting = list(options.sources)[::-1]
    running: dict[Any, Any] = {}
    tables, counts = [], Counter[str]()
    while waiting or running:
        while waiting and len(running) < num_at_once:
            table, about = task.remote(waiting.pop(), shared)
            running[about] = table
        (about,), _ = ray.wait(list(running), num_returns=1)
        tables.append(running.pop(about))
        rest, found = ray.get(about)
        waiting += rest[::-1]
        counts.update(found)
    return tables, counts


def _list_source(
    source: ScanSource, shared: tuple[str, Identifiers]
) -> tuple[pa.Table, tuple[tuple[ScanSource, ...], dict[str, int]]]:
    output_uri, identifiers = shared
    found = list_source(source, leave_out=[output_uri], max_seconds=MAX_LISTING_S)
    counts = {"scans": found.scans.num_rows, "hidden": found.num_hidden}
    counts["indices"] = found.num_indices
    return _complete(name_scans(found.scans, identifiers)), (found.rest, counts)


def name_scans(listed: pa.Table, identifiers: Identifiers) -> pa.Table:
    """Replace scan_uri by its name in the output; ``uri`` keeps the path."""
    if not identifiers.redact_paths:
        return listed
    names = pa.array(map(identifiers.name, listed["scan_uri"].to_pylist()), pa.string())
    return listed.set_column(listed.schema.get_field_index("scan_uri"), "scan_uri", names)


def _complete(table: pa.Table) -> pa.Table:
    """Add the missing columns of _ROWS_SCHEMA as nulls."""
    empty = _ROWS_SCHEMA.empty_table()
    return pa.concat_tables([empty, table], promote_options="default").select(_ROWS_SCHEMA.names)


def _read_known(store: PredictionStore) -> tuple[list[Any], int]:
    """Return references to the scans with predictions, and their number."""
    files = store.list_files()
    if not files:
        return [], 0

    def read(batch: dict[str, Any]) -> Iterator[pa.Table]:
        for uri in batch["item"]:
            yield _complete(store.read_known(str(uri)))

    stream: Any = ray.data.from_items(files)
    known = stream.map_batches(read, batch_size=64, num_cpus=TASK_CPUS).materialize()
    return known.to_arrow_refs(), known.count()


def _write_parts(tables: list[Any], num_parts: int, options: PlanOptions) -> list[dict[str, Any]]:
    """Shuffle the rows to one task per part, which writes the part's plan."""
    if num_parts == 1:  # a shuffle would take seconds
        task: Any = ray.remote(num_cpus=TASK_CPUS)(
            lambda *tables: write_part(pa.concat_tables(tables), 0, options)
        )
        whole: list[dict[str, Any]] = ray.get(task.remote(*tables)).to_pylist()
        return whole

    def assign(table: pa.Table) -> pa.Table:
        hashes = hash_names(find_neighbourhoods(table["scan_uri"].to_pylist()))
        return table.append_column("part", pa.array(hashes % num_parts, pa.int64()))

    def write(table: pa.Table) -> pa.Table:
        return write_part(table, int(table["part"][0].as_py()), options)

    rows = ray.data.from_arrow_refs(tables)
    assigned = rows.map_batches(assign, batch_format="pyarrow", num_cpus=TASK_CPUS)
    shuffled = assigned.groupby("part", num_partitions=num_parts)
    return list(shuffled.map_groups(write, batch_format="pyarrow").take_all())


def find_neighbourhoods(scan_uris: Sequence[str]) -> list[str]:
    """Return for each scan the text whose hash chooses its part.

    It is the scan's URI; for a row of a table, the table and the block of
    :data:`TABLE_ROWS_PER_PART` rows.
    """
    row_name = re.compile(rf"(.*{re.escape(TABLE_SUFFIX)})#row=(\d+)", re.DOTALL)
    matches = [row_name.fullmatch(uri) for uri in scan_uris]
    return [
        f"{match[1]}#{int(match[2]) // TABLE_ROWS_PER_PART}" if match else uri
        for match, uri in zip(matches, scan_uris, strict=True)
    ]


def write_part(table: pa.Table, part: int, options: PlanOptions) -> pa.Table:
    """Write a part of the plan, a Parquet file with a row group for each shard.

    ``table`` has all rows of :data:`_ROWS_SCHEMA` of some scans. Return ``part``, ``num_rows`` and
    ``num_shards``.
    """
    new = choose_new(table)
    sizes = list_shard_sizes(
        weigh_files(new), options.max_shard_rows, options.num_engines, is_first=part == 0
    )
    if sizes:
        sink = io.BytesIO()
        with pq.ParquetWriter(sink, PLAN_SCHEMA, compression="zstd") as writer:
            start = 0
            for size in sizes:
                writer.write_table(new.slice(start, size), row_group_size=size)
                start += size
        uri = options.store.name_plan(options.run, name_part(part))
        storage.write_bytes(uri, sink.getvalue())
    return pa.table({"part": [part], "num_rows": [new.num_rows], "num_shards": [len(sizes)]})


def name_part(part: int) -> str:
    """Return the name of a part's file."""
    return f"{part:04d}.parquet"


def choose_new(table: pa.Table) -> pa.Table:
    """Choose the scans to open: each once, and only if there are no rows for its size and time.

    Return rows of :data:`PLAN_SCHEMA`, those of one file in sequence.
    """
    is_listed = table["uri"].is_valid()
    listed, known = table.filter(is_listed), table.filter(pc.invert(is_listed))
    # Of the rows of one scan, prefer one with the file's time; rows from a list have none.
    count = listed.num_rows
    priorities = np.arange(count) + count * listed["modified_ns"].is_null().to_numpy()
    once = pa.table([listed["scan_uri"], priorities], ["scan_uri", "priority"]).group_by("scan_uri")
    first = once.aggregate([("priority", "min")])["priority_min"].to_numpy()
    listed = listed.take(pa.array(first % max(1, count)))
    listed = listed.select(LISTING_SCHEMA.names)
    contents = pa.nulls(listed.num_rows, pa.list_(pa.string()))
    if known.num_rows:
        listed = _drop_unchanged(listed, known)
        by_scan = known.group_by("scan_uri").aggregate([("content", "list")])
        found = pc.index_in(listed["scan_uri"], value_set=by_scan["scan_uri"].combine_chunks())
        contents = by_scan["content_list"].combine_chunks().take(found)
    listed = listed.append_column(PLAN_SCHEMA.field("known_contents"), contents)
    order = [(name, "ascending") for name in ("uri", "row_group", "row")]
    return listed.sort_by(order).cast(PLAN_SCHEMA)


def _drop_unchanged(listed: pa.Table, known: pa.Table) -> pa.Table:
    """Drop the scans that have rows for their present size and time."""
    is_final = pc.invert(pc.fill_null(pc.is_in(known["reason"], pa.array(NOT_FINAL)), False))
    final = known.filter(pc.and_(is_final, known["modified_ns"].is_valid()))

    def get_keys(table: pa.Table) -> pa.Table:  # a join matches no nulls
        sizes = pc.fill_null(table["size_bytes"], -1)
        columns = [table["scan_uri"], sizes, table["modified_ns"]]
        return pa.table(columns, ["scan_uri", "size_bytes", "modified_ns"])

    rows = pa.array(np.arange(listed.num_rows))
    left = get_keys(listed).append_column("row", rows)
    keys = ["scan_uri", "size_bytes", "modified_ns"]
    return listed.take(left.join(get_keys(final), keys=keys, join_type="left anti")["row"])


def weigh_files(files: pa.Table) -> NDArray[np.int64]:
    """Estimate the slices of each file from ``uri`` and ``size_bytes``, shape (n,).

    A picture, and a file of unknown size, count as one.
    """
    is_picture = pc.match_substring_regex(files["uri"], _PICTURE_NAME).to_numpy()
    sizes = pc.fill_null(files["size_bytes"], 0).to_numpy()
    slices = np.maximum(1, -(-sizes // BYTES_PER_SLICE))
    return np.where(is_picture, 1, slices).astype(np.int64)


def list_shard_sizes(
    weights: NDArray[np.int64], max_weight: int, num_engines: int, *, is_first: bool
) -> list[int]:
    """Return the number of files of each shard: at least eight shards per engine, small ones first.

    Parameters
    ----------
    weights : ndarray of int64, shape (n,)
        Estimated slices of each file of a part, at least 1.
    max_weight : int
        Most slices of a shard that has more than one file.
    is_first : bool
        Whether this is the first part of the run.
    """
    ends = np.cumsum(weights)
    total = int(ends[-1]) if len(ends) else 0
    limit = min(max_weight, max(FIRST_SHARD_ROWS, math.ceil(total / (8 * num_engines))))
    size = min(limit, FIRST_SHARD_ROWS) if is_first else limit
    sizes, start = [], 0
    while start < len(ends):
        before = int(ends[start] - weights[start])
        end = max(start + 1, int(np.searchsorted(ends, before + size, side="right")))
        sizes.append(end - start)
        start = end
        size = min(limit, 2 * size) if len(sizes) % num_engines == 0 else size
    return sizes


def read_shard(plan_uri: str, shard: int) -> pa.Table:
    """Read a shard's scans: rows of :data:`PLAN_SCHEMA`."""
    return _open_part(plan_uri).read_row_group(shard)


@lru_cache(maxsize=2)
def _open_part(plan_uri: str) -> pq.ParquetFile:
    try:
        content = storage.read_bytes(plan_uri)
    except FileNotFoundError as error:
        raise BrainrayError(f"The plan at '{plan_uri}' was deleted while the job ran.") from error
    return pq.ParquetFile(pa.BufferReader(content))
