"""Joining a Ray cluster, or starting one on this machine, and what it can take."""

import logging
import math
import os

import ray
import ray.data

from brainray.errors import ConfigError
from brainray.pipelines.config import Placement
from brainray.raytoken import keep_token_private

MIN_CPUS = 2
"""A training worker and a decoding task need a (logical) CPU each."""


def connect_ray(*, verbose: bool = False) -> None:
    """Join the cluster that RAY_ADDRESS or `ray job submit` names, else start one here."""
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    level = logging.INFO if verbose else logging.ERROR
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = verbose
    context.print_on_execution_start = verbose
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(level)
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=verbose, logging_level=level)
        return
    keep_token_private()
    # Nobody drains the only node; each idle actor takes 1 % of a core from two that train.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    ray.init(
        address="local",
        num_cpus=max(MIN_CPUS, len(os.sched_getaffinity(0))),
        include_dashboard=False,
        log_to_driver=verbose,
        logging_level=level,
    )


def compute_cpus_per_worker(placement: Placement) -> float:
    """Return the logical CPUs that each training worker reserves.

    One with a GPU. Without, one as well where the cluster has more CPUs than workers, else
    a fraction: whatever happens, a CPU stays free for the tasks that decode, since a run
    whose workers hold every CPU waits for its own data for ever.

    Raises
    ------
    ConfigError
        The cluster has too few CPUs or GPUs, now, and cannot add any.
    """
    if placement.use_gpu:
        check_gpus(placement.min_workers or placement.num_workers)
    cpus = ray.cluster_resources().get("CPU", 0.0)
    if placement.use_gpu or (cpus < MIN_CPUS and os.environ.get("RAY_ADDRESS")):
        return 1.0  # a cluster that was joined may add nodes when asked
    if cpus < MIN_CPUS:
        raise ConfigError(f"Expected at least {MIN_CPUS} CPUs in the cluster, found {cpus:g}.")
    thousandths = math.floor(1000 * (cpus - 1) / placement.num_workers)  # Ray counts in 1e-4
    return float(min(1.0, thousandths / 1000))


def check_gpus(least: int) -> None:
    """Check that there are enough GPUs for ``--use-gpu``.

    A cluster that was joined may add nodes when asked, and is not judged by what it has now.

    Raises
    ------
    ConfigError
        This machine has fewer.
    """
    gpus = ray.cluster_resources().get("GPU", 0.0)
    if gpus < least and not os.environ.get("RAY_ADDRESS"):
        raise ConfigError(
            f"Expected at least {least} GPUs for --use-gpu, found {gpus:g}. "
            "Add GPU nodes, lower --num-workers, or leave --use-gpu out."
        )
