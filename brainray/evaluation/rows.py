"""The evaluation table: rows of the prediction table with their labels.

::

    OUT/predictions/{val,test,cv}.parquet

Its columns are those of :func:`brainray.inference.schema.build_schema`, then ``path``,
``true_class``, ``split`` (in cv: ``fold``), ``group``, ``nearest_correlation`` and ``probs``.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from brainray.errors import DataError
from brainray.evaluation.prepared import PreparedData
from brainray.inference.schema import stack_lists
from brainray.io import storage
from brainray.model.calibration import Calibration


def add_labels(
    rows: pa.Table, data: PreparedData, indices: NDArray[np.int64], calibration: Calibration
) -> pa.Table:
    """Add labels to rows of the prediction table, those of the samples ``indices``.

    ``probs`` are calibrated probabilities in class order. Scores count every image, so a rejected
    image has them too, although its ``prob_<class>`` is null.
    """
    manifest = data.manifest.take(pa.array(indices))
    probs = calibration.calibrate(stack_lists(rows["logits"]))
    labels = {
        "path": manifest["path"],
        "true_class": manifest["label"],
        **{name: manifest[name] for name in ("split", "group", "nearest_correlation")},
        "probs": pa.array(list(probs), pa.list_(pa.float32())),
    }
    for name, column in labels.items():
        rows = rows.append_column(name, column)
    return rows


def read_evaluation_rows(uri: str) -> pa.Table:
    """Read an evaluation table; a DataError if it has no labels, or an earlier version wrote it."""
    rows = storage.read_table(uri)
    if "true_class" not in rows.column_names:
        raise DataError(
            f"Expected the column true_class in '{uri}', found {', '.join(rows.column_names)}. "
            "Evaluate on labelled scans first: brainray evaluate."
        )
    missing = {"engine", "probs"} - set(rows.column_names)
    if missing:
        raise DataError(
            f"No column {' or '.join(sorted(missing))} in '{uri}': an earlier version wrote it. "
            "Run `brainray evaluate` again."
        )
    return rows


def list_classes(column_names: Sequence[str]) -> tuple[str, ...]:
    """Return the classes of a prediction table, in class order."""
    return tuple(name.removeprefix("prob_") for name in column_names if name.startswith("prob_"))


def find_mistakes(rows: pa.Table, classes: Sequence[str], limit: int) -> NDArray[np.int64]:
    """Return the rows of an evaluation table with the most confident mistakes, the worst first."""
    probs = stack_lists(rows["probs"])
    top = probs.argmax(1)
    wrong = np.flatnonzero(np.array(classes)[top] != np.array(rows["true_class"].to_pylist()))
    return wrong[np.argsort(-probs[wrong, top[wrong]], kind="stable")][:limit]
