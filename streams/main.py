"""The parent of the stream jobs: each is a child, restarted when it dies, stopped with it.

    python -m streams.main

A job is a process of its own because Faust's flow control is of a whole app: one slow job would stall the others.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Final

from processes import logs
from processes.signals import stop_on_signals
from processes.supervisor import Child, Supervisor
from schemas.errors import SettingsInvalid
from schemas.settings import Settings, load

ROUTING: Final = "routing"
# They sign what they append, so they run where there is a key.
SIGNERS: Final = ("checkpoints", "rollouts")


def children(settings: Settings) -> list[Child]:
    return [
        Child(
            name=job,
            argv=(sys.executable, "-m", f"streams.jobs.{job}"),
            stop_timeout_s=12,
            max_restarts=20,
        )
        for job in ((ROUTING,) if settings.signing_key is None else (ROUTING, *SIGNERS))
    ]


async def run(settings: Settings) -> None:
    async with stop_on_signals() as stop, Supervisor() as supervisor:
        await supervisor.start(children(settings))
        await supervisor.run_until(stop)


def main() -> None:
    try:
        settings = load()
    except SettingsInvalid as error:
        raise SystemExit(str(error)) from None
    logs.configure(settings.log_level)
    asyncio.run(run(settings))


if __name__ == "__main__":
    main()
