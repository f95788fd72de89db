"""The service on this machine: starts Ray and Serve, says where it listens, and drains at the end.

The ingress listens itself (Serve's direct ingress): Serve's proxy would take 4 to 9 ms of the
processor for each request, where the ingress takes 0.3 ms. A single ingress process is enough for
that: at 3,000 requests a second it is far from being what limits.
"""

import fcntl
import ipaddress
import logging
import os
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from types import FrameType
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus

from brainray.errors import ConfigError, ServingError
from brainray.model.classifier import Classifier, load_classifier
from brainray.raytoken import keep_token_private
from brainray.serving.app import QUIET, build_application
from brainray.serving.auth import TOKEN_VARIABLE, read_token
from brainray.serving.config import ServeJob, ServiceConfig
from brainray.serving.connection import DIRECT_VARIABLE, write_environment
from brainray.serving.journal import Journal

Say = Callable[[str], None]

logger = logging.getLogger(__name__)

APPLICATION = "brainray"
POLL_S = 0.5
DRAIN_S = 60.0
"""Longest time that requests in flight have at the end, in seconds."""


def serve_here(job: ServeJob, *, say: Say, verbose: bool = False) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Parameters
    ----------
    job : ServeJob
        What answers, and where it listens.
    say : callable
        Takes a line for a person.
    verbose : bool
        Whether Ray's own lines are shown.

    Raises
    ------
    UserError
        The classifier, the port, the token or the certificate cannot be used.
    ServingError
        The service did not start, or ended by itself.
    """
    check_alone(job)
    check_address(job)
    check_certificate(job)
    check_port(job.host, job.port)
    Journal(job.service.log_path)
    classifier = load_classifier(job.service.model.classifier_uri)
    config = share_cpus(job.service, count_cpus())
    config = replace(config, log_path=config.log_path or find_output())
    stop = StopSignals()
    try:
        start_ray(job, verbose=verbose)
        stop.install()  # once more: Ray has put its own in their place, which print a stack trace
        start_service(job, config)
        stop.is_serving = True
        announce(job, classifier, say)
        stop.wait(check_running)
        say("Draining: what is in flight is answered, nothing else is taken.")
        drain()
        serve.delete(APPLICATION)
    finally:
        ray.shutdown()
        stop.restore()
    say("Stopped.")


def check_alone(job: ServeJob) -> None:
    """Check that no cluster is meant."""
    if job.service.ingress_replicas != 1:
        raise ConfigError(
            "On one machine one process speaks HTTP. Leave out --ingress-replicas, or serve on a "
            "cluster: `serve deploy deploy/serve.yaml`."
        )
    if os.environ.get("RAY_ADDRESS"):
        raise ConfigError(
            "RAY_ADDRESS names a cluster, and this command serves on this machine alone. On a "
            "cluster run `serve deploy deploy/serve.yaml`; else unset RAY_ADDRESS."
        )


def check_address(job: ServeJob) -> None:
    """Check that an address that others reach has a token, and that the token can be had."""
    token = read_token(job.service.api_token_file, os.environ)
    if token is None and not job.insecure and not is_loopback(job.host):
        raise ConfigError(
            f"Others can reach {job.host}, and there is no token. Pass --api-token-file, or set "
            f"${TOKEN_VARIABLE}; or pass --insecure to let everybody ask."
        )


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_certificate(job: ServeJob) -> None:
    """Check that certificate and key are there and belong together."""
    if job.tls_cert is None and job.tls_key is None:
        return
    if job.tls_cert is None or job.tls_key is None:
        raise ConfigError("--tls-cert and --tls-key go together: give both, or none.")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(job.tls_cert, job.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"Cannot use the certificate '{job.tls_cert}' with the key '{job.tls_key}': {error}."
        ) from error


def check_port(host: str, port: int) -> None:
    """Check that an address can be listened on."""
    if not 1 <= port < 65536:
        raise ConfigError(f"Expected a --port from 1 to 65535, got {port}.")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ConfigError(
            f"Cannot listen on {host}:{port} ({error.strerror}). "
            "Stop what listens there, or pass another --port or --host."
        ) from error


def count_cpus() -> int:
    """Return how many CPUs this process may use."""
    return len(os.sched_getaffinity(0))


def share_cpus(config: ServiceConfig, num_cpus: int) -> ServiceConfig:
    """Give each model replica its threads, and reserve such that twice as many fit.

    Ray reserves, it does not confine: the threads are what counts. Twice as many replicas fit, so
    that one that is to take another's place may start beside it.
    """
    threads = config.model.engine.num_threads or max(1, num_cpus // config.max_replicas)
    reserved = config.replica_cpus
    if reserved is None:
        reserved = round(num_cpus / (2 * config.max_replicas), 3)
    engine = replace(config.model.engine, num_threads=threads)
    return replace(config, model=replace(config.model, engine=engine), replica_cpus=reserved)


def start_ray(job: ServeJob, *, verbose: bool) -> None:
    """Start Ray on this machine, for this service alone."""
    os.environ.update(build_environment(job))
    level = logging.INFO if verbose else logging.ERROR
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(level)
    keep_token_private()
    ray.init(
        address="local",
        num_cpus=max(2, count_cpus()),
        include_dashboard=False,
        log_to_driver=verbose,
        logging_level=level,
    )


def start_service(job: ServeJob, config: ServiceConfig) -> None:
    """Start Serve and the application; return when it answers.

    Raises
    ------
    ServingError
        It does not.
    """
    tls = {"ssl_certfile": job.tls_cert, "ssl_keyfile": job.tls_key} if job.tls_cert else {}
    serve.start(
        proxy_location="HeadOnly",
        http_options={
            "host": job.host,
            "port": find_free_port(job.host),
            "keep_alive_timeout_s": job.connections.idle_s,
            **tls,
        },
        logging_config=QUIET,
    )
    try:
        serve.run(build_application(config), name=APPLICATION, route_prefix="/")
    except RuntimeError as error:
        raise ServingError(f"The service did not start: {describe_failure() or error}") from error


def build_environment(job: ServeJob) -> dict[str, str]:
    """Return the variables with which Ray's processes start."""
    return {
        "RAY_USAGE_STATS_ENABLED": "0",
        # The ingress listens itself, on the port asked for, and stops as soon as it is idle.
        DIRECT_VARIABLE: "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(job.port),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(job.port + 1),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0.5",
        "RAY_SERVE_PORT_QUARANTINE_S": "0",
        # One event loop in a replica instead of three threads with one each.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
        "RAY_SERVE_LOG_TO_STDERR": "1" if logging.getLogger("ray").level <= logging.INFO else "0",
        # Else Ray lets everything else on the machine go before its workers.
        "RAY_worker_niceness": "0",
        # Ten times a second, Serve's controller took 3 % of a core for nothing.
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.4",
        # The service counts for itself; Ray's agent would take a tenth of a core.
        "RAY_enable_metrics_collection": "0",
        **write_environment(job.connections),
    }


def find_output() -> str | None:
    """Return a path under which other processes write to this one's standard output (Linux)."""
    path = f"/proc/{os.getpid()}/fd/1"
    try:
        # Into a file that was opened with `>`, each would otherwise write over the other's lines.
        fcntl.fcntl(1, fcntl.F_SETFL, fcntl.fcntl(1, fcntl.F_GETFL) | os.O_APPEND)
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK))
    except OSError:  # a socket, or a system without /proc: Ray's log file takes the lines
        return None
    return path


def find_free_port(host: str) -> int:
    """Return a port that nobody listens on."""
    family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind(address)
        return int(probe.getsockname()[1])


def announce(job: ServeJob, classifier: Classifier, say: Say) -> None:
    """Say what answers, where, and to whom."""
    scheme = "https" if job.tls_cert else "http"
    host = f"[{job.host}]" if ":" in job.host else job.host
    token = read_token(job.service.api_token_file, os.environ)
    say(f"classifier  {classifier.classifier_id}: {', '.join(classifier.classes)}")
    say(f"serving     {scheme}://{host}:{job.port}/  (interface: /docs)")
    say("token       needed" if token else "token       none: whoever reaches this address may ask")
    say("Research use only; not a medical device.")


def check_running() -> None:
    """Check that the application has not ended by itself.

    Raises
    ------
    ServingError
        It has.
    """
    failure = describe_failure()
    if failure is not None:
        raise ServingError(f"The service ended by itself: {failure}")


def drain() -> None:
    """Wait until the ingress has answered what it had taken.

    Serve ends all deployments of an application together: the model would be gone before scans
    that still wait for it.
    """
    asked = serve.get_app_handle(APPLICATION).drain.remote()
    try:
        asked.result(timeout_s=DRAIN_S)
    except (RayError, TimeoutError, RayServeException) as error:
        logger.warning("Not everything in flight was answered: %s", error)


def describe_failure() -> str | None:
    """Return what Serve says of an application that failed for good; None while it has not."""
    found = serve.status().applications.get(APPLICATION)
    if found is None:
        return "Serve knows nothing of it any more."
    if found.status != ApplicationStatus.DEPLOY_FAILED:
        return None
    messages = [d.message for d in found.deployments.values() if d.message] or [found.message]
    lines = [line.strip() for line in messages[0].splitlines() if line.strip()]
    return lines[-1] if lines else "Serve gives no reason."


class StopSignals:
    """Waits for SIGTERM or Ctrl-C, which then no longer interrupt.

    Before the service answers, Ctrl-C interrupts its start.
    """

    def __init__(self) -> None:
        self.is_serving = False
        self._asked = threading.Event()
        self._before = self.install()

    def install(self) -> dict[int, Any]:
        """Take the signals, and return what took them before."""
        return {n: signal.signal(n, self._ask) for n in (signal.SIGTERM, signal.SIGINT)}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGINT and not self.is_serving:
            raise KeyboardInterrupt
        self._asked.set()

    def wait(self, check: Callable[[], None]) -> None:
        """Return when asked to stop; ``check`` is called now and then."""
        looked_at = time.monotonic()
        while not self._asked.wait(POLL_S):
            if time.monotonic() - looked_at > 10:
                check()
                looked_at = time.monotonic()

    def restore(self) -> None:
        """Let the signals do what they did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
