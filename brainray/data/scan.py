"""Open every scan once: hash, thumbnail, and the reason when it cannot be used.

The same pass leaves in Ray's object store what fits there: the encoded bytes of files with one
slice, so that nothing goes back to the disk or the network for them, and the pixels at the sizes
that are asked for, so that no epoch decodes again what the first look has decoded.
"""

import secrets
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, fields
from hashlib import sha256
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from numpy.typing import NDArray

from brainray.data.near_duplicates import THUMBNAIL_PX, compute_thumbnail
from brainray.data.read import SampleReader, name_scan
from brainray.data.slice_columns import SLICE_FIELDS, describe_slice
from brainray.errors import RejectedImage
from brainray.images.intensity import scale_to_8_bits, to_display, to_unsigned
from brainray.images.metadata import ImageProperties, measure_properties
from brainray.images.preprocess import Preprocessing
from brainray.images.slices import ReadOptions, ScanFile, name_slice, open_slice

SCAN_ROWS_PER_TASK = 256
"""Scans opened by one task, about: a tenth of a second of work for 224-px JPEGs."""

OBJECT_STORE_SHARE = 0.4
"""Scans stay in the object store up to this share of the smallest node's store.

Ray Data asks for half of the store for blocks in flight; the rest is left to those.
"""


FINDING_TYPES = {
    "scan_uri": pa.string(),  # as bulk jobs name it: FILE, FILE#row=N or FILE#frame=N
    "content_sha256": pa.string(),  # null where no byte could be read
    "reason": pa.string(),  # why it is rejected; else null
    "width_px": pa.int32(),  # null where it is rejected
    "height_px": pa.int32(),
    "size_bytes": pa.int64(),  # of the encoded bytes; null where they could not be read
    **{column.name: column.type for column in SLICE_FIELDS},
}
"""Columns of every scan, beside its thumbnail. ``grey_range`` is that of the first pixels that are
kept, else null. The hashes of the identifiers have a key that is not kept: they tell which scans
are of one patient, study or series, and are to be forgotten then."""

TRAIT_TYPES = {
    "pixel_sha256": pa.string(),
    "width_px": pa.int32(),
    "height_px": pa.int32(),
    "mode": pa.string(),
    "format": pa.string(),
    "size_bytes": pa.int64(),
    "mean_grey": pa.float32(),
    "border_grey": pa.float32(),
    "border_dark_share": pa.float32(),
}
"""Columns of a scan with traits."""
assert set(TRAIT_TYPES) == {field.name for field in fields(ImageProperties)}


@dataclass(frozen=True, slots=True)
class ScanResult:
    """What opening every scan brought."""

    table: pa.Table
    """Columns index and those of :data:`FINDING_TYPES`, in sample order; with those of
    :class:`brainray.images.metadata.ImageProperties` where they were asked for."""
    store: "ScanStore"
    """Opens any scan again."""


class PixelViews:
    """Preprocessed pixels of scans, by index, where they lie in the object store of the node."""

    def __init__(self, views: dict[int, NDArray[np.uint8]], positions: NDArray[np.int64]) -> None:
        self._views = views
        self._positions = positions

    def take(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return a copy of some scans' pixels, shape (n, size_px, size_px)."""
        side = next(iter(self._views.values())).shape[-1] if self._views else 0
        images = np.empty((len(indices), side, side), np.uint8)
        for image, (block, row) in zip(images, self._positions[indices].tolist(), strict=True):
            image[:] = self._views[block][row]
        return images


class ScanStore:
    """Every scan's bytes and pixels, by index: from the object store, or from where they lie.

    It travels to tasks and workers as a handle of a few hundred bytes.
    """

    def __init__(
        self,
        samples: "ray.ObjectRef[pa.Table]",
        reading: ReadOptions,
        blocks: "Sequence[ray.ObjectRef[pa.Table]]" = (),
        positions: "ray.ObjectRef[NDArray[np.int64]] | None" = None,
        kept: Sequence[Preprocessing] = (),
    ) -> None:
        self._samples = samples
        self.reading = reading
        """How the files are read."""
        self._blocks = blocks
        self._positions = positions
        self._kept = frozenset(map(_name_pixels, kept))

    @property
    def samples(self) -> "ray.ObjectRef[pa.Table]":
        """The sample table, in the object store: where each scan lies."""
        return self._samples

    @property
    def in_object_store(self) -> bool:
        """Whether the bytes are held in Ray's object store."""
        return self._positions is not None

    def holds_pixels(self, preprocessing: Preprocessing) -> bool:
        """Whether preprocessed pixels are held in Ray's object store."""
        return _name_pixels(preprocessing) in self._kept

    def open_slices(self, indices: Sequence[int]) -> Iterator[tuple[ScanFile, int]]:
        """Open some scans, in the order asked for: their files, and indices of their slices.

        Slices of one file that follow each other are read and opened together.

        Raises
        ------
        RejectedImage
            A file has vanished or cannot be read, or its header cannot.
        """
        samples: pa.Table = ray.get(self._samples)
        rows = samples.select(["uri", "row_group", "row", "frame"]).take(
            pa.array(indices, pa.int64())
        )
        tables, positions = self._fetch(indices) if self.in_object_store else ({}, None)
        reader = SampleReader(self.reading)
        for index, row in zip(indices, rows.to_pylist(), strict=True):
            content = None
            if positions is not None:
                block, at = positions[index].tolist()
                content = tables[block]["image_bytes"][at].as_py()
            yield reader.open(**row, content=content)

    def open_pixels(self, preprocessing: Preprocessing, indices: Sequence[int]) -> PixelViews:
        """Bring some scans' pixels to this node, where its processes share them without a copy.

        Those of the preprocessing must be held: :meth:`holds_pixels`.
        """
        column, side = _name_pixels(preprocessing), preprocessing.size_px
        tables, positions = self._fetch(indices)
        views = {block: view_pixels(table[column], side) for block, table in tables.items()}
        return PixelViews(views, positions)

    def load_images(
        self, indices: Sequence[int], preprocessing: Preprocessing
    ) -> NDArray[np.uint8]:
        """Return the pixels of some scans, decoded and resized, in the order asked for.

        Returns
        -------
        ndarray of uint8, shape (n, size_px, size_px)

        Raises
        ------
        RejectedImage
            A scan cannot be turned into pixels, or has vanished.
        """
        side = preprocessing.size_px
        images = np.empty((len(indices), side, side), np.uint8)
        if self.holds_pixels(preprocessing) and len(indices):
            wanted = np.asarray(indices, np.int64)
            return self.open_pixels(preprocessing, indices).take(wanted)
        order = np.argsort(indices, kind="stable")  # slices of one file together
        opened = self.open_slices([indices[position] for position in order])
        for position, (file, index) in zip(order, opened, strict=True):
            images[position] = open_slice(file, index, preprocessing).scan.image
        return images

    def _fetch(self, indices: Sequence[int]) -> tuple[dict[int, pa.Table], NDArray[np.int64]]:
        """Return the blocks of some scans by their numbers, and each scan's block and row."""
        assert self._positions is not None
        positions: NDArray[np.int64] = ray.get(self._positions)
        needed = np.unique(positions[indices, 0]).tolist()
        tables = ray.get([self._blocks[block] for block in needed])
        return dict(zip(needed, tables, strict=True)), positions


def _list_indices(table: pa.Table) -> NDArray[np.int64]:
    """Return the scans of a block; runs as a Ray task, so that the driver fetches no pixels."""
    indices: NDArray[np.int64] = table["index"].to_numpy()
    return indices


def _locate(blocks: "Sequence[ray.ObjectRef[pa.Table]]") -> NDArray[np.int64]:
    """Return each scan's block and row, shape (scans, 2)."""
    task = ray.remote(_list_indices)
    indices = ray.get([task.remote(block) for block in blocks])
    positions = np.full((sum(map(len, indices)), 2), -1, np.int64)
    for block, index in enumerate(indices):
        positions[index] = np.stack([np.full(len(index), block), np.arange(len(index))], 1)
    return positions


def _name_pixels(preprocessing: Preprocessing) -> str:
    """Return the column that holds scans preprocessed so; mean and std come after it."""
    chosen = (preprocessing.crop, preprocessing.intensity, preprocessing.fit)
    return "_".join(("pixels", *chosen, str(preprocessing.size_px)))


def view_pixels(column: pa.ChunkedArray, side: int) -> NDArray[np.uint8]:
    """View a column of squares as uint8, shape (rows, side, side), without copying it."""
    values = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    pixels = np.frombuffer(values.buffers()[1], np.uint8)
    start = values.offset * side**2
    return pixels[start : start + len(values) * side**2].reshape(-1, side, side)


def scan_samples(
    samples: pa.Table,
    *,
    reading: ReadOptions,
    keep: Collection[Preprocessing] = (),
    with_traits: bool = False,
) -> ScanResult:
    """Open every scan once, in parallel Ray Data tasks.

    Parameters
    ----------
    samples : pyarrow.Table
        From :func:`brainray.data.labelled.find_samples`, with a row for each slice: see
        :func:`brainray.data.expand.expand_files`.
    reading : ReadOptions
        How the files are read.
    keep : collection of Preprocessing
        Pixels that will be asked for again; they are kept where they fit.
    with_traits : bool
        Whether to measure what an image is besides its picture.
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
            _scan_batch,  # type: ignore[arg-type]  # Ray's hint knows no fn_kwargs
            batch_size=None,
            batch_format="pyarrow",
            fn_kwargs={
                "reading": reading,
                "key": secrets.token_bytes(32),
                "keep_bytes": fits,
                "keep": kept,
                "with_traits": with_traits,
            },
        )
        .materialize()
    )
    names = FINDING_TYPES | TRAIT_TYPES if with_traits else FINDING_TYPES
    findings = scanned.select_columns(["index", "thumbnail", *names])
    table = pa.concat_tables(ray.get(findings.to_arrow_refs())).sort_by("index")
    store = ScanStore(ray.put(samples), reading)
    if fits:
        blocks = scanned.to_arrow_refs()
        store = ScanStore(ray.put(samples), reading, blocks, ray.put(_locate(blocks)), kept)
    return ScanResult(table, store)


def _cut_between_files(samples: pa.Table) -> list[pa.Table]:
    """Cut a sample table into parts of about :data:`SCAN_ROWS_PER_TASK`, no file in two parts."""
    uris = np.array(samples["uri"].to_pylist(), dtype=object)
    starts = np.flatnonzero(
        np.append(True, (uris[1:] != uris[:-1]) | (samples["frame"].to_numpy()[1:] < 0))
    )
    wanted = np.arange(0, samples.num_rows, SCAN_ROWS_PER_TASK)
    cuts = np.unique(starts[np.searchsorted(starts, wanted, side="right") - 1]).tolist()
    ends = [*cuts[1:], samples.num_rows]
    return [samples.slice(start, end - start) for start, end in zip(cuts, ends, strict=True)]


def bytes_fit_object_store(num_bytes: int) -> bool:
    """Tell whether encoded bytes may stay in the object store, as the cluster is now."""
    stores = [
        node["Resources"]["object_store_memory"]
        for node in ray.nodes()
        if node["Alive"] and "object_store_memory" in node["Resources"]
    ]
    return num_bytes <= OBJECT_STORE_SHARE * min(stores, default=0.0)


@dataclass(slots=True)
class _Look:
    """What one look at a scan brought."""

    found: dict[str, Any]
    """Values of :data:`FINDING_TYPES`."""
    content: bytes | None = None
    """To be kept; None for a rejected scan, and for a file of several slices, which would be kept
    with each of them."""
    squares: tuple[bytes | None, ...] = ()
    """The thumbnail, then the pixels to keep."""
    properties: ImageProperties | None = None


def _scan_batch(
    batch: pa.Table,
    *,
    reading: ReadOptions,
    key: bytes,
    keep_bytes: bool,
    keep: Sequence[Preprocessing],
    with_traits: bool,
) -> pa.Table:
    scanner = _Scanner(reading, SampleReader(reading, key=key), tuple(keep), with_traits)
    rows = batch.select(["uri", "row_group", "row", "frame"]).to_pylist()
    looks = [scanner.look_at(**row) for row in rows]
    columns: dict[str, Any] = {"index": batch["index"]}
    for name, kind in FINDING_TYPES.items():
        columns[name] = pa.array([look.found[name] for look in looks], kind)
    if keep_bytes:
        columns["image_bytes"] = pa.array([look.content for look in looks], pa.binary())
    sides = [THUMBNAIL_PX, *(one.size_px for one in keep)]
    names = ["thumbnail", *map(_name_pixels, keep)]
    for position, (name, side) in enumerate(zip(names, sides, strict=True)):
        values = [look.squares[position] if look.squares else None for look in looks]
        columns[name] = pa.array(values, pa.binary(side**2))
    for name, kind in TRAIT_TYPES.items() if with_traits else ():
        values = [getattr(look.properties, name) if look.properties else None for look in looks]
        columns[name] = pa.array(values, kind)
    return pa.table(columns)


@dataclass(slots=True)
class _Scanner:
    """Looks at one scan after the other."""

    reading: ReadOptions
    reader: SampleReader
    keep: tuple[Preprocessing, ...]
    with_traits: bool
    _hashed: tuple[bytes, str] = field(default=(b"", ""), init=False)

    def look_at(self, uri: str, row_group: int, row: int, frame: int) -> _Look:
        """Read, open and decode a scan."""
        number = None if frame < 0 else frame
        look = _Look(dict.fromkeys(FINDING_TYPES) | {"scan_uri": uri, "frame": number})
        try:
            content = self.reader.read(uri, row_group, row)
            look.found["scan_uri"] = name_slice(name_scan(uri, row_group, row), number)
            look.found["content_sha256"] = self._hash(content)
            look.found["size_bytes"] = len(content)
            self._decode(look, content, *self.reader.open(uri, row_group, row, frame))
        except RejectedImage as rejection:
            look.found["reason"] = rejection.reason
            return look
        look.content = content if number is None else None
        return look

    def _decode(self, look: _Look, content: bytes, file: ScanFile, index: int) -> None:
        look.found |= describe_slice(file.slices[index], None)
        samples = to_unsigned(file.decode(index))
        # The whole range of 8 or 16 bits for pictures; others have no range but their samples'.
        pixels = scale_to_8_bits(samples) if file.format == "picture" else to_display(samples)
        kept = [open_slice(file, index, one, samples) for one in self.keep]
        look.found["height_px"], look.found["width_px"] = pixels.shape
        look.found["grey_range"] = kept[0].grey_range if kept else None
        squares = (compute_thumbnail(pixels), *(one.scan.image for one in kept))
        look.squares = tuple(square.tobytes() for square in squares)
        if self.with_traits:
            look.properties = measure_properties(content, file, pixels, self.reading.limits)

    def _hash(self, content: bytes) -> str:
        """Return the SHA-256 of a file; once for all of its slices."""
        if content is not self._hashed[0]:
            self._hashed = (content, sha256(content).hexdigest())
        return self._hashed[1]
