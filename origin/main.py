"""The origin's process: the composition root."""

from __future__ import annotations

import asyncio
import dataclasses
import sys

import structlog
import uvicorn
from starlette.applications import Starlette

from inference.onnx_model import SessionSettings
from origin import routes
from origin.admin import UPLOAD_S, Admin
from origin.hosting import Hosting
from origin.invalidate import Invalidator
from origin.publish import Publisher
from processes import logs
from processes.http_connection import GuardedProtocol
from processes.http_limits import Limits, limits_of
from processes.http_server import Server, serve_until
from processes.ports import PortBusy, listen
from processes.signals import stop_on_signals
from schemas import metrics, settings
from schemas.errors import SettingsInvalid
from schemas.settings import Settings
from schemas.topics import RELEASES
from streams.artifacts import ArtifactStore
from streams.follow import DeadLetters, Follower, FollowSpec
from streams.log.keys import load_private, load_roots
from streams.log.producer import KafkaAppender
from streams.log.reader import KafkaReader
from streams.log.writer import Writer

log = structlog.get_logger(__name__)


def _server(app: Starlette, given: Settings, limits: Limits) -> Server:
    config = uvicorn.Config(
        app,
        http=GuardedProtocol,
        ws="none",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=int(max(1, given.drain_s)),
    )
    cut = metrics.counter("mlcdn_connections_cut_total")
    return Server(config, limits, lambda reason: cut.labels(reason).inc())


def _admin(
    given: Settings, store: ArtifactStore, reader: KafkaReader, roots: tuple[bytes, ...], app: KafkaAppender
) -> Admin:
    if given.signing_key is None:
        raise SettingsInvalid("setting signing_key: the admin API signs what it appends, so it needs a private key")
    writer = Writer(app, source=f"/operators/{given.author}", signing_key=load_private(given.signing_key))
    return Admin(
        Publisher(store, writer, reader, roots),
        Invalidator(writer, reader, roots),
        reader,
        given.admin_token,
        given.author,
        given.dir / "uploads",
    )


async def serve(given: Settings) -> None:
    roots = load_roots(given.root_keys)
    reader = KafkaReader(given.kafka)
    appender = KafkaAppender(given.kafka, client_id=f"mlcdn-{given.node}")
    store = ArtifactStore(
        given.s3_endpoint,
        given.s3_bucket,
        given.s3_access_key,
        given.s3_secret_key.get_secret_value(),
        given.s3_region,
    )
    session = SessionSettings(intra_op_threads=given.intra_op_threads, inter_op_threads=given.inter_op_threads)
    hosting = Hosting(store, given.dir, roots, session, given.run_threads)
    follower = Follower(
        FollowSpec(
            topics=(RELEASES.name,),
            group=f"mlcdn-origin-{given.node}",
            instance=f"mlcdn-origin-{given.node}-0",
            bootstrap=given.kafka,
            datadir=given.dir,
        ),
        reader,
        hosting.on_record,
        hosting.on_caught_up,
        DeadLetters(Writer(appender, source=f"/origins/{given.node}"), node=given.node, region=given.region),
        hosting.on_recreated,
    )
    try:
        async with stop_on_signals() as stop, asyncio.TaskGroup() as group:
            socket = listen(given.host, given.port)
            log.info("origin listens", host=given.host, port=socket.getsockname()[1])
            limits = limits_of(given)
            open_port = _server(routes.app(hosting, given.max_body_bytes), given, limits)
            group.create_task(serve_until(open_port, [socket], stop))
            if given.admin_token.get_secret_value():
                admin = _admin(given, store, reader, roots, appender)
                listening = listen(given.admin_host, given.admin_port)
                patient = dataclasses.replace(limits, body_timeout_s=max(UPLOAD_S, limits.body_timeout_s))
                group.create_task(serve_until(_server(admin.app(), given, patient), [listening], stop))
            group.create_task(follower.run(stop))
            group.create_task(hosting.reconcile_until(stop))
    finally:
        await appender.close()


def main() -> int:
    try:
        given = settings.load()
        logs.configure(given.log_level)
        asyncio.run(serve(given))
    except* (SettingsInvalid, PortBusy) as wrong:
        for error in wrong.exceptions:
            sys.stderr.write(f"origin: {error}\n")
        return_code = 2
    else:
        return_code = 0
    return return_code


if __name__ == "__main__":
    sys.exit(main())
