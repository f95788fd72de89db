"""Predictions on disk: files are written atomically and once, and shards closed after a kill."""

import json
from dataclasses import replace
from datetime import UTC, datetime
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from brainray.errors import ConfigError, LockLostError, StorageError
from brainray.inference.schema import SCHEMA_VERSION, build_schema
from brainray.inference.store import KNOWN_SCHEMA, PredictionStore, Wave
from brainray.io import storage

CLASSES = ("glioma", "notumor")
ENGINE = {"backend": "torch", "precision": "fp32", "description": "torch, fp32"}
STATISTICS = {"num_rows": 1}


def make_card(classifier_id: str = "aaa", size_px: int = 32) -> dict[str, Any]:
    return {
        "classifier_id": classifier_id,
        "classes": list(CLASSES),
        "weights": {"sha256": "0" * 64},
        "preprocessing": {"size_px": size_px},
    }


def make_rows(*names: str, reason: str | None = None, classifier_id: str = "aaa") -> pa.Table:
    """Return rows of the prediction table, as the prediction stage gives them."""
    is_classified = reason is None
    return pa.Table.from_pylist(
        [
            {
                "scan_uri": name,
                "content_sha256": None if reason in ("missing", "unreadable") else f"sha-{name}",
                "status": "classified" if is_classified else "rejected",
                "reason": reason,
                "predicted_class": "glioma" if is_classified else None,
                "confidence": 0.75 if is_classified else None,
                "prob_glioma": 0.75 if is_classified else None,
                "prob_notumor": 0.25 if is_classified else None,
                "classifier_id": classifier_id,
                "engine": "torch",
                "precision": "fp32",
                "classified_at": datetime.now(UTC),
                "size_bytes": 10,
                "modified_ns": 5,
            }
            for name in names
        ],
        schema=build_schema(CLASSES),
    )


def open_store(output: object, classifier_id: str = "aaa", **options: Any) -> PredictionStore:  # noqa: ANN401
    return PredictionStore.of(str(output), make_card(classifier_id, **options))


def write(store: PredictionStore, shard: int, rows: pa.Table) -> pa.Table:
    return store.write_shard(store.name_file("run", 0, shard), rows, ENGINE, STATISTICS)


def read_names(output: Path) -> list[str]:
    """Return the scans of all rows, as another program reads them."""
    names: list[str] = (
        ds.dataset(output / "predictions", partitioning="hive").to_table()["scan_uri"].to_pylist()
    )
    return sorted(names)


# --------------------------------------------------------------------------------- one file


def test_a_file_has_its_rows_and_describes_how_they_were_computed(tmp_path: Path) -> None:
    store = open_store(tmp_path, size_px=100)
    rows = make_rows("a", "b")
    assert write(store, 7, rows) is rows
    (file,) = (tmp_path / "predictions" / "classifier_id=aaa").iterdir()
    assert file.name == "run-0000-000007.parquet"
    assert store.list_files() == [str(file)]
    assert store.read(str(file), ["scan_uri"])["scan_uri"].to_pylist() == ["a", "b"]
    schema = pq.read_schema(file)
    assert schema.names == [name for name in build_schema(CLASSES).names if name != "classifier_id"]
    assert schema.remove_metadata().equals(store.file_schema)
    about = json.loads(schema.metadata[b"brainray"])
    assert about == store.read_metadata(str(file))
    assert about["schema_version"] == SCHEMA_VERSION
    assert about["classifier_id"] == "aaa"
    assert about["weights_sha256"] == "0" * 64
    assert about["preprocessing"] == {"size_px": 100}
    assert about["class_map"] == {"height": 13, "width": 13, "stride_px": 8}
    assert about["runtime"] == ENGINE
    assert about["statistics"] == STATISTICS
    assert about["versions"]["pyarrow"] == pa.__version__


def test_other_programs_read_the_classifier_from_the_folder(tmp_path: Path) -> None:
    write(open_store(tmp_path), 0, make_rows("a", "b"))
    write(open_store(tmp_path, "bbb"), 0, make_rows("a"))
    write(open_store(tmp_path), 1, make_rows("gone", reason="missing"))
    expected = [("a", "aaa"), ("a", "bbb"), ("b", "aaa"), ("gone", "aaa")]
    found = ds.dataset(tmp_path / "predictions", partitioning="hive").to_table()
    names = zip(found["scan_uri"].to_pylist(), found["classifier_id"].to_pylist(), strict=True)
    assert sorted(names) == expected
    frame = pd.read_parquet(tmp_path / "predictions")
    assert sorted(zip(frame["scan_uri"], frame["classifier_id"], strict=True)) == expected
    assert set(frame.columns) == set(build_schema(CLASSES).names)
    one = pd.read_parquet(tmp_path / "predictions" / "classifier_id=bbb")
    assert one["scan_uri"].tolist() == ["a"]


def test_a_shard_that_is_written_twice_keeps_its_first_rows(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    write(store, 0, make_rows("a", "b"))
    before = Path(store.list_files()[0]).read_bytes()
    stored = write(store, 0, make_rows("a", "c", reason="empty"))
    assert stored["scan_uri"].to_pylist() == ["a", "b"]
    assert stored["status"].to_pylist() == ["classified"] * 2
    assert [Path(uri).read_bytes() for uri in store.list_files()] == [before]


def test_of_concurrent_writes_of_a_shard_one_is_kept(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with ThreadPool(8) as pool:
        stored = pool.map(lambda name: write(store, 0, make_rows(name)), "abcdefgh")
    names = {table["scan_uri"][0].as_py() for table in stored}
    assert len(names) == 1
    assert read_names(tmp_path) == list(names)


def test_the_partial_file_of_a_killed_writer_is_not_read(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    write(store, 0, make_rows("a"))
    folder = tmp_path / "predictions" / "classifier_id=aaa"
    (folder / ".run-0000-000001.parquet.0f.partial").write_bytes(b"PAR1 half of a file")
    assert len(store.list_files()) == 1
    assert read_names(tmp_path) == ["a"]
    assert pd.read_parquet(tmp_path / "predictions")["scan_uri"].tolist() == ["a"]
    write(store, 1, make_rows("b"))
    assert read_names(tmp_path) == ["a", "b"]


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_damaged_file_is_an_error_with_its_name(tmp_path: Path, kept: int) -> None:
    store = open_store(tmp_path)
    write(store, 0, make_rows("a"))
    (uri,) = store.list_files()
    Path(uri).write_bytes(Path(uri).read_bytes()[:kept])
    for read in (
        store.read_known,
        store.read_metadata,
        lambda _: write(store, 0, make_rows("a")),
    ):
        with pytest.raises(StorageError, match=r"run-0000-000000\.parquet' is damaged.*Delete it"):
            read(uri)


def test_a_known_scan_has_its_content_hash_or_the_reason_without_one(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    rows = [make_rows("a"), make_rows("b", reason="corrupt"), make_rows("c", reason="missing")]
    write(store, 0, pa.concat_tables(rows))
    known = store.read_known(store.list_files()[0])
    assert known.schema.equals(KNOWN_SCHEMA)
    assert known["content"].to_pylist() == ["sha-a", "sha-b", "missing"]
    assert known["reason"].to_pylist() == [None, "corrupt", "missing"]
    assert known["size_bytes"].to_pylist() == [10] * 3
    assert known["modified_ns"].to_pylist() == [5] * 3


def test_slices_are_known_by_the_name_of_their_file(tmp_path: Path) -> None:
    """There is one row for each file and content. A file's name may look like a slice's."""
    names = [f"volume.nii#frame={number}" for number in range(3)]
    rows = make_rows(*names, "odd#frame=7").to_pylist()
    for number, row in enumerate(rows[:3]):
        row |= {"frame": number, "content_sha256": "one"}
    rows[1] |= {"reason": "little_tissue", "status": "rejected", "predicted_class": None}
    rows += [rows[0] | {"content_sha256": "two", "modified_ns": 6}]
    store = open_store(tmp_path)
    write(store, 0, pa.Table.from_pylist(rows, schema=build_schema(CLASSES)))
    known = store.read_known(store.list_files()[0])
    assert known.schema.equals(KNOWN_SCHEMA)
    found = sorted(zip(*(known[name].to_pylist() for name in known.column_names), strict=True))
    assert found == [
        ("odd#frame=7", 10, 5, None, "sha-odd#frame=7"),
        ("volume.nii", 10, 5, None, "one"),
        ("volume.nii", 10, 6, None, "two"),
    ]


def test_predictions_of_an_older_schema_of_the_same_classifier_are_refused(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    older = replace(store, about=store.about | {"schema_version": SCHEMA_VERSION - 1})
    write(older, 0, make_rows("a"))
    with pytest.raises(ConfigError, match="older schema"):
        open_store(tmp_path)
    assert open_store(tmp_path, "bbb").list_files() == []


# ---------------------------------------------------------------------------- closed shards


def test_an_interrupted_run_is_closed(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    state = json.loads(json.dumps(store.describe_wave(Wave("run", 0, 4, 5))))
    for shard in (3, 5, 7):  # 3 is in the wave before
        write(store, shard, make_rows(f"scan-{shard}"))
    before = {uri: Path(uri).read_bytes() for uri in store.list_files()}
    assert store.close(state) == 3
    files = {uri: Path(uri).read_bytes() for uri in store.list_files()}
    assert set(files) == {store.name_file("run", 0, shard) for shard in range(3, 9)}
    assert before.items() <= files.items(), "a written file has changed"
    assert store.close(state) == 0
    assert {uri: Path(uri).read_bytes() for uri in store.list_files()} == files
    assert read_names(tmp_path) == ["scan-3", "scan-5", "scan-7"]
    assert len(pd.read_parquet(tmp_path / "predictions")) == 3
    for shard in (4, 6, 8):
        uri = store.name_file("run", 0, shard)
        assert store.read_known(uri).num_rows == 0
        assert store.read_metadata(uri)["closed"] is True


def test_a_late_write_to_a_closed_shard_is_refused(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.close(store.describe_wave(Wave("run", 0, 0, 2)))
    with pytest.raises(LockLostError, match="Another run has taken over"):
        write(store, 1, make_rows("a"))
    assert read_names(tmp_path) == []
    write(store, 2, make_rows("b"))  # this shard was not in the wave
    assert read_names(tmp_path) == ["b"]


def test_a_shard_is_either_written_or_closed_if_both_are_tried_at_once(tmp_path: Path) -> None:
    """If the write is first, its row is kept; otherwise the writer gets an error."""
    store = open_store(tmp_path)
    shards = range(40)

    def write_or_close(shard: int) -> bool | None:
        if shard < 0:
            store.close(store.describe_wave(Wave("run", 0, 0, len(shards))))
            return None
        try:
            write(store, shard, make_rows(f"{shard}"))
        except LockLostError:
            return False
        return True

    with ThreadPool(4) as pool:
        done = pool.map(write_or_close, [*shards[:20], -1, *shards[20:]], chunksize=1)
    written = [
        shard for shard, is_written in zip(shards, done[:20] + done[21:], strict=True) if is_written
    ]
    assert read_names(tmp_path) == sorted(map(str, written))
    assert len(store.list_files()) == len(shards)


def test_the_run_of_another_classifier_is_closed_in_its_own_folder(tmp_path: Path) -> None:
    other = replace(open_store(tmp_path, "bbb"), classes=("one", "two", "three"))
    state = other.describe_wave(Wave("run", 2, 0, 3))
    store = open_store(tmp_path)
    assert store.close(state) == 3
    assert store.list_files() == []
    assert other.list_files() == [other.name_file("run", 2, shard) for shard in range(3)]
    schema = pq.read_schema(other.list_files()[0])
    assert [name for name in schema.names if name.startswith("prob_")] == [
        "prob_one",
        "prob_two",
        "prob_three",
    ]
    assert schema.remove_metadata().equals(other.file_schema)


def test_a_finished_run_leaves_nothing_to_close(tmp_path: Path) -> None:
    assert open_store(tmp_path).close({}) == 0
    assert not (tmp_path / "predictions").exists()


# ------------------------------------------------------------------------------ the output


def test_an_output_of_an_older_schema_is_refused(tmp_path: Path) -> None:
    write(open_store(tmp_path), 0, make_rows("a"))
    pq.write_table(make_rows("old"), tmp_path / "predictions" / "aaa-0-000000.parquet")
    with pytest.raises(ConfigError, match=r"older schema than 4\. Give another") as caught:
        open_store(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_plan_is_outside_the_folder_of_predictions(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    plan_uri = store.name_plan("run", "0000.parquet")
    assert plan_uri == str(tmp_path / ".plan/run/0000.parquet")
    write(store, 1, make_rows("a"))
    storage.write_bytes(plan_uri, b"a plan")
    assert store.list_files() == [store.name_file("run", 0, 1)]
