"""The model card: what a training run knows of its classifier, as JSON and as Markdown.

It says only what is known: what is not, it calls not known, or leaves open for people.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from brainray import storage
from brainray.model.reasons import INTENDED_USE, NOT_INTENDED_FOR, NOTICE
from brainray.reports.guidelines import CLAIM, TRIPOD_AI
from brainray.reports.page import (
    MISSING,
    build_environment,
    flatten,
    format_number,
    format_setting,
    format_share,
    format_text,
)

INTENDED_USERS = (
    "People who do research, and who can judge its answers against scans whose class they know."
)

_SPLITS = {"test": "test", "val": "validation"}  # the most telling first
_PARTS = {"all": "all images", "without_near_duplicates": "images without a near duplicate"}
_BASELINES = {"all": "baseline_1nn", "without_near_duplicates": "baseline_1nn_no_near_duplicate"}
_SCORES = {
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "macro_f1": "Macro F1",
    "macro_auroc": "Macro AUROC, each class against the rest",
    "mcc": "Matthews correlation",
    "log_loss": "Log loss (lower is better)",
    "brier": "Brier score (0 to 2, lower is better)",
    "ece": "Expected calibration error, 15 bins (lower is better)",
}
_CLASS_SCORES = {
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "precision": "Precision",
}
_MARKS = re.compile(r"[\\`*\[\]|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
"""What Markdown could take for markup within a line; an underscore within a word is none."""


def build_model_card(
    metadata: Mapping[str, Any], metrics: Mapping[str, Any], data: Mapping[str, Any]
) -> dict[str, Any]:
    """Bring together what a training run knows of its classifier.

    Parameters
    ----------
    metadata : mapping
        Content of ``classifier.json``. Of ``calibration``, if it is there, the scalars are taken.
    metrics : mapping
        Content of ``metrics.json``.
    data : mapping
        What ``summarise_data`` counted, and the data set's ``name``.

    Returns
    -------
    dict
        Ready for JSON; None stands for what is not known.
    """
    judged = [split for split in _SPLITS if metrics.get(split)]
    results = {split: _select_results(metrics[split]) for split in judged}
    training = _describe_training(metadata.get("training") or {}, metrics.get("training") or {})
    config = training["configuration"]
    calibration = _select_scalars(metadata.get("calibration") or {})
    return {
        "notice": NOTICE,
        "use": {
            "intended_use": INTENDED_USE,
            "intended_users": INTENDED_USERS,
            "not_intended_for": NOT_INTENDED_FOR,
        },
        "classifier": {
            "classifier_id": metadata["classifier_id"],
            "classes": list(metadata["classes"]),
            "architecture": dict(metadata["architecture"]),
            "weights_size_bytes": metadata["weights"].get("size_bytes"),
            "preprocessing": dict(metadata["preprocessing"]),
        },
        "data": {
            **data,
            "manifest_sha256": metadata.get("data_manifest_sha256"),
            "group_correlation": config.get("group_correlation"),
            "fractions": {split: config.get(f"{split}_fraction") for split in _SPLITS},
            "seed": config.get("seed"),
        },
        "training": training,
        "results": results,
        "engine": (metrics.get("runtime") or {}).get("description"),
        "calibration": calibration,
        "limits": _list_limits(data, results, calibration, len(metadata["classes"])),
        "software": {
            "versions": dict(metadata.get("versions") or {}),
            "code_revision": metadata.get("code_revision"),
        },
        "guidelines": [CLAIM.describe(), TRIPOD_AI.describe()],
    }


def render_model_card(model_card: Mapping[str, Any]) -> str:
    """Render a model card as Markdown with the front matter of Hugging Face's model cards.

    Parameters
    ----------
    model_card : mapping
        What :func:`build_model_card` returned.
    """
    environment = build_environment(escape_markdown)
    environment.filters.update(estimate=format_estimate, setting=format_setting)
    template = environment.get_template("card.md.j2")
    names = {"splits": _SPLITS, "scores": _SCORES, "class_scores": _CLASS_SCORES}
    return template.render(names=names, **model_card)


def escape_markdown(value: object) -> Markup:
    """Write any value so that Markdown shows it as it is, on one line and in one table cell."""
    if isinstance(value, Markup):  # of a macro, whose values are escaped
        return value
    text = _MARKS.sub(r"\\\g<0>", str(format_text(value)))
    return Markup(text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def format_estimate(found: Mapping[str, Any], name: str) -> str:
    """Format a score and its 95 % interval: ``0.897 (0.871 to 0.921)``."""
    if name not in found:
        return MISSING
    if found[name] is None:
        return "not defined"
    interval = found.get(f"{name}_ci95")
    ends = " to ".join(map(format_number, interval)) if interval else "no interval"
    return f"{format_number(float(found[name]))} ({ends})"


def _select_results(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Select what the card shows of a split's metrics."""
    without_near_duplicates, baseline = (
        evaluation.get("without_near_duplicates"),
        evaluation.get("baseline_1nn"),
    )
    return {
        "n": evaluation["n"],
        "near_duplicate_correlation": evaluation.get("near_duplicate_correlation"),
        "near_duplicate_share": None
        if without_near_duplicates is None
        else 1 - without_near_duplicates["n"] / evaluation["n"],
        "all": _select_scores(evaluation),
        "without_near_duplicates": _select_scores(without_near_duplicates),
        "baseline_1nn": _select_scores(baseline),
        "baseline_1nn_no_near_duplicate": _select_scores(
            (baseline or {}).get("without_near_duplicates")
        ),
        "confusion": evaluation.get("confusion"),
    }


def _select_scores(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Select the scores of some images; None where there are none."""
    if not found or not found["n"]:
        return None
    kept = _keep(found, ("n", "num_groups"), _SCORES)
    if "per_class" in found:
        kept["per_class"] = {
            name: _keep(scores, ("n",), _CLASS_SCORES)
            for name, scores in found["per_class"].items()
        }
    return kept


def _keep(
    found: Mapping[str, Any], counts: Sequence[str], scores: Mapping[str, str]
) -> dict[str, Any]:
    """Keep counts, and scores with their intervals, of those that are there."""
    names = [*counts, *(name for score in scores for name in (score, f"{score}_ci95"))]
    return {name: found[name] for name in names if name in found}


def _select_scalars(calibration: Mapping[str, Any]) -> dict[str, Any]:
    """Select the scalars, under dotted names."""
    scalar = (str, int, float, bool, type(None))
    return {
        name: value for name, value in flatten(calibration).items() if isinstance(value, scalar)
    }


def _describe_training(sealed: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
    """Say how the classifier was trained; of a place, only the last name."""
    best = summary.get("best_epoch")
    return {
        "recipe": sealed.get("recipe"),
        "num_epochs": summary.get("num_epochs"),
        "sealed_epoch": None if best is None else best + 1,
        "monitor": summary.get("monitor"),
        "best_score": summary.get("best_score"),
        "time_s": summary.get("time_s"),
        "num_workers": summary.get("world_size"),
        "hardware": summary.get("hardware"),
        "precision": sealed.get("precision"),
        "configuration": {
            name: storage.get_name(value) if name.endswith("_uri") and value else value
            for name, value in flatten(sealed.get("config") or {}).items()
        },
    }


def _list_limits(
    data: Mapping[str, Any],
    results: Mapping[str, Mapping[str, Any]],
    calibration: Mapping[str, Any],
    num_classes: int,
) -> list[str]:
    """List the limits that hold for this run, in sentences."""
    limits = [line for split in results for line in _list_leaks(_SPLITS[split], results[split])]
    if data["num_shared_groups"]:
        limits.append(
            f"{data['num_shared_groups']:,} groups of near-identical slices lie in more than one "
            "split, as the data set gives the splits."
        )
    if "test" not in results:
        limits.append("There is no test split: no score is of images that chose nothing.")
    if "val" in results:
        limits.append(
            "Validation scores chose the epoch that is sealed: they are a little flattered."
        )
    limits += [
        _describe_patients(data),
        "It sees one slice at a time, not a volume, and nothing else that is known of a patient.",
        f"It knows {num_classes} classes, and has no name for anything else a scan may show.",
        "All images are of one data set: how it does on other scanners, sequences, hospitals and "
        "patients is not known.",
        "Age, sex, scanner and sequence are not known: no subgroup was looked at.",
        "It is one training run: how much another seed would change is not known.",
    ]
    if calibration.get("facts.method", "none") == "none":
        limits.append("Its probabilities are not calibrated after training.")
    if not calibration.get("min_confidence"):
        limits.append("It never abstains: the most probable class is given, however improbable.")
    if calibration.get("max_distance") is None:
        limits.append("It does not know what is no brain MRI: every picture gets an answer.")
    if data["rejected"]:
        count = sum(data["rejected"].values())
        limits.append(f"Scans that cannot be read ({count:,} here) are in no score.")
    return limits


def _describe_patients(data: Mapping[str, Any]) -> str:
    named, total = data["num_named"], data["num_scans"]
    stand_in = "groups of near-identical slices stand in for patients, and miss what looks unlike"
    if not named:
        return (
            "No patient is known by name, so a patient's slices may lie on both sides of a split: "
            f"{stand_in}."
        )
    return (
        f"The data set names a group or a patient for {named:,} of {total:,} scans; "
        f"for the others, if any, {stand_in}. What the names mean was not checked."
    )


def _list_leaks(name: str, result: Mapping[str, Any]) -> list[str]:
    """Say what of a split may be memory, and where a vote that learns nothing does better."""
    lines = []
    share = result["near_duplicate_share"]
    if share:
        lines.append(
            f"{format_share(share)} of the {name} images have a near duplicate among those they are "
            "held out from: scores on all images measure memory in part."
        )
    for part, words in _PARTS.items():
        ours, theirs = result[part], result[_BASELINES[part]]
        if ours and theirs and theirs["accuracy"] > ours["accuracy"]:
            lines.append(
                f"On the {name} split, {words}: the nearest thumbnail, which learns nothing, is "
                f"right more often than the classifier (accuracy "
                f"{format_number(theirs['accuracy'])} against {format_number(ours['accuracy'])})."
            )
    return lines
