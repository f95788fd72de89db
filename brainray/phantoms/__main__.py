"""Redraw the README's contact sheet: ``python -m brainray.phantoms docs/phantoms.png``."""

import sys

from brainray.phantoms import draw_contact_sheet

if __name__ == "__main__":
    draw_contact_sheet().save(sys.argv[1], optimize=True)
