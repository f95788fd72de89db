"""Draw the contact sheet of the README: ``python -m brainray.phantoms docs/phantoms.png``."""

import sys

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from brainray.labels import BRAIN_TUMOUR_CLASSES
from brainray.phantoms.painter import draw_phantom
from brainray.phantoms.views import PLANES


def draw_contact_sheet(seed: int = 1, *, cell_px: int = 144) -> Image.Image:
    """Draw a row for each class, two columns for each plane, as a palette image of few greys."""
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
    steps = sheet.point([7 * round(level / 7) for level in range(256)])  # even steps avoid blotches
    return steps.quantize(64, dither=Image.Dither.NONE)


if __name__ == "__main__":
    draw_contact_sheet().save(sys.argv[1], optimize=True)
