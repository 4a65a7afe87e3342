"""What is said to a Redis or Valkey: how a connection is made, where an entry lies, and the two scripts.

Laws:
- No retry: redis-py's own defaults waited 4.5 s for a refused server and for a hung one.
- A script costs the server no more than the keys it is given, and reads no more of a value than it is told to.

It must not know queues, breakers or what an entry says.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

import structlog
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from edge_node.caching.entry import FORMAT

# One command for all keys of a look-up: 1.2 us of the loop a key, and 8.6 as a pipeline of GETRANGE. MGET costs as little
# and reads whole values, however long.
LOOK_UP: Final = """
local found, left = {}, tonumber(ARGV[2])
for i, key in ipairs(KEYS) do
  local held = left > 0 and redis.pcall('GETRANGE', key, 0, ARGV[1])
  found[i] = held
  if type(held) == 'string' then left = left - #held end
end
return found
"""
# Byte by byte: the server's string comparison follows its locale. What is no frame of this format is written over.
SET_UNLESS_NEWER: Final = """
local written = {}
for i, key in ipairs(KEYS) do
  local new, keep = ARGV[2 * i - 1], true
  local held = redis.pcall('GETRANGE', key, 0, 15)
  if type(held) == 'string' and #held == 16 and string.sub(held, 1, 5) == string.sub(new, 1, 5) then
    for at = 9, 16 do
      local old, now = string.byte(held, at), string.byte(new, at)
      if old ~= now then
        keep = old < now
        break
      end
    end
  end
  written[i] = keep and redis.pcall('SET', key, new, 'PX', ARGV[2 * i]) or 0
end
return written
"""

log = structlog.get_logger()


def connect(url: str, timeout_s: float, connections: int) -> Redis:
    """A client; it connects when it is first used."""
    return Redis.from_url(
        url,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        retry=Retry(NoBackoff(), 0),
        retry_on_timeout=False,
        health_check_interval=0,
        max_connections=connections,
        protocol=2,
    )


def address(namespace: str, key: bytes) -> str:
    """The name of an entry in the store."""
    return f"mlcdn:{FORMAT}:{namespace}:{key.hex()}"


def reason_of(error: Exception) -> str:
    """`timeout` or `unreachable`, as near as the client library tells them apart."""
    # redis.exceptions.TimeoutError is no builtin TimeoutError.
    return "timeout" if "Timeout" in type(error).__name__ else "unreachable"


async def discard(client: Any) -> None:
    try:
        async with asyncio.timeout(1):
            await client.aclose()
    except Exception as error:  # noqa: BLE001 (logged)
        log.debug("connection_did_not_close", cause=type(error).__name__)
