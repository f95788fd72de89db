"""What is a scan, and what it is called: every visible file of every place, once."""

import itertools
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from brainray import storage
from brainray.dataset.scans import (
    CHUNK_BYTES,
    CHUNK_ROWS,
    FIRST_CHUNK_ROWS,
    FoundScan,
    chunk_scans,
    list_scans,
    read_named_scan,
)
from brainray.errors import DataError, RejectedImage

HARD_NAMES = [
    "with space.jpg",
    "quote\"and'quote.png",
    "new\nline.png",
    "tab\tand#hash?and%25.png",
    "äöü-脳.png",
    "star*and[bracket].png",
    "no-suffix",
    "x" * 251 + ".png",  # 255 bytes
]


def fill(folder: Path, names: list[str]) -> None:
    for name in names:
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(name.encode())


def names_of(*places: object) -> list[str]:
    return [scan.scan_uri for scan in list_scans([str(place) for place in places])]


def test_a_folder_gives_every_visible_file_below_it(tmp_path: Path) -> None:
    fill(tmp_path, ["a.jpg", "deep/er/b.txt", "c.zip", ".hidden", "deep/.cache/d.jpg"])
    hidden = itertools.count()
    found = list(list_scans([str(tmp_path)], hidden=lambda: next(hidden)))
    assert {s.scan_uri for s in found} == {
        str(tmp_path / n) for n in ("a.jpg", "deep/er/b.txt", "c.zip")
    }
    assert next(hidden) == 2
    sizes = {Path(s.scan_uri).name: s.size_bytes for s in found}
    assert sizes["b.txt"] == len("deep/er/b.txt")
    assert all(s.modified_ns == Path(s.uri).stat().st_mtime_ns for s in found)


def test_hard_names_are_found_and_read_again(tmp_path: Path) -> None:
    fill(tmp_path, HARD_NAMES)
    found = names_of(tmp_path)
    assert len(found) == len(HARD_NAMES)
    assert {read_named_scan(uri).decode() for uri in found} == set(HARD_NAMES)


def test_a_name_that_is_not_utf8_gets_a_uri_that_is(tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path) + b"/caf\xe9 100%.jpg"
    Path(os.fsdecode(raw)).write_bytes(b"pixels")
    (uri,) = names_of(tmp_path)
    uri.encode()
    assert uri.endswith("/caf%E9%20100%25.jpg")
    assert read_named_scan(uri) == b"pixels"
    assert names_of(uri) == [uri]


def test_links_are_followed_once_and_broken_ones_are_scans(tmp_path: Path) -> None:
    fill(tmp_path, ["real/a.jpg"])
    (tmp_path / "again").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "loop").symlink_to(tmp_path)
    (tmp_path / "broken.jpg").symlink_to(tmp_path / "nowhere")
    found = names_of(tmp_path)
    assert sorted(Path(uri).name for uri in found) == ["a.jpg", "broken.jpg"]
    with pytest.raises(RejectedImage, match="missing"):
        read_named_scan(str(tmp_path / "broken.jpg"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_does_not_block_the_reader(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (uri,) = names_of(tmp_path)
    with pytest.raises(RejectedImage, match="unreadable"):
        read_named_scan(uri)


def test_a_folder_that_cannot_be_listed_is_one_rejected_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, ["closed/a.jpg", "open/b.jpg"])
    scan = os.scandir

    def refuse(folder: str) -> object:
        if folder.endswith("closed"):
            raise PermissionError(13, "Permission denied", folder)
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    found = {Path(s.scan_uri).name: s.reason for s in list_scans([str(tmp_path)])}
    assert found == {"closed": "unreadable", "b.jpg": None}


def test_globs(tmp_path: Path) -> None:
    fill(tmp_path, ["a/1.jpg", "a/2.png", "b/deep/3.jpg", "b/4.jpg", "[x]/5.jpg"])

    def match(pattern: str) -> set[str]:
        return {Path(uri).name for uri in names_of(f"{tmp_path}/{pattern}")}

    assert match("*/*.jpg") == {"1.jpg", "4.jpg", "5.jpg"}
    assert match("**/*.jpg") == {"1.jpg", "3.jpg", "4.jpg", "5.jpg"}
    assert match("a/?.png") == {"2.png"}
    assert match("[ab]/*") == {"1.jpg", "2.png", "4.jpg"}
    assert match("[x]/5.jpg") == {"5.jpg"}, "a file of that very name comes before a pattern"
    assert match("*.nothing") == set()


def test_overlapping_places_give_a_scan_once(tmp_path: Path) -> None:
    fill(tmp_path, ["a/1.jpg", "a/2.jpg", "b/3.jpg"])
    found = names_of(tmp_path, tmp_path / "a", f"{tmp_path}/a/*.jpg", tmp_path / "a" / "1.jpg")
    assert len(found) == len(set(found)) == 3


def test_lists(tmp_path: Path) -> None:
    fill(tmp_path, ["in/1.jpg", "in/2 and, comma.jpg", "in/new\nline.jpg"])
    (tmp_path / "list.txt").write_text(f"in/1.jpg\n\n{tmp_path}/in/gone.jpg\nin/1.jpg\n")
    assert names_of(tmp_path / "list.txt") == [f"{tmp_path}/in/1.jpg", f"{tmp_path}/in/gone.jpg"]
    (tmp_path / "list.csv").write_text(
        'patient,uri\n7,"in/2 and, comma.jpg"\n8,"in/new\nline.jpg"\n', newline=""
    )
    found = names_of(tmp_path / "list.csv")
    assert [read_named_scan(uri).decode() for uri in found] == [
        "in/2 and, comma.jpg",
        "in/new\nline.jpg",
    ]
    (tmp_path / "bare.csv").write_text("in/1.jpg\n")
    assert names_of(tmp_path / "bare.csv") == [f"{tmp_path}/in/1.jpg"]


def test_tables_give_a_scan_for_every_row(tmp_path: Path) -> None:
    contents = [f"scan {n}".encode() for n in range(10)]
    table = pa.table({"image_bytes": contents, "other": list(range(10))})
    pq.write_table(table, tmp_path / "scans.parquet", row_group_size=4)
    found = names_of(tmp_path / "scans.parquet")
    assert found == [f"{tmp_path}/scans.parquet#row={n}" for n in range(10)]
    assert [read_named_scan(uri) for uri in found] == contents
    assert names_of(tmp_path) == found, "a table within a folder is a table too"
    with pytest.raises(RejectedImage, match="missing"):
        read_named_scan(f"{tmp_path}/scans.parquet#row=10")


def test_what_only_looks_like_a_table(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [1]}), tmp_path / "other.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="image_bytes"):
        names_of(tmp_path / "other.parquet")
    with pytest.raises(DataError, match="as Parquet"):
        names_of(tmp_path / "broken.parquet")
    reasons = {Path(s.uri).name: s.reason for s in list_scans([str(tmp_path)])}
    assert reasons == {"other.parquet": "unsupported", "broken.parquet": "unsupported"}


@pytest.mark.parametrize("name", ["nowhere", "nowhere/*.jpg", "gone.jpg", "gone.txt"])
def test_a_place_that_is_not_there_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="No scans at"):
        names_of(tmp_path / name)


def test_the_output_is_left_out(tmp_path: Path) -> None:
    fill(tmp_path, ["a.jpg", "out/predictions/part.bin", "outer.jpg"])
    found = list_scans([str(tmp_path)], leave_out=[str(tmp_path / "out")])
    assert {Path(s.uri).name for s in found} == {"a.jpg", "outer.jpg"}


def test_the_first_scan_comes_before_the_listing_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, [f"{n}/scan.jpg" for n in range(20)])
    looked: list[str] = []
    scan = os.scandir
    monkeypatch.setattr(os, "scandir", lambda f: (looked.append(f), scan(f))[1])
    next(list_scans([str(tmp_path)]))
    assert len(looked) == 2


def test_chunks_are_small_at_first_and_bounded_by_rows_and_bytes() -> None:
    def scan(weight: int) -> FoundScan:
        return FoundScan("u", "u", weight_bytes=weight)

    light = [chunk.num_rows for chunk in chunk_scans(scan(10) for _ in range(1000))]
    assert light[0] == FIRST_CHUNK_ROWS
    assert max(light) == CHUNK_ROWS
    assert sum(light) == 1000
    heavy = [chunk.num_rows for chunk in chunk_scans(scan(CHUNK_BYTES // 2) for _ in range(5))]
    assert heavy == [2, 2, 1]


def test_reading_stops_beyond_the_limit(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"x" * 1000)
    assert len(storage.read_bytes(str(tmp_path / "large"), max_bytes=99)) == 100
    assert len(storage.read_bytes(str(tmp_path / "large"), max_bytes=1000)) == 1000
