"""Bulk runs on Ray: one row for every scan, only what is new, and nothing half written."""

import contextlib
import json
import os
import random
import re
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from brainray.pipelines.classify import ClassifyJob, classify, parse_max_rejected
from brainray.pipelines.tally import Standing, find_bottleneck
from PIL import Image
from ray.exceptions import ActorDiedError

from brainray import storage
from brainray.errors import ClassificationError, ConfigError, DataError, StorageError
from brainray.inference.engine import EngineOptions, open_engine
from brainray.io.lock import hold_output
from brainray.model.classifier import load_classifier, save_classifier
from brainray.model.network import build_network
from brainray.pipelines import classify as room
from brainray.pixels.decode import REJECTION_REASONS, DecodeLimits, decode_image
from brainray.pixels.preprocess import Preprocessing, load_image
from tests.conftest import CLASSES, REPOSITORY
from tests.test_decode import SAMPLES, mutate

GUIDE = REPOSITORY / "docs" / "bulk.md"

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture
def inbox(phantom_folder: Path, tmp_path: Path) -> Path:
    """Return a folder of some phantoms that a test may change."""
    folder = tmp_path / "inbox"
    for name in CLASSES:
        for scan in sorted((phantom_folder / "Testing" / name).iterdir())[:5]:
            (folder / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(scan, folder / name / scan.name)
    return folder


def make_job(inbox: Path, classifier: Path, output: Path, **changes: Any) -> ClassifyJob:  # noqa: ANN401
    job = ClassifyJob(
        scans_uri=(str(inbox),),
        classifier_uri=str(classifier),
        output_uri=str(output),
        backend="torch",
        precision="fp32",
    )
    return replace(job, **changes)


def read_rows(output: Path) -> list[dict[str, Any]]:
    return pq.read_table(output / "predictions").to_pylist()


def save_bomb(place: Path, side: int = 60_000) -> None:
    """Write a whole PNG of 60,000 × 60,000 black pixels, which takes a few hundred kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    header = side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])  # one bit a pixel
    packer = zlib.compressobj(9)
    line = bytes(1 + side // 8)
    data = b"".join(packer.compress(line) for _ in range(side)) + packer.flush()
    content = chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    place.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def make_bad_inbox(folder: Path, good: Path) -> dict[str, str | None]:
    """Fill a folder with everything that ever lay in an inbox; return the reasons by name."""
    whole = good.read_bytes()
    image = Image.open(good).convert("L")
    reasons: dict[str, str | None] = {
        "empty.jpg": "empty",
        "cut.jpg": "truncated",
        "noise.jpg": "not_an_image",
        "text.png": "not_an_image",
        "archive.zip": "unsupported",
        "a jpeg named.png": None,
        "no-suffix": None,
        "bomb.png": "too_large",
        "sixteen-bit.png": None,
        "palette.png": None,
        "cmyk.jpg": None,
        "animated.gif": "multi_frame",
        "gone.jpg": "missing",
        "quote\"and'quote.jpg": None,
        "new\nline.jpg": None,
        "x" * 251 + ".jpg": None,
    }
    contents = {
        "empty.jpg": b"",
        "cut.jpg": whole[: len(whole) // 2],
        "noise.jpg": np.random.default_rng(0).bytes(5000),
        "text.png": b"this is not an image",
        "archive.zip": b"PK\x03\x04" + bytes(100),
    }
    folder.mkdir()
    for name in reasons:
        (folder / name).write_bytes(contents.get(name, whole))
    save_bomb(folder / "bomb.png")
    Image.fromarray(np.asarray(image, np.uint16) * 257).save(folder / "sixteen-bit.png")
    image.convert("P").save(folder / "palette.png")
    image.convert("CMYK").save(folder / "cmyk.jpg")
    image.save(folder / "animated.gif", save_all=True, append_images=[image.rotate(90)])
    (folder / "gone.jpg").unlink()
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    odd = os.fsencode(folder) + b"/caf\xe9.jpg"
    Path(os.fsdecode(odd)).write_bytes(whole)
    return reasons | {"caf%E9.jpg": None}


def test_every_scan_has_its_row_and_the_rows_say_what_the_classifier_says(
    inbox: Path, tiny_classifier: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    metrics = classify(make_job(inbox, tiny_classifier, output))
    rows = {row["scan_uri"]: row for row in read_rows(output)}
    assert {row["class_map"] for row in rows.values()} == {None}
    files = sorted(p for p in inbox.rglob("*") if p.is_file())
    assert sorted(rows) == [str(file) for file in files]
    classifier = load_classifier(str(tiny_classifier))
    images = [
        load_image(file.read_bytes(), classifier.preprocessing, DecodeLimits()) for file in files
    ]
    probs = classifier.predict_probs(np.stack(images))
    for file, expected in zip(files, probs, strict=True):
        row = rows[str(file)]
        assert row["status"] == "classified"
        assert row["reason"] is None
        assert row["content_sha256"] == sha256(file.read_bytes()).hexdigest()
        found = [row[f"prob_{name}"] for name in CLASSES]
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert row["predicted_class"] == CLASSES[int(np.argmax(found))]
        assert row["confidence"] == max(found)
        assert (row["width_px"], row["height_px"]) == Image.open(file).size
        assert row["classifier_id"] == classifier.classifier_id
    assert metrics["counts"]["total"] == len(files)
    assert metrics["counts"]["by_status"] == {
        "classified": len(files),
        "abstained": 0,
        "rejected": 0,
    }
    assert sum(metrics["counts"]["by_class"].values()) == len(files)
    assert sum(metrics["confidence_histogram"]["counts"]) == len(files)
    assert metrics["run"]["images_per_s"] > 0
    assert metrics["run"]["memory_peak_bytes"] > 100 * 2**20
    assert metrics == json.loads((output / "metrics.json").read_text())
    report = (output / "report.html").read_text()
    assert classifier.classifier_id in report
    assert "Where the network saw" not in report


def test_whatever_lies_in_an_inbox_gets_its_row(
    phantom_folder: Path, tiny_classifier: Path, tmp_path: Path
) -> None:
    good = next((phantom_folder / "Testing").rglob("*.jpg"))
    expected = make_bad_inbox(tmp_path / "in", good)
    output = tmp_path / "out"
    metrics = classify(make_job(tmp_path / "in", tiny_classifier, output))
    found = {row["scan_uri"].rpartition("/")[2]: row for row in read_rows(output)}
    assert {name: row["reason"] for name, row in found.items()} == expected
    for row in found.values():
        assert (row["status"] == "classified") == (row["reason"] is None)
        assert (row["predicted_class"] is None) == (row["status"] == "rejected")
        assert (row["prob_glioma"] is None) == (row["status"] == "rejected")
    assert found["bomb.png"]["content_sha256"] is not None
    assert found["gone.jpg"]["content_sha256"] is None
    assert sum(metrics["counts"]["by_reason"].values()) == sum(map(bool, expected.values()))


def test_a_second_run_does_only_what_is_new(
    inbox: Path, tiny_classifier: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    job = make_job(inbox, tiny_classifier, output)
    classify(job)
    first = read_rows(output)
    metrics = classify(job)
    assert metrics["run"]["num_new"] == 0
    assert read_rows(output) == first
    scans = sorted(inbox.rglob("*.jpg"))
    shutil.copy(scans[0], inbox / "new.jpg")  # a new place
    scans[1].write_bytes(scans[2].read_bytes())  # a new content
    os.utime(scans[3])  # neither: looked at again
    (inbox / "late.jpg").symlink_to(inbox / "later.jpg")
    metrics = classify(job)
    assert (metrics["run"]["num_new"], metrics["run"]["num_known"]) == (3, 1)
    rows = read_rows(output)
    assert len(rows) == len(first) + 3
    assert len({(row["scan_uri"], row["content_sha256"]) for row in rows}) == len(rows)
    assert metrics["counts"]["total"] == len(rows)
    shutil.copy(scans[4], inbox / "later.jpg")  # what was missing has come
    metrics = classify(job)
    assert metrics["run"]["num_new"] == 2  # later.jpg, and late.jpg that leads there
    late = [row for row in read_rows(output) if row["scan_uri"].endswith("late.jpg")]
    assert [row["reason"] for row in sorted(late, key=lambda row: row["classified_at"])] == [
        "missing",
        None,
    ]


def test_explained_answers_have_the_map_of_their_class(
    inbox: Path, phantom_folder: Path, tmp_path: Path
) -> None:
    uri, output = str(tmp_path / "classifier"), tmp_path / "out"
    save_classifier(
        uri,
        build_network(len(CLASSES)).state_dict(),
        classes=CLASSES,
        preprocessing=Preprocessing(size_px=64),
        provenance={},
    )
    (inbox / "empty.jpg").touch()
    job = make_job(inbox, Path(uri), output, explain=True, labels="folder")
    classify(job)
    rows = {row["scan_uri"]: row for row in read_rows(output)}
    classifier = load_classifier(uri)
    runtime = open_engine(classifier, EngineOptions(backend="torch", precision="fp32"))
    for scan, row in rows.items():
        if row["status"] == "rejected":
            assert row["class_map"] is None
            continue
        content = Path(scan).read_bytes()
        image = load_image(content, classifier.preprocessing, DecodeLimits())
        maps = runtime.explain(image[None]).maps
        assert maps is not None
        expected = maps[0, CLASSES.index(row["predicted_class"])]
        np.testing.assert_allclose(np.reshape(row["class_map"], (2, 2)), expected, atol=1e-4)
        assert row["confidence"] == max(row[f"prob_{name}"] for name in CLASSES)
    mistakes = sum(
        row["predicted_class"] != Path(scan).parent.name
        for scan, row in rows.items()
        if row["predicted_class"]
    )
    assert mistakes
    report = (output / "report.html").read_text()
    assert report.count('alt="Where the network saw ') == len(rows) - 1 + mistakes

    shutil.copy(next(phantom_folder.glob("Training/*/*")), inbox / "new.jpg")
    plain = replace(job, explain=False)
    assert classify(plain)["run"]["num_new"] == 1
    assert classify(job)["run"]["num_new"] == 0, "a map alone is no reason to do a scan again"
    later = {row["scan_uri"]: row for row in read_rows(output)}
    assert later.pop(str(inbox / "new.jpg"))["class_map"] is None
    assert later == rows
    check_the_guide_draws_a_map(output, tmp_path)


def check_the_guide_draws_a_map(output: Path, folder: Path) -> None:
    """Run what docs/bulk.md says, on answers with and without maps."""
    (code,) = re.findall(r"```python\n(.*?class_map.*?)```", GUIDE.read_text(), re.DOTALL)
    (folder / "ANSWERS").symlink_to(output)
    named: dict[str, Any] = {}
    with contextlib.chdir(folder):
        exec(compile(code, str(GUIDE), "exec"), named)
    shown = np.asarray(Image.open(folder / "overlay.png"))
    pixels = decode_image(Path(named["row"]["scan_uri"]).read_bytes(), DecodeLimits())
    assert shown.shape == (*pixels.shape, 3)
    assert np.ptp(shown, axis=2).any(), "a grey scan has no colours of its own"


def test_another_classifier_stands_beside_or_replaces(
    inbox: Path, tiny_classifier: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    new_id = save_classifier(
        str(other),
        build_network(len(CLASSES)).state_dict(),
        classes=CLASSES,
        preprocessing=Preprocessing(size_px=32),
        provenance={},
    )
    output = tmp_path / "out"
    count = len([p for p in inbox.rglob("*") if p.is_file()])
    classify(make_job(inbox, tiny_classifier, output))
    assert classify(make_job(inbox, other, output))["counts"]["total"] == count
    assert len(read_rows(output)) == 2 * count
    metrics = classify(make_job(inbox, other, tmp_path / "out", replace=True))
    rows = read_rows(output)
    assert {row["classifier_id"] for row in rows} == {new_id}
    assert len({row["scan_uri"] for row in rows}) == len(rows) == count
    assert metrics["counts"]["total"] == count
    again = classify(make_job(inbox, other, output, replace=True))
    assert again["run"]["num_new"] == 0


def test_tables_and_lists_and_files_in_one_run(
    inbox: Path, tiny_classifier: Path, tmp_path: Path
) -> None:
    scans = sorted(inbox.rglob("*.jpg"))
    table = pa.table({"image_bytes": [scan.read_bytes() for scan in scans[:7]]})
    pq.write_table(table, tmp_path / "scans.parquet", row_group_size=3)
    (tmp_path / "list.txt").write_text(f"{scans[0]}\n{tmp_path}/nowhere.jpg\n{scans[0]}\n")
    places = (tmp_path / "scans.parquet", tmp_path / "list.txt", scans[1])
    job = make_job(inbox, tiny_classifier, tmp_path / "out", scans_uri=tuple(map(str, places)))
    metrics = classify(job)
    assert metrics["counts"]["total"] == 7 + 2 + 1
    assert metrics["counts"]["by_reason"] == {"missing": 1}
    rows = {row["scan_uri"]: row for row in read_rows(tmp_path / "out")}
    from_table, from_file = rows[f"{tmp_path}/scans.parquet#row=0"], rows[str(scans[0])]
    assert from_table["content_sha256"] == from_file["content_sha256"]
    assert from_table["prob_glioma"] == pytest.approx(from_file["prob_glioma"], abs=1e-6)
    assert classify(job)["run"]["num_new"] == 0


def test_the_truth_is_judged_where_it_is_known(
    inbox: Path, tiny_classifier: Path, tmp_path: Path
) -> None:
    (inbox / "elsewhere").mkdir()
    shutil.copy(next(inbox.rglob("*.jpg")), inbox / "elsewhere" / "unknown.jpg")
    output = tmp_path / "out"
    metrics = classify(make_job(inbox, tiny_classifier, output, labels="folder"))
    rows = [row for row in read_rows(output) if "elsewhere" not in row["scan_uri"]]
    right = sum(row["scan_uri"].split("/")[-2] == row["predicted_class"] for row in rows)
    assert metrics["evaluation"]["accuracy"] == pytest.approx(right / len(rows))
    assert metrics["evaluation"]["n"] == len(rows)
    assert metrics["evaluation"]["num_without_truth"] == 1
    wrong = [row for row in rows if row["scan_uri"].split("/")[-2] != row["predicted_class"]]
    assert wrong
    assert Path(wrong[0]["scan_uri"]).name in (output / "report.html").read_text()
    lines = [f'"{row["scan_uri"]}",{row["predicted_class"]}' for row in rows[:8]]
    (tmp_path / "truth.csv").write_text("scan_uri,label\n" + "\n".join(lines))
    truth = str(tmp_path / "truth.csv")
    metrics = classify(make_job(inbox, tiny_classifier, output, labels=truth))
    assert (metrics["evaluation"]["n"], metrics["evaluation"]["accuracy"]) == (8, 1.0)


def test_too_many_rejections_are_an_error_after_everything_is_written(
    inbox: Path, tiny_classifier: Path, tmp_path: Path
) -> None:
    (inbox / "empty.jpg").touch()
    (inbox / "text.jpg").write_text("text")
    total = len([p for p in inbox.rglob("*") if p.is_file()])
    job = make_job(inbox, tiny_classifier, tmp_path / "out", max_rejected="5%")
    with pytest.raises(DataError, match=f"2 of {total} new scans were rejected"):
        classify(job)
    assert len(read_rows(tmp_path / "out")) == total
    assert (tmp_path / "out" / "report.html").exists()
    classify(make_job(inbox, tiny_classifier, tmp_path / "other", max_rejected="2"))


@pytest.mark.parametrize("text", ["", "five", "-1", "101%", "nan", "inf"])
def test_max_rejected_is_a_share_or_a_number(text: str) -> None:
    with pytest.raises(ConfigError, match="max-rejected"):
        parse_max_rejected(text)


def test_what_cannot_be_used_is_said_at_once(
    inbox: Path, tiny_classifier: Path, tmp_path: Path
) -> None:
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / ".hidden").touch()
    (tmp_path / "file").touch()
    output = tmp_path / "out"
    cases: list[tuple[ClassifyJob, type[Exception], str]] = [
        (make_job(tmp_path / "nothing", tiny_classifier, output), DataError, "not one visible"),
        (make_job(tmp_path / "nowhere", tiny_classifier, output), DataError, "neither a folder"),
        (make_job(inbox, tmp_path / "nowhere", output), ValueError, "nowhere"),
        (make_job(inbox, tiny_classifier, tmp_path / "file"), StorageError, "Cannot write"),
        (make_job(inbox, tiny_classifier, output, precision="int8"), ConfigError, "calibration"),
        (make_job(inbox, tiny_classifier, output, use_gpu=True), ConfigError, "GPU"),
        (make_job(inbox, tiny_classifier, output, labels="no.csv"), DataError, "No labels"),
    ]
    for job, error, message in cases:
        with pytest.raises(error, match=message):
            classify(job)
        assert not storage.exists(str(output / "predictions"))


def test_a_second_run_at_once_is_refused(
    inbox: Path, tiny_classifier: Path, tmp_path: Path
) -> None:
    with (
        hold_output(str(tmp_path / "out")),
        pytest.raises(ConfigError, match="Another run is writing"),
    ):
        classify(make_job(inbox, tiny_classifier, tmp_path / "out"))


def test_progress_reaches_the_total_and_names_what_was_rejected(
    inbox: Path, tiny_classifier: Path, tmp_path: Path
) -> None:
    (inbox / "empty.jpg").touch()
    standings: list[Standing] = []
    classify(make_job(inbox, tiny_classifier, tmp_path / "out"), tick=standings.append)
    last = standings[-1]
    assert last.is_total_known
    assert last.done == last.total == len([p for p in inbox.rglob("*") if p.is_file()])
    assert last.rejected == 1


def test_a_stream_that_keeps_breaking_ends_in_an_error(
    inbox: Path, tiny_classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def break_at_once(*_: object) -> Iterator[pa.Table]:
        raise ActorDiedError
        yield

    monkeypatch.setattr(room, "_iterate", break_at_once)
    with pytest.raises(ClassificationError, match="3 times without a new answer"):
        classify(make_job(inbox, tiny_classifier, tmp_path / "out"), say=said.append)
    assert sum("going on with what is left" in line for line in said) == 2


@pytest.mark.slow
def test_twenty_thousand_damaged_scans_get_a_row_each(
    real_data: Path, tiny_classifier: Path, tmp_path: Path
) -> None:
    real = [path.read_bytes() for path in sorted(real_data.glob("Testing/*/*.jpg"))[::20]]
    drawn = list(SAMPLES.values())
    names = set()
    for seed in range(20_000):
        place = tmp_path / "inbox" / f"{seed // 1000:02d}" / f"{seed:05d}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(mutate(random.Random(seed), real if seed % 2 else drawn))
        names.add(str(place))
    metrics = classify(make_job(tmp_path / "inbox", tiny_classifier, tmp_path / "out"))
    rows = read_rows(tmp_path / "out")
    assert len(rows) == len(names)
    assert {row["scan_uri"] for row in rows} == names
    for row in rows:
        probs = [row[f"prob_{name}"] for name in CLASSES]
        if row["status"] == "classified":
            assert row["reason"] is None
            assert sum(probs) == pytest.approx(1, abs=1e-5)
        else:
            assert row["status"] == "rejected"
            assert row["reason"] in REJECTION_REASONS
            assert probs == [None] * len(CLASSES)
    counts = metrics["counts"]["by_reason"]
    assert {"truncated", "corrupt", "too_large", "unsupported"} <= set(counts), counts
    print(metrics["counts"])  # noqa: T201 - read with -s


def test_more_predictors_than_cpus_do_not_starve_the_decoders(
    inbox: Path, tiny_classifier: Path, tmp_path: Path
) -> None:
    job = make_job(inbox, tiny_classifier, tmp_path / "out", num_predictors=3)
    assert classify(job)["runtime"]["num_predictors"] == 3


def test_int8_says_what_it_costs(inbox: Path, tiny_classifier: Path, tmp_path: Path) -> None:
    pytest.importorskip("nncf", reason="int8 needs NNCF: pip install 'brainray[int8]'")
    said: list[str] = []
    job = make_job(
        inbox,
        tiny_classifier,
        tmp_path / "out",
        backend="auto",
        precision="int8",
        calibration_uri=str(inbox),
    )
    metrics = classify(job, say=said.append)
    assert metrics["runtime"]["precision"] == "int8"
    assert any("int8 against fp32 on 20 of the calibration images" in line for line in said)


def test_an_answer_that_comes_twice_is_kept_once() -> None:
    chunk = pa.table({"scan_uri": ["a", "b", "a"], "is_known": [False, True, False]})
    seen: set[bytes] = set()
    fresh, num_known = room.keep_new(chunk, seen)
    assert fresh["scan_uri"].to_pylist() == ["a"]
    assert num_known == 1
    assert room.keep_new(chunk, seen)[0].num_rows == 0


@pytest.mark.parametrize(
    ("busy", "words"),
    [
        ({"decode": 0.95, "predict": 0.3}, "decode-bound: add CPUs"),
        ({"decode": 0.2, "predict": 0.9}, "predict-bound"),
        ({"decode": 0.2, "predict": 0.4}, "nothing is saturated"),
    ],
)
def test_the_bottleneck_in_words(busy: dict[str, float], words: str) -> None:
    assert words in find_bottleneck(busy)
