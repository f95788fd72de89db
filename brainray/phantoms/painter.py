"""Paint one slice of a subject from the outside in, then apply the scanner's effects."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from brainray.phantoms.anatomy import (
    SEQUENCES,
    TISSUES,
    Curve,
    Part,
    Plane,
    Points,
    smooth,
    smooth_part,
)
from brainray.phantoms.canvas import Frame, Layer, Picture, blend, draw_textures, ramp
from brainray.phantoms.subjects import Mass, SubjectParameters, draw_subject


class Painter:
    """Paints one slice of one subject; brightness in [0, 1]."""

    def __init__(self, subject: SubjectParameters, offset: float) -> None:
        self.subject, self.view, self.offset = subject, subject.view, offset
        self.frame = Frame(subject, offset)
        column = SEQUENCES.index(subject.sequence)
        self.shade = {
            name: float(row[column] * jitter)
            for (name, row), jitter in zip(TISSUES.items(), subject.tissue_jitter, strict=True)
        }
        textures = (self.frame.sample(field) for field in draw_textures(subject.texture_seed))
        self.folds, self.mottle, self.swell = textures
        self.cavity = self._mask(self.view.cavity)

    def paint(self) -> Picture:
        """Paint the whole head, shape (H, W)."""
        picture = self._paint_outside()
        picture = self._paint_cortex(picture)
        picture = self._paint_cerebellum(picture)
        picture = self._paint_inside(picture)
        return self._paint_mass(picture)

    def _mask(self, points: Points) -> Picture:
        layer = Layer(self.frame)
        layer.fill(smooth(points), 0.0)
        return layer.flatten()[1]

    def _place(self, part: Part, *, pushed: bool) -> Iterator[Curve]:
        """Yield the part's curve, and its mirror image if mirrored."""
        curve = smooth_part(part)
        for side in (1.0, -1.0) if part.mirrored else (1.0,):
            placed = curve * np.array([side, 1.0])
            yield self._push(placed) if pushed else placed

    def _paint_part(self, layer: Layer, part: Part, *, pushed: bool = False) -> None:
        for placed in self._place(part, pushed=pushed):
            if part.width:
                layer.stroke(placed, part.width, self.shade[part.tissue])
            else:
                layer.fill(placed, self.shade[part.tissue])

    def _push(self, curve: Curve) -> Curve:
        """Move deep structures away from a mass (mass effect)."""
        mass = self.subject.mass
        if mass is None or self.subject.label == "pituitary":
            return curve
        away = curve - np.array(mass.centre)
        distance = np.hypot(away[:, 0], away[:, 1])[:, None] + 1e-6
        push = 0.4 * mass.radius * np.exp(-((distance / (2.2 * mass.radius)) ** 2))
        moved: Curve = curve + away / distance * push
        return moved

    def _paint_outside(self) -> Picture:
        """Paint scalp, face and neck, bone with its marrow, and the dura over CSF."""
        shade, view = self.shade, self.view
        base = Layer(self.frame)
        head, cavity = smooth(view.head), smooth(view.cavity)
        base.fill(head, 0.45 * shade["fat"] + 0.1)  # skin
        middle = np.array([0.0, -0.05])
        base.fill(middle + (head - middle) * 0.983, shade["fat"])
        picture = base.over(np.zeros((self.frame.height, self.frame.width), np.float32))
        picture *= 1 + 0.05 * self.mottle + 0.05 * self.swell
        if view.face:
            septa = 1 - ramp(np.abs(self.mottle + 0.5 * self.folds), 0.05, 0.5)
            strands = 0.55 * septa + 0.35 * ramp(self.swell + 0.6 * self.folds, -0.2, 1.8)
            tissue = shade["muscle"] + (0.8 * shade["fat"] - shade["muscle"]) * strands
            face = self._mask(view.face)
            picture = blend(picture, tissue, face)
        skull = Layer(self.frame)
        for part in view.outside:
            self._paint_part(skull, part)
        around = cavity.mean(axis=0)
        for grown, tissue_name in ((1.1, "bone"), (1.07, "diploe"), (1.04, "bone")):
            skull.fill(around + (cavity - around) * grown, shade[tissue_name])
        skull.fill(around + (cavity - around) * 1.014, shade["dura"])
        skull.fill(cavity, shade["csf"])
        return skull.over(picture)

    def _paint_cortex(self, picture: Picture) -> Picture:
        """Paint the folded grey ribbon over white matter.

        Sulci are zero crossings of a field of one wavelength, near the surface only. The ribbon has
        the same thickness along them and along the surface.
        """
        view, shade = self.view, self.shade
        layer = Layer(self.frame)
        layer.fill(smooth(view.cerebrum), 0.0)
        for part in view.fissures:
            for placed in self._place(part, pushed=True):
                layer.stroke(placed, part.width * self.subject.ventricles, 0.0, cover=0.0)
        cerebrum = layer.flatten()[1]
        depth = self._compute_depth(cerebrum)
        floor = 0.13 + 0.06 * self.swell
        crevice = 0.036 * np.abs(self.folds + 0.3 * self.mottle)
        ribbon = np.minimum(depth, crevice + np.maximum(depth - floor, 0))
        opening = 0.008 * self.subject.ventricles * (0.75 + 0.45 * self.swell)
        white = shade["white"] * (1 + 0.03 * self.swell + 0.015 * self.mottle)
        tissue = shade["grey"] + (white - shade["grey"]) * ramp(ribbon, 0.02, 0.052)
        cleft = 0.85 * (1 - ramp(ribbon - opening, -0.008, 0.012))
        tissue = tissue + cleft * (shade["csf"] - tissue)
        # Vessels in the clefts are bright after contrast agent.
        vessel = 0.7 * (1 - ramp(ribbon, 0.006, 0.016)) * ramp(self.mottle, 1.2, 1.7)
        tissue = tissue + vessel * (shade["vessel"] - tissue)
        return blend(picture, tissue, cerebrum)

    def _compute_depth(self, mask: Picture) -> Picture:
        """Compute the distance to the mask's edge in head units, at half resolution for speed."""
        height, width = mask.shape
        halved = Image.fromarray(mask).resize((width // 2, height // 2), Image.Resampling.BOX)
        distance = ndimage.distance_transform_edt(np.asarray(halved) > 0.5) * (2 / self.frame.scale)
        restored = Image.fromarray(distance.astype(np.float32)).resize((width, height))
        return np.asarray(restored)

    def _paint_cerebellum(self, picture: Picture) -> Picture:
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
        tissue = shade["grey"] + (shade["white"] - shade["grey"]) * ramp(stripes, -0.3, 1)
        cleft = 0.45 * (1 - ramp(stripes, -1.3, -0.5))
        tissue = tissue + cleft * (shade["csf"] - tissue)
        mask = self._mask(self.view.cerebellum)
        return blend(picture, tissue, mask)

    def _paint_inside(self, picture: Picture) -> Picture:
        layer = Layer(self.frame)
        for part in self.view.inside:
            self._paint_part(layer, part, pushed=True)
        return layer.over(picture, soft_px=0.009 * self.frame.scale)

    def _paint_mass(self, picture: Picture) -> Picture:
        mass, label = self.subject.mass, self.subject.label
        if mass is None:
            return picture
        outline = self._outline_mass(mass)
        if label == "glioma":
            return self._paint_glioma(picture, mass, outline)
        value = self.shade["meningioma" if label == "meningioma" else "adenoma"] * mass.brightness
        centre = np.array(mass.centre)
        shell, body = Layer(self.frame), Layer(self.frame)
        shell.fill(centre + 1.12 * outline, 0.6 * self.shade["csf"] + 0.4 * self.shade["grey"], 0.8)
        body.fill(centre + outline, value)
        within = self.cavity if label == "meningioma" else None
        picture = shell.over(picture, within=within)
        painted = body.over(picture, within=within)
        grain: Picture = 1 + 0.03 * body.flatten()[1] * (self.mottle + self.swell)
        return painted * grain

    def _outline_mass(self, mass: Mass) -> Curve:
        """Return the mass's outline around its centre, smaller in slices far from its middle."""
        outline: Curve = (
            smooth(mass.outline) * mass.radius * (1 - 0.07 * min(abs(self.offset), 4.0))
        )
        return outline

    def mark_mass(self) -> Picture:
        """Return each pixel's share within the mass, without oedema; shape (H, W)."""
        mass = self.subject.mass
        layer = Layer(self.frame)
        if mass is not None:
            layer.fill(np.array(mass.centre) + self._outline_mass(mass), 0.0)
        marked = layer.flatten()[1]
        return marked * self.cavity if self.subject.label != "pituitary" else marked

    def _paint_glioma(self, picture: Picture, mass: Mass, outline: Curve) -> Picture:
        """Paint oedema, an uneven bright rim, and a dark necrotic core."""
        shade, centre = self.shade, np.array(mass.centre)
        halo, body, core = Layer(self.frame), Layer(self.frame), Layer(self.frame)
        turn = np.linspace(0, 2 * np.pi, len(outline))[:, None]
        reach = 1.55 + 0.35 * np.sin(3 * turn + self.subject.warp[0, 0])
        halo.fill(centre + reach * outline, shade["oedema"], 0.85)
        body.fill(centre + outline, shade["rim"] * mass.brightness)
        inner = 0.64 + 0.13 * np.sin(2 * turn + self.subject.warp[1, 1])
        core.fill(centre + inner * outline, shade["core"])
        picture = halo.over(picture, within=self.cavity, soft_px=0.045 * self.frame.scale)
        uneven = ramp(self.mottle, -2.4, -0.6)  # the rim has gaps
        picture = body.over(picture, within=self.cavity * (0.35 + 0.65 * uneven))
        solid = 0.72 + 0.28 * ramp(-self.folds, -1.4, -0.4)  # and the core has islands
        return core.over(picture, within=self.cavity * solid)


def _scan(picture: Picture, subject: SubjectParameters, rng: np.random.Generator) -> Picture:
    """Apply the scanner's receive field, Rician noise, blur and grey-scale window."""
    height, width = picture.shape
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    across, down, bowl = (np.float32(value) for value in subject.bias)
    field = 1 + across * x + down * y + bowl * (x * x + y * y - np.float32(0.6))
    if subject.view.plane != "axial":
        field = field * (1 - 0.8 * np.clip((y - 0.35) / 0.65, 0, 1) ** 2)  # the coil ends here
    signal = picture * np.maximum(field, 0.2)
    real = signal + subject.noise * rng.standard_normal(picture.shape, dtype=np.float32)
    imaginary = subject.noise * rng.standard_normal(picture.shape, dtype=np.float32)
    power = real * real + imaginary * imaginary
    magnitude = ndimage.gaussian_filter(np.sqrt(power), subject.blur_px, truncate=2.5)
    window = np.clip(subject.gain * (magnitude - 0.8 * subject.noise), 0, 1)
    result: Picture = window ** np.float32(subject.gamma)
    return result


def render_slice(
    subject: SubjectParameters, offset: float, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Render one slice of a subject.

    Parameters
    ----------
    subject : SubjectParameters
    offset : float
        Distance from the middle of the mass, in slices; near offsets give near duplicates.
    rng : Generator
        Source of this slice's noise.

    Returns
    -------
    ndarray of uint8, shape (H, W)
        Grey levels.
    """
    picture = _scan(Painter(subject, offset).paint(), subject, rng)
    return np.rint(picture * 255).astype(np.uint8)


def mark_lesion(subject: SubjectParameters, offset: float) -> NDArray[np.bool_]:
    """Return the mask of the mass in :func:`render_slice`, without oedema, shape (H, W)."""
    return Painter(subject, offset).mark_mass() > 0.5


def draw_phantom(
    label: str, rng: np.random.Generator, *, plane: Plane | None = None
) -> NDArray[np.uint8]:
    """Draw one slice of a new subject; parameters and exceptions of :func:`draw_subject`.

    Returns
    -------
    ndarray of uint8, shape (H, W)
        Grey levels; each side is between 160 and 320 px.
    """
    return render_slice(draw_subject(label, rng, plane=plane), 0.0, rng)
