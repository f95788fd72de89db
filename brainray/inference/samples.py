"""Predict samples of a data set, for evaluation, calibration and galleries."""

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from numpy.typing import NDArray

from brainray.cluster import TASK_CPUS, raise_own_errors
from brainray.data.scan_store import ScanStore
from brainray.images.preprocess import Preprocessing
from brainray.inference.predict import PredictStage, pack_images, retry_lost

PART_ROWS = 256
"""Samples of one block, some seconds of work on a CPU."""

Runtime = dict[str, str]
"""From :meth:`brainray.inference.engine.Engine.describe`."""


def predict_samples(
    stage: PredictStage, store: ScanStore, scans: pa.Table, indices: NDArray[np.int64]
) -> tuple[pa.Table, Runtime]:
    """Predict some samples of a data set.

    Parameters
    ----------
    stage : PredictStage
    store : ScanStore
        Gives the samples' pixels.
    scans : Table
        Rows of :data:`brainray.inference.schema.SCAN_SCHEMA` for all samples, in sample order.
    indices : ndarray of int64, shape (n,)
        Distinct indices of the samples to predict, at least one; all of them can be opened.

    Returns
    -------
    rows : Table
        Rows of :func:`brainray.inference.schema.build_schema`, in the order of ``indices``.
    runtime : dict of str to str

    Raises
    ------
    BrainrayError
        A file was deleted, or a worker cannot open the engine.
    RayError
        Ray failed several times in a row.
    """
    blocks: list[pa.Table] = []
    found = np.zeros(len(scans), np.bool_)
    with raise_own_errors():
        for block in retry_lost(lambda: _stream(stage, store, scans, indices[~found[indices]])):
            blocks.append(block)
            found[block["index"].to_numpy()] = True
    assert found[indices].all(), "Ray Data ended without an error and without some rows"
    rows = pa.concat_tables(blocks)
    positions = np.empty(len(scans), np.int64)
    positions[rows["index"].to_numpy()] = np.arange(len(rows))
    rows = rows.take(pa.array(positions[indices])).combine_chunks()
    runtime: Runtime = json.loads(rows["runtime"][0].as_py())
    return rows.drop_columns(["index", "runtime", "predict_s"]), runtime


def _stream(
    stage: PredictStage, store: ScanStore, scans: pa.Table, indices: NDArray[np.int64]
) -> Iterator[pa.Table]:
    if not len(indices):
        return
    chosen = scans.take(pa.array(indices)).append_column("index", pa.array(indices))
    parts = [chosen.slice(start, PART_ROWS) for start in range(0, len(indices), PART_ROWS)]
    num_cpus = max(1, int(ray.cluster_resources()["CPU"]))
    # Ray's hint knows no partial.
    load: Any = partial(_load_part, store=store, preprocessing=stage.preprocessing)
    opened = ray.data.from_arrow(parts).map_batches(
        load,
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=TASK_CPUS,
        compute=ray.data.TaskPoolStrategy(size=min(len(parts), num_cpus)),
    )
    blocks: Any = stage.apply(opened).iter_batches(batch_size=None, batch_format="pyarrow")
    yield from blocks


def _load_part(part: pa.Table, *, store: ScanStore, preprocessing: Preprocessing) -> pa.Table:
    images = store.load_images(part["index"].to_pylist(), preprocessing)
    return part.append_column("image", pack_images(list(images), preprocessing.size_px))
