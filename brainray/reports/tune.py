"""The report of a hyperparameter search."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from brainray.reports import charts
from brainray.reports.html import render_page

_LABELS = {
    "learning_rate": "learning rate",
    "weight_decay": "weight decay",
    "grey_strength": "grey augmentation, times the recipe's",
    "geometric_strength": "geometric augmentation, times the recipe's",
    "num_epochs": "epochs",
}


def render_tuning_report(result: Mapping[str, Any]) -> str:
    """Render what :func:`brainray.training.tune.tune` returned as an HTML document."""
    configurations = result["configurations"]
    complete = sum(one["percent_done"] == 100 for one in configurations)
    return render_page(
        "tune.html.j2",
        title="brainray tuning report",
        facts={
            "Recipe": result["recipe"],
            "Score": result["monitor"],
            "Configurations": f"{len(configurations)}, of which {complete} trained to the end",
        },
        labels=_LABELS,
        configurations=configurations,
        figures={
            label: _draw_scores(configurations, name, label)
            for name, label in _LABELS.items()
            if len({one["parameters"][name] for one in configurations}) > 1
        },
        options=result["options"],
    )


def _draw_scores(configurations: Sequence[Mapping[str, Any]], name: str, label: str) -> Markup:
    values = [math.log10(one["parameters"][name]) for one in configurations]
    scores = [one["score"] for one in configurations]
    chart = charts.Chart(
        f"Score by {label}",
        charts.build_axis(min(values), max(values), f"{label} (log10)"),
        charts.build_axis(min(scores), max(scores), "score"),
    )
    for one, value, score in zip(configurations, values, scores, strict=True):
        done = one["percent_done"]
        tip = f"{label} {10**value:.3g}: {score:.4f}, {done} % of the epochs"
        chart.dot(value, score, "s0" if done == 100 else "s1", tip, 4)
    return chart.render()
