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

Rows = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareJob:
    """The two classifiers, and how to compare them."""

    a_uri: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="A")]
    """The classifier to compare with: output folder of training or evaluation, or one of the
    Parquet files in its predictions folder."""
    b_uri: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="B")]
    """The other classifier. Verdicts and differences are of B against A."""
    output_uri: str | None = None
    """Folder for compare.json."""
    split: Literal["test", "val", "cv"] = "test"
    """Split to compare, where a folder is given; `cv` for two cross-validations."""
    common: bool = False
    """If the images differ, compare on those that both have."""
    primary: str | None = None
    """The one score that gets a verdict. By default all five do, with corrected p-values. One of
    accuracy, balanced_accuracy, macro_f1, macro_auroc, log_loss."""
    alpha: float = 0.05
    """Accepted probability of a wrong verdict, over all verdicts."""
    num_resamples: int = 2000
    """Bootstrap resamples."""
    seed: int = 0
    """Seed of the resampling."""

    def __post_init__(self) -> None:
        if self.primary is not None and self.primary not in COMPARED:
            raise ConfigError(
                f"Unknown score '{self.primary}'. Expected --primary to be one of "
                f"{', '.join(COMPARED)}."
            )


@dataclass(frozen=True, slots=True)
class Predictions:
    """The evaluation table of a classifier."""

    uri: str
    table: pa.Table
    classes: tuple[str, ...]
    """In the order of the table's columns."""

    def get(self, name: str) -> list[Any] | None:
        """Return a column; None if it is absent or has nulls."""
        if name not in self.table.column_names or self.table[name].null_count:
            return None
        return list(self.table[name].to_pylist())

    def get_probs(self, classes: Sequence[str]) -> NDArray[np.float64]:
        """Return the probabilities, shape (n, K), in the order of ``classes``."""
        order = [self.classes.index(name) for name in classes]
        return stack_lists(self.table["probs"])[:, order].astype(np.float64)

    def describe(self) -> dict[str, Any]:
        """Describe them for compare.json."""
        ids = sorted(set(self.get("classifier_id") or ()))
        return {"uri": self.uri, "n": self.table.num_rows, "classifier_ids": ids}


def compare(job: CompareJob) -> dict[str, Any]:
    """Compare two classifiers, and write compare.json if there is an output.

    Returns
    -------
    dict
        What :func:`brainray.metrics.comparison.compare_predictions` returns, and under ``a``,
        ``b`` and ``join`` what was compared.

    Raises
    ------
    UserError
        The predictions cannot be read, or are not of the same images, labels and classes.
    """
    if job.output_uri is not None:
        storage.check_writable(job.output_uri)
    a, b = (_read_predictions(uri, job.split) for uri in (job.a_uri, job.b_uri))
    if set(a.classes) != set(b.classes):
        raise DataError(
            f"Expected both to have the same classes; '{a.uri}' has {', '.join(a.classes)}, "
            f"'{b.uri}' has {', '.join(b.classes)}."
        )
    key, rows_a, rows_b = _match_images(a, b, common=job.common)
    labels = _match_labels(a, b, rows_a, rows_b)
    groups = _join_groups(a, b, rows_a, rows_b)
    document: dict[str, Any] = {
        "schema_version": COMPARE_SCHEMA_VERSION,
        "a": a.describe(),
        "b": b.describe(),
        "join": {
            "by": key,
            "num_only_a": a.table.num_rows - len(rows_a),
            "num_only_b": b.table.num_rows - len(rows_b),
            "has_groups": groups is not None,
        },
        "classes": list(a.classes),
        **compare_predictions(
            np.array([a.classes.index(label) for label in labels], np.int64),
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


def _read_predictions(uri: str, split: str) -> Predictions:
    """Read an evaluation table, or that of a split below an output folder."""
    file = uri
    if not uri.endswith(".parquet"):
        files = [storage.join(uri, *below, f"{split}.parquet") for below in (("predictions",), ())]
        file = next((one for one in files if storage.exists(one)), files[0])
    try:
        table = read_evaluation_rows(file)
    except FileNotFoundError:
        raise DataError(
            f"No predictions at '{file}'. Expected an output folder of training or evaluation, or "
            "a Parquet file of its predictions folder."
        ) from None
    classes = list_classes(table.column_names)
    if not table.num_rows:
        raise DataError(f"No rows in '{file}'. Expected a prediction for each image.")
    unknown = sorted({str(name) for name in table["true_class"].to_pylist()} - set(classes))
    if unknown:
        raise DataError(
            f"Unknown class '{unknown[0]}' in the column true_class of '{file}'. Expected one of "
            f"{', '.join(classes)}, as its probabilities have."
        )
    return Predictions(file, table, classes)


def _match_images(a: Predictions, b: Predictions, *, common: bool) -> tuple[str, Rows, Rows]:
    """Return the key that the tables are joined by, and the rows of the same images in both.

    The key is ``path`` if the tables share any, and then the content must be equal too; else
    ``content_sha256``, because a data set may have moved. Equal images are numbered.
    """
    share_paths = not set(a.get("path") or ()).isdisjoint(b.get("path") or ())
    key = "path" if share_paths else "content_sha256"
    images_a, images_b = _number_images(a, key), _number_images(b, key)
    shared = sorted(images_a.keys() & images_b.keys())
    only_a, only_b = (sorted(one - set(shared)) for one in (images_a.keys(), images_b.keys()))
    if not shared:
        raise DataError(f"'{a.uri}' and '{b.uri}' have no image in common.")
    if (only_a or only_b) and not common:
        raise DataError(
            f"Expected both to be of the same images; {len(only_a)} are only in '{a.uri}', "
            f"{len(only_b)} only in '{b.uri}' (such as {(only_a or only_b)[0][0]}), {len(shared)} "
            "in both. Pass --common to compare on those."
        )
    rows_a = np.array([images_a[image] for image in shared], np.int64)
    rows_b = np.array([images_b[image] for image in shared], np.int64)
    hashes_a, hashes_b = a.get("content_sha256"), b.get("content_sha256")
    if hashes_a and hashes_b:
        pairs = zip(rows_a, rows_b, strict=True)
        changed = [at for at, bt in pairs if hashes_a[at] != hashes_b[bt]]
        if changed:
            raise DataError(
                f"{len(changed)} images have another content in '{b.uri}' than in '{a.uri}', such "
                f"as {(a.get('path') or hashes_a)[changed[0]]}. Evaluate both classifiers on the "
                "same files."
            )
    return key, rows_a, rows_b


def _number_images(predictions: Predictions, key: str) -> dict[tuple[str, int], int]:
    """Map each image, as (key, number among equal keys by class and path), to its row."""
    names = predictions.get(key)
    if names is None:
        raise DataError(
            f"Expected the column path or content_sha256, filled in every row, in "
            f"'{predictions.uri}', found {', '.join(predictions.table.column_names)}."
        )
    labels = predictions.table["true_class"].to_pylist()
    paths = predictions.get("path") or names
    seen: Counter[str] = Counter()
    images = {}
    for row in sorted(range(len(names)), key=lambda at: (labels[at], paths[at], at)):
        images[names[row], seen[names[row]]] = row
        seen[names[row]] += 1
    return images


def _match_labels(a: Predictions, b: Predictions, rows_a: Rows, rows_b: Rows) -> list[str]:
    """Return the true classes; raise if the tables differ in any."""
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


def _join_groups(a: Predictions, b: Predictions, rows_a: Rows, rows_b: Rows) -> Rows | None:
    """Return the connected components of both groupings; None if there is no group."""
    known = [
        np.unique(np.array(groups)[rows], return_inverse=True)[1]
        for groups, rows in ((a.get("group"), rows_a), (b.get("group"), rows_b))
        if groups is not None
    ]
    if not known:
        return None
    return merge_groups(known[0].astype(np.int64), [str(group) for group in known[-1]])
