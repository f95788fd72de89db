"""Whole jobs with all URIs in S3: train, kill, resume, evaluate, classify."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch

from brainray.io.lock import LEASE_LIFE_S
from brainray.model.network import build_network
from tests.conftest import CLASSES, REPOSITORY
from tests.object_store import BODY, BUCKET, Environ, ObjectStore, StalledWrites, serve_objects
from tests.processes import finish, wait_for

pytestmark = pytest.mark.slow

SMALL = ("--recipe", "smoke", "--preprocessing.size-px", "32", "--num-epochs", "2")


@pytest.fixture(scope="module")
def store(phantom_folder: Path) -> Iterator[ObjectStore]:
    """Serve a bucket that holds the phantoms."""
    with serve_objects() as store:
        store.put_folder(phantom_folder, "data")
        yield store


def start(store: ObjectStore, program: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a job; arguments that begin with @ are URIs in the bucket."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "RAY_ADDRESS"))}
    return subprocess.Popen(
        [
            sys.executable,
            *program.split(),
            *(a.replace("@", f"s3://{BUCKET}/", 1) for a in arguments),
        ],
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
    """Train from weights in the bucket; kill the run after a checkpoint, and resume it."""
    weights = safetensors.torch.save(build_network(len(CLASSES)).state_dict())
    store.put("weights/random.safetensors", weights)
    options = ("--data-uri", "@data", "--output-uri", "@runs/1", *SMALL)
    options += ("--weights-uri", "@weights/random.safetensors")
    process = start(store, "jobs/train.py", *options)
    wait_for(lambda: any(k.endswith("state.json") for k in store.list_keys()), process)
    process.kill()
    process.communicate()
    assert "runs/1/metrics.json" not in store.list_keys(), "the run finished before it was killed"
    status, printed = finish(start(store, "jobs/train.py", *options))
    assert status == 0, printed
    assert "Resuming the run" in printed
    return store


def test_a_killed_training_resumes_from_its_checkpoint(trained: ObjectStore) -> None:
    assert read_epochs(trained) == [0, 1]
    keys = trained.list_keys()
    assert {"runs/1/classifier/classifier.json", "runs/1/report.html"} <= set(keys)
    assert any(key.startswith("runs/1/checkpoints/checkpoint_") for key in keys)
    assert not any(".probe" in key for key in keys)


def test_the_classifier_is_evaluated(trained: ObjectStore) -> None:
    options = ("--data-uri", "@data", "--classifier-uri", "@runs/1/classifier")
    status, printed = finish(
        start(trained, "jobs/evaluate.py", *options, "--output-uri", "@evaluated")
    )
    assert status == 0, printed
    table = pq.read_table(pa.BufferReader(trained.get("evaluated/predictions/test.parquet")))
    assert table.num_rows == 32


def test_every_scan_has_one_row_in_few_requests_and_a_second_run_adds_only_new_scans(
    trained: ObjectStore, phantom_folder: Path
) -> None:
    files = sorted((phantom_folder / "Training").rglob("*.jpg"))
    for number, file in enumerate(files):
        trained.put(f"inbox/{number:03d}.jpg", file.read_bytes())
    trained.put("inbox/empty.jpg", b"")
    options = ("--scans-uri", "@inbox", "--classifier-uri", "@runs/1/classifier")
    options += ("--output-uri", "@answers")
    trained.forget()
    status, printed = finish(start(trained, "jobs/classify.py", *options))
    assert status == 0, printed
    of_scans = [line.split()[0] for line in trained.requests if f" /{BUCKET}/inbox/" in line]
    num_shown = 24  # pictures in the report
    for verb in ("HEAD", "GET"):
        assert of_scans.count(verb) <= len(files) + 1 + num_shown, verb
    others = Counter(
        re.sub(r"/[0-9T]+-\w{6}", "/RUN", line.partition("?")[0])
        for line in trained.requests
        if f" /{BUCKET}/inbox/" not in line
    )
    assert others.total() < 60, others.most_common()
    rows = trained.read_predictions("answers")
    assert len(rows) == len({row["scan_uri"] for row in rows}) == len(files) + 1
    assert Counter(row["reason"] for row in rows)["empty"] == 1

    trained.put("inbox/new.jpg", files[0].read_bytes())
    trained.forget()
    status, printed = finish(start(trained, "jobs/classify.py", *options))
    assert status == 0, printed
    new = [row for row in trained.read_predictions("answers") if row not in rows]
    assert [row["scan_uri"] for row in new] == [f"s3://{BUCKET}/inbox/new.jpg"]
    lock = json.loads(trained.get("answers/.lock"))
    assert (lock["released"], lock["state"]) == (True, {})
    assert not any("/.plan/" in key for key in trained.list_keys())


def test_a_few_files_are_classified(trained: ObjectStore) -> None:
    scan = next(key for key in trained.list_keys() if key.startswith("data/Testing/"))
    options = ("classify", f"@{scan}", "@data/none.jpg", "--classifier-uri", "@runs/1/classifier")
    status, printed = finish(start(trained, "-m brainray", *options, "--json"))
    assert status == 0, printed
    first, second = json.loads(printed[printed.index("{") :])["predictions"]
    assert first["scan_uri"] == f"s3://{BUCKET}/{scan}"
    assert first["content_sha256"]
    assert second["reason"] == "missing"


@pytest.fixture
def inbox(store: ObjectStore, phantom_folder: Path, tiny_classifier: Path) -> set[str]:
    """Put a few hundred scans and a classifier into the bucket; return the scans' URIs."""
    store.forget()
    store.put_folder(tiny_classifier, "tiny")
    files = sorted(phantom_folder.rglob("*.jpg"))
    keys = [f"many/{number:03d}.jpg" for number in range(200)]
    for number, key in enumerate(keys):
        store.put(key, files[number % len(files)].read_bytes())
    return {f"s3://{BUCKET}/{key}" for key in keys}


def check_rows(store: ObjectStore, output: str, uris: set[str]) -> None:
    found = Counter(row["scan_uri"] for row in store.read_predictions(output))
    assert {uri: count for uri, count in found.items() if count > 1} == {}, "duplicate rows"
    assert uris - set(found) == set(), "missing rows"
    assert set(found) == uris


@pytest.mark.parametrize("way", ["killed", "stopped"])
def test_a_stalled_write_of_a_lost_run_cannot_add_a_row(
    store: ObjectStore, inbox: set[str], way: str
) -> None:
    """A run stalls during a write; another takes over its output; then the first resumes."""
    options = ("--scans-uri", "@many", "--classifier-uri", "@tiny", "--output-uri", f"@{way}")
    options += ("--part-s", "0.01")

    first_run: list[str] = []

    def is_row_of_first_run(environ: Environ) -> bool:
        """Match rows of the first run, after two files from which another run can resume."""
        path = environ["PATH_INFO"]
        if f"/{way}/predictions/" not in path:
            return False
        first_run.append(path)
        return (
            path not in first_run[:2]
            and path.rpartition("-0000-")[0] == first_run[0].rpartition("-0000-")[0]
            and pq.read_table(io.BytesIO(environ[BODY])).num_rows > 0
        )

    stall = StalledWrites(is_row_of_first_run)
    store.fail = stall
    first = start(store, "-m tests.fakes", *options)
    wait_for(lambda: bool(stall.stalled), first)
    status, printed = finish(start(store, "-m tests.fakes", *options))
    assert status == 2
    assert f"process {first.pid}" in printed
    os.kill(first.pid, signal.SIGKILL if way == "killed" else signal.SIGSTOP)
    lock = json.loads(store.get(f"{way}/.lock"))
    lock["renewed_unix_s"] -= LEASE_LIFE_S
    store.put(f"{way}/.lock", json.dumps(lock).encode())
    status, printed = finish(start(store, "-m tests.fakes", *options))
    assert status == 0, printed
    assert "The last run was interrupted;" in printed
    check_rows(store, way, inbox)
    assert set(stall.let_go()) == {412}, "a stalled write succeeded"
    check_rows(store, way, inbox)
    for path in {environ["PATH_INFO"] for environ in stall.stalled}:
        content = store.get(path.removeprefix(f"/{BUCKET}/"))
        assert pq.read_table(pa.BufferReader(content)).num_rows == 0
    if way == "stopped":
        os.kill(first.pid, signal.SIGCONT)
        status, printed = finish(first)
        assert status in (1, 2), printed  # 2 if its write times out before it finds the lock lost
        check_rows(store, way, inbox)
    else:
        first.communicate()
    status, printed = finish(start(store, "-m tests.fakes", *options))
    assert status == 0, printed
    assert "0 new" in printed
    check_rows(store, way, inbox)
