"""What the pages share: the template environment, and how values are written.

A page is one HTML file that opens offline, in light, dark and print. It holds no script and
loads nothing: its style, figures and pictures are in it.
"""

import base64
import json
import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from brainray.reports import plots

MISSING = "\N{EN DASH}"
"""Shown for a value that is unknown or undefined."""

_NBSP = "\N{NO-BREAK SPACE}"


def render_page(template: str, page: Mapping[str, Any]) -> str:
    """Render one of the page templates.

    Parameters
    ----------
    template : str
        File name of a template that extends ``page.html.j2``.
    page : mapping
        Its variables, among them ``title``, ``facts`` and ``sections``.

    Returns
    -------
    str
        A whole HTML document, encodable as UTF-8 whatever its values hold.
    """
    return build_environment(format_text).get_template(template).render(page)


def select_sections(headings: Mapping[str, tuple[object, str]]) -> dict[str, str]:
    """Name the sections that have content: anchor to heading, in page order.

    Parameters
    ----------
    headings : mapping of str to (object, str)
        Content, and heading, by anchor; a section whose content is falsy is left out.
    """
    return {anchor: heading for anchor, (content, heading) in headings.items() if content}


def list_settings(tables: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """List dotted names and values, by caption; a table that is empty is left out."""
    flat = {caption: flatten(values) for caption, values in tables.items()}
    return {
        caption: {name: format_setting(value) for name, value in values.items()}
        for caption, values in flat.items()
        if values
    }


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to dotted names; other values stay as they are."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def format_setting(value: object) -> str:
    """Format any value of a configuration."""
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def format_number(value: float | None, digits: int = 3) -> str:
    """Format a metric; :data:`MISSING` for None or a value that is not finite."""
    if value is None or not math.isfinite(value):
        return MISSING
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.{digits}f}".replace("-", "\N{MINUS SIGN}")


def format_percent(value: float | None) -> str:
    """Format a fraction as a percentage with one decimal."""
    number = format_number(None if value is None else 100.0 * value, 1)
    return number if number == MISSING else f"{number}{_NBSP}%"


def format_share(share: float | None) -> str:
    """Format a share of counted things; a few never round to none, nor most to all."""
    if share is not None and 0 < share < 0.0005:
        return f"<{_NBSP}0.1{_NBSP}%"
    if share is not None and 0.9995 <= share < 1:
        return f">{_NBSP}99.9{_NBSP}%"
    return format_percent(share)


def format_interval(interval: Sequence[float | None] | None, *, percent: bool = False) -> str:
    """Format a 95 % interval as ``low–high``; empty if either end is unknown."""
    if interval is None:
        return ""
    scale, digits = (100.0, 1) if percent else (1.0, 3)
    ends = [format_number(None if end is None else scale * end, digits) for end in interval]
    return "" if MISSING in ends else "\N{EN DASH}".join(ends) + (f"{_NBSP}%" if percent else "")


def format_duration(seconds: float | None) -> str:
    """Format a duration in its two largest units, or in seconds below two minutes."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 120:
        return f"{format_number(float(seconds), 1)}{_NBSP}s"
    minutes, rest_s = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes}{_NBSP}min {rest_s}{_NBSP}s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,}{_NBSP}h {minutes}{_NBSP}min"


def format_moment(moment: str | None) -> str | None:
    """Format an ISO 8601 moment to the second; leave what is none as it is."""
    try:
        parsed = datetime.fromisoformat(moment or "")
    except ValueError:
        return moment
    return f"{parsed:%Y-%m-%d %H:%M:%S} {parsed.tzname() or ''}".rstrip()


def format_bytes(num_bytes: float | None) -> str:
    """Format a number of bytes in the largest binary unit that it fills."""
    if num_bytes is None or not math.isfinite(num_bytes):
        return MISSING
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{format_number(num_bytes / size, 2)}{_NBSP}{unit}"
    return f"{num_bytes:,.0f}{_NBSP}B"


def format_text(text: object) -> object:
    """Make text safe to show and to encode; leave anything else as it is.

    Line breaks, control characters, lone surrogates (undecodable file names) and characters
    that reorder text are written as escapes, so that a path cannot look like another one.
    """
    if text is None:
        return MISSING
    if not isinstance(text, str) or isinstance(text, Markup):
        return text
    return "".join(
        c
        if c.isprintable() or unicodedata.category(c) == "Zs"
        else c.encode("unicode_escape").decode()
        for c in text
    )


def build_environment(finalize: Callable[[object], object]) -> Environment:
    """Build the template environment.

    Parameters
    ----------
    finalize : callable
        Makes a value safe to show in the language of the templates.
    """
    environment = Environment(
        loader=PackageLoader("brainray", "reports"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["dashes"] = plots.DASHES
    environment.filters.update(
        number=format_number,
        percent=format_percent,
        share=format_share,
        interval=format_interval,
        duration=format_duration,
        moment=format_moment,
        bytes=format_bytes,
        base64=lambda data: base64.b64encode(data).decode("ascii"),
    )
    return environment
