"""Outputs of bulk jobs, written without a network from given DICOM files and probabilities."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from brainray.data.slice_columns import describe_slice
from brainray.errors import RejectedImage
from brainray.images.slices import name_slice, open_file
from brainray.inference.schema import build_schema
from brainray.inference.series import SeriesRule
from brainray.inference.store import METADATA_KEY, PredictionStore
from brainray.inference.studies import build_series_schema, read_slices, summarise_group
from brainray.io.identifiers import open_identifiers

CLASSES = ("glioma", "meningioma", "notumor", "pituitary")
CLASSIFIER_ID = "75e2e1e7af65"
START = datetime(2026, 3, 1, 10, 30, tzinfo=UTC)
ENGINE = {"backend": "openvino", "precision": "bf16"}

Probs = Callable[[int], dict[str, float]]
"""From a slice number to the probabilities of the tumours; the rest is that of `notumor`."""


def predict_glioma(index: int) -> dict[str, float]:
    """Return a high glioma probability for slices 2 to 5."""
    return {"glioma": 0.9 if 2 <= index <= 5 else 0.02, "meningioma": 0.03, "pituitary": 0.01}


def predict_no_tumour(index: int) -> dict[str, float]:  # noqa: ARG001 - the same for all
    """Return low tumour probabilities for every slice."""
    return {"glioma": 0.02, "meningioma": 0.03, "pituitary": 0.01}


def predict_weak_glioma(index: int) -> dict[str, float]:
    """Return a high glioma probability for slice 3 only: weak evidence."""
    return {"glioma": 0.9 if index == 3 else 0.02, "meningioma": 0.03, "pituitary": 0.01}


def write_output(
    output: Path,
    files: Sequence[Path],
    predict: Probs = predict_glioma,
    *,
    redact_paths: bool = False,
    with_maps: bool = True,
    rule: SeriesRule | None = None,
) -> PredictionStore:
    """Write predictions and series.parquet, as a bulk job over these files does."""
    identifiers = open_identifiers(str(output), redact_paths=redact_paths)
    rows = []
    for number, path in enumerate(files):
        own = _make_rows(path, number, predict, identifiers.key, with_maps=with_maps)
        for row in own:
            row["scan_uri"] = name_slice(identifiers.name(str(path)), row["frame"])
        rows += own
    metadata = {
        "classifier_id": CLASSIFIER_ID,
        "classes": list(CLASSES),
        "weights": {"sha256": "5a" * 32},
        "preprocessing": {"size_px": 32},
    }
    store = PredictionStore.of(str(output), metadata)
    table = pa.Table.from_pylist(rows, schema=build_schema(CLASSES))
    store.write_shard(store.name_file("run", 0, len(store.list_files())), table, ENGINE, {})
    _write_series(store, rule or SeriesRule())
    return store


def _make_rows(
    path: Path, number: int, predict: Probs, key: bytes, *, with_maps: bool
) -> list[dict[str, Any]]:
    content = path.read_bytes()
    row: dict[str, Any] = {
        "content_sha256": sha256(content).hexdigest(),
        "status": "classified",
        "classifier_id": CLASSIFIER_ID,
        "engine": "openvino",
        "precision": "bf16",
        "classified_at": START,
    }
    try:
        slices = open_file(content, key=key).slices
    except RejectedImage as rejection:
        return [row | {"status": "rejected", "reason": rejection.reason, "frame": None}]
    rows = []
    for index, info in enumerate(slices):
        probs = predict(number + index)
        probs["notumor"] = 1 - sum(probs.values())
        cells = np.zeros((4, 4), np.float32)
        cells[1, 2] = 3
        rows.append(
            row
            | describe_slice(info, "percentile")
            | {f"prob_{name}": prob for name, prob in probs.items()}
            | {"class_map": cells.ravel().tolist() if with_maps else None}
        )
    return rows


def _write_series(store: PredictionStore, rule: SeriesRule) -> None:
    slices = pa.concat_tables([read_slices(store, uri) for uri in store.list_files()])
    series = []
    for group in slices["group"].unique().to_pylist():
        own = slices.filter(pa.compute.equal(slices["group"], group))
        series += summarise_group(own, store, rule).to_pylist()[0]["series"]
    about = store.about | {"rule": asdict(rule)}
    schema = build_series_schema(CLASSES).with_metadata({METADATA_KEY: json.dumps(about)})
    uri = f"{store.output_uri}/series.parquet"
    pq.write_table(pa.Table.from_pylist(series, schema=schema), uri)
