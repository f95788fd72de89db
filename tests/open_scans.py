"""Opens all slices of scan files, as every command does."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from brainray.errors import RejectedImage
from brainray.images.preprocess import Preprocessing
from brainray.images.slices import OpenedSlice, ReadOptions, SliceInfo, open_file, open_slice


def load_image(content: bytes, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Return the network's input for a file with one slice."""
    return open_slice(open_file(content), 0, preprocessing).scan.image


def open_slices(
    content: bytes,
    preprocessing: Preprocessing,
    options: ReadOptions | None = None,
    *,
    key: bytes | None = None,
) -> Iterator[OpenedSlice | tuple[SliceInfo, RejectedImage]]:
    """Yield every slice of a file: opened, or its info and its rejection."""
    file = open_file(content, options, key=key)
    for index, info in enumerate(file.slices):
        try:
            yield open_slice(file, index, preprocessing)
        except RejectedImage as rejection:
            if info.frame is None:
                raise
            yield info, rejection
