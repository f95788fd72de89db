"""Reports from templates: the environment, and how values are written.

A report is one HTML file that opens offline, in light, dark and print. Style, charts and images
are inside it; it has no script and loads nothing.
"""

import base64
import json
import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from brainray import runlog
from brainray.reports import charts

MISSING = "\N{EN DASH}"
"""Shown for a value that is unknown or undefined."""

_NBSP = "\N{NO-BREAK SPACE}"


def render_page(template: str, **page: Any) -> str:  # noqa: ANN401
    """Render a template that extends ``page.html.j2``, with its variables.

    The document can be encoded as UTF-8 whatever its values are.
    """
    return build_environment(format_text).get_template(template).render(contents=[], **page)


def build_environment(finalize: Callable[[object], object]) -> Environment:
    """Build the template environment; ``finalize`` escapes a value for the templates' language."""
    environment = Environment(
        loader=PackageLoader("brainray.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["dashes"] = charts.DASHES
    environment.filters.update(
        number=format_number,
        percent=format_percent,
        interval=format_interval,
        duration=format_duration,
        setting=format_setting,
        flatten=flatten,
        base64=lambda data: base64.b64encode(data).decode("ascii"),
    )
    return environment


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
    """Format a number; :data:`MISSING` for None or a value that is not finite."""
    if value is None or not math.isfinite(value):
        return MISSING
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.{digits}f}".replace("-", "\N{MINUS SIGN}")


def format_percent(share: float | None) -> str:
    """Format a fraction as a percentage; what is not 0 or 1 is never rounded to it."""
    if share is not None and 0 < share < 0.0005:
        return f"<{_NBSP}0.1{_NBSP}%"
    if share is not None and 0.9995 <= share < 1:
        return f">{_NBSP}99.9{_NBSP}%"
    number = format_number(None if share is None else 100.0 * share, 1)
    return number if number == MISSING else f"{number}{_NBSP}%"


def format_interval(interval: Sequence[float | None] | None, *, percent: bool = False) -> str:
    """Format a 95 % interval as ``low–high``; empty if either end is unknown."""
    if interval is None:
        return ""
    scale, digits = (100.0, 1) if percent else (1.0, 3)
    ends = [format_number(None if end is None else scale * end, digits) for end in interval]
    return "" if MISSING in ends else "\N{EN DASH}".join(ends) + (f"{_NBSP}%" if percent else "")


def format_duration(seconds: float | None) -> str:
    """Format a duration; below a minute with one decimal."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    text = f"{seconds:.1f} s" if seconds < 59.95 else runlog.format_duration(seconds)
    return text.replace(" ", _NBSP)


def format_text(value: object) -> object:
    """Make text safe to show and to encode; leave anything else as it is.

    Line breaks, control characters, lone surrogates (undecodable file names) and characters
    that reorder text are escaped, so that a path cannot look like another one.
    """
    if value is None:
        return MISSING
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "".join(
        c
        if c.isprintable() or unicodedata.category(c) == "Zs"
        else c.encode("unicode_escape").decode()
        for c in value
    )
