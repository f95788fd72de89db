"""The report of a data audit."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from brainray.images.decode import REJECTION_REASONS
from brainray.reports import charts
from brainray.reports.html import format_percent, render_page

_SPLITS = {"train": "Training", "val": "Validation", "test": "Test", "": "All"}


@dataclass(frozen=True, kw_only=True, slots=True)
class PicturedPair:
    """Two scans shown side by side: of each field the left scan's value, then the right's."""

    paths: tuple[str, str]
    """They may have any characters."""
    labels: tuple[str, str]
    images_png: tuple[bytes, bytes]
    correlation: float
    """Of their thumbnails."""
    is_exact: bool
    """The pixels are identical."""


def render_audit_report(
    *,
    title: str,
    document: Mapping[str, Any],
    galleries: Mapping[str, Sequence[PicturedPair]],
    configuration: Mapping[str, Any],
    facts: Mapping[str, str],
) -> str:
    """Render the report of a data audit as HTML.

    Parameters
    ----------
    document : mapping
        Content of ``audit.json``.
    galleries : mapping of str to sequence of PicturedPair
        ``exact`` and ``near`` across splits, ``exact_duplicates`` in a data set without splits,
        and ``conflicts``.
    facts : mapping of str to str
        Short labels and values for the header.
    """
    found = document["leaks"]
    leaks = {split: found[split] for split in ("test", "val") if split in found}
    shortcuts = document["shortcuts"]
    return render_page(
        "audit.html.j2",
        title=title,
        facts=facts,
        audit=document,
        splits=_SPLITS,
        reasons=REJECTION_REASONS,
        leaks=leaks,
        leak_names=[_SPLITS[split] for split in leaks],
        balance_names=[_SPLITS[split] for split in document["class_balance"]],
        held_out=next(iter(leaks), None),
        baselines={split: list(_list_baseline(leak)) for split, leak in leaks.items()},
        galleries={name: pairs for name, pairs in galleries.items() if pairs},
        shortcuts=list(_list_shortcuts(shortcuts)),
        # The last row is all properties together.
        strongest=max(shortcuts[:-1], key=lambda row: row["balanced_accuracy"], default=None),
        chance=shortcuts[0]["chance"] if shortcuts else None,
        unit=charts.build_axis(0, 1),
        configuration=configuration,
    )


def _list_baseline(leak: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """List the accuracy of the nearest thumbnail's class by the correlation with it."""
    for row in leak["baseline_1nn"]:
        low, high = row["low"], row["high"]
        label = f"{low} to {high}"
        if high is None:
            label = "All held-out scans" if low is None else f"{low} or more: near duplicates"
        elif low is None:
            label = f"Below {high}"
        share = "" if row["n"] == leak["n"] else f", {format_percent(row['n'] / leak['n'])}"
        yield {
            "label": label,
            "note": f"{row['n']:,} scans{share}",
            "value": row["accuracy"],
            "interval": row["accuracy_ci95"],
            "css": "" if low is None and high is None else "hollow",
        }


def _list_shortcuts(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in rows:
        note = "above chance" if row["is_above_chance"] else "no better than chance"
        yield {
            "label": row["property"].capitalize(),
            "note": "the same in all scans" if row["is_constant"] else note,
            "value": row["balanced_accuracy"],
            "interval": row["balanced_accuracy_ci95"],
            "css": "" if row["is_above_chance"] else "hollow quiet",
        }
