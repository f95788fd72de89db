"""Collective operations of the training workers."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from brainray.model.precision import has_native_bf16


def count_workers() -> int:
    """Return the number of workers; 1 outside of a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_workers(values: torch.Tensor) -> torch.Tensor:
    """Return the sum of the workers' tensors, on every worker."""
    total = values.clone()
    if count_workers() > 1:
        dist.all_reduce(total)
    return total


def gather_rows(ids: list[NDArray[np.int64]], rows: list[NDArray[np.float32]]) -> Any:  # noqa: ANN401
    """Gather the workers' rows on every worker.

    Parameters
    ----------
    ids : list of ndarray of int64, shapes (n,)
        Sample numbers of this worker's rows, batch by batch.
    rows : list of ndarray of float32, shapes (n, K)

    Returns
    -------
    ids : ndarray of int64, shape (N,)
        In ascending order.
    rows : ndarray of float32, shape (N, K)
    """
    parts: list[Any] = [(ids, rows)]
    if count_workers() > 1:
        parts = [None] * count_workers()
        dist.all_gather_object(parts, (ids, rows))
    all_ids = np.concatenate([batch for part in parts for batch in part[0]])
    order = np.argsort(all_ids)
    return all_ids[order], np.concatenate([batch for part in parts for batch in part[1]])[order]


def all_have_bf16(device: torch.device) -> bool:
    """Return whether all workers have bf16 instructions; every worker must call this."""
    has_bf16 = torch.tensor(has_native_bf16(use_gpu=device.type == "cuda"), dtype=torch.int32)
    if count_workers() > 1:
        has_bf16 = has_bf16.to(device)
        dist.all_reduce(has_bf16, op=dist.ReduceOp.MIN)
    return bool(has_bf16)


def average_statistics(networks: Iterable[nn.Module]) -> None:
    """Average the batch-norm running statistics over the workers, in place."""
    if count_workers() == 1:
        return
    for network in networks:
        for name, buffer in network.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                dist.all_reduce(buffer)
                buffer /= count_workers()


def make_data_parallel(network: nn.Module, device: torch.device, *, in_bf16: bool) -> nn.Module:
    """Wrap the network in DistributedDataParallel; gradients are reduced in bf16 under autocast."""
    if count_workers() == 1:
        return network
    parallel = nn.parallel.DistributedDataParallel(
        network,
        device_ids=[device] if device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        static_graph=True,
    )
    if in_bf16:
        parallel.register_comm_hook(None, bf16_compress_hook)
    return parallel
