"""Labels: the true classes of scans."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from brainray.errors import ConfigError, DataError
from brainray.images.slices import split_name
from brainray.io import storage

FOLDER = "folder"


@dataclass(frozen=True, slots=True)
class Labels:
    """Labels of scans; picklable."""

    classes: tuple[str, ...]
    by_uri: Mapping[str, str] | None = field(default=None)
    """None if the name of a scan's folder is its label."""

    def find(self, scan_uri: str) -> str | None:
        """Return the label of a slice, else of its file; None if there is none."""
        if self.by_uri is not None:
            return self.by_uri.get(scan_uri) or self.by_uri.get(split_name(scan_uri)[0])
        name = scan_uri.rsplit("/", 2)[-2] if scan_uri.count("/") > 1 else ""
        return name if name in self.classes else None

    def rename(self, name: Callable[[str], str]) -> "Labels":
        """Return the labels with other names of the scans, which contain no folder names."""
        if self.by_uri is not None:
            return replace(self, by_uri={name(uri): label for uri, label in self.by_uri.items()})
        if name("") != "":
            raise ConfigError(
                "With --redact-paths the name of a scan's folder is not known. Leave out --labels "
                "folder or --redact-paths, or give the labels as a CSV file."
            )
        return self


def read_labels(labels: str | None, classes: tuple[str, ...]) -> Labels | None:
    """Read the labels of scans.

    ``labels`` is ``folder`` (the name of a scan's folder is its label), a CSV file with the columns
    scan_uri and label, or None. The errors are those of :func:`read_label_table`.
    """
    if labels is None:
        return None
    if labels == FOLDER:
        return Labels(classes)
    _, by_uri = read_label_table(labels, ("scan_uri",), classes)
    return Labels(classes, {storage.make_absolute(uri): name for uri, name in by_uri.items()})


def read_label_table(
    uri: str, keys: Sequence[str], classes: Sequence[str]
) -> tuple[str, dict[str, str]]:
    """Read a CSV file with the column ``label`` and at least one of the columns ``keys``.

    Returns
    -------
    key : str
        The first of the keys that the file has.
    labels : dict of str to str
        Class by the key's value.

    Raises
    ------
    DataError
        The file or a column is missing, a class is unknown, or one value has two labels.
    """
    try:
        text = storage.read_bytes(uri).decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"No labels at '{uri}'. Check --labels.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"Expected UTF-8 text in '{uri}': {error}") from error
    reader = csv.DictReader(io.StringIO(text, newline=""))
    columns = reader.fieldnames or ()
    key = next((name for name in keys if name in columns), None)
    if key is None or "label" not in columns:
        raise DataError(
            f"Expected the column label and {'one of ' if keys[1:] else ''}{', '.join(keys)} in "
            f"'{uri}', found {', '.join(columns) or 'none'}."
        )
    labels: dict[str, str] = {}
    for line, row in enumerate(reader, 2):
        if row["label"] not in classes:
            raise DataError(
                f"Unknown class '{row['label']}' in line {line} of '{uri}'. "
                f"Expected one of {', '.join(classes)}."
            )
        if labels.setdefault(row[key], row["label"]) != row["label"]:
            raise DataError(
                f"Line {line} of '{uri}' gives a {key} another label than a line before. "
                "Give each one label."
            )
    return key, labels
