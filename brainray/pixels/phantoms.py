"""Synthetic brain-MRI slices ("phantoms"): seeded, four classes, for the demo and the tests.

A phantom looks the part and learns like the part, but it is nobody's scan. A *subject* is drawn
once (anatomy, plane, contrast, scanner, mass) and then rendered slice by slice, so slices of one
subject are near twins, as neighbouring slices of one patient are in the real data.

Drawings are in head units: the origin is the middle of the head, x points right, y down, and the
head is about two units high. An anatomy is data (:class:`_View`): outlines through which smooth
curves run. One rendering pass paints, from the outside in, scalp, bone, dura, cortex, deep
structures and mass, and then puts the scanner on top: bias field, blur, noise, grey-scale window.

Redraw the contact sheet of the README with
``python -m brainray.pixels.phantoms docs/phantoms.png``.
"""

import io
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from brainray.errors import ConfigError
from brainray.labels import BRAIN_TUMOUR_CLASSES

Plane = Literal["axial", "coronal", "sagittal"]
Points = Sequence[tuple[float, float]]
_Curve = NDArray[np.float64]
_Picture = NDArray[np.float32]

PLANES: tuple[Plane, ...] = ("axial", "coronal", "sagittal")
"""Anatomical planes; every class is drawn in all three, equally often."""

_SIDES_PX = (160, 176, 192, 208, 224, 256, 320)
_SIDE_ODDS = (0.16, 0.18, 0.2, 0.16, 0.2, 0.07, 0.03)
"""How often the shorter side of a canvas has each length."""

# Brightness of each tissue in [0, 1] under four sequences: T1, T1 after contrast agent, T2, FLAIR.
# Chosen by eye against textbook slices; only the order within a sequence carries meaning.
_SEQUENCES = ("t1", "t1c", "t2", "flair")
_SEQUENCE_ODDS = (0.22, 0.52, 0.11, 0.15)
_TISSUES: dict[str, tuple[float, float, float, float]] = {
    "air": (0.00, 0.00, 0.00, 0.00),
    "bone": (0.05, 0.05, 0.04, 0.05),
    "marrow": (0.40, 0.38, 0.22, 0.22),
    "diploe": (0.20, 0.19, 0.13, 0.12),
    "fat": (0.86, 0.84, 0.66, 0.62),
    "muscle": (0.32, 0.34, 0.20, 0.28),
    "mucosa": (0.38, 0.62, 0.74, 0.66),
    "dura": (0.24, 0.52, 0.16, 0.26),
    "csf": (0.12, 0.11, 0.95, 0.10),
    "grey": (0.38, 0.36, 0.60, 0.52),
    "white": (0.54, 0.47, 0.40, 0.41),
    "deep": (0.43, 0.40, 0.50, 0.48),
    "vessel": (0.20, 0.82, 0.06, 0.20),
    "void": (0.06, 0.10, 0.04, 0.06),
    "gland": (0.46, 0.56, 0.52, 0.48),
    "vitreous": (0.16, 0.15, 0.96, 0.20),
    "rim": (0.74, 0.95, 0.50, 0.82),
    "core": (0.14, 0.13, 0.98, 0.24),
    "oedema": (0.28, 0.26, 0.84, 0.84),
    "meningioma": (0.76, 0.88, 0.80, 0.86),
    "adenoma": (0.76, 0.86, 0.74, 0.84),
}


# --------------------------------------------------------------------------------- anatomy as data


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)  # parts are told apart by identity
class _Part:
    """One structure: a filled outline, or an open stroke where ``width`` is positive."""

    tissue: str
    points: Points
    width: float = 0.0
    mirrored: bool = False


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _View:
    """One cut through the head; all lengths in head units."""

    plane: Plane
    half_width: float
    head: Points
    cavity: Points
    """Inside of the skull: what the dura lines and CSF fills."""
    cerebrum: Points
    fissures: tuple[_Part, ...]
    """Clefts cut out of the cerebrum; cortex lines them as it lines the surface."""
    cerebellum: Points
    face: Points
    """Where fat and muscle intermix: face and neck; may be empty."""
    outside: tuple[_Part, ...]
    inside: tuple[_Part, ...]
    glioma_boxes: tuple[tuple[float, float, float, float], ...]
    """Where a glioma may be centred: (x low, y low, x high, y high)."""
    dura_spans: tuple[tuple[float, float], ...]
    """Where a meningioma may sit, as fractions of the way round the cavity."""
    sella: tuple[float, float] | None
    """Where a pituitary mass grows; None in cuts that miss the sella."""


def _mirror(half: Points) -> Points:
    """Close a right-hand outline, given from top to bottom midline, with its mirror image."""
    return [*half, *((-x, y) for x, y in list(half)[-2:0:-1])]


def _oval(x: float, y: float, x_radius: float, y_radius: float, tilt: float = 0.0) -> Points:
    """Outline an ellipse; ``tilt`` in radians."""
    angles = np.arange(10) * (2 * np.pi / 10)
    along, across = x_radius * np.cos(angles), y_radius * np.sin(angles)
    xs = x + along * np.cos(tilt) - across * np.sin(tilt)
    ys = y + along * np.sin(tilt) + across * np.cos(tilt)
    return [(float(a), float(b)) for a, b in zip(xs, ys, strict=True)]


_AXIAL_HEAD = _mirror(
    [(0, -0.97), (0.34, -0.90), (0.58, -0.64), (0.71, -0.22), (0.76, 0.2), (0.68, 0.6), (0.4, 0.9),
     (0, 0.98)]
)  # fmt: skip
_AXIAL_CAVITY = _mirror(
    [(0, -0.83), (0.28, -0.78), (0.48, -0.55), (0.59, -0.2), (0.635, 0.18), (0.57, 0.52),
     (0.34, 0.77), (0, 0.84)]
)  # fmt: skip
_MIDLINE = _Part(tissue="csf", points=[(0, -0.9), (0.008, -0.4), (-0.008, 0.3), (0, 0.9)],
                 width=0.016)  # fmt: skip
_EVERYWHERE = ((0.0, 1.0),)
_SIDES_BOX = ((-0.36, -0.42, -0.2, 0.42), (0.2, -0.42, 0.36, 0.42))

_AXIAL_HIGH = _View(
    plane="axial",
    half_width=0.82,
    head=_mirror([(0, -0.94), (0.36, -0.86), (0.62, -0.56), (0.74, -0.1), (0.74, 0.3), (0.6, 0.68),
                  (0.34, 0.9), (0, 0.95)]),
    cavity=_mirror([(0, -0.76), (0.27, -0.7), (0.48, -0.45), (0.58, -0.08), (0.58, 0.26),
                    (0.46, 0.56), (0.26, 0.73), (0, 0.78)]),
    cerebrum=_mirror([(0, -0.74), (0.26, -0.68), (0.46, -0.44), (0.56, -0.08), (0.56, 0.25),
                      (0.44, 0.54), (0.25, 0.71), (0, 0.76)]),
    fissures=(_MIDLINE,),
    cerebellum=(),
    face=(),
    outside=(),
    inside=(
        _Part(tissue="vessel", points=_oval(0, 0.75, 0.035, 0.025)),
        _Part(tissue="dura", points=[(0, -0.76), (0.006, -0.1), (0, 0.75)], width=0.01),
    ),
    glioma_boxes=_SIDES_BOX,
    dura_spans=_EVERYWHERE,
    sella=None,
)  # fmt: skip

_AXIAL_MID = _View(
    plane="axial",
    half_width=0.82,
    head=_AXIAL_HEAD,
    cavity=_AXIAL_CAVITY,
    cerebrum=_mirror([(0, -0.81), (0.27, -0.76), (0.46, -0.54), (0.57, -0.2), (0.615, 0.18),
                      (0.55, 0.51), (0.33, 0.75), (0, 0.82)]),
    fissures=(
        _Part(tissue="csf", points=[(0, -0.9), (0.01, -0.7), (0, -0.46)], width=0.018),
        _Part(tissue="csf", points=[(0, 0.42), (-0.01, 0.6), (0, 0.9)], width=0.018),
        _Part(tissue="csf", points=[(0.64, -0.16), (0.5, -0.1), (0.4, -0.14), (0.37, -0.02),
                                    (0.39, 0.1)], width=0.024, mirrored=True),
    ),
    cerebellum=(),
    face=(),
    outside=(),
    inside=(
        _Part(tissue="white", points=[(-0.12, -0.4), (0, -0.37), (0.12, -0.4)], width=0.07),
        _Part(tissue="white", points=[(-0.16, 0.36), (0, 0.29), (0.16, 0.36)], width=0.08),
        _Part(tissue="grey", points=_oval(0.25, -0.05, 0.055, 0.15, -0.3), mirrored=True),
        _Part(tissue="grey", points=_oval(0.15, -0.24, 0.045, 0.1, -0.35), mirrored=True),
        _Part(tissue="deep", points=_oval(0.105, 0.09, 0.085, 0.14, -0.35), mirrored=True),
        _Part(tissue="csf", points=[(0.012, -0.13), (0.02, -0.3), (0.1, -0.42), (0.17, -0.43),
                                    (0.13, -0.3), (0.06, -0.15)], mirrored=True),
        _Part(tissue="csf", points=[(0.1, 0.22), (0.19, 0.24), (0.27, 0.36), (0.27, 0.52),
                                    (0.22, 0.46), (0.17, 0.33)], mirrored=True),
        _Part(tissue="csf", points=[(0, -0.06), (0.014, 0.06), (0, 0.17), (-0.014, 0.06)]),
        _Part(tissue="vessel", points=_oval(0, 0.81, 0.04, 0.028)),
        _Part(tissue="dura", points=[(0, -0.83), (0.004, -0.47)], width=0.009),
        _Part(tissue="dura", points=[(0, 0.83), (-0.004, 0.4)], width=0.009),
    ),
    glioma_boxes=_SIDES_BOX,
    dura_spans=_EVERYWHERE,
    sella=None,
)  # fmt: skip

_AXIAL_LOW = _View(
    plane="axial",
    half_width=0.82,
    head=_mirror([(0, -1.0), (0.2, -0.93), (0.46, -0.9), (0.62, -0.66), (0.7, -0.25), (0.74, 0.2),
                  (0.66, 0.58), (0.4, 0.88), (0, 0.96)]),
    cavity=_mirror([(0, -0.37), (0.12, -0.4), (0.3, -0.47), (0.48, -0.43), (0.58, -0.18),
                    (0.615, 0.18), (0.55, 0.5), (0.33, 0.75), (0, 0.82)]),
    cerebrum=_mirror([(0, 0.1), (0.16, -0.1), (0.17, -0.3), (0.3, -0.44), (0.46, -0.41),
                      (0.555, -0.17), (0.595, 0.18), (0.53, 0.42), (0.38, 0.36), (0.25, 0.2)]),
    fissures=(
        _Part(tissue="csf", points=[(0.26, -0.12), (0.34, -0.03), (0.33, 0.08)], width=0.03,
              mirrored=True),
    ),
    cerebellum=_mirror([(0, 0.27), (0.2, 0.26), (0.36, 0.38), (0.47, 0.5), (0.4, 0.64),
                        (0.22, 0.76), (0.03, 0.75)]),
    face=_mirror([(0, -0.93), (0.2, -0.88), (0.44, -0.84), (0.58, -0.62), (0.6, -0.4), (0.3, -0.5),
                  (0, -0.42)]),
    outside=(
        _Part(tissue="air", points=_oval(0.06, -0.72, 0.045, 0.16), mirrored=True),
        _Part(tissue="mucosa", points=[(0, -0.9), (0, -0.55)], width=0.025),
        _Part(tissue="mucosa", points=[(0.1, -0.86), (0.13, -0.7), (0.1, -0.56)], width=0.03,
              mirrored=True),
        _Part(tissue="bone", points=[(0.16, -0.52), (0.36, -0.55), (0.55, -0.44)], width=0.05,
              mirrored=True),
        _Part(tissue="fat", points=_oval(0.33, -0.68, 0.16, 0.14), mirrored=True),
        _Part(tissue="muscle", points=[(0.24, -0.55), (0.36, -0.7)], width=0.03, mirrored=True),
        _Part(tissue="vitreous", points=_oval(0.36, -0.78, 0.125, 0.125), mirrored=True),
        _Part(tissue="muscle", points=_oval(0.38, -0.885, 0.05, 0.022), mirrored=True),
        _Part(tissue="air", points=_oval(0, -0.47, 0.1, 0.06)),
        _Part(tissue="muscle", points=_oval(0.64, -0.4, 0.04, 0.16, -0.15), mirrored=True),
    ),
    inside=(
        _Part(tissue="csf", points=[(0.5, 0.42), (0.36, 0.34), (0.2, 0.22)], width=0.022,
              mirrored=True),
        _Part(tissue="csf", points=_mirror([(0, -0.36), (0.1, -0.3), (0.2, -0.2), (0.13, -0.08),
                                            (0.17, 0.08), (0.1, 0.22), (0, 0.26)])),
        _Part(tissue="deep", points=_mirror([(0, -0.06), (0.08, -0.08), (0.13, 0.0), (0.12, 0.13),
                                             (0.05, 0.2), (0, 0.2)])),
        _Part(tissue="csf", points=_oval(0, 0.235, 0.045, 0.03)),
        _Part(tissue="void", points=_oval(0.11, -0.27, 0.025, 0.025), mirrored=True),
        _Part(tissue="vessel", points=_oval(0, -0.12, 0.018, 0.018)),
        _Part(tissue="gland", points=_oval(0, -0.29, 0.035, 0.025)),
        _Part(tissue="vessel", points=[(0.5, 0.55), (0.38, 0.7), (0.2, 0.79)], width=0.028,
              mirrored=True),
        _Part(tissue="white", points=[(0, 0.36), (0.01, 0.72)], width=0.035),
    ),
    glioma_boxes=((-0.4, -0.2, -0.33, 0.12), (0.33, -0.2, 0.4, 0.12)),
    dura_spans=((0.15, 0.45), (0.55, 0.85)),
    sella=(0.0, -0.27),
)  # fmt: skip

_CORONAL_HEAD = _mirror(
    [(0, -0.97), (0.34, -0.9), (0.6, -0.62), (0.7, -0.22), (0.68, 0.12), (0.62, 0.34), (0.63, 0.56),
     (0.56, 0.86), (0.4, 1.1), (0.36, 1.4), (0, 1.45)]
)  # fmt: skip

_CORONAL_MID = _View(
    plane="coronal",
    half_width=0.8,
    head=_CORONAL_HEAD,
    cavity=_mirror([(0, -0.84), (0.3, -0.77), (0.51, -0.52), (0.6, -0.15), (0.57, 0.16),
                    (0.45, 0.31), (0.3, 0.3), (0.17, 0.2), (0.09, 0.24), (0, 0.24)]),
    cerebrum=_mirror([(0, -0.82), (0.29, -0.75), (0.49, -0.51), (0.58, -0.15), (0.55, 0.15),
                      (0.44, 0.28), (0.29, 0.26), (0.2, 0.12), (0.1, 0.08), (0, 0.06)]),
    fissures=(
        _Part(tissue="csf", points=[(0, -0.9), (0.008, -0.6), (0, -0.36)], width=0.018),
        _Part(tissue="csf", points=[(0.64, -0.04), (0.5, -0.02), (0.4, -0.08), (0.38, -0.18)],
              width=0.024, mirrored=True),
        _Part(tissue="csf", points=[(0.5, 0.0), (0.34, 0.04), (0.24, 0.1)], width=0.02,
              mirrored=True),
    ),
    cerebellum=(),
    face=_mirror([(0, 0.3), (0.2, 0.32), (0.45, 0.4), (0.58, 0.5), (0.53, 0.8), (0.46, 1.1),
                  (0.4, 1.35), (0, 1.4)]),
    outside=(
        _Part(tissue="bone", points=[(0.14, 0.3), (0.3, 0.37), (0.5, 0.38)], width=0.045,
              mirrored=True),
        _Part(tissue="muscle", points=_oval(0.33, 0.58, 0.1, 0.16, 0.25), mirrored=True),
        _Part(tissue="marrow", points=[(0.5, 0.5), (0.48, 0.7), (0.42, 0.95)], width=0.06,
              mirrored=True),
        _Part(tissue="bone", points=_oval(0, 0.37, 0.19, 0.1)),
        _Part(tissue="air", points=_oval(0, 0.37, 0.16, 0.075)),
        _Part(tissue="mucosa", points=[(0.15, 0.44), (0.06, 0.47), (0, 0.44)], width=0.02,
              mirrored=True),
        _Part(tissue="air", points=_oval(0, 0.6, 0.11, 0.075)),
        _Part(tissue="muscle", points=_oval(0, 0.86, 0.24, 0.13)),
        _Part(tissue="air", points=_oval(0, 0.72, 0.16, 0.016)),
    ),
    inside=(
        _Part(tissue="white", points=[(-0.22, -0.34), (0, -0.33), (0.22, -0.34)], width=0.07),
        _Part(tissue="grey", points=_oval(0.26, -0.1, 0.06, 0.11, 0.3), mirrored=True),
        _Part(tissue="deep", points=_oval(0.11, -0.09, 0.085, 0.085), mirrored=True),
        _Part(tissue="grey", points=_oval(0.2, -0.24, 0.04, 0.06, 0.3), mirrored=True),
        _Part(tissue="csf", points=[(0.012, -0.19), (0.02, -0.28), (0.1, -0.32), (0.18, -0.31),
                                    (0.12, -0.24), (0.05, -0.2)], mirrored=True),
        _Part(tissue="csf", points=[(0, -0.15), (0.016, -0.06), (0, 0.05), (-0.016, -0.06)]),
        _Part(tissue="csf", points=_mirror([(0, 0.05), (0.14, 0.1), (0.12, 0.17), (0, 0.17)])),
        _Part(tissue="white", points=[(-0.07, 0.11), (0, 0.1), (0.07, 0.11)], width=0.02),
        _Part(tissue="csf", points=_oval(0.36, 0.16, 0.035, 0.018, 0.4), mirrored=True),
        _Part(tissue="dura", points=_oval(0.12, 0.22, 0.045, 0.04), mirrored=True),
        _Part(tissue="void", points=_oval(0.12, 0.21, 0.022, 0.022), mirrored=True),
        _Part(tissue="gland", points=_oval(0, 0.215, 0.06, 0.022)),
        _Part(tissue="vessel", points=_oval(0, -0.83, 0.035, 0.024)),
        _Part(tissue="dura", points=[(0, -0.84), (0.004, -0.4)], width=0.009),
    ),
    glioma_boxes=((-0.36, -0.5, -0.2, -0.05), (0.2, -0.5, 0.36, -0.05)),
    dura_spans=((0.0, 0.27), (0.73, 1.0)),
    sella=(0.0, 0.18),
)  # fmt: skip

_CORONAL_BACK = _View(
    plane="coronal",
    half_width=0.8,
    head=_CORONAL_HEAD,
    cavity=_mirror([(0, -0.84), (0.3, -0.77), (0.51, -0.52), (0.59, -0.15), (0.56, 0.18),
                    (0.46, 0.42), (0.26, 0.56), (0, 0.58)]),
    cerebrum=_mirror([(0, -0.82), (0.29, -0.75), (0.49, -0.51), (0.57, -0.15), (0.53, 0.13),
                      (0.38, 0.12), (0.2, 0.05), (0.05, -0.02)]),
    fissures=(_MIDLINE,),
    cerebellum=_mirror([(0, 0.06), (0.16, 0.11), (0.36, 0.18), (0.48, 0.25), (0.4, 0.42),
                        (0.22, 0.51), (0.05, 0.47)]),
    face=_mirror([(0, 0.62), (0.3, 0.6), (0.5, 0.5), (0.58, 0.5), (0.53, 0.8), (0.46, 1.1),
                  (0.4, 1.35), (0, 1.4)]),
    outside=(
        _Part(tissue="muscle", points=_oval(0.18, 0.9, 0.13, 0.24, 0.1), mirrored=True),
        _Part(tissue="marrow", points=_oval(0, 0.78, 0.06, 0.08)),
    ),
    inside=(
        _Part(tissue="csf", points=[(0.16, -0.2), (0.22, -0.24), (0.25, -0.12), (0.2, -0.02),
                                    (0.17, -0.08)], mirrored=True),
        _Part(tissue="white", points=[(0.0, 0.16), (0.0, 0.42)], width=0.05),
        _Part(tissue="white", points=[(0.1, 0.3), (0.24, 0.28), (0.34, 0.3)], width=0.04,
              mirrored=True),
        _Part(tissue="dura", points=[(0, 0.0), (0.2, 0.09), (0.38, 0.16), (0.55, 0.19)],
              width=0.014, mirrored=True),
        _Part(tissue="vessel", points=_oval(0.53, 0.19, 0.03, 0.026), mirrored=True),
        _Part(tissue="vessel", points=_oval(0, -0.83, 0.035, 0.024)),
        _Part(tissue="dura", points=[(0, -0.84), (0.004, -0.02)], width=0.009),
    ),
    glioma_boxes=((-0.36, -0.5, -0.2, -0.12), (0.2, -0.5, 0.36, -0.12)),
    dura_spans=((0.0, 0.28), (0.72, 1.0)),
    sella=None,
)  # fmt: skip

_SAGITTAL = _View(
    plane="sagittal",
    half_width=0.95,
    head=[(0.02, -0.97), (0.4, -0.88), (0.66, -0.6), (0.74, -0.25), (0.72, -0.02), (0.8, 0.18),
          (0.9, 0.32), (0.78, 0.39), (0.81, 0.5), (0.78, 0.58), (0.8, 0.66), (0.74, 0.84),
          (0.52, 0.9), (0.3, 0.95), (0.26, 1.2), (0.24, 1.4), (-0.5, 1.4), (-0.5, 1.1),
          (-0.52, 0.75), (-0.64, 0.5), (-0.84, 0.22), (-0.91, -0.15), (-0.8, -0.58),
          (-0.44, -0.88)],
    cavity=[(0.02, -0.84), (0.36, -0.76), (0.56, -0.52), (0.63, -0.22), (0.56, -0.03), (0.36, 0.0),
            (0.22, 0.05), (0.19, 0.14), (0.12, 0.15), (0.08, 0.12), (0.05, 0.28), (0.0, 0.44),
            (-0.03, 0.56), (-0.18, 0.56), (-0.4, 0.5), (-0.62, 0.36), (-0.77, 0.1), (-0.79, -0.18),
            (-0.68, -0.52), (-0.38, -0.77)],
    cerebrum=[(0.02, -0.82), (0.35, -0.74), (0.54, -0.51), (0.605, -0.22), (0.54, -0.06),
              (0.36, -0.03), (0.22, -0.01), (0.0, -0.05), (-0.2, -0.02), (-0.4, 0.08),
              (-0.6, 0.18), (-0.74, 0.08), (-0.765, -0.18), (-0.66, -0.51), (-0.37, -0.75)],
    fissures=(
        _Part(tissue="csf", points=[(0.3, -0.3), (0.28, -0.44), (0.05, -0.55), (-0.22, -0.5),
                                    (-0.34, -0.62)], width=0.018),
        _Part(tissue="csf", points=[(-0.38, -0.66), (-0.42, -0.38), (-0.3, -0.12)], width=0.018),
        _Part(tissue="csf", points=[(-0.32, -0.1), (-0.55, 0.0), (-0.76, 0.0)], width=0.018),
    ),
    cerebellum=[(-0.22, 0.1), (-0.38, 0.12), (-0.56, 0.22), (-0.6, 0.32), (-0.44, 0.44),
                (-0.27, 0.46), (-0.18, 0.36), (-0.16, 0.22)],
    face=[(0.68, 0.02), (0.76, 0.2), (0.84, 0.33), (0.73, 0.39), (0.76, 0.5), (0.75, 0.66),
          (0.7, 0.8), (0.5, 0.85), (0.27, 0.9), (0.22, 1.2), (0.2, 1.4), (-0.45, 1.4),
          (-0.45, 1.1), (-0.46, 0.72), (-0.4, 0.58), (-0.1, 0.62), (0.06, 0.5), (0.2, 0.3),
          (0.4, 0.08)],
    outside=(
        _Part(tissue="marrow", points=[(0.09, 0.2), (0.06, 0.34), (0.0, 0.5)], width=0.07),
        _Part(tissue="bone", points=_oval(0.29, 0.17, 0.13, 0.11)),
        _Part(tissue="air", points=_oval(0.29, 0.17, 0.1, 0.085)),
        _Part(tissue="air", points=[(0.64, 0.02), (0.69, -0.1), (0.68, -0.22), (0.655, -0.12)]),
        _Part(tissue="air", points=[(0.4, 0.12), (0.6, 0.14), (0.7, 0.3), (0.4, 0.34),
                                    (0.28, 0.36)]),
        _Part(tissue="mucosa", points=[(0.38, 0.2), (0.52, 0.2), (0.63, 0.26)], width=0.055),
        _Part(tissue="mucosa", points=[(0.36, 0.3), (0.52, 0.3), (0.66, 0.32)], width=0.045),
        _Part(tissue="marrow", points=[(0.36, 0.4), (0.55, 0.4), (0.7, 0.42)], width=0.035),
        _Part(tissue="muscle", points=[(0.34, 0.5), (0.46, 0.45), (0.64, 0.47), (0.7, 0.58),
                                       (0.6, 0.68), (0.4, 0.74)]),
        _Part(tissue="marrow", points=_oval(0.7, 0.72, 0.04, 0.09, 0.2)),
        _Part(tissue="air", points=[(0.28, 0.38), (0.25, 0.55), (0.27, 0.75), (0.2, 1.0),
                                    (0.18, 1.4)], width=0.055),
        *(_Part(tissue="marrow", points=_oval(0.085 - 0.025 * i, 0.66 + 0.17 * i, 0.075, 0.065))
          for i in range(5)),
        _Part(tissue="csf", points=[(-0.09, 0.5), (-0.1, 0.8), (-0.14, 1.4)], width=0.13),
        _Part(tissue="deep", points=[(-0.09, 0.5), (-0.1, 0.8), (-0.14, 1.4)], width=0.075),
        _Part(tissue="muscle", points=[(-0.3, 0.66), (-0.33, 0.9), (-0.34, 1.4)], width=0.14),
    ),
    inside=(
        _Part(tissue="csf", points=[(0.27, -0.16), (0.2, -0.29), (0.02, -0.36), (-0.18, -0.3),
                                    (-0.26, -0.16), (-0.12, -0.2), (0.1, -0.22)]),
        _Part(tissue="deep", points=_oval(-0.02, -0.15, 0.14, 0.085)),
        _Part(tissue="white", points=[(0.23, -0.11), (0.31, -0.17), (0.28, -0.29), (0.15, -0.38),
                                      (0.0, -0.41), (-0.15, -0.37), (-0.25, -0.28),
                                      (-0.3, -0.16), (-0.25, -0.13)], width=0.055),
        _Part(tissue="deep", points=[(0.03, -0.08), (-0.12, -0.06), (-0.15, 0.06), (-0.14, 0.2),
                                     (-0.12, 0.36), (-0.1, 0.57), (-0.05, 0.57), (-0.03, 0.4),
                                     (0.02, 0.3), (0.03, 0.16), (-0.02, 0.06)]),
        _Part(tissue="csf", points=[(-0.13, 0.16), (-0.21, 0.25), (-0.13, 0.36)]),
        _Part(tissue="csf", points=[(-0.16, -0.04), (-0.24, 0.02), (-0.2, 0.08), (-0.14, 0.04)]),
        _Part(tissue="white", points=[(-0.22, 0.27), (-0.34, 0.28), (-0.46, 0.26)], width=0.03),
        _Part(tissue="white", points=[(-0.3, 0.28), (-0.38, 0.36), (-0.4, 0.4)], width=0.022),
        _Part(tissue="dura", points=[(-0.22, 0.07), (-0.42, 0.11), (-0.72, 0.26)], width=0.016),
        _Part(tissue="vessel", points=[(-0.3, -0.06), (-0.46, 0.06), (-0.74, 0.2)], width=0.022),
        _Part(tissue="csf", points=[(0.2, 0.0), (0.1, -0.02), (0.04, 0.02), (0.08, 0.1),
                                    (0.2, 0.1)]),
        _Part(tissue="gland", points=_oval(0.155, 0.125, 0.035, 0.02)),
        _Part(tissue="gland", points=[(0.15, 0.11), (0.13, 0.02)], width=0.014),
    ),
    glioma_boxes=((0.15, -0.56, 0.38, -0.28), (-0.5, -0.5, -0.1, -0.22)),
    dura_spans=((0.0, 0.2), (0.82, 1.0)),
    sella=(0.16, 0.08),
)  # fmt: skip

# Sellar cuts come often in every class, so that the cut alone does not tell of a pituitary mass.
_VIEWS: dict[Plane, tuple[tuple[_View, float], ...]] = {
    "axial": ((_AXIAL_HIGH, 0.2), (_AXIAL_MID, 0.35), (_AXIAL_LOW, 0.45)),
    "coronal": ((_CORONAL_MID, 0.7), (_CORONAL_BACK, 0.3)),
    "sagittal": ((_SAGITTAL, 1.0),),
}


# ------------------------------------------------------------------------------- a subject's dice


@dataclass(frozen=True, kw_only=True, slots=True)
class _Mass:
    """A tumour's place and shape, in head units."""

    centre: tuple[float, float]
    radius: float
    outline: Points
    """Relative to ``centre``, for ``radius`` 1."""
    brightness: float
    """Factor on the tissue brightness, near 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SubjectParameters:
    """What the slices of one phantom subject share; made by :func:`draw_subject`."""

    label: str
    """Class name."""
    view: _View
    """The cut through the head."""
    sequence: str
    """MRI sequence: t1, t1c (after contrast agent), t2 or flair."""
    height_px: int
    """Canvas height."""
    width_px: int
    """Canvas width."""
    fill: float
    """Part of the canvas that the head takes, 1 for edge to edge."""
    shift: tuple[float, float]
    """Head centre off the canvas centre, (x, y), in head units."""
    rotation_rad: float
    """In-plane rotation."""
    flipped: bool
    """Mirror left and right."""
    stretch: float
    """Width of the head relative to the view's drawing."""
    warp: NDArray[np.float64]
    """Phases of the smooth deformation, radians, shape (2, 2)."""
    ventricles: float
    """Opening of sulci relative to the average."""
    tissue_jitter: NDArray[np.float64]
    """Factor on each tissue's brightness, in the order of the tissue table."""
    bias: NDArray[np.float64]
    """Receive-field coefficients of x, y, x² + y²; shape (3,)."""
    gain: float
    """Factor on all brightness."""
    gamma: float
    """Exponent of the grey-scale window."""
    noise: float
    """Standard deviation of the complex noise, full scale 1."""
    blur_px: float
    """Standard deviation of the point spread."""
    texture_seed: int
    """Seed of the folds and mottles."""
    mass: _Mass | None
    """The tumour, if any."""


def _draw_view(label: str, plane: Plane, rng: np.random.Generator) -> _View:
    """Draw a cut of the plane that can show the class."""
    choices = [
        (view, odds)
        for view, odds in _VIEWS[plane]
        if label != "pituitary" or view.sella is not None
    ]
    odds = np.array([odds for _, odds in choices])
    return choices[int(rng.choice(len(choices), p=odds / odds.sum()))][0]


def _draw_outline(rng: np.random.Generator, *, raggedness: float, knots: int) -> Points:
    """Draw a closed unit outline whose radius varies by ``raggedness`` (standard deviation)."""
    angles = np.arange(knots) * (2 * np.pi / knots)
    radii = 1 + raggedness * np.clip(rng.standard_normal(knots), -1.8, 1.8)
    oval = 1 + rng.uniform(0, 0.18) * np.cos(2 * (angles - rng.uniform(0, np.pi)))
    xs, ys = radii * oval * np.cos(angles), radii * oval * np.sin(angles)
    return [(float(x), float(y)) for x, y in zip(xs, ys, strict=True)]


def _draw_mass(label: str, view: _View, rng: np.random.Generator) -> _Mass | None:
    """Draw the tumour that the class calls for."""
    if label == "notumor":
        return None
    brightness = float(rng.uniform(0.9, 1.1))
    if label == "glioma":
        box = view.glioma_boxes[int(rng.integers(len(view.glioma_boxes)))]
        centre = (float(rng.uniform(box[0], box[2])), float(rng.uniform(box[1], box[3])))
        radius = float(rng.uniform(0.16, 0.26))
        outline = _draw_outline(rng, raggedness=0.15, knots=13)
    elif label == "meningioma":
        span = view.dura_spans[int(rng.integers(len(view.dura_spans)))]
        curve = _smooth(view.cavity)
        edge = curve[int(rng.uniform(*span) * len(curve)) % len(curve)]
        radius = float(rng.uniform(0.14, 0.25))
        # Set in by less than the radius, the disc is cut by the skull: that is its broad base.
        inward = np.array([0.0, -0.1]) - edge
        x, y = edge + inward / np.hypot(*inward) * radius * rng.uniform(0.35, 0.65)
        centre = (float(x), float(y))
        outline = _draw_outline(rng, raggedness=0.03, knots=9)
    else:
        assert view.sella is not None
        radius = float(rng.uniform(0.095, 0.155))
        x, y = view.sella
        centre = (x + float(rng.normal(0, 0.008)), y - radius * float(rng.uniform(0.0, 0.4)))
        outline = _draw_outline(rng, raggedness=0.05, knots=9)
    return _Mass(centre=centre, radius=radius, outline=outline, brightness=brightness)


def draw_subject(
    label: str, rng: np.random.Generator, *, plane: Plane | None = None
) -> SubjectParameters:
    """Draw what the slices of one subject share.

    Parameters
    ----------
    label : str
        Class name, one of ``BRAIN_TUMOUR_CLASSES``.
    rng : Generator
        Source of the dice.
    plane : {"axial", "coronal", "sagittal"}, optional
        Drawn evenly where not given.

    Raises
    ------
    ConfigError
        An unknown class or plane.
    """
    _check_labels([label])
    if plane is not None and plane not in PLANES:
        raise ConfigError(f"Unknown plane {plane!r}. Expected one of {', '.join(PLANES)}.")
    drawn: Plane = PLANES[int(rng.integers(len(PLANES)))] if plane is None else plane
    view = _draw_view(label, drawn, rng)
    short = int(rng.choice(_SIDES_PX, p=_SIDE_ODDS))
    long = short if rng.random() < 0.6 else min(320, int(short * rng.uniform(1.04, 1.3)))
    tall = rng.random() < 0.6
    rotation = np.clip(rng.normal(0, 0.05), -0.12, 0.12)
    return SubjectParameters(
        label=label,
        view=view,
        sequence=str(rng.choice(_SEQUENCES, p=_SEQUENCE_ODDS)),
        height_px=long if tall else short,
        width_px=short if tall else long,
        fill=float(rng.uniform(0.84, 0.98)),
        shift=(float(rng.uniform(-0.04, 0.04)), float(rng.uniform(-0.03, 0.03))),
        rotation_rad=float(rotation),
        flipped=bool(rng.random() < 0.5),
        stretch=float(rng.uniform(0.95, 1.06)),
        warp=rng.uniform(0, 2 * np.pi, (2, 2)),
        ventricles=float(rng.uniform(0.7, 1.5)),
        tissue_jitter=rng.uniform(0.92, 1.08, len(_TISSUES)),
        bias=rng.normal(0, 1, 3) * np.array([0.12, 0.12, 0.12]),
        gain=float(rng.uniform(0.72, 1.12)),
        gamma=float(rng.uniform(0.85, 1.3)),
        noise=float(rng.uniform(0.008, 0.042)),
        blur_px=float(rng.uniform(0.5, 0.85)),
        texture_seed=int(rng.integers(2**32)),
        mass=_draw_mass(label, view, rng),
    )


# ----------------------------------------------------------------------------------- drawing tools

_KNOT_STEPS = np.arange(6)[:, None, None] / 6.0


def _smooth(points: Points | _Curve, *, closed: bool = True) -> _Curve:
    """Run a Catmull-Rom curve through the points; shape (N, 2) in and (6 N, 2) out."""
    knots = np.asarray(points, dtype=np.float64)
    if not closed:
        knots = np.concatenate([knots[:1], knots, knots[-1:]])
    before, start, end, after = (np.roll(knots, shift, axis=0) for shift in (1, 0, -1, -2))
    t = _KNOT_STEPS
    curve = 0.5 * (
        2 * start
        + (end - before) * t
        + (2 * before - 5 * start + 4 * end - after) * t**2
        + (3 * start - before - 3 * end + after) * t**3
    )
    pieces = curve.transpose(1, 0, 2)  # (knots, steps, 2)
    if not closed:
        pieces = pieces[1:-2]
        return np.concatenate([pieces.reshape(-1, 2), knots[-1:]])
    return pieces.reshape(-1, 2)


@cache
def _smooth_part(part: _Part) -> _Curve:
    return _smooth(part.points, closed=part.width == 0)


class _Frame:
    """Where head units fall on the canvas."""

    def __init__(self, subject: SubjectParameters, offset: float) -> None:
        self.height, self.width = subject.height_px, subject.width_px
        half_width = subject.view.half_width
        scale = min(self.height / 2, self.width / 2 / half_width)
        self.scale = scale * subject.fill * (1 + 0.006 * offset)  # px per head unit
        cos, sin = np.cos(subject.rotation_rad), np.sin(subject.rotation_rad)
        sign = -1.0 if subject.flipped else 1.0
        stretch = np.diag([sign * subject.stretch, 1.0])
        self.matrix = self.scale * np.array([[cos, -sin], [sin, cos]]) @ stretch
        moved = np.array(subject.shift) + 0.006 * offset
        self.centre = np.array([self.width / 2, self.height / 2]) + self.scale * moved
        self.warp = subject.warp

    def to_pixels(self, curve: _Curve) -> _Curve:
        """Map head units, shape (N, 2), to canvas pixels, with the subject's deformation."""
        bent = curve + 0.02 * np.sin(3.1 * curve[:, ::-1] + self.warp[0])
        bent += 0.008 * np.sin(7.3 * curve[:, ::-1] + self.warp[1])
        placed: _Curve = bent @ self.matrix.T + self.centre
        return placed

    def coordinates(self) -> tuple[_Picture, _Picture]:
        """Compute the head units x and y of every pixel, each of shape (H, W)."""
        inverse = np.linalg.inv(self.matrix)
        columns = np.arange(self.width, dtype=np.float32)[None, :] + np.float32(
            0.5 - self.centre[0]
        )
        rows = np.arange(self.height, dtype=np.float32)[:, None] + np.float32(0.5 - self.centre[1])
        one, two, three, four = (np.float32(value) for value in inverse.ravel())
        return columns * one + rows * two, columns * three + rows * four

    def sample(self, field: _Picture) -> _Picture:
        """Lay a square field that spans head units [-1.5, 1.5] on the canvas."""
        size = field.shape[0]
        inverse = np.linalg.inv(self.matrix) * (size / 3.0)
        origin = size / 2 - inverse @ self.centre
        coefficients = (*inverse[0], origin[0], *inverse[1], origin[1])
        picture = Image.fromarray(field).transform(
            (self.width, self.height),
            Image.Transform.AFFINE,
            tuple(float(value) for value in coefficients),
            resample=Image.Resampling.BILINEAR,
        )
        return np.asarray(picture, dtype=np.float32)


_FULL = 200
"""Eight-bit level of brightness or cover 1; leaves room for brightness up to 1.27."""


class _Layer:
    """A sheet painted at twice the canvas resolution, whose edges come out smooth.

    One RGB picture holds brightness times cover in its first band and cover in its second: Pillow
    draws both in one go, and eight bits are ample under the noise.
    """

    _mode = "RGB"

    def __init__(self, frame: _Frame) -> None:
        self.frame = frame
        self._sheet = Image.new(self._mode, (2 * frame.width, 2 * frame.height))
        self._pen = ImageDraw.Draw(self._sheet)

    def _ink(self, value: float, cover: float) -> tuple[int, ...]:
        return round(_FULL * value * cover), round(_FULL * cover), 0

    def fill(self, curve: _Curve, value: float, cover: float = 1.0) -> None:
        """Fill a closed curve in head units."""
        corners = (2 * self.frame.to_pixels(curve)).ravel().tolist()
        self._pen.polygon(corners, fill=self._ink(value, cover))

    def stroke(self, curve: _Curve, width: float, value: float, cover: float = 1.0) -> None:
        """Draw along an open curve; ``width`` in head units."""
        corners = (2 * self.frame.to_pixels(curve)).ravel().tolist()
        thick = max(1, round(2 * width * self.frame.scale))
        self._pen.line(corners, fill=self._ink(value, cover), width=thick)

    def flatten(self, soft_px: float = 0.0) -> tuple[_Picture, _Picture]:
        """Return brightness times cover, and cover in [0, 1]; each of shape (H, W)."""
        shrink = 4 if soft_px > 3 else 1  # a wide blur loses nothing at quarter size
        bands = np.asarray(self._sheet.reduce(2 * shrink))
        value, cover = (bands[..., band] * np.float32(1 / _FULL) for band in (0, 1))
        if soft_px:
            value, cover = (
                ndimage.gaussian_filter(band, soft_px / shrink, truncate=2.5)
                for band in (value, cover)
            )
        if shrink > 1:
            size = (self.frame.width, self.frame.height)
            value, cover = (
                np.asarray(Image.fromarray(band).resize(size, Image.Resampling.BILINEAR))
                for band in (value, cover)
            )
        return value, cover

    def over(
        self, picture: _Picture, *, within: _Picture | None = None, soft_px: float = 0.0
    ) -> _Picture:
        """Lay this sheet over a picture, where wanted only within a mask or with soft edges."""
        value, cover = self.flatten(soft_px)
        if within is not None:
            value, cover = value * within, cover * within
        result: _Picture = picture * (1 - cover) + value
        return result


class _Stencil(_Layer):
    """A sheet of cover alone, which is quicker to paint."""

    _mode = "L"

    def _ink(self, value: float, cover: float) -> tuple[int, ...]:  # noqa: ARG002
        return (round(_FULL * cover),)

    def cover(self) -> _Picture:
        """Return how much of each pixel is painted, in [0, 1], shape (H, W)."""
        result: _Picture = np.asarray(self._sheet.reduce(2)) * np.float32(1 / _FULL)
        return result


@lru_cache(maxsize=8)  # slices of one subject follow each other
def _draw_textures(seed: int) -> tuple[_Picture, _Picture, _Picture]:
    """Draw the fields of the folds, the mottles and the swells."""
    rng = np.random.default_rng(seed)
    return (
        _draw_ring_noise(rng, 0.235, 0.22),
        _draw_ring_noise(rng, 0.11, 0.35),
        _draw_ring_noise(rng, 0.6, 0.35),
    )


def _draw_ring_noise(rng: np.random.Generator, wavelength: float, spread: float) -> _Picture:
    """Draw mottles of one wavelength (head units); shape (128, 128), unit variance."""
    size = 128
    rows = np.fft.fftfreq(size, 3.0 / size)[:, None]
    columns = np.fft.rfftfreq(size, 3.0 / size)[None, :]
    away = (np.hypot(rows, columns) * wavelength - 1) / spread
    spectrum = np.fft.rfft2(rng.standard_normal((size, size))) * np.exp(-0.5 * away**2)
    field = np.fft.irfft2(spectrum, s=(size, size))
    result: _Picture = (field / field.std()).astype(np.float32)
    return result


def _ramp(values: _Picture, low: float, high: float) -> _Picture:
    """Rise linearly from 0 at ``low`` to 1 at ``high``."""
    result: _Picture = np.clip((values - low) * np.float32(1 / (high - low)), 0, 1)
    return result


def _blend(under: _Picture, over: NDArray[np.floating], cover: _Picture) -> _Picture:
    return np.asarray(under + cover * (over - under), dtype=np.float32)


# ------------------------------------------------------------------------------------- the painter


class _Painter:
    """Paints one slice of one subject; brightness in [0, 1]."""

    def __init__(self, subject: SubjectParameters, offset: float) -> None:
        self.subject, self.view, self.offset = subject, subject.view, offset
        self.frame = _Frame(subject, offset)
        column = _SEQUENCES.index(subject.sequence)
        self.shade = {
            name: float(row[column] * jitter)
            for (name, row), jitter in zip(_TISSUES.items(), subject.tissue_jitter, strict=True)
        }
        textures = (self.frame.sample(field) for field in _draw_textures(subject.texture_seed))
        self.folds, self.mottle, self.swell = textures
        self.cavity = self._mask(self.view.cavity)

    def paint(self) -> _Picture:
        """Paint everything that is in the head, shape (H, W)."""
        picture = self._paint_outside()
        picture = self._paint_cortex(picture)
        picture = self._paint_cerebellum(picture)
        picture = self._paint_inside(picture)
        return self._paint_mass(picture)

    def _mask(self, points: Points) -> _Picture:
        stencil = _Stencil(self.frame)
        stencil.fill(_smooth(points), 0.0)
        return stencil.cover()

    def _paint_part(self, layer: _Layer, part: _Part, *, pushed: bool = False) -> None:
        curve = _smooth_part(part)
        for side in (1.0, -1.0) if part.mirrored else (1.0,):
            placed = curve * np.array([side, 1.0])
            if pushed:
                placed = self._push(placed)
            if part.width:
                layer.stroke(placed, part.width, self.shade[part.tissue])
            else:
                layer.fill(placed, self.shade[part.tissue])

    def _push(self, curve: _Curve) -> _Curve:
        """Move deep structures away from a mass, as a real one does (mass effect)."""
        mass = self.subject.mass
        if mass is None or self.subject.label == "pituitary":
            return curve
        away = curve - np.array(mass.centre)
        distance = np.hypot(away[:, 0], away[:, 1])[:, None] + 1e-6
        push = 0.4 * mass.radius * np.exp(-((distance / (2.2 * mass.radius)) ** 2))
        moved: _Curve = curve + away / distance * push
        return moved

    def _paint_outside(self) -> _Picture:
        """Paint scalp, face and neck, bone with its marrow, and the dura over CSF."""
        shade, view = self.shade, self.view
        base = _Layer(self.frame)
        head, cavity = _smooth(view.head), _smooth(view.cavity)
        base.fill(head, 0.45 * shade["fat"] + 0.1)  # skin
        middle = np.array([0.0, -0.05])
        base.fill(middle + (head - middle) * 0.983, shade["fat"])
        picture = base.over(np.zeros((self.frame.height, self.frame.width), np.float32))
        picture *= 1 + 0.05 * self.mottle + 0.05 * self.swell
        if view.face:
            septa = 1 - _ramp(np.abs(self.mottle + 0.5 * self.folds), 0.05, 0.5)
            strands = 0.55 * septa + 0.35 * _ramp(self.swell + 0.6 * self.folds, -0.2, 1.8)
            tissue = shade["muscle"] + (0.8 * shade["fat"] - shade["muscle"]) * strands
            face = self._mask(view.face)
            picture = _blend(picture, tissue, face)
        skull = _Layer(self.frame)
        for part in view.outside:
            self._paint_part(skull, part)
        around = cavity.mean(axis=0)
        for grown, tissue_name in ((1.1, "bone"), (1.07, "diploe"), (1.04, "bone")):
            skull.fill(around + (cavity - around) * grown, shade[tissue_name])
        skull.fill(around + (cavity - around) * 1.014, shade["dura"])
        skull.fill(cavity, shade["csf"])
        return skull.over(picture)

    def _paint_cortex(self, picture: _Picture) -> _Picture:
        """Paint the folded grey ribbon over white matter.

        Sulci are zero crossings of a single-wavelength field, open near the surface only; the
        ribbon follows them and the surface at one thickness.
        """
        view, shade = self.view, self.shade
        stencil = _Stencil(self.frame)
        stencil.fill(_smooth(view.cerebrum), 0.0)
        for part in view.fissures:
            curve = _smooth_part(part)
            for side in (1.0, -1.0) if part.mirrored else (1.0,):
                placed = self._push(curve * np.array([side, 1.0]))
                stencil.stroke(placed, part.width * self.subject.ventricles, 0.0, cover=0.0)
        cerebrum = stencil.cover()
        depth = self._compute_depth(cerebrum)
        floor = 0.13 + 0.06 * self.swell
        crevice = 0.036 * np.abs(self.folds + 0.3 * self.mottle)
        ribbon = np.minimum(depth, crevice + np.maximum(depth - floor, 0))
        opening = 0.008 * self.subject.ventricles * (0.75 + 0.45 * self.swell)
        white = shade["white"] * (1 + 0.03 * self.swell + 0.015 * self.mottle)
        tissue = shade["grey"] + (white - shade["grey"]) * _ramp(ribbon, 0.02, 0.052)
        cleft = 0.85 * (1 - _ramp(ribbon - opening, -0.008, 0.012))
        tissue = tissue + cleft * (shade["csf"] - tissue)
        # Vessels run in the clefts; after contrast agent they are bright.
        vessel = 0.7 * (1 - _ramp(ribbon, 0.006, 0.016)) * _ramp(self.mottle, 1.2, 1.7)
        tissue = tissue + vessel * (shade["vessel"] - tissue)
        return _blend(picture, tissue, cerebrum)

    def _compute_depth(self, mask: _Picture) -> _Picture:
        """Compute the distance to the mask's edge in head units, at half resolution for speed."""
        height, width = mask.shape
        halved = Image.fromarray(mask).resize((width // 2, height // 2), Image.Resampling.BOX)
        distance = ndimage.distance_transform_edt(np.asarray(halved) > 0.5) * (2 / self.frame.scale)
        restored = Image.fromarray(distance.astype(np.float32)).resize((width, height))
        return np.asarray(restored)

    def _paint_cerebellum(self, picture: _Picture) -> _Picture:
        """Paint the fine parallel folia."""
        if not self.view.cerebellum:
            return picture
        shade = self.shade
        x, y = self.frame.coordinates()
        middle = np.asarray(self.view.cerebellum, dtype=np.float32).mean(axis=0)
        if self.view.plane == "sagittal":
            radius = np.hypot(x - middle[0] - np.float32(0.2), y - middle[1])
        else:  # two hemispheres, each with its own arches
            radius = np.hypot(np.abs(x) - np.float32(0.12), 1.3 * (y - middle[1] + np.float32(0.3)))
        stripes = np.cos(np.float32(80) * radius + 1.5 * self.folds + 0.6 * self.mottle)
        stripes += 0.5 * self.swell
        tissue = shade["grey"] + (shade["white"] - shade["grey"]) * _ramp(stripes, -0.3, 1)
        cleft = 0.45 * (1 - _ramp(stripes, -1.3, -0.5))
        tissue = tissue + cleft * (shade["csf"] - tissue)
        mask = self._mask(self.view.cerebellum)
        return _blend(picture, tissue, mask)

    def _paint_inside(self, picture: _Picture) -> _Picture:
        layer = _Layer(self.frame)
        for part in self.view.inside:
            self._paint_part(layer, part, pushed=True)
        return layer.over(picture, soft_px=0.009 * self.frame.scale)

    def _paint_mass(self, picture: _Picture) -> _Picture:
        mass, label = self.subject.mass, self.subject.label
        if mass is None:
            return picture
        # Further from the mass's middle slice, its section is smaller.
        radius = mass.radius * (1 - 0.07 * min(abs(self.offset), 4.0))
        outline = _smooth(mass.outline) * radius
        if label == "glioma":
            return self._paint_glioma(picture, mass, outline)
        value = self.shade["meningioma" if label == "meningioma" else "adenoma"] * mass.brightness
        centre = np.array(mass.centre)
        shell, body = _Layer(self.frame), _Layer(self.frame)
        shell.fill(centre + 1.12 * outline, 0.6 * self.shade["csf"] + 0.4 * self.shade["grey"], 0.8)
        body.fill(centre + outline, value)
        within = self.cavity if label == "meningioma" else None
        picture = shell.over(picture, within=within)
        painted = body.over(picture, within=within)
        grain: _Picture = 1 + 0.03 * body.flatten()[1] * (self.mottle + self.swell)
        return painted * grain

    def _paint_glioma(self, picture: _Picture, mass: _Mass, outline: _Curve) -> _Picture:
        """Paint oedema, an uneven bright rim, and a dark necrotic core."""
        shade, centre = self.shade, np.array(mass.centre)
        halo, body, core = _Layer(self.frame), _Layer(self.frame), _Layer(self.frame)
        turn = np.linspace(0, 2 * np.pi, len(outline))[:, None]
        reach = 1.55 + 0.35 * np.sin(3 * turn + self.subject.warp[0, 0])
        halo.fill(centre + reach * outline, shade["oedema"], 0.85)
        body.fill(centre + outline, shade["rim"] * mass.brightness)
        inner = 0.64 + 0.13 * np.sin(2 * turn + self.subject.warp[1, 1])
        core.fill(centre + inner * outline, shade["core"])
        picture = halo.over(picture, within=self.cavity, soft_px=0.045 * self.frame.scale)
        uneven = _ramp(self.mottle, -2.4, -0.6)  # the rim has gaps
        picture = body.over(picture, within=self.cavity * (0.35 + 0.65 * uneven))
        solid = 0.72 + 0.28 * _ramp(-self.folds, -1.4, -0.4)  # and the core has islands
        return core.over(picture, within=self.cavity * solid)


def _scan(picture: _Picture, subject: SubjectParameters, rng: np.random.Generator) -> _Picture:
    """Put the scanner on top: receive field, Rician noise, blur, grey-scale window."""
    height, width = picture.shape
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    across, down, bowl = (np.float32(value) for value in subject.bias)
    field = 1 + across * x + down * y + bowl * (x * x + y * y - np.float32(0.6))
    if subject.view.plane != "axial":
        field = field * (1 - 0.8 * np.clip((y - 0.35) / 0.65, 0, 1) ** 2)  # the coil ends there
    signal = picture * np.maximum(field, 0.2)
    real = signal + subject.noise * rng.standard_normal(picture.shape, dtype=np.float32)
    imaginary = subject.noise * rng.standard_normal(picture.shape, dtype=np.float32)
    power = real * real + imaginary * imaginary
    magnitude = ndimage.gaussian_filter(np.sqrt(power), subject.blur_px, truncate=2.5)
    window = np.clip(subject.gain * (magnitude - 0.8 * subject.noise), 0, 1)
    result: _Picture = window ** np.float32(subject.gamma)
    return result


def render_slice(
    subject: SubjectParameters, offset: float, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Render one slice of a subject.

    Parameters
    ----------
    subject : SubjectParameters
        What the subject's slices share.
    offset : float
        Slices away from the middle of the mass; near offsets give near-identical images.
    rng : Generator
        Dice of this slice alone: its noise.

    Returns
    -------
    ndarray of uint8, shape (H, W)
        Grey levels.
    """
    picture = _scan(_Painter(subject, offset).paint(), subject, rng)
    return np.rint(picture * 255).astype(np.uint8)


def draw_phantom(
    label: str, rng: np.random.Generator, *, plane: Plane | None = None
) -> NDArray[np.uint8]:
    """Draw one slice of a new subject.

    Parameters
    ----------
    label : str
        Class name, one of ``BRAIN_TUMOUR_CLASSES``.
    rng : Generator
        Source of the dice.
    plane : {"axial", "coronal", "sagittal"}, optional
        Drawn evenly where not given.

    Returns
    -------
    ndarray of uint8, shape (H, W)
        Grey levels; each side is between 160 and 320 px.

    Raises
    ------
    ConfigError
        An unknown class or plane.
    """
    return render_slice(draw_subject(label, rng, plane=plane), 0.0, rng)


# ------------------------------------------------------------------------------- streams and files


@dataclass(frozen=True, kw_only=True, slots=True)
class Phantom:
    """One synthetic slice as a file would hold it."""

    name: str
    """File name, suffix included; unique within its class."""
    label: str
    """Class name."""
    subject: str
    """Subject identifier; slices of one subject are near twins."""
    image_bytes: bytes
    """Encoded JPEG or PNG, grey or RGB."""


def _check_labels(classes: Sequence[str]) -> None:
    unknown = [name for name in classes if name not in BRAIN_TUMOUR_CLASSES]
    if unknown:
        raise ConfigError(
            f"No phantom looks like {', '.join(map(repr, unknown))}. "
            f"Expected classes among {', '.join(BRAIN_TUMOUR_CLASSES)}."
        )


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"Expected {name} to be at least {least}, got {value}.")


def _encode(pixels: NDArray[np.uint8], rng: np.random.Generator) -> tuple[str, bytes]:
    """Encode as files in the wild are: mostly grey JPEG, some RGB, some PNG; suffix and bytes."""
    kinds = ((".jpg", "L"), (".jpg", "RGB"), (".png", "L"), (".png", "RGB"))
    suffix, mode = kinds[int(rng.choice(4, p=[0.7, 0.14, 0.1, 0.06]))]
    image, buffer = Image.fromarray(pixels).convert(mode), io.BytesIO()
    if suffix == ".jpg":
        image.save(buffer, "JPEG", quality=int(rng.integers(80, 96)))
    else:
        image.save(buffer, "PNG", compress_level=3)
    return suffix, buffer.getvalue()


def _iterate_stream(
    *, num_per_class: int, seed: int, stream: int, classes: Sequence[str], slices_per_subject: int
) -> Iterator[Phantom]:
    """Yield phantoms; every subject and slice has dice of its own, found by their numbers."""
    num_subjects = -(-num_per_class // slices_per_subject)
    for number in range(num_subjects):
        for label in classes:
            key = [seed, stream, zlib.crc32(label.encode()), number]  # not hash(): that is salted
            subject = draw_subject(label, np.random.default_rng([*key, 0]))
            subject_name = f"{label}-{seed}{'t' if stream else ''}-{number:04d}"
            first = number * slices_per_subject
            for index in range(min(slices_per_subject, num_per_class - first)):
                rng = np.random.default_rng([*key, 1 + index])
                pixels = render_slice(subject, float(index), rng)
                suffix, image_bytes = _encode(pixels, rng)
                yield Phantom(
                    name=f"{subject_name}-{index}{suffix}",
                    label=label,
                    subject=subject_name,
                    image_bytes=image_bytes,
                )


def iterate_phantoms(
    *,
    num_per_class: int,
    seed: int,
    classes: Sequence[str] = BRAIN_TUMOUR_CLASSES,
    slices_per_subject: int = 2,
) -> Iterator[Phantom]:
    """Yield encoded phantoms, class by class within each subject number.

    The same arguments give the same bytes on every run. Image number *i* of a class does not
    depend on ``num_per_class`` or on which other classes are asked for, and no subject is shared
    between two seeds.

    Parameters
    ----------
    num_per_class : int
        Images of each class.
    seed : int
        Non-negative; names the subjects.
    classes : sequence of str
        Class names among ``BRAIN_TUMOUR_CLASSES``.
    slices_per_subject : int
        Near-twin slices of each subject; the last subject may have fewer.

    Yields
    ------
    Phantom
        One encoded slice.

    Raises
    ------
    ConfigError
        A count below one, a negative seed, or an unknown class; raised at the call.
    """
    _check_at_least("num_per_class", num_per_class, 1)
    _check_at_least("slices_per_subject", slices_per_subject, 1)
    _check_at_least("seed", seed, 0)
    _check_labels(classes)
    return _iterate_stream(
        num_per_class=num_per_class,
        seed=seed,
        stream=0,
        classes=classes,
        slices_per_subject=slices_per_subject,
    )


def write_phantom_folder(
    root: Path, *, num_train_per_class: int = 160, num_test_per_class: int = 40, seed: int = 0
) -> None:
    """Write ``Training/<class>/<name>`` and ``Testing/<class>/<name>``, as the Kaggle data set is.

    The training images are those of :func:`iterate_phantoms` with the same seed; the test images
    come from other subjects.

    Parameters
    ----------
    root : Path
        Local folder; made where missing.
    num_train_per_class, num_test_per_class : int
        Images of each class, two slices of each subject.
    seed : int
        Non-negative; names the subjects.

    Raises
    ------
    ConfigError
        A count below one or a negative seed.
    """
    _check_at_least("num_train_per_class", num_train_per_class, 1)
    _check_at_least("num_test_per_class", num_test_per_class, 1)
    _check_at_least("seed", seed, 0)
    splits = (("Training", num_train_per_class), ("Testing", num_test_per_class))
    for stream, (split, num_per_class) in enumerate(splits):
        for label in BRAIN_TUMOUR_CLASSES:
            (root / split / label).mkdir(parents=True, exist_ok=True)
        phantoms = _iterate_stream(
            num_per_class=num_per_class,
            seed=seed,
            stream=stream,
            classes=BRAIN_TUMOUR_CLASSES,
            slices_per_subject=2,
        )
        for phantom in phantoms:
            (root / split / phantom.label / phantom.name).write_bytes(phantom.image_bytes)


def draw_contact_sheet(seed: int = 1, *, cell_px: int = 144) -> Image.Image:
    """Draw the README's contact sheet: a row for each class, two columns for each plane.

    Parameters
    ----------
    seed : int
        Non-negative; names the subjects.
    cell_px : int
        Side of one picture.

    Returns
    -------
    PIL.Image.Image
        Palette image of 37 even greys, which keeps the PNG small.
    """
    gap, left, top = 6, 112, 34
    columns = [plane for plane in PLANES for _ in range(2)]
    size = (
        left + len(columns) * (cell_px + gap) + gap,
        top + len(BRAIN_TUMOUR_CLASSES) * (cell_px + gap) + gap,
    )
    sheet = Image.new("L", size, 16)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    for group, plane in enumerate(PLANES):
        middle = left + (2 * group + 1) * (cell_px + gap)
        pen.text((middle, top / 2 + 2), plane, fill=170, font=font, anchor="mm")
    for row, label in enumerate(BRAIN_TUMOUR_CLASSES):
        upper = top + row * (cell_px + gap)
        pen.text((left - 14, upper + cell_px / 2), label, fill=230, font=font, anchor="rm")
        for column, plane in enumerate(columns):
            rng = np.random.default_rng([seed, row, column])
            slice_image = Image.fromarray(draw_phantom(label, rng, plane=plane))
            slice_image.thumbnail((cell_px, cell_px), Image.Resampling.LANCZOS)
            cell = Image.new("L", (cell_px, cell_px), 0)
            corner = ((cell_px - slice_image.width) // 2, (cell_px - slice_image.height) // 2)
            cell.paste(slice_image, corner)
            sheet.paste(cell, (left + column * (cell_px + gap) + gap, upper))
    steps = sheet.point([7 * round(level / 7) for level in range(256)])  # even steps: no blotches
    return steps.quantize(64, dither=Image.Dither.NONE)


if __name__ == "__main__":
    draw_contact_sheet().save(sys.argv[1], optimize=True)
