"""The model card of a training run: what there is to know of the data, and the writing."""

from typing import Any

import numpy as np

from brainray import storage
from brainray.evaluation.prepared import PreparedData
from brainray.model.classifier import amend_classifier_metadata, read_classifier_metadata
from brainray.reports.card import build_model_card, render_model_card

MODEL_CARD_FILE = "MODEL_CARD.md"


def write_model_card(
    classifier_uri: str, data: PreparedData, metrics: dict[str, Any], *, data_uri: str
) -> None:
    """Write what is known of a trained classifier into its folder, for people and as JSON.

    Parameters
    ----------
    classifier_uri : str
        The classifier bundle; its weights and their meaning stay as they are.
    data : PreparedData
        What it was trained and judged on.
    metrics : dict
        Content of ``metrics.json``.
    data_uri : str
        Where the data are; only the last name is written down.
    """
    metadata = read_classifier_metadata(classifier_uri)
    counted = {"name": storage.get_name(data_uri), **summarise_data(data, metadata["classes"])}
    model_card = build_model_card(metadata, metrics, counted)
    text = render_model_card(model_card)
    storage.write_bytes(storage.join(classifier_uri, MODEL_CARD_FILE), text.encode())
    amend_classifier_metadata(classifier_uri, {"model_card": model_card})


def summarise_data(data: PreparedData, classes: list[str]) -> dict[str, Any]:
    """Count a data set's images by split, class and group.

    Returns
    -------
    dict
        ``num_scans``; ``rejected``, counts by reason, and ``rejected_per_class``; ``num_groups``
        and ``num_shared_groups``, those that lie in more than one split;
        ``num_named``, scans whose group or patient the data set names; and ``splits``: for
        each that has images ``n``, ``num_groups``, ``per_class``, and ``given``, whether the
        data set says which images are in it.
    """
    groups = data.manifest["group"].to_numpy()
    given = set(data.found.samples["split"].to_pylist())
    members = {split: data.select(split) for split in ("train", "val", "test")}
    found = {split: np.unique(groups[rows]) for split, rows in members.items() if len(rows)}
    _, counts = np.unique(np.concatenate(list(found.values())), return_counts=True)

    def count_classes(split: str) -> list[int]:
        counts = np.bincount(data.labels[data.select(split)], minlength=len(classes))
        return [int(count) for count in counts]

    samples = data.found.samples
    return {
        "num_scans": samples.num_rows,
        "rejected": data.count_rejected(),
        "rejected_per_class": count_classes("rejected"),
        "num_groups": len(counts),
        "num_shared_groups": int((counts > 1).sum()),
        "num_named": data.num_named,
        "splits": {
            split: {
                "n": len(members[split]),
                "num_groups": len(numbers),
                "per_class": count_classes(split),
                "given": split in given,
            }
            for split, numbers in found.items()
        },
    }
