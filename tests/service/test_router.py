"""The router as a process would run it: a real log port, real HTTP in front, real HTTP nodes behind."""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
import msgspec
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from processes.ports import listen
from router.choose import ChoicePolicy
from router.geo import Place, parse_locations
from router.http import Doors, build
from router.main import run, serve
from router.probe import Prober, probe
from router.table import Table, follow
from schemas.errors import Unreachable
from schemas.events import Event, Health, Location, NodeBeat, RoutedModel, RoutedNode, RoutesPublished, ServedModel
from schemas.settings import Settings
from schemas.topics import FLEET, ROUTES
from streams.folds.routes import Policy
from streams.jobs.broker_clock import BrokerClock
from streams.jobs.routing import RoutingJob, last_table
from streams.log.local import LocalLog
from streams.log.writer import Writer

PLACES = {"london-1": (51.51, -0.13), "tokyo-1": (35.68, 139.69), "virginia-1": (38.95, -77.45)}
IN_LONDON = {"model": "digits", "lat": "51.5", "lon": "-0.1"}


T = TypeVar("T")


async def eventually(look: Callable[[], T | None]) -> T:
    """What `look` finds, once it finds something."""
    async with asyncio.timeout(5):
        while True:
            if found := look():
                return found
            await asyncio.sleep(0.01)


def wall_ms() -> int:
    return time.time_ns() // 1_000_000


class Edge:
    """A small HTTP node. `stop` closes its port, `well` False makes its health 503, `delay_s` slows it."""

    def __init__(self, name: str) -> None:
        self.name, self.well, self.delay_s = name, True, 0.0
        self.listener: socket.socket = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self._stop = asyncio.Event()
        routes = [Route("/health", self._health), Route("/{path:path}", self._echo, methods=["POST", "PUT"])]
        self._task = asyncio.create_task(serve(Starlette(routes=routes), self.listener, 1.0, self._stop))

    async def stop(self) -> None:
        self._stop.set()
        await self._task

    async def _health(self, _: Request) -> JSONResponse:
        await asyncio.sleep(self.delay_s)
        return JSONResponse({}, 200 if self.well else 503)

    async def _echo(self, request: Request) -> JSONResponse:
        body = (await request.body()).decode()
        return JSONResponse({"node": self.name, "method": request.method, "url": str(request.url), "body": body})

    def routed(self, **other: Any) -> RoutedNode:
        lat, lon = PLACES[self.name]
        return RoutedNode(
            **{
                "node": self.name,
                "region": self.name.rpartition("-")[0],
                "url": self.url,
                "location": Location(lat=lat, lon=lon),
                "health": Health.ALIVE,
                "phi": 0.1,
                "load": 0.0,
                "hit_rate": 0.0,
                "error_rate": 0.0,
                "window_requests": 0,
                "rate": 0.0,
                "p50_ms": 1.0,
                "p99_ms": 2.0,
                "in_flight": 0,
                "models": (RoutedModel(name="digits", version="1", digest="ab" * 32),),
            }
            | other
        )


class Network:
    """Three nodes, a log in memory, and a router that probes every 0.1 s."""

    def __init__(self, directory: Path) -> None:
        self.log = LocalLog(wall_ms)
        self.writer = Writer(self.log, source="/streams/test")
        self.edges = {name: Edge(name) for name in PLACES}
        self.table = Table(directory / "table.json")
        self.number = 0
        self.client: httpx.AsyncClient

    async def publish(self, term: int = 1, number: int | None = None, **health: Health) -> None:
        self.number = self.number + 1 if number is None else number
        nodes = tuple(
            edge.routed(health=health.get(name.replace("-", "_"), Health.ALIVE)) for name, edge in self.edges.items()
        )
        await self.writer.append(RoutesPublished(term=term, number=self.number, derived_at_ms=wall_ms(), nodes=nodes))

    async def route(self, **asked: str) -> dict[str, Any]:
        answer = await self.client.get("/route", params=asked or IN_LONDON)
        document: dict[str, Any] = answer.json()
        return document | {"status": answer.status_code}

    async def until(self, true: Callable[[dict[str, Any]], bool], **asked: str) -> dict[str, Any]:
        async with asyncio.timeout(5):
            while True:
                if true(document := await self.route(**asked)):
                    return document
                await asyncio.sleep(0.02)


@asynccontextmanager
async def network(directory: Path) -> AsyncIterator[Network]:
    net, stop = Network(directory), asyncio.Event()
    net.table.load()
    listener = listen("127.0.0.1", 0)
    base = f"http://127.0.0.1:{listener.getsockname()[1]}"
    locations = parse_locations("127.0.0.0/8, 35.7, 139.7\n", Place(lat=38.9, lon=-77.4, source="default"))
    async with httpx.AsyncClient(trust_env=False) as http, httpx.AsyncClient(trust_env=False, base_url=base) as client:
        net.client = client
        prober = Prober(lambda: net.table.nodes, http)
        app = build(Doors(net.table, prober, locations, ChoicePolicy(), random.Random(1).randrange))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(follow(net.log, net.table, stop))
            tasks.create_task(prober.run(0.1, stop))
            tasks.create_task(serve(app, listener, 1.0, stop))
            try:
                yield net
            finally:
                stop.set()
                await asyncio.gather(*(edge.stop() for edge in net.edges.values()))


def played(directory: Path, story: Callable[[Network], Awaitable[None]]) -> None:
    async def play() -> None:
        async with network(directory) as net:
            await story(net)

    asyncio.run(play())


def edges(document: dict[str, Any]) -> list[str]:
    return [edge["node"] for edge in document["edges"]]


def test_ranked_with_every_term_and_redirected_with_method_and_body(tmp_path: Path) -> None:
    async def story(net: Network) -> None:
        assert (await net.client.get("/health")).status_code == 503
        assert (await net.route())["status"] == 503
        assert (await net.client.post("/predict", content=b"x")).headers["retry-after"] == "1"
        await net.publish()
        document = await net.until(lambda d: d["status"] == 200)
        first = document["edges"][0]
        assert first["node"] == "london-1"
        assert set(first["terms"]) == {"distance", "load", "hit_rate"}
        assert first["score"] == pytest.approx(sum(first["terms"].values()))
        assert document["table"]["age_s"] < 5
        health = await net.client.get("/health")
        assert (health.status_code, health.json()["status"]) == (200, "ok")

        # The client is on the loopback, which the location file puts in Tokyo.
        target = "/v2/models/digits/versions/1/infer?a=%2Fb&c=d%20e"
        answer = await net.client.post(target, content=b"12345", follow_redirects=True)
        said = answer.json()
        assert (said["node"], said["method"], said["body"]) == ("tokyo-1", "POST", "12345")
        assert said["url"] == net.edges["tokyo-1"].url + target
        answer = await net.client.put("/predict", content=b"1")
        assert (answer.status_code, answer.headers["mlcdn-node"]) == (307, "tokyo-1")
        metrics = (await net.client.get("/metrics")).text
        assert 'mlcdn_router_table_nodes{health="alive"} 3.0' in metrics

    played(tmp_path, story)


def test_a_dead_node_is_out_once_both_observers_say_so_and_back_when_they_do(tmp_path: Path) -> None:
    async def story(net: Network) -> None:
        await net.publish()
        await net.until(lambda d: d["status"] == 200 and edges(d)[0] == "london-1")
        await net.edges["london-1"].stop()
        doubted = await net.until(lambda d: edges(d)[-1] == "london-1")
        assert doubted["edges"][-1]["doubts"] == ["probe: ConnectError"]
        await net.publish(london_1=Health.DEAD)
        out = await net.until(lambda d: "london-1" not in edges(d))
        assert [left["node"] for left in out["out"]] == ["london-1"]
        assert "ConnectError" in out["out"][0]["why"]
        assert "beats: dead" in out["out"][0]["why"]
        assert not out["panic"]
        net.edges["london-1"] = Edge("london-1")
        await net.publish()
        await net.until(lambda d: edges(d)[0] == "london-1")

    played(tmp_path, story)


def test_panic_lists_the_dead_behind_the_living(tmp_path: Path) -> None:
    async def story(net: Network) -> None:
        await net.publish()
        await net.until(lambda d: d["status"] == 200)
        for name in ("london-1", "virginia-1"):
            net.edges[name].well = False
        await net.publish(london_1=Health.DEAD, virginia_1=Health.SUSPECT)
        document = await net.until(lambda d: d["panic"])
        assert edges(document)[0] == "tokyo-1"
        assert sorted(edges(document)) == sorted(PLACES)

    played(tmp_path, story)


@pytest.mark.parametrize(
    "asked",
    [
        {"lat": "x", "lon": "1"},
        {"lat": "nan", "lon": "1"},
        {"lat": "1"},
        {"lat": "91", "lon": "0"},
        {"ip": "1.2.3"},
        {"model": "../etc"},
    ],
)
def test_what_cannot_be_asked_is_a_400(tmp_path: Path, asked: dict[str, str]) -> None:
    async def story(net: Network) -> None:
        await net.publish()
        answer = await net.route(**asked)
        assert answer["status"] == 400
        assert answer["error"]

    played(tmp_path, story)


def test_unknown_addresses_stand_at_the_default_and_a_forged_one_harms_nothing(tmp_path: Path) -> None:
    async def story(net: Network) -> None:
        await net.publish()
        for address in ("192.168.1.1", "2001:db8::1", "::1"):
            document = await net.until(lambda d: d["status"] == 200, ip=address)
            assert document["place"]["source"] == "default"
            assert edges(document)[0] == "virginia-1"
        for forged in ("999.999", "nobody", "\u00e9"):
            answer = await net.client.post("/predict", headers={"x-forwarded-for": forged.encode()})
            assert answer.status_code == 307

    played(tmp_path, story)


def test_a_replaced_job_is_not_heard_and_a_topic_made_again_is(tmp_path: Path) -> None:
    async def story(net: Network) -> None:
        await net.publish(term=4, number=9)
        await net.until(lambda d: d["status"] == 200)
        await net.publish(term=3, number=10, london_1=Health.LEFT)
        await net.publish(term=4, number=9, london_1=Health.LEFT)
        net.log.append_raw(ROUTES.name, b"global", b"junk")
        await net.publish(term=4, number=11, tokyo_1=Health.LEFT)
        document = await net.until(lambda d: d["table"]["number"] == 11)
        assert "london-1" in edges(document)
        assert "tokyo-1" not in edges(document)
        net.table.of_topic("another")
        await net.publish(term=1, number=1)
        await net.until(lambda d: d["table"]["term"] == 1)

    played(tmp_path, story)


def test_it_starts_from_its_saved_table_without_the_log(tmp_path: Path) -> None:
    async def first(net: Network) -> None:
        await net.publish(term=7)
        await net.until(lambda d: d["status"] == 200)

    played(tmp_path, first)
    later = Table(tmp_path / "table.json", wall_ms=lambda: wall_ms() + 60_000)
    later.load()
    assert {node.node for node in later.nodes} == set(PLACES)
    assert 60 <= (later.age_s() or 0) < 65
    (tmp_path / "table.json").write_bytes(b'{"format":')
    torn = Table(tmp_path / "table.json")
    torn.load()
    assert torn.age_s() is None


class GoneLog(LocalLog):
    def topic_id(self, topic: str) -> str:
        raise Unreachable("Kafka", "nowhere")


def test_the_whole_process_serves_while_the_log_is_away(tmp_path: Path) -> None:
    async def play() -> None:
        edge, stop = Edge("london-1"), asyncio.Event()
        log = LocalLog(wall_ms)
        table = Table(tmp_path / "table.json")
        published = RoutesPublished(term=1, number=1, derived_at_ms=1, nodes=(edge.routed(),))
        await Writer(log, source="/t").append(published)
        reading = asyncio.create_task(follow(log, table, stop))
        await eventually(lambda: table.nodes)
        stop.set()
        await reading
        for _ in range(5):
            port = listen("127.0.0.1", 0)
            number = port.getsockname()[1]
            port.close()
            settings = Settings(dir=tmp_path, port=number, probe_s=0.1)
            stop = asyncio.Event()
            running = asyncio.create_task(run(settings, GoneLog(wall_ms), stop))
            async with httpx.AsyncClient(trust_env=False, base_url=f"http://127.0.0.1:{number}") as client:
                for _ in range(200):
                    await asyncio.sleep(0.02)
                    if running.done():
                        break
                    try:
                        answer = await client.get("/route")
                    except httpx.ConnectError:
                        continue
                    assert edges(answer.json()) == ["london-1"]
                    health = (await client.get("/health")).json()
                    assert "the log is not read" in health["degraded"]
                    break
            stop.set()
            done = await asyncio.gather(running, return_exceptions=True)
            if done == [None]:
                break
        else:
            raise AssertionError(f"no port could be had: {done}")
        await edge.stop()

    asyncio.run(play())


def test_probes_are_bounded_and_name_the_cause() -> None:
    async def play() -> None:
        edge = Edge("london-1")
        async with httpx.AsyncClient(trust_env=False) as http:
            assert (await probe(http, edge.url)).ok
            edge.well = False
            assert (await probe(http, edge.url)).detail == "HTTP 503"
            edge.delay_s = 1.5
            began = time.monotonic()
            assert (await probe(http, edge.url)).detail == "no answer in 1 s"
            assert time.monotonic() - began < 1.4
            await edge.stop()
            assert (await probe(http, edge.url)).detail == "ConnectError"

    asyncio.run(play())


class Job:
    """The routing job over a log in memory, with clocks that the test moves; broker time is ahead by an hour."""

    def __init__(self, log: LocalLog, clock: list[int]) -> None:
        self.log, self.clock = log, clock
        writer = Writer(log, source="/streams/test")
        self.job = RoutingJob(log, writer, Policy(settle_ms=2_000), 2.0, monotonic_ms=lambda: clock[0])
        self._read: dict[int, int] = {}

    def feed(self) -> None:
        for partition in range(FLEET.partitions):
            for record in self.log.read(FLEET.name, partition, self._read.get(partition, 0)):
                self._read[partition] = record.offset + 1
                self.job.on_record(record)

    async def tick(self) -> RoutesPublished | None:
        self.feed()
        published = await self.job.tick()
        return last_table(self.log) if published else None


def beat(name: str, number: int) -> Event:
    lat, lon = PLACES[name]
    model = ServedModel(name="digits", version="1", digest="ab" * 32, sequence=1, channel="stable", state="live")
    return NodeBeat(
        node=name,
        region=name.rpartition("-")[0],
        worker=0,
        incarnation=1,
        beat=number,
        url=f"http://{name}",
        location=Location(lat=lat, lon=lon),
        capacity=0,
        load=0,
        in_flight=0,
        queue=0,
        requests=0,
        errors=0,
        p50_ms=0,
        p99_ms=0,
        hits={},
        positions={},
        models=(model,),
        desired_digest="",
    )


def test_the_job_publishes_a_dead_node_within_three_seconds_and_its_return_after_a_while() -> None:
    async def play() -> None:
        clock = [0]
        log = LocalLog(lambda: clock[0] + 3_600_000)
        writer, job = Writer(log, source="/t"), Job(log, clock)
        health: list[tuple[int, Health]] = []
        tables = 0
        # Beats every second; London is silent from 20 to 30 s.
        for clock[0] in range(0, 40_000, 200):
            if clock[0] % 1_000 == 0:
                await writer.append(beat("tokyo-1", clock[0] // 1_000))
                if not 20_000 < clock[0] < 30_000:
                    await writer.append(beat("london-1", clock[0] // 1_000))
            if (table := await job.tick()) is not None:
                tables += 1
                now = {node.node: node.health for node in table.nodes}
                assert now["tokyo-1"] is Health.ALIVE
                if not health or health[-1][1] is not now["london-1"]:
                    health.append((clock[0], now["london-1"]))
        assert [state for _, state in health] == [
            Health.ALIVE,
            Health.SUSPECT,
            Health.DEAD,
            Health.SUSPECT,
            Health.ALIVE,
        ]
        (_, _), (suspect, _), (dead, _), (heard, _), (back, _) = health
        assert 21_500 <= suspect <= 22_000
        assert dead <= 23_000
        assert 30_000 <= heard <= 30_400
        assert 31_600 <= back <= 32_400
        assert tables <= 40_000 / 2_000 + 6

    asyncio.run(play())


def test_a_new_job_takes_a_higher_term_and_keeps_the_nodes_it_has_not_heard_of() -> None:
    async def play() -> None:
        clock = [0]
        log = LocalLog(lambda: clock[0])
        writer, first = Writer(log, source="/t"), Job(log, clock)
        stop = asyncio.Event()
        await writer.append(beat("tokyo-1", 1))
        first.feed()
        first.job.on_caught_up()
        running = asyncio.create_task(first.job.run(stop))
        table = await eventually(lambda: last_table(log))
        assert (table.term, table.number) == (1, 1)
        stop.set()
        await running

        second = RoutingJob(log, writer, Policy(), 2.0, monotonic_ms=lambda: clock[0])
        stop = asyncio.Event()
        running = asyncio.create_task(second.run(stop))
        await asyncio.sleep(0.05)
        assert last_table(log) == table, "nothing is published before the log was read to its end"
        london = await writer.append(beat("london-1", 1))
        second.on_record(london.record)
        second.on_caught_up()
        table = await eventually(lambda: now if (now := last_table(log)) and now.term > 1 else None)
        assert {node.node: node.health for node in table.nodes} == {
            "london-1": Health.ALIVE,
            "tokyo-1": Health.DEAD,
        }
        stop.set()
        await running

    asyncio.run(play())


def test_a_job_without_the_log_goes_on_when_it_is_back() -> None:
    async def play() -> None:
        clock = [0]
        log = LocalLog(lambda: clock[0])
        writer, job = Writer(log, source="/t"), Job(log, clock)
        await writer.append(beat("tokyo-1", 1))
        job.feed()
        job.job.on_caught_up()
        log.fail_next(1)
        stop = asyncio.Event()
        running = asyncio.create_task(job.job.run(stop))
        table = await eventually(lambda: last_table(log))
        assert table.number == 2
        stop.set()
        await running

    asyncio.run(play())


def test_the_brokers_clock_is_the_truest_heard_of_late() -> None:
    clock = BrokerClock()
    assert clock.now_ms(5) is None
    clock.hear(1_000, 100)
    clock.hear(1_500, 900)  # arrived 300 ms late
    assert clock.now_ms(1_000) == 1_900
    for monotonic in range(1_000, 40_000, 500):
        clock.hear(monotonic + 400, monotonic)  # set back by half a second
    assert clock.now_ms(40_000) == 40_400


def test_a_node_with_figures_out_of_range_never_becomes_a_table(tmp_path: Path) -> None:
    async def story(net: Network) -> None:
        await net.publish()
        await net.until(lambda d: d["status"] == 200)
        bad = net.edges["london-1"].routed()
        msgspec.structs.force_setattr(bad, "load", float("nan"))
        await net.writer.append(RoutesPublished(term=9, number=1, derived_at_ms=1, nodes=(bad,)))
        await net.publish(term=9, number=2)
        document = await net.until(lambda d: d["table"]["term"] == 9)
        assert document["table"]["number"] == 2

    played(tmp_path, story)
