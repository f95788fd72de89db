"""The model card of a trained classifier, as JSON and as Markdown.

It states what the training run knows. Everything else is "unknown", or open for people to answer.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from markupsafe import Markup

from brainray.io import storage
from brainray.model.reasons import INTENDED_USE, NOT_INTENDED_FOR, NOTICE
from brainray.reports.html import (
    MISSING,
    build_environment,
    flatten,
    format_number,
    format_percent,
    format_text,
)

INTENDED_USERS = "Researchers who can check its predictions against scans of known class."

_SPLITS = {"test": "test", "val": "validation"}
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
_SELECTED = {
    *("n", "num_groups", "confusion", "per_class", "near_duplicate_correlation"),
    *("without_near_duplicates", "baseline_1nn", *_SCORES, *_CLASS_SCORES),
}
_MARKUP = re.compile(r"[\\`*\[\]|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
"""What Markdown could take for markup within a line; an underscore within a word is none."""


def build_model_card(
    metadata: Mapping[str, Any], metrics: Mapping[str, Any], data: Mapping[str, Any]
) -> dict[str, Any]:
    """Collect what a training run knows of its classifier: ready for JSON, None if unknown.

    Parameters
    ----------
    metadata, metrics : mapping
        Content of ``classifier.json`` and of ``metrics.json``.
    data : mapping
        What :func:`brainray.evaluation.scoring.summarise_data` counted, and the data set's
        ``name``.
    """
    training, summary = metadata.get("training") or {}, metrics.get("training") or {}
    config = flatten(training.get("config") or {})
    results = {split: _select(metrics[split]) for split in _SPLITS if metrics.get(split)}
    calibration = {
        name: value
        for name, value in flatten(metadata.get("calibration") or {}).items()
        if value is None or isinstance(value, (str, int, float))
    }
    best_epoch = summary.get("best_epoch")
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
        "training": {
            "recipe": training.get("recipe"),
            "num_epochs": summary.get("num_epochs"),
            "exported_epoch": None if best_epoch is None else best_epoch + 1,
            "monitor": summary.get("monitor"),
            "best_score": summary.get("best_score"),
            "time_s": summary.get("time_s"),
            "num_workers": summary.get("world_size"),
            "hardware": summary.get("hardware"),
            "precision": training.get("precision"),
            "configuration": {  # of a URI only the last name: no folder of the machine
                name: storage.get_name(value) if name.endswith("_uri") and value else value
                for name, value in config.items()
            },
        },
        "results": results,
        "engine": (metrics.get("runtime") or {}).get("description"),
        "calibration": calibration,
        "limits": list(_list_limits(data, results, calibration, len(metadata["classes"]))),
        "software": {
            "versions": dict(metadata.get("versions") or {}),
            "code_revision": metadata.get("code_revision"),
        },
    }


def render_model_card(model_card: Mapping[str, Any]) -> str:
    """Render what :func:`build_model_card` returned as a Markdown model card for Hugging Face."""
    environment = build_environment(escape_markdown)
    environment.filters["estimate"] = format_estimate
    return environment.get_template("model_card.md.j2").render(
        names={"splits": _SPLITS, "scores": _SCORES, "class_scores": _CLASS_SCORES},
        columns={split: _list_columns(result) for split, result in model_card["results"].items()},
        **model_card,
    )


def _list_columns(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """List headings and scores of the table of a split's results; without images, none."""
    baseline = result.get("baseline_1nn") or {}
    columns = {
        "Classifier": result,
        "Classifier, no near duplicate": result.get("without_near_duplicates"),
        "Nearest thumbnail": baseline,
        "Nearest thumbnail, no near duplicate": baseline.get("without_near_duplicates"),
    }
    return {heading: found for heading, found in columns.items() if found and found["n"]}


def escape_markdown(value: object) -> Markup:
    """Write any value so that Markdown shows it as it is, on one line and in one table cell."""
    if isinstance(value, Markup):  # of a macro, whose values are escaped
        return value
    text = _MARKUP.sub(r"\\\g<0>", str(format_text(value)))
    return Markup(text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def format_estimate(found: Mapping[str, Any], name: str) -> str:
    """Format a score and its 95 % interval: ``0.897 (0.871 to 0.921)``."""
    if name not in found:
        return MISSING
    if found[name] is None:
        return "undefined"
    interval = found.get(f"{name}_ci95")
    ends = " to ".join(map(format_number, interval)) if interval else "no interval"
    return f"{format_number(float(found[name]))} ({ends})"


def _select(found: Mapping[str, Any]) -> dict[str, Any]:
    """Select what the card shows of a split's metrics; the shape stays the same."""
    selected = {}
    for name, value in found.items():
        if name == "per_class":
            value = {name: _select(scores) for name, scores in value.items()}
        elif isinstance(value, Mapping):
            value = _select(value)
        if name.removesuffix("_ci95") in _SELECTED:
            selected[name] = value
    return selected


def _list_limits(
    data: Mapping[str, Any],
    results: Mapping[str, Mapping[str, Any]],
    calibration: Mapping[str, Any],
    num_classes: int,
) -> Iterator[str]:
    """List the limitations of this run, in sentences."""
    for split, result in results.items():
        yield from _list_leaks(_SPLITS[split], result)
    if data["num_shared_groups"]:
        yield (
            f"{data['num_shared_groups']:,} groups of near-identical slices lie in more than one "
            "split, because the data set gives the splits."
        )
    if "test" not in results:
        yield "There is no test split: every score is of images that training used."
    if "val" in results:
        yield "Validation scores chose the exported epoch: they are slightly optimistic."
    groups = (
        "Groups of near-identical slices stand for patients, and miss slices that look different."
    )
    if data["num_named"]:
        yield (
            f"The data set names a group or patient for {data['num_named']:,} of "
            f"{data['num_scans']:,} scans. Nobody checked these names. For other scans: {groups}"
        )
    else:
        yield f"No patient is known by name: one patient's slices may lie in two splits. {groups}"
    yield "It sees single slices: no volume, and no other information about a patient."
    yield f"It knows {num_classes} classes; it cannot name any other finding."
    yield (
        "All images are of one data set: its accuracy on other scanners, sequences, hospitals and "
        "patients is unknown."
    )
    yield "Age, sex, scanner and sequence are unknown: no subgroup was evaluated."
    yield "It is one training run: the variation with another seed is unknown."
    if calibration.get("facts.method", "none") == "none":
        yield "Its probabilities are not calibrated after training."
    if not calibration.get("min_confidence"):
        yield "It never abstains: it gives the most probable class at any confidence."
    if calibration.get("max_distance") is None:
        yield "It cannot detect images that are no brain MRI: every image gets a class."
    if data["rejected"]:
        yield f"{sum(data['rejected'].values()):,} scans that cannot be decoded are in no score."


def _list_leaks(name: str, result: Mapping[str, Any]) -> Iterator[str]:
    """State which scores memory may explain, and where the baseline is better."""
    apart, baseline = result.get("without_near_duplicates"), result.get("baseline_1nn") or {}
    if apart and apart["n"] < result["n"]:
        yield (
            f"{format_percent(1 - apart['n'] / result['n'])} of the {name} images have a near "
            "duplicate among the images that they are held out from: memory explains a part of "
            "the scores on all images."
        )
    nearest_apart = baseline.get("without_near_duplicates") or {}
    for words, ours, theirs in (
        ("all images", result, baseline),
        ("images without a near duplicate", apart or {}, nearest_apart),
    ):
        if theirs.get("accuracy", 0) > ours.get("accuracy", 1):
            yield (
                f"On the {name} split, {words}: the nearest-thumbnail baseline is right more often "
                f"than the classifier (accuracy {format_number(theirs['accuracy'])} against "
                f"{format_number(ours['accuracy'])})."
            )
