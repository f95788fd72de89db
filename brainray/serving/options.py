"""Options of the service: the classifier, the limits, and the address. No import of Ray."""

from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar

import tyro
from pydantic import ConfigDict, TypeAdapter, ValidationError

from brainray.errors import ConfigError
from brainray.images.decode import DecodeLimits
from brainray.serving.predictor import ModelOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceLimits:
    """Limits of each replica; a request beyond one is refused with the status given."""

    body_bytes: int = 32 * 2**20
    """Largest request body, in bytes (413)."""
    files: int = 32
    """Largest number of files in one request (422)."""
    slices: int = 512
    """Largest number of slices in the files of one request together (422)."""
    pixels: int = 50_000_000
    """Largest picture or DICOM frame, in pixels, and largest NIfTI volume, in voxels; a larger scan
    is rejected as `too_large`."""
    request_s: float = 30.0
    """Longest time from the complete body to the answer, in seconds (504)."""
    body_s: float = 20.0
    """Longest time until the complete body has arrived, in seconds (408)."""
    in_flight: int = 512
    """Largest number of requests being received or answered at a time (429)."""
    queued: int = 128
    """Largest number of slices that wait for the model (429)."""
    buffered_bytes: int = 512 * 2**20
    """Largest size of all request bodies in memory, in bytes (429)."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise ConfigError(f"{field.name} must be positive, got {value}.")

    @property
    def decode(self) -> DecodeLimits:
        """The limits of the decoder."""
        return DecodeLimits(max_bytes=self.body_bytes, max_pixels=self.pixels)


@dataclass(frozen=True, kw_only=True)
class ServiceConfig:
    """A service: its classifier, limits and replicas."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")  # also in nested options

    model: Annotated[ModelOptions, tyro.conf.arg(name="")]
    limits: ServiceLimits = ServiceLimits()
    min_replicas: int = 1
    """Number of replicas that always run."""
    max_replicas: int = 1
    """Largest number of replicas. Ray Serve adds replicas while requests wait."""
    replica_cpus: float | None = None
    """CPUs that Ray reserves for each replica; by default the number of its threads."""
    api_token_file: str | None = None
    """File with the token that requests need; by default $BRAINRAY_API_TOKEN, else no token."""
    id_key_file: str | None = None
    """File with the key of the hashes that replace identifiers, at least 16 bytes. By default the
    key is random; all replicas share it, and it is lost when the service stops."""
    log_path: str | None = None
    """File to append the access log to; by default standard output, and on a cluster the replica's
    log file."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise ConfigError(
                "Expected 1 <= min_replicas <= max_replicas, got "
                f"{self.min_replicas} and {self.max_replicas}."
            )


@dataclass(frozen=True, kw_only=True)
class ServeJob:
    """A service on this machine."""

    service: Annotated[ServiceConfig, tyro.conf.arg(name="")]
    host: str = "127.0.0.1"
    """Address to listen on. An address that is not loopback needs a token, or --insecure."""
    port: int = 8000
    """Port to listen on."""
    tls_cert: str | None = None
    """File with the certificate chain (PEM); needs --tls-key."""
    tls_key: str | None = None
    """File with the certificate's key (PEM)."""
    insecure: bool = False
    """Accept requests from other machines without a token."""
    production: bool = False
    """Listen with HAProxy for more requests per second, on every interface and without TLS. Needs
    a token. docs/serving.md lists the ports to close."""


def read_arguments(arguments: dict[str, Any]) -> ServiceConfig:
    """Build a service's configuration from the plain values of a YAML file."""
    try:
        return TypeAdapter(ServiceConfig).validate_python(arguments)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        location = ".".join(map(str, ("args", *first["loc"])))
        raise ConfigError(f"{location}: {first['msg'].rstrip('.')}.") from error
