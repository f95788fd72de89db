"""Pictures of scans for the galleries of reports."""

from collections.abc import Sequence

import numpy as np

from brainray.images.heatmap import GALLERY_OVERLAY_PX, render_overlay, render_picture
from brainray.images.preprocess import Preprocessing
from brainray.images.slices import ScanFile, open_slice, show_slice
from brainray.inference.schema import describe_class_map
from brainray.model.explain import STRIDE_PX


def draw_scan(
    file: ScanFile,
    index: int,
    class_map: Sequence[float] | None,
    preprocessing: Preprocessing,
) -> tuple[bytes, bytes | None]:
    """Draw a slice of a file, alone and under its class map of the prediction table.

    Returns
    -------
    bytes, bytes or None
        PNG files; the second is None without a class map.

    Raises
    ------
    RejectedImage
        The slice cannot be decoded.
    """
    shown = show_slice(file, index)
    image_png = render_picture(shown)
    if class_map is None:
        return image_png, None
    shape = describe_class_map(preprocessing.size_px)
    cells = np.array(class_map, np.float32).reshape(shape["height"], shape["width"])
    frame = open_slice(file, index, preprocessing).scan.frame
    overlay_png = render_overlay(cells, shown, frame, STRIDE_PX, shown_px=GALLERY_OVERLAY_PX)
    return image_png, overlay_png
