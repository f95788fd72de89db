"""A short training, started as a user starts it. Several test files run, kill and resume it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
NUM_EPOCHS = 4


def list_words(data: Path | str, output: Path | str, **changes: object) -> list[str]:
    """List the options of `brainray train`; ``num_workers=2`` adds `--num-workers 2`."""
    options = {
        "data_uri": data,
        "output_uri": output,
        "recipe": "smoke",
        "preprocessing.size_px": 64,
        "num_epochs": NUM_EPOCHS,
        "precision": "fp32",
        "batch_norm": "sync",
        "global_batch_size": 32,
        **changes,
    }
    return [
        word
        for name, value in options.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]


def start(environment: dict[str, str], *words: str) -> subprocess.Popen[str]:
    """Start `python jobs/train.py` in a new process group."""
    return subprocess.Popen(
        [sys.executable, "jobs/train.py", *words],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def read_records(output: Path) -> list[dict[str, Any]]:
    """Read the records of a run's epochs so far."""
    file = output / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def read_losses(output: Path) -> list[tuple[float, float]]:
    """Read the training and validation loss of every epoch so far."""
    return [(record["train_loss"], record["val_loss"]) for record in read_records(output)]


def train_here(data: Path, output: Path, **changes: object) -> Path:
    """Run `brainray train` in this process, on this session's Ray; return the output."""
    from brainray import cli  # imports nearly everything

    cli.main(["train", *list_words(data, output, **changes)])
    assert len(read_records(output)) == NUM_EPOCHS
    return output
