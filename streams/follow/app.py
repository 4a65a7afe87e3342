"""The Faust app: made in a factory, a new one for each attempt to start. The only room that imports faust.

Every setting here was measured. `topic_disable_leader`, `topic_allow_declare` and `web_enabled`: Faust neither creates
topics nor opens a port. `store` and no tables: state is our own folds over the log, since a Faust table lost events at
rebalances. `stream_wait_empty=False`: a stop does not wait for a stalled stream. `consumer_group_instance_id`: a killed
process is back in its group in 2 s instead of 9. Never `exactly_once`, never a serializer that decodes: a record that
cannot be decoded must reach the handler, which dead-letters it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faust
import structlog
from mode.threads import WorkerThread

from streams.log.record import Record

log = structlog.get_logger(__name__)

# The end of a consumer waits in turn for several things: each takes a cancellation of its own.
_CANCELS = 10
_CANCEL_PAUSE_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class FollowSpec:
    """What to follow. `group` is the node's own, `instance` its static member id; `recent_ms` limits the boot read."""

    topics: tuple[str, ...]
    group: str
    instance: str
    bootstrap: str
    datadir: Path
    recent_ms: int | None = None
    security: Mapping[str, str] = field(default_factory=dict)


def build_app(spec: FollowSpec, handle: Callable[[Record], Awaitable[None]]) -> Any:
    """A Faust app that hands every record to `handle`, which must not raise."""
    app: Any = faust.App(
        spec.group,
        broker=[f"kafka://{server}" for server in spec.bootstrap.split(",")],
        key_serializer="raw",
        value_serializer="raw",
        autodiscover=False,
        web_enabled=False,
        topic_disable_leader=True,
        topic_allow_declare=False,
        store="memory://",
        datadir=str(spec.datadir / "faust"),
        table_standby_replicas=0,
        broker_session_timeout=10,
        broker_heartbeat_interval=3,
        broker_request_timeout=15,
        broker_commit_interval=1,
        stream_wait_empty=False,
        worker_redirect_stdouts=False,
        consumer_metadata_max_age_ms=30_000,
        consumer_group_instance_id=spec.instance,
        consumer_auto_offset_reset="earliest",
    )
    for topic in spec.topics:
        channel = app.topic(topic, key_type=bytes, value_type=bytes, key_serializer="raw", value_serializer="raw")

        async def follow(stream: Any) -> None:
            async for event in stream.events():
                await handle(_record(event.message))

        app.agent(channel, name=f"{spec.group}.{topic}")(follow)
    app.consumer._thread.Worker = _ConsumerThread
    return app


class _ConsumerThread(WorkerThread):
    """Faust's own is no daemon, and so keeps a process from ending for as long as the broker is away."""

    def __init__(self, service: Any, **kwargs: Any) -> None:
        super().__init__(service, **kwargs)
        self.daemon = True

    def run(self) -> None:
        # Cancelled by `dispose`: nobody is left to be told.
        with suppress(asyncio.CancelledError):
            super().run()


def alive(app: Any) -> bool:
    """What the app says of itself; True proves nothing. A topic whose actor has ended is never read again."""
    if app.should_stop or app.crashed:
        return False
    actors = [ref.actor_task for agent in app.agents.values() for ref in agent._actors]
    return not any(task is not None and task.done() for task in actors)


async def dispose(app: Any) -> None:
    """Ends what Faust leaves of an app whose start was cancelled or whose stop did not end.

    Its consumer lives in a thread with a loop of its own. Without a start nobody closes that loop; without a stop the
    thread goes on asking for a broker that is away.
    """
    consumer = app._consumer
    if consumer is None:
        return
    loop, thread = consumer._thread.thread_loop, consumer._thread._thread
    if thread is None:
        loop.close()
        return
    for _ in range(_CANCELS):
        if not thread.is_alive():
            return
        # The loop may close between the question and the call: then the thread has just ended.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(_cancel_all, loop)
        await asyncio.sleep(_CANCEL_PAUSE_S)
    log.error("consumer thread did not end", thread=thread.name)


def _cancel_all(loop: asyncio.AbstractEventLoop) -> None:
    for task in asyncio.all_tasks(loop):
        task.cancel()


def _record(message: Any) -> Record:
    headers = message.headers or ()
    pairs = headers.items() if isinstance(headers, Mapping) else headers
    return Record(
        topic=message.topic,
        partition=message.partition,
        offset=message.offset,
        timestamp_ms=round(message.timestamp * 1000),
        key=message.key,
        value=message.value,
        headers=tuple((name, value) for name, value in pairs),
    )
