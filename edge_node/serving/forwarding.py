"""Computations that the origin does for this node: what `Engine` is to a model in memory.

Laws: one task a computation, each ends by the ask's deadline; an answer of the origin's is checked to be one before it
counts. It must not know caches, flights or HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import structlog

from edge_node.serving.batches import Ask
from edge_node.serving.origin_client import OriginClient
from inference.onnx_model import RunFailed
from schemas.errors import DeadlineExceeded, MlcdnError, NotReady, Unreachable

ASK_S: Final = 2.0

log = structlog.get_logger()


class Forwarding:
    def __init__(self, origin: OriginClient | None) -> None:
        self.origin = origin
        self._tasks: set[asyncio.Task[None]] = set()

    def submit(self, ask: Ask, land: Callable[[bytes | MlcdnError], None]) -> None:
        if self.origin is None:
            land(Unreachable("origin", "nowhere", "no origin is configured"))
            return
        task = asyncio.get_running_loop().create_task(self._forward(self.origin, ask, land))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def ready(self, model: str, digest: str) -> bool:
        """Whether a release could be forwarded; True where there is nobody to ask."""
        return self.origin is None or await self.origin.offers(model, digest, ASK_S)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _forward(self, origin: OriginClient, ask: Ask, land: Callable[[bytes | MlcdnError], None]) -> None:
        served = ask.served
        outcome: bytes | MlcdnError = NotReady("the worker stops")
        try:
            with served.held():
                async with asyncio.timeout(max(0.0, ask.deadline.remaining())):
                    outcome = await origin.infer(
                        served.name,
                        served.digest,
                        ask.inputs,
                        served.inputs,
                        ask.outputs,
                        ask.deadline,
                        ask.controls.traceparent,
                    )
        except TimeoutError:
            outcome = DeadlineExceeded("no answer before the deadline")
        except MlcdnError as error:
            outcome = error
        except Exception:
            log.exception("forwarding_broke", model=served.name)
            outcome = RunFailed("internal error")
        finally:
            land(outcome)
