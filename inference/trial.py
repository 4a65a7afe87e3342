"""Trials of new artifacts, for who decides about them: an asyncio client of one warm server, and a call for a single
trial.

Laws:
- A refused artifact is a report. An error means that no verdict could be had, and that asking again may help.
- At most `concurrency` trials run at once; others wait their turn. A trial that is cancelled ends its child.
- A server that dies is replaced; a trial it had accepted is asked once more, then given up.
- The server gets an environment without the caller's: no key or password stands in it.

It must not know sessions, onnxruntime or releases.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Final, Self

import msgspec

from inference import golden
from inference.external_data import DataFile
from inference.trial_report import (
    FROM_SERVER,
    MAX_FRAME,
    TrialCancel,
    TrialDone,
    TrialLimits,
    TrialReady,
    TrialReport,
    TrialRequest,
    TrialUnavailable,
    frame,
    take_frame,
)

__all__ = ["TrialLimits", "TrialReport", "TrialRunner", "TrialUnavailable", "run_trial"]

_START_S: Final = 30.0
_STOP_S: Final = 5.0
# Beyond a trial's own wall-clock limit, which the server keeps: after this the server itself is taken for hung.
_GRACE_S: Final = 10.0
_COMMAND: Final = (sys.executable, "-P", "-m", "inference.trial_server")
_KEPT: Final = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR", "TZ", "PYTHONPATH")
_DEFAULT: Final = TrialLimits()


class TrialRunner:
    """`async with TrialRunner() as trials: report = await trials.trial(path, sha256)`; or `start` and `close`."""

    def __init__(self, concurrency: int = 2) -> None:
        self._turns = asyncio.Semaphore(concurrency)
        self._ids = itertools.count(1)
        self._server: _Server | None = None
        self._starting = asyncio.Lock()
        self._closed = False

    async def start(self) -> None:
        """Start the server now, so that the first trial does not wait for it."""
        await self._live_server()

    async def trial(
        self,
        path: Path,
        sha256: str,
        golden_path: Path | None = None,
        rtol: float = golden.RTOL,
        atol: float = golden.ATOL,
        limits: TrialLimits = _DEFAULT,
        files: tuple[DataFile, ...] = (),
    ) -> TrialReport:
        async with self._turns:
            request = _request(next(self._ids), path, sha256, golden_path, rtol, atol, limits, files)
            try:
                return await (await self._live_server()).ask(request)
            except TrialUnavailable:
                if self._closed:
                    raise
                return await (await self._live_server()).ask(request)

    async def close(self) -> None:
        self._closed = True
        async with self._starting:
            if self._server is not None:
                await self._server.stop()
                self._server = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def server_pid(self) -> int | None:
        return self._server.process.pid if self._server is not None and self._server.alive else None

    async def _live_server(self) -> _Server:
        async with self._starting:
            if self._closed:
                raise TrialUnavailable("trials are closed")
            if self._server is None or not self._server.alive:
                if self._server is not None:
                    await self._server.stop()
                self._server = await _Server.start()
            return self._server


class _Server:
    """One server process and the conversation with it."""

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.process = process
        self.alive = True
        self._reader = reader
        self._writer = writer
        self._waiting: dict[int, asyncio.Future[TrialReport]] = {}
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._listening = asyncio.create_task(self._listen())

    @classmethod
    async def start(cls) -> _Server:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    *_COMMAND, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, env=environment()
                )
            except OSError as error:
                ours.close()
                raise TrialUnavailable(f"the trial server cannot be started: {error.strerror}") from error
        server = cls(process, *await asyncio.open_connection(sock=ours))
        try:
            await asyncio.wait_for(asyncio.shield(server._ready), _START_S)
        except BaseException as error:
            await server.stop()
            if isinstance(error, TimeoutError):
                raise TrialUnavailable(f"the trial server was not ready in {_START_S:g} s") from error
            raise
        return server

    async def ask(self, request: TrialRequest) -> TrialReport:
        if not self.alive:
            raise TrialUnavailable("the trial server died")
        answer: asyncio.Future[TrialReport] = asyncio.get_running_loop().create_future()
        self._waiting[request.id] = answer
        try:
            self._writer.write(frame(request))
            return await asyncio.wait_for(answer, request.limits.wall_s + _GRACE_S)
        except TimeoutError as error:
            # Its death ends the other trials too: they are asked again of the next one.
            self.process.kill()
            raise TrialUnavailable("the trial server hangs") from error
        except asyncio.CancelledError:
            if self.alive:
                self._writer.write(frame(TrialCancel(request.id)))
            raise
        finally:
            self._waiting.pop(request.id, None)

    async def stop(self) -> None:
        """Closing the socket is the order; a server that does not follow is killed."""
        self.alive = False
        self._writer.close()
        try:
            await asyncio.wait_for(self.process.wait(), _STOP_S)
        except TimeoutError:
            self.process.kill()
            await self.process.wait()
        await self._listening
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()

    async def _listen(self) -> None:
        buffer = bytearray()
        try:
            while data := await self._reader.read(65536):
                buffer += data
                while (body := take_frame(buffer)) is not None:
                    self._hear(FROM_SERVER.decode(body))
        except ConnectionError:
            pass  # as an end of input: below
        finally:
            self.alive = False
            gone = TrialUnavailable("the trial server died")
            for answer in self._waiting.values():
                if not answer.done():
                    answer.set_exception(gone)
            if not self._ready.done():
                self._ready.set_exception(gone)
                self._ready.exception()  # seen: whoever waited may have given up

    def _hear(self, message: TrialReady | TrialDone) -> None:
        if isinstance(message, TrialReady):
            self._ready.set_result(None)
        elif (answer := self._waiting.get(message.id)) is not None and not answer.done():
            answer.set_result(message.report)


def run_trial(
    path: Path,
    sha256: str,
    golden_path: Path | None = None,
    rtol: float = golden.RTOL,
    atol: float = golden.ATOL,
    limits: TrialLimits = _DEFAULT,
    files: tuple[DataFile, ...] = (),
) -> TrialReport:
    """One trial with a server of its own, for a command that needs no more. Blocks, for 0.2 s and the trial."""
    request = _request(1, path, sha256, golden_path, rtol, atol, limits, files)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        try:
            process = subprocess.Popen(_COMMAND, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, env=environment())
        except OSError as error:
            raise TrialUnavailable(f"the trial server cannot be started: {error.strerror}") from error
        theirs.close()
        try:
            ours.settimeout(_START_S + request.limits.wall_s + _GRACE_S)
            ours.sendall(frame(request))
            return _hear_report(ours)
        except (TimeoutError, ConnectionError) as error:
            raise TrialUnavailable("the trial server does not answer") from error
        finally:
            ours.close()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _hear_report(server: socket.socket) -> TrialReport:
    buffer = bytearray()
    while data := server.recv(MAX_FRAME):
        buffer += data
        while (body := take_frame(buffer)) is not None:
            message = FROM_SERVER.decode(body)
            if isinstance(message, TrialDone):
                return message.report
    raise TrialUnavailable("the trial server died")


def _request(
    number: int,
    path: Path,
    sha256: str,
    golden_path: Path | None,
    rtol: float,
    atol: float,
    limits: TrialLimits,
    files: tuple[DataFile, ...],
) -> TrialRequest:
    # The server sits in a folder of its own.
    absolute = str(golden_path.absolute()) if golden_path is not None else None
    found = tuple(msgspec.structs.replace(file, path=str(Path(file.path).absolute())) for file in files)
    return TrialRequest(number, str(path.absolute()), sha256, limits.beside(files), absolute, rtol, atol, found)


def environment() -> dict[str, str]:
    """What a process that runs somebody's model may know of its caller's."""
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    # The server must find this package also where it is not installed, and nothing in the working directory (-P).
    package = str(Path(__file__).resolve().parent.parent)
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, (package, kept.get("PYTHONPATH"))))
    # A library's own threads would make a fork unsafe, and a child's memory is counted by its address space, of which
    # each further malloc arena reserves 64 MiB.
    for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "MALLOC_ARENA_MAX"):
        kept[variable] = "1"
    return kept
