"""The audit of a log of a million events and more: records a second, and memory, of each command as a process of its own.

The log (`bench.audit_log`) stands in a Kafka of its own; the network that the other benchmarks share is not in it. CPU is
user and system time of the command, Kafka's client threads included; *rate* is records read over that, so it is what
one core does, whoever else has the machine. A record that a command does not read does not count.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.audit_log import write
from mlcdn.demo.command import Mlcdn
from mlcdn.local_stack.running import running_stack
from schemas.topics import FLEET, INVALIDATIONS, RELEASES, TOPICS
from streams.log.admin import TopicAdmin
from streams.log.reader import KafkaReader

EVENTS: Final = 1_000_000
REACH: Final = 100_000
_AUDITED: Final = (RELEASES.name, INVALIDATIONS.name, FLEET.name)


@dataclass(frozen=True, slots=True)
class Cost:
    wall_s: float
    cpu_s: float
    rss_mib: float
    digest: str


def run(mlcdn: Mlcdn | None, work: Path, events: int = EVENTS) -> int:
    with running_stack(work / "audit", ()) as stack:
        kafka = stack.addresses.kafka
        TopicAdmin(kafka).apply()
        began = time.monotonic()
        roots = write(kafka, events, work / "audit-keys")
        print(f"{events:,} events written in {time.monotonic() - began:.0f} s")
        reader = KafkaReader(kafka)
        lengths = {t.name: sum(reader.watermarks(t.name, p)[1] for p in range(t.partitions)) for t in TOPICS.values()}
        print(f"{'':<28}{'records':>12}{'wall s':>9}{'CPU s':>9}{'rate / s':>12}{'RSS MiB':>9}")
        rates = []
        environment = {**os.environ, "MLCDN_KAFKA": kafka, "MLCDN_ROOT_KEYS": str(roots)}
        for name, records, command in cases(lengths):
            cost = _measured(command, environment)
            rates.append(f"{name} {records / cost.cpu_s / REACH:.2f}")
            print(
                f"{name:<28}{records:>12,}{cost.wall_s:>9.1f}{cost.cpu_s:>9.1f}{records / cost.cpu_s:>12,.0f}"
                f"{cost.rss_mib:>9.0f}  {cost.digest[:12]}"
            )
    print(f"ratio: rate / {REACH:,} per s and core: {', '.join(rates)}")
    return 0


def cases(lengths: Mapping[str, int]) -> tuple[tuple[str, int, tuple[str, ...]], ...]:
    """What is measured: its name, how many records it reads of topics of these lengths, the command."""
    audited = sum(lengths[name] for name in _AUDITED)
    return (
        ("state", audited, ("state", "--json")),
        ("story of a model", audited, ("story", "model-3", "--json")),
        ("story of positions", audited, ("story", "20/100", "--json")),
        ("story of a report", audited, ("story", f"e-{0:031d}", "--json")),
        ("verify", audited, ("verify", "--json")),
        ("export, fleet and releases", lengths[FLEET.name] + lengths[RELEASES.name],
         ("export", "--topics", "fleet", "--topics", "releases")),
        ("export, all", sum(lengths.values()), ("export",)),
    )  # fmt: skip


def _measured(command: tuple[str, ...], environment: Mapping[str, str]) -> Cost:
    digest = hashlib.sha256()
    began = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, "-m", "mlcdn", "audit", *command], env=environment, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    while chunk := child.stdout.read(1 << 20):
        digest.update(chunk)
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    child.stdout.close()
    if child.returncode:
        raise RuntimeError(f"mlcdn audit {' '.join(command)}: exit code {child.returncode}")
    wall_s, cpu_s = time.monotonic() - began, used.ru_utime + used.ru_stime
    return Cost(wall_s, cpu_s, used.ru_maxrss / 1024, digest.hexdigest())
