"""Pictures of scans for the reports' galleries."""

from collections.abc import Sequence

import numpy as np

from brainray.images.decode import DecodeLimits
from brainray.images.heatmap import GALLERY_OVERLAY_PX, render_overlay, render_picture
from brainray.images.preprocess import Preprocessing, open_scan
from brainray.inference.schema import describe_class_map
from brainray.model.explain import STRIDE_PX


def draw_scan(
    content: bytes,
    class_map: Sequence[float] | None,
    preprocessing: Preprocessing,
    limits: DecodeLimits,
) -> tuple[bytes, bytes | None]:
    """Draw a scan, and the same with a class map on it.

    Parameters
    ----------
    content : bytes
        The encoded scan.
    class_map : sequence of float, optional
        As the prediction table has it.
    preprocessing : Preprocessing
        Of the classifier.
    limits : DecodeLimits
        What is too large to open.

    Returns
    -------
    bytes, bytes or None
        PNGs; the second is None without a class map.

    Raises
    ------
    RejectedImage
        The scan cannot be decoded.
    """
    image_png = render_picture(content, limits)
    if class_map is None:
        return image_png, None
    shape = describe_class_map(preprocessing.size_px)
    cells = np.array(class_map, np.float32).reshape(shape["height"], shape["width"])
    scan = open_scan(content, preprocessing, limits)
    overlay_png = render_overlay(
        cells, scan.samples, scan.frame, STRIDE_PX, shown_px=GALLERY_OVERLAY_PX
    )
    return image_png, overlay_png
