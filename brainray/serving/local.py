"""The service on this machine: start Ray and Serve, and drain at the end.

By default Serve's own proxy listens, on 127.0.0.1. With ``--production`` HAProxy listens, enabled
by the two variables of Ray's guide to high throughput. It adds less time to a request, has no TLS,
and opens its ports for statistics (8404) and metrics (9101) on every interface.
"""

import fcntl
import ipaddress
import logging
import os
import signal
import socket
import ssl
import threading
from dataclasses import replace

import ray
from ray import serve
from ray.serve.schema import ApplicationStatus

from brainray.errors import ConfigError, ServingError
from brainray.io.identifiers import read_key
from brainray.model.classifier import Classifier, load_classifier
from brainray.raytoken import protect_token_file
from brainray.runlog import Log
from brainray.serving.app import LOGGING, build_application
from brainray.serving.middleware import TOKEN_VARIABLE, AccessLog, read_token
from brainray.serving.options import ServeJob, ServiceConfig

APPLICATION = "brainray"
STATUS_PERIOD_S = 10.0
KEEP_ALIVE_S = 30
REQUEST_MARGIN_S = 10.0
"""Serve ends a request this long after the service itself would have answered 408 or 504."""
PRODUCTION_VARIABLES = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
"""docs.ray.io, "Enable High Throughput on Ray Serve with KubeRay"."""


def serve_here(job: ServeJob, *, log: Log, verbose: bool = False) -> None:
    """Serve until SIGTERM or Ctrl-C; ``verbose`` shows Ray's own log.

    Raises
    ------
    UserError
        The classifier, the port, the token or the certificate cannot be used.
    ServingError
        The service did not start, or failed while running.
    """
    check_job(job)
    check_port(job.host, job.port)
    AccessLog(job.service.log_path)
    if job.service.id_key_file:
        read_key(job.service.id_key_file)
    classifier = load_classifier(job.service.model.classifier_uri)
    config = divide_cpus(job.service, len(os.sched_getaffinity(0)))
    config = replace(config, log_path=config.log_path or find_stdout())
    try:
        start_ray(job, verbose=verbose)
        stop = threading.Event()
        # Before the first request can be answered: Ray's own handler ends the process at once.
        signal.signal(signal.SIGTERM, lambda *_: stop.set())
        start_service(job, config)
        signal.signal(signal.SIGINT, lambda *_: stop.set())
        log_start(job, classifier, log)
        while not stop.wait(STATUS_PERIOD_S):
            failure = find_failure()
            if failure is not None:
                raise ServingError(f"The service failed: {failure}")
        log("Draining: requests in flight are answered, new ones refused.")
        serve.delete(APPLICATION)
    finally:
        ray.shutdown()
    log("Stopped.")


def check_job(job: ServeJob) -> None:
    """Check address, token and certificate."""
    if os.environ.get("RAY_ADDRESS"):
        raise ConfigError(
            "RAY_ADDRESS names a cluster, but this command serves on this machine alone. "
            "Run `serve deploy deploy/serve.yaml` on the cluster, or unset RAY_ADDRESS."
        )
    token = read_token(job.service.api_token_file, os.environ)
    give_token = f"Pass --api-token-file, or set ${TOKEN_VARIABLE}"
    if job.production and token is None:
        raise ConfigError(
            f"--production listens on every interface, and there is no token. {give_token}."
        )
    if token is None and not job.insecure and not _is_loopback(job.host):
        raise ConfigError(
            f"Other machines can reach {job.host}, and there is no token. {give_token}, "
            "or pass --insecure to accept requests from anyone."
        )
    if job.production and job.tls_cert:
        raise ConfigError(
            "--production has no TLS. Remove --tls-cert and --tls-key, and put "
            "deploy/haproxy.cfg in front of the service."
        )
    if (job.tls_cert is None) != (job.tls_key is None):
        raise ConfigError("Expected both --tls-cert and --tls-key or neither, got one.")
    if job.tls_cert is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(job.tls_cert, job.tls_key)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"Cannot use the certificate '{job.tls_cert}' with the key '{job.tls_key}': "
                f"{error}."
            ) from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address("127.0.0.1" if host == "localhost" else host).is_loopback
    except ValueError:
        return False


def check_port(host: str, port: int) -> None:
    """Check that the service can listen on an address."""
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
            "Stop the program that listens there, or pass another --port or --host."
        ) from error


def divide_cpus(config: ServiceConfig, num_cpus: int) -> ServiceConfig:
    """Set the threads of each replica and the CPUs that Ray reserves for it.

    The reserved CPUs do not limit a replica; its threads do. Half of the CPUs stay unreserved, so
    that a replacement can start beside each replica.
    """
    threads = config.model.engine.num_threads or max(1, num_cpus // config.max_replicas)
    half = round(num_cpus / (2 * config.max_replicas), 3)
    reserved = half if config.replica_cpus is None else config.replica_cpus
    engine = replace(config.model.engine, num_threads=threads)
    return replace(config, model=replace(config.model, engine=engine), replica_cpus=reserved)


def start_ray(job: ServeJob, *, verbose: bool) -> None:
    """Start a Ray of its own for this service."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if job.production:
        os.environ.update(PRODUCTION_VARIABLES)
    level = logging.INFO if verbose else logging.ERROR
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(level)
    protect_token_file()
    ray.init(
        address="local",
        num_cpus=max(2, len(os.sched_getaffinity(0))),
        include_dashboard=False,
        log_to_driver=verbose,
        logging_level=level,
    )


def start_service(job: ServeJob, config: ServiceConfig) -> None:
    """Start Serve and the application; return when the service is ready."""
    limits = config.limits
    tls = {"ssl_certfile": job.tls_cert, "ssl_keyfile": job.tls_key} if job.tls_cert else {}
    # HAProxy reaches replicas by the node's address, so Serve must listen on every interface.
    host = {} if job.production else {"host": job.host}
    serve.start(
        proxy_location="HeadOnly",
        http_options={
            **host,
            **tls,
            "port": job.port,
            "keep_alive_timeout_s": KEEP_ALIVE_S,
            "request_timeout_s": limits.body_s + limits.request_s + REQUEST_MARGIN_S,
        },
        logging_config=LOGGING,
    )
    try:
        application = build_application(config, use_ray_metrics=False)
        serve.run(application, name=APPLICATION, route_prefix="/")
    except RuntimeError as error:
        raise ServingError(f"The service did not start: {find_failure() or error}") from error


def find_stdout() -> str | None:
    """Return a path by which replicas append to this process's standard output.

    None without /proc, or if standard output is a socket; Ray's log file then has the lines.
    """
    path = f"/proc/{os.getpid()}/fd/1"
    try:
        # Without O_APPEND, processes overwrite each other's lines in a file opened with `>`.
        fcntl.fcntl(1, fcntl.F_SETFL, fcntl.fcntl(1, fcntl.F_GETFL) | os.O_APPEND)
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK))
    except OSError:
        return None
    return path


def log_start(job: ServeJob, classifier: Classifier, log: Log) -> None:
    """Log the classifier, the address, and whether a token is needed."""
    scheme = "https" if job.tls_cert else "http"
    host = f"[{job.host}]" if ":" in job.host else job.host
    if job.production:
        host = socket.gethostname()
    token = read_token(job.service.api_token_file, os.environ)
    log(f"classifier  {classifier.classifier_id}: {', '.join(classifier.classes)}")
    log(f"serving     {scheme}://{host}:{job.port}/  (interface: /docs)")
    log("token       required" if token else "token       none: anyone who can connect may use it")
    log("Research use only; not a medical device.")


def find_failure() -> str | None:
    """Return why Serve gave the application up; None if it has not."""
    found = serve.status().applications.get(APPLICATION)
    if found is None:
        return "Serve has no such application."
    if found.status != ApplicationStatus.DEPLOY_FAILED:
        return None
    messages = [d.message for d in found.deployments.values() if d.message] or [found.message]
    lines = [line.strip() for line in messages[0].splitlines() if line.strip()]
    return lines[-1] if lines else "Serve reports no reason."
