"""Join a Ray cluster or start one on this machine, and check its resources."""

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
"""Minimum of logical CPUs of a local cluster: one to train, one to decode."""

TASK_CPUS = 0.01
"""Logical CPUs of a task that reads and decodes; another option limits their number. With whole
CPUs they would wait for ever while training workers or predictors hold a part of each node."""

JOINING_S = 15.0
"""Time for the nodes of a starting cluster to join."""

WAIT_LOG_INTERVAL_S = 30.0
"""Interval of the lines about a job that waits for nodes."""

NODE_GROUP_LABEL = "ray.io/node-group"
"""Ray's label of nodes that an autoscaler started."""

Bundle = dict[str, float]
"""Resources of a process or a node, by Ray's names."""


def connect_ray(*, verbose: bool = False, with_dashboard: bool = False) -> None:
    """Join the cluster of RAY_ADDRESS or `ray job submit`, else start one on this machine.

    ``verbose`` shows Ray's log. ``with_dashboard`` starts the dashboard too, on the loopback
    interface. Ray Tune needs it for trials that use Ray Train: to free the CPUs of a trial, Ray
    2.60 asks the dashboard whether the trial still runs, and waits for ever without it.

    Raises
    ------
    ConfigError
        ``with_dashboard``, and a Ray that runs already has none.
    """
    if not ray.is_initialized():
        _join_or_start(verbose=verbose, with_dashboard=with_dashboard)
    if with_dashboard:
        from ray.util import state

        try:
            state.list_nodes(ray.get_runtime_context().gcs_address, limit=1)
        except state.exception.RayStateApiException as error:
            raise ConfigError(
                "Ray Tune needs Ray's dashboard, which the running Ray does not have. Start that "
                "with `ray start --head --include-dashboard=true`, or unset RAY_ADDRESS."
            ) from error


def _join_or_start(*, verbose: bool, with_dashboard: bool) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    level = logging.INFO if verbose else logging.ERROR
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = verbose
    context.print_on_execution_start = verbose
    context.raise_original_map_exception = True  # not a UserCodeException
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(level)
    if not verbose:  # few scans on a large cluster are no mistake
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
        # Clients of the dashboard must find this cluster if there is another one on the machine.
        runtime_env={"worker_process_setup_hook": _name_own_cluster} if with_dashboard else None,
        log_to_driver=verbose,
        logging_level=level,
    )


def _name_own_cluster() -> None:
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address


def find_own_error(error: RayTaskError) -> BrainrayError | None:
    """Return the BrainrayError that ended a task of Ray Data, if it was one."""
    own = error.cause
    if not isinstance(own, BrainrayError):
        return None
    # Ray Data (2.60) appends the number of attempts to the message.
    return type(own)(*(str(part).partition("\nFailed to ")[0] for part in own.args))


@contextmanager
def raise_own_errors() -> Iterator[None]:
    """Raise a BrainrayError that ended a Ray task instead of the RayTaskError with a traceback."""
    try:
        yield
    except RayTaskError as error:
        raise find_own_error(error) or error from None


def _interrupt(*_: object) -> None:
    """End the job as Ctrl-C does; Ray's own handler would end it silently."""
    raise KeyboardInterrupt


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """Resources that a job needs, and how to need less."""

    bundle: Bundle
    """Resources of one process."""
    count: int
    """Concurrent processes."""
    what: str
    """Name of the processes in messages."""
    remedy: str


def list_nodes() -> list[Bundle]:
    """Return the resources of every node that is alive."""
    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def count_fitting(bundle: Bundle, nodes: Sequence[Bundle]) -> int:
    """Return how many processes with this bundle fit on the nodes."""
    needed = {name: amount for name, amount in bundle.items() if amount}
    return sum(
        int(min((node.get(name, 0.0) + 1e-6) // amount for name, amount in needed.items()))
        for node in nodes
    )


def share_cpus(count: int, nodes: Sequence[Bundle], wanted: float = 1.0, **others: float) -> float:
    """Return the CPUs that each of some processes reserves: the wanted number, or a part of one.

    The processes leave a part of every CPU to the tasks that read and decode. Otherwise a run
    whose processes hold all CPUs would wait for its own data for ever. ``others`` are other
    resources of each process, such as ``GPU=1.0``.
    """
    kept = 1 - 2 * TASK_CPUS
    if others:
        count = min(count, max(1, count_fitting(others, nodes)))
    for share in (wanted, *(1 / parts for parts in range(1, count + 1))):
        cpus = round(share * kept - 5e-5, 4)  # Ray counts in 1e-4
        if share <= wanted and count_fitting({"CPU": cpus, **others}, nodes) >= count:
            return cpus
    return kept * min(1.0, wanted)  # does not fit yet; an autoscaler may add nodes


def describe_gpu_need(gpus: float = 1.0, count: int = 1) -> Need:
    """Return the resources for predicting on GPUs."""
    return Need(
        bundle={"CPU": TASK_CPUS, "GPU": gpus},
        count=count,
        what="predictor",
        remedy="leave --use-gpu out" if count == 1 else "lower --num-predictors",
    )


def check_fits(*needs: Need) -> None:
    """Raise ConfigError if a job does not fit, after waiting for nodes to join.

    It may fit later on a cluster with an autoscaler.
    """
    deadline = time.monotonic() + (JOINING_S if os.environ.get("RAY_ADDRESS") else 0.0)
    while lacking := find_lacking(needs, list_nodes()):
        if has_autoscaler():
            return
        if time.monotonic() > deadline:
            raise ConfigError(f"{lacking} The cluster has no autoscaler.")
        time.sleep(1.0)


def find_lacking(needs: Sequence[Need], nodes: Sequence[Bundle]) -> str | None:
    """Describe the first need that does not fit on the nodes, if any."""
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
                f"Expected resources for {need.count} {need.what}{'s' * (need.count > 1)} with "
                f"{each} each; {fitting} fit on the cluster ({len(nodes)} nodes with {total} in "
                f"total). Add nodes, or {need.remedy}."
            )
    return None


def has_autoscaler() -> bool:
    """Return whether the cluster has an autoscaler."""
    return any(NODE_GROUP_LABEL in node["Labels"] for node in ray.nodes() if node["Alive"])


@contextmanager
def report_waiting(needs: Sequence[Need], log: Callable[[str], None]) -> Iterator[None]:
    """Log every half minute what a job waits for, while the cluster lacks resources."""

    def watch() -> None:
        lacking = find_lacking(needs, list_nodes())
        if lacking:
            log(f"Waiting for nodes. {lacking}")

    with repeat(watch, WAIT_LOG_INTERVAL_S, "waiting"):
        yield
