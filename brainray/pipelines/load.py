"""The first half of the bulk stream: list scans, read and decode them, a chunk at a time.

Apart from the half that predicts, because torch takes seconds to import and hundreds of
megabytes, which no process that only decodes needs.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import pyarrow as pa
import ray

from brainray.dataset.inbox import FoundScan, chunk_scans, list_scans
from brainray.dataset.scan import read_scan
from brainray.errors import RejectedImage
from brainray.pipelines.answers import Ledger
from brainray.pixels.decode import DecodeLimits, decode_image
from brainray.pixels.preprocess import Preprocessing, resize_image


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadPlan:
    """Which scans a bulk run opens, and how."""

    scans_uris: tuple[str, ...]
    output_uri: str
    """What lies there is no scan."""
    preprocessing: Preprocessing
    limits: DecodeLimits


def pack(table: pa.Table) -> bytes:
    """Write a table as one value."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def unpack(value: pa.Scalar) -> pa.Table:
    """Read a table from a value, without copying it."""
    return pa.ipc.open_stream(value.as_buffer()).read_all()


def list_unanswered(
    plan: LoadPlan, ledger: Ledger, hidden: Callable[[], object] = lambda: None
) -> Iterator[FoundScan]:
    """List what is not answered yet, as far as names, sizes and times tell."""
    for scan in list_scans(plan.scans_uris, leave_out=[plan.output_uri], hidden=hidden):
        if not ledger.has_file(scan.scan_uri, scan.size_bytes, scan.modified_ns):
            yield scan


def list_chunks(
    _: pa.Table, *, plan: LoadPlan, ledger: "ray.ObjectRef[Ledger]"
) -> Iterator[pa.Table]:
    """List what is to be answered; runs as one Ray Data task beside the others."""
    scans = list_unanswered(plan, ray.get(ledger))
    resumed = time.perf_counter()
    for chunk in chunk_scans(scans):
        spent = time.perf_counter() - resumed
        yield pa.table({"chunk": [pack(chunk)], "list_s": [spent]})
        resumed = time.perf_counter()


@dataclass(slots=True)
class _Loaded:
    """One scan, opened or rejected."""

    scan_uri: str
    size_bytes: int | None
    modified_ns: int | None
    reason: str | None
    content_sha256: str | None = None
    is_known: bool = False
    width_px: int | None = None
    height_px: int | None = None
    pixels: bytes | None = None


class _Stopwatch:
    """Adds up the time of its laps."""

    def __init__(self) -> None:
        self.total_s = 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.total_s += time.perf_counter() - self._started


def load_chunk(block: pa.Table, *, plan: LoadPlan, ledger: "ray.ObjectRef[Ledger]") -> pa.Table:
    """Read, decode and resize a chunk of scans; runs as a Ray Data task."""
    known = ray.get(ledger)
    reading, decoding = _Stopwatch(), _Stopwatch()
    loaded = [
        _load_scan(row, plan, known, reading, decoding)
        for row in unpack(block["chunk"][0]).to_pylist()
    ]
    names = _Loaded.__slots__
    columns = {name: [getattr(one, name) for one in loaded] for name in names}
    schema = pa.schema(
        [
            ("scan_uri", pa.string()),
            ("size_bytes", pa.int64()),
            ("modified_ns", pa.int64()),
            ("reason", pa.string()),
            ("content_sha256", pa.string()),
            ("is_known", pa.bool_()),
            ("width_px", pa.int32()),
            ("height_px", pa.int32()),
            ("pixels", pa.binary(plan.preprocessing.size_px**2)),
        ]
    )
    return pa.table(
        {
            "chunk": [pack(pa.table(columns, schema=schema))],
            "list_s": block["list_s"],
            "read_s": [reading.total_s],
            "decode_s": [decoding.total_s],
        }
    )


def _load_scan(
    row: dict[str, Any], plan: LoadPlan, known: Ledger, reading: _Stopwatch, decoding: _Stopwatch
) -> _Loaded:
    scan = _Loaded(
        row["scan_uri"],
        row["size_bytes"] if row["size_bytes"] >= 0 else None,
        row["modified_ns"] or None,
        row["reason"],
    )
    try:
        if scan.reason is None:
            with reading:
                content = _read(row, plan.limits)
                if len(content) <= plan.limits.max_bytes:  # else it was not read to its end
                    scan.content_sha256 = sha256(content).hexdigest()
            if not known.has_content(scan.scan_uri, scan.content_sha256):
                with decoding:
                    pixels = decode_image(content, plan.limits)
                    scan.height_px, scan.width_px = pixels.shape
                    scan.pixels = resize_image(pixels, plan.preprocessing).tobytes()
    except RejectedImage as rejection:
        scan.reason = rejection.reason
    scan.is_known = known.has_content(scan.scan_uri, scan.content_sha256 or scan.reason)
    return scan


def _read(row: dict[str, Any], limits: DecodeLimits) -> bytes:
    return read_scan(row["uri"], row["row_group"], row["row"], max_bytes=limits.max_bytes)
