"""The ratios that say whether an edge is as fast as it set out to be. PURE: figures in, lines out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Figures:
    rps: float
    p50_ms: float
    p99_ms: float
    cpu_us: float


@dataclass(frozen=True, slots=True)
class Reach:
    """One figure of ours over one of a peer's; `least` and `most` bound it where there is a bound."""

    ours: str
    peer: str
    load: str
    of: Callable[[Figures], float]
    unit: str
    least: float | None = None
    most: float | None = None

    def line(self, table: Mapping[tuple[str, str], Figures]) -> str | None:
        ours, peer = table.get((self.ours, self.load)), table.get((self.peer, self.load))
        if ours is None or peer is None:
            return None
        ratio = self.of(ours) / max(self.of(peer), 1e-9)
        said = f"{self.load} {self.unit}: {self.ours} / {self.peer} {ratio:.3f}"
        return f"{said}{_verdict(ratio, self.least, self.most)}"


def _rps(figures: Figures) -> float:
    return figures.rps


def _cpu(figures: Figures) -> float:
    return figures.cpu_us


def _p50(figures: Figures) -> float:
    return figures.p50_ms


def _p99(figures: Figures) -> float:
    return figures.p99_ms


REACHES: Final = (
    Reach("mlcdn", "nginx", "cached", _rps, "rps", least=0.9),
    # Where wrk is the limit, the server's own cost still tells.
    Reach("mlcdn", "nginx", "cached", _cpu, "CPU a request"),
    Reach("mlcdn", "triton", "cached", _rps, "rps", least=5),
    Reach("mlcdn", "triton", "zipf", _rps, "rps"),
    Reach("mlcdn", "triton", "fresh id", _rps, "rps"),
    *(
        reach
        for mosec in ("mosec", "mosec oip")
        for reach in (
            Reach("mlcdn", mosec, "unique", _rps, "rps", least=3),
            Reach("mlcdn", mosec, "unique", _p99, "p99", most=0.5),
            Reach("mlcdn Starlette", mosec, "unique", _rps, "rps", least=0.9),
            Reach("mlcdn", mosec, "one", _p50, "p50"),
        )
    ),
    Reach("mlcdn", "mlserver", "unique", _rps, "rps", least=20),
    Reach("mlcdn", "triton", "unique", _rps, "rps"),
    Reach("mlcdn", "litserve", "unique", _rps, "rps"),
    Reach("mlcdn", "bentoml", "unique", _rps, "rps"),
)
ONE_P50_MS: Final = 0.15


def lines(table: Mapping[tuple[str, str], Figures]) -> Iterator[str]:
    """A line for every ratio whose two sides were measured."""
    for reach in REACHES:
        if line := reach.line(table):
            yield f"ratio: {line}"
    if one := table.get(("mlcdn", "one")):
        yield f"one client, a miss: p50 {one.p50_ms:.3f} ms{_verdict(one.p50_ms, None, ONE_P50_MS)}"


def _verdict(value: float, least: float | None, most: float | None) -> str:
    if least is not None:
        return f" (reach ≥ {least:g}: {'met' if value >= least else 'not met'})"
    if most is not None:
        return f" (reach ≤ {most:g}: {'met' if value <= most else 'not met'})"
    return ""
