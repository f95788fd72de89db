"""A scan as the galleries of reports show it."""

from collections.abc import Sequence

import numpy as np

from brainray.inference.schema import describe_class_map
from brainray.model.explain import STRIDE_PX
from brainray.pixels.decode import DecodeLimits, decode_image
from brainray.pixels.picture import GALLERY_OVERLAY_PX, render_overlay, render_picture
from brainray.pixels.preprocess import Preprocessing


def draw_scan(
    content: bytes,
    class_map: Sequence[float] | None,
    preprocessing: Preprocessing,
    limits: DecodeLimits,
) -> tuple[bytes, bytes | None]:
    """Draw a scan, and on it where the evidence for its class is.

    Parameters
    ----------
    content : bytes
        The encoded scan.
    class_map : sequence of float or None
        The column ``class_map`` of its prediction.

    Returns
    -------
    image_png : bytes
    overlay_png : bytes or None
        The scan with its class map on it; None if it has none.

    Raises
    ------
    RejectedImage
        The bytes cannot be turned into pixels.
    """
    image_png = render_picture(content, limits)
    if class_map is None:
        return image_png, None
    side = describe_class_map(preprocessing.size_px)["height"]
    overlay_png = render_overlay(
        np.array(class_map, np.float32).reshape(side, side),
        decode_image(content, limits),
        preprocessing,
        STRIDE_PX,
        shown_px=GALLERY_OVERLAY_PX,
    )
    return image_png, overlay_png
