"""The true classes of scans, where somebody knows them."""

import csv
import io
from collections.abc import Callable

from brainray import storage
from brainray.errors import DataError

Truth = Callable[[str], str | None]
"""Gives a scan's true class by its URI; None where it is not known."""


def read_truth(labels: str | None, classes: tuple[str, ...]) -> Truth | None:
    """Read where the true classes are.

    Parameters
    ----------
    labels : str or None
        ``folder`` (the name of a scan's folder is its class), a CSV file with the columns
        scan_uri and label, or None where no truth is known.
    classes : tuple of str
        The classes that a scan may have.

    Raises
    ------
    DataError
        The CSV lacks a column, or names a class that the classifier does not know.
    """
    if labels is None:
        return None
    if labels == "folder":

        def look_at_folder(scan_uri: str) -> str | None:
            name = scan_uri.rsplit("/", 2)[-2] if scan_uri.count("/") > 1 else ""
            return name if name in classes else None

        return look_at_folder
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
    return by_uri.get
