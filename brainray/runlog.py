"""The log of a run: metrics.jsonl, TensorBoard events, and lines of text."""

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from brainray.io import storage

Record = dict[str, Any]
Log = Callable[[str], None]
"""Receives one line of text, without a line break."""


def read_records(uri: str) -> list[Record]:
    """Read metrics.jsonl; a missing file gives an empty list."""
    try:
        content = storage.read_bytes(uri)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in content.decode().splitlines() if line.strip()]


def write_records(uri: str, records: Sequence[Record]) -> None:
    """Replace metrics.jsonl, so that no reader sees half a line."""
    lines = [json.dumps(record, allow_nan=False) + "\n" for record in records]
    storage.write_bytes(uri, "".join(lines).encode())


def format_duration(seconds: float) -> str:
    """Format a duration as `2 h 05 min`, `3 min 20 s` or `12 s`."""
    whole = max(0, round(seconds))
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    if whole >= 60:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole} s"


def format_epoch(record: Record) -> str:
    """Describe an epoch in one line."""
    best = " *" if record.get("is_best") else ""
    left = format_duration(record["time_left_s"])
    return (
        f"epoch {record['epoch'] + 1:>3}/{record['num_epochs']}  {record['size_px']:>3} px  "
        f"train loss {record['train_loss']:.3f} acc {record['train_accuracy']:.1%}  "
        f"val loss {record['val_loss']:.3f} acc {record['val_accuracy']:.1%} "
        f"F1 {record['val_macro_f1']:.3f} AUROC {record['val_macro_auroc']:.4f}  "
        f"{record['images_per_s']:.0f} images/s  left {left}{best}"
    )


def write_tensorboard(tensorboard_uri: str, records: Sequence[Record]) -> None:
    """Write all epochs as one event file with a fixed name.

    So a resumed run does not duplicate epochs, and object stores, which cannot append, work too.
    """
    from torch.utils.tensorboard import SummaryWriter

    with tempfile.TemporaryDirectory() as folder:
        with SummaryWriter(folder) as writer:
            for record in records:
                at = {"global_step": record["epoch"] + 1, "walltime": record["unix_time_s"]}
                for name, value in scalars_of(record).items():
                    writer.add_scalar(name, value, **at)
        (file,) = Path(folder).iterdir()
        uri = storage.join(tensorboard_uri, "events.out.tfevents.0.brainray")
        storage.write_bytes(uri, file.read_bytes())


def scalars_of(record: Record) -> dict[str, float]:
    """Return the values of an epoch to plot."""
    return {
        name: value
        for name, value in record.items()
        if isinstance(value, float) and name != "unix_time_s"
    }
