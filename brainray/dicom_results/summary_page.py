"""The summary of a series on one page, drawn with Pillow.

At the left, from top to bottom: the answer; the evidence for each tumour; its probability on every
slice; flags, and what computed it. At the right: the key slices, with their class maps where the
bulk job wrote them. Nothing on it names a patient.
"""

from collections.abc import Sequence
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

from brainray.dicom_results.result import SeriesResult, list_tumours
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
    """Draw the page of a series; RGB, :data:`WIDTH_PX` wide and :data:`HEIGHT_PX` high."""
    return _Page(result).image


@lru_cache(maxsize=16)
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow is built without FreeType"
    return font


def _name(label: str) -> str:
    return "no tumour" if label == NO_TUMOUR else label


def _find_x(index: int, count: int, width: float) -> float:
    return (index + 0.5) / count * width


class _Page:
    """Draws the parts of a page, from top to bottom; each begins where the one above it ends."""

    def __init__(self, result: SeriesResult) -> None:
        self.result = result
        self.image = Image.new("RGB", (WIDTH_PX, HEIGHT_PX), _PAGE)
        self.draw = ImageDraw.Draw(self.image)
        classes = result.output.classes
        self.colours = {
            label: _COLOURS[classes.index(label) % len(_COLOURS)] for label in list_tumours(classes)
        }
        """Of each tumour."""
        self.draw.rectangle((0, 0, WIDTH_PX, 64), _NOTE)
        text = "RESEARCH USE ONLY - NOT FOR DIAGNOSTIC USE"
        self.write(WIDTH_PX / 2, 32, text, 30, _NOTE_INK, "mm")
        y = self.draw_answer(_TOP)
        y = self.draw_evidence(y + 24)
        y = self.draw_chart(y + 24)
        self.draw_remarks(y + 20)
        self.draw_key_slices(_TOP)

    def write(
        self, x: float, y: float, text: str, size: int, colour: str = _INK, anchor: str = "la"
    ) -> None:
        self.draw.text((x, y), text, colour, _font(size), anchor)

    def write_lines(self, lines: Sequence[str], y: int) -> int:
        """Write small text into the left column, and break lines that are wider than it."""
        wrapped = []
        for line in lines:
            wrapped.append("")
            for word in line.split(" "):
                longer = f"{wrapped[-1]} {word}".strip()
                if wrapped[-1] and _font(20).getlength(longer) > _LEFT_END - _LEFT:
                    wrapped.append(word)
                else:
                    wrapped[-1] = longer
        for number, line in enumerate(wrapped):
            self.write(_LEFT, y + 27 * number, line, 20, _MUTED)
        return y + 27 * len(wrapped)

    def draw_answer(self, y: int) -> int:
        summary, rule = self.result.summary, self.result.output.rule
        number = self.result.series_number
        facts = [f"series {number}" if number is not None else "one series"]
        facts += [summary["plane"]] if summary["plane"] else []
        facts.append(f"{summary['num_used']} of {summary['num_slices']} slices used")
        self.write(_LEFT, y, "AI summary of a series", 24, _MUTED)
        self.write(_LEFT_END, y, ", ".join(facts), 24, _MUTED, "ra")
        answer = summary["answer"]
        if not self.result.has_answer:
            title, text = "No answer", f"Indeterminate: {_WHY_NOT[summary['reason']]}."
        elif answer == NO_TUMOUR:
            title = "No tumour found"
            text = "No tumour has evidence. This does not mean that there is no abnormality."
        else:
            title = answer.capitalize()
            asked = f"at least {rule.threshold:.0%} on {rule.min_run} neighbouring positions"
            text = f"The only tumour with evidence ({asked})."
        self.write(_LEFT, y + 38, title, 64, self.colours.get(answer, _INK))
        self.write(_LEFT, y + 118, text, 24)
        return y + 150

    def draw_evidence(self, y: int) -> int:
        summary, rule = self.result.summary, self.result.output.rule
        start, end = 220, 600
        self.write(_LEFT, y, "Evidence", 26)
        self.write(end + 90, y + 4, "evidence", 20, _MUTED, "ra")
        self.write(_LEFT_END, y + 4, "longest run", 20, _MUTED, "ra")
        y += 40
        top = y
        for label, colour in self.colours.items():
            share = min(1.0, max(0.0, summary["evidence"][label]))
            self.write(_LEFT, y, label, 24)
            self.draw.rectangle((start, y + 4, end, y + 24), _PANEL)
            if share:
                self.draw.rectangle((start, y + 4, start + share * (end - start), y + 24), colour)
            self.write(end + 90, y, f"{share:.0%}", 24, anchor="ra")
            self.write(_LEFT_END, y, str(summary["longest_run"][label]), 24, anchor="ra")
            y += 34
        at = start + rule.threshold * (end - start)
        self.draw.line((at, top, at, y - 4), _INK, 2)
        text = (
            f"Evidence: mean probability of the most probable {rule.top_fraction:.0%} of "
            f"positions. Line: threshold, {rule.threshold:.0%}."
        )
        return self.write_lines([text], y + 4)

    def draw_chart(self, y: int) -> int:
        """Draw the probability of each tumour on every slice, and which are the key slices."""
        self.write(_LEFT, y, "Probability on each slice", 26)
        x = _LEFT_END
        for label in reversed(self.colours):
            self.write(x, y + 4, label, 22, self.colours[label], "ra")
            x -= int(_font(22).getlength(label)) + 24
        y += 38
        left = _LEFT + 64
        width = _LEFT_END - left
        self.image.paste(self.plot(width, _CHART_PX), (left, y))
        for share in (0.0, 0.5, 1.0):
            at = y + (1 - share) * (_CHART_PX - 1)
            self.write(left - 8, at, f"{share:.0%}", 20, _MUTED, "rm")
        indices = {row["scan_uri"]: index for index, row in enumerate(self.result.slices)}
        numbers = [
            (_find_x(indices[key.row["scan_uri"]], len(indices), width), number)
            for number, key in enumerate(self.result.key_slices, 1)
        ]
        free = 0.0
        for offset, number in sorted(numbers):  # side by side if the slices are close
            self.write(left + max(offset, free), y + _CHART_PX + 4, str(number), 20, _INK, "ma")
            free = max(offset, free) + 18
        text = f"{len(indices)} slices in the order of their positions; numbers: key slices"
        self.write(left, y + _CHART_PX + 30, text, 20, _MUTED)
        return y + _CHART_PX + 54

    def plot(self, width_px: int, height_px: int) -> Image.Image:
        slices = self.result.slices
        width, height = width_px * _SMOOTH, height_px * _SMOOTH
        chart = Image.new("RGB", (width, height), _PANEL)
        draw = ImageDraw.Draw(chart)

        def find_y(prob: float) -> float:
            return (1 - prob) * (height - 1)

        for share in (0.25, 0.5, 0.75):
            draw.line((0, find_y(share), width, find_y(share)), _RULE, _SMOOTH)
        keys = {key.row["scan_uri"] for key in self.result.key_slices}
        for index, row in enumerate(slices):
            if row["scan_uri"] in keys:
                x = _find_x(index, len(slices), width)
                draw.line((x, 0, x, height), _MUTED, _SMOOTH)
        at = find_y(self.result.output.rule.threshold)
        for x in range(0, width, 14 * _SMOOTH):
            draw.line((x, at, x + 7 * _SMOOTH, at), _INK, _SMOOTH)
        radius = (4 if len(slices) <= 60 else 2) * _SMOOTH
        for label, colour in self.colours.items():
            points = [
                (_find_x(index, len(slices), width), find_y(row[f"prob_{label}"]))
                for index, row in enumerate(slices)
            ]
            draw.line(points, colour, 3 * _SMOOTH, joint="curve")
            for x, y in points:
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), colour)
        return chart.resize((width_px, height_px), Image.Resampling.LANCZOS)

    def draw_key_slices(self, y: int) -> None:
        """Draw a row for each key slice: the slice, and the same with its class map."""
        keys = self.result.key_slices
        self.write(_RIGHT, y, "Key slices" if keys else "No key slices", 26)
        y += 38
        for number, key in enumerate(keys, 1):
            self.paste(key.picture.convert("RGB"), _RIGHT, y)
            if key.overlay is not None:
                self.paste(key.overlay, _RIGHT + _PICTURE_PX + _GAP, y)
                text = f"map: {_name(key.map_class)}"
                self.write(WIDTH_PX - _MARGIN, y + _PICTURE_PX + 4, text, 20, _MUTED, "ra")
            row, shown = key.row, self.result.shown_class
            parts = [f"{number}: {_name(shown)} {row[f'prob_{shown}']:.0%}"]
            parts += [] if key.instance.number is None else [f"image {key.instance.number}"]
            parts += [] if key.frame_number is None else [f"frame {key.frame_number}"]
            parts += [] if row["position_mm"] is None else [f"{row['position_mm']:.1f} mm"]
            self.write(_RIGHT, y + _PICTURE_PX + 4, ", ".join(parts), 20)
            y += _PICTURE_PX + 36

    def paste(self, picture: Image.Image, x: int, y: int) -> None:
        """Paste a picture into the middle of its black square."""
        shown = picture.copy()
        shown.thumbnail((_PICTURE_PX, _PICTURE_PX), Image.Resampling.LANCZOS)
        square = Image.new("RGB", (_PICTURE_PX, _PICTURE_PX))
        square.paste(shown, ((_PICTURE_PX - shown.width) // 2, (_PICTURE_PX - shown.height) // 2))
        self.image.paste(square, (x, y))

    def draw_remarks(self, y: int) -> None:
        result, summary = self.result, self.result.summary
        skipped = ", ".join(f"{count} {reason}" for reason, count in summary["skipped"].items())
        lines = [
            f"Flags: {', '.join(summary['flags']) or 'none'}",
            f"Slices not used: {skipped or 'none'}",
            f"Classifier {result.output.store.classifier_id}, {result.engine}, "
            f"{result.computed_at:%Y-%m-%d %H:%M}",
            "Slice evidence is no probability of the series or the patient. Class maps show where "
            "the network found evidence; they outline nothing. No person has checked this page.",
        ]
        self.write_lines([line.replace("_", " ") for line in lines], y)
