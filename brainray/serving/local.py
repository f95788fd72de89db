"""The service on this machine: starts Ray and Serve, tells where it listens, and drains at the end.

By default Serve's own proxy listens, on 127.0.0.1. With ``--production`` HAProxy does, by the two
variables of Ray's guide to high throughput: it costs a request less, has no TLS, and its ports of
statistics (8404) and metrics (9101) are open on every interface.
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
from brainray.raytoken import use_token_file
from brainray.runlog import Log
from brainray.serving.access_log import AccessLog
from brainray.serving.app import QUIET, build_application
from brainray.serving.auth import TOKEN_VARIABLE, read_token
from brainray.serving.options import ServeJob, ServiceConfig

APPLICATION = "brainray"
STATUS_PERIOD_S = 10.0
KEEP_ALIVE_S = 30
REQUEST_MARGIN_S = 10.0
"""Serve ends a request so long after the service would have answered 408 or 504 itself."""
PRODUCTION_VARIABLES = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
"""docs.ray.io, "Enable High Throughput on Ray Serve with KubeRay"."""


def serve_here(job: ServeJob, *, log: Log, verbose: bool = False) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Parameters
    ----------
    job : ServeJob
        What answers, and where it listens.
    log : callable
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
    check_job(job)
    check_port(job.host, job.port)
    AccessLog(job.service.log_path)
    if job.service.id_key_file:
        read_key(job.service.id_key_file)
    classifier = load_classifier(job.service.model.classifier_uri)
    config = share_cpus(job.service, len(os.sched_getaffinity(0)))
    config = replace(config, log_path=config.log_path or find_stdout())
    try:
        start_ray(job, verbose=verbose)
        start_service(job, config)
        stop = catch_stop_signals()
        announce(job, classifier, log)
        while not stop.wait(STATUS_PERIOD_S):
            failure = find_failure()
            if failure is not None:
                raise ServingError(f"The service ended by itself: {failure}")
        log("Draining: requests in flight are answered, further ones refused.")
        serve.delete(APPLICATION)
    finally:
        ray.shutdown()
    log("Stopped.")


def catch_stop_signals() -> threading.Event:
    """Return an event that SIGTERM and Ctrl-C set from now on, instead of ending this process."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop


def check_job(job: ServeJob) -> None:
    """Check that a job means this machine, and that its token and certificate can be used.

    Raises
    ------
    ConfigError
        Not so.
    """
    if os.environ.get("RAY_ADDRESS"):
        raise ConfigError(
            "RAY_ADDRESS names a cluster, and this command serves on this machine alone. On a "
            "cluster run `serve deploy deploy/serve.yaml`; else unset RAY_ADDRESS."
        )
    token = read_token(job.service.api_token_file, os.environ)
    give_token = f"Pass --api-token-file, or set ${TOKEN_VARIABLE}"
    if job.production and token is None:
        raise ConfigError(
            f"--production listens on every interface, and there is no token. {give_token}."
        )
    if token is None and not job.insecure and not is_loopback(job.host):
        raise ConfigError(
            f"Others can reach {job.host}, and there is no token. {give_token}; "
            "or pass --insecure to let everybody ask."
        )
    if job.production and job.tls_cert:
        raise ConfigError(
            "--production has no TLS. Leave out --tls-cert and --tls-key, and put "
            "deploy/haproxy.cfg in front."
        )
    check_certificate(job)


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


def share_cpus(config: ServiceConfig, num_cpus: int) -> ServiceConfig:
    """Give each replica its threads, and reserve such that twice as many replicas fit.

    Ray reserves, it does not confine: the threads are what counts. Twice as many fit, so that one
    that is to take another's place starts beside it.
    """
    threads = config.model.engine.num_threads or max(1, num_cpus // config.max_replicas)
    reserved = config.replica_cpus
    if reserved is None:
        reserved = round(num_cpus / (2 * config.max_replicas), 3)
    engine = replace(config.model.engine, num_threads=threads)
    return replace(config, model=replace(config.model, engine=engine), replica_cpus=reserved)


def start_ray(job: ServeJob, *, verbose: bool) -> None:
    """Start Ray on this machine, for this service alone."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if job.production:
        os.environ.update(PRODUCTION_VARIABLES)
    level = logging.INFO if verbose else logging.ERROR
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(level)
    use_token_file()
    ray.init(
        address="local",
        num_cpus=max(2, len(os.sched_getaffinity(0))),
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
    limits = config.limits
    tls = {"ssl_certfile": job.tls_cert, "ssl_keyfile": job.tls_key} if job.tls_cert else {}
    serve.start(
        proxy_location="HeadOnly",
        http_options={
            # HAProxy reaches replicas by the node's address: Serve's default with it is every
            # interface.
            **({} if job.production else {"host": job.host}),
            "port": job.port,
            "keep_alive_timeout_s": KEEP_ALIVE_S,
            "request_timeout_s": limits.body_s + limits.request_s + REQUEST_MARGIN_S,
            **tls,
        },
        logging_config=QUIET,
    )
    try:
        application = build_application(config, use_ray_metrics=False)
        serve.run(application, name=APPLICATION, route_prefix="/")
    except RuntimeError as error:
        raise ServingError(f"The service did not start: {find_failure() or error}") from error


def find_stdout() -> str | None:
    """Return a path by which other processes append to this one's standard output (Linux)."""
    path = f"/proc/{os.getpid()}/fd/1"
    try:
        # Into a file that was opened with `>`, each would otherwise write over the other's lines.
        fcntl.fcntl(1, fcntl.F_SETFL, fcntl.fcntl(1, fcntl.F_GETFL) | os.O_APPEND)
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK))
    except OSError:  # a socket, or a system without /proc: Ray's log file takes the lines
        return None
    return path


def announce(job: ServeJob, classifier: Classifier, log: Log) -> None:
    """Log what answers, where, and to whom."""
    scheme = "https" if job.tls_cert else "http"
    host = f"[{job.host}]" if ":" in job.host else job.host
    if job.production:
        host = socket.gethostname()
    token = read_token(job.service.api_token_file, os.environ)
    log(f"classifier  {classifier.classifier_id}: {', '.join(classifier.classes)}")
    log(f"serving     {scheme}://{host}:{job.port}/  (interface: /docs)")
    log("token       needed" if token else "token       none: whoever reaches this address may ask")
    log("Research use only; not a medical device.")


def find_failure() -> str | None:
    """Return what Serve reports of an application that failed for good; None while it has not."""
    found = serve.status().applications.get(APPLICATION)
    if found is None:
        return "Serve does not know it any more."
    if found.status != ApplicationStatus.DEPLOY_FAILED:
        return None
    messages = [d.message for d in found.deployments.values() if d.message] or [found.message]
    lines = [line.strip() for line in messages[0].splitlines() if line.strip()]
    return lines[-1] if lines else "Serve gives no reason."
