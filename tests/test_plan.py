"""The plan of a bulk job: which scans are new, and which shard each is in."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brainray.data.read import read_scan
from brainray.data.scans import LISTING_SCHEMA, find_sources
from brainray.errors import DataError
from brainray.inference import plan as plan_module
from brainray.inference.plan import (
    FIRST_SHARD_ROWS,
    PLAN_SCHEMA,
    TABLE_ROWS_PER_PART,
    Plan,
    PlanOptions,
    choose_new,
    find_neighbourhoods,
    list_shard_sizes,
    make_plan,
    name_part,
    name_scans,
    read_shard,
    weigh_files,
)
from brainray.inference.store import Wave
from brainray.io.identifiers import Identifiers
from tests.test_store import make_rows, open_store, write

IDENTIFIERS = Identifiers(bytes(16))

# ----------------------------------------------------------------------------- new scans


def listed(scan_uri: str, **columns: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return a row of a listing."""
    file = {"uri": scan_uri, "row_group": -1, "row": -1, "size_bytes": 10, "modified_ns": 5}
    return file | {"scan_uri": scan_uri} | columns


def known(scan_uri: str, **columns: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return a row of an earlier prediction."""
    row = {"scan_uri": scan_uri, "size_bytes": 10, "modified_ns": 5, "content": f"sha-{scan_uri}"}
    return row | columns


def choose(*rows: dict[str, Any]) -> dict[str, list[str] | None]:
    """Return the scans to open, and the content hashes for which each of them has rows."""
    table = choose_new(pa.Table.from_pylist(list(rows), schema=plan_module._ROWS_SCHEMA))
    assert table.schema.equals(PLAN_SCHEMA)
    names = table["scan_uri"].to_pylist()
    assert len(names) == len(set(names))
    return dict(zip(names, table["known_contents"].to_pylist(), strict=True))


def test_a_scan_without_a_row_is_new() -> None:
    assert choose(listed("a"), listed("b"), known("c")) == {"a": None, "b": None}
    assert choose(known("c")) == {}
    assert choose() == {}


def test_a_scan_that_is_listed_twice_is_opened_once() -> None:
    unknown = {"size_bytes": None, "modified_ns": None}
    assert choose(listed("a"), listed("b"), listed("a", **unknown), listed("a")) == {
        "a": None,
        "b": None,
    }


def test_a_scan_with_a_row_of_the_same_size_and_time_is_not_opened() -> None:
    assert choose(listed("a"), listed("b"), known("a")) == {"b": None}
    assert choose(listed("a"), known("a", modified_ns=4, content="old"), known("a")) == {}


@pytest.mark.parametrize(
    "change",
    [
        {"size_bytes": 11},
        {"modified_ns": 6},
        {"size_bytes": None},
        {"modified_ns": None},
        {"size_bytes": None, "modified_ns": None},
    ],
)
def test_a_changed_scan_is_opened_with_the_hashes_that_have_rows(
    change: dict[str, Any],
) -> None:
    rows = [known("a"), known("a", modified_ns=3, content="older"), known("b")]
    found = choose(listed("a", **change), listed("b"), *rows)
    assert {name: sorted(contents or []) for name, contents in found.items()} == {
        "a": ["older", "sha-a"]
    }


@pytest.mark.parametrize("reason", ["missing", "unreadable"])
def test_a_scan_that_could_not_be_read_is_retried(reason: str) -> None:
    assert choose(listed("a"), known("a", reason=reason, content=reason)) == {"a": [reason]}
    assert choose(listed("a"), known("a", reason=reason, content=reason), known("a")) == {}


def test_a_scan_that_was_rejected_for_its_content_is_not_retried() -> None:
    assert choose(listed("a"), known("a", reason="corrupt")) == {}
    assert choose(listed("a"), known("a", reason="low_confidence")) == {}
    assert choose(listed("a"), known("a", reason="unsupported", content="unsupported")) == {}


def test_rows_of_a_table_are_compared_by_the_time_of_the_table() -> None:
    """A row of a table has no size of its own."""
    row = {"uri": "t.parquet", "row_group": 0, "row": 0, "size_bytes": None}
    predicted = known("t.parquet#row=0", size_bytes=None)
    assert choose(listed("t.parquet#row=0", **row), predicted) == {}
    assert choose(listed("t.parquet#row=0", **row | {"modified_ns": 6}), predicted) == {
        "t.parquet#row=0": ["sha-t.parquet#row=0"]
    }
    assert choose(listed("t.parquet#row=1", **row), predicted) == {"t.parquet#row=1": None}


def test_entries_of_lists_are_opened_in_every_run() -> None:
    """A list gives neither size nor time, so an entry matches no row."""
    nulls = {"size_bytes": None, "modified_ns": None}
    assert choose(listed("a", **nulls), known("a", **nulls)) == {"a": ["sha-a"]}


def test_rows_of_one_row_group_stay_together() -> None:
    rows = [
        listed(f"{table}#row={group * 10 + row}", uri=table, row_group=group, row=row)
        for row, group, table in itertools.product(range(4), range(3), ("t.parquet", "u.parquet"))
    ]
    table = choose_new(pa.Table.from_pylist(rows, schema=plan_module._ROWS_SCHEMA))
    positions = list(
        zip(*(table[name].to_pylist() for name in ("uri", "row_group", "row")), strict=True)
    )
    assert positions == sorted(positions)


# ---------------------------------------------------------------------------------- shards


def compute_sizes(num_rows: int, max_rows: int, num_engines: int, *, is_first: bool) -> list[int]:
    """Return the sizes of shards of files with one slice each."""
    weights = np.ones(num_rows, np.int64)
    return list_shard_sizes(weights, max_rows, num_engines, is_first=is_first)


@settings(max_examples=50, deadline=None)
@given(
    num_rows=st.integers(0, 20_000),
    max_rows=st.integers(1, 3000),
    num_engines=st.integers(1, 64),
    is_first=st.booleans(),
)
def test_shards_hold_every_scan_and_are_bounded(
    num_rows: int, max_rows: int, num_engines: int, is_first: bool
) -> None:
    sizes = compute_sizes(num_rows, max_rows, num_engines, is_first=is_first)
    assert sum(sizes) == num_rows
    assert all(0 < size <= max_rows for size in sizes)
    assert sizes[:-1] == sorted(sizes[:-1]), "sizes do not decrease, except that of the last shard"
    share = math.ceil(num_rows / (8 * num_engines))
    assert max(sizes, default=0) <= max(share, FIRST_SHARD_ROWS), "every engine has work"
    if is_first:
        assert max(sizes[:num_engines], default=0) <= FIRST_SHARD_ROWS


def test_the_first_shards_double_in_size() -> None:
    sizes = compute_sizes(10_000, 500, 2, is_first=True)
    assert sizes[:12] == [16, 16, 32, 32, 64, 64, 128, 128, 256, 256, 500, 500]
    assert set(sizes[12:-1]) == {500}
    later = compute_sizes(10_000, 500, 2, is_first=False)
    assert set(later[:-1]) == {500}


def test_few_scans_of_large_images_make_small_shards() -> None:
    assert compute_sizes(10, 3, 1, is_first=True) == [3, 3, 3, 1]


@settings(max_examples=50, deadline=None)
@given(
    weights=st.lists(st.integers(1, 400), max_size=200),
    max_weight=st.integers(1, 3000),
    num_engines=st.integers(1, 8),
    is_first=st.booleans(),
)
def test_a_shard_has_one_file_or_at_most_the_maximum_number_of_slices(
    weights: list[int], max_weight: int, num_engines: int, is_first: bool
) -> None:
    sizes = list_shard_sizes(
        np.array(weights, np.int64), max_weight, num_engines, is_first=is_first
    )
    assert sum(sizes) == len(weights)
    shards = np.split(np.array(weights), np.cumsum(sizes)[:-1]) if sizes else []
    assert all(len(shard) == 1 or 1 < shard.sum() <= max_weight for shard in shards)
    if is_first and shards:
        assert len(shards[0]) == 1 or shards[0].sum() <= FIRST_SHARD_ROWS


def test_files_are_weighed_by_name_and_size() -> None:
    """The planner opens no file."""
    mib = 2**20
    files = {
        "/in/a.JPG": (50 * mib, 1),
        "/in/new\nline.tiff": (50 * mib, 1),
        "/in/volume.nii.gz": (10 * mib, 160),
        "/in/IM0001": (mib // 8, 2),
        "/in/short": (5, 1),
        "/in/picture.png.dcm": (mib + 1, 17),
        "/in/list-entry.dcm": (None, 1),
    }
    table = pa.table({"uri": list(files), "size_bytes": [size for size, _ in files.values()]})
    found = dict(zip(files, weigh_files(table).tolist(), strict=True))
    assert found == {uri: weight for uri, (_, weight) in files.items()}
    assert weigh_files(table.slice(0, 0)).shape == (0,)


def test_names_are_hashes_if_paths_are_redacted() -> None:
    """Known scans are compared by these hashes. The plan keeps the URI to read from."""
    identifiers = Identifiers(bytes(16), redact_paths=True)
    listing = pa.Table.from_pylist([listed("/in/Doe.dcm"), listed("/in/b")], schema=LISTING_SCHEMA)
    named = name_scans(listing, identifiers)
    assert named["uri"].to_pylist() == ["/in/Doe.dcm", "/in/b"]
    assert named["scan_uri"].to_pylist() == [
        identifiers.name("/in/Doe.dcm"),
        identifiers.name("/in/b"),
    ]
    assert name_scans(listing, Identifiers(bytes(16))) is listing
    assert choose(*named.to_pylist(), known(identifiers.name("/in/b"))) == {
        identifiers.name("/in/Doe.dcm"): None
    }


def test_neighbouring_rows_of_a_table_share_a_part() -> None:
    numbers = [0, 1, TABLE_ROWS_PER_PART - 1, TABLE_ROWS_PER_PART, 2 * TABLE_ROWS_PER_PART]
    names = [f"/in/t.parquet#row={number}" for number in numbers]
    found = find_neighbourhoods(names)
    assert found[0] == found[1] == found[2]
    assert len(set(found)) == 3
    assert find_neighbourhoods(["/in/other.parquet#row=0"]) != found[:1]
    files = ["/in/a.jpg", "/in/b.parquet", "/in/c.jpg#row=7", "/in/d.parquet#row=x"]
    assert find_neighbourhoods(files) == files


# ------------------------------------------------------------------------------- on Ray


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    """Write 60 files and a table of 20 rows; a list repeats one file and names a missing one."""
    folder = tmp_path / "inbox"
    for number in range(60):
        file = folder / f"{number % 7}" / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(f"scan {number}".encode())
    rows = [f"row {number}".encode() for number in range(20)]
    pq.write_table(pa.table({"image_bytes": rows}), folder / "t.parquet", row_group_size=6)
    (folder / ".hidden").touch()
    names = [str(folder / "0" / "0.jpg"), str(folder / "nowhere.jpg")]
    (tmp_path / "list.txt").write_text("\n".join(names))
    return folder


def make_options(inbox: Path, output: Path, run: str = "run") -> PlanOptions:
    return PlanOptions(
        sources=tuple(find_sources([str(inbox), str(inbox.parent / "list.txt")])),
        store=open_store(output),
        run=run,
        max_shard_rows=8,
        num_engines=1,
        identifiers=IDENTIFIERS,
    )


def read_plan(options: PlanOptions, plan: Plan) -> list[dict[str, Any]]:
    """Return the rows of all shards."""
    rows: list[dict[str, Any]] = []
    for part, num_shards in enumerate(plan.num_shards):
        uri = options.store.name_plan(options.run, name_part(part))
        for shard in range(num_shards):
            table = read_shard(uri, shard)
            assert table.schema.equals(PLAN_SCHEMA)
            assert 0 < table.num_rows <= options.max_shard_rows
            rows += table.to_pylist()
    assert len(rows) == plan.num_scans
    return rows


def read_contents(rows: Sequence[dict[str, Any]]) -> Counter[bytes]:
    return Counter(
        read_scan(row["uri"], row["row_group"], row["row"])
        for row in rows
        if not row["uri"].endswith("nowhere.jpg")
    )


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("max_part_rows", [1_000_000, 45])
def test_a_plan_has_every_scan_without_a_row_once(
    inbox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_part_rows: int
) -> None:
    """With one part and with several; ``make_plan`` chooses the number in this process."""
    monkeypatch.setattr(plan_module, "MAX_PART_ROWS", max_part_rows)
    options = make_options(inbox, tmp_path / "out")
    plan = make_plan(options)
    assert len(plan.num_shards) == (1 if max_part_rows > 100 else 2)
    assert sum(map(bool, plan.num_shards)) > (0 if max_part_rows > 100 else 1)
    assert (plan.num_listed, plan.num_scans, plan.num_hidden) == (82, 81, 1)
    rows = read_plan(options, plan)
    assert len({row["scan_uri"] for row in rows}) == 81
    assert {row["known_contents"] for row in rows} == {None}
    contents = [f"scan {number}" for number in range(60)] + [
        f"row {number}" for number in range(20)
    ]
    assert read_contents(rows) == Counter(content.encode() for content in contents)

    files = [row for row in rows if row["row_group"] < 0 and row["size_bytes"] is not None]
    chosen = [row["scan_uri"] for row in files[:30]]
    predictions = make_rows(*chosen)
    for name in ("size_bytes", "modified_ns"):
        column = pa.array([row[name] for row in files[:30]], pa.int64())
        predictions = predictions.set_column(predictions.schema.get_field_index(name), name, column)
    write(options.store, 0, predictions.slice(0, 20))
    write(options.store, 1, predictions.slice(20))
    options.store.close(options.store.describe_wave(Wave("run", 0, 2, 2)))
    Path(chosen[7]).write_bytes(b"changed in size")

    later = replace(options, run="later")
    plan = make_plan(later)
    rows = read_plan(later, plan)
    assert (plan.num_listed, plan.num_scans) == (82, 81 - 29)
    assert not {row["scan_uri"] for row in rows}.intersection(set(chosen) - {chosen[7]})
    hashes = {row["scan_uri"]: row["known_contents"] for row in rows if row["known_contents"]}
    assert hashes == {chosen[7]: [f"sha-{chosen[7]}"]}


@pytest.mark.usefixtures("local_ray")
def test_a_plan_without_scans_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    options = PlanOptions(
        sources=tuple(find_sources([str(tmp_path / "empty")])),
        store=open_store(tmp_path / "out"),
        run="run",
        max_shard_rows=8,
        num_engines=1,
        identifiers=IDENTIFIERS,
    )
    assert make_plan(options) == Plan(0, 0, 0, (0,))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("local_ray")
def test_a_given_table_without_images_is_an_error(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [1]}), tmp_path / "other.parquet")
    options = replace(
        make_options_without_sources(tmp_path),
        sources=tuple(find_sources([str(tmp_path / "other.parquet")])),
    )
    with pytest.raises(DataError, match="image_bytes"):
        make_plan(options)


def make_options_without_sources(folder: Path) -> PlanOptions:
    return PlanOptions(
        sources=(),
        store=open_store(folder / "out"),
        run="run",
        max_shard_rows=8,
        num_engines=1,
        identifiers=IDENTIFIERS,
    )


def test_the_parts_of_many_scans_are_about_equal_in_size() -> None:
    names = [f"s3://hospital/inbox/{number:07d}.jpg" for number in range(20_000)]
    parts = plan_module.hash_names(find_neighbourhoods(names)) % 4
    counts = np.bincount(parts.astype(np.int64), minlength=4)
    assert counts.min() > 4_700


@pytest.mark.parametrize("list_first", [True, False])
def test_of_two_listings_of_a_scan_the_one_with_a_time_is_used(list_first: bool) -> None:
    """Otherwise a scan that a list repeats would be read in every run."""
    row = {"scan_uri": "a", "uri": "a", "row_group": -1, "row": -1}
    named = [row, row | {"size_bytes": 10, "modified_ns": 5}]
    rows = pa.Table.from_pylist(
        named if list_first else named[::-1], schema=plan_module._ROWS_SCHEMA
    )
    (found,) = choose_new(rows).to_pylist()
    assert (found["size_bytes"], found["modified_ns"]) == (10, 5)
    known = {"scan_uri": "a", "size_bytes": 10, "modified_ns": 5, "content": "c"}
    predictions = pa.Table.from_pylist([known], schema=plan_module._ROWS_SCHEMA)
    assert choose_new(pa.concat_tables([rows, predictions])).num_rows == 0
