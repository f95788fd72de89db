"""Tissues, parts and curves of a cut through the head."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Plane = Literal["axial", "coronal", "sagittal"]
Points = Sequence[tuple[float, float]]
Curve = NDArray[np.float64]

PLANES: tuple[Plane, ...] = ("axial", "coronal", "sagittal")
"""Anatomical planes; every class is drawn in all three with the same probability."""

# Brightness of each tissue in [0, 1] under four sequences: T1, T1 after contrast agent, T2, FLAIR.
# Chosen by eye against textbook slices; only the order within a sequence carries meaning.
SEQUENCES = ("t1", "t1c", "t2", "flair")
TISSUES: dict[str, tuple[float, float, float, float]] = {
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


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)  # parts are cached by identity
class Part:
    """One structure: a filled outline, or an open stroke where ``width`` is positive."""

    tissue: str
    points: Points
    width: float = 0.0
    mirrored: bool = False


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class View:
    """One cut through the head; all lengths in head units."""

    plane: Plane
    half_width: float
    head: Points
    cavity: Points
    """Inside of the skull, lined by dura and filled with CSF."""
    cerebrum: Points
    fissures: tuple[Part, ...]
    """Clefts in the cerebrum; cortex lines them like the surface."""
    cerebellum: Points
    face: Points
    """Face and neck, where fat and muscle mix; may be empty."""
    outside: tuple[Part, ...]
    inside: tuple[Part, ...]
    glioma_boxes: tuple[tuple[float, float, float, float], ...]
    """Areas for a glioma's centre: (x low, y low, x high, y high)."""
    dura_spans: tuple[tuple[float, float], ...]
    """Ranges of positions of a meningioma, as shares of the cavity's outline."""
    sella: tuple[float, float] | None
    """Position of a pituitary mass; None in cuts without the sella."""


def mirror(half: Points) -> Points:
    """Close the right half of an outline, from top to bottom midline, with its mirror image."""
    return [*half, *((-x, y) for x, y in list(half)[-2:0:-1])]


def oval(x: float, y: float, x_radius: float, y_radius: float, tilt: float = 0.0) -> Points:
    """Return points on an ellipse; ``tilt`` in radians."""
    angles = np.arange(10) * (2 * np.pi / 10)
    along, across = x_radius * np.cos(angles), y_radius * np.sin(angles)
    xs = x + along * np.cos(tilt) - across * np.sin(tilt)
    ys = y + along * np.sin(tilt) + across * np.cos(tilt)
    return [(float(a), float(b)) for a, b in zip(xs, ys, strict=True)]


_KNOT_STEPS = np.arange(6)[:, None, None] / 6.0


def smooth(points: Points | Curve, *, closed: bool = True) -> Curve:
    """Return a Catmull-Rom curve through points (N, 2), shape (6 N, 2)."""
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
def smooth_part(part: Part) -> Curve:
    """Return the curve through a part's points."""
    return smooth(part.points, closed=part.width == 0)
