"""Scans in Ray's object store: the bytes and pixels that fingerprinting has read and decoded."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray

from brainray.data.read import SampleReader
from brainray.images.preprocess import Preprocessing
from brainray.images.slices import ReadOptions, ScanFile, open_slice


@dataclass(frozen=True, slots=True)
class PixelViews:
    """Preprocessed pixels of scans by index, as views of the node's object store."""

    views: dict[int, NDArray[np.uint8]]
    """By block."""
    positions: NDArray[np.int64]
    """Block and row of each scan, shape (scans, 2)."""

    def take(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return a copy of some scans' pixels, shape (n, size_px, size_px)."""
        side = next(iter(self.views.values())).shape[-1] if self.views else 0
        images = np.empty((len(indices), side, side), np.uint8)
        for image, (block, row) in zip(images, self.positions[indices].tolist(), strict=True):
            image[:] = self.views[block][row]
        return images


@dataclass(frozen=True, slots=True)
class ScanStore:
    """Gives every scan's slices and pixels by index, from the object store or from storage.

    A task or worker gets a handle of a few hundred bytes.
    """

    samples: "ray.ObjectRef[pa.Table]"
    """The sample table, in the object store."""
    reading: ReadOptions
    """Options for reading the files."""
    blocks: "Sequence[ray.ObjectRef[pa.Table]]" = ()
    """Blocks with the files' bytes and the kept pixels."""
    positions: "ray.ObjectRef[NDArray[np.int64]] | None" = None
    """Block and row of each scan; None if the object store does not have the bytes."""
    kept: Sequence[Preprocessing] = ()
    """What the object store has pixels for."""

    @property
    def in_object_store(self) -> bool:
        """Whether Ray's object store has the files' bytes."""
        return self.positions is not None

    def holds_pixels(self, preprocessing: Preprocessing) -> bool:
        """Whether Ray's object store has the pixels for a preprocessing."""
        return name_pixels(preprocessing) in map(name_pixels, self.kept)

    def open_slices(self, indices: Sequence[int]) -> Iterator[tuple[ScanFile, int]]:
        """Yield the file of each scan, and the index of its slice there, or raise a RejectedImage.

        A file is opened once for slices that follow each other.
        """
        columns = ray.get(self.samples).select(["uri", "row_group", "row", "frame"])
        rows = columns.take(pa.array(indices, pa.int64()))
        tables, positions = self._fetch(indices) if self.in_object_store else ({}, None)
        reader = SampleReader(self.reading)
        for index, row in zip(indices, rows.to_pylist(), strict=True):
            content = None
            if positions is not None:
                block, at = positions[index].tolist()
                content = tables[block]["image_bytes"][at].as_py()
            yield reader.open(**row, content=content)

    def open_pixels(self, preprocessing: Preprocessing, indices: Sequence[int]) -> PixelViews:
        """Fetch scans' pixels to this node, where all processes share them without a copy.

        :meth:`holds_pixels` must be true.
        """
        column, side = name_pixels(preprocessing), preprocessing.size_px
        tables, positions = self._fetch(indices)
        views = {block: view_pixels(table[column], side) for block, table in tables.items()}
        return PixelViews(views, positions)

    def load_images(
        self, indices: Sequence[int], preprocessing: Preprocessing
    ) -> NDArray[np.uint8]:
        """Return the network's input of some scans, uint8 of shape (n, size_px, size_px).

        Raises
        ------
        RejectedImage
            A scan is gone, or cannot be decoded.
        """
        if self.holds_pixels(preprocessing) and len(indices):
            return self.open_pixels(preprocessing, indices).take(np.asarray(indices, np.int64))
        images = np.empty((len(indices), preprocessing.size_px, preprocessing.size_px), np.uint8)
        order = np.argsort(indices, kind="stable")  # slices of one file together
        opened = self.open_slices([indices[position] for position in order])
        for position, (file, index) in zip(order, opened, strict=True):
            images[position] = open_slice(file, index, preprocessing).scan.image
        return images

    def _fetch(self, indices: Sequence[int]) -> tuple[dict[int, pa.Table], NDArray[np.int64]]:
        """Return the blocks with some scans, by number, and every scan's block and row."""
        assert self.positions is not None
        positions: NDArray[np.int64] = ray.get(self.positions)
        needed = np.unique(positions[indices, 0]).tolist()
        tables = ray.get([self.blocks[block] for block in needed])
        return dict(zip(needed, tables, strict=True)), positions


def locate_scans(blocks: "Sequence[ray.ObjectRef[pa.Table]]") -> NDArray[np.int64]:
    """Return each scan's block and row, shape (scans, 2)."""
    # In tasks, so that the driver fetches no pixels.
    task: Any = ray.remote(lambda table: table["index"].to_numpy())
    indices = ray.get([task.remote(block) for block in blocks])
    positions = np.full((sum(map(len, indices)), 2), -1, np.int64)
    for block, index in enumerate(indices):
        positions[index] = np.stack([np.full(len(index), block), np.arange(len(index))], 1)
    return positions


def name_pixels(preprocessing: Preprocessing) -> str:
    """Return the column with the pixels for a preprocessing; they do not depend on mean and std."""
    chosen = (preprocessing.crop, preprocessing.intensity, preprocessing.fit)
    return "_".join(("pixels", *chosen, str(preprocessing.size_px)))


def view_pixels(column: pa.ChunkedArray, side: int) -> NDArray[np.uint8]:
    """View a column of square images as uint8, shape (rows, side, side), without a copy."""
    values = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    pixels = np.frombuffer(values.buffers()[1], np.uint8)
    start = values.offset * side**2
    return pixels[start : start + len(values) * side**2].reshape(-1, side, side)
