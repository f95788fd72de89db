"""The six cuts through the head: tissues, outlines in head units, and smooth curves through them.

The origin is the middle of the head, x points right, y down; the head is about two units high.
Outlines are written as in SVG, ``x,y x,y ...``; they, ovals and widths are in hundredths of a unit.
"""

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


@dataclass(frozen=True, slots=True, eq=False)  # parts are cached by identity
class Part:
    """One structure: a filled outline, or an open stroke where ``width`` is positive."""

    tissue: str
    points: Points
    width: float = 0.0
    mirrored: bool = False


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class View:
    """One cut through the head."""

    plane: Plane
    half_width: float
    head: Points
    cavity: Points
    """Inside of the skull, lined by dura and filled with CSF."""
    cerebrum: Points
    fissures: tuple[Part, ...]
    """Clefts in the cerebrum; cortex lines them like the surface."""
    cerebellum: Points = ()
    face: Points = ()
    """Face and neck, where fat and muscle mix."""
    outside: tuple[Part, ...] = ()
    inside: tuple[Part, ...]
    glioma_boxes: tuple[tuple[float, float, float, float], ...]
    """Areas for a glioma's centre: (x low, y low, x high, y high)."""
    dura_spans: tuple[tuple[float, float], ...] = ((0.0, 1.0),)
    """Ranges of positions of a meningioma, as shares of the cavity's outline."""
    sella: tuple[float, float] | None = None
    """Position of a pituitary mass; None in cuts without the sella."""


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


# ---- outlines ------------------------------------------------------------------------------------


def _to_units(hundredths: float) -> float:
    return round(hundredths / 100, 4)  # the number nearest to the decimal one


def _parse(outline: str) -> Points:
    pairs = (pair.split(",") for pair in outline.split())
    return [(_to_units(float(x)), _to_units(float(y))) for x, y in pairs]


def _mirror(half: str) -> Points:
    """Close the right half of an outline, from top to bottom midline, with its mirror image."""
    right = _parse(half)
    return [*right, *((-x, y) for x, y in right[-2:0:-1])]


def _oval(x: float, y: float, x_radius: float, y_radius: float, tilt: float = 0.0) -> Points:
    """Return points on an ellipse; ``tilt`` in radians."""
    angles = np.arange(10) * (2 * np.pi / 10)
    along, across = _to_units(x_radius) * np.cos(angles), _to_units(y_radius) * np.sin(angles)
    xs = _to_units(x) + along * np.cos(tilt) - across * np.sin(tilt)
    ys = _to_units(y) + along * np.sin(tilt) + across * np.cos(tilt)
    return [(float(a), float(b)) for a, b in zip(xs, ys, strict=True)]


def _area(tissue: str, outline: str | Points, *, mirrored: bool = False) -> Part:
    points = _parse(outline) if isinstance(outline, str) else outline
    return Part(tissue, points, mirrored=mirrored)


def _line(tissue: str, points: str, width: float, *, mirrored: bool = False) -> Part:
    return Part(tissue, _parse(points), _to_units(width), mirrored)


# ---- cuts ----------------------------------------------------------------------------------------

_MIDLINE = _line("csf", "0,-90 0.8,-40 -0.8,30 0,90", 1.6)
_SIDES_BOX = ((-0.36, -0.42, -0.2, 0.42), (0.2, -0.42, 0.36, 0.42))

_AXIAL_HIGH = View(
    plane="axial",
    half_width=0.82,
    head=_mirror("0,-94 36,-86 62,-56 74,-10 74,30 60,68 34,90 0,95"),
    cavity=_mirror("0,-76 27,-70 48,-45 58,-8 58,26 46,56 26,73 0,78"),
    cerebrum=_mirror("0,-74 26,-68 46,-44 56,-8 56,25 44,54 25,71 0,76"),
    fissures=(_MIDLINE,),
    inside=(
        _area("vessel", _oval(0, 75, 3.5, 2.5)),
        _line("dura", "0,-76 0.6,-10 0,75", 1),
    ),
    glioma_boxes=_SIDES_BOX,
)

_AXIAL_MID = View(
    plane="axial",
    half_width=0.82,
    head=_mirror("0,-97 34,-90 58,-64 71,-22 76,20 68,60 40,90 0,98"),
    cavity=_mirror("0,-83 28,-78 48,-55 59,-20 63.5,18 57,52 34,77 0,84"),
    cerebrum=_mirror("0,-81 27,-76 46,-54 57,-20 61.5,18 55,51 33,75 0,82"),
    fissures=(
        _line("csf", "0,-90 1,-70 0,-46", 1.8),
        _line("csf", "0,42 -1,60 0,90", 1.8),
        _line("csf", "64,-16 50,-10 40,-14 37,-2 39,10", 2.4, mirrored=True),
    ),
    inside=(
        _line("white", "-12,-40 0,-37 12,-40", 7),
        _line("white", "-16,36 0,29 16,36", 8),
        _area("grey", _oval(25, -5, 5.5, 15, -0.3), mirrored=True),
        _area("grey", _oval(15, -24, 4.5, 10, -0.35), mirrored=True),
        _area("deep", _oval(10.5, 9, 8.5, 14, -0.35), mirrored=True),
        _area("csf", "1.2,-13 2,-30 10,-42 17,-43 13,-30 6,-15", mirrored=True),
        _area("csf", "10,22 19,24 27,36 27,52 22,46 17,33", mirrored=True),
        _area("csf", "0,-6 1.4,6 0,17 -1.4,6"),
        _area("vessel", _oval(0, 81, 4, 2.8)),
        _line("dura", "0,-83 0.4,-47", 0.9),
        _line("dura", "0,83 -0.4,40", 0.9),
    ),
    glioma_boxes=_SIDES_BOX,
)

_AXIAL_LOW = View(
    plane="axial",
    half_width=0.82,
    head=_mirror("0,-100 20,-93 46,-90 62,-66 70,-25 74,20 66,58 40,88 0,96"),
    cavity=_mirror("0,-37 12,-40 30,-47 48,-43 58,-18 61.5,18 55,50 33,75 0,82"),
    cerebrum=_mirror("0,10 16,-10 17,-30 30,-44 46,-41 55.5,-17 59.5,18 53,42 38,36 25,20"),
    fissures=(_line("csf", "26,-12 34,-3 33,8", 3, mirrored=True),),
    cerebellum=_mirror("0,27 20,26 36,38 47,50 40,64 22,76 3,75"),
    face=_mirror("0,-93 20,-88 44,-84 58,-62 60,-40 30,-50 0,-42"),
    outside=(
        _area("air", _oval(6, -72, 4.5, 16), mirrored=True),
        _line("mucosa", "0,-90 0,-55", 2.5),
        _line("mucosa", "10,-86 13,-70 10,-56", 3, mirrored=True),
        _line("bone", "16,-52 36,-55 55,-44", 5, mirrored=True),
        _area("fat", _oval(33, -68, 16, 14), mirrored=True),
        _line("muscle", "24,-55 36,-70", 3, mirrored=True),
        _area("vitreous", _oval(36, -78, 12.5, 12.5), mirrored=True),
        _area("muscle", _oval(38, -88.5, 5, 2.2), mirrored=True),
        _area("air", _oval(0, -47, 10, 6)),
        _area("muscle", _oval(64, -40, 4, 16, -0.15), mirrored=True),
    ),
    inside=(
        _line("csf", "50,42 36,34 20,22", 2.2, mirrored=True),
        _area("csf", _mirror("0,-36 10,-30 20,-20 13,-8 17,8 10,22 0,26")),
        _area("deep", _mirror("0,-6 8,-8 13,0 12,13 5,20 0,20")),
        _area("csf", _oval(0, 23.5, 4.5, 3)),
        _area("void", _oval(11, -27, 2.5, 2.5), mirrored=True),
        _area("vessel", _oval(0, -12, 1.8, 1.8)),
        _area("gland", _oval(0, -29, 3.5, 2.5)),
        _line("vessel", "50,55 38,70 20,79", 2.8, mirrored=True),
        _line("white", "0,36 1,72", 3.5),
    ),
    glioma_boxes=((-0.4, -0.2, -0.33, 0.12), (0.33, -0.2, 0.4, 0.12)),
    dura_spans=((0.15, 0.45), (0.55, 0.85)),
    sella=(0.0, -0.27),
)
_CORONAL_HEAD = _mirror("0,-97 34,-90 60,-62 70,-22 68,12 62,34 63,56 56,86 40,110 36,140 0,145")

_CORONAL_MID = View(
    plane="coronal",
    half_width=0.8,
    head=_CORONAL_HEAD,
    cavity=_mirror("0,-84 30,-77 51,-52 60,-15 57,16 45,31 30,30 17,20 9,24 0,24"),
    cerebrum=_mirror("0,-82 29,-75 49,-51 58,-15 55,15 44,28 29,26 20,12 10,8 0,6"),
    fissures=(
        _line("csf", "0,-90 0.8,-60 0,-36", 1.8),
        _line("csf", "64,-4 50,-2 40,-8 38,-18", 2.4, mirrored=True),
        _line("csf", "50,0 34,4 24,10", 2, mirrored=True),
    ),
    face=_mirror("0,30 20,32 45,40 58,50 53,80 46,110 40,135 0,140"),
    outside=(
        _line("bone", "14,30 30,37 50,38", 4.5, mirrored=True),
        _area("muscle", _oval(33, 58, 10, 16, 0.25), mirrored=True),
        _line("marrow", "50,50 48,70 42,95", 6, mirrored=True),
        _area("bone", _oval(0, 37, 19, 10)),
        _area("air", _oval(0, 37, 16, 7.5)),
        _line("mucosa", "15,44 6,47 0,44", 2, mirrored=True),
        _area("air", _oval(0, 60, 11, 7.5)),
        _area("muscle", _oval(0, 86, 24, 13)),
        _area("air", _oval(0, 72, 16, 1.6)),
    ),
    inside=(
        _line("white", "-22,-34 0,-33 22,-34", 7),
        _area("grey", _oval(26, -10, 6, 11, 0.3), mirrored=True),
        _area("deep", _oval(11, -9, 8.5, 8.5), mirrored=True),
        _area("grey", _oval(20, -24, 4, 6, 0.3), mirrored=True),
        _area("csf", "1.2,-19 2,-28 10,-32 18,-31 12,-24 5,-20", mirrored=True),
        _area("csf", "0,-15 1.6,-6 0,5 -1.6,-6"),
        _area("csf", _mirror("0,5 14,10 12,17 0,17")),
        _line("white", "-7,11 0,10 7,11", 2),
        _area("csf", _oval(36, 16, 3.5, 1.8, 0.4), mirrored=True),
        _area("dura", _oval(12, 22, 4.5, 4), mirrored=True),
        _area("void", _oval(12, 21, 2.2, 2.2), mirrored=True),
        _area("gland", _oval(0, 21.5, 6, 2.2)),
        _area("vessel", _oval(0, -83, 3.5, 2.4)),
        _line("dura", "0,-84 0.4,-40", 0.9),
    ),
    glioma_boxes=((-0.36, -0.5, -0.2, -0.05), (0.2, -0.5, 0.36, -0.05)),
    dura_spans=((0.0, 0.27), (0.73, 1.0)),
    sella=(0.0, 0.18),
)

_CORONAL_BACK = View(
    plane="coronal",
    half_width=0.8,
    head=_CORONAL_HEAD,
    cavity=_mirror("0,-84 30,-77 51,-52 59,-15 56,18 46,42 26,56 0,58"),
    cerebrum=_mirror("0,-82 29,-75 49,-51 57,-15 53,13 38,12 20,5 5,-2"),
    fissures=(_MIDLINE,),
    cerebellum=_mirror("0,6 16,11 36,18 48,25 40,42 22,51 5,47"),
    face=_mirror("0,62 30,60 50,50 58,50 53,80 46,110 40,135 0,140"),
    outside=(
        _area("muscle", _oval(18, 90, 13, 24, 0.1), mirrored=True),
        _area("marrow", _oval(0, 78, 6, 8)),
    ),
    inside=(
        _area("csf", "16,-20 22,-24 25,-12 20,-2 17,-8", mirrored=True),
        _line("white", "0,16 0,42", 5),
        _line("white", "10,30 24,28 34,30", 4, mirrored=True),
        _line("dura", "0,0 20,9 38,16 55,19", 1.4, mirrored=True),
        _area("vessel", _oval(53, 19, 3, 2.6), mirrored=True),
        _area("vessel", _oval(0, -83, 3.5, 2.4)),
        _line("dura", "0,-84 0.4,-2", 0.9),
    ),
    glioma_boxes=((-0.36, -0.5, -0.2, -0.12), (0.2, -0.5, 0.36, -0.12)),
    dura_spans=((0.0, 0.28), (0.72, 1.0)),
)

_SAGITTAL = View(
    plane="sagittal",
    half_width=0.95,
    head=_parse(
        "2,-97 40,-88 66,-60 74,-25 72,-2 80,18 90,32 78,39 81,50 78,58 80,66 74,84 52,90 30,95 "
        "26,120 24,140 -50,140 -50,110 -52,75 -64,50 -84,22 -91,-15 -80,-58 -44,-88"
    ),
    cavity=_parse(
        "2,-84 36,-76 56,-52 63,-22 56,-3 36,0 22,5 19,14 12,15 8,12 5,28 0,44 -3,56 -18,56 -40,50 "
        "-62,36 -77,10 -79,-18 -68,-52 -38,-77"
    ),
    cerebrum=_parse(
        "2,-82 35,-74 54,-51 60.5,-22 54,-6 36,-3 22,-1 0,-5 -20,-2 -40,8 -60,18 -74,8 -76.5,-18 "
        "-66,-51 -37,-75"
    ),
    fissures=(
        _line("csf", "30,-30 28,-44 5,-55 -22,-50 -34,-62", 1.8),
        _line("csf", "-38,-66 -42,-38 -30,-12", 1.8),
        _line("csf", "-32,-10 -55,0 -76,0", 1.8),
    ),
    cerebellum=_parse("-22,10 -38,12 -56,22 -60,32 -44,44 -27,46 -18,36 -16,22"),
    face=_parse(
        "68,2 76,20 84,33 73,39 76,50 75,66 70,80 50,85 27,90 22,120 20,140 -45,140 -45,110 -46,72 "
        "-40,58 -10,62 6,50 20,30 40,8"
    ),
    outside=(
        _line("marrow", "9,20 6,34 0,50", 7),
        _area("bone", _oval(29, 17, 13, 11)),
        _area("air", _oval(29, 17, 10, 8.5)),
        _area("air", "64,2 69,-10 68,-22 65.5,-12"),
        _area("air", "40,12 60,14 70,30 40,34 28,36"),
        _line("mucosa", "38,20 52,20 63,26", 5.5),
        _line("mucosa", "36,30 52,30 66,32", 4.5),
        _line("marrow", "36,40 55,40 70,42", 3.5),
        _area("muscle", "34,50 46,45 64,47 70,58 60,68 40,74"),
        _area("marrow", _oval(70, 72, 4, 9, 0.2)),
        _line("air", "28,38 25,55 27,75 20,100 18,140", 5.5),
        *(_area("marrow", _oval(8.5 - 2.5 * i, 66 + 17 * i, 7.5, 6.5)) for i in range(5)),
        _line("csf", "-9,50 -10,80 -14,140", 13),
        _line("deep", "-9,50 -10,80 -14,140", 7.5),
        _line("muscle", "-30,66 -33,90 -34,140", 14),
    ),
    inside=(
        _area("csf", "27,-16 20,-29 2,-36 -18,-30 -26,-16 -12,-20 10,-22"),
        _area("deep", _oval(-2, -15, 14, 8.5)),
        _line("white", "23,-11 31,-17 28,-29 15,-38 0,-41 -15,-37 -25,-28 -30,-16 -25,-13", 5.5),
        _area("deep", "3,-8 -12,-6 -15,6 -14,20 -12,36 -10,57 -5,57 -3,40 2,30 3,16 -2,6"),
        _area("csf", "-13,16 -21,25 -13,36"),
        _area("csf", "-16,-4 -24,2 -20,8 -14,4"),
        _line("white", "-22,27 -34,28 -46,26", 3),
        _line("white", "-30,28 -38,36 -40,40", 2.2),
        _line("dura", "-22,7 -42,11 -72,26", 1.6),
        _line("vessel", "-30,-6 -46,6 -74,20", 2.2),
        _area("csf", "20,0 10,-2 4,2 8,10 20,10"),
        _area("gland", _oval(15.5, 12.5, 3.5, 2)),
        _line("gland", "15,11 13,2", 1.4),
    ),
    glioma_boxes=((0.15, -0.56, 0.38, -0.28), (-0.5, -0.5, -0.1, -0.22)),
    dura_spans=((0.0, 0.2), (0.82, 1.0)),
    sella=(0.16, 0.08),
)

# Cuts through the sella are frequent in every class, so that they do not predict a pituitary mass.
VIEWS: dict[Plane, tuple[tuple[View, float], ...]] = {
    "axial": ((_AXIAL_HIGH, 0.2), (_AXIAL_MID, 0.35), (_AXIAL_LOW, 0.45)),
    "coronal": ((_CORONAL_MID, 0.7), (_CORONAL_BACK, 0.3)),
    "sagittal": ((_SAGITTAL, 1.0),),
}
"""Cuts of each plane, and their probabilities."""
