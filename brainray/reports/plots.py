"""Small figures as inline SVG, coloured by the page's own CSS variables.

Hand-written, because a drawing that takes its colours from the page is right in light,
dark and print alike, stays sharp at any size, and needs a few kilobytes. A series is told
by colour and by dash (CSS classes ``s0`` … ``s7``), never by colour alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

DASHES = ("", "7 3", "2 2.5", "9 3 2 3", "", "7 3", "2 2.5", "9 3 2 3")
"""Dash pattern of each series class; the stylesheet has as many colours. Then they begin again."""

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 440, 330  # of a figure's viewBox; text is 12 units high
_LEFT, _RIGHT, _TOP, _BOTTOM = 36, 12, 32, 40  # margins that hold tick and axis labels
_DIGIT = 7  # width of a digit of a tick label
_TIME_UNITS = {"s": 1, "min": 60, "h": 3600}  # seconds
_ZOOM = 0.1  # side of the unit-square corner that an inset magnifies


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """One axis of a panel: its range, its ticks and its label."""

    low: float
    """Value at the left or lower end."""
    high: float
    """Value at the right or upper end; above ``low``."""
    ticks: tuple[float, ...]
    """Values that carry a label and a grid line."""
    label: str = ""
    """What the axis shows."""

    def scale(self, value: float) -> float:
        """Return where a value lies on the axis, 0 at its low end and 1 at its high end."""
        return (value - self.low) / (self.high - self.low)


def build_axis(
    low: float, high: float, label: str = "", *, num_ticks: int = 5, min_step: float = 0.0
) -> Axis:
    """Build an axis with round ticks whose range is widened to the nearest ticks.

    Parameters
    ----------
    low, high : float
        Range that must be covered.
    label : str
        What the axis shows.
    num_ticks : int
        About how many steps to cut the range into.
    min_step : float
        Smallest distance of two ticks; 1 for an axis that counts.
    """
    span = (high - low) or 1.0
    raw = max(span / num_ticks, min_step)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil((low + span) / step - 1e-9)
    ticks = tuple(round(step * i, 10) for i in range(first, last + 1))
    return Axis(low=ticks[0], high=ticks[-1], ticks=ticks, label=label)


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """A rectangle of a figure with two axes; places are relative to its upper left corner."""

    x: Axis
    """The horizontal axis."""
    y: Axis
    """The vertical axis."""
    left: float = _LEFT
    """Distance from the figure's left edge, in viewBox units, as are the following."""
    top: float = _TOP
    """Distance from the figure's upper edge."""
    width: float = _WIDTH - _LEFT - _RIGHT
    """Width of the plotting area."""
    height: float = _HEIGHT - _TOP - _BOTTOM
    """Height of the plotting area."""

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Return the place of a value pair, in viewBox units, to a tenth."""
        return (
            round(self.x.scale(x) * self.width, 1),
            round((1 - self.y.scale(y)) * self.height, 1),
        )

    def line(self, points: Points, css: str) -> Markup:
        """Draw a line through points; consecutive points on one spot are drawn once."""
        places: list[tuple[float, float]] = []
        for x, y in points:
            place = self.place(x, y)
            if not places or place != places[-1]:
                places.append(place)
        if len(places) < 2:
            return Markup("")
        path = "M" + "L".join(f"{x:g} {y:g}" for x, y in places)
        return Markup('<path class="line {}" d="{}"/>').format(css, path)

    def dot(self, x: float, y: float, css: str, tip: str, radius: float = 3) -> Markup:
        """Draw a dot that says its value when pointed at."""
        cx, cy = self.place(x, y)
        return Markup(
            '<circle class="dot {}" cx="{:g}" cy="{:g}" r="{:g}"><title>{}</title></circle>'
        ).format(css, cx, cy, radius, tip)

    def axes(self) -> Markup:
        """Draw grid lines, tick labels and axis labels."""
        parts = []
        for tick in self.y.ticks:
            y = self.place(self.x.low, tick)[1]
            parts.append(Markup('<path class="grid" d="M0 {:g}H{:g}"/>').format(y, self.width))
            parts.append(_text(-6, y + 4, _tick_label(tick, self.y), "end"))
        for tick in self.x.ticks:
            x = self.place(tick, self.y.low)[0]
            parts.append(_text(x, self.height + 16, _tick_label(tick, self.x), "middle"))
        parts.append(
            Markup('<path class="axis" d="M0 {0:g}H{1:g}"/>').format(self.height, self.width)
        )
        parts.append(_text(self.width / 2, self.height + 34, self.x.label, "middle", "label"))
        parts.append(_text(2 - self.left, -18, self.y.label, "start", "label"))
        return Markup("").join(parts)

    def wrap(self, *parts: Markup, clip: bool = False) -> Markup:
        """Put what was drawn at the panel's place in the figure, and clip it if asked."""
        return Markup(
            '<svg class="{}" x="{:g}" y="{:g}" width="{:g}" height="{:g}">{}</svg>'
        ).format(
            "panel clip" if clip else "panel",
            self.left,
            self.top,
            self.width,
            self.height,
            Markup("").join(parts),
        )


def draw_history(series: Mapping[str, Points], *, title: str, y_axis: Axis) -> Markup:
    """Draw one quantity over the epochs.

    Parameters
    ----------
    series : mapping of str to sequence of (int, float)
        Epoch, counted from 1, and value, by name of the series.
    title : str
        What a screen reader says of the figure.
    y_axis : Axis
        The vertical axis.
    """
    epochs = [epoch for points in series.values() for epoch, _ in points]
    low, high = min(epochs), max(epochs)
    ticks = build_axis(low, high, min_step=1, num_ticks=8).ticks
    x_axis = Axis(
        low=low if high > low else low - 1,
        high=high if high > low else high + 1,
        ticks=tuple(tick for tick in ticks if low <= tick <= high),
        label="epoch",
    )
    panel = Panel(x=x_axis, y=y_axis)
    parts = [panel.axes()]
    for i, (name, points) in enumerate(series.items()):
        parts.append(panel.line(points, _style(i)))
        parts += [panel.dot(x, y, _style(i), f"{name}, epoch {x:g}: {y:.4g}") for x, y in points]
    return _figure(title, panel.wrap(*parts))


def draw_unit_curves(
    curves: Mapping[str, Points],
    *,
    title: str,
    x_label: str,
    y_label: str,
    zoom_left: bool,
    chance: bool = False,
) -> Markup:
    """Draw curves in the unit square, with an inset that magnifies their busy corner.

    The inset is left out unless every curve reaches that corner: there would be little to
    magnify, and it could cover a curve.

    Parameters
    ----------
    curves : mapping of str to sequence of (float, float)
        Points in [0, 1]², by name; the order gives the style.
    title, x_label, y_label : str
        What a screen reader says of the figure, and the axes' labels.
    zoom_left : bool
        Magnify the upper left corner (ROC) rather than the upper right one (PR).
    chance : bool
        Draw the diagonal.
    """
    panel = Panel(x=build_axis(0, 1, x_label), y=build_axis(0, 1, y_label))
    lines = [(points, _style(i)) for i, points in enumerate(curves.values())]
    parts = [panel.axes()]
    if chance:
        parts.append(panel.line([(0, 0), (1, 1)], "reference"))
    parts += [panel.line(points, css) for points, css in lines]
    start = 0.0 if zoom_left else 1 - _ZOOM
    reached = all(
        any(start <= x <= start + _ZOOM and y >= 1 - _ZOOM for x, y in points)
        for points, _ in lines
    )
    if not (lines and reached):
        return _figure(title, panel.wrap(*parts))
    side = (_ZOOM * panel.width, _ZOOM * panel.height)
    parts.append(_box(*panel.place(start, 1), *side, "lens"))
    return _figure(title, panel.wrap(*parts), _draw_inset(panel, lines, zoom_left=zoom_left))


def _draw_inset(panel: Panel, lines: Sequence[tuple[Points, str]], *, zoom_left: bool) -> Markup:
    """Draw the upper left (ROC) or right (PR) corner again, large, where no curve passes."""
    start = 0.0 if zoom_left else 1 - _ZOOM
    inset = Panel(
        x=Axis(low=start, high=start + _ZOOM, ticks=()),
        y=Axis(low=1 - _ZOOM, high=1, ticks=()),
        left=_LEFT + panel.width * (0.44 if zoom_left else 0.08),
        top=_TOP + panel.height * 0.36,
        width=panel.width * 0.48,
        height=panel.height * 0.54,
    )
    bounds = f"{panel.x.label.split(' (')[0]} {'≤' if zoom_left else '≥'} {start or _ZOOM:g}"
    place, anchor = (inset.width - 8, "end") if zoom_left else (8.0, "start")
    caption = _text(place, inset.height - 8, bounds, anchor, "note")
    return inset.wrap(
        _box(0, 0, inset.width, inset.height, "lens fill"),
        *(inset.line(points, css) for points, css in lines),
        _box(0, 0, inset.width, inset.height, "lens"),
        caption,
        clip=True,
    )


def draw_risk_coverage(points: Points, *, title: str, marked: tuple[float, float]) -> Markup:
    """Draw risk over coverage, and mark where the threshold stands.

    Parameters
    ----------
    points : sequence of (float, float)
        Coverage and risk, in [0, 1].
    title : str
        What a screen reader says of the figure.
    marked : (float, float)
        Coverage and risk at the threshold.
    """
    panel = Panel(
        x=build_axis(0, 1, "coverage: share of scans that get a class"),
        y=build_axis(0, max([0.01, *(risk for _, risk in points)]), "risk: share of these, wrong"),
    )
    coverage, risk = marked
    tip = f"{coverage:.1%} of the scans get a class, {risk:.1%} of these are wrong"
    parts = [panel.axes(), panel.line(points, _style(0))]
    return _figure(title, panel.wrap(*parts, panel.dot(coverage, risk, _style(0), tip, radius=5)))


def draw_reliability(
    confidence: Sequence[float | None],
    accuracy: Sequence[float | None],
    counts: Sequence[int],
    *,
    title: str,
) -> Markup:
    """Draw accuracy against confidence with the distance from the diagonal, and the counts.

    Parameters
    ----------
    confidence, accuracy : sequence of float or None
        Mean confidence and accuracy of each bin of equal width; None for an empty bin.
    counts : sequence of int
        Number of images in each bin.
    title : str
        What a screen reader says of the figure.
    """
    strip, gap = 48, 36  # the counts below, and the room for their label
    top = Panel(
        x=Axis(low=0, high=1, ticks=()),
        y=build_axis(0, 1, "accuracy"),
        height=_HEIGHT - _TOP - strip - gap - _BOTTOM,
    )
    base = Panel(
        x=build_axis(0, 1, "confidence of the predicted class"),
        y=Axis(low=0, high=max([*counts, 1]), ticks=(), label="scans"),
        top=_HEIGHT - _BOTTOM - strip,
        height=strip,
    )
    points = [top.axes(), top.line([(0, 0), (1, 1)], "reference")]
    bars = [base.axes()]
    width = base.width / max(len(counts), 1)
    for i, (x, y, n) in enumerate(zip(confidence, accuracy, counts, strict=True)):
        if x is None or y is None or not n:
            continue
        points.append(top.line([(x, x), (x, y)], "gap"))
        tip = f"{n:,} images: mean confidence {x:.3f}, accuracy {y:.3f}"
        points.append(top.dot(x, y, "s0", tip, 4.5))
        height = max(base.height * n / base.y.high, 1)
        bars.append(_box(i * width + 1, base.height - height, width - 2, height, "bar"))
        bars.append(_text((i + 0.5) * width, base.height - height - 3, f"{n:,}", "middle", "count"))
    return _figure(title, top.wrap(*points), base.wrap(*bars))


def draw_histogram(
    edges: Sequence[float], counts: Sequence[int], *, title: str, x_label: str
) -> Markup:
    """Draw how many scans have a value in each bin; a bin with any scan can be seen.

    Parameters
    ----------
    edges : sequence of float
        The bins' borders in [0, 1], ascending; one more than there are bins.
    counts : sequence of int
        Number of scans in each bin.
    title, x_label : str
        What a screen reader says of the figure, and what is counted.
    """
    panel = _build_count_panel(build_axis(0, 1, x_label), max(counts))
    bars = []
    for low, high, n in zip(edges[:-1], edges[1:], counts, strict=True):
        if not n:
            continue
        left, top = panel.place(low, n)
        right, base = panel.place(high, 0)
        height = max(base - top, 1.5)
        tip = f"{low:.2f} to {high:.2f}: {n:,} scans"
        bars.append(_box(left + 1, base - height, right - left - 2, height, "bar", tip))
    return _figure(title, panel.wrap(panel.axes(), *bars))


def draw_progress(points: Points, *, title: str) -> Markup:
    """Draw how many scans were done after how long.

    Parameters
    ----------
    points : sequence of (float, int)
        Seconds since the start, and scans done by then; at least one.
    title : str
        What a screen reader says of the figure.
    """
    end_s = max(seconds for seconds, _ in points)
    unit = next((u for u in ("h", "min") if end_s >= 3 * _TIME_UNITS[u]), "s")
    scale = _TIME_UNITS[unit]
    high = end_s / scale or 1.0
    ticks = tuple(tick for tick in build_axis(0, high).ticks if tick <= high)
    x_axis = Axis(low=0, high=high, ticks=ticks, label=f"time since the start ({unit})")
    panel = _build_count_panel(x_axis, max(done for _, done in points))
    places = [(seconds / scale, done) for seconds, done in points]
    time, done = places[-1]
    dot = panel.dot(time, done, "s0", f"{done:,} scans after {time:.1f} {unit}", 4)
    return _figure(title, panel.wrap(panel.axes(), panel.line(places, "s0"), dot))


def draw_panel(title: str, panel: Panel, marks: Sequence[Markup]) -> Markup:
    """Draw a panel with its axes and some marks.

    Parameters
    ----------
    title : str
        What a screen reader says of the figure.
    marks : sequence of Markup
        Of the panel's ``dot`` and ``line``.
    """
    return _figure(title, panel.wrap(panel.axes(), *marks))


def _build_count_panel(x: Axis, highest: float) -> Panel:
    """Build the panel of a figure that counts scans; large numbers get a wide left margin."""
    y = build_axis(0, max(highest, 1), "scans", min_step=1)
    left = max(_LEFT, 12 + _DIGIT * max(len(_tick_label(tick, y)) for tick in y.ticks))
    return Panel(x=x, y=y, left=left, width=_WIDTH - left - _RIGHT)


def _style(index: int) -> str:
    return f"s{index % len(DASHES)}"


def _figure(title: str, *parts: Markup) -> Markup:
    return Markup(
        '<svg class="plot" role="img" aria-label="{}" viewBox="0 0 {} {}">{}</svg>'
    ).format(title, _WIDTH, _HEIGHT, Markup("").join(parts))


def _text(x: float, y: float, text: str, anchor: str, css: str = "tick") -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        css, x, y, anchor, text
    )


def _box(x: float, y: float, width: float, height: float, css: str, tip: str = "") -> Markup:
    return Markup('<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"{}').format(
        css,
        x,
        y,
        width,
        height,
        Markup("><title>{}</title></rect>").format(tip) if tip else Markup("/>"),
    )


def _tick_label(tick: float, axis: Axis) -> str:
    """Give all ticks of an axis as many decimals as its step needs."""
    step = axis.ticks[1] - axis.ticks[0] if len(axis.ticks) > 1 else 1.0
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{tick:,.{decimals}f}"
