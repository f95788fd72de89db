"""Bulk runs that are killed, doubled or interrupted: every scan has one row in the end."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.conftest import REPOSITORY
from tests.processes import finish, wait_for


@pytest.fixture(scope="module")
def inbox(phantom_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Link the phantoms until there are 1,500, so that a run takes a while."""
    folder = tmp_path_factory.mktemp("inbox")
    files = sorted(phantom_folder.rglob("*.jpg"))
    for number in range(1500):
        (folder / f"{number:05d}.jpg").symlink_to(files[number % len(files)])
    return folder


def start(inbox: Path, classifier: Path, output: Path, *extra: str) -> subprocess.Popen[str]:
    words = ["--scans-uri", inbox, "--classifier-uri", classifier, "--output-uri", output]
    return subprocess.Popen(
        [sys.executable, "jobs/classify.py", *map(str, words), "--part-s", "0.3", *extra],
        cwd=REPOSITORY,
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def list_parts(output: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in (output / "predictions").glob("*.parquet")}


def check_complete(output: Path, inbox: Path) -> None:
    rows = pq.read_table(output / "predictions", columns=["scan_uri", "status"])
    uris = rows["scan_uri"].to_pylist()
    assert len(uris) == len(set(uris)), "a scan has two rows"
    assert set(uris) == {str(file) for file in inbox.iterdir()}
    assert set(rows["status"].to_pylist()) == {"classified"}


def kill_repeatedly(
    inbox: Path, classifier: Path, output: Path, *, kills: int, early: float
) -> list[int]:
    """Kill runs at random moments, then let one end; return the files there were at each kill.

    A share of ``early`` of the kills falls into the start, before the first answer.
    """
    moments = random.Random()
    found = []
    for _ in range(kills):
        before = list_parts(output)
        process = start(inbox, classifier, output)
        if moments.random() < early:
            time.sleep(moments.uniform(0.5, 10.0))
        else:
            wanted = len(before) + moments.randint(1, 2)
            wait_for(lambda wanted=wanted: len(list_parts(output)) >= wanted, process)  # type: ignore[misc]
            time.sleep(moments.uniform(0.0, 0.3))
        process.kill()
        process.communicate()
        assert before.items() <= list_parts(output).items(), "what was written has changed"
        found.append(len(list_parts(output)))
    before = list_parts(output)
    status, said = finish(start(inbox, classifier, output))
    assert status == 0, said
    assert before.items() <= list_parts(output).items()
    check_complete(output, inbox)
    return found


def test_a_killed_run_is_taken_up_where_it_was(
    inbox: Path, tiny_classifier: Path, tmp_path: Path
) -> None:
    (parts,) = kill_repeatedly(inbox, tiny_classifier, tmp_path, kills=1, early=0.0)
    assert parts > 0, "the kill came before anything was written"


@pytest.mark.slow
def test_ten_kills_at_random_moments(inbox: Path, tiny_classifier: Path, tmp_path: Path) -> None:
    parts = kill_repeatedly(inbox, tiny_classifier, tmp_path, kills=10, early=0.3)
    assert len(parts) == 10


@pytest.mark.slow
def test_a_killed_predictor_is_replaced(inbox: Path, tiny_classifier: Path, tmp_path: Path) -> None:
    process = start(inbox, tiny_classifier, tmp_path)
    wait_for(lambda: bool(list_parts(tmp_path)), process)
    victims = [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and _is_predictor(entry, process.pid)
    ]
    assert victims
    os.kill(victims[0], signal.SIGKILL)
    status, said = finish(process)
    assert status == 0, said
    assert "going on with what is left" in said
    check_complete(tmp_path, inbox)


def _is_predictor(entry: Path, ancestor: int) -> bool:
    try:
        if b"_Predictor" not in (entry / "cmdline").read_bytes():
            return False
        pid = int(entry.name)
        while pid > 1 and pid != ancestor:
            stat = Path(f"/proc/{pid}/stat").read_text()
            pid = int(stat.rpartition(")")[2].split()[1])
    except OSError:
        return False
    return pid == ancestor


@pytest.mark.slow
def test_two_runs_at_once_and_an_interrupt(
    inbox: Path, tiny_classifier: Path, tmp_path: Path
) -> None:
    first = start(inbox, tiny_classifier, tmp_path)
    wait_for(lambda: bool(list_parts(tmp_path)), first)
    os.kill(first.pid, signal.SIGSTOP)  # so that it lasts until the second has looked
    status, said = finish(start(inbox, tiny_classifier, tmp_path))
    os.kill(first.pid, signal.SIGCONT)
    assert status == 2
    assert "Another run is writing" in said
    assert f"process {first.pid}" in said
    assert first.poll() is None, "the first run was over before the second began"
    os.kill(first.pid, signal.SIGINT)
    status, said = finish(first)
    assert status == 130, said
    assert "the same command goes on" in said
    status, said = finish(start(inbox, tiny_classifier, tmp_path))
    assert status == 0, said
    check_complete(tmp_path, inbox)
