"""``mlcdn topics apply, list, check, tail``: the catalogue against the broker, and events as they come, decoded."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import sys
from datetime import UTC, datetime
from typing import Annotated, Any

import msgspec
import typer

from mlcdn.cli import output
from mlcdn.cli.output import Json
from mlcdn.cli.target import DEFAULT_DIR, Dir, Target
from schemas import codec, signing
from schemas.errors import BadInput, EventRefused
from schemas.topics import TOPICS
from streams.audit.control import At
from streams.log.admin import TopicAdmin
from streams.log.reader import KafkaReader
from streams.log.record import Record

app = typer.Typer(help="The topics of the log: their layout, and what stands in them.", no_args_is_help=True)


@app.command(name="apply")
def apply_(directory: Dir = DEFAULT_DIR) -> None:
    """Create what is missing and set what differs; never deletes."""
    for line in TopicAdmin(Target.at(directory).settings.kafka).apply():
        output.say(line)


@app.command(name="list")
def list_(json: Json = False, directory: Dir = DEFAULT_DIR) -> None:
    """The catalogue, with each topic's high watermarks."""
    reader = Target.at(directory).reader
    rows: list[dict[str, Any]] = [
        {
            "topic": name,
            "key": topic.key,
            "partitions": topic.partitions,
            "signed": topic.signed,
            "events": sorted(topic.kinds),
            "high_watermarks": [reader.watermarks(name, p)[1] for p in range(topic.partitions)],
        }
        for name, topic in TOPICS.items()
    ]
    if json:
        output.document(rows)
    else:
        output.table(
            ("topic", "key", "partitions", "signed", "records"),
            [(r["topic"], r["key"], r["partitions"], r["signed"], sum(r["high_watermarks"])) for r in rows],
        )


@app.command()
def check(json: Json = False, directory: Dir = DEFAULT_DIR) -> None:
    """What differs from the catalogue; exit 1 if anything does."""
    drift = TopicAdmin(Target.at(directory).settings.kafka).drift()
    if json:
        output.document([str(d) for d in drift])
    else:
        for one in drift:
            output.say(str(one))
        output.progress(f"{len(drift)} differences from the catalogue")
    if drift:
        raise typer.Exit(1)


@app.command()
def tail(
    topic: Annotated[str, typer.Argument(help="Topic, with or without mlcdn. in front.")],
    start: Annotated[
        str | None, typer.Option("--from", help="Position or ISO 8601 time; default: the last 10.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as records come.")] = False,
    json: Json = False,
    directory: Dir = DEFAULT_DIR,
) -> None:
    """Records of a topic, decoded; with --json one document a line."""
    name = topic if topic in TOPICS else f"mlcdn.{topic}"
    if name not in TOPICS:
        raise BadInput(f"no topic {topic!r}; there are {', '.join(TOPICS)}")
    reader = Target.at(directory).reader
    starts = {(name, p): _start(reader, name, p, At.parse(start)) for p in range(TOPICS[name].partitions)}
    if follow:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(_follow(reader, starts, json))
        return
    records = [r for (_, partition), first in starts.items() for r in reader.read(name, partition, first)]
    for record in sorted(records, key=lambda r: (r.timestamp_ms, r.partition, r.offset)):
        _show(record, json)


async def _follow(reader: KafkaReader, starts: dict[tuple[str, int], int], json: bool) -> None:
    async for record in reader.tail(starts):
        _show(record, json)


def _start(reader: KafkaReader, topic: str, partition: int, at: At) -> int:
    low, high = reader.watermarks(topic, partition)
    if at.position is not None:
        return max(low, at.position)
    if at.timestamp_ms is not None:
        return reader.offset_at(topic, partition, at.timestamp_ms)
    return max(low, high - 10)


def _show(record: Record, json: bool) -> None:
    moment = datetime.fromtimestamp(record.timestamp_ms / 1000, UTC).isoformat(timespec="milliseconds")
    said: dict[str, Any] = {"partition": record.partition, "position": record.offset, "time": moment}
    try:
        envelope = codec.decode(record.topic, record.key, record.value, record.headers)
    except EventRefused as refused:
        value = base64.b64encode((record.value or b"")[:1024]).decode()
        said |= {"kind": None, "undecodable": str(refused), "value": value}
    else:
        said |= {
            "kind": envelope.event.kind,
            "id": envelope.id,
            "source": envelope.source,
            "cause": envelope.causation_id,
            "event": msgspec.to_builtins(envelope.event),
        }
    signer = _signer(record) if TOPICS[record.topic].signed else ""
    if signer:
        said["signer"] = signer
    if json:
        sys.stdout.write(msgspec.json.encode(said).decode() + "\n")
        sys.stdout.flush()
    else:
        body = msgspec.json.encode(said.get("event", said.get("undecodable"))).decode()
        by = f" by {signer}" if signer else ""
        output.say(f"{record.partition}/{record.offset} {moment} {said['kind']}{by} {body}")


def _signer(record: Record) -> str:
    """The key id that a record names, whoever it is; nobody has checked its signature here."""
    try:
        return signing.signer(record.headers)
    except EventRefused:
        return "nobody"
