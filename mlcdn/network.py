"""The whole network on this machine: parts, topics, keys, origin, streams, router, edges, under one supervisor.

    DIR/network.json            written when all is ready, removed when it stops: what everything else reads
    DIR/keys/  DIR/logs/        signing keys and roots; each process's output
    DIR/nodes/NODE/             an edge node's own directory: board, artifacts, disk cache
    DIR/router/ DIR/origin/ DIR/streams/

Laws: nothing here is known to the processes but their settings, as ``MLCDN_*`` variables; ports are chosen once and stay;
when the parent dies, however it dies, every child is gone with it.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from mlcdn.identities import Identities, grant_first, key_files
from mlcdn.local_stack.stack import StackAddresses, start_stack
from mlcdn.places import place
from processes.ports import free_ports
from processes.supervisor import Child, Supervisor
from schemas import names
from schemas.errors import BadInput
from streams.log.admin import TopicAdmin

Progress = Callable[[str], None]
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkPlan:
    """What to start. `locations` adds to the table of places: region name to degrees north and east."""

    directory: Path
    regions: Sequence[str] = ("tokyo", "london", "virginia")
    nodes: int = 1
    workers: int = 1
    locations: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    kafka_port: int | None = None
    router_port: int | None = None

    def __post_init__(self) -> None:
        for region in self.regions:
            names.name(region, "region")
            place(region, self.locations)
        if not self.regions or len(set(self.regions)) != len(self.regions):
            raise BadInput("a network has at least one region, each named once")
        names.within(self.nodes, 1, 64, "nodes")
        names.within(self.workers, 1, 64, "workers")

    def node_names(self) -> list[tuple[str, str]]:
        return [(region, f"{region}-{i}") for region in self.regions for i in range(1, self.nodes + 1)]


class Network:
    """A running network. `document` is what network.json says."""

    def __init__(self, plan: NetworkPlan, supervisor: Supervisor, progress: Progress) -> None:
        self._plan, self._supervisor, self._progress = plan, supervisor, progress
        self._directory = plan.directory.resolve()
        self.document: dict[str, Any] = {}
        # What our processes need, and outlasts them: their last words are to the log.
        self._parts: tuple[str, ...] = ()

    async def start(self) -> None:
        """1. parts, 2. topics, 3. trust and our processes, in parallel, 4. the document, last."""
        began = time.monotonic()
        (self._directory / "logs").mkdir(parents=True, exist_ok=True)
        self._path().unlink(missing_ok=True)
        addresses = await start_stack(
            self._supervisor,
            self._directory / "stack",
            self._plan.regions,
            self._progress,
            kafka_port=self._plan.kafka_port,
        )
        self._parts = tuple(sorted(self._supervisor.names()))
        identities = key_files(self._directory / "keys")
        for line in await asyncio.to_thread(TopicAdmin(addresses.kafka).apply):
            self._progress(line)
        token = self._admin_token()
        origin, admin, router = free_ports(3)
        router = self._plan.router_port or router
        edges = {
            node: (region, port)
            for (region, node), port in zip(
                self._plan.node_names(), free_ports(len(self._plan.node_names())), strict=True
            )
        }
        shared = self._shared(addresses, identities)
        children = [
            self._child("origin", "origin.main", origin, shared | {
                "MLCDN_ADMIN_PORT": str(admin),
                "MLCDN_ADMIN_TOKEN": token,
                "MLCDN_SIGNING_KEY": str(identities.origin),
                "MLCDN_AUTHOR": "origin",
            }),
            self._child("streams", "streams.main", None, shared | {"MLCDN_SIGNING_KEY": str(identities.jobs)}),
            self._child("router", "router.main", router, shared),
            *(
                self._child(node, "edge_node.main", port, shared | self._edge(addresses, region, node, origin))
                for node, (region, port) in edges.items()
            ),
        ]  # fmt: skip
        self._progress("starting origin, streams, router and edges")
        # A new producer's first append takes half a second, which the processes need to start anyway.
        first_trust = grant_first(identities, addresses.kafka)
        await asyncio.gather(first_trust, *(self._supervisor.add(child) for child in children))
        self._describe(addresses, identities, token, origin, admin, router, edges)
        self._write()
        self._progress(f"ready in {time.monotonic() - began:.1f} s")

    async def run_until(self, stop: asyncio.Event) -> None:
        """Watches until `stop`; keeps the document's pids true; removes the document at the end."""
        refresh = asyncio.create_task(self._refresh())
        try:
            await self._supervisor.run_until(stop)
        finally:
            refresh.cancel()
            self._path().unlink(missing_ok=True)

    async def _refresh(self) -> None:
        while True:
            await asyncio.sleep(0.5)
            before = json.dumps(self.document, sort_keys=True)
            self._fill_pids()
            if json.dumps(self.document, sort_keys=True) != before:
                self._write()

    def _path(self) -> Path:
        return self._directory / "network.json"

    def _write(self) -> None:
        """Owner-only and whole: it holds the admin token."""
        temporary = self._path().with_suffix(".tmp")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(self.document, file, indent=1)
        temporary.replace(self._path())

    def _admin_token(self) -> str:
        path = self._directory / "keys" / "admin-token"
        if not path.exists():
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_urlsafe(32))
        return path.read_text()

    def _shared(self, addresses: StackAddresses, identities: Identities) -> dict[str, str]:
        return {
            "MLCDN_KAFKA": addresses.kafka,
            "MLCDN_S3_ENDPOINT": addresses.s3_endpoint,
            "MLCDN_S3_BUCKET": addresses.s3_bucket,
            "MLCDN_S3_ACCESS_KEY": addresses.s3_access_key,
            "MLCDN_S3_SECRET_KEY": addresses.s3_secret_key,
            "MLCDN_ROOT_KEYS": str(identities.roots),
        }

    def _edge(self, addresses: StackAddresses, region: str, node: str, origin: int) -> dict[str, str]:
        lat, lon = place(region, self._plan.locations)
        return {
            "MLCDN_REGION": region,
            "MLCDN_NODE": node,
            "MLCDN_LAT": str(lat),
            "MLCDN_LON": str(lon),
            "MLCDN_WORKERS": str(self._plan.workers),
            "MLCDN_REDIS_URL": addresses.redis[region],
            "MLCDN_ORIGIN_URL": f"http://{LOOPBACK}:{origin}",
        }

    def _child(self, name: str, module: str, port: int | None, env: Mapping[str, str]) -> Child:
        directory = self._directory / ("nodes" if module == "edge_node.main" else "") / name
        directory.mkdir(parents=True, exist_ok=True)
        own = {"MLCDN_NODE": name} | dict(env) | {"MLCDN_DIR": str(directory)}
        if port is not None:
            own |= {"MLCDN_PORT": str(port), "MLCDN_URL": f"http://{LOOPBACK}:{port}"}
        path = "/v2/health/ready" if module == "edge_node.main" else "/health"
        return Child(
            name=name,
            argv=(sys.executable, "-m", module),
            env=own,
            after=self._parts,
            ready=_answers(f"http://{LOOPBACK}:{port}{path}") if port is not None else None,
            ready_timeout_s=60,
            stop_timeout_s=15,
            max_restarts=20,
            log=self._directory / "logs" / f"{name}.log",
        )

    def _describe(
        self,
        addresses: StackAddresses,
        identities: Identities,
        token: str,
        origin: int,
        admin: int,
        router: int,
        edges: Mapping[str, tuple[str, int]],
    ) -> None:
        regions: dict[str, Any] = {}
        for region in self._plan.regions:
            lat, lon = place(region, self._plan.locations)
            regions[region] = {"redis": addresses.redis[region], "location": {"lat": lat, "lon": lon}, "nodes": []}
        for node, (region, port) in edges.items():
            url = f"http://{LOOPBACK}:{port}"
            directory = str(self._directory / "nodes" / node)
            regions[region]["nodes"].append(
                {"node": node, "url": url, "metrics": f"{url}/metrics", "dir": directory, "pids": {}},
            )
        self.document = {
            "kafka": addresses.kafka,
            "s3": {
                "endpoint": addresses.s3_endpoint,
                "bucket": addresses.s3_bucket,
                "access_key": addresses.s3_access_key,
                "secret_key": addresses.s3_secret_key,
            },
            "origin": f"http://{LOOPBACK}:{origin}",
            "admin": {"url": f"http://{LOOPBACK}:{admin}", "token": token},
            "router": {"http": f"http://{LOOPBACK}:{router}"},
            "keys": {
                "signing": str(identities.operator),
                "trusted": str(identities.roots),
                "root": str(identities.root),
            },
            "regions": regions,
            "pids": {},
        }
        self._fill_pids()

    def _fill_pids(self) -> None:
        pids = self._supervisor.pids()
        edges = {node for _, node in self._plan.node_names()}
        self.document["pids"] = {name: pid for name, pid in pids.items() if name not in edges} | {"up": os.getpid()}
        for region in self.document["regions"].values():
            for node in region["nodes"]:
                node["pids"] = _node_pids(Path(node["dir"])) | {"edge": pids.get(node["node"])}


def _node_pids(directory: Path) -> dict[str, Any]:
    """What the node's parent wrote of its children; empty while it starts."""
    try:
        written: dict[str, Any] = json.loads((directory / "pids.json").read_text())
    except (OSError, ValueError):
        return {"agent": None, "workers": []}
    return {"agent": written.get("agent"), "workers": written.get("workers", [])}


def _answers(url: str) -> Callable[[], Awaitable[None]]:
    async def ready() -> None:
        async with httpx.AsyncClient(timeout=1, trust_env=False) as client:
            (await client.get(url)).raise_for_status()

    return ready
