"""Storage: atomic writes, odd file names, and errors that name the URI."""

import errno
import os
from pathlib import Path
from typing import NoReturn

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brainray.errors import StorageError
from brainray.io import storage

ODD_NAMES = ("a b.jpg", 'it\'s "q".jpg', "line\nbreak.jpg", "größe-脳.jpg", "50%#?&+.jpg", ".h")


@pytest.fixture
def odd_folder(tmp_path: Path) -> Path:
    """Write one file of each odd name, in a folder that has an odd name too."""
    root = tmp_path / "odd name"
    (root / "Sub dir").mkdir(parents=True)
    for name in ODD_NAMES:
        (root / "Sub dir" / name).write_bytes(name.encode())
    (root / "b.jpg").write_bytes(b"12345")
    (root / "B.jpg").write_bytes(b"")
    return root


# ---------------------------------------------------------------------------------------- writing


def test_bytes_round_trip_creates_the_folders_above(tmp_path: Path) -> None:
    uri = str(tmp_path / "new" / "deep" / "x.bin")
    storage.write_bytes(uri, b"\x00\xff")
    assert storage.read_bytes(uri) == b"\x00\xff"
    storage.write_bytes(uri, b"second")
    assert storage.read_bytes(uri) == b"second"
    assert [p.name for p in (tmp_path / "new" / "deep").iterdir()] == ["x.bin"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    target = tmp_path / "document.json"
    storage.write_bytes(str(target), b"old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match=r"Cannot write '.*document\.json': .*No space left"):
        storage.write_bytes(str(target), b"new and longer")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_no_reader_sees_a_partial_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    target = tmp_path / "f"
    target.write_bytes(b"old")
    fsync = os.fsync

    def inspect(descriptor: int) -> None:  # the new content is written, but not visible yet
        fsync(descriptor)
        seen.append((target.read_bytes(), sorted(p.name[0] for p in tmp_path.iterdir())))

    monkeypatch.setattr(os, "fsync", inspect)
    storage.write_bytes(str(target), b"new")
    assert seen == [(b"old", [".", "f"])]  # the partial file is hidden, so no listing has it
    assert target.read_bytes() == b"new"


def test_an_unwritable_path_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"in the way")
    below_a_file = str(tmp_path / "file" / "folder")
    with pytest.raises(StorageError, match="Cannot write") as caught:
        storage.write_bytes(f"{below_a_file}/x", b"")
    assert below_a_file in str(caught.value)
    with pytest.raises(StorageError, match="Cannot write"):
        storage.check_writable(below_a_file)
    assert (tmp_path / "file").read_bytes() == b"in the way"


def test_check_writable_leaves_nothing_behind(tmp_path: Path) -> None:
    storage.check_writable(str(tmp_path / "runs" / "1"))
    assert (tmp_path / "runs" / "1").is_dir()
    assert list((tmp_path / "runs" / "1").iterdir()) == []


def test_json_round_trip(tmp_path: Path) -> None:
    uri = str(tmp_path / "d.json")
    document = {"größe": [1, 2.5, None, True], "nested": {"a": "x\ny"}}
    storage.write_json(uri, document)
    assert storage.read_json(uri) == document
    assert "größe" in Path(uri).read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="Out of range float"):
        storage.write_json(uri, {"x": float("nan")})
    assert storage.read_json(uri) == document


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe"])
def test_an_invalid_json_document_is_an_error_with_its_path(tmp_path: Path, content: bytes) -> None:
    uri = str(tmp_path / "d.json")
    storage.write_bytes(uri, content)
    with pytest.raises(StorageError, match=r"d\.json' is not a JSON document"):
        storage.read_json(uri)


def test_table_round_trip_keeps_the_schema(tmp_path: Path) -> None:
    uri = str(tmp_path / "t.parquet")
    table = pa.table({"path": ["a", None], "n": pa.array([1, 2], pa.int32())})
    storage.write_table(uri, table)
    assert storage.read_table(uri).equals(table)
    assert pq.ParquetFile(uri).metadata.row_group(0).column(0).compression == "ZSTD"


@pytest.mark.parametrize("damage", ["cut", "empty", "footer", "pages"])
def test_damaged_parquet_is_a_storage_error(tmp_path: Path, damage: str) -> None:
    uri = str(tmp_path / "t.parquet")
    storage.write_table(uri, pa.table({"n": list(range(1000))}))
    content = bytearray(Path(uri).read_bytes())
    if damage == "cut":
        content = content[:50]
    elif damage == "empty":
        content.clear()
    elif damage == "footer":
        content[-40:-10] = b"\xff" * 30
    else:
        content[4:60] = b"\xff" * 56
    Path(uri).write_bytes(content)
    with pytest.raises(StorageError, match=r"t\.parquet' is not a Parquet file"):
        storage.read_table(uri)


# ---------------------------------------------------------------------------------------- reading


def test_missing_and_unreadable_files_raise_different_errors(tmp_path: Path) -> None:
    missing = str(tmp_path / "nothing")
    for read in (storage.read_bytes, storage.read_json, storage.read_table):
        with pytest.raises(FileNotFoundError):
            read(missing)
        with pytest.raises(StorageError, match="Cannot read"):
            read(str(tmp_path))
    for list_ in (storage.list_files, storage.list_folders):
        with pytest.raises(StorageError, match=r"No folder at '.*nothing'. Check the path"):
            list_(missing)


def test_exists_and_is_folder(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"")
    paths = [str(tmp_path), str(tmp_path / "f"), str(tmp_path / "none")]
    assert [storage.exists(path) for path in paths] == [True, True, False]
    assert [storage.is_folder(path) for path in paths] == [True, False, False]
    assert storage.is_folder(tmp_path.as_uri() + "/")


def test_list_files_is_recursive_sorted_and_complete(odd_folder: Path) -> None:
    found = storage.list_files(str(odd_folder))
    expected = sorted(["b.jpg", "B.jpg", *(f"Sub dir/{name}" for name in ODD_NAMES)])
    assert [file.relative_path for file in found] == expected
    sizes = {file.relative_path: file.size_bytes for file in found}
    assert (sizes["b.jpg"], sizes["B.jpg"]) == (5, 0)


@pytest.mark.parametrize("as_uri", [False, True], ids=["path", "file-uri"])
def test_listed_files_can_be_read_whatever_their_name(odd_folder: Path, as_uri: bool) -> None:
    uri = odd_folder.as_uri() if as_uri else str(odd_folder)
    found = [f for f in storage.list_files(uri) if f.relative_path.startswith("Sub dir/")]
    assert len(found) == len(ODD_NAMES)
    for file in found:
        assert storage.read_bytes(file.uri).decode() == file.relative_path.removeprefix("Sub dir/")


def test_a_uri_need_not_be_escaped(odd_folder: Path) -> None:
    assert storage.read_bytes(f"file://{odd_folder}/b.jpg") == b"12345"
    assert (
        storage.read_bytes(f"file://{odd_folder}/Sub dir/größe-脳.jpg") == "größe-脳.jpg".encode()
    )


def test_list_files_and_folders_refuse_a_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"")
    for list_ in (storage.list_files, storage.list_folders):
        with pytest.raises(StorageError, match="Cannot list"):
            list_(str(tmp_path / "f"))


def test_list_folders_names_only_the_first_level(odd_folder: Path) -> None:
    (odd_folder / "Sub dir" / "deeper").mkdir()
    (odd_folder / "A").mkdir()
    assert storage.list_folders(str(odd_folder)) == ["A", "Sub dir"]


# ------------------------------------------------------------------------------------------- URIs


@pytest.mark.parametrize("uri", ["http://host/x", "hdfs://x", "s4://b/x"])
def test_an_unknown_scheme_is_an_error_with_the_uri(uri: str) -> None:
    with pytest.raises(StorageError, match="Expected a local path, s3:// or gs://") as caught:
        storage.resolve(uri)
    assert uri in str(caught.value)


def test_object_store_uris_are_resolved_without_a_request() -> None:
    base = "s3://bucket/runs/?region=us-east-1"
    uri = storage.join(base, "no tumor", "50%#?.jpg")
    assert uri.endswith("?region=us-east-1")
    filesystem, path = storage.resolve(uri)
    assert (filesystem.type_name, path) == ("s3", "bucket/runs/no tumor/50%#?.jpg")
    assert filesystem.region == "us-east-1"


def test_relative_and_home_paths_become_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert storage.make_absolute("runs/1/") == str(tmp_path / "runs" / "1")
    assert storage.make_absolute("~/x") == str(tmp_path / "home" / "x")
    assert storage.make_absolute("s3://b/x/") == "s3://b/x"
    storage.write_bytes("runs/f", b"here")
    assert storage.list_files("runs")[0].uri == str(tmp_path / "runs" / "f")
    assert storage.resolve("~/x")[1] == str(tmp_path / "home" / "x")


@pytest.mark.parametrize(
    ("uri", "parts", "expected"),
    [
        ("/a", ("b", "c"), "/a/b/c"),
        ("/a/", ("b",), "/a/b"),
        ("/", ("b",), "/b"),
        ("a", ("b c?.jpg",), "a/b c?.jpg"),
        ("s3://b", ("c",), "s3://b/c"),
        ("s3://b/x/", ("c", "d"), "s3://b/x/c/d"),
    ],
)
def test_join(uri: str, parts: tuple[str, ...], expected: str) -> None:
    assert storage.join(uri, *parts) == expected


@given(
    st.lists(
        st.text(st.characters(exclude_characters="/\0", codec="utf-8"), min_size=1), max_size=3
    )
)
def test_join_and_resolve_agree_on_any_name(parts: list[str]) -> None:
    parts = ["x", *(part for part in parts if part not in (".", "..")), "y"]
    expected = "/".join(["/root", *parts])
    assert storage.resolve(storage.join("/root", *parts))[1] == expected
    assert storage.resolve(storage.join("file:///root", *parts))[1] == expected


def test_different_paths_to_a_folder_have_the_same_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b")
    monkeypatch.chdir(tmp_path / "a" / "b")
    real = str(tmp_path.resolve())
    assert storage.make_absolute("../c") == f"{real}/a/c"
    assert storage.make_absolute("../../link/x") == f"{real}/link/x"
    assert storage.make_absolute(f"{tmp_path}/link/../y") == f"{real}/a/y"
    assert storage.make_absolute("s3://bucket/a/") == "s3://bucket/a"


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("/data/somebody/scans", "scans"),
        ("/data/scans/", "scans"),
        ("s3://key:secret@bucket/a/scans?region=eu", "scans"),
        ("s3://key:secret@bucket", "bucket"),
        ("file:///data/two%20words", "two words"),
        ("/", ""),
    ],
)
def test_the_name_of_a_uri_is_its_last_part(uri: str, name: str) -> None:
    assert storage.get_name(uri) == name
