"""Whole jobs whose every place is in S3: trained, killed, gone on with, judged, classified."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch

from brainray.model.network import build_network
from tests.conftest import CLASSES, REPOSITORY
from tests.object_store import BUCKET, ObjectStore, serve_objects
from tests.processes import finish, wait_for

pytestmark = pytest.mark.slow

SMALL = ("--recipe", "smoke", "--preprocessing.size-px", "32", "--num-epochs", "2")


@pytest.fixture(scope="module")
def store(phantom_folder: Path) -> Iterator[ObjectStore]:
    """Serve a bucket that holds the phantoms."""
    with serve_objects() as store:
        store.put_folder(phantom_folder, "data")
        yield store


def start(store: ObjectStore, program: str, *words: str) -> subprocess.Popen[str]:
    """Start a job; words that begin with @ are places in the bucket."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "RAY_ADDRESS"))}
    return subprocess.Popen(
        [sys.executable, *program.split(), *(w.replace("@", f"s3://{BUCKET}/", 1) for w in words)],
        cwd=REPOSITORY,
        env=kept | store.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def read_epochs(store: ObjectStore) -> list[int]:
    text = store.get("runs/1/metrics.jsonl").decode()
    return [json.loads(line)["epoch"] for line in text.splitlines()]


@pytest.fixture(scope="module")
def trained(store: ObjectStore) -> ObjectStore:
    """Train from weights in the bucket; kill it after a checkpoint, and go on."""
    weights = safetensors.torch.save(build_network(len(CLASSES)).state_dict())
    store.put("weights/random.safetensors", weights)
    words = ("--data-uri", "@data", "--output-uri", "@runs/1", *SMALL)
    words += ("--weights-uri", "@weights/random.safetensors")
    process = start(store, "jobs/train.py", *words)
    wait_for(lambda: any(k.endswith("state.json") for k in store.list_keys()), process)
    process.kill()
    process.communicate()
    assert "runs/1/metrics.json" not in store.list_keys(), "it was over before it was killed"
    status, said = finish(start(store, "jobs/train.py", *words))
    assert status == 0, said
    assert "Going on with the run" in said
    return store


def test_a_killed_training_goes_on_from_its_checkpoint(trained: ObjectStore) -> None:
    assert read_epochs(trained) == [0, 1]
    keys = trained.list_keys()
    assert {"runs/1/classifier/classifier.json", "runs/1/report.html"} <= set(keys)
    assert any(key.startswith("runs/1/checkpoints/checkpoint_") for key in keys)
    assert not any(".probe" in key for key in keys)


def test_the_classifier_is_judged(trained: ObjectStore) -> None:
    words = ("--data-uri", "@data", "--classifier-uri", "@runs/1/classifier")
    status, said = finish(start(trained, "jobs/evaluate.py", *words, "--output-uri", "@judged"))
    assert status == 0, said
    table = pq.read_table(pa.BufferReader(trained.get("judged/predictions/test.parquet")))
    assert table.num_rows == 32


def test_every_scan_has_one_answer_in_few_requests_and_only_what_is_new(
    trained: ObjectStore, phantom_folder: Path
) -> None:
    files = sorted((phantom_folder / "Training").rglob("*.jpg"))
    for number, file in enumerate(files):
        trained.put(f"inbox/{number:03d}.jpg", file.read_bytes())
    trained.put("inbox/empty.jpg", b"")
    words = ("--scans-uri", "@inbox", "--classifier-uri", "@runs/1/classifier")
    words += ("--output-uri", "@answers")
    trained.forget()
    status, said = finish(start(trained, "jobs/classify.py", *words))
    assert status == 0, said
    of_scans = [line.split()[0] for line in trained.requests if f" /{BUCKET}/inbox/" in line]
    drawn = 24  # the report's pictures
    for verb in ("HEAD", "GET"):
        assert of_scans.count(verb) <= len(files) + 1 + drawn, verb
    assert len(trained.requests) - len(of_scans) < 80
    rows = trained.read_answers("answers")
    assert len(rows) == len({row["scan_uri"] for row in rows}) == len(files) + 1
    assert Counter(row["reason"] for row in rows)["empty"] == 1

    trained.put("inbox/new.jpg", files[0].read_bytes())
    trained.forget()
    status, said = finish(start(trained, "jobs/classify.py", *words))
    assert status == 0, said
    new = [row for row in trained.read_answers("answers") if row not in rows]
    assert [row["scan_uri"] for row in new] == [f"s3://{BUCKET}/inbox/new.jpg"]
    assert json.loads(trained.get("answers/.lock"))["released"] is True


def test_a_handful_is_answered(trained: ObjectStore) -> None:
    scan = next(key for key in trained.list_keys() if key.startswith("data/Testing/"))
    words = ("classify", f"@{scan}", "@data/none.jpg", "--classifier-uri", "@runs/1/classifier")
    status, said = finish(start(trained, "-m brainray", *words, "--json"))
    assert status == 0, said
    first, second = json.loads(said[said.index("{") :])["answers"]
    assert first["name"] == f"s3://{BUCKET}/{scan}"
    assert first["content_sha256"]
    assert second["reason"] == "missing"
