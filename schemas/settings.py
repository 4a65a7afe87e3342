"""Every setting, typed, in one catalogue: ``MLCDN_*`` variables over a TOML file over defaults.

Laws: settings are read once, in a process's `main`; an unknown name is refused, wherever it stands; secrets never show.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from schemas.errors import SettingsInvalid

PREFIX: Final = "MLCDN_"
# Not settings of a process: what a parent tells its child, and what the command line and the tests read.
NOT_SETTINGS: Final = frozenset({"MLCDN_DIR", "MLCDN_CONFIG", "MLCDN_LISTEN_FD", "MLCDN_WORKER"})


class Settings(BaseSettings):
    """The settings of every process; each uses the ones it needs."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    log_level: str = Field("INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$", description="Least severe log line written.")

    kafka: str = Field("127.0.0.1:9092", description="Kafka bootstrap servers, host:port, comma-separated.")
    s3_endpoint: str = Field("http://127.0.0.1:8333", description="S3 endpoint URL.")
    s3_bucket: str = Field("mlcdn", description="Bucket that object keys are relative to.")
    s3_access_key: str = Field("", description="S3 access key.")
    s3_secret_key: SecretStr = Field(SecretStr(""), description="S3 secret key.")
    s3_region: str = Field("us-east-1", description="S3 region name.")
    redis_url: str = Field("", description="The region's Redis or Valkey, redis:// or rediss://; empty for none.")

    root_keys: Path = Field(
        Path("keys/roots.txt"), description="File of root public keys: the only trust outside the log."
    )
    signing_key: Path | None = Field(None, description="File of the private key that signs what this process appends.")
    author: str = Field("operator", description="Who signs, for people.")

    region: str = Field("local", description="Region of this node.")
    node: str = Field("local-1", description="Name of this node, unique in the network.")
    lat: float = Field(0.0, ge=-90, le=90, description="Where the node stands, degrees north.")
    lon: float = Field(0.0, ge=-180, le=180, description="Where the node stands, degrees east.")
    dir: Path = Field(Path(".mlcdn/node"), description="The process's own directory: board, artifacts, caches.")
    host: str = Field("127.0.0.1", description="Address that HTTP listens on.")
    port: int = Field(0, ge=0, le=65535, description="Port that HTTP listens on; 0 lets the system choose.")
    url: str = Field("", description="URL that clients reach this process by; empty: host and port.")
    tls_cert: Path | None = Field(None, description="File of the certificate chain that an edge shows; empty: HTTP.")
    tls_key: Path | None = Field(None, description="File of its private key. Both are read again when they change.")
    workers: int = Field(1, ge=1, le=256, description="Workers of an edge node.")
    capacity: float = Field(0.0, ge=0, description="Requests a second the node is built for; 0 when unknown.")
    beat_s: float = Field(1.0, gt=0, le=60, description="Seconds between a worker's beats.")
    flush_s: float = Field(0.1, gt=0, le=10, description="Seconds between a worker's request batches.")
    drain_s: float = Field(10.0, gt=0, le=600, description="Seconds a process may take to finish what is in flight.")

    origin_url: str = Field("", description="Origin that runs models placed there; empty for none.")
    admin_host: str = Field("127.0.0.1", description="Address that the admin API listens on.")
    admin_port: int = Field(0, ge=0, le=65535, description="Port that the admin API listens on.")
    admin_token: SecretStr = Field(SecretStr(""), description="Bearer token of the admin API; empty turns it off.")

    default_model: str = Field("", description="Model of /predict when the request names none and several are served.")
    max_body_bytes: int = Field(8 * 2**20, ge=1_024, description="Largest request body.")
    header_timeout_s: float = Field(10.0, gt=0, le=600, description="Seconds for a request's head to arrive.")
    body_timeout_s: float = Field(30.0, gt=0, le=3600, description="Seconds for a request's body to arrive.")
    write_timeout_s: float = Field(10.0, gt=0, le=600, description="Seconds for a client to take its answer.")
    keep_alive_s: float = Field(75.0, gt=0, le=3600, description="Seconds that an idle connection stays open.")
    max_connections: int = Field(10_000, ge=1, description="Connections of one worker; 503 above.")
    max_batch_rows: int = Field(4_096, ge=1, description="Most rows of one request.")
    run_threads: int = Field(2, ge=1, le=256, description="Threads that run models in a worker.")
    intra_op_threads: int = Field(1, ge=1, le=256, description="onnxruntime threads inside one operator.")
    inter_op_threads: int = Field(1, ge=1, le=256, description="onnxruntime threads across operators.")
    providers: tuple[str, ...] = Field(
        ("CPUExecutionProvider",), description="onnxruntime execution providers, in order."
    )

    model_memory_bytes: int = Field(
        0,
        ge=0,
        description="Memory for a worker's sessions; idle ones above it are loaded again when asked for. 0: no limit.",
    )
    gateway_sets_tenant: bool = Field(
        False, description="Believe mlcdn-tenant: a gateway before the node sets it, and lets no caller's through."
    )
    fast_lane: bool = Field(True, description="Answer usual requests below ASGI; off, all take the full path.")
    memory_cache_bytes: int = Field(64 * 2**20, ge=0, description="Size of a worker's memory tier; 0 turns it off.")
    redis_cache_bytes: int = Field(64 * 2**20, ge=0, description="maxmemory of the region's Redis tier.")
    disk_cache_bytes: int = Field(256 * 2**20, ge=0, description="Size of a node's disk tier; 0 turns it off.")
    model_disk_bytes: int = Field(
        8 * 2**30, ge=2**20, description="Disk budget of artifacts; those in use are kept anyway."
    )
    fetch_concurrency: int = Field(2, ge=1, le=32, description="Artifacts a node fetches at once.")
    fetch_deadline_s: float = Field(
        300.0, gt=0, description="Longest one attempt to fetch an artifact, and a second more for each MiB of it."
    )
    fetch_chunks: int = Field(4, ge=1, le=32, description="Chunks of one artifact that are fetched at once.")
    peers: bool = Field(True, description="Give artifacts to the region's other nodes, and ask them before the store.")
    peer_secret: SecretStr = Field(
        SecretStr(""), description="What the nodes of a region know each other by; empty: the S3 secret key."
    )
    peer_bytes_s: int = Field(128 * 2**20, ge=0, description="Most bytes a second a node gives others; 0: no limit.")
    peer_patience_s: float = Field(
        3.0, ge=0, le=600, description="Seconds without progress of a peer after which the store is asked."
    )
    fetch_bytes_s: int = Field(0, ge=0, description="Most bytes a second that a node's fetches take; 0: no limit.")

    recordings_kafka: str = Field(
        "", description="Kafka that a node's recorded requests stay in: the region's own; empty: the network's."
    )
    recordings_bytes_s: int = Field(
        65_536, ge=0, description="Most bytes a second of requests that a worker records; 0: none."
    )

    router_margin: float = Field(
        0.05, ge=0, le=1, description="Candidates within this score of the best share the load."
    )
    router_locations: Path | None = Field(
        None, description="CIDR override file: network, latitude, longitude per line."
    )
    router_default_lat: float = Field(0.0, ge=-90, le=90, description="Where a client of unknown place stands.")
    router_default_lon: float = Field(0.0, ge=-180, le=180, description="Where a client of unknown place stands.")
    probe_s: float = Field(1.0, gt=0, le=60, description="Seconds between a router's probes of a node.")
    routes_s: float = Field(2.0, gt=0, le=60, description="Longest time between two published routing tables.")
    checkpoint_s: float = Field(60.0, gt=0, le=86_400, description="Longest wait of a signed record for a checkpoint.")
    checkpoint_expires_s: float = Field(
        900.0,
        gt=0,
        le=30 * 86_400,
        description="How long a checkpoint vouches for an idle topic; renewed after a third.",
    )
    phi_suspect: float = Field(3.0, gt=0, description="Phi from which a node is suspect.")
    phi_dead: float = Field(8.0, gt=0, description="Phi from which a node is dead.")

    @property
    def shared_peer_secret(self) -> str:
        """Empty where nodes bring each other nothing."""
        secret = self.peer_secret.get_secret_value() or self.s3_secret_key.get_secret_value()
        return secret if self.peers else ""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Variables over what `load` read from the file (the init arguments)."""
        return (env_settings, init_settings)


def load(config: Path | None = None, environ: Mapping[str, str] | None = None) -> Settings:
    """Reads the settings once. `SettingsInvalid` names the setting, its source and why.

    `config` is a TOML file; by default the one that ``MLCDN_CONFIG`` names. `environ` defaults to the process's own and
    is only looked through for unknown names.
    """
    environ = os.environ if environ is None else environ
    for name in environ:
        if name.startswith(PREFIX) and name not in NOT_SETTINGS:
            _known(name.removeprefix(PREFIX).lower(), f"variable {name}")
    path = config or (Path(environ["MLCDN_CONFIG"]) if environ.get("MLCDN_CONFIG") else None)
    from_file = _file(path) if path is not None else {}
    try:
        return Settings(**from_file)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        source = f"variable {PREFIX}{name.upper()}" if f"{PREFIX}{name.upper()}" in environ else f"{path}"
        raise SettingsInvalid(f"setting {name} ({source}): {first['msg']}") from None


def source_of(name: str, config: Path | None = None) -> str:
    """Where a setting's value comes from: ``variable``, ``file`` or ``default``."""
    if f"{PREFIX}{name.upper()}" in os.environ:
        return "variable"
    return "file" if config is not None and name in _file(config) else "default"


def _file(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise SettingsInvalid(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsInvalid(f"{path}: {error}") from None
    for name in values:
        _known(name, str(path))
    return values


def _known(name: str, where: str) -> None:
    if name not in Settings.model_fields:
        near = difflib.get_close_matches(name, Settings.model_fields, 1)
        raise SettingsInvalid(f"{where}: no such setting" + (f"; did you mean {near[0]}?" if near else ""))
