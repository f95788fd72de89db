"""Compare two classifiers by their predictions for the same images."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import tyro
from numpy.typing import NDArray

from brainray import storage
from brainray.data.near_duplicates import merge_groups
from brainray.errors import ConfigError, DataError
from brainray.evaluation.rows import list_classes, read_evaluation_rows
from brainray.inference.schema import stack_lists
from brainray.metrics.comparison import COMPARED, compare_predictions

COMPARE_FILE = "compare.json"
COMPARE_SCHEMA_VERSION = 1
PREDICTIONS_FOLDER = "predictions"

Key = tuple[str, int]
"""A path, or a content hash, and which of several images of that name it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareJob:
    """One comparison: of what with what."""

    a_uri: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="A")]
    """The classifier to compare with: output folder of training or evaluation, or one of the
    Parquet files in its predictions folder."""
    b_uri: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="B")]
    """The classifier to judge, likewise. Verdicts and differences are on B against A."""
    output_uri: str | None = None
    """Where compare.json goes, if anywhere."""
    split: Literal["test", "val", "cv"] = "test"
    """Split whose predictions are compared, where a folder is given; `cv` for the folds of two
    cross-validations."""
    common: bool = False
    """Compare on the images that both have, where they do not have the same."""
    primary: str | None = None
    """The one score that decides; else all five do, corrected for being several. One of
    accuracy, balanced_accuracy, macro_f1, macro_auroc, log_loss."""
    alpha: float = 0.05
    """Probability of a wrong verdict that is put up with, over all verdicts."""
    num_resamples: int = 2000
    """Bootstrap resamples."""
    seed: int = 0
    """Seeds the resampling."""

    def __post_init__(self) -> None:
        if self.primary is not None and self.primary not in COMPARED:
            raise ConfigError(
                f"Unknown score '{self.primary}'. Expected --primary to be one of "
                f"{', '.join(COMPARED)}."
            )


@dataclass(frozen=True, slots=True)
class Predictions:
    """A classifier's answers, with the truth beside them."""

    uri: str
    table: pa.Table
    classes: tuple[str, ...]
    """In the order of the table's columns."""

    def get(self, name: str) -> list[Any] | None:
        """Return a column, or None where it is absent or has a gap."""
        if name not in self.table.column_names or self.table[name].null_count:
            return None
        return list(self.table[name].to_pylist())

    def get_probs(self, classes: Sequence[str]) -> NDArray[np.float64]:
        """Return the probabilities, shape (n, K), in the order of some classes."""
        order = [self.classes.index(name) for name in classes]
        return stack_lists(self.table["probs"])[:, order].astype(np.float64)


def compare(job: CompareJob) -> dict[str, Any]:
    """Compare two classifiers, and write compare.json where an output was given.

    Returns
    -------
    dict
        What :func:`brainray.metrics.comparison.compare_predictions` gives, and under ``a``,
        ``b`` and ``join`` what was compared.

    Raises
    ------
    UserError
        The predictions cannot be read, or are not of the same images, labels and classes.
    """
    if job.output_uri is not None:
        storage.check_writable(job.output_uri)
    a, b = (read_predictions(uri, job.split) for uri in (job.a_uri, job.b_uri))
    check_classes_agree(a, b)
    name, rows_a, rows_b = match_images(a, b, common=job.common)
    y_true = check_labels_agree(a, b, rows_a, rows_b)
    groups = join_groups(a, b, rows_a, rows_b)
    order = {label: index for index, label in enumerate(a.classes)}
    document: dict[str, Any] = {
        "schema_version": COMPARE_SCHEMA_VERSION,
        "a": _describe(a),
        "b": _describe(b),
        "join": {
            "by": name,
            "num_only_a": a.table.num_rows - len(rows_a),
            "num_only_b": b.table.num_rows - len(rows_b),
            "has_groups": groups is not None,
        },
        "classes": list(a.classes),
        **compare_predictions(
            np.array([order[label] for label in y_true], np.int64),
            a.get_probs(a.classes)[rows_a],
            b.get_probs(a.classes)[rows_b],
            a.classes,
            groups=groups,
            primary=job.primary,
            num_resamples=job.num_resamples,
            seed=job.seed,
            alpha=job.alpha,
        ),
    }
    if job.output_uri is not None:
        storage.write_json(storage.join(job.output_uri, COMPARE_FILE), document)
    return document


def _describe(predictions: Predictions) -> dict[str, Any]:
    sealed = sorted(set(predictions.get("classifier_id") or ()))
    return {"uri": predictions.uri, "n": predictions.table.num_rows, "classifier_ids": sealed}


def read_predictions(uri: str, split: str) -> Predictions:
    """Read a table of predictions, or that of a split below an output folder.

    Raises
    ------
    DataError
        There is none, it has no labels, or it is of an earlier version.
    """
    file = uri if uri.endswith(".parquet") else _find_file(uri, split)
    try:
        table = read_evaluation_rows(file)
    except FileNotFoundError:
        raise DataError(
            f"No predictions at '{file}'. Expected an output folder of training or evaluation, or "
            "a Parquet file of its predictions folder."
        ) from None
    classes = list_classes(table)
    if not table.num_rows:
        raise DataError(f"No rows in '{file}'. Expected a prediction for each image.")
    unknown = sorted({str(name) for name in table["true_class"].to_pylist()} - set(classes))
    if unknown:
        raise DataError(
            f"Unknown class '{unknown[0]}' in the column true_class of '{file}'. Expected one of "
            f"{', '.join(classes)}, as its probabilities have."
        )
    return Predictions(file, table, classes)


def _find_file(uri: str, split: str) -> str:
    name = f"{split}.parquet"
    places = [storage.join(uri, PREDICTIONS_FOLDER, name), storage.join(uri, name)]
    return next((place for place in places if storage.exists(place)), places[0])


def check_classes_agree(a: Predictions, b: Predictions) -> None:
    """Refuse classifiers of different classes."""
    if set(a.classes) != set(b.classes):
        raise DataError(
            f"Expected both to know the same classes; '{a.uri}' knows {', '.join(a.classes)}, "
            f"'{b.uri}' {', '.join(b.classes)}."
        )


def match_images(
    a: Predictions, b: Predictions, *, common: bool
) -> tuple[str, NDArray[np.int64], NDArray[np.int64]]:
    """Find the rows of the same image in both tables.

    By path where the tables share any, and then the content must be the same too; else by
    content, so that a data set may have moved. Copies of one image are told apart by number.

    Returns
    -------
    name : str
        ``path`` or ``content_sha256``.
    rows_a, rows_b : ndarray of int64, shape (n,)

    Raises
    ------
    DataError
        The tables are of different images (and ``common`` is not given, or there is not one
        in both), or the content behind a path differs.
    """
    name = "path" if _share_any(a.get("path"), b.get("path")) else "content_sha256"
    keys_a, keys_b = _number_keys(a, name), _number_keys(b, name)
    shared = sorted(keys_a.keys() & keys_b.keys())
    only_a, only_b = (sorted(one - set(shared)) for one in (keys_a.keys(), keys_b.keys()))
    if not shared:
        raise DataError(f"'{a.uri}' and '{b.uri}' have no image in common.")
    if (only_a or only_b) and not common:
        example = (only_a or only_b)[0][0]
        raise DataError(
            f"Expected both to be of the same images; {len(only_a)} are only in '{a.uri}', "
            f"{len(only_b)} only in '{b.uri}' (such as {example}), {len(shared)} in both. Pass "
            "--common to compare on those."
        )
    rows_a = np.array([keys_a[key] for key in shared], np.int64)
    rows_b = np.array([keys_b[key] for key in shared], np.int64)
    hashes_a, hashes_b = a.get("content_sha256"), b.get("content_sha256")
    if hashes_a and hashes_b:
        changed = [
            at for at, bt in zip(rows_a, rows_b, strict=True) if hashes_a[at] != hashes_b[bt]
        ]
        if changed:
            example = (a.get("path") or hashes_a)[changed[0]]
            raise DataError(
                f"{len(changed)} images have another content in '{b.uri}' than in '{a.uri}', such "
                f"as {example}. Judge both classifiers on the same files."
            )
    return name, rows_a, rows_b


def _share_any(left: list[str] | None, right: list[str] | None) -> bool:
    return left is not None and right is not None and not set(left).isdisjoint(right)


def _number_keys(predictions: Predictions, name: str) -> dict[Key, int]:
    """Return the row of every image by its key; equal names are numbered by class, then path."""
    names = predictions.get(name)
    if names is None:
        raise DataError(
            f"Expected the column path or content_sha256, filled in every row, in "
            f"'{predictions.uri}', found {', '.join(predictions.table.column_names)}."
        )
    labels = predictions.table["true_class"].to_pylist()
    paths = predictions.get("path") or names
    seen: Counter[str] = Counter()
    keys = {}
    for row in sorted(range(len(names)), key=lambda at: (labels[at], paths[at], at)):
        keys[names[row], seen[names[row]]] = row
        seen[names[row]] += 1
    return keys


def check_labels_agree(
    a: Predictions, b: Predictions, rows_a: NDArray[np.int64], rows_b: NDArray[np.int64]
) -> list[str]:
    """Return the true classes, or refuse tables that do not agree on them."""
    y_true, other = (one.table["true_class"].to_pylist() for one in (a, b))
    pairs = list(zip(rows_a, rows_b, strict=True))
    differing = [(at, bt) for at, bt in pairs if y_true[at] != other[bt]]
    if differing:
        at, bt = differing[0]
        image = (a.get("path") or a.get("content_sha256") or [at])[at]
        raise DataError(
            f"Expected the same true classes; {len(differing)} of {len(pairs)} images differ: "
            f"{image} is {y_true[at]} in '{a.uri}', {other[bt]} in '{b.uri}'."
        )
    return [y_true[at] for at in rows_a]


def join_groups(
    a: Predictions, b: Predictions, rows_a: NDArray[np.int64], rows_b: NDArray[np.int64]
) -> NDArray[np.int64] | None:
    """Return groups that part no group of either table; None where neither has any."""
    given = [
        None if groups is None else np.array(groups, np.int64)[rows]
        for groups, rows in ((a.get("group"), rows_a), (b.get("group"), rows_b))
    ]
    known = [np.unique(groups, return_inverse=True)[1] for groups in given if groups is not None]
    if not known:
        return None
    return merge_groups(known[0].astype(np.int64), [str(group) for group in known[-1]])
