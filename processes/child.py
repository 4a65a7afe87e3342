"""What the supervisor is told of a child, and what it raises when one cannot be kept."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    """One process to run. `env` is added to the parent's; `ready` returns once the child serves and raises before."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: Path | None = None
    after: tuple[str, ...] = ()
    ready: Callable[[], Awaitable[None]] | None = None
    ready_timeout_s: float = 30.0
    stop_timeout_s: float = 10.0
    restart: bool = True
    max_restarts: int = 5
    pass_fds: tuple[int, ...] = ()
    log: Path | Literal["prefix"] | None = None
    """A file to append to; "prefix": lines to our stderr behind the child's name; None: our own stdout and stderr."""


class SupervisorError(Exception):
    """SupervisorError
    ├── StartFailed   a child could not be spawned, exited before it was ready, or was not ready in time
    └── GaveUp        a child died more often than it may be restarted
    """

    def __init__(self, name: str, reason: str, lines: Sequence[str] = ()) -> None:
        super().__init__("\n    ".join([f"{name} {reason}", *lines]))
        self.name = name
        self.reason = reason
        self.lines = tuple(lines)


class StartFailed(SupervisorError):
    pass


class GaveUp(SupervisorError):
    pass
