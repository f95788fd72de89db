"""Examine this machine: what it supports, and what is missing."""

import os
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from brainray.cluster import MIN_CPUS
from brainray.model.network import imagenet_weights_path
from brainray.model.precision import has_native_bf16


@dataclass(frozen=True, slots=True)
class Finding:
    """One property of the machine."""

    name: str
    holds: bool
    detail: str
    """What was found, and a remedy if it does not hold."""
    needed: bool = False
    """Whether all commands need it."""


def examine() -> list[Finding]:
    """Examine this machine, without starting anything and without network access."""
    python = ".".join(map(str, sys.version_info[:3]))
    num_cpus = len(os.sched_getaffinity(0))
    has_gpu = torch.cuda.is_available()
    gpus = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    processor = "GPU" if has_gpu else "processor"
    has_bf16 = has_native_bf16(use_gpu=has_gpu)
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    weights = imagenet_weights_path()
    free_gib = shutil.disk_usage(".").free / 2**30
    has_bytecode = not os.environ.get("PYTHONDONTWRITEBYTECODE")
    return [
        Finding("Python", sys.version_info >= (3, 11), f"{python}; 3.11 or newer", needed=True),
        _examine_ray(),
        Finding(
            "CPUs",
            num_cpus >= MIN_CPUS,
            f"{num_cpus} usable" + ("" if num_cpus >= MIN_CPUS else "; jobs will be slow"),
        ),
        Finding(
            "GPU",
            has_gpu,
            f"{gpus}; train with --recipe gpu --use-gpu"
            if has_gpu
            else "torch finds none; train with --recipe cpu",
        ),
        Finding(
            "bf16",
            has_bf16,
            f"on the {processor}"
            if has_bf16
            else f"the {processor} has no bf16 instructions; computing in fp32",
        ),
        Finding("Memory", memory_gib >= 6, f"{memory_gib:.1f} GiB; training needs about 6"),
        Finding(
            "ImageNet weights",
            weights.exists(),
            str(weights)
            if weights.exists()
            else f"not at {weights}; they are downloaded on first use, "
            "else pass --weights-uri FILE or --weights none",
        ),
        Finding("Disk", free_gib >= 5, f"{free_gib:.0f} GiB free here; a run writes about 1"),
        Finding(
            "Bytecode cache",
            has_bytecode,
            "on"
            if has_bytecode
            else "unset PYTHONDONTWRITEBYTECODE, which slows the start of every Ray worker",
        ),
    ]


def _examine_ray() -> Finding:
    try:
        found = version("ray")
    except PackageNotFoundError:
        return Finding("Ray", False, "not installed; run `make install`", needed=True)
    address = os.environ.get("RAY_ADDRESS")
    where = f"cluster at {address}" if address else "no RAY_ADDRESS: jobs start Ray here"
    return Finding("Ray", found.startswith("2.60."), f"{found}; {where}", needed=True)
