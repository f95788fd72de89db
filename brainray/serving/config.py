"""What a service is made of; importing it starts nothing and imports no Ray."""

from dataclasses import dataclass, fields
from typing import Annotated, Any

import tyro
from pydantic import TypeAdapter, ValidationError

from brainray.errors import ConfigError
from brainray.inference.engine import EngineOptions
from brainray.serving.limits import ConnectionLimits, ServiceLimits
from brainray.serving.predictor import ModelOptions


@dataclass(frozen=True, kw_only=True)
class ServiceConfig:
    """A service: what answers, how much of it, and what is too much."""

    model: Annotated[ModelOptions, tyro.conf.arg(name="")]
    limits: ServiceLimits = ServiceLimits()
    min_replicas: int = 1
    """Model replicas that are always there."""
    max_replicas: int = 1
    """Model replicas at most; there are more while scans wait."""
    ingress_replicas: int = 1
    """Processes that speak HTTP."""
    replica_cpus: float | None = None
    """CPUs that Ray sets aside for each model replica; its threads, if not given."""
    api_token_file: str | None = None
    """File with the token that requests need; else $BRAINRAY_API_TOKEN, else they need none."""
    log_path: str | None = None
    """File that the service's log lines are appended to; if not given, standard output, and on a
    cluster the replica's log file."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise ConfigError(
                "Expected 1 <= min_replicas <= max_replicas, got "
                f"{self.min_replicas} and {self.max_replicas}."
            )
        if self.ingress_replicas < 1:
            raise ConfigError(f"Expected at least one ingress, got {self.ingress_replicas}.")


def read_arguments(arguments: dict[str, Any]) -> ServiceConfig:
    """Read a service's configuration from plain values, as a YAML file gives them.

    Raises
    ------
    ConfigError
        A name that is not known, or a value that is not of its type.
    """
    _check_names(arguments, ServiceConfig, "args")
    try:
        return TypeAdapter(ServiceConfig).validate_python(arguments)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigError(f"args.{place}: {first['msg']}.") from error


PARTS = {"model": ModelOptions, "engine": EngineOptions, "limits": ServiceLimits}
"""What the fields are that have fields of their own."""


def _check_names(given: dict[str, Any], kind: type, place: str) -> None:
    known = {field.name: field for field in fields(kind)}
    for name, value in given.items():
        if name not in known:
            raise ConfigError(f"{place} has no '{name}'. It has {', '.join(known)}.")
        if isinstance(value, dict):
            _check_names(value, PARTS[name], name)


@dataclass(frozen=True, kw_only=True)
class ServeJob:
    """One service on this machine: what answers, and where it listens."""

    service: Annotated[ServiceConfig, tyro.conf.arg(name="")]
    connections: ConnectionLimits = ConnectionLimits()
    host: str = "127.0.0.1"
    """Address to listen on. Another than a loopback address needs a token, or --insecure."""
    port: int = 8000
    """Port to listen on."""
    tls_cert: str | None = None
    """File with the certificate, and those that vouch for it (PEM); with --tls-key."""
    tls_key: str | None = None
    """File with the certificate's key (PEM)."""
    insecure: bool = False
    """Let everybody who reaches the address ask, without a token."""
