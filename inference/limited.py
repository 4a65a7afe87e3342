"""Answers of a model that is not trusted yet: one limited child asked again and again, as a trial's is once.

    with LimitedModel(path, sha256) as model: packed = model.ask(inputs, outputs)

Laws:
- The artifact is loaded and run nowhere but in the child: what it does to a process it does to that one. What comes back
  is bytes, and is taken for whatever a stranger sent.
- An input that the model refuses, or breaks on, is an answer (`Refused`). A child that dies, is silent for longer than a
  run may take, or cannot load the model ends the whole (ModelRefused), and no other is started.
- One thread, one row at a time: the same questions get the same answers.

It must not know releases, recordings or what is made of an answer.
"""

from __future__ import annotations

import contextlib
import selectors
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec

from inference.external_data import DataFile
from inference.packed import Output
from inference.trial import environment
from inference.trial_report import SLOWEST_BYTES_S, TrialLimits
from schemas.errors import ModelRefused

MAX_FRAME: Final = 64 * 2**20
LENGTH: Final = struct.Struct(">I")
_LOAD_S: Final = 60.0
_GRACE_S: Final = 5.0
_STOP_S: Final = 5.0
_CHUNK: Final = 2**20
_COMMAND: Final = (sys.executable, "-P", "-m", "inference.limited_child")


class Question(msgspec.Struct, frozen=True, array_like=True):
    inputs: list[Output]
    outputs: list[str]


class Reply(msgspec.Struct, frozen=True, array_like=True):
    """`packed` are the outputs, as caches keep them; with a `reason` there are none."""

    packed: bytes = b""
    reason: str = ""


class Refused(msgspec.Struct, frozen=True):
    """Why the model did not answer one question."""

    reason: str


_REPLY: Final = msgspec.msgpack.Decoder(Reply)
_encode: Final = msgspec.msgpack.Encoder().encode


class LimitedModel:
    """Synchronous; one thread owns it."""

    def __init__(
        self, path: Path, sha256: str, limits: TrialLimits | None = None, files: tuple[DataFile, ...] = ()
    ) -> None:
        self._limits = (limits or TrialLimits(cpu_s=3_600)).beside(files)
        self._load_s = _LOAD_S + 2 * sum(file.size_bytes for file in files) / SLOWEST_BYTES_S
        # The child sits in a folder of its own.
        listed = [msgspec.structs.replace(file, path=str(Path(file.path).absolute())) for file in files]
        said = (msgspec.json.encode(words).decode() for words in (self._limits, listed))
        self._argv = [*_COMMAND, str(path.absolute()), sha256, *said]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment(),
            bufsize=0,
        )
        try:
            loaded = self._hear(self._load_s)
            if loaded.reason:
                raise ModelRefused(loaded.reason)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end()

    @property
    def pid(self) -> int:
        """The child's."""
        assert self._process is not None
        return self._process.pid

    def ask(self, inputs: Sequence[Output], outputs: Sequence[str]) -> bytes | Refused:
        """The packed outputs of those names, as a stranger sent them."""
        body = _encode(Question(list(inputs), list(outputs)))
        try:
            self._say(LENGTH.pack(len(body)) + body)
        except OSError:
            raise ModelRefused(self._death()) from None
        reply = self._hear(self._limits.run_s + _GRACE_S)
        return Refused(reply.reason) if reply.reason else reply.packed

    def _say(self, data: bytes) -> None:
        assert self._process is not None and self._process.stdin is not None
        view = memoryview(data)
        # The child reads a question whole before it runs anything, so this ends.
        while view:
            view = view[self._process.stdin.write(view) :]

    def _hear(self, seconds: float) -> Reply:
        assert self._process is not None and self._process.stdout is not None
        until, pipe, buffer = time.monotonic() + seconds, self._process.stdout, bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while True:
                if len(buffer) >= LENGTH.size:
                    (length,) = LENGTH.unpack_from(buffer)
                    if length > MAX_FRAME:
                        raise ModelRefused(f"it answered with {length} bytes, more than {MAX_FRAME}")
                    if len(buffer) >= LENGTH.size + length:
                        try:
                            return _REPLY.decode(memoryview(buffer)[LENGTH.size : LENGTH.size + length])
                        except msgspec.MsgspecError:
                            raise ModelRefused("it answered with what is no answer") from None
                if not selector.select(max(0.0, until - time.monotonic())):
                    raise ModelRefused(f"it did not answer within {seconds:g} s")
                data = pipe.read(_CHUNK)
                if not data:
                    raise ModelRefused(self._death())
                buffer += data

    def _death(self) -> str:
        assert self._process is not None
        try:
            status = self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            return "it closed its end while it was asked"
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        return f"it ended while it was asked ({how})"

    def _end(self) -> None:
        if (process := self._process) is None:
            return
        self._process = None
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
