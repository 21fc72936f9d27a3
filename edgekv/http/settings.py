"""What the endpoint needs to know. Runs in: anywhere; owns: nothing (frozen data)."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key that opens the endpoint. `priority`: lower runs first (as in `SequenceSpec`)."""

    name: str
    key: str = field(repr=False)
    priority: int = 0


@dataclass(frozen=True, slots=True)
class HttpSettings:
    """Where to listen, whom to let in, and the bounds on what one client may take.

    Times are in seconds. `allowed_hosts` are names (without port) that a Host header may carry beside loopback names
    and `host` itself; `allowed_origins` are whole origins such as "https://notes.example"; "*" in either allows all.
    """

    host: str = "127.0.0.1"
    port: int = 8181
    api_keys: tuple[ApiKey, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    default_priority: int = 0
    max_body_bytes: int = 8 * 1024 * 1024
    max_header_bytes: int = 32 * 1024
    max_headers: int = 100
    max_connections: int = 1024
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    keep_alive_s: float = 75.0
    stall_s: float = 30.0
    grace_s: float = 10.0
    backlog: int = 512
