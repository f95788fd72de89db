"""Synthetic brain-MRI slices ("phantoms"): seeded, four classes, for the demo and the tests.

A phantom resembles a scan, and a network can learn its class, but it shows no person. A *subject*
is drawn once (anatomy, plane, contrast, scanner, mass) and rendered slice by slice. So slices of a
subject are near duplicates, as neighbouring slices of a patient are.

Drawings are in head units: the origin is the middle of the head, x points right, y down, and the
head is about two units high. Smooth curves run through the points of each outline. A slice is
painted from the outside in: scalp, bone, dura, cortex, deep structures, mass. Then the scanner's
effects follow: bias field, noise, blur, grey-scale window.

Modules in reading order: ``views`` (the six cuts), ``subjects`` (random parameters), ``painter``
(one slice), ``folder`` (files).
"""

from brainray.phantoms.folder import Phantom, iterate_phantoms, write_phantom_folder
from brainray.phantoms.painter import draw_phantom, mark_lesion, render_slice
from brainray.phantoms.subjects import SubjectParameters, draw_subject
from brainray.phantoms.views import PLANES, Plane

__all__ = [
    "PLANES",
    "Phantom",
    "Plane",
    "SubjectParameters",
    "draw_phantom",
    "draw_subject",
    "iterate_phantoms",
    "mark_lesion",
    "render_slice",
    "write_phantom_folder",
]
