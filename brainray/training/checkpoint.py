"""Training checkpoints: a folder with ``state.safetensors`` and ``state.json``.

The first holds network, averaged weights and optimiser state, the second the progress. Nothing is
pickled.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch.optim.swa_utils import AveragedModel

from brainray.model.network import StateDict

TENSORS_FILE = "state.safetensors"
PROGRESS_FILE = "state.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Progress of a run."""

    next_epoch: int = 0
    """Epoch to train next, from 0."""
    best_score: float = float("-inf")
    """Best validation score so far."""
    best_epoch: int = -1
    """Epoch of the best score; -1 before the first."""
    time_s: float = 0.0
    """Seconds of all finished epochs, also those before a resume."""


def save_checkpoint(
    folder: Path,
    *,
    network: torch.nn.Module,
    averaged: AveragedModel | None,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
) -> None:
    """Write a checkpoint into an existing local folder."""
    tensors = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    if averaged is not None:
        tensors |= {f"averaged.{name}": tensor for name, tensor in averaged.state_dict().items()}
    for index, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{slot}": tensor for slot, tensor in slots.items()}
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(ready, folder / TENSORS_FILE)
    (folder / PROGRESS_FILE).write_text(json.dumps(asdict(progress)))


def load_network_weights(folder: Path) -> StateDict:
    """Read the weights to export: the averaged ones, if the run keeps them."""
    tensors = safetensors.torch.load_file(folder / TENSORS_FILE)
    return _select(tensors, "averaged.module.") or _select(tensors, "network.")


def load_checkpoint(
    folder: Path,
    *,
    network: torch.nn.Module,
    averaged: AveragedModel | None,
    optimizer: torch.optim.Optimizer,
) -> Progress:
    """Restore network, averaged weights and optimiser from a checkpoint."""
    tensors = safetensors.torch.load_file(folder / TENSORS_FILE)
    network.load_state_dict(_select(tensors, "network."))
    if averaged is not None:
        averaged.load_state_dict(_select(tensors, "averaged."))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in _select(tensors, "optimizer.").items():
        index, slot = name.split(".")
        parameter = parameters[int(index)]
        if tensor.shape == parameter.shape:
            # The fused optimiser requires the parameter's memory layout, which may be
            # channels-last; the file is row-major.
            tensor = torch.empty_like(parameter, dtype=tensor.dtype, device="cpu").copy_(tensor)
        slots.setdefault(int(index), {})[slot] = tensor
    optimizer.load_state_dict(optimizer.state_dict() | {"state": slots})
    return Progress(**json.loads((folder / PROGRESS_FILE).read_text()))


def _select(tensors: StateDict, prefix: str) -> StateDict:
    """Return the tensors of a prefix, without it."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
