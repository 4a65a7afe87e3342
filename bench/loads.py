"""What servers are asked: the same rows of 32 floats, in the form each of them speaks, in a few orders.

    cached    64 bodies again and again
    zipf      100,000 bodies by Zipf(1.0): some repeat all the time, most hardly ever
    fresh id  the 64 bodies, a new `id` in each request: the same question, never the same bytes
    unique    no row twice, so that no cache can answer
    one       unique, by one client that waits for its answer

Everything is written to files that `bench/load.lua` reads. It must not know servers or clocks.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

COUNT: Final = "\1"
CLIENTS: Final = 32
FEATURES: Final = 32


@dataclass(frozen=True, slots=True)
class Load:
    name: str
    clients: int
    rows: int
    cacheable: bool
    warm_s: float
    zipf: bool = False


LOADS: Final = {
    load.name: load
    for load in (
        Load("cached", CLIENTS, 64, cacheable=True, warm_s=1),
        Load("zipf", CLIENTS, 100_000, cacheable=True, warm_s=3, zipf=True),
        Load("fresh id", CLIENTS, 64, cacheable=True, warm_s=1),
        Load("unique", CLIENTS, 64, cacheable=False, warm_s=1),
        Load("one", 1, 64, cacheable=False, warm_s=0.5),
    )
}


@dataclass(frozen=True, slots=True)
class Written:
    """A load in one form, on disk."""

    load: Load
    bodies: Path
    order: Path | None

    def sample(self, number: int) -> Iterator[bytes]:
        """Bodies as wrk would send them, with counts that wrk does not reach, for a look at single answers."""
        chosen = random.Random()
        lines = self.bodies.read_text().splitlines()
        order = [int(n) - 1 for n in self.order.read_text().split()] if self.order else list(range(len(lines)))
        for _ in range(number):
            count = f"1{chosen.randrange(10**6):06d}, 1999999, 1{chosen.randrange(10**6):06d}"
            yield lines[chosen.choice(order)].replace(COUNT, count).encode()


class Bodies:
    """Writes each load once for each form: `oip`, `features` (one flat row) or `rows` (a list of rows)."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._written: dict[tuple[str, str], Written] = {}
        rng = np.random.default_rng(0)
        self._rows = rng.standard_normal((max(load.rows for load in LOADS.values()), FEATURES)).round(4).tolist()
        rank = np.arange(1, len(self._rows) + 1)
        self._order = rng.choice(rank, size=1_000_000, p=(1 / rank) / (1 / rank).sum())

    def written(self, load: Load, form: str) -> Written:
        key = (load.name, form)
        if key not in self._written:
            name = f"{load.name.replace(' ', '-')}-{form}"
            bodies, order = self._directory / f"{name}.bodies", None
            bodies.write_text("".join(f"{_body(load, form, row)}\n" for row in self._rows[: load.rows]))
            if load.zipf:
                order = self._directory / f"{name}.order"
                order.write_text("\n".join(map(str, self._order)))
            self._written[key] = Written(load, bodies, order)
        return self._written[key]


class Mixed:
    """Body of the nth request of an open loop: every other one of 64 that repeat (or always), the others new."""

    def __init__(self, repeat: int = 64, *, new: bool = True) -> None:
        rng = np.random.default_rng(1)
        rows = rng.standard_normal((repeat, FEATURES)).round(4).tolist()
        self._new = new
        self._bodies = [plain("oip", row) for row in rows]
        parts = [_body(LOADS["unique"], "oip", row).encode().split(COUNT.encode()) for row in rows]
        self._parts = [(head, tail) for head, tail in parts]
        self._base = random.Random().randrange(10**6)

    def __call__(self, number: int) -> bytes:
        if not self._new or number % 2 == 0:
            return self._bodies[number // (1 + self._new) % len(self._bodies)]
        head, tail = self._parts[number // 2 % len(self._parts)]
        return head + b"1%06d, 1%06d, 1%06d" % (number % 10**6, number // 10**6, self._base) + tail


def plain(form: str, row: list[float]) -> bytes:
    """One body without a count."""
    return _document(form, row).encode()


def _body(load: Load, form: str, row: list[float]) -> str:
    if not load.cacheable:
        mark = "123456.25, 123456.25, 123456.25"
        return _document(form, [123456.25] * 3 + row[3:]).replace(mark, COUNT, 1)
    text = _document(form, row)
    if load.name == "fresh id":
        return f'{{"id": "{COUNT}", {text.removeprefix("{")}'
    return text


def _document(form: str, row: list[float]) -> str:
    if form == "oip":
        tensor = {"name": "features", "shape": [1, FEATURES], "datatype": "FP32", "data": row}
        return json.dumps({"inputs": [tensor]})
    return json.dumps({"features": row if form == "features" else [row]})
