"""Killed, interrupted, resumed: a run ends as if nothing had happened, or says what to do."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from brainray import cli
from tests.conftest import REPOSITORY
from tests.processes import finish, wait_for


def list_words(data: Path, output: Path) -> list[str]:
    arguments = {
        "--data-uri": str(data),
        "--output-uri": str(output),
        "--recipe": "smoke",
        "--preprocessing.size-px": "32",
        "--num-epochs": "4",
        "--precision": "fp32",
        "--global-batch-size": "8",
    }
    return [word for pair in arguments.items() for word in pair]


def start(data: Path, output: Path, *extra: str) -> subprocess.Popen[str]:
    """Start `python jobs/train.py` in a process group of its own, on a Ray of its own."""
    return subprocess.Popen(
        [sys.executable, "jobs/train.py", *list_words(data, output), *extra],
        cwd=REPOSITORY,
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def read_records(output: Path) -> list[dict[str, Any]]:
    file = output / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def has_checkpoint(output: Path) -> bool:
    return any(output.glob("checkpoints/checkpoint_*/state.safetensors"))


def losses(output: Path) -> list[tuple[float, float]]:
    return [(record["train_loss"], record["val_loss"]) for record in read_records(output)]


def find_train_worker(process: subprocess.Popen[str], *, after: int = 0) -> int | None:
    """Find a training worker of this run: the one whose driver is `process`."""
    group = os.getpgid(process.pid)
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) <= after:
            continue
        try:
            name = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            if "RayTrainWorker" in name and _descends_from(int(entry.name), group):
                return int(entry.name)
        except (OSError, UnicodeDecodeError):
            continue
    return None


def _descends_from(pid: int, ancestor: int) -> bool:
    while pid > 1:
        if pid == ancestor or os.getsid(pid) == ancestor:
            return True
        stat = Path(f"/proc/{pid}/stat").read_text()
        pid = int(stat.rpartition(")")[2].split()[1])
    return False


@pytest.fixture(scope="module")
def uninterrupted(
    local_ray: None,  # noqa: ARG001 - runs
    phantom_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> list[tuple[float, float]]:
    """Train with nothing going wrong."""
    output = tmp_path_factory.mktemp("whole")
    cli.main(["train", *list_words(phantom_folder, output)])
    assert len(losses(output)) == 4
    return losses(output)


@pytest.mark.slow
def test_a_worker_killed_in_mid_epoch_costs_at_most_that_epoch(
    phantom_folder: Path, tmp_path: Path, uninterrupted: list[tuple[float, float]]
) -> None:
    process = start(phantom_folder, tmp_path, "--num-workers", "2")
    wait_for(lambda: has_checkpoint(tmp_path), process)
    before = len(read_records(tmp_path))
    victim = find_train_worker(process)
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    status, said = finish(process)
    assert status == 0, said
    assert [record["epoch"] for record in read_records(tmp_path)] == [0, 1, 2, 3]
    assert before < 4, "the run was over before the worker was killed"
    assert (tmp_path / "metrics.json").exists()
    assert len(uninterrupted) == len(losses(tmp_path))


def test_the_drivers_death_changes_no_loss(
    phantom_folder: Path, tmp_path: Path, uninterrupted: list[tuple[float, float]]
) -> None:
    process = start(phantom_folder, tmp_path)
    wait_for(lambda: has_checkpoint(tmp_path), process)
    process.kill()
    process.communicate()
    cut = len(read_records(tmp_path))
    assert cut < 4, "the run was over before the driver was killed"
    leftover = tmp_path / "checkpoints" / ".unfinished-0"
    leftover.mkdir()
    status, said = finish(start(phantom_folder, tmp_path))
    assert status == 0, said
    assert "Going on with the run" in said
    assert losses(tmp_path) == uninterrupted
    assert not leftover.exists()


@pytest.mark.slow
def test_an_interrupt_says_how_to_go_on_and_the_same_command_does(
    phantom_folder: Path, tmp_path: Path, uninterrupted: list[tuple[float, float]]
) -> None:
    process = start(phantom_folder, tmp_path)
    wait_for(lambda: has_checkpoint(tmp_path), process)
    os.kill(process.pid, signal.SIGINT)
    status, said = finish(process)
    assert status == 130, said
    assert "the same command goes on" in said
    assert not (tmp_path / "metrics.json").exists()
    status, said = finish(start(phantom_folder, tmp_path))
    assert status == 0, said
    assert losses(tmp_path) == uninterrupted
    status, said = finish(start(phantom_folder, tmp_path))
    assert status == 0
    assert "Already finished" in said


@pytest.mark.slow
def test_a_cross_validation_goes_on_with_the_fold_in_which_it_was_killed(
    phantom_folder: Path, tmp_path: Path
) -> None:
    command = (phantom_folder, tmp_path, "--folds", "2", "--val-fraction", "0.25")
    second = tmp_path / "fold-1"
    process = start(*command)
    wait_for(lambda: has_checkpoint(second), process)
    process.kill()
    process.communicate()
    cut = losses(second)
    assert len(cut) < 4, "the fold was over before the driver was killed"
    first = (tmp_path / "fold-0" / "metrics.jsonl").stat()
    status, said = finish(start(*command))
    assert status == 0, said
    assert "Fold 1 of 2 is finished." in said
    assert "Fold 2 of 2 goes on: " in said
    assert (tmp_path / "fold-0" / "metrics.jsonl").stat().st_mtime_ns == first.st_mtime_ns
    assert losses(second)[: len(cut)] == cut
    assert [record["epoch"] for record in read_records(second)] == [0, 1, 2, 3]
    assert said.strip().splitlines()[-4].startswith("cv ")
