"""Comparing two runs: their predictions are joined by image, or an error names the difference."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from brainray.errors import DataError
from brainray.evaluation.compare import CompareJob, compare
from brainray.io.storage import read_json
from tests.conftest import CLASSES


def draw_probs(y_true: NDArray[np.int64], skill: float, seed: int) -> NDArray[np.float64]:
    logits = np.random.default_rng(seed).normal(size=(len(y_true), 4))
    logits[np.arange(len(y_true)), y_true] += skill
    powers = np.exp(logits)
    return powers / powers.sum(1, keepdims=True)


def write_predictions(file: Path, skill: float, **changes: Any) -> Path:  # noqa: ANN401
    y_true = np.tile(np.arange(4), 12)
    probs = draw_probs(y_true, skill, seed=int(skill * 10))
    columns: dict[str, Any] = {
        "path": [f"scan-{number}.jpg" for number in range(48)],
        "content_sha256": [f"{number:064x}" for number in range(48)],
        "true_class": [CLASSES[label] for label in y_true],
        **{f"prob_{name}": probs[:, k] for k, name in enumerate(CLASSES)},
        "engine": ["openvino"] * 48,
        "probs": pa.array(list(probs), pa.list_(pa.float32())),
    } | changes
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), file)
    return file


def test_tables_are_joined_in_any_order(tmp_path: Path) -> None:
    a = write_predictions(tmp_path / "a" / "predictions" / "test.parquet", 1.0)
    b = write_predictions(tmp_path / "b.parquet", 3.0)
    table = pq.read_table(b)
    expected = compare(CompareJob(a_uri=str(a), b_uri=str(b), num_resamples=100))
    pq.write_table(table.take(np.random.default_rng(0).permutation(48)), b)
    job = CompareJob(
        a_uri=str(tmp_path / "a"),
        b_uri=str(b),
        output_uri=str(tmp_path / "out"),
        num_resamples=100,
    )
    found = compare(job)
    assert found["scores"] == expected["scores"]
    assert found["join"]["by"] == "path"
    assert read_json(str(tmp_path / "out" / "compare.json"))["scores"] == found["scores"]


def test_a_data_set_that_moved_is_joined_by_content(tmp_path: Path) -> None:
    a = write_predictions(tmp_path / "a.parquet", 1.0)
    moved = [f"elsewhere/{number}.jpg" for number in range(48)]
    b = write_predictions(tmp_path / "b.parquet", 3.0, path=moved)
    found = compare(CompareJob(a_uri=str(a), b_uri=str(b), num_resamples=100))
    assert (found["join"]["by"], found["n"]) == ("content_sha256", 48)


def test_different_images_are_an_error_without_common(tmp_path: Path) -> None:
    a = write_predictions(tmp_path / "a.parquet", 1.0)
    b = write_predictions(tmp_path / "b.parquet", 3.0)
    pq.write_table(pq.read_table(b).slice(0, 40), b)
    with pytest.raises(DataError, match="8 are only in"):
        compare(CompareJob(a_uri=str(a), b_uri=str(b)))
    found = compare(CompareJob(a_uri=str(a), b_uri=str(b), common=True, num_resamples=100))
    assert (found["n"], found["join"]["num_only_a"]) == (40, 8)


def test_different_labels_are_an_error(tmp_path: Path) -> None:
    a = write_predictions(tmp_path / "a.parquet", 1.0)
    labels = [CLASSES[(number + (number == 7)) % 4] for number in range(48)]
    b = write_predictions(tmp_path / "b.parquet", 3.0, true_class=labels)
    with pytest.raises(DataError, match="1 of 48 images differ"):
        compare(CompareJob(a_uri=str(a), b_uri=str(b)))


def test_different_content_of_a_path_is_an_error(tmp_path: Path) -> None:
    a = write_predictions(tmp_path / "a.parquet", 1.0)
    b = write_predictions(tmp_path / "b.parquet", 3.0, content_sha256=["f" * 64] * 48)
    with pytest.raises(DataError, match="another content"):
        compare(CompareJob(a_uri=str(a), b_uri=str(b)))


def test_tables_without_labels_or_of_an_earlier_version_are_an_error(tmp_path: Path) -> None:
    a = write_predictions(tmp_path / "a.parquet", 1.0)
    for column, printed in (
        ("true_class", "Expected the column true_class"),
        ("engine", "No column engine in .* an earlier version wrote it"),
        ("probs", "No column probs in .* Run `brainray evaluate` again"),
    ):
        b = write_predictions(tmp_path / "b.parquet", 3.0)
        pq.write_table(pq.read_table(b).drop_columns([column]), b)
        with pytest.raises(DataError, match=printed) as caught:
            compare(CompareJob(a_uri=str(a), b_uri=str(b)))
        assert "\n" not in str(caught.value)


def test_rejected_images_are_compared_too(tmp_path: Path) -> None:
    a = write_predictions(tmp_path / "a.parquet", 1.0)
    b = write_predictions(tmp_path / "b.parquet", 3.0)
    job = CompareJob(a_uri=str(a), b_uri=str(b), num_resamples=100)
    expected = compare(job)
    table = pq.read_table(b)
    for name in CLASSES:  # as for an image unlike the training images
        column = table.column_names.index(f"prob_{name}")
        values = [None, *table[f"prob_{name}"].to_pylist()[1:]]
        table = table.set_column(column, f"prob_{name}", pa.array(values))
    pq.write_table(table, b)
    assert compare(job)["scores"] == expected["scores"]
