"""List the labelled scans of a data set (class folders, Parquet tables, manifests) as one table.

Nothing here opens an image. The sample table (:data:`SAMPLE_SCHEMA`) has a row for every scan, with
its file, label and given split. A DICOM or NIfTI file has one row, until
:func:`brainray.data.fingerprint.expand_files` has counted its slices.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from brainray.data.read import TABLE_SUFFIX, open_table
from brainray.errors import DataError
from brainray.images.slices import name_slice
from brainray.io import storage

SAMPLE_SCHEMA = pa.schema(
    [
        ("path", pa.string()),  # displayed name; unique in the data set
        ("uri", pa.string()),  # file with the bytes
        ("row_group", pa.int32()),  # of a Parquet file; -1 for an image file
        ("row", pa.int64()),  # within the row group; -1 for an image file
        ("frame", pa.int32()),  # slice within the file, from 0; -1 for a file with one
        ("label", pa.int32()),  # index into the class order
        ("split", pa.string()),  # train, val, test, or "" where none is given
        ("group", pa.string()),  # given by the user, else null
        ("size_bytes", pa.int64()),
    ]
)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")
"""Suffixes of pictures, which have one slice."""
SLICES_SUFFIXES = (".dcm", ".dicom", ".ima", ".nii", ".nii.gz")
"""Suffixes of DICOM and NIfTI files, which may have several."""
_SUFFIX = re.compile(r"\.[a-z][a-z0-9]*$")
"""A suffix. Scanners name files by UIDs, whose last part is a number."""

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
"""Names of folders or Parquet files, in lower case, to splits."""

_FILE_COLUMNS = ("uri", "row_group", "row", "frame", "size_bytes")
"""Columns of a manifest; all but ``uri`` are optional."""

_SIZE_SAMPLE = 64

SPLITS_IN_WORDS = "Training/, Testing/, or train/, val/, test/"


@dataclass(frozen=True, slots=True)
class FoundSamples:
    """A data set's samples, and the files that were skipped."""

    samples: pa.Table
    """Rows of :data:`SAMPLE_SCHEMA`."""
    num_hidden: int = 0
    """Files skipped because a part of their path starts with a dot (or is __MACOSX)."""
    other_files: tuple[str, ...] = ()
    """Files skipped because they are not named as images."""

    def describe_skipped(self) -> str:
        """Return a phrase about skipped files; empty if there are none."""
        parts = []
        if self.num_hidden:
            parts.append(f"{self.num_hidden} hidden")
        if self.other_files:
            example = self.other_files[0]
            parts.append(f"{len(self.other_files)} not named as images (such as '{example}')")
        return " and ".join(parts)


def find_samples(
    data_uri: str, classes: Sequence[str], *, splits: Sequence[str] | None = None
) -> FoundSamples:
    """List a data set.

    Parameters
    ----------
    data_uri : str
        A folder of class folders, of split folders with class folders, or of Parquet files; or
        one Parquet file. Local, s3:// or gs://. A Parquet file has the scans (``image_bytes``),
        or is a manifest with their ``uri`` (or ``path``), ``row_group`` and ``row`` of a scan
        within a Parquet file, and ``frame`` of a slice. Relative URIs are below its folder.
    classes : sequence of str
        In class order; a class folder must be one of them.
    splits : sequence of str, optional
        Return only these of "train", "val", "test" and "" (none given), and require all classes
        in them. A data set without splits is returned whole.

    Raises
    ------
    DataError
        No images, an unknown class, or a class without images.
    StorageError
        The folder cannot be listed.
    """
    if data_uri.endswith(TABLE_SUFFIX) and not storage.is_folder(data_uri):
        uri = storage.make_absolute(data_uri)
        if not storage.exists(uri):
            raise DataError(f"No Parquet file at '{data_uri}'. Check the path, or mount it.")
        files = [storage.FoundFile(uri, uri.rpartition("/")[2], 0)]
    else:
        files = storage.list_files(data_uri)
    visible = [file for file in files if not is_hidden(file.relative_path)]
    tables = [file for file in visible if file.relative_path.endswith(TABLE_SUFFIX)]
    images = [file for file in visible if _may_be_image(file.relative_path, classes)]
    if images and tables:
        raise DataError(
            f"Expected images or Parquet files in '{data_uri}', found {len(images)} images and "
            f"{len(tables)} Parquet files. Give one of the two a folder of its own."
        )
    if not images and not tables:
        raise DataError(
            f"No images in '{data_uri}' ({len(files)} files seen). Expected class folders "
            f"({', '.join(classes)}), alone or below {SPLITS_IN_WORDS}, or Parquet files."
        )
    read = _read_parquet_samples if tables else _read_folder_samples
    samples = read(data_uri, tables or images, classes)
    if splits is not None:
        samples = _keep_splits(samples, splits, data_uri)
    _check_every_class(samples, classes, data_uri)
    known = {file.relative_path for file in images or tables}
    others = tuple(f.relative_path for f in visible if f.relative_path not in known)
    return FoundSamples(samples, len(files) - len(visible), others)


def is_hidden(relative_path: str) -> bool:
    """Return whether a file, or a folder above it, is hidden."""
    parts = relative_path.split("/")
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


def _may_be_image(relative_path: str, classes: Sequence[str]) -> bool:
    """Return whether a file may be an image, by its name.

    In a class folder it may have no suffix: scanners write such DICOM files.
    """
    *folders, name = relative_path.split("/")
    name = name.lower()
    if name.endswith(IMAGE_SUFFIXES + SLICES_SUFFIXES):
        return True
    is_in_class = not set(folders[:2]).isdisjoint(classes)
    return is_in_class and name != "dicomdir" and not _SUFFIX.search(name)


def _keep_splits(samples: pa.Table, splits: Sequence[str], data_uri: str) -> pa.Table:
    present = set(samples["split"].to_pylist())
    if present == {""}:
        return samples
    if present.isdisjoint(splits):
        raise DataError(
            f"Expected {' or '.join(filter(None, splits))} scans in '{data_uri}', found only "
            f"{', '.join(sorted(present))}. Point --data-uri at the folder of the class folders."
        )
    return samples.filter(pc.is_in(samples["split"], pa.array(splits)))


def _read_folder_samples(
    data_uri: str, images: Sequence[storage.FoundFile], classes: Sequence[str]
) -> pa.Table:
    tops = {image.relative_path.split("/")[0] for image in images if "/" in image.relative_path}
    tops |= {name for name in storage.list_folders(data_uri) if not is_hidden(name)}
    unknown = [top for top in tops if top.lower() not in SPLIT_NAMES]
    has_splits = len(unknown) < len(tops)
    if has_splits and unknown:
        raise DataError(
            f"Unknown folder {', '.join(map(repr, sorted(unknown)))} beside the splits in "
            f"'{data_uri}'. Expected only {SPLITS_IN_WORDS}. Move it elsewhere."
        )
    rows: list[tuple[Any, ...]] = []
    for image in images:
        parts = image.relative_path.split("/")
        split = SPLIT_NAMES[parts.pop(0).lower()] if has_splits and len(parts) > 1 else ""
        if len(parts) < 2:
            raise DataError(
                f"Image '{image.relative_path}' in '{data_uri}' lies in no class folder. "
                f"Expected one of {', '.join(classes)} above it."
            )
        if parts[0] not in classes:
            raise _reject_class(parts[0], image.uri, classes)
        label, size = classes.index(parts[0]), image.size_bytes
        rows.append((image.relative_path, image.uri, -1, -1, -1, label, split, None, size))
    return pa.table(list(zip(*rows, strict=True)), SAMPLE_SCHEMA)


def _reject_class(name: str, where: str, classes: Sequence[str]) -> DataError:
    return DataError(
        f"Unknown class '{name}' in {where}. Expected one of {', '.join(classes)}. "
        "Rename it, or pass --classes."
    )


def _check_every_class(samples: pa.Table, classes: Sequence[str], data_uri: str) -> None:
    present = set(zip(samples["split"].to_pylist(), samples["label"].to_pylist(), strict=True))
    for split in sorted({split for split, _ in present}):
        missing = [name for label, name in enumerate(classes) if (split, label) not in present]
        if missing:
            where = f"the {split} split of '{data_uri}'" if split else f"'{data_uri}'"
            raise DataError(
                f"No images of class {', '.join(missing)} in {where}. Expected some of each of "
                f"{', '.join(classes)}. Add them, or pass --classes."
            )


def _read_parquet_samples(
    data_uri: str, files: Sequence[storage.FoundFile], classes: Sequence[str]
) -> pa.Table:
    unknown = [file.relative_path for file in files if not _split_of(file.relative_path)]
    if 0 < len(unknown) < len(files):
        raise DataError(
            f"Unknown Parquet file '{unknown[0]}' beside the splits in '{data_uri}'. Expected "
            f"only {SPLITS_IN_WORDS}, or names such as train-0.parquet. Rename it, or move it."
        )
    samples = pa.concat_tables([_read_parquet_file(file, classes) for file in files])
    if not samples.num_rows:
        raise DataError(
            f"No rows in the Parquet files of '{data_uri}' ({len(files)} files read). Expected "
            "a row for each scan. Check what wrote them."
        )
    path, count = Counter(samples["path"].to_pylist()).most_common(1)[0]
    if count > 1:
        raise DataError(
            f"Path '{path}' is given {count} times in the Parquet files of '{data_uri}'. Expected "
            "a `path` of its own for each scan. Make them differ, or leave the column out."
        )
    return samples


def _split_of(relative_path: str) -> str:
    """Read the split from a folder's or a file's name, such as train/0.parquet, test-1.parquet."""
    for part in relative_path.lower().removesuffix(".parquet").split("/"):
        split = SPLIT_NAMES.get(re.split(r"[-_.\d]", part)[0])
        if split:
            return split
    return ""


def _read_parquet_file(file: storage.FoundFile, classes: Sequence[str]) -> pa.Table:
    with open_table(file.uri) as parquet:
        metadata, names = parquet.metadata, parquet.schema_arrow.names
        has_images = "image_bytes" in names
        if "label" not in names or {"image_bytes", "uri", "path"}.isdisjoint(names):
            missing = "image_bytes" if "label" in names else "label"
            raise DataError(
                f"No column {missing} in '{file.uri}' (it has {', '.join(names)}). Expected "
                "label, and image_bytes (or, in a manifest of files, uri or path); "
                "split and group are optional."
            )
        wanted = ("label", "path", "split", "group", *(() if has_images else _FILE_COLUMNS))
        table = parquet.read(columns=[name for name in wanted if name in names])
    columns = _locate_rows(file, metadata) if has_images else _locate_files(table, file)
    columns["label"] = _read_labels(table["label"], file.uri, classes)
    columns["split"] = (
        _read_splits(table["split"], file.uri)
        if "split" in table.column_names
        else [_split_of(file.relative_path)] * table.num_rows
    )
    columns["group"] = pa.nulls(table.num_rows)
    for name in {"path", "group"} & set(table.column_names):
        columns[name] = table[name].cast(pa.string())
    return pa.table({name: columns[name] for name in SAMPLE_SCHEMA.names}, SAMPLE_SCHEMA)


def _locate_rows(file: storage.FoundFile, metadata: pq.FileMetaData) -> dict[str, Any]:
    """Return the columns of :data:`SAMPLE_SCHEMA` that locate the rows of a Parquet file."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    counts = np.array([group.num_rows for group in groups], np.int64)
    row_groups = np.repeat(np.arange(len(groups)), counts)
    rows = np.concatenate([np.zeros(0, np.int64), *map(np.arange, counts)])
    sizes = []
    for group in groups:
        chunks = map(group.column, range(group.num_columns))
        chunk = next(one for one in chunks if one.path_in_schema == "image_bytes")
        sizes.append(chunk.total_uncompressed_size // max(group.num_rows, 1))
    numbers = zip(row_groups.tolist(), rows.tolist(), strict=True)
    return {
        "path": [f"{file.relative_path}#{group}-{row}" for group, row in numbers],
        "uri": [file.uri] * metadata.num_rows,
        "row_group": row_groups,
        "row": rows,
        "frame": [-1] * metadata.num_rows,
        "size_bytes": np.repeat(np.array(sizes, np.int64), counts),
    }


def _locate_files(table: pa.Table, file: storage.FoundFile) -> dict[str, Any]:
    """Return the columns that locate the files of a manifest, which has no image bytes itself."""
    count, names = table.num_rows, table.column_names
    given = table["uri" if "uri" in names else "path"].cast(pa.string()).to_pylist()
    if None in given:
        raise DataError(
            f"No uri in row {given.index(None)} of '{file.uri}'. Expected the uri of a scan in "
            "every row."
        )
    folder = file.uri.rpartition("/")[0]
    columns: dict[str, Any] = {"uri": [make_absolute_below(folder, uri) for uri in given]}
    for name in ("row_group", "row", "frame"):
        columns[name] = [-1] * count
        if name in names:
            columns[name] = table[name].cast(pa.int64()).fill_null(-1).to_pylist()
    frames = [None if frame < 0 else frame for frame in columns["frame"]]
    columns["path"] = list(map(name_slice, given, frames))
    columns["size_bytes"] = (
        table["size_bytes"].cast(pa.int64())
        if "size_bytes" in names
        else [_estimate_size(columns["uri"])] * count
    )
    return columns


def make_absolute_below(folder: str, uri: str) -> str:
    """Return an absolute URI as it is, and a relative one below a folder: that of a list."""
    if "://" in uri or uri.startswith(("/", "~")):
        return storage.make_absolute(uri)
    return storage.join(folder, uri)


def _estimate_size(uris: Sequence[str]) -> int:
    """Return the mean size of a sample of the files, in bytes; missing files count as 0."""
    sample = uris[:: max(1, len(uris) // _SIZE_SAMPLE)]
    found = [storage.find_file(uri) for uri in sample]
    sizes = [max(file.size_bytes, 0) if file else 0 for file in found]
    return sum(sizes) // max(len(sizes), 1)


def _read_splits(column: pa.ChunkedArray, where: str) -> list[str]:
    """Return splits by their names, which are those of folders; all or none may be empty."""
    given = [str(value or "").lower() for value in column.to_pylist()]
    unknown = [value for value in given if value and value not in SPLIT_NAMES]
    if unknown:
        raise DataError(
            f"Unknown split '{unknown[0]}' in {where}. Expected train, val or test in the column "
            "`split`. Rename it, or leave the column out."
        )
    if "" in given and any(given):
        raise DataError(
            f"No split in row {given.index('')} of {where}, while others have one. Expected train, "
            "val or test in every row, or in none."
        )
    return [SPLIT_NAMES.get(value, "") for value in given]


def _read_labels(column: pa.ChunkedArray, where: str, classes: Sequence[str]) -> list[int]:
    """Return indices into the class order, from class names or indices."""
    order: dict[object, int] = {name: index for index, name in enumerate(classes)}
    order |= {index: index for index in range(len(classes))}
    labels = []
    for value in column.to_pylist():
        if value not in order:
            raise _reject_class(str(value), where, classes)
        labels.append(order[value])
    return labels
