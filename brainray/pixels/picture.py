"""A scan as a small picture for a person to look at."""

import io

from PIL import Image

from brainray.pixels.decode import DecodeLimits, decode_image

PICTURE_PX = 224


def render_picture(image_bytes: bytes, limits: DecodeLimits) -> bytes:
    """Render a scan as a PNG of at most :data:`PICTURE_PX` on its longer side.

    Raises
    ------
    RejectedImage
        The bytes cannot be turned into pixels.
    """
    image = Image.fromarray(decode_image(image_bytes, limits))
    image.thumbnail((PICTURE_PX, PICTURE_PX))
    sink = io.BytesIO()
    image.save(sink, "PNG")
    return sink.getvalue()
