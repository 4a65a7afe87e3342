"""Replay rate: a log of releases and invalidations folded again, signatures and all, in memory."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mlcdn.demo.command import Mlcdn
from schemas.events import CacheInvalidated, Grant, TrustChanged
from schemas.names import Scope, ScopeKind
from schemas.topics import INVALIDATIONS
from streams.audit.control import fold_invalidations
from streams.log.local import LocalLog
from streams.log.writer import Writer, wall_clock_ms

EVENTS = 20_000


def run(mlcdn: Mlcdn, work: Path) -> int:
    root, operator = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    log = LocalLog(wall_clock_ms)
    asyncio.run(_fill(log, root, operator))
    began = time.perf_counter()
    state, _ = fold_invalidations(log, (root.public_key().public_bytes_raw(),), None)
    took = time.perf_counter() - began
    print(
        f"{EVENTS} signed invalidations folded in {took:.2f} s: {EVENTS / took:,.0f} events/s, position {state.position}"
    )
    print(f"ratio: rate / 100,000 per s {EVENTS / took / 100_000:.3f}")
    return 0


async def _fill(log: LocalLog, root: Ed25519PrivateKey, operator: Ed25519PrivateKey) -> None:
    grant = Grant(
        public_key=operator.public_key().public_bytes_raw(), label="op", models=("*",), kinds=("CacheInvalidated",)
    )
    rooted = Writer(log, source="/operators/root", signing_key=root)
    await rooted.append(TrustChanged(grants=(grant,), author="bench"), topic=INVALIDATIONS.name)
    writer = Writer(log, source="/operators/op", signing_key=operator)
    for number in range(EVENTS):
        await writer.append(CacheInvalidated(scopes=(Scope(ScopeKind.TAG, f"t{number % 1000}"),), author="bench"))
