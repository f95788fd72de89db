"""Joining a Ray cluster, or starting one on this machine, and what it can take."""

import logging
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import ray
import ray.data
from ray.exceptions import RayTaskError

from brainray.errors import BrainrayError, ConfigError
from brainray.io.repeat import repeat
from brainray.raytoken import protect_token_file

MIN_CPUS = 2
"""Logical CPUs that Ray is given at least on this machine: one to train, one to decode."""

TASK_CPUS = 0.01
"""Logical CPUs of a task that reads and decodes. How many run at a time is said beside; asking for
whole ones, they would wait for ever where training workers or predictors hold part of each node."""

JOINING_S = 15.0
"""Nodes of a cluster that is just being started have this long to join."""

TELL_S = 30.0
"""Between two lines on what a job waits for."""

NODE_GROUP_LABEL = "ray.io/node-group"
"""Ray's label of nodes whose kind an autoscaler knows; nodes that people start have none."""

Bundle = dict[str, float]
"""Resources of one process, or of one node, by Ray's names."""


def connect_ray(*, verbose: bool = False, with_dashboard: bool = False) -> None:
    """Join the cluster that RAY_ADDRESS or `ray job submit` names, else start one here.

    Parameters
    ----------
    verbose : bool
        Whether to show Ray's own lines.
    with_dashboard : bool
        Start the dashboard too, on the loopback interface. Ray Tune needs it where trials train
        with Ray Train: what frees the CPUs of a trial that is ended asks the dashboard whether the
        trial still runs, and waits for ever without it (Ray 2.60).
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    level = logging.INFO if verbose else logging.ERROR
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = verbose
    context.print_on_execution_start = verbose
    context.raise_original_map_exception = True  # our own errors, not a UserCodeException
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(level)
    if not verbose:  # a handful of scans on a large cluster is no mistake
        warnings.filterwarnings("ignore", message="The minimum number of concurrent actors")
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=verbose, logging_level=level)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _interrupt)  # `ray job stop`
        return
    protect_token_file()
    # Disable the preemption watcher on a single node: an idle actor takes 1 % of a core.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    ray.init(
        address="local",
        num_cpus=max(MIN_CPUS, len(os.sched_getaffinity(0))),
        include_dashboard=with_dashboard,
        # Where another cluster runs on this machine, what asks the dashboard must be told which.
        runtime_env={"worker_process_setup_hook": _name_own_cluster} if with_dashboard else None,
        log_to_driver=verbose,
        logging_level=level,
    )


def _name_own_cluster() -> None:
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address


def find_own_error(error: RayTaskError) -> BrainrayError | None:
    """Return the error of ours that ended a task of Ray Data, if it was one.

    Ray Data (2.60) writes how often it tried below an error's message; that is left out.
    """
    own = error.cause
    if not isinstance(own, BrainrayError):
        return None
    return type(own)(*(str(part).partition("\nFailed to ")[0] for part in own.args))


@contextmanager
def raise_own_errors() -> Iterator[None]:
    """Raise an error of ours that ended a task of Ray as itself: one line, no traceback in it."""
    try:
        yield
    except RayTaskError as error:
        raise find_own_error(error) or error from None


def _interrupt(*_: object) -> None:
    """End the job as Ctrl-C does; Ray's own handler would end it without a word."""
    raise KeyboardInterrupt


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """What a job cannot do without, and how a person asks for less."""

    bundle: Bundle
    """Resources of one process."""
    count: int
    """Processes at one time."""
    what: str
    """What they are, for people."""
    remedy: str
    """What makes the job need less."""


def list_nodes() -> list[Bundle]:
    """Return the resources of every node that is there now."""
    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def count_fitting(bundle: Bundle, nodes: Sequence[Bundle]) -> int:
    """Return how many processes of one kind the nodes can hold, each on one node."""
    return sum(
        int(
            min((node.get(name, 0.0) + 1e-6) // amount for name, amount in bundle.items() if amount)
        )
        for node in nodes
    )


def share_cpus(count: int, nodes: Sequence[Bundle], wanted: float = 1.0, **others: float) -> float:
    """Return the CPUs that each of some processes reserves: all wanted, or a part of one.

    Whatever the nodes and whichever of them are lost, each of the processes leaves
    :data:`TASK_CPUS` of every CPU to the tasks that read and decode: a
    run whose processes hold every CPU of every node waits for its own data for ever.

    Parameters
    ----------
    count : int
        Processes.
    nodes : sequence of Bundle
        The nodes that there are.
    wanted : float
        CPUs for each, if there are enough.
    others : float
        What else each of them takes: ``GPU=1.0``.
    """
    kept = 1 - 2 * TASK_CPUS
    if others:
        count = min(count, max(1, count_fitting(others, nodes)))
    for share in (wanted, *(1 / parts for parts in range(1, count + 1))):
        cpus = round(share * kept - 5e-5, 4)  # Ray counts in 1e-4
        if share <= wanted and count_fitting({"CPU": cpus, **others}, nodes) >= count:
            return cpus
    return kept * min(1.0, wanted)  # more than there is: an autoscaler may add nodes


def describe_gpu_need(gpus: float = 1.0, count: int = 1) -> Need:
    """Say what predicting on GPUs cannot do without."""
    return Need(
        bundle={"CPU": TASK_CPUS, "GPU": gpus},
        count=count,
        what="predictor",
        remedy="leave --use-gpu out" if count == 1 else "lower --num-predictors",
    )


def check_fits(*needs: Need) -> None:
    """Check that the cluster can hold what a job needs; nodes may be about to join it.

    A cluster with an autoscaler is not judged by what it has now.

    Raises
    ------
    ConfigError
        It cannot, and nothing will add nodes.
    """
    deadline = time.monotonic() + (JOINING_S if os.environ.get("RAY_ADDRESS") else 0.0)
    while lacking := find_lacking(needs, list_nodes()):
        if has_autoscaler():
            return
        if time.monotonic() > deadline:
            raise ConfigError(f"{lacking} Nothing adds nodes to it by itself.")
        time.sleep(1.0)


def find_lacking(needs: Sequence[Need], nodes: Sequence[Bundle]) -> str | None:
    """Say in a sentence or two what does not fit on the nodes, if anything."""
    tasks = Need(
        bundle={"CPU": 1.0}, count=1, what="task", remedy="start nodes with more --num-cpus"
    )
    for need in (tasks, *needs):
        fitting = count_fitting(need.bundle, nodes)
        if fitting < need.count:
            each = " and ".join(f"{amount:g} {name}" for name, amount in need.bundle.items())
            total = " and ".join(
                f"{sum(node.get(name, 0.0) for node in nodes):g} {name}" for name in need.bundle
            )
            return (
                f"Expected room for {need.count} {need.what}{'s' * (need.count > 1)} with {each} "
                f"each; the cluster has room for {fitting} ({len(nodes)} nodes with {total} in "
                f"all). Add nodes, {need.remedy}."
            )
    return None


def has_autoscaler() -> bool:
    """Tell whether the cluster may add nodes by itself."""
    return any(NODE_GROUP_LABEL in node["Labels"] for node in ray.nodes() if node["Alive"])


@contextmanager
def report_waiting(needs: Sequence[Need], log: Callable[[str], None]) -> Iterator[None]:
    """Say from time to time what a job waits for, while the cluster lacks what it needs."""

    def watch() -> None:
        lacking = find_lacking(needs, list_nodes())
        if lacking:
            log(f"Waiting for nodes. {lacking}")

    with repeat(watch, TELL_S, "waiting"):
        yield
