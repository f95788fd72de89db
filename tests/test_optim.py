"""Optimisers, learning rates, weight averaging, and TensorBoard curves."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from brainray import runlog
from brainray.model.network import STAGES, build_network, choose_norm_layer, stage_of
from brainray.training.optim import (
    Optimisation,
    build_average,
    build_optimizer,
    compute_lr_fraction,
    set_learning_rate,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return build_network(4)


def name_groups(
    network: nn.Module, optimizer: torch.optim.Optimizer
) -> list[tuple[dict[str, Any], list[str]]]:
    """Return every group with the names of its parameters."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return [
        (group, [names[id(parameter)] for parameter in group["params"]])
        for group in optimizer.param_groups
    ]


# --- parameter groups ---------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_every_parameter_is_in_one_group(network: nn.Module, optimizer: Any) -> None:  # noqa: ANN401 - a Literal
    built = build_optimizer(network, Optimisation(optimizer=optimizer, weight_decay=0.05))
    members = [name for _, names in name_groups(network, built) for name in names]
    assert sorted(members) == sorted(name for name, _ in network.named_parameters())


def test_biases_and_normalisation_have_no_weight_decay(network: nn.Module) -> None:
    built = build_optimizer(network, Optimisation(weight_decay=0.07))
    decays = {
        name: group["weight_decay"]
        for group, names in name_groups(network, built)
        for name in names
    }
    for name, parameter in network.named_parameters():
        assert decays[name] == (0.07 if parameter.ndim > 1 else 0.0), name
    assert decays["fc.weight"] == decays["layer2.0.downsample.0.weight"] == 0.07
    assert decays["fc.bias"] == decays["bn1.weight"] == decays["layer2.0.downsample.1.bias"] == 0


def test_each_stage_has_a_lower_rate_than_the_stage_above(network: nn.Module) -> None:
    optimisation = Optimisation(stage_decay=0.7, learning_rate=0.02)
    built = build_optimizer(network, optimisation)
    expected = dict(zip(STAGES[::-1], [1, 0.7, 0.49, 0.343, 0.2401, 0.16807], strict=True))
    set_learning_rate(built, optimisation, 10, 10, 5)  # the peak
    for group, names in name_groups(network, built):
        (stage,) = {stage_of(name) for name in names}
        assert group["lr_scale"] == pytest.approx(expected[stage])
        assert group["lr"] == pytest.approx(0.02 * expected[stage])


def test_without_stage_decay_all_rates_are_equal(network: nn.Module) -> None:
    built = build_optimizer(network, Optimisation(stage_decay=1.0))
    assert {group["lr_scale"] for group in built.param_groups} == {1.0}


def test_the_rate_follows_the_schedule_at_each_step(network: nn.Module) -> None:
    optimisation = Optimisation(learning_rate=0.5, warmup_epochs=1, stage_decay=0.5)
    built = build_optimizer(network, optimisation)
    for step in (0, 4, 29):
        set_learning_rate(built, optimisation, step, 10, 3)
        fraction = compute_lr_fraction(step, 10, optimisation, 3)
        for group in built.param_groups:
            assert group["lr"] == pytest.approx(0.5 * fraction * group["lr_scale"])


def test_frozen_parameters_are_left_out() -> None:
    network = build_network(2, norm_layer=choose_norm_layer("frozen", on_gpu=False))
    built = build_optimizer(network, Optimisation())
    members = [name for _, names in name_groups(network, built) for name in names]
    trained = [name for name, p in network.named_parameters() if p.requires_grad]
    assert sorted(members) == sorted(trained)
    assert len(trained) == 161 - 2 * 53


def test_the_configured_optimizer_is_built(network: nn.Module) -> None:
    adamw = build_optimizer(network, Optimisation(optimizer="adamw"))
    assert isinstance(adamw, torch.optim.AdamW)
    sgd = build_optimizer(network, Optimisation(optimizer="sgd"))
    assert isinstance(sgd, torch.optim.SGD)
    assert all(group["momentum"] == 0.9 and group["nesterov"] for group in sgd.param_groups)


# --- the learning rate over a run ---------------------------------------------------------


@given(
    steps_per_epoch=st.integers(1, 40),
    warmup_epochs=st.integers(0, 4),
    epochs_after=st.integers(2, 20),
    final=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
)
def test_rate_rises_linearly_then_falls_to_its_final_value(
    steps_per_epoch: int, warmup_epochs: int, epochs_after: int, final: float
) -> None:
    optimisation = Optimisation(warmup_epochs=warmup_epochs, final_lr_fraction=final)
    num_epochs = warmup_epochs + epochs_after
    fractions = [
        compute_lr_fraction(step, steps_per_epoch, optimisation, num_epochs)
        for step in range(num_epochs * steps_per_epoch)
    ]
    peak = warmup_epochs * steps_per_epoch
    assert fractions[0] > 0
    assert fractions[peak] == pytest.approx(1)
    assert max(fractions) <= 1 + 1e-12
    rise = [0.0, *fractions[: peak + 1]]
    steps = [b - a for a, b in pairwise(rise)]
    assert steps == pytest.approx([1 / (peak + 1)] * (peak + 1))
    fall = fractions[peak:]
    assert all(b <= a for a, b in pairwise(fall))
    assert all(fraction >= final for fraction in fall)
    if len(fall) >= 20:
        assert fall[-1] == pytest.approx(final, abs=0.01)
        assert fall[len(fall) // 2] == pytest.approx((1 + final) / 2, abs=0.1)


def test_rate_keeps_its_final_value_after_the_last_step() -> None:
    optimisation = Optimisation(warmup_epochs=1, final_lr_fraction=0.05)
    assert compute_lr_fraction(1000, 10, optimisation, 3) == pytest.approx(0.05)


def test_warmup_may_be_part_of_an_epoch_or_longer_than_the_run() -> None:
    half = Optimisation(warmup_epochs=0.5)
    assert compute_lr_fraction(4, 10, half, 3) == pytest.approx(5 / 6)
    assert compute_lr_fraction(5, 10, half, 3) == pytest.approx(1)
    long = Optimisation(warmup_epochs=5)
    assert compute_lr_fraction(9, 10, long, 1) == pytest.approx(10 / 51)


# --- the average of the weights ---------------------------------------------------------------


def test_the_average_decays_faster_in_early_steps() -> None:
    network = nn.Linear(1, 1, bias=False)
    averaged = build_average(network, decay=0.9)
    expected = network.weight.item()
    for step in range(1, 200):
        nn.init.constant_(network.weight, float(step))
        averaged.update_parameters(network)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        assert averaged.module.weight.item() == pytest.approx(expected, rel=1e-5)
    assert not averaged.module.weight.requires_grad


def test_the_average_has_the_buffers_of_the_network() -> None:
    network = nn.BatchNorm1d(2)
    averaged = build_average(network, decay=0.9)
    for _ in range(2):
        network(torch.randn(8, 2) + 3)
        averaged.update_parameters(network)
    assert torch.equal(averaged.module.running_mean, network.running_mean)
    assert int(averaged.module.num_batches_tracked) == 2


# --- TensorBoard --------------------------------------------------------------------------


def make_record(epoch: int) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "num_epochs": 3,
        "train_loss": 1.5 / (epoch + 1),
        "val_accuracy": 0.25 * (epoch + 1),
        "is_best": True,
        "world_size": 2,
        "unix_time_s": 1.7e9 + 60.5 * epoch,
    }


def test_curves_can_be_read_by_tensorboard(tmp_path: Path) -> None:
    folder = tmp_path / "tensorboard"
    records = [make_record(epoch) for epoch in range(3)]
    runlog.write_tensorboard(str(folder), records[:1])
    runlog.write_tensorboard(str(folder), records)
    assert len(list(folder.iterdir())) == 1, "a second file would show every curve twice"
    events = EventAccumulator(str(folder))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["train_loss", "val_accuracy"]
    for tag in ("train_loss", "val_accuracy"):
        scalars = events.Scalars(tag)
        assert [scalar.step for scalar in scalars] == [1, 2, 3]
        assert [scalar.value for scalar in scalars] == pytest.approx(
            [record[tag] for record in records]
        )
        assert [scalar.wall_time for scalar in scalars] == [r["unix_time_s"] for r in records]


def test_a_reader_sees_epochs_as_they_are_written(tmp_path: Path) -> None:
    records = [make_record(epoch) for epoch in range(3)]
    events = EventAccumulator(str(tmp_path))
    for count in (1, 2, 3):
        runlog.write_tensorboard(str(tmp_path), records[:count])
        events.Reload()  # reads on from where it stopped
        assert [scalar.step for scalar in events.Scalars("train_loss")] == [1, 2, 3][:count]
