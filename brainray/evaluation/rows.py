"""The evaluation table: rows of the prediction table with labels beside them.

::

    OUT/predictions/{val,test,cv}.parquet

Its columns are those of :func:`brainray.inference.schema.build_schema`, then ``path``,
``true_class``, ``split`` (in cv: ``fold``), ``group``, ``nearest_correlation`` and ``probs``.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from brainray import storage
from brainray.errors import DataError
from brainray.evaluation.prepared import PreparedData
from brainray.inference.schema import stack_lists
from brainray.model.calibration import Calibration


def add_labels(
    rows: pa.Table, data: PreparedData, indices: NDArray[np.int64], calibration: Calibration
) -> pa.Table:
    """Put the labels beside predictions.

    Parameters
    ----------
    rows : Table
        Rows of the prediction table with ``logits``, of the samples ``indices``, in their order.
    calibration : Calibration
        Of the classifier that predicted.

    Returns
    -------
    Table
        ``probs`` are the calibrated probabilities of every image, in class order, also where
        ``prob_<class>`` is null because the image is rejected as unlike the training images:
        scores count every image.
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
    """Read an evaluation table.

    Raises
    ------
    FileNotFoundError
        There is none.
    DataError
        It has no labels, or is of an earlier version.
    """
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


def list_classes(rows: pa.Table) -> tuple[str, ...]:
    """Return the classes of a prediction table, in class order."""
    names = rows.column_names
    return tuple(name.removeprefix("prob_") for name in names if name.startswith("prob_"))


def find_mistakes(rows: pa.Table, classes: Sequence[str], most: int) -> NDArray[np.int64]:
    """Return the row numbers of an evaluation table's most confident mistakes, the worst first."""
    probs = stack_lists(rows["probs"])
    top = probs.argmax(1)
    wrong = np.flatnonzero(np.array(classes)[top] != np.array(rows["true_class"].to_pylist()))
    return wrong[np.argsort(-probs[wrong, top[wrong]], kind="stable")][:most]
