"""The Faust app: made in a factory, a new one for each attempt to start. The only room that imports faust.

Every setting here was measured. `topic_disable_leader`, `topic_allow_declare` and `web_enabled`: Faust neither creates
topics nor opens a port. `store` and no tables: state is our own folds over the log, since a Faust table lost events at
rebalances. `stream_wait_empty=False`: a stop does not wait for a stalled stream. `consumer_group_instance_id`: a killed
process is back in its group in 2 s instead of 9. Never `exactly_once`, never a serializer that decodes: a record that
cannot be decoded must reach the handler, which dead-letters it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faust

from streams.log.record import Record


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
    """A Faust app that hands every record of the topics to `handle`, which must not raise."""
    app = faust.App(
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
    return app


def alive(app: Any) -> bool:
    """What the app says of itself; True proves nothing. A topic whose actor has ended is never read again."""
    if app.should_stop or app.crashed:
        return False
    actors = [ref.actor_task for agent in app.agents.values() for ref in agent._actors]
    return not any(task is not None and task.done() for task in actors)


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
