"""The parent of the stream processors: one child a job, restarted when it dies, stopped when this ends."""

from __future__ import annotations

import asyncio
import sys

from processes import logs
from processes.signals import stop_on_signals
from processes.supervisor import Child, Supervisor
from schemas import settings

JOBS = {"routing": "streams.jobs.routing"}


async def main() -> None:
    logs.configure(settings.load().log_level)
    children = [
        Child(name=name, argv=(sys.executable, "-m", module), max_restarts=1_000, log=None)
        for name, module in JOBS.items()
    ]
    async with stop_on_signals() as stop, Supervisor() as supervisor:
        await supervisor.start(children)
        await supervisor.run_until(stop)


if __name__ == "__main__":
    asyncio.run(main())
