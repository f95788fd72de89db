"""Labelled data sets: supported layouts, skipped files, and errors."""

import io
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from brainray.data.labelled import SAMPLE_SCHEMA, FoundSamples, find_samples
from brainray.errors import DataError, StorageError
from brainray.io import storage
from brainray.labels import BRAIN_TUMOUR_CLASSES as CLASSES
from brainray.phantoms import write_phantom_folder


def fill(root: Path, *folders: str, names: Sequence[str] = ("1.jpg",)) -> Path:
    """Write files into every class folder below some folders; their content is their path."""
    for folder in folders or ("",):
        for label in CLASSES:
            for name in names:
                put(root / folder / label / name)
    return root


def put(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(str(path).encode())


def column(found: FoundSamples, name: str) -> list[Any]:
    values: list[Any] = found.samples[name].to_pylist()
    return values


def get_error(data: Path | str, **options: Any) -> str:  # noqa: ANN401 - passed on
    with pytest.raises(DataError) as caught:
        find_samples(str(data), CLASSES, **options)
    return str(caught.value)


def write_parquet(
    file: Path,
    count: int = 8,
    /,
    *,
    rows_per_group: int | None = None,
    **columns: Iterable[Any] | None,
) -> Path:
    """Write scans whose bytes are file name and number; a column given as None is left out."""
    content = {
        "image_bytes": [f"{file.name}-{i}".encode() for i in range(count)],
        "label": [CLASSES[i % 4] for i in range(count)],
    } | columns
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({name: values for name, values in content.items() if values is not None})
    pq.write_table(table, file, row_group_size=rows_per_group or max(count, 1))
    return file


# ---------------------------------------------------------------------------------- class folders


def test_kaggle_layout(tmp_path: Path) -> None:
    write_phantom_folder(tmp_path, num_train_per_class=2, num_test_per_class=1, seed=3)
    found = find_samples(str(tmp_path), CLASSES)
    assert found.samples.schema == SAMPLE_SCHEMA
    counts = Counter(zip(column(found, "split"), column(found, "label"), strict=True))
    assert counts == {(s, k): n for s, n in (("train", 2), ("test", 1)) for k in range(4)}
    for row in found.samples.to_pylist():
        assert row["uri"] == str(tmp_path / row["path"])
        assert f"/{CLASSES[row['label']]}/" in row["path"]
        assert row["size_bytes"] == Path(row["uri"]).stat().st_size
        assert (row["row_group"], row["row"], row["group"]) == (-1, -1, None)
    assert found.describe_skipped() == ""


@pytest.mark.parametrize(
    ("folders", "splits"),
    [
        (("train", "val", "test"), {"train", "val", "test"}),
        (("Training", "VALIDATION", "Testing"), {"train", "val", "test"}),
        (("Train", "valid"), {"train", "val"}),
        (("",), {""}),
    ],
)
def test_split_folder_names(tmp_path: Path, folders: tuple[str, ...], splits: set[str]) -> None:
    found = find_samples(str(fill(tmp_path, *folders)), CLASSES)
    assert found.samples.num_rows == 4 * len(folders)
    assert set(column(found, "split")) == splits
    assert sorted(set(column(found, "label"))) == [0, 1, 2, 3]


def test_labels_follow_the_class_order_of_the_caller(tmp_path: Path) -> None:
    found = find_samples(str(fill(tmp_path)), tuple(reversed(CLASSES)))
    labels = dict(zip(column(found, "path"), column(found, "label"), strict=True))
    assert labels == {f"{name}/1.jpg": 3 - index for index, name in enumerate(CLASSES)}


def test_folders_below_a_class_folder_belong_to_the_class(tmp_path: Path) -> None:
    fill(tmp_path, "train", "test")
    put(tmp_path / "train" / "glioma" / "patient 7" / "test" / "x.png")
    found = find_samples(str(tmp_path), CLASSES)
    rows = {row["path"]: row for row in found.samples.to_pylist()}
    nested = rows["train/glioma/patient 7/test/x.png"]
    assert (nested["split"], nested["label"]) == ("train", 0)


def test_hidden_files_and_other_files_are_counted(tmp_path: Path) -> None:
    fill(tmp_path, "Training", "Testing", names=("1.jpg", "2.JPEG", "3.png"))
    put(tmp_path / "Training" / ".ipynb_checkpoints" / "1-checkpoint.jpg")
    put(tmp_path / ".ipynb_checkpoints" / "x.jpg")
    put(tmp_path / "__MACOSX" / "Training" / "glioma" / "1.jpg")
    put(tmp_path / "Training" / "glioma" / "._1.jpg")
    put(tmp_path / "Training" / "glioma" / "Thumbs.db")
    put(tmp_path / "README.md")
    found = find_samples(str(tmp_path), CLASSES)
    assert found.samples.num_rows == 2 * 4 * 3
    assert found.num_hidden == 4
    assert sorted(found.other_files) == ["README.md", "Training/glioma/Thumbs.db"]
    message = found.describe_skipped()
    assert message == "4 hidden and 2 not named as images (such as 'README.md')"


def test_unusual_names_are_kept_and_can_be_read_from_a_file_uri(tmp_path: Path) -> None:
    names = ("a b (1).jpg", "it's\n脳.jpg", "50%#?.jpg")
    fill(tmp_path / "my data", "train", "test", names=names)
    for uri in (str(tmp_path / "my data"), (tmp_path / "my data").as_uri()):
        found = find_samples(uri, CLASSES)
        assert found.samples.num_rows == 24
        for row in found.samples.to_pylist():
            assert storage.read_bytes(row["uri"]).decode().endswith(row["path"])


def test_the_error_for_an_unknown_class_names_class_file_and_remedy(tmp_path: Path) -> None:
    fill(tmp_path, "train", "test")
    put(tmp_path / "test" / "glioma_2" / "1.jpg")
    assert re.fullmatch(
        r"Unknown class 'glioma_2' in .*/test/glioma_2/1\.jpg\. Expected one of glioma, "
        r"meningioma, notumor, pituitary\. Rename it, or pass --classes\.",
        get_error(tmp_path),
    )


@pytest.mark.parametrize("absent", [True, False], ids=["absent", "empty"])
@pytest.mark.parametrize("folder", ["", "test"])
def test_class_without_images_is_rejected(tmp_path: Path, absent: bool, folder: str) -> None:
    fill(tmp_path, *(("train", "test") if folder else ("",)))
    (tmp_path / folder / "notumor" / "1.jpg").unlink()
    if absent:
        (tmp_path / folder / "notumor").rmdir()
    message = get_error(tmp_path)
    where = f"the test split of '{tmp_path}'" if folder else f"'{tmp_path}'"
    assert message.startswith(f"No images of class notumor in {where}. Expected some of each of ")
    assert message.endswith("Add them, or pass --classes.")


@pytest.mark.parametrize("path", ["stray.jpg", "train/stray.jpg"])
def test_image_outside_any_class_folder_is_rejected(tmp_path: Path, path: str) -> None:
    fill(tmp_path, "train", "test")
    put(tmp_path / path)
    message = get_error(tmp_path)
    assert f"Image '{path}' in '{tmp_path}' lies in no class folder" in message
    assert "Expected one of glioma, meningioma, notumor, pituitary above it" in message


@pytest.mark.parametrize("empty", [True, False])
def test_unknown_folder_beside_the_splits_is_rejected(tmp_path: Path, empty: bool) -> None:
    fill(tmp_path, "Training", "Testing")
    if empty:
        (tmp_path / "Extra").mkdir()
    else:
        put(tmp_path / "Extra" / "glioma" / "1.jpg")
    message = get_error(tmp_path)
    assert f"Unknown folder 'Extra' beside the splits in '{tmp_path}'" in message
    assert "Expected only Training/, Testing/, or train/, val/, test/. Move it" in message


def test_images_beside_parquet_are_rejected(tmp_path: Path) -> None:
    write_parquet(fill(tmp_path, "train") / "train.parquet")
    message = get_error(tmp_path)
    assert f"in '{tmp_path}', found 4 images and 1 Parquet files" in message
    assert message.endswith("Give one of the two a folder of its own.")


def test_folder_without_images_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "train" / "glioma").mkdir(parents=True)
    put(tmp_path / "notes.txt")
    message = get_error(tmp_path)
    assert message.startswith(f"No images in '{tmp_path}' (1 files seen). Expected class folders ")
    assert "glioma, meningioma, notumor, pituitary" in message
    assert "Parquet" in message
    with pytest.raises(StorageError, match="No folder at"):
        find_samples(str(tmp_path / "absent"), CLASSES)


def test_only_requested_splits_must_be_complete(tmp_path: Path) -> None:
    fill(tmp_path, "train", "val", "test")
    (tmp_path / "train" / "glioma" / "1.jpg").unlink()
    found = find_samples(str(tmp_path), CLASSES, splits=("val", "test"))
    assert set(column(found, "split")) == {"val", "test"}
    assert found.samples.num_rows == 8
    assert "class glioma in the train split" in get_error(tmp_path, splits=("train",))


def test_a_missing_split_is_named(tmp_path: Path) -> None:
    fill(tmp_path, "Training")
    message = get_error(tmp_path, splits=("val", "test"))
    assert f"Expected val or test scans in '{tmp_path}', found only train" in message
    assert message.endswith("Point --data-uri at the folder of the class folders.")


def test_data_without_splits_are_returned_completely(tmp_path: Path) -> None:
    found = find_samples(str(fill(tmp_path)), CLASSES, splits=("test",))
    assert column(found, "split") == [""] * 4


# ------------------------------------------------------------------------------------------ Parquet


def test_parquet_with_every_column(tmp_path: Path) -> None:
    write_parquet(
        tmp_path / "scans.parquet",
        path=[f"p{i}" for i in range(8)],
        group=[None if i == 3 else f"g{i // 2}" for i in range(8)],
    )
    found = find_samples(str(tmp_path), CLASSES)
    assert found.samples.schema == SAMPLE_SCHEMA
    assert column(found, "path") == [f"p{i}" for i in range(8)]
    assert column(found, "group") == ["g0", "g0", "g1", None, "g2", "g2", "g3", "g3"]
    assert column(found, "label") == [0, 1, 2, 3] * 2
    assert column(found, "split") == [""] * 8
    assert min(column(found, "size_bytes")) > 0


def test_parquet_labels_may_be_indices_or_a_dictionary(tmp_path: Path) -> None:
    kinds = {
        "int": pa.array([3, 2, 1, 0], pa.int8()),
        "dictionary": pa.array(
            [CLASSES[3], CLASSES[2], CLASSES[1], CLASSES[0]]
        ).dictionary_encode(),
    }
    for name, labels in kinds.items():
        file = write_parquet(tmp_path / f"{name}.parquet", 4, label=labels)
        assert column(find_samples(str(file), CLASSES), "label") == [3, 2, 1, 0]


def test_parquet_groups_that_are_numbers_become_strings(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", 4, group=[10, 10, 11, None])
    assert column(find_samples(str(file), CLASSES), "group") == ["10", "10", "11", None]


def test_parquet_without_paths_gets_unique_ones(tmp_path: Path) -> None:
    for name in ("a.parquet", "sub/a.parquet", "sub/b.parquet"):
        write_parquet(tmp_path / name, rows_per_group=3)
    found = find_samples(str(tmp_path), CLASSES)
    paths = column(found, "path")
    assert len(set(paths)) == len(paths) == 24
    assert "sub/a.parquet#2-1" in paths
    assert column(found, "group") == [None] * 24


def test_row_group_and_row_identify_the_image_bytes(tmp_path: Path) -> None:
    for name in ("train-0.parquet", "train-1.parquet"):
        write_parquet(
            tmp_path / name, 10, rows_per_group=4, path=[f"{name}-{i}" for i in range(10)]
        )
    found = find_samples(str(tmp_path), CLASSES)
    assert found.samples.num_rows == 20
    assert set(column(found, "row_group")) == {0, 1, 2}
    for row in found.samples.to_pylist():
        group = pq.ParquetFile(row["uri"]).read_row_group(row["row_group"])
        assert group["image_bytes"][row["row"]].as_py() == row["path"].encode()


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.parquet", "train"),
        ("test-00000-of-00001.parquet", "test"),
        ("Testing/part.parquet", "test"),
        ("VALIDATION_3.parquet", "val"),
        ("train.parquet/part-0.parquet", "train"),
        ("val2.parquet", "val"),
        ("trainer.parquet", ""),
        ("part-0.parquet", ""),
    ],
)
def test_parquet_split_is_read_from_the_file_name(tmp_path: Path, name: str, split: str) -> None:
    write_parquet(tmp_path / name)
    assert set(column(find_samples(str(tmp_path), CLASSES), "split")) == {split}


def test_single_parquet_file_by_path_and_by_uri(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "test scans.parquet")
    write_parquet(tmp_path / "train.parquet")
    for uri in (str(file), file.as_uri()):
        found = find_samples(uri, CLASSES)
        assert found.samples.num_rows == 8
        filesystem, path = storage.resolve(column(found, "uri")[0])
        assert path == str(file)
        with filesystem.open_input_file(path) as stream:
            assert pq.read_table(io.BytesIO(stream.readall())).num_rows == 8
    message = get_error(tmp_path / "absent.parquet")
    assert (
        message == f"No Parquet file at '{tmp_path}/absent.parquet'. Check the path, or mount it."
    )


def test_a_folder_may_be_named_parquet(tmp_path: Path) -> None:
    folder = tmp_path / "scans.parquet"
    write_parquet(folder / "part-0.parquet")
    assert find_samples(str(folder), CLASSES).samples.num_rows == 8


def test_parquet_is_filtered_by_split(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet")
    write_parquet(tmp_path / "test.parquet", 4)
    found = find_samples(str(tmp_path), CLASSES, splits=("test",))
    assert column(found, "split") == ["test"] * 4


def test_parquet_file_without_a_split_beside_the_splits_is_rejected(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet")
    write_parquet(tmp_path / "more.parquet")
    message = get_error(tmp_path)
    assert f"Unknown Parquet file 'more.parquet' beside the splits in '{tmp_path}'" in message
    assert message.endswith("Rename it, or move it.")


@pytest.mark.parametrize("name", ["image_bytes", "label"])
def test_parquet_with_a_missing_column_is_rejected(tmp_path: Path, name: str) -> None:
    file = write_parquet(tmp_path / "a.parquet", **{name: None}, other=range(8))
    message = get_error(file)
    assert message.startswith(f"No column {name} in '{file}' (it has ")
    assert "other" in message
    assert "Expected label, and image_bytes (or, in a manifest of files, uri or path)" in message


# --------------------------------------------------------------------- splits in columns, manifests


def test_the_split_column_sets_the_split(tmp_path: Path) -> None:
    given = ["train", "Training", "val", "TEST"]
    file = write_parquet(tmp_path / "scans.parquet", 16, split=[s for s in given for _ in CLASSES])
    splits = column(find_samples(str(file), CLASSES), "split")
    assert splits == [s for s in ("train", "train", "val", "test") for _ in CLASSES]


def test_an_empty_split_column_is_ignored(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "scans.parquet", 4, split=pa.nulls(4, pa.string()))
    assert column(find_samples(str(file), CLASSES), "split") == [""] * 4


@pytest.mark.parametrize(
    ("bad", "message"), [("dev", "Unknown split 'dev'"), ("", "No split in row")]
)
def test_an_unknown_split_is_rejected(tmp_path: Path, bad: str, message: str) -> None:
    file = write_parquet(tmp_path / "a.parquet", 8, split=[*["train"] * 7, bad])
    assert message in get_error(file)


def write_manifest(file: Path, uris: Sequence[str], **columns: Iterable[Any]) -> Path:
    labels = [uri.split("/")[-2] for uri in uris]
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"label": labels} | columns), file)
    return file


@pytest.mark.parametrize("name", ["uri", "path"])
@pytest.mark.parametrize("absolute", [True, False])
def test_a_manifest_is_read_as_a_data_set(tmp_path: Path, name: str, absolute: bool) -> None:
    fill(tmp_path / "scans", names=("1.jpg", "2 é.jpg"))
    files = sorted((tmp_path / "scans").rglob("*.jpg"))
    uris = [str(f if absolute else f.relative_to(tmp_path)) for f in files]
    splits = ["train", "test"] * 4
    manifest = write_manifest(
        tmp_path / "split.parquet", uris, **{name: uris, "split": splits, "group": range(8)}
    )
    found = find_samples(str(manifest), CLASSES)
    assert found.samples.schema == SAMPLE_SCHEMA
    assert column(found, "split") == splits
    assert column(found, "group") == [str(number) for number in range(8)]
    assert column(found, "path") == uris
    for row, file in zip(found.samples.to_pylist(), files, strict=True):
        assert storage.read_bytes(row["uri"]) == file.read_bytes()
        assert (row["row_group"], row["row"]) == (-1, -1)
    sizes = [file.stat().st_size for file in files]
    assert column(found, "size_bytes") == [sum(sizes) // 8] * 8


def test_a_manifest_may_point_into_parquet(tmp_path: Path) -> None:
    table = write_parquet(tmp_path / "bytes" / "scans.parquet", 8, rows_per_group=4)
    whole = find_samples(str(table), CLASSES).samples
    kept = whole.take([6, 1, 4, 3]).append_column("extra", pa.array([1.0] * 4))
    labels = [CLASSES[label] for label in kept["label"].to_pylist()]
    kept = kept.set_column(kept.column_names.index("label"), "label", pa.array(labels))
    pq.write_table(kept, tmp_path / "manifest.parquet")
    found = find_samples(str(tmp_path / "manifest.parquet"), CLASSES)
    assert found.samples == whole.take([6, 1, 4, 3])


def test_a_manifest_row_without_a_uri_is_rejected(tmp_path: Path) -> None:
    manifest = write_manifest(
        tmp_path / "m.parquet", [f"{name}/1.jpg" for name in CLASSES], uri=["a", None, "c", "d"]
    )
    assert f"No uri in row 1 of '{manifest}'" in get_error(manifest)


@pytest.mark.parametrize("label", ["glioma_2", None, ""])
def test_parquet_with_an_unknown_label_is_rejected(tmp_path: Path, label: str | None) -> None:
    file = write_parquet(tmp_path / "a.parquet", 4, label=[*CLASSES[:3], label])
    message = get_error(file)
    assert message.startswith(f"Unknown class '{label}' in {file}. Expected one of glioma, ")


@pytest.mark.parametrize("label", [4, -1])
def test_parquet_with_a_label_out_of_range_is_rejected(tmp_path: Path, label: int) -> None:
    assert f"Unknown class '{label}'" in get_error(
        write_parquet(tmp_path / "a.parquet", 4, label=[0, 1, 2, label])
    )


def test_parquet_without_rows_of_a_class_is_rejected(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "train.parquet", 3)
    assert f"No images of class pituitary in the train split of '{file}'" in get_error(file)


def test_parquet_with_duplicate_paths_across_files_is_rejected(tmp_path: Path) -> None:
    for name in ("train.parquet", "test.parquet"):
        write_parquet(tmp_path / name, 4, path=["same", f"{name}1", f"{name}2", f"{name}3"])
    message = get_error(tmp_path)
    assert message.startswith(f"Path 'same' is given 2 times in the Parquet files of '{tmp_path}'")
    assert message.endswith("Make them differ, or leave the column out.")


def test_parquet_without_rows_is_rejected(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", 0)
    message = get_error(file)
    assert message.startswith(f"No rows in the Parquet files of '{file}' (1 files read)")


@pytest.mark.parametrize("content", [b"", b"not parquet", None], ids=["empty", "text", "cut"])
def test_broken_parquet_is_rejected(tmp_path: Path, content: bytes | None) -> None:
    file = write_parquet(tmp_path / "a.parquet")
    file.write_bytes(file.read_bytes()[:-40] if content is None else content)
    assert get_error(tmp_path).startswith(f"Cannot read '{file}' as Parquet: ")
