"""Series and studies of an output: from rows of predictions to two tables."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from brainray.inference.schema import build_schema
from brainray.inference.series import INDETERMINATE, SeriesRule, summarise_series, summarise_study
from brainray.inference.store import PredictionStore
from brainray.inference.studies import (
    SERIES_FILE,
    STUDIES_FILE,
    build_series_schema,
    build_study_schema,
    read_slices,
    summarise_group,
    write_series,
)
from tests.test_store import CLASSES, make_rows, open_store, write

RULE = SeriesRule(min_slices=3, min_run=2)
START = datetime(2026, 1, 1, tzinfo=UTC)


def make_slices(
    series: str,
    probs: list[float | None],
    *,
    study: str | None = "study",
    patient: str | None = "patient",
    later_s: int = 0,
) -> list[dict[str, Any]]:
    """Return rows of a series with these probabilities of a glioma; None is a rejected slice."""
    rows = []
    for number, prob in enumerate(probs):
        reason = "corrupt" if prob is None else None
        (row,) = make_rows(f"/in/{series}/{number}", reason=reason).to_pylist()
        row |= {"series": series, "study": study, "patient": patient, "plane": "axial"}
        row |= {"sop_instance": f"{series}-{number}", "position_mm": 5.0 * number, "flags": ["x"]}
        row |= {"orientation": [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]}
        row |= {"classified_at": START + timedelta(seconds=later_s)}
        if prob is not None:
            row |= {
                "prob_glioma": prob,
                "prob_notumor": 1 - prob,
                "confidence": max(prob, 1 - prob),
            }
        rows.append(row)
    return rows


def make_table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=build_schema(CLASSES))


def summarise(store: PredictionStore, *rows: dict[str, Any]) -> dict[str, Any]:
    """Summarise the rows of one study, as they are read from one file."""
    write(store, len(store.list_files()), make_table(list(rows)))
    slices = read_slices(store, store.list_files()[-1])
    assert slices["group"].null_count == 0
    (found,) = summarise_group(slices, store, RULE).to_pylist()
    return dict(found)


# ------------------------------------------------------------------------------------ one study


def test_a_series_row_is_the_summary_of_its_slices(tmp_path: Path) -> None:
    rows = make_slices("a", [0.1, 0.9, 0.8, None, 0.2])
    found = summarise(open_store(tmp_path), *rows)
    expected = summarise_series(rows, CLASSES, RULE)
    (series,) = found["series"]
    assert (series["answer"], series["reason"]) == (expected["answer"], None) == ("glioma", None)
    assert series["evidence_glioma"] == pytest.approx(expected["evidence"]["glioma"]) == 0.9
    assert series["longest_run_glioma"] == expected["longest_run"]["glioma"] == 2
    assert series["key_slices"] == expected["key_slices"]
    assert (series["num_slices"], series["num_used"]) == (5, 4)
    assert series["skipped"] == [("corrupt", 1)]
    assert (series["series"], series["study"], series["patient"]) == ("a", "study", "patient")
    assert (series["plane"], series["classifier_id"]) == ("axial", "aaa")
    assert "incomplete" in series["flags"]


def test_the_latest_row_of_a_slice_is_used(tmp_path: Path) -> None:
    old = make_slices("a", [0.9, 0.9, 0.9, 0.9])
    new = make_slices("a", [0.1, 0.1, 0.1, 0.1], later_s=60)
    for rows in ([*old, *new], [*new, *old]):
        (series,) = summarise(open_store(tmp_path), *rows)["series"]
        assert (series["answer"], series["num_slices"]) == ("notumor", 4)


def test_series_are_never_merged(tmp_path: Path) -> None:
    """Neighbouring slices of two series are not a run."""
    rows = [*make_slices("a", [0.1, 0.1, 0.1, 0.9]), *make_slices("b", [0.9, 0.1, 0.1, 0.1])]
    found = summarise(open_store(tmp_path), *rows)
    assert [series["longest_run_glioma"] for series in found["series"]] == [1, 1]
    assert found["study"]["num_series"] == 2
    assert found["study"]["series"] == ["a", "b"]


def test_a_series_without_a_study_has_no_study_row(tmp_path: Path) -> None:
    rows = make_slices("volume", [0.1, 0.1, 0.1], study=None, patient=None)
    found = summarise(open_store(tmp_path), *rows)
    assert found["study"] is None
    assert found["series"][0]["study"] is found["series"][0]["patient"] is None


def test_pictures_are_in_no_series(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    write(store, 0, make_rows("a.png", "b.png"))
    assert read_slices(store, store.list_files()[0]).num_rows == 0


def make_summary(series: str, answer: str, glioma: float) -> dict[str, Any]:
    evidence = {"glioma": glioma, "notumor": 1 - glioma}
    return {"series": series, "answer": answer, "evidence": evidence}


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["glioma", "glioma"], ("glioma", None)),
        (["glioma", INDETERMINATE], ("glioma", None)),
        (["glioma", "notumor"], (INDETERMINATE, "disagreement")),
        ([INDETERMINATE, INDETERMINATE], (INDETERMINATE, "no_answers")),
    ],
)
def test_a_study_has_an_answer_if_its_series_agree(
    answers: list[str], expected: tuple[str, str | None]
) -> None:
    series = [make_summary(f"s{number}", answer, 0.5) for number, answer in enumerate(answers)]
    found = summarise_study(series[::-1], CLASSES)
    assert (found["answer"], found["reason"]) == expected
    assert found["series"] == ["s0", "s1"]
    assert found["series_answers"] == answers
    assert (found["num_series"], found["num_answered"]) == (2, 2 - answers.count(INDETERMINATE))


def test_a_study_names_the_strongest_series_of_each_class() -> None:
    series = [make_summary("a", "glioma", 0.6), make_summary("b", "glioma", 0.9)]
    found = summarise_study(series, CLASSES)
    assert found["evidence"] == {"glioma": 0.9, "notumor": 0.4}
    assert found["strongest_series"] == {"glioma": "b", "notumor": "a"}


# --------------------------------------------------------------------------------- the tables


@pytest.mark.usefixtures("local_ray")
def test_the_tables_hold_every_series_and_study_once(tmp_path: Path) -> None:
    """Their slices can be in any file, and each run replaces the tables of the last one."""
    store = open_store(tmp_path)
    rows = [
        *make_slices("a", [0.9, 0.9, 0.9, 0.9], study="one"),
        *make_slices("b", [0.1, 0.1, 0.1, 0.1], study="one"),
        *make_slices("c", [0.1, 0.1, 0.1, 0.1], study="two"),
        *make_slices("volume", [0.9, 0.9, 0.9, 0.9], study=None),
        *make_rows("picture.png").to_pylist(),
    ]
    for shard in range(3):
        write(store, shard, make_table(rows[shard::3]))
    counts = write_series(store, RULE, 16)
    assert counts == {
        "series": {"total": 4, "by_answer": {"glioma": 2, "notumor": 2}},
        "studies": {"total": 2, "by_answer": {"indeterminate": 1, "notumor": 1}},
    }
    series = pq.read_table(tmp_path / SERIES_FILE)
    studies = pq.read_table(tmp_path / STUDIES_FILE)
    assert series.schema.names == build_series_schema(CLASSES).names
    assert studies.schema.names == build_study_schema(CLASSES).names
    found = {row["series"]: row for row in series.to_pylist()}
    assert {name: row["answer"] for name, row in found.items()} == {
        "a": "glioma",
        "b": "notumor",
        "c": "notumor",
        "volume": "glioma",
    }
    assert {row["num_slices"] for row in found.values()} == {4}
    assert {row["study"]: row["reason"] for row in studies.to_pylist()} == {
        "one": "disagreement",
        "two": None,
    }
    about = json.loads(series.schema.metadata[b"brainray"])
    assert about["rule"]["min_run"] == 2
    assert "not a probability" in about["notice"]

    strict = SeriesRule(min_slices=100)
    assert write_series(store, strict, 16)["series"]["by_answer"] == {INDETERMINATE: 4}
    assert pq.read_table(tmp_path / SERIES_FILE).num_rows == 4
    assert write_series(store, RULE, 0) == {}
    assert not (tmp_path / SERIES_FILE).exists()
    assert not (tmp_path / STUDIES_FILE).exists()
