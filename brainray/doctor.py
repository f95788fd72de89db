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
    return [
        _examine_python(),
        _examine_ray(),
        _examine_cpus(),
        _examine_gpus(),
        _examine_bf16(),
        _examine_memory(),
        _examine_weights(),
        _examine_disk(),
        _examine_bytecode(),
    ]


def _examine_python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    return Finding("Python", sys.version_info >= (3, 11), f"{found}; 3.11 or newer", needed=True)


def _examine_ray() -> Finding:
    try:
        found = version("ray")
    except PackageNotFoundError:
        return Finding("Ray", False, "not installed; run `make install`", needed=True)
    address = os.environ.get("RAY_ADDRESS")
    where = f"cluster at {address}" if address else "no RAY_ADDRESS: jobs start Ray here"
    return Finding("Ray", found.startswith("2.60."), f"{found}; {where}", needed=True)


def _examine_cpus() -> Finding:
    count = len(os.sched_getaffinity(0))
    detail = f"{count} usable" if count >= MIN_CPUS else f"{count} usable; jobs will be slow"
    return Finding("CPUs", count >= MIN_CPUS, detail)


def _examine_gpus() -> Finding:
    if not torch.cuda.is_available():
        return Finding("GPU", False, "torch finds none; train with --recipe cpu")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Finding("GPU", True, ", ".join(names) + "; train with --recipe gpu --use-gpu")


def _examine_bf16() -> Finding:
    use_gpu = torch.cuda.is_available()
    where = "GPU" if use_gpu else "processor"
    if has_native_bf16(use_gpu=use_gpu):
        return Finding("bf16", True, f"on the {where}")
    return Finding("bf16", False, f"the {where} has no bf16 instructions; computing in fp32")


def _examine_memory() -> Finding:
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Finding("Memory", gib >= 6, f"{gib:.1f} GiB; training needs about 6")


def _examine_weights() -> Finding:
    path = imagenet_weights_path()
    if path.exists():
        return Finding("ImageNet weights", True, str(path))
    return Finding(
        "ImageNet weights",
        False,
        f"not at {path}; they are downloaded on first use, "
        "else pass --weights-uri FILE or --weights none",
    )


def _examine_disk() -> Finding:
    free = shutil.disk_usage(".").free / 2**30
    return Finding("Disk", free >= 5, f"{free:.0f} GiB free here; a run writes about 1")


def _examine_bytecode() -> Finding:
    set_here = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    detail = "unset PYTHONDONTWRITEBYTECODE, which slows the start of every Ray worker"
    return Finding("Bytecode cache", not set_here, detail if set_here else "on")
