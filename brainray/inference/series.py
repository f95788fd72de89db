"""What the slices of a series say together: slice evidence, by one stated rule.

A network that is wrong on one slice in a hundred gives a tumour to some slice of nearly every
series, so neither the maximum of a series nor a product over its slices means anything. Here a
class has evidence where a share of the series' slices agree on it, and where they are neighbours.

Slices at one position, such as the volumes of a diffusion series, count once, with their mean
probabilities. Slices are neighbours if they have one direction and no slice is missing between
them; where the header gives no positions, the order of frames and names stands for them.

The evidence is a mean of probabilities that are calibrated for slices. It is not a probability of
the series or of the patient: ``brainray calibrate-series`` fits thresholds where labels are known.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainray.errors import ConfigError

NO_TUMOUR = "notumor"
"""The class that stands for the absence of the others."""
INDETERMINATE = "indeterminate"
NUM_KEY_SLICES = 3
DUPLICATE = "duplicate"
"""Why a slice is not used: the series has the same object, or the same frame of it, already."""

MAX_LOCALIZER_SLICES = 30
"""A series of several planes and at most so many slices is a localizer."""
SAME_DIRECTION = math.cos(math.radians(5))
"""Least cosine between the rows, and between the columns, of slices of one direction."""
SAME_PLANE = math.cos(math.radians(30))
"""Least cosine between the normals of slices of one plane."""
SAME_POSITION_MM = 0.05
"""Slices of one direction that are nearer than this lie at one position."""
GAP = 1.5
"""Times the usual distance between slices from which one is taken to be missing."""

_Row = dict[str, Any]
_Position = list[_Row]
"""Slices of one direction at one position."""
_Stack = list[_Position]
"""Neighbouring positions, in their order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SeriesRule:
    """When the slices of a series give it a class."""

    top_fraction: float = 0.1
    """Share of the positions, those most probable of a class, whose mean probability is its
    evidence (above 0, up to 1)."""
    threshold: float = 0.5
    """Evidence, and probability at each position of a run, that counts for a class (0 to 1)."""
    min_run: int = 3
    """Neighbouring positions at or above the threshold that a class needs."""
    min_slices: int = 5
    """Positions with probabilities that a series needs; with fewer it is indeterminate."""

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
    """Put the answers to a series' slices together.

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
        at most :data:`NUM_KEY_SLICES` ``scan_uri`` of slices that are strongest for the most
        evident class and no neighbours; ``num_slices``, ``num_used``, and ``num_positions`` of
        those used; ``skipped``, a number for each reason; ``plane``; ``flags``, sorted.
    """
    rule = rule or SeriesRule()
    used, skipped = _choose_slices(slices, classes)
    groups = _group_by_direction(used)
    stacks, is_complete = _make_stacks(groups)
    positions = [position for stack in stacks for position in stack]
    stack_of = np.repeat(np.arange(len(stacks)), [len(stack) for stack in stacks])
    probs = np.array([_average_probs(position, classes) for position in positions], np.float64)
    probs = probs.reshape(len(positions), len(classes))
    evidence = _compute_evidence(probs, rule.top_fraction)
    runs = [_find_longest_run(column >= rule.threshold, stack_of) for column in probs.T]
    answer, reason = decide_series(evidence, runs, len(positions), classes, rule)
    if _is_localizer(slices, groups):
        answer, reason = INDETERMINATE, "localizer"
    shown = answer if answer in classes else _find_most_evident(evidence, classes)
    strongest = np.argsort(-probs[:, list(classes).index(shown)], kind="stable")
    planes = Counter(row["plane"] for row in used)
    flags = {flag for row in used for flag in row["flags"] or ()}
    flags |= _find_flags(groups, positions)
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
        "plane": planes.most_common(1)[0][0] if used else None,
        "flags": sorted(flags if is_complete else flags | {"incomplete"}),
    }


def summarise_study(series: Sequence[dict[str, Any]], classes: Sequence[str]) -> dict[str, Any]:
    """Put the answers to a study's series side by side; their slices are never mixed.

    Parameters
    ----------
    series : sequence of dict
        What :func:`summarise_series` returned of each series, and its ``series``.
    classes : sequence of str
        In class order.

    Returns
    -------
    dict
        ``answer``, the class that all series give which have one, else "indeterminate", with the
        ``reason`` ``no_answers`` or ``disagreement``; ``num_series``; ``num_answered``, the series
        with a class; ``series`` and ``series_answers``, in one order; ``evidence``, the greatest of
        any series for each class; and ``strongest_series``, which one that is.
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
    """Return the slices with probabilities, each once; count the others by reason."""

    def has_no_answer(row: _Row) -> bool:
        return row[f"prob_{classes[0]}"] is None

    used, skipped, seen = [], Counter[str](), set()
    # Of two copies, the one that has an answer is used, else the same one in every order of rows.
    for row in sorted(slices, key=lambda row: (has_no_answer(row), str(row["scan_uri"]))):
        name = (row["sop_instance"], row["frame"])
        if row["sop_instance"] is not None and name in seen:
            skipped[DUPLICATE] += 1
        elif has_no_answer(row):
            skipped[str(row["reason"])] += 1
        else:
            used.append(row)
        seen.add(name)
    return used, skipped


# ---- where slices lie ----------------------------------------------------------------------------


def _group_by_direction(used: Sequence[_Row]) -> list[list[_Row]]:
    """Put slices of one direction together; those without one are a group of their own."""
    without = [row for row in used if row["orientation"] is None]
    groups: list[list[_Row]] = []
    # Of the first slice of each group: an array, since a client may send thousands of directions.
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


def _make_stacks(groups: Sequence[Sequence[_Row]]) -> tuple[list[_Stack], bool]:
    """Put slices of each direction in order; return stacks, and whether no slice is missing."""

    def place(row: _Row) -> tuple[float, int, str]:
        frame = -1 if row["frame"] is None else row["frame"]
        return row["position_mm"] or 0.0, frame, str(row["scan_uri"])

    stacks: list[_Stack] = []
    is_complete = True
    for group in groups:
        ordered = sorted(group, key=place)
        found = _cut_at_gaps(
            _group_by_position([row for row in ordered if row["position_mm"] is not None])
        )
        is_complete &= len(found) <= 1
        stacks += found
        if others := [[row] for row in ordered if row["position_mm"] is None]:
            stacks.append(others)
    return stacks, is_complete


def _group_by_position(ordered: Sequence[_Row]) -> list[_Position]:
    positions: list[_Position] = []
    for row in ordered:
        if positions and row["position_mm"] - positions[-1][0]["position_mm"] < SAME_POSITION_MM:
            positions[-1].append(row)
        else:
            positions.append([row])
    return positions


def _cut_at_gaps(positions: list[_Position]) -> list[_Stack]:
    steps = np.diff([position[0]["position_mm"] for position in positions])
    gaps = np.flatnonzero(steps > GAP * np.median(steps)) if len(steps) else steps
    ends = [*(int(gap) + 1 for gap in gaps), len(positions)]
    return [positions[start:end] for start, end in pairwise([0, *ends]) if start < end]


def _average_probs(position: _Position, classes: Sequence[str]) -> NDArray[np.float64]:
    probs = [[row[f"prob_{name}"] for name in classes] for row in position]
    average: NDArray[np.float64] = np.mean(probs, axis=0, dtype=np.float64)
    return average


# ---- the rule ------------------------------------------------------------------------------------


def _compute_evidence(probs: NDArray[np.float64], top_fraction: float) -> NDArray[np.float64]:
    if not len(probs):
        return np.zeros(probs.shape[1])
    count = max(1, math.ceil(top_fraction * len(probs) - 1e-9))
    evidence: NDArray[np.float64] = np.sort(probs, axis=0)[-count:].mean(axis=0)
    return evidence


def _find_longest_run(holds: NDArray[np.bool_], stack_of: NDArray[np.intp]) -> int:
    longest = current = 0
    previous = None
    for is_in_run, stack in zip(holds.tolist(), stack_of.tolist(), strict=True):
        before = current if stack == previous else 0
        current = before + 1 if is_in_run else 0
        longest, previous = max(longest, current), stack
    return longest


def decide_series(
    evidence: NDArray[np.float64],
    runs: Sequence[int],
    num_positions: int,
    classes: Sequence[str],
    rule: SeriesRule,
) -> tuple[str, str | None]:
    """Return the class of a series, or "indeterminate" and why.

    Parameters
    ----------
    evidence : ndarray of float64, shape (K,)
        Mean probability of each class over its most probable positions.
    runs : sequence of int, length K
        Longest run of neighbours at or above the rule's threshold, of each class.
    num_positions : int
        What the rule's ``min_slices`` is compared with.
    classes : sequence of str
        The K names, in class order.
    rule : SeriesRule
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


def _find_most_evident(evidence: NDArray[np.float64], classes: Sequence[str]) -> str:
    """Return the class that a reader would check first: a tumour where there is one."""
    named = [k for k, name in enumerate(classes) if name != NO_TUMOUR] or range(len(classes))
    return classes[max(named, key=lambda k: evidence[k])]


def _choose_key_positions(strongest: NDArray[np.intp], stack_of: NDArray[np.intp]) -> list[int]:
    """Return the first of these indices that are no neighbours of earlier ones."""
    chosen: list[int] = []
    for index in strongest.tolist():
        if len(chosen) == NUM_KEY_SLICES:
            break
        if all(abs(index - one) > 1 or stack_of[index] != stack_of[one] for one in chosen):
            chosen.append(index)
    return chosen


# ---- flags ---------------------------------------------------------------------------------------


def _find_flags(groups: Sequence[Sequence[_Row]], positions: Sequence[_Position]) -> set[str]:
    flags = set()
    if sum(group[0]["orientation"] is not None for group in groups) > 1:
        flags.add("mixed")
    if any(position[0]["position_mm"] is None for position in positions):
        flags.add("position_unknown")
    if any(len(position) > 1 for position in positions):
        flags.add("repeated_positions")
    return flags


def _is_localizer(slices: Sequence[_Row], groups: Sequence[Sequence[_Row]]) -> bool:
    """Tell a localizer by its geometry: a few slices of several planes."""
    orientations = [group[0]["orientation"] for group in groups]
    normals = [np.cross(one[:3], one[3:]) for one in orientations if one is not None]
    return len(slices) <= MAX_LOCALIZER_SLICES and any(
        abs(np.dot(one, two)) < SAME_PLANE for one, two in combinations(normals, 2)
    )
