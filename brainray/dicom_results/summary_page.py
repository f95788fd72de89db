"""The summary of a series on one page, drawn with Pillow.

At the left, from top to bottom: the answer; the evidence for each tumour; its probability on every
slice; flags, and what computed it. At the right: the key slices, with their class maps where the
bulk job wrote them. Nothing on it names a patient.
"""

from collections.abc import Sequence
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

from brainray.dicom_results.result import KeySlice, SeriesResult, list_tumours
from brainray.inference.series import NO_TUMOUR

WIDTH_PX, HEIGHT_PX = 1600, 1200
"""Of a landscape screen: viewers fit a picture to it."""
_MARGIN = 40
_LEFT, _LEFT_END = _MARGIN, 880
"""Where the left column begins and ends."""
_RIGHT, _PICTURE_PX, _GAP = 920, 310, 20
_TOP = 92
_CHART_PX = 400
_SMOOTH = 3
"""The chart is drawn so many times larger, since Pillow's lines have steps."""

_PAGE, _PANEL, _INK, _MUTED, _RULE = "#0e1319", "#161d25", "#e7ecf1", "#a2aebb", "#2d3843"
_NOTE, _NOTE_INK = "#ffd78c", "#2e230d"
_COLOURS = ("#62b0f2", "#f0904e", "#45c9a1", "#dc96d5", "#d3bf45", "#f58a9b", "#a3abff", "#a9b4c0")

_WHY_NOT = {
    "too_few_slices": "too few slices were classified",
    "several_classes": "several tumours have evidence",
    "weak_evidence": "the evidence is weak",
}


def draw_page(result: SeriesResult) -> Image.Image:
    """Draw the page of a series.

    Parameters
    ----------
    result : SeriesResult

    Returns
    -------
    Image
        RGB, :data:`WIDTH_PX` wide and :data:`HEIGHT_PX` high.
    """
    page = Image.new("RGB", (WIDTH_PX, HEIGHT_PX), _PAGE)
    draw = ImageDraw.Draw(page)
    _draw_notice(draw)
    y = _draw_answer(draw, result, _TOP)
    y = _draw_evidence(draw, result, y + 24)
    y = _draw_chart(page, draw, result, y + 24)
    _draw_remarks(draw, result, y + 20)
    _draw_key_slices(page, draw, result, _TOP)
    return page


@lru_cache(maxsize=16)
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow is built without FreeType"
    return font


def _write(
    draw: ImageDraw.ImageDraw,
    x: float,
    y: float,
    text: str,
    size: int,
    colour: str = _INK,
    anchor: str = "la",
) -> None:
    draw.text((x, y), text, colour, _font(size), anchor)


def _name(label: str) -> str:
    return "no tumour" if label == NO_TUMOUR else label


def _colour(result: SeriesResult, label: str) -> str:
    return _COLOURS[result.output.classes.index(label) % len(_COLOURS)]


# ---- from top to bottom --------------------------------------------------------------------------


def _draw_notice(draw: ImageDraw.ImageDraw) -> None:
    draw.rectangle((0, 0, WIDTH_PX, 64), _NOTE)
    text = "RESEARCH USE ONLY - NOT FOR DIAGNOSTIC USE"
    _write(draw, WIDTH_PX / 2, 32, text, 30, _NOTE_INK, "mm")


def _draw_answer(draw: ImageDraw.ImageDraw, result: SeriesResult, y: int) -> int:
    """Draw what the series says; return where the next part begins."""
    summary, rule = result.summary, result.output.rule
    number = result.source.series_number
    facts = [f"series {number}" if number is not None else "one series"]
    facts += [summary["plane"]] if summary["plane"] else []
    facts.append(f"{summary['num_used']} of {summary['num_slices']} slices used")
    _write(draw, _LEFT, y, "AI summary of a series", 24, _MUTED)
    _write(draw, _LEFT_END, y, ", ".join(facts), 24, _MUTED, "ra")
    answer = summary["answer"]
    asked = f"at least {rule.threshold:.0%} on {rule.min_run} neighbouring positions"
    if not result.has_answer:
        title, text = "No answer", f"Indeterminate: {_WHY_NOT[summary['reason']]}."
    elif answer == NO_TUMOUR:
        title = "No tumour found"
        text = "No tumour has evidence. This does not mean that there is no abnormality."
    else:
        title = answer.capitalize()
        text = f"The only tumour with evidence ({asked})."
    _write(draw, _LEFT, y + 38, title, 64, _colour_of_title(result))
    _write(draw, _LEFT, y + 118, text, 24)
    return y + 150


def _colour_of_title(result: SeriesResult) -> str:
    answer = result.summary["answer"]
    return _colour(result, answer) if answer in list_tumours(result.output.classes) else _INK


def _draw_evidence(draw: ImageDraw.ImageDraw, result: SeriesResult, y: int) -> int:
    summary, rule = result.summary, result.output.rule
    start, end = 220, 600
    _write(draw, _LEFT, y, "Evidence", 26)
    _write(draw, end + 90, y + 4, "evidence", 20, _MUTED, "ra")
    _write(draw, _LEFT_END, y + 4, "longest run", 20, _MUTED, "ra")
    y += 40
    top = y
    for label in list_tumours(result.output.classes):
        share = min(1.0, max(0.0, summary["evidence"][label]))
        _write(draw, _LEFT, y, label, 24)
        draw.rectangle((start, y + 4, end, y + 24), _PANEL)
        if share:
            draw.rectangle(
                (start, y + 4, start + share * (end - start), y + 24), _colour(result, label)
            )
        _write(draw, end + 90, y, f"{share:.0%}", 24, anchor="ra")
        _write(draw, _LEFT_END, y, str(summary["longest_run"][label]), 24, anchor="ra")
        y += 34
    at = start + rule.threshold * (end - start)
    draw.line((at, top, at, y - 4), _INK, 2)
    text = (
        f"Evidence: mean probability of the most probable {rule.top_fraction:.0%} of positions. "
        f"Line: threshold, {rule.threshold:.0%}."
    )
    return _write_lines(draw, [text], y + 4)


def _draw_chart(page: Image.Image, draw: ImageDraw.ImageDraw, result: SeriesResult, y: int) -> int:
    """Draw the probability of each tumour on every slice, and which are the key slices."""
    _write(draw, _LEFT, y, "Probability on each slice", 26)
    x = _LEFT_END
    for label in reversed(list_tumours(result.output.classes)):
        _write(draw, x, y + 4, label, 22, _colour(result, label), "ra")
        x -= int(_font(22).getlength(label)) + 24
    y += 38
    left = _LEFT + 64
    width = _LEFT_END - left
    page.paste(_plot(result, width, _CHART_PX), (left, y))
    for share in (0.0, 0.5, 1.0):
        at = y + (1 - share) * (_CHART_PX - 1)
        _write(draw, left - 8, at, f"{share:.0%}", 20, _MUTED, "rm")
    places = {row["scan_uri"]: index for index, row in enumerate(result.slices)}
    numbers = [
        (_find_x(places[key.row["scan_uri"]], len(places), width), number)
        for number, key in enumerate(result.key_slices, 1)
    ]
    free = 0.0
    for offset, number in sorted(numbers):  # side by side if the slices are close
        _write(draw, left + max(offset, free), y + _CHART_PX + 4, str(number), 20, _INK, "ma")
        free = max(offset, free) + 18
    text = f"{len(places)} slices in the order of their positions; numbers: key slices"
    _write(draw, left, y + _CHART_PX + 30, text, 20, _MUTED)
    return y + _CHART_PX + 54


def _find_x(index: int, count: int, width: float) -> float:
    return (index + 0.5) / count * width


def _plot(result: SeriesResult, width: int, height: int) -> Image.Image:
    size = (width * _SMOOTH, height * _SMOOTH)
    chart = Image.new("RGB", size, _PANEL)
    draw = ImageDraw.Draw(chart)

    def find_y(prob: float) -> float:
        return (1 - prob) * (size[1] - 1)

    for share in (0.25, 0.5, 0.75):
        draw.line((0, find_y(share), size[0], find_y(share)), _RULE, _SMOOTH)
    count = len(result.slices)
    keys = {key.row["scan_uri"] for key in result.key_slices}
    for index, row in enumerate(result.slices):
        if row["scan_uri"] in keys:
            x = _find_x(index, count, size[0])
            draw.line((x, 0, x, size[1]), _MUTED, _SMOOTH)
    at = find_y(result.output.rule.threshold)
    for x in range(0, size[0], 14 * _SMOOTH):
        draw.line((x, at, x + 7 * _SMOOTH, at), _INK, _SMOOTH)
    for label in list_tumours(result.output.classes):
        points = [
            (_find_x(index, count, size[0]), find_y(row[f"prob_{label}"]))
            for index, row in enumerate(result.slices)
        ]
        colour = _colour(result, label)
        draw.line(points, colour, 3 * _SMOOTH, joint="curve")
        radius = (4 if count <= 60 else 2) * _SMOOTH
        for x, y in points:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), colour)
    return chart.resize((width, height), Image.Resampling.LANCZOS)


def _draw_key_slices(
    page: Image.Image, draw: ImageDraw.ImageDraw, result: SeriesResult, y: int
) -> None:
    """Draw a row for each key slice: the slice, and the same with its class map."""
    _write(draw, _RIGHT, y, "Key slices" if result.key_slices else "No key slices", 26)
    y += 38
    beside = _RIGHT + _PICTURE_PX + _GAP
    for number, key in enumerate(result.key_slices, 1):
        _paste(page, key.picture.convert("RGB"), _RIGHT, y)
        if key.overlay is not None:
            _paste(page, key.overlay, beside, y)
        y += _PICTURE_PX
        _write(draw, _RIGHT, y + 4, _describe_key(number, key, result), 20)
        if key.overlay is not None:
            text = f"map: {_name(key.map_class)}"
            _write(draw, WIDTH_PX - _MARGIN, y + 4, text, 20, _MUTED, "ra")
        y += 36


def _paste(page: Image.Image, picture: Image.Image, x: int, y: int) -> None:
    """Paste a picture into the middle of its black square."""
    shown = picture.copy()
    shown.thumbnail((_PICTURE_PX, _PICTURE_PX), Image.Resampling.LANCZOS)
    square = Image.new("RGB", (_PICTURE_PX, _PICTURE_PX))
    square.paste(shown, ((_PICTURE_PX - shown.width) // 2, (_PICTURE_PX - shown.height) // 2))
    page.paste(square, (x, y))


def _describe_key(number: int, key: KeySlice, result: SeriesResult) -> str:
    row, shown = key.row, result.shown_class
    parts = [f"{number}: {_name(shown)} {row[f'prob_{shown}']:.0%}"]
    parts += [] if key.instance.number is None else [f"image {key.instance.number}"]
    parts += [] if key.frame_number is None else [f"frame {key.frame_number}"]
    parts += [] if row["position_mm"] is None else [f"{row['position_mm']:.1f} mm"]
    return ", ".join(parts)


def _draw_remarks(draw: ImageDraw.ImageDraw, result: SeriesResult, y: int) -> None:
    summary, output = result.summary, result.output
    skipped = ", ".join(f"{count} {reason}" for reason, count in summary["skipped"].items())
    lines = [
        f"Flags: {', '.join(summary['flags']) or 'none'}",
        f"Slices not used: {skipped or 'none'}",
        f"Classifier {output.store.classifier_id}, {result.engine}, "
        f"{result.computed_at:%Y-%m-%d %H:%M}",
        "Slice evidence is no probability of the series or the patient. Class maps show where the "
        "network found evidence; they outline nothing. No person has checked this page.",
    ]
    _write_lines(draw, [line.replace("_", " ") for line in lines], y)


def _write_lines(draw: ImageDraw.ImageDraw, lines: Sequence[str], y: int) -> int:
    """Write small text into the left column; return where it ends."""
    for line in _wrap(lines, 20):
        _write(draw, _LEFT, y, line, 20, _MUTED)
        y += 27
    return y


def _wrap(lines: Sequence[str], size: int) -> list[str]:
    """Break lines that are wider than the left column."""
    wrapped = []
    for line in lines:
        current = ""
        for word in line.split(" "):
            longer = f"{current} {word}".strip()
            if current and _font(size).getlength(longer) > _LEFT_END - _LEFT:
                wrapped.append(current)
                longer = word
            current = longer
        wrapped.append(current)
    return wrapped
