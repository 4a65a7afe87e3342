"""The region's Redis or Valkey as a tier.

Laws:
- It never raises and never makes a request wait longer than `timeout_s`: one time-out around all of a round trip.
- The first error opens the breaker. From then on a look-up costs nothing; only a PING in the background, over a
  connection of its own, closes it. The connections of before are thrown away, and late replies with them.
- Values are bytes from a stranger: no more than the cap is read of any, and what is not the entry asked for is removed.
- The store decides on `as_of`, in a script, because nodes that share it lag differently.

It must not know whether an entry may answer, or what is said to the server (redis_commands.py). One event loop owns it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Final

import structlog
from redis.asyncio import Redis
from redis.exceptions import InvalidResponse, ResponseError

from edge_node.caching.entry import Entry, EntryRefused, pack, unpack
from edge_node.caching.redis_commands import LOOK_UP, SET_UNLESS_NEWER, address, connect, discard, reason_of
from edge_node.caching.tallies import dropped, missed
from edge_node.caching.tier_choice import LookupCost
from schemas.errors import SettingsInvalid
from schemas.metrics import gauge

# What a hung server adds to a request, 50 ms at most, has the loop's own turns in it: 52 were seen with 0.05.
TIMEOUT_S: Final = 0.045
MAX_VALUE_BYTES: Final = 2**20
PROBED: Final = "mlcdn:probe"
PING_EVERY_S: Final = 0.25
MAX_ASKING: Final = 64
# Of one look-up: 1,000 took 10 ms of the loop, and 6,000 the whole time-out, which opened the breaker of a sound server.
MAX_KEYS: Final = 1_024
MAX_QUEUED: Final = 1_024
MAX_QUEUED_BYTES: Final = 16 * 2**20
BATCH: Final = 64
BATCH_BYTES: Final = 256 * 2**10
LAST_WRITES_S: Final = 0.3

# Of one look-up's values together: that many strangers' bytes must not gather in the server, nor here.
MAX_REPLY_BYTES: Final = 2**24

log = structlog.get_logger()


class RedisTier:
    name: Final = "redis"

    def __init__(self, url: str, *, timeout_s: float = TIMEOUT_S, max_value_bytes: int = MAX_VALUE_BYTES) -> None:
        self._url, self._timeout_s, self._max_value_bytes = url, timeout_s, max_value_bytes
        try:
            self._client = connect(self._url, self._timeout_s, 2 * MAX_ASKING)
        except ValueError:
            # Not the URL itself: it may hold a password.
            raise SettingsInvalid("redis_url is not a redis://, rediss:// or unix:// URL") from None
        # Run over whichever client there is; loaded again where a server has forgotten them.
        self._look_up = self._client.register_script(LOOK_UP)
        self._set_unless_newer = self._client.register_script(SET_UNLESS_NEWER)
        self.cost = LookupCost()
        self._healing: asyncio.Task[None] | None = None
        self._writing: asyncio.Task[None] | None = None
        self._queue: dict[tuple[str, bytes], Entry] = {}
        self._queued_bytes = 0
        self._asking = 0
        gauge("mlcdn_breaker_open").labels(self.name).set(0)

    @property
    def answers(self) -> bool:
        return self._healing is None

    async def get_many(self, keys: Sequence[bytes], digest: str, namespace: str) -> dict[bytes, Entry]:
        if not self.answers or self._asking >= MAX_ASKING:
            missed(self.name, "busy" if self.answers else "breaker", len(keys))
            return {}
        if len(keys) > MAX_KEYS:
            missed(self.name, "too_many", len(keys) - MAX_KEYS)
            keys = keys[:MAX_KEYS]
        client = self._client
        until = asyncio.get_running_loop().time() + self._timeout_s
        replies = await self._ask(client, [address(namespace, key) for key in keys], until)
        found: dict[bytes, Entry] = {}
        wrong: list[str] = []
        for key, reply in zip(keys, replies, strict=True) if replies else ():
            try:
                found[key] = self._read(reply, key, digest, namespace)
            except EntryRefused as refused:
                missed(self.name, refused.reason)
                if refused.reason not in ("absent", "store_error", "no_room"):
                    wrong.append(address(namespace, key))
        if wrong:
            await self._remove(client, wrong, until)
        return found

    async def probe(self) -> None:
        if self.answers:
            await self._ask(self._client, [PROBED], asyncio.get_running_loop().time() + self._timeout_s)

    def offer(self, entry: Entry, namespace: str) -> None:
        size = len(entry.body)
        if not self.answers:
            dropped(self.name, "breaker")
        elif size > self._max_value_bytes:
            dropped(self.name, "oversize")
        elif len(self._queue) >= MAX_QUEUED or self._queued_bytes + size > MAX_QUEUED_BYTES:
            dropped(self.name, "queue_full")
        else:
            at = (namespace, entry.key)
            queued = self._queue.get(at)
            if queued is None or queued.as_of <= entry.as_of:
                self._queue[at] = entry
                self._queued_bytes += size - (len(queued.body) if queued is not None else 0)
            if self._writing is None:
                self._writing = asyncio.get_running_loop().create_task(self._write())

    async def settle(self) -> None:
        while self._writing is not None:
            await asyncio.wait({self._writing})

    async def close(self) -> None:
        try:
            async with asyncio.timeout(LAST_WRITES_S):
                await self.settle()
        except TimeoutError:
            dropped(self.name, "closed", len(self._queue))
        tasks = [t for t in (self._writing, self._healing) if t is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await discard(self._client)

    async def _ask(self, client: Redis, at: Sequence[str], until: float) -> Sequence[object]:
        """A reply for each, or none at all where the server does not answer, which is counted."""
        self._asking += 1
        began = time.perf_counter()
        try:
            async with asyncio.timeout_at(until):
                replies = await self._look_up(at, (self._max_value_bytes, MAX_REPLY_BYTES), client)
                if not isinstance(replies, list) or len(replies) != len(at):
                    raise InvalidResponse("the reply to something else")
                self.cost.observe(time.perf_counter() - began, len(at))
                return replies
        except ResponseError as error:
            # The server is sound, and refuses: a right is missing, say.
            return [error] * len(at)
        except Exception as error:  # noqa: BLE001 (counted)
            missed(self.name, reason_of(error), len(at))
            self._open(client, error)
            return ()
        finally:
            self._asking -= 1

    def _read(self, reply: object, key: bytes, digest: str, namespace: str) -> Entry:
        if isinstance(reply, ResponseError):
            raise EntryRefused("wrong_type" if str(reply).startswith("WRONGTYPE") else "store_error")
        if not isinstance(reply, bytes):
            raise EntryRefused("no_room" if reply is None else "store_error")
        if not reply:
            raise EntryRefused("absent")
        if len(reply) > self._max_value_bytes:
            raise EntryRefused("oversize")
        return unpack(reply, key=key, digest=digest, namespace=namespace)

    async def _remove(self, client: Redis, at: Sequence[str], until: float) -> None:
        try:
            async with asyncio.timeout_at(until):
                await client.unlink(*at)
        except Exception as error:  # noqa: BLE001 (the breaker says so)
            self._open(client, error)

    async def _write(self) -> None:
        """Ends when the queue is empty; the next offer starts another."""
        try:
            while self._queue:
                client, batch = self._client, self._batch()
                try:
                    async with asyncio.timeout(self._timeout_s):
                        await self._write_batch(client, batch)
                except Exception as error:  # noqa: BLE001 (counted)
                    dropped(self.name, reason_of(error), len(batch) + len(self._queue))
                    self._queue.clear()
                    self._queued_bytes = 0
                    self._open(client, error)
        finally:
            self._writing = None

    def _batch(self) -> list[tuple[str, Entry]]:
        batch: list[tuple[str, Entry]] = []
        size = 0
        while self._queue and len(batch) < BATCH and size < BATCH_BYTES:
            at = next(iter(self._queue))
            entry = self._queue.pop(at)
            size += len(entry.body)
            batch.append((at[0], entry))
        self._queued_bytes -= size
        return batch

    async def _write_batch(self, client: Redis, batch: Sequence[tuple[str, Entry]]) -> None:
        now_ms = time.time_ns() // 1_000_000
        at: list[str] = []
        values: list[bytes | int] = []
        for namespace, entry in batch:
            ttl_ms = entry.last_use_ms - now_ms
            frame = pack(entry, namespace)
            if ttl_ms <= 0 or len(frame) > self._max_value_bytes:
                dropped(self.name, "oversize" if ttl_ms > 0 else "expired")
                continue
            at.append(address(namespace, entry.key))
            values += (frame, ttl_ms)
        if not at:
            return
        try:
            replies = await self._set_unless_newer(at, values, client)
        except ResponseError:
            dropped(self.name, "store_error", len(at))
            return
        for reply in replies:
            if isinstance(reply, Exception):
                dropped(self.name, "store_error")
            elif reply == 0:
                dropped(self.name, "older")

    def _open(self, client: Redis, error: Exception) -> None:
        if self._healing is None and client is self._client:
            log.warning("cache_tier_left_alone", tier=self.name, cause=type(error).__name__)
            gauge("mlcdn_breaker_open").labels(self.name).set(1)
            self._healing = asyncio.get_running_loop().create_task(self._heal())

    async def _heal(self) -> None:
        await discard(self._client)
        while True:
            await asyncio.sleep(PING_EVERY_S)
            client = connect(self._url, self._timeout_s, 2 * MAX_ASKING)
            try:
                async with asyncio.timeout(self._timeout_s):
                    await client.ping()
            except Exception as error:  # noqa: BLE001 (logged)
                log.debug("cache_tier_still_away", tier=self.name, cause=type(error).__name__)
                await discard(client)
            except BaseException:
                await discard(client)
                raise
            else:
                break
        self._client, self._healing = client, None
        gauge("mlcdn_breaker_open").labels(self.name).set(0)
        log.info("cache_tier_back", tier=self.name)
