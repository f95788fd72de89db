"""Synthetic brain-MRI slices ("phantoms"): seeded, four classes, for the demo and the tests.

A phantom looks the part and learns like the part, but it is nobody's scan. A *subject* is drawn
once (anatomy, plane, contrast, scanner, mass) and then rendered slice by slice, so slices of one
subject are near duplicates, as neighbouring slices of one patient are in the real data.

Drawings are in head units: the origin is the middle of the head, x points right, y down, and the
head is about two units high. An anatomy is data: outlines through which smooth curves run. One
rendering pass paints, from the outside in, scalp, bone, dura, cortex, deep structures and mass, and
then puts the scanner on top: bias field, blur, noise, grey-scale window.

Read in this order: ``anatomy`` (parts and curves), ``views`` (the cuts), ``subjects`` (the rng),
``canvas`` (tools), ``painter`` (one slice), ``folder`` (files), ``sheet`` (the README's picture).
"""

from brainray.phantoms.anatomy import PLANES, Plane
from brainray.phantoms.folder import Phantom, iterate_phantoms, write_phantom_folder
from brainray.phantoms.painter import draw_phantom, mark_lesion, render_slice
from brainray.phantoms.sheet import draw_contact_sheet
from brainray.phantoms.subjects import SubjectParameters, draw_subject

__all__ = [
    "PLANES",
    "Phantom",
    "Plane",
    "SubjectParameters",
    "draw_contact_sheet",
    "draw_phantom",
    "draw_subject",
    "iterate_phantoms",
    "mark_lesion",
    "render_slice",
    "write_phantom_folder",
]
