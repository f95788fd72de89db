"""Fingerprint every scan: open it once for its hash, thumbnail and properties, or its rejection.

The same pass keeps in Ray's object store what fits there: the encoded bytes of files with one
slice, so that they are not read again, and the network's inputs, so that no epoch decodes again.
"""

import io
import secrets
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from numpy.typing import NDArray
from PIL import Image

from brainray.data.near_duplicates import THUMBNAIL_PX, compute_thumbnail
from brainray.data.read import SampleReader, name_scan
from brainray.data.scan_store import ScanStore, locate_scans, name_pixels
from brainray.data.slice_columns import SLICE_FIELDS, describe_slice
from brainray.errors import RejectedImage
from brainray.images.decode import DecodeLimits, read_header
from brainray.images.intensity import scale_to_8_bits, to_display, to_unsigned
from brainray.images.preprocess import Preprocessing
from brainray.images.slices import ReadOptions, ScanFile, name_slice, open_slice

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


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageProperties:
    """Properties of an image besides its content; they may reveal its source."""

    pixel_sha256: str
    """Of the decoded grey pixels and their shape; does not depend on the file format."""
    width_px: int
    height_px: int
    """After EXIF orientation is applied."""
    mode: str
    """Pillow's mode of the file (L, RGB, P, …), with the depth unless 8 bits; "grey" for DICOM and
    NIfTI."""
    format: str
    """JPEG, PNG, …, DICOM, NIfTI."""
    size_bytes: int
    """Length of the encoded file, divided by its number of slices."""
    mean_grey: float
    """Mean of all pixels, 0 to 255."""
    border_grey: float
    """Mean of the border, 0 to 255."""
    border_dark_share: float
    """Share of the border's pixels that are black, in [0, 1]."""


_ARROW_TYPES: dict[Any, pa.DataType] = {str: pa.string(), int: pa.int64(), float: pa.float32()}
PROPERTY_TYPES = {field.name: _ARROW_TYPES[field.type] for field in fields(ImageProperties)}
"""Columns of :class:`ImageProperties`."""


@dataclass(frozen=True, slots=True)
class Fingerprints:
    """Fingerprints of all scans."""

    table: pa.Table
    """Columns index and those of :data:`FINGERPRINT_TYPES`, in sample order, and those of
    :data:`PROPERTY_TYPES` where requested."""
    store: ScanStore
    """Opens any scan again."""


def fingerprint_samples(
    samples: pa.Table,
    *,
    reading: ReadOptions,
    keep: Collection[Preprocessing] = (),
    with_properties: bool = False,
) -> Fingerprints:
    """Open every scan once, in parallel Ray Data tasks.

    Parameters
    ----------
    samples : pyarrow.Table
        From :func:`brainray.data.labelled.find_samples`, with a row for each slice: see
        :func:`brainray.data.expand.expand_files`.
    reading : ReadOptions
        Options for reading the files.
    keep : collection of Preprocessing
        Keep the network's inputs for these in the object store, if they fit there.
    with_properties : bool
        Measure :class:`ImageProperties` too.
    """
    is_alone = samples["frame"].to_numpy() < 0
    num_bytes = int(samples["size_bytes"].to_numpy()[is_alone].sum())
    num_pixels = samples.num_rows * sum(one.size_px**2 for one in keep)
    fits = bytes_fit_object_store(num_bytes)
    kept = tuple(keep) if bytes_fit_object_store(num_bytes + num_pixels) else ()
    indexed = samples.append_column("index", pa.array(range(samples.num_rows), pa.int64()))
    scanned = (
        ray.data.from_arrow(_cut_between_files(indexed))
        .map_batches(
            _fingerprint_batch,  # type: ignore[arg-type]  # Ray's hint knows no fn_kwargs
            batch_size=None,
            batch_format="pyarrow",
            fn_kwargs={
                "reading": reading,
                "key": secrets.token_bytes(32),
                "keep_bytes": fits,
                "keep": kept,
                "with_properties": with_properties,
            },
        )
        .materialize()
    )
    names = FINGERPRINT_TYPES | (PROPERTY_TYPES if with_properties else {})
    findings = scanned.select_columns(["index", "thumbnail", *names])
    table = pa.concat_tables(ray.get(findings.to_arrow_refs())).sort_by("index")
    store = ScanStore(ray.put(samples), reading)
    if fits:
        blocks = scanned.to_arrow_refs()
        store = ScanStore(ray.put(samples), reading, blocks, ray.put(locate_scans(blocks)), kept)
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
    reading: ReadOptions,
    key: bytes,
    keep_bytes: bool,
    keep: Sequence[Preprocessing],
    with_properties: bool,
) -> pa.Table:
    types = {"index": pa.int64(), **FINGERPRINT_TYPES, "thumbnail": pa.binary(THUMBNAIL_PX**2)}
    types |= {"image_bytes": pa.binary()} if keep_bytes else {}
    types |= {name_pixels(one): pa.binary(one.size_px**2) for one in keep}
    types |= PROPERTY_TYPES if with_properties else {}
    fingerprinter = _Fingerprinter(reading, key, keep, with_properties)
    columns = ["index", "uri", "row_group", "row", "frame"]
    rows = [fingerprinter.read(**row) for row in batch.select(columns).to_pylist()]
    return pa.table(
        {name: pa.array([row.get(name) for row in rows], kind) for name, kind in types.items()}
    )


class _Fingerprinter:
    """Reads scans one after another; each becomes a row, in which absent values are null."""

    def __init__(
        self,
        reading: ReadOptions,
        key: bytes,
        keep: Sequence[Preprocessing],
        with_properties: bool,
    ) -> None:
        self._reading, self._keep, self._with_properties = reading, keep, with_properties
        self._reader = SampleReader(reading, key=key)
        self._hashed: tuple[bytes, str] = (b"", "")

    def read(self, index: int, uri: str, row_group: int, row: int, frame: int) -> dict[str, Any]:
        number = None if frame < 0 else frame
        found: dict[str, Any] = {"index": index, "scan_uri": uri, "frame": number}
        try:
            content = self._reader.read(uri, row_group, row)
            found["scan_uri"] = name_slice(name_scan(uri, row_group, row), number)
            found["content_sha256"] = self._hash(content)
            found["size_bytes"] = len(content)
            file, position = self._reader.open(uri, row_group, row, frame)
            found |= describe_slice(file.slices[position], None)
            found |= self._decode(content, file, position)
        except RejectedImage as rejection:
            return found | {"reason": rejection.reason}
        # The bytes of a file with several slices would be kept with each of them.
        return found | {"image_bytes": content if number is None else None}

    def _decode(self, content: bytes, file: ScanFile, index: int) -> dict[str, Any]:
        samples = to_unsigned(file.decode(index))
        # Pictures by the full range of 8 or 16 bits; others have only the range of their samples.
        pixels = scale_to_8_bits(samples) if file.format == "picture" else to_display(samples)
        opened = {one: open_slice(file, index, one, samples) for one in self._keep}
        height, width = pixels.shape
        found: dict[str, Any] = {
            "height_px": height,
            "width_px": width,
            "grey_range": next((one.grey_range for one in opened.values()), None),
            "thumbnail": compute_thumbnail(pixels).tobytes(),
        }
        found |= {name_pixels(one): kept.scan.image.tobytes() for one, kept in opened.items()}
        if self._with_properties:
            found |= asdict(measure_properties(content, file, pixels, self._reading.limits))
        return found

    def _hash(self, content: bytes) -> str:
        """Return the SHA-256 of a file, computed once for all of its slices."""
        if content is not self._hashed[0]:
            self._hashed = (content, sha256(content).hexdigest())
        return self._hashed[1]


# ---- properties ----------------------------------------------------------------------------------


def measure_properties(
    image_bytes: bytes, file: ScanFile, pixels: NDArray[np.uint8], limits: DecodeLimits
) -> ImageProperties:
    """Measure the properties of one slice; `pixels` are its decoded grey levels."""
    mode, name = _find_mode(image_bytes, file, limits)
    height, width = pixels.shape
    border = _cut_border(pixels)
    return ImageProperties(
        pixel_sha256=hash_pixels(pixels),
        width_px=width,
        height_px=height,
        mode=mode,
        format=name,
        size_bytes=len(image_bytes) // len(file.slices),
        mean_grey=float(pixels.mean()),
        border_grey=float(border.mean()),
        border_dark_share=float((border <= DARK_GREY).mean()),
    )


def _find_mode(image_bytes: bytes, file: ScanFile, limits: DecodeLimits) -> tuple[str, str]:
    """Return the colour mode and the name of the format."""
    if file.format != "picture":
        return "grey", {"dicom": "DICOM", "nifti": "NIfTI"}[file.format]
    header = read_header(image_bytes, limits)
    with Image.open(io.BytesIO(header.payload), formats=[header.format]) as image:
        mode = image.mode if header.bits == 8 else f"{image.mode}, {header.bits} bit"
    return mode, header.format


def hash_pixels(pixels: NDArray[np.uint8]) -> str:
    """Compute the SHA-256 of grey pixels and their shape."""
    digest = sha256(f"{pixels.shape[0]} {pixels.shape[1]} ".encode())
    digest.update(pixels.tobytes())
    return digest.hexdigest()


def _cut_border(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the pixels of the border, in one dimension."""
    width = max(1, round(BORDER_SHARE * min(pixels.shape)))
    is_border = np.ones(pixels.shape, np.bool_)
    is_border[width:-width, width:-width] = False
    return pixels[is_border]
