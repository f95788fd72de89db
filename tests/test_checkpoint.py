"""A checkpoint restores the whole state: the next step is bit-identical."""

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import safetensors.torch
import torch
from torch import nn

from brainray.model.network import choose_norm_layer
from brainray.training.checkpoint import (
    Progress,
    load_checkpoint,
    load_network_weights,
    save_checkpoint,
)
from brainray.training.optim import Optimisation, build_average, build_optimizer

pytestmark = pytest.mark.usefixtures("one_thread")


PROGRESS = Progress(next_epoch=3, best_score=0.1 + 0.2, best_epoch=2, time_s=12.5)

OptimizerName = Literal["adamw", "sgd"]


class Run:
    """The state of a worker: a small network with the real one's modules, average, optimizer."""

    def __init__(
        self,
        seed: int,
        *,
        optimizer: OptimizerName = "adamw",
        channels_last: bool = True,
        frozen: bool = False,
    ) -> None:
        torch.manual_seed(seed)
        layers = {
            "conv1": nn.Conv2d(2, 6, 3),
            "bn1": choose_norm_layer("frozen" if frozen else "local", on_gpu=False)(6),
            "layer1": nn.Conv2d(6, 4, 3),
            "pool": nn.AdaptiveAvgPool2d(2),
            "flat": nn.Flatten(),
            "fc": nn.Linear(16, 3),
        }
        network: nn.Module = nn.Sequential()
        for name, layer in layers.items():
            network.add_module(name, layer)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.network = network.to(memory_format=layout)  # type: ignore[call-overload]
        self.averaged = build_average(self.network, decay=0.9)
        optimisation = Optimisation(optimizer=optimizer, stage_decay=0.7, learning_rate=0.05)
        self.optimizer = build_optimizer(self.network, optimisation)

    def take_step(self, number: int) -> None:
        images = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(number))
        self.optimizer.zero_grad()
        self.network(images).square().sum().backward()
        self.optimizer.step()
        self.averaged.update_parameters(self.network)

    def save(self, folder: Path, *, with_average: bool = True) -> None:
        save_checkpoint(
            folder,
            network=self.network,
            averaged=self.averaged if with_average else None,
            optimizer=self.optimizer,
            progress=PROGRESS,
        )

    def load(self, folder: Path) -> Progress:
        return load_checkpoint(
            folder, network=self.network, averaged=self.averaged, optimizer=self.optimizer
        )


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    assert found.state_dict().keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


@pytest.mark.parametrize("num_steps", [0, 3])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained norm", "frozen norm"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_resumed_run_takes_the_same_next_step(
    tmp_path: Path, optimizer: OptimizerName, channels_last: bool, frozen: bool, num_steps: int
) -> None:
    original = Run(0, optimizer=optimizer, channels_last=channels_last, frozen=frozen)
    for number in range(num_steps):
        original.take_step(number)
    original.save(tmp_path)
    resumed = Run(1, optimizer=optimizer, channels_last=channels_last, frozen=frozen)
    found, expected = (run.network.get_parameter("fc.weight") for run in (resumed, original))
    assert not torch.equal(found, expected)

    assert resumed.load(tmp_path) == PROGRESS
    assert_same(resumed.network, original.network)
    assert_same(resumed.averaged, original.averaged)

    before = deepcopy(original.network)
    for number in (10, 11):
        original.take_step(number)
        resumed.take_step(number)
    assert_same(resumed.network, original.network)
    assert_same(resumed.averaged, original.averaged)
    moved = (before.get_parameter("fc.weight") - original.network.get_parameter("fc.weight")).abs()
    assert moved.min() > 0


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_next_step_differs_without_optimizer_state(
    tmp_path: Path, optimizer: OptimizerName
) -> None:
    """Shows that the test above can fail."""
    original = Run(0, optimizer=optimizer)
    for number in range(3):
        original.take_step(number)
    original.save(tmp_path)
    without_state = Run(1, optimizer=optimizer)
    without_state.load(tmp_path)
    without_state.optimizer.state.clear()
    original.take_step(10)
    without_state.take_step(10)
    found = without_state.network.get_parameter("fc.weight")
    assert not torch.allclose(found, original.network.get_parameter("fc.weight"))


def test_options_of_parameter_groups_come_from_the_recipe_not_the_file(tmp_path: Path) -> None:
    original = Run(0)
    original.take_step(0)
    original.optimizer.param_groups[0]["weight_decay"] = 123.0
    original.save(tmp_path)
    resumed = Run(1)
    groups = [{**group, "params": None} for group in resumed.optimizer.param_groups]
    resumed.load(tmp_path)
    assert [{**group, "params": None} for group in resumed.optimizer.param_groups] == groups


def test_training_without_an_average_resumes(tmp_path: Path) -> None:
    original = Run(0)
    original.take_step(0)
    original.save(tmp_path, with_average=False)
    resumed = Run(1)
    load_checkpoint(tmp_path, network=resumed.network, averaged=None, optimizer=resumed.optimizer)
    assert_same(resumed.network, original.network)


@pytest.mark.parametrize(
    "progress",
    [
        Progress(),
        PROGRESS,
        replace(PROGRESS, best_score=float("-inf")),
        replace(PROGRESS, time_s=1e9 / 3),
    ],
)
def test_progress_is_restored_exactly(tmp_path: Path, progress: Progress) -> None:
    run = Run(0)
    save_checkpoint(
        tmp_path,
        network=run.network,
        averaged=None,
        optimizer=run.optimizer,
        progress=progress,
    )
    found = load_checkpoint(tmp_path, network=run.network, averaged=None, optimizer=run.optimizer)
    assert found == progress


def test_any_score_is_better_than_the_initial_best_score(tmp_path: Path) -> None:
    run = Run(0)
    save_checkpoint(
        tmp_path,
        network=run.network,
        averaged=None,
        optimizer=run.optimizer,
        progress=Progress(),
    )
    found = load_checkpoint(tmp_path, network=run.network, averaged=None, optimizer=run.optimizer)
    assert found.best_score < 0.0


def test_averaged_weights_are_exported_if_there_are_any(tmp_path: Path) -> None:
    run = Run(0)
    for number in range(2):
        run.take_step(number)
    averaged = run.averaged.module
    assert not torch.equal(
        run.network.get_parameter("fc.weight"), averaged.get_parameter("fc.weight")
    )
    for with_average, expected in ((True, averaged), (False, run.network)):
        run.save(tmp_path, with_average=with_average)
        found = load_network_weights(tmp_path)
        assert found.keys() == expected.state_dict().keys()
        assert all(torch.equal(found[k], v) for k, v in expected.state_dict().items())


def test_a_checkpoint_is_two_files_without_pickles(tmp_path: Path) -> None:
    run = Run(0)
    run.take_step(0)
    run.save(tmp_path)
    run.save(tmp_path)  # overwrites the first one
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["state.json", "state.safetensors"]
    assert json.loads((tmp_path / "state.json").read_text())["next_epoch"] == 3
    tensors = safetensors.torch.load_file(tmp_path / "state.safetensors")
    assert {name.split(".")[0] for name in tensors} == {"network", "averaged", "optimizer"}
