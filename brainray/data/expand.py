"""Expand files with several slices: a row for each slice in the sample table."""

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from numpy.typing import NDArray

from brainray.data.labelled import IMAGE_SUFFIXES, FoundSamples
from brainray.data.read import read_scan
from brainray.errors import RejectedImage
from brainray.images.slices import ReadOptions, name_slice, open_file

FILES_PER_TASK = 16
"""Files of a task: some seconds of work for volumes."""


def expand_files(found: FoundSamples, reading: ReadOptions) -> FoundSamples:
    """Count the slices of files that may have several, and give each slice a row.

    Files are opened, except those with a picture's suffix, scans in Parquet tables, and rows that
    name a slice. Rejected slices have a row too;
    :func:`brainray.data.fingerprint.fingerprint_samples` gives the reason.

    Parameters
    ----------
    found : FoundSamples
        From :func:`brainray.data.labelled.find_samples`.
    reading : ReadOptions
        Options for reading the files.

    Returns
    -------
    FoundSamples
        A slice's ``path`` is :func:`brainray.images.slices.name_slice` of its file's.
    """
    samples = found.samples
    is_file = (samples["row_group"].to_numpy() < 0) & (samples["frame"].to_numpy() < 0)
    is_picture = [uri.lower().endswith(IMAGE_SUFFIXES) for uri in samples["uri"].to_pylist()]
    rows = np.flatnonzero(is_file & ~np.array(is_picture, np.bool_))
    if not len(rows):
        return found
    counts = np.zeros(samples.num_rows, np.int64)
    counts[rows] = _count_slices(samples["uri"].take(pa.array(rows)), reading)
    return replace(found, samples=_repeat_rows(samples, counts))


def _count_slices(uris: pa.ChunkedArray, reading: ReadOptions) -> NDArray[np.int64]:
    """Open files in Ray Data tasks; return the number of numbered slices of each."""
    files = pa.table({"number": np.arange(len(uris)), "uri": uris})
    parts = [
        files.slice(start, FILES_PER_TASK) for start in range(0, files.num_rows, FILES_PER_TASK)
    ]
    counted = ray.data.from_arrow(parts).map_batches(
        _count_batch,  # type: ignore[arg-type]  # Ray's hint knows no fn_kwargs
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={"reading": reading},
    )
    table = pa.concat_tables(ray.get(counted.to_arrow_refs())).sort_by("number")
    counts: NDArray[np.int64] = table["num_slices"].to_numpy()
    return counts


def _count_batch(batch: pa.Table, *, reading: ReadOptions) -> dict[str, Any]:
    counts = [count_slices(uri, reading) for uri in batch["uri"].to_pylist()]
    return {"number": batch["number"].to_numpy(), "num_slices": np.array(counts, np.int64)}


def count_slices(uri: str, reading: ReadOptions) -> int:
    """Return the number of numbered slices; 0 for a picture, or a file that cannot be opened."""
    try:
        slices = open_file(read_scan(uri, -1, -1), reading).slices
    except RejectedImage:
        return 0
    return 0 if slices[0].frame is None else len(slices)


def _repeat_rows(samples: pa.Table, counts: NDArray[np.int64]) -> pa.Table:
    """Repeat each row for the numbered slices of its file, and number them."""
    repeats = np.maximum(counts, 1)
    rows = np.repeat(np.arange(len(counts)), repeats)
    frames = np.arange(len(rows)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    is_numbered = counts[rows] > 0
    expanded = samples.take(pa.array(rows))
    names = [
        name_slice(path, frame) if numbered else path
        for path, frame, numbered in zip(
            expanded["path"].to_pylist(), frames.tolist(), is_numbered, strict=True
        )
    ]
    numbers = np.where(is_numbered, frames, expanded["frame"].to_numpy())
    for name, values in (("path", names), ("frame", numbers)):
        field = expanded.schema.field(name)
        position = expanded.schema.get_field_index(name)
        expanded = expanded.set_column(position, field, pa.array(values, field.type))
    return expanded
