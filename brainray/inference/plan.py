"""Plan a bulk job: list the scans, leave out what is answered, and cut the rest into shards.

Listing, and the comparison with earlier predictions, run on the workers. The plan is written below
the output, in parts of about a million scans; the driver learns how many scans and shards each part
has, and no scan's name.
"""

import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.data

from brainray import storage
from brainray.cluster import TASK_CPUS
from brainray.data.read import TABLE_SUFFIX
from brainray.data.scans import LISTING_SCHEMA, Listing, Place, list_place
from brainray.errors import BrainrayError
from brainray.inference.stats import hash_names
from brainray.inference.store import KNOWN_SCHEMA, PredictionStore

MAX_PART_ROWS = 1_000_000
"""Scans, listed or answered, that one task compares."""
MAX_LISTING_S = 2.0
"""A task that has listed for so long returns what is left, for other tasks."""
TABLE_ROWS_PER_PART = 65_536
"""Consecutive rows of a table that stay in one part, so that a row group is read by few tasks."""
FIRST_SHARD_ROWS = 16
"""The first shards are small, so that the first predictions come soon; each next one is twice as
large."""
NOT_FINAL = ("missing", "unreadable")
"""Reasons of scans that are tried again in every run."""

PLAN_SCHEMA = LISTING_SCHEMA.append(pa.field("known_contents", pa.list_(pa.string())))
"""``known_contents``: content hashes (or reasons) that the scan is answered with already."""

_ROWS_SCHEMA = pa.unify_schemas([LISTING_SCHEMA, KNOWN_SCHEMA])
"""Listed scans, and answered ones, whose ``uri`` is null."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanOptions:
    """What a plan is made of."""

    places: tuple[Place, ...]
    store: PredictionStore
    run: str
    max_shard_rows: int
    num_engines: int


@dataclass(frozen=True, slots=True)
class Plan:
    """How much there is to do."""

    num_listed: int
    """Scans of all places, as often as they are named."""
    num_scans: int
    """Scans to open."""
    num_hidden: int
    """Hidden files that were skipped."""
    num_shards: tuple[int, ...]
    """Of each part."""


def make_plan(options: PlanOptions, on_listed: Callable[[int], None] = lambda _: None) -> Plan:
    """List, compare and write the plan of a run.

    Parameters
    ----------
    options : PlanOptions
    on_listed : callable
        Takes the number of parts, before the parts are gathered. To gather several takes CPUs.

    Raises
    ------
    DataError
        A table that was named holds no scans; a list is not UTF-8.
    StorageError
        Earlier predictions are damaged, or the plan cannot be written.
    """
    tables, num_listed, num_hidden = list_all(options.places, options.store.output_uri)
    known, num_known = _read_known(options.store)
    num_parts = math.ceil((num_listed + num_known) / MAX_PART_ROWS) or 1
    on_listed(num_parts)
    planned = _write_parts([*tables, *known], num_parts, options)
    found = {int(part["part"]): part for part in planned}
    counts = [found.get(part, {"num_rows": 0, "num_shards": 0}) for part in range(num_parts)]
    return Plan(
        num_listed,
        sum(int(part["num_rows"]) for part in counts),
        num_hidden,
        tuple(int(part["num_shards"]) for part in counts),
    )


def list_all(places: Sequence[Place], output_uri: str) -> tuple[list[Any], int, int]:
    """List places in tasks, which pass on what they do not reach.

    Returns
    -------
    list of ObjectRef of Table
        Rows of :data:`_ROWS_SCHEMA`.
    int
        How many they are.
    int
        Hidden files that were skipped.
    """
    task: Any = ray.remote(num_cpus=TASK_CPUS, num_returns=2)(_list_place)
    num_at_once = max(2, int(ray.cluster_resources().get("CPU", 1)))
    waiting = list(places)[::-1]
    running: dict[Any, Any] = {}
    tables, num_listed, num_hidden = [], 0, 0
    while waiting or running:
        while waiting and len(running) < num_at_once:
            table, about = task.remote(waiting.pop(), output_uri)
            running[about] = table
        (about,), _ = ray.wait(list(running), num_returns=1)
        tables.append(running.pop(about))
        listing, count = ray.get(about)
        waiting += listing.rest[::-1]
        num_listed += count
        num_hidden += listing.num_hidden
    return tables, num_listed, num_hidden


def _list_place(place: Place, output_uri: str) -> tuple[pa.Table, tuple[Listing, int]]:
    found = list_place(place, leave_out=[output_uri], max_seconds=MAX_LISTING_S)
    about = Listing(LISTING_SCHEMA.empty_table(), found.rest, found.num_hidden)
    return _complete(found.scans), (about, found.scans.num_rows)


def _complete(table: pa.Table) -> pa.Table:
    """Add the columns of the other kind of rows, as nulls."""
    columns = [
        table[field.name]
        if field.name in table.column_names
        else pa.nulls(table.num_rows, field.type)
        for field in _ROWS_SCHEMA
    ]
    return pa.table(columns, schema=_ROWS_SCHEMA)


def _read_known(store: PredictionStore) -> tuple[list[Any], int]:
    """Return references of the rows that are answered, and how many they are."""
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
    """Gather the rows of each part in one task, which writes the part's plan."""
    if num_parts == 1:
        # Ray Data would ask for a whole CPU, which the engines of the first wave may hold.
        task: Any = ray.remote(num_cpus=TASK_CPUS)(_write_only_part)
        whole: pa.Table = ray.get(task.remote(options, *tables))
        return list(whole.to_pylist())

    def assign(table: pa.Table) -> pa.Table:
        hashes = hash_names(find_neighbourhoods(table["scan_uri"].to_pylist()))
        return table.append_column("part", pa.array(hashes % num_parts, pa.int64()))

    def write(table: pa.Table) -> pa.Table:
        return write_part(table, int(table["part"][0].as_py()), options)

    rows = ray.data.from_arrow_refs(tables)
    assigned = rows.map_batches(assign, batch_format="pyarrow", num_cpus=TASK_CPUS)
    shuffled = assigned.groupby("part", num_partitions=num_parts)
    return list(shuffled.map_groups(write, batch_format="pyarrow").take_all())


def _write_only_part(options: PlanOptions, *tables: pa.Table) -> pa.Table:
    return write_part(pa.concat_tables(tables), 0, options)


def find_neighbourhoods(scan_uris: Sequence[str]) -> list[str]:
    """Return what the part of each scan is chosen by.

    That is its URI; of a table's row, the table and which :data:`TABLE_ROWS_PER_PART` rows of it.
    """
    mark = f"{TABLE_SUFFIX}#row="
    found = []
    for uri in scan_uris:
        table, sign, number = uri.rpartition(mark)
        is_row = bool(sign) and number.isdecimal()
        found.append(f"{table}#{int(number) // TABLE_ROWS_PER_PART}" if is_row else uri)
    return found


def write_part(table: pa.Table, part: int, options: PlanOptions) -> pa.Table:
    """Write a part of the plan: a Parquet file with a row group for each shard.

    Parameters
    ----------
    table : Table
        Rows of :data:`_ROWS_SCHEMA`: all that are listed or answered of some scans.

    Returns
    -------
    Table
        ``part``, ``num_rows`` and ``num_shards``.
    """
    new = choose_new(table)
    sizes = list_shard_sizes(
        new.num_rows, options.max_shard_rows, options.num_engines, is_first=part == 0
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
    """Choose the scans that are to be opened.

    Each once, and none that is answered with the same size and time; of the others, the contents
    that they are answered with.

    Returns
    -------
    Table
        Rows of :data:`PLAN_SCHEMA`, those of one file together.
    """
    is_listed = table["uri"].is_valid()
    listed, known = table.filter(is_listed), table.filter(pc.invert(is_listed))
    # Of a scan that is named twice, the row that knows the file's time: a list does not.
    count = listed.num_rows
    places = np.arange(count) + count * listed["modified_ns"].is_null().to_numpy()
    once = pa.table([listed["scan_uri"], places], ["scan_uri", "place"]).group_by("scan_uri")
    first = once.aggregate([("place", "min")])["place_min"].to_numpy()
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
    """Leave out the scans that are answered with the size and time that they have now."""
    keys = ["scan_uri", "size_bytes", "modified_ns"]
    is_final = pc.invert(pc.fill_null(pc.is_in(known["reason"], pa.array(NOT_FINAL)), False))
    final = known.filter(pc.and_(is_final, known["modified_ns"].is_valid())).select(keys)
    rows = pa.array(np.arange(listed.num_rows))

    def complete(table: pa.Table) -> pa.Table:  # nulls equal nothing in a join
        sizes = pc.fill_null(table["size_bytes"], -1)
        return table.set_column(table.schema.get_field_index("size_bytes"), "size_bytes", sizes)

    left = complete(listed.select(keys)).append_column("row", rows)
    kept = left.join(complete(final), keys=keys, join_type="left anti")["row"]
    return listed.take(kept)


def list_shard_sizes(
    num_rows: int, max_rows: int, num_engines: int, *, is_first: bool
) -> list[int]:
    """Cut scans into shards: at least eight for each engine, small ones first.

    Parameters
    ----------
    num_rows : int
        Scans of a part.
    max_rows : int
        Scans of a shard, at most.
    is_first : bool
        Whether the run begins with this part.
    """
    limit = min(max_rows, max(FIRST_SHARD_ROWS, math.ceil(num_rows / (8 * num_engines))))
    size = min(limit, FIRST_SHARD_ROWS) if is_first else limit
    sizes, left = [], num_rows
    while left:
        sizes.append(min(size, left))
        left -= sizes[-1]
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
        raise BrainrayError(f"The plan at '{plan_uri}' has vanished while the job ran.") from error
    return pq.ParquetFile(pa.BufferReader(content))
