"""Killed, interrupted, resumed: a run ends as if nothing had happened, or says what to do."""

import os
import re
import signal
from pathlib import Path

import pytest

from tests.processes import finish, wait_for
from tests.training import NUM_EPOCHS, list_words, read_losses, read_records, start


@pytest.fixture(scope="module")
def alone() -> dict[str, str]:
    """Return the environment of a process that starts a Ray of its own."""
    return {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}


def has_checkpoint(output: Path) -> bool:
    return any(output.glob("checkpoints/checkpoint_*/state.safetensors"))


def find_train_worker() -> int | None:
    """Find a training worker on this session's Ray."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            name = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            if "RayTrainWorker" in name and _descends_from(int(entry.name), os.getpid()):
                return int(entry.name)
        except (OSError, UnicodeDecodeError):
            continue
    return None


def _descends_from(pid: int, ancestor: int) -> bool:
    while pid > 1:
        if pid == ancestor:
            return True
        stat = Path(f"/proc/{pid}/stat").read_text()
        pid = int(stat.rpartition(")")[2].split()[1])
    return False


@pytest.mark.slow
def test_a_worker_killed_in_mid_epoch_changes_no_loss(
    phantom_folder: Path, tmp_path: Path, trained_by_two: Path, joined: dict[str, str]
) -> None:
    process = start(joined, *list_words(phantom_folder, tmp_path, num_workers=2))
    wait_for(lambda: has_checkpoint(tmp_path), process)
    before = len(read_records(tmp_path))
    victim = find_train_worker()
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    status, printed = finish(process)
    assert status == 0, printed
    assert before < NUM_EPOCHS, "the run was over before the worker was killed"
    assert read_losses(tmp_path) == read_losses(trained_by_two)
    told = re.findall(r"^epoch +(\d)/", printed, re.MULTILINE)
    assert len(told) <= NUM_EPOCHS + 1, "more than one epoch was done again"
    assert (tmp_path / "metrics.json").exists()


def test_the_drivers_death_changes_no_loss(
    phantom_folder: Path,
    tmp_path: Path,
    trained: Path,
    alone: dict[str, str],
    joined: dict[str, str],
) -> None:
    """It takes a Ray of its own with it, as a machine's loss does."""
    words = list_words(phantom_folder, tmp_path)
    process = start(alone, *words)
    wait_for(lambda: has_checkpoint(tmp_path), process)
    process.kill()
    process.communicate()
    cut = len(read_records(tmp_path))
    assert cut < NUM_EPOCHS, "the run was over before the driver was killed"
    status, printed = finish(start(joined, *words))
    assert status == 0, printed
    assert "Resuming the run" in printed
    assert read_losses(tmp_path) == read_losses(trained)


@pytest.mark.slow
def test_an_interrupt_says_how_to_go_on_and_the_same_command_does(
    phantom_folder: Path, tmp_path: Path, trained: Path, joined: dict[str, str]
) -> None:
    words = list_words(phantom_folder, tmp_path)
    process = start(joined, *words)
    wait_for(lambda: has_checkpoint(tmp_path), process)
    os.kill(process.pid, signal.SIGINT)
    status, printed = finish(process)
    assert status == 130, printed
    assert "the same command resumes" in printed
    assert not (tmp_path / "metrics.json").exists()
    status, printed = finish(start(joined, *words))
    assert status == 0, printed
    assert read_losses(tmp_path) == read_losses(trained)
    status, printed = finish(start(joined, *words))
    assert status == 0
    assert "Already finished" in printed


@pytest.mark.slow
def test_a_cross_validation_goes_on_with_the_fold_in_which_it_was_killed(
    phantom_folder: Path, tmp_path: Path, joined: dict[str, str]
) -> None:
    words = list_words(phantom_folder, tmp_path, folds=2, val_fraction=0.25)
    second = tmp_path / "fold-1"
    process = start(joined, *words)
    wait_for(lambda: has_checkpoint(second), process)
    process.kill()
    process.communicate()
    cut = read_losses(second)
    assert len(cut) < NUM_EPOCHS, "the fold was over before the driver was killed"
    first = (tmp_path / "fold-0" / "metrics.jsonl").stat()
    status, printed = finish(start(joined, *words))
    assert status == 0, printed
    assert "Fold 1 of 2 is finished." in printed
    assert "Fold 2 of 2, resumed: " in printed
    assert (tmp_path / "fold-0" / "metrics.jsonl").stat().st_mtime_ns == first.st_mtime_ns
    assert read_losses(second)[: len(cut)] == cut
    assert [record["epoch"] for record in read_records(second)] == list(range(NUM_EPOCHS))
    assert printed.strip().splitlines()[-4].startswith("cv ")
