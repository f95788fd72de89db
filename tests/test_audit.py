"""The audit finds planted duplicates and conflicts; its split keeps groups whole."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from brainray import cli
from brainray.data.labelled import find_samples
from brainray.errors import ConfigError
from brainray.evaluation.audit import AuditJob, audit, parse_max_leak
from tests.conftest import CLASSES

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(scope="module")
def planted(phantom_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the phantoms; add a duplicate across splits, a label conflict and a broken file."""
    root = tmp_path_factory.mktemp("planted") / "data"
    shutil.copytree(phantom_folder, root)
    first, second = sorted((root / "Training" / "glioma").iterdir())[:2]
    with Image.open(first) as image:  # the same pixels in another file
        image.convert("L").save(root / "Testing" / "glioma" / "copy.png")
    shutil.copy(second, root / "Training" / "meningioma" / f"conflict{second.suffix}")
    (root / "Testing" / "notumor" / "broken.jpg").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def clean_leak(phantom_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """Return the number of near duplicates across splits among the phantoms."""
    job = AuditJob(data_uri=str(phantom_folder), output_uri=str(tmp_path_factory.mktemp("clean")))
    document = audit(job)
    assert document["leaks"]["test"]["num_exact_duplicate"] == 0
    assert document["exact_duplicates"]["num_repeated"] == 0
    assert document["groups"]["num_mixed"] == 0
    return int(document["leaks"]["test"]["num_near_duplicate"])


def test_planted_duplicates_and_conflicts_are_found(
    planted: Path, clean_leak: int, tmp_path: Path
) -> None:
    document = audit(AuditJob(data_uri=str(planted), output_uri=str(tmp_path)))
    leak = document["leaks"]["test"]
    assert leak["num_exact_duplicate"] == 1
    assert leak["num_near_duplicate"] == clean_leak + 1
    assert document["exact_duplicates"]["num_repeated"] == 2
    assert document["exact_duplicates"]["num_mixed"] == 1
    assert document["groups"]["num_mixed"] == 1
    (unreadable,) = document["unreadable"]
    assert (unreadable["reason"], unreadable["by_split"]) == ("not_an_image", {"test": 1})
    assert document["num_scans"] == document["num_usable"] + 1
    rows = pq.read_table(tmp_path / "groups.parquet").to_pylist()
    assert len(rows) == document["num_scans"]
    by_path = {row["path"]: row for row in rows}
    copy = next(row for path, row in by_path.items() if path.endswith("copy.png"))
    assert copy["nearest_correlation"] == pytest.approx(1, abs=1e-4)
    assert copy["nearest_label"] == "glioma"
    assert copy["exact_duplicate_set"] == by_path[copy["nearest_path"]]["exact_duplicate_set"]
    assert copy["pixel_sha256"] == by_path[copy["nearest_path"]]["pixel_sha256"]
    assert copy["content_sha256"] != by_path[copy["nearest_path"]]["content_sha256"]
    page = (tmp_path / "audit.html").read_text()
    assert "copy.png" in page
    assert "conflict" in page
    assert "not_an_image" in page
    assert "<script src" not in page
    assert json.loads((tmp_path / "audit.json").read_text())["leaks"] == document["leaks"]


def test_the_new_split_is_readable_and_keeps_groups_whole(planted: Path, tmp_path: Path) -> None:
    job = AuditJob(data_uri=str(planted), output_uri=str(tmp_path), make_split="grouped", folds=3)
    document = audit(job)
    table = pq.read_table(tmp_path / "split.parquet")
    rows = table.to_pylist()
    splits_of: dict[str, set[str]] = {}
    folds_of: dict[str, set[int | None]] = {}
    for row in rows:
        splits_of.setdefault(row["group"], set()).add(row["split"] == "test")
        folds_of.setdefault(row["group"], set()).add(row["fold"])
    assert all(len(found) == 1 for found in splits_of.values())
    assert all(len(found) == 1 for found in folds_of.values())
    assert {row["fold"] for row in rows if row["split"] != "test"} == {0, 1, 2}
    assert {row["fold"] for row in rows if row["split"] == "test"} == {None}
    for split in ("train", "val", "test"):
        assert {row["label"] for row in rows if row["split"] == split} == set(CLASSES)
    found = find_samples(document["split"]["uri"], CLASSES)
    assert found.samples.num_rows == document["num_usable"]
    assert found.samples["split"].to_pylist() == table["split"].to_pylist()
    again = audit(AuditJob(data_uri=document["split"]["uri"], output_uri=str(tmp_path / "again")))
    assert again["leaks"]["test"]["num_same_group"] == 0


def test_a_shortcut_is_found(phantom_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for scan in sorted((phantom_folder / "Training" / name).iterdir()):
            side = 100 + 20 * label  # the size alone determines the class
            with Image.open(scan) as image:
                image.convert("L").resize((side, side)).save(root / name / f"{scan.stem}.png")
    document = audit(AuditJob(data_uri=str(root), output_uri=str(tmp_path / "out")))
    found = {row["property"]: row for row in document["shortcuts"]}
    assert found["size in pixels"]["balanced_accuracy"] > 0.95
    assert found["size in pixels"]["is_above_chance"]
    assert found["aspect ratio"]["is_constant"]
    assert found["aspect ratio"]["balanced_accuracy"] == 0.25


def test_the_command_exits_with_3_above_max_leak(
    planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data-uri", str(planted), "--output-uri", str(tmp_path), "--max-leak", "1%"]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["audit", *words])
    assert stopped.value.code == 3
    assert "more than --max-leak 1%" in capsys.readouterr().err
    assert (tmp_path / "audit.html").exists()


def test_max_leak_without_splits_is_an_error(phantom_folder: Path, tmp_path: Path) -> None:
    job = AuditJob(
        data_uri=str(phantom_folder / "Training"), output_uri=str(tmp_path), max_leak="5%"
    )
    with pytest.raises(ConfigError, match="found no splits"):
        audit(job)


@pytest.mark.parametrize(
    ("text", "share"), [(None, None), ("5%", 0.05), ("0.05", 0.05), ("0", 0.0)]
)
def test_shares_are_parsed(text: str | None, share: float | None) -> None:
    assert parse_max_leak(text) == share


@pytest.mark.parametrize("text", ["five", "120%", "-1", "nan"])
def test_text_that_is_not_a_share_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError, match="share"):
        AuditJob(data_uri="x", output_uri="y", max_leak=text)


def test_small_data_sets_are_searched_pair_by_pair(planted: Path, tmp_path: Path) -> None:
    document = audit(AuditJob(data_uri=str(planted), output_uri=str(tmp_path)))
    assert document["groups"]["search"] == "every pair"
    sizes = document["groups"]["sizes"]
    assert sum(row["images"] for row in sizes) == document["num_usable"]
    assert np.isfinite(document["resolution"]["aspect_ratio"]).all()
