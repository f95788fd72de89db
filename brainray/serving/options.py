"""Options of the service: the classifier, its limits, and where it listens.

Importing this starts nothing and imports no Ray.
"""

from dataclasses import dataclass, fields
from typing import Annotated, Any

import tyro
from pydantic import TypeAdapter, ValidationError

from brainray.errors import ConfigError
from brainray.images.decode import DecodeLimits
from brainray.inference.engine import EngineOptions
from brainray.serving.predictor import ModelOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceLimits:
    """Beyond these a request is refused; each replica counts for itself."""

    body_bytes: int = 32 * 2**20
    """Largest request body, in bytes (413)."""
    files: int = 32
    """Most scans of one request (422)."""
    slices: int = 512
    """Most slices of one request's scans together (422)."""
    pixels: int = 50_000_000
    """Largest picture or DICOM frame, in pixels, and largest NIfTI volume, in voxels; the scan is
    rejected as `too_large`."""
    request_s: float = 30.0
    """Time from the whole body to the answer, in seconds (504)."""
    body_s: float = 20.0
    """Time in which a whole body must arrive, in seconds (408)."""
    in_flight: int = 512
    """Requests being received or answered at a time (429)."""
    queued: int = 128
    """Slices that may wait for the model (429)."""
    buffered_bytes: int = 512 * 2**20
    """Request bodies held in memory at a time, in bytes (429)."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise ConfigError(f"{field.name} must be positive, got {value}.")

    @property
    def decode(self) -> DecodeLimits:
        """What the decoder refuses."""
        return DecodeLimits(max_bytes=self.body_bytes, max_pixels=self.pixels)


@dataclass(frozen=True, kw_only=True)
class ServiceConfig:
    """A service: what answers, how many replicas of it, and its limits."""

    model: Annotated[ModelOptions, tyro.conf.arg(name="")]
    limits: ServiceLimits = ServiceLimits()
    min_replicas: int = 1
    """Replicas that always run."""
    max_replicas: int = 1
    """Replicas at most; there are more while requests wait."""
    replica_cpus: float | None = None
    """CPUs that Ray reserves for each replica; its threads, if not given."""
    api_token_file: str | None = None
    """File with the token that requests need; else $BRAINRAY_API_TOKEN, else they need none."""
    id_key_file: str | None = None
    """File with the key of the hashes that stand for identifiers, at least 16 bytes. Without it the
    key is random: hashes are the same while the service runs, in all of its replicas."""
    log_path: str | None = None
    """File that the access log is appended to; if not given, standard output, and on a cluster the
    replica's log file."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise ConfigError(
                "Expected 1 <= min_replicas <= max_replicas, got "
                f"{self.min_replicas} and {self.max_replicas}."
            )


@dataclass(frozen=True, kw_only=True)
class ServeJob:
    """One service on this machine: what answers, and where it listens."""

    service: Annotated[ServiceConfig, tyro.conf.arg(name="")]
    host: str = "127.0.0.1"
    """Address to listen on. Another than a loopback address needs a token, or --insecure."""
    port: int = 8000
    """Port to listen on."""
    tls_cert: str | None = None
    """File with the certificate chain (PEM); with --tls-key."""
    tls_key: str | None = None
    """File with the certificate's key (PEM)."""
    insecure: bool = False
    """Let everybody who reaches the address ask, without a token."""
    production: bool = False
    """Listen with HAProxy, on every interface and without TLS, for more requests per second. Needs
    a token; docs/serving.md says which ports to close."""


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
        location = ".".join(map(str, first["loc"]))
        raise ConfigError(f"args.{location}: {first['msg']}.") from error


NESTED = {"model": ModelOptions, "engine": EngineOptions, "limits": ServiceLimits}
"""Fields that have fields of their own."""


def _check_names(given: dict[str, Any], kind: type, location: str) -> None:
    known = {field.name: field for field in fields(kind)}
    for name, value in given.items():
        if name not in known:
            raise ConfigError(f"{location} has no '{name}'. It has {', '.join(known)}.")
        if isinstance(value, dict):
            _check_names(value, NESTED[name], name)
