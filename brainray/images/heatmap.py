"""Render scans and class-evidence maps as PNG."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from brainray.images.intensity import Samples, to_display
from brainray.images.preprocess import Frame

PICTURE_PX = 224
"""Longer side of a picture of a scan, at most."""
SHOWN_PX = 1024
"""Longer side of a scan with a heat map, at most; the map itself is far coarser."""

GALLERY_OVERLAY_PX = 160
"""Longer side of an overlay in a gallery: colour takes twice the bytes."""

OVERLAY_ALPHA = 0.6
"""Opacity of the strongest evidence; the scan stays visible under it."""

# Matplotlib's inferno (van der Walt and Smith, 2015; CC0) from 2/9 on: visible on black, with
# evenly rising lightness.
_INFERNO = ("4b0c6b", "781c6d", "a52c60", "cf4446", "ed6925", "fb9a06", "f7d03c", "fcffa4")
_STOPS = np.array([list(bytes.fromhex(stop)) for stop in _INFERNO])
_COLOURS: NDArray[np.uint8] = (
    np.stack(
        [
            np.interp(np.linspace(0, 1, 256), np.linspace(0, 1, len(_STOPS)), one)
            for one in _STOPS.T
        ],
        axis=1,
    )
    .round()
    .astype(np.uint8)
)
"""A colour for every level, shape (256, 3)."""


def render_picture(samples: Samples) -> bytes:
    """Render a scan as a PNG of at most :data:`PICTURE_PX`; 16 bits are shown by their range."""
    image = Image.fromarray(to_display(samples))
    image.thumbnail((PICTURE_PX, PICTURE_PX))
    return _encode(image)


def render_grey(pixels: NDArray[np.uint8]) -> bytes:
    """Render grey levels as a PNG of at most :data:`SHOWN_PX` on the longer side.

    A map or an overlay of the same slice has the same size.
    """
    height, width = _find_shown_size(pixels.shape, SHOWN_PX)
    image = Image.fromarray(pixels)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BOX)
    return _encode(image)


def render_map(class_map: NDArray[np.float32], frame: Frame, stride_px: int) -> bytes:
    """Render the evidence for a class as a transparent PNG, to be laid over the scan.

    Colour and opacity rise with the evidence, relative to its maximum. Pixels without evidence,
    with evidence against the class, or outside of the network's input are transparent. Evidence in
    the input's padding is not shown, but counts for the maximum.

    Parameters
    ----------
    class_map : ndarray of float32, shape (h, w)
        Evidence for one class in every cell of the network's last features.
    frame : Frame
        Part of the scan in the network's input, and its position there.
    stride_px : int
        Distance of cells in pixels of the input; cell i is centred on pixel i * stride_px.

    Returns
    -------
    bytes
        An RGBA PNG of the scan's size, reduced to :data:`SHOWN_PX` on the longer side.
    """
    levels = _compute_levels(class_map, frame, stride_px)
    return _encode(Image.fromarray(np.dstack([_COLOURS[levels], levels])))


def render_overlay(
    class_map: NDArray[np.float32],
    samples: Samples,
    frame: Frame,
    stride_px: int,
    *,
    shown_px: int = SHOWN_PX,
) -> bytes:
    """Render a scan with the evidence for a class on it, as one opaque RGB PNG.

    16-bit samples are shown by their own range. `shown_px` is the longer side of the picture, at
    most; by default it has the size of that of :func:`render_map`, which explains the others.
    """
    levels = _compute_levels(class_map, frame, stride_px, shown_px)
    image = Image.fromarray(to_display(samples))
    if levels.shape != samples.shape:
        image = image.resize(levels.shape[::-1], Image.Resampling.BOX)
    alpha = (levels * np.float32(OVERLAY_ALPHA / 255))[..., None]
    blended = np.asarray(image)[..., None] * (1 - alpha) + _COLOURS[levels] * alpha
    return _encode(Image.fromarray(blended.round().astype(np.uint8)))


def _find_shown_size(shape: tuple[int, ...], shown_px: int) -> tuple[int, int]:
    """Return height and width of a scan as shown."""
    shrunk = min(1.0, shown_px / max(shape))
    height, width = (max(1, round(length * shrunk)) for length in shape)
    return height, width


def _compute_levels(
    class_map: NDArray[np.float32], frame: Frame, stride_px: int, shown_px: int = SHOWN_PX
) -> NDArray[np.uint8]:
    """Return the evidence at every shown pixel, from 0 (none) to 255 (the maximum)."""
    height, width = _find_shown_size(frame.shape, shown_px)
    peak = float(class_map.max())
    if not peak > 0:
        return np.zeros((height, width), np.uint8)
    source, target = frame.source, frame.target
    num_rows, num_columns = class_map.shape
    # Centres of the shown pixels, in pixels of the scan; below as shares of its part in the input.
    down = (np.arange(height) + 0.5) * (frame.shape[0] / height)
    across = (np.arange(width) + 0.5) * (frame.shape[1] / width)
    rows = _interpolate(
        (down - source.top) / source.height, target.top, target.height, num_rows, stride_px
    )
    columns = _interpolate(
        (across - source.left) / source.width, target.left, target.width, num_columns, stride_px
    )
    levels = rows @ (class_map * np.float32(255 / peak)) @ columns.T
    return levels.clip(0, 255).round().astype(np.uint8)


def _interpolate(
    shares: NDArray[np.float64], start: int, extent: int, num_cells: int, stride_px: int
) -> NDArray[np.float32]:
    """Return the weight of every cell at every pixel of a line, shape (pixels, num_cells).

    Catmull-Rom splines are smooth and keep the value of each cell. Beyond the outermost centres the
    evidence is constant. Pixels outside of the network's input have weights 0.

    `shares` are the centres of the pixels; 0 and 1 are the ends of the line's part in the input.
    `start` and `extent` are the position and length of that part in the input.
    """
    positions = start + shares * extent - 0.5
    cells = (positions / stride_px).clip(0, num_cells - 1)
    first = np.floor(cells).astype(np.int64)
    t = cells - first
    weights = (
        -0.5 * t + t**2 - 0.5 * t**3,
        1 - 2.5 * t**2 + 1.5 * t**3,
        0.5 * t + 2 * t**2 - 1.5 * t**3,
        -0.5 * t**2 + 0.5 * t**3,
    )
    matrix = np.zeros((len(shares), num_cells), np.float32)
    for offset, weight in enumerate(weights, start=-1):
        neighbours = (first + offset).clip(0, num_cells - 1)
        np.add.at(matrix, (np.arange(len(shares)), neighbours), weight)
    matrix[(shares < 0) | (shares > 1)] = 0
    return matrix


def _encode(image: Image.Image) -> bytes:
    sink = io.BytesIO()
    image.save(sink, "PNG", compress_level=3)  # twice as fast as 6, and a tenth larger
    return sink.getvalue()
