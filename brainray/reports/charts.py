"""Charts as inline SVG, coloured by the page's own CSS variables.

Hand-written, because a chart that takes its colours from the page is right in light, dark and
print. Matplotlib 3 writes SVG too, but takes 1.5 s of CPU to import, adds 56 MB of packages, and
its charts of 16 KB have fixed colours, ids that several charts of one page share, and no tooltips.

A series has a colour and a dash pattern of its own (CSS classes ``s0`` … ``s7``), so that colour
alone never carries information.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

DASHES = ("", "7 3", "2 2.5", "9 3 2 3", "", "7 3", "2 2.5", "9 3 2 3")
"""Dash pattern of each series class; the stylesheet has as many colours. Then they repeat."""

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 440, 330  # of the viewBox; text is 12 units high
_RIGHT, _TOP, _BOTTOM = 12, 32, 40  # margins
_ZOOM = 0.1  # side of the unit-square corner that an inset magnifies
_TEXT = '<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>'


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """The range, ticks and label of one axis."""

    low: float
    high: float
    ticks: tuple[float, ...]
    """Values that carry a label and a grid line."""
    label: str = ""

    def scale(self, value: float) -> float:
        """Return the position of a value, 0 at the low end and 1 at the high end."""
        return (value - self.low) / (self.high - self.low)

    def list_labels(self) -> list[str]:
        """Return the labels of the ticks, all with the decimals that their distance needs."""
        step = self.ticks[1] - self.ticks[0] if len(self.ticks) > 1 else 1.0
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
        return [f"{tick:,.{decimals}f}" for tick in self.ticks]


def build_axis(low: float, high: float, label: str = "", *, min_step: float = 0.0) -> Axis:
    """Build an axis with about five round ticks; the range is widened to the nearest ticks."""
    span = (high - low) or 1.0
    raw = max(span / 5, min_step)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil((low + span) / step - 1e-9)
    ticks = tuple(round(step * i, 10) for i in range(first, last + 1))
    return Axis(low=ticks[0], high=ticks[-1], ticks=ticks, label=label)


class Chart:
    """Marks in a panel with two axes; in data coordinates. A screen reader has the title."""

    def __init__(self, title: str, x: Axis, y: Axis) -> None:
        self.title, self.x, self.y = title, x, y
        self.left = max(36, 12 + 7 * max(map(len, y.list_labels()), default=0))
        self.width, self.height = _WIDTH - self.left - _RIGHT, _HEIGHT - _TOP - _BOTTOM
        self._marks: list[Markup] = []
        self._draw_axes()
        self._axes, self._marks = self._marks, []

    def _add(self, markup: str, *values: object) -> None:
        self._marks.append(Markup(markup).format(*values))

    def _add_box(self, css: str, *box: float) -> None:
        markup = '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>'
        self._add(markup, css, *box)

    def project(self, x: float, y: float) -> tuple[float, float]:
        """Return the position of a data point in the panel, from the upper left corner."""
        across, down = self.x.scale(x) * self.width, (1 - self.y.scale(y)) * self.height
        return round(across, 1), round(down, 1)

    def line(self, points: Points, css: str) -> None:
        """Draw a line; consecutive points on one spot are drawn once."""
        positions = itertools.groupby(self.project(x, y) for x, y in points)
        path = "L".join(f"{x:g} {y:g}" for (x, y), _ in positions)
        if "L" in path:
            self._add('<path class="line {}" d="M{}"/>', css, path)

    def dot(self, x: float, y: float, css: str, tip: str, radius: float = 3) -> None:
        """Draw a dot with a tooltip."""
        markup = '<circle class="dot {}" cx="{:g}" cy="{:g}" r="{:g}"><title>{}</title></circle>'
        self._add(markup, css, *self.project(x, y), radius, tip)

    def bar(self, x: tuple[float, float], y: tuple[float, float], tip: str) -> None:
        """Draw a bar with a tooltip; it is never too low to be seen."""
        (left, bottom), (right, top) = self.project(x[0], y[0]), self.project(x[1], y[1])
        height = max(bottom - top, 1.5)
        markup = (
            '<rect class="bar" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}">'
            "<title>{}</title></rect>"
        )
        self._add(markup, left + 1, bottom - height, right - left - 2, height, tip)

    def text(self, x: float, y: float, text: str, anchor: str = "middle") -> None:
        """Write small text just above a point."""
        across, down = self.project(x, y)
        self._add(_TEXT, "note", across, down - 3, anchor, text)

    def magnify(self, x: float, y: float, size: float, *, at: float, note: str) -> None:
        """Repeat the marks in an inset that magnifies a square of data coordinates.

        ``x`` and ``y`` are the square's lower left corner. ``at`` is the left end of the inset, as
        a share of the panel's width, and ``note`` its caption.
        """
        (left, bottom), (right, top) = self.project(x, y), self.project(x + size, y + size)
        source = (left, top, right - left, bottom - top)
        target = (at * self.width, 0.36 * self.height, 0.48 * self.width, 0.54 * self.height)
        marks = Markup("").join(self._marks)
        self._add_box("lens", *source)
        self._add_box("lens fill", *target)
        self._add(
            '<svg class="inset" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" '
            'viewBox="{:.1f} {:.1f} {:.1f} {:.1f}" preserveAspectRatio="none">{}</svg>',
            *(*target, *source, marks),
        )
        self._add_box("lens", *target)
        below = target[1] + target[3] + 13
        self._add(_TEXT, "note", target[0] + target[2] / 2, below, "middle", note)

    def _draw_axes(self) -> None:
        for tick, label in zip(self.y.ticks, self.y.list_labels(), strict=True):
            down = self.project(self.x.low, tick)[1]
            self._add('<path class="grid" d="M0 {:g}H{:g}"/>', down, self.width)
            self._add(_TEXT, "tick", -6, down + 4, "end", label)
        for tick, label in zip(self.x.ticks, self.x.list_labels(), strict=True):
            across = self.project(tick, self.y.low)[0]
            self._add(_TEXT, "tick", across, self.height + 16, "middle", label)
        self._add('<path class="axis" d="M0 {0:g}H{1:g}"/>', self.height, self.width)
        self._add(_TEXT, "label", self.width / 2, self.height + 34, "middle", self.x.label)
        self._add(_TEXT, "label", 2 - self.left, -18, "start", self.y.label)

    def render(self) -> Markup:
        """Return the chart as an SVG element."""
        markup = Markup(
            '<svg class="plot" role="img" aria-label="{}" viewBox="0 0 {} {}">'
            '<svg class="panel" x="{:g}" y="{:g}" width="{:g}" height="{:g}">{}</svg></svg>'
        )
        panel = (self.left, _TOP, self.width, self.height)
        marks = Markup("").join(self._axes + self._marks)
        return markup.format(self.title, _WIDTH, _HEIGHT, *panel, marks)


def _style(index: int) -> str:
    return f"s{index % len(DASHES)}"


def draw_history(series: Mapping[str, Points], *, title: str, y_axis: Axis) -> Markup:
    """Draw series of (epoch, value), by name; epochs count from 1."""
    epochs = [epoch for points in series.values() for epoch, _ in points]
    low, high = min(epochs), max(epochs)
    ticks = tuple(t for t in build_axis(low, high, min_step=1).ticks if low <= t <= high)
    if low == high:
        low, high = low - 1, high + 1
    chart = Chart(title, Axis(low=low, high=high, ticks=ticks, label="epoch"), y_axis)
    for i, (name, points) in enumerate(series.items()):
        chart.line(points, _style(i))
        for epoch, value in points:
            chart.dot(epoch, value, _style(i), f"{name}, epoch {epoch:g}: {value:.4g}")
    return chart.render()


def draw_unit_curves(
    curves: Mapping[str, Points],
    *,
    title: str,
    x_label: str,
    y_label: str,
    zoom_left: bool,
    chance: bool = False,
) -> Markup:
    """Draw curves in the unit square, by name, with an inset that magnifies a corner.

    It is the upper left corner (ROC) or the upper right one (precision-recall). There is no inset
    unless every curve reaches the corner: it could cover a curve. ``chance`` draws the diagonal.
    """
    chart = Chart(title, build_axis(0, 1, x_label), build_axis(0, 1, y_label))
    if chance:
        chart.line([(0, 0), (1, 1)], "reference")
    for i, points in enumerate(curves.values()):
        chart.line(points, _style(i))
    start = 0.0 if zoom_left else 1 - _ZOOM
    reached = [
        any(start <= x <= start + _ZOOM and y >= 1 - _ZOOM for x, y in points)
        for points in curves.values()
    ]
    if reached and all(reached):
        note = f"{x_label.split(' (')[0]} {'≤' if zoom_left else '≥'} {start or _ZOOM:g}"
        chart.magnify(start, 1 - _ZOOM, _ZOOM, at=0.44 if zoom_left else 0.08, note=note)
    return chart.render()


def draw_risk_coverage(selective: Mapping[str, Any], *, title: str) -> Markup:
    """Draw what :func:`brainray.metrics.compute_risk_coverage` returned, and its threshold."""
    curve, coverage, risk = selective["curve"], selective["coverage"], selective["risk"] or 0.0
    chart = Chart(
        title,
        build_axis(0, 1, "coverage: share of scans that get a class"),
        build_axis(0, max([0.01, *curve["risk"]]), "risk: share of these that is wrong"),
    )
    chart.line(list(zip(curve["coverage"], curve["risk"], strict=True)), _style(0))
    tip = f"{coverage:.1%} of the scans get a class, {risk:.1%} of these are wrong"
    chart.dot(coverage, risk, _style(0), tip, radius=5)
    return chart.render()


def draw_reliability(bins: Mapping[str, Sequence[Any]], *, title: str) -> Markup:
    """Draw accuracy against confidence, and below it the count of each bin.

    ``bins`` are those of :func:`brainray.metrics.compute_curves`.
    """
    base, highest = -0.3, max(*bins["count"], 1)  # the strip of counts lies below accuracy 0
    unit = build_axis(0, 1, "accuracy")
    chart = Chart(
        title,
        build_axis(0, 1, "confidence of the predicted class"),
        Axis(low=base, high=1, ticks=unit.ticks, label=unit.label),
    )
    chart.line([(0, 0), (1, 1)], "reference")
    chart.text(0, -0.06, "scans", "start")
    names = ("edges", "confidence", "accuracy", "count")
    for low, x, y, n in zip(*(bins[name] for name in names), strict=False):
        if not n:
            continue
        tip = f"{n:,} images: mean confidence {x:.3f}, accuracy {y:.3f}"
        chart.line([(x, x), (x, y)], "gap")
        chart.dot(x, y, "s0", tip, 4.5)
        high, top = low + 1 / len(bins["count"]), base + 0.19 * n / highest
        chart.bar((low, high), (base, top), tip)
        chart.text((low + high) / 2, top, f"{n:,}")
    return chart.render()


def draw_histogram(
    edges: Sequence[float], counts: Sequence[int], *, title: str, x_label: str
) -> Markup:
    """Draw the number of scans in each bin; ``edges`` has one more entry than ``counts``."""
    y_axis = build_axis(0, max(*counts, 1), "scans", min_step=1)
    chart = Chart(title, build_axis(0, 1, x_label), y_axis)
    for low, high, n in zip(edges[:-1], edges[1:], counts, strict=True):
        if n:
            chart.bar((low, high), (0, n), f"{low:.2f} to {high:.2f}: {n:,} scans")
    return chart.render()


def draw_progress(points: Points, *, title: str) -> Markup:
    """Draw the number of scans done after each number of seconds; at least one point."""
    end_s, done = points[-1]
    unit, scale = next(((u, s) for u, s in (("h", 3600), ("min", 60)) if end_s >= 3 * s), ("s", 1))
    high = end_s / scale or 1.0
    ticks = tuple(tick for tick in build_axis(0, high).ticks if tick <= high)
    x_axis = Axis(low=0, high=high, ticks=ticks, label=f"time since the start ({unit})")
    chart = Chart(title, x_axis, build_axis(0, max(done, 1), "scans", min_step=1))
    chart.line([(seconds / scale, count) for seconds, count in points], "s0")
    tip = f"{done:,} scans after {end_s / scale:.1f} {unit}"
    chart.dot(end_s / scale, done, "s0", tip, 4)
    return chart.render()
