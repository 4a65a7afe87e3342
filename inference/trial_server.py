"""The warm process that trials are forked from: `python -m inference.trial_server`, with a socket as its standard
input.

Laws:
- One thread, always: a fork of a process with threads may leave a lock held for ever. It checks that before it is
  ready.
- It never reads an artifact. It opens its files by name, forks, and waits for a report or a death.
- Every child ends: by itself, by its limits, by its wall-clock deadline, by a cancel, or with the server.
- End of input is the order to stop, so the server never outlives the process that asked.
- It sits in a folder that it removed, and so do its children.
- It and its children give way to what serves: a release waits for a prediction, never the other way round.

It must not know releases, or what a verdict leads to.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import selectors
import signal
import socket
import stat
import sys
import tempfile
import time
from pathlib import Path

import msgspec
from onnx import TensorProto, helper

from inference import trial_child
from inference.onnx_model import OnnxModel
from inference.trial_report import (
    MAX_FRAME,
    REPORT,
    TO_SERVER,
    TrialCancel,
    TrialDone,
    TrialReady,
    TrialReport,
    TrialRequest,
    frame,
    take_frame,
)
from processes.priority import lower_priority
from schemas.errors import ModelRefused

_CHUNK = 65536
# A tenth of a core beside a process that wants it all; at 19 a trial may not end before its deadline there.
_NICENESS = 10


class _Child:
    __slots__ = ("ends_at", "overdue", "pid", "pipe", "report", "request", "started")

    def __init__(self, pid: int, pipe: int, request: TrialRequest, started: float) -> None:
        self.pid = pid
        self.pipe = pipe
        self.request = request
        self.report = bytearray()
        self.started = started
        self.ends_at = started + request.limits.wall_s
        self.overdue = False


class TrialServer:
    def __init__(self, client: socket.socket) -> None:
        self._client = client
        self._received = bytearray()
        self._children: dict[int, _Child] = {}  # by request id
        self._selector = selectors.DefaultSelector()
        self._selector.register(client, selectors.EVENT_READ, None)
        self._null = os.open(os.devnull, os.O_RDWR)
        self._pid = os.getpid()

    def serve(self) -> None:
        self._send(TrialReady(self._pid))
        try:
            while True:
                ends = [child.ends_at for child in self._children.values() if not child.overdue]
                wait = max(0.0, min(ends) - time.monotonic()) if ends else None
                for key, _ in self._selector.select(wait):
                    if key.data is None:
                        if not self._receive():
                            return
                        continue
                    child: _Child = key.data
                    # A cancel in the same round may have taken it away.
                    if self._children.get(child.request.id) is child:
                        self._collect(child)
                self._kill_overdue()
        finally:
            for child in self._children.values():
                os.kill(child.pid, signal.SIGKILL)
                os.waitpid(child.pid, 0)

    def _receive(self) -> bool:
        data = self._client.recv(_CHUNK)
        if not data:
            return False
        self._received += data
        while (body := take_frame(self._received)) is not None:
            message = TO_SERVER.decode(body)
            if isinstance(message, TrialRequest):
                self._start(message)
            else:
                self._cancel(message)
        return True

    def _start(self, request: TrialRequest) -> None:
        with contextlib.ExitStack() as files:
            try:
                model = _open(request.path, "the file")
                files.callback(os.close, model)
                golden = None
                if request.golden_path is not None:
                    golden = _open(request.golden_path, "the golden file")
                    files.callback(os.close, golden)
                weights = []
                for file in request.files:
                    weights.append(_open(file.path, f"the file {file.name}"))
                    files.callback(os.close, weights[-1])
            except ModelRefused as refused:
                self._send(TrialDone(request.id, TrialReport(False, refused.reason)))
                return
            read, write = os.pipe()
            files.callback(os.close, write)
            started = time.monotonic()
            pid = os.fork()
            if pid == 0:
                trial_child.live(request, model, golden, weights, write, self._null, self._pid)
        child = _Child(pid, read, request, started)
        self._children[request.id] = child
        self._selector.register(read, selectors.EVENT_READ, child)

    def _cancel(self, message: TrialCancel) -> None:
        child = self._children.get(message.id)
        if child is not None:
            self._reap(child)

    def _collect(self, child: _Child) -> None:
        data = os.read(child.pipe, _CHUNK)
        child.report += data
        if data and len(child.report) <= MAX_FRAME:
            return
        # The pipe ends when the child does, or when it closed it: the kill meets only one that meant to live on.
        status = self._reap(child)
        report = _verdict(child, status)
        report = msgspec.structs.replace(report, trial_ms=(time.monotonic() - child.started) * 1e3)
        self._send(TrialDone(child.request.id, report))

    def _kill_overdue(self) -> None:
        now = time.monotonic()
        for child in self._children.values():
            if now >= child.ends_at and not child.overdue:
                child.overdue = True
                os.kill(child.pid, signal.SIGKILL)

    def _reap(self, child: _Child) -> int:
        self._selector.unregister(child.pipe)
        os.close(child.pipe)
        del self._children[child.request.id]
        os.kill(child.pid, signal.SIGKILL)
        return os.waitpid(child.pid, 0)[1]

    def _send(self, message: TrialReady | TrialDone) -> None:
        self._client.sendall(frame(message))


def _verdict(child: _Child, status: int) -> TrialReport:
    if child.report:
        try:
            return REPORT.decode(child.report)
        except msgspec.DecodeError:
            return TrialReport(False, "the trial ended within its report")
    limits = child.request.limits
    if child.overdue:
        return TrialReport(False, f"the trial took longer than {limits.wall_s:g} s")
    if not os.WIFSIGNALED(status):
        return TrialReport(False, f"the trial ended without a report (exit status {os.waitstatus_to_exitcode(status)})")
    number = os.WTERMSIG(status)
    if number == signal.SIGXCPU:
        return TrialReport(False, f"it used more than {limits.cpu_s:g} s of CPU time")
    return TrialReport(False, f"it crashed the trial ({signal.Signals(number).name})")


def _open(path: str, what: str) -> int:
    try:
        # Without O_NONBLOCK a named pipe in the file's place would stop the server.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ModelRefused(f"{what} cannot be opened: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ModelRefused(f"{what} is not a regular file")
    return fd


def _warm_up() -> None:
    """Load and run something once, so that a child inherits what the first session of a process sets up (7 ms)."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N"])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "warm_up", [x], [y])
    opset = helper.make_opsetid("", 17)
    data: bytes = helper.make_model(graph, opset_imports=[opset], ir_version=9).SerializeToString()
    model = OnnxModel.from_bytes(data, hashlib.sha256(data).hexdigest())
    # Without a deadline: that would start the watchdog's thread.
    model.run(model.zeros())
    model.close()


def _threads() -> int:
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.exists() else 1


def main() -> int:
    # An interrupt at the terminal reaches the whole group; who asked for the trials decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lower_priority(_NICENESS)
    client = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1):
        os.dup2(null, fd)
    os.close(null)
    folder = tempfile.mkdtemp(prefix="mlcdn-trial-")
    os.chdir(folder)
    os.rmdir(folder)
    _warm_up()
    if _threads() != 1:
        sys.stderr.write(f"trial server: {_threads()} threads before the first fork, so forking is not safe\n")
        return 70
    # What is frozen is not touched by a child's collector, and stays shared.
    gc.collect()
    gc.freeze()
    # The client may vanish between two frames: that ends the server like an end of input.
    with client, contextlib.suppress(ConnectionError):
        TrialServer(client).serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
