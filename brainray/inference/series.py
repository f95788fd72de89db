"""Slice evidence: summarise the predictions for the slices of a series by one rule.

A network that errs on one slice in a hundred predicts a tumour on some slice of nearly every
series. So neither the maximum over slices nor the product of their probabilities is meaningful.
The rule gives a series a class if the mean probability of its most probable slices is high, and if
several neighbouring slices agree.

Slices at one position, such as the volumes of a diffusion series, count once, with their mean
probabilities. Slices are neighbours if they have one direction and no slice is missing between
them. If the header gives no positions, frame numbers and names define the order.

The evidence is a mean of probabilities that are calibrated for slices. It is not a probability for
the series or the patient. ``brainray calibrate-series`` fits the thresholds to labelled series.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, groupby, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainray.errors import ConfigError

NO_TUMOUR = "notumor"
"""The class without a tumour."""
INDETERMINATE = "indeterminate"
NUM_KEY_SLICES = 3
DUPLICATE = "duplicate"
"""A slice is not used if the series already has the same object or frame."""

MAX_LOCALIZER_SLICES = 30
"""A series with several planes and at most so many slices is a localizer."""
SAME_DIRECTION = math.cos(math.radians(5))
"""Least cosine between the rows, and between the columns, of slices of one direction."""
SAME_PLANE = math.cos(math.radians(30))
"""Least cosine between the normals of slices of one plane."""
SAME_POSITION_MM = 0.05
"""Slices of one direction closer than this have one position."""
GAP = 1.5
"""A slice is missing if a distance exceeds the median distance by this factor."""

_Row = dict[str, Any]
_Position = list[_Row]
"""Slices of one direction at one position."""
_Stack = list[_Position]
"""Neighbouring positions, in order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SeriesRule:
    """The rule by which a series gets a class."""

    top_fraction: float = 0.1
    """A class's evidence is its mean probability over this share of the positions, those where it
    is most probable (above 0, up to 1)."""
    threshold: float = 0.5
    """Minimum evidence, and minimum probability at each position of a run (0 to 1)."""
    min_run: int = 3
    """Neighbouring positions at or above the threshold that a class needs (a run)."""
    min_slices: int = 5
    """Positions with probabilities; with fewer a series is indeterminate."""

    def __post_init__(self) -> None:
        if not 0 < self.top_fraction <= 1:
            raise ConfigError(f"top_fraction must be in (0, 1], got {self.top_fraction}.")
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"threshold must be in [0, 1], got {self.threshold}.")
        for name in ("min_run", "min_slices"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")


def summarise_series(
    slices: Sequence[_Row], classes: Sequence[str], rule: SeriesRule | None = None
) -> dict[str, Any]:
    """Summarise the predictions for the slices of a series.

    Parameters
    ----------
    slices : sequence of dict
        Rows of one series, in any order, with the columns ``scan_uri``, ``reason``,
        ``prob_<class>`` (None where rejected), ``sop_instance``, ``frame``, ``plane``,
        ``position_mm``, ``orientation`` and ``flags``, of
        :func:`brainray.inference.schema.build_schema`.
    classes : sequence of str
        In class order.
    rule : SeriesRule, optional

    Returns
    -------
    dict
        ``answer``, a class or "indeterminate"; ``reason``, why it is indeterminate, else None;
        ``evidence`` and ``longest_run`` (in positions), a number for each class; ``key_slices``,
        the ``scan_uri`` of at most :data:`NUM_KEY_SLICES` slices with the highest probability of
        the answer, or of the class with most evidence, none of them neighbours; ``num_slices``,
        ``num_used`` and ``num_positions``; ``skipped``, a number for each reason; ``plane``;
        ``flags``, sorted.
    """
    rule = rule or SeriesRule()
    used, skipped = _choose_slices(slices, classes)
    groups = _group_by_direction(used)
    stacks_of = [_make_stacks(group) for group in groups]
    stacks = [stack for found in stacks_of for stack in found]
    positions = [position for stack in stacks for position in stack]
    stack_of = np.repeat(np.arange(len(stacks)), [len(stack) for stack in stacks])
    probs = np.zeros((len(positions), len(classes)))
    for index, position in enumerate(positions):
        values = [[row[f"prob_{name}"] for name in classes] for row in position]
        probs[index] = np.mean(values, axis=0, dtype=np.float64)
    evidence = np.zeros(len(classes))
    if positions:
        count = max(1, math.ceil(rule.top_fraction * len(positions) - 1e-9))
        evidence = np.sort(probs, axis=0)[-count:].mean(axis=0)
    runs = [_find_longest_run(column >= rule.threshold, stack_of) for column in probs.T]
    answer, reason = decide_series(evidence, runs, len(positions), classes, rule)
    if _is_localizer(slices, groups):
        answer, reason = INDETERMINATE, "localizer"
    shown = answer
    if answer not in classes:  # the tumour with the most evidence
        tumours = [k for k, name in enumerate(classes) if name != NO_TUMOUR] or range(len(classes))
        shown = classes[max(tumours, key=lambda k: evidence[k])]
    strongest = np.argsort(-probs[:, list(classes).index(shown)], kind="stable")
    return {
        "answer": answer,
        "reason": reason,
        "evidence": dict(zip(classes, map(float, evidence), strict=True)),
        "longest_run": dict(zip(classes, runs, strict=True)),
        "key_slices": [
            str(max(positions[index], key=lambda row: row[f"prob_{shown}"])["scan_uri"])
            for index in _choose_key_positions(strongest, stack_of)
        ],
        "num_slices": len(slices),
        "num_used": len(used),
        "num_positions": len(positions),
        "skipped": dict(sorted(skipped.items())),
        "plane": Counter(row["plane"] for row in used).most_common(1)[0][0] if used else None,
        "flags": sorted(_find_flags(used, groups, stacks_of)),
    }


def summarise_study(series: Sequence[dict[str, Any]], classes: Sequence[str]) -> dict[str, Any]:
    """Summarise the answers for the series of a study; slices of different series are not mixed.

    Parameters
    ----------
    series : sequence of dict
        Results of :func:`summarise_series`, each with ``series``.

    Returns
    -------
    dict
        ``answer``, the only class among the answers of the series, else "indeterminate" with the
        ``reason`` ``no_answers`` or ``disagreement``; ``num_series``; ``num_answered``, the number
        of series with a class; ``series`` and ``series_answers``, in the same order; ``evidence``,
        each class's greatest evidence in any series; and ``strongest_series``, the series with it.
    """
    ordered = sorted(series, key=lambda one: str(one["series"]))
    answers = [str(one["answer"]) for one in ordered]
    given = set(answers) - {INDETERMINATE}
    strongest = {name: max(ordered, key=lambda one: one["evidence"][name]) for name in classes}
    return {
        "answer": next(iter(given)) if len(given) == 1 else INDETERMINATE,
        "reason": {0: "no_answers", 1: None}.get(len(given), "disagreement"),
        "num_series": len(ordered),
        "num_answered": sum(answer != INDETERMINATE for answer in answers),
        "series": [one["series"] for one in ordered],
        "series_answers": answers,
        "evidence": {name: one["evidence"][name] for name, one in strongest.items()},
        "strongest_series": {name: one["series"] for name, one in strongest.items()},
    }


def _choose_slices(
    slices: Sequence[_Row], classes: Sequence[str]
) -> tuple[list[_Row], Counter[str]]:
    """Return the distinct slices with probabilities; count the others by reason."""

    def is_rejected(row: _Row) -> bool:
        return row[f"prob_{classes[0]}"] is None

    used, skipped, seen = [], Counter[str](), set()
    # Of two duplicates use the one with probabilities, else the first by name.
    for row in sorted(slices, key=lambda row: (is_rejected(row), str(row["scan_uri"]))):
        name = (row["sop_instance"], row["frame"])
        if row["sop_instance"] is not None and name in seen:
            skipped[DUPLICATE] += 1
        elif is_rejected(row):
            skipped[str(row["reason"])] += 1
        else:
            used.append(row)
        seen.add(name)
    return used, skipped


# ---- positions of slices -------------------------------------------------------------------------


def _group_by_direction(used: Sequence[_Row]) -> list[list[_Row]]:
    """Group slices by direction; those without a direction form one group."""
    without = [row for row in used if row["orientation"] is None]
    groups: list[list[_Row]] = []
    # Directions of the first slice of each group; an array, for thousands of directions.
    firsts = np.empty((len(used), 2, 3))
    for row in used:
        if row["orientation"] is None:
            continue
        own = np.reshape(row["orientation"], (2, 3))
        cosines = (firsts[: len(groups)] * own).sum(axis=2).min(axis=1)
        same = np.flatnonzero(cosines >= SAME_DIRECTION)
        if len(same):
            groups[same[0]].append(row)
        else:
            firsts[len(groups)] = own
            groups.append([row])
    return groups + ([without] if without else [])


def _make_stacks(group: Sequence[_Row]) -> list[_Stack]:
    """Order the slices of a direction, and cut them where one is missing.

    Those without a position come last, as a stack of their own.
    """

    def order(row: _Row) -> tuple[float, int, str]:
        frame = -1 if row["frame"] is None else row["frame"]
        return row["position_mm"] or 0.0, frame, str(row["scan_uri"])

    positions: list[_Position] = []
    unknown: _Stack = []
    for row in sorted(group, key=order):
        place = row["position_mm"]
        if place is None:
            unknown.append([row])
        elif positions and place - positions[-1][0]["position_mm"] < SAME_POSITION_MM:
            positions[-1].append(row)
        else:
            positions.append([row])
    steps = np.diff([position[0]["position_mm"] for position in positions])
    ends = [0]
    if len(steps):
        ends += (np.flatnonzero(steps > GAP * np.median(steps)) + 1).tolist()
    stacks = [positions[start:end] for start, end in pairwise([*ends, len(positions)])]
    return [stack for stack in (*stacks, unknown) if stack]


# ---- the rule ------------------------------------------------------------------------------------


def _find_longest_run(holds: NDArray[np.bool_], stack_of: NDArray[np.intp]) -> int:
    """Return the most neighbouring positions, all in one stack, at which something holds."""
    runs = groupby(zip(holds.tolist(), stack_of.tolist(), strict=True))
    return max((len(list(run)) for (is_run, _), run in runs if is_run), default=0)


def decide_series(
    evidence: NDArray[np.float64],
    runs: Sequence[int],
    num_positions: int,
    classes: Sequence[str],
    rule: SeriesRule,
) -> tuple[str, str | None]:
    """Return the class of a series, or "indeterminate" and the reason.

    ``evidence`` and ``runs`` have the evidence and the longest run of each class, in class order.
    """
    if num_positions < rule.min_slices:
        return INDETERMINATE, "too_few_slices"
    tumours = [k for k, name in enumerate(classes) if name != NO_TUMOUR]
    strong = {k for k in tumours if evidence[k] >= rule.threshold}
    long = {k for k in tumours if runs[k] >= rule.min_run}
    if len(strong & long) == 1:
        return classes[(strong & long).pop()], None
    if strong & long:
        return INDETERMINATE, "several_classes"
    if strong | long or NO_TUMOUR not in classes:
        return INDETERMINATE, "weak_evidence"
    return NO_TUMOUR, None


def _choose_key_positions(strongest: NDArray[np.intp], stack_of: NDArray[np.intp]) -> list[int]:
    """Return the first indices that are not neighbours of earlier ones."""
    chosen: list[int] = []
    for index in strongest.tolist():
        if len(chosen) == NUM_KEY_SLICES:
            break
        if all(abs(index - one) > 1 or stack_of[index] != stack_of[one] for one in chosen):
            chosen.append(index)
    return chosen


# ---- flags ---------------------------------------------------------------------------------------


def _find_flags(
    used: Sequence[_Row], groups: Sequence[Sequence[_Row]], stacks_of: Sequence[Sequence[_Stack]]
) -> set[str]:
    flags = {flag for row in used for flag in row["flags"] or ()}
    if sum(group[0]["orientation"] is not None for group in groups) > 1:
        flags.add("mixed")
    for stacks in stacks_of:
        placed = [stack for stack in stacks if stack[0][0]["position_mm"] is not None]
        if len(placed) > 1:
            flags.add("incomplete")
        if len(placed) < len(stacks):
            flags.add("position_unknown")
        if any(len(position) > 1 for stack in placed for position in stack):
            flags.add("repeated_positions")
    return flags


def _is_localizer(slices: Sequence[_Row], groups: Sequence[Sequence[_Row]]) -> bool:
    """Return whether the series is a localizer: a few slices in several planes."""
    orientations = [group[0]["orientation"] for group in groups]
    normals = [np.cross(one[:3], one[3:]) for one in orientations if one is not None]
    return len(slices) <= MAX_LOCALIZER_SLICES and any(
        abs(np.dot(one, two)) < SAME_PLANE for one, two in combinations(normals, 2)
    )
