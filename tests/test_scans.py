"""Listing scans: every visible file of every URI, once, with its name."""

import itertools
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pydicom
import pytest

from brainray.data import scans as scans_module
from brainray.data.read import read_named_scan
from brainray.data.scans import (
    LISTING_SCHEMA,
    Listing,
    find_sources,
    list_scans,
    list_source,
)
from brainray.errors import DataError, RejectedImage
from brainray.io import storage

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


def fill(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(name.encode())


def list_uris(*scans_uris: object) -> list[str]:
    names: list[str] = list_scans([str(uri) for uri in scans_uris])["scan_uri"].to_pylist()
    return names


def list_reasons(*scans_uris: object) -> dict[str, str | None]:
    """Return the reason of each listed scan, by the name of its file."""
    listed = list_scans([str(uri) for uri in scans_uris])
    names = [Path(uri).name for uri in listed["uri"].to_pylist()]
    return dict(zip(names, listed["reason"].to_pylist(), strict=True))


def list_pieces(*scans_uris: object, max_seconds: float = 0.0) -> list[Listing]:
    """List as the tasks of a job do: each returns the sources that are left."""
    waiting = find_sources([str(uri) for uri in scans_uris])
    pieces = []
    while waiting:
        pieces.append(list_source(waiting.pop(), max_seconds=max_seconds))
        waiting += pieces[-1].rest
    return pieces


def join_pieces(pieces: Sequence[Listing]) -> pa.Table:
    return pa.concat_tables([piece.scans for piece in pieces]).sort_by("scan_uri")


# ------------------------------------------------------------------------------------- folders


def test_a_folder_gives_every_visible_file_below_it(tmp_path: Path) -> None:
    names = ["a.jpg", "deep/er/b.txt", "c.zip"]
    fill(tmp_path, [*names, ".hidden", "deep/.cache/d.jpg", ".cache/e/f.jpg", "__MACOSX/g.jpg"])
    found = list_scans([str(tmp_path)])
    assert found.schema.equals(LISTING_SCHEMA)
    rows = {row["scan_uri"]: row for row in found.to_pylist()}
    assert set(rows) == {str(tmp_path / name) for name in names}
    for uri, row in rows.items():
        stat = Path(uri).stat()
        assert (row["uri"], row["size_bytes"]) == (uri, stat.st_size)
        assert row["modified_ns"] == stat.st_mtime_ns
        assert (row["row_group"], row["row"], row["reason"]) == (-1, -1, None)


def test_hidden_files_and_files_of_hidden_folders_are_counted(tmp_path: Path) -> None:
    fill(tmp_path, ["a.jpg", ".hidden", "b/.cache/c.jpg", ".cache/d/e.jpg", "__MACOSX/f.parquet"])
    assert sum(piece.num_hidden for piece in list_pieces(tmp_path)) == 4
    assert list_uris(tmp_path) == [str(tmp_path / "a.jpg")]


def test_a_hidden_folder_may_be_given_itself(tmp_path: Path) -> None:
    fill(tmp_path, [".inbox/a.jpg"])
    assert list_uris(tmp_path / ".inbox") == [str(tmp_path / ".inbox" / "a.jpg")]


def test_hard_names_are_found_and_read_again(tmp_path: Path) -> None:
    fill(tmp_path, HARD_NAMES)
    found = list_uris(tmp_path)
    assert len(found) == len(HARD_NAMES)
    assert {read_named_scan(uri).decode() for uri in found} == set(HARD_NAMES)


def test_a_name_that_is_not_utf8_gets_a_utf8_uri(tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path) + b"/caf\xe9 100%.jpg"
    Path(os.fsdecode(raw)).write_bytes(b"pixels")
    (uri,) = list_uris(tmp_path)
    uri.encode()
    assert uri.endswith("/caf%E9%20100%25.jpg")
    assert read_named_scan(uri) == b"pixels"
    assert list_uris(uri) == [uri]


def test_a_folder_whose_name_is_not_utf8_is_listed(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    fill(folder, ["deep/a.jpg"])
    (uri,) = list_uris(tmp_path)
    assert read_named_scan(uri) == b"deep/a.jpg"


def test_the_output_folder_is_not_listed(tmp_path: Path) -> None:
    fill(tmp_path, ["a.jpg", "out/predictions/part.bin", "out.jpg", "outer/b.jpg"])
    found = list_scans([str(tmp_path)], leave_out=[str(tmp_path / "out")])
    assert {Path(uri).name for uri in found["uri"].to_pylist()} == {"a.jpg", "out.jpg", "b.jpg"}


@pytest.fixture
def closed_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make listing a folder named `closed` fail; permissions would not stop root."""
    scan = os.scandir

    def refuse(folder: str) -> object:
        if folder.endswith("closed"):
            raise PermissionError(13, "Permission denied", folder)
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refuse)


@pytest.mark.usefixtures("closed_folders")
def test_a_folder_that_cannot_be_listed_is_one_rejected_scan(tmp_path: Path) -> None:
    fill(tmp_path, ["closed/a.jpg", "open/b.jpg"])
    assert list_reasons(tmp_path) == {"closed": "unreadable", "b.jpg": None}


@pytest.mark.usefixtures("closed_folders")
def test_a_hidden_folder_that_cannot_be_listed_is_ignored(tmp_path: Path) -> None:
    fill(tmp_path, [".closed/a.jpg", ".trash/closed/b.jpg", "c.jpg"])
    assert list_reasons(tmp_path) == {"c.jpg": None}


# --------------------------------------------------------------------------------------- links


def test_a_link_to_another_folder_is_followed_and_keeps_its_name(tmp_path: Path) -> None:
    fill(tmp_path, ["inbox/a.jpg", "elsewhere/deep/b.jpg"])
    (tmp_path / "inbox" / "linked").symlink_to(tmp_path / "elsewhere")
    assert set(list_uris(tmp_path / "inbox")) == {
        str(tmp_path / "inbox" / name) for name in ("a.jpg", "linked/deep/b.jpg")
    }


def test_a_link_into_the_listed_folder_or_above_itself_is_not_followed(tmp_path: Path) -> None:
    fill(tmp_path, ["outer/inbox/real/a.jpg", "elsewhere/b.jpg"])
    inbox = tmp_path / "outer" / "inbox"
    (inbox / "again").symlink_to(inbox / "real")
    (inbox / "real" / "loop").symlink_to(inbox)
    (inbox / "above").symlink_to(tmp_path / "outer")
    (inbox / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "elsewhere")
    found = [str(Path(uri).relative_to(inbox)) for uri in list_uris(inbox)]
    assert sorted(found) == ["linked/b.jpg", "real/a.jpg"]


def test_a_link_to_a_file_is_a_scan_and_a_broken_one_is_missing(tmp_path: Path) -> None:
    fill(tmp_path, ["a.jpg"])
    (tmp_path / "b.jpg").symlink_to(tmp_path / "a.jpg")
    (tmp_path / "broken.jpg").symlink_to(tmp_path / "nowhere")
    found = list_scans([str(tmp_path)])
    sizes = dict(zip(found["uri"].to_pylist(), found["size_bytes"].to_pylist(), strict=True))
    assert {Path(uri).name: size for uri, size in sizes.items()} == {
        "a.jpg": 5,
        "b.jpg": 5,
        "broken.jpg": None,
    }
    with pytest.raises(RejectedImage, match="missing"):
        read_named_scan(str(tmp_path / "broken.jpg"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_does_not_block_the_reader(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (uri,) = list_uris(tmp_path)
    with pytest.raises(RejectedImage, match="unreadable"):
        read_named_scan(uri)


# ----------------------------------------------------------------------- globs, files and lists


def test_globs_match_names_and_folders(tmp_path: Path) -> None:
    fill(tmp_path, ["a/1.jpg", "a/2.png", "b/deep/3.jpg", "b/4.jpg", "[x]/5.jpg", "a/.6.jpg"])

    def match(pattern: str) -> set[str]:
        return {Path(uri).name for uri in list_uris(f"{tmp_path}/{pattern}")}

    assert match("*/*.jpg") == {"1.jpg", "4.jpg", "5.jpg"}
    assert match("**/*.jpg") == {"1.jpg", "3.jpg", "4.jpg", "5.jpg"}
    assert match("a/?.png") == {"2.png"}
    assert match("[ab]/*") == {"1.jpg", "2.png", "4.jpg"}
    assert match("[x]/5.jpg") == {"5.jpg"}, "an existing file takes precedence over a pattern"
    assert match("*.nothing") == set()


def test_a_glob_matches_names_that_are_not_utf8(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg")).write_bytes(b"pixels")
    fill(tmp_path, ["b.png"])
    (uri,) = list_uris(f"{tmp_path}/*.jpg")
    assert uri.endswith("caf%E9.jpg")


def test_a_scan_that_several_uris_name_is_listed_for_each_of_them(tmp_path: Path) -> None:
    fill(tmp_path, ["a/1.jpg", "a/2.jpg", "b/3.jpg"])
    found = list_uris(tmp_path, tmp_path / "a", f"{tmp_path}/a/*.jpg", tmp_path / "a" / "1.jpg")
    assert len(found) == 3 + 2 + 2 + 1
    assert len(set(found)) == 3


def test_lists_are_text_or_csv(tmp_path: Path) -> None:
    fill(tmp_path, ["in/1.jpg", "in/2 and, comma.jpg", "in/new\nline.jpg"])
    (tmp_path / "list.txt").write_text(f"in/1.jpg\n\n{tmp_path}/in/gone.jpg\nin/1.jpg\n")
    first = f"{tmp_path}/in/1.jpg"
    assert list_uris(tmp_path / "list.txt") == [first, f"{tmp_path}/in/gone.jpg", first]
    (tmp_path / "list.csv").write_text(
        'patient,uri\n7,"in/2 and, comma.jpg"\n8,"in/new\nline.jpg"\n', newline=""
    )
    found = list_uris(tmp_path / "list.csv")
    assert [read_named_scan(uri).decode() for uri in found] == [
        "in/2 and, comma.jpg",
        "in/new\nline.jpg",
    ]
    (tmp_path / "bare.csv").write_text("in/1.jpg\n")
    assert list_uris(tmp_path / "bare.csv") == [first]
    listed = list_scans([str(tmp_path / "bare.csv")])
    assert listed["size_bytes"].null_count == listed["modified_ns"].null_count == 1


def test_a_list_that_is_not_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"caf\xe9.jpg\n")
    with pytest.raises(DataError, match=r"UTF-8 text in the list '.*list\.txt'"):
        list_uris(tmp_path / "list.txt")
    assert list_reasons(tmp_path) == {"list.txt": None}, "in a folder it is listed as a file"


@pytest.mark.parametrize("name", ["nowhere", "nowhere/*.jpg", "gone.jpg", "gone.txt"])
def test_a_uri_without_scans_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="No scans at"):
        list_uris(tmp_path / name)


def test_a_source_that_is_deleted_before_it_is_listed_is_missing(tmp_path: Path) -> None:
    fill(tmp_path, ["a.jpg", "folder/b.jpg"])
    sources = find_sources([str(tmp_path / "a.jpg"), str(tmp_path / "folder")])
    (tmp_path / "a.jpg").unlink()
    (tmp_path / "folder" / "b.jpg").unlink()
    (tmp_path / "folder").rmdir()
    assert [list_source(source).scans["reason"].to_pylist() for source in sources] == [
        ["missing"],
        ["missing"],
    ]


# ---------------------------------------------------------------------------------- DICOMDIR

DISC = Path(pydicom.__file__).parent / "data" / "test_files" / "dicomdirtests"


def test_a_dicomdir_gives_the_files_that_it_references(tmp_path: Path) -> None:
    disc = tmp_path / "disc"
    shutil.copytree(DISC, disc)
    folders = [disc / name for name in ("77654033", "98892001", "98892003")]
    expected = {str(file) for folder in folders for file in folder.glob("*/*") if file.is_file()}
    listed = list_scans([str(disc / "DICOMDIR")])
    assert len(listed) == len(expected) == 31
    assert set(listed["scan_uri"].to_pylist()) == expected
    assert {row["size_bytes"] for row in listed.to_pylist()} == {
        Path(file).stat().st_size for file in expected
    }
    next(disc.glob("98892001/CT5N/*")).unlink()
    assert sorted(filter(None, list_reasons(disc / "DICOMDIR").values())) == ["missing"]


def test_a_dicomdir_in_a_folder_is_counted_and_is_not_a_scan(tmp_path: Path) -> None:
    shutil.copytree(DISC / "98892003", tmp_path / "98892003")
    shutil.copy(DISC / "DICOMDIR", tmp_path / "dicomdir")
    pieces = list_pieces(tmp_path)
    assert sum(piece.num_indices for piece in pieces) == 1
    assert len(join_pieces(pieces)) == 17
    assert list_uris(f"{tmp_path}/*dir") == []


def test_a_dicomdir_is_read_if_the_file_names_are_in_lower_case(tmp_path: Path) -> None:
    for file in DISC.rglob("*"):
        if file.is_file():
            target = tmp_path / str(file.relative_to(DISC)).lower()
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
    listed = list_scans([str(tmp_path / "dicomdir")])
    assert listed["reason"].null_count == len(listed) == 31


@pytest.mark.parametrize("kind", ["text", "cut", "empty", "no-records"])
def test_a_dicomdir_that_cannot_be_read_is_an_error_without_values(
    tmp_path: Path, kind: str
) -> None:
    whole = (DISC / "DICOMDIR").read_bytes()
    contents = {"text": b"Doe^Peter", "cut": whole[:-999], "empty": b"", "no-records": whole[:400]}
    (tmp_path / "DICOMDIR").write_bytes(contents[kind])
    with pytest.raises(DataError, match=r"the DICOMDIR at '.*DICOMDIR': .*folder") as caught:
        list_uris(tmp_path / "DICOMDIR")
    assert caught.value.__context__ is None
    assert "Doe" not in str(caught.value)


@pytest.mark.parametrize("parts", [["..", "secret"], ["/etc/passwd"], ["DOE", "."]])
def test_a_dicomdir_cannot_reference_files_outside_its_folder(
    tmp_path: Path, parts: list[str]
) -> None:
    index = pydicom.dcmread(DISC / "DICOMDIR")
    index.DirectoryRecordSequence[-1].ReferencedFileID = parts
    index.save_as(tmp_path / "DICOMDIR")
    with pytest.raises(DataError, match="does not name a file below its folder") as caught:
        list_uris(tmp_path / "DICOMDIR")
    assert parts[0] not in str(caught.value).replace(str(tmp_path), "")


# -------------------------------------------------------------------------------------- tables


def write_scans(file: Path, num_rows: int, **options: int) -> list[bytes]:
    contents = [f"scan {number}".encode() for number in range(num_rows)]
    table = pa.table({"image_bytes": contents, "other": list(range(num_rows))})
    pq.write_table(table, file, **options)
    return contents


def test_tables_give_a_scan_for_every_row(tmp_path: Path) -> None:
    contents = write_scans(tmp_path / "scans.parquet", 10, row_group_size=4)
    found = list_scans([str(tmp_path / "scans.parquet")])
    names = found["scan_uri"].to_pylist()
    assert names == [f"{tmp_path}/scans.parquet#row={number}" for number in range(10)]
    assert [read_named_scan(uri) for uri in names] == contents
    assert found["row_group"].to_pylist() == [0] * 4 + [1] * 4 + [2] * 2
    assert found["row"].to_pylist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert found["size_bytes"].null_count == 10, "the table's size is not a scan's"
    time_ns = (tmp_path / "scans.parquet").stat().st_mtime_ns
    assert set(found["modified_ns"].to_pylist()) == {time_ns}
    assert list_uris(tmp_path) == names, "a table in a folder is expanded too"
    with pytest.raises(RejectedImage, match="missing"):
        read_named_scan(f"{tmp_path}/scans.parquet#row=10")


def test_a_parquet_file_without_scans_is_an_error_or_rejected_in_a_folder(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [1]}), tmp_path / "other.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="image_bytes"):
        list_uris(tmp_path / "other.parquet")
    with pytest.raises(DataError, match="as Parquet"):
        list_uris(tmp_path / "broken.parquet")
    assert list_reasons(tmp_path) == {
        "other.parquet": "unsupported",
        "broken.parquet": "unsupported",
    }


# ----------------------------------------------------------------------------------- in pieces


@pytest.fixture
def mixed_inbox(tmp_path: Path) -> Path:
    """Return a folder of files, tables and folders, whose listing is a few dozen scans."""
    fill(tmp_path, [f"{a}/{b}/{c}.jpg" for a, b, c in itertools.product("abc", "de", range(3))])
    fill(tmp_path, ["top.jpg", ".hidden", "a/.cache/x.jpg", "empty/.keep"])
    write_scans(tmp_path / "b" / "scans.parquet", 10, row_group_size=3)
    (tmp_path / "b" / "broken.parquet").write_bytes(b"PAR1")
    return tmp_path


@pytest.mark.parametrize(("max_rows", "max_seconds"), [(200_000, 0.0), (1, 60.0), (4, 60.0)])
def test_the_pieces_of_a_listing_give_every_scan_once(
    mixed_inbox: Path, monkeypatch: pytest.MonkeyPatch, max_rows: int, max_seconds: float
) -> None:
    whole = list_pieces(mixed_inbox, max_seconds=60.0)
    assert len(whole) == 3, "the folder and its two tables"
    monkeypatch.setattr(scans_module, "MAX_ROWS_PER_TASK", max_rows)
    pieces = list_pieces(mixed_inbox, max_seconds=max_seconds)
    assert len(pieces) > 5
    assert join_pieces(pieces).equals(join_pieces(whole))
    assert join_pieces(pieces).num_rows == 3 * 2 * 3 + 1 + 10 + 1
    assert sum(piece.num_hidden for piece in pieces) == 3
    assert join_pieces(pieces).equals(list_scans([str(mixed_inbox)]).sort_by("scan_uri"))


def test_a_task_over_its_time_limit_returns_the_remaining_folders(tmp_path: Path) -> None:
    """The limit also applies if the task has listed only hidden files and tables so far."""
    fill(tmp_path, [f"{number}/{name}" for number in range(5) for name in (".h", "t.parquet")])
    (source,) = find_sources([str(tmp_path)])
    listing = list_source(source, max_seconds=0.0)
    assert [Path(rest.uri).name for rest in listing.rest] == ["4", "3", "2", "1", "0"]


def test_a_table_is_split_between_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_scans(tmp_path / "scans.parquet", 10, row_group_size=3)
    monkeypatch.setattr(scans_module, "MAX_ROWS_PER_TASK", 4)
    pieces = list_pieces(tmp_path / "scans.parquet")
    assert [piece.scans.num_rows for piece in pieces] == [6, 4]
    numbers = [uri.rpartition("=")[2] for uri in join_pieces(pieces)["scan_uri"].to_pylist()]
    assert numbers == [str(number) for number in range(10)]


def test_the_pieces_of_a_glob_match_below_the_same_folder(mixed_inbox: Path) -> None:
    pieces = list_pieces(f"{mixed_inbox}/*/d/*.jpg")
    assert len(pieces) > 5
    found = {
        str(Path(uri).relative_to(mixed_inbox)) for uri in join_pieces(pieces)["uri"].to_pylist()
    }
    assert found == {f"{a}/d/{number}.jpg" for a in "abc" for number in range(3)}


def test_reading_stops_one_byte_after_the_limit(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"x" * 1000)
    assert len(storage.read_bytes(str(tmp_path / "large"), max_bytes=99)) == 100
    assert len(storage.read_bytes(str(tmp_path / "large"), max_bytes=1000)) == 1000
