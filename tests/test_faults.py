"""Training that is killed or interrupted resumes with the same losses."""

import os
import re
import signal
from pathlib import Path

import pytest

from tests.processes import finish, wait_for
from tests.training import NUM_EPOCHS, list_words, read_losses, read_records, start


@pytest.fixture(scope="module")
def own_ray() -> dict[str, str]:
    """Return an environment in which a process starts its own Ray."""
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
def test_losses_do_not_change_if_a_worker_is_killed_mid_epoch(
    phantom_folder: Path, tmp_path: Path, trained_by_two: Path, joined: dict[str, str]
) -> None:
    process = start(joined, *list_words(phantom_folder, tmp_path, num_workers=2))
    wait_for(lambda: has_checkpoint(tmp_path), process)
    worker = find_train_worker()
    assert worker is not None
    os.kill(worker, signal.SIGKILL)
    before = len(read_records(tmp_path))
    status, printed = finish(process)
    assert status == 0, printed
    assert before < NUM_EPOCHS, "the run finished before the worker was killed"
    assert read_losses(tmp_path) == read_losses(trained_by_two)
    epochs = re.findall(r"^epoch +(\d)/", printed, re.MULTILINE)
    assert len(epochs) <= NUM_EPOCHS + 1, "more than one epoch was repeated"
    assert (tmp_path / "metrics.json").exists()


@pytest.mark.slow
def test_losses_do_not_change_if_the_driver_is_killed(
    phantom_folder: Path,
    tmp_path: Path,
    trained: Path,
    own_ray: dict[str, str],
    joined: dict[str, str],
) -> None:
    """Its Ray ends with it, as when a machine fails."""
    options = list_words(phantom_folder, tmp_path)
    process = start(own_ray, *options)
    wait_for(lambda: has_checkpoint(tmp_path), process)
    process.kill()
    process.communicate()
    num_done = len(read_records(tmp_path))
    assert num_done < NUM_EPOCHS, "the run finished before the driver was killed"
    status, printed = finish(start(joined, *options))
    assert status == 0, printed
    assert "Resuming the run" in printed
    assert read_losses(tmp_path) == read_losses(trained)


@pytest.mark.slow
def test_an_interrupt_prints_how_to_resume_and_the_same_command_resumes(
    phantom_folder: Path, tmp_path: Path, trained: Path, joined: dict[str, str]
) -> None:
    options = list_words(phantom_folder, tmp_path)
    process = start(joined, *options)
    wait_for(lambda: has_checkpoint(tmp_path), process)
    os.kill(process.pid, signal.SIGINT)
    status, printed = finish(process)
    assert status == 130, printed
    assert "the same command resumes" in printed
    assert not (tmp_path / "metrics.json").exists()
    status, printed = finish(start(joined, *options))
    assert status == 0, printed
    assert read_losses(tmp_path) == read_losses(trained)
    status, printed = finish(start(joined, *options))
    assert status == 0
    assert "Already finished" in printed


@pytest.mark.slow
def test_a_killed_cross_validation_resumes_in_the_same_fold(
    phantom_folder: Path, tmp_path: Path, joined: dict[str, str]
) -> None:
    options = list_words(phantom_folder, tmp_path, folds=2, val_fraction=0.25)
    second = tmp_path / "fold-1"
    process = start(joined, *options)
    wait_for(lambda: has_checkpoint(second), process)
    process.kill()
    process.communicate()
    losses_before = read_losses(second)
    assert len(losses_before) < NUM_EPOCHS, "the fold finished before the driver was killed"
    first = (tmp_path / "fold-0" / "metrics.jsonl").stat()
    status, printed = finish(start(joined, *options))
    assert status == 0, printed
    assert "Fold 1 of 2 is finished." in printed
    assert "Fold 2 of 2, resumed: " in printed
    assert (tmp_path / "fold-0" / "metrics.jsonl").stat().st_mtime_ns == first.st_mtime_ns
    assert read_losses(second)[: len(losses_before)] == losses_before
    assert [record["epoch"] for record in read_records(second)] == list(range(NUM_EPOCHS))
    assert printed.strip().splitlines()[-4].startswith("cv ")
