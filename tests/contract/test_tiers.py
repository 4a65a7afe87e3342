"""Every tier keeps the same promises: memory, a real Valkey, LMDB on a real disk; and the cache over them adds its own."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_node.caching.cache import Cache
from edge_node.caching.disk_generations import GENERATIONS, Generations
from edge_node.caching.disk_tier import DiskTier
from edge_node.caching.entry import Entry, pack
from edge_node.caching.memory_tier import MemoryTier
from edge_node.caching.redis_tier import RedisTier
from edge_node.caching.tier_choice import FIRST_LOOKUPS, LookupCost
from edge_node.caching.tiers import SharedTier
from schemas.errors import Conflict
from schemas.metrics import gauge
from tests.one_valkey import one_valkey

SPACE, OTHER_SPACE = "0123456789abcdef", "fedcba9876543210"
DIGEST = "d" * 64
MEGABYTE = 2**20


def entry(number: int = 0, *, size: int = 5, **changes: Any) -> Entry:
    now = time.time_ns() // 1_000_000
    key = number.to_bytes(16, "big")
    whole: dict[str, Any] = {
        "key": key,
        "model": "digits",
        "version": "v1",
        "digest": DIGEST,
        "as_of": 7,
        "stored_at_ms": now,
        "fresh_until_ms": now + 30_000,
        "stale_until_ms": now + 40_000,
        "error_until_ms": now + 60_000,
        "tags": ("a", "b"),
        "body": os.urandom(size),
    }
    return Entry(**whole | changes)


class Memory:
    """The memory tier behind the port of the others, so that one contract holds for all."""

    name = "memory"
    answers = True

    def __init__(self, max_bytes: int) -> None:
        self.tier, self.cost = MemoryTier(max_bytes), LookupCost()

    async def get_many(self, keys: Any, digest: str, namespace: str) -> dict[bytes, Entry]:
        return {key: found for key in keys if (found := self.tier.get(key)) is not None}

    def offer(self, entry: Entry, namespace: str) -> None:
        self.tier.put(entry)

    async def probe(self) -> None:
        pass

    async def settle(self) -> None:
        pass

    async def close(self) -> None:
        pass


@asynccontextmanager
async def opened(kind: str, directory: Path) -> AsyncIterator[SharedTier]:
    if kind == "redis":
        async with one_valkey(directory) as server:
            tier: SharedTier = RedisTier(server.url)
            yield tier
            await tier.close()
        return
    tier = Memory(MEGABYTE) if kind == "memory" else DiskTier(directory / "disk", 16 * MEGABYTE)
    yield tier
    await tier.close()


Check = Callable[[SharedTier], Awaitable[None]]
tiers = pytest.mark.parametrize("kind", ["memory", "redis", "disk"])


def over(kind: str, directory: Path, check: Check) -> None:
    async def run() -> None:
        async with opened(kind, directory) as tier:
            await check(tier)

    asyncio.run(run())


async def put(tier: SharedTier, *entries: Entry, namespace: str = SPACE) -> None:
    for one in entries:
        tier.offer(one, namespace)
    await tier.settle()


async def get(tier: SharedTier, one: Entry, namespace: str = SPACE) -> Entry | None:
    return (await tier.get_many([one.key], DIGEST, namespace)).get(one.key)


@tiers
def test_a_tier_keeps_its_promises(kind: str, tmp_path: Path) -> None:
    async def check(tier: SharedTier) -> None:
        # What was put comes back whole, the rest is a miss.
        many = [entry(n, size=n * 10) for n in range(1, 200)]
        await put(tier, *many)
        found = await tier.get_many([one.key for one in many] + [bytes(16)], DIGEST, SPACE)
        assert found == {one.key: one for one in many}
        # A write never replaces an entry of a higher as_of; an equal or higher one is the newer answer.
        newer = entry(1, as_of=2**33, body=b"newer")
        await put(tier, newer)
        await put(tier, entry(1, as_of=2**33 - 1, body=b"late"), entry(1, as_of=-1, body=b"later"))
        assert await get(tier, newer) == newer
        again = entry(1, as_of=2**33, body=b"again")
        await put(tier, again)
        assert await get(tier, again) == again
        # In one batch too, whatever the order.
        await put(tier, entry(2, as_of=20, body=b"high"), entry(2, as_of=19, body=b"low"))
        held = await get(tier, entry(2))
        assert held is not None and held.body == b"high"
        # What is too large is not kept, and harms nothing.
        await put(tier, entry(3, size=20 * MEGABYTE, as_of=9))
        held = await get(tier, entry(3))
        assert held is not None and held.as_of == 7
        assert tier.answers

    over(kind, tmp_path, check)


@pytest.mark.parametrize("kind", ["redis", "disk"])
def test_another_log_or_digest_finds_nothing(kind: str, tmp_path: Path) -> None:
    async def check(tier: SharedTier) -> None:
        one = entry(1)
        await put(tier, one)
        assert await get(tier, one, OTHER_SPACE) is None
        await put(tier, msgspec.structs.replace(one, as_of=1, body=b"other log"), namespace=OTHER_SPACE)
        assert await get(tier, one) == one
        assert await tier.get_many([one.key], "e" * 64, SPACE) == {}

    over(kind, tmp_path, check)


def test_memory_is_bounded_and_a_scan_does_not_wash_it_out() -> None:
    tier = MemoryTier(200_000)
    wanted = [entry(n, size=100) for n in range(20)]
    for one in wanted:
        tier.put(one)
    for n in range(1_000, 3_000):
        tier.put(entry(n, size=100))
        if n % 50 == 0:
            for one in wanted:
                tier.get(one.key)
        assert tier.bytes <= tier.max_bytes
    assert all(tier.get(one.key) is not None for one in wanted)
    assert len(tier) > 100 and tier.get((1_000).to_bytes(16, "big")) is None
    tier.drop(wanted[0].key)
    assert tier.get(wanted[0].key) is None
    tier.clear()
    assert tier.bytes == 0 and len(tier) == 0 and not tier.put(entry(size=30_000))


FILL = """
import gc, os, sys, time
from edge_node.caching.entry import Entry, pack, unpack
from edge_node.caching.memory_tier import MemoryTier

def rss():
    with open("/proc/self/smaps_rollup") as said:
        return next(int(line.split()[1]) * 1024 for line in said if line.startswith("Rss:"))

def fill(tier, count):
    now = time.time_ns() // 1_000_000
    for number in range(count):
        one = Entry(
            key=os.urandom(16), model="digits", version="v1", digest="d" * 64, as_of=2**33 + number, stored_at_ms=now,
            fresh_until_ms=now + number, stale_until_ms=now + 2 * number, error_until_ms=now + 3 * number,
            body=os.urandom(300), tags=(f"user:{number}",) if sys.argv[1] == "tagged" else (),
        )
        # As it comes from another tier, with nothing that others have too.
        tier.put(unpack(pack(one, "space"), key=one.key, digest=one.digest, namespace="space"))

COUNT = 100_000
tier = MemoryTier(2**30)
fill(tier, 1)
tier.clear()
gc.collect()
gc.freeze()
before = rss()
fill(tier, COUNT)
grown, counted = rss() - before, tier.bytes
best = 1.0
for _ in range(5):
    began = time.perf_counter()
    gc.collect()
    best = min(best, time.perf_counter() - began)
tracked = sum(1 for one in gc.get_objects() if type(one).__module__.startswith("edge_node"))
tier.max_bytes = counted
fill(tier, COUNT)
print(len(tier) * counted // COUNT, grown, rss() - before, best, tracked)
"""


@pytest.mark.parametrize("kind", ["plain", "tagged"])
def test_memory_takes_what_it_counts_and_no_time_of_the_collector(kind: str) -> None:
    ran = subprocess.run([sys.executable, "-c", FILL, kind], capture_output=True, text=True, check=True, timeout=60)
    counted, grown, after_churn, collection_s, tracked = map(float, ran.stdout.split())
    assert 0.85 * counted < grown < 1.03 * counted
    # 100,000 further entries in the place of the first.
    assert after_churn < 1.1 * counted
    assert collection_s < 0.005 and tracked == 0


def test_one_put_evicts_in_bounded_time_though_all_were_asked_for() -> None:
    tier = MemoryTier(2**40)
    for n in range(50_000):
        tier.put(entry(n))
        tier.get(n.to_bytes(16, "big"))
    tier.max_bytes = tier.bytes
    first = next(iter(tier._places))
    tier.put(entry(50_000))
    # Only so many were sent round: the head moved on by that, not by all there are.
    assert list(tier._places).index(first) > 49_000 and next(iter(tier._places)) == (65).to_bytes(16, "big")
    assert tier.bytes <= tier.max_bytes


@pytest.mark.parametrize("kind", ["memory", "redis", "disk"])
def test_what_expired_does_not_keep_a_lower_position_out(kind: str, tmp_path: Path) -> None:
    """A node that lags its peers must still be able to refill what one of them had filled."""

    async def check(tier: SharedTier) -> None:
        soon = time.time_ns() // 1_000_000 + 150
        await put(tier, entry(1, as_of=9, fresh_until_ms=soon, stale_until_ms=soon, error_until_ms=soon))
        await put(tier, entry(1, as_of=7, body=b"too early"))
        held = await get(tier, entry(1))
        assert held is not None and held.as_of == 9
        await asyncio.sleep(0.2)
        assert kind == "memory" or await get(tier, entry(1)) is None
        lower = entry(1, as_of=7)
        await put(tier, lower)
        assert await get(tier, lower) == lower

    over(kind, tmp_path, check)


def test_the_bytes_in_memory_are_told(tmp_path: Path) -> None:
    async def check(disk: SharedTier) -> None:
        told = gauge("mlcdn_cache_bytes").labels("memory")._value
        cache = Cache(MemoryTier(MEGABYTE), None, disk)
        cache.adopt(SPACE)
        await put(disk, entry(1))
        assert await cache.lookup(entry(1).key, DIGEST, shared=True) is not None
        cache.measure()
        assert told.get() == cache.memory.bytes > 0
        cache.adopt(OTHER_SPACE)
        cache.measure()
        assert told.get() == 0

    over("disk", tmp_path, check)


def test_only_the_tiers_that_are_named_are_asked_and_filled(tmp_path: Path) -> None:
    async def run() -> None:
        async with opened("redis", tmp_path) as redis, opened("disk", tmp_path) as disk:
            cache = Cache(MemoryTier(MEGABYTE), redis, disk)
            cache.adopt(SPACE)
            one, two = entry(1), entry(2)
            await put(redis, one)
            for tiers in ((), ("disk",)):
                assert await cache.lookup_shared([one.key], DIGEST, tiers=tiers) == {}
            assert await cache.lookup_shared([one.key], DIGEST, tiers=("redis",)) == {one.key: (one, "redis")}
            cache.fill(two, shared=True, tiers=("disk",))
            await cache.settle()
            assert await get(redis, two) is None and await get(disk, two) == two
            # What Redis had was not promoted past a tier that was not asked.
            assert await get(disk, one) is None

    asyncio.run(run())


@pytest.mark.parametrize("kind", ["redis", "disk"])
def test_a_tier_that_nobody_asks_is_probed(kind: str, tmp_path: Path) -> None:
    async def check(tier: SharedTier) -> None:
        cache = Cache(MemoryTier(MEGABYTE), *((tier, None) if kind == "redis" else (None, tier)))
        for _ in range(50):
            cache.tend()
            await asyncio.sleep(0.02)
        first = tier.cost.lookups
        assert FIRST_LOOKUPS <= first <= FIRST_LOOKUPS + 1 and 0 < cache.lookup_s()[kind] < 0.05
        for _ in range(60):
            cache.tend()
            await asyncio.sleep(0.02)
        assert first < tier.cost.lookups <= first + 2

    over(kind, tmp_path, check)


def test_redis_forgets_when_nothing_may_use_it_any_more(tmp_path: Path) -> None:
    async def run() -> None:
        async with opened("redis", tmp_path) as tier:
            now = time.time_ns() // 1_000_000
            brief = entry(1, fresh_until_ms=now + 100, stale_until_ms=now + 200, error_until_ms=now + 300)
            await put(tier, brief, entry(2, fresh_until_ms=now, stale_until_ms=now, error_until_ms=now))
            assert await get(tier, brief) == brief and await get(tier, entry(2)) is None
            await asyncio.sleep(0.35)
            assert await get(tier, brief) is None

    asyncio.run(run())


def test_the_disk_is_bounded_and_what_is_asked_for_stays(tmp_path: Path) -> None:
    limit = 8 * MEGABYTE

    async def run() -> None:
        tier = DiskTier(tmp_path, limit)
        wanted = entry(1, size=20_000)
        await put(tier, wanted)
        for start in range(1_000, 3_000, 50):
            await put(tier, *(entry(n, size=20_000) for n in range(start, start + 50)))
            assert await get(tier, wanted) == wanted
            await tier.settle()
        report = await tier.check()
        assert report.generations == GENERATIONS and report.broken == 0 and report.entries > 100
        assert report.bytes <= limit
        assert await get(tier, entry(1_000)) is None
        await tier.close()

    asyncio.run(run())
    assert sum(f.stat().st_size for f in tmp_path.glob("g-*/data.mdb")) <= limit + GENERATIONS * 4096


def test_the_disk_is_warm_after_a_stop_and_after_a_kill(tmp_path: Path) -> None:
    one = entry(1)

    async def read() -> Entry | None:
        tier = DiskTier(tmp_path, MEGABYTE)
        found = await get(tier, one)
        await tier.close()
        return found

    async def write() -> None:
        tier = DiskTier(tmp_path, MEGABYTE)
        tier.offer(one, SPACE)
        await tier.close()

    asyncio.run(write())
    assert asyncio.run(read()) == one
    # Killed with the files open: the page cache still has what was committed.
    program = (
        "import sys, pathlib, time; from edge_node.caching.disk_generations import Generations;"
        "files = Generations(pathlib.Path(sys.argv[1]), 2**20); files.put_many([(b'k', b'v')]);"
        "print('written', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"written\n"
        # While it lives, the directory is its own.
        with pytest.raises(Conflict):
            Generations(tmp_path, MEGABYTE)
        assert asyncio.run(read()) is None
        child.send_signal(signal.SIGKILL)
    assert asyncio.run(read()) == one


def test_what_a_power_cut_may_have_torn_is_not_read(tmp_path: Path) -> None:
    files = Generations(tmp_path, MEGABYTE)
    files.put_many([(b"k", b"v")])
    files.close()
    (tmp_path / "state").write_text("another boot")
    files = Generations(tmp_path, MEGABYTE)
    assert files.get(b"k") is None
    files.close()


def _truncate(data: Path) -> None:
    os.truncate(data, data.stat().st_size // 2)


def _garble(data: Path) -> None:
    data.write_bytes(os.urandom(data.stat().st_size))


@pytest.mark.parametrize("harm", [_truncate, _garble, Path.unlink, lambda data: data.write_bytes(b"")])
def test_a_harmed_file_costs_its_generation_and_no_more(harm: Callable[[Path], None], tmp_path: Path) -> None:
    def frames(start: int) -> list[tuple[bytes, bytes]]:
        return [(one.key, pack(one, SPACE)) for one in (entry(n, size=20_000) for n in range(start, start + 40))]

    files = Generations(tmp_path, 4 * MEGABYTE)
    for start in (0, 40):
        files.put_many(frames(start))
    files.close()
    old, young = sorted(tmp_path.glob("g-*/data.mdb"))
    harm(young)
    files = Generations(tmp_path, 4 * MEGABYTE)
    assert files.get((1).to_bytes(16, "big")) is not None and files.get((41).to_bytes(16, "big")) is None
    assert files.put_many(frames(80)) == 40 and files.get((81).to_bytes(16, "big")) is not None
    assert old.exists()
    files.close()


def test_a_broken_frame_on_disk_is_a_miss_and_goes(tmp_path: Path) -> None:
    one = entry(1)
    at = SPACE.encode() + b":" + one.key
    files = Generations(tmp_path, MEGABYTE)
    files.put_many([(at, pack(msgspec.structs.replace(one, as_of=99), SPACE)[:-1])])
    assert files.check().broken == 1
    files.close()

    async def run() -> None:
        tier = DiskTier(tmp_path, MEGABYTE)
        assert await get(tier, one) is None
        # It claimed a higher position; it must not keep the good one out.
        await put(tier, one)
        assert await get(tier, one) == one and (await tier.check()).broken == 0
        await tier.close()

    asyncio.run(run())


def test_a_disk_that_cannot_be_used_costs_nothing_but_misses(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")

    async def run() -> None:
        tier = DiskTier(blocked, MEGABYTE)
        assert await get(tier, entry(1)) is None and not tier.answers
        tier.offer(entry(1), SPACE)
        await tier.settle()
        await tier.close()
        assert await get(tier, entry(1)) is None

    asyncio.run(run())


def test_a_full_queue_drops_instead_of_growing(tmp_path: Path) -> None:
    async def run() -> None:
        tier = DiskTier(tmp_path, 1024 * MEGABYTE)
        for n in range(5_000):
            tier.offer(entry(n), SPACE)
        await tier.settle()
        assert 500 < (await tier.check()).entries <= 1_024
        await tier.close()

    asyncio.run(run())


def test_the_cache_asks_nearest_first_and_promotes_with_as_of(tmp_path: Path) -> None:
    async def run() -> None:
        async with opened("redis", tmp_path) as redis, opened("disk", tmp_path) as disk:
            first = Cache(MemoryTier(MEGABYTE), redis, disk)
            first.adopt(SPACE)
            one, two = entry(1, as_of=5), entry(2, as_of=5)
            first.fill(one, shared=True)
            assert await first.lookup(one.key, DIGEST, shared=True) == (one, "memory")
            first.fill(two, shared=False)
            await first.settle()
            # Another worker of the region: what was filled as shared, and that only.
            second = Cache(MemoryTier(MEGABYTE), redis, disk)
            second.adopt(SPACE)
            assert await second.lookup(one.key, DIGEST, shared=False) is None
            assert await second.lookup(one.key, DIGEST, shared=True) == (one, "redis")
            assert second.peek(one.key, DIGEST) == one
            assert await second.lookup(two.key, DIGEST, shared=True) is None
            # Only the disk has it: up it goes to Redis and memory, as of what it was.
            three = entry(3, as_of=4)
            await put(disk, three)
            assert await second.lookup(three.key, DIGEST, shared=True) == (three, "disk")
            await second.settle()
            assert second.peek(three.key, DIGEST) == three and await get(redis, three) == three
            # An entry that may not answer is passed over for one further out that may.
            late = msgspec.structs.replace(three, as_of=9)
            await put(disk, late)
            found = await second.lookup(three.key, DIGEST, shared=True, accept=lambda e: e.as_of > 8)
            assert found == (late, "disk") and second.peek(three.key, DIGEST) == late
            # Many keys at once, each from where it is.
            third = Cache(MemoryTier(MEGABYTE), redis, disk)
            third.adopt(SPACE)
            await put(disk, entry(4))
            many = await third.lookup_shared([n.to_bytes(16, "big") for n in (1, 4, 5)], DIGEST)
            assert {int.from_bytes(key, "big"): tier for key, (_, tier) in many.items()} == {1: "redis", 4: "disk"}
            # Another log: nothing of the old one is found again, and no log at all means memory only.
            for namespace in (OTHER_SPACE, ""):
                third.adopt(namespace)
                assert await third.lookup(one.key, DIGEST, shared=True) is None
            assert third.standing() == {"redis": True, "disk": True}

    asyncio.run(run())
