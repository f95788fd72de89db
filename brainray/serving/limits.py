"""What a request may ask for, and for how long a connection may keep a door open."""

from dataclasses import dataclass, fields

from brainray.errors import ConfigError
from brainray.images.decode import DecodeLimits


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceLimits:
    """Beyond these a request is refused; each ingress replica counts for itself."""

    body_bytes: int = 32 * 2**20
    """Largest request body, in bytes (413)."""
    files: int = 32
    """Most scans of one request (422)."""
    pixels: int = 50_000_000
    """Largest scan, width times height, in pixels; the scan is rejected as `too_large`."""
    request_s: float = 30.0
    """Time from the whole body to the answer, in seconds (504)."""
    body_s: float = 20.0
    """Time in which a whole body must arrive, in seconds (408)."""
    in_flight: int = 512
    """Requests being received or answered at a time (429)."""
    queued: int = 128
    """Scans that may wait for the model (429)."""
    buffered_bytes: int = 512 * 2**20
    """Request bodies held in memory at a time, in bytes (429)."""

    def __post_init__(self) -> None:
        _check_positive(self)

    @property
    def decode(self) -> DecodeLimits:
        """What the decoder refuses."""
        return DecodeLimits(max_bytes=self.body_bytes, max_pixels=self.pixels)


@dataclass(frozen=True, kw_only=True, slots=True)
class ConnectionLimits:
    """Beyond these a connection is closed, before anything of it reaches the application."""

    header_bytes: int = 32 * 2**10
    """Largest request line and headers together, in bytes (431)."""
    header_s: float = 10.0
    """Time in which a connection must have sent the headers of its first request, in seconds."""
    idle_s: int = 30
    """Time between an answer and the next request on the same connection, in seconds."""
    connections: int = 2048
    """Connections at a time; one more is closed at once."""

    def __post_init__(self) -> None:
        _check_positive(self)


def _check_positive(limits: ServiceLimits | ConnectionLimits) -> None:
    for field in fields(limits):
        value = getattr(limits, field.name)
        if not value > 0:
            raise ConfigError(f"{field.name} must be positive, got {value}.")
