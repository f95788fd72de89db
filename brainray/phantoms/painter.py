"""Paint one slice of a subject from the outside in, then apply the scanner's effects."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from brainray.phantoms.subjects import Mass, SubjectParameters, draw_subject
from brainray.phantoms.views import (
    SEQUENCES,
    TISSUES,
    Curve,
    Part,
    Plane,
    Points,
    smooth,
    smooth_part,
)

Picture = NDArray[np.float32]


class Frame:
    """Maps head units to pixels of the canvas."""

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

    def to_pixels(self, curve: Curve) -> Curve:
        """Map head units, shape (N, 2), to pixels, with the subject's deformation."""
        bent = curve + 0.02 * np.sin(3.1 * curve[:, ::-1] + self.warp[0])
        bent += 0.008 * np.sin(7.3 * curve[:, ::-1] + self.warp[1])
        placed: Curve = bent @ self.matrix.T + self.centre
        return placed

    def coordinates(self) -> tuple[Picture, Picture]:
        """Compute the head units x and y of every pixel, each of shape (H, W)."""
        inverse = np.linalg.inv(self.matrix)
        left, top = (0.5 - self.centre).astype(np.float32)
        columns = np.arange(self.width, dtype=np.float32)[None, :] + left
        rows = np.arange(self.height, dtype=np.float32)[:, None] + top
        one, two, three, four = inverse.astype(np.float32).ravel()
        return columns * one + rows * two, columns * three + rows * four

    def sample(self, field: Picture) -> Picture:
        """Sample a square field over head units [-1.5, 1.5] at every pixel."""
        size = field.shape[0]
        inverse = np.linalg.inv(self.matrix) * (size / 3.0)
        origin = size / 2 - inverse @ self.centre
        coefficients = np.column_stack([inverse, origin]).ravel().tolist()
        picture = Image.fromarray(field).transform(
            (self.width, self.height),
            Image.Transform.AFFINE,
            coefficients,
            resample=Image.Resampling.BILINEAR,
        )
        return np.asarray(picture, dtype=np.float32)


_FULL = 200
"""Eight-bit level of brightness or cover 1; allows brightness up to 1.27."""


class Layer:
    """A layer of paint, drawn at twice the canvas resolution for smooth edges.

    An RGB image has brightness times cover in its first band and cover in its second, so that
    Pillow draws both at once. Eight bits suffice, since noise is added.
    """

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self._image = Image.new("RGB", (2 * frame.width, 2 * frame.height))
        self._pen = ImageDraw.Draw(self._image)

    def fill(self, curve: Curve, value: float, cover: float = 1.0) -> None:
        """Fill a closed curve in head units."""
        self._pen.polygon(self._to_corners(curve), fill=self._mix_ink(value, cover))

    def stroke(self, curve: Curve, width: float, value: float, cover: float = 1.0) -> None:
        """Draw along an open curve; ``width`` in head units."""
        thick = max(1, round(2 * width * self.frame.scale))
        self._pen.line(self._to_corners(curve), fill=self._mix_ink(value, cover), width=thick)

    def _to_corners(self, curve: Curve) -> list[float]:
        corners: list[float] = (2 * self.frame.to_pixels(curve)).ravel().tolist()
        return corners

    @staticmethod
    def _mix_ink(value: float, cover: float) -> tuple[int, int, int]:
        return round(_FULL * value * cover), round(_FULL * cover), 0

    def flatten(self, soft_px: float = 0.0) -> tuple[Picture, Picture]:
        """Return brightness times cover, and cover in [0, 1]; each of shape (H, W)."""
        shrink = 4 if soft_px > 3 else 1  # a wide blur needs no full resolution
        bands = np.asarray(self._image.reduce(2 * shrink)) * np.float32(1 / _FULL)
        layers = [bands[..., 0], bands[..., 1]]
        if soft_px:
            layers = [
                ndimage.gaussian_filter(band, soft_px / shrink, truncate=2.5) for band in layers
            ]
        if shrink > 1:
            size = (self.frame.width, self.frame.height)
            resized = (
                Image.fromarray(band).resize(size, Image.Resampling.BILINEAR) for band in layers
            )
            layers = [np.asarray(band) for band in resized]
        value, cover = layers
        return value, cover

    def over(
        self, picture: Picture, *, within: Picture | None = None, soft_px: float = 0.0
    ) -> Picture:
        """Lay this layer over a picture, optionally within a mask or with soft edges."""
        value, cover = self.flatten(soft_px)
        if within is not None:
            value, cover = value * within, cover * within
        result: Picture = picture * (1 - cover) + value
        return result


@lru_cache(maxsize=8)  # slices of one subject follow each other
def _draw_textures(seed: int) -> tuple[Picture, Picture, Picture]:
    """Draw the fields of folds, mottles and swells."""
    rng = np.random.default_rng(seed)
    folds = _draw_ring_noise(rng, 0.235, 0.22)
    return folds, _draw_ring_noise(rng, 0.11, 0.35), _draw_ring_noise(rng, 0.6, 0.35)


def _draw_ring_noise(rng: np.random.Generator, wavelength: float, spread: float) -> Picture:
    """Draw noise of one wavelength (head units); shape (128, 128), unit variance."""
    size = 128
    rows = np.fft.fftfreq(size, 3.0 / size)[:, None]
    columns = np.fft.rfftfreq(size, 3.0 / size)[None, :]
    away = (np.hypot(rows, columns) * wavelength - 1) / spread
    spectrum = np.fft.rfft2(rng.standard_normal((size, size))) * np.exp(-0.5 * away**2)
    field = np.fft.irfft2(spectrum, s=(size, size))
    result: Picture = (field / field.std()).astype(np.float32)
    return result


def _ramp(values: Picture, low: float, high: float) -> Picture:
    """Rise linearly from 0 at ``low`` to 1 at ``high``."""
    result: Picture = np.clip((values - low) * np.float32(1 / (high - low)), 0, 1)
    return result


def _blend(under: Picture, over: NDArray[np.floating], cover: Picture) -> Picture:
    """Lay one picture over another with opacity ``cover``, from 0 to 1."""
    return np.asarray(under + cover * (over - under), dtype=np.float32)


# ---- one slice -----------------------------------------------------------------------------------


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
        textures = (self.frame.sample(field) for field in _draw_textures(subject.texture_seed))
        self.folds, self.mottle, self.swell = textures
        self.cavity = self._mask(self.view.cavity)

    def paint(self) -> Picture:
        """Paint the whole head, shape (H, W)."""
        picture = self._paint_cortex(self._paint_outside())
        if self.view.cerebellum:
            picture = self._paint_cerebellum(picture)
        layer = Layer(self.frame)
        for part in self.view.inside:
            self._paint_part(layer, part, pushed=True)
        picture = layer.over(picture, soft_px=0.009 * self.frame.scale)
        return picture if self.subject.mass is None else self._paint_mass(picture)

    def _mask(self, points: Points) -> Picture:
        return self._mark(smooth(points))

    def _mark(self, curve: Curve) -> Picture:
        """Return each pixel's share within a closed curve, shape (H, W)."""
        layer = Layer(self.frame)
        layer.fill(curve, 0.0)
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
            septa = 1 - _ramp(np.abs(self.mottle + 0.5 * self.folds), 0.05, 0.5)
            strands = 0.55 * septa + 0.35 * _ramp(self.swell + 0.6 * self.folds, -0.2, 1.8)
            tissue = shade["muscle"] + (0.8 * shade["fat"] - shade["muscle"]) * strands
            face = self._mask(view.face)
            picture = _blend(picture, tissue, face)
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
        tissue = shade["grey"] + (white - shade["grey"]) * _ramp(ribbon, 0.02, 0.052)
        cleft = 0.85 * (1 - _ramp(ribbon - opening, -0.008, 0.012))
        tissue = tissue + cleft * (shade["csf"] - tissue)
        # Vessels in the clefts are bright after contrast agent.
        vessel = 0.7 * (1 - _ramp(ribbon, 0.006, 0.016)) * _ramp(self.mottle, 1.2, 1.7)
        tissue = tissue + vessel * (shade["vessel"] - tissue)
        return _blend(picture, tissue, cerebrum)

    def _compute_depth(self, mask: Picture) -> Picture:
        """Compute the distance to the mask's edge in head units, at half resolution for speed."""
        height, width = mask.shape
        halved = Image.fromarray(mask).resize((width // 2, height // 2), Image.Resampling.BOX)
        distance = ndimage.distance_transform_edt(np.asarray(halved) > 0.5) * (2 / self.frame.scale)
        restored = Image.fromarray(distance.astype(np.float32)).resize((width, height))
        return np.asarray(restored)

    def _paint_cerebellum(self, picture: Picture) -> Picture:
        """Paint the fine parallel folia."""
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

    def _paint_mass(self, picture: Picture) -> Picture:
        mass, label = self.subject.mass, self.subject.label
        assert mass is not None
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
        shrunk = 1 - 0.07 * min(abs(self.offset), 4.0)
        return np.asarray(smooth(mass.outline) * mass.radius * shrunk)

    def mark_mass(self) -> Picture:
        """Return each pixel's share within the mass, without oedema; shape (H, W)."""
        mass = self.subject.mass
        if mass is None:
            return np.zeros_like(self.cavity)
        marked = self._mark(np.array(mass.centre) + self._outline_mass(mass))
        return marked if self.subject.label == "pituitary" else marked * self.cavity

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
        uneven = _ramp(self.mottle, -2.4, -0.6)  # the rim has gaps
        picture = body.over(picture, within=self.cavity * (0.35 + 0.65 * uneven))
        solid = 0.72 + 0.28 * _ramp(-self.folds, -1.4, -0.4)  # and the core has islands
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
    """Render one slice of a subject as grey levels, shape (H, W).

    `offset` is the distance from the middle of the mass, in slices; near offsets give near
    duplicates. `rng` is the source of the noise.
    """
    picture = _scan(Painter(subject, offset).paint(), subject, rng)
    return np.rint(picture * 255).astype(np.uint8)


def mark_lesion(subject: SubjectParameters, offset: float) -> NDArray[np.bool_]:
    """Return the mask of the mass in :func:`render_slice`, without oedema, shape (H, W)."""
    return Painter(subject, offset).mark_mass() > 0.5


def draw_phantom(
    label: str, rng: np.random.Generator, *, plane: Plane | None = None
) -> NDArray[np.uint8]:
    """Draw one slice of a new subject (see :func:`draw_subject`), 160 to 320 px on each side."""
    return render_slice(draw_subject(label, rng, plane=plane), 0.0, rng)
