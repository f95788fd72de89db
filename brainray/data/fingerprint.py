"""Fingerprint every scan: open it once for its hash, thumbnail and properties, or its rejection.

Files with several slices are expanded first: a row for each slice. The same pass keeps in Ray's
object store what fits there: the encoded bytes of files with one slice, so that they are not read
again, and the network's inputs, so that no epoch decodes again.
"""

import io
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from numpy.typing import NDArray
from PIL import Image

from brainray.data.labelled import IMAGE_SUFFIXES, FoundSamples
from brainray.data.near_duplicates import THUMBNAIL_PX, compute_thumbnail
from brainray.data.read import SampleReader, name_scan, read_scan
from brainray.data.scan_store import ScanStore, locate_scans, name_pixels
from brainray.data.slice_columns import SLICE_FIELDS, describe_slice
from brainray.errors import RejectedImage
from brainray.images.decode import DecodeLimits, read_header
from brainray.images.intensity import scale_to_8_bits, to_display, to_unsigned
from brainray.images.preprocess import Preprocessing
from brainray.images.slices import ReadOptions, ScanFile, name_slice, open_file, open_slice

FILES_PER_TASK = 16
"""Files whose slices a task counts: some seconds of work for volumes."""

ROWS_PER_TASK = 256
"""Approximate number of scans of a task: a tenth of a second of work for 224-px JPEGs."""

OBJECT_STORE_SHARE = 0.4
"""Scans are kept in the object store up to this share of the smallest node's store. Ray Data uses
half of the store for blocks in flight."""

BORDER_SHARE = 0.05
"""Width of an image's border, as a share of its shorter side."""

DARK_GREY = 8
"""Highest grey level, of 255, of a black pixel; a JPEG's black is rarely 0."""

FINGERPRINT_TYPES = {
    "scan_uri": pa.string(),  # named as in bulk predictions: FILE, FILE#row=N or FILE#frame=N
    "content_sha256": pa.string(),  # null where no byte could be read
    "reason": pa.string(),  # of a rejection; else null
    "width_px": pa.int32(),  # null for a rejected scan
    "height_px": pa.int32(),
    "size_bytes": pa.int64(),  # of the encoded bytes; null where they could not be read
    **{column.name: column.type for column in SLICE_FIELDS},
}
"""Columns of every scan, beside its thumbnail. ``grey_range`` is that of the first pixels that are
kept, else null. The key of the identifiers' hashes is not kept: they tell which scans have the same
patient, study or series, and are to be deleted after that."""


PROPERTY_TYPES = {
    "pixel_sha256": pa.string(),  # of the decoded grey pixels and their shape, whatever the format
    "width_px": pa.int64(),  # after EXIF orientation is applied, as height_px
    "height_px": pa.int64(),
    "mode": pa.string(),  # Pillow's (L, RGB, P, …), with the depth unless 8 bits; "grey" for slices
    "format": pa.string(),  # JPEG, PNG, …, DICOM, NIfTI
    "size_bytes": pa.int64(),  # of the encoded file, divided by its number of slices
    "mean_grey": pa.float32(),  # of all pixels, 0 to 255
    "border_grey": pa.float32(),  # mean of the border, 0 to 255
    "border_dark_share": pa.float32(),  # share of the border's pixels that are black, in [0, 1]
}
"""Properties of an image besides its content; they may reveal its source."""


@dataclass(frozen=True, slots=True)
class Fingerprints:
    """Fingerprints of all scans."""

    table: pa.Table
    """Columns index and those of :data:`FINGERPRINT_TYPES`, in sample order, and those of
    :data:`PROPERTY_TYPES` where requested."""
    store: ScanStore
    """Opens any scan again."""


def expand_files(found: FoundSamples, reading: ReadOptions) -> FoundSamples:
    """Count the slices of files that may have several, and give each slice a row.

    Files are opened, except those with a picture's suffix, scans in Parquet tables, and rows that
    name a slice. A slice's ``path`` is :func:`brainray.images.slices.name_slice` of its file's.
    Rejected slices have a row too; :func:`fingerprint_samples` gives the reason.
    """
    samples = found.samples
    is_file = (samples["row_group"].to_numpy() < 0) & (samples["frame"].to_numpy() < 0)
    is_picture = [uri.lower().endswith(IMAGE_SUFFIXES) for uri in samples["uri"].to_pylist()]
    to_open = is_file & ~np.array(is_picture, np.bool_)
    if not to_open.any():
        return found
    numbered = samples.append_column("number", pa.array(np.arange(samples.num_rows)))
    files = numbered.filter(pa.array(to_open))
    parts = [files.slice(at, FILES_PER_TASK) for at in range(0, files.num_rows, FILES_PER_TASK)]
    expanded = ray.data.from_arrow(parts).map_batches(
        _expand_batch,  # type: ignore[arg-type]  # Ray's hint knows no fn_kwargs
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={"reading": reading},
    )
    tables = [numbered.filter(pa.array(~to_open)), *ray.get(expanded.to_arrow_refs())]
    whole = pa.concat_tables(tables).sort_by([("number", "ascending"), ("frame", "ascending")])
    return replace(found, samples=whole.drop_columns("number"))


def _expand_batch(batch: pa.Table, *, reading: ReadOptions) -> pa.Table:
    rows = []
    for row in batch.to_pylist():
        frames = range(count_slices(row["uri"], reading))
        rows += [row | {"path": name_slice(row["path"], n), "frame": n} for n in frames] or [row]
    return pa.Table.from_pylist(rows, batch.schema)


def count_slices(uri: str, reading: ReadOptions) -> int:
    """Return the number of numbered slices; 0 for a picture, or a file that cannot be opened."""
    try:
        slices = open_file(read_scan(uri, -1, -1), reading).slices
    except RejectedImage:
        return 0
    return 0 if slices[0].frame is None else len(slices)


def fingerprint_samples(
    samples: pa.Table,
    *,
    reading: ReadOptions,
    keep: Collection[Preprocessing] = (),
    with_properties: bool = False,
) -> Fingerprints:
    """Open every scan once, in parallel Ray Data tasks.

    ``samples`` are from :func:`expand_files`. The network's inputs for the preprocessings ``keep``
    are kept in the object store, if they fit there. ``with_properties`` measures
    :data:`PROPERTY_TYPES` too.
    """
    is_alone = samples["frame"].to_numpy() < 0
    num_bytes = int(samples["size_bytes"].to_numpy()[is_alone].sum())
    num_pixels = samples.num_rows * sum(one.size_px**2 for one in keep)
    fits = bytes_fit_object_store(num_bytes)
    kept = tuple(keep) if bytes_fit_object_store(num_bytes + num_pixels) else ()
    types = {"index": pa.int64(), **FINGERPRINT_TYPES, "thumbnail": pa.binary(THUMBNAIL_PX**2)}
    types |= PROPERTY_TYPES if with_properties else {}
    stored = {"image_bytes": pa.binary()} if fits else {}
    stored |= {name_pixels(one): pa.binary(one.size_px**2) for one in kept}
    indexed = samples.append_column("index", pa.array(range(samples.num_rows), pa.int64()))
    scanned = (
        ray.data.from_arrow(_cut_between_files(indexed))
        .map_batches(
            _fingerprint_batch,  # type: ignore[arg-type]  # Ray's hint knows no fn_kwargs
            batch_size=None,
            batch_format="pyarrow",
            fn_kwargs={
                "types": types | stored,
                "reading": reading,
                "key": secrets.token_bytes(32),
                "keep": kept,
                "with_properties": with_properties,
            },
        )
        .materialize()
    )
    refs = scanned.select_columns(list(types)).to_arrow_refs()
    table = pa.concat_tables(ray.get(refs)).sort_by("index")
    blocks = scanned.to_arrow_refs() if fits else ()
    positions = ray.put(locate_scans(blocks)) if fits else None
    store = ScanStore(ray.put(samples), reading, blocks, positions, kept)
    return Fingerprints(table, store)


def _cut_between_files(samples: pa.Table) -> list[pa.Table]:
    """Cut a sample table into parts of about :data:`ROWS_PER_TASK`, with no file in two parts."""
    uris = np.array(samples["uri"].to_pylist(), dtype=object)
    starts = np.flatnonzero(
        np.append(True, (uris[1:] != uris[:-1]) | (samples["frame"].to_numpy()[1:] < 0))
    )
    wanted = np.arange(0, samples.num_rows, ROWS_PER_TASK)
    cuts = np.unique(starts[np.searchsorted(starts, wanted, side="right") - 1]).tolist()
    ends = [*cuts[1:], samples.num_rows]
    return [samples.slice(start, end - start) for start, end in zip(cuts, ends, strict=True)]


def bytes_fit_object_store(num_bytes: int) -> bool:
    """Return whether bytes fit in the object stores of the cluster as it is now."""
    stores = [
        node["Resources"]["object_store_memory"]
        for node in ray.nodes()
        if node["Alive"] and "object_store_memory" in node["Resources"]
    ]
    return num_bytes <= OBJECT_STORE_SHARE * min(stores, default=0.0)


# ---- tasks ---------------------------------------------------------------------------------------


def _fingerprint_batch(
    batch: pa.Table,
    *,
    types: dict[str, pa.DataType],
    reading: ReadOptions,
    key: bytes,
    keep: Sequence[Preprocessing],
    with_properties: bool,
) -> pa.Table:
    reader = SampleReader(reading, key=key)
    hashes: dict[tuple[Any, ...], str] = {}  # slices of a file share one

    def read(index: int, frame: int, **location: Any) -> dict[str, Any]:  # noqa: ANN401
        number = None if frame < 0 else frame
        found: dict[str, Any] = {"index": index, "scan_uri": location["uri"], "frame": number}
        try:
            content = reader.read(**location)
            found["scan_uri"] = name_slice(name_scan(**location), number)
            file_key = tuple(location.values())
            hashes[file_key] = hashes.get(file_key) or sha256(content).hexdigest()
            found["content_sha256"] = hashes[file_key]
            found["size_bytes"] = len(content)
            file, position = reader.open(**location, frame=frame)
            found |= describe_slice(file.slices[position], None)
            decoded, pixels = _decode(file, position, keep)
            if with_properties:
                decoded |= measure_properties(content, file, pixels, reading.limits)
        except RejectedImage as rejection:
            return found | {"reason": rejection.reason}
        # The bytes of a file with several slices would be kept with each of them.
        return found | decoded | {"image_bytes": content if number is None else None}

    columns = ["index", "uri", "row_group", "row", "frame"]
    rows = [read(**row) for row in batch.select(columns).to_pylist()]
    return pa.table(  # absent values are null
        {name: pa.array([row.get(name) for row in rows], kind) for name, kind in types.items()}
    )


def _decode(
    file: ScanFile, index: int, keep: Sequence[Preprocessing]
) -> tuple[dict[str, Any], NDArray[np.uint8]]:
    """Return the columns that depend on the decoded pixels, and the grey levels."""
    samples = to_unsigned(file.decode(index))
    # Pictures by the full range of 8 or 16 bits; others have only the range of their samples.
    pixels = scale_to_8_bits(samples) if file.format == "picture" else to_display(samples)
    opened = {one: open_slice(file, index, one, samples) for one in keep}
    found = {
        "height_px": pixels.shape[0],
        "width_px": pixels.shape[1],
        "grey_range": next((one.grey_range for one in opened.values()), None),
        "thumbnail": compute_thumbnail(pixels).tobytes(),
        **{name_pixels(one): kept.scan.image.tobytes() for one, kept in opened.items()},
    }
    return found, pixels


# ---- properties ----------------------------------------------------------------------------------


def measure_properties(
    image_bytes: bytes, file: ScanFile, pixels: NDArray[np.uint8], limits: DecodeLimits
) -> dict[str, Any]:
    """Measure the :data:`PROPERTY_TYPES` of one slice; `pixels` are its decoded grey levels."""
    mode, name = _find_mode(image_bytes, file, limits)
    height, width = pixels.shape
    margin = max(1, round(BORDER_SHARE * min(pixels.shape)))
    is_border = np.ones(pixels.shape, np.bool_)
    is_border[margin:-margin, margin:-margin] = False
    border = pixels[is_border]
    return {
        "pixel_sha256": hash_pixels(pixels),
        "width_px": width,
        "height_px": height,
        "mode": mode,
        "format": name,
        "size_bytes": len(image_bytes) // len(file.slices),
        "mean_grey": float(pixels.mean()),
        "border_grey": float(border.mean()),
        "border_dark_share": float((border <= DARK_GREY).mean()),
    }


def _find_mode(image_bytes: bytes, file: ScanFile, limits: DecodeLimits) -> tuple[str, str]:
    """Return the colour mode and the name of the format."""
    if file.format != "picture":
        return "grey", {"dicom": "DICOM", "nifti": "NIfTI"}[file.format]
    header = read_header(image_bytes, limits)
    with Image.open(io.BytesIO(header.payload), formats=[header.format]) as image:
        mode = image.mode if header.bits == 8 else f"{image.mode}, {header.bits} bit"
    return mode, header.format


def hash_pixels(pixels: NDArray[np.uint8]) -> str:
    """Return the SHA-256 of grey pixels and their shape."""
    digest = sha256(f"{pixels.shape[0]} {pixels.shape[1]} ".encode())
    digest.update(pixels.tobytes())
    return digest.hexdigest()
