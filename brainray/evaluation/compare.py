"""Compare two classifiers by their predictions for the same images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import tyro
from numpy.typing import NDArray

from brainray.data.near_duplicates import Indices, merge_groups
from brainray.errors import DataError
from brainray.evaluation.rows import list_classes, read_evaluation_rows
from brainray.inference.schema import stack_lists
from brainray.io import storage
from brainray.metrics.comparison import Compared, compare_predictions

COMPARE_FILE = "compare.json"
COMPARE_SCHEMA_VERSION = 1

HASH = "content_sha256"


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
    primary: Compared | None = None
    """The one score that gets a verdict. By default all five do, with corrected p-values."""
    alpha: float = 0.05
    """Accepted probability of a wrong verdict, over all verdicts."""
    num_resamples: int = 2000
    """Bootstrap resamples."""
    seed: int = 0
    """Seed of the resampling."""


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

    def get_probs(self, classes: Sequence[str], rows: pd.Series) -> NDArray[np.float64]:
        """Return the probabilities of some rows, shape (n, K), in the order of ``classes``."""
        order = [self.classes.index(name) for name in classes]
        probs = stack_lists(self.table["probs"])[:, order].astype(np.float64)
        return probs[np.asarray(rows, np.int64)]

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
    key, images = _join_images(a, b, common=job.common)
    groups = _join_groups(a, b, images)
    document: dict[str, Any] = {
        "schema_version": COMPARE_SCHEMA_VERSION,
        "a": a.describe(),
        "b": b.describe(),
        "join": {
            "by": key,
            "num_only_a": a.table.num_rows - len(images),
            "num_only_b": b.table.num_rows - len(images),
            "has_groups": groups is not None,
        },
        "classes": list(a.classes),
        **compare_predictions(
            np.array([a.classes.index(label) for label in images["label_a"]], np.int64),
            a.get_probs(a.classes, images["row_a"]),
            b.get_probs(a.classes, images["row_b"]),
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


def _join_images(a: Predictions, b: Predictions, *, common: bool) -> tuple[str, pd.DataFrame]:
    """Return the key that the tables are joined by, and ``row_a`` and ``row_b`` of each image.

    The key is ``path`` if the tables share any, and then the content must be equal too; else
    ``content_sha256``, because a data set may have moved. Equal images are numbered.
    """
    share_paths = not set(a.get("path") or ()).isdisjoint(b.get("path") or ())
    key = "path" if share_paths else HASH
    numbered = [_number_images(one, key) for one in (a, b)]
    joined = numbered[0].merge(
        numbered[1], on=["name", "number"], how="outer", suffixes=("_a", "_b"), indicator="found"
    )
    images = joined[joined["found"] == "both"].astype({"row_a": int, "row_b": int})
    alone = joined[joined["found"] != "both"].sort_values("found", kind="stable")
    if images.empty:
        raise DataError(f"'{a.uri}' and '{b.uri}' have no image in common.")
    if len(alone) and not common:
        only_a = int((alone["found"] == "left_only").sum())
        raise DataError(
            f"Expected both to be of the same images; {only_a} are only in '{a.uri}', "
            f"{len(alone) - only_a} only in '{b.uri}' (such as {alone['name'].iloc[0]}), "
            f"{len(images)} in both. Pass --common to compare on those."
        )
    if a.get(HASH) and b.get(HASH):
        changed = images[images["hash_a"] != images["hash_b"]]
        if len(changed):
            raise DataError(
                f"{len(changed)} images have another content in '{b.uri}' than in '{a.uri}', such "
                f"as {changed['path_a'].iloc[0]}. Evaluate both classifiers on the same files."
            )
    differing = images[images["label_a"] != images["label_b"]]
    if len(differing):
        first = differing.iloc[0]
        raise DataError(
            f"Expected the same true classes; {len(differing)} of {len(images)} images differ: "
            f"{first['path_a']} is {first['label_a']} in '{a.uri}', {first['label_b']} in "
            f"'{b.uri}'."
        )
    return key, images


def _number_images(predictions: Predictions, key: str) -> pd.DataFrame:
    """List the images by ``name``, that of the key, and ``number`` among those of equal name.

    Images of equal name are numbered by class and path.
    """
    names = predictions.get(key)
    if names is None:
        raise DataError(
            f"Expected the column path or content_sha256, filled in every row, in "
            f"'{predictions.uri}', found {', '.join(predictions.table.column_names)}."
        )
    columns = {
        "name": names,
        "label": predictions.table["true_class"].to_pylist(),
        "path": predictions.get("path") or names,
        "hash": predictions.get(HASH) or names,
        "row": range(len(names)),
    }
    images = pd.DataFrame(columns).sort_values(["label", "path", "row"])
    return images.assign(number=images.groupby("name").cumcount())


def _join_groups(a: Predictions, b: Predictions, images: pd.DataFrame) -> Indices | None:
    """Return the connected components of both groupings; None if there is no group."""
    known = [
        pd.factorize(np.array(groups)[rows], sort=True)[0]
        for groups, rows in ((a.get("group"), images["row_a"]), (b.get("group"), images["row_b"]))
        if groups is not None
    ]
    if not known:
        return None
    return merge_groups(known[0], [str(group) for group in known[-1]])
