"""Random parameters of a subject: cut, canvas, contrast, scanner and mass."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from brainray.errors import ConfigError
from brainray.labels import BRAIN_TUMOUR_CLASSES
from brainray.phantoms.views import (
    PLANES,
    SEQUENCES,
    TISSUES,
    VIEWS,
    Plane,
    Points,
    View,
    smooth,
)

_SEQUENCE_ODDS = (0.22, 0.52, 0.11, 0.15)
"""Probability of each of ``SEQUENCES``."""

_SIDES_PX = (160, 176, 192, 208, 224, 256, 320)
_SIDE_ODDS = (0.16, 0.18, 0.2, 0.16, 0.2, 0.07, 0.03)
"""Probability of each length of a canvas's shorter side."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mass:
    """Position and shape of a tumour, in head units."""

    centre: tuple[float, float]
    radius: float
    outline: Points
    """Relative to ``centre``, for ``radius`` 1."""
    brightness: float
    """Factor on the tissue brightness, near 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SubjectParameters:
    """Parameters of all slices of a subject; made by :func:`draw_subject`."""

    label: str
    view: View
    sequence: str
    """MRI sequence: t1, t1c (after contrast agent), t2 or flair."""
    height_px: int
    width_px: int
    fill: float
    """Size of the head relative to the canvas; 1 reaches from edge to edge."""
    shift: tuple[float, float]
    """Offset (x, y) of the head from the canvas centre, in head units."""
    rotation_rad: float
    flipped: bool
    """Mirror left and right."""
    stretch: float
    """Width of the head relative to the view's drawing."""
    warp: NDArray[np.float64]
    """Phases of the smooth deformation, radians, shape (2, 2)."""
    ventricles: float
    """Width of sulci and ventricles relative to the average."""
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
    mass: Mass | None


def check_labels(classes: Sequence[str]) -> None:
    """Raise ConfigError for a class without phantoms."""
    unknown = [name for name in classes if name not in BRAIN_TUMOUR_CLASSES]
    if unknown:
        raise ConfigError(
            f"There are no phantoms of class {', '.join(map(repr, unknown))}. "
            f"Expected classes among {', '.join(BRAIN_TUMOUR_CLASSES)}."
        )


def _draw_view(label: str, plane: Plane, rng: np.random.Generator) -> View:
    """Draw a cut of the plane that can show the class."""
    choices = [one for one in VIEWS[plane] if label != "pituitary" or one[0].sella is not None]
    odds = np.array([odds for _, odds in choices])
    return choices[int(rng.choice(len(choices), p=odds / odds.sum()))][0]


def _draw_outline(rng: np.random.Generator, *, raggedness: float, knots: int) -> Points:
    """Draw a closed outline of radius 1, with standard deviation ``raggedness``."""
    angles = np.arange(knots) * (2 * np.pi / knots)
    radii = 1 + raggedness * np.clip(rng.standard_normal(knots), -1.8, 1.8)
    oval = 1 + rng.uniform(0, 0.18) * np.cos(2 * (angles - rng.uniform(0, np.pi)))
    xs, ys = radii * oval * np.cos(angles), radii * oval * np.sin(angles)
    return [(float(x), float(y)) for x, y in zip(xs, ys, strict=True)]


def _draw_mass(label: str, view: View, rng: np.random.Generator) -> Mass | None:
    """Draw the tumour of the class."""
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
        curve = smooth(view.cavity)
        edge = curve[int(rng.uniform(*span) * len(curve)) % len(curve)]
        radius = float(rng.uniform(0.14, 0.25))
        # The centre is less than a radius inside, so that the skull cuts the disc: a broad base.
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
    return Mass(centre=centre, radius=radius, outline=outline, brightness=brightness)


def draw_subject(
    label: str, rng: np.random.Generator, *, plane: Plane | None = None
) -> SubjectParameters:
    """Draw the parameters of one subject; without a plane, each has the same probability.

    Raises ConfigError for an unknown class or plane.
    """
    check_labels([label])
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
        sequence=str(rng.choice(SEQUENCES, p=_SEQUENCE_ODDS)),
        height_px=long if tall else short,
        width_px=short if tall else long,
        fill=float(rng.uniform(0.84, 0.98)),
        shift=(float(rng.uniform(-0.04, 0.04)), float(rng.uniform(-0.03, 0.03))),
        rotation_rad=float(rotation),
        flipped=bool(rng.random() < 0.5),
        stretch=float(rng.uniform(0.95, 1.06)),
        warp=rng.uniform(0, 2 * np.pi, (2, 2)),
        ventricles=float(rng.uniform(0.7, 1.5)),
        tissue_jitter=rng.uniform(0.92, 1.08, len(TISSUES)),
        bias=rng.normal(0, 0.12, 3),
        gain=float(rng.uniform(0.72, 1.12)),
        gamma=float(rng.uniform(0.85, 1.3)),
        noise=float(rng.uniform(0.008, 0.042)),
        blur_px=float(rng.uniform(0.5, 0.85)),
        texture_seed=int(rng.integers(2**32)),
        mass=_draw_mass(label, view, rng),
    )
