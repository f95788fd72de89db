"""Training steps are the same on any number of workers."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.optim.swa_utils import update_bn

from brainray.images.preprocess import Preprocessing
from brainray.model.network import build_network, choose_norm_layer, normalise_images
from brainray.training.augment import NO_AUGMENTATION
from brainray.training.config import TrainConfig
from brainray.training.loader import Batch, share_of
from brainray.training.optim import Optimisation, build_optimizer
from brainray.training.step import TrainStep, compute_class_weights

CPU = torch.device("cpu")
SIZE_PX, BATCH_SIZE, NUM_STEPS = 32, 7, 3
CONFIG = TrainConfig(
    preprocessing=Preprocessing(size_px=SIZE_PX),
    num_epochs=2,
    augmentation=NO_AUGMENTATION,  # augmentation computes in single precision
    optimisation=Optimisation(learning_rate=1e-3, warmup_epochs=0.0),
)


def make_share(step: int, rank: int, world_size: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    shape = (BATCH_SIZE, SIZE_PX, SIZE_PX)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 4, (BATCH_SIZE,), generator=generator)
    share = share_of(rank, world_size, BATCH_SIZE)
    return Batch(images[share], labels[share], np.arange(BATCH_SIZE)[share] + 100 * step)


def take_steps(rank: int, world_size: int) -> dict[str, Any]:
    """Take steps in double precision, so that no difference is due to rounding."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = build_network(4, norm_layer=choose_norm_layer("sync", on_gpu=False)).double()
    network.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))
    step = TrainStep(
        CONFIG,
        network,
        build_optimizer(network, CONFIG.optimisation),
        SimpleNamespace(global_batch_size=BATCH_SIZE, steps_per_epoch=NUM_STEPS),  # type: ignore[arg-type]
        precision="fp32",
        device=CPU,
        class_weights=torch.tensor([1.0, 2.0, 0.5, 1.0]).double(),
    )
    shares = [make_share(n, rank, world_size) for n in range(NUM_STEPS)]
    sums = [step(share, 0, n) for n, share in enumerate(shares)]
    update_bn((normalise_images(s.images, CONFIG.preprocessing) for s in shares), network)
    return {"sums": torch.stack(sums), **network.state_dict()}


def run_worker(rank: int, folder: str) -> None:
    """Run one of two gloo workers; each has its own process."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    setattr(torch.Tensor, "float", torch.Tensor.double)  # noqa: B010 - normalisation and loss cast
    torch.save(take_steps(rank, 2), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.heavy
def test_two_workers_take_the_same_steps_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mp.spawn(run_worker, (str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    expected = take_steps(0, 1)
    torch.testing.assert_close(first.pop("sums") + second.pop("sums"), expected.pop("sums"))
    for name, tensor in expected.items():
        for found in (first, second):
            torch.testing.assert_close(found[name], tensor, rtol=1e-7, atol=1e-9, msg=name)
    assert (expected["fc.weight"] - build_network(4).fc.weight).abs().max() > 1e-3


def test_rare_classes_have_larger_weights() -> None:
    weights = compute_class_weights(np.array([0, 0, 0, 1]), 2)
    torch.testing.assert_close(weights, torch.tensor([4 / 6, 2.0]))
