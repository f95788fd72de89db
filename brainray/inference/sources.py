"""Bulk outputs that are read again, with the scans that their rows were made from.

The rows of each group, such as a study, come together, and are done by one call. Small outputs are
done in this process; in larger ones, or where RAY_ADDRESS names a cluster, the groups are hash
partitions of Ray Data, and tasks do them.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from brainray.cluster import TASK_CPUS, connect_ray, raise_own_errors
from brainray.data.read import read_named_scan, read_scan
from brainray.data.scans import list_scans
from brainray.errors import ConfigError, RejectedImage
from brainray.images.slices import split_name
from brainray.inference.plan import name_scans
from brainray.io.identifiers import Identifiers

MAX_LOCAL_SLICES = 5_000
"""Slices of an output that are done in this process: some tens of MB, and a few minutes."""

Row = dict[str, Any]
"""A slice: a row of the prediction table."""
Result = dict[str, Any]
"""What a group's call returns, in JSON's types."""
_Task = TypeVar("_Task")


# ---- scans ---------------------------------------------------------------------------------------


def name_file(row: Row) -> str:
    """Return the name of the file that a row is a slice of."""
    return str(row["scan_uri"]) if row["frame"] is None else split_name(row["scan_uri"])[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceReader:
    """Reads files of scans by their names in an output; may be sent to workers."""

    listed: pa.Table | None = field(repr=False)
    """Rows of :data:`brainray.data.scans.LISTING_SCHEMA`, named as in the predictions; None where
    these names are the URIs."""
    max_bytes: int

    def select(self, names: Iterable[str]) -> "SourceReader":
        """Return a reader of some files alone, which finds each of them faster."""
        if self.listed is None:
            return self
        wanted = pa.array(list(names), pa.string())
        return replace(self, listed=self.listed.filter(pc.is_in(self.listed["scan_uri"], wanted)))

    def read(self, name: str) -> bytes:
        """Read a file; raises RejectedImage with the reason ``missing`` or ``unreadable``."""
        if self.listed is None:
            return read_named_scan(name, max_bytes=self.max_bytes)
        index = pc.index(self.listed["scan_uri"], name).as_py()
        if index < 0:
            raise RejectedImage("missing", "The source is not among the files of --scans-uri.")
        found = self.listed.slice(index, 1).to_pylist()[0]
        return read_scan(found["uri"], found["row_group"], found["row"], max_bytes=self.max_bytes)


def check_scans_uri(predictions_uri: str, identifiers: Identifiers, uris: Sequence[str]) -> None:
    """Raise ConfigError if the paths of an output are redacted and no URIs are given."""
    if identifiers.redact_paths and not uris:
        raise ConfigError(
            f"'{predictions_uri}' has hashes in place of paths. Give the folders of its scans "
            "by --scans-uri."
        )


def open_sources(
    scans_uris: Sequence[str],
    identifiers: Identifiers,
    *,
    leave_out: Sequence[str],
    max_bytes: int,
) -> SourceReader:
    """List the scans below some URIs, if any, under the names that they have in an output."""
    listed = None
    if scans_uris:
        listed = name_scans(list_scans(scans_uris, leave_out=leave_out), identifiers)
    return SourceReader(listed=listed, max_bytes=max_bytes)


# ---- groups --------------------------------------------------------------------------------------


def process_groups(
    files: Sequence[str],
    read: Callable[[str], pa.Table],
    key: str,
    prepare: Callable[[], _Task],
    process: Callable[[list[Row], _Task], Iterable[Result]],
    *,
    choose: Callable[[Iterable[Row]], Iterable[Row]] = iter,
    num_slices: int,
    num_partitions: int,
    num_tasks: int,
    verbose: bool = False,
) -> Iterator[Result]:
    """Group the rows of an output, and yield what is made of each group.

    Parameters
    ----------
    files : sequence of str
        Files of the output.
    read : callable
        From a file to its rows.
    key : str
        Column that is the same for the rows of a group.
    prepare : callable
        Makes, once, what all groups need: on Ray in a task, so that scans are not listed here.
    process : callable
        Takes the rows of a group, and what `prepare` made.
    choose : callable
        Leaves out rows; gets all of them where that is possible, else those of a group.
    num_slices : int
        Rows of all files; more than :data:`MAX_LOCAL_SLICES` are done on Ray.
    num_partitions, num_tasks : int
        Hash partitions, and groups at a time, on Ray.
    verbose : bool
        Whether Ray's own lines are shown.
    """
    if not os.environ.get("RAY_ADDRESS") and num_slices <= MAX_LOCAL_SLICES:
        task = prepare()
        groups: dict[Any, list[Row]] = {}
        for row in choose(row for uri in files for row in read(uri).to_pylist()):
            groups.setdefault(row[key], []).append(row)
        for name in sorted(groups):
            yield from process(groups[name], task)
        return
    connect_ray(verbose=verbose)

    def read_files(batch: dict[str, Any]) -> Iterator[pa.Table]:
        for uri in batch["item"]:
            yield read(str(uri))

    def process_rows(rows: pa.Table) -> pa.Table:
        results = process(list(choose(rows.to_pylist())), _get_prepared(prepared))
        return pa.table({"result": pa.array(map(json.dumps, results), pa.string())})

    with raise_own_errors():
        # Of two returns the first stays on the cluster; the second raises here what listing raised.
        make: Any = ray.remote(num_cpus=TASK_CPUS, num_returns=2)(lambda: (prepare(), None))
        prepared, is_prepared = make.remote()
        ray.get(is_prepared)
        rows: Any = ray.data.from_items(list(files))
        results = (
            rows.map_batches(read_files, batch_size=8, num_cpus=TASK_CPUS)
            .groupby(key, num_partitions=num_partitions)
            .map_groups(
                process_rows,
                batch_format="pyarrow",
                num_cpus=TASK_CPUS,
                compute=ray.data.TaskPoolStrategy(size=min(num_tasks, num_partitions)),
            )
        )
        for batch in results.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield from map(json.loads, batch["result"].to_pylist())


@lru_cache(maxsize=1)
def _get_prepared(prepared: "ray.ObjectRef[_Task]") -> _Task:
    return ray.get(prepared)
