"""From a plan to opened slices: how a worker opens the files of a shard, without Ray."""

import gzip
import io
import shutil
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pyarrow as pa
import pydicom
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydicom.uid import JPEG2000Lossless

from brainray.data.scans import list_scans
from brainray.images.decode import DecodeLimits
from brainray.images.preprocess import Preprocessing
from brainray.images.slices import ReadOptions, split_name
from brainray.inference import plan as plan_module
from brainray.inference import shards as shards_module
from brainray.inference.plan import PlanOptions, write_part
from brainray.inference.schema import SCAN_SCHEMA
from brainray.inference.shards import ALREADY_ANSWERED, WaveTask, open_shard
from brainray.inference.store import KNOWN_SCHEMA
from brainray.io.identifiers import Identifiers
from brainray.model.reasons import REASONS
from tests.dicom_files import PYDICOM_FILES, RAMP, make_mr, write
from tests.open_scans import open_slices
from tests.test_store import open_store

KEY = b"a key of the tests"
NIBABEL_FILES = Path(nib.__file__).parent / "tests" / "data"
PREPROCESSING = Preprocessing(size_px=32, crop="head", intensity="percentile", fit="pad")
HEAD = np.array(np.pad(np.full((40, 40), 900), 12) + RAMP % 50, np.uint16)


def make_task(output: Path, **changes: Any) -> WaveTask:  # noqa: ANN401
    options = {
        "store": open_store(output),
        "run": "run",
        "preprocessing": PREPROCESSING,
        "reading": ReadOptions(),
        "key": KEY,
        "labels": None,
    }
    return WaveTask(**options | changes)


def open_all(
    scans_uri: Path,
    task: WaveTask,
    *,
    known: Sequence[dict[str, Any]] = (),
    max_shard_rows: int = 1000,
    redact_paths: bool = False,
) -> list[dict[str, Any]]:
    """Plan files, and open them shard by shard, as the tasks of a run do."""
    identifiers = Identifiers(KEY, redact_paths)
    listed = plan_module.name_scans(list_scans([str(scans_uri)]), identifiers)
    answered = pa.Table.from_pylist(list(known), schema=KNOWN_SCHEMA)
    table = pa.concat_tables([plan_module._complete(one) for one in (listed, answered)])
    options = PlanOptions(
        sources=(),
        store=task.store,
        run=task.run,
        max_shard_rows=max_shard_rows,
        num_engines=1,
        identifiers=identifiers,
    )
    (plan,) = write_part(table, 0, options).to_pylist()
    rows = []
    for shard in range(plan["num_shards"]):
        block = pa.table({"shard": [shard]})
        opened = open_shard(block, task=task, part=0).to_pylist()
        assert {row["shard_rows"] for row in opened} == {len(opened)}
        assert {row["shard_files"] for row in opened} == {len({find_file(row) for row in opened})}
        rows += opened
    files = [list(dict.fromkeys((find_file(row), row["shard"]) for row in rows))]
    assert len(files[0]) == plan["num_rows"], "the slices of a file are in one shard"
    return rows


def find_file(row: dict[str, Any]) -> str:
    return split_name(row["scan_uri"])[0] if row["frame"] is not None else str(row["scan_uri"])


def make_volume(folder: Path, name: str = "volume.nii", num_slices: int = 12) -> Path:
    """Write a volume whose outer slices are air."""
    voxels = np.zeros((40, 48, num_slices), np.int16)
    voxels[8:32, 8:40, 3:-3] = np.random.default_rng(0).integers(300, 900, (24, 32, num_slices - 6))
    nib.save(nib.Nifti1Image(voxels, np.diag([-1.0, 1.0, 2.0, 1.0])), folder / name)
    return folder / name


def get_image(row: dict[str, Any]) -> NDArray[np.uint8]:
    return np.frombuffer(row["image"], np.uint8).reshape(32, 32)


# ------------------------------------------------------------------------- a row for each slice


def test_each_slice_of_each_file_has_its_row(tmp_path: Path) -> None:
    inbox = tmp_path / "in"
    inbox.mkdir()
    Image.fromarray(np.asarray(HEAD // 4, np.uint8)).save(inbox / "picture.png")
    (inbox / "classic.dcm").write_bytes(make_mr(HEAD))
    (inbox / "frames.dcm").write_bytes(make_mr(np.stack([HEAD, HEAD[::-1], HEAD // 2])))
    (inbox / "text.txt").write_text("no scan")
    make_volume(inbox)
    rows = open_all(inbox, make_task(tmp_path / "out"))
    names = [row["scan_uri"].removeprefix(f"{inbox}/") for row in rows]
    assert Counter(map(find_name, names)) == {
        "picture.png": 1,
        "classic.dcm": 1,
        "frames.dcm": 3,
        "text.txt": 1,
        "volume.nii": 12,
    }
    found = dict(zip(names, rows, strict=True))
    assert set(found["frames.dcm#frame=1"]) >= set(SCAN_SCHEMA.names)
    for name, row in found.items():
        content = (inbox / find_name(name)).read_bytes()
        assert row["content_sha256"] == sha256(content).hexdigest(), "the hash is that of the file"
        assert row["size_bytes"] == len(content)
        assert (row["image"] is None) == (row["reason"] is not None)
    assert found["text.txt"]["reason"] == "not_an_image"
    assert found["picture.png"]["frame"] is found["classic.dcm"]["frame"] is None
    assert [found[f"frames.dcm#frame={k}"]["frame"] for k in range(3)] == [0, 1, 2]
    reasons = [found[f"volume.nii#frame={k}"]["reason"] for k in range(12)]
    assert reasons == ["little_tissue"] * 3 + [None] * 6 + ["little_tissue"] * 3
    assert found["classic.dcm"]["flags"] == ["no_window"]
    assert found["classic.dcm"]["plane"] == "axial"
    assert found["classic.dcm"]["position_mm"] == 33
    assert {row["grey_range"] for row in rows if row["image"]} == {"percentile"}
    assert found["picture.png"]["series"] is None
    for name in ("patient", "study", "series", "sop_instance"):
        assert len(found["classic.dcm"][name]) == 32


def find_name(name: str) -> str:
    return split_name(name)[0]


def test_the_rows_match_the_slices_of_the_file(tmp_path: Path) -> None:
    """The pixels are the same as if the file is opened directly."""
    inbox = tmp_path / "in"
    inbox.mkdir()
    make_volume(inbox)
    rows = open_all(inbox, make_task(tmp_path / "out"))
    content = (inbox / "volume.nii").read_bytes()
    for row, opened in zip(rows, open_slices(content, PREPROCESSING, key=KEY), strict=True):
        if isinstance(opened, tuple):
            assert row["image"] is None
            continue
        np.testing.assert_array_equal(get_image(row), opened.scan.image)
        assert (row["height_px"], row["width_px"]) == opened.scan.samples.shape
        assert (row["series"], row["frame"]) == (opened.info.series, opened.info.frame)


def test_a_corrupt_slice_does_not_reject_its_neighbours(tmp_path: Path) -> None:
    inbox = tmp_path / "in"
    inbox.mkdir()
    dataset = pydicom.dcmread(io.BytesIO(make_mr(np.stack([HEAD, HEAD, HEAD]))))
    dataset.compress(JPEG2000Lossless)
    content = bytearray(write(dataset, JPEG2000Lossless))
    start = content.index(b"\xff\x4f\xff\x51", content.index(b"\xff\x4f\xff\x51") + 1)
    content[start + 60 : start + 400] = bytes(340)
    (inbox / "frames.dcm").write_bytes(content)
    rows = open_all(inbox, make_task(tmp_path / "out"))
    assert [row["reason"] for row in rows] == [None, "corrupt", None]
    assert [row["image"] is None for row in rows] == [False, True, False]
    assert {row["sop_instance"] for row in rows} != {None}
    assert len({row["content_sha256"] for row in rows}) == 1


def test_the_plane_is_that_of_the_job(tmp_path: Path) -> None:
    volume = make_volume(tmp_path)
    for plane, count in (("axial", 12), ("coronal", 48), ("sagittal", 40)):
        task = make_task(tmp_path / plane, reading=ReadOptions(plane=plane))
        rows = open_all(volume, task)
        assert len(rows) == count
        assert {row["plane"] for row in rows} == {plane}
        assert ("non_axial" in (rows[0]["flags"] or [])) == (plane != "axial")


# ------------------------------------------------------------------------------------- limits


def test_a_file_that_is_too_large_has_one_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = make_volume(tmp_path)
    small = ReadOptions(limits=DecodeLimits(max_bytes=1000))
    (row,) = open_all(volume, make_task(tmp_path / "a", reading=small))
    assert (row["reason"], row["content_sha256"], row["frame"]) == ("too_large", None, None)
    monkeypatch.setattr(shards_module, "MAX_FILE_BYTES", 11 * 32 * 32)
    (row,) = open_all(volume, make_task(tmp_path / "b"))
    assert (row["reason"], row["scan_uri"]) == ("too_large", str(volume))
    assert row["content_sha256"] is not None


def test_a_shard_has_only_a_few_large_files(tmp_path: Path) -> None:
    """Shards are planned by file size alone; the number of slices is not known yet."""
    inbox = tmp_path / "in"
    inbox.mkdir()
    for number in range(3):
        volume = make_volume(inbox, f"{number}.nii", num_slices=150)
        (inbox / f"{number}.nii.gz").write_bytes(gzip.compress(volume.read_bytes()))
    rows = open_all(inbox, make_task(tmp_path / "out"), max_shard_rows=30)
    counts = Counter(row["shard"] for row in rows)
    assert sum(counts.values()) == 6 * 150
    assert max(counts.values()) <= 4 * 150
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(40):
        Image.fromarray(np.zeros((300, 300), np.uint8)).save(pictures / f"{number}.bmp")
    rows = open_all(pictures, make_task(tmp_path / "other"), max_shard_rows=30)
    assert sorted(Counter(row["shard"] for row in rows).values()) == [8, 16, 16]


# --------------------------------------------------------------------------------- known files


def describe_known(rows: Sequence[dict[str, Any]], **changes: Any) -> list[dict[str, Any]]:  # noqa: ANN401
    """Return the known rows of the files of some rows."""
    files = {find_file(row): row for row in rows}
    return [
        {"scan_uri": name, "size_bytes": row["size_bytes"], "modified_ns": row["modified_ns"]}
        | {"reason": None, "content": row["content_sha256"]}
        | changes
        for name, row in files.items()
    ]


def test_a_file_whose_slices_have_rows_is_not_opened_again(tmp_path: Path) -> None:
    inbox = tmp_path / "in"
    inbox.mkdir()
    volume = make_volume(inbox)
    (inbox / "frames.dcm").write_bytes(make_mr(np.stack([HEAD, HEAD])))
    first = open_all(inbox, make_task(tmp_path / "out"))
    assert len(first) == 14
    known = describe_known(first)
    assert open_all(inbox, make_task(tmp_path / "out", run="second"), known=known) == []
    # With another time, the file is read and its content is known: one row for all slices.
    touched = describe_known(first, modified_ns=1)
    rows = open_all(inbox, make_task(tmp_path / "out", run="third"), known=touched)
    assert [(row["scan_uri"], row["reason"]) for row in rows] == [
        (str(inbox / "frames.dcm"), ALREADY_ANSWERED),
        (str(volume), ALREADY_ANSWERED),
    ]
    assert [row["image"] for row in rows] == [None, None]
    make_volume(inbox, num_slices=9)
    rows = open_all(inbox, make_task(tmp_path / "out", run="fourth"), known=known)
    assert {find_file(row) for row in rows} == {str(volume)}
    assert [row["reason"] for row in rows if row["reason"] != "little_tissue"] == [None] * 3


def test_redacted_names_are_recognised_and_contain_no_path(tmp_path: Path) -> None:
    inbox = tmp_path / "Doe^John"
    inbox.mkdir()
    make_volume(inbox)
    (inbox / "classic.dcm").write_bytes(make_mr(HEAD))
    rows = open_all(inbox, make_task(tmp_path / "out"), redact_paths=True)
    assert len(rows) == 13
    assert not any("Doe" in str(row) for row in rows)
    names = [row["scan_uri"] for row in rows]
    assert len(set(names)) == 13
    assert {name[:9] for name in names} == {"redacted:"}
    assert len({find_file(row) for row in rows}) == 2
    task = make_task(tmp_path / "out", run="second")
    assert open_all(inbox, task, known=describe_known(rows), redact_paths=True) == []


# -------------------------------------------------------------------- files of pydicom and nibabel


def test_every_file_of_pydicom_has_a_row_and_a_reason_or_pixels(tmp_path: Path) -> None:
    task = make_task(tmp_path / "out", reading=ReadOptions(limits=DecodeLimits(max_pixels=10**6)))
    rows = open_all(PYDICOM_FILES, task)
    listed = list_scans([str(PYDICOM_FILES)])["scan_uri"].to_pylist()
    assert {find_file(row) for row in rows} == set(listed)
    assert len({row["scan_uri"] for row in rows}) == len(rows)
    for row in rows:
        assert (row["image"] is None) == (row["reason"] is not None)
        assert row["reason"] is None or row["reason"] in REASONS
    reasons = {row["scan_uri"].removeprefix(f"{PYDICOM_FILES}/"): row["reason"] for row in rows}
    expected = {
        "MR_small.dcm": None,
        "MR_small_RLE.dcm": None,
        "MR_small_bigendian.dcm": None,
        "MR_small_jp2klossless.dcm": None,
        "MR_truncated.dcm": "truncated",
        "CT_small.dcm": "not_mr",
        "test-SR.dcm": "not_an_image_object",
        "reportsi.dcm": "not_an_image_object",
        "rtplan.dcm": "not_an_image_object",
        "dicomdirtests/98892003/MR2/4950": None,
    }
    assert {name: reasons[name] for name in expected} == expected
    copies = [row for row in rows if Path(row["scan_uri"]).name.startswith("MR_small")]
    assert len({row["series"] for row in copies if row["reason"] is None}) == 1


@pytest.mark.parametrize(
    ("name", "num_slices", "is_4d"),
    [("anatomical.nii", 25, False), ("functional.nii", 3, True), ("example4d.nii.gz", 24, True)],
)
def test_volumes_of_nibabel_have_a_row_for_each_slice(
    tmp_path: Path, name: str, num_slices: int, is_4d: bool
) -> None:
    rows = open_all(NIBABEL_FILES / name, make_task(tmp_path / "out"))
    assert [row["frame"] for row in rows] == list(range(num_slices))
    assert {row["reason"] for row in rows} <= {None, "little_tissue"}
    assert any(row["image"] for row in rows)
    assert {"multi_volume" in (row["flags"] or []) for row in rows} == {is_4d}
    assert len({row["series"] for row in rows}) == 1
    assert {row["plane"] for row in rows} == {"axial"}


def test_copies_of_an_object_and_of_a_volume_have_equal_hashes(tmp_path: Path) -> None:
    inbox = tmp_path / "in"
    inbox.mkdir()
    (inbox / "a.dcm").write_bytes(make_mr(HEAD))
    (inbox / "b.dcm").write_bytes(make_mr(HEAD, ImageComments="copied"))
    (inbox / "c.dcm").write_bytes(make_mr(HEAD, SOPInstanceUID="1.2.3.4"))
    shutil.copy(make_volume(inbox), inbox / "copy.nii")
    rows = open_all(inbox, make_task(tmp_path / "out"))
    objects = {Path(row["scan_uri"]).name: row["sop_instance"] for row in rows}
    assert objects["a.dcm"] == objects["b.dcm"] != objects["c.dcm"]
    assert objects["volume.nii#frame=4"] == objects["copy.nii#frame=4"] is not None
    other = open_all(inbox, make_task(tmp_path / "other", key=b"another key of theirs"))
    assert not {row["sop_instance"] for row in other} & {row["sop_instance"] for row in rows}
