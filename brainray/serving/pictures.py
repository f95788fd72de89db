"""Evidence as a picture: the map of a class, alone or over its scan."""

import io
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from brainray.serving.handler import Evidence

Render = Literal["map", "overlay"]

ANCHORS = np.array(
    [(0, 0, 60), (120, 20, 130), (220, 50, 60), (250, 150, 20), (255, 245, 120)], np.float64
)
"""Colours from no evidence to most, equally far apart; dark to light, so that grey prints tell."""


def render_evidence(evidence: Evidence, render: Render) -> bytes:
    """Render where the network saw its class, as a PNG of the scan's size.

    Parameters
    ----------
    evidence : Evidence
        Map and scan; evidence against the class shows like none.
    render : {"map", "overlay"}
        The colours alone, the more transparent the less evidence; or laid over the scan.
    """
    size = evidence.pixels.shape[::-1]
    strength = _scale(evidence.class_map)
    wide = Image.fromarray(strength).resize(size, Image.Resampling.BILINEAR)
    layer = _colour(np.clip(np.asarray(wide), 0, 1))
    image = Image.fromarray(layer, "RGBA")
    if render == "overlay":
        scan = Image.fromarray(evidence.pixels).convert("RGBA")
        image = Image.alpha_composite(scan, image).convert("RGB")
    sink = io.BytesIO()
    image.save(sink, "PNG", compress_level=1)
    return sink.getvalue()


def _scale(class_map: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale a map to [0, 1], of what speaks for the class."""
    positive = np.clip(class_map, 0, None).astype(np.float32)
    most = float(positive.max())
    return positive / np.float32(most) if most > 0 else positive


def _colour(strength: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return colours with transparency, shape (H, W, 4)."""
    place = np.linspace(0, 1, len(ANCHORS))
    channels = [np.interp(strength, place, ANCHORS[:, c]) for c in range(3)]
    return np.stack([*channels, strength * 255 * 0.7], axis=-1).round().astype(np.uint8)
