"""Redraw the README's contact sheet: ``python -m brainray.pixels.phantoms docs/phantoms.png``."""

import sys

from brainray.pixels.phantoms import draw_contact_sheet

if __name__ == "__main__":
    draw_contact_sheet().save(sys.argv[1], optimize=True)
