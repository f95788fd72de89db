"""The answers on disk: whole or absent, each known again, sets that change places."""

import json
import os
import threading
import tracemalloc
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from brainray import storage
from brainray.errors import StorageError
from brainray.pipelines import answers as room
from brainray.pipelines.answers import AnswerSet, Ledger, build_schema

CLASSES = ("glioma", "notumor")
RUNTIME = {"backend": "torch", "precision": "fp32"}


def card(classifier_id: str = "aaa") -> dict[str, Any]:
    return {
        "classifier_id": classifier_id,
        "classes": list(CLASSES),
        "weights": {"sha256": "0" * 64},
        "preprocessing": {"size_px": 32},
    }


def rows(*names: str, reason: str | None = None) -> pa.Table:
    classified = reason is None
    return pa.Table.from_pylist(
        [
            {
                "scan_uri": name,
                "content_sha256": None if reason in ("missing", "unreadable") else f"sha-{name}",
                "status": "classified" if classified else "rejected",
                "reason": reason,
                "predicted_class": "glioma" if classified else None,
                "confidence": 0.75 if classified else None,
                "prob_glioma": 0.75 if classified else None,
                "prob_notumor": 0.25 if classified else None,
                "classified_at": datetime.now(UTC),
                "size_bytes": 10,
                "modified_ns": 5,
            }
            for name in names
        ],
        schema=pa.schema([f for f in build_schema(CLASSES) if f.name != "classifier_id"]),
    )


def open_set(place: Path, classifier_id: str = "aaa", *, replace: bool = False) -> AnswerSet:
    return AnswerSet(str(place), card(classifier_id), replace=replace)


def published(place: Path) -> set[tuple[str, str]]:
    table = pq.read_table(place / "predictions", columns=["scan_uri", "classifier_id"])
    return set(zip(*(c.to_pylist() for c in table.columns), strict=True))


def test_what_is_written_is_read_and_says_what_wrote_it(tmp_path: Path) -> None:
    answers = open_set(tmp_path)
    answers.write(rows("a", "b"), RUNTIME)
    answers.write(rows("c", reason="empty"), RUNTIME)
    assert answers.read().num_rows == 3
    files = sorted((tmp_path / "predictions").iterdir())
    assert len(files) == 2
    schema = pq.read_schema(files[0])
    assert schema.remove_metadata().equals(build_schema(CLASSES))
    about = json.loads(schema.metadata[b"brainray"])
    assert about["schema_version"] == room.ANSWERS_SCHEMA_VERSION
    assert about["weights_sha256"] == "0" * 64
    assert about["preprocessing"] == {"size_px": 32}
    assert about["runtime"] == RUNTIME
    assert about["versions"]["pyarrow"] == pa.__version__


def test_the_metadata_says_how_a_map_lies_over_the_square(tmp_path: Path) -> None:
    answers = AnswerSet(str(tmp_path), card() | {"preprocessing": {"size_px": 100}}, replace=False)
    answers.write(rows("a"), RUNTIME)
    (file,) = (tmp_path / "predictions").iterdir()
    about = json.loads(pq.read_schema(file).metadata[b"brainray"])
    assert about["class_map"] == {"height": 4, "width": 4, "stride_px": 32}


def test_files_of_the_first_schema_are_read_beside_those_of_this_one(tmp_path: Path) -> None:
    answers = open_set(tmp_path)
    first = rows("old").append_column("classifier_id", pa.array(["aaa"]))
    first = first.select([name for name in answers.schema.names if name != "class_map"])
    storage.write_table(str(tmp_path / "predictions" / "aaa-0-000000.parquet"), first)
    answers.write(rows("without"), RUNTIME)
    new = rows("with")
    maps = pa.array([[1.5, -2.0, 0.25, 0.0]], pa.list_(pa.float32()))
    place = new.schema.get_field_index("class_map")
    answers.write(new.set_column(place, new.schema.field(place), maps), RUNTIME)
    table = open_set(tmp_path).read()
    assert table.schema.equals(build_schema(CLASSES))
    found = dict(zip(table["scan_uri"].to_pylist(), table["class_map"].to_pylist(), strict=True))
    assert found == {"old": None, "without": None, "with": [1.5, -2.0, 0.25, 0.0]}
    assert open_set(tmp_path).read(["class_map"]).column_names == ["class_map"]
    ledger = open_set(tmp_path).read_ledger()
    assert all(ledger.has_content(name, f"sha-{name}") for name in found)
    assert {name for name, _ in published(tmp_path)} == set(found)


def test_the_ledger_knows_files_and_contents(tmp_path: Path) -> None:
    answers = open_set(tmp_path)
    answers.write(rows("a"), RUNTIME)
    answers.write(rows("gone", reason="missing"), RUNTIME)
    ledger = open_set(tmp_path).read_ledger()
    assert ledger.has_file("a", 10, 5)
    assert not ledger.has_file("a", 11, 5)
    assert not ledger.has_file("a", 10, 6)
    assert not ledger.has_file("b", 10, 5)
    assert ledger.has_content("a", "sha-a")
    assert not ledger.has_content("a", "sha-b")
    assert not ledger.has_file("gone", 10, 5), "it is looked for again"
    assert ledger.has_content("gone", "missing")
    assert not ledger.has_content("gone", "sha-gone")


def test_an_empty_ledger_knows_nothing() -> None:
    assert not Ledger.of([]).has_file("a", 1, 1)
    assert not Ledger.of([]).has_content("a", "b")


def test_a_ledger_takes_the_memory_of_its_keys_not_of_the_answers(tmp_path: Path) -> None:
    names = [f"s3://hospital/inbox/{number:06d}.jpg" for number in range(2_000)]
    for start in range(0, 2_000, 100):
        open_set(tmp_path).write(rows(*names[start : start + 100]), RUNTIME)
    answers = open_set(tmp_path)
    tracemalloc.start()
    ledger = answers.read_ledger()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(ledger.files) == len(ledger.contents) == 2_000
    assert peak < 300 * 2_000, "bytes; all rows at once take 800 for each"


def test_another_classifier_makes_a_set_beside(tmp_path: Path) -> None:
    open_set(tmp_path).write(rows("a"), RUNTIME)
    other = open_set(tmp_path, "bbb")
    assert not other.read_ledger().has_content("a", "sha-a")
    other.write(rows("a"), RUNTIME)
    assert published(tmp_path) == {("a", "aaa"), ("a", "bbb")}
    assert open_set(tmp_path).read().num_rows == 1
    prefixed = pq.read_table(next((tmp_path / "predictions").glob("bbb-*.parquet")))
    assert prefixed["classifier_id"].to_pylist() == ["bbb"]


def test_a_replacing_set_is_out_of_sight_until_it_is_published(tmp_path: Path) -> None:
    open_set(tmp_path).write(rows("a", "b"), RUNTIME)
    first = open_set(tmp_path, "bbb", replace=True)
    first.write(rows("a"), RUNTIME)
    assert published(tmp_path) == {("a", "aaa"), ("b", "aaa")}
    again = open_set(tmp_path, "bbb", replace=True)  # the first was killed: this goes on
    assert again.read_ledger().has_content("a", "sha-a")
    again.write(rows("b"), RUNTIME)
    again.publish()
    assert published(tmp_path) == {("a", "bbb"), ("b", "bbb")}
    assert again.read().num_rows == 2
    assert {p.name for p in tmp_path.iterdir()} == {"predictions", ".replaced"}
    later = open_set(tmp_path, "bbb", replace=True)
    assert not later.replaces, "there is nothing left to replace"


def test_a_reader_never_sees_half_of_an_exchange(tmp_path: Path) -> None:
    """Read all the time while sets change places; every reading is one set, whole."""
    names = [f"scan-{n}" for n in range(50)]
    answers = open_set(tmp_path, "set0")
    for name in names:
        answers.write(rows(name), RUNTIME)
    seen: list[set[str]] = []
    ended = threading.Event()

    def read() -> None:
        while not ended.is_set():
            found = [entry.name.partition("-")[0] for entry in os.scandir(tmp_path / "predictions")]
            seen.append(set(found))
            assert len(found) == 50

    def guarded() -> None:
        try:
            read()
        except BaseException as error:  # told to the test below
            failures.append(error)

    failures: list[BaseException] = []
    reader = threading.Thread(target=guarded)
    reader.start()
    for number in range(1, 6):
        name = f"set{number}"
        new = open_set(tmp_path, name, replace=True)
        for scan in names:
            new.write(rows(scan), RUNTIME)
        new.publish()
    ended.set()
    reader.join()
    assert not failures
    assert all(len(one) == 1 for one in seen)
    assert len({next(iter(one)) for one in seen}) > 1


def test_what_a_killed_exchange_left_is_swept(tmp_path: Path) -> None:
    open_set(tmp_path).write(rows("a"), RUNTIME)
    left = tmp_path / ".next" / "aaa"
    left.mkdir(parents=True)
    (left / "old-1-000000.parquet").write_bytes(b"the set before")
    assert open_set(tmp_path).read().num_rows == 1
    assert not (tmp_path / ".next").exists()
    (aside,) = (tmp_path / ".replaced").iterdir()
    assert (aside / "old-1-000000.parquet").exists(), "somebody may still be reading it"
    aside.rename(aside.with_name("1000000000-long-ago"))
    open_set(tmp_path)
    assert not list((tmp_path / ".replaced").iterdir())


def test_the_exchange_works_where_the_system_has_no_such_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room.ctypes, "CDLL", lambda *_, **__: object())
    open_set(tmp_path).write(rows("a"), RUNTIME)
    new = open_set(tmp_path, "bbb", replace=True)
    new.write(rows("a"), RUNTIME)
    new.publish()
    assert published(tmp_path) == {("a", "bbb")}


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    answers = open_set(tmp_path)
    answers.write(rows("a"), RUNTIME)
    (file,) = (tmp_path / "predictions").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(StorageError, match=file.name):
        answers.read_ledger()
