"""The report of a search for a recipe's numbers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from brainray.reports import plots
from brainray.reports.page import list_settings, render_page, select_sections

LABELS = {
    "learning_rate": "learning rate",
    "weight_decay": "weight decay",
    "grey_strength": "grey augmentation, times the recipe's",
    "geometric_strength": "geometric augmentation, times the recipe's",
    "num_epochs": "epochs",
}


def render_tuning(result: Mapping[str, Any]) -> str:
    """Render the report of a search.

    Parameters
    ----------
    result : mapping
        What :func:`brainray.training.tune.tune` returns.

    Returns
    -------
    str
        A whole HTML document.
    """
    configurations = result["configurations"]
    whole = [one for one in configurations if one["percent_done"] == 100]
    page: dict[str, Any] = {
        "title": "brainray tuning report",
        "facts": {
            "Recipe": result["recipe"],
            "Score": result["monitor"],
            "Configurations": f"{len(configurations)}, of them trained to the end: {len(whole)}",
        },
        "labels": LABELS,
        "configurations": configurations,
        "figures": draw_parameters(configurations),
        "settings": list_settings({"All settings": result["options"]}),
    }
    headings = {
        "table": (True, "Configurations"),
        "figures": (page["figures"], "Score by parameter"),
        "configuration": (page["settings"], "Configuration"),
        "reading": (True, "How to read this"),
    }
    page["sections"] = select_sections(headings)
    return render_page("tune.html.j2", page)


def draw_parameters(configurations: Sequence[Mapping[str, Any]]) -> dict[str, Markup]:
    """Draw the score of each configuration by each parameter that varies, by its label."""
    figures = {}
    for name, label in LABELS.items():
        points = [
            (float(one["parameters"][name]), one["score"], one["percent_done"])
            for one in configurations
        ]
        if len({value for value, _, _ in points}) > 1:
            figures[label] = _draw_parameter(label, points)
    return figures


def _draw_parameter(label: str, points: Sequence[tuple[float, float, int]]) -> Markup:
    values = [math.log10(value) for value, _, _ in points]
    scores = [score for _, score, _ in points]
    panel = plots.Panel(
        x=plots.build_axis(min(values), max(values), f"{label} (log10)"),
        y=plots.build_axis(min(scores), max(scores), "score"),
    )
    dots = [
        panel.dot(
            math.log10(value),
            score,
            "s0" if percent_done == 100 else "s1",
            f"{label} {value:.3g}: {score:.4f}, {percent_done} % of the epochs",
            4,
        )
        for value, score, percent_done in points
    ]
    return plots.draw_panel(f"Score by {label}", panel, dots)
