"""The report of a data audit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from brainray.images.decode import REJECTION_REASONS
from brainray.reports import plots
from brainray.reports.page import format_share, list_settings, render_page, select_sections

_SPLITS = {"train": "Training", "val": "Validation", "test": "Test", "": "All"}
_HELD_OUT = ("test", "val")  # the first one present makes the headline
_GALLERIES = {
    "exact": (
        "The same picture on both sides",
        "Left a held-out scan, right a training scan with exactly the same pixels.",
    ),
    "near": (
        "Near duplicates across splits",
        "Left a held-out scan, right the training scan most like it. From the least alike upwards.",
    ),
    "exact_duplicates": (
        "The same picture twice",
        "Two scans of the data set with exactly the same pixels.",
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class PicturedPair:
    """Two scans to be shown side by side; of each field the left one's value, then the right's."""

    paths: tuple[str, str]
    """Where the scans came from; may hold anything a file name may."""
    labels: tuple[str, str]
    """Names of their classes."""
    splits: tuple[str, str]
    """train, val, test, or empty."""
    images_png: tuple[bytes, bytes]
    """The scans as encoded PNGs."""
    correlation: float
    """Of their thumbnails."""
    is_copy: bool
    """The pixels are identical."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A score with its interval, as a row of a figure."""

    label: str
    """What was measured."""
    note: str
    """On what, or what it means."""
    value: float | None
    """In [0, 1]; None if unknown."""
    interval: tuple[float, float] | None
    """95 % interval; None if unknown."""
    is_hollow: bool = False
    """Drawn as a ring: of less weight."""


def render_audit(
    *,
    title: str,
    document: Mapping[str, Any],
    galleries: Mapping[str, Sequence[PicturedPair]],
    configuration: Mapping[str, Any],
    facts: Mapping[str, str],
) -> str:
    """Render the report of a data audit.

    Parameters
    ----------
    title : str
        Heading of the page.
    document : mapping
        Content of ``audit.json``.
    galleries : mapping of str to sequence of PicturedPair
        Pairs to show: ``exact`` and ``near`` across splits, ``copies`` in a data set without
        splits, and ``conflicts``.
    configuration : mapping
        The full configuration; may be nested.
    facts : mapping of str to str
        Short labels and values for the header.

    Returns
    -------
    str
        A whole HTML document, encodable as UTF-8 whatever the paths hold.
    """
    leaks = {split: document["leaks"][split] for split in _HELD_OUT if split in document["leaks"]}
    page: dict[str, Any] = {
        "title": title,
        "facts": facts,
        "audit": document,
        "split_names": _SPLITS,
        "reasons": REJECTION_REASONS,
        "leaks": leaks,
        "leak_heads": [_SPLITS[split] for split in leaks],
        "balance_heads": [_SPLITS[split] for split in document["class_balance"]],
        "held_out": next(iter(leaks), None),
        "baselines": {split: _list_baseline(leak) for split, leak in leaks.items()},
        "galleries": {
            name: (*words, galleries.get(name, ()))
            for name, words in _GALLERIES.items()
            if galleries.get(name)
        },
        "conflicts": galleries.get("conflicts", ()),
        "shortcuts": _list_shortcuts(document["shortcuts"]),
        "strongest": _find_strongest(document["shortcuts"]),
        "chance": next((row["chance"] for row in document["shortcuts"]), None),
        "unit": plots.build_axis(0, 1),
        "settings": list_settings({"All settings": configuration}),
    }
    has_conflicts = any(
        document[name]["num_mixed"] for name in ("exact_duplicates", "near_duplicates", "groups")
    )
    page["has_conflicts"] = has_conflicts
    headings = {
        "short": (True, "In short"),
        "leaks": (leaks, "Twins across splits"),
        "baseline": (leaks, "What memory alone would score"),
        "groups": (True, "Copies and look-alikes"),
        "pictures": (page["galleries"], "Pairs to look at"),
        "conflicts": (has_conflicts, "Label conflicts"),
        "shortcuts": (page["shortcuts"], "Shortcuts"),
        "balance": (True, "Class balance"),
        "resolution": (True, "Sizes and formats"),
        "unreadable": (document["unreadable"], "Files that cannot be read"),
        "split": (document.get("split"), "The new split"),
        "configuration": (page["settings"], "Settings"),
        "reading": (True, "How to read this"),
    }
    page["sections"] = select_sections(headings)
    return render_page("audit.html.j2", page)


def _list_baseline(leak: Mapping[str, Any]) -> list[Estimate]:
    """List the accuracy of the nearest thumbnail's class, by how near that thumbnail is."""
    rows = []
    for row in leak["baseline_1nn"]:
        share = format_share(row["n"] / leak["n"])
        rows.append(
            Estimate(
                label=_describe_bounds(row["low"], row["high"]),
                note=f"{row['n']:,} scans" + ("" if row["n"] == leak["n"] else f", {share}"),
                value=row["accuracy"],
                interval=_interval(row["accuracy_ci95"]),
                is_hollow=row["low"] is not None or row["high"] is not None,
            )
        )
    return rows


def _describe_bounds(low: float | None, high: float | None) -> str:
    if low is None and high is None:
        return "All held-out scans"
    if high is None:
        return f"{low} or more: a near duplicate"
    return f"Below {high}" if low is None else f"{low} to {high}"


def _interval(given: Sequence[float] | None) -> tuple[float, float] | None:
    return (given[0], given[1]) if given else None


def _list_shortcuts(rows: Sequence[Mapping[str, Any]]) -> list[Estimate]:
    listed = []
    for row in rows:
        note = "above chance" if row["is_above_chance"] else "no better than chance"
        listed.append(
            Estimate(
                label=row["property"].capitalize(),
                note="the same in all scans" if row["is_constant"] else note,
                value=row["balanced_accuracy"],
                interval=_interval(row["balanced_accuracy_ci95"]),
                is_hollow=not row["is_above_chance"],
            )
        )
    return listed


def _find_strongest(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the single trait that predicts best, all of them together aside."""
    return max(rows[:-1], key=lambda row: row["balanced_accuracy"], default=None)
