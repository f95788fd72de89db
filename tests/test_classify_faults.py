"""Bulk runs that are killed, interrupted or concurrent: every scan has one row at the end."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from brainray.errors import LockLostError
from brainray.inference.store import PredictionStore, Wave
from brainray.model.classifier import read_classifier_metadata
from tests.conftest import REPOSITORY
from tests.fakes import DELAY_VARIABLE
from tests.processes import finish, wait_for

FAKE = ("-m", "tests.fakes")
SHARD_S = 0.2


@pytest.fixture(scope="module")
def inbox(phantom_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make 1,500 links to the phantoms, so that a run takes some time."""
    folder = tmp_path_factory.mktemp("inbox")
    files = sorted(phantom_folder.rglob("*.jpg"))
    for number in range(1500):
        (folder / f"{number:05d}.jpg").symlink_to(files[number % len(files)])
    return folder


def start(
    inbox: Path, classifier: Path, output: Path, program: tuple[str, ...] = FAKE
) -> subprocess.Popen[str]:
    """Start a run with small shards, each of which takes a fifth of a second."""
    words = ["--scans-uri", inbox, "--classifier-uri", classifier, "--output-uri", output]
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, *program, *map(str, words), "--part-s", "0.02"],
        cwd=REPOSITORY,
        env=kept | {DELAY_VARIABLE: str(SHARD_S)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def list_files(output: Path) -> dict[str, int]:
    """Return the modification time of each file of predictions."""
    files = (output / "predictions").glob("*/*.parquet")
    return {file.name: file.stat().st_mtime_ns for file in files}


def check_complete(output: Path, inbox: Path) -> None:
    rows = pq.read_table(output / "predictions", columns=["scan_uri", "status"])
    found = Counter(rows["scan_uri"].to_pylist())
    assert {uri: count for uri, count in found.items() if count > 1} == {}, "duplicate rows"
    assert set(found) == {str(file) for file in inbox.iterdir()}
    assert set(rows["status"].to_pylist()) == {"classified"}


def kill_repeatedly(
    inbox: Path, classifier: Path, output: Path, *, kills: int, early: float
) -> list[int]:
    """Kill runs at random times, then let one end; return the number of files at each kill.

    A share ``early`` of the kills happens during the start, before the first prediction.
    """
    rng = random.Random()
    found = []
    for _ in range(kills):
        before = list_files(output)
        process = start(inbox, classifier, output)
        if rng.random() < early:
            time.sleep(rng.uniform(0.5, 10.0))
        else:
            # A resumed run first writes empty files for unfinished shards, all at once.
            wanted = len(before) + rng.randint(1, 6)
            wait_for(lambda wanted=wanted: len(list_files(output)) >= wanted, process)  # type: ignore[misc]
            time.sleep(rng.uniform(0.0, 0.3))
        process.kill()
        process.communicate()
        assert before.items() <= list_files(output).items(), "an existing file has changed"
        found.append(len(list_files(output)))
    before = list_files(output)
    status, printed = finish(start(inbox, classifier, output))
    assert status == 0, printed
    assert before.items() <= list_files(output).items()
    check_complete(output, inbox)
    return found


def test_a_killed_run_is_resumed_and_its_late_writes_are_rejected(
    inbox: Path, tiny_classifier: Path, tmp_path: Path
) -> None:
    """A worker may be stalled in a write, and continue after the second run has ended."""
    process = start(inbox, tiny_classifier, tmp_path)
    wait_for(lambda: len(list_files(tmp_path)) >= 3, process)
    process.kill()
    process.communicate()
    state = json.loads((tmp_path / ".state.json").read_text())
    wave = Wave(**state["wave"])
    store = PredictionStore.of(str(tmp_path), read_classifier_metadata(str(tiny_classifier)))
    _wait_for_workers(tmp_path)
    written = {Path(uri).name for uri in store.list_files()}
    uris = {store.name_file(wave.run, wave.part, shard) for shard in wave.list_shards()}
    late = sorted(uri for uri in uris if Path(uri).name not in written)
    assert written, "the kill came before anything was written"
    assert late, "the kill came after everything was written"
    plan = pq.ParquetFile(store.name_plan(wave.run, f"{wave.part:04d}.parquet"))
    planned = {
        uri: plan.read_row_group(shard, ["scan_uri"])["scan_uri"].to_pylist()
        for shard in wave.list_shards()
        for uri in [store.name_file(wave.run, wave.part, shard)]
        if uri in late
    }

    status, printed = finish(start(inbox, tiny_classifier, tmp_path))
    assert status == 0, printed
    assert f"The last run was interrupted; {len(late):,} of its files are left empty." in printed
    check_complete(tmp_path, inbox)
    files = list_files(tmp_path)
    table = pq.read_table(tmp_path / "predictions", partitioning=None)
    by_name = {row["scan_uri"]: row for row in table.to_pylist()}
    for uri, names in planned.items():
        rows = table.from_pylist([by_name[name] for name in names], schema=table.schema)
        with pytest.raises(LockLostError, match="Another run has taken over"):
            store.write_shard(uri, rows, {"backend": "torch"}, {})
    assert list_files(tmp_path) == files
    check_complete(tmp_path, inbox)


def _wait_for_workers(output: Path) -> None:
    """Wait until the Ray workers of a killed run have ended or stopped writing."""
    before: Any = None
    while before != (before := list_files(output)):
        time.sleep(1.0)


@pytest.mark.slow
def test_a_run_survives_ten_kills_at_random_times(
    inbox: Path, tiny_classifier: Path, tmp_path: Path
) -> None:
    files = kill_repeatedly(inbox, tiny_classifier, tmp_path, kills=10, early=0.3)
    assert any(files), "every kill came before the first file"


@pytest.mark.slow
def test_a_killed_predictor_is_replaced(inbox: Path, tiny_classifier: Path, tmp_path: Path) -> None:
    process = start(inbox, tiny_classifier, tmp_path)
    wait_for(lambda: bool(list_files(tmp_path)), process)
    predictors = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "_PredictBatch" in " ".join(child.cmdline())
    ]
    assert predictors
    predictors[0].kill()
    status, printed = finish(process)
    assert status == 0, printed
    assert "continuing with the other shards" in printed
    check_complete(tmp_path, inbox)


@pytest.mark.slow
def test_two_runs_at_once_and_an_interrupt(
    inbox: Path, tiny_classifier: Path, tmp_path: Path
) -> None:
    first = start(inbox, tiny_classifier, tmp_path)
    wait_for(lambda: bool(list_files(tmp_path)), first)
    os.kill(first.pid, signal.SIGSTOP)  # so that it runs until the second has checked
    status, printed = finish(start(inbox, tiny_classifier, tmp_path))
    os.kill(first.pid, signal.SIGCONT)
    assert status == 2
    assert "Another run is writing" in printed
    assert f"process {first.pid}" in printed
    assert first.poll() is None, "the first run was over before the second began"
    os.kill(first.pid, signal.SIGINT)
    status, printed = finish(first)
    assert status == 130, printed
    assert "the same command resumes" in printed
    before = list_files(tmp_path)
    # With the command of users, and the real network.
    status, printed = finish(start(inbox, tiny_classifier, tmp_path, ("jobs/classify.py",)))
    assert status == 0, printed
    assert before.items() <= list_files(tmp_path).items()
    check_complete(tmp_path, inbox)
