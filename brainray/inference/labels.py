"""Labels: the true classes of scans."""

import csv
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from brainray import storage
from brainray.errors import ConfigError, DataError
from brainray.images.slices import split_name

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
        """Return the labels with other names of the scans.

        Raises
        ------
        ConfigError
            The labels are folder names, which the new names do not contain.
        """
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

    Parameters
    ----------
    labels : str or None
        ``folder`` (the name of a scan's folder is its label), a CSV file with the columns scan_uri
        and label, or None.
    classes : tuple of str
        The classes of the classifier.

    Raises
    ------
    DataError
        The CSV file lacks a column, or has an unknown class.
    """
    if labels is None:
        return None
    if labels == FOLDER:
        return Labels(classes)
    try:
        text = storage.read_bytes(labels).decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"No labels at '{labels}'. Give `folder` or a CSV file.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"Expected UTF-8 text in '{labels}': {error}") from error
    reader = csv.DictReader(io.StringIO(text, newline=""))
    if not {"scan_uri", "label"} <= set(reader.fieldnames or ()):
        raise DataError(
            f"Expected the columns scan_uri and label in '{labels}', "
            f"found {', '.join(reader.fieldnames or ['none'])}."
        )
    by_uri = {storage.make_absolute(row["scan_uri"]): row["label"] for row in reader}
    unknown = sorted(set(by_uri.values()) - set(classes))
    if unknown:
        raise DataError(
            f"Unknown class '{unknown[0]}' in '{labels}'. Expected one of {', '.join(classes)}."
        )
    return Labels(classes, by_uri)
